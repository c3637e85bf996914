"""A run that has trained, opened again: its config and its checkpoints."""

import os
import pathlib
from typing import Any

from margin_jax import config as config_lib
from margin_jax import selection
from margin_jax.checkpoints import FOLDER, Checkpoints


def saved_config(
  info: dict[str, Any], data_dir: str | None
) -> config_lib.ml_collections.ConfigDict:
  """The run's config; a rule that only the run knew does not matter here."""
  saved = dict(info['config'])
  if str(saved.get('selection.rule')).startswith('custom: '):
    saved['selection.rule'] = next(iter(selection.RULES))
  if data_dir is not None:
    saved['data.data_dir'] = data_dir
  saved['devices'] = None  # those of this machine
  return config_lib.from_json(saved)


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
