"""Does MMR widen the normalized margin at equal training accuracy?

    python -m benchmarks.mmr_margins_on_cifar10 --data_dir=DIR

Trains a small ResNet on CIFAR-10 with and without MMR, analyzes every run, and
writes benchmarks/mmr_margins_on_cifar10.md, its tables as .csv, and of that
.png and .pdf; --report draws these anew.
"""

import argparse
import csv
import functools
import importlib
import pathlib
import statistics

import numpy as np

from margin_jax import analyze, data, figures, files
from margin_jax.train import loop

METHODS = ('baseline', 'mmr')
END, EQUAL = 'last checkpoint', 'equal accuracy'
TITLES = {END: 'at the last checkpoint', EQUAL: 'at equal training accuracy'}
QUANTITIES = (
  'margin',
  'margin/feature_norm',
  'normalized margin at features',
  'normalized margin at input',
)


def train(method: str, seed: int, args: argparse.Namespace) -> tuple:
  """The result of a run, and the rows of its distributions.csv."""
  config = importlib.import_module('configs.cifar10_resnet44').get_config(
    method
  )
  config.seed = seed
  config.model.name = args.model
  config.data.data_dir = args.data_dir
  config.steps = args.steps
  config.optimizer.learning_rates = (0.1, 0.01)
  config.optimizer.boundaries = (args.steps * 2 // 3,)
  every = args.steps // args.checkpoints
  config.eval_every = config.checkpoint_every = config.keep_every = every
  if method == 'mmr' and args.alpha is not None:
    config.mmr.alpha, config.mmr.alpha_end = args.alpha, None
  workdir = pathlib.Path(args.workdir) / f'{method}_{seed}'
  result = loop.train(config, str(workdir), log=lambda line: None)
  folder = analyze.analyze(
    str(workdir), examples=args.examples, log=lambda line: None
  )
  with (folder / 'distributions.csv').open(newline='') as file:
    return result, list(csv.DictReader(file))


def curve(rows: list[dict], quantity: str) -> tuple[np.ndarray, np.ndarray]:
  """Training accuracy and median of a quantity, over the checkpoints."""
  chosen = [
    (float(row['accuracy']), float(row['q50']))
    for row in rows
    if row['split'] == 'train' and row['quantity'] == quantity
  ]
  accuracy, median = np.array(chosen).T
  return accuracy, median


def at_accuracy(rows: list[dict], quantity: str, accuracy: float) -> float:
  """The median where training accuracy first was `accuracy`, interpolated."""
  x, y = curve(rows, quantity)
  # Only where it rises above all before.
  rises = np.append(True, x[1:] > np.maximum.accumulate(x)[:-1])
  return float(np.interp(accuracy, x[rises], y[rises]))


def cell(mean: float, deviation: float) -> str:
  """Mean and standard deviation over the seeds."""
  return f'{mean:.4f} ± {deviation:.4f}'


def over_seeds(values: list[float]) -> tuple[float, float]:
  """Mean and standard deviation."""
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return statistics.mean(values), deviation


def table(head: str, rows: list[dict]) -> list[str]:
  """A line a method, a column a quantity."""
  lines = [
    f'| {head} | ' + ' | '.join(QUANTITIES) + ' |',
    '|---|' + '---|' * len(QUANTITIES),
  ]
  for method in METHODS:
    cells = (
      cell(row['mean'], row['deviation'])
      for row in rows
      if (row['at'], row['method']) == (head, method)
    )
    lines.append(f'| {method} | ' + ' | '.join(cells) + ' |')
  return lines


def statistics_of(runs: dict[str, list], equal: list[float]) -> list[dict]:
  """A row of the CSV file for each comparison, method and quantity."""
  rows = []
  for at in TITLES:
    for method, found in runs.items():
      for quantity in QUANTITIES:
        values = [
          curve(x, quantity)[1][-1]
          if at == END
          else at_accuracy(x, quantity, equal[seed])
          for seed, (_, x) in enumerate(found)
        ]
        mean, deviation = over_seeds(values)
        rows.append({
          'at': at, 'method': method, 'quantity': quantity,
          'seeds': len(values), 'mean': mean, 'deviation': deviation,
        })  # fmt: skip
  return rows


def draw() -> None:
  """The medians with MMR relative to those without, of the CSV file."""
  path = pathlib.Path(__file__).with_suffix('.csv')
  with path.open(newline='') as file:
    rows = [
      {**row, 'mean': float(row['mean']), 'deviation': float(row['deviation'])}
      for row in csv.DictReader(file)
    ]
  looks = figures.looks(METHODS)
  with figures.drawing(path.with_suffix('.png'), 2.4) as figure:
    grid = figure.subplots(1, len(TITLES), sharey=True, sharex=True)
    for axes, at in zip(grid, TITLES, strict=True):
      found = {(x['method'], x['quantity']): x for x in rows if x['at'] == at}
      for shift, method in zip((-0.13, 0.13), METHODS, strict=True):
        own = [found[method, quantity] for quantity in QUANTITIES]
        of = [found[METHODS[0], quantity]['mean'] for quantity in QUANTITIES]
        axes.errorbar(
          [x['mean'] / y for x, y in zip(own, of, strict=True)],
          [shift + i for i in range(len(QUANTITIES))],
          xerr=[x['deviation'] / y for x, y in zip(own, of, strict=True)],
          label=method, **{**looks[method], 'linestyle': '', 'linewidth': 1.2},
        )  # fmt: skip
      axes.axvline(1, color=figures.BLACK, linewidth=0.7)
      axes.set_title(TITLES[at])
      axes.set_xlabel("relative to the baseline's")
    grid[0].set_yticks(range(len(QUANTITIES)), QUANTITIES)
    grid[0].set_ylim(len(QUANTITIES) - 0.5, -0.5)
    note = f'medians over the training images; {rows[0]["seeds"]} seeds: mean'
    figures.legend(figure, grid[0], f'{note} and standard deviation')


def write(args: argparse.Namespace, runs: dict[str, list]) -> None:
  """The tables."""
  # For each seed the highest training accuracy that both methods reached.
  equal = [
    min(curve(runs[m][seed][1], 'margin')[0].max() for m in METHODS)
    for seed in range(args.seeds)
  ]
  first = runs['mmr'][0][0]
  alpha = first['config']['mmr.alpha'], first['config']['mmr.alpha_end']
  lines = [
    '# MMR and the normalized margin on CIFAR-10',
    '',
    f'`python -m benchmarks.mmr_margins_on_cifar10 --model={args.model} '
    f'--steps={args.steps} --seeds={args.seeds} --examples={args.examples}`'
    ': configs/cifar10_resnet44.py (b=64, crop and flip), learning rate 0.1, '
    'and 0.01 for the last third; MMR with alpha '
    f'{alpha[0]:g} to {alpha[1] or alpha[0]:g}. The table shows medians over '
    f'{args.examples:,} training images: of the signed margin in feature '
    'space; of this margin divided by the largest feature norm, which MMR '
    'widens; and of the margins normalized by total variation (Jiang et al. '
    '2019) at the features and at the input. Mean ± standard deviation over '
    f'{args.seeds} seeds.',
    '',
    'At the end of training:',
    '',
    '| method | training accuracy | test accuracy | steps | TFLOP | seconds |',
    '|---|---|---|---|---|---|',
  ]
  for method, found in runs.items():
    accuracies = [curve(rows, 'margin')[0][-1] for _, rows in found]
    train_accuracy = cell(*over_seeds(accuracies))
    tests = [result['test']['accuracy'] for result, _ in found]
    test = cell(*over_seeds(tests))
    seconds = statistics.median(result['seconds'] for result, _ in found)
    lines.append(
      f'| {method} | {train_accuracy} | {test} | {args.steps:,} | '
      f'{found[0][0]["flops"] / 1e12:.1f} | {seconds:.0f} |'
    )
  rows = statistics_of(runs, equal)
  lines += ['', *table(END, rows)]
  lines += [
    '',
    'At equal training accuracy: for each seed the highest that both reached '
    f'({", ".join(f"{value:.2%}" for value in equal)}; linear between '
    'checkpoints):',
    '',
    *table(EQUAL, rows),
    '',
    f'{first["devices"]} x {first["device"]}, jax {first["versions"]["jax"]}.',
    '',
    '![Margins with MMR relative to those without](mmr_margins_on_cifar10.png)',
  ]
  path = pathlib.Path(__file__)
  path.with_suffix('.md').write_text('\n'.join(lines) + '\n')
  files.write_csv(path.with_suffix('.csv'), [*rows[0]], rows)
  draw()


def main() -> None:
  """Trains and analyzes; finished runs in the workdir are not trained again."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir')
  parser.add_argument('--workdir', default='/tmp/mmr_margins')
  parser.add_argument('--model', default='resnet8')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--checkpoints', type=int, default=5)
  parser.add_argument('--examples', type=int, default=10_000)
  parser.add_argument('--alpha', type=float, help="default: the config's ramp")
  parser.add_argument('--report', action='store_true')
  args = parser.parse_args()
  if args.report:
    draw()
    return
  data.tfds_images.load = functools.cache(data.tfds_images.load)
  runs = {method: [] for method in METHODS}
  for seed in range(args.seeds):
    for method in METHODS:
      runs[method].append(train(method, seed, args))
      result, rows = runs[method][-1]
      print(
        method, seed, result['test']['accuracy'],
        *(round(curve(rows, q)[1][-1], 4) for q in QUANTITIES), flush=True,
      )  # fmt: skip
  write(args, runs)


if __name__ == '__main__':
  main()
