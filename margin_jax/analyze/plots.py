"""Pictures, with matplotlib and without a display."""

import pathlib
from typing import Any

import numpy as np

from margin_jax import files

# Pairs of columns of distributions.csv, the widest band first.
BANDS = (('q1', 'q99'), ('q5', 'q95'), ('q25', 'q75'))
BINS = 80
# The histogram leaves out the tails, which would flatten the rest.
SHOWN = (0.005, 0.995)


def figure(width: float, height: float) -> Any:
  """A matplotlib figure of so many inches."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # Not pyplot: it would look for a display, and keep the figure.
  made = Figure((width, height), layout='constrained')
  FigureCanvasAgg(made)
  return made


def save(made: Any, path: pathlib.Path, dpi: int) -> None:
  """Writes the figure as PNG, whole or not at all."""
  with files.whole(path) as aside:
    made.savefig(aside, format='png', dpi=dpi)


def _bands(axes: Any, rows: list[dict[str, Any]], color: str) -> None:
  """Quantile bands and the median of a quantity over the checkpoints."""
  rows = [row for row in rows if np.isfinite(row['q50'])]
  steps = [row['step'] for row in rows]
  for low, high in BANDS:
    axes.fill_between(
      steps,
      [row[low] for row in rows],
      [row[high] for row in rows],
      color=color,
      alpha=0.2,
      linewidth=0,
    )
  axes.plot(steps, [row['q50'] for row in rows], color=color, marker='.')
  axes.axhline(0, color='black', linewidth=0.5)


def _histogram(axes: Any, splits: dict[str, np.ndarray]) -> None:
  """The distribution at the last checkpoint, a line a split."""
  finite = {k: v[np.isfinite(v)] for k, v in splits.items()}
  values = np.concatenate([*finite.values()])
  if not values.size:
    return
  low, high = np.quantile(values, SHOWN)
  if low == high:
    low, high = low - 0.5, high + 0.5
  for index, (split, x) in enumerate(finite.items()):
    shown = x[(x >= low) & (x <= high)]
    if shown.size:  # a density of nothing is a division by zero
      axes.hist(
        shown, bins=BINS, range=(low, high), density=True, histtype='step',
        color=f'C{index}', label=split,
      )  # fmt: skip
  axes.axvline(0, color='black', linewidth=0.5)
  axes.legend()


def margins(
  path: pathlib.Path,
  distributions: list[dict[str, Any]],
  last: dict[str, dict[str, np.ndarray]],
) -> None:
  """Margin distributions over the checkpoints, and at the last one.

  A row for each quantity: for each split the median and the bands that hold
  50, 90 and 98% of its examples, by step; then both histograms.

  Args:
    path: of the PNG file.
    distributions: the rows of distributions.csv.
    last: for each split, for each quantity, the values at the last checkpoint.
  """
  splits = list(last)
  quantities = list(last[splits[0]])
  drawn = figure(4 * (len(splits) + 1), 2.6 * len(quantities))
  grid = drawn.subplots(len(quantities), len(splits) + 1, squeeze=False)
  for line, quantity in zip(grid, quantities, strict=True):
    line[0].set_ylabel(quantity)
    for index, split in enumerate(splits):
      rows = [
        row
        for row in distributions
        if row['split'] == split and row['quantity'] == quantity
      ]
      _bands(line[index], rows, f'C{index}')
      line[index].set_xlabel('step')
      line[index].set_title(split)
    _histogram(line[-1], {split: last[split][quantity] for split in splits})
    line[-1].set_xlabel(quantity)
    line[-1].set_title('last checkpoint')
  save(drawn, path, 100)
