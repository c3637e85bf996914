"""The style of all figures: sizes, colours, a look for each method, files.

The fonts and lines are in paper.mplstyle, which figures of your own can use
too: `matplotlib.style.use('margin_jax.paper')`.
"""

import contextlib
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from margin_jax import files

STYLE = 'margin_jax.paper'
# Inches: a column and a page of a paper.
COLUMN, PAGE = 3.3, 6.9
SUFFIXES = ('.png', '.pdf')
# Of Okabe and Ito (2008), told apart by most colour-blind people.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
  '#000000', '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00', '#CC79A7',
)  # fmt: skip
COLORS = (BLACK, RED, BLUE, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ('o', 's', 'D', '^', 'v', 'P', 'X', 'h', '<', '>', 'p', '*', 'd')
LINES = ('-', (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
# The same colour and marker in every figure.
METHODS = {
  'uniform': (BLACK, 'o'),
  'baseline': (BLACK, 'o'),
  'random': (SKY, 's'),
  'mms': (RED, 'D'),
  'fresh': (RED, 'd'),
  'proxy': (RED, '>'),
  'loss': (BLUE, '^'),
  'selective_backprop': (BLUE, '<'),
  'infobatch': (BLUE, 'h'),
  'entropy': (GREEN, 'v'),
  'weighted': (GREEN, '*'),
  'memory': (PURPLE, 'P'),
  'signed_margin': (PURPLE, 'h'),
  'margin pruning': (PURPLE, 'P'),
  'random pruning': (SKY, 'P'),
  'margin': (ORANGE, '<'),
  'mmr': (ORANGE, 'X'),
  'large_margin': (ORANGE, 'p'),
}
# Of the splits of a dataset: colour and line.
SPLITS = {
  'train': (BLUE, LINES[0]),
  'test': (RED, LINES[1]),
  'validation': (GREEN, LINES[2]),
  'test_mismatched': (PURPLE, LINES[3]),
}


def look(name: str) -> tuple[str, str, Any]:
  """Returns the colour, the marker and the line of a method.

  They depend on nothing but the name. A method with settings, such as
  `mms+reuse=5`, has the colour of its rule. A method with a preset, such as
  `loss+memory`, also has the marker of the preset.

  Args:
    name: the method; after a comma, a grid point may follow.
  """
  name = name.lower().split(',')[0].strip()
  number = zlib.crc32(name.encode())
  if name in METHODS:
    return *METHODS[name], LINES[0]
  rule, *settings = re.split(r'[+ (]', name)
  color, _ = METHODS.get(rule, (COLORS[1 + number % (len(COLORS) - 1)], ''))
  preset = next((x for x in settings if x in METHODS), None)
  marker = METHODS[preset][1] if preset else MARKERS[number % len(MARKERS)]
  return color, marker, LINES[1 + number % (len(LINES) - 1)]


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns how each method of a figure is drawn, as arguments of `plot`.

  If `look` would make two methods look alike, the later one gets the next
  marker and line. Later lines are thinner and on top, so that none hides
  another with the same values.
  """
  chosen: dict[str, dict[str, Any]] = {}
  used = set()
  for index, name in enumerate(names):
    color, marker, line = look(name)
    for _ in MARKERS:
      if (color, marker) not in used:
        break
      marker = MARKERS[(MARKERS.index(marker) + 1) % len(MARKERS)]
      line = LINES[(LINES.index(line) + 1) % len(LINES)]
    used.add((color, marker))
    thin = index / max(len(names) - 1, 1)
    chosen[name] = {
      'color': color, 'marker': marker, 'linestyle': line,
      'linewidth': 2.2 - thin, 'markersize': 6 - 2.2 * thin,
      'zorder': 2 + index / 100,
    }  # fmt: skip
  return chosen


def stagger(index: int, lines: int, points: int) -> slice | None:
  """Returns which points of a line get a marker: few, not those of the others.

  Args:
    index: the index of the line.
    lines: the number of lines in the figure.
    points: the number of points of the line.
  """
  every = max(points // 8, 1)
  return slice(index * every // max(lines, 1), None, every)


def curve(
  axes: Any,
  x: Any,
  values: tuple[Any, Any, Any],
  place: tuple[int, int],
  look: dict[str, Any],
  label: str,
  band: bool = True,
) -> None:
  """Draws a line over the seeds, and the band from the lowest to the highest.

  Args:
    axes: to draw in.
    x: (n,).
    values: mean, lowest and highest, each (n,).
    place: the line's index, and how many lines there are.
    look: the look of the method, one of `looks`.
    label: for the legend.
    band: whether to draw the band.
  """
  mean, low, high = values
  every = stagger(*place, len(x))
  axes.plot(x, mean, label=label, markevery=every, **look)
  if band:
    axes.fill_between(
      x, low, high, color=look['color'], alpha=0.15, linewidth=0
    )


def log_ticks(axis: Any, low: float, high: float) -> None:
  """Gives a logarithmic axis from `low` to `high` ticks that can be read."""
  from matplotlib import ticker

  if high / low < 5:
    major: Any = ticker.MaxNLocator(6)
  else:
    subs = (1, 2, 3, 5, 7) if high / low < 20 else (1, 2, 5)
    subs = subs if high / low < 300 else (1,)
    major = ticker.LogLocator(subs=subs, numticks=12)
  axis.set_major_locator(major)
  axis.set_major_formatter('{x:g}')
  minor = ticker.LogLocator(subs=range(1, 10), numticks=12)
  axis.set_minor_locator(minor if high / low >= 5 else ticker.NullLocator())
  axis.set_minor_formatter(ticker.NullFormatter())


def count_axis(axis: Any) -> None:
  """Labels large counts as 20k or 3T."""
  from matplotlib.ticker import EngFormatter

  axis.set_major_formatter(EngFormatter(sep=''))


def seeds_note(seeds: Sequence[int]) -> str:
  """Returns a note on what lines and bands show, given seeds per curve."""
  least, most = min(seeds), max(seeds)
  if most == 1:
    return 'one seed'
  count = f'{most}' if least == most else f'{least} to {most}'
  return f'line: mean of {count} seeds; band: from the lowest to the highest'


def legend(figure: Any, axes: Any, note: str = '') -> None:
  """Puts one legend below all axes, in as many columns as fit.

  Args:
    figure: the figure to put the legend in.
    axes: the axes that have the labels, or a list of axes.
    note: a line above the legend, such as what the bands are.
  """
  several = axes if isinstance(axes, list) else [axes]
  found: dict[str, Any] = {}
  for one in several:
    for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  longest = max(map(len, found), default=1)
  columns = int(figure.get_figwidth() * 16) // (longest + 7)
  figure.legend(
    [*found.values()], [*found], loc='outside lower center',
    ncols=max(1, min(len(found), columns)), title=note or None,
  )  # fmt: skip


def show(figure: Any, alt: str) -> None:
  """Shows a pyplot figure in a notebook, with a text for screen readers.

  Args:
    figure: the figure, which is then closed so that the notebook does not show
      it again.
    alt: what the figure shows, in a sentence; nbconvert writes it as `alt`.
  """
  from IPython.display import display
  from matplotlib import pyplot

  display(figure, metadata={'image/png': {'alt': alt}})
  pyplot.close(figure)


@contextlib.contextmanager
def drawing(
  path: pathlib.Path,
  height: float,
  width: float = PAGE,
  suffixes: Sequence[str] = SUFFIXES,
) -> Iterator[Any]:
  """Yields an empty figure in the style, and writes it as PNG and as PDF.

  Args:
    path: the PNG file; the PDF file is beside it.
    height: inches.
    width: inches.
    suffixes: the suffixes of the files to write.
  """
  from matplotlib import style
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  with style.context(STYLE):
    # Not pyplot: it would look for a display, and keep the figure in memory.
    figure = Figure((width, height))
    FigureCanvasAgg(figure)
    yield figure
    save(figure, path, suffixes)


def save(
  figure: Any, path: pathlib.Path, suffixes: Sequence[str] = SUFFIXES
) -> None:
  """Writes a figure, each file whole or not at all; the same bytes each time.

  Args:
    figure: in the style.
    path: its suffix is replaced.
    suffixes: the suffixes of the files.
  """
  date = {'.pdf': 'CreationDate', '.svg': 'Date'}
  for suffix in suffixes:
    with files.whole(path.with_suffix(suffix)) as aside:
      undated = {date[suffix]: None} if suffix in date else None
      figure.savefig(aside, format=suffix[1:], metadata=undated)
