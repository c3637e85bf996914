"""What soft pruning gains or loses by each of its settings, with few steps.

    python -m benchmarks.pruning_designs --data_dir=DIR [--steps=4700]

The network and the recipe of benchmarks/time_to_accuracy.py on MNIST, a quarter
of its steps, without crops. Margin pruning, share = drop = 0.9, and then
with one thing changed at a time; what changes plain training too is compared
with plain training of its own. Every run is kept in WORKDIR: started again it
goes on.
Writes benchmarks/pruning_designs.md.
"""

import argparse
import dataclasses
import pathlib
import statistics
from typing import Any

from benchmarks import time_to_accuracy
from margin_jax import cpu
from margin_jax.compare import methods as methods_lib
from margin_jax.compare import runs
from margin_jax.config import UNIFORM
from margin_jax.train import devices as devices_lib
from margin_jax.train.process import Interrupts, one_line_errors
from margin_jax.train.workdirs import Workdir

Fields = dict[str, Any]

PLAIN = {'selection.rule': UNIFORM}
PRUNED = time_to_accuracy.pruned(0.9, 0.9)
# Of the pruning alone.
SETTINGS: dict[str, Fields] = {
  'as it is': {},
  'drops half as much: share = drop = 0.64': {
    'selection.share': 0.64,
    'selection.drop': 0.64,
  },
  'drops a quarter: share = drop = 0.5': {
    'selection.share': 0.5,
    'selection.drop': 0.5,
  },
  'from the first epoch on: warmup=0': {'selection.warmup': 0},
  'to the last step: tail=0': {'selection.tail': 0.0},
  'a longer tail: tail=0.3': {'selection.tail': 0.3},
  'unbiased': {'selection.unbiased': True},
  'scores averaged: decay=0.5': {'selection.decay': 0.5},
  'by the loss': {'selection.rule': 'loss'},
  'by MMS': {'selection.rule': 'mms'},
  'at random, the control': {'selection.rule': 'random'},
}
# Of the recipe: plain training has it too.
RECIPES: dict[str, Fields] = {
  'crops, padding 2': {
    'data.augmentations': ('crop',),
    'data.crop_padding': 2,
  },
  'learning rate 0.03': {'optimizer.learning_rates': (0.03, 0.003, 0.0003)},
  'learning rate falls linearly': {
    'optimizer.learning_rates': (0.1,),
    'optimizer.boundaries': (),
    'optimizer.decay': 'linear',
  },
}


def make_trials(args: argparse.Namespace) -> dict[str, methods_lib.Trial]:
  """Every setting and recipe, and what each is compared with, by name."""
  size = dataclasses.replace(
    time_to_accuracy.SIZES['mnist'], augmentations=(), crop_padding=4
  )
  schedule = size.shortened(args.steps / size.long[0])
  args.scale = 1
  fields = {UNIFORM: PLAIN}
  fields |= {name: PRUNED | change for name, change in SETTINGS.items()}
  for name, change in RECIPES.items():
    fields[f'{UNIFORM}, {name}'] = PLAIN | change
    fields[name] = PRUNED | change
  return {
    name: methods_lib.Trial(
      name, {}, time_to_accuracy.make_config(size, args, schedule, changed)
    )
    for name, changed in fields.items()
  }


def table(errors: dict[str, dict[int, float]]) -> list[str]:
  """Markdown rows: the errors of both, and their difference, in points.

  Args:
    errors: of each setting or recipe, by seed.
  """
  lines = [
    '| margin pruning, share = drop = 0.9 | seeds | test error, % | of plain '
    'training | difference, two standard errors |',
    '|---|---|---|---|---|',
  ]
  for name in (*SETTINGS, *RECIPES):
    found = errors.get(name, {})
    base = errors.get(f'{UNIFORM}, {name}' if name in RECIPES else UNIFORM, {})
    seeds = sorted({*found} & {*base})
    count = len(seeds)
    if not count:
      continue
    # The same seeds start from the same parameters.
    pairs = [100 * (found[seed] - base[seed]) for seed in seeds]
    spread = ''
    if count > 1:
      spread = f' ± {2 * statistics.stdev(pairs) / count**0.5:.2f}'
    lines.append(
      f'| {name} | {count} | '
      f'{100 * statistics.mean(found[seed] for seed in seeds):.2f} | '
      f'{100 * statistics.mean(base[seed] for seed in seeds):.2f} | '
      f'{statistics.mean(pairs):+.2f}{spread} |'
    )
  return lines


def main() -> None:
  """Trains what is missing, and writes the table after every run."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir')
  parser.add_argument('--steps', type=int, default=4700)
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--workdir', default='/tmp/pruning_designs')
  args = parser.parse_args()
  cpu.tune()
  devices_lib.use_compilation_cache()
  with one_line_errors(), Interrupts() as interrupts:
    trials = make_trials(args)
    plan = runs.plan([*trials.values()], args.seeds, Workdir(args.workdir))
    for outcome in runs.train(plan, interrupts, time_to_accuracy.say):
      errors: dict[str, dict[int, float]] = {}
      for run, result in zip(outcome.runs, outcome.results, strict=True):
        error = 1 - result['test']['accuracy']
        errors.setdefault(run.trial.name, {})[run.seed] = error
      version = outcome.results[0]['versions']['jax']
      text = [
        '# Designs of pruning',
        '',
        f'`python -m benchmarks.pruning_designs --steps={args.steps} '
        f'--seeds={args.seeds}`: MNIST, {time_to_accuracy.SMALL}, b=64, '
        f'{trials[UNIFORM].config.steps:,} steps, jax {version}. Each row '
        'changes one thing. Differences are between runs of the same seed. '
        'Below 0, pruning is better at equal steps.',
        '',
        *table(errors),
      ]
      path = pathlib.Path(__file__).with_suffix('.md')
      path.write_text('\n'.join(text) + '\n')


if __name__ == '__main__':
  main()
