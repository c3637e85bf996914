"""Fine-tuning a small pretrained BERT on GLUE, with and without MMR.

    python -m benchmarks.minilm_weights /tmp/minilm
    python -m benchmarks.glue_minilm --weights=/tmp/minilm --data_dir=DIR

The weights are those of all-MiniLM-L6-v2 (6 layers of 384), the recipe is that
of configs/glue_bert.py. Every task, method and seed is a run of its own, kept
in WORKDIR: started again, the benchmark does what is missing. Writes
benchmarks/glue_minilm.md.
"""

import argparse
import importlib
import pathlib
import statistics

from margin_jax.train import loop

METHODS = ('baseline', 'mmr')
MODEL = 'bert6_384_12'


def train(task: str, method: str, seed: int, args: argparse.Namespace) -> dict:
  """The result of one run, now or before."""
  config = importlib.import_module('configs.glue_bert').get_config(
    f'{task},method={method},epochs={args.epochs},model={MODEL}'
  )
  config.seed = seed
  config.data.data_dir = args.data_dir
  config.model.pretrained = args.weights
  name = f'{task}_{method}_{args.epochs}_{seed}'
  workdir = pathlib.Path(args.workdir) / name
  return loop.train(config, str(workdir), log=lambda line: None)


def cell(values: list[float]) -> str:
  """Mean and standard deviation over the seeds, in percent."""
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{100 * statistics.mean(values):.2f} ± {100 * spread:.2f}'


def row(task: str, method: str, runs: list[dict]) -> str:
  """A line of the table."""
  tests = [run['test'] for run in runs]
  accuracy = cell([test['accuracy'] for test in tests])
  f1 = cell([test['f1'] for test in tests]) if 'f1' in tests[0] else ''
  seconds = statistics.median(run['seconds'] for run in runs)
  return (
    f'| {task} | {method} | {accuracy} | {f1} | {runs[0]["steps"]:,} '
    f'| {runs[0]["flops"] / 1e12:.1f} | {seconds:.0f} |'
  )


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--weights', required=True)
  parser.add_argument('--data_dir')
  parser.add_argument('--tasks', nargs='*', default=['mrpc', 'rte'])
  parser.add_argument('--epochs', type=int, default=3)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--workdir', default='/tmp/glue_minilm')
  args = parser.parse_args()
  results = {}
  for task in args.tasks:
    for seed in range(args.seeds):
      for method in METHODS:
        run = train(task, method, seed, args)
        results.setdefault((task, method), []).append(run)
        seconds = f'{run["seconds"]:.0f} s'
        print(task, method, seed, run['test'], seconds, flush=True)
  first = next(iter(results.values()))[0]
  lines = [
    '# MMR in fine-tuning all-MiniLM-L6-v2',
    '',
    f'`python -m benchmarks.glue_minilm --tasks {" ".join(args.tasks)} '
    f'--epochs={args.epochs} --seeds={args.seeds}`: the recipe of '
    'configs/glue_bert.py with another pretrained BERT. Results on GLUE '
    'validation splits, in percent, mean and standard deviation over the '
    'seeds. Seconds are the median training time.',
    '',
    '| task | method | accuracy | F1 | steps | TFLOP | seconds |',
    '|---|---|---|---|---|---|---|',
    *(row(*key, runs) for key, runs in results.items()),
    '',
    f'{first["devices"]} x {first["device"]}, jax {first["versions"]["jax"]}.',
  ]
  path = pathlib.Path(__file__).with_suffix('.md')
  path.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  main()
