"""The live view: how a run goes, on a terminal, in place of progress lines."""

import datetime
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from margin_jax import terminal

Row = dict[str, float]

# Drawing takes the interpreter from the thread that keeps the devices busy, and
# nobody reads faster.
DRAWINGS_PER_SECOND = 4
WIDEST = 100  # columns; a longer bar tells no more
LONGEST_NAME = 36  # of a split, so that its numbers fit into 80 columns

# Columns of train.csv and eval.csv, by their names there.
_FORMATS: dict[str, Callable[[float], str]] = {
  'steps_per_second': '{:,.1f}'.format,
  'examples_scored': '{:,}'.format,
  'examples_trained': '{:,}'.format,
  'data_wait_share': '{:.1%}'.format,
  'loss': '{:.4f}'.format,
  'accuracy': '{:.2%}'.format,
  'mean_mms': '{:.4g}'.format,
  'memory_bytes': decimal,
  'memory_peak_bytes': decimal,
  'f1': '{:.2%}'.format,
}
SHOWN = (
  ('steps_per_second', 'loss'),
  ('examples_scored', 'accuracy'),
  ('examples_trained', 'mean_mms'),
  ('data_wait_share', 'memory_bytes'),
)
_PEAK = 'memory_peak_bytes'


def on_terminal() -> 'View | None':
  """Returns a view, if standard output is a terminal that can show one."""
  found = terminal.find()
  return None if found is None else View(found)


class View:
  """A bar and the last numbers, drawn anew by a thread; other lines go above.

  It is a hook of `loop.train`: a row is put down here, and never waited for.
  """

  def __init__(self, console: Console):
    """Draws nothing yet."""
    self._terminal = console
    self._live: Live | None = None

  def start(self, step: int, steps: int, best: dict[str, Any] | None) -> None:
    """Begins to draw.

    Args:
      step: the current step of the run.
      steps: the number of steps of the whole run.
      best: 'step' and 'validation' (accuracy) of the best evaluation so far.
    """
    self._steps = steps
    self._trained: tuple[int, Row, float] = (step, {}, time.monotonic())
    self._evaluated: dict[str, tuple[int, Row]] = {}
    self._best = best
    self._live = Live(
      console=self._terminal,
      get_renderable=self._draw,
      refresh_per_second=DRAWINGS_PER_SECOND,
      # What goes to a file should go on going there.
      redirect_stderr=sys.stderr.isatty(),
    )
    self._live.start(refresh=True)

  def __call__(self, prefix: str, step: int, row: Row) -> None:
    """Takes a row of 'train', or of a split that was evaluated."""
    if prefix == 'train':
      self._trained = (step, row, time.monotonic())
      return
    # Not in place: the thread may be going through them.
    self._evaluated = {**self._evaluated, prefix: (step, row)}
    if prefix == 'validation':
      accuracy = row['accuracy']
      if self._best is None or accuracy >= self._best['validation']:
        self._best = {'step': step, 'validation': accuracy}

  def close(self) -> None:
    """Draws the last numbers, which stay, and gives the terminal back."""
    if self._live is not None:
      live, self._live = self._live, None
      live.stop()

  def _draw(self) -> RenderableType:
    parts = [self._bar(), self._numbers()]
    if self._evaluated:
      parts.append(self._evaluations())
    if self._best is not None:
      accuracy = _text('accuracy', {'accuracy': self._best['validation']})
      text = f'best validation {accuracy} at step {self._best["step"]:,}'
      parts.append(Text(text, no_wrap=True))
    if self._live is not None:
      # The cursor waits below, where a prompt belongs if the process is killed.
      parts.append(Text())
    return Group(*parts)

  def _bar(self) -> Table:
    step, row, since = self._trained
    eta = '-'
    if row:
      left = (self._steps - step) / row['steps_per_second']
      left = max(0, left - (time.monotonic() - since))
      eta = str(datetime.timedelta(seconds=round(left)))
    grid = Table.grid(padding=(0, 2))
    grid.width = min(self._terminal.width, WIDEST)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    bar = ProgressBar(total=self._steps, completed=step)
    grid.add_row(bar, f'step {step:,}/{self._steps:,}', f'eta {eta}')
    return grid

  def _numbers(self) -> Table:
    row = self._trained[1]
    grid = Table.grid(padding=(0, 2))
    for style in ('dim', None, 'dim', None):
      grid.add_column(style=style, no_wrap=True)
    pairs = [*SHOWN, ('', _PEAK)] if _PEAK in row else SHOWN
    for left, right in pairs:
      grid.add_row(left, _text(left, row), right, _text(right, row))
    return grid

  def _evaluations(self) -> Table:
    names = ['loss', 'accuracy']
    if any('f1' in row for _, row in self._evaluated.values()):
      names.append('f1')
    table = Table(
      box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style='dim'
    )
    # Not 'ellipsis', which is no character of every terminal.
    table.add_column(
      'split', no_wrap=True, overflow='crop', max_width=LONGEST_NAME
    )
    for name in ('step', *names):
      table.add_column(name, justify='right', no_wrap=True)
    for split, (step, row) in self._evaluated.items():
      numbers = [_text(name, row) for name in names]
      table.add_row(split, f'{step:,}', *numbers)
    return table


def _text(name: str, row: Row) -> str:
  """Formats the number; a dash where there is none, nothing without a name."""
  value = row.get(name, math.nan)
  if not name or math.isnan(value):
    return '-' if name else ''
  return _FORMATS[name](value)
