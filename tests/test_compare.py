"""Comparisons as users run them: budgets, resuming, refusals, files."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from margin_jax import files
from margin_jax.compare import budgets, experiment, runs
from margin_jax.compare.methods import Trial
from margin_jax.config import ConfigError
from margin_jax.train import guard, loop, process, workdirs
from margin_jax.train import runs as runs_lib
from tests.helpers import ROOT, small_config

COSTS = ('examples_scored', 'examples_trained', 'flops', 'seconds', 'data_wait')
# A weight of MMR.
DIVERGES = 1e12


def quiet(line):
  """Takes a progress line."""


def compare(workdir, *methods, config=None, log=quiet, **options):
  options = {'seeds': 1, **options}
  return experiment.compare(
    config or small_config(), str(workdir), methods=methods, log=log, **options
  )


def read(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


class Pretended:
  """In place of `loop.train`: writes what a run writes, at once.

  The validation error is best at the second value of a sweep of alpha; a step
  that scores takes four times as long.
  """

  def __init__(self):
    self.trained = []

  def __call__(self, config, workdir, log):
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self.trained.append((config.selection.rule, config.seed, config.steps))
    if config.mmr.alpha == DIVERGES:
      raise guard.NonFiniteError('loss is inf at step 3', 3)
    log('a line')
    rate = 1 if config.selection.rule == 'uniform' else 4
    error = 0.1 + 0.01 * config.seed + 0.001 * rate
    costs = dict.fromkeys(COSTS, float(rate * config.steps))
    row = {'step': config.steps, **costs, 'accuracy': 1 - error, 'mean_mms': 1}
    for name, fields in (('train', {}), ('eval', {'split': 'test'})):
      with (folder / f'{name}.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, [*row, *fields])
        writer.writeheader()
        writer.writerow(row | fields)
    result = {
      'test': {'accuracy': 1 - error},
      'steps': config.steps, **costs, 'device': 'abacus', 'devices': 1,
      'skipped': 0, 'undecodable': 0, 'host_cores': 5,
      'versions': {'jax': '7'}, 'config': runs_lib.to_save(config),
    }  # fmt: skip
    if config.data.validation_examples:
      worse = abs(config.mmr.alpha - 1e-4)
      result['validation'] = {'accuracy': 1 - error - worse}
    (folder / 'result.json').write_text(json.dumps(result))
    return result


@pytest.fixture
def pretended(monkeypatch):
  train = Pretended()
  monkeypatch.setattr(loop, 'train', train)
  return train


def test_validation_errors_need_a_validation_split_in_every_method(
  tmp_path, pretended
):
  method = 'mms+data.validation_examples=0'
  with pytest.raises(ConfigError) as caught:
    compare(tmp_path, 'uniform', method, split='validation')
  assert f'{caught.value}'.startswith(f"{method}: split='validation' is not")
  assert not pretended.trained


def test_a_comparison_without_checkpoints_has_no_best_run(tmp_path, pretended):
  """Somebody removed them, to save space."""
  compare(tmp_path, 'uniform')
  assert runs_lib.find_best(tmp_path) is None


@pytest.mark.slow
def test_the_summary_of_a_config_file_stands_below_the_table(
  tmp_path, pretended
):
  lines, seen = [], []

  def summary(rows):
    seen.append([(row['method'], row['seed']) for row in rows])
    return [f'The mean of {len(rows)} runs.']

  compare(
    tmp_path, 'uniform', 'random', seeds=2, log=lines.append, summary=summary
  )
  assert seen[-1] == [
    ('uniform', 0), ('random', 0), ('uniform', 1), ('random', 1)
  ]  # fmt: skip
  assert lines[-1].endswith('\n\nThe mean of 4 runs.')
  assert '\n\nThe mean of 4 runs.\n\n' in (tmp_path / 'compare.md').read_text()


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  """Two seeds on the FLOPs of the baseline: the rows, and the folder."""
  workdir = tmp_path_factory.mktemp('real')
  options = {'seeds': 2, 'budget': 'flops', 'command': 'python -m x'}
  return compare(workdir, 'uniform', 'mms', **options), workdir


@pytest.mark.slow
def test_all_have_the_flops_of_the_baseline(real):
  rows, workdir = real
  assert [(row['method'], row['seed']) for row in rows] == [
    (method, seed) for seed in (0, 1) for method in ('uniform', 'mms', 'random')
  ]
  total = rows[0]['flops']
  assert rows[0]['steps'] == 20
  for row in rows:
    assert total - row['flops'] / row['steps'] < row['flops'] <= total
    result = json.loads(
      (workdir / f'runs/{row["method"]}/seed_{row["seed"]}/result.json')
      .read_text()
    )  # fmt: skip
    assert result['flops'] == row['flops']
    assert 1 - result['test']['accuracy'] == row['test_error']
    worst = 1 - result['test']['worst_class_accuracy']
    assert worst == row['test_worst_class_error'] >= row['test_error']
  assert rows[1]['steps'] < 20
  assert rows[1]['examples_scored'] == 32 * rows[1]['steps']


@pytest.mark.slow
def test_the_files_of_a_comparison(real):
  rows, workdir = real
  assert [float(x['test_error']) for x in read(workdir / 'runs.csv')] == [
    row['test_error'] for row in rows
  ]
  points = read(workdir / 'compare.csv')
  assert {x['method'] for x in points} == {'uniform', 'mms', 'random'}
  last = {(x['method'], x['seed']): x for x in points}
  for row in rows:
    found = last[row['method'], str(row['seed'])]
    assert int(found['step']) == row['steps']
    assert float(found['error']) == row['test_error']
    assert float(found['worst_class_error']) == row['test_worst_class_error']
  text = (workdir / 'compare.md').read_text()
  assert '`python -m x`' in text
  assert 'Welch' in text
  assert '| worst class test error, % |' in text
  assert 'Seeds: 0, 1.' in text
  for name in ('error', 'mean_mms', 'cost'):
    assert f'![{name}]({name}.png)' in text
    assert (workdir / f'{name}.pdf').read_bytes().startswith(b'%PDF')
    with Image.open(workdir / f'{name}.png') as image:
      assert image.width >= 800
      assert len(image.convert('L').getcolors()) > 10
  log = (workdir / 'runs/mms/seed_0/train.log').read_text()
  assert 'test accuracy' in log


@pytest.mark.slow
def test_nothing_that_is_complete_is_redone(real, monkeypatch):
  rows, workdir = real

  def fail(*args, **kwargs):
    raise AssertionError('trained again')

  monkeypatch.setattr(loop, 'train', fail)
  monkeypatch.setattr(budgets, 'flops', fail)
  lines = []
  options = {'seeds': 2, 'budget': 'flops'}
  again = compare(workdir, 'uniform', 'mms', log=lines.append, **options)
  assert again == rows
  assert sum('already complete' in line for line in lines) == 6


@pytest.mark.slow
def test_another_config_is_refused_before_anything_is_trained(real, pretended):
  _, workdir = real
  options = {'config': small_config(pool_size=16), 'budget': 'steps'}
  with pytest.raises(ConfigError, match=r'seed_0.*\n  pool_size: 32 -> 16'):
    compare(workdir, 'uniform', 'entropy', 'mms', **options)
  assert not pretended.trained


@pytest.mark.slow
def test_seconds_are_those_of_pilots_and_kept(tmp_path, pretended):
  config = small_config(steps=400, **{'optimizer.boundaries': (200,),
    'optimizer.learning_rates': (0.1, 0.01)})  # fmt: skip
  options = {'config': config, 'budget': 'seconds'}
  rows = compare(tmp_path, 'uniform', 'mms', **options)
  assert [row['steps'] for row in rows] == [400, 100, 100]
  assert [row['seconds'] for row in rows] == [400, 400, 400]
  # The first of a process is slow, and does not count.
  rules = ('uniform', 'uniform', 'mms', 'random')
  assert pretended.trained[:4] == [(rule, 0, 100) for rule in rules]
  saved = json.loads((tmp_path / 'runs/mms/seed_0/result.json').read_text())
  assert saved['config']['optimizer.boundaries'] == [50]
  assert not [*(tmp_path / 'pilots').glob('**/*.*')]
  pretended.trained.clear()
  compare(tmp_path, 'uniform', 'mms', seeds=2, **options)
  assert pretended.trained == [
    ('uniform', 1, 400), ('mms', 1, 100), ('random', 1, 100),
  ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_marks_the_best_by_validation(tmp_path, pretended):
  sweep = ['mmr.alpha=1e-5,1e-4,1e-3']
  rows = compare(tmp_path, 'uniform', 'random', sweep=sweep, seeds=2)
  assert len(rows) == len(pretended.trained) == 12
  assert {row['mmr.alpha'] for row in rows} == {1e-5, 1e-4, 1e-3}
  table = (tmp_path / 'sweep.md').read_text().splitlines()
  marked = [line for line in table if line.startswith('| **')]
  assert [line.split('|')[1:3] for line in marked] == [
    [' **`uniform`** ', ' **0.0001** '], [' **`random`** ', ' **0.0001** '],
  ]  # fmt: skip
  text = (tmp_path / 'compare.md').read_text()
  assert '`random, mmr.alpha=0.0001`' in text
  assert 'mmr.alpha=0.001' not in text


def test_a_sweep_without_validation_has_no_best(tmp_path, pretended):
  config = small_config(**{'data.validation_examples': 0})
  options = {'config': config, 'sweep': ['batch_size=4,8']}
  compare(tmp_path, 'uniform', **options)
  text = (tmp_path / 'sweep.md').read_text()
  assert '**' not in text
  assert 'No method has a best grid point' in text
  assert not (tmp_path / 'compare.md').exists()


@pytest.mark.slow
def test_files_of_another_command_do_not_stay(tmp_path, pretended):
  config = small_config(**{'data.validation_examples': 0})
  compare(tmp_path, 'uniform', config=config)
  assert (tmp_path / 'compare.md').exists()
  sweep = ['batch_size=4,8']
  compare(tmp_path, 'uniform', config=config, sweep=sweep)
  assert not (tmp_path / 'compare.md').exists()
  assert not [*tmp_path.glob('*.p??')]
  compare(tmp_path, 'uniform', config=config)
  assert not (tmp_path / 'sweep.md').exists()


def test_a_run_that_diverges_is_left_out_and_named(tmp_path, pretended):
  options = {'sweep': [f'mmr.alpha=1e-4,{DIVERGES}'], 'seeds': 2}
  with pytest.raises(guard.NonFiniteError, match='4 of 8 runs') as caught:
    compare(tmp_path, 'uniform', 'random', **options)
  assert 'random, mmr.alpha=1000000000000.0, seed 1' in str(caught.value)
  assert len(pretended.trained) == 8
  text = (tmp_path / 'sweep.md').read_text()
  assert 'seed 1: loss is inf at step 3' in text
  assert len(read(tmp_path / 'runs.csv')) == 4
  assert (tmp_path / 'compare.md').exists()


@pytest.mark.parametrize('text', ['', '[]', '{"a": 1}', '{"a": {"cost": 1}}'])
def test_costs_that_cannot_be_read_are_named(tmp_path, pretended, text):
  (tmp_path / 'costs.json').write_text(text)
  with pytest.raises(files.FileError, match=r'costs\.json cannot be read'):
    compare(tmp_path, 'uniform', budget='seconds')


def test_every_seed_writes_its_tables(tmp_path, pretended):
  def stop(line):
    if 'seed 1: starts' in line:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    compare(tmp_path, 'uniform', 'mms', seeds=2, log=stop)
  assert len(read(tmp_path / 'runs.csv')) == 3


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"config"'])
def test_a_result_that_cannot_be_read_is_named(tmp_path, pretended, text):
  compare(tmp_path, 'uniform')
  path = tmp_path / 'runs/uniform/seed_0/result.json'
  path.write_text(text)
  with pytest.raises(files.FileError, match=r'result\.json cannot be read'):
    compare(tmp_path, 'uniform')


@pytest.mark.parametrize('name', ['train.csv', 'eval.csv'])
def test_tables_that_are_lost_are_named(tmp_path, pretended, name):
  compare(tmp_path, 'uniform')
  path = tmp_path / 'runs/uniform/seed_0' / name
  head = path.read_text().splitlines()[0]
  for text in (f'{head}\n', 'x\n1\n', None):
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(files.FileError, match='uniform/seed_0'):
      compare(tmp_path, 'uniform')


def test_one_budget_for_all_points_of_a_sweep(tmp_path, pretended):
  options = {'sweep': ['batch_size=4,8'], 'budget': 'seconds'}
  rows = compare(
    tmp_path, 'uniform', 'mms', config=small_config(steps=400), **options
  )
  assert {row['seconds'] for row in rows} == {400}


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'budget': 'hours'}, "budget='hours' is not allowed: .*'seconds'"),
    ({'seeds': 0}, 'seeds=0 is not allowed'),
    ({'seeds': 10**12}, 'must be an integer from 1 to 1,000'),
    (
      {'seeds': 2, 'config': small_config(seed=2**32 - 1)},
      'uniform, seed 4294967296: seed=4294967296 is not allowed',
    ),
    ({'baseline': 'mm'}, r"baseline='mm' .* one of \['uniform', 'loss'"),
    (
      {'config': small_config(pool_size=2000)},
      'loss: pool_size=2000 is not allowed: it must be at most 1257',
    ),
  ],
)
def test_bad_arguments_are_refused_at_once(
  tmp_path, pretended, options, words
):  # fmt: skip
  with pytest.raises(ConfigError, match=words):
    compare(tmp_path, 'uniform', 'loss', **options)
  assert not pretended.trained


def test_two_comparisons_do_not_share_a_folder(tmp_path, pretended):
  message = f"workdir='{tmp_path}': in use by process {os.getpid()}"
  with (
    files.locked(str(tmp_path)),
    pytest.raises(ConfigError, match=message),
  ):
    compare(tmp_path, 'uniform')
  assert not pretended.trained


@pytest.mark.slow
def test_a_signal_in_the_last_step_of_a_run_stops_the_next(
  tmp_path, pretended, monkeypatch
):
  def train(config, workdir, log):
    with process.Interrupts():  # as loop.train has
      signal.raise_signal(signal.SIGTERM)
      return pretended(config, workdir, log)

  monkeypatch.setattr(loop, 'train', train)
  with pytest.raises(process.Interrupted) as stopped:
    compare(tmp_path, 'uniform', seeds=2)
  assert stopped.value.status == 143
  assert pretended.trained == [('uniform', 0, 20)]
  monkeypatch.setattr(loop, 'train', pretended)
  compare(tmp_path, 'uniform', seeds=2)
  assert pretended.trained == [('uniform', 0, 20), ('uniform', 1, 20)]


COMMAND = (
  sys.executable, '-m', 'margin_jax.compare', '--config=configs/digits.py',
  '--config.steps=40', '--config.optimizer.boundaries=(30,)',
  '--config.eval_every=20', '--config.checkpoint_every=5',
  '--config.log_every=5', '--seeds=1', '--methods=uniform,random',
)  # fmt: skip


def start(workdir, *arguments):
  return subprocess.Popen(
    [*COMMAND, f'--workdir={workdir}', *arguments],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    env={**os.environ, 'XLA_FLAGS': ''},
  )  # fmt: skip


@pytest.mark.slow
def test_a_killed_comparison_redoes_nothing_that_was_finished(tmp_path):
  process = start(tmp_path)
  for line in process.stdout:
    if line.startswith('run 2 of 2: random, seed 0: starts'):
      break
  process.kill()
  process.communicate()
  before = (tmp_path / 'runs/uniform/seed_0/result.json').stat()
  output = start(tmp_path).communicate()[0]
  assert 'run 1 of 2: uniform, seed 0: already complete' in output
  # It may have been killed before it had a folder.
  assert re.search('run 2 of 2: random, seed 0: (starts|resumes)', output)
  assert 'Traceback' not in output
  after = (tmp_path / 'runs/uniform/seed_0/result.json').stat()
  assert before.st_mtime_ns == after.st_mtime_ns
  assert [x['method'] for x in read(tmp_path / 'runs.csv')] == [
    'uniform', 'random',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--methods=uniform,,mms',), "methods='uniform,,mms' is not allowed"),
    (('--config.stepz=3',), "'stepz' is not a config field"),
    (('--budget=hours',), "--budget: invalid choice: 'hours'"),
    (('--methods=uniform,mms+reuse=9',), 'mms+reuse=9: pool_size=128 is not'),
  ],
)
@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line(
  tmp_path, arguments, message
):  # fmt: skip
  process = start(tmp_path / 'run', *arguments)
  output = process.communicate()[0]
  assert process.returncode
  assert message in output
  assert 'Traceback' not in output
  assert not (tmp_path / 'run').exists()


def test_runs_are_one_seed_after_the_other(tmp_path):
  found = runs.plan(
    [Trial(name, {}, small_config(seed=5)) for name in ('a', 'b')],
    2,
    workdirs.Workdir(tmp_path),
  )
  assert [(x.trial.method, x.seed) for x in found] == [
    ('a', 5), ('b', 5), ('a', 6), ('b', 6),
  ]  # fmt: skip
  assert found[3].folder == tmp_path / 'runs/b/seed_6'
  assert [x.config.seed for x in found] == [5, 5, 6, 6]
