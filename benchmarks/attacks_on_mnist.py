"""MNIST under attack: cross-entropy against the large-margin loss.

    python -m benchmarks.attacks_on_mnist --data_dir=DIR

Writes benchmarks/attacks_on_mnist.md. Each loss trains on 600 images of MNIST
with two seeds, at the learning rate that is best on 500 validation images with
a third. Then FGSM and IFGSM attack 300 test images: on the network itself
(white-box), and on those of both losses with the other seed (black-box). Runs
and accuracies stay in --workdir: stop it, and the same command goes on.
"""

import argparse
import importlib
import json
import pathlib
import statistics

from margin_jax import data, files, register_dataset
from margin_jax.train import loop
from margin_jax.train import runs as runs_lib

LOSSES = ('cross_entropy', 'large_margin')
SEEDS = (0, 1)
RATES = (0.01, 0.003)
TUNING_SEED = 1000
ATTACKS = ('fgsm', 'ifgsm')
EPSILONS = (0.1, 0.2)
# Of the training split, of which a tenth is trained on, and of the test split.
TRAIN, TEST = 6500, 300
ATTACK_STEPS = 5
DATASET = 'mnist_part'


def register(data_dir: str | None) -> None:
  """Registers the first images of both splits."""
  splits, _ = data.tfds_images.load('mnist', data_dir, side=28)
  train, test = (
    (splits[name]['inputs'][:count], splits[name]['label'][:count])
    for name, count in (('train', TRAIN), ('test', TEST))
  )
  register_dataset(DATASET, train=train, test=test)


def run(
  workdir: pathlib.Path,
  loss: str,
  seed: int,
  rate: float,
  args: argparse.Namespace,
  **attack: object,
) -> dict:
  """The result of a run, attacked as `attack` says; trains what is missing."""
  module = importlib.import_module('configs.mnist_large_margin')
  config = module.get_config(f'loss={loss},small=0.1,steps={args.steps}')
  config.seed = seed
  config.data.name = DATASET
  config.data.validation_examples = 500
  config.batch_size = args.batch_size
  config.eval_batch_size = TEST
  config.eval_every = config.checkpoint_every = args.steps
  config.optimizer.learning_rates = (rate, 0.1 * rate)
  config.optimizer.boundaries = (args.steps * 2 // 3,)
  config.attack.update(attack)
  return loop.train(config, str(workdir), log=lambda line: None)


def tune(args: argparse.Namespace) -> dict[str, dict[float, float]]:
  """Validation accuracy of every loss at every learning rate."""
  found = {loss: {} for loss in LOSSES}
  for loss in LOSSES:
    for rate in RATES:
      workdir = pathlib.Path(args.workdir, f'tune_{loss}_{rate:g}')
      result = run(workdir, loss, TUNING_SEED, rate, args)
      found[loss][rate] = result['validation']['accuracy']
      print(loss, rate, found[loss][rate], flush=True)
  return found


def attack_all(
  args: argparse.Namespace, best: dict[str, float]
) -> tuple[dict, dict]:
  """The results of all runs, and the accuracies under all attacks."""
  folder = pathlib.Path(args.workdir)
  runs = {}
  for loss in LOSSES:
    for seed in SEEDS:
      workdir = folder / f'{loss}_{seed}'
      runs[loss, seed] = run(workdir, loss, seed, best[loss], args)
      print(workdir.name, runs[loss, seed]['test']['accuracy'], flush=True)
  path = folder / 'accuracies.json'
  found = json.loads(path.read_text()) if path.exists() else {}
  for loss, seed in runs:
    for source in (None, *LOSSES):
      for name in ATTACKS:
        key = f'{loss} {seed} {source} {name}'
        if key in found:
          continue
        other = None
        if source is not None:
          other = str(folder / f'{source}_{1 - seed}')
        attacked = run(
          folder / f'{loss}_{seed}', loss, seed, best[loss], args,
          name=name, epsilons=EPSILONS, steps=ATTACK_STEPS, source=other,
        )  # fmt: skip
        # Beside those of earlier attacks.
        names = runs_lib.attack_names(attacked['config'])
        found[key] = [attacked['attack'][x]['accuracy'] for x in names]
        files.write_json(path, found)
        print(key, found[key], flush=True)
  return runs, found


def table(
  args: argparse.Namespace, tuned: dict, runs: dict, found: dict
) -> list[str]:
  """Accuracy of both losses under every attack."""
  heads = [f'{name.upper()} {x:g}' for name in ATTACKS for x in EPSILONS]
  lines = [
    '# MNIST under attack',
    '',
    f'`python -m benchmarks.attacks_on_mnist --steps={args.steps} '
    f'--batch_size={args.batch_size}`: configs/mnist_large_margin.py (images '
    "in [0, 1], Glorot's initialization, RMSProp; large_margin: l_inf margins "
    'at the input and after both convolutional blocks) on 600 training images, '
    f'{args.steps:,} steps of {args.batch_size}, with a tenth of the learning '
    'rate for the last third. Accuracy in percent on the first '
    f'{TEST} test images. The attacks may change a pixel, in [0, 1], by 0.1 or '
    f'0.2, and IFGSM makes {ATTACK_STEPS} steps. White-box examples are made '
    'on the network itself, black-box ones on a network that trained with the '
    'other seed, and so on other images. The table shows the mean of seeds 0 '
    'and 1, and the two values.',
    '',
    *rate_lines(tuned),
    '',
    f'| loss | examples made on | clean | {" | ".join(heads)} |',
    '|---|---|---|' + '---|' * len(heads),
  ]
  for loss in LOSSES:
    clean = cell([runs[loss, seed]['test']['accuracy'] for seed in SEEDS])
    for source in (None, *LOSSES):
      place = 'itself' if source is None else f'another, {source}'
      columns = [
        cell([found[f'{loss} {seed} {source} {name}'][i] for seed in SEEDS])
        for name in ATTACKS
        for i in range(len(EPSILONS))
      ]
      lines.append(f'| {loss} | {place} | {clean} | {" | ".join(columns)} |')
  first = runs[LOSSES[0], SEEDS[0]]
  seconds = sum(x['seconds'] for x in runs.values())
  return [
    *lines,
    '',
    f'{first["devices"]} x {first["device"]}, {first["host_cores"]} cores '
    f'shared with other work, jax {first["versions"]["jax"]}; {seconds:.0f} s '
    'of training.',
  ]


def cell(values: list[float]) -> str:
  """'95.1 (94.8, 95.4)', in percent."""
  each = ', '.join(f'{100 * x:.1f}' for x in values)
  return f'{100 * statistics.mean(values):.1f} ({each})'


def rate_lines(tuned: dict[str, dict[float, float]]) -> list[str]:
  """A line for each loss, on the choice of its rate."""
  return [
    f'- Validation accuracy of {loss}, seed {TUNING_SEED}: '
    + ', '.join(f'{100 * x:.1f} at {rate:g}' for rate, x in rates.items())
    + f'; trained at {max(rates, key=rates.get):g}.'
    for loss, rates in tuned.items()
  ]


def main() -> None:
  """Chooses the rates, trains, attacks, and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir')
  parser.add_argument('--workdir', default='/tmp/attacks_on_mnist')
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--batch_size', type=int, default=32)
  args = parser.parse_args()
  register(args.data_dir)
  tuned = tune(args)
  best = {loss: max(rates, key=rates.get) for loss, rates in tuned.items()}
  lines = table(args, tuned, *attack_all(args, best))
  path = pathlib.Path(__file__).with_suffix('.md')
  path.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  main()
