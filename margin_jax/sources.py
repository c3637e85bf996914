"""Config -> the devices and the data of a run, both checked against it."""

import os
import pathlib
import shutil

import ml_collections

from margin_jax import config as config_lib
from margin_jax import data, files, parallel, selection, validation
from margin_jax.checkpoints import FOLDER
from margin_jax.data import tokenization
from margin_jax.models import bert_weights, pretrained


def load(
  config: ml_collections.ConfigDict,
  rule: selection.Rule | None,
  training: bool = True,
  workdir: str | None = None,
) -> tuple[parallel.Devices, data.Source | data.Streamed]:
  """Checks the config against itself, the data and, to train, the devices.

  Args:
    config: of the run.
    rule: a rule of the caller's own, or None.
    training: whether steps will be run, and not only examples measured.
    workdir: of the run, where it may keep its vocabulary.

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
    source = _source(config, workdir)
  except pretrained.PretrainedError as error:
    raise config_lib.ConfigError(f'model.pretrained: {error}') from error
  except ValueError as error:  # what only the machine or the data can tell
    raise config_lib.ConfigError(str(error)) from error
  validation.validate_data(config, source.counts['train'], source.input_shape)
  return devices, source


def _source(
  config: ml_collections.ConfigDict, workdir: str | None
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
      vocabulary=vocabulary(config, workdir),
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
    undecodable=config.data.undecodable,
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


def vocabulary(
  config: ml_collections.ConfigDict, workdir: str | None
) -> str | None:
  """The vocab.txt that sentences are read with, None where none is needed.

  The one that `data.vocabulary` names, else that of `model.pretrained`; where
  they are gone, the copy that a run with checkpoints has in its workdir, so
  that it outlives its sources.

  Raises:
    ValueError: there are two, and they differ.
    PretrainedError: the weights' folder is missing.
    DatasetError: one cannot be read, or the weights are of cased words.
  """
  if config.data.name not in data.VOCABULARY_NEEDED:
    return None
  named, weights = config.data.vocabulary, config.model.pretrained
  kept = _kept(workdir)
  found = {}
  if named is not None and not (kept and _gone(named)):
    found['data.vocabulary'] = os.path.expanduser(named)
  if weights is not None and not (kept and _gone(weights)):
    folder = bert_weights.resolve(weights)
    tokenization.check_words(folder)
    path = folder / bert_weights.VOCABULARY
    if path.is_file() or not (named or kept):
      found['model.pretrained'] = str(path)
  if kept:
    found['the workdir'] = kept
  digests = {
    tokenization.fingerprint(tokenization.read_vocab(path))
    for path in found.values()
  }
  if len(digests) > 1:
    raise ValueError(
      f'the tokens of {" and ".join(found)} must be the same: they differ '
      f'between {" and ".join(found.values())}'
    )
  return next(iter(found.values()), None)


def _gone(path: str) -> bool:
  """Whether there is no such file, or it would have to be downloaded."""
  return not os.path.exists(os.path.expanduser(path))


def _kept(workdir: str | None) -> str | None:
  """The copy in the workdir, of a run that has begun: what else is there may
  be of a start that came to nothing."""
  path = pathlib.Path(workdir or '', bert_weights.VOCABULARY)
  folder = pathlib.Path(workdir or '', FOLDER)
  if workdir is None or not (path.is_file() and folder.is_dir()):
    return None
  begun = any(entry.name.isdigit() for entry in folder.iterdir())
  return str(path) if begun else None


def keep_vocabulary(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Copies the vocabulary into the workdir."""
  path = vocabulary(config, workdir)
  kept = pathlib.Path(workdir, bert_weights.VOCABULARY)
  if path is not None and path != str(kept):
    with files.whole(kept) as aside:
      shutil.copyfile(path, aside)
