"""Fields that are good alone and bad together.

Refused are combinations that would do nothing, or contradict each other.
"""

from typing import Any

from margin_jax import data, models
from margin_jax.config import UNIFORM, default, flatten, require
from margin_jax.models import bert, pretrained

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
  if not any(name and models.has_batch_norm(name) for name in used):
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
      holds = models.reads_sentences(flat[field]) == sentences
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
        flat[field] in models.own.MODELS, field, flat[field],
        f'a registered model with data.name={name!r}, whose inputs have shape '
        f'{found.shape}',
      )  # fmt: skip


def _check_model(flat: dict[str, Any]) -> None:
  """Refuses options of other models."""
  name = flat['model.name']
  for field, holds, has in (
    ('model.variant', models.has_variants(name), 'has one variant'),
    ('model.dropout', models.has_dropout(name), 'has no dropout'),
    ('model.stem', models.has_stems(name), 'has one stem'),
    ('model.width', models.has_widths(name), 'has no width multiplier'),
    ('model.dtype', models.has_dtypes(name), 'has no field dtype'),
    ('model.pretrained', pretrained.supports(name), 'has no published weights'),
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
  if not models.has_dtypes(scorer):
    because = f'where {scorer!r} scores, which has no field dtype'
    _forbid(flat, ('selection.score_dtype',), because)
  side = flat['selection.score_resolution']
  if side is not None:
    require(
      models.takes_any_resolution(scorer),
      'selection.score_resolution',
      side,
      f'None where {scorer!r} scores: it reads images of one size only',
    )
    stem = flat['model.stem'] if proxy is None else 'imagenet'
    least = models.least_side(scorer, stem)
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
    require(
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
    _forbid(flat, ('optimizer.decayed',), because)
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
