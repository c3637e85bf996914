"""Signals: saved, and a documented status; a second one: at once."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from margin_jax.train import process
from tests.faults import runs

# Slow enough to be caught between two steps.
LONG = ('--config.steps=100000', '--config.checkpoint_every=100000')


@pytest.fixture
def heeded():
  """SIGHUP is not ignored, as it is under nohup, by what a test starts."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures('heeded')
@pytest.mark.parametrize('number', process.SIGNALS)
@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, number):
  process = runs.start(tmp_path, *LONG)
  runs.wait_for(process, 'step 20/')
  process.send_signal(number)
  if number == signal.SIGHUP:  # which the kernel and the shell may both send
    time.sleep(0.05)
    process.send_signal(number)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 128 + number, output
  assert 'which is saved' in output
  assert 'Traceback' not in output
  step = int(output.split('stopped at step ')[1].split()[0].replace(',', ''))
  assert step >= 20
  again = runs.start(tmp_path, *LONG)
  assert f'starting at step {step:,}' in runs.wait_for(again, 'starting at')
  again.kill()
  again.communicate()


@pytest.mark.usefixtures('heeded')
@pytest.mark.parametrize('seconds', [3, 6])
@pytest.mark.long
@pytest.mark.slow
def test_a_closing_terminal_spares_the_workers(tmp_path, seconds):
  """It signals all processes of the run, also while workers start."""
  rng = np.random.default_rng(0)
  for i in range(100):
    path = tmp_path / f'images/{i % 2}/{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
  process = subprocess.Popen(
    [
      sys.executable, '-m', 'margin_jax.train', '--config=configs/images.py',
      f'--workdir={tmp_path / "run"}',
      f'--config.data.name=folder:{tmp_path / "images"}',
      '--config.data.streamed=True', '--config.data.workers=2',
      '--config.data.image_size=8', *LONG,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=runs.ROOT,
    start_new_session=True,
  )  # fmt: skip
  runs.wait_for(process, 'starting at')
  time.sleep(seconds)
  os.killpg(process.pid, signal.SIGHUP)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 128 + signal.SIGHUP, output
  assert 'which is saved' in output
  assert 'Traceback' not in output
  assert 'leaked' not in output


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
  runs.finish(runs.start(tmp_path / 'whole'))
  stopped = runs.start(tmp_path / 'stopped')
  runs.wait_for(stopped, 'step 10/')
  stopped.send_signal(signal.SIGTERM)
  output = stopped.communicate(timeout=60)[0]
  if stopped.returncode:  # or it was at its end already
    assert stopped.returncode == 128 + signal.SIGTERM, output
    runs.finish(runs.start(tmp_path / 'stopped'))
  assert runs.digest(tmp_path / 'stopped') == runs.digest(tmp_path / 'whole')
  for name in ('train.csv', 'eval.csv', 'classes.csv'):
    rows = [runs.rows(tmp_path / x, name) for x in ('stopped', 'whole')]
    assert rows[0] == rows[1], name


def test_the_first_signal_is_remembered_and_handlers_are_given_back():
  with process.Interrupts() as caught:
    assert caught.number is None
    signal.raise_signal(signal.SIGINT)
    assert caught.number == signal.SIGINT
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_reach_the_outer_of_two():
  with process.Interrupts() as outer:
    with process.Interrupts() as inner:
      signal.raise_signal(signal.SIGTERM)
    assert outer.number == inner.number == signal.SIGTERM
    with pytest.raises(process.Interrupted):
      outer.check()


@pytest.mark.parametrize('again', ['outside', 'in the next'])
@pytest.mark.slow
def test_a_second_signal_ends_a_process_whose_first_was_within(again):
  script = (
    'import os, signal, time\n'
    'from margin_jax.train.process import Interrupts\n'
    'def come():\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  time.sleep(1)\n'
    'with Interrupts():\n'
    '  with Interrupts():\n'
    '    come()\n'
  )
  script += {
    'outside': '  come()\n',
    'in the next': '  with Interrupts():\n    come()\n',
  }[again]
  done = subprocess.run(
    [sys.executable, '-c', script + 'os._exit(7)\n'],
    cwd=runs.ROOT,
    check=False,
  )
  assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_two_signals_end_a_process_that_is_busy():
  script = (
    'import time\n'
    'from margin_jax.train import process\n'
    'with process.Interrupts():\n'
    "  print('ready', flush=True)\n"
    '  time.sleep(60)\n'
    '  time.sleep(60)\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script],
    stdout=subprocess.PIPE,
    text=True,
    cwd=runs.ROOT,
  )
  process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  time.sleep(0.5)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 128 + signal.SIGTERM
