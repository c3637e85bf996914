"""What a config may be.

Whatever is wrong with a config stops the run before anything is compiled, in a
`ConfigError` that names the field, its value and what would be allowed.
"""

import math
from typing import Any

import ml_collections

from margin_jax import data, linearized, models, selection
from margin_jax import losses as losses_lib
from margin_jax.config import UNIFORM, ConfigError, default, flatten, require
from margin_jax.data import NORMALIZATIONS
from margin_jax.data.augment import AUGMENTATIONS
from margin_jax.models import bert
from margin_jax.train import attacks, guard, optimizers

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
  'mmr.reduction': losses_lib.REDUCTIONS,
  'optimizer.weight_decay_mask': optimizers.WEIGHT_DECAY_MASKS,
  'optimizer.decay': optimizers.DECAYS,
  'large_margin.norm': linearized.NORMS,
  'large_margin.difference': losses_lib.DIFFERENCES,
  'on_nonfinite': guard.ACTIONS,
  'attack.name': (None, *attacks.NAMES),
}
# And what the user registers while the program runs.
REGISTERED = {
  'data.name': data.own.DATASETS,
  'selection.rule': selection.REGISTERED,
}
FLAGS = (
  'optimizer.nesterov',
  'mmr.stop_feature_gradient',
  'selection.log_counts',
  'large_margin.worst_case',
  'large_margin.normalize_by_size',
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
    ('model.name', models.names()),
    ('selection.proxy', (None, *models.names())),
  ):
    no_proxy = name == 'selection.proxy' and flat[name] is None
    holds = no_proxy or models.find(flat[name]) is not None
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
    most = losses_lib.LARGEST  # or it may be infinite in float32
    require(flat[name] <= most, name, flat[name], f'at most {most}')
  for name in POSITIVE:
    if flat[name] is None and name.startswith('optimizer.'):
      continue
    holds = _is_real(flat[name]) and flat[name] > 0
    require(holds, name, flat[name], 'a finite number above 0')
    least, most = losses_lib.SMALLEST, losses_lib.LARGEST
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
  most = losses_lib.LARGEST
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
  check(flat)


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
        min(image_shape[:2]) >= models.find(model).least_side_with(stem), name,
        model,
        f'a model for images of {image_shape}',
      )  # fmt: skip


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


def void(rule: str) -> tuple[str, ...]:
  """The fields that do nothing with a rule, and so must be their defaults."""
  fields = SCORING if rule == UNIFORM else ()
  if rule != 'loss':
    fields += ('selection.ramp',)
  if rule != 'selective_backprop':
    fields += ('selection.beta',)
  return fields


def idle(flat: dict[str, Any]) -> dict[str, str]:
  """Fields of MMR and BatchNorm that do nothing without them, and why."""
  found = {}
  if not flat['mmr.alpha'] and not flat['mmr.alpha_end']:
    because = 'with mmr.alpha=0.0: nothing is regularized'
    found['mmr.stop_feature_gradient'] = because
  used = flat['model.name'], flat['selection.proxy']
  if not any(name and models.find(name).batch_norm for name in used):
    because = f'with model.name={used[0]!r}, which has no BatchNorm'
    found['model.batch_norm'] = because
  return found


def _forbid(flat: dict[str, Any], names: tuple[str, ...], because: str) -> None:
  """Raises if one of the fields is not its default."""
  defaults = flatten(default())
  for name in names:
    value = defaults[name]
    require(flat[name] == value, name, flat[name], f'{value!r} {because}')


def _check_basics(flat: dict[str, Any]) -> None:
  if flat['mmr.alpha_end'] is not None and flat['steps'] < 2:
    require(False, 'steps', flat['steps'], 'at least 2 with mmr.alpha_end')
  if flat['optimizer.name'] == 'adam':
    because = "with optimizer.name='adam', which has its own"
    _forbid(flat, ('optimizer.momentum',), because)
  if flat['optimizer.name'] != 'sgd':
    because = f'with optimizer.name={flat["optimizer.name"]!r}: SGD has it'
    _forbid(flat, ('optimizer.nesterov',), because)
  if flat['optimizer.nesterov']:
    momentum = flat['optimizer.momentum']
    require(
      momentum > 0,
      'optimizer.momentum',
      momentum,
      'above 0 with optimizer.nesterov',
    )
  if flat['data.name'] not in data.STREAMED:
    because = f'with data.name={flat["data.name"]!r}, which lies in memory'
    fields = ('data.image_size', 'data.workers', 'data.undecodable')
    _forbid(flat, fields, because)
  if flat['data.name'] in data.GENERATED:
    because = f'with data.name={flat["data.name"]!r}, which is in no folder'
    _forbid(flat, ('data.data_dir',), because)
  if flat['optimizer.decay'] == 'linear':
    because = "with optimizer.decay='linear', which falls from one rate"
    _forbid(flat, ('optimizer.boundaries',), because)
  warmup, steps = flat['optimizer.warmup'], flat['steps']
  allowed = f'below steps={steps}, or the learning rate is never reached'
  require(warmup < steps, 'optimizer.warmup', warmup, allowed)
  _check_augmentations(flat)
  keep, every = flat['keep_every'], flat['checkpoint_every']
  if keep is not None:
    allowed = f'a multiple of checkpoint_every={every}, which saves them'
    require(keep % every == 0, 'keep_every', keep, allowed)
    allowed = f'at most steps={flat["steps"]}, or nothing more is kept'
    require(keep <= flat['steps'], 'keep_every', keep, allowed)
  call = flat['steps_per_call']
  if call is not None:
    for name in ('steps', 'log_every', 'eval_every', 'checkpoint_every'):
      divisor = f'a divisor of {name}={flat[name]}'
      require(flat[name] % call == 0, 'steps_per_call', call, divisor)


def _check_augmentations(flat: dict[str, Any]) -> None:
  names = flat['data.augmentations']
  for name, field in (
    ('cutout', 'data.cutout_size'),
    ('crop', 'data.crop_padding'),
  ):
    if name not in names:
      _forbid(flat, (field,), f'without the augmentation {name}')
  if 'crop' in names:
    padding = flat['data.crop_padding']
    allowed = 'above 0 with the augmentation crop, or it does nothing'
    require(padding > 0, 'data.crop_padding', padding, allowed)
  if flat['data.name'] in data.STREAMED:
    allowed = "without 'random_resized_crop': images are read as such crops"
    holds = 'random_resized_crop' not in names
    require(holds, 'data.augmentations', names, allowed)


IMAGES_ONLY = (
  'data.augmentations',
  'data.crop_padding',
  'data.normalization',
  'selection.score_resolution',
  'attack.name',
)
SENTENCES_ONLY = ('data.max_length', 'data.widths')


def _check_sentences(flat: dict[str, Any]) -> None:
  """Whether data and models are of the same kind: images, or sentences."""
  name = flat['data.name']
  sentences = name in data.SENTENCES
  kind = 'sentences' if sentences else 'images'
  for field in ('model.name', 'selection.proxy'):
    if flat[field] is not None:
      holds = models.find(flat[field]).reads == kind
      allowed = f'a model that reads {kind} with data.name={name!r}'
      require(holds, field, flat[field], allowed)
  _check_arrays(flat)
  because = f'with data.name={name!r}, which is of {kind}'
  _forbid(flat, IMAGES_ONLY if sentences else SENTENCES_ONLY, because)
  if sentences:
    most = bert.MAX_LENGTH
    allowed = f'at most {most}, the places that BERT knows'
    require(
      flat['data.max_length'] <= most, 'data.max_length',
      flat['data.max_length'], allowed,
    )  # fmt: skip
  if name not in data.VOCABULARY_NEEDED:
    because = f'with data.name={name!r}, which needs none'
    _forbid(flat, ('data.vocabulary',), because)


def _check_arrays(flat: dict[str, Any]) -> None:
  """Refuses, of registered arrays, what is for images."""
  name = flat['data.name']
  if name not in data.own.DATASETS:
    return
  found = data.own.DATASETS[name]
  if not found.pixels:
    because = f'with data.name={name!r}, whose inputs are not uint8 images'
    _forbid(flat, IMAGES_ONLY, because)
  for field in ('model.name', 'selection.proxy'):
    if flat[field] is not None and len(found.shape) != 3:
      require(
        models.find(flat[field]).any_shape, field, flat[field],
        f'a registered model with data.name={name!r}, whose inputs have shape '
        f'{found.shape}',
      )  # fmt: skip


def _check_model(flat: dict[str, Any]) -> None:
  """Refuses options of other models."""
  name = flat['model.name']
  model = models.find(name)
  for field, holds, has in (
    ('model.variant', 'variant' in model.options, 'has one variant'),
    ('model.dropout', 'dropout' in model.options, 'has no dropout'),
    ('model.stem', 'stem' in model.options, 'has one stem'),
    ('model.width', 'width' in model.options, 'has no width multiplier'),
    ('model.dtype', 'dtype' in model.options, 'has no field dtype'),
    (
      'model.pretrained',
      model.published is not None,
      'has no published weights',
    ),
  ):
    if not holds:
      _forbid(flat, (field,), f'with model.name={name!r}, which {has}')


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
  require(pool >= size, 'pool_size', pool, allowed)
  every, reuse = flat['selection.every'], flat['selection.reuse']
  require(
    every == 1 or reuse == 1,
    'selection.every',
    every,
    f'1 with selection.reuse={reuse}: both say which steps score',
  )
  start, stop = flat['selection.start'], flat['selection.stop']
  allowed = f'below steps={flat["steps"]}, or nothing is ever scored'
  require(start < flat['steps'], 'selection.start', start, allowed)
  if stop is not None:
    allowed = f'above selection.start={start}, or nothing is ever scored'
    require(stop > start, 'selection.stop', stop, allowed)
    allowed = f'below steps={flat["steps"]}, or None: it would stop nothing'
    require(stop < flat['steps'], 'selection.stop', stop, allowed)
  _check_scorer(flat)


def _check_scorer(flat: dict[str, Any]) -> None:
  proxy = flat['selection.proxy']
  scorer = flat['model.name'] if proxy is None else proxy
  model = models.find(scorer)
  if 'dtype' not in model.options:
    because = f'where {scorer!r} scores, which has no field dtype'
    _forbid(flat, ('selection.score_dtype',), because)
  side = flat['selection.score_resolution']
  if side is not None:
    require(
      model.any_size,
      'selection.score_resolution',
      side,
      f'None where {scorer!r} scores: it reads images of one size only',
    )
    stem = flat['model.stem'] if proxy is None else 'imagenet'
    least = model.least_side_with(stem)
    allowed = f'at least {least} where {scorer!r} scores'
    require(side >= least, 'selection.score_resolution', side, allowed)
  if flat['selection.batch_stats'] == 'pool':
    because = (
      "with selection.batch_stats='pool': the statistics would not be of what "
      'the model sees'
    )
    names = ('selection.proxy', 'selection.score_resolution')
    _forbid(flat, names, because)
    require(
      models.find(flat['model.name']).batch_norm,
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
    require(
      not models.find(flat['model.name']).batch_norm,
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
  if flat['large_margin.top_k'] == 1:
    because = 'with large_margin.top_k=1: the one class is the worst case'
    _forbid(flat, ('large_margin.worst_case',), because)
  if (flat['trimming.first'], flat['trimming.last']) != (1, 1):
    because = 'with trimming, which is of cross-entropy'
    _forbid(flat, ('large_margin.weight',), because)
  if flat['optimizer.name'] == 'sgd':
    because = "with optimizer.name='sgd', which has none"
    _forbid(flat, ('optimizer.epsilon',), because)
  if not flat['optimizer.weight_decay']:
    because = 'with optimizer.weight_decay=0.0'
    _forbid(flat, ('optimizer.weight_decay_mask',), because)
  attack, radii = flat['attack.name'], flat['attack.epsilons']
  if attack is None:
    because = 'with attack.name=None'
    _forbid(flat, ('attack.epsilons', 'attack.steps'), because)
    return
  require(bool(radii), 'attack.epsilons', radii, 'given with attack.name')
  if attack == 'fgsm':
    because = "with attack.name='fgsm', which is one step"
    _forbid(flat, ('attack.steps',), because)


def check(flat: dict[str, Any]) -> None:
  """Checks fields against each other; each is good alone.

  Args:
    flat: every field by dotted name.

  Raises:
    ConfigError: naming the field to blame, its value and what is allowed.
  """
  _check_basics(flat)
  _check_sentences(flat)
  _check_model(flat)
  for field, because in idle(flat).items():
    _forbid(flat, (field,), because)
  _check_selection(flat)
  _check_trimming(flat)
  _check_losses(flat)
