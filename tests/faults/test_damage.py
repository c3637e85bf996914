"""Workdirs with random damages: the right bits, or one line.

python -m tests.faults.test_damage --cases=500
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

import pytest
from absl import logging as absl_logging

import margin_jax
from margin_jax.compare import report
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop, process
from tests import helpers
from tests.faults import runs

# TensorStore still calls back for the files of a restore that has failed.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

STEPS = 12
FIELDS = {
  'steps': STEPS, 'log_every': 3, 'eval_every': 6, 'checkpoint_every': 4,
  'selection.log_counts': True,
}  # fmt: skip
TABLES = ('train.csv', 'eval.csv', 'classes.csv')


def train(workdir, log=lambda line: None):
  return loop.train(helpers.small_config(**FIELDS), str(workdir), log=log)


def interrupt(workdir, step: int) -> None:
  """Trains up to a signal, which comes when that step is told."""

  came = []

  def log(line):
    if f'step {step}/' in line and not came:
      came.append(signal.raise_signal(signal.SIGTERM))

  with pytest.raises(process.Interrupted):
    train(workdir, log)


class Runs:
  """A finished and an unfinished run, to be copied and damaged.

  Attributes:
    folders: by name.
    digest: of the state at the end.
    result: of the finished one.
    rows: of its tables.
    contents: of their files.
    networks: variables by the checkpoint's step.
  """

  def __init__(self, folder):
    folder = pathlib.Path(folder)
    self.folders = {x: folder / x for x in ('finished', 'unfinished')}
    self.result = train(self.folders['finished'])
    interrupt(self.folders['unfinished'], 6)
    self.digest = runs.digest(self.folders['finished'], STEPS)
    self.rows = {x: runs.rows(self.folders['finished'], x) for x in TABLES}
    self.contents = contents(folder)
    self.networks = {}
    for workdir in self.folders.values():
      for path in (workdir / 'checkpoints').iterdir():
        trained = margin_jax.load(workdir, int(path.name))
        self.networks[trained.step] = trained.variables
    for workdir in self.folders.values():  # of somebody else
      (workdir / 'notes.txt').write_text('of somebody else')
      (workdir / 'mine').mkdir()
      (workdir / 'mine' / 'train.csv').write_text('a,b\n1,2\n')


@contextlib.contextmanager
def compiled_once():
  """All runs within, which are of one config, share their programs."""
  compile_steps, make_evaluator = loop.compile_steps, loop._evaluator
  made = {}

  def steps(config, devices, dataset, spec, state):
    if 'program' not in made:
      made['program'] = compile_steps(config, devices, dataset, spec, state)[1]
    sizes = spec.sizes(config.steps)
    loader = dataset.loader(devices, sizes, int(state.step), config.seed)
    program = copy.copy(made['program'])
    program._loader = loader
    return loader, program

  def evaluator(*arguments):
    return made.setdefault('evaluator', make_evaluator(*arguments))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'compile_steps', steps)
    patch.setattr(loop, '_evaluator', evaluator)
    yield


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  with compiled_once():
    yield Runs(tmp_path_factory.mktemp('prepared'))


# Damages: each takes a generator, a workdir, a folder outside of it and one of
# the workdir's paths.


def flip(rng, path):
  content = bytearray(path.read_bytes() or b'\0')
  for _ in range(rng.choice((1, 1, 8))):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def cut(rng, path):
  path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])


def overwrite(rng, path):
  size = rng.choice((0, 1, 100, 100_000))
  path.write_bytes(rng.choice((bytes(size), rng.randbytes(size))))


def append(rng, path):
  with path.open('ab') as file:
    file.write(rng.choice((b'\0' * 50, rng.randbytes(20), b'1,2\n')))


def spoil_json(rng, path):
  """Exchanges one value of an object, and leaves the rest as it is."""
  try:
    content = json.loads(path.read_text())
    inner = content
    while isinstance(inner[key := rng.choice([*inner])], dict) and inner[key]:
      inner = inner[key]
  except (ValueError, TypeError, IndexError):
    return flip(rng, path)
  inner[key] = rng.choice(
    (None, -1, 10**30, 'x', [], {}, True, '__class__', float('nan'), [[[]]])
  )
  if rng.random() < 0.3:
    inner[rng.choice(('__class__', 'more', ''))] = inner.pop(key)
  path.write_text(json.dumps(content))
  return None


def remove(rng, path):
  del rng
  is_folder = path.is_dir() and not path.is_symlink()  # a damage before
  shutil.rmtree(path) if is_folder else path.unlink()


def to_folder(rng, path):
  remove(rng, path)
  path.mkdir()
  if rng.random() < 0.5:
    (path / 'file').write_text('of somebody else')


def to_file(rng, path):
  remove(rng, path)
  path.write_bytes(rng.choice((b'', b'a file', rng.randbytes(100))))


def to_link(rng, path, outside):
  remove(rng, path)
  path.symlink_to(
    rng.choice((outside, outside / 'train.csv', outside / 'gone', path))
  )


def exchange(rng, path, workdir):
  """Exchanges two of the workdir's files or folders."""
  kin = [
    other
    for other in workdir.rglob('*')
    if other.is_dir() == path.is_dir()
    and other not in (path, *path.parents)
    and path not in other.parents
  ]
  if not kin:
    return
  other = rng.choice(kin)
  aside = workdir / 'aside'
  path.rename(aside)
  other.rename(path)
  aside.rename(other)


def add(rng, workdir, outside):
  """Puts something beside what is there."""
  folder = rng.choice(
    [workdir, workdir, *(x for x in workdir.iterdir() if x.is_dir())]
  )
  name = rng.choice(
    ('0', '7', '400', 'x', '.lock', 'train.csv', 'nonfinite_step_3.npz')
  )
  path = folder / name
  if os.path.lexists(path):
    return
  rng.choice(
    (
      path.mkdir,
      lambda: path.write_bytes(rng.randbytes(50)),
      lambda: path.symlink_to(outside),
    )
  )()


def damage(rng, workdir, outside) -> str:
  """Does one damage, and says which."""
  paths = sorted(workdir.rglob('*'))
  # As often what the trainer reads itself as the many files of checkpoints.
  top = [path for path in paths if path.parent == workdir]
  path = rng.choice(rng.choice((paths, top)))
  if path.is_symlink():
    kinds = [remove]
  elif path.is_dir():
    kinds = [remove, to_file, to_link, exchange, add]
  else:
    kinds = [
      flip, flip, cut, cut, overwrite, append, remove, to_folder, to_link,
      exchange, spoil_json,
    ]  # fmt: skip
  kind = rng.choice(kinds)
  extra = {to_link: (outside,), exchange: (workdir,)}.get(kind, ())
  if kind is add:
    add(rng, workdir, outside)
  else:
    kind(rng, path, *extra)
  return f'{kind.__name__} {path.relative_to(workdir)}'


def contents(folder) -> collections.Counter:
  """Digests of the files below, without those that say who is at work."""
  return contents_of(x for x in folder.rglob('*') if x.name != '.lock')


def contents_of(paths) -> collections.Counter:
  return collections.Counter(
    hashlib.sha256(path.read_bytes()).hexdigest()
    for path in paths
    if path.is_file() and not path.is_symlink()
  )


def attempt(function):
  """What a function returns, or the message that it ends a command with."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), process.one_line_errors():
      return function(), ''
  except SystemExit as stopped:
    if isinstance(stopped.code, int):  # a signal
      raise
    message = str(stopped.code)
    assert message.startswith('error: '), message
    first, *fields = message.splitlines()
    # Of another config, the fields that differ stand below.
    assert all(line.startswith('  ') for line in fields), message
    assert not fields or 'another config' in first, message
    return None, message


def check(prepared, name: str, seed: int) -> str:
  """Damages a copy of a run, and does with it what users do.

  Returns:
    'right' if training ended with the bits of the run that was left alone,
    'complete' if there was nothing to do, 'line' if it ended in one line.
  """
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    workdir, outside = scratch / 'run', scratch / 'outside'
    shutil.copytree(prepared.folders[name], workdir)
    if rng.random() < 0.7:  # a run that is complete reads little else
      (workdir / 'result.json').unlink(missing_ok=True)
    outside.mkdir()
    (outside / 'train.csv').write_text('step,loss\n5,1\n')
    (outside / '7').mkdir()
    (outside / '7' / 'file').write_text('of somebody else')
    done = [damage(rng, workdir, outside) for _ in range(rng.choice((1, 1, 3)))]
    try:
      return _check(prepared, workdir, outside, done)
    except Exception as error:
      error.add_note(f'{name}, seed {seed}: {done}')
      raise


def _check(prepared, workdir, outside, done) -> str:
  before, beyond = contents(workdir), contents(outside)
  theirs = [workdir / 'notes.txt', *(workdir / 'mine').rglob('*')]
  theirs = contents_of(theirs) & before

  trained, _ = attempt(lambda: margin_jax.load(workdir))
  if trained is not None:
    expected = prepared.networks[trained.step]
    helpers.assert_trees_equal(trained.variables, expected)
  attempt(lambda: report.read_curves(workdir))
  assert contents(workdir) == before

  lines = []
  result, _ = attempt(functools.partial(train, workdir, lines.append))
  after = contents(workdir)
  assert not beyond - contents(outside)
  assert not theirs - after
  if result is None:
    # Of what was not damaged, a run drops what it will do again.
    lost = before - after - prepared.contents
    assert not lost, lost
    return 'line'
  if lines[-1].startswith('already complete'):  # checkpoints are not looked at
    assert result == prepared.result
    return 'complete'
  assert runs.digest(workdir, STEPS) == prepared.digest
  for split in ('test', 'validation', 'best'):
    assert result[split] == prepared.result[split]
  for table in TABLES:
    # That a digit is another one, nobody can tell.
    if not any(table in what or 'exchange' in what for what in done):
      assert runs.rows(workdir, table) == prepared.rows[table], table
  return 'right'


@pytest.mark.parametrize('name', ['finished', 'unfinished'])
def test_a_damaged_run_ends_right_or_in_one_line(prepared, name):
  for seed in range(2):
    check(prepared, name, seed)


@pytest.mark.slow
def test_thirty_damaged_runs_end_right_or_in_one_line(prepared):
  ends = collections.Counter()
  for seed in range(100, 115):
    for name in prepared.folders:
      ends[check(prepared, name, seed)] += 1
  assert ends['right'] >= 5
  assert ends['line'] >= 5


def test_a_run_that_was_interrupted_has_the_rows_of_one_that_was_not(
  prepared, tmp_path
):
  workdir = tmp_path / 'run'
  shutil.copytree(prepared.folders['unfinished'], workdir)
  train(workdir)
  assert runs.digest(workdir, STEPS) == prepared.digest
  for table in TABLES:
    assert runs.rows(workdir, table) == prepared.rows[table]


def main(cases: int, first: int, seconds: float) -> None:
  """Does so many cases, half of them with each run."""
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.disable()
  ends: collections.Counter = collections.Counter()
  with tempfile.TemporaryDirectory() as folder, compiled_once():
    prepared = Runs(folder)
    started = time.monotonic()
    for i in range(cases):
      if time.monotonic() - started > seconds:
        break
      name = [*prepared.folders][i % 2]
      try:
        ends[name, check(prepared, name, first + i // 2)] += 1
      except Exception as error:  # go on, to see all
        ends[name, 'WRONG'] += 1
        notes = '; '.join(getattr(error, '__notes__', ['while damaging']))
        print(f'{notes}\n  {type(error).__name__}: {error!s:.500}', flush=True)
      if i % 50 == 49:
        print(dict(ends), flush=True)
  for (name, end), count in sorted(ends.items()):
    print(f'{name}: {count} {end}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='Damages workdirs at random.')
  parser.add_argument('--cases', type=int, default=500)
  parser.add_argument('--first', type=int, default=1000, help='seed')
  parser.add_argument('--seconds', type=float, default=1e9, help='at most')
  args = parser.parse_args()
  devices_lib.use_compilation_cache()
  main(args.cases, args.first, args.seconds)
