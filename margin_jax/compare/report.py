"""The files that a comparison writes: tables, curves, pictures."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from margin_jax import files
from margin_jax.compare import curves, plots, tables
from margin_jax.compare.methods import Entry
from margin_jax.compare.runs import Run

Rows = list[dict[str, Any]]
COMPARISON, SWEEP = 'compare.md', 'sweep.md'
PICTURES = ('error', 'mean_mms', 'cost')
EXPLANATION = (
  'Test error at the last step: mean ± standard deviation over the seeds whose '
  'runs were finite. p: '
  'two-sided Welch t-test of the test errors against `{baseline}`, not '
  'corrected for the number of methods; there is none with one seed, or where '
  'all errors are equal. FLOPs are those of XLA, scoring included; seconds are '
  'of training, without compilation and evaluation.'
)


def write_rows(path: pathlib.Path, rows: Rows) -> None:
  """A CSV file whose rows may lack some fields."""
  fields = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
  files.write_csv(path, fields, rows)


def hardware(results: Sequence[Mapping[str, Any]]) -> list[str]:
  """Where the runs were made and by which versions, each once."""
  devices, versions = {}, {}
  for result in results:
    name = f'{result["devices"]} x {result["device"]}'
    cores = result.get('host_cores', 'unknown')
    devices[f'{name} (host cores: {cores})'] = None
    shown = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
    versions[shown] = None
  return [
    f'Hardware: {"; ".join(devices)}.', '', f'Versions: {"; ".join(versions)}.',
  ]  # fmt: skip


def grouped(runs: Sequence[Run], values: Sequence[Any]) -> dict[str, list]:
  """Values of the runs, by the name of their entry."""
  groups: dict[str, list] = {}
  for run, value in zip(runs, values, strict=True):
    groups.setdefault(run.entry.name, []).append(value)
  return groups


def best(
  entries: Sequence[Entry], summaries: Mapping[str, Mapping[str, Any]]
) -> list[Entry]:
  """Of each method the entry with the lowest mean validation error.

  Where runs were not finite, of those with the most that were: an entry must
  not win by the one seed that it survived.
  """
  found = []
  for method in dict.fromkeys(entry.method for entry in entries):
    own = [entry for entry in entries if entry.method == method]
    most = max(summaries[entry.name]['seeds'] for entry in own)
    own = [entry for entry in own if summaries[entry.name]['seeds'] == most]
    found.append(min(own, key=lambda x: summaries[x.name]['validation'][0]))
  return found


class Report:
  """What the results of all runs say."""

  def __init__(
    self,
    runs: Sequence[Run],
    results: Sequence[Mapping[str, Any]],
    baseline: str,
  ):
    """Reads the curves of all runs.

    Args:
      runs: all of them.
      results: what their result.json hold, in the same order.
      baseline: the method that the others are measured by.
    """
    self.results = results
    self.rows = [
      curves.row(x.entry.method, x.entry.point, x.seed, result)
      for x, result in zip(runs, results, strict=True)
    ]
    self._runs = runs
    self._baseline = baseline
    self._entries = list({run.entry.name: run.entry for run in runs}.values())
    self._curves = [curves.read(run.folder) for run in runs]
    self._summaries = {
      name: curves.summarize(rows)
      for name, rows in grouped(runs, self.rows).items()
    }

  def write(self, folder: pathlib.Path, about: Sequence[str]) -> str:
    """Writes all files, and removes those of another command; the table.

    Args:
      folder: that exists.
      about: lines for below the tables: the command, the budget.
    """
    write_rows(folder / 'runs.csv', self.rows)
    points = [
      {'method': x.entry.method, **x.entry.point, 'seed': x.seed, **row}
      for x, found in zip(self._runs, self._curves, strict=True)
      for row in found.test
    ]
    write_rows(folder / 'compare.csv', points)
    footer = ['', *about, *self._skipped(), '', *hardware(self.results)]
    fields = list(dict.fromkeys(f for e in self._entries for f in e.point))
    if not fields:
      (folder / SWEEP).unlink(missing_ok=True)
      return self._compare(folder, self._entries, footer)
    text, chosen = self._sweep(fields)
    if not chosen:
      for name in (COMPARISON, *(f'{x}.png' for x in PICTURES)):
        (folder / name).unlink(missing_ok=True)
    best_of = 'the lowest validation error, of those with the most seeds'
    note = (
      f'In bold: for each method, {best_of}.'
      if chosen
      else 'Without a validation split (data.validation_examples) none is best.'
    )
    _write(folder / SWEEP, ['# Sweep', '', *text, '', note, *footer])
    shown = '\n'.join([*text, '', note])
    if chosen:
      note = f'Each method at its point of the sweep with {best_of}: {SWEEP}.'
      footer = ['', note, *footer]
      shown += '\n\n' + self._compare(folder, chosen, footer)
    return shown

  def _skipped(self) -> list[str]:
    lines = []
    for name, found in self._summaries.items():
      if found['skipped']:
        steps = f'{found["skipped"]:g} steps a run'
        lines += ['', f'`{name}`: {steps} were skipped, not being finite.']
    return lines

  def _sweep(self, fields: list[str]) -> tuple[list[str], list[Entry]]:
    """The table, and the best entries if there is a validation split."""
    summaries = [self._summaries[entry.name] for entry in self._entries]
    chosen = []
    if all('validation' in summary for summary in summaries):
      chosen = best(self._entries, self._summaries)
    text = tables.sweep(
      fields,
      [(entry.method, entry.point) for entry in self._entries],
      summaries,
      [self._entries.index(entry) for entry in chosen],
    )
    return text, chosen

  def _compare(
    self, folder: pathlib.Path, entries: list[Entry], footer: list[str]
  ) -> str:
    """Writes compare.md and the pictures of an entry of each method."""
    rows = grouped(self._runs, self.rows)
    found = grouped(self._runs, self._curves)
    baseline = next(e.name for e in entries if e.method == self._baseline)
    summaries = {
      entry.name: self._summaries[entry.name]
      | curves.against(rows[entry.name], rows[baseline])
      for entry in entries
    }
    text = tables.comparison(summaries, baseline)
    explanation = EXPLANATION.format(baseline=baseline)
    drawn = {name: found[name] for name in summaries}
    plots.error(folder / 'error.png', drawn)
    plots.mean_mms(folder / 'mean_mms.png', drawn)
    points = {name: rows[name] for name in summaries}
    plots.cost(folder / 'cost.png', points)
    images = [f'![{x}]({x}.png)\n' for x in PICTURES]
    config = entries[0].config
    title = f'# {config.data.name}, {config.model.name}: methods compared'
    _write(
      folder / COMPARISON,
      [title, '', *text, '', explanation, *footer, '', *images],
    )
    return '\n'.join([*text, '', explanation])


def _write(path: pathlib.Path, lines: list[str]) -> None:
  with files.whole(path) as aside:
    aside.write_text('\n'.join(lines) + '\n', encoding='utf-8')
