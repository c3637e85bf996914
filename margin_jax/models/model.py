"""What a model can do, as data: `Model` and `Family`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from margin_jax.models.weights import Published


@dataclasses.dataclass(frozen=True)
class Model:
  """A model and what it can do.

  Attributes:
    make: `(num_classes, **options) -> module`, whose `__call__(inputs, *,
      train)` returns `(logits, features)`. With `batch_norm` it also takes
      `batch_norm_axis`; if it reads sentences, `vocab_size`.
    options: of 'variant', 'head', 'dtype', 'dropout', 'stem' and 'width',
      those that `make` takes.
    reads: 'images' or 'sentences'.
    any_shape: whether it also reads arrays that are no images.
    batch_norm: whether the examples of a batch meet in BatchNorm.
    any_size: whether the same parameters read images of another size, as
      global average pooling allows.
    least_side: the smallest side of an image of which something is left at
      the end; by stem, where 'stem' is an option.
    published: how published weights of the model are laid out, or None.
  """

  make: Callable[..., nn.Module]
  options: frozenset[str]
  reads: str = 'images'
  any_shape: bool = False
  batch_norm: bool = True
  any_size: bool = False
  least_side: int | Mapping[str, int] = 1
  published: Published | None = None

  def least_side_with(self, stem: str) -> int:
    """Returns `least_side`, of the given stem where there are stems."""
    if isinstance(self.least_side, Mapping):
      return self.least_side[stem]
    return self.least_side


@dataclasses.dataclass(frozen=True)
class Family:
  """Models of any size, such as 'wrn28_10': of their names there is no end.

  Attributes:
    names: what a message lists.
    parse: a name -> the sizes in it; None for what is no such name.
    model: the sizes -> the model.
  """

  names: tuple[str, ...]
  parse: Callable[[str], tuple[int, ...] | None]
  model: Callable[..., Model]

  def find(self, name: str) -> Model | None:
    """Returns the model of that name, or None."""
    sizes = self.parse(name)
    return None if sizes is None else self.model(*sizes)


def unmet_requirement(
  model: Model, module: nn.Module, inputs: Any, num_classes: int
) -> str | None:
  """Returns what a registered model must do and does not, or None.

  Args:
    model: as registered.
    module: as `models.build` made it.
    inputs: shapes of a batch of one, as the module reads it.
    num_classes: C.

  Returns:
    The rest of a sentence that begins with "a model that".
  """

  def init(key: jax.Array, inputs: Any) -> Any:
    return module.init_with_output(key, inputs, train=False)

  key = jax.eval_shape(jax.random.key, 0)
  outputs, variables = jax.eval_shape(init, key, inputs)
  is_pair = isinstance(outputs, tuple) and len(outputs) == 2
  if not is_pair or any(getattr(x, 'ndim', None) != 2 for x in outputs):
    return 'returns a pair: logits (B, C) and features (B, D)'
  logits, features = outputs
  for name, array in (('logits', logits), ('features', features)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      return f'returns floating {name}, not {array.dtype}'
  if logits.shape[1] != num_classes:
    return f'returns {num_classes} logits, not {logits.shape[1]}'
  expected = features.shape[1], num_classes
  head = variables.get('params', {}).get('head')
  kernel = head.get('kernel') if isinstance(head, Mapping) else None
  if kernel is None or kernel.shape != expected:
    return (
      f"ends with nn.Dense({num_classes}, name='head') of the features it "
      f'returns, whose kernel has shape {expected}'
    )
  statistics = {'batch_stats'} if model.batch_norm else set()
  others = sorted({*variables} - {'params', *statistics})
  if others == ['batch_stats']:
    return 'has a field batch_norm_axis, the axis_name of its BatchNorm'
  if others:
    return f'has no variables but params and batch_stats, not {others}'
  return None
