"""The plot of an analysis: margins over the checkpoints, and at the last."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from margin_jax import figures

# Pairs of columns of distributions.csv, the widest band first.
BANDS = (('q1', 'q99'), ('q5', 'q95'), ('q25', 'q75'))
BINS = 80
# The quantiles between which a histogram is drawn: tails would flatten it.
HISTOGRAM_RANGE = (0.005, 0.995)


def margins(
  path: pathlib.Path,
  distributions: Sequence[Mapping[str, Any]],
  last: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
  """Plots margin distributions over the checkpoints, and at the last one.

  Every quantity has a row of axes: for each split the median and the bands that
  hold 50, 90 and 98% of its examples, by step; then the histograms of all
  splits at the last checkpoint.

  Args:
    path: of the PNG file.
    distributions: the rows of distributions.csv.
    last: for each split, for each quantity, the values at the last checkpoint.
  """
  splits = list(last)
  quantities = list(last[splits[0]])
  figure = figures.new(4 * (len(splits) + 1), 2.6 * len(quantities))
  grid = figure.subplots(len(quantities), len(splits) + 1, squeeze=False)
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
    _histograms(line[-1], {split: last[split][quantity] for split in splits})
    line[-1].set_xlabel(quantity)
    line[-1].set_title('last checkpoint')
  figures.save(figure, path, 100)


def _bands(axes: Any, rows: Sequence[Mapping[str, Any]], color: str) -> None:
  """Draws quantile bands and the median of a quantity by step."""
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


def _histograms(axes: Any, splits: Mapping[str, np.ndarray]) -> None:
  """Draws the distribution of a quantity, a line for each split."""
  finite = {split: x[np.isfinite(x)] for split, x in splits.items()}
  pooled = np.concatenate([*finite.values()])
  if not pooled.size:
    return
  low, high = np.quantile(pooled, HISTOGRAM_RANGE)
  if low == high:
    low, high = low - 0.5, high + 0.5
  for index, (split, x) in enumerate(finite.items()):
    inside = x[(x >= low) & (x <= high)]
    if inside.size:  # a density of nothing is a division by zero
      axes.hist(
        inside, bins=BINS, range=(low, high), density=True, histtype='step',
        color=f'C{index}', label=split,
      )  # fmt: skip
  axes.axvline(0, color='black', linewidth=0.5)
  axes.legend()
