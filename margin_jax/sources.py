"""Config -> the devices and the data of a run, both checked against it."""

import ml_collections

from margin_jax import config as config_lib
from margin_jax import data, parallel, selection, validation
from margin_jax.models import bert_weights, pretrained


def load(
  config: ml_collections.ConfigDict,
  rule: selection.Rule | None,
  training: bool = True,
) -> tuple[parallel.Devices, data.Source | data.Streamed]:
  """Checks the config against itself, the data and, to train, the devices.

  Args:
    config: of the run.
    rule: a rule of the caller's own, or None.
    training: whether steps will be run, and not only examples measured.

  Raises:
    ConfigError: a field is bad, or does not fit the data or the devices.
    DatasetError: the dataset is missing or broken.
  """
  validation.validate(config)
  _check_rule(config, rule)
  try:
    devices = parallel.Devices(config.devices)
    if training:
      validation.validate_devices(config, devices.total)
    source = _source(config)
  except pretrained.PretrainedError as error:
    raise config_lib.ConfigError(f'model.pretrained: {error}') from error
  except ValueError as error:  # what only the machine or the data can tell
    raise config_lib.ConfigError(str(error)) from error
  validation.validate_data(config, source.counts['train'], source.input_shape)
  return devices, source


def _source(
  config: ml_collections.ConfigDict,
) -> data.Source | data.Streamed:
  common = {
    'data_dir': config.data.data_dir,
    'validation_examples': config.data.validation_examples,
    'fraction': config.data.fraction,
    'label_noise': config.data.label_noise,
    'seed': config.seed,
  }
  if config.data.name in data.SENTENCES:
    scored = config.selection.rule != config_lib.UNIFORM
    return data.load_sentences(
      config.data.name,
      max_length=config.data.max_length,
      widths=config.data.widths,
      vocabulary=vocabulary(config),
      draw_size=config.pool_size if scored else config.batch_size,
      **common,
    )
  return data.load(
    config.data.name,
    augmentations=config.data.augmentations,
    crop_padding=config.data.crop_padding,
    cutout_size=config.data.cutout_size,
    normalization=config.data.normalization,
    image_size=config.data.image_size,
    workers=config.data.workers,
    **common,
  )


def _check_rule(
  config: ml_collections.ConfigDict, rule: selection.Rule | None
) -> None:
  if rule is not None and config.selection.rule == config_lib.UNIFORM:
    raise config_lib.ConfigError(
      "selection.rule='uniform' is not allowed with a rule of your own, which "
      "needs a pool: set it to another, 'random' say"
    )
  arranged = config.selection.rule == 'selective_backprop'
  if rule is not None and (config.selection.ramp or arranged):
    raise config_lib.ConfigError(
      f'selection.rule={config.selection.rule!r} with ramp='
      f'{config.selection.ramp} is not allowed with a rule of your own, whose '
      "scores are ranked as they are: use 'random' and no ramp"
    )


def vocabulary(config: ml_collections.ConfigDict) -> str | None:
  """The vocab.txt that sentences are read with: weights bring their own."""
  if config.data.vocabulary is not None or config.model.pretrained is None:
    return config.data.vocabulary
  if config.data.name not in data.VOCABULARY_NEEDED:
    return None
  return str(bert_weights.resolve(config.model.pretrained) / 'vocab.txt')
