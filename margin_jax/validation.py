"""What a config may be.

Whatever is wrong with a config stops the run before anything is compiled, in a
`ConfigError` that names the field, its value and what would be allowed.
"""

import math
from typing import Any

import ml_collections

from margin_jax import (
  attacks,
  combinations,
  data,
  layers,
  models,
  nonfinite,
  optimizers,
  penalties,
  selection,
)
from margin_jax.config import UNIFORM, ConfigError, default, flatten, require
from margin_jax.data import NORMALIZATIONS
from margin_jax.data.augment import AUGMENTATIONS

CHOICES = {
  'data.name': data.NAMES,
  'data.normalization': NORMALIZATIONS,
  'data.undecodable': ('stop', 'skip'),
  'model.variant': models.VARIANTS,
  'model.dtype': models.DTYPES,
  'model.batch_norm': ('global', 'device'),
  'model.stem': models.STEMS,
  'optimizer.name': optimizers.NAMES,
  'selection.rule': (*selection.RULES, UNIFORM),
  'selection.scope': ('global', 'device'),
  'selection.batch_stats': ('selected', 'pool'),
  'selection.score_dtype': (None, *models.DTYPES),
  'trimming.backward': ('all', 'kept'),
  'mmr.reduction': penalties.REDUCTIONS,
  'optimizer.decayed': optimizers.DECAYED,
  'optimizer.decay': optimizers.DECAYS,
  'large_margin.norm': layers.NORMS,
  'large_margin.difference': penalties.DIFFERENCES,
  'on_nonfinite': nonfinite.ACTIONS,
  'attack.name': (None, *attacks.NAMES),
}
# And what the user registers while the program runs.
REGISTERED = {
  'data.name': data.own.DATASETS,
  'selection.rule': selection.OWN_RULES,
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
  'data.image_size': 1,
  'data.workers': 0,
  'data.cutout_size': 1,
  # [CLS] and, of a pair, a token and [SEP] of each.
  'data.max_length': 5,
  'optimizer.warmup': 0,
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
  'model.dropout',
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
  'model.width',
  'large_margin.gamma',
  'large_margin.alpha',
  'large_margin.epsilon',
)


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


def _check_models(flat: dict[str, Any]) -> None:
  for name, allowed in (
    ('model.name', models.allowed()),
    ('selection.proxy', (None, *models.allowed())),
  ):
    holds = models.exists(flat[name]) or flat[name] in allowed[:-1]
    require(holds, name, flat[name], f'one of {allowed}')


def choices(name: str) -> tuple[str | None, ...]:
  """What the field may be, of those in `CHOICES`."""
  return (*CHOICES[name], *REGISTERED.get(name, ()))


def _check_values(flat: dict[str, Any]) -> None:
  for name in CHOICES:
    allowed = choices(name)
    require(flat[name] in allowed, name, flat[name], f'one of {allowed}')
  for name in FLAGS:
    require(isinstance(flat[name], bool), name, flat[name], 'True or False')
  for name, least in LEAST.items():
    if flat[name] is None and name in OPTIONAL:
      continue
    holds = _is_int(flat[name]) and flat[name] >= least
    require(holds, name, flat[name], f'an integer, at least {least}')
    if name != 'seed':
      require(flat[name] < 2**31, name, flat[name], 'below 2**31')
  require(flat['seed'] < 2**32, 'seed', flat['seed'], 'below 2**32')
  for name in REALS:
    holds = _is_real(flat[name]) and flat[name] >= 0
    require(holds, name, flat[name], 'a finite number, at least 0')
    most = penalties.LARGEST  # or it may be infinite in float32
    require(flat[name] <= most, name, flat[name], f'at most {most}')
  for name in POSITIVE:
    if flat[name] is None and name.startswith('optimizer.'):
      continue
    holds = _is_real(flat[name]) and flat[name] > 0
    require(holds, name, flat[name], 'a finite number above 0')
    least, most = penalties.SMALLEST, penalties.LARGEST
    holds = least <= flat[name] <= most
    require(holds, name, flat[name], f'from {least} to {most}')
  noise = flat['data.label_noise']
  require(noise <= 1, 'data.label_noise', noise, 'at most 1')
  for name in ('data.fraction', 'trimming.first', 'trimming.last'):
    holds = _is_real(flat[name]) and 0 < flat[name] <= 1
    require(holds, name, flat[name], 'a number above 0, at most 1')
  for name in ('optimizer.momentum', 'model.dropout'):
    require(flat[name] < 1, name, flat[name], 'below 1')
  end = flat['mmr.alpha_end']
  most = penalties.LARGEST
  holds = end is None or (_is_real(end) and 0 <= end <= most)
  require(holds, 'mmr.alpha_end', end, f'None or a number from 0 to {most}')
  for name in ('data.data_dir', 'data.vocabulary', 'model.pretrained'):
    holds = flat[name] is None or isinstance(flat[name], str)
    require(holds, name, flat[name], 'None or a string')
    require(flat[name] != '', name, flat[name], 'None or a string not empty')


def _check_sequences(flat: dict[str, Any]) -> None:
  for name in (
    'data.augmentations',
    'data.widths',
    'optimizer.learning_rates',
    'optimizer.boundaries',
    'large_margin.layers',
    'attack.epsilons',
  ):
    require(isinstance(flat[name], tuple), name, flat[name], 'a tuple')
  names = flat['data.augmentations']
  holds = all(name in AUGMENTATIONS for name in names)
  holds = holds and len({*names}) == len(names)
  require(holds, 'data.augmentations', names, f'different of {AUGMENTATIONS}')
  widths, most = flat['data.widths'], flat['data.max_length']
  holds = all(_is_int(x) and 2 < x < most for x in widths)
  holds = holds and list(widths) == sorted(set(widths))
  allowed = f'increasing integers above 2 and below data.max_length={most}'
  require(holds, 'data.widths', widths, allowed)
  names = flat['large_margin.layers']
  holds = bool(names) and all(isinstance(name, str) for name in names)
  holds = holds and len({*names}) == len(names)
  require(holds, 'large_margin.layers', names, 'different names of layers')
  radii = flat['attack.epsilons']
  holds = all(_is_real(x) and 0 < x <= 1 for x in radii)
  holds = holds and len({*radii}) == len(radii)
  require(holds, 'attack.epsilons', radii, 'different numbers in (0, 1]')
  boundaries = flat['optimizer.boundaries']
  holds = all(_is_int(x) and x > 0 for x in boundaries)
  holds = holds and list(boundaries) == sorted(set(boundaries))
  require(holds, 'optimizer.boundaries', boundaries, 'increasing steps')
  holds = all(x < 2**31 for x in boundaries)
  require(holds, 'optimizer.boundaries', boundaries, 'below 2**31')
  rates = flat['optimizer.learning_rates']
  holds = all(_is_real(x) and x >= 0 for x in rates)
  holds = holds and len(rates) == len(boundaries) + 1
  require(
    holds,
    'optimizer.learning_rates',
    rates,
    f'{len(boundaries) + 1} finite numbers, at least 0: one more than '
    'optimizer.boundaries has',
  )
  holds = all(x <= 1e38 for x in rates)  # or they are infinite in float32
  require(holds, 'optimizer.learning_rates', rates, 'at most 1e38')


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks everything that can be checked without devices or data.

  Raises:
    ConfigError: naming the field, its value and what is allowed.
  """
  flat = flatten(config)
  _check_fields(flat)
  _check_models(flat)
  _check_values(flat)
  _check_sequences(flat)
  combinations.check(flat)


def validate_devices(config: ml_collections.ConfigDict, devices: int) -> None:
  """Checks that batch and pool can be shared evenly by the devices."""
  names = ['batch_size']
  if config.selection.rule != UNIFORM:
    names.append('pool_size')
  for name in names:
    holds = config[name] % devices == 0
    require(holds, name, config[name], f'divisible by {devices} devices')


def validate_data(
  config: ml_collections.ConfigDict, examples: int, image_shape: tuple[int, ...]
) -> None:
  """Checks that pool and model fit the training split."""
  scored = config.selection.rule != UNIFORM
  name = 'pool_size' if scored else 'batch_size'
  require(
    config[name] <= examples, name, config[name],
    f'at most {examples}, the number of training examples',
  )  # fmt: skip
  if config.trimming.first != config.trimming.last:
    epoch = examples // config.batch_size
    require(
      config.steps > epoch, 'steps', config.steps,
      f'above {epoch}, one epoch: what trimming keeps changes by the epoch',
    )  # fmt: skip
  if config.data.name in data.SENTENCES:
    return  # what remains is about images
  if 'cutout' in config.data.augmentations:
    size = config.data.cutout_size
    require(
      size <= min(image_shape[:2]), 'data.cutout_size', size,
      f'at most {min(image_shape[:2])}, the side of the images',
    )  # fmt: skip
  side = config.selection.score_resolution
  if side is not None:
    require(
      side < min(image_shape[:2]), 'selection.score_resolution', side,
      f'below the {min(image_shape[:2])} of the images themselves',
    )  # fmt: skip
  proxy = config.selection.proxy
  for name, model, stem in (
    ('model.name', config.model.name, config.model.stem),
    ('selection.proxy', proxy, 'imagenet'),
  ):
    if model is not None:
      require(
        min(image_shape[:2]) >= models.least_side(model, stem), name, model,
        f'a model for images of {image_shape}',
      )  # fmt: skip
