"""What a config may be: each field, fields together, the data, the devices.

A mistake in a config stops the run before anything is compiled, with a
`ConfigError` that names the field, its value and the allowed values. A field
that has no effect in a run is not an error, but the trainer warns of it.
"""

import copy
from collections.abc import Mapping

import ml_collections

from margin_jax import config as config_lib
from margin_jax import config_files, data, models
from margin_jax.checks import did_you_mean, nearest
from margin_jax.config import (
  FIELDS,
  TRIMMING,
  ConfigError,
  Flat,
  flatten,
  require,
)
from margin_jax.data import imagenet, kinds
from margin_jax.models import bert


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks everything that can be checked without devices or data.

  Raises:
    ConfigError: naming the field, its value and what is allowed.
  """
  flat = flatten(config)
  _check_fields(flat)
  # What has no effect contradicts nothing.
  flat |= {name: FIELDS[name].default for name in unused(config)}
  _check_steps(flat)
  _check_optimizer(flat)
  _check_data(flat)
  _check_models(flat)
  _check_selection(flat)
  _check_scoring(flat)
  _check_memory(flat)
  _check_trimming(flat)
  _check_losses(flat)
  _check_attack(flat)


def unused(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the fields that are set but have no effect in this run, and why.

  Args:
    config: each of its fields has a value that it may have.

  Returns:
    Reasons by the name of the field, of those that are not their default.
  """
  flat = flatten(config)
  return {
    name: reason
    for name, reason in config_lib.without_effect(flat).items()
    if flat[name] != FIELDS[name].default
  }


def set_in_vain(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns what `unused` does, but for a pool that just follows the batch."""
  reasons = unused(config)
  if config.pool_size == config_lib.POOL_FACTOR * config.batch_size:
    reasons.pop('pool_size', None)
  return reasons


def warnings(config: ml_collections.ConfigDict) -> list[str]:
  """Returns a line for all that is set and has no effect."""
  flat = flatten(config)
  lines = [
    f'warning: {name}={flat[name]!r} has no effect: {reason}'
    for name, reason in set_in_vain(config).items()
  ]
  return [*lines, *never_reached(config), *rising_mmr(config)]


def never_reached(config: ml_collections.ConfigDict) -> list[str]:
  """Returns a line if the run ends before boundaries of its learning rate."""
  boundaries = tuple(config.optimizer.boundaries)
  beyond = [x for x in boundaries if x >= config.steps]
  if not beyond:
    return []
  return [
    f'warning: {len(beyond)} of optimizer.boundaries={boundaries} are never '
    f'reached in steps={config.steps}'
  ]


def rising_mmr(config: ml_collections.ConfigDict) -> list[str]:
  """Returns a line if MMR is on although mmr.alpha is 0."""
  end = config.mmr.alpha_end
  if config.mmr.alpha or not end:
    return []
  return [
    f'warning: MMR is on: mmr.alpha rises from 0 to mmr.alpha_end={end}; '
    'mmr.alpha_end=None turns it off'
  ]


def effective(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Returns a copy in which each field without effect is its default.

  So whoever reads a field need not ask whether it counts.
  """
  changed = ml_collections.ConfigDict(copy.deepcopy(config))  # not frozen
  with changed.ignore_type():
    for name in unused(config):
      changed.update_from_flattened_dict({name: FIELDS[name].default})
  return changed


# Each field by itself.


def _check_fields(flat: Flat) -> None:
  for name in sorted({*flat} - {*FIELDS}):
    raise ConfigError(f'{name}={flat[name]!r} {config_files.is_unknown(name)}')
  for name, field in FIELDS.items():
    if name not in flat:
      raise ConfigError(f'{name} is missing; its default is {field.default!r}')
  for name, field in FIELDS.items():
    value, check = flat[name], field.check
    near = nearest(value, check.choices()) if isinstance(value, str) else []
    meant = did_you_mean(list(map(repr, near)))
    require(check.holds(value), name, value, check.allowed() + meant)


# Fields that contradict each other.


def _forbid(flat: Flat, names: tuple[str, ...], because: str) -> None:
  """Raises if one of the fields is not its default."""
  for name in names:
    usual = FIELDS[name].default
    require(flat[name] == usual, name, flat[name], f'{usual!r} {because}')


def _check_steps(flat: Flat) -> None:
  steps, warmup = flat['steps'], flat['optimizer.warmup']
  if flat['mmr.alpha_end'] is not None:
    require(steps >= 2, 'steps', steps, 'at least 2 with mmr.alpha_end')
  allowed = f'below steps={steps}, or the learning rate is never reached'
  require(warmup < steps, 'optimizer.warmup', warmup, allowed)
  keep, every = flat['keep_every'], flat['checkpoint_every']
  if keep is not None:
    allowed = f'a multiple of checkpoint_every={every}, which saves them'
    require(keep % every == 0, 'keep_every', keep, allowed)
  call = flat['steps_per_call']
  if call is not None:
    for name in ('steps', 'log_every', 'eval_every', 'checkpoint_every'):
      divisor = f'a divisor of {name}={flat[name]}'
      require(flat[name] % call == 0, 'steps_per_call', call, divisor)


def _check_optimizer(flat: Flat) -> None:
  boundaries = flat['optimizer.boundaries']
  decay = flat['optimizer.decay']
  if decay != 'steps':
    because = f'with optimizer.decay={decay!r}, which starts from one rate'
    _forbid(flat, ('optimizer.boundaries',), because)
  rates = flat['optimizer.learning_rates']
  allowed = (
    f'{len(boundaries) + 1} value(s), one more than optimizer.boundaries='
    f'{boundaries} has'
  )
  holds = len(rates) == len(boundaries) + 1
  require(holds, 'optimizer.learning_rates', rates, allowed)


def _check_data(flat: Flat) -> None:
  """Checks that the options fit the kind of data."""
  name, augmentations = flat['data.name'], flat['data.augmentations']
  meant = did_you_mean(list(map(repr, kinds.near(name))))
  known = kinds.is_known(name, flat['data.data_dir'])
  require(known, 'data.name', name, kinds.allowed() + meant)
  if not config_lib.IMAGES.met(flat):
    because = f'with data.name={name!r}, whose inputs are not uint8 images'
    names = ('data.augmentations', 'selection.score_resolution', 'attack.name')
    _forbid(flat, names, because)
  if name in imagenet.NAMES:
    allowed = (
      "without 'random_resized_crop': images are already read as such crops"
    )
    holds = 'random_resized_crop' not in augmentations
    require(holds, 'data.augmentations', augmentations, allowed)
  if 'crop' in augmentations:
    padding = flat['data.crop_padding']
    allowed = 'above 0 with the augmentation crop, or it does nothing'
    require(padding > 0, 'data.crop_padding', padding, allowed)
  if kinds.is_sentences(name):
    longest, buckets = flat['data.max_length'], flat['data.buckets']
    allowed = f'at most {bert.MAX_LENGTH}, the positions that BERT has'
    holds = longest <= bert.MAX_LENGTH
    require(holds, 'data.max_length', longest, allowed)
    allowed = f'lengths below data.max_length={longest}'
    holds = all(length < longest for length in buckets)
    require(holds, 'data.buckets', buckets, allowed)


def _check_models(flat: Flat) -> None:
  """Checks that the model and the proxy read such data."""
  name, model = flat['data.name'], flat['model.name']
  kind = 'sentences' if kinds.is_sentences(name) else 'images'
  registered = data.REGISTERED.get(name)
  for field in ('model.name', 'selection.proxy'):
    if flat[field] is not None:
      holds = models.find(flat[field]).reads == kind
      allowed = f'a model that reads {kind} with data.name={name!r}'
      require(holds, field, flat[field], allowed)
      if registered is not None and len(registered.shape) != 3:
        holds = models.find(flat[field]).any_shape
        allowed = (
          f'a registered model with data.name={name!r}, whose inputs have '
          f'shape {registered.shape}'
        )
        require(holds, field, flat[field], allowed)
  if models.find(model).published is None:
    because = f'with model.name={model!r}, which has no published weights'
    _forbid(flat, ('model.pretrained',), because)
  if flat['model.variant'] == 'mms_select':
    because = "with model.variant='mms_select', whose bias is in a kernel"
    _forbid(flat, ('model.kernel_init',), because)


def _check_selection(flat: Flat) -> None:
  """Checks which steps score, and how many examples."""
  if not config_lib.scores_pools(flat):
    return
  pool, size = flat['pool_size'], flat['batch_size'] * flat['selection.reuse']
  allowed = f'at least batch_size * selection.reuse = {size}'
  require(pool >= size, 'pool_size', pool, allowed)
  every, reuse = flat['selection.every'], flat['selection.reuse']
  allowed = f'1 with selection.reuse={reuse}: both say which steps score'
  require(every == 1 or reuse == 1, 'selection.every', every, allowed)
  start, stop = flat['selection.start'], flat['selection.stop']
  allowed = f'below steps={flat["steps"]}, or nothing is ever scored'
  require(start < flat['steps'], 'selection.start', start, allowed)
  if stop is not None:
    allowed = f'above selection.start={start}, or nothing is ever scored'
    require(stop > start, 'selection.stop', stop, allowed)


def _check_scoring(flat: Flat) -> None:
  """Checks that the model that scores can do what is asked."""
  name, proxy = flat['model.name'], flat['selection.proxy']
  scorer = name if proxy is None else proxy
  model = models.find(scorer)
  if 'dtype' not in model.options:
    because = f'where {scorer!r} scores, which has no field dtype'
    _forbid(flat, ('selection.score_dtype',), because)
  field = 'selection.score_resolution'
  side = flat[field]
  if side is not None:
    allowed = f'None where {scorer!r} scores: it reads images of one size only'
    require(model.any_size, field, side, allowed)
    stem = flat['model.stem'] if proxy is None else 'imagenet'
    least = model.least_side_with(stem)
    require(
      side >= least, field, side, f'at least {least} where {scorer!r} scores'
    )
  if flat['selection.batch_stats'] == 'pool':
    because = (
      "with selection.batch_stats='pool': the statistics would not describe "
      'what the model sees'
    )
    _forbid(flat, ('selection.proxy', field), because)
    allowed = f"'selected' for {name!r}, which has no BatchNorm"
    holds = models.find(name).batch_norm
    require(holds, 'selection.batch_stats', 'pool', allowed)


def _check_memory(flat: Flat) -> None:
  """Checks that the sampler can do with the remembered scores what it is to."""
  if not config_lib.remembers_scores(flat):
    return
  rule, size = flat['selection.rule'], flat['batch_size']
  allowed = "'loss' with selection.memory, and selection.sampler='weighted'"
  holds = rule != 'selective_backprop'
  require(holds, 'selection.rule', rule, allowed)
  if flat['selection.sampler'] == 'pool':
    pool, most = flat['pool_size'], 4 * size
    allowed = (
      f'from batch_size = {size} to 4 * batch_size = {most} with '
      'selection.memory: with larger pools, most examples would never be seen'
    )
    require(size <= pool <= most, 'pool_size', pool, allowed)
  if flat['selection.share'] == 'auto':
    drop = flat['selection.drop']
    allowed = "above 0 with selection.share='auto', which divides by it"
    require(drop > 0, 'selection.drop', drop, allowed)


def _check_trimming(flat: Flat) -> None:
  """Checks that trimming stands alone, and is of cross-entropy."""
  if not TRIMMING.met(flat):
    return
  because = 'with trimming: both choose what the gradient sees'
  _forbid(flat, ('selection.rule',), because)
  because = 'with trimming, which chooses inside the loss'
  _forbid(flat, ('selection.log_counts',), because)
  because = 'with trimming, which trims cross-entropy'
  _forbid(flat, ('loss.risk', 'large_margin.weight'), because)
  if flat['trimming.backward'] == 'kept':
    model = flat['model.name']
    allowed = f"'all' for {model!r}: its BatchNorm needs the whole batch"
    holds = not models.find(model).batch_norm
    require(holds, 'trimming.backward', 'kept', allowed)
    because = "with trimming.backward='kept': they are over the whole batch"
    _forbid(flat, ('mmr.alpha', 'mmr.alpha_end', 'loss.names'), because)


def _check_losses(flat: Flat) -> None:
  """Checks that every added loss has a weight, and adds something."""
  names, weights = flat['loss.names'], flat['loss.weights']
  allowed = f'{len(names)} values, one for each of loss.names={names}'
  require(len(weights) == len(names), 'loss.weights', weights, allowed)
  risk = flat['loss.risk']
  allowed = f'without {risk!r}, which is the risk'
  require(risk not in names, 'loss.names', names, allowed)
  layers, weights = (flat[f'large_margin.layer{x}'] for x in ('s', '_weights'))
  if weights:
    allowed = f'{len(layers)} values, one for each of {layers}'
    holds = len(weights) == len(layers)
    require(holds, 'large_margin.layer_weights', weights, allowed)
  if flat['model.batch_norm_examples'] is not None:
    because = (
      'with model.batch_norm_examples: it holds the statistics of one batch '
      'fixed, and these are of groups'
    )
    _forbid(flat, ('large_margin.weight',), because)


def _check_attack(flat: Flat) -> None:
  if flat['attack.name'] is not None:
    epsilons = flat['attack.epsilons']
    allowed = 'one or more values with attack.name'
    require(bool(epsilons), 'attack.epsilons', epsilons, allowed)


# The data and the devices.


def validate_data(
  config: ml_collections.ConfigDict, examples: int, image_shape: tuple[int, ...]
) -> None:
  """Checks that pool and model fit the training split.

  Args:
    config: valid by itself, and effective.
    examples: number of training examples.
    image_shape: the shape of one image.

  Raises:
    ConfigError: naming the field, its value and what is allowed.
  """
  pools = config_lib.samples_pools(flatten(config))
  name = 'pool_size' if pools else 'batch_size'
  allowed = f'at most {examples}, the number of training examples'
  held_out = config.data.validation_examples
  if held_out:
    allowed += f' without those of data.validation_examples={held_out}'
  require(config[name] <= examples, name, config[name], allowed)
  if config.trimming.first != config.trimming.last:
    epoch = examples // config.batch_size
    require(
      config.steps > epoch, 'steps', config.steps,
      f'above {epoch}, one epoch: what trimming keeps changes by the epoch',
    )  # fmt: skip
  if config.mmr.schedule == 'released':
    epoch = examples // config.batch_size
    require(
      config.steps > epoch, 'steps', config.steps,
      f"above {epoch}, one epoch without MMR, with mmr.schedule='released'",
    )  # fmt: skip
  if kinds.is_sentences(config.data.name):
    return  # what remains is about images
  _check_sides(config, image_shape)


def idle_memory(
  config: ml_collections.ConfigDict, counts: Mapping[str, int]
) -> list[str]:
  """Returns a line if the run ends before its sampler leaves anything out."""
  selection = config.selection
  epoch = counts['train'] // config.batch_size
  tail = config.steps - round(selection.tail * config.steps)
  if not selection.memory or selection.warmup * epoch < tail:
    return []
  return [
    'warning: selection.memory=True has no effect: the first '
    f'selection.warmup={selection.warmup} epoch(s) have {epoch:,} steps each, '
    f'and all examples; so have the steps from {tail:,} on '
    f'(selection.tail={selection.tail:g})'
  ]


def _check_sides(
  config: ml_collections.ConfigDict, image_shape: tuple[int, ...]
) -> None:
  """Checks that images are as large as everything needs them to be."""
  least = min(image_shape[:2])
  if 'crop' in config.data.augmentations:
    padding = config.data.crop_padding
    allowed = f'below {least}, the side of the images: some crops were empty'
    require(padding < least, 'data.crop_padding', padding, allowed)
  if 'cutout' in config.data.augmentations:
    size = config.data.cutout_size
    allowed = f'at most {least}, the side of the images'
    require(size <= least, 'data.cutout_size', size, allowed)
  side = config.selection.score_resolution
  if side is not None:
    allowed = f'below the {least} of the images themselves'
    require(side < least, 'selection.score_resolution', side, allowed)
  for name, model, stem in (
    ('model.name', config.model.name, config.model.stem),
    ('selection.proxy', config.selection.proxy, 'imagenet'),
  ):
    if model is not None:
      holds = least >= models.find(model).least_side_with(stem)
      require(holds, name, model, f'a model for images of {image_shape}')


def validate_devices(config: ml_collections.ConfigDict, devices: int) -> None:
  """Checks that the devices can share batch and pool evenly.

  Raises:
    ConfigError: naming the field, its value and what is allowed.
  """
  names = ['batch_size']
  if config_lib.samples_pools(flatten(config)) and not config.selection.memory:
    names.append('pool_size')
  for name in names:
    holds = config[name] % devices == 0
    require(holds, name, config[name], f'divisible by {devices} devices')
  own, parts = config.batch_size // devices, config.accumulate
  allowed = f'a divisor of {own}, the examples in the batch of each device'
  require(own % parts == 0, 'accumulate', parts, allowed)
  if config.model.batch_norm_examples is not None:
    _check_groups(config, devices)


def _check_groups(config: ml_collections.ConfigDict, devices: int) -> None:
  """Checks that BatchNorm's groups and the devices divide the examples."""
  size = config.model.batch_norm_examples
  if config.accumulate > 1:
    part = config.batch_size // devices // config.accumulate
    allowed = (
      f'a divisor of {part}, the examples of a part on each device, with '
      f'accumulate={config.accumulate}'
    )
    require(part % size == 0, 'model.batch_norm_examples', size, allowed)
  places = {'': config.batch_size}
  if config.selection.batch_stats == 'pool':
    places[' in a pool'] = config.pool_size
  for place, total in places.items():
    own = total // devices
    allowed = (
      f'a divisor of {own}, the examples of each device{place}, or a multiple '
      f'of them and a divisor of all {total}'
    )
    holds = own % size == 0 or (size % own == 0 and total % size == 0)
    require(holds, 'model.batch_norm_examples', size, allowed)


def choices(name: str) -> tuple[str, ...]:
  """Returns the names that a field may be, registered ones included."""
  return FIELDS[name].check.choices()
