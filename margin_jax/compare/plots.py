"""The plots of a comparison: errors, mean MMS, accuracy against cost."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from margin_jax import figures

# What a run wrote at one of its steps, by column.
Row = Mapping[str, Any]
# The rows of every seed of every trial, by the trial's name.
Curves = Mapping[str, Sequence[Sequence[Row]]]

COSTS = {'step': 'steps', 'flops': 'FLOPs', 'seconds': 'seconds of training'}
# Inches and dots per inch: at 800 pixels the letters are 11 pixels high.
WIDTH, DPI = 9.0, 160
COLORS = 10  # of matplotlib's cycle; more lines are dotted


def error(
  path: pathlib.Path,
  test: Curves,
  train: Curves,
  baseline: str,
  split: str = 'test',
) -> None:
  """Plots errors against steps, FLOPs and seconds (ICLR, Figures 2, 4, 5).

  Solid is the error of a split, the mean over the seeds with a band of one
  standard deviation; dashed and thin the error on the batches that were trained
  on, down to a tenth of the least test error. Dotted is where the baseline ends
  (2020, Figure 3).

  Args:
    path: of the PNG file.
    test: have 'step', 'flops', 'seconds' and 'error'.
    train: the same, of the same trials.
    baseline: the name of one of them.
    split: what the first are of: 'test', or 'validation' as in the figures of
      the 2020 paper.
  """
  figure = figures.new(WIDTH, 4.2)
  grid = figure.subplots(1, len(COSTS), sharey=True)
  test_errors, train_errors = [], []
  final = 100 * np.mean([rows[-1]['error'] for rows in test[baseline]])
  for axes, (cost, label) in zip(grid, COSTS.items(), strict=True):
    for index, (name, seeds) in enumerate(test.items()):
      style = _style(index)
      mean = _line(axes, seeds, (cost, 'error'), 100, style, name)
      test_errors += [100 * rows[-1]['error'] for rows in seeds] + list(mean)
      x, y, _ = average(train[name], cost, 'error')
      dashed = style | {'linestyle': '--'}
      axes.plot(x, 100 * y, linewidth=0.8, alpha=0.7, **dashed)
      train_errors += list(100 * y)
    color = _style([*test].index(baseline))['color']
    axes.axhline(final, color=color, linestyle=':', label=f'end of {baseline}')
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    _cost_axis(axes.xaxis, cost)
  least = min((x for x in test_errors if x > 0), default=0.1)
  # Of a fitted training set one decade, so that the test errors have room.
  least = min([x for x in train_errors if x > least / 10] + [least])
  most = max([*test_errors, *train_errors], default=100) or 100
  for axes in grid:
    _percent_axis(axes, least, most)
  grid[0].set_ylabel(f'error, % (— {split}, - - training batches)')
  _legend(figure, grid[0])
  figures.save(figure, path, DPI)


def mean_mms(path: pathlib.Path, train: Curves) -> None:
  """Plots the mean MMS of the ten nearest selected examples (ICLR, Figure 3).

  Args:
    path: of the PNG file.
    train: have 'step' and 'mean_mms'.
  """
  figure = figures.new(WIDTH, 4.6)
  axes = figure.subplots()
  for index, (name, seeds) in enumerate(train.items()):
    _line(axes, seeds, ('step', 'mean_mms'), 1, _style(index), name)
  axes.set_xlabel('step')
  axes.set_xlim(left=0)
  axes.set_ylabel('mean MMS (distance in feature space)')
  axes.grid(alpha=0.3)
  _cost_axis(axes.xaxis, 'step')
  _legend(figure, axes)
  figures.save(figure, path, DPI)


def cost(path: pathlib.Path, trials: Mapping[str, Sequence[Row]]) -> None:
  """Plots final test accuracy against cost, a marker for each trial.

  Args:
    path: of the PNG file.
    trials: the rows of runs.csv, a row for each seed, by the trial's name.
  """
  figure = figures.new(WIDTH, 4.6)
  costs = [name for name in COSTS if name != 'step']
  grid = figure.subplots(1, len(costs), sharey=True)
  for axes, name in zip(grid, costs, strict=True):
    for index, (label, rows) in enumerate(trials.items()):
      x = np.array([row[name] for row in rows])
      y = 100 - 100 * np.array([row['test_error'] for row in rows])
      several = len(rows) > 1
      axes.errorbar(
        x.mean(), y.mean(), label=label, color=f'C{index % COLORS}',
        xerr=x.std(ddof=1) if several else None,
        yerr=y.std(ddof=1) if several else None,
        marker='o' if index < COLORS else 's', linestyle='', capsize=3,
      )  # fmt: skip
    axes.set_xlabel(COSTS[name])
    axes.set_xlim(left=0)
    _cost_axis(axes.xaxis, name)
    axes.grid(alpha=0.3)
  grid[0].set_ylabel('test accuracy after the last step, %')
  _legend(figure, grid[0])
  figures.save(figure, path, DPI)


def average(
  seeds: Sequence[Sequence[Row]], x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Averages a curve over the seeds, at the steps that all of them have.

  Args:
    seeds: the rows of each.
    x: the column of the abscissa.
    y: the column of the ordinate.

  Returns:
    Means of x, means of y, standard deviations of y (0 for a single seed).
  """
  tables = [{row['step']: row for row in rows} for rows in seeds]
  steps = sorted(set.intersection(*({*table} for table in tables)))
  xs = np.array([[table[step][x] for step in steps] for table in tables])
  ys = np.array([[table[step][y] for step in steps] for table in tables])
  several = len(tables) > 1
  deviation = ys.std(0, ddof=1) if several else np.zeros(len(steps))
  return xs.mean(0), ys.mean(0), deviation


def _line(
  axes: Any,
  seeds: Sequence[Sequence[Row]],
  columns: tuple[str, str],
  scale: float,
  style: dict[str, Any],
  label: str,
) -> np.ndarray:
  """Draws the mean with a band of one standard deviation; returns the mean."""
  x, mean, deviation = average(seeds, *columns)
  mean, deviation = scale * mean, scale * deviation
  marker = '.' if len(x) < 20 else None
  axes.plot(x, mean, label=label, marker=marker, linewidth=1.3, **style)
  axes.fill_between(
    x, mean - deviation, mean + deviation,
    color=style['color'], alpha=0.2, linewidth=0,
  )  # fmt: skip
  return mean


def _style(index: int) -> dict[str, Any]:
  return {
    'color': f'C{index % COLORS}',
    'linestyle': '-' if index < COLORS else ':',
  }


def _cost_axis(axis: Any, cost: str) -> None:
  """Labels large counts as 20 k or 3 T; seconds as they are."""
  from matplotlib.ticker import EngFormatter

  plain = cost == 'seconds'
  axis.set_major_formatter('{x:,g}' if plain else EngFormatter())


def _percent_axis(axes: Any, least: float, most: float) -> None:
  """Makes the axis logarithmic, with plain numbers; 0 lies below it."""
  axes.set_yscale('log', nonpositive='clip')
  axes.set_ylim(least / 1.3, min(100, most * 1.3))
  axes.yaxis.set_major_formatter('{x:g}')
  # The labels of nine and ten would touch.
  digits = '25' if most > 10 * least else '2345678'
  axes.yaxis.set_minor_formatter(
    lambda x, _: f'{x:g}' if f'{x:e}'[0] in digits else ''
  )
  axes.tick_params(axis='y', which='minor', labelsize=7)
  axes.grid(alpha=0.3, which='both')


def _legend(figure: Any, axes: Any) -> None:
  """Puts one legend below all axes, in as many columns as fit."""
  handles, labels = axes.get_legend_handles_labels()
  longest = max(map(len, labels))
  columns = max(1, min(len(labels), 100 // (longest + 6)))
  figure.legend(handles, labels, loc='outside lower center', ncols=columns)
