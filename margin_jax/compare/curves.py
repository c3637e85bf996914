"""What runs have written, read again; means, deviations, tests."""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from margin_jax.config import ConfigError

Row = dict[str, float]
# What tasks are reported by beside their test error, and how tables call it.
OTHERS = {'test_f1': 'F1', 'test_mismatched_error': 'mismatched test error'}


@dataclasses.dataclass(frozen=True)
class Curves:
  """What a run went through.

  Attributes:
    test: 'step', 'flops', 'seconds' and 'error' at every evaluation.
    train: the same and 'mean_mms' at every row of train.csv, where the error
      is of the batches that were trained on since the row before.
  """

  test: list[Row]
  train: list[Row]


def _read(path: pathlib.Path, names: Sequence[str], split: str = '') -> list:
  """Rows by step; of a step that was done twice, the last."""
  found = {}
  with path.open(newline='', encoding='utf-8') as file:
    for row in csv.DictReader(file):
      if not split or row['split'] == split:
        kept = {name: float(row[name]) for name in names}
        error = {'error': 1 - float(row['accuracy'])}
        found[int(row['step'])] = {'step': int(row['step'])} | kept | error
  return [found[step] for step in sorted(found)]


def read(folder: pathlib.Path) -> Curves:
  """Reads eval.csv and train.csv of a run.

  Raises:
    ConfigError: they are not as the run has left them.
  """
  costs = ('flops', 'seconds')
  try:
    found = Curves(
      test=_read(folder / 'eval.csv', costs, 'test'),
      train=_read(folder / 'train.csv', (*costs, 'mean_mms')),
    )
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f'{folder}: its tables cannot be read: {error}'
    ) from error
  if not found.test or not found.train:
    raise ConfigError(f'{folder}: its tables have lost their rows')
  return found


def spread(
  runs: Sequence[Sequence[Row]], x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A quantity over the runs, at the steps that all of them have.

  Args:
    runs: of one entry, a run a seed.
    x: the name of what it is drawn against; its mean is taken.
    y: the name of the quantity.

  Returns:
    Means of x, means of y, standard deviations of y (0 of a single run).
  """
  tables = [{row['step']: row for row in rows} for rows in runs]
  steps = sorted(set.intersection(*({*table} for table in tables)))
  xs = np.array([[table[step][x] for step in steps] for table in tables])
  ys = np.array([[table[step][y] for step in steps] for table in tables])
  several = len(tables) > 1
  deviation = ys.std(0, ddof=1) if several else np.zeros(len(steps))
  return xs.mean(0), ys.mean(0), deviation


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean and sample standard deviation; None of a single value."""
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return float(np.mean(values)), deviation


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
  """p of the two-sided Welch t-test that two means are equal.

  None where there is no test: a single value, or both without variance.
  """
  if min(len(first), len(second)) < 2:
    return None
  if np.ptp(first) == np.ptp(second) == 0:
    return None
  found = scipy.stats.ttest_ind_from_stats(
    np.mean(first), np.std(first, ddof=1), len(first),
    np.mean(second), np.std(second, ddof=1), len(second),
    equal_var=False,
  )  # fmt: skip
  return float(found.pvalue)


def row(
  method: str, point: Mapping[str, Any], seed: int, result: Mapping[str, Any]
) -> dict[str, Any]:
  """A line of runs.csv, of what result.json holds; errors are shares."""
  found = {'method': method, **point, 'seed': seed, 'steps': result['steps']}
  for split in ('validation', 'test', 'test_mismatched'):
    if split in result:
      found[f'{split}_error'] = 1 - result[split]['accuracy']
  if 'f1' in result['test']:
    found['test_f1'] = result['test']['f1']
  costs = (
    'examples_scored', 'examples_trained', 'flops', 'seconds', 'data_wait',
    'skipped', 'undecodable',
  )  # fmt: skip
  return found | {name: result[name] for name in costs}


def against(
  rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """'difference' of two entries' mean test errors, and its 'p'."""
  test, reference = ([row['test_error'] for row in x] for x in (rows, baseline))
  difference = float(np.mean(test) - np.mean(reference))
  return {'difference': difference, 'p': welch(test, reference)}


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """An entry over its seeds.

  Args:
    rows: of one entry, a row a seed.

  Returns:
    'steps', how many 'seeds'; mean and deviation of 'test' and, if there is
    one, 'validation'; of what else the task is reported by (`OTHERS`); means of
    the costs.
  """

  def values(name: str) -> list[float]:
    return [row[name] for row in rows]

  found = {
    'steps': rows[0]['steps'],
    'seeds': len(rows),
    'test': mean_and_deviation(values('test_error')),
    'wait': sum(values('data_wait')) / sum(values('seconds')),
  }
  if 'validation_error' in rows[0]:
    found['validation'] = mean_and_deviation(values('validation_error'))
  for name in OTHERS:
    if name in rows[0]:
      found[name] = mean_and_deviation(values(name))
  for name in ('examples_scored', 'flops', 'seconds', 'skipped'):
    found[name] = float(np.mean(values(name)))
  return found
