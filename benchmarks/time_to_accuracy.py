"""Test error against steps, FLOPs and seconds: does MMS pay?

    python -m benchmarks.time_to_accuracy --data_dir=DIR
    python -m benchmarks.time_to_accuracy --size=paper --data_dir=DIR

'small' is ResNet-8 on CIFAR-10 for two CPU cores. 'paper' is ResNet-44 with the
papers' regimes for one GPU. The baseline has a long schedule; everything else,
`uniform` and `random` among it, has a short one that drops the learning rate
early, and should reach the baseline's error in less. Every run is kept in
WORKDIR: started again, the benchmark goes on where it was; with --minutes it
stops before so many are over, as far as the time of what it has done so far can
tell.
Writes benchmarks/time_to_accuracy_SIZE.md, .csv and .png. `--scale=0.01` takes
a hundredth of the steps, to see that all of it runs, and writes into WORKDIR.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from margin_jax import config as config_lib
from margin_jax import cpu, files, loop, parallel
from margin_jax.checkpoints import Checkpoints
from margin_jax.config import UNIFORM
from margin_jax.reporting import versions

BASELINE = 'uniform, long'
STARTED = time.time()


@dataclasses.dataclass(frozen=True)
class Size:
  """A size of the benchmark: model, schedules, variants.

  Attributes:
    model: its name.
    long: steps of the baseline, and where its learning rate drops by 10.
    short: of everything else.
    interval: steps between evaluations, and checkpoints, of every variant.
    proxy: of the variants that score with one.
    seeds: how many.
  """

  model: str
  long: tuple[int, ...]
  short: tuple[int, ...]
  interval: int
  proxy: str
  seeds: int


SIZES = {
  'small': Size(
    'resnet8', (1500, 900, 1275), (750, 450, 640), 125, 'resnet8', 3
  ),
  'paper': Size(
    'resnet44',
    (156_200, 63_261, 95_282, 128_084),
    (44_000, 24_992, 27_335, 29_678),
    1_100,
    'resnet8',
    1,
  ),
}


def scaled(size: Size, scale: float) -> Size:
  """The same in fewer steps, with two evaluations of the short runs."""

  def times(steps: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, round(scale * x)) for x in steps)

  if scale == 1:
    return size
  long, short = times(size.long), times(size.short)
  for name, (steps, *drops) in (('long', long), ('short', short)):
    if sorted({0, *drops, steps}) != [0, *drops, steps]:
      raise SystemExit(
        f'error: --scale={scale} is too small: of the {name} schedule '
        f'{steps} steps remain, with drops at {drops}'
      )
  return dataclasses.replace(
    size, long=long, short=short, interval=-(-short[0] // 2)
  )


def variants(size: Size) -> dict[str, dict[str, Any]]:
  """Fields by name; all but the baseline have the short schedule."""
  half = {'selection.score_resolution': 16}
  found = {
    BASELINE: {'selection.rule': UNIFORM},
    'uniform': {'selection.rule': UNIFORM},
    'random': {'selection.rule': 'random'},
    'loss, ramp=0.1': {'selection.rule': 'loss', 'selection.ramp': 0.1},
    'mms': {},
    'mms, B=128': {'pool_size': 128},
    'mms, score_resolution=16': half,
    'mms, B=128, score_resolution=16': {'pool_size': 128, **half},
    'mms, reuse=5': {'selection.reuse': 5},
  }
  if size.proxy != size.model:
    proxy = {'selection.proxy': size.proxy}
    found[f'mms, proxy={size.proxy}'] = proxy
  return found


def make_config(
  size: Size, name: str, seed: int, data_dir: str
) -> ml_collections.ConfigDict:
  """The recipe of configs/cifar10_resnet44.py, scaled."""
  steps, *boundaries = size.long if name == BASELINE else size.short
  config = config_lib.default()
  config.seed = seed
  config.steps = steps
  config.eval_every = config.checkpoint_every = size.interval
  config.data.name = 'cifar10'
  config.data.data_dir = data_dir
  config.data.validation_examples = 0
  config.data.augmentations = ('crop', 'flip')
  config.model.name = size.model
  config.optimizer.weight_decay = 1e-4
  config.optimizer.learning_rates = tuple(
    0.1 / 10**i for i in range(len(boundaries) + 1)
  )
  config.optimizer.boundaries = tuple(boundaries)
  config.selection.rule = 'mms'
  config.update_from_flattened_dict(variants(size)[name])
  return config


def steps_done(workdir: pathlib.Path) -> int:
  """How far a run is."""
  if not (workdir / 'checkpoints').is_dir():
    return 0
  with contextlib.closing(Checkpoints(str(workdir))) as checkpoints:
    info = checkpoints.info()
    return 0 if info is None else info['step']


class Clock:
  """Begins nothing that would not end in time.

  Attributes:
    deadline: when all must have ended.
    overhead: the longest that a run took to start and train one interval.
  """

  def __init__(self, minutes: float):
    """Counts from when this program was imported."""
    self.deadline = STARTED + 60 * minutes
    self.overhead = 0.0

  def intervals(self, last: int, seconds: float) -> int:
    """How many to train next; 0 if none fits.

    Args:
      last: how many were trained last; 0 at a run's start.
      seconds: that each of these took, with all that belongs to a start.
    """
    left = self.deadline - time.time()
    if left <= self.overhead:
      return 0
    if not last:
      return 1
    return max(0, min(2 * last, int(0.8 * (left - self.overhead) / seconds)))


def finished(workdir: pathlib.Path, steps: int) -> bool:
  """Whether a run has its result, of all its steps."""
  path = workdir / 'result.json'
  return path.exists() and json.loads(path.read_text())['steps'] == steps


def advance(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, clock: Clock
) -> bool:
  """Runs to the end, or as many intervals as the time allows."""
  parts, seconds = 0, 0.0
  while not finished(workdir, config.steps):
    part = config.copy_and_resolve_references()
    done = steps_done(workdir)
    if clock.deadline < float('inf'):
      parts = clock.intervals(parts, seconds)
      if not parts:
        return False
      part.steps = min(config.steps, done + parts * config.checkpoint_every)
    started = time.time()
    loop.train(part, str(workdir), log=lambda line: None)
    spent = time.time() - started
    if parts == 1:
      clock.overhead = max(clock.overhead, spent)
    seconds = spent / max(parts, 1)
  # What a machine that is lent for minutes must give back is small.
  shutil.rmtree(workdir / 'checkpoints', ignore_errors=True)
  return True


def curve(workdir: pathlib.Path) -> list[dict[str, float]]:
  """Test error, and what it had cost, at every evaluation."""
  with (workdir / 'eval.csv').open(newline='') as file:
    rows = [row for row in csv.DictReader(file) if row['split'] == 'test']
  found = {}
  for row in rows:  # the last of a step counts
    found[int(row['step'])] = {
      'step': int(row['step']),
      'flops': float(row['flops']),
      'seconds': float(row['seconds']),
      'error': 1 - float(row['accuracy']),
    }
  return [found[step] for step in sorted(found)]


def reached(rows: list[dict[str, float]], error: float) -> dict | None:
  """The first evaluation with at most this error."""
  return next((row for row in rows if row['error'] <= error), None)


def arrival(runs: list[list[dict]], goal: float) -> str:
  """How many seeds reach an error, and after how many seconds on average."""
  hits = [row for rows in runs if (row := reached(rows, goal))]
  if not hits:
    return f'0 of {len(runs)}'
  seconds = statistics.mean(row['seconds'] for row in hits)
  return f'{len(hits)} of {len(runs)}, {seconds:.0f} s'


def table(curves: dict[tuple[str, int], list[dict]], seeds: int) -> list[str]:
  """Final errors, costs, and when the baselines' errors were reached."""
  names = list(dict.fromkeys(name for name, _ in curves))
  variants = {n: [curves[n, seed] for seed in range(seeds)] for n in names}
  goals = {
    name: statistics.mean(rows[-1]['error'] for rows in variants[name])
    for name in (BASELINE, UNIFORM)
  }
  columns = (f'at most {goal:.2%} ({name})' for name, goal in goals.items())
  lines = [
    'The last columns: how many seeds come to an error on the test split, that '
    'with which the two baselines end on average, and after how many seconds, '
    'a mean over those that do, at the first evaluation that shows it.',
    '',
    f'| variant | steps | test error | PFLOP | seconds | {" | ".join(columns)} '
    '|',
    '|---|---|---|---|---|---|---|',
  ]
  for name, runs in variants.items():
    errors = [rows[-1]['error'] for rows in runs]
    spread = f' ± {100 * statistics.stdev(errors):.2f}' if seeds > 1 else ''
    seconds = statistics.mean(rows[-1]['seconds'] for rows in runs)
    lines.append(
      f'| {name} | {runs[0][-1]["step"]:,} '
      f'| {statistics.mean(errors):.2%}{spread} '
      f'| {runs[0][-1]["flops"] / 1e15:.3g} | {seconds:.0f} | '
      + ' | '.join(arrival(runs, goal) for goal in goals.values())
      + ' |'
    )
  return lines


def plot(path: pathlib.Path, curves: dict[tuple[str, int], list[dict]]) -> None:
  """Error against steps, FLOPs and seconds; the mean over the seeds."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure((17, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  names = list(dict.fromkeys(name for name, _ in curves))
  for axes, cost in zip(
    figure.subplots(1, 3), ('step', 'flops', 'seconds'), strict=True
  ):
    for index, name in enumerate(names):
      runs = [rows for (other, _), rows in curves.items() if other == name]
      x = np.mean([[row[cost] for row in rows] for rows in runs], axis=0)
      y = np.mean([[row['error'] for row in rows] for rows in runs], axis=0)
      axes.plot(
        x, 100 * y, f'C{index}.' + ('--' if index > 9 else '-'), label=name
      )
    axes.set_xlabel({'step': 'steps', 'flops': 'FLOPs'}.get(cost, cost))
    axes.set_ylabel('test error, %')
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.grid(alpha=0.3, which='both')
  figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper')
  figure.savefig(path, dpi=100)


def report(
  args: argparse.Namespace,
  root: pathlib.Path,
  curves: dict[tuple[str, int], list[dict]],
) -> None:
  """Writes the table, the curves and the picture."""
  here = pathlib.Path(__file__).parent if args.scale == 1 else root
  base = (args.out or here) / f'time_to_accuracy_{args.size}'
  rows = [
    {'variant': name, 'seed': seed, **row}
    for (name, seed), found in curves.items()
    for row in found
  ]
  files.write_csv(base.with_suffix('.csv'), list(rows[0]), rows)
  plot(base.with_suffix('.png'), curves)
  device, size = jax.devices()[0], SIZES[args.size]
  text = [
    '# Time to accuracy',
    '',
    f'`python -m benchmarks.time_to_accuracy --size={args.size} '
    f'--scale={args.scale:g} --seeds={args.seeds}`: {size.model} on CIFAR-10, '
    'b=64, B=640 unless said, the augmentation and optimizer of '
    f'configs/cifar10_resnet44.py, {args.seeds} seed(s); '
    f'1 x {device.device_kind} ({os.cpu_count()} host cores), '
    f'jax {versions()["jax"]}. Seconds are of training, without '
    'evaluation and compilation.',
    '',
    *table(curves, args.seeds),
    '',
    f'![curves]({base.name}.png)',
  ]
  base.with_suffix('.md').write_text('\n'.join(text) + '\n')
  print('\n'.join(text))


def main() -> None:
  """Trains what is missing and, once nothing is, writes the report."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', choices=[*SIZES], default='small')
  parser.add_argument('--data_dir')
  parser.add_argument('--seeds', type=int)
  parser.add_argument('--scale', type=float, default=1)
  parser.add_argument('--minutes', type=float, default=float('inf'))
  parser.add_argument('--workdir', help='default: /tmp/time_to_accuracy_SIZE')
  parser.add_argument(
    '--out', type=pathlib.Path, help='of the report; default: beside this file'
  )
  args = parser.parse_args()
  cpu.tune()
  parallel.use_compilation_cache()
  size = scaled(SIZES[args.size], args.scale)
  args.seeds = size.seeds if args.seeds is None else args.seeds
  name = args.size if args.scale == 1 else f'{args.size}_{args.scale:g}'
  root = pathlib.Path(args.workdir or f'/tmp/time_to_accuracy_{name}')
  root.mkdir(parents=True, exist_ok=True)
  clock = Clock(args.minutes)
  curves = {}
  for seed in range(args.seeds):
    for name in variants(size):
      folder = name.replace(', ', '_').replace('=', '')
      workdir = root / f'{folder}_{seed}'
      config = make_config(size, name, seed, args.data_dir)
      if not advance(config, workdir, clock):
        done = steps_done(workdir)
        print(f'{name}, seed {seed}: step {done:,}; run it again to go on')
        return
      curves[name, seed] = curve(workdir)
      last = curves[name, seed][-1]
      print(
        f'{name}, seed {seed}: error {last["error"]:.2%} after '
        f'{last["step"]:,} steps and {last["seconds"]:.0f} s',
        flush=True,
      )
  report(args, root, curves)


if __name__ == '__main__':
  main()
