"""What a step costs: plain, MMS fused, MMS in two programs, and in PyTorch.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --models=resnet20 --torch_python=PYTHON

All of one model in one process tree, in turns, so that whatever else the
machine does hits all of them; medians over the rounds, quartiles beside. On a
GPU the same command measures larger models in bfloat16. PyTorch runs in a
process of its own (benchmarks/torch_steps.py) that sleeps while JAX measures;
--torch_python names a Python that has it, if this one has not. Prints a table
and writes it to benchmarks/step_time_DEVICE.md.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import selection_cost, steps
from benchmarks.steps import Run
from margin_jax import cpu
from margin_jax.reporting import versions

# Name: b and B.
CPU_MODELS = {
  'resnet20': (64, 640),
  'resnet44': (64, 640),
  'wrn16_4': (16, 160),
  'bert4_256_4': (8, 80),
}
GPU_MODELS = {
  'resnet44': (64, 640),
  'wrn28_10': (64, 640),
  'bert_base': (32, 320),
}
NAMES = {
  'plain': 'plain step',
  'forward': 'forward on B',
  'select': 'scores, top-k and gather alone',
  'mms': 'MMS step, fused',
  'two': 'MMS step, two programs and the host between them',
  'torch plain': 'PyTorch, plain step',
  'torch forward': 'PyTorch, forward on B',
  'torch mms': 'PyTorch, MMS step',
}


def peak(dtype: str) -> float:
  """FLOP/s of the machine's matrix product, the best of ten."""
  side = 2048 if jax.default_backend() == 'cpu' else 8192
  x = jnp.ones((side, side), dtype)
  product = jax.jit(lambda x: x @ x)
  best = float('inf')
  for _ in range(11):
    started = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - started)
  return 2 * side**3 / best


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
  """Seconds a step of every run, in turns; so many steps that they count."""
  counts = {}
  for name, run in runs.items():
    run(2)  # compiles what is left, and warms up
    counts[name] = max(1, min(50, round(1.0 / run(2))))
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      times[name].append(run(counts[name]))
  return times


def rows(
  model: str, times: dict[str, list[float]], flops: dict[str, float], top: float
) -> list[str]:
  """The model's part of the table."""
  lines = []
  for name, values in times.items():
    low, middle, high = statistics.quantiles(values, n=4)
    line = f'| {model} | {NAMES[name]} | {1e3 * middle:.1f} | '
    line += f'{1e3 * low:.1f} to {1e3 * high:.1f} |'
    if name in flops:
      rate = flops[name] / middle
      line += f' {rate / 1e9:.0f} | {rate / top:.0%} |'
    else:
      line += ' | |'
    lines.append(line)
  return lines


def ratios(model: str, times: dict[str, list[float]]) -> list[str]:
  """What the table is for: medians of the ratios within each round."""

  def ratio(above: Callable, below: Callable) -> str:
    found = [
      above(*x) / below(*x)
      for x in (
        ({k: v[i] for k, v in times.items()},)
        for i in range(len(times['plain']))
      )
    ]
    low, middle, high = statistics.quantiles(found, n=4)
    return f'{middle:.2f} ({low:.2f} to {high:.2f})'

  lines = [
    f'- {model}: MMS step / (forward on B + plain step): '
    + ratio(lambda t: t['mms'], lambda t: t['forward'] + t['plain']),
    f'- {model}: scores, top-k and gather / MMS step: '
    + ratio(lambda t: t['select'], lambda t: t['mms']),
    f'- {model}: two programs / fused: '
    + ratio(lambda t: t['two'], lambda t: t['mms']),
  ]
  for kind in ('plain', 'mms'):
    if f'torch {kind}' in times:
      lines.append(
        f'- {model}: PyTorch / ours, {kind} step: '
        + ratio(lambda t, k=kind: t[f'torch {k}'], lambda t, k=kind: t[k])
      )
  return lines


def measure_model(
  model: str, sizes: tuple[int, int], args: argparse.Namespace, top: float
) -> tuple[list[str], list[str], str]:
  """Table rows, ratios and the version of PyTorch."""
  batch, pool_size = sizes
  torch = None
  if args.torch_python != 'none':  # first: there may be none
    more = ['--compile'] if args.torch_compile else []
    torch = steps.Torch(args.torch_python, model, sizes, *more)
  source = (
    steps.make_sentences(4 * pool_size)
    if model.startswith('bert')
    else selection_cost.make_source(10 * pool_size)
  )
  plain, fused = (
    steps.Fused(
      steps.make_config(model, batch, pool_size, rule, args.dtype), source
    )
    for rule in ('uniform', 'mms')
  )
  two, forward = steps.in_two_programs(fused)
  names = ('plain', 'forward', 'mms')
  runs = {
    'plain': plain.run,
    'forward': forward,
    'select': steps.selection_alone(fused),
    'mms': fused.run,
    'two': two,
  }
  if torch is not None:
    runs |= {f'torch {kind}': torch.run(kind) for kind in names}
  times = measure(runs, args.rounds)
  flops = {'plain': plain.flops, 'mms': fused.flops, 'two': fused.flops}
  flops['forward'] = fused.flops - plain.flops
  flops |= {f'torch {k}': flops[k] for k in names}
  version = ''
  if torch is not None:
    version = torch.version
    torch.close()
  return rows(model, times, flops, top), ratios(model, times), version


def write(
  args: argparse.Namespace,
  top: float,
  torch: str,
  found: list[str],
  compared: list[str],
) -> None:
  """Writes the table and the ratios."""
  device, version = jax.devices()[0], versions()['jax']
  compiled = '_compiled' if args.torch_compile else ''
  text = [
    '# Step times',
    '',
    f'`python -m benchmarks.step_time --models {" ".join(args.models)} '
    f'--rounds={args.rounds} --dtype={args.dtype}'
    f'{" --torch_compile" if compiled else ""}`: '
    f'1 x {device.device_kind} ({os.cpu_count()} host cores), jax {version}, '
    f'{torch or "no PyTorch"}, {args.dtype}. Medians and quartiles of '
    f'{args.rounds} rounds, all of a model in turns. The matrix product of '
    f'this machine reaches {top / 1e9:.0f} GFLOP/s. '
    "FLOPs are XLA's count, for PyTorch too, whose allocator keeps its pages "
    'as ours does.',
    '',
    '| model | what | ms | quartiles | GFLOP/s | of the peak |',
    '|---|---|---|---|---|---|',
    *found,
    '',
    *compared,
  ]
  name = f'step_time_{device.platform}_jax{version}{compiled}.md'
  path = pathlib.Path(args.out or pathlib.Path(__file__).with_name(name))
  path.write_text('\n'.join(text) + '\n')
  print(f'written to {path}')


def main() -> None:
  """Measures one model after the other."""
  cpu.tune()  # as the trainer does, before JAX starts
  gpu = jax.default_backend() != 'cpu'
  table = GPU_MODELS if gpu else CPU_MODELS
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--models', nargs='*', default=[*table])
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--dtype', default='bfloat16' if gpu else 'float32')
  parser.add_argument(
    '--torch_python', default=sys.executable, help='or none, to leave it out'
  )
  parser.add_argument('--torch_compile', action='store_true')
  parser.add_argument('--out', help='default: beside this file')
  args = parser.parse_args()
  if args.rounds < 2:
    parser.error('--rounds must be at least 2')
  top = peak(args.dtype)
  found, compared, torch = [], [], ''
  for model in args.models:
    sizes = {**CPU_MODELS, **GPU_MODELS, **table}[model]
    lines, more, torch = measure_model(model, sizes, args, top)
    found += lines
    compared += more
    print('\n'.join([*lines, *more]), flush=True)
  write(args, top, torch, found, compared)


if __name__ == '__main__':
  main()
