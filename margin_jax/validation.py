"""What a config may be.

Whatever is wrong with a config stops the run before anything is compiled, in a
`ConfigError` that names the field, its value and what would be allowed.
"""

import math
from typing import Any

import ml_collections

from margin_jax import (
  attacks,
  data,
  layers,
  models,
  optimizers,
  penalties,
  selection,
)
from margin_jax.config import UNIFORM, ConfigError, default, flatten
from margin_jax.data import NORMALIZATIONS
from margin_jax.data.augment import AUGMENTATIONS

CHOICES = {
  'data.name': data.NAMES,
  'data.normalization': NORMALIZATIONS,
  'model.name': models.NAMES,
  'model.variant': models.VARIANTS,
  'model.dtype': models.DTYPES,
  'model.batch_norm': ('global', 'device'),
  'optimizer.name': optimizers.NAMES,
  'selection.rule': (*selection.RULES, UNIFORM),
  'selection.scope': ('global', 'device'),
  'selection.batch_stats': ('selected', 'pool'),
  'selection.score_dtype': (None, *models.DTYPES),
  'selection.proxy': (None, *models.NAMES),
  'trimming.backward': ('all', 'kept'),
  'mmr.reduction': penalties.REDUCTIONS,
  'optimizer.decayed': optimizers.DECAYED,
  'large_margin.norm': layers.NORMS,
  'large_margin.difference': penalties.DIFFERENCES,
  'attack.name': (None, *attacks.NAMES),
}
FLAGS = (
  'optimizer.nesterov',
  'mmr.stop_feature_gradient',
  'selection.log_counts',
  'large_margin.worst_case',
  'large_margin.by_size',
  'large_margin.second_order',
)
# Integers and the least they may be; those in OPTIONAL may be None.
LEAST = {
  'steps': 1,
  'batch_size': 1,
  'pool_size': 1,
  'log_every': 1,
  'eval_every': 1,
  'checkpoint_every': 1,
  'eval_batch_size': 1,
  'devices': 1,
  'steps_per_call': 1,
  'seed': 0,
  'data.validation_examples': 0,
  'data.crop_padding': 0,
  'selection.reuse': 1,
  'selection.every': 1,
  'selection.start': 0,
  'selection.stop': 1,
  'selection.score_resolution': 4,
  'keep_every': 1,
  'large_margin.top_k': 1,
  'attack.steps': 1,
}
OPTIONAL = (
  'devices',
  'steps_per_call',
  'keep_every',
  'selection.stop',
  'selection.score_resolution',
)
# Finite numbers, at least 0.
REALS = (
  'optimizer.momentum',
  'optimizer.weight_decay',
  'mmr.alpha',
  'selection.ramp',
  'selection.beta',
  'data.label_noise',
  'large_margin.weight',
  'large_margin.cross_entropy',
)
# Finite numbers above 0; the first two may be None.
POSITIVE = (
  'optimizer.epsilon',
  'optimizer.clip_norm',
  'large_margin.gamma',
  'large_margin.alpha',
  'large_margin.epsilon',
)


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
  if not holds:
    raise ConfigError(f'{name}={value!r} is not allowed: it must be {allowed}')


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and math.isfinite(value)


def _check_fields(flat: dict[str, Any]) -> None:
  known = flatten(default())
  for name in sorted({*flat} - {*known}):
    raise ConfigError(
      f'{name}={flat[name]!r} is unknown; the fields are {tuple(known)}'
    )
  for name in sorted({*known} - {*flat}):
    raise ConfigError(f'{name} is missing; its default is {known[name]!r}')


def _check_values(flat: dict[str, Any]) -> None:
  for name, allowed in CHOICES.items():
    _require(flat[name] in allowed, name, flat[name], f'one of {allowed}')
  for name in FLAGS:
    _require(isinstance(flat[name], bool), name, flat[name], 'True or False')
  for name, least in LEAST.items():
    if flat[name] is None and name in OPTIONAL:
      continue
    holds = _is_int(flat[name]) and flat[name] >= least
    _require(holds, name, flat[name], f'an integer, at least {least}')
    if name != 'seed':
      _require(flat[name] < 2**31, name, flat[name], 'below 2**31')
  _require(flat['seed'] < 2**32, 'seed', flat['seed'], 'below 2**32')
  for name in REALS:
    holds = _is_real(flat[name]) and flat[name] >= 0
    _require(holds, name, flat[name], 'a finite number, at least 0')
  for name in POSITIVE:
    if flat[name] is None and name.startswith('optimizer.'):
      continue
    holds = _is_real(flat[name]) and flat[name] > 0
    _require(holds, name, flat[name], 'a finite number above 0')
  noise = flat['data.label_noise']
  _require(noise <= 1, 'data.label_noise', noise, 'at most 1')
  for name in ('data.fraction', 'trimming.first', 'trimming.last'):
    holds = _is_real(flat[name]) and 0 < flat[name] <= 1
    _require(holds, name, flat[name], 'a number above 0, at most 1')
  momentum = flat['optimizer.momentum']
  _require(momentum < 1, 'optimizer.momentum', momentum, 'below 1')
  end = flat['mmr.alpha_end']
  holds = end is None or (_is_real(end) and end >= 0)
  _require(holds, 'mmr.alpha_end', end, 'None or a finite number, at least 0')
  folder = flat['data.data_dir']
  holds = folder is None or isinstance(folder, str)
  _require(holds, 'data.data_dir', folder, 'None or a string')


def _check_sequences(flat: dict[str, Any]) -> None:
  for name in (
    'data.augmentations',
    'optimizer.learning_rates',
    'optimizer.boundaries',
    'large_margin.layers',
    'attack.epsilons',
  ):
    _require(isinstance(flat[name], tuple), name, flat[name], 'a tuple')
  names = flat['data.augmentations']
  holds = all(name in AUGMENTATIONS for name in names)
  _require(holds, 'data.augmentations', names, f'of {AUGMENTATIONS}')
  names = flat['large_margin.layers']
  holds = bool(names) and all(isinstance(name, str) for name in names)
  holds = holds and len({*names}) == len(names)
  _require(holds, 'large_margin.layers', names, 'different names of layers')
  radii = flat['attack.epsilons']
  holds = all(_is_real(x) and 0 < x <= 1 for x in radii)
  holds = holds and len({*radii}) == len(radii)
  _require(holds, 'attack.epsilons', radii, 'different numbers in (0, 1]')
  boundaries = flat['optimizer.boundaries']
  holds = all(_is_int(x) and x > 0 for x in boundaries)
  holds = holds and list(boundaries) == sorted(set(boundaries))
  _require(holds, 'optimizer.boundaries', boundaries, 'increasing steps')
  holds = all(x < 2**31 for x in boundaries)
  _require(holds, 'optimizer.boundaries', boundaries, 'below 2**31')
  rates = flat['optimizer.learning_rates']
  holds = all(_is_real(x) and x >= 0 for x in rates)
  holds = holds and len(rates) == len(boundaries) + 1
  _require(
    holds,
    'optimizer.learning_rates',
    rates,
    f'{len(boundaries) + 1} finite numbers, at least 0: one more than '
    'optimizer.boundaries has',
  )


def _forbid(flat: dict[str, Any], names: tuple[str, ...], because: str) -> None:
  """Raises if one of the fields is not its default."""
  defaults = flatten(default())
  for name in names:
    value = defaults[name]
    _require(flat[name] == value, name, flat[name], f'{value!r} {because}')


def _check_combinations(flat: dict[str, Any]) -> None:
  if flat['mmr.alpha_end'] is not None and flat['steps'] < 2:
    _require(False, 'steps', flat['steps'], 'at least 2 with mmr.alpha_end')
  if flat['optimizer.nesterov']:
    momentum = flat['optimizer.momentum']
    _require(
      momentum > 0,
      'optimizer.momentum',
      momentum,
      'above 0 with optimizer.nesterov',
    )
  if not models.has_variants(flat['model.name']):
    because = f'with model.name={flat["model.name"]!r}, which has one variant'
    _forbid(flat, ('model.variant',), because)
  call = flat['steps_per_call']
  if call is not None:
    for name in ('steps', 'log_every', 'eval_every', 'checkpoint_every'):
      divisor = f'a divisor of {name}={flat[name]}'
      _require(flat[name] % call == 0, 'steps_per_call', call, divisor)


SCORING = (
  'selection.scope',
  'selection.batch_stats',
  'selection.reuse',
  'selection.every',
  'selection.start',
  'selection.stop',
  'selection.score_dtype',
  'selection.score_resolution',
  'selection.proxy',
)


def _check_selection(flat: dict[str, Any]) -> None:
  """Refuses combinations that would do nothing, or contradict each other."""
  rule = flat['selection.rule']
  if rule != 'loss':
    because = f'with selection.rule={rule!r}: only the rule loss ramps'
    _forbid(flat, ('selection.ramp',), because)
  if rule != 'selective_backprop':
    because = f'with selection.rule={rule!r}: only selective_backprop has it'
    _forbid(flat, ('selection.beta',), because)
  if rule == UNIFORM:
    _forbid(flat, SCORING, 'with selection.rule=uniform, which scores nothing')
    return
  pool, size = flat['pool_size'], flat['batch_size'] * flat['selection.reuse']
  allowed = f'at least batch_size * selection.reuse = {size}'
  _require(pool >= size, 'pool_size', pool, allowed)
  every, reuse = flat['selection.every'], flat['selection.reuse']
  _require(
    every == 1 or reuse == 1,
    'selection.every',
    every,
    f'1 with selection.reuse={reuse}: both say which steps score',
  )
  start, stop = flat['selection.start'], flat['selection.stop']
  allowed = f'below steps={flat["steps"]}, or nothing is ever scored'
  _require(start < flat['steps'], 'selection.start', start, allowed)
  if stop is not None:
    allowed = f'above selection.start={start}, or nothing is ever scored'
    _require(stop > start, 'selection.stop', stop, allowed)
  _check_scorer(flat)


def _check_scorer(flat: dict[str, Any]) -> None:
  proxy = flat['selection.proxy']
  scorer = flat['model.name'] if proxy is None else proxy
  if flat['selection.score_resolution'] is not None:
    _require(
      models.takes_any_resolution(scorer),
      'selection.score_resolution',
      flat['selection.score_resolution'],
      f'None where {scorer!r} scores: it reads images of one size only',
    )
  if flat['selection.batch_stats'] == 'pool':
    because = (
      "with selection.batch_stats='pool': the statistics would not be of what "
      'the model sees'
    )
    names = ('selection.proxy', 'selection.score_resolution')
    _forbid(flat, names, because)
    _require(
      models.has_batch_norm(flat['model.name']),
      'selection.batch_stats',
      'pool',
      f"'selected' for {flat['model.name']!r}, which has no BatchNorm",
    )


def _check_trimming(flat: dict[str, Any]) -> None:
  first, last = flat['trimming.first'], flat['trimming.last']
  backward = flat['trimming.backward']
  if first == last == 1:
    because = 'without trimming (trimming.first and trimming.last are 1)'
    _forbid(flat, ('trimming.backward',), because)
    return
  because = 'with trimming: both choose what the gradient sees'
  _forbid(flat, ('selection.rule',), because)
  because = 'with trimming, which chooses inside the loss'
  _forbid(flat, ('selection.log_counts',), because)
  if backward == 'kept':
    _require(
      not models.has_batch_norm(flat['model.name']),
      'trimming.backward',
      backward,
      f"'all' for {flat['model.name']!r}: its BatchNorm needs the whole batch",
    )
    because = "with trimming.backward='kept': MMR is over the whole batch"
    _forbid(flat, ('mmr.alpha', 'mmr.alpha_end'), because)


def _check_losses(flat: dict[str, Any]) -> None:
  """The large-margin loss, the attack and the optimizer's options."""
  if not flat['large_margin.weight']:
    because = 'with large_margin.weight=0.0: there is no large-margin loss'
    names = [n for n in flat if n.startswith('large_margin.')]
    _forbid(flat, tuple(names), because)
  if (flat['trimming.first'], flat['trimming.last']) != (1, 1):
    because = 'with trimming, which is of cross-entropy'
    _forbid(flat, ('large_margin.weight',), because)
  if flat['optimizer.name'] == 'sgd':
    because = "with optimizer.name='sgd', which has none"
    _forbid(flat, ('optimizer.epsilon',), because)
  if not flat['optimizer.weight_decay']:
    because = 'with optimizer.weight_decay=0.0'
    _forbid(flat, ('optimizer.decayed',), because)
  attack, radii = flat['attack.name'], flat['attack.epsilons']
  if attack is None:
    because = 'with attack.name=None'
    _forbid(flat, ('attack.epsilons', 'attack.steps'), because)
    return
  _require(bool(radii), 'attack.epsilons', radii, 'given with attack.name')
  if attack == 'fgsm':
    because = "with attack.name='fgsm', which is one step"
    _forbid(flat, ('attack.steps',), because)


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks everything that can be checked without devices or data.

  Raises:
    ConfigError: naming the field, its value and what is allowed.
  """
  flat = flatten(config)
  _check_fields(flat)
  _check_sequences(flat)
  _check_values(flat)
  _check_combinations(flat)
  _check_selection(flat)
  _check_trimming(flat)
  _check_losses(flat)


def validate_devices(config: ml_collections.ConfigDict, devices: int) -> None:
  """Checks that batch and pool can be shared evenly by the devices."""
  names = ['batch_size']
  if config.selection.rule != UNIFORM:
    names.append('pool_size')
  for name in names:
    holds = config[name] % devices == 0
    _require(holds, name, config[name], f'divisible by {devices} devices')


def validate_data(
  config: ml_collections.ConfigDict, examples: int, image_shape: tuple[int, ...]
) -> None:
  """Checks that pool and model fit the training split."""
  scored = config.selection.rule != UNIFORM
  name = 'pool_size' if scored else 'batch_size'
  _require(
    config[name] <= examples, name, config[name],
    f'at most {examples}, the number of training examples',
  )  # fmt: skip
  side = config.selection.score_resolution
  if side is not None:
    _require(
      side < min(image_shape[:2]), 'selection.score_resolution', side,
      f'below the {min(image_shape[:2])} of the images themselves',
    )  # fmt: skip
  if config.trimming.first != config.trimming.last:
    epoch = examples // config.batch_size
    _require(
      config.steps > epoch, 'steps', config.steps,
      f'above {epoch}, one epoch: what trimming keeps changes by the epoch',
    )  # fmt: skip
  if models.has_batch_norm(config.model.name):
    _require(
      min(image_shape[:2]) >= 4, 'model.name', config.model.name,
      f'a model for images of {image_shape}',
    )  # fmt: skip
