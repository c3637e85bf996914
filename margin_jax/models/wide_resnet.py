"""Wide residual networks for 32x32 images (Zagoruyko & Komodakis 2016)."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common
from margin_jax.models.model import Family, Model


def parse(name: str) -> tuple[int, int] | None:
  """Parses 'wrn28_10' as (28, 10); None for what is no such name.

  The depth must be 6n + 4, n >= 1: three stages of n blocks with two
  convolutions, three shortcuts, and the first convolution.
  """
  match = re.fullmatch(r'wrn([1-9]\d*)_([1-9]\d*)', name)
  if match is None:
    return None
  depth, width = int(match[1]), int(match[2])
  return (depth, width) if depth >= 10 and depth % 6 == 4 else None


class Block(nn.Module):
  """Pre-activation: BatchNorm and ReLU come before each 3x3 convolution.

  Where the number of channels changes, the shortcut is a 1x1 convolution of
  the activated input, as in the paper's code; elsewhere it is the input.
  """

  width: int
  stride: int
  dropout: float
  train: bool
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = nn.relu(self.norm(name='norm1')(x))
    if x.shape[-1] != self.width:
      x = self.conv(self.width, (1, 1), self.stride, name='conv_proj')(y)
    y = self.conv(self.width, (3, 3), self.stride, padding=1, name='conv1')(y)
    y = nn.relu(self.norm(name='norm2')(y))
    y = nn.Dropout(self.dropout, deterministic=not self.train, name='dropout')(
      y
    )
    y = self.conv(self.width, (3, 3), padding=1, name='conv2')(y)
    return x + y


class WideResNet(nn.Module):
  """WRN-depth-width: three stages of (depth - 4) / 6 pre-activation blocks.

  Stages have 16, 32 and 64 times `width` channels; the second and third halve
  the image.

  Attributes:
    depth: 10, 16, 22, 28, ...
    width: the paper's k, at least 1.
    num_classes: C.
    dropout: the fraction of activations dropped between the two convolutions of
      a block; 0.3 in the paper, where there is any.
    dtype: the dtype of the computation; parameters and the head stay float32.
    batch_norm_axis: mapped axis to average BatchNorm statistics over, if any.
  """

  depth: int
  width: int
  num_classes: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, 64 * width)."""
    conv = common.make_conv(self)
    norm = common.make_norm(self, train)
    x = conv(16, (3, 3), padding=1, name='conv_stem')(inputs.astype(self.dtype))
    for stage, width in enumerate((16, 32, 64)):
      for index in range((self.depth - 4) // 6):
        x = Block(
          width=width * self.width,
          stride=2 if stage and not index else 1,
          dropout=self.dropout,
          train=train,
          conv=conv,
          norm=norm,
          name=f'stage{stage + 1}_block{index + 1}',
        )(x)
    x = nn.relu(norm(name='norm_final')(x))
    return common.classify(x, self.num_classes)


def _model(depth: int, width: int) -> Model:
  return Model(
    make=functools.partial(WideResNet, depth, width),
    options=frozenset({'dtype', 'dropout'}),
    any_size=True,
    least_side=4,
  )


FAMILY = Family(
  names=('wrn{depth}_{width} (depth 6n+4, such as wrn28_10)',),
  parse=parse,
  model=_model,
)
