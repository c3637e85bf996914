"""Flax modules of your own as models, by name."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

# Fields that the trainer fills, where a module has them.
NUM_CLASSES, BATCH_NORM_AXIS = 'num_classes', 'batch_norm_axis'


@dataclasses.dataclass(frozen=True)
class Own:
  """A module, and what its class does not say.

  Attributes:
    module: the class.
    any_size: whether the same parameters read inputs of another size.
  """

  module: type[nn.Module]
  any_size: bool

  def has(self, field: str) -> bool:
    """Whether the module can be told `field`."""
    return field in {x.name for x in dataclasses.fields(self.module)}


MODELS: dict[str, Own] = {}


def add(
  name: str, module: type[nn.Module], *, any_size: bool, taken: bool
) -> None:
  """See `margin_jax.register_model`."""
  if taken:
    raise ValueError(f'model {name!r} is there already; take another name')
  is_module = isinstance(module, type) and issubclass(module, nn.Module)
  if not is_module:
    raise TypeError(
      f'model {name!r} must be a class that is a flax.linen.Module, got '
      f'{module!r}'
    )
  found = Own(module, any_size)
  if not found.has(NUM_CLASSES):
    raise TypeError(
      f'model {name!r} must have a field {NUM_CLASSES}: {module.__name__} has '
      'none'
    )
  MODELS[name] = found


def build(name: str, **options: object) -> nn.Module:
  """The module, with those of the options that are fields of it."""
  found = MODELS[name]
  given = {key: value for key, value in options.items() if found.has(key)}
  return found.module(**given)


def lacks(
  name: str, model: nn.Module, inputs: Any, num_classes: int
) -> str | None:
  """What the model would have to do and does not; None is nothing.

  Args:
    name: of the model.
    model: as `build` made it.
    inputs: shapes of a batch of one, as the model reads it.
    num_classes: C.
  """
  init = functools.partial(model.init_with_output, train=False)
  key = jax.eval_shape(jax.random.key, 0)
  outputs, variables = jax.eval_shape(init, key, inputs)
  pair = isinstance(outputs, tuple) and len(outputs) == 2
  if not pair or any(getattr(x, 'ndim', None) != 2 for x in outputs):
    return 'returns a pair: logits (B, C) and features (B, D)'
  logits, features = outputs
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
  own_statistics = {'batch_stats'} if MODELS[name].has(BATCH_NORM_AXIS) else {}
  others = sorted({*variables} - {'params', *own_statistics})
  if others == ['batch_stats']:
    return f'has a field {BATCH_NORM_AXIS}, the axis_name of its BatchNorm'
  if others:
    return f'has no variables but params and batch_stats, not {others}'
  return None
