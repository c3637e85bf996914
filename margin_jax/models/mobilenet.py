"""MobileNet v1 (Howard et al. 2017, Table 1)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common
from margin_jax.models.model import Model
from margin_jax.models.weights import Path, Published

# Channels and stride of each block.
BLOCKS = (
  (64, 1),
  (128, 2),
  (128, 1),
  (256, 2),
  (256, 1),
  (512, 2),
  *[(512, 1)] * 5,
  (1024, 2),
  (1024, 1),
)
LEAST_CHANNELS = 8


class Separable(nn.Module):
  """A depthwise 3x3 and a pointwise 1x1 convolution, each with BatchNorm."""

  width: int
  stride: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    x = self.conv(
      channels,
      (3, 3),
      self.stride,
      padding=1,
      feature_group_count=channels,
      kernel_init=common.depthwise_init,
      name='conv_depth',
    )(x)
    x = nn.relu(self.norm(name='norm_depth')(x))
    x = self.conv(self.width, (1, 1), name='conv_point')(x)
    return nn.relu(self.norm(name='norm_point')(x))


class MobileNet(nn.Module):
  """MobileNet v1: a 3x3 convolution and 13 depthwise separable ones.

  ReLU, and padding of one pixel on both sides, as PyTorch implementations
  have it; TensorFlow's has ReLU6 and pads strided convolutions on one side.

  Attributes:
    num_classes: C.
    width: multiplier of all numbers of channels, which are rounded down, and
      at least 8.
    dtype: the dtype of the computation; parameters and the head stay float32.
    batch_norm_axis: mapped axis to average BatchNorm statistics over, if any.
  """

  num_classes: int
  width: float = 1.0
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, 1024 * width)."""

    def scaled(channels: int) -> int:
      return max(int(channels * self.width), LEAST_CHANNELS)

    conv = common.make_conv(self)
    norm = common.make_norm(self, train)
    x = conv(scaled(32), (3, 3), 2, padding=1, name='conv_stem')(
      inputs.astype(self.dtype)
    )
    x = nn.relu(norm(name='norm_stem')(x))
    for index, (channels, stride) in enumerate(BLOCKS, start=1):
      x = Separable(scaled(channels), stride, conv, norm, name=f'block{index}')(
        x
      )
    return common.classify(x, self.num_classes)


def _published_name(module: Path) -> str:
  """transformers' name: its layers alternate, depthwise and pointwise."""
  if module == ('head',):
    return 'classifier'
  kind, _, which = module[-1].partition('_')
  kind = {'conv': 'convolution', 'norm': 'normalization'}[kind]
  if which == 'stem':
    return f'mobilenet_v1.conv_stem.{kind}'
  index = 2 * int(module[0].removeprefix('block')) - 2 + (which == 'point')
  return f'mobilenet_v1.layer.{index}.{kind}'


MODELS = {
  'mobilenet': Model(
    make=MobileNet,
    options=frozenset({'dtype', 'width'}),
    any_size=True,
    least_side=4,
    published=Published(name_of=_published_name),
  ),
}
