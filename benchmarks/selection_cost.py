"""What a step costs with each rule and each way to make scoring cheap.

    python -m benchmarks.selection_cost

ResNet-20, b=64, B=640, images of CIFAR's shape (random: time does not depend
on what is in them). All variants in one process, in turns, so that whatever
else the machine does hits all of them; medians over the rounds, with the
quartiles. Writes benchmarks/selection_cost.md.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics

import jax
import numpy as np

from benchmarks import steps
from margin_jax import config as config_lib
from margin_jax import cpu, data
from margin_jax.train import devices as devices_lib
from margin_jax.train import schema
from margin_jax.train.reporting import versions

RULES = ('random', 'mms', 'loss', 'entropy', 'margin', 'selective_backprop')
BFLOAT16 = {'selection.score_dtype': 'bfloat16'}
SMALL = {'selection.score_resolution': 16}
VARIANTS = {
  'uniform': {'selection.rule': 'uniform'},
  **{rule: {'selection.rule': rule} for rule in RULES},
  'loss, ramp=0.1': {'selection.rule': 'loss', 'selection.ramp': 0.1},
  'mms, scope=device': {'selection.scope': 'device'},
  'mms, log_counts': {'selection.log_counts': True},
  'mms, batch_stats=pool': {'selection.batch_stats': 'pool'},
  'mms, score_dtype=bfloat16': BFLOAT16,
  'mms, score_resolution=16': SMALL,
  'mms, proxy=resnet8': {'selection.proxy': 'resnet8'},
  'mms, proxy=resnet8 at 16': {'selection.proxy': 'resnet8', **SMALL},
  'mms, reuse=2': {'selection.reuse': 2},
  'mms, reuse=5': {'selection.reuse': 5},
  'mms, every=5': {'selection.every': 5},
  'mms, B=128': {'pool_size': 128},
  'trimming to 0.2': {'selection.rule': 'uniform', 'trimming.last': 0.2},
}
# One pool may feed five steps, so that many are timed together.
STEPS = 10


def make_dataset(examples: int = 6400) -> data.InMemory:
  """Random images with CIFAR-10's shape and augmentation."""
  rng = np.random.default_rng(0)
  split = {
    'inputs': rng.integers(0, 256, (examples, 32, 32, 3)).astype(np.uint8),
    'label': rng.integers(0, 10, examples).astype(np.int32),
  }
  return data.InMemory(
    name='random',
    num_classes=10,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(examples), 'test': np.arange(examples)},
    augment=data.augment.compose(('crop', 'flip'), 4),
    prepare=data.normalizer(split['inputs'], 'dataset'),
  )


def make_run(fields: dict, model: str, dataset: data.Dataset):
  """A function that takes `STEPS` steps and waits for them."""
  config = config_lib.default()
  config.model.name = model
  config.selection.rule = 'mms'
  config.optimizer.weight_decay = 1e-4
  config.devices = 1
  config.update_from_flattened_dict(fields)
  schema.validate(config)
  fused = steps.Fused(config, dataset)
  cost = fused.program.cost(0, STEPS)
  return functools.partial(fused.run, STEPS), dataclasses.asdict(cost)


def table(times: dict[str, list[float]], costs: dict[str, dict]) -> list[str]:
  """Markdown rows: time, ratio to uniform, its quartiles, FLOPs."""
  lines = [
    '| variant | ms a step | times uniform | quartiles | examples scored '
    'a step | GFLOP a step |',
    '|---|---|---|---|---|---|',
  ]
  base = times['uniform']
  for name, values in times.items():
    ratios = [x / y for x, y in zip(values, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    lines.append(
      f'| {name} | {1e3 * statistics.median(values):.0f} | {middle:.2f} | '
      f'{low:.2f} to {high:.2f} | '
      f'{costs[name]["examples_scored"] / STEPS:.0f} | '
      f'{costs[name]["flops"] / STEPS / 1e9:.1f} |'
    )
  return lines


def main() -> None:
  """Compiles all variants, then times them in turns."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet20')
  parser.add_argument('--rounds', type=int, default=7)
  args = parser.parse_args()
  cpu.tune()  # as the trainer does, before JAX starts
  devices_lib.use_compilation_cache()
  dataset = make_dataset()
  runs, costs = {}, {}
  for name, fields in VARIANTS.items():
    runs[name], costs[name] = make_run(fields, args.model, dataset)
    runs[name]()  # the first steps of a program are slower
    print('compiled', name, flush=True)
  times: dict[str, list[float]] = {name: [] for name in runs}
  for round_number in range(args.rounds):
    for name, run in runs.items():
      times[name].append(run())
    print('round', round_number + 1, flush=True)
  found = versions()
  device = jax.devices()[0]
  text = [
    '# Cost of selection',
    '',
    f'`python -m benchmarks.selection_cost --model={args.model} '
    f'--rounds={args.rounds}`: {args.model}, b=64, B=640, '
    f'1 x {device.device_kind} ({os.cpu_count()} host cores), '
    f'jax {found["jax"]}, Python {found["python"]}. Medians of '
    f'{args.rounds} rounds of {STEPS} steps, all variants in turns; the ratio '
    'is taken within each round.',
    '',
    *table(times, costs),
  ]
  path = pathlib.Path(__file__).with_suffix('.md')
  path.write_text('\n'.join(text) + '\n')
  print('\n'.join(text))


if __name__ == '__main__':
  main()
