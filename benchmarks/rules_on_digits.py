"""Trains configs/digits.py with every rule and writes a table.

    python -m benchmarks.rules_on_digits

Writes benchmarks/rules_on_digits.md: test accuracy after the config's 1,000
steps, examples scored and FLOPs, over the seeds.
"""

import argparse
import importlib
import pathlib
import statistics
import tempfile

from margin_jax import selection
from margin_jax.config import UNIFORM
from margin_jax.train import loop

RULES = {
  UNIFORM: {},
  **{rule: {} for rule in selection.RULES},
  'loss, ramp=0.1': {'selection.rule': 'loss', 'selection.ramp': 0.1},
  'trimming to 0.2': {'selection.rule': UNIFORM, 'trimming.last': 0.2},
}


def main() -> None:
  """Runs all rules with all seeds."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  config_file = importlib.import_module('configs.digits')
  lines = [
    '# Rules on digits',
    '',
    f'`python -m benchmarks.rules_on_digits --seeds={args.seeds}`: '
    'configs/digits.py (CNN, b=32, B=128, 1,000 steps, MMR) with each rule; '
    'test accuracy on 360 images, mean and range over the seeds.',
    '',
    '| rule | test accuracy | lowest to highest | examples scored | PFLOP |',
    '|---|---|---|---|---|',
  ]
  for name, fields in RULES.items():
    results = []
    for seed in range(args.seeds):
      config = config_file.get_config()
      config.seed = seed
      config.selection.rule = name if not fields else 'loss'
      config.update_from_flattened_dict(fields)
      with tempfile.TemporaryDirectory() as workdir:
        results.append(loop.train(config, workdir, log=lambda line: None))
    accuracy = [result['test']['accuracy'] for result in results]
    lines.append(
      f'| {name} | {statistics.mean(accuracy):.2%} | '
      f'{min(accuracy):.2%} to {max(accuracy):.2%} | '
      f'{results[0]["examples_scored"]:,} | '
      f'{results[0]["flops"] / 1e15:.5f} |'
    )
    print(lines[-1], flush=True)
  first = results[0]
  device = f'{first["devices"]} x {first["device"]}'
  lines += ['', f'{device}, jax {first["versions"]["jax"]}.']
  pathlib.Path(__file__).with_suffix('.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  main()
