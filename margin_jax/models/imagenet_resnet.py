"""Residual networks of the ImageNet family (He et al. 2016, Table 1)."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common
from margin_jax.models.model import Model
from margin_jax.models.resnet import Block
from margin_jax.models.weights import Path, Published

# How many blocks each of the four stages has.
STAGES = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
}


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, the last with four times the channels.

  The 3x3 convolution has the stride, as in torchvision; in the paper it is
  the first 1x1, which loses half a percent.
  """

  width: int
  stride: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = self.conv(self.width, (1, 1), name='conv1')(x)
    y = nn.relu(self.norm(name='norm1')(y))
    y = self.conv(self.width, (3, 3), self.stride, padding=1, name='conv2')(y)
    y = nn.relu(self.norm(name='norm2')(y))
    y = self.conv(4 * self.width, (1, 1), name='conv3')(y)
    y = self.norm(name='norm3')(y)
    if x.shape != y.shape:
      x = self.conv(4 * self.width, (1, 1), self.stride, name='conv_proj')(x)
      x = self.norm(name='norm_proj')(x)
    return nn.relu(x + y)


class ImageNetResNet(nn.Module):
  """ResNet-18, 34, 50 or 101: four stages of 64, 128, 256 and 512 channels.

  18 and 34 have blocks of two 3x3 convolutions, 50 and 101 bottlenecks.
  Shortcuts are 1x1 projections where the shape changes.

  Attributes:
    depth: 18, 34, 50 or 101.
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
    """(B, H, W, channels) -> logits (B, C), features (B, 512 or 2048)."""
    conv = common.make_conv(self)
    norm = common.make_norm(self, train)
    x = common.stem(inputs.astype(self.dtype), self.stem, conv, norm)
    for stage, count in enumerate(STAGES[self.depth]):
      for index in range(count):
        options = {
          'width': 64 * 2**stage,
          'stride': 2 if stage and not index else 1,
          'conv': conv,
          'norm': norm,
          'name': f'stage{stage + 1}_block{index + 1}',
        }
        if self.depth < 50:
          block = Block(projection=True, zero_init=False, **options)
        else:
          block = Bottleneck(**options)
        x = block(x)
    return common.classify(x, self.num_classes)


def _published_name(module: Path) -> str:
  """torchvision's name of a module."""
  table = {
    'conv_stem': 'conv1',
    'norm_stem': 'bn1',
    'conv_proj': 'downsample.0',
    'norm_proj': 'downsample.1',
    'head': 'fc',
  }
  *block, leaf = module
  leaf = table.get(leaf, leaf.replace('norm', 'bn'))
  if not block:
    return leaf
  stage, index = re.findall(r'\d+', block[0])
  return f'layer{stage}.{int(index) - 1}.{leaf}'


_PUBLISHED = Published(
  name_of=_published_name,
  spellings=(  # of transformers
    (r'^resnet\.embedder\.embedder\.convolution\.', 'conv1.'),
    (r'^resnet\.embedder\.embedder\.normalization\.', 'bn1.'),
    (r'^resnet\.encoder\.stages\.(\d+)\.layers\.', r'layer+\1.'),
    (r'\.shortcut\.convolution\.', '.downsample.0.'),
    (r'\.shortcut\.normalization\.', '.downsample.1.'),
    (r'\.layer\.(\d)\.convolution\.', r'.conv+\1.'),
    (r'\.layer\.(\d)\.normalization\.', r'.bn+\1.'),
    (r'^classifier\.1\.', 'fc.'),
  ),
)
MODELS = {
  f'imagenet_resnet{depth}': Model(
    make=functools.partial(ImageNetResNet, depth),
    options=frozenset({'dtype', 'stem'}),
    any_size=True,
    least_side={'imagenet': 4, 'small': 4},
    published=_PUBLISHED,
  )
  for depth in STAGES
}
