"""VGG with BatchNorm, for 32x32 images.

The convolutions are those of Simonyan & Zisserman 2015 (configurations A, B, D
and E). One linear layer follows, as is usual for small images, or three as in
the paper and in the code that the MMR authors released (convNet.pytorch's):
they have 4096, 4096 and C outputs, and read the 512 features that the
convolutions leave of a 32x32 image.
"""

import functools
import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from margin_jax.models import common
from margin_jax.models.model import Model
from margin_jax.models.weights import Path, Published, State

WIDTHS = (64, 128, 256, 512, 512)
# How many convolutions each of the five stages has.
STAGES = {
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}


HIDDEN = 4096


class VGG(nn.Module):
  """Five stages of 3x3 convolutions, each ending in 2x2 max-pooling.

  Every convolution is followed by BatchNorm and ReLU. What is left of the
  image, one pixel of a 32x32 one, is averaged.

  Attributes:
    depth: 11, 13, 16 or 19.
    num_classes: C.
    head: 'linear', the last layer alone, or 'released': two hidden layers of
      4096 with ReLU stand before it.
    dropout: the fraction dropped of what each hidden layer returns; without
      them, of the features. 0.5 with the released head.
    dtype: the dtype of the computation; parameters and the head stay float32.
    batch_norm_axis: mapped axis to average BatchNorm statistics over, if any.
  """

  depth: int
  num_classes: int
  head: str = 'linear'
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, D), both float32.

    D is 512, or 4096 with the released head. The features are what the last
    layer reads: in training, after dropout.
    """
    conv = common.make_conv(self)
    norm = common.make_norm(self, train)
    x = inputs.astype(self.dtype)
    layers = zip(WIDTHS, STAGES[self.depth], strict=True)
    for stage, (width, count) in enumerate(layers, start=1):
      for index in range(1, count + 1):
        suffix = f'{stage}_{index}'
        x = conv(width, (3, 3), padding=1, name=f'conv{suffix}')(x)
        x = nn.relu(norm(name=f'norm{suffix}')(x))
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
    drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
    if self.head == 'linear':
      features = drop(name='dropout')(x)
      return nn.Dense(self.num_classes, name='head')(features), features
    for index in (1, 2):
      dense = _pytorch_dense(x.shape[-1])
      x = dense(HIDDEN, dtype=self.dtype, name=f'hidden{index}')(x)
      x = drop(name=f'dropout{index}')(nn.relu(x))
    features = x.astype(jnp.float32)
    head = _pytorch_dense(HIDDEN)(self.num_classes, name='head')
    return head(features), features


def _pytorch_dense(inputs: int) -> Callable[..., nn.Module]:
  """`nn.Dense` that starts as PyTorch's linear layers do."""
  uniform = nn.initializers.uniform(2 / math.sqrt(inputs))

  def init(*args) -> Array:
    return uniform(*args) - 1 / math.sqrt(inputs)

  return functools.partial(nn.Dense, kernel_init=init, bias_init=init)


# Linear, ReLU, dropout, linear, ReLU, dropout and linear, or the last alone.
_LINEAR = {
  'hidden1': 'classifier.0',
  'hidden2': 'classifier.3',
  'head': 'classifier',
}


def _published_name(depth: int, module: Path) -> str:
  """Its index in a sequence of convolution, BatchNorm, ReLU, ..., pooling."""
  if module[0] in _LINEAR:
    return _LINEAR[module[0]]
  kind, stage, index = re.fullmatch(r'(\D+)(\d)_(\d)', module[0]).groups()
  stage, index = int(stage) - 1, int(index) - 1
  before = sum(3 * count + 1 for count in STAGES[depth][:stage])
  return f'features.{before + 3 * index + (kind == "norm")}'


def _without_biases(state: State) -> State:
  """Moves the biases of convolutions into BatchNorm's means.

  BatchNorm subtracts the mean of what it reads, so that a bias in front of it
  changes nothing but the running mean.
  """
  state = dict(state)
  for name in [*state]:
    match = re.fullmatch(r'features\.(\d+)\.weight', name)
    if not match or state[name].ndim != 4:
      continue
    mean = f'features.{int(match[1]) + 1}.running_mean'
    bias = f'features.{match[1]}.bias'
    if {mean, bias} <= {*state} and state[mean].shape == state[bias].shape:
      state[mean] = state[mean] - state.pop(bias)
  return state


MODELS = {
  f'vgg{depth}': Model(
    make=functools.partial(VGG, depth),
    options=frozenset({'dtype', 'head', 'dropout'}),
    any_size=True,
    least_side=32,
    published=Published(
      name_of=functools.partial(_published_name, depth),
      spellings=((r'^classifier\.6\.', 'classifier.'),),
      convert=_without_biases,
    ),
  )
  for depth in STAGES
}
