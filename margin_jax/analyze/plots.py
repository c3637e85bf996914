"""The figures of an analysis: margins over the checkpoints, and at the last.

For the last checkpoint, also the examples with the most negative margins.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from margin_jax import figures

# Pairs of columns of distributions.csv, the widest band first.
BANDS = (('q1', 'q99'), ('q5', 'q95'), ('q25', 'q75'))
BINS = 60
# A histogram goes this many times the range of the middle 98% beyond it.
REACH = 1.0
NOTE = (
  'left: median (line) and the bands that hold the middle 50, 90 and 98% of '
  'the examples\nright: all examples, on a logarithmic scale'
)
NOTE_AT_LAST = 'all examples, on a logarithmic scale'
# So many characters of a title fit on the page.
TITLE = 100
SHEET_COLUMNS = 8
# So many characters are as wide as an image of the sheet.
SHOWN = 12


def margins(
  path: pathlib.Path,
  title: str,
  distributions: Sequence[Mapping[str, Any]],
  last: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
  """Plots margin distributions over the checkpoints, and at the last one.

  Every quantity has a row of axes: for each split the median and the bands that
  hold 50, 90 and 98% of its examples, by step, unless there is only one; then
  the histograms of all splits at the last checkpoint, of every example: those
  far out lie in the outermost bins, and the axes say how many.

  Args:
    path: the PNG file; a PDF file is beside it.
    title: the title of the figure; its end is shown if it is long.
    distributions: the rows of distributions.csv.
    last: for each split, for each quantity, the values at the last checkpoint.
  """
  splits = list(last)
  quantities = list(last[splits[0]])
  steps = {row['step'] for row in distributions}
  over_steps = splits if len(steps) > 1 else []
  height = 1.5 * len(quantities) + 0.9
  with figures.drawing(path, height) as figure:
    figure.suptitle(_end(title, TITLE), parse_math=False)
    grid = figure.subplots(len(quantities), len(over_steps) + 1, squeeze=False)
    for line, quantity in zip(grid, quantities, strict=True):
      for axes, split in zip(line, over_steps, strict=False):
        _bands(
          axes,
          [
            row
            for row in distributions
            if row['split'] == split and row['quantity'] == quantity
          ],
          _look(split)['color'],
        )
        axes.sharey(line[0])
        axes.tick_params(labelleft=axes is line[0])
        line[0].set_ylabel(quantity.replace(' at ', '\nat '))
      _histograms(line[-1], {split: last[split][quantity] for split in splits})
      line[-1].set_xlabel(quantity)
      line[-1].set_ylabel('% in a bin')
    for axes, split in zip(grid[0], over_steps, strict=False):
      axes.set_title(split)
    grid[0][-1].set_title(f'step {max(steps):,}')
    for axes in grid[-1][:-1]:
      axes.set_xlabel('step')
    figures.legend(figure, grid[0][-1], NOTE if over_steps else NOTE_AT_LAST)


def _look(split: str) -> dict[str, Any]:
  color, line = figures.SPLITS.get(split, (figures.BLACK, '-'))
  return {'color': color, 'linestyle': line}


def _bands(axes: Any, rows: Sequence[Mapping[str, Any]], color: str) -> None:
  """Draws quantile bands and the median of a quantity by step."""
  from matplotlib.ticker import MaxNLocator

  rows = [row for row in rows if np.isfinite(row['q50'])]
  steps = np.array([row['step'] for row in rows])
  for low, high in BANDS:
    axes.fill_between(
      steps, [row[low] for row in rows], [row[high] for row in rows],
      color=color, alpha=0.25, linewidth=0,
    )  # fmt: skip
  axes.plot(steps, [row['q50'] for row in rows], '.-', color=color)
  axes.axhline(0, color='black', linewidth=0.5)
  locator = MaxNLocator(3, integer=True, steps=(1, 2, 2.5, 5, 10))
  axes.xaxis.set_major_locator(locator)
  figures.count_axis(axes.xaxis)


def _histograms(axes: Any, splits: Mapping[str, np.ndarray]) -> None:
  """Draws the distribution of a quantity, a line for each split."""
  # Sixty bins do not fit between neighbours in float32.
  there = {split: np.float64(x[~np.isnan(x)]) for split, x in splits.items()}
  finite = np.concatenate([x[np.isfinite(x)] for x in there.values()])
  axes.set_yscale('log')
  if not finite.size:
    axes.annotate('none is finite', (0.5, 0.5), xycoords='axes fraction')
    return
  low, high = _range(finite)
  for split, x in there.items():
    if x.size:
      # Those beyond the range, infinite ones too, lie in the outermost bins.
      axes.hist(
        np.clip(x, low, high), bins=BINS, range=(low, high), histtype='step',
        weights=np.full(x.size, 100 / x.size), label=split, **_look(split),
      )  # fmt: skip
  figures.log_ticks(axes.yaxis, *axes.get_ylim())
  axes.axvline(0, color='black', linewidth=0.5)
  axes.annotate(
    _outside(np.concatenate([*there.values()]), low, high), (0.5, 0.02),
    xycoords='axes fraction', ha='center', va='bottom',
    bbox={'color': 'white', 'alpha': 0.8, 'pad': 1},
  )  # fmt: skip


def _range(finite: np.ndarray) -> tuple[float, float]:
  """Returns where a histogram begins and ends: at the ends, or near them."""
  q1, q99 = np.quantile(finite, (0.01, 0.99))
  reach = REACH * (q99 - q1)
  low, high = max(finite.min(), q1 - reach), min(finite.max(), q99 + reach)
  return (low, high) if low < high else (low - 0.5, high + 0.5)


def _outside(x: np.ndarray, low: float, high: float) -> str:
  """Returns how many examples lie in the outermost bins from beyond."""
  below, above = x[x < low], x[x > high]
  notes = []
  if below.size:
    notes.append(f'first bin: {below.size}, down to {below.min():.3g}')
  if above.size:
    notes.append(f'last bin: {above.size}, up to {above.max():.3g}')
  return '\n'.join(notes)


def most_negative(
  path: pathlib.Path,
  split: str,
  images: np.ndarray,
  rows: Sequence[Mapping[str, Any]],
  names: Sequence[str],
) -> None:
  """Draws a sheet of images with their labels, predictions and margins.

  Args:
    path: the PNG file; a PDF file is beside it.
    split: the split of the examples.
    images: (N, H, W, 1 or 3) uint8.
    rows: as many rows of the split's CSV file.
    names: the names of the classes.
  """
  lines = -(-len(images) // SHEET_COLUMNS)
  has_files = 'file' in rows[0]
  height = 1.55 if has_files else 1.43
  last = 'the margin, #index and file' if has_files else 'the margin and #index'
  with figures.drawing(path, height * lines + 0.45) as figure:
    grid = figure.subplots(lines, SHEET_COLUMNS, squeeze=False).ravel()
    for axes in grid:
      axes.set_axis_off()
    for axes, image, row in zip(grid, images, rows, strict=False):
      axes.imshow(image.squeeze(), cmap='gray', vmin=0, vmax=255)
      label, prediction = row['label'], row['prediction']
      axes.set_title(_short(names[label]), pad=2, parse_math=False)
      wrong = label != prediction
      below = [_short(names[prediction]), f'{row["margin"]:.3g}']
      below.append(f'#{row["index"]}')
      if has_files:
        below.append(_end(pathlib.PurePath(row['file']).name, SHOWN))
      axes.text(
        0.5, -0.04, '\n'.join(below),
        ha='center', va='top', transform=axes.transAxes, parse_math=False,
        color=figures.RED if wrong else 'black',
        fontweight='bold' if wrong else 'normal',
      )  # fmt: skip
    figure.suptitle(
      f'The {len(images)} lowest margins of the {split} split. Above: '
      f'the label. Below: the\nprediction (bold if it differs), {last}.'
    )


def _short(name: str) -> str:
  """Returns a name that is no wider than an image."""
  return name if len(name) <= SHOWN else f'{name[: SHOWN - 1]}…'


def _end(text: str, length: int) -> str:
  """Returns a text, or its end, of at most so many characters."""
  return text if len(text) <= length else f'…{text[1 - length :]}'
