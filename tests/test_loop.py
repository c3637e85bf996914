"""The trainer: resuming, files, refusals. Digits, 20 steps, one device."""

import functools
import json
import shutil
import signal
import types

import numpy as np
import pytest

from margin_jax import config as config_lib
from margin_jax import files
from margin_jax.data import description
from margin_jax.train import devices as devices_lib
from margin_jax.train import guard, loop, process
from tests import helpers
from tests.helpers import Interrupted, read_csv, saved_state, slow, train


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp('finished')
  result, lines = train(workdir)
  return workdir, result, lines


def test_run_writes_what_it_promises(finished):
  workdir, result, lines = finished
  written = json.loads((workdir / 'result.json').read_text())
  assert written.pop('sha256')
  assert written == json.loads(json.dumps(result))
  assert result['test']['count'] == 360
  assert result['validation']['count'] == 180
  assert result['config'] == config_lib.as_json(helpers.small_config())
  assert result['seed'] == 0
  assert result['examples_scored'] == 20 * 32
  assert result['examples_trained'] == 20 * 8
  assert result['flops'] > 0
  assert result['seconds'] > 0
  assert result['versions']['jax']
  assert list((workdir / 'tensorboard').iterdir())

  rows = read_csv(workdir / 'train.csv')
  assert [int(row['step']) for row in rows] == [5, 10, 15, 20]
  assert [int(row['examples_scored']) for row in rows] == [160, 320, 480, 640]
  flops = [float(row['flops']) for row in rows]
  np.testing.assert_allclose(np.diff(flops), flops[0])
  assert all(float(row['penalty']) > 0 for row in rows)
  rows = read_csv(workdir / 'eval.csv')
  assert [(int(row['step']), row['split']) for row in rows] == [
    (10, 'validation'), (10, 'test'), (20, 'validation'), (20, 'test'),
  ]  # fmt: skip
  assert float(rows[-1]['accuracy']) == result['test']['accuracy']
  assert any('eta' in line and 'steps/s' in line for line in lines)
  assert 'test accuracy' in lines[-1]


def test_best_is_the_best_validation(finished):
  workdir, result, _ = finished
  rows = read_csv(workdir / 'eval.csv')
  best = max(float(r['accuracy']) for r in rows if r['split'] == 'validation')
  assert result['best']['validation'] == best


def test_same_command_on_a_complete_run_changes_nothing(finished):
  workdir, result, _ = finished
  before = (workdir / 'eval.csv').read_bytes()
  again, lines = train(workdir)
  assert again['test'] == result['test']
  assert again['seconds'] == result['seconds']
  assert (workdir / 'eval.csv').read_bytes() == before
  (line,) = lines
  assert line.startswith('already complete: test accuracy')


@pytest.mark.parametrize('at', [*slow(10), 15])
def test_interrupted_run_ends_bit_identical(finished, tmp_path, at):
  workdir, result, _ = finished
  with pytest.raises(Interrupted):
    train(tmp_path, interrupt_at=at)
  again, lines = train(tmp_path)
  # At 10 the interruption comes before the save at 10.
  assert f'starting at step {0 if at == 10 else 10}' in lines[0]
  helpers.assert_trees_equal(saved_state(workdir)[0], saved_state(tmp_path)[0])
  assert again['test'] == result['test']
  assert again['best'] == result['best']
  for name in ('examples_scored', 'examples_trained', 'flops'):
    assert again[name] == result[name]
  steps = [int(row['step']) for row in read_csv(tmp_path / 'train.csv')]
  assert steps == [5, 10, 15, 20]


@pytest.mark.slow
def test_a_checkpoint_fits_any_number_of_devices(finished, tmp_path):
  workdir, _, _ = finished
  with pytest.raises(Interrupted):
    train(tmp_path, interrupt_at=15, devices=4)
  _, lines = train(tmp_path, devices=1)
  assert 'starting at step 10' in lines[0]
  one, four = saved_state(workdir)[0], saved_state(tmp_path)[0]
  helpers.assert_trees_close(one.params, four.params, 1e-5)


def test_all_devices_are_as_many_as_before_where_it_matters():
  """The config says None at both times."""
  fields = {'selection.scope': 'device', 'devices': None}
  config = helpers.small_config(**fields)
  saved = config_lib.as_json(config)
  check = functools.partial(
    loop._check_same_run,
    config=config,
    devices=types.SimpleNamespace(total=2),
  )
  info = {'config': saved, 'step': 5, 'devices': 2}
  check(info, saved_config=saved)
  with pytest.raises(config_lib.ConfigError, match=r'\n  devices: 4 -> 2$'):
    check(info | {'devices': 4}, saved_config=saved)
  free = {**saved, 'selection.scope': 'global'}
  check({**info, 'config': free, 'devices': 4}, saved_config=free)


def test_another_config_is_refused(finished):
  workdir, _, _ = finished
  before = (workdir / 'result.json').read_bytes()
  with pytest.raises(config_lib.ConfigError, match=r'seed: 0 -> 1'):
    train(workdir, seed=1)
  with pytest.raises(config_lib.ConfigError, match=r'steps=10 .* step 20'):
    train(workdir, steps=10)
  assert (workdir / 'result.json').read_bytes() == before


def test_another_config_is_refused_where_checkpoints_were_removed(
  finished, tmp_path
):
  """By someone who needed the room: the results stay."""
  shutil.copytree(
    finished[0], tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints')
  )
  files = 'result.json', 'train.csv', 'eval.csv'
  before = [(tmp_path / 'run' / x).read_bytes() for x in files]
  with pytest.raises(config_lib.ConfigError, match=r'result of another config'):
    train(tmp_path / 'run', seed=1)
  assert [(tmp_path / 'run' / x).read_bytes() for x in files] == before


def test_data_that_have_changed_are_refused():
  """Those of TFDS, say, have no digest."""
  dataset = helpers.digits()
  described = description.to_json(dataset)
  loop._check_same_data({'dataset': described}, dataset)
  loop._check_same_data({}, dataset)  # older versions had none
  with pytest.raises(config_lib.ConfigError, match=r'examples: 99 -> 1257$'):
    loop._check_same_data({'dataset': described | {'examples': 99}}, dataset)


@pytest.mark.slow
def test_a_run_cannot_end_where_it_was_stopped(tmp_path):
  """There was no evaluation, and the checkpoint says so."""
  came = []

  def log(line):
    if 'step 6/' in line and not came:
      came.append(signal.raise_signal(signal.SIGTERM))

  fields = {'eval_every': 10, 'log_every': 2}
  with pytest.raises(process.Interrupted):
    loop.train(helpers.small_config(**fields), str(tmp_path), log=log)
  step = max(int(x.name) for x in (tmp_path / 'checkpoints').iterdir())
  assert 6 <= step < 10
  with pytest.raises(config_lib.ConfigError, match=f'must be above {step}$'):
    train(tmp_path, steps=step, **fields)
  assert train(tmp_path, steps=10, **fields)[0]['best']['step'] == 10


@pytest.mark.slow
def test_diverging_run_stops_and_keeps_its_checkpoints(tmp_path):
  with pytest.raises(guard.NonFiniteError, match=r'is (nan|inf) at step \d+'):
    train(
      tmp_path,
      **{
        'optimizer.learning_rates': (0.01, 1e30),
        'optimizer.boundaries': (12,),
      },
    )
  state, info = saved_state(tmp_path)
  assert info['step'] == 10
  assert all(np.isfinite(x).all() for x in state.params['head'].values())


def test_bad_config_stops_before_anything_is_written(tmp_path):
  config = helpers.small_config()
  config.pool_size = 4
  workdir = tmp_path / 'run'
  with pytest.raises(config_lib.ConfigError, match='pool_size=4'):
    loop.train(config, str(workdir))
  config = helpers.small_config(devices=4, batch_size=10)
  with pytest.raises(config_lib.ConfigError, match='divisible by 4 devices'):
    loop.train(config, str(workdir))
  config = helpers.small_config(pool_size=1258)
  with pytest.raises(config_lib.ConfigError, match='at most 1257'):
    loop.train(config, str(workdir))
  assert not workdir.exists()


@pytest.mark.slow
def test_fields_without_effect_are_warnings_and_change_nothing(tmp_path):
  plain = {'selection.rule': 'uniform', 'mmr.alpha': 0.0, 'steps': 10}
  useless = {
    'selection.proxy': 'resnet8', 'selection.ramp': 0.1,
    'selection.batch_stats': 'pool', 'model.batch_norm': 'device',
    'model.dropout': 0.5, 'trimming.backward': 'kept', 'data.buckets': (5,),
    'large_margin.layers': ('nothing',), 'attack.epsilons': (0.1,),
    'mmr.stop_feature_gradient': True, 'optimizer.epsilon': 1.0,
  }  # fmt: skip
  result, lines = train(tmp_path / 'plain', **plain)
  other, others = train(tmp_path / 'useless', **plain, **useless)
  new = [line for line in others if 'has no effect' in line]
  assert {x.removeprefix('warning: ').split('=')[0] for x in new} >= {*useless}
  assert not any(name in line for line in lines for name in useless)
  same = ('test', 'validation', 'flops', 'config')
  assert [result[x] for x in same] == [other[x] for x in same]
  first, second = (
    saved_state(tmp_path / x, **plain)[0] for x in ('plain', 'useless')
  )
  helpers.assert_trees_equal(first.params, second.params)
  # It is the same run, which is complete.
  again, _ = train(tmp_path / 'plain', **plain, **useless)
  assert again == result


@pytest.mark.slow
def test_without_validation_there_is_no_best(tmp_path):
  result, _ = train(tmp_path, **{'data.validation_examples': 0}, steps=5)
  assert result['best'] is None
  assert 'validation' not in result


@pytest.mark.slow
def test_cifar10_trains(data_dir, tmp_path):
  """The real 45,000 images: scored, selected, evaluated on all 10,000."""
  result, lines = train(
    tmp_path,
    **{
      'data.name': 'cifar10',
      'data.data_dir': str(data_dir / 'tfds'),
      'data.validation_examples': 5000,
      'data.augmentations': ('crop', 'flip'),
      'model.name': 'resnet8',
      'batch_size': 32,
      'pool_size': 64,
      'steps': 40,
      'eval_every': 40,
      'checkpoint_every': 40,
      'log_every': 10,
      'optimizer.learning_rates': (0.05,),
    },
  )
  assert '45,000 training examples' in lines[0]
  assert result['test']['count'] == 10_000
  assert result['validation']['count'] == 5_000
  losses = [float(row['loss']) for row in read_csv(tmp_path / 'train.csv')]
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_resumed_run_reaches_its_end_with_several_steps_a_call(tmp_path):
  intervals = {'log_every': 5, 'eval_every': 5, 'checkpoint_every': 5}
  train(tmp_path, steps=15, **intervals)
  intervals = {'log_every': 10, 'eval_every': 10, 'checkpoint_every': 10}
  with pytest.raises(config_lib.ConfigError, match='a divisor of 15'):
    train(tmp_path, steps=40, steps_per_call=10, **intervals)
  result, _ = train(tmp_path, steps=40, steps_per_call=5, **intervals)
  assert result['examples_trained'] == 40 * 8
  assert int(saved_state(tmp_path)[0].step) == 40


@pytest.mark.slow
def test_a_run_stopped_before_its_result_writes_it(tmp_path):
  first, _ = train(tmp_path, steps=5)
  (tmp_path / 'result.json').unlink()
  again, _ = train(tmp_path, steps=5)
  assert again['test'] == first['test']
  assert (tmp_path / 'result.json').exists()
  for text in ('', '{}', '{"steps": 5}'):
    (tmp_path / 'result.json').write_text(text)
    with pytest.raises(files.FileError, match='cannot be read'):
      train(tmp_path, steps=5)


@pytest.mark.parametrize(
  'fields',
  [
    {'devices': 9},
    {'data.validation_examples': 5000},
    {'data.normalization': 'imagenet'},
  ],
)
def test_mistakes_seen_late_are_config_errors_too(tmp_path, fields):
  with pytest.raises(config_lib.ConfigError):
    train(tmp_path, **fields)


def test_unusable_workdir_is_a_config_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(config_lib.ConfigError, match='workdir='):
    train(tmp_path / 'file')


@pytest.mark.slow
def test_python_stays_a_few_calls_ahead_of_the_devices(monkeypatch, tmp_path):
  """A hundred waiting calls deadlock XLA:CPU's collectives."""
  ahead = []
  add = guard.Watch.add

  def counted(watch, *args):
    add(watch, *args)
    ahead.append(len(watch._calls))

  monkeypatch.setattr(guard.Watch, 'add', counted)
  intervals = {'log_every': 200, 'eval_every': 200, 'checkpoint_every': 200}
  train(tmp_path, steps=200, devices=4, **intervals)
  assert len(ahead) == 200
  assert max(ahead) <= devices_lib.MAX_CALLS_AHEAD


def test_rows_grow_rarer():
  """Four rows, then two for every doubling of the steps."""
  ends = [x for x in range(1, 641) if loop.row_ends(x, 10, 4)]
  assert ends == [10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640]
  assert [x for x in range(1, 50) if loop.row_ends(x, 10, None)] == [
    10,
    20,
    30,
    40,
  ]


def test_a_run_with_fewer_rows_counts_all_steps(tmp_path):
  fields = {'log_every': 1, 'eval_every': 20, 'checkpoint_every': 20}
  config = helpers.small_config(**fields, log_rows=2, steps=20)
  loop.train(config, str(tmp_path), log=lambda line: None)
  rows = helpers.read_csv(tmp_path / 'train.csv')
  assert [int(row['step']) for row in rows] == [1, 2, 4, 8, 16, 20]
