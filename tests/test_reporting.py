"""What a run tells: the same names and numbers in files, hooks and the view."""

import collections
import contextlib
import csv
import io
import math
import struct
import sys

import numpy as np
import psutil
import pytest
from tensorboardX.proto.event_pb2 import Event

from margin_jax.train import devices as devices_lib
from margin_jax.train import loop, progress, reporting
from tests import helpers


def read_csv(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def scalars(folder):
  """{tag: {step: value}} of TensorBoard's files."""
  found = collections.defaultdict(dict)
  for path in folder.iterdir():
    content = path.read_bytes()
    while content:
      (size,) = struct.unpack('<Q', content[:8])
      event = Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]  # two checksums
      for value in event.summary.value:
        found[value.tag][event.step] = value.simple_value
  return found


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with a hook and a view: its folder, rows, lines, and screen."""
  folder = tmp_path_factory.mktemp('run')
  rows, lines, screen = [], [], io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TERM', 'xterm')
    loop.train(
      helpers.small_config(**{'selection.start': 5}),
      str(folder),
      log=lines.append,
      hook=lambda *told: rows.append(told),
      view=progress.View(progress.Terminal(file=screen, force_terminal=True)),
    )
  return folder, rows, lines, screen.getvalue()


def test_the_hook_gets_every_row_of_the_files(run):
  folder, rows, _, _ = run
  trained = read_csv(folder / 'train.csv')
  evaluated = read_csv(folder / 'eval.csv')
  assert len(rows) == len(trained) + len(evaluated) == 4 + 4
  written = [('train', row) for row in trained]
  written += [(row.pop('split'), row) for row in evaluated]
  written = [
    (prefix, int(row.pop('step')), {k: float(v) for k, v in row.items()})
    for prefix, row in written
  ]
  rows = sorted(rows, key=lambda row: row[0] != 'train')
  for (prefix, step, row), told in zip(written, rows, strict=True):
    assert (prefix, step) == told[:2]
    np.testing.assert_equal(told[2], row)
  assert any(math.isnan(v) for _, _, row in rows for v in row.values())


def test_rows_come_in_the_order_of_their_steps(run):
  steps = [step for _, step, _ in run[1]]
  assert steps == sorted(steps)


def test_tensorboard_has_the_same_names_and_numbers(run):
  folder, rows, _, _ = run
  expected = collections.defaultdict(dict)
  for prefix, step, row in rows:
    for name, value in row.items():
      if not math.isnan(value):
        expected[f'{prefix}/{name}'][step] = np.float32(value)
  assert scalars(folder / 'tensorboard') == expected


def test_the_view_uses_the_same_names_and_takes_the_place_of_lines(run):
  _, rows, lines, screen = run
  for name in (name for pair in progress.SHOWN for name in pair):
    assert name in screen
    assert name in rows[0][2]
  assert 'step 20/20' in screen
  assert not any('steps/s' in line for line in lines)
  assert sum('validation: loss' in line for line in lines) == 2


def test_a_hook_that_raises_ends_the_run_and_loses_nothing_saved(tmp_path):
  def hook(prefix, step, row):
    if (prefix, step) == ('train', 15):
      raise ConnectionError('no network')

  out, lines = sys.stdout, []
  screen = progress.Terminal(file=io.StringIO(), force_terminal=True)
  with pytest.raises(ConnectionError, match='no network'):
    loop.train(
      helpers.small_config(),
      str(tmp_path),
      log=lines.append,
      hook=hook,
      view=progress.View(screen),
    )
  assert sys.stdout is out
  assert read_csv(tmp_path / 'train.csv')[-1]['step'] == '15'
  loop.train(helpers.small_config(), str(tmp_path), log=lines.append)
  assert any('starting at step 10' in line for line in lines)


def test_speed_and_share_of_waiting_are_of_the_steps_since_the_last_row(
  tmp_path,
):
  rows = []
  counters = {'examples_scored': 0, 'examples_trained': 0}
  metrics = {'loss': 1.0, 'accuracy': 0.5, 'mean_mms': 1.0}
  reporter = reporting.Reporter(
    str(tmp_path),
    steps=100,
    after=20,
    last_row=(20, {**counters, 'seconds': 10.0, 'data_wait': 4.0}),
    best=None,
    log=lambda line: None,
    hook=lambda prefix, step, row: rows.append(row),
  )
  with contextlib.closing(reporter):
    for step, seconds, wait in ((30, 12.0, 4.5), (40, 20.0, 12.5)):
      times = {'seconds': seconds, 'data_wait': wait}
      reporter.train(step, {**counters, **times}, metrics)
  assert [row['steps_per_second'] for row in rows] == [5.0, 1.25]
  assert [row['data_wait_share'] for row in rows] == [0.25, 1.0]


@pytest.mark.parametrize('cut', ['1', '10,0.5', '\x00\x00'])
def test_a_row_that_was_cut_is_left_out(tmp_path, cut):
  path = tmp_path / 'train.csv'
  path.write_text(f'step,loss,accuracy\n5,1.5,0.5\n{cut}')
  reporting._Table(path, after=10).begin()
  assert [row['step'] for row in read_csv(path)] == ['5']


def test_memory_is_that_of_the_process_on_cpus():
  memory = devices_lib.Devices(2).memory()
  assert memory.keys() == {'memory_bytes'}
  resident = psutil.Process().memory_info().rss
  assert 0.5 * resident < memory['memory_bytes'] < 2 * resident


def test_memory_is_that_of_the_fullest_accelerator(monkeypatch):
  class Device:
    def __init__(self, now, peak):
      self._stats = {'bytes_in_use': now, 'peak_bytes_in_use': peak}

    def memory_stats(self):
      return self._stats

  devices = devices_lib.Devices(2)
  monkeypatch.setattr(devices, '_local', [Device(3, 7), Device(5, 6)])
  assert devices.memory() == {'memory_bytes': 5, 'memory_peak_bytes': 7}
