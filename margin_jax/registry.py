"""Registers your own rules, losses, optimizers, models and datasets by name.

A registered name is a value of a config field, like the built-in ones.
"""

import copy
import dataclasses
import functools
import inspect

import flax.linen as nn
import ml_collections
import numpy as np
import optax

from margin_jax import data, losses, models, optimizers, selection
from margin_jax.config import PRESETS
from margin_jax.data import registered


def register_rule(
  name: str,
  rule: selection.RuleFunction,
  *,
  whole_pool: bool = False,
  distance: bool = False,
) -> None:
  """Registers your function as a rule: a `selection.rule`.

  If you register a name again, it stands for the new function.

  Args:
    name: one that no built-in rule has.
    rule: a pure, traceable function `scored -> (B,) scores`. The lowest scores
      are selected. `selection.Scored` lists what the function can read.
    whole_pool: whether the rule sees the pool of all devices at once (with
      `selection.memory`, the batch; with `selection.scope='device'`, its own
      device's pool). It can then compare examples with each other, on any
      number of devices. Otherwise it sees one device's shard.
    distance: whether scores are distances between features and boundaries.
      `selection.memory` divides such scores by the mean norm of the features.

  Raises:
    TypeError: `rule` is not a function of one argument.
    ValueError: the name is taken.

  Examples:
    >>> def least_confident(scored):
    ...   return jax.nn.softmax(scored.logits).max(axis=1)
    >>> register_rule('least_confident', least_confident)
    >>> config = config_lib.default()
    >>> config.selection.rule = 'least_confident'
  """
  if name in (*selection.RULES, 'uniform'):
    raise ValueError(f'rule {name!r} already exists; choose another name')
  if name in PRESETS:
    raise ValueError(f'rule {name!r}: a preset has that name; choose another')
  check_rule(name, rule)
  selection.REGISTERED[name] = selection.Rule(rule, whole_pool, distance)


def check_rule(name: str, rule: object) -> None:
  """Raises a TypeError unless `rule` is a function of one argument."""
  if not callable(rule):
    raise TypeError(f'rule {name!r} must be a function, got {rule!r}')
  problem = _problem_of(rule, 'scored')
  if problem:
    raise TypeError(
      f'rule {name!r} {problem}: write `def rule(scored)` and read '
      'scored.logits, .features, .kernel, .labels, .index and .keys'
    )


def register_loss(name: str, loss: losses.Loss) -> None:
  """Registers your function as a loss: one of `loss.names`, or `loss.risk`.

  If you register a name again, it stands for the new function.

  Args:
    name: one that no built-in loss has.
    loss: a pure, differentiable function of one `losses.Outputs`. It returns
      either a loss for each example of this device, (b,), of which the trainer
      takes the mean, or one loss for the batch of all devices, (). As
      `loss.risk` it must return (b,).

  Raises:
    TypeError: `loss` is not a function of one argument.
    ValueError: the name is taken.

  Examples:
    >>> register_loss('largest', lambda outputs: outputs.logits.max(axis=1))
    >>> config = config_lib.default()
    >>> config.loss.names, config.loss.weights = ('largest',), (1e-3,)
  """
  if name in losses.LOSSES:
    raise ValueError(f'loss {name!r} already exists; choose another name')
  if not callable(loss):
    raise TypeError(f'loss {name!r} must be a function, got {loss!r}')
  problem = _problem_of(loss, 'outputs')
  if problem:
    raise TypeError(
      f'loss {name!r} {problem}: write `def loss(outputs)` and read '
      'outputs.logits, .features, .kernel, .labels, .index and .weights'
    )
  losses.REGISTERED[name] = loss


def register_optimizer(
  name: str, optimizer: optimizers.Factory | optax.GradientTransformation
) -> None:
  """Registers your optax optimizer as an `optimizer.name`.

  `optimizer.weight_decay` and `optimizer.clip_norm` change the gradient before
  your optimizer sees it, as with 'sgd'. If you register a name again, it stands
  for the new one.

  Args:
    name: one that no built-in optimizer has.
    optimizer: a function of the learning rate that returns an
      `optax.GradientTransformation`, such as `optax.lion`; the function gets
      the config's `optax.Schedule` (`optimizer.learning_rates`, boundaries,
      warm-up and decay). It may also be a transformation with its own rate.
      `update` gets the gradient, the state and the parameters.

  Raises:
    TypeError: `optimizer` is neither.
    ValueError: the name is taken.

  Examples:
    >>> register_optimizer('lion', optax.lion)
    >>> register_optimizer(
    ...   'lookahead', lambda rate: optax.chain(optax.sign(), optax.sgd(rate))
    ... )
  """
  if name in optimizers.NAMES:
    raise ValueError(f'optimizer {name!r} already exists; choose another name')
  optimizers.REGISTERED[name] = _factory(name, optimizer)


def _factory(
  name: str, optimizer: optimizers.Factory | optax.GradientTransformation
) -> optimizers.Factory:
  """Returns the function that makes the optimizer of a learning rate."""
  if isinstance(optimizer, optax.GradientTransformation):
    return lambda learning_rate: optimizer
  if not callable(optimizer):
    raise TypeError(
      f'optimizer {name!r} must be an optax transformation or a function that '
      f'returns one, got {optimizer!r}'
    )
  problem = _problem_of(optimizer, 'learning_rate')
  if problem:
    raise TypeError(
      f'optimizer {name!r} {problem}: write `def optimizer(learning_rate)` and '
      'return an optax transformation'
    )
  return optimizer


def with_optimizer(
  config: ml_collections.ConfigDict,
  optimizer: optimizers.Factory | optax.GradientTransformation,
) -> ml_collections.ConfigDict:
  """Returns a copy of the config whose optimizer is this one, registered.

  It is called 'custom: ' and the name of the function, the same in every
  process.
  """
  name = f'custom: {name_of(optimizer)}'
  register_optimizer(name, optimizer)
  changed = ml_collections.ConfigDict(copy.deepcopy(config))  # not frozen
  changed.optimizer.name = name
  return changed


def name_of(function: object) -> str:
  """Names a function, the same in every process: a `repr` has an address."""
  while isinstance(function, functools.partial):
    function = function.func
  return getattr(function, '__qualname__', type(function).__qualname__)


def _problem_of(function: object, argument: str) -> str | None:
  """Returns why the function cannot be called with one argument, or None."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # of what is not written in Python
    return None
  try:
    signature.bind(object())
  except TypeError:
    names = tuple(signature.parameters)
    return f'takes {names}, and must take one argument, `{argument}`'
  return None


def register_model(
  name: str, module: type[nn.Module], *, any_size: bool = False
) -> None:
  """Registers a Flax module as a model: a `model.name`, or a proxy.

  If you register a name again, it stands for the new module.

  Args:
    name: one that no built-in model has.
    module: the class of the module. `__call__(inputs, *, train)` returns logits
      (B, C) and the features (B, D) that its last layer,
      `nn.Dense(..., name='head')`, reads. The class has a field `num_classes`.
      It may have fields `dtype`, `dropout` and `width`; `model.dtype` (and
      `selection.score_dtype`), `model.dropout` and `model.width` set them. With
      BatchNorm it has a field `batch_norm_axis`, and passes it on as the
      `axis_name` of each `nn.BatchNorm`.
    any_size: whether the same parameters can read images of another size.
      `selection.score_resolution` needs this.

  Raises:
    TypeError: `module` is not such a class.
    ValueError: the name is taken.

  Examples:
    >>> class Linear(nn.Module):
    ...   num_classes: int
    ...   @nn.compact
    ...   def __call__(self, inputs, *, train):
    ...     features = inputs.reshape(inputs.shape[0], -1)
    ...     return nn.Dense(self.num_classes, name='head')(features), features
    >>> register_model('linear', Linear)
    >>> config = config_lib.default()
    >>> config.model.name = 'linear'
  """
  if name not in models.REGISTERED and models.find(name):
    raise ValueError(f'model {name!r} already exists; choose another name')
  if not (isinstance(module, type) and issubclass(module, nn.Module)):
    raise TypeError(
      f'model {name!r} must be a class that is a flax.linen.Module, got '
      f'{module!r}'
    )
  fields = {field.name for field in dataclasses.fields(module)}
  if 'num_classes' not in fields:
    raise TypeError(
      f'model {name!r} must have a field num_classes: {module.__name__} has '
      'none'
    )
  for field in dataclasses.fields(module):
    allowed = models.OPTIONAL.get(field.name, (field.default,))
    if field.default not in (*allowed, dataclasses.MISSING):
      raise ValueError(
        f'model {name!r}: {module.__name__} has '
        f'{field.name}={field.default!r}, but model.{field.name} of the config '
        f'sets it. Let its default be {allowed[0]!r}, or give the field '
        'another name'
      )
  models.REGISTERED[name] = models.Model(
    make=module,
    options=frozenset(fields & {*models.OPTIONAL}),
    any_shape=True,
    batch_norm='batch_norm_axis' in fields,
    any_size=any_size,
  )


def register_dataset(
  name: str,
  *,
  train: tuple[np.ndarray, ...],
  test: tuple[np.ndarray, np.ndarray],
  num_classes: int | None = None,
) -> None:
  """Registers your arrays as a dataset: a `data.name`.

  uint8 inputs are images: the trainer normalizes them, and can augment them.
  The model gets floating-point inputs as they are, in float32. Every device
  holds all arrays in memory. If you register a name again, it stands for the
  new arrays.

  Args:
    name: one that no built-in dataset has.
    train: inputs (N, H, W, channels) uint8 or (N, ...) floating, labels (N,)
      integers in [0, C) and, optionally, weights (N,) floating, at least 0. A
      loss is then the mean of weight times an example's loss.
    test: inputs and labels of the test split.
    num_classes: C; None is the largest label plus one.

  Raises:
    ValueError: the name is taken, or the arrays are not as described.

  Examples:
    >>> corners = np.eye(4), np.arange(4) % 2
    >>> register_dataset('corners', train=corners, test=corners)
    >>> config = config_lib.default()
    >>> config.data.name = 'corners'
  """
  if name in data.NAMES or ':' in name:
    raise ValueError(f'dataset {name!r} already exists; choose another name')
  registered.REGISTERED[name] = registered.from_arrays(
    name, train=train, test=test, num_classes=num_classes
  )
