"""Checkpoints with Orbax: the last two and the best, saved in the background.

A checkpoint is the `TrainState`, as plain arrays that do not know how many
devices wrote them, and a JSON dictionary about the run. A digest of both is
saved with it, so a checkpoint that has changed since is never used. (Older ones
without a digest are used as they are.)
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from margin_jax import checks, files
from margin_jax import config as config_lib
from margin_jax.data import description
from margin_jax.train import devices as devices_lib
from margin_jax.train.compiled import Counters
from margin_jax.train.workdirs import FOLDER, QUARANTINE, Workdir

PyTree = Any

_ACCURACY, _DIGESTS = 'accuracy', 'sha256'
_FRACTION = checks.number(least=0, most=1)
_COUNTERS = checks.numbers(
  tuple(field.name for field in dataclasses.fields(Counters))
)
# What is read of a checkpoint's info. Older versions lacked some of it.
INFO = {
  'step': checks.integer(0),
  'config': checks.mapping(),
  'counters': _COUNTERS,
  'devices': checks.optional(checks.integer(1)),
  'dataset': checks.optional(description.DESCRIPTION),
  'best': checks.optional(
    checks.mapping(step=checks.integer(1), validation=_FRACTION)
  ),
  'pending': checks.optional(
    checks.mapping(
      step=checks.integer(0), counters=_COUNTERS, metrics=checks.arrays()
    )
  ),
  _ACCURACY: checks.optional(_FRACTION),
  _DIGESTS: checks.optional(
    checks.mapping(  # older ones have 'state' in place of 'arrays'
      arrays=checks.optional(checks.string()), info=checks.string()
    )
  ),
}
# Seconds that the removal of a checkpoint may take.
_REMOVAL = 1.0
# What is said of a file that may be all right.
_PASSING = (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)


class CorruptError(Exception):
  """A checkpoint cannot be read, or is not what was saved."""


class RemovedError(CorruptError):
  """The run, which goes on, has removed the checkpoint since it was listed."""


class SaveError(Exception):
  """A checkpoint could not be written; those before are as they were."""


def _digest(state: PyTree) -> str:
  """Digests names, shapes, dtypes and every byte of the leaves."""
  digest = hashlib.sha256()
  # A tuple with names digests as the dictionary that may be read in its place.
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  for name, array in sorted(leaves.items()):
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _digest_info(info: dict[str, Any]) -> str:
  rest = {name: value for name, value in info.items() if name != _DIGESTS}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  # What the system has said stands far behind in TensorStore's messages.
  said = re.search(r': ([^:[]+) \[\w+=', lines[0])
  if said and 'os_error_code' in lines[0]:
    return said[1]
  return lines[0][:200]


def _is_passing(error: Exception) -> bool:
  """Returns whether the fault is elsewhere: of memory, rights, a peer."""
  several = devices_lib.several_processes()
  return (
    isinstance(error, MemoryError)
    or (isinstance(error, OSError) and error.errno in _PASSING)
    or (several and isinstance(error, jax.errors.JaxRuntimeError))
  )


@functools.cache
def _expect_late_failures() -> None:
  """Leaves out what Python would print of a restore or save that has failed.

  The first error is raised, and ends Orbax's event loop. TensorStore goes on
  with the other arrays: each calls back into the loop, or fails in a task of
  which nobody asks, and either would be a traceback.
  """
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

  def is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not ('never retrieved' in text and 'orbax' in text)

  sys.unraisablehook = hook
  logging.getLogger('asyncio').addFilter(is_news)


class _Best:
  """Keeps the most accurate step, of equals the latest.

  Orbax's own reads the accuracies from files that nothing verifies, and ends
  with the first that is cut.
  """

  def __init__(self, accuracies: dict[int, float]):
    self._accuracies = accuracies

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    steps = [info.step for info in checkpoints]
    known = {s: self._accuracies[s] for s in steps if s in self._accuracies}
    best = max(known, key=lambda s: (known[s], s), default=None)
    return [step == best for step in steps]


class _Unknown:
  """Keeps what is none of the run's checkpoints, as far as one can see.

  A folder named by a number may be somebody else's, or of use to a user whose
  checkpoints are corrupt.
  """

  def __init__(self, steps: set[int]):
    self._steps = steps

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    return [info.step in self._steps for info in checkpoints]


class Checkpoints:
  """A few functions around an Orbax `CheckpointManager`."""

  def __init__(
    self,
    workdir: Workdir,
    keep_every: int | None = None,
    *,
    writing: bool = False,
  ):
    """Opens, or creates, `workdir`/checkpoints.

    Args:
      workdir: the workdir of the run.
      keep_every: checkpoints at its multiples are never deleted.
      writing: whether this is the run itself, which may clear away what a
        save left that was killed.
    """
    _expect_late_failures()
    policies = ocp.checkpoint_managers
    self._accuracies: dict[int, float] = {}
    self._unknown: set[int] = set()
    keep = [
      policies.LatestN(2), _Best(self._accuracies), _Unknown(self._unknown)
    ]  # fmt: skip
    if keep_every is not None:
      keep.append(policies.EveryNSteps(keep_every))
    self._workdir = workdir
    self._writing = writing
    self._folder = workdir.folder / FOLDER
    self._folder.mkdir(parents=True, exist_ok=True)
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(keep),
      cleanup_tmp_directories=writing,
      create=False,  # Orbax would not, for a process of several
      multiprocessing_options=self._processes(),
      # Without times and metrics, whose files may be damaged.
      lightweight_initialize=True,
    )
    self._manager = ocp.CheckpointManager(self._folder, options=self._options)
    self._note_all()

  def _processes(self) -> ocp.options.MultiprocessingOptions:
    """Says which processes share the folder: all, or none with another."""
    if not self._workdir.remote or not devices_lib.several_processes():
      return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
      primary_host=own,
      active_processes={own},
      barrier_sync_key_prefix=f'process_{own}',
    )

  @property
  def shared(self) -> bool:
    """Whether all processes of the run read and write the same files."""
    return not self._workdir.remote

  def _note_all(self) -> None:
    for step in self.steps():
      try:
        self._note(step, self.info(step).get(_ACCURACY))
      except CorruptError:
        self._unknown.add(step)

  def _note(self, step: int, accuracy: float | None) -> None:
    if accuracy is not None:
      self._accuracies[step] = accuracy

  def save(
    self, state: PyTree, info: dict[str, Any], accuracy: float | None
  ) -> None:
    """Saves state and info at `state.step`; returns while files are written.

    Args:
      state: the train state. It is copied first: the step that follows
        donates its memory.
      info: JSON-serializable, with the 'step'.
      accuracy: on the validation split, which decides the best checkpoint (of
        equals the latest); None if this step was not evaluated.

    Raises:
      SaveError: this one or the one before could not be written.
      FileError: the workdir is gone.
    """
    self._workdir.check()
    if not self.shared and jax.process_index() != 0:
      return  # the first process saves for all
    host = _stored(jax.tree.map(np.array, jax.device_get(state)))
    info = {**info, _ACCURACY: accuracy}
    info[_DIGESTS] = {'arrays': _digest(host), 'info': _digest_info(info)}
    step = int(host['step'])
    self._note(step, accuracy)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(host), info=ocp.args.JsonSave(info)
    )
    with self._explained():
      self._workdir.wait()
      saved = self._manager.save(step, args=args)
    if not saved:
      raise SaveError(
        f'{self._folder} already holds steps {self.steps()}, so step {step} '
        'could not be saved'
      )
    self._workdir.commit(self._manager.is_saving_in_progress)

  def restore(
    self, target: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any]] | None:
    """Reads the state and info of a step, by default the latest, or None.

    Args:
      target: a state of the same structure, shapes and dtypes. Where a field
        is None, that of the checkpoint is read as dictionaries and lists.
      step: which checkpoint.

    Raises:
      CorruptError: it cannot be read, or is not what was saved.
      RemovedError: it was there, and is no longer.
      ConfigError: an array has another shape or dtype.
    """
    if step is None:
      return self._latest(functools.partial(self.restore, target))
    info = self.info(step)
    self._workdir.fetch(step)
    host = jax.tree.map(np.asarray, jax.device_get(target))
    with self._read(step):
      host = self._with_saved(host, step)
      args = ocp.args.StandardRestore(_stored(host))
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=args)
      ).state
    digest = self.digests(step).get('arrays')
    if digest not in (None, _digest(state)):
      raise self._corrupt(step, 'its arrays are not those that were saved')
    _check_shapes(_stored(host), state, self._folder / str(step))
    return target.replace(**state | {'nonfinite': np.int32(0)}), info

  def _with_saved(self, target: PyTree, step: int) -> PyTree:
    """Returns the target whose fields are None as the checkpoint has them.

    Whoever only predicts needs to know neither data nor optimizer.
    """
    unknown = [name for name, value in vars(target).items() if value is None]
    if not unknown:
      return target
    saved = ocp.StandardCheckpointHandler().metadata(
      self._folder / str(step) / 'state'
    )
    saved = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), saved.tree)
    return target.replace(**{name: saved[name] for name in unknown})

  def info(self, step: int | None = None) -> dict[str, Any] | None:
    """Reads the info of a step, by default the latest, or None.

    Raises:
      CorruptError: it cannot be read, or is not what was saved.
      RemovedError: it was there, and is no longer.
    """
    if step is None:
      return self._latest(self.info)
    info = self._read_info(step)
    digest = (info.pop(_DIGESTS, None) or {}).get('info')
    if info['step'] != step:
      raise self._corrupt(step, f'it belongs to step {info["step"]}')
    if digest not in (None, _digest_info(info)):
      raise self._corrupt(step, 'its info is not what was saved')
    return info

  def _latest(self, read: Callable[[int], Any]) -> Any:
    """Returns what is read of the latest step, or None if there is none."""
    while (step := self._manager.latest_step()) is not None:
      try:
        return read(step)
      except RemovedError:
        self.refresh()
        if not self.steps():
          raise
    return None

  def digests(self, step: int) -> dict[str, str]:
    """Returns the digests of a step's arrays and info; older ones lack some."""
    return self._read_info(step).get(_DIGESTS) or {}

  def _read_info(self, step: int) -> dict[str, Any]:
    # Asked for what a folder does not have, Orbax takes all for another kind.
    if not (self._folder / str(step) / 'info').is_dir():
      raise self._corrupt(step, 'it has no info, unlike those of margin_jax')
    args = ocp.args.Composite(info=ocp.args.JsonRestore())
    with self._read(step):
      info = self._manager.restore(step, args=args).info
      files.check_object(info, INFO)
    return info

  @contextlib.contextmanager
  def _read(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
      if _is_passing(error):
        raise
      raise self._corrupt(step, _first_line(error)) from error

  def _corrupt(self, step: int, why: str) -> CorruptError:
    folder = self._folder / str(step)
    if not self._writing and self._is_removed(step):
      return RemovedError(
        f'the checkpoint {folder} was removed while it was to be read'
      )
    return CorruptError(f'the checkpoint {folder} cannot be used: {why}')

  def _is_removed(self, step: int) -> bool:
    """Returns whether the run removes a step, file by file, or has done so."""
    deadline = time.monotonic() + _REMOVAL
    while self._workdir.has(step):
      if time.monotonic() > deadline:
        return False
      time.sleep(_REMOVAL / 10)
    return True

  def quarantine(self, step: int) -> pathlib.Path:
    """Moves a step's folder out of the way, and says where it is now."""
    self._workdir.fetch(step)
    folder = self._folder.with_name(QUARANTINE)
    folder.mkdir(exist_ok=True)
    names = itertools.chain(
      [str(step)], (f'{step}-{i}' for i in itertools.count(1))
    )
    target = next(x for x in map(folder.joinpath, names) if not x.exists())
    shutil.move(self._folder / str(step), target)
    self._workdir.forget(step)
    self._unknown.discard(step)
    return target

  def reload(self) -> None:
    """Looks again which steps there are."""
    # Its own `reload` reads what may be damaged; see `_options`.
    self._manager.close()
    self._manager = ocp.CheckpointManager(self._folder, options=self._options)

  def refresh(self) -> None:
    """Looks again which steps the run has, as it goes on."""
    self._workdir.refresh()
    self.reload()
    self._note_all()

  def accuracy(self, step: int) -> float | None:
    """Returns the validation accuracy of a step, None if it has none."""
    return self._accuracies.get(step)

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint."""
    return sorted(self._manager.all_steps())

  def wait(self) -> None:
    """Waits for the last save.

    Raises:
      SaveError: it failed.
      FileError: the workdir is gone.
    """
    with self._explained():
      self._manager.wait_until_finished()
      self._workdir.wait()
    self._workdir.check()

  def close(self) -> None:
    """Waits for the last save, and closes Orbax's manager.

    Raises:
      SaveError: it failed.
      FileError: the workdir was moved or removed.
    """
    try:
      self.wait()
    finally:
      with self._explained():
        self._manager.close()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
      if devices_lib.several_processes() and _is_passing(error):
        raise
      self._workdir.check()
      raise SaveError(
        f'a checkpoint could not be written to {self._folder}: '
        f'{_first_line(error)}'
      ) from error


def _check_shapes(target: PyTree, state: PyTree, folder: pathlib.Path) -> None:
  """Raises a ConfigError unless arrays are as they should be.

  Orbax gives them the shapes that were saved.
  """
  leaves = jax.tree_util.tree_leaves_with_path(target)
  for (path, wanted), found in zip(leaves, jax.tree.leaves(state), strict=True):
    if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise config_lib.ConfigError(
        f'the checkpoint {folder} is of another model or dataset: {name} is '
        f'{found.dtype}{[*found.shape]} in it, and should be '
        f'{wanted.dtype}{[*wanted.shape]}'
      )


def _stored(state: PyTree) -> dict[str, PyTree]:
  """Returns what is saved of a state, field by field.

  That is all but `nonfinite`, which is 0 in whatever is saved, and an `ema`
  that is empty, which checkpoints of older versions do not have.
  """
  fields = {**vars(state), 'nonfinite': ()}
  return {k: x for k, x in fields.items() if k != 'ema' or x}
