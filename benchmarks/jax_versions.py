"""What a step costs with one version of jax and another, and with XLA's flags.

    python -m benchmarks.jax_versions
    python -m benchmarks.jax_versions --pythons PYTHON1 PYTHON2

Plain and MMS steps of ResNet-20, WRN-16-4 and a small BERT on random data, as
the trainer compiles them. Every interpreter and every value of XLA_FLAGS is a
process of its own; they measure in turns, while the others sleep, so that
whatever else the machine does hits all of them. `cpu.tune` adds its flags to
those given. Medians over the rounds, and of the ratios to the first within each
round, with quartiles: of seconds, and of seconds of the processors, which other
programs on the machine change less. Writes benchmarks/jax_versions.md.
"""

import argparse
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

MODELS = ('resnet20', 'wrn16_4', 'bert4_256_4')
KINDS = {'plain': 'uniform', 'mms': 'mms'}
ONEDNN = '--xla_cpu_experimental_onednn_custom_call='
FUSIONS = '--xla_cpu_experimental_ynn_fusion_type='
FLAGS = {
  'as tuned': '',
  'without fused sums': f'{FUSIONS}-reduce',  # `cpu.avoid_wrong_results`
  'without fusions into YNNPACK': FUSIONS,
  'without oneDNN': f'{ONEDNN}false',
}
SECONDS = 0.6  # of a measurement


class Process:
  """An interpreter with flags; answers 'MODEL KIND STEPS'."""

  def __init__(self, python: str, flags: str):
    """Starts it."""
    given = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()
    self.process = subprocess.Popen(
      [python, '-m', 'benchmarks.jax_versions', '--worker'],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      env={**os.environ, 'XLA_FLAGS': given},
    )  # fmt: skip

  def answer(self) -> str:
    """What it says next; first the versions of its Python and jax."""
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit('error: a process stopped, see above')
    return line.strip()

  def ask(self, model: str, kind: str, steps: int) -> None:
    """Lets it begin."""
    self.process.stdin.write(f'{model} {kind} {steps}\n')
    self.process.stdin.flush()

  def times(self) -> tuple[float, float]:
    """Seconds a step, and seconds of the processors."""
    wall, cpu = map(float, self.answer().split())
    return wall, cpu

  def close(self) -> None:
    """Ends it."""
    self.process.stdin.close()
    self.process.wait()


def work() -> None:
  """Answers lines until there are no more."""
  import jax

  from benchmarks import selection_cost, step_time, steps
  from margin_jax import cpu
  from margin_jax.train import devices as devices_lib

  cpu.tune()  # as the trainer does, before JAX starts
  devices_lib.use_compilation_cache()
  print(f'{platform.python_version()}, jax {jax.__version__}', flush=True)
  model, runs = None, {}
  for line in sys.stdin:
    name, kind, count = line.split()
    if name != model:
      model, runs = name, {}
      batch, pool = step_time.CPU_MODELS[model]
      make = steps.make_sentences
      if not model.startswith('bert'):
        make = selection_cost.make_dataset
      dataset = make(4 * pool)
    if kind not in runs:
      config = steps.make_config(
        model, batch, pool, KINDS[kind], 'float32', steps_per_call=1
      )
      runs[kind] = steps.Fused(config, dataset).run
      runs[kind](2)  # warms up
    started = time.process_time()
    seconds = runs[kind](int(count))
    busy = (time.process_time() - started) / int(count)
    print(seconds, busy, flush=True)


def spread(values: list[float], form: str) -> str:
  """The median, and the quartiles in brackets."""
  low, middle, high = statistics.quantiles(values, n=4)
  return f'{middle:{form}} ({low:{form}} to {high:{form}})'


def measure(
  processes: dict[str, Process], model: str, kind: str, rounds: int
) -> list[str]:
  """The lines of a table: every process in turns."""
  for process in processes.values():
    process.ask(model, kind, 1)  # compiles, all at once
  slowest = max(process.times()[0] for process in processes.values())
  count = max(1, round(SECONDS / slowest))
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
  for _ in range(rounds):
    for name, process in processes.items():
      process.ask(model, kind, count)
      times[name].append(process.times())
  first = next(iter(times.values()))
  lines = []
  for name, values in times.items():
    cells = [model, kind, name]
    for ours, its in zip(
      zip(*values, strict=True), zip(*first, strict=True), strict=True
    ):
      cells.append(spread([1e3 * x for x in ours], '.4g'))
      ratios = [x / y for x, y in zip(ours, its, strict=True)]
      cells.append(spread(ratios, '.3f'))
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def main() -> None:
  """Measures, or works for another process."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--worker', action='store_true', help='of this program')
  parser.add_argument('--pythons', nargs='+', default=[sys.executable])
  parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS)
  parser.add_argument('--kinds', nargs='+', choices=[*KINDS], default=[*KINDS])
  parser.add_argument(
    '--flags', nargs='+', choices=[*FLAGS], default=[*FLAGS],
    help='how each interpreter is started; the first is the measure',
  )  # fmt: skip
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--out', help='default: beside this file')
  args = parser.parse_args()
  if args.worker:
    work()
    return
  started = [
    (flags, Process(python, FLAGS[flags]))
    for python in args.pythons
    for flags in args.flags
  ]
  processes = {f'Python {p.answer()}, {flags}': p for flags, p in started}
  text = [
    '# Versions of jax, and flags of XLA',
    '',
    f'`python -m benchmarks.jax_versions`: {os.cpu_count()} cores, float32, '
    f'medians and quartiles of {args.rounds} rounds, in turns. Ratios are to '
    'the first line of each step.',
    '',
    '| model | step | with | ms | ratio | ms of the processors | ratio |',
    '|---|---|---|---|---|---|---|',
  ]
  path = pathlib.Path(args.out or pathlib.Path(__file__).with_suffix('.md'))
  for model in args.models:
    for kind in args.kinds:
      lines = measure(processes, model, kind, args.rounds)
      print('\n'.join(lines), flush=True)
      text += lines
      path.write_text('\n'.join(text) + '\n')  # what is done is not lost
  for process in processes.values():
    process.close()


if __name__ == '__main__':
  main()
