"""Device metrics of many steps -> one row of numbers."""

from typing import Any

import jax
import numpy as np

PyTree = Any

# Zero in the steps that score nothing, so averaged over the others.
SCORED_ONLY = (
  'pool_error',
  'batch_error',
  'score_min',
  'score_q25',
  'score_median',
  'score_q75',
  'score_max',
)
# Summed over the steps.
SUMMED = ('nan_scores', 'scored', 'skipped')
# Per class: reported as the share of each class's pool examples selected.
POOL_CLASSES, BATCH_CLASSES = 'pool_classes', 'batch_classes'


def summarize(
  calls: list[PyTree],
) -> tuple[dict[str, float], np.ndarray | None]:
  """One row about the steps of several calls.

  Args:
    calls: the metrics of each, with a leading axis of steps.

  Returns:
    Means over the steps, without those that were skipped; of pool metrics over
    the scored steps, NaN if there are none; sums of `SUMMED`. And, with a
    selection, (C,) rates: which share of each class's examples in the pools was
    selected, NaN for a class that was in none.
  """
  calls = jax.device_get(calls)
  steps = {k: np.concatenate([call[k] for call in calls]) for k in calls[0]}
  good = steps.pop('nonfinite') == 0
  del steps['bad_gradient']
  pooled = steps.pop(POOL_CLASSES, None)
  selected = steps.pop(BATCH_CLASSES, None)
  scored = steps.get('scored', np.zeros(1)) > 0
  row = {}
  for name, values in steps.items():
    if name in SUMMED:
      row[name] = float(values.sum(dtype=np.float64))
      continue
    values = values[scored if name in SCORED_ONLY else good]
    row[name] = float(values.mean(dtype=np.float64)) if values.size else np.nan
  if pooled is None:
    return row, None
  there = pooled.sum(axis=0, dtype=np.float64)
  taken = selected.sum(axis=0, dtype=np.float64)
  rates = np.full(there.shape, np.nan)
  return row, np.divide(taken, there, out=rates, where=there > 0)
