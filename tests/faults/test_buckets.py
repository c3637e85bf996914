"""Runs in a bucket: the bits, rows and files of a run in a folder.

    python -m tests.faults.test_buckets --kills=50

kills a run as often, half of the times at a call of the store.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import fsspec
import numpy as np
import pytest

import margin_jax
from margin_jax import buckets
from margin_jax import config as config_lib
from margin_jax.analyze import analyze
from margin_jax.buckets import Bucket, BucketError, Lock
from margin_jax.compare import compare
from margin_jax.train import loop, workdirs
from margin_jax.train import runs as runs_lib
from margin_jax.train.checkpoints import RemovedError, SaveError
from tests import helpers
from tests.faults import object_store, runs

URL = 'gs://bucket/run'
FIELDS = {'steps': 20, 'eval_every': 5, 'checkpoint_every': 5, 'log_every': 5}


@pytest.fixture
def store(tmp_path, monkeypatch):
  """A store with a bucket, that stands for Google's and Amazon's."""
  folder = tmp_path / 'store'
  folder.mkdir()
  monkeypatch.setenv(object_store.STORE, str(folder))
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  monkeypatch.setattr(
    fsspec,
    'get_filesystem_class',
    lambda name: object_store.ObjectStore,
  )
  fs = object_store.ObjectStore()
  fs.pipe_file('bucket/there', b'')
  return fs


def names(store):
  """The objects of the run, without TensorBoard's."""
  found = (
    path.removeprefix('bucket/run/') for path in store.find('bucket/run')
  )
  return sorted(name for name in found if not name.startswith('tensorboard/'))


def train(workdir, **fields):
  lines = []
  config = helpers.small_config(**FIELDS, **fields)
  result = loop.train(config, str(workdir), log=lines.append)
  return result, lines


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_in_a_folder(store, tmp_path):
  counted = {'selection.log_counts': True}
  here, _ = train(tmp_path / 'here', **counted)
  there, _ = train(URL, **counted)
  assert there['test'] == here['test']
  assert runs.digest(URL, 20) == runs.digest(tmp_path / 'here', 20)
  for name in ('train.csv', 'eval.csv', 'classes.csv'):
    assert runs.rows(URL, name) == runs.rows(tmp_path / 'here', name)
  others = {
    name for name in names(store) if not name.startswith('checkpoints/')
  }
  assert others == {
    'train.csv', 'eval.csv', 'classes.csv', 'result.json',
    'selection_counts.npy',
  }  # fmt: skip
  assert {x.name for x in tmp_path.iterdir()} == {'store', 'here'}
  again, lines = train(URL, **counted)
  assert again['test'] == here['test']
  assert lines[-1].startswith('already complete')

  # Read by everything that reads a run, and by nothing else than its URL.
  both = [margin_jax.load(x) for x in (URL, str(tmp_path / 'here'))]
  images = np.zeros((3, *both[0].input_shape), np.uint8)
  np.testing.assert_array_equal(*(x.apply(images)[0] for x in both))
  folder = analyze(URL, steps=[20], examples=8, log=lines.append)
  assert f'{folder}' == f'{URL}/analysis'
  assert (folder.parent.name, folder.name) == ('run', 'analysis')
  expected = analyze(
    str(tmp_path / 'here'), steps=[20], examples=8, log=lambda line: None
  )
  for path in expected.iterdir():
    found = store.cat_file(f'bucket/run/analysis/{path.name}')
    assert path.suffix != '.csv' or found == path.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_is_removed_from_the_bucket_is_left_out(store):
  train(URL)
  with runs_lib.open_run(URL) as run:
    before, last = run.checkpoints.steps()[-2:]
    for path in store.find('bucket/run/checkpoints/20'):
      store.rm_file(path)
    with pytest.raises(RemovedError, match='was removed'):
      run.restore(20)
    assert (int(run.restore().step), last) == (before, 20)


def test_all_events_are_in_the_bucket(store, tmp_path):
  """TensorBoard's writer is behind; nothing of it may be lost."""
  accumulator = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator'
  )
  train(URL)
  target = tmp_path / 'events'
  target.mkdir()
  for name in store.find('bucket/run/tensorboard'):
    store.get_file(name, target / name.rpartition('/')[2])
  events = accumulator.EventAccumulator(str(target))
  events.Reload()
  steps = [event.step for event in events.Scalars('train/loss')]
  assert steps == [5, 10, 15, 20]


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_moved_in_the_bucket(store, tmp_path):
  train(tmp_path / 'whole')
  with pytest.raises(RuntimeError, match='stopped'):
    loop.train(
      helpers.small_config(**FIELDS),
      URL,
      log=lambda line: None,
      hook=stop_at(20),
    )
  found = [
    x for x in store.find('bucket/run/checkpoints/15/info') if 'meta' in x
  ]
  store.pipe_file(found[0], b'{}')
  result, lines = train(URL)
  moved = [line for line in lines if 'it is now' in line]
  assert moved == [f'warning: it is now {URL}/corrupt_checkpoints/15']
  assert any('going back to step 10' in line for line in lines)
  assert f'{URL}/checkpoints/15 cannot be used' in ''.join(lines)
  for step in (15, 20):  # 15 was saved again
    assert runs.digest(URL, step) == runs.digest(tmp_path / 'whole', step)
  for name in ('train.csv', 'eval.csv'):
    assert runs.rows(URL, name) == runs.rows(tmp_path / 'whole', name)
  kept = store.find('bucket/run/corrupt_checkpoints/15/state')
  assert len(kept) > 5
  assert result['steps'] == 20


@pytest.mark.slow
def test_a_download_that_fails_removes_nothing(store, tmp_path, monkeypatch):
  """Another program has saved step 20 since the first look."""
  train(URL)
  hidden = store.find('bucket/run/checkpoints/20')
  contents = {name: store.cat_file(name) for name in hidden}
  for name in hidden:
    store.rm_file(name)
  download = Bucket.download

  def fails(self, folder, names):
    download(self, folder, names[: len(names) // 2])
    raise BucketError('the network is gone')

  with workdirs.opened(URL) as place:
    place.refresh()
    for name, content in contents.items():
      store.pipe_file(name, content)
    monkeypatch.setattr(Bucket, 'download', fails)
    with pytest.raises(BucketError, match='is gone'), place.locked():
      place.refresh()
  there = {
    x: store.cat_file(x) for x in store.find('bucket/run/checkpoints/20')
  }
  assert there == contents


def stop_at(last):
  """A hook that ends a run by an error of its own, after a row is written."""

  def hook(prefix, step, row):
    del row
    if (prefix, step) == ('train', last):
      raise RuntimeError('stopped')

  return hook


@pytest.mark.slow
def test_a_comparison_in_a_bucket_goes_on(store, tmp_path):
  config = helpers.small_config(**FIELDS)
  options = {
    'methods': ('uniform', 'mms'),
    'seeds': 1,
    'log': lambda line: None,
  }
  here = compare(config, str(tmp_path / 'here'), **options)
  there = compare(config, 'gs://bucket/all', **options)
  exact = ('method', 'steps', 'test_error', 'flops')
  assert [[row[x] for x in exact] for row in there] == [
    [row[x] for x in exact] for row in here
  ]
  found, expected = (
    runs_lib.find_best(x) for x in ('gs://bucket/all', tmp_path / 'here')
  )
  assert found == expected.replace(str(tmp_path / 'here'), 'gs://bucket/all')
  with pytest.raises(config_lib.ConfigError, match='name one of its runs: gs:'):
    margin_jax.load('gs://bucket/all')
  with pytest.raises(config_lib.ConfigError, match='it holds a comparison; '):
    helpers.train('gs://bucket/all', **FIELDS)
  with pytest.raises(config_lib.ConfigError, match='it holds a run; '):
    compare(config, found, **options)
  tables = {'compare.md', 'runs.csv', 'compare.csv', 'error.png', 'cost.png'}
  found = {x.removeprefix('bucket/all/') for x in store.find('bucket/all')}
  assert tables < found
  assert sum(x.endswith('/train.log') for x in found) == len(here)
  before = {
    x: y
    for x, y in store.find('bucket/all', detail=True).items()
    if 'seed_' in x
  }
  lines = []
  compare(config, 'gs://bucket/all', **{**options, 'log': lines.append})
  assert sum('already complete' in line for line in lines) == len(here)
  assert before == {
    x: y
    for x, y in store.find('bucket/all', detail=True).items()
    if 'seed_' in x
  }


# Who owns a folder.


def other(**about):
  """What another process would have written into the lock."""
  return json.dumps({**buckets.this_process(), **about}).encode()


def test_a_folder_has_one_owner(store):
  with (
    Lock(Bucket(URL)).held(),
    pytest.raises(
      BlockingIOError, match=f'process {os.getpid()} on .*, seen 0 s'
    ),
    Lock(Bucket(URL)).held(),
  ):
    pass
  assert names(store) == []
  with Lock(Bucket(URL)).held():
    pass


def test_a_run_in_a_folder_that_is_owned_is_one_line(store):
  with (
    Lock(Bucket(URL)).held(),
    pytest.raises(config_lib.ConfigError) as caught,
  ):
    train(URL)
  text = str(caught.value)
  assert text.startswith(
    f'workdir={URL!r}: in use by process {os.getpid()} on '
  )
  assert '\n' not in text


@pytest.mark.parametrize('content', [other(machine='far'), b'\xff\0'])
def test_an_owner_elsewhere_is_believed_for_a_minute(store, content):
  store.pipe_file('bucket/run/.lock', content)
  file = store._file('bucket/run/.lock')
  now = time.time()
  os.utime(file, (now, now - buckets.STALE_SECONDS + 5))
  with (
    pytest.raises(BlockingIOError, match=r'seen 5\d s ago'),
    Lock(Bucket(URL)).held(),
  ):
    pass
  assert store.cat_file('bucket/run/.lock') == content
  os.utime(file, (now, now - buckets.STALE_SECONDS - 1))
  with Lock(Bucket(URL)).held():
    pass


@pytest.mark.parametrize('about', [{'process': 2**22}, {'started': 1.0}])
def test_an_owner_that_was_killed_here_is_forgotten_at_once(store, about):
  store.pipe_file('bucket/run/.lock', other(**about))
  with Lock(Bucket(URL)).held():
    pass


def test_an_owner_says_that_it_lives(store, monkeypatch):
  monkeypatch.setattr(buckets, 'BEAT_SECONDS', 0.05)
  file = store._file('bucket/run/.lock')
  lock = Lock(Bucket(URL))
  with lock.held():
    os.utime(file, (1, 1))
    deadline = time.monotonic() + 20
    while file.stat().st_mtime < 2 and time.monotonic() < deadline:
      time.sleep(0.05)
    assert file.stat().st_mtime > 2
    lock.check()
  assert not file.exists()


def test_an_owner_notices_a_takeover(store):
  lock = Lock(Bucket(URL))
  taken = other(process=7, machine='far', host='elsewhere')
  with lock.held():
    store.pipe_file('bucket/run/.lock', taken)
    with pytest.raises(BucketError, match='process 7 on elsewhere has taken'):
      lock.check()
  assert store.cat_file('bucket/run/.lock') == taken


def test_an_owner_leaves_the_object_of_another_alone(store, monkeypatch):
  monkeypatch.setattr(buckets, 'BEAT_SECONDS', 0.01)
  monkeypatch.setattr(Lock, '_take', lambda lock: None)  # taken over at once
  taken = other(process=7, machine='far', host='elsewhere')
  store.pipe_file('bucket/run/.lock', taken)
  with Lock(Bucket(URL)).held():
    time.sleep(0.2)
  assert store.cat_file('bucket/run/.lock') == taken


def test_what_a_killed_process_left_on_this_machine_is_removed(store, tmp_path):
  left, kept = tmp_path / 'margin_jax-a', tmp_path / 'margin_jax-b'
  for folder, about in ((left, {'process': 2**22}), (kept, {})):
    (folder / 'checkpoints').mkdir(parents=True)
    (folder / '.owner').write_bytes(other(**about))
  with workdirs.opened(URL):
    pass
  assert not left.exists()
  assert kept.exists()


# What goes wrong.


def test_what_a_killed_save_left_is_removed_and_nothing_else(store):
  kept = ['checkpoints/30/mine.txt', 'checkpoints/notes/info/a', 'own.txt']
  for name in ('checkpoints/30/state/d/1', 'checkpoints/30/info/a', *kept):
    store.pipe_file(f'bucket/run/{name}', b'')
  with workdirs.opened(URL) as place, place.locked():
    assert sorted({*names(store)} - {'.lock'}) == sorted(kept)
    place.refresh()
    assert not (place.folder / 'checkpoints').exists()


def test_a_missing_package_is_one_line_that_names_the_extra():
  if importlib.util.find_spec('gcsfs') or importlib.util.find_spec('s3fs'):
    pytest.skip('gcsfs or s3fs is installed')
  for scheme, extra in (('gs', 'gcs'), ('s3', 's3')):
    with pytest.raises(config_lib.ConfigError) as caught:
      train(f'{scheme}://bucket/run')
    text = str(caught.value)
    assert f"pip install 'margin_jax[{extra}]'" in text
    assert '\n' not in text


def test_a_store_that_does_not_answer_is_one_line(store, monkeypatch):
  silent = threading.Event()
  monkeypatch.setattr(buckets, 'ANSWER_SECONDS', 0.2)
  monkeypatch.setattr(type(store), 'find', lambda *_, **__: silent.wait(20))
  with pytest.raises(
    BucketError, match=r'no answer within 0\.2 s; log in with'
  ):
    Bucket(URL)
  silent.set()


def test_a_bucket_that_is_not_there_is_one_line(store):
  with pytest.raises(BucketError, match="there is no bucket 'other'"):
    Bucket('gs://other/run')


@pytest.mark.slow
def test_a_store_that_fails_ends_the_run_and_loses_nothing(
  store, tmp_path, monkeypatch
):
  train(tmp_path / 'whole')
  write, calls = type(store).pipe_file, []

  def fail(self, path, *arguments, **options):
    calls.append(path)
    if len(calls) > 30:
      raise PermissionError('token expired\nand a second line')
    write(self, path, *arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(type(store), 'pipe_file', fail)
    with pytest.raises(SaveError, match='token expired') as caught:
      train(URL)
  assert '\n' not in str(caught.value)
  assert URL in str(caught.value)
  assert str(tmp_path) not in str(caught.value)
  train(URL)
  assert runs.digest(URL, 20) == runs.digest(tmp_path / 'whole', 20)
  for name in ('train.csv', 'eval.csv'):
    assert runs.rows(URL, name) == runs.rows(tmp_path / 'whole', name)


# Processes that are killed.

THROUGH = ('tests.faults.object_store',)


def check_kills(folder, url, kills, seed, through=(), **environment) -> int:
  """A run that is killed ends as one in a folder that is not; how often it was.

  Args:
    folder: for the other run.
    url: of the run.
    kills: how often it is killed, at most.
    seed: of the moments.
    through: the module that stands for the store, which kills at its calls.
    **environment: of the processes.
  """
  rng = random.Random(seed)
  done = 0
  for i in range(kills):
    variables = dict(environment)
    if through and i % 2:
      variables[object_store.KILL_AT] = str(rng.randint(1, 60))
    process = runs.start(url, through=through, **variables)
    try:
      runs.wait_for(process, 'starting at')
      timeout = 60 if object_store.KILL_AT in variables else rng.uniform(0, 0.7)
      process.communicate(timeout=timeout)
    except AssertionError:
      pass  # killed before
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
    done += process.wait() == -signal.SIGKILL
  runs.finish(runs.start(url, through=through, **environment))
  runs.finish(runs.start(f'{folder}/whole'))
  assert runs.digest(url) == runs.digest(f'{folder}/whole')
  for name in ('train.csv', 'eval.csv', 'classes.csv'):
    assert runs.rows(url, name) == runs.rows(f'{folder}/whole', name), name
  return done


@pytest.mark.slow
def test_kills_change_nothing(store, tmp_path):
  scratch = {'TMPDIR': str(tmp_path)}
  assert check_kills(tmp_path, URL, 4, 0, THROUGH, **scratch) >= 2
  assert not [*tmp_path.glob('margin_jax-*')]
  assert '.lock' not in names(store)


def start_both(workdir, **options):
  """Starts two processes that train together."""
  address = f'--coordinator=127.0.0.1:{helpers.free_port()}'
  return [
    runs.start(
      workdir, address, '--num_processes=2', f'--process_id={i}', **options
    )
    for i in range(2)
  ]


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_with_a_copy_each_end_as_in_a_folder(store, tmp_path):
  for process in start_both(tmp_path / 'whole'):
    runs.finish(process)
  first, second = start_both(URL, through=THROUGH)
  runs.wait_for(first, 'step 20/')
  second.kill()
  second.communicate()
  first.communicate(timeout=60)
  assert 'bucket/run/result.json' not in store.find('bucket/run')
  steps = {x.split('/')[3] for x in store.find('bucket/run/checkpoints')}
  (damaged,) = (
    x
    for x in store.find(f'bucket/run/checkpoints/{max(steps, key=int)}/info')
    if x.endswith('/metadata')
  )
  store.pipe_file(damaged, b'{}')
  outputs = [runs.finish(x) for x in start_both(URL, through=THROUGH)]
  assert f'it is now {URL}/corrupt_checkpoints/' in outputs[0]
  assert runs.digest(URL) == runs.digest(tmp_path / 'whole')
  for name in ('train.csv', 'eval.csv', 'classes.csv'):
    assert runs.rows(URL, name) == runs.rows(tmp_path / 'whole', name)


@contextlib.contextmanager
def serving(command, port):
  """A server of this machine, from its first answer on."""
  server = subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  try:
    for _ in range(300):
      with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', port), 1).close()
        break
      time.sleep(0.1)
    yield
  finally:
    server.kill()
    server.wait()


@pytest.mark.slow
def test_kills_change_nothing_with_s3fs_and_motos_server(tmp_path, monkeypatch):
  pytest.importorskip('moto', reason='needs moto[server]')
  s3fs = pytest.importorskip('s3fs')
  port = helpers.free_port()
  environment = {
    'AWS_ACCESS_KEY_ID': 'any',
    'AWS_SECRET_ACCESS_KEY': 'any',
    'AWS_ENDPOINT_URL': f'http://127.0.0.1:{port}',
  }
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  command = [sys.executable, '-m', 'moto.server', '-p', str(port)]
  with serving(command, port):
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir('bucket')
    assert check_kills(tmp_path, 's3://bucket/run', 3, 0) >= 1


@pytest.mark.slow
def test_kills_change_nothing_with_gcsfs_and_an_emulator(tmp_path, monkeypatch):
  pytest.importorskip('gcsfs')
  pytest.importorskip('gcp_storage_emulator')
  port = helpers.free_port()
  host = f'http://127.0.0.1:{port}'
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', host)
  command = [
    sys.executable, '-m', 'gcp_storage_emulator', 'start', '--in-memory',
    '--host=127.0.0.1', f'--port={port}', '--default-bucket=bucket',
  ]  # fmt: skip
  with serving(command, port):
    assert check_kills(tmp_path, URL, 3, 0) >= 1


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='Kills a run in a bucket.')
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    os.environ[object_store.STORE] = f'{scratch}/store'
    os.mkdir(f'{scratch}/store')
    object_store.register()
    object_store.ObjectStore().pipe_file('bucket/there', b'')
    real = check_kills(scratch, URL, args.kills, args.seed, THROUGH)
  print(
    f'{args.kills} starts, {real} killed before their end: the state and every '
    'row are those of the run that was left alone'
  )
