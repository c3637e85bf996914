"""Test error against seconds: does a method beat plain training cut short?

    python -m benchmarks.time_to_accuracy --size=mnist --data_dir=DIR
    python -m benchmarks.time_to_accuracy --size=mnist --data_dir=DIR --time

The first command trains: every method with seed 0, then with seed 1, and so on.
It may run beside other work and be stopped; started again it goes on. With
--minutes it saves and stops after so many. A run that ends has its evaluations
in benchmarks/time_to_accuracy_SIZE.csv and is not trained again on any machine,
unless its recipe changes. The second command measures the seconds of a step, of
all methods in turns; it wants the machine for itself. Both write the report of
what there is, benchmarks/time_to_accuracy_SIZE.md and .png; --report only that.

'mnist' (a small CNN, 20 epochs) and 'cifar10' (ResNet-8, 15 epochs) are for two
CPU cores, 'paper' (ResNet-44 on CIFAR-10, the papers' regimes) for one GPU.
`--scale=0.01` takes a hundredth of the steps, to see that all of it runs, and
writes into WORKDIR.
"""

import argparse
import csv
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import pathlib
import signal
import statistics
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

import margin_jax
from benchmarks import steps as steps_lib
from margin_jax import config as config_lib
from margin_jax import cpu, figures, files
from margin_jax.compare import methods as methods_lib
from margin_jax.compare import report, runs
from margin_jax.config import UNIFORM
from margin_jax.models import common
from margin_jax.train import devices as devices_lib
from margin_jax.train import reporting, schema
from margin_jax.train import runs as runs_lib
from margin_jax.train import setup as setup_lib
from margin_jax.train.process import Interrupts, one_line_errors

Fields = dict[str, Any]
Row = dict[str, Any]


# The models that are registered for this benchmark. A run is known by the name
# of its model: other layers need another name.


class StridedCNN(nn.Module):
  """3x3 convolutions of stride 2 with BatchNorm, then a hidden layer."""

  num_classes: int
  channels: tuple[int, ...] = (16, 32, 32)
  hidden: int = 64
  dtype: jnp.dtype = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs: Array, *, train: bool) -> tuple[Array, Array]:
    """(B, H, W, channels) -> logits (B, C), features (B, hidden)."""
    conv, norm = common.make_conv(self), common.make_norm(self, train)
    x = inputs.astype(self.dtype)
    for i, width in enumerate(self.channels):
      x = nn.relu(norm()(conv(width, (3, 3), 2, name=f'conv{i}')(x)))
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name='hidden')(x))
    features = x.astype(jnp.float32)
    return nn.Dense(self.num_classes, name='head')(features), features


class TinyCNN(StridedCNN):
  """The proxy of the other."""

  channels: tuple[int, ...] = (4, 8)
  hidden: int = 16


SMALL, TINY = 'strided_16_32_32_h64', 'strided_4_8_h16'
margin_jax.register_model(SMALL, StridedCNN)
margin_jax.register_model(TINY, TinyCNN)


# What is compared.


@dataclasses.dataclass(frozen=True)
class Size:
  """A size of the benchmark.

  Attributes:
    dataset, model, proxy, augmentations: of its runs.
    long: steps of `uniform`, and where its learning rate, 0.1 at first, drops
      by 10.
    short: of the methods that must be faster.
    interval: steps between evaluations; all steps are multiples of it.
    timed_steps: so many are timed at once.
    seeds: how many.
  """

  dataset: str
  model: str
  proxy: str
  augmentations: tuple[str, ...]
  long: tuple[int, ...]
  short: tuple[int, ...]
  interval: int
  timed_steps: int
  seeds: int

  def shortened(self, fraction: float) -> tuple[int, ...]:
    """The long schedule, as a whole, in a fraction of its steps."""
    steps = self.interval * round(fraction * self.long[0] / self.interval)
    ratio = steps / self.long[0]
    return (steps, *(round(ratio * x) for x in self.long[1:]))

  def scaled(self, scale: float) -> 'Size':
    """The size with fewer steps."""
    interval = max(1, round(scale * self.interval))

    def shrink(schedule: tuple[int, ...]) -> tuple[int, ...]:
      steps = interval * round(scale * schedule[0] / interval)
      return (steps, *(round(scale * x) for x in schedule[1:]))

    return dataclasses.replace(
      self,
      long=shrink(self.long),
      short=shrink(self.short),
      interval=interval,
    )


CROP_FLIP = ('crop', 'flip')
SIZES = {
  'mnist': Size(
    'mnist', SMALL, TINY, (),
    (18_800, 9_400, 15_040), (12_220, 6_110, 9_776), 940, 80, 3,
  ),
  'cifar10': Size(
    'cifar10', 'resnet8', SMALL, CROP_FLIP,
    (12_000, 6_000, 9_600), (7_800, 3_900, 6_240), 600, 20, 3,
  ),
  # The regimes of configs/cifar10_resnet44.py.
  'paper': Size(
    'cifar10', 'resnet44', 'resnet8', CROP_FLIP,
    (156_200, 63_261, 95_282, 128_084), (44_000, 24_992, 27_335, 29_678),
    1_100, 100, 1,
  ),
}  # fmt: skip

# The families of methods, and their colours; the first is the line to beat.
PLAIN, MEMORY, FRESH, LOSS = (
  'plain training, cut short',
  'sampled by remembered scores',
  'selected by fresh scores',
  'another loss',
)
COLORS = {PLAIN: '0.35', MEMORY: 'C0', FRESH: 'C3', LOSS: 'C2'}
CUTS = (0.5, 0.65, 0.8)


@dataclasses.dataclass(frozen=True)
class Method:
  """What is compared: a family, for its colour, and a config but for the seed.

  Attributes:
    family: one of `COLORS`.
    config: with the first seed.
  """

  family: str
  config: ml_collections.ConfigDict

  @property
  def digest(self) -> str:
    """Says what is trained, whatever the seed, to know a recipe again."""
    return digest(self.config)

  @property
  def step_digest(self) -> str:
    """The same of a step: it costs what it costs in a run of any length."""
    return digest(self.config, but=('steps', 'optimizer.boundaries'))


def digest(config: ml_collections.ConfigDict, but: Iterable[str] = ()) -> str:
  """Of the fields that differ from their default, but for some."""
  default = config_lib.as_json(config_lib.default())
  ignored = (
    'seed', 'data.data_dir', 'log_every', 'eval_every', 'checkpoint_every', *but
  )  # fmt: skip
  changed = {
    name: value
    for name, value in sorted(runs_lib.to_save(config).items())
    if name not in ignored and value != default.get(name)
  }
  return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:8]


def remembered(sampler: str, rule: str, **fields: Any) -> Fields:
  """The fields of sampling by remembered scores."""
  fields |= {'memory': True, 'sampler': sampler, 'rule': rule}
  return {f'selection.{name}': value for name, value in fields.items()}


def pruned(share: float | str, drop: float) -> Fields:
  """Those of soft pruning by the signed margin."""
  return remembered('prune', 'signed_margin', share=share, drop=drop)


def fresh(rule: str, pool_size: int, **fields: Any) -> Fields:
  """Those of selection from a pool that is scored."""
  fields = {f'selection.{name}': value for name, value in fields.items()}
  return {'selection.rule': rule, 'pool_size': pool_size, **fields}


MMR = {'mmr.alpha': 1e-5, 'mmr.alpha_end': 1e-3}


def make_methods(size: Size, args: argparse.Namespace) -> dict[str, Method]:
  """Every method by its name.

  Whatever changes which examples are trained on promises to need fewer steps,
  and gets few; another loss promises less error for the same, and gets all.
  """
  if args.scale != 1:
    size = size.scaled(args.scale)
  plain = {'selection.rule': UNIFORM}
  table: list[tuple[str, str, tuple[int, ...], Fields]] = [
    (UNIFORM, PLAIN, size.long, plain),
    *(
      (f'{UNIFORM}, {cut:.0%}', PLAIN, size.shortened(cut), plain)
      for cut in CUTS
    ),
    *(
      (name, MEMORY, size.short, fields)
      for name, fields in {
        'random pruning': remembered('prune', 'random', share=0.5, drop=0.5),
        'InfoBatch': remembered(
          'prune', 'loss', threshold='mean', drop=0.5, unbiased=True
        ),
        'margin pruning, 0.5, 0.5': pruned(0.5, 0.5),
        'margin pruning, 0.9, 0.9': pruned(0.9, 0.9),
        'margin pruning, auto': pruned('auto', 0.9),
        'margin pruning, auto + MMR': pruned('auto', 0.9) | MMR,
        'weighted': remembered('weighted', 'mms'),
      }.items()
    ),
    *(
      (name, FRESH, size.short, fields)
      for name, fields in {
        'mms, B=128': fresh('mms', 128),
        'mms, B=128, proxy': fresh('mms', 128, proxy=size.proxy, proxy_every=4),
        'mms, B=640': fresh('mms', 640),
        'hard-negative, ramp': fresh('loss', 640, ramp=0.1),
      }.items()
    ),
    ('trimming', LOSS, size.long, plain | {'trimming.last': 0.2}),
    ('MMR', LOSS, size.long, plain | MMR),
  ]
  if size.short != size.shortened(0.65):
    table.append((f'{UNIFORM}, early drop', PLAIN, size.short, plain))
  return {
    name: Method(family, make_config(size, args, schedule, fields))
    for name, family, schedule, fields in table
  }


def make_config(
  size: Size,
  args: argparse.Namespace,
  schedule: tuple[int, ...],
  fields: Fields,
) -> ml_collections.ConfigDict:
  """b=64 and SGD as in configs/cifar10_resnet44.py, on this schedule."""
  config = config_lib.default()
  config.steps, *boundaries = schedule
  config.log_every = config.eval_every = size.interval
  # Whoever is stopped saves; the others are for a machine that dies.
  config.checkpoint_every = 4 * size.interval
  config.data.name = size.dataset
  config.data.data_dir = args.data_dir
  config.data.augmentations = size.augmentations
  # So that a trial run has as many epochs; a pool needs 640 examples.
  config.data.fraction = min(1.0, max(args.scale, 0.03))
  config.model.name = size.model
  config.optimizer.weight_decay = 1e-4
  config.optimizer.learning_rates = tuple(
    0.1 / 10**i for i in range(len(boundaries) + 1)
  )
  config.optimizer.boundaries = tuple(boundaries)
  config.update_from_flattened_dict(fields)
  schema.validate(config)
  return config


# The results: rows of a CSV file.

COLUMNS = [
  'method', 'seed', 'config', 'step', 'examples_scored', 'flops', 'error',
  'worst_class_error',
]  # fmt: skip


def read_results(
  path: pathlib.Path, methods: Mapping[str, Method]
) -> dict[tuple[str, int], list[Row]]:
  """The evaluations of each complete run by method and seed; {} without file.

  Those of an unknown method, or of another recipe, are left out.
  """
  results: dict[tuple[str, int], list[Row]] = {}
  if path.exists():
    with path.open(newline='', encoding='utf-8') as file:
      for row in csv.DictReader(file):
        name = row['method']
        if name in methods and row['config'] == methods[name].digest:
          row |= {key: int(row[key]) for key in ('seed', 'step')}
          row |= {key: float(row[key]) for key in COLUMNS[4:]}
          results.setdefault((name, row['seed']), []).append(row)
  return {
    (name, seed): rows
    for (name, seed), rows in results.items()
    if rows[-1]['step'] == methods[name].config.steps
  }


def write_results(
  path: pathlib.Path,
  methods: Mapping[str, Method],
  results: Mapping[tuple[str, int], list[Row]],
) -> None:
  """Writes the rows, seed by seed, in the order of the methods."""
  order = {name: index for index, name in enumerate(methods)}
  keys = sorted(results, key=lambda key: (key[1], order[key[0]]))
  rows = [row for key in keys for row in results[key]]
  files.write_csv(path, COLUMNS, rows)


def read_run(run: runs.Run, config: str) -> list[Row]:
  """The rows of a complete run, from its eval.csv."""
  rows = []
  with (run.folder / 'eval.csv').open(newline='', encoding='utf-8') as file:
    for row in csv.DictReader(file):
      if row['split'] != 'test':
        continue
      worst = float(row['worst_class_accuracy'])
      rows.append(
        {
          'method': run.trial.name,
          'seed': run.seed,
          'config': config,
          'step': int(row['step']),
          'examples_scored': int(float(row['examples_scored'])),
          'flops': float(row['flops']),
          'error': round(1 - float(row['accuracy']), 6),
          'worst_class_error': round(1 - worst, 6),
        }
      )
  return rows


def train(
  args: argparse.Namespace,
  methods: Mapping[str, Method],
  base: pathlib.Path,
  root: pathlib.Path,
) -> None:
  """Trains what is missing, and adds each run to the results as it ends."""
  path = base.with_suffix('.csv')
  trials = [
    methods_lib.Trial(name, {}, method.config)
    for name, method in methods.items()
  ]
  done = read_results(path, methods)
  missing = [
    run
    for run in runs.plan(trials, args.seeds, root)
    if (run.trial.name, run.seed) not in done
  ]
  with Interrupts() as interrupts:
    if args.minutes is not None:
      stop = threading.Timer(
        60 * args.minutes, os.kill, (os.getpid(), signal.SIGTERM)
      )
      stop.daemon = True
      stop.start()
    for outcome in runs.train(missing, interrupts, say):
      results = read_results(path, methods)  # another process may add to them
      for run in outcome.runs:
        name = run.trial.name
        results[name, run.seed] = read_run(run, methods[name].digest)
      write_results(path, methods, results)
      write_report(args, methods, base)


def say(line: str) -> None:
  """Prints a line with the time of the day."""
  print(f'{datetime.datetime.now():%d %H:%M:%S} {line}', flush=True)


# The seconds of a step, of all methods in turns.


class Timed:
  """Steps of a method in the middle of its run."""

  def __init__(self, config: ml_collections.ConfigDict):
    """Compiles them, and fills the score memory."""
    config = schema.effective(config)
    _, dataset = setup_lib.load(config, None)
    self._fused = steps_lib.Fused(config, dataset)
    state = self._fused.state
    self._examples = len(state.sampler.order)
    # Past the epochs of the warm-up.
    sampler = state.sampler.replace(epoch=state.sampler.epoch + 1000)
    rng = np.random.default_rng(0)

    def remembered(x: Array) -> Array:
      """Scores of all examples; few are misclassified."""
      if x.shape != (self._examples,):
        return x
      values = rng.standard_normal(self._examples)
      values = values > 2 if x.dtype == bool else values
      return jax.device_put(values.astype(x.dtype), x.sharding)

    memory = jax.tree.map(remembered, state.memory)
    self._fused.state = state.replace(sampler=sampler, memory=memory)

  def run(self, steps: int) -> tuple[float, float]:
    """Seconds of an ordinary step, and what a step of an epoch's start adds.

    The second is a share: divided by the steps of the epoch.
    """
    fused = self._fused
    sampler = fused.state.sampler
    fused.state = fused.state.replace(
      sampler=sampler.replace(cursor=sampler.cursor + self._examples)
    )
    start = fused.run(fused.count) * fused.count
    sampled = int(fused.spec.examples_sampled(0))
    epoch = int(fused.state.sampler.count) // sampled
    # No other epoch begins among the steps that are ordinary.
    step = fused.run(max(1, min(steps, epoch - 2 * fused.count)))
    return step, max(0.0, start - fused.count * step) / epoch


def time_steps(
  args: argparse.Namespace, methods: Mapping[str, Method], path: pathlib.Path
) -> None:
  """Times the steps of all methods in turns and writes them as JSON."""
  distinct: dict[str, tuple[str, Method]] = {}
  for name, method in methods.items():
    distinct.setdefault(method.step_digest, (name, method))
  timed = {}
  for key, (name, method) in distinct.items():
    timed[key] = Timed(method.config)
    timed[key].run(2)  # the first steps of a program are slower
    say(f'compiled {name}')
  found: dict[str, list[tuple[float, float]]] = {key: [] for key in timed}
  for number in range(args.rounds):
    for key, one in timed.items():
      found[key].append(one.run(SIZES[args.size].timed_steps))
    say(f'round {number + 1} of {args.rounds}')
  device = jax.devices()[0]
  content = {
    'date': f'{datetime.date.today():%Y-%m-%d}',
    'device': f'{jax.device_count()} x {device.device_kind}',
    'host_cores': os.cpu_count(),
    'versions': reporting.versions(),
    'rounds': args.rounds,
    'steps': {},
  }
  for key, pairs in found.items():
    low, middle, high = statistics.quantiles(map(sum, pairs), n=4)
    content['steps'][key] = {
      'method': distinct[key][0],
      'seconds': middle,
      'quartiles': [low, high],
      'of these for the start of epochs': statistics.median(
        extra for _, extra in pairs
      ),
    }
  files.write_json(path, content)


# The report.


@dataclasses.dataclass(frozen=True)
class Point:
  """A method in the picture: what it cost and what came out, over its seeds.

  Attributes:
    family: one of `COLORS`.
    seconds: of a run.
    errors: at the end, one for each seed.
  """

  family: str
  seconds: float
  errors: list[float]

  @property
  def error(self) -> float:
    """The mean."""
    return statistics.mean(self.errors)

  @property
  def variance(self) -> float:
    """Of an error; 0 of a single seed."""
    return statistics.variance(self.errors) if len(self.errors) > 1 else 0.0


def write_report(
  args: argparse.Namespace, methods: Mapping[str, Method], base: pathlib.Path
) -> None:
  """Writes the table and the picture of the runs that are complete."""
  results = read_results(base.with_suffix('.csv'), methods)
  by_method = {
    name: [rows for (other, _), rows in results.items() if other == name]
    for name in methods
  }
  by_method = {name: found for name, found in by_method.items() if found}
  path = base.with_suffix('.json')
  times = json.loads(path.read_text()) if path.exists() else {'steps': {}}
  step_seconds = {
    name: times['steps'][methods[name].step_digest]['seconds']
    for name in by_method
    if methods[name].step_digest in times['steps']
  }
  points = {
    name: Point(
      methods[name].family,
      seconds * methods[name].config.steps,
      [rows[-1]['error'] for rows in by_method[name]],
    )
    for name, seconds in step_seconds.items()
  }
  size = SIZES[args.size]
  text = [
    f'# Time to accuracy: {size.model} on {size.dataset}',
    '',
    f'`python -m benchmarks.time_to_accuracy --size={args.size}`, b=64, SGD '
    'with momentum 0.9 and weight decay 1e-4, augmentations: '
    f'{", ".join(size.augmentations) or "none"}; learning rate 0.1, divided by '
    f'10 at steps {", ".join(f"{x:,}" for x in size.long[1:])} of '
    f'{size.long[0]:,}, the same parts of the runs cut short. '
    'Errors are of the test split at the last step, mean ± standard deviation '
    'over the seeds.',
    '',
    *verdict(points),
    *([f'![Error against seconds]({base.name}.png)', ''] if points else []),
    *table(methods, by_method, step_seconds, points),
    '',
    *explanation(times),
  ]
  if points:
    plot(base.with_suffix('.png'), points)
  base.with_suffix('.md').write_text('\n'.join(text) + '\n', encoding='utf-8')


def table(
  methods: Mapping[str, Method],
  by_method: Mapping[str, list[list[Row]]],
  step_seconds: Mapping[str, float],
  points: Mapping[str, Point],
) -> list[str]:
  """A line a method."""
  goal = None
  if UNIFORM in by_method:
    goal = statistics.mean(x[-1]['error'] for x in by_method[UNIFORM])
  most = max((found[0][-1]['flops'] for found in by_method.values()), default=1)
  divisor, prefix = report.unit(most)
  header = [
    'method', 'seeds', 'steps', 'test error, %', 'worst class, %',
    f'{prefix}FLOP', 'seconds', 'error less that of the line, points',
    "seconds to the error of `uniform`",
  ]  # fmt: skip
  lines = []
  for name, found in by_method.items():
    ends = [rows[-1] for rows in found]
    seconds = step_seconds.get(name)
    line = [
      name,
      f'{len(found)}',
      f'{methods[name].config.steps:,}',
      *(
        report.percent(*report.mean_and_deviation([x[key] for x in ends]))
        for key in ('error', 'worst_class_error')
      ),
      f'{ends[0]["flops"] / divisor:.3g}',
      '-' if seconds is None else f'{points[name].seconds:.0f}',
      '-',
      '-',
    ]
    compared = against_line(points[name], points) if name in points else None
    if compared is not None and points[name].family != PLAIN:
      difference, noise = (100 * x for x in compared)
      line[-2] = f'{difference:+.2f}' + (f' ± {noise:.2f}' if noise else '')
    if seconds is not None and goal is not None:
      line[-1] = arrival(found, goal, seconds)
    lines.append(line)
  return report.markdown(header, lines)


def arrival(found: list[list[Row]], goal: float, seconds: float) -> str:
  """How many seeds reach an error, and after how many seconds on average."""
  first = [
    next((row['step'] for row in rows if row['error'] <= goal), None)
    for rows in found
  ]
  hits = [step for step in first if step is not None]
  if not hits:
    return f'0 of {len(found)}'
  return f'{len(hits)} of {len(found)}: {statistics.mean(hits) * seconds:.0f}'


def line_to_beat(points: Mapping[str, Point]) -> list[Point]:
  """Those of plain training, by seconds."""
  plain = [point for point in points.values() if point.family == PLAIN]
  return sorted(plain, key=lambda point: point.seconds)


def against_line(
  point: Point, points: Mapping[str, Point]
) -> tuple[float, float] | None:
  """How far a point is above the line at its seconds, and two standard errors.

  None where the line has not even begun.
  """
  line = line_to_beat(points)
  if not line or point.seconds < line[0].seconds * 0.99:
    return None
  there = np.interp(
    point.seconds, [x.seconds for x in line], [x.error for x in line]
  )
  of_line = statistics.mean(x.variance / len(x.errors) for x in line)
  own = point.variance / len(point.errors)
  return point.error - float(there), 2 * (own + of_line) ** 0.5


def verdict(points: Mapping[str, Point]) -> list[str]:
  """A paragraph: who is below the line, on it, above it; of several seeds."""
  groups: dict[str, list[str]] = {
    'Below it, so better': [],
    'On it': [],
    'Above it, so worse': [],
  }
  below, on, above = groups.values()
  for name, point in points.items():
    compared = against_line(point, points)
    if point.family == PLAIN or compared is None:
      continue
    if len(point.errors) == 1:
      return []
    difference, noise = compared
    side = below if difference < 0 else above
    (on if abs(difference) <= noise else side).append(name)
  return [
    "Plain training that is cut short to a method's seconds comes to the grey "
    'line. '
    + ' '.join(f'{x}: {"; ".join(y) or "none"}.' for x, y in groups.items())
    + ' A difference within two standard errors counts as none.',
    '',
  ]


def explanation(times: Mapping[str, Any]) -> list[str]:
  """What the columns are, and where the seconds were measured."""
  lines = [
    'Methods that change which examples are trained on get fewer steps than '
    '`uniform`, as they promise to need fewer; another loss gets the same '
    'steps. All are points in one plane, so that any of them can be compared '
    'with plain training cut short to its seconds: `uniform, 65%` is a whole '
    'run, its learning rate too, of 65% of the steps. The line is straight '
    'between these; right of its end it goes on level, which flatters what '
    'lies there. "Error above the line" is with two standard errors. '
    '"Margin pruning, q, r" leaves out a fraction r of the fraction q of the '
    'examples with the largest remembered margins, in every epoch.',
    '',
    'Seconds are those of a step times the steps; "to the error" ends at the '
    'first evaluation with at most the mean error of `uniform`, in so many of '
    'the seeds, a mean over them.',
  ]
  if not times['steps']:
    return [*lines, '', 'No step has been timed yet (`--time`).']
  spread = max(
    (x['quartiles'][1] - x['quartiles'][0]) / x['seconds']
    for x in times['steps'].values()
  )
  versions = ', '.join(f'{k} {v}' for k, v in times['versions'].items())
  return [
    *lines,
    '',
    f'Steps were timed on {times["date"]}, on {times["device"]} '
    f'({times["host_cores"]} host cores), {versions}: medians of '
    f'{times["rounds"]} rounds, all methods in turns in one process, with what '
    'the start of an epoch adds. The quartiles of a step differ by at most '
    f'{spread:.0%} of it.',
  ]


def plot(path: pathlib.Path, points: Mapping[str, Point]) -> None:
  """Error against seconds; plain training cut short is the line to beat."""
  figure = figures.new(9, 5.4)
  axes = figure.subplots()
  for family, color in COLORS.items():
    own = [x for x in points.values() if x.family == family]
    if own:
      axes.plot(
        [x.seconds for x in own], [100 * x.error for x in own], 'o',
        color=color, markersize=7, label=family, zorder=3,
      )  # fmt: skip
      axes.errorbar(
        [x.seconds for x in own], [100 * x.error for x in own],
        yerr=[100 * x.variance**0.5 for x in own], color=color, linestyle='',
        linewidth=1, alpha=0.5, zorder=1,
      )  # fmt: skip
  axes.set_xscale('log')
  axes.set_yscale('log')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter('{x:g}')
  axes.tick_params(which='both', labelsize=9)
  axes.margins(x=0.2, y=0.15)
  line = line_to_beat(points)
  if line:
    ends = axes.get_xlim()
    x = [*(point.seconds for point in line), ends[1]]
    y = [*(100 * point.error for point in line), 100 * line[-1].error]
    axes.plot(x[:-1], y[:-1], color=COLORS[PLAIN], linewidth=2.5, zorder=2)
    axes.plot(x[-2:], y[-2:], color=COLORS[PLAIN], linestyle=':', zorder=2)
    axes.set_xlim(ends)
    bottom = axes.get_ylim()[0]
    axes.fill_between(x, bottom, y, color='C8', alpha=0.12, linewidth=0)
    axes.set_ylim(bottom)
  axes.set_xlabel('seconds of training')
  axes.set_ylabel('test error, %')
  axes.set_title(
    'In the coloured area: less error than plain training in the same seconds'
  )
  axes.grid(alpha=0.25, which='both')
  axes.legend(loc='upper right')
  figure.canvas.draw()  # the layout is known from here on
  figure.set_layout_engine('none')
  label(axes, points)
  figures.save(figure, path, 160)


def label(axes: Any, points: Mapping[str, Point]) -> None:
  """Writes each name near its point, where nothing else is."""
  to_pixels, to_points = axes.transData.transform, 72 / axes.figure.dpi
  centers = {
    name: to_pixels((x.seconds, 100 * x.error)) for name, x in points.items()
  }
  ends = [(x.seconds, 100 * x.error) for x in line_to_beat(points)]
  line = to_pixels([*ends, (axes.get_xlim()[1], ends[-1][1])])
  taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in centers.values()]
  for start, end in itertools.pairwise(line):
    along = start + np.linspace(0, 1, 60)[:, None] * (end - start)
    taken += [(x - 4, y - 4, x + 4, y + 4) for x, y in along]
  for point in points.values():
    spread = point.variance**0.5
    bar = [(point.seconds, 100 * (point.error + x)) for x in (-spread, spread)]
    (x, y0), (_, y1) = to_pixels(bar)
    taken.append((x - 2, y0, x + 2, y1))
  taken.append(axes.get_legend().get_window_extent().extents)
  left, bottom, right, top = axes.get_window_extent().extents

  def free(box: np.ndarray) -> bool:
    x0, y0, x1, y1 = box
    inside = left < x0 and x1 < right and bottom < y0 and y1 < top
    return inside and not any(
      x0 < c and a < x1 and y0 < d and b < y1 for a, b, c, d in taken
    )

  # Outwards in circles, of the same distance to the sides first.
  angles = np.radians([0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90])
  directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  for name in sorted(points, key=lambda name: centers[name][1]):
    color = COLORS[points[name].family]
    text = axes.annotate(
      name, (points[name].seconds, 100 * points[name].error), (0, 0),
      textcoords='offset points', fontsize=8.5, color=color, ha='center',
      va='center',
      arrowprops={'arrowstyle': '-', 'color': color, 'linewidth': 0.6},
    )  # fmt: skip
    half = np.array(text.get_window_extent().size) / 2
    for radius in range(14, 300, 8):
      offsets = directions * (radius + half * abs(directions).round(1))
      boxes = [
        np.concatenate([centers[name] + x - half, centers[name] + x + half])
        for x in offsets
      ]
      place = next((i for i, box in enumerate(boxes) if free(box)), None)
      if place is not None:
        taken.append(boxes[place])
        text.set_position(to_points * offsets[place])
        break


def main() -> None:
  """Trains what is missing, or times the steps, and writes the report."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', choices=[*SIZES], default='mnist')
  parser.add_argument('--time', action='store_true')
  parser.add_argument('--report', action='store_true')
  parser.add_argument('--data_dir')
  parser.add_argument('--seeds', type=int)
  parser.add_argument('--scale', type=float, default=1)
  parser.add_argument('--minutes', type=float)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--workdir', help='default: /tmp/time_to_accuracy_SIZE')
  parser.add_argument(
    '--out', type=pathlib.Path, help='of the results; default: beside this file'
  )
  args = parser.parse_args()
  if args.seeds is None:
    args.seeds = SIZES[args.size].seeds
  cpu.tune()
  devices_lib.use_compilation_cache()
  name = args.size if args.scale == 1 else f'{args.size}_{args.scale:g}'
  root = pathlib.Path(args.workdir or f'/tmp/time_to_accuracy_{name}')
  here = pathlib.Path(__file__).parent if args.scale == 1 else root
  base = (args.out or here) / f'time_to_accuracy_{args.size}'
  root.mkdir(parents=True, exist_ok=True)
  with one_line_errors():
    methods = make_methods(SIZES[args.size], args)
    if args.time:
      time_steps(args, methods, base.with_suffix('.json'))
    elif not args.report:
      train(args, methods, base, root)
    write_report(args, methods, base)
  print(base.with_suffix('.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
  main()
