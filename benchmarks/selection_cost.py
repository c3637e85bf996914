"""What a step costs with each rule and each way to make scoring cheap.

    python -m benchmarks.selection_cost

ResNet-20, b=64, B=640, images of CIFAR's shape (random: time does not depend
on what is in them). All variants in one process, in turns, with plain steps
between them; a ratio is to the plain steps just before and after, so that
whatever else the machine does hits both. Medians over the rounds, with the
quartiles; those of plain steps themselves show the noise. Where no pool is
scored, the beginning of an epoch is timed too, and divided by its steps. Then
what examples cost in bytes.
Writes benchmarks/selection_cost.md.
"""

import argparse
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
MEMORY = {'selection.memory': True, 'selection.rule': 'signed_margin'}
PRUNE = {**MEMORY, 'selection.sampler': 'prune'}
# Nothing is scored.
UNSCORED = {
  'uniform': {'selection.rule': 'uniform'},
  'memory, prune': PRUNE,
  'memory, prune, share=auto, unbiased': {
    **PRUNE,
    'selection.share': 'auto',
    'selection.unbiased': True,
  },
  'memory, weighted': {**MEMORY, 'selection.sampler': 'weighted'},
  'memory, pool, B=128, explore=0.2': {
    **MEMORY,
    'selection.sampler': 'pool',
    'pool_size': 128,
    'selection.explore': 0.2,
  },
}
VARIANTS = {
  **UNSCORED,
  **{rule: {'selection.rule': rule} for rule in RULES},
  'loss, ramp=0.1': {'selection.rule': 'loss', 'selection.ramp': 0.1},
  'mms, scope=device': {'selection.scope': 'device'},
  'mms, log_counts': {'selection.log_counts': True},
  'mms, batch_stats=pool': {'selection.batch_stats': 'pool'},
  'mms, score_dtype=bfloat16': BFLOAT16,
  'mms, score_resolution=16': SMALL,
  'mms, proxy=resnet8': {'selection.proxy': 'resnet8'},
  'mms, proxy=resnet8, proxy_every=5': {
    'selection.proxy': 'resnet8',
    'selection.proxy_every': 5,
  },
  'mms, proxy=resnet8 at 16': {'selection.proxy': 'resnet8', **SMALL},
  'mms, reuse=2': {'selection.reuse': 2},
  'mms, reuse=5': {'selection.reuse': 5},
  'mms, every=5': {'selection.every': 5},
  'mms, B=128': {'pool_size': 128},
  'trimming to 0.2': {'selection.rule': 'uniform', 'trimming.last': 0.2},
}
# One pool may feed five steps, so that many are timed together.
STEPS = 10
# Bytes for an example are a difference: between training splits, and pools.
SIZES = (10_000, 30_000)
POOLS = (640, 1280)


def make_dataset(examples: int = 50_000) -> data.InMemory:
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


def make_steps(fields: dict, model: str, dataset: data.Dataset) -> steps.Fused:
  """The steps of a variant, compiled."""
  config = config_lib.default()
  config.model.name = model
  config.selection.rule = 'mms'
  config.optimizer.weight_decay = 1e-4
  config.devices = 1
  config.update_from_flattened_dict(fields)
  config.steps = 100_000
  schema.validate(config)
  fused = steps.Fused(schema.effective(config), dataset)
  fused.fill_memory()
  return fused


def run(fused: steps.Fused, unscored: bool) -> tuple[float, float]:
  """Seconds of a step, and of these what the beginnings of epochs add."""
  if not unscored:
    return fused.run(STEPS), 0.0
  start, epoch = fused.run_epoch_start()
  step = fused.run(STEPS)
  added = max(0.0, start - fused.count * step) / epoch
  return step + added, added


def time_round(
  compiled: dict[str, steps.Fused],
) -> dict[str, tuple[float, float, float]]:
  """Returns the seconds of a step: a variant's, to begin epochs, plain ones."""
  found = {}
  before, _ = run(compiled['uniform'], True)
  for name, fused in compiled.items():
    step, added = run(fused, name in UNSCORED)
    after, _ = run(compiled['uniform'], True)
    found[name] = step, added, (before + after) / 2
    before = after
  return found


def table(
  rounds: list[dict[str, tuple[float, float, float]]],
  compiled: dict[str, steps.Fused],
) -> list[str]:
  """Markdown rows: time, ratio to uniform, its quartiles, FLOPs."""
  lines = [
    '| variant | ms a step | of these to begin epochs | times uniform | '
    'quartiles | examples scored a step | GFLOP a step |',
    '|---|---|---|---|---|---|---|',
  ]
  for name in compiled:
    found, begins, plain = zip(*(times[name] for times in rounds), strict=True)
    ratios = [x / y for x, y in zip(found, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    added = statistics.median(begins)
    cost = compiled[name].program.cost(0, STEPS)
    lines.append(
      f'| {name} | {1e3 * statistics.median(found):.0f} | '
      f'{f"{1e3 * added:.2f}" if name in UNSCORED else "-"} | {middle:.3f} | '
      f'{low:.3f} to {high:.3f} | {cost.examples_scored / STEPS:.0f} | '
      f'{cost.flops / STEPS / 1e9:.1f} |'
    )
  return lines


def bytes_table(model: str) -> list[str]:
  """Markdown rows: bytes for each training example, and each of the pool."""
  lines = ['| bytes for | state | temporary |', '|---|---|---|']
  for name, fields in UNSCORED.items():
    few, many = (
      make_steps(fields, 'cnn', make_dataset(size)).bytes for size in SIZES
    )
    state, temporary = (
      (many[x] - few[x]) / (SIZES[1] - SIZES[0]) for x in ('state', 'temporary')
    )
    lines.append(
      f'| a training example, {name} | {state:.0f} | {temporary:.0f} |'
    )
  dataset = make_dataset(6400)
  few, many = (
    make_steps({'pool_size': size}, model, dataset).bytes for size in POOLS
  )
  temporary = (many['temporary'] - few['temporary']) / (POOLS[1] - POOLS[0])
  lines.append(f'| a pool example, mms, {model} | 0 | {temporary:,.0f} |')
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
  compiled = {}
  for name, fields in VARIANTS.items():
    compiled[name] = make_steps(fields, args.model, dataset)
    run(compiled[name], name in UNSCORED)  # a program's first steps are slower
    print('compiled', name, flush=True)
  rounds = []
  for number in range(args.rounds):
    rounds.append(time_round(compiled))
    print('round', number + 1, flush=True)
  found = versions()
  device = jax.devices()[0]
  text = [
    '# Cost of selection',
    '',
    f'`python -m benchmarks.selection_cost --model={args.model} '
    f'--rounds={args.rounds}`: {args.model}, b=64, B=640, '
    f'1 x {device.device_kind} ({os.cpu_count()} host cores), '
    f'jax {found["jax"]}, Python {found["python"]}. Medians of '
    f'{args.rounds} rounds of {STEPS} steps, all variants in turns; each '
    'ratio is to the plain steps just before and after. The steps that score '
    'nothing include the start of an epoch, which puts its 50,000 examples in '
    'order.',
    '',
    *table(rounds, compiled),
    '',
    '## Bytes',
    '',
    'The table shows what XLA reserves for a step, from the difference of two '
    'sizes. The state is kept between steps; temporaries last for one step. On '
    'CPUs a pool is scored 32 examples at a time, so a larger pool needs no '
    'more memory.',
    '',
    *bytes_table(args.model),
  ]
  path = pathlib.Path(__file__).with_suffix('.md')
  path.write_text('\n'.join(text) + '\n')
  print('\n'.join(text))


if __name__ == '__main__':
  main()
