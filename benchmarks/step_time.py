"""What a step costs: plain, MMS fused, MMS in two programs, and in PyTorch.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --models resnet20 --torch_python=PYTHON

All of one model in one process tree, in turns, so that whatever else the
machine does hits all of them; medians over the rounds, quartiles beside. On a
GPU the same command measures larger models in bfloat16. PyTorch runs in
processes of its own (benchmarks/torch_steps.py) that sleep while another
measures: as it comes, with pages kept by the allocator as `cpu.tune` keeps
ours, and compiled. --torch_python names a Python that has it, if this one has
not. Prints a table and writes it to benchmarks/step_time_DEVICE.md.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax

from benchmarks import selection_cost, steps
from benchmarks.steps import Run
from margin_jax import cpu
from margin_jax.train import devices as devices_lib
from margin_jax.train.reporting import versions

# Name: b and B.
CPU_MODELS = {
  'resnet20': (64, 640),
  'resnet44': (64, 640),
  'wrn16_4': (16, 160),
  'bert4_256_4': (8, 80),
}
GPU_MODELS = {
  'resnet20': (64, 640),
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
  'plain many': 'plain step, many a call',
  'mms many': 'MMS step, fused, many a call',
}
TORCH = {
  'plain': 'plain step',
  'forward': 'forward on B',
  'mms': 'MMS step',
}


def peak(dtype: str) -> float:
  """FLOP/s of the machine's matrix product, the best of ten."""
  side = 2048 if jax.default_backend() == 'cpu' else 8192
  x = jax.random.normal(jax.random.key(0), (side, side), dtype)
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
    low, middle, high = (1e3 * x for x in statistics.quantiles(values, n=4))
    line = f'| {model} | {NAMES.get(name, name)} | {middle:.4g} | '
    line += f'{low:.4g} to {high:.4g} |'
    if name in flops:
      rate = 1e3 * flops[name] / middle
      line += f' {rate / 1e9:.0f} | {rate / top:.0%} |'
    else:
      line += ' | |'
    lines.append(line)
  return lines


def ratios(model: str, times: dict[str, list[float]]) -> list[str]:
  """What the table is for: medians of the ratios within each round."""

  def ratio(above: Callable, below: Callable, form: str = '.2f') -> str:
    found = [
      above(*x) / below(*x)
      for x in (
        ({k: v[i] for k, v in times.items()},)
        for i in range(len(times['plain']))
      )
    ]
    low, middle, high = statistics.quantiles(found, n=4)
    return f'{middle:{form}} ({low:{form}} to {high:{form}})'

  lines = [
    f'- {model}: MMS step / (forward on B + plain step): '
    + ratio(lambda t: t['mms'], lambda t: t['forward'] + t['plain']),
    f'- {model}: scores, top-k and gather / MMS step: '
    + ratio(lambda t: t['select'], lambda t: t['mms'], '.3%'),
    f'- {model}: two programs / fused: '
    + ratio(lambda t: t['two'], lambda t: t['mms']),
  ]
  for name in times:
    if name.startswith('PyTorch') and not name.endswith(TORCH['forward']):
      kind = next(k for k, v in TORCH.items() if name.endswith(v))
      for ours in (kind, f'{kind} many'):
        if ours in times:
          lines.append(
            f'- {model}: {name} / ours{", many a call" * (ours != kind)}: '
            + ratio(lambda t, n=name: t[n], lambda t, k=ours: t[k])
          )
  return lines


def measure_model(
  model: str, sizes: tuple[int, int], args: argparse.Namespace, top: float
) -> tuple[list[str], list[str], str]:
  """Table rows, ratios and the version of PyTorch."""
  batch, pool_size = sizes
  torch = {}
  if args.torch_python != 'none':  # first: there may be none
    torch = {
      f'PyTorch {variant}': steps.Torch(
        args.torch_python, model, sizes, variant, args.dtype
      )
      for variant in args.torch
    }
  dataset = (
    steps.make_sentences(4 * pool_size)
    if model.startswith('bert')
    else selection_cost.make_dataset(10 * pool_size)
  )

  def make(rule: str, per_call: int | None = 1) -> steps.Fused:
    config = steps.make_config(
      model, batch, pool_size, rule, args.dtype, per_call
    )
    return steps.Fused(config, dataset)

  plain, fused = make('uniform'), make('mms')
  two, forward = steps.in_two_programs(fused)
  runs = {
    'plain': plain.run,
    'forward': forward,
    'select': steps.Selection.of(fused).run,
    'mms': fused.run,
    'two': two,
  }
  if jax.default_backend() != 'cpu':  # as the trainer runs them there
    runs |= {
      f'{kind} many': make(rule, None).run
      for kind, rule in (('plain', 'uniform'), ('mms', 'mms'))
    }
  version = ''
  flops = {'plain': plain.flops, 'mms': fused.flops, 'two': fused.flops}
  flops['forward'] = fused.flops - plain.flops
  flops |= {f'{kind} many': flops[kind] for kind in ('plain', 'mms')}
  for name, process in torch.items():
    for kind, what in TORCH.items():
      runs[f'{name}, {what}'] = process.run(kind)
      flops[f'{name}, {what}'] = flops[kind]
  times = measure(runs, args.rounds)
  for process in torch.values():
    version = process.version
    process.close()
  shown = f'{model}, b={batch}, B={pool_size}'
  return rows(shown, times, flops, top), ratios(model, times), version


def write(
  args: argparse.Namespace,
  top: float,
  torch: str,
  found: list[str],
  compared: list[str],
) -> None:
  """Writes the table and the ratios."""
  device, version = jax.devices()[0], versions()['jax']
  text = [
    '# Step times',
    '',
    f'`python -m benchmarks.step_time --models {" ".join(args.models)} '
    f'--rounds={args.rounds} --dtype={args.dtype} '
    f'--torch {" ".join(repr(x) for x in args.torch)}`: '
    f'1 x {device.device_kind} ({os.cpu_count()} host cores), jax {version}, '
    f'{torch or "no PyTorch"}, {args.dtype}. Medians and quartiles of '
    f'{args.rounds} rounds, all of a model in turns. The matrix product of '
    f'this machine reaches {top / 1e9:.0f} GFLOP/s. '
    "FLOPs are XLA's count, for PyTorch too.",
    '',
    '| model | what | ms | quartiles | GFLOP/s | of the peak |',
    '|---|---|---|---|---|---|',
    *found,
    '',
    *compared,
  ]
  name = f'step_time_{device.platform}_jax{version}.md'
  path = pathlib.Path(args.out or pathlib.Path(__file__).with_name(name))
  path.write_text('\n'.join(text) + '\n')
  print(f'written to {path}')


def main() -> None:
  """Measures one model after the other."""
  cpu.tune()  # as the trainer does, before JAX starts
  devices_lib.use_compilation_cache()
  gpu = jax.default_backend() != 'cpu'
  table = GPU_MODELS if gpu else CPU_MODELS
  parser = argparse.ArgumentParser(description=__doc__)
  known = {**CPU_MODELS, **GPU_MODELS, **table}
  parser.add_argument('--models', nargs='*', choices=[*known], default=[*table])
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--dtype', default='bfloat16' if gpu else 'float32')
  parser.add_argument(
    '--torch_python', default=sys.executable, help='or none, to leave it out'
  )
  parser.add_argument(
    '--torch',
    nargs='*',
    choices=[*steps.VARIANTS],
    default=['as it comes', 'compiled', 'compiled, CUDA graphs']
    if gpu
    else ['as it comes', 'pages kept', 'compiled, pages kept'],
  )
  parser.add_argument('--out', help='default: beside this file')
  args = parser.parse_args()
  if args.rounds < 2:
    parser.error('--rounds must be at least 2')
  top = peak(args.dtype)
  found, compared, torch = [], [], ''
  for model in args.models:
    lines, more, torch = measure_model(model, known[model], args, top)
    found += lines
    compared += more
    print('\n'.join([*lines, *more]), flush=True)
    write(args, top, torch, found, compared)  # what is done is not lost


if __name__ == '__main__':
  main()
