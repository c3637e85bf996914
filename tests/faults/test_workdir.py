"""Folders that are taken, full or not to be written."""

import os
import pathlib
import signal
import subprocess

import pytest

import margin_jax
from margin_jax import config as config_lib
from margin_jax import files
from margin_jax.analyze import analyze
from margin_jax.compare import compare
from margin_jax.train import loop
from tests import helpers
from tests.faults import runs


@pytest.mark.slow
def test_two_processes_in_one_workdir(tmp_path):
  first = runs.start(tmp_path, '--config.steps=100000')
  runs.wait_for(first, 'step 5/')
  second = runs.start(tmp_path, '--config.steps=100000')
  output = runs.finish(second, 1)
  assert f'error: workdir={str(tmp_path)!r}: in use by process' in output
  assert str(first.pid) in output
  first.kill()
  first.communicate()
  # The lock goes with its owner, even with one that was killed.
  with files.locked(str(tmp_path)):
    pass


def test_a_lock_names_its_owner(tmp_path):
  with (
    files.locked(str(tmp_path)),
    pytest.raises(BlockingIOError, match=f'process {os.getpid()} on '),
    files.locked(str(tmp_path)),
  ):
    pass


def test_a_workdir_that_is_in_use_is_a_config_error(tmp_path):
  with (
    files.locked(str(tmp_path)),
    pytest.raises(config_lib.ConfigError, match=r'workdir=.* in use by'),
  ):
    loop.train(helpers.small_config(), str(tmp_path))


@pytest.mark.parametrize(
  'name',
  [
    'ftp://host/run',
    'gs:/bucket/run',
    'file:///tmp/run',
    'gs://',
    's3:///run',
    '',
    '~nosuchuser/run',
  ],
)
def test_what_names_no_folder_is_one_line(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  calls = [
    lambda: loop.train(helpers.small_config(), name),
    lambda: compare(helpers.small_config(), name),
    lambda: analyze(name),
    lambda: margin_jax.load(name),
  ]
  for call in calls:
    with pytest.raises(config_lib.ConfigError) as caught:
      call()
    assert str(caught.value).startswith(f'workdir={name!r} is not allowed: ')
    assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 32 MB, if we may make one."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  made = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', str(folder)],
    capture_output=True,
    check=False,
  )
  if made.returncode:
    pytest.skip('a small disk: mounting a tmpfs is not allowed here')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_loses_nothing(small_disk):
  workdir = small_disk / 'run'
  first = runs.start(workdir)
  runs.wait_for(first, 'step 20/')
  first.send_signal(signal.SIGTERM)
  first.communicate(timeout=60)
  step = max(int(x.name) for x in (workdir / 'checkpoints').iterdir())
  saved = runs.digest(workdir, step)
  free = os.statvfs(small_disk)
  filler = pathlib.Path(small_disk, 'filler')
  filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 20_000)))
  process = runs.start(workdir)
  output = process.communicate(timeout=240)[0]
  assert process.returncode == 1, output
  last = output.strip().splitlines()[-1]
  assert last.startswith('error: '), output
  assert 'No space left' in last, output
  assert 'Traceback' not in output, output
  filler.unlink()
  assert runs.digest(workdir, step) == saved
  runs.finish(runs.start(workdir))
  assert runs.digest(workdir)
  # Nothing that was half written is left.
  left = [x.name for x in (workdir / 'checkpoints').iterdir()]
  assert all(name.isdigit() for name in left), left
  assert [x.name for x in workdir.glob('.*')] == ['.lock']


@pytest.mark.parametrize(
  ('log_every', 'stopped', 'anew'),
  [(1000, False, True), (5, True, False)],
)
@pytest.mark.slow
def test_a_workdir_moved_while_it_trains_is_one_line(
  tmp_path, log_every, stopped, anew
):
  """Whatever is written next, and also where there is a folder again."""
  long = ('--config.steps=100000', f'--config.log_every={log_every}')
  process = runs.start(tmp_path / 'before', *long)
  runs.wait_for(process, 'step 20/')
  (tmp_path / 'before').rename(tmp_path / 'after')
  if stopped:
    process.send_signal(signal.SIGTERM)
  if anew:
    (tmp_path / 'before').mkdir(exist_ok=True)
  output = runs.finish(process, 1)
  (line,) = (x for x in output.splitlines() if x.startswith('error: '))
  assert f'{tmp_path}/before is gone' in line
  again = runs.start(tmp_path / 'after', *long)
  assert 'starting at step 0' not in runs.wait_for(again, 'starting at step')
  again.kill()
  again.communicate()
