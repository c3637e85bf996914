"""Test error against steps, FLOPs and seconds: does MMS pay?

    python -m benchmarks.time_to_accuracy --data_dir=DIR
    python -m benchmarks.time_to_accuracy --size=paper --data_dir=DIR

'small' is ResNet-8 on CIFAR-10 for two CPU cores. 'paper' is ResNet-44 with the
papers' regimes for one GPU. The baseline has a long schedule; everything else,
`uniform` and `random` among it, has a short one that drops the learning rate
early, and should reach the baseline's error in less. Every run is kept in
WORKDIR: started again, the benchmark goes on where it was; with --minutes it
stops before so many are over, as far as the time of its runs so far can tell.
Writes benchmarks/time_to_accuracy_SIZE.md, .csv and .png. `--scale=0.01` takes
a hundredth of the steps, to see that all of it runs, and writes into WORKDIR.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from margin_jax import config as config_lib
from margin_jax import cpu, files
from margin_jax.compare import budgets, plots, report, runs
from margin_jax.compare import methods as methods_lib
from margin_jax.compare.runs import Run
from margin_jax.config import UNIFORM
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop
from margin_jax.train.checkpoints import Checkpoints

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


def make_config(
  size: Size, schedule: tuple[int, ...], scale: float, data_dir: str | None
) -> ml_collections.ConfigDict:
  """The recipe of configs/cifar10_resnet44.py, on this schedule, with MMS."""
  steps, *boundaries = schedule
  config = config_lib.default()
  config.steps = steps
  config.eval_every = config.checkpoint_every = size.interval
  config.data.name = 'cifar10'
  config.data.data_dir = data_dir
  config.data.augmentations = ('crop', 'flip')
  config.model.name = size.model
  config.optimizer.weight_decay = 1e-4
  config.optimizer.learning_rates = tuple(
    0.1 / 10**i for i in range(len(boundaries) + 1)
  )
  config.optimizer.boundaries = tuple(boundaries)
  config.selection.rule = 'mms'
  if scale != 1:  # two evaluations of the short runs
    config = budgets.scaled(config, round(scale * steps))
    interval = -(-round(scale * size.short[0]) // 2)
    config.eval_every = config.checkpoint_every = interval
  return config


def variants(
  size: Size, long: ml_collections.ConfigDict
) -> dict[str, dict[str, Any]]:
  """Fields by name; all but the baseline have the short schedule."""
  half = {'selection.score_resolution': 16}
  found = {
    BASELINE: {
      'selection.rule': UNIFORM,
      'steps': long.steps,
      'optimizer.boundaries': long.optimizer.boundaries,
    },
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


def plan(args: argparse.Namespace, root: pathlib.Path) -> list[Run]:
  """Every variant with every seed."""
  size = SIZES[args.size]
  short = make_config(size, size.short, args.scale, args.data_dir)
  long = make_config(size, size.long, args.scale, args.data_dir)
  found = methods_lib.make_trials(short, variants(size, long), {})
  return runs.plan(found, args.seeds, root)


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


def advance(run: Run, clock: Clock) -> bool:
  """Runs to the end, or as many intervals as the time allows."""
  parts, seconds, config = 0, 0.0, run.config
  while run.result() is None:
    part = config.copy_and_resolve_references()
    done = steps_done(run.folder)
    if clock.deadline < float('inf'):
      parts = clock.intervals(parts, seconds)
      if not parts:
        return False
      part.steps = min(config.steps, done + parts * config.checkpoint_every)
    started = time.time()
    loop.train(part, str(run.folder), log=lambda line: None)
    spent = time.time() - started
    if parts == 1:
      clock.overhead = max(clock.overhead, spent)
    seconds = spent / max(parts, 1)
  # The tables are enough to report from.
  shutil.rmtree(run.folder / 'checkpoints', ignore_errors=True)
  return True


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


def table(variants: Mapping[str, Sequence[report.Curves]]) -> list[str]:
  """Final errors, costs, and when the baselines' errors were reached."""
  ends = {
    name: [run.test[-1] for run in found] for name, found in variants.items()
  }
  goals = {
    name: statistics.mean(row['error'] for row in ends[name])
    for name in (BASELINE, UNIFORM)
  }
  header = ['variant', 'steps', 'test error, %', 'PFLOP', 'seconds']
  header += [f'at most {goal:.2%} ({name})' for name, goal in goals.items()]
  rows = []
  for name, last in ends.items():
    error = report.mean_and_deviation([row['error'] for row in last])
    rows.append([
      name,
      f'{last[0]["step"]:,}',
      report.percent(*error),
      f'{last[0]["flops"] / 1e15:.3g}',
      f'{statistics.mean(row["seconds"] for row in last):.0f}',
      *(arrival([x.test for x in variants[name]], x) for x in goals.values()),
    ])  # fmt: skip
  return [
    'The last columns: how many seeds come to an error on the test split, that '
    'with which the two baselines end on average, and after how many seconds, '
    'a mean over those that do, at the first evaluation that shows it.',
    '',
    *report.markdown(header, rows),
  ]


def write(
  args: argparse.Namespace, root: pathlib.Path, all_runs: list[Run]
) -> None:
  """Writes the table, the curves and the plot."""
  here = pathlib.Path(__file__).parent if args.scale == 1 else root
  base = (args.out or here) / f'time_to_accuracy_{args.size}'
  read = [report.read_curves(run.folder) for run in all_runs]
  results = [run.result() for run in all_runs]
  rows = [
    {'variant': run.trial.name, 'seed': run.seed, **row}
    for run, found in zip(all_runs, read, strict=True)
    for row in found.test
  ]
  files.write_csv(base.with_suffix('.csv'), list(rows[0]), rows)
  found = report.by_trial(all_runs, read)
  plots.error(
    base.with_suffix('.png'),
    {name: [x.test for x in seeds] for name, seeds in found.items()},
    {name: [x.train for x in seeds] for name, seeds in found.items()},
  )
  text = [
    '# Time to accuracy',
    '',
    f'`python -m benchmarks.time_to_accuracy --size={args.size} '
    f'--scale={args.scale:g} --seeds={args.seeds}`: {SIZES[args.size].model} '
    'on CIFAR-10, b=64, B=640 unless said, the augmentation and optimizer of '
    f'configs/cifar10_resnet44.py, {args.seeds} seed(s). Seconds are of '
    'training, without evaluation and compilation.',
    '',
    *report.hardware(results),
    '',
    *table(found),
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
  devices_lib.use_compilation_cache()
  if args.seeds is None:
    args.seeds = SIZES[args.size].seeds
  name = args.size if args.scale == 1 else f'{args.size}_{args.scale:g}'
  root = pathlib.Path(args.workdir or f'/tmp/time_to_accuracy_{name}')
  try:
    all_runs = plan(args, root)
  except config_lib.ConfigError as error:
    raise SystemExit(f'error: --scale={args.scale}: {error}') from error
  root.mkdir(parents=True, exist_ok=True)
  clock = Clock(args.minutes)
  for run in all_runs:
    name = f'{run.trial.name}, seed {run.seed}'
    if not advance(run, clock):
      done = steps_done(run.folder)
      print(f'{name}: step {done:,}; run it again to go on')
      return
    last = report.read_curves(run.folder).test[-1]
    print(
      f'{name}: error {last["error"]:.2%} after {last["step"]:,} steps and '
      f'{last["seconds"]:.0f} s',
      flush=True,
    )
  write(args, root, all_runs)


if __name__ == '__main__':
  main()
