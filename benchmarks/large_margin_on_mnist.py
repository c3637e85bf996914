"""1% of MNIST's labels: cross-entropy against the large-margin loss.

    python -m benchmarks.large_margin_on_mnist --data_dir=DIR

Writes benchmarks/large_margin_on_mnist.md. Each loss trains on 1% of the
training set, 600 images, with every seed; a seed decides the images, the
initial weights and the batches. The learning rates are those that were best on
5,000 validation images, for another sample of 1% of the others:

    python -m benchmarks.large_margin_on_mnist --tune --data_dir=DIR

writes benchmarks/large_margin_on_mnist_rates.md.
"""

import argparse
import functools
import importlib
import pathlib
import statistics
import tempfile

from margin_jax import data
from margin_jax.train import loop

LOSSES = ('cross_entropy', 'large_margin')
RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
EPSILONS = (0.05, 0.1, 0.2)
TUNING_SEED = 1000
# By --tune.
BEST_RATES = {'cross_entropy': 0.1, 'large_margin': 0.003}


def train(
  loss: str, rate: float, seed: int, args: argparse.Namespace, tuning: bool
) -> dict:
  """The result of one run."""
  config = importlib.import_module('configs.mnist_large_margin').get_config(
    f'loss={loss},small=0.01,steps={args.steps}'
  )
  # As measured: before the config had images in [0, 1] and Glorot's kernels.
  config.data.normalization = 'dataset'
  config.model.kernel_init = 'default'
  config.seed = seed
  config.data.data_dir = args.data_dir
  config.batch_size = args.batch_size
  config.optimizer.learning_rates = (rate, 0.1 * rate)
  config.optimizer.boundaries = (args.steps * 2 // 3,)
  config.eval_every = config.checkpoint_every = args.steps
  if tuning:
    config.data.validation_examples = 5000
  else:
    config.attack.name = 'fgsm'
    config.attack.epsilons = EPSILONS
  with tempfile.TemporaryDirectory() as workdir:
    return loop.train(config, workdir, log=lambda line: None)


def cell(values: list[float]) -> str:
  """Mean and standard deviation over the seeds, in percent."""
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{100 * statistics.mean(values):.2f} ± {100 * spread:.2f}'


def main() -> None:
  """Compares the losses, or the learning rates of each."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir')
  parser.add_argument('--tune', action='store_true')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--batch_size', type=int, default=64)
  args = parser.parse_args()
  # Decoding MNIST takes longer than some of the runs.
  data.tfds_images.load = functools.cache(data.tfds_images.load)
  path = pathlib.Path(__file__)
  if args.tune:
    lines = tune(args)
    path = path.with_name(path.stem + '_rates.md')
  else:
    results = {loss: [] for loss in LOSSES}
    for seed in range(args.seeds):
      for loss in LOSSES:
        run = train(loss, BEST_RATES[loss], seed, args, tuning=False)
        results[loss].append(run)
        print(loss, seed, run['test']['accuracy'], flush=True)
    lines = table(args, results)
  path.with_suffix('.md').write_text('\n'.join(lines) + '\n')


def tune(args: argparse.Namespace) -> list[str]:
  """Validation accuracy of every learning rate."""
  lines = [
    '# Learning rates of large_margin_on_mnist',
    '',
    f'`python -m benchmarks.large_margin_on_mnist --tune --steps={args.steps} '
    f'--batch_size={args.batch_size}`: accuracy in percent on 5,000 '
    f'validation images after training on 550, seed {TUNING_SEED}.',
    '',
    '| loss | ' + ' | '.join(f'{rate:g}' for rate in RATES) + ' |',
    '|---|' + '---|' * len(RATES),
  ]
  for loss in LOSSES:
    found = []
    for rate in RATES:
      result = train(loss, rate, TUNING_SEED, args, tuning=True)
      found.append(result['validation']['accuracy'])
      print(loss, rate, found[-1], flush=True)
    cells = ' | '.join(f'{100 * x:.2f}' for x in found)
    lines.append(f'| {loss} | {cells} |')
  return lines


def table(
  args: argparse.Namespace, results: dict[str, list[dict]]
) -> list[str]:
  """Clean and attacked accuracy of both losses."""
  attacks = [f'fgsm {epsilon}' for epsilon in EPSILONS]
  heads = ' | '.join(f'FGSM {epsilon:g}' for epsilon in EPSILONS)
  first = results[LOSSES[0]][0]
  lines = [
    '# Large-margin loss on 1% of MNIST',
    '',
    f'`python -m benchmarks.large_margin_on_mnist --seeds={args.seeds} '
    f'--steps={args.steps} --batch_size={args.batch_size}`: '
    'configs/mnist_large_margin.py:small=0.01 (600 training images, l_inf '
    'margins at the input and after both convolutional blocks, RMSProp), but '
    'with images of mean 0 and variance 1 and LeCun initialization, '
    f'{args.steps:,} steps of {args.batch_size}, with a tenth of the learning '
    'rate for the last third. Accuracy in percent on the 10,000 test images, '
    'clean and under l_inf FGSM with the given epsilon (pixels in [0, 1]); '
    f'mean and standard deviation over {args.seeds} seeds. Seconds are '
    'training time. We chose the rates by validation: '
    'large_margin_on_mnist_rates.md.',
    '',
    f'| loss | rate | clean | {heads} | steps | TFLOP | seconds |',
    '|---|---|---|' + '---|' * len(attacks) + '---|---|---|',
  ]
  for loss, runs in results.items():
    clean = cell([run['test']['accuracy'] for run in runs])
    attacked = ' | '.join(
      cell([run['attack'][name]['accuracy'] for run in runs])
      for name in attacks
    )
    seconds = statistics.median(run['seconds'] for run in runs)
    lines.append(
      f'| {loss} | {BEST_RATES[loss]:g} | {clean} | {attacked} '
      f'| {args.steps:,} | {runs[0]["flops"] / 1e12:.2f} | {seconds:.0f} |'
    )
  device = f'{first["devices"]} x {first["device"]}'
  return [*lines, '', f'{device}, jax {first["versions"]["jax"]}.']


if __name__ == '__main__':
  main()
