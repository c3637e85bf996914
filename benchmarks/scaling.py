"""What grows with the pool, the classes and the features, and how.

    python -m benchmarks.scaling

Choosing by itself (scores, top-k and gather, from logits that are there) for
pools, classes and features of several sizes: time, and the memory beside
arguments and result. Then whole MMS steps of ResNet-20 as the pool grows: time,
memory, and the part of a step that Python spends on the data, which is on the
device. Writes benchmarks/scaling_DEVICE.md.
"""

import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks import selection_cost, step_time, steps
from margin_jax import cpu
from margin_jax.train import devices as devices_lib
from margin_jax.train.reporting import versions

BATCH = 64
# B, C, D: each grows while the others stay.
SIZES = (
  *((pool, 10, 64) for pool in (160, 640, 2560, 10240)),
  *((640, classes, 512) for classes in (10, 100, 1000, 21841)),
  *((640, 1000, features) for features in (64, 512, 2048)),
)
POOLS = (128, 320, 640, 1280, 2560)
ROUNDS = 7


def timed(run: steps.Run) -> float:
  """Median seconds of a step."""
  run(2)
  count = max(1, round(0.2 / run(2)))
  return statistics.median(run(count) for _ in range(ROUNDS))


def selection_rows() -> list[str]:
  """One row for each of `SIZES`."""
  lines = [
    '| B | C | D | ms | temporary MB | logits, MB | B x C x D, MB |',
    '|---|---|---|---|---|---|---|',
  ]
  for examples, classes, features in SIZES:
    pool = {
      'inputs': jnp.zeros((examples, 32, 32, 3), jnp.uint8),
      'label': jnp.zeros(examples, jnp.int32),
    }
    sizes = (examples, classes, features)
    one = steps.Selection(sizes, BATCH, pool)
    logits = 4e-6 * examples * classes
    lines.append(
      f'| {examples} | {classes} | {features} '
      f'| {1e3 * timed(one.run):.3f} '
      f'| {one.temporary_bytes / 1e6:.3f} | {logits:.3f} '
      f'| {logits * features:,.0f} |'
    )
    print(lines[-1], flush=True)
  return lines


def waited(fused: steps.Fused) -> float:
  """Seconds a step that Python spends on the data of a call."""
  calls = 1000
  started = time.perf_counter()
  for call in range(calls):
    fused.loader(call * fused.count)
  return (time.perf_counter() - started) / (calls * fused.count)


def step_rows() -> list[str]:
  """One row for each of `POOLS`."""
  lines = [
    '| B | ms | ms an example scored | temporary MB | data, of the step |',
    '|---|---|---|---|---|',
  ]
  dataset = selection_cost.make_dataset(6400)
  fused = {}
  for size in (None, *POOLS):
    rule = 'uniform' if size is None else 'mms'
    config = steps.make_config(
      'resnet20', BATCH, size or BATCH, rule, 'float32'
    )
    fused[size] = steps.Fused(config, dataset)
  times = step_time.measure({k: one.run for k, one in fused.items()}, ROUNDS)
  for size, one in fused.items():
    seconds = statistics.median(times[size])
    more = statistics.median(
      x - y for x, y in zip(times[size], times[None], strict=True)
    )
    scoring = f'{1e3 * more / size:.3g}' if size else ''
    memory = one.program.programs[0].lowered.compile().memory_analysis()
    lines.append(
      f'| {size or "plain"} | {1e3 * seconds:.3g} | {scoring} '
      f'| {memory.temp_size_in_bytes / 1e6:.1f} '
      f'| {waited(one) / seconds:.4%} |'
    )
    print(lines[-1], flush=True)
  return lines


def main() -> None:
  """Measures both."""
  cpu.tune()  # as the trainer does, before JAX starts
  devices_lib.use_compilation_cache()
  device = jax.devices()[0]
  text = [
    '# What grows with what',
    '',
    f'`python -m benchmarks.scaling`: 1 x {device.device_kind} '
    f'({os.cpu_count()} host cores), jax {versions()["jax"]}, float32, b=64. '
    f'Medians of {ROUNDS} rounds. Temporary memory is what XLA plans for '
    'in addition to arguments and results.',
    '',
    'Scores, top-k and gather, from given logits. The pool has images of '
    "CIFAR's size.",
    '',
    *selection_rows(),
    '',
    'Steps of ResNet-20 as the pool grows. The cost of a scored example is the '
    'median over the rounds of the time beyond the plain step of the same '
    'round, divided by B.',
    '',
    *step_rows(),
  ]
  path = pathlib.Path(__file__).with_name(f'scaling_{device.platform}.md')
  path.write_text('\n'.join(text) + '\n')


if __name__ == '__main__':
  main()
