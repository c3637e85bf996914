"""Small convolutional networks for small images."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common
from margin_jax.models.model import Model


class CNN(nn.Module):
  """Two 3x3 convolutions, 2x2 max-pooling, one hidden layer, no normalization.

  Attributes:
    num_classes: C.
    dtype: the dtype of the computation; parameters and the head stay float32.
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


class MnistCNN(nn.Module):
  """The MNIST network of the large-margin paper's released configuration.

  Twice: 5x5 convolution, ReLU, 2x2 max-pooling, BatchNorm; then a hidden layer
  of 512. The activations that the paper asks for margins at are what `norm1`
  and `norm2` return.

  Attributes:
    num_classes: C.
    dtype: the dtype of the computation; parameters and the head stay float32.
    batch_norm_axis: mapped axis to average BatchNorm statistics over, if any.
  """

  num_classes: int
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, 512), both float32."""
    norm = common.make_norm(self, train)
    x = inputs.astype(self.dtype)
    for index, width in enumerate((32, 64), start=1):
      x = nn.Conv(
        width, (5, 5), use_bias=False, dtype=self.dtype, name=f'conv{index}'
      )(x)
      x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
      x = norm(name=f'norm{index}')(x)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(512, dtype=self.dtype, name='hidden')(x))
    features = x.astype(jnp.float32)
    return nn.Dense(self.num_classes, name='head')(features), features


MODELS = {
  'cnn': Model(
    make=CNN, options=frozenset({'dtype'}), batch_norm=False, least_side=2
  ),
  'mnist_cnn': Model(make=MnistCNN, options=frozenset({'dtype'}), least_side=4),
}
