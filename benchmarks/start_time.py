"""From the command to the first step, without and with a compilation cache.

    python -m benchmarks.start_time --data_dir=DIR

ResNet-44 on CIFAR-10 with MMS, as users start it: a new process each time,
first with an empty compilation cache, then with the one that it left. On CPU
also without oneDNN, whose convolutions cannot be kept there. Stops each once it
says that the first step is done. Writes benchmarks/start_time.md.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from margin_jax.train.reporting import versions

CONFIG = 'configs/cifar10_resnet44.py:mms'
OFF = {'XLA_FLAGS': '--xla_cpu_experimental_onednn_custom_call=false'}


def start(
  folder: str, cache: str, data_dir: str, flags: dict[str, str]
) -> tuple[float, float]:
  """Seconds to the end of the first step, and those spent on compiling it."""
  command = [
    sys.executable, '-m', 'margin_jax.train', f'--config={CONFIG}',
    '--config.log_every=1', f'--config.data.data_dir={data_dir}',
    f'--workdir={folder}',
  ]  # fmt: skip
  started = time.perf_counter()
  compiled = None
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True,
    env={
      **os.environ,
      **flags,
      'JAX_COMPILATION_CACHE_DIR': cache,
      'PYTHONUNBUFFERED': '1',
    },
  ) as process:  # fmt: skip
    for line in process.stdout:
      if found := re.search(r'compiled in ([\d.]+) s', line):
        compiled = float(found[1])
      if compiled is not None and re.match(r'step +1\b', line):
        seconds = time.perf_counter() - started
        process.kill()
        return seconds, compiled
  raise SystemExit('error: the run ended before its first step')


def main() -> None:
  """Starts it in turns, each pair with a cache of its own."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  variants = {'': {}}
  if jax.default_backend() == 'cpu' and jax.__version_info__ >= (0, 11):
    variants[', without oneDNN'] = OFF
  found = {f'{x}{name}': [] for name in variants for x in ('empty', 'warm')}
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as folder:
      for name in found:
        flags = variants[name.removeprefix('empty').removeprefix('warm')]
        times = start(
          f'{folder}/{name}', f'{folder}/cache', args.data_dir, flags
        )
        found[name].append(times)
        print(name, times, flush=True)
  device = jax.devices()[0]
  text = [
    '# Time to the first step',
    '',
    f'`python -m benchmarks.start_time --data_dir=DIR --rounds={args.rounds}`: '
    f'{CONFIG}, 1 x {device.device_kind} ({os.cpu_count()} host cores), '
    f'jax {versions()["jax"]}. Medians of {args.rounds} starts, each in a '
    'new process, including imports, reading the data and initialization.',
    '',
    '| compilation cache | seconds to the end of step 1 | of these, compiling '
    'the step |',
    '|---|---|---|',
    *(
      f'| {name} | {statistics.median(s for s, _ in times):.1f} '
      f'| {statistics.median(c for _, c in times):.1f} |'
      for name, times in found.items()
    ),
  ]
  path = pathlib.Path(__file__).with_suffix('.md')
  path.write_text('\n'.join(text) + '\n')


if __name__ == '__main__':
  main()
