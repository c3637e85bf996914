"""A small convolutional network without normalisation, for small images."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class CNN(nn.Module):
  """Two 3x3 convolutions, 2x2 max-pooling, one hidden layer.

  Attributes:
    num_classes: C.
    dtype: of the computation; parameters and the head stay float32.
  """

  num_classes: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, 128), both float32."""
    del train
    x = inputs.astype(self.dtype)
    x = nn.relu(nn.Conv(32, (3, 3), dtype=self.dtype, name='conv1')(x))
    x = nn.relu(nn.Conv(64, (3, 3), dtype=self.dtype, name='conv2')(x))
    x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(128, dtype=self.dtype, name='hidden')(x))
    features = x.astype(jnp.float32)
    return nn.Dense(self.num_classes, name='head')(features), features
