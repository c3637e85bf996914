"""Configuration: every field, and the arguments of config files.

Every field stands in `default()` with its meaning, and is read somewhere;
`validation.py` says what each may be.
"""

import json
from typing import Any

import ml_collections
from ml_collections import config_dict

# Plain training on batches of b: no pool, nothing scored.
UNIFORM = 'uniform'

# Fields that may differ between a checkpoint and the run that continues it:
# they change neither a batch nor an update, but for what rounding does: sums
# over other devices, or compiled in another loop, end in other bits.
RESUMABLE = (
  'steps',
  'devices',
  'steps_per_call',
  'log_every',
  'eval_every',
  'checkpoint_every',
  'keep_every',
  'eval_batch_size',
  'data.data_dir',
  'data.workers',
  # What to do about what has not happened yet, or the run would have ended.
  'data.undecodable',
  'on_nonfinite',
  'attack.name',
  'attack.epsilons',
  'attack.steps',
)

# Not a field, but saved with them: of which arrays a registered dataset was.
DIGEST = 'data.digest'


class ConfigError(ValueError):
  """A field of the config is unknown, missing or has a bad value."""


def _data() -> dict[str, Any]:
  return {
    'name': 'digits',
    # Where TFDS has prepared datasets; None is TFDS's own folder.
    'data_dir': config_dict.placeholder(str),
    # The last training examples held out: in the original order where records
    # tell it (CIFAR, GLUE), else as they are stored.
    'validation_examples': 0,
    # The share of the other training examples that is used, and the share of
    # those that gets a wrong label; `seed` decides which.
    'fraction': 1.0,
    'label_noise': 0.0,
    # Of training images, in the order given: 'crop', 'flip', 'cutout',
    # 'autoaugment', 'random_resized_crop'. A crop is of an image with so many
    # pixels of padding on every side.
    'augmentations': (),
    'crop_padding': 4,
    # The side of the square that the augmentation cutout covers.
    'cutout_size': 16,
    # Statistics of the training split ('dataset') or ImageNet's, which
    # ImageNet has either way.
    'normalization': 'dataset',
    # Of ImageNet, whose JPEGs are decoded while training: the side that images
    # are cut to, and how many processes decode (0: the training process).
    'image_size': 224,
    # A JPEG that cannot be decoded ends the run ('stop'), or is left out and
    # counted ('skip').
    'undecodable': 'stop',
    'workers': 8,
    # Of sentences: the most tokens an example has, and the shorter widths that
    # those with fewer are padded to; a part of its own for each.
    'max_length': 128,
    'widths': (32, 64),
    # Of GLUE: a vocab.txt; None is the one of model.pretrained.
    'vocabulary': config_dict.placeholder(str),
  }


def _model() -> dict[str, Any]:
  return {
    'name': 'cnn',
    # Of the CIFAR ResNets: He's layout, or the one of the MMS authors' code.
    'variant': 'he',
    # Of the computation; parameters and the head stay float32.
    'dtype': 'float32',
    # Whose examples BatchNorm normalises with: all devices' ('global', which
    # does not depend on their number) or each device's own.
    'batch_norm': 'global',
    # The share of activations dropped: inside a block of wide ResNets; of
    # BERT's embeddings, sublayers, attention and features (published: 0.1).
    'dropout': 0.0,
    # Of ImageNet ResNets and DenseNets: 'imagenet', or 'small' for images of
    # 32x32.
    'stem': 'imagenet',
    # Of MobileNet: multiplier of the numbers of channels.
    'width': 1.0,
    # A .safetensors or PyTorch file to start from, of BERT a folder in the
    # layout of Hugging Face or a name there; None starts at random.
    'pretrained': config_dict.placeholder(str),
  }


def _optimizer() -> dict[str, Any]:
  optional = config_dict.placeholder
  return {
    'name': 'sgd',  # or 'adam', 'rmsprop'; the momentum below is not Adam's
    # learning_rates[i] from step boundaries[i-1] on.
    'learning_rates': (0.1,),
    'boundaries': (),
    # Steps over which the rate rises from 0; and whether it changes at the
    # boundaries only ('steps'), or also falls to 0 at the last ('linear').
    'warmup': 0,
    'decay': 'steps',
    'momentum': 0.9,
    'nesterov': False,
    # On 'kernels' only, of those on the 'convolutions' only, or on 'all'.
    'weight_decay': 0.0,
    'weight_decay_mask': 'kernels',
    # Of Adam and RMSProp; None is optax's own.
    'epsilon': optional(float),
    # Largest L2 norm of the gradient; None does not clip.
    'clip_norm': optional(float),
  }


def _selection() -> dict[str, Any]:
  optional = config_dict.placeholder
  return {
    # How the batch is chosen from a pool; 'uniform' has no pool.
    'rule': UNIFORM,
    # Rank over the examples of all devices, or of each 'device'.
    'scope': 'global',
    # The model's running BatchNorm statistics follow the 'selected'
    # batches or the 'pool', which a train-mode forward then scores.
    'batch_stats': 'selected',
    # One scored pool feeds so many steps, best ranks first.
    'reuse': 1,
    # Score at every n-th step, from step `start` to before `stop`; the
    # other steps are plain.
    'every': 1,
    'start': 0,
    'stop': optional(int),
    # Score in this dtype (None: the model's), at this side length (None:
    # the images' own), by this small model trained along (None: the model).
    'score_dtype': optional(str),
    'score_resolution': optional(int),
    'proxy': optional(str),
    # Of rule 'loss': how much the hard share grows per epoch of draws, the
    # rest being random; classes are balanced. 0 is plain hard-negative
    # mining; the authors' value is 0.1.
    'ramp': 0.0,
    # Of rule 'selective_backprop': the power of the loss percentile.
    'beta': 1.0,
    # Count how often each training example is in a batch.
    'log_counts': False,
  }


def _large_margin() -> dict[str, Any]:
  return {
    # Weight of the large-margin loss in the loss; 0 is none. And the weight of
    # cross-entropy beside it; 0 trains on the large-margin loss alone.
    'weight': 0.0,
    'cross_entropy': 1.0,
    # Where margins are asked for: 'input', 'features', or paths of submodules.
    'layers': ('input',),
    # How distances are measured there.
    'norm': 'l2',
    # How many wrong classes count, and whether only the nearest of them does.
    'top_k': 1,
    'worst_case': False,
    # Of softmax or of logits.
    'difference': 'softmax',
    # Distances are clipped to [gamma * (1 - alpha), gamma].
    'gamma': 1e4,
    'alpha': 4.0,
    'epsilon': 1e-6,
    # Divide gradient norms by the number of the layer's activations.
    'normalize_by_size': False,
    # The exact gradient, through the norm of the gradient.
    'second_order': False,
  }


def _attack() -> dict[str, Any]:
  return {
    # At the end the test split is evaluated under an l_inf attack too, of
    # each of these radii; images are in [0, 1]. None is no attack.
    'name': config_dict.placeholder(str),
    'epsilons': (),
    # Of PGD.
    'steps': 10,
  }


def default() -> ml_collections.ConfigDict:
  """Every field with its default; config files change some of them."""
  optional = config_dict.placeholder
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'steps': 1000,
      # b and B, over all devices. B is unused by the rule 'uniform'.
      'batch_size': 64,
      'pool_size': 640,
      # How many devices to use; None is all that JAX sees.
      'devices': optional(int),
      # Steps compiled into one call; None chooses: 1 on CPU, where XLA is slow
      # on gradients of convolutions in loops, and up to 100 on accelerators.
      'steps_per_call': optional(int),
      # What to do where a loss, a gradient, an update or BatchNorm's statistics
      # are NaN or infinite: 'stop' the run, or 'skip' the step. A NaN score
      # stops it too; with 'skip' it ranks last.
      'on_nonfinite': 'stop',
      # Steps between two lines of train.csv, two evaluations, two checkpoints.
      'log_every': 100,
      'eval_every': 1000,
      'checkpoint_every': 1000,
      # Checkpoints at multiples of it are never deleted; None: the last two and
      # the best are kept.
      'keep_every': optional(int),
      'eval_batch_size': 1000,  # over all devices
      'data': _data(),
      'model': _model(),
      'optimizer': _optimizer(),
      'selection': _selection(),
      'trimming': {
        # The share of the batch with the largest losses that counts, linear
        # in the epoch from `first` to `last`; 1 and 1 is no trimming. The
        # paper has 1.0 and 0.2.
        'first': 1.0,
        'last': 1.0,
        # The backward pass runs on 'all' of the batch, or on the 'kept' part
        # only (for models without BatchNorm).
        'backward': 'all',
      },
      'loss': {'risk': 'cross_entropy', 'names': (), 'weights': ()},
      'mmr': {
        # Weight of MMR in the loss; linear in the step up to alpha_end, if set.
        'alpha': 0.0,
        'alpha_end': optional(float),
        # The paper's mean over the batch, or 'square_of_mean' as in the later
        # code; and whether the radius of the features is a constant.
        'reduction': 'mean_of_squares',
        'stop_feature_gradient': False,
      },
      'large_margin': _large_margin(),
      'attack': _attack(),
    }
  )


def require(holds: bool, name: str, value: Any, allowed: str) -> None:
  """Raises a `ConfigError` about a field unless `holds`."""
  if not holds:
    raise ConfigError(f'{name}={value!r} is not allowed: it must be {allowed}')


def parse_arguments(
  text: str | None, **fields: Any
) -> ml_collections.ConfigDict:
  """Parses the argument of a config file: `config.py:mms,regime=standard`.

  Args:
    text: what stands behind the colon: comma-separated `field=value`; the
      first may be a bare value, for the first field.
    **fields: for each field its default, whose type the value gets, or a
      tuple of strings: the values allowed, the first the default.

  Returns:
    The value of every field.

  Raises:
    ConfigError: unknown field, value not allowed, or field given twice.
  """
  values = {
    name: field[0] if isinstance(field, tuple) else field
    for name, field in fields.items()
  }
  given = set()
  for position, part in enumerate(filter(None, (text or '').split(','))):
    name, equals, value = part.partition('=')
    if not equals:
      if position:
        raise ConfigError(f'config argument {part!r} must be field=value')
      name, value = next(iter(fields)), part
    if name not in fields:
      raise ConfigError(
        f'config argument {name!r} is unknown; there are {tuple(fields)}'
      )
    if name in given:
      raise ConfigError(f'config argument {name!r} is given twice')
    given.add(name)
    field = fields[name]
    if isinstance(field, tuple):
      if value not in field:
        raise ConfigError(
          f'config argument {name}={value!r} must be one of {field}'
        )
      values[name] = value
    else:
      values[name] = _parse_scalar(name, value, type(field))
  return ml_collections.ConfigDict(values)


def _parse_scalar(name: str, value: str, kind: type) -> Any:
  table = {'true': True, 'false': False}
  try:
    return table[value.lower()] if kind is bool else kind(value)
  except (KeyError, ValueError):
    raise ConfigError(
      f'config argument {name}={value!r} must be of type {kind.__name__}'
    ) from None


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """{'data.name': 'digits', ...}; tuples for sequences."""
  flat = {}
  for name, value in dict(config).items():
    if isinstance(value, ml_collections.ConfigDict | dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = tuple(value) if isinstance(value, list) else value
  return flat


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The flattened config as JSON will give it back."""
  return json.loads(json.dumps(flatten(config)))


def from_json(saved: dict[str, Any]) -> ml_collections.ConfigDict:
  """The config that `as_json` made this of; fields it lacks are defaults.

  Raises:
    ConfigError: it has a field that does not exist.
  """
  config = default()
  known = flatten(config)
  for name, value in saved.items():
    if name not in known:
      raise ConfigError(
        f'{name}={value!r} is unknown; the fields are {tuple(known)}'
      )
    value = tuple(value) if isinstance(value, list) else value
    config.update_from_flattened_dict({name: value})
  return config


def binds_devices(config: dict[str, Any]) -> bool:
  """Whether what is trained depends on the number of devices."""
  return (
    # Whose examples are normalised, or ranked.
    config.get('model.batch_norm') == 'device'
    or config.get('selection.scope') == 'device'
    # They divide the part that the gradient sees.
    or config.get('trimming.backward') == 'kept'
  )


def differences(saved: dict[str, Any], config: dict[str, Any]) -> list[str]:
  """Lines 'field: saved -> now' for fields that a continued run must keep."""
  saved = as_json(default()) | saved  # fields that came after the checkpoint
  free = {*RESUMABLE}
  trims = config.get('trimming.first') != config.get('trimming.last')
  falls = config.get('optimizer.decay') == 'linear'
  if config.get('mmr.alpha_end') is not None or trims or falls:
    # The slope of alpha, of the share that is kept, of the learning rate.
    free.discard('steps')
  if binds_devices(config):
    free.discard('devices')
  return [
    f'{name}: {saved.get(name)!r} -> {config.get(name)!r}'
    for name in sorted({*saved, *config} - free)
    if saved.get(name) != config.get(name)
  ]
