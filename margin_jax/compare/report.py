"""The report of a comparison: tables and plots of what the runs have written.

From top to bottom: the files, reading what the runs wrote, statistics over the
seeds of a trial, tables in Markdown.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import scipy.stats

from margin_jax import files
from margin_jax.compare import plots
from margin_jax.compare.methods import Trial
from margin_jax.compare.runs import Result, Run
from margin_jax.config import FIELDS, flatten
from margin_jax.train import schema

Row = dict[str, Any]
Summary = dict[str, Any]

COMPARISON, SWEEP = 'compare.md', 'sweep.md'
PLOTS = ('error', 'mean_mms', 'cost')
# What a comparison writes to its workdir.
FILES = (
  COMPARISON, SWEEP, 'runs.csv', 'compare.csv', 'costs.json',
  *(f'{name}.{kind}' for name in PLOTS for kind in ('png', 'pdf')),
)  # fmt: skip
FOLDERS = ('runs', 'pilots')
EXPLANATION = (
  'Test error at the last step: mean ± standard deviation over the seeds whose '
  'runs were finite. Worst class: the class with the largest test error in '
  'each run. Difference: how many points higher the error is than that of '
  '`{baseline}`. Reduction: how many percent lower it is. p: two-sided Welch '
  't-test of the test errors against `{baseline}`, which does not pair the '
  'seeds, and is not corrected for the number of methods. There is no p with '
  'one seed, or if the errors of neither method vary. XLA counts the FLOPs, '
  'scoring included. Seconds are training time, without compilation and '
  'evaluation.'
)
# What tasks are reported by beside their test error, and how tables call it.
OTHER_METRICS = {
  'test_worst_class_error': 'worst class test error',
  'test_f1': 'F1',
  'test_mismatched_error': 'mismatched test error',
}
# Groups of fields by which training is more than plain training.
BEYOND_PLAIN = ('mmr', 'large_margin', 'trimming', 'loss', 'ema')
BEST = 'the lowest validation error, among those with the most seeds'


@dataclasses.dataclass(frozen=True)
class Curves:
  """What a run logged.

  Attributes:
    test: of the split that is looked at, 'step', 'flops', 'seconds', 'error'
      and 'worst_class_error' (not in runs of older versions) at every
      evaluation.
    train: the same and 'mean_mms' at every row of train.csv, where the error
      is of the batches that were trained on since the row before; and
      'mean_mms_scoring' where pools were scored since then.
  """

  test: list[Row]
  train: list[Row]


@dataclasses.dataclass(frozen=True)
class Seeds:
  """A trial with all its seeds.

  Attributes:
    trial: what was trained.
    rows: the rows of runs.csv, one for each seed.
    curves: one for each seed.
    summary: what `summarize` makes of the rows.
  """

  trial: Trial
  rows: list[Row]
  curves: list[Curves]
  summary: Summary


def write(
  folder: pathlib.Path,
  runs: Sequence[Run],
  results: Sequence[Result],
  baseline: str,
  notes: Sequence[str],
  split: str = 'test',
) -> str:
  """Writes all files, and removes those of another command.

  Args:
    folder: an existing folder.
    runs: all that are complete.
    results: what their result.json hold.
    baseline: the method that the others are compared with.
    notes: lines for below the tables: the command, the budget.
    split: the split of the errors, 'test' or 'validation'.

  Returns:
    The tables, to be shown.
  """
  rows = run_rows(runs, results)
  curves = [read_curves(run.folder, split) for run in runs]
  _write_csv(folder / 'runs.csv', rows)
  _write_csv(folder / 'compare.csv', _evaluation_rows(runs, curves))
  rows, curves = by_trial(runs, rows), by_trial(runs, curves)
  trials = [
    Seeds(trial, rows[name], curves[name], summarize(rows[name]))
    for name, trial in {run.trial.name: run.trial for run in runs}.items()
  ]
  about = [
    *_shared_fields([x.trial.config for x in trials]),
    *_resolution(results),
  ]
  footer = ['', *notes, *_skipped_steps(trials), '', *hardware(results)]
  fields = list(dict.fromkeys(f for x in trials for f in x.trial.grid_point))
  if not fields:
    (folder / SWEEP).unlink(missing_ok=True)
    return _write_comparison(folder, trials, baseline, about, footer, split)
  validated = all('validation' in x.summary for x in trials)
  best = best_of_methods(trials) if validated else []
  table = '\n'.join(sweep_table(fields, trials, best))
  if not validated:
    plots_of = [f'{x}.{y}' for x in PLOTS for y in ('png', 'pdf')]
    for name in (COMPARISON, *plots_of):
      (folder / name).unlink(missing_ok=True)
    note = (
      'No method has a best grid point: there is no validation split '
      '(data.validation_examples).'
    )
    _write_lines(folder / SWEEP, ['# Sweep', '', table, '', note, *footer])
    return f'{table}\n\n{note}'
  note = f'In bold: for each method, {BEST}.'
  _write_lines(folder / SWEEP, ['# Sweep', '', table, '', note, *footer])
  of_best = f'Each method at its grid point with {BEST}: {SWEEP}.'
  comparison = _write_comparison(
    folder, best, baseline, about, ['', of_best, *footer], split
  )
  return f'{table}\n\n{note}\n\n{comparison}'


def _write_comparison(
  folder: pathlib.Path,
  trials: Sequence[Seeds],
  baseline: str,
  about: Sequence[str],
  footer: Sequence[str],
  split: str,
) -> str:
  """Writes compare.md and the plots of one trial of each method."""
  test = {x.trial.name: [run.test for run in x.curves] for x in trials}
  train = {x.trial.name: [run.train for run in x.curves] for x in trials}
  reference = next(x for x in trials if x.trial.method == baseline)
  plots.error(folder / 'error.png', test, train, reference.trial.name, split)
  plots.mean_mms(folder / 'mean_mms.png', train)
  plots.cost(folder / 'cost.png', {x.trial.name: x.rows for x in trials})
  table = '\n'.join(comparison_table(trials, reference))
  explanation = EXPLANATION.format(baseline=reference.trial.name)
  explanation = ' '.join([explanation, *about])
  configs = [x.trial.config for x in trials]
  names = dict.fromkeys(x.data.name for x in configs)
  names |= dict.fromkeys(x.model.name for x in configs)
  title = f'# {", ".join(names)}: methods compared'
  images = [f'![{name}]({name}.png)\n' for name in PLOTS]
  links = ', '.join(f'[{name}]({name}.pdf)' for name in PLOTS)
  images.append(f'The plots as PDF: {links}.')
  _write_lines(
    folder / COMPARISON,
    [title, '', table, '', explanation, *footer, '', *images],
  )
  return f'{table}\n\n{explanation}'


def _shared_fields(
  configs: Sequence[ml_collections.ConfigDict],
) -> list[str]:
  """Returns a sentence on what is more than plain training in all methods."""
  first, *others = (flatten(schema.effective(config)) for config in configs)
  shared = [
    f'{name}={value!r}'
    for name, value in first.items()
    if name.partition('.')[0] in BEYOND_PLAIN
    and value != FIELDS[name].default
    and all(other[name] == value for other in others)
  ]
  return [f'All methods train with {", ".join(shared)}.'] if shared else []


def _resolution(results: Sequence[Result]) -> list[str]:
  """Returns a sentence on what one test example is worth."""
  counts = {result['test'].get('count') for result in results}  # once not there
  if len(counts) != 1 or None in counts:
    return []
  (count,) = counts
  return [f'One of {count:,} test examples is {100 / count:.2g} points.']


def by_trial(runs: Sequence[Run], values: Sequence[Any]) -> dict[str, list]:
  """Groups values, one of each run, by the names of the runs' trials."""
  groups: dict[str, list] = {}
  for run, value in zip(runs, values, strict=True):
    groups.setdefault(run.trial.name, []).append(value)
  return groups


def best_of_methods(trials: Sequence[Seeds]) -> list[Seeds]:
  """Returns of each method the trial with the lowest mean validation error.

  Where runs were not finite it is one of those with the most seeds: a trial
  must not win by the one seed that it survived.
  """
  best = []
  for method in dict.fromkeys(x.trial.method for x in trials):
    own = [x for x in trials if x.trial.method == method]
    most = max(x.summary['seeds'] for x in own)
    own = [x for x in own if x.summary['seeds'] == most]
    best.append(min(own, key=lambda x: x.summary['validation'][0]))
  return best


def _skipped_steps(trials: Sequence[Seeds]) -> list[str]:
  """Returns lines for below the tables."""
  lines = []
  for x in trials:
    if x.summary['skipped']:
      steps = f'{x.summary["skipped"]:g} steps per run'
      lines += [
        '',
        f'`{x.trial.name}`: {steps} were skipped because they were not finite.',
      ]
  return lines


def hardware(results: Sequence[Result]) -> list[str]:
  """Returns lines on which machines the runs were made, with which versions."""
  devices, versions = {}, {}
  for result in results:
    name = f'{result["devices"]} x {result["device"]}'
    cores = result.get('host_cores', 'unknown')
    devices[f'{name} (host cores: {cores})'] = None
    versions[', '.join(f'{k} {v}' for k, v in result['versions'].items())] = (
      None
    )
  return [
    f'Hardware: {"; ".join(devices)}.', '', f'Versions: {"; ".join(versions)}.',
  ]  # fmt: skip


def _write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes rows of which some may lack fields."""
  fields = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
  files.write_csv(path, fields, rows)


def _write_lines(path: pathlib.Path, lines: Sequence[str]) -> None:
  with files.whole(path) as aside:
    aside.write_text('\n'.join(lines) + '\n', encoding='utf-8')


# What runs wrote, read again.


def read_curves(folder: pathlib.Path, split: str = 'test') -> Curves:
  """Reads eval.csv and train.csv of a run.

  Args:
    folder: the folder of the run.
    split: the split whose evaluations are read.

  Raises:
    FileError: they are not as the run has left them.
  """
  costs = ('flops', 'seconds')
  curves = Curves(
    test=_read_rows(folder / 'eval.csv', costs, split),
    train=_read_rows(folder / 'train.csv', (*costs, 'mean_mms')),
  )
  if not curves.test or not curves.train:
    raise files.FileError(f'{folder}: its tables have lost their rows')
  return curves


def _read_rows(
  path: pathlib.Path, columns: Sequence[str], split: str = ''
) -> list[Row]:
  """Reads rows by step; of a step that was done twice, the last."""
  by_step = {}
  remedy = f'move {path.parent} away, and its run is trained again'
  try:
    _, rows = files.read_table(
      path, (*columns, 'accuracy'), remedy, ('split',) if split else ()
    )
  except FileNotFoundError:
    rows = []
  for row in rows:
    if not split or row['split'] == split:
      step = int(row['step'])
      by_step[step] = {
        'step': step,
        **{name: float(row[name]) for name in columns},
        'error': 1 - float(row['accuracy']),
      }
      # Neither was in the tables of older versions.
      worst = row.get('worst_class_accuracy')
      if worst:
        by_step[step]['worst_class_error'] = 1 - float(worst)
      scoring = float(row.get('mean_mms_scoring') or 'nan')
      if not math.isnan(scoring):
        by_step[step]['mean_mms_scoring'] = scoring
  return [by_step[step] for step in sorted(by_step)]


def _evaluation_rows(
  runs: Sequence[Run], curves: Sequence[Curves]
) -> list[Row]:
  """Returns the rows of compare.csv, one for each evaluation."""
  return [
    {
      'method': run.trial.method,
      **run.trial.grid_point,
      'seed': run.seed,
      **row,
    }
    for run, own in zip(runs, curves, strict=True)
    for row in own.test
  ]


def run_rows(runs: Sequence[Run], results: Sequence[Result]) -> list[Row]:
  """Returns the rows of runs.csv, one for each run.

  Args:
    runs: the complete runs.
    results: what their result.json hold.

  Returns:
    'method', the grid point, 'seed', 'steps', errors as fractions, what else
    the task is reported by (`OTHER_METRICS`), and costs.
  """
  rows = []
  for run, result in zip(runs, results, strict=True):
    row = {'method': run.trial.method, **run.trial.grid_point}
    row |= {'seed': run.seed, 'steps': result['steps']}
    for split in ('validation', 'test', 'test_mismatched'):
      if split in result:
        row[f'{split}_error'] = 1 - result[split]['accuracy']
    if 'worst_class_accuracy' in result['test']:
      worst = result['test']['worst_class_accuracy']
      row['test_worst_class_error'] = 1 - worst
    if 'f1' in result['test']:
      row['test_f1'] = result['test']['f1']
    for name in (
      'examples_scored', 'examples_trained', 'flops', 'seconds', 'data_wait',
      'skipped', 'undecodable',
    ):  # fmt: skip
      row[name] = result[name]
    rows.append(row)
  return rows


# Statistics over the seeds of a trial.


def summarize(rows: Sequence[Row]) -> Summary:
  """Summarizes a trial over its seeds.

  Args:
    rows: the rows of runs.csv, one for each seed.

  Returns:
    'steps'; how many 'seeds'; mean and deviation of the errors 'test' and, if
    there is one, 'validation', and of `OTHER_METRICS`; means of the costs; the
    fraction 'wait' of the seconds in which training waited for data.
  """

  def values(name: str) -> list[float]:
    return [row[name] for row in rows]

  summary = {
    'steps': rows[0]['steps'],
    'seeds': len(rows),
    'test': mean_and_deviation(values('test_error')),
    'wait': sum(values('data_wait')) / sum(values('seconds')),
  }
  if 'validation_error' in rows[0]:
    summary['validation'] = mean_and_deviation(values('validation_error'))
  for name in OTHER_METRICS:
    if all(name in row for row in rows):
      summary[name] = mean_and_deviation(values(name))
  for name in ('examples_scored', 'flops', 'seconds', 'skipped'):
    summary[name] = float(np.mean(values(name)))
  return summary


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
  """Returns mean and sample standard deviation; None of a single value."""
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return float(np.mean(values)), deviation


def difference(
  rows: Sequence[Row], baseline: Sequence[Row]
) -> tuple[float, float | None]:
  """Returns how far two mean test errors differ, and p (see `welch`)."""
  own, reference = ([row['test_error'] for row in x] for x in (rows, baseline))
  return float(np.mean(own) - np.mean(reference)), welch(own, reference)


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
  """Returns p of the two-sided Welch t-test that two means are equal.

  None where there is no test: a single value, or no variance in both.
  """
  if min(len(first), len(second)) < 2:
    return None
  if np.ptp(first) == np.ptp(second) == 0:
    return None
  test = scipy.stats.ttest_ind_from_stats(
    np.mean(first), np.std(first, ddof=1), len(first),
    np.mean(second), np.std(second, ddof=1), len(second),
    equal_var=False,
  )  # fmt: skip
  return float(test.pvalue)


# Tables in Markdown.


def comparison_table(trials: Sequence[Seeds], baseline: Seeds) -> list[str]:
  """Returns the lines of compare.md's table.

  Args:
    trials: a row each.
    baseline: the trial that the others are compared with.
  """
  summaries = [x.summary for x in trials]
  divisor, prefix = unit(max(summary['flops'] for summary in summaries))
  others = [
    name
    for name in OTHER_METRICS
    if all(name in summary for summary in summaries)
  ]
  header = (
    'method', 'steps', 'seeds', 'test error, %',
    *(f'{OTHER_METRICS[name]}, %' for name in others),
    f'difference to `{baseline.trial.name}`', 'reduction, %', 'p',
    'examples scored', f'{prefix}FLOP', 'seconds', 'seconds waiting for data',
  )  # fmt: skip
  lines = []
  for x, summary in zip(trials, summaries, strict=True):
    compared = '-', '-', '-'
    comparable = x.trial.config.data.name == baseline.trial.config.data.name
    if comparable and x.trial.name != baseline.trial.name:
      higher, p = difference(x.rows, baseline.rows)
      error = baseline.summary['test'][0]
      reduction = f'{-100 * higher / error + 0.0:+.1f}' if error else '-'
      compared = f'{100 * higher:+.2f}', reduction, significance(p)
    lines.append([
      f'`{x.trial.name}`',
      f'{summary["steps"]:,}',
      f'{summary["seeds"]}',
      percent(*summary['test']),
      *(percent(*summary[name]) for name in others),
      *compared,
      f'{summary["examples_scored"]:,.0f}',
      f'{summary["flops"] / divisor:.3g}',
      f'{summary["seconds"]:.1f}',
      f'{summary["wait"]:.1%}',
    ])  # fmt: skip
  return markdown(header, lines)


def sweep_table(
  fields: Sequence[str], trials: Sequence[Seeds], best: Sequence[Seeds]
) -> list[str]:
  """Returns the lines of sweep.md's table.

  Args:
    fields: the swept fields.
    trials: a row each.
    best: those in bold.
  """
  validated = all('validation' in x.summary for x in trials)
  header = ['method', *(f'`{field}`' for field in fields)]
  header += ['validation error, %'] if validated else []
  header += ['test error, %', 'seeds', 'steps', 'seconds']
  lines = []
  for x in trials:
    point, summary = x.trial.grid_point, x.summary
    line = [f'`{x.trial.method}`', *(f'{point.get(f, "-")}' for f in fields)]
    if validated:
      line.append(percent(*summary['validation']))
    line.append(percent(*summary['test']))
    if x in best:
      line = [f'**{cell}**' for cell in line]
    line += [
      f'{summary["seeds"]}',
      f'{summary["steps"]:,}',
      f'{summary["seconds"]:.1f}',
    ]
    lines.append(line)
  return markdown(header, lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Returns the lines of a table."""
  lines = [header, ['---'] * len(header), *rows]
  return ['| ' + ' | '.join(line) + ' |' for line in lines]


def percent(mean: float, deviation: float | None) -> str:
  """Formats fractions as '1.23 ± 0.45'."""
  tail = '' if deviation is None else f' ± {100 * deviation:.2f}'
  return f'{100 * mean:.2f}{tail}'


def unit(largest: float) -> tuple[float, str]:
  """Returns a divisor, and its prefix, that leave `largest` few digits."""
  power, prefixes = 0, ('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')
  while largest >= 1000 and power < len(prefixes) - 1:
    largest, power = largest / 1000, power + 1
  return 1000.0**power, prefixes[power]


def significance(p: float | None) -> str:
  """Formats p of a test, if there was one."""
  if p is None:
    return '-'
  return '< 0.001' if p < 0.001 else f'{p:.3f}'
