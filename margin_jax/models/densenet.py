"""Densely connected networks (Huang et al. 2017, Table 1: DenseNet-BC)."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common
from margin_jax.models.model import Model
from margin_jax.models.weights import Path, Published

GROWTH = 32
BOTTLENECK = 4
# How many layers each of the four dense blocks has.
BLOCKS = {
  121: (6, 12, 24, 16),
  169: (6, 12, 32, 32),
  201: (6, 12, 48, 32),
}


class DenseLayer(nn.Module):
  """The 32 channels that a layer adds: 1x1 to 128 channels, then 3x3."""

  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.relu(self.norm(name='norm1')(x))
    x = self.conv(BOTTLENECK * GROWTH, (1, 1), name='conv1')(x)
    x = nn.relu(self.norm(name='norm2')(x))
    return self.conv(GROWTH, (3, 3), padding=1, name='conv2')(x)


class Transition(nn.Module):
  """Half of the channels (1x1), half of the side (2x2 average)."""

  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.relu(self.norm(name='norm')(x))
    x = self.conv(x.shape[-1] // 2, (1, 1), name='conv')(x)
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(nn.Module):
  """DenseNet-121, 169 or 201: every layer reads all before it in its block.

  Growth 32, bottlenecks of 4 * 32 channels, compression 0.5.

  Attributes:
    depth: 121, 169 or 201.
    num_classes: C.
    stem: 'imagenet' (7x7 convolution of stride 2, 3x3 max-pooling of stride 2)
      or 'small' (3x3 convolution of stride 1, for 32x32 images).
    dtype: the dtype of the computation; parameters and the head stay float32.
    batch_norm_axis: mapped axis to average BatchNorm statistics over, if any.
  """

  depth: int
  num_classes: int
  stem: str = 'imagenet'
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, 1024 to 1920)."""
    conv = common.make_conv(self)
    norm = common.make_norm(self, train)
    x = common.stem(inputs.astype(self.dtype), self.stem, conv, norm)
    for block, count in enumerate(BLOCKS[self.depth], start=1):
      if block > 1:
        x = Transition(conv, norm, name=f'transition{block - 1}')(x)
      for index in range(1, count + 1):
        new = DenseLayer(conv, norm, name=f'block{block}_layer{index}')(x)
        x = jnp.concatenate([x, new], axis=-1)
    x = nn.relu(norm(name='norm_final')(x))
    return common.classify(x, self.num_classes)


def _published_name(module: Path) -> str:
  """torchvision's name of a module."""
  table = {
    'conv_stem': 'features.conv0',
    'norm_stem': 'features.norm0',
    'norm_final': 'features.norm5',
    'head': 'classifier',
  }
  if len(module) == 1:
    return table[module[0]]
  block = re.sub(r'block(\d+)_layer', r'denseblock\1.denselayer', module[0])
  return f'features.{block}.{module[1]}'


_PUBLISHED = Published(
  name_of=_published_name,
  # The names that old files of torchvision have.
  spellings=((r'(denselayer\d+\.(?:norm|conv))\.(\d)\.', r'\1\2.'),),
)
MODELS = {
  f'densenet{depth}': Model(
    make=functools.partial(DenseNet, depth),
    options=frozenset({'dtype', 'stem'}),
    any_size=True,
    # Three halvings that round down, after two that round up.
    least_side={'imagenet': 29, 'small': 8},
    published=_PUBLISHED,
  )
  for depth in BLOCKS
}
