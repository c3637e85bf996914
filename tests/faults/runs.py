"""Real training processes of a second or two, to be disturbed."""

import csv
import os
import pathlib
import subprocess
import sys

from margin_jax.train.checkpoints import Checkpoints
from margin_jax.train.workdirs import Workdir

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
COMMAND = (
  sys.executable, '-m', 'margin_jax.train', '--config=configs/digits.py',
  f'--config.steps={STEPS}', '--config.eval_every=20',
  '--config.log_every=5', '--config.checkpoint_every=5',
  '--config.batch_size=8', '--config.pool_size=32',
  '--config.selection.log_counts=True', '--config.selection.reuse=2',
)  # fmt: skip


def start(workdir, *arguments, devices=1, **environment) -> subprocess.Popen:
  """Starts a run; its output is one stream of text."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    [*COMMAND, f'--workdir={workdir}', *arguments],
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
  checkpoints = Checkpoints(Workdir(workdir))
  try:
    return checkpoints.digests(step)['arrays']
  finally:
    checkpoints.close()


def rows(workdir, name: str) -> list[tuple[str, ...]]:
  """A CSV file without what no two runs share."""
  with pathlib.Path(workdir, name).open(newline='') as file:
    found = list(csv.DictReader(file))
  varying = {
    'seconds', 'data_wait', 'data_wait_share', 'steps_per_second',
    'memory_bytes', 'memory_peak_bytes',
  }  # fmt: skip
  return [tuple(v for k, v in row.items() if k not in varying) for row in found]
