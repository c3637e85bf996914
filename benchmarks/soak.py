"""A long run in pieces: do memory or open files grow?

    python -m benchmarks.soak

100,000 steps of configs/digits.py with MMS, validation, checkpoints and tables.
A process trains a fifth, sends itself SIGTERM, and the next goes on. Every 500
steps it writes what it holds into WORKDIR/soak.csv. Stopped in between, the
same command goes on. Writes benchmarks/soak.md.
"""

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import psutil

from margin_jax import cpu, files
from margin_jax.train import loop
from margin_jax.train.process import Interrupted
from margin_jax.train.reporting import versions

EVERY = 500  # steps between two rows
# After so many steps of a process everything has been compiled, evaluated and
# saved more than once.
SETTLED = 2_000
CONFIG = pathlib.Path(__file__).parent.parent / 'configs/digits.py'
COUNTED = 'files', 'threads'
COLUMNS = ('process', 'step', 'memory', 'files', 'threads', 'steps_per_second')


def make_config(steps: int):
  """The digits at length, saved and evaluated as often as ever."""
  spec = importlib.util.spec_from_file_location('digits', CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.steps = steps
  config.optimizer.boundaries = (7 * steps // 10,)
  config.log_every = EVERY
  config.eval_every = config.checkpoint_every = 2 * EVERY
  return config


def work(workdir: pathlib.Path, steps: int, piece: int) -> None:
  """Trains one piece, and then stops as anybody who is asked to."""
  path = workdir / 'soak.csv'
  new = not path.exists()
  cpu.tune()
  this = psutil.Process()
  with path.open('a', newline='') as file:
    table = csv.DictWriter(file, COLUMNS)
    if new:
      table.writeheader()

    def hook(prefix: str, step: int, row: Mapping[str, float]) -> None:
      if prefix != 'train':
        return
      table.writerow({
        'process': os.getpid(),
        'step': step,
        'memory': this.memory_info().rss,
        'files': this.num_fds(),
        'threads': this.num_threads(),
        'steps_per_second': row['steps_per_second'],
      })  # fmt: skip
      file.flush()
      if step % piece == 0 and step < steps:
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(Interrupted):
      loop.train(
        make_config(steps), str(workdir / 'run'), hook=hook, log=lambda _: None
      )


def report(workdir: pathlib.Path, steps: int) -> str:
  """The text of the page."""
  with (workdir / 'soak.csv').open(newline='') as file:
    rows = [
      {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)
    ]
  lines, grown = [], []
  for process in dict.fromkeys(row['process'] for row in rows):
    mine = [row for row in rows if row['process'] == process]
    settled = [x for x in mine if x['step'] >= mine[0]['step'] + SETTLED]
    if len(settled) < 3:
      continue
    # The very last row may be of the end of the run, where things are closed.
    seen = settled[0], settled[len(settled) // 2], settled[-2]
    grown.append([
      (after['memory'] - before['memory']) / 2**20 * 10_000
      / (after['step'] - before['step'])
      for before, after in itertools.pairwise(seen)
    ])  # fmt: skip
    cells = [f'{int(x["step"]):,}' for x in (mine[0], mine[-1])]
    cells = [' to '.join(cells)]
    cells += [f'{x["memory"] / 2**20:.0f}' for x in seen]
    cells += [f'{seen[i][name]:.0f}' for name in COUNTED for i in (0, -1)]
    lines.append(f'| {" | ".join(cells)} |')
  first, second = np.mean(grown, axis=0)
  run = workdir / 'run'
  board = sum(x.stat().st_size for x in (run / 'tensorboard').glob('*'))
  found = json.loads((run / 'result.json').read_text())
  return '\n'.join([
    '# A long run',
    '',
    f'`python -m benchmarks.soak`: {steps:,} steps of configs/digits.py, in '
    f'pieces that end with SIGTERM; {os.cpu_count()} cores, jax '
    f'{versions()["jax"]}. Each process, {SETTLED:,} steps after its first '
    'row, half way from there to its end, and at its end:',
    '',
    '| steps | MiB | half way | at the end | open files | at the end | threads '
    '| at the end |',
    '|---|---|---|---|---|---|---|---|',
    *lines,
    '',
    f'In 10,000 steps a process grows by {first:.1f} MiB in the first half, by '
    f'{second:.1f} MiB in the second. At the end '
    f'train.csv has {(run / "train.csv").stat().st_size / 2**20:.2f} MiB, '
    f'TensorBoard\'s files {board / 2**20:.2f} MiB. Test accuracy '
    f'{found["test"]["accuracy"]:.2%}.',
    '',
  ])  # fmt: skip


def main() -> None:
  """Trains what is missing, and reports."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=100_000)
  parser.add_argument('--pieces', type=int, default=5)
  parser.add_argument('--workdir', default='/tmp/soak')
  parser.add_argument('--out', help='default: beside this file')
  parser.add_argument('--worker', action='store_true', help='of this program')
  args = parser.parse_args()
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if args.worker:
    work(workdir, args.steps, args.steps // args.pieces)
    return
  while not (workdir / 'run' / 'result.json').exists():
    subprocess.run(
      [sys.executable, '-m', 'benchmarks.soak', '--worker', *sys.argv[1:]],
      check=True,
    )
  path = pathlib.Path(args.out or pathlib.Path(__file__).with_suffix('.md'))
  with files.whole(path) as aside:
    aside.write_text(report(workdir, args.steps))
  print(path.read_text())


if __name__ == '__main__':
  main()
