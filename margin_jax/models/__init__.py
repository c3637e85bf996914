"""Models by name. Each returns `(logits, features)`; its head is `head`."""

import flax.linen as nn
import jax.numpy as jnp

from margin_jax.models.cnn import CNN, MnistCNN
from margin_jax.models.resnet import DEPTHS, ResNet

NAMES = ('cnn', 'mnist_cnn', *(f'resnet{depth}' for depth in DEPTHS))
VARIANTS = ('he', 'authors')
DTYPES = ('float32', 'bfloat16')


def build(
  name: str,
  num_classes: int,
  *,
  variant: str = 'he',
  dtype: str = 'float32',
  batch_norm_axis: str | None = None,
) -> nn.Module:
  """The Flax module called `name`.

  Args:
    name: one of `NAMES`: 'cnn', 'mnist_cnn', or 'resnetN' with depth N = 8,
      14, ..., 110.
    num_classes: C.
    variant: of the ResNets: 'he' or 'authors'.
    dtype: of the computation: 'float32' or 'bfloat16'.
    batch_norm_axis: mapped axis that BatchNorm statistics are averaged over.

  Returns:
    A module with `__call__(inputs, *, train) -> (logits, features)`.

  Raises:
    ValueError: no model has that name.
  """
  if name not in NAMES:
    raise ValueError(f'no model is called {name!r}; there are {NAMES}')
  if variant not in VARIANTS:
    raise ValueError(f'no variant is called {variant!r}; there are {VARIANTS}')
  if dtype not in DTYPES:
    raise ValueError(f'no dtype is called {dtype!r}; there are {DTYPES}')
  dtype = jnp.dtype(dtype)
  if name == 'cnn':
    return CNN(num_classes, dtype=dtype)
  if name == 'mnist_cnn':
    return MnistCNN(num_classes, dtype=dtype, batch_norm_axis=batch_norm_axis)
  return ResNet(
    depth=int(name.removeprefix('resnet')),
    num_classes=num_classes,
    variant=variant,
    dtype=dtype,
    batch_norm_axis=batch_norm_axis,
  )


def has_variants(name: str) -> bool:
  """Whether `variant` means something to the model."""
  return name.startswith('resnet')


def has_batch_norm(name: str) -> bool:
  """Whether the model's examples meet in BatchNorm."""
  return name != 'cnn'


def takes_any_resolution(name: str) -> bool:
  """Whether the same parameters read images of another size."""
  return name.startswith('resnet')
