"""The plots of a comparison: errors, mean MMS, accuracy against cost.

A line is the mean over the seeds, and its band spans the lowest to the highest
seed. With few seeds, a standard deviation would claim more than we know, and
reach below 0.
"""

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
# The fraction of a run, its first, whose errors do not widen the axis.
BEGINNING = 0.2
MMS_NOTE = (
  'Mean over the ten examples of the training batch that are nearest to a '
  'boundary. Rules that select such\nexamples are lower by design: the curves '
  "show what was selected, and do not compare the networks' margins. A proxy "
  'scores in a feature space of its own.'
)
# Which forward mean MMS is by, by column.
FORWARDS = {'mean_mms': 'training', 'mean_mms_scoring': 'scoring'}


def error(
  path: pathlib.Path,
  test: Curves,
  train: Curves,
  baseline: str,
  split: str = 'test',
) -> None:
  """Plots errors against steps, FLOPs and seconds (ICLR, Figures 2, 4, 5).

  Above, the error of a split. Its axis has room for what comes after the first
  fifth of every run, and says what lies above it. Dotted is where the baseline
  ends (2020, Figure 3). Below, the error of the batches that were trained on,
  and every seed's error of the split at the end.

  Args:
    path: the PNG file; a PDF file is beside it.
    test: have 'step', 'flops', 'seconds' and 'error'.
    train: the same, of the same trials.
    baseline: the name of one of them.
    split: what the first are of: 'test', or 'validation' as in the figures of
      the 2020 paper.
  """
  looks = figures.looks([*test])
  final = 100 * np.mean([rows[-1]['error'] for rows in test[baseline]])
  dotted = {
    'color': looks[baseline]['color'], 'linestyle': ':', 'linewidth': 1.2,
    'label': f'end of {baseline}',
  }  # fmt: skip
  below = 1.2 + 0.13 * max(len(test) - 5, 0)
  with figures.drawing(path, 2.9 + below) as figure:
    above, under = figure.subfigures(2, 1, height_ratios=(2.2, below))
    averages = [average(x, 'step', 'error') for x in test.values()]
    limits = _limits(averages, BEGINNING, final)
    grid = above.subplots(1, len(COSTS), sharey=True)
    for axes, cost in zip(grid, COSTS, strict=True):
      _error_lines(axes, test, looks, cost, limits)
      axes.axhline(max(final, limits[0]), **dotted)
    grid[0].set_ylabel(f'{split} error, %')

    batches, ends = under.subplots(1, 2, width_ratios=(1, 1.6))
    limits = _limits([average(x, 'step', 'error') for x in train.values()], 0)
    thin = {
      name: {**look, 'linewidth': 0.6 * look['linewidth'], 'marker': ''}
      for name, look in looks.items()
    }
    _error_lines(batches, train, thin, 'step', limits, bands=False)
    batches.set_ylabel('error of the\ntraining batches, %')
    _ends(ends, test, looks)
    ends.axvline(final, **dotted)
    figures.legend(figure, grid[0], _note(test))


def _limits(
  curves: Sequence[tuple[np.ndarray, ...]],
  beginning: float,
  *others: float,
) -> tuple[float, float]:
  """Returns where a logarithmic axis begins and ends, in percent.

  Errors of 0 have no place on it, and those of the beginning of a run may lie
  outside. Those of steps that were all skipped are NaN.

  Args:
    curves: steps; means, minima and maxima of errors.
    beginning: the fraction of a run that may lie outside.
    *others: other errors, in percent, that have a place.
  """
  later = [
    100 * np.stack(errors)[:, x >= beginning * x[-1]].ravel()
    for x, *errors in curves
  ]
  values = np.concatenate([*later, np.array(others)])
  values = values[np.isfinite(values) & (values > 0)]
  least = float(values.min()) if values.size else 0.1
  most = max(float(values.max(initial=0)), 1.5 * least)
  return least / 1.15, min(1.15 * most, max(100, most))


def _error_lines(
  axes: Any,
  curves: Curves,
  looks: Mapping[str, dict[str, Any]],
  cost: str,
  limits: tuple[float, float],
  bands: bool = True,
) -> None:
  """Draws errors on a logarithmic axis, and says what does not fit on it."""
  low, high = limits
  axes.set_yscale('log')
  axes.set_ylim(low, high)
  figures.log_ticks(axes.yaxis, low, high)
  found = []
  for index, (name, seeds) in enumerate(curves.items()):
    x, *values = average(seeds, cost, 'error')
    found.append(100 * np.concatenate(values))
    values = tuple(np.maximum(100 * y, low) for y in values)
    place = index, len(curves)
    figures.curve(axes, x, values, place, looks[name], name, bands)
  _cost_axis(axes, cost)
  values = np.concatenate(found)
  above, below = values[values > high], values[(values > 0) & (values < low)]
  notes = [f'at first up to {above.max():.3g}%'] if above.size else []
  notes += [f'at first down to {below.min():.3g}%'] if below.size else []
  notes += ['0% is at the lower edge'] if (values == 0).any() else []
  axes.annotate(
    '\n'.join(notes), (0.98, 0.98), xycoords='axes fraction', ha='right',
    va='top',
  )  # fmt: skip


def _ends(
  axes: Any, curves: Curves, looks: Mapping[str, dict[str, Any]]
) -> None:
  """Draws the last error of every seed, a row for each method."""
  for row, (name, seeds) in enumerate(curves.items()):
    errors = [100 * rows[-1]['error'] for rows in seeds]
    color, marker = looks[name]['color'], looks[name]['marker']
    axes.plot(
      errors, [row] * len(errors), marker, color=color, markersize=5,
      markerfacecolor='none', clip_on=False,
    )  # fmt: skip
    axes.plot(
      np.mean(errors), row, '|', color=color, markersize=9, markeredgewidth=2,
    )  # fmt: skip
  axes.set_yticks(range(len(curves)), [*curves])
  axes.set_ylim(len(curves) - 0.5, -0.5)
  axes.grid(visible=False, axis='y')
  axes.set_xlabel('error at the end, % (every seed; | their mean)')


def mean_mms(path: pathlib.Path, train: Curves) -> None:
  """Plots mean MMS, of the ten nearest examples of the batch (ICLR, Figure 3).

  By the training forward, which every method has; and beside it, where methods
  score pools, by the scoring forward, as the authors' code traces it.

  Args:
    path: the PNG file; a PDF file is beside it.
    train: have 'step' and 'mean_mms', and 'mean_mms_scoring' where pools were
      scored.
  """
  looks = figures.looks([*train])
  panels = {column: _with_column(train, column) for column in FORWARDS}
  panels = {column: curves for column, curves in panels.items() if curves}
  with figures.drawing(path, 3.6) as figure:
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (column, curves) in zip(grid, panels.items(), strict=True):
      for index, (name, seeds) in enumerate(curves.items()):
        x, *values = average(seeds, 'step', column)
        place = index, len(curves)
        figures.curve(axes, x, tuple(values), place, looks[name], name)
      _cost_axis(axes, 'step')
      axes.set_title(f'by the {FORWARDS[column]} forward')
    grid[0].set_ylabel('mean MMS (distance in feature space)')
    figure.suptitle(MMS_NOTE, x=0, horizontalalignment='left')
    figures.legend(figure, grid[0], _note(train))


def _with_column(curves: Curves, column: str) -> Curves:
  """Returns the rows that have a column, of the trials that all have some."""
  found = {
    name: [[row for row in rows if column in row] for rows in seeds]
    for name, seeds in curves.items()
  }
  return {name: seeds for name, seeds in found.items() if all(seeds)}


def cost(path: pathlib.Path, trials: Mapping[str, Sequence[Row]]) -> None:
  """Plots final test accuracy against cost, a marker for each trial.

  Args:
    path: the PNG file; a PDF file is beside it.
    trials: the rows of runs.csv, a row for each seed, by the trial's name.
  """
  looks = figures.looks([*trials])
  costs = [name for name in COSTS if name != 'step']
  with figures.drawing(path, 3.2) as figure:
    grid = figure.subplots(1, len(costs), sharey=True)
    for axes, name in zip(grid, costs, strict=True):
      for label, rows in trials.items():
        x = np.array([row[name] for row in rows])
        y = 100 - 100 * np.array([row['test_error'] for row in rows])
        look = {**looks[label], 'linestyle': ''}
        width = look.pop('linewidth')
        axes.errorbar(
          x.mean(), y.mean(), label=label, elinewidth=width, capsize=2 * width,
          xerr=_reach(x), yerr=_reach(y), **look,
        )  # fmt: skip
      _cost_axis(axes, name)
    grid[0].set_ylabel('test accuracy after the last step, %')
    seeds = [len(rows) for rows in trials.values()]
    note = figures.seeds_note(seeds).replace('line', 'marker')
    figures.legend(figure, grid[0], note.replace('band', 'bars'))


def _reach(values: np.ndarray) -> np.ndarray:
  """Returns how far values reach below and above their mean, (2, 1)."""
  mean = values.mean()
  # The mean of equal values may differ from them in the last bit.
  return np.maximum([[mean - values.min()], [values.max() - mean]], 0)


def average(
  seeds: Sequence[Sequence[Row]], x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Averages a curve over the seeds, at the steps that all of them have.

  Args:
    seeds: the rows of each.
    x: the column of the abscissa.
    y: the column of the ordinate.

  Returns:
    Means of x; means, minima and maxima of y.
  """
  tables = [{row['step']: row for row in rows} for rows in seeds]
  steps = sorted(set.intersection(*({*table} for table in tables)))
  xs = np.array([[table[step][x] for step in steps] for table in tables])
  ys = np.array([[table[step][y] for step in steps] for table in tables])
  return xs.mean(0), ys.mean(0), ys.min(0), ys.max(0)


def _note(curves: Curves) -> str:
  return figures.seeds_note([len(seeds) for seeds in curves.values()])


def _cost_axis(axes: Any, cost: str) -> None:
  """Labels large counts as 20k or 3T; seconds as they are."""
  from matplotlib.ticker import MaxNLocator

  axes.set_xlabel(COSTS[cost])
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
  if cost == 'seconds':
    axes.xaxis.set_major_formatter('{x:,g}')
  else:
    figures.count_axis(axes.xaxis)
