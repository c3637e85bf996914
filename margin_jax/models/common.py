"""What the image models share: convolution, BatchNorm, initializers, head."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from margin_jax import cpu

STEMS = ('imagenet', 'small')

# "fan_out" keeps the variance of the gradients; He et al. 2015, Eq. 14.
conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# A depthwise output sees one input channel: JAX would count them all as its
# fan-out, and start 6 to 32 times too small.
depthwise_init = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


def glorot(params: Any, key: Array) -> Any:
  """Draws all kernels anew: uniform, of variance 2 / (fan_in + fan_out).

  Whatever the model is; biases, embeddings and scales stay as they are.

  Args:
    params: a model's, whose kernels are called `kernel`.
    key: PRNG key.

  References:
    Glorot & Bengio 2010, Eq. 16.
  """
  flat = traverse_util.flatten_dict(params)
  paths = sorted(path for path in flat if path[-1] == 'kernel')
  init = nn.initializers.glorot_uniform()
  keys = jax.random.split(key, len(paths))
  for path, key in zip(paths, keys, strict=True):
    flat[path] = init(key, flat[path].shape, flat[path].dtype)
  return traverse_util.unflatten_dict(flat)


def make_norm(model: Any, train: bool) -> Callable[..., nn.Module]:
  """BatchNorm as every model has it, with PyTorch's epsilon and momentum.

  The running variance is the mean of the batches' own. PyTorch's is n / (n - 1)
  times that, for n values a channel: 1.0002 for 64 images in the last stage of
  ResNet-44, 1.004 in that of VGG-16. No accuracy of a paper has so many digits.

  Args:
    model: has `dtype` and `batch_norm_axis`.
    train: whether to normalize with the batch's own statistics.

  Returns:
    Takes what else `nn.BatchNorm` takes, such as `name`.
  """
  return functools.partial(
    nn.BatchNorm,
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=model.dtype,
    axis_name=model.batch_norm_axis,
  )


def make_conv(model: Any) -> Callable[..., nn.Module]:
  """A convolution without bias, to be followed by BatchNorm.

  Args:
    model: has `dtype`.

  Returns:
    Takes what else `nn.Conv` takes: channels, kernel, strides, padding, name.
  """
  return functools.partial(
    nn.Conv,
    use_bias=False,
    kernel_init=conv_init,
    dtype=model.dtype,
    conv_general_dilated=cpu.conv_general_dilated,
  )


def classify(
  x: Array,
  num_classes: int,
  kernel_init: Callable = nn.linear.default_kernel_init,
  fold_bias: bool = False,
) -> tuple[Array, Array]:
  """Global average pooling and the last layer, in float32.

  To be called inside the model: the layer is the model's `head`.

  Args:
    x: (B, H, W, D) activations.
    num_classes: C.
    kernel_init: the initializer of the head.
    fold_bias: whether the bias is the last row of the kernel, and the last
      feature 1.

  Returns:
    Logits (B, C) and features (B, D), or (B, D + 1), both float32.
  """
  features = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
  if not fold_bias:
    head = nn.Dense(num_classes, kernel_init=kernel_init, name='head')
    return head(features), features

  def init(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    rows, columns = shape
    kernel = kernel_init(key, (rows - 1, columns), dtype)
    return jnp.pad(kernel, ((0, 1), (0, 0)))

  features = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)
  head = nn.Dense(num_classes, use_bias=False, kernel_init=init, name='head')
  return head(features), features


def stem(x: Array, kind: str, conv: Callable, norm: Callable) -> Array:
  """The first layers of the ImageNet families, 64 channels.

  To be called inside the model: the layers are `conv_stem` and `norm_stem`.

  Args:
    x: (B, H, W, channels) images.
    kind: 'imagenet' (7x7 convolution of stride 2, 3x3 max-pooling of stride
      2: a quarter of the side is left) or 'small' (3x3 of stride 1, no
      pooling: the usual change for 32x32 images).
    conv: as `make_conv` returns it.
    norm: as `make_norm` returns it.

  Returns:
    (B, H', W', 64) activations.
  """
  if kind == 'small':
    x = conv(64, (3, 3), padding=1, name='conv_stem')(x)
    return nn.relu(norm(name='norm_stem')(x))
  x = conv(64, (7, 7), 2, padding=3, name='conv_stem')(x)
  x = nn.relu(norm(name='norm_stem')(x))
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
