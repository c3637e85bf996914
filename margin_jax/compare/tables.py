"""Numbers as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from margin_jax.compare import curves

# Names of powers of a thousand, for counts of operations.
PREFIXES = ('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """The lines of a table."""
  lines = [header, ['---'] * len(header), *rows]
  return ['| ' + ' | '.join(line) + ' |' for line in lines]


def percent(mean: float, deviation: float | None) -> str:
  """'1.23 ± 0.45', of shares."""
  tail = '' if deviation is None else f' ± {100 * deviation:.2f}'
  return f'{100 * mean:.2f}{tail}'


def unit(largest: float) -> tuple[float, str]:
  """What to divide by, and the prefix, so that `largest` has few digits."""
  power = 0
  while largest >= 1000 and power < len(PREFIXES) - 1:
    largest, power = largest / 1000, power + 1
  return 1000.0**power, PREFIXES[power]


def _significance(p: float | None) -> str:
  if p is None:
    return '-'
  return '< 0.001' if p < 0.001 else f'{p:.3f}'


def comparison(
  summaries: Mapping[str, Mapping[str, Any]], baseline: str
) -> list[str]:
  """The lines of compare.md's table.

  Args:
    summaries: `curves.summarize` of every entry, by its name.
    baseline: the name that the differences are to.
  """
  divisor, prefix = unit(max(x['flops'] for x in summaries.values()))
  others = [
    x for x in curves.OTHERS if all(x in found for found in summaries.values())
  ]
  rows = []
  for name, found in summaries.items():
    compared = name != baseline
    rows.append([
      f'`{name}`',
      f'{found["steps"]:,}',
      f'{found["seeds"]}',
      percent(*found['test']),
      *(percent(*found[other]) for other in others),
      f'{100 * found["difference"]:+.2f}' if compared else '-',
      _significance(found['p']) if compared else '-',
      f'{found["examples_scored"]:,.0f}',
      f'{found["flops"] / divisor:.3g}',
      f'{found["seconds"]:.1f}',
      f'{found["wait"]:.1%}',
    ])  # fmt: skip
  header = (
    'method', 'steps', 'seeds', 'test error, %',
    *(f'{curves.OTHERS[other]}, %' for other in others),
    f'difference to `{baseline}`', 'p',
    'examples scored', f'{prefix}FLOP', 'seconds', 'of these waiting for data',
  )  # fmt: skip
  return markdown(header, rows)


def sweep(
  fields: Sequence[str],
  entries: Sequence[tuple[str, Mapping[str, Any]]],
  summaries: Sequence[Mapping[str, Any]],
  best: Sequence[int],
) -> list[str]:
  """The lines of sweep.md's table.

  Args:
    fields: that are swept.
    entries: the method and the point of every row.
    summaries: of every row.
    best: which rows are marked.
  """
  validated = all('validation' in found for found in summaries)
  header = ['method', *(f'`{field}`' for field in fields)]
  header += ['validation error, %'] if validated else []
  header += ['test error, %', 'seeds', 'steps', 'seconds']
  rows = []
  for index, ((method, point), found) in enumerate(
    zip(entries, summaries, strict=True)
  ):
    line = [f'`{method}`', *(f'{point.get(field, "-")}' for field in fields)]
    if validated:
      line.append(percent(*found['validation']))
    line.append(percent(*found['test']))
    if index in best:
      line = [f'**{cell}**' for cell in line]
    rest = f'{found["seeds"]}', f'{found["steps"]:,}', f'{found["seconds"]:.1f}'
    rows.append([*line, *rest])
  return markdown(header, rows)
