"""What a run tells: the same names and numbers in files, hooks and the view."""

import collections
import contextlib
import csv
import errno
import io
import json
import math
import struct
import sys
import time

import numpy as np
import psutil
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from margin_jax import terminal
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop, metrics, progress, reporting
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
      view=progress.View(terminal.Terminal(file=screen, force_terminal=True)),
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
  found = scalars(folder / 'tensorboard')
  assert {tag: found[tag] for tag in expected} == expected


def values(folder):
  """Every value in TensorBoard's files, with its step."""
  for path in folder.iterdir():
    content = path.read_bytes()
    while content:
      (size,) = struct.unpack('<Q', content[:8])
      event = Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]
      for value in event.summary.value:
        yield event.step, value


def test_tensorboard_has_histograms_of_every_score_and_margin(run):
  folder, _, _, _ = run
  histograms = collections.defaultdict(dict)
  for step, value in values(folder / 'tensorboard'):
    if value.HasField('histo'):
      histograms[value.tag][step] = value.histo
  assert {*histograms} == {
    'train/scores', 'validation/margin', 'validation/mms', 'test/margin',
    'test/mms',
  }  # fmt: skip
  assert [*histograms['train/scores']] == [10, 15, 20]  # selection.start is 5
  assert {x.num for x in histograms['train/scores'].values()} == {32}
  scored = {int(x['step']): x for x in read_csv(folder / 'train.csv')}
  for step, histogram in histograms['train/scores'].items():
    low, high = (float(scored[step][f'score_{x}']) for x in ('min', 'max'))
    assert histogram.min <= high
    assert histogram.max >= low
  evaluated = [x for x in read_csv(folder / 'eval.csv') if x['split'] == 'test']
  for row in evaluated:
    margin = histograms['test/margin'][int(row['step'])]
    assert margin.num == 360
    mms = histograms['test/mms'][int(row['step'])]
    assert mms.min >= 0
    assert mms.max == max(abs(margin.min), margin.max) or mms.max <= margin.max


@pytest.mark.parametrize('scored', [(0, 1, 0), (0, 0, 0)])
def test_the_last_scores_for_tensorboard_survive_an_interruption(scored):
  """What is kept of the steps since the last row says the same as they do."""

  def call(scored, start):
    count = len(scored)
    rows = np.arange(start, start + 4 * count, dtype=np.float32)
    return {
      'nonfinite': np.zeros(count, np.int32),
      'bad_gradient': np.zeros(count, np.int32),
      'scored': np.float32(scored),
      'loss': np.float32(scored) + start,
      'scores': rows.reshape(count, 4),
      'pool_classes': np.ones((count, 3), np.float32),
      'batch_classes': np.ones((count, 3), np.float32),
    }

  before, after = [call(scored, 0), call([0], 100)], call([0, 0], 200)
  kept = json.loads(json.dumps(metrics.to_json(before)))
  whole = metrics.summarize([*before, after])
  again = metrics.summarize([metrics.from_json(kept), after])
  np.testing.assert_equal(again, whole)
  if any(scored):
    np.testing.assert_array_equal(whole[2], [4, 5, 6, 7])
  else:
    assert whole[2] is None


def test_tensorboard_has_classes_and_hyperparameters(run):
  folder, _, _, _ = run
  accuracy = collections.defaultdict(dict)
  worst, plugins = {}, {}
  for step, value in values(folder / 'tensorboard'):
    if value.tag.startswith('test_class_accuracy/class_'):
      accuracy[step][value.tag] = value.simple_value
    if value.tag.startswith('test/worst_class/'):
      worst[step] = value.tensor.string_val[0].decode()
    if value.metadata.plugin_data.plugin_name == 'hparams':
      data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
      plugins[value.tag.removeprefix('_hparams_/')] = data
  rows = [x for x in read_csv(folder / 'eval.csv') if x['split'] == 'test']
  assert len(rows) == 2
  for row in rows:
    step = int(row['step'])
    assert len(accuracy[step]) == 10
    least = min(accuracy[step], key=accuracy[step].get)
    lowest = float(row['worst_class_accuracy'])
    assert accuracy[step][least] == pytest.approx(lowest)
    assert worst[step].endswith(f'{lowest:.2%}')
  fields = plugins['session_start_info'].session_start_info.hparams
  assert fields['selection.rule'].string_value == 'mms'
  assert fields['batch_size'].number_value == 8
  tags = {x.name.tag for x in plugins['experiment'].experiment.metric_infos}
  assert 'test/accuracy' in tags
  assert tags <= {*scalars(folder / 'tensorboard')}
  assert 'session_end_info' in plugins


def test_the_view_uses_the_same_names_and_takes_the_place_of_lines(run):
  _, rows, lines, screen = run
  for name in (name for pair in progress.SHOWN for name in pair):
    assert name in screen
    assert name in rows[0][2]
  assert 'step 20/20' in screen
  assert not any('steps/s' in line for line in lines)
  assert sum('validation: loss' in line for line in lines) == 2


@pytest.mark.slow
def test_a_hook_that_raises_ends_the_run_and_loses_nothing_saved(tmp_path):
  def hook(prefix, step, row):
    if (prefix, step) == ('train', 15):
      raise ConnectionError('no network')

  out, lines = sys.stdout, []
  screen = terminal.Terminal(file=io.StringIO(), force_terminal=True)
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


@pytest.mark.parametrize('first', [True, False])
def test_what_is_skipped_may_change_where_a_run_is_stopped(first):
  """`on_nonfinite` may be another when the run goes on, in the same row."""
  plain = {
    'nonfinite': np.zeros(2, np.int32),
    'bad_gradient': np.zeros(2, np.int32),
    'loss': np.ones(2, np.float32),
  }
  skipping = {
    **plain,
    'nonfinite': np.int32([1, 0]),
    'skipped': np.float32([1, 0]),
  }
  calls = [skipping, plain] if first else [plain, skipping]
  kept = metrics.from_json(json.loads(json.dumps(metrics.to_json(calls[:1]))))
  row, _, _ = metrics.summarize([kept, calls[1]])
  assert row['skipped'] == 1
  assert row['loss'] == 1


def test_a_disk_that_is_full_is_no_reason_to_wait(tmp_path):
  """TensorBoard's thread would end, and its queue would take no more."""
  board = reporting._Board(str(tmp_path))

  def fail(*arguments):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with contextlib.closing(board):
    board._records._writer.write = fail
    for step in range(50):  # its queue takes ten
      board.add_scalar('loss', 1.0, step)
    for _ in range(100):
      if board._records.error is not None:
        break
      time.sleep(0.1)
    with pytest.raises(OSError, match='No space left'):
      board.check()
