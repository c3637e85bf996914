"""Real training processes of a second or two, to be disturbed."""

import contextlib
import csv
import os
import pathlib
import subprocess
import sys

from margin_jax.train import workdirs
from margin_jax.train.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
ARGUMENTS = (
  'margin_jax.train', '--config=configs/digits.py',
  f'--config.steps={STEPS}', '--config.eval_every=20',
  '--config.log_every=5', '--config.checkpoint_every=5',
  '--config.batch_size=8', '--config.pool_size=32',
  '--config.selection.log_counts=True', '--config.selection.reuse=2',
)  # fmt: skip


COMMAND = (sys.executable, '-m', *ARGUMENTS)


def start(
  workdir, *arguments, devices=1, through=(), **environment
) -> subprocess.Popen:
  """Starts a run, by a module if need be; its output is one stream of text."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      *through,
      *ARGUMENTS,
      f'--workdir={workdir}',
      *arguments,
    ],
    cwd=ROOT,
    env={
      **os.environ,
      'XLA_FLAGS': flags,
      'PYTHONUNBUFFERED': '1',
      **environment,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process: subprocess.Popen, status: int = 0) -> str:
  """Waits for the end, which must be of that status; the output."""
  output = process.communicate(timeout=240)[0]
  assert process.returncode == status, output
  assert 'Traceback' not in output, output
  return output


def wait_for(process: subprocess.Popen, text: str) -> str:
  """Reads the output until a line has that text."""
  read = []
  for line in process.stdout:
    read.append(line)
    if text in line:
      return ''.join(read)
  raise AssertionError(''.join(read))


def digest(workdir, step: int = STEPS) -> str:
  """Of the state that a checkpoint holds."""
  with workdirs.opened(workdir) as place:
    place.refresh()
    with contextlib.closing(Checkpoints(place)) as checkpoints:
      return checkpoints.digests(step)['arrays']


def rows(workdir, name: str) -> list[tuple[str, ...]]:
  """A CSV file without what no two runs share."""
  with workdirs.opened(workdir) as place:
    place.refresh()
    with (place.folder / name).open(newline='') as file:
      found = list(csv.DictReader(file))
  varying = {
    'seconds', 'data_wait', 'data_wait_share', 'steps_per_second',
    'memory_bytes', 'memory_peak_bytes',
  }  # fmt: skip
  return [tuple(v for k, v in row.items() if k not in varying) for row in found]
