"""Processes that are killed, and started again, end as if nothing was."""

import argparse
import random
import signal
import subprocess
import tempfile
import time

import pytest

from tests.faults import runs

pytestmark = pytest.mark.slow


def disturb(workdir, kills: int, seed: int, part: float, *arguments) -> int:
  """Kills a run so many times, at random moments; returns how many came true.

  Args:
    workdir: of the run.
    kills: how often.
    seed: of the moments.
    part: seconds that one part of `kills` of the steps takes.
    *arguments: of the run.
  """
  rng = random.Random(seed)
  done = 0
  for i in range(kills):
    process = runs.start(workdir, *arguments)
    try:
      if i % 5:  # else also while it starts
        runs.wait_for(process, 'starting at')
      # Half a part on average: the last kill, too, finds it running, even if
      # the machine has become faster.
      process.communicate(timeout=rng.uniform(0, part))
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.communicate()
      done += 1
  return done


def check(folder, kills: int, seed: int, steps: int) -> int:
  """A run without kills and one with them: the same bits, the same rows."""
  whole, killed = f'{folder}/whole', f'{folder}/killed'
  length = f'--config.steps={steps}'
  process = runs.start(whole, length)
  runs.wait_for(process, 'starting at')
  started = time.monotonic()
  runs.finish(process)
  part = (time.monotonic() - started) / kills
  done = disturb(killed, kills, seed, part, length)
  runs.finish(runs.start(killed, length))
  assert runs.digest(killed, steps) == runs.digest(whole, steps)
  for name in ('train.csv', 'eval.csv', 'classes.csv'):
    assert runs.rows(killed, name) == runs.rows(whole, name), name
  return done


def test_three_kills_change_nothing(tmp_path):
  assert check(tmp_path, 3, seed=0, steps=120) >= 2


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='Kills a run at random moments.')
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    real = check(scratch, args.kills, args.seed, steps=40 * args.kills)
  print(
    f'{args.kills} starts, {real} killed before their end: the state and every '
    'row are those of the run that was left alone'
  )
