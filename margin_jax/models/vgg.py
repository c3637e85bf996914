"""VGG with BatchNorm and one linear layer, for 32x32 images.

The convolutions of Simonyan & Zisserman 2015 (configurations A, B, D and E);
the 4096-wide hidden layers, made for 224x224 images, are left out.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common

WIDTHS = (64, 128, 256, 512, 512)
# How many convolutions each of the five stages has.
STAGES = {
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
  """Five stages of 3x3 convolutions, each ending in 2x2 max-pooling.

  Every convolution is followed by BatchNorm and ReLU. What is left of the
  image, one pixel of a 32x32 one, is averaged.

  Attributes:
    depth: 11, 13, 16 or 19.
    num_classes: C.
    dtype: of the computation; parameters and the head stay float32.
    batch_norm_axis: mapped axis to average BatchNorm statistics over, if any.
  """

  depth: int
  num_classes: int
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, 512), both float32."""
    conv = common.make_conv(self)
    norm = common.make_norm(self, train)
    x = inputs.astype(self.dtype)
    layers = zip(WIDTHS, STAGES[self.depth], strict=True)
    for stage, (width, count) in enumerate(layers, start=1):
      for index in range(1, count + 1):
        place = f'{stage}_{index}'
        x = conv(width, (3, 3), padding=1, name=f'conv{place}')(x)
        x = nn.relu(norm(name=f'norm{place}')(x))
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    return common.classify(x, self.num_classes)
