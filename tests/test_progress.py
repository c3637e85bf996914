"""The live view: what it draws, where, and how it leaves a terminal."""

import io
import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading

import pytest

from margin_jax import terminal
from margin_jax.train import progress
from tests.faults import runs

HIDE_CURSOR = '\x1b[?25l'
# Soon compiled.
PLAIN = (
  '--config.selection.rule=uniform', '--config.selection.reuse=1',
  '--config.selection.log_counts=False',
)  # fmt: skip
ROW = {
  'steps_per_second': 123.45, 'examples_scored': 1_280_000,
  'examples_trained': 320_000, 'data_wait_share': 0.0123, 'loss': 0.04321,
  'accuracy': 0.9875, 'mean_mms': 0.5, 'memory_bytes': 726_600_000,
}  # fmt: skip
EVALUATION = {'loss': 0.5, 'accuracy': 0.75, 'count': 180}


class Tty(io.StringIO):
  """A terminal, for all that can be asked."""

  def isatty(self):
    return True


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
  """No wish of who runs the tests."""
  for name in ('NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE', 'TTY_INTERACTIVE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('TERM', 'xterm')


@pytest.fixture
def make():
  """Makes views that have begun, and ends them."""
  views = []

  def made(width=80, step=0, best=None):
    console = terminal.Terminal(
      file=io.StringIO(), force_terminal=True, width=width, height=40,
      color_system=None,
    )  # fmt: skip
    views.append(progress.View(console))
    views[-1].start(step, 1000, best)
    return views[-1], console.file

  yield made
  for view in views:
    view.close()


def last_drawing(file):
  """What is below the last line that was erased."""
  return file.getvalue().rsplit('\x1b[2K', 1)[-1].splitlines()


@pytest.mark.parametrize('width', [80, 120])
def test_a_drawing_has_every_number_once_and_no_line_is_broken(make, width):
  view, file = make(width)
  view('train', 1000, {**ROW, 'memory_peak_bytes': 34e9})
  view('validation', 750, {**EVALUATION, 'accuracy': 0.875})
  view('validation', 1000, EVALUATION)
  view('test_mismatched', 1000, {**EVALUATION, 'f1': 0.625})
  view.close()
  bar, *lines = last_drawing(file)
  assert re.fullmatch('━+  step 1,000/1,000  eta 0:00:00', bar.rstrip())
  assert [re.split('  +', line.strip()) for line in lines] == [
    ['steps_per_second', '123.5', 'loss', '0.0432'],
    ['examples_scored', '1,280,000', 'accuracy', '98.75%'],
    ['examples_trained', '320,000', 'mean_mms', '0.5'],
    ['data_wait_share', '1.2%', 'memory_bytes', '726.6 MB'],
    ['memory_peak_bytes', '34.0 GB'],
    ['split', 'step', 'loss', 'accuracy', 'f1'],
    ['validation', '1,000', '0.5000', '75.00%', '-'],
    ['test_mismatched', '1,000', '0.5000', '75.00%', '62.50%'],
    ['best validation 87.50% at step 750'],
  ]
  assert max(len(line) for line in (bar, *lines)) <= width


def test_before_the_first_row_there_are_dashes(make):
  view, file = make(step=250, best={'step': 200, 'validation': 0.9})
  view.close()
  lines = last_drawing(file)
  assert 'step 250/1,000  eta -' in lines[0]
  assert re.fullmatch(r'steps_per_second  -  loss +-', lines[1].rstrip())
  assert lines[-1].rstrip() == 'best validation 90.00% at step 200'


def test_the_best_validation_of_an_earlier_part_stays_until_it_is_met(make):
  view, file = make(best={'step': 200, 'validation': 0.75})
  view('validation', 300, {**EVALUATION, 'accuracy': 0.5})
  view('validation', 400, EVALUATION)
  view.close()
  assert last_drawing(file)[-1].rstrip() == (
    'best validation 75.00% at step 400'
  )


def test_a_number_that_does_not_exist_is_a_dash(make):
  view, file = make()
  view('train', 100, {**ROW, 'mean_mms': math.nan, 'loss': math.inf})
  view.close()
  text = '\n'.join(last_drawing(file))
  assert re.search(r'mean_mms +-\s', text)
  assert re.search(r'loss +inf\s', text)
  assert 'nan' not in text


def test_the_time_left_is_of_the_last_speed(make):
  view, file = make()
  view('train', 500, {**ROW, 'steps_per_second': 500 / 36_000})
  view.close()
  assert re.search(r'eta (10:00:00|9:59:\d\d)', last_drawing(file)[0])


@pytest.mark.parametrize('width', [40, 80])
def test_long_names_are_cut_and_not_wrapped(make, width):
  view, file = make(width)
  view('train', 100, ROW)
  view('test under ' + 60 * 'x', 100, EVALUATION)
  view.close()
  lines = last_drawing(file)
  assert len(lines) == 7
  assert max(map(len, lines)) <= width
  assert width < 80 or lines[-1].rstrip().endswith('100  0.5000    75.00%')


def test_other_lines_go_above(make):
  before = sys.stdout
  view, file = make()
  view('train', 100, ROW)
  print('a line')
  view.close()
  assert sys.stdout is before
  text = file.getvalue()
  assert text.count('a line') == 1
  assert not any('a line' in line for line in last_drawing(file))


@pytest.mark.parametrize('seen', [True, False])
def test_warnings_go_above_unless_they_go_to_a_file(make, monkeypatch, seen):
  errors = Tty() if seen else io.StringIO()
  monkeypatch.setattr(sys, 'stderr', errors)
  view, file = make()
  print('be warned', file=sys.stderr)
  view.close()
  assert sys.stderr is errors
  assert ('be warned' in file.getvalue()) == seen
  assert ('be warned' in errors.getvalue()) != seen


def test_the_cursor_is_seen_and_waits_below_so_that_a_kill_leaves_it_there(
  make,
):
  view, file = make()
  view('validation', 100, EVALUATION)
  print('a line')
  assert file.getvalue().endswith('\n')
  view.close()
  assert file.getvalue().endswith('\n')
  assert HIDE_CURSOR not in file.getvalue()


@pytest.mark.parametrize(
  ('file', 'environment', 'shown'),
  [
    (Tty, {}, True),
    (Tty, {'NO_COLOR': '1'}, True),
    (Tty, {'TERM': 'dumb'}, False),
    (Tty, {'TTY_INTERACTIVE': '0'}, False),
    (io.StringIO, {}, False),
    (io.StringIO, {'FORCE_COLOR': '1'}, False),
    (io.StringIO, {'TTY_COMPATIBLE': '1'}, False),
  ],
)
def test_only_a_terminal_that_can_show_it_gets_a_view(
  monkeypatch, file, environment, shown
):
  monkeypatch.setattr(sys, 'stdout', file())
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  view = progress.on_terminal()
  assert (view is not None) == shown
  if shown:
    view.start(0, 10, None)
    view.close()
    colours = re.findall(r'\x1b\[[39]\d', sys.stdout.getvalue())
    assert bool(colours) == ('NO_COLOR' not in environment)


def on_terminal(workdir, *arguments, number=None):
  """Output and status of a run on a terminal of 80 columns.

  The signal comes once there is a first row.
  """
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (30, 80))
  process = subprocess.Popen(
    [*runs.COMMAND, *PLAIN, f'--workdir={workdir}', *arguments],
    cwd=runs.ROOT,
    env={k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES')},
    stdin=subprocess.DEVNULL,
    stdout=theirs,
    stderr=theirs,
  )
  os.close(theirs)
  hung = threading.Timer(240, process.kill)
  hung.start()
  read = b''
  while True:
    try:
      part = os.read(ours, 4096)
    except OSError:  # how Linux says that nobody writes any more
      break
    if not part:
      break
    read += part
    if number is not None and re.search(rb'eta \d', read):
      process.send_signal(number)
      number = None
  hung.cancel()
  os.close(ours)
  output = read.decode().replace('\r\n', '\n')
  assert 'Traceback' not in output, output
  assert HIDE_CURSOR not in output
  return output, process.wait(timeout=60)


@pytest.mark.slow
def test_a_run_on_a_terminal(tmp_path):
  output, status = on_terminal(tmp_path)
  assert status == 0, output
  assert ' steps/s ' not in output
  last, end = output.rsplit('best validation', 1)
  assert 'step 60/60  eta 0:00:00' in last.rsplit('\x1b[2K', 1)[1]
  assert re.fullmatch(
    r' [\d.]+% at step \d+ *\ntest accuracy [\d.]+% after 60 steps, .*\n'
    r'results: .*\nnext:    .*\n',
    end,
  )


@pytest.mark.slow
def test_a_signal_leaves_the_terminal_as_it_was(tmp_path):
  output, status = on_terminal(
    tmp_path, '--config.steps=100000', '--config.checkpoint_every=100000',
    '--config.eval_every=100000', number=signal.SIGINT,
  )  # fmt: skip
  assert status == 128 + signal.SIGINT, output
  assert re.search(r'\nstopped at step [\d,]+ .* is saved;[^\x1b]*\n$', output)
