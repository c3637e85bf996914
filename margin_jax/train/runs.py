"""What a run keeps of its config; a run that has trained, opened again."""

import json
import os
import pathlib
import runpy
from typing import Any

from margin_jax import config as config_lib
from margin_jax import data, models, selection
from margin_jax.train.checkpoints import FOLDER, Checkpoints


def to_save(config: config_lib.ml_collections.ConfigDict) -> dict[str, Any]:
  """What a checkpoint and result.json keep of the config."""
  saved = config_lib.as_json(config)
  if config.data.name in data.own.DATASETS:
    saved[config_lib.DIGEST] = data.own.DATASETS[config.data.name].digest
  return saved


def saved_config(
  info: dict[str, Any], data_dir: str | None
) -> config_lib.ml_collections.ConfigDict:
  """The run's config; a rule that only the run knew does not matter here."""
  saved = dict(info['config'])
  digest = saved.pop(config_lib.DIGEST, None)
  rule = str(saved.get('selection.rule'))
  if rule not in (*selection.RULES, config_lib.UNIFORM):
    saved['selection.rule'] = next(iter(selection.RULES))
  if data_dir is not None:
    saved['data.data_dir'] = data_dir
  saved['devices'] = None  # those of this machine
  _check_registered(saved)
  if digest and data.own.DATASETS[saved['data.name']].digest != digest:
    raise config_lib.ConfigError(
      f'data.name={saved["data.name"]!r} stands for other arrays than the '
      'run had'
    )
  return config_lib.from_json(saved)


def _check_registered(saved: dict[str, Any]) -> None:
  """Raises if the run's dataset or models are known to another program only."""
  datasets = (*data.NAMES, *data.own.DATASETS)
  for field, known in (
    ('data.name', lambda name: name in datasets),
    ('model.name', models.find),
    ('selection.proxy', models.find),
  ):
    name = saved.get(field)
    if name is not None and not known(name):
      raise config_lib.ConfigError(
        f'{field}={name!r} of the run is registered nowhere: name the file '
        'that registers it by --config'
      )


def register_from(path: str) -> None:
  """Runs a config file, for the models and datasets that it registers."""
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    raise config_lib.ConfigError(f'config={path!r}: it is a folder')
  try:
    runpy.run_path(path)
  except OSError as error:
    raise config_lib.ConfigError(f'config={path!r}: {error}') from error


def read_result(path: pathlib.Path) -> dict[str, Any]:
  """What a run's result.json holds.

  Raises:
    ConfigError: it is cut, or somebody else's.
  """
  try:
    result = json.loads(path.read_text(encoding='utf-8'))
    if {'config', 'steps', 'test'} <= {*result}:
      return result
    problem = 'it is no result of margin_jax'
  except (ValueError, TypeError) as error:
    problem = str(error)
  raise config_lib.ConfigError(
    f'{path} cannot be read ({problem}): remove it, and the run is finished '
    'again'
  )


def _no_checkpoints(workdir: str) -> config_lib.ConfigError:
  return config_lib.ConfigError(
    f'workdir={workdir!r} holds no checkpoints: train it first with '
    'python -m margin_jax.train'
  )


def make_folder(out: str) -> pathlib.Path:
  """Creates the folder to write to, before anything is measured."""
  folder = pathlib.Path(out).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise config_lib.ConfigError(f'out={out!r}: {error}') from error
  return folder


def checkpoints(workdir: str, steps: list[int] | None) -> Checkpoints:
  """Opens the run's checkpoints; looking must not create a folder."""
  if not os.path.isdir(os.path.join(workdir, FOLDER)):
    raise _no_checkpoints(workdir)
  found = Checkpoints(workdir)
  kept = found.steps()
  missing = sorted({*(steps or ())} - {*kept})
  if kept and not missing:
    return found
  found.close()
  if not kept:
    raise _no_checkpoints(workdir)
  raise config_lib.ConfigError(
    f'workdir={workdir!r} holds no checkpoint of step(s) {missing}; it has '
    f'{kept}'
  )
