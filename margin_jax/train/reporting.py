"""What a run tells: progress lines, CSV files, TensorBoard, result.json."""

import csv
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import tensorboardX

from margin_jax import files
from margin_jax.train import progress
from margin_jax.train.progress import Row

# Takes a row of numbers by its prefix, 'train' or a split, and its step.
Hook = Callable[[str, int, Row], None]
# What an evaluation of the test split under an attack begins with.
ATTACKED = 'test under '


class _Table:
  """A CSV file that grows by rows; a resumed run drops rows it will redo."""

  def __init__(
    self,
    path: pathlib.Path,
    after: int,
    texts: tuple[str, ...] = (),
    redone: str = '',
  ):
    """Reads what is there; `begin` drops what will be redone.

    Args:
      path: of the file.
      after: the step that the run continues from; later rows are dropped.
      texts: the columns that hold no numbers.
      redone: at `after` no rows are kept whose split begins so.

    Raises:
      FileError: the file is no such table.
    """
    self._path = path
    self._texts = texts
    self._fields, rows = self._read()
    self._kept = [
      row
      for row in rows
      if int(row['step']) < after
      or (
        int(row['step']) == after
        and not (redone and row['split'].startswith(redone))
      )
    ]

  def begin(self) -> None:
    """Rewrites the file with the rows that are kept."""
    if self._fields:
      files.write_csv(self._path, self._fields, self._kept)
    self._kept = []

  def _read(self) -> tuple[list[str], list[dict[str, str]]]:
    remedy = 'move it away, and the run goes on with a new one'
    try:
      return files.read_table(self._path, (), remedy, self._texts)
    except FileNotFoundError:
      return [], []

  def add(self, row: dict[str, Any]) -> None:
    new = [name for name in row if name not in self._fields]
    if new:  # the first row, or a run continued by a later version
      rows = self._read()[1] if self._fields else []
      self._fields += new
      files.write_csv(self._path, self._fields, rows)
    with self._path.open('a', newline='') as file:
      csv.DictWriter(file, self._fields).writerow(row)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else (
    f'{minutes}:{seconds:02}'
  )  # fmt: skip


class Reporter:
  """Writes train.csv, eval.csv, classes.csv, tensorboard/, progress lines."""

  def __init__(
    self,
    workdir: str,
    *,
    steps: int,
    after: int,
    last_row: tuple[int, Row],
    best: dict[str, Any] | None,
    log: Callable[[str], None],
    hook: Hook | None = None,
    view: progress.View | None = None,
  ):
    """Opens the files of a run.

    Args:
      workdir: the run's folder; it exists.
      steps: how many the whole run has.
      after: the step the run continues from; later rows are dropped.
      last_row: the step of the last row of train.csv, and what the run had
        cost up to it.
      best: its best evaluation up to there.
      log: takes the progress lines.
      hook: takes every row, after the files have it.
      view: shows every row of training, in place of a line.
    """
    folder = pathlib.Path(workdir)
    self._steps = steps
    self._log = log
    self._train = _Table(folder / 'train.csv', after)
    # At the end of a run all attacks are made again.
    redone = ATTACKED if after == steps else ''
    self._eval = _Table(folder / 'eval.csv', after, ('split',), redone)
    self._classes = _Table(folder / 'classes.csv', after)
    for table in (self._train, self._eval, self._classes):
      table.begin()
    self._board = tensorboardX.SummaryWriter(
      str(folder / 'tensorboard'), purge_step=after + 1
    )
    self._last = last_row
    self._view = view
    hooks = (self._scalars, view, hook)
    self._hooks: list[Hook] = [hook for hook in hooks if hook is not None]
    if view is not None:
      view.start(after, steps, best)

  def train(
    self, step: int, counters: Row, metrics: Row, class_rates: Any = None
  ) -> None:
    """Reports the means of the steps since the last call.

    Args:
      step: the last of them.
      counters: what the run has cost up to it.
      metrics: the means.
      class_rates: (C,) fraction of each class's pool examples that was
        selected, for classes.csv; None without a selection.
    """
    before, then = self._last
    self._last = (step, counters)
    seconds = max(counters['seconds'] - then['seconds'], 1e-9)
    speed = (step - before) / seconds
    row = {
      **counters,
      **metrics,
      'steps_per_second': speed,
      'data_wait_share': (counters['data_wait'] - then['data_wait']) / seconds,
    }
    self._train.add({'step': step, **row})
    if class_rates is not None:
      rates = {f'class_{i}': rate for i, rate in enumerate(class_rates)}
      self._classes.add({'step': step, **rates})
    if self._view is None:
      self._log(
        f'step {step:,}/{self._steps:,}  '
        f'eta {_duration((self._steps - step) / speed)}  '
        f'{speed:.1f} steps/s  '
        f'scored {int(counters["examples_scored"]):,}  '
        f'trained {int(counters["examples_trained"]):,}  '
        f'loss {metrics["loss"]:.4f}  '
        f'accuracy {metrics["accuracy"]:.2%}  '
        f'mean MMS {metrics["mean_mms"]:.4g}'
      )
    self._tell('train', step, row)

  def evaluation(
    self, step: int, split: str, counters: Row, metrics: Row
  ) -> None:
    """Reports one split's loss, accuracy and, where it has one, F1."""
    row = {**counters, **metrics}
    self._eval.add({'step': step, 'split': split, **row})
    self._log(
      f'step {step:,}/{self._steps:,}  {split}: '
      f'loss {metrics["loss"]:.4f}  accuracy {metrics["accuracy"]:.2%} '
      f'of {int(metrics["count"]):,} examples'
      + (f'  F1 {metrics["f1"]:.2%}' if 'f1' in metrics else '')
    )
    self._tell(split, step, row)

  def _tell(self, prefix: str, step: int, row: Row) -> None:
    for hook in self._hooks:
      hook(prefix, step, {**row})

  def _scalars(self, prefix: str, step: int, row: Row) -> None:
    for name, value in row.items():
      if not math.isnan(value):
        self._board.add_scalar(f'{prefix}/{name}', value, step)

  def close(self) -> None:
    """Ends the view; flushes and closes the files."""
    try:
      if self._view is not None:
        self._view.close()
    finally:
      self._board.close()


class Silent(Reporter):
  """What the other processes of a run use: writes nothing."""

  def __init__(self):
    """Opens nothing."""

  def train(self, *args: Any) -> None:
    """Does nothing."""

  def evaluation(self, *args: Any) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def versions() -> dict[str, str]:
  """Returns the versions that numbers depend on."""
  import flax
  import jax
  import jaxlib
  import numpy
  import optax

  import margin_jax

  modules = (margin_jax, jax, jaxlib, flax, optax, numpy)
  found = {module.__name__: module.__version__ for module in modules}
  return {'python': sys.version.split()[0], **found}
