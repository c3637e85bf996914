"""Pictures of a comparison: errors, mean MMS, accuracy against cost."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from margin_jax.analyze import plots
from margin_jax.compare import curves as curves_lib
from margin_jax.compare.curves import Curves

COSTS = {'step': 'steps', 'flops': 'FLOPs', 'seconds': 'seconds of training'}
# Inches and dots per inch: at 800 pixels the letters are 11 pixels high.
WIDTH, DPI = 9.0, 160
COLORS = 10  # of matplotlib's cycle; then the lines are dotted


def _style(index: int) -> dict[str, Any]:
  dashes = '-' if index < COLORS else ':'
  return {'color': f'C{index % COLORS}', 'linestyle': dashes}


def _line(
  axes: Any,
  runs: Sequence[Sequence[Mapping[str, float]]],
  names: tuple[str, str],
  scale: float,
  style: dict[str, Any],
  label: str,
) -> None:
  """The mean over the runs, and a band of one standard deviation."""
  x, mean, deviation = curves_lib.spread(runs, *names)
  mean, deviation = scale * mean, scale * deviation
  marker = '.' if len(x) < 20 else None
  axes.plot(x, mean, label=label, marker=marker, linewidth=1.3, **style)
  axes.fill_between(
    x, mean - deviation, mean + deviation,
    color=style['color'], alpha=0.2, linewidth=0,
  )  # fmt: skip


def _cost_axis(axis: Any, cost: str) -> None:
  """Large counts as 20 k or 3 T; seconds as they are."""
  from matplotlib.ticker import EngFormatter

  plain = cost == 'seconds'
  axis.set_major_formatter('{x:,g}' if plain else EngFormatter())


def _percent_axis(axes: Any, least: float, most: float) -> None:
  """Logarithmic, with plain numbers; what is 0 lies below it."""
  axes.set_yscale('log', nonpositive='clip')
  axes.set_ylim(least / 1.3, min(100, most * 1.3))
  axes.yaxis.set_major_formatter('{x:g}')
  # Nine would touch ten.
  digits = '25' if most > 10 * least else '2345678'
  axes.yaxis.set_minor_formatter(
    lambda x, _: f'{x:g}' if f'{x:e}'[0] in digits else ''
  )
  axes.tick_params(axis='y', which='minor', labelsize=7)
  axes.grid(alpha=0.3, which='both')


def _legend(figure: Any, axes: Any) -> None:
  handles, labels = axes.get_legend_handles_labels()
  longest = max(map(len, labels))
  columns = max(1, min(len(labels), 100 // (longest + 6)))
  figure.legend(handles, labels, loc='outside lower center', ncols=columns)


def error(path: pathlib.Path, runs: Mapping[str, Sequence[Curves]]) -> None:
  """Test error against steps, FLOPs and seconds (ICLR, Figures 2, 4, 5).

  Means over the seeds, with a band of one standard deviation; dashed and thin,
  the error on the batches that were trained on, down to a tenth of the least
  test error.

  Args:
    path: of the PNG file.
    runs: of every entry, by its name.
  """
  figure = plots.figure(WIDTH, 4.2)
  grid = figure.subplots(1, len(COSTS), sharey=True)
  means, trained = [], []
  for axes, (cost, label) in zip(grid, COSTS.items(), strict=True):
    for index, (name, seeds) in enumerate(runs.items()):
      style = _style(index)
      test = [run.test for run in seeds]
      _line(axes, test, (cost, 'error'), 100, style, name)
      means += [100 * run[-1]['error'] for run in test]
      means += list(100 * curves_lib.spread(test, cost, 'error')[1])
      x, y, _ = curves_lib.spread([r.train for r in seeds], cost, 'error')
      dashed = style | {'linestyle': '--'}
      axes.plot(x, 100 * y, linewidth=0.8, alpha=0.7, **dashed)
      trained += list(100 * y)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    _cost_axis(axes.xaxis, cost)
  least = min((x for x in means if x > 0), default=0.1)
  # Of a fitted training set one decade, so that the test errors have room.
  least = min([x for x in trained if x > least / 10] + [least])
  most = max([*means, *trained], default=100) or 100
  for axes in grid:
    _percent_axis(axes, least, most)
  grid[0].set_ylabel('error, % (— test, - - training batches)')
  _legend(figure, grid[0])
  plots.save(figure, path, DPI)


def mean_mms(path: pathlib.Path, runs: Mapping[str, Sequence[Curves]]) -> None:
  """Mean MMS of the ten nearest selected examples, by step (ICLR, Figure 3)."""
  figure = plots.figure(WIDTH, 4.6)
  axes = figure.subplots()
  for index, (name, seeds) in enumerate(runs.items()):
    rows = [run.train for run in seeds]
    _line(axes, rows, ('step', 'mean_mms'), 1, _style(index), name)
  axes.set_xlabel('step')
  axes.set_xlim(left=0)
  axes.set_ylabel('mean MMS (distance in feature space)')
  axes.grid(alpha=0.3)
  _cost_axis(axes.xaxis, 'step')
  _legend(figure, axes)
  plots.save(figure, path, DPI)


def cost(
  path: pathlib.Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
  """Final test accuracy against what it cost, a point an entry.

  Args:
    path: of the PNG file.
    rows: of every entry, by its name, the rows of runs.csv.
  """
  figure = plots.figure(WIDTH, 4.6)
  names = [name for name in COSTS if name != 'step']
  grid = figure.subplots(1, len(names), sharey=True)
  for axes, name in zip(grid, names, strict=True):
    for index, (label, found) in enumerate(rows.items()):
      x = np.array([row[name] for row in found])
      y = 100 - 100 * np.array([row['test_error'] for row in found])
      several = len(found) > 1
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
  plots.save(figure, path, DPI)
