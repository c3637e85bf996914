"""What a run reports: progress lines, CSV files and TensorBoard files."""

import csv
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorboardX
import tensorboardX.summary

from margin_jax import files
from margin_jax.train import progress
from margin_jax.train.progress import Row

# Takes a row of numbers by its prefix, 'train' or a split, and its step.
Hook = Callable[[str, int, Row], None]
# What an evaluation of the test split under an attack begins with.
ATTACKED = 'test under '
# TensorBoard has a chart of each class's accuracy, unless there are more.
MOST_CHARTS = 20


class _Table:
  """A CSV file that grows by rows; a resumed run drops rows it will redo."""

  def __init__(
    self,
    path: pathlib.Path,
    after: int,
    texts: tuple[str, ...] = (),
    is_redone: Callable[[dict[str, str]], bool] = lambda row: False,
  ):
    """Reads what is there; `begin` drops what will be redone.

    Args:
      path: the path of the file.
      after: the step that the run continues from; later rows are dropped.
      texts: the columns that hold no numbers.
      is_redone: which rows at `after` are dropped too.

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
      or (int(row['step']) == after and not is_redone(row))
    ]

  def begin(self) -> None:
    """Rewrites the file with the rows that are kept."""
    if self._fields:
      files.write_csv(self._path, self._fields, self._kept)
    self._kept = []

  def _read(self) -> tuple[list[str], list[dict[str, str]]]:
    remedy = 'move it away, and the run continues with a new one'
    try:
      return files.read_table(self._path, (), remedy, self._texts)
    except FileNotFoundError:
      return [], []

  def add(self, row: dict[str, Any]) -> None:
    """Appends a row."""
    new = [name for name in row if name not in self._fields]
    # The first row, a run continued by a later version, or a file removed.
    if new or not self._path.exists():
      rows = self._read()[1] if self._fields else []
      self._fields += new
      files.write_csv(self._path, self._fields, rows)
    with self._path.open('a', newline='') as file:
      csv.DictWriter(file, self._fields).writerow(row)


class _Records:
  """A writer of records that remembers an error, in place of raising it."""

  def __init__(self, writer: Any):
    self._writer = writer
    self.error: OSError | None = None

  def write(self, record: bytes) -> None:
    self._attempt(self._writer.write, record)

  def flush(self) -> None:
    self._attempt(self._writer.flush)

  def close(self) -> None:
    self._attempt(self._writer.close)

  def _attempt(self, function: Callable[..., None], *arguments: Any) -> None:
    try:
      function(*arguments)
    except OSError as error:
      self.error = self.error or error


class _Board(tensorboardX.SummaryWriter):
  """A writer for TensorBoard that tells of a full disk.

  Its thread would end there, and who adds to its queue would wait for ever.
  """

  def __init__(self, folder: str, **options: Any):
    super().__init__(folder, **options)
    events = self.file_writer.event_writer._ev_writer
    self._records = _Records(events._py_recordio_writer)
    events._py_recordio_writer = self._records

  def check(self) -> None:
    """Raises the OSError of what was to be written."""
    if self._records.error is not None:
      raise self._records.error


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
    config: dict[str, Any] | None = None,
    splits: Sequence[str] = (),
    attacks: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
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
      config: the fields by name, for TensorBoard's table of hyperparameters.
      splits: the splits that are evaluated.
      attacks: those under earlier attacks, whose rows stay at the end.
      class_names: the names of the classes; None are their indices.
      hook: takes every row, after the files have it.
      view: shows every row of training, in place of a line.
    """
    folder = pathlib.Path(workdir)
    self._steps = steps
    self._log = log
    self._train = _Table(folder / 'train.csv', after)

    def is_redone(row: dict[str, str]) -> bool:
      attacked = row['split'].startswith(ATTACKED)
      return after == steps and attacked and row['split'] not in attacks

    self._eval = _Table(folder / 'eval.csv', after, ('split',), is_redone)
    self._classes = _Table(folder / 'classes.csv', after)
    for table in (self._train, self._eval, self._classes):
      table.begin()
    self._board_folder = str(folder / 'tensorboard')
    self._board = _Board(self._board_folder, purge_step=after + 1)
    self._class_names = class_names
    self._begin_session(config or {}, splits)
    self._last = last_row
    self._view = view
    hooks = (self._scalars, view, hook)
    self._hooks: list[Hook] = [hook for hook in hooks if hook is not None]
    if view is not None:
      view.start(after, steps, best)

  def train(
    self,
    step: int,
    counters: Row,
    metrics: Row,
    class_rates: Any = None,
    scores: Any = None,
  ) -> None:
    """Reports the means of the steps since the last call.

    Args:
      step: the last of them.
      counters: what the run has cost up to it.
      metrics: the means.
      class_rates: (C,) fraction of each class's pool examples that was
        selected, for classes.csv; None where no pool is scored.
      scores: (B,) of the last pool, for a histogram; None where there is none.
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
      self._by_class('selected_of_pool', class_rates, step)
    if scores is not None:
      self.histogram('train/scores', scores, step)
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
    self,
    step: int,
    split: str,
    counters: Row,
    metrics: Row,
    details: dict[str, Any] | None = None,
  ) -> None:
    """Reports one split's loss, accuracy and, where it has one, F1.

    Args:
      step: at which it was evaluated.
      split: its name.
      counters: what the run has cost up to it.
      metrics: the numbers.
      details: arrays for TensorBoard, see `Evaluator.in_detail`.
    """
    row = {**counters, **metrics}
    self._eval.add({'step': step, 'split': split, **row})
    self._log(
      f'step {step:,}/{self._steps:,}  {split}: '
      f'loss {metrics["loss"]:.4f}  accuracy {metrics["accuracy"]:.2%} '
      f'of {int(metrics["count"]):,} examples'
      + (f'  F1 {metrics["f1"]:.2%}' if 'f1' in metrics else '')
    )
    self._tell(split, step, row)
    if details is not None:
      for name in ('margin', 'mms'):
        self.histogram(f'{split}/{name}', details[name], step)
      self._by_class(f'{split}_class_accuracy', details['class_accuracy'], step)
      worst = int(np.nanargmin(details['class_accuracy']))
      text = f'{self._name(worst)}: {details["class_accuracy"][worst]:.2%}'
      self._board.add_text(f'{split}/worst_class', text, step)
    if step == self._steps and self._end_of_session is not None:
      self._board.file_writer.add_summary(self._end_of_session)
      self._end_of_session = None

  def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
    """Adds the finite ones of some values to TensorBoard's histograms."""
    finite = values[np.isfinite(values)]
    if finite.size:
      self._board.add_histogram(tag, finite, step)

  def _begin_session(
    self, config: dict[str, Any], splits: Sequence[str]
  ) -> None:
    """Tells TensorBoard the hyperparameters, and by what to compare runs."""
    numbers = bool | int | float | str
    fields = {
      name: value if isinstance(value, numbers) else str(value)
      for name, value in config.items()
    }
    metrics = [
      f'{split}/{name}'
      for split in splits
      for name in ('accuracy', 'worst_class_accuracy', 'loss')
    ]
    *begin, self._end_of_session = tensorboardX.summary.hparams(
      fields, dict.fromkeys(metrics, 0)
    )
    for summary in begin:
      self._board.file_writer.add_summary(summary)

  def _name(self, index: int) -> str:
    return f'class_{index}' if self._class_names is None else (
      self._class_names[index]
    )  # fmt: skip

  def _by_class(self, group: str, values: np.ndarray, step: int) -> None:
    """Adds a chart for each class, where they are few."""
    if len(values) > MOST_CHARTS:
      return
    for index, value in enumerate(values):
      if not math.isnan(value):
        self._board.add_scalar(f'{group}/{self._name(index)}', value, step)

  def _tell(self, prefix: str, step: int, row: Row) -> None:
    for hook in self._hooks:
      hook(prefix, step, {**row})
    self._board.check()

  def _scalars(self, prefix: str, step: int, row: Row) -> None:
    for name, value in row.items():
      if not math.isnan(value):
        self._board.add_scalar(f'{prefix}/{name}', value, step)

  def next_file(self, step: int) -> None:
    """Ends TensorBoard's file and begins another, which starts after a step.

    What is in a bucket cannot be appended to, and its writer is behind.
    """
    self._board.close()
    self._board = _Board(self._board_folder, filename_suffix=f'.{step:09}')

  def close(self) -> None:
    """Ends the view; flushes and closes the files."""
    try:
      if self._view is not None:
        self._view.close()
    finally:
      self._board.close()
    self._board.check()


class Silent(Reporter):
  """What the other processes of a run use: writes nothing."""

  def __init__(self):
    """Opens nothing."""

  def train(self, *args: Any) -> None:
    """Does nothing."""

  def evaluation(self, *args: Any) -> None:
    """Does nothing."""

  def histogram(self, *args: Any) -> None:
    """Does nothing."""

  def next_file(self, *args: Any) -> None:
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
