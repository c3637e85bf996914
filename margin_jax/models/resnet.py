"""Residual networks for 32x32 images (He et al. 2016, section 4.2)."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common
from margin_jax.models.model import Model

DEPTHS = range(8, 111, 6)


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut.

  Where the shape changes, the shortcut is the identity, subsampled and
  zero-padded in channels (He's option A), or a 1x1 projection (`projection`,
  option B). `zero_init` starts the last BatchNorm scale at zero, so that the
  block starts as its shortcut.
  """

  width: int
  stride: int
  conv: Any
  norm: Any
  projection: bool
  zero_init: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = self.conv(self.width, (3, 3), self.stride, padding=1, name='conv1')(x)
    y = nn.relu(self.norm(name='norm1')(y))
    y = self.conv(self.width, (3, 3), padding=1, name='conv2')(y)
    scale_init = (
      nn.initializers.zeros if self.zero_init else nn.initializers.ones
    )
    y = self.norm(name='norm2', scale_init=scale_init)(y)
    if x.shape != y.shape:
      if self.projection:
        x = self.conv(self.width, (1, 1), self.stride, name='conv_proj')(x)
        x = self.norm(name='norm_proj')(x)
      else:
        x = x[:, :: self.stride, :: self.stride]
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, self.width - x.shape[-1])])
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet of depth 6n+2 for small images: three stages of n blocks.

  Stages have 16, 32 and 64 channels; the second and third halve the image.
  `variant='he'` is the paper's layout (identity shortcuts everywhere).
  `variant='authors'` is the one of the MMS and MMR papers' code: 1x1
  projections where the shape changes, last BatchNorm scale of a block at
  zero, and a head initialized with standard deviation 0.01.
  `variant='mms_select'` has besides, as their repository of that name, the bias
  folded into the last layer's weights: the last feature is 1, and the head has
  no bias, but a row more of weights that starts at zero. So the bias is in the
  norm of MMS and MMR and under weight decay.

  Attributes:
    depth: 8, 14, 20, ..., 110.
    num_classes: C.
    variant: 'he', 'authors' or 'mms_select'.
    dtype: the dtype of the computation; parameters and the head stay float32.
    batch_norm_axis: mapped axis to average BatchNorm statistics over, if any.
  """

  depth: int
  num_classes: int
  variant: str = 'he'
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, 64), both float32.

    Of 'mms_select' (B, 65).
    """
    authors = self.variant != 'he'
    conv = common.make_conv(self)
    norm = common.make_norm(self, train)
    x = conv(16, (3, 3), padding=1, name='conv_stem')(inputs.astype(self.dtype))
    x = nn.relu(norm(name='norm_stem')(x))
    for stage, width in enumerate((16, 32, 64)):
      for index in range((self.depth - 2) // 6):
        x = Block(
          width=width,
          stride=2 if stage and not index else 1,
          conv=conv,
          norm=norm,
          projection=authors,
          zero_init=authors,
          name=f'stage{stage + 1}_block{index + 1}',
        )(x)
    head_init = (
      nn.initializers.normal(0.01) if authors else nn.linear.default_kernel_init
    )
    folded = self.variant == 'mms_select'
    return common.classify(x, self.num_classes, head_init, folded)


MODELS = {
  f'resnet{depth}': Model(
    make=functools.partial(ResNet, depth),
    options=frozenset({'variant', 'dtype'}),
    any_size=True,
    least_side=4,
  )
  for depth in DEPTHS
}
