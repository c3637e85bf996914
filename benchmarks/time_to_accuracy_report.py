"""The table and the picture of benchmarks/time_to_accuracy.py."""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke

from margin_jax import figures
from margin_jax.compare import report

Row = Mapping[str, Any]

# Families of methods; the first is the line to beat.
PLAIN, MEMORY, FRESH, LOSS = (
  'plain training, cut short',
  'sampled by remembered scores',
  'selected by fresh scores',
  'another loss',
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What has come of a method.

  Attributes:
    name: of the method.
    family: one of the four above.
    steps: of a run.
    runs: of each seed its evaluations, that have 'step', 'flops', 'error' and
      'worst_class_error'.
    step_seconds: of a step on average; None if it has not been timed.
  """

  name: str
  family: str
  steps: int
  runs: Sequence[Sequence[Row]]
  step_seconds: float | None

  @property
  def seconds(self) -> float:
    """Of a run; only of what has been timed."""
    return self.steps * self.step_seconds

  def last(self, column: str) -> list[float]:
    """A column at the end, of each seed."""
    return [rows[-1][column] for rows in self.runs]

  @property
  def error(self) -> float:
    """At the end, the mean over the seeds."""
    return statistics.mean(self.last('error'))

  @property
  def variance(self) -> float:
    """Of an error; NaN, unknown, of a single seed."""
    errors = self.last('error')
    return statistics.variance(errors) if len(errors) > 1 else math.nan


class Line:
  """Plain training that is cut short: the line to beat.

  Attributes:
    outcomes: its points, by seconds.
  """

  def __init__(self, outcomes: Sequence[Outcome]):
    """Is straight between the timed points."""
    plain = [x for x in outcomes if x.family == PLAIN]
    self.outcomes = sorted(plain, key=lambda x: x.seconds)

  def above(self, one: Outcome) -> tuple[float, float] | None:
    """How far a method is above the line, and two standard errors of that.

    None where the line has not begun. Right of its end it goes on level. The
    errors are NaN where the method, or a point beside it, has a single seed.
    """
    line = self.outcomes
    # Steps of the same program are timed a little differently.
    if not line or one.seconds < 0.98 * line[0].seconds:
      return None
    seconds = [x.seconds for x in line]
    shares = [np.interp(one.seconds, seconds, x) for x in np.eye(len(line))]
    beside = [(w, x) for w, x in zip(shares, line, strict=True) if w]
    there = sum(w * x.error for w, x in beside)
    variance = sum(w**2 * x.variance / len(x.runs) for w, x in beside)
    variance += one.variance / len(one.runs)
    return float(one.error - there), 2 * float(variance) ** 0.5


def write(
  base: pathlib.Path,
  opening: Sequence[str],
  outcomes: Sequence[Outcome],
  times: Mapping[str, Any],
) -> None:
  """Writes BASE.md and, of what has been timed, BASE.png.

  Args:
    base: the path of the files without their suffix.
    opening: the first lines.
    outcomes: of the methods that have any, in the order of the table.
    times: what the file of the timed steps holds; {} without one.
  """
  timed = [x for x in outcomes if x.step_seconds is not None]
  line = Line(timed)
  lines = [*opening, '', *verdict(timed, line)]
  if timed and line.outcomes:
    plot(base.with_suffix('.png'), timed, line)
    lines += [f'![Error against seconds]({base.name}.png)', '']
  lines += [*table(outcomes, line), '', *explanation(times)]
  base.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


def verdict(timed: Sequence[Outcome], line: Line) -> list[str]:
  """A paragraph: who is below the line, on it, above it; of several seeds."""
  below, on, above = [], [], []
  for one in timed:
    compared = line.above(one)
    if one.family == PLAIN or compared is None:
      continue
    difference, noise = compared
    side = below if difference < 0 else above
    (on if abs(difference) <= noise else side).append(one.name)
  if not timed or any(len(x.runs) == 1 for x in timed):
    return []
  groups = {
    'Below it, so better': below,
    'On it': on,
    'Above it, so worse': above,
  }
  return [
    "The black line is plain training that is cut short to a method's seconds. "
    + ' '.join(f'{x}: {"; ".join(y) or "none"}.' for x, y in groups.items())
    + ' A difference within two standard errors counts as none. With three '
    'seeds, one null difference in ten still counts as one.',
    '',
  ]


def table(outcomes: Sequence[Outcome], line: Line) -> list[str]:
  """A row a method."""
  goal = next((x.error for x in outcomes if x.name == 'uniform'), None)
  most = max((x.last('flops')[0] for x in outcomes), default=1)
  divisor, prefix = report.unit(most)
  header = [
    'method', 'seeds', 'steps', 'test error, %', 'worst class, %',
    f'{prefix}FLOP', 'seconds', 'error above the line, points',
    'seconds to the error of `uniform`',
  ]  # fmt: skip
  rows = []
  for one in outcomes:
    compared = arrived = seconds = '-'
    if one.step_seconds is not None:
      seconds = f'{one.seconds:,.0f}'
      if one.family != PLAIN and (found := line.above(one)):
        difference, noise = (100 * x for x in found)
        known = not math.isnan(noise)
        compared = f'{difference:+.2f}' + (f' ± {noise:.2f}' if known else '')
      if goal is not None:
        arrived = arrival(one, goal)
    rows.append([
      one.name,
      f'{len(one.runs)}',
      f'{one.steps:,}',
      *(
        report.percent(*report.mean_and_deviation(one.last(column)))
        for column in ('error', 'worst_class_error')
      ),
      f'{one.last("flops")[0] / divisor:.3g}',
      seconds,
      compared,
      arrived,
    ])  # fmt: skip
  return report.markdown(header, rows)


def arrival(one: Outcome, goal: float) -> str:
  """How many seeds reach an error, and after how many seconds on average."""
  first = [
    next((row['step'] for row in rows if row['error'] <= goal), None)
    for rows in one.runs
  ]
  hits = [step for step in first if step is not None]
  count = f'{len(hits)} of {len(first)}'
  if not hits:
    return count
  return f'{count}: {one.step_seconds * statistics.mean(hits):,.0f}'


def explanation(times: Mapping[str, Any]) -> list[str]:
  """What the columns are, and where the seconds were measured."""
  lines = [
    'Errors are on the test split at the last step, mean ± standard deviation '
    'over the seeds. `uniform, 65%` is a plain run of 65% of the steps, with '
    'the whole learning-rate schedule in them. The line joins the plain runs. '
    'Right of the longest run the line is level; a longer plain run might do '
    'better, so methods there look better than they are. Methods that choose '
    'examples get fewer steps than `uniform`, and those with another loss get '
    'as many. Compare each with the line at its seconds: "error above the '
    'line" is that difference, with two standard errors over the seeds, once '
    'the method and the points of the line beside it have several seeds. '
    '"Margin pruning, 0.9, 0.8" leaves out of every epoch a random fraction '
    '0.8 (`drop`) of the fraction 0.9 (`share`) of the examples with the '
    'largest remembered margins.',
    '',
    'Seconds are the time of a step times the number of steps. The seconds '
    '"to the error" are those until the first evaluation of a run with an '
    'error of at most the mean final error of `uniform`. The table gives the '
    'number of seeds that reached it, and the mean over these seeds. FLOPs are '
    'those of the first seed.',
    '',
  ]
  if not times:
    return [*lines, 'No step has been timed yet (`--time`).']
  spread = max(
    (x['quartiles'][1] - x['quartiles'][0]) / x['seconds']
    for x in times['steps'].values()
  )
  versions = ', '.join(f'{k} {v}' for k, v in times['versions'].items())
  return [
    *lines,
    f'Steps were timed on {times["date"]}, on {times["device"]} '
    f'({times["host_cores"]} host cores), {versions}: medians of '
    f'{times["rounds"]} rounds, all methods in turns in one process, including '
    'what the start of an epoch adds. The quartiles of a step differ by at '
    f'most {spread:.0%} of its time.',
  ]


def plot(path: pathlib.Path, timed: Sequence[Outcome], line: Line) -> None:
  """Error against seconds; plain training cut short is the line to beat."""
  with figures.drawing(path, 4.6) as figure:
    axes = figure.subplots()
    for one in timed:
      color, marker, _ = figures.look(one.name)
      errors = [100 * x for x in one.last('error')]
      axes.vlines(
        one.seconds, min(errors), max(errors), color=color, linewidth=1.2,
        zorder=3,
      )  # fmt: skip
      axes.plot(
        one.seconds, 100 * one.error, marker, color=color, markersize=7,
        markeredgecolor='white', markeredgewidth=0.5, zorder=4,
      )  # fmt: skip
    for axis in ('x', 'y'):
      getattr(axes, f'set_{axis}scale')('log')
    axes.margins(x=0.2, y=0.15)
    ends, bottom, top = axes.get_xlim(), *axes.get_ylim()
    figures.log_ticks(axes.xaxis, *ends)
    figures.log_ticks(axes.yaxis, bottom, top)
    plain = line.outcomes
    x = [*(one.seconds for one in plain), ends[1]]
    y = [*(100 * one.error for one in plain), 100 * plain[-1].error]
    axes.plot(x[:-1], y[:-1], color=figures.BLACK, linewidth=2, zorder=2)
    axes.plot(x[-2:], y[-2:], color=figures.BLACK, linestyle=':', zorder=2)
    axes.fill_between(
      x, bottom, y, color=figures.BLACK, alpha=0.06, linewidth=0
    )
    axes.set_xlim(ends)
    axes.set_ylim(bottom, top)
    axes.set_xlabel('seconds of training')
    axes.set_ylabel('test error at the end, %')
    counts = [len(one.runs) for one in timed]
    few, many = min(counts), max(counts)
    seeds = f'{many} seed{"s" * (many > 1)}'
    if few < many:
      seeds = f'{few} to {seeds}'
    axes.set_title(
      'shaded: less error than plain training (uniform) in the same seconds\n'
      f'marker: mean of {seeds}; bar: from the lowest to the highest'
    )
    figure.canvas.draw()  # the layout is known from here on
    figure.set_layout_engine('none')
    label(axes, timed, np.stack([x, y], axis=1))


def label(axes: Any, timed: Sequence[Outcome], line: np.ndarray) -> None:
  """Writes each name near its point, where nothing else is."""
  to_pixels, to_points = axes.transData.transform, 72 / axes.figure.dpi
  centers = to_pixels([(x.seconds, 100 * x.error) for x in timed])
  taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in centers]
  for start, end in itertools.pairwise(to_pixels(line)):
    along = start + np.linspace(0, 1, 60)[:, None] * (end - start)
    taken += [(x - 4, y - 4, x + 4, y + 4) for x, y in along]
  for one in timed:
    errors = one.last('error')
    bar = [(one.seconds, 100 * x) for x in (min(errors), max(errors))]
    (x, y0), (_, y1) = to_pixels(bar)
    taken.append((x - 2, y0, x + 2, y1))
  left, bottom, right, top = axes.get_window_extent().extents

  def free(box: np.ndarray) -> bool:
    x0, y0, x1, y1 = box
    inside = left < x0 and x1 < right and bottom < y0 and y1 < top
    return inside and not any(
      x0 < c and a < x1 and y0 < d and b < y1 for a, b, c, d in taken
    )

  # Outwards in circles, of the same distance to the sides first.
  angles = np.radians([0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90])
  directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  for index in np.argsort(centers[:, 1]):
    one, center = timed[index], centers[index]
    color = figures.look(one.name)[0]
    text = axes.annotate(
      one.name, (one.seconds, 100 * one.error), (0, 0),
      textcoords='offset points', ha='center', va='center',
      arrowprops={'arrowstyle': '-', 'color': color, 'linewidth': 0.6},
      # Readable where another one's line crosses it.
      path_effects=[withStroke(linewidth=2.5, foreground='white')], zorder=6,
    )  # fmt: skip
    half = np.array(text.get_window_extent().size) / 2
    for radius in range(14, 300, 8):
      offsets = directions * (radius + half * abs(directions).round(1))
      boxes = [
        np.concatenate([center + x - half, center + x + half]) for x in offsets
      ]
      place = next((i for i, box in enumerate(boxes) if free(box)), None)
      if place is not None:
        taken.append(boxes[place])
        along = center + np.linspace(0.2, 0.8, 20)[:, None] * offsets[place]
        taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in along]
        text.set_position(to_points * offsets[place])
        break
