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
import functools
import hashlib
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
from jax import Array

import margin_jax
from benchmarks import steps as steps_lib
from benchmarks import time_to_accuracy_report as report
from benchmarks.time_to_accuracy_report import FRESH, LOSS, MEMORY, PLAIN
from margin_jax import config as config_lib
from margin_jax import cpu, data, files
from margin_jax.compare import methods as methods_lib
from margin_jax.compare import runs
from margin_jax.config import UNIFORM
from margin_jax.models import common
from margin_jax.train import devices as devices_lib
from margin_jax.train import reporting, schema
from margin_jax.train import runs as runs_lib
from margin_jax.train import setup as setup_lib
from margin_jax.train.process import Interrupted, Interrupts, one_line_errors
from margin_jax.train.workdirs import Workdir

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
    dataset, model, proxy, augmentations, crop_padding: of its runs.
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
  crop_padding: int
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
    'mnist', SMALL, TINY, ('crop',), 2,
    (18_800, 9_400, 15_040), (12_220, 6_110, 9_776), 940, 80, 3,
  ),
  'cifar10': Size(
    'cifar10', 'resnet8', SMALL, CROP_FLIP, 4,
    (12_000, 6_000, 9_600), (7_800, 3_900, 6_240), 600, 20, 3,
  ),
  # The regimes of configs/cifar10_resnet44.py.
  'paper': Size(
    'cifar10', 'resnet44', 'resnet8', CROP_FLIP, 4,
    (156_200, 63_261, 95_282, 128_084), (44_000, 24_992, 27_335, 29_678),
    1_100, 100, 1,
  ),
}  # fmt: skip

CUTS = (0.25, 0.5, 0.65, 0.8)


@dataclasses.dataclass(frozen=True)
class Method:
  """What is compared: a family, for its colour, and a config but for the seed.

  Attributes:
    family: one of the report's.
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
  """Digests the fields that differ from their default, but for some."""
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


def pruned(
  share: float | str, drop: float, rule: str = 'signed_margin'
) -> Fields:
  """Those of soft pruning."""
  return remembered('prune', rule, share=share, drop=drop)


def fresh(rule: str, pool_size: int, **fields: Any) -> Fields:
  """Those of selection from a pool that is scored."""
  fields = {f'selection.{name}': value for name, value in fields.items()}
  return {'selection.rule': rule, 'pool_size': pool_size, **fields}


PLAIN_FIELDS = {'selection.rule': UNIFORM}
MMR = {'mmr.alpha': 1e-5, 'mmr.alpha_end': 1e-3}
INFOBATCH = {'threshold': 'mean', 'drop': 0.5, 'unbiased': True}
REMEMBERED = {
  'random pruning': pruned(0.5, 0.5, 'random'),
  'random pruning, 0.9, 0.9': pruned(0.9, 0.9, 'random'),
  'InfoBatch': remembered('prune', 'loss', **INFOBATCH),
  'margin pruning, 0.5, 0.5': pruned(0.5, 0.5),
  'margin pruning, 0.9, 0.9': pruned(0.9, 0.9),
  'margin pruning, auto': pruned('auto', 0.9),
  'margin pruning, auto + MMR': pruned('auto', 0.9) | MMR,
  'weighted': remembered('weighted', 'mms'),
}
# Of these, and of `mms` with a small pool, also runs of a quarter of the steps:
# which part of an epoch is redundant shows where steps are few.
QUARTER = 0.25
SHORTEST = (
  'random pruning', 'random pruning, 0.9, 0.9', 'InfoBatch',
  'margin pruning, 0.9, 0.9', 'margin pruning, auto', 'weighted',
)  # fmt: skip
OTHER_LOSSES = {
  'trimming': PLAIN_FIELDS | {'trimming.last': 0.2},
  'MMR': PLAIN_FIELDS | MMR,
}


def make_methods(size: Size, args: argparse.Namespace) -> dict[str, Method]:
  """Every method by its name.

  Whatever changes which examples are trained on promises to need fewer steps,
  and gets few; another loss promises less error for the same, and gets all.
  """
  early_drop = size.short[0] != size.shortened(0.65)[0]
  if args.scale != 1:
    size = size.scaled(args.scale)
  methods: dict[str, Method] = {}

  def add(name: str, family: str, schedule: tuple[int, ...], fields: Fields):
    methods[name] = Method(family, make_config(size, args, schedule, fields))

  add(UNIFORM, PLAIN, size.long, PLAIN_FIELDS)
  for cut in CUTS:
    add(f'{UNIFORM}, {cut:.0%}', PLAIN, size.shortened(cut), PLAIN_FIELDS)
  if early_drop:
    add(f'{UNIFORM}, early drop', PLAIN, size.short, PLAIN_FIELDS)
  for name in SHORTEST:
    schedule = size.shortened(QUARTER)
    add(f'{name}, {QUARTER:.0%}', MEMORY, schedule, REMEMBERED[name])
  small = fresh('mms', 128)
  add(f'mms, B=128, {QUARTER:.0%}', FRESH, size.shortened(QUARTER), small)
  for name, fields in REMEMBERED.items():
    add(name, MEMORY, size.short, fields)
  proxy = {'proxy': size.proxy, 'proxy_every': 4}
  add('mms, B=128', FRESH, size.short, small)
  add('mms, B=128, proxy', FRESH, size.short, fresh('mms', 128, **proxy))
  add('mms, B=640', FRESH, size.short, fresh('mms', 640))
  add('hard-negative, ramp', FRESH, size.short, fresh('loss', 640, ramp=0.1))
  for name, fields in OTHER_LOSSES.items():
    add(name, LOSS, size.long, fields)
  return methods


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
  config.data.crop_padding = size.crop_padding
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
    for run in runs.plan(trials, args.seeds, Workdir(root))
    if (run.trial.name, run.seed) not in done
  ]
  with Interrupts() as interrupts:
    stop = threading.Timer(
      60 * args.minutes, os.kill, (os.getpid(), signal.SIGTERM)
    )
    stop.daemon = True
    stop.start()
    try:
      for outcome in runs.train(missing, interrupts, say):
        results = read_results(path, methods)  # others may have added to them
        for run in outcome.runs:
          name = run.trial.name
          results[name, run.seed] = read_run(run, methods[name].digest)
        write_results(path, methods, results)
        write_report(args, methods, base)
    except Interrupted as stopped:
      if not stop.finished.is_set():
        raise
      say(f'{args.minutes:g} minutes are over: {stopped}')
    stop.cancel()


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
    self._fused.fill_memory()

  def run(self, steps: int) -> tuple[float, float]:
    """Seconds of an ordinary step, and what a step of an epoch's start adds.

    The second is a share: divided by the steps of the epoch.
    """
    start, epoch = self._fused.run_epoch_start()
    # No other epoch begins among the steps that are ordinary.
    step = self._fused.run(max(1, min(steps, epoch - 2 * self._fused.count)))
    return step, max(0.0, start - self._fused.count * step) / epoch


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
    if high - low > 0.2 * middle:
      say(f'{distinct[key][0]}: the machine is not quiet; time it again')
  files.write_json(path, content)


# The report.


def read_outcomes(
  methods: Mapping[str, Method], base: pathlib.Path
) -> tuple[list[report.Outcome], dict[str, Any]]:
  """What has come of each method that has run, and the file of the times."""
  path = base.with_suffix('.json')
  times = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
  results = read_results(base.with_suffix('.csv'), methods)
  outcomes = []
  for name, method in methods.items():
    found = [rows for (other, _), rows in results.items() if other == name]
    timed = times.get('steps', {}).get(method.step_digest, {})
    if found:
      outcomes.append(
        report.Outcome(
          name,
          method.family,
          method.config.steps,
          found,
          timed.get('seconds'),
        )
      )
  return outcomes, times


def write_report(
  args: argparse.Namespace, methods: Mapping[str, Method], base: pathlib.Path
) -> None:
  """Writes the table and the picture of the runs that are complete."""
  outcomes, times = read_outcomes(methods, base)
  size = SIZES[args.size]
  steps, *boundaries = size.long
  opening = [
    f'# Time to accuracy: {size.model} on {size.dataset}',
    '',
    f'`python -m benchmarks.time_to_accuracy --size={args.size}`: b=64, SGD '
    'with momentum 0.9 and weight decay 1e-4, augmentations: '
    f'{", ".join(size.augmentations) or "none"}; learning rate 0.1, divided by '
    f'10 at steps {", ".join(f"{x:,}" for x in boundaries)} of {steps:,}.',
  ]
  report.write(base, opening, outcomes, times)


def main() -> None:
  """Trains what is missing, or times the steps, and writes the report."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', choices=[*SIZES], default='mnist')
  parser.add_argument('--time', action='store_true')
  parser.add_argument('--report', action='store_true')
  parser.add_argument('--data_dir')
  parser.add_argument('--seeds', type=int)
  parser.add_argument('--scale', type=float, default=1)
  parser.add_argument('--minutes', type=float, default=1e6)
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
  # All runs read the same files.
  data.tfds_images.load = functools.cache(data.tfds_images.load)
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
