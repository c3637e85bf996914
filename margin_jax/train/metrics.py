"""The metrics of a step, and of many steps one row of numbers.

Of every step, float32 unless stated:

* `loss`: the mean risk of the batch (`loss.risk`), in training mode;
* `penalty`: MMR; `large_margin`; and `loss_NAME` for each of `loss.names`. None
  is part of `loss`;
* `accuracy` of the batch, and `trimmed_loss` with trimming;
* `mean_mms`: the mean of the ten smallest MMS of the batch, from the training
  forward, so that every rule and plain training have the same quantity;
* `gradient_norm`, `update_norm` (of the change of the parameters),
  `learning_rate`, `alpha`;
* `statistics_norm` of BatchNorm's running statistics, where there are any;
* `epoch_fraction` with a score memory: the examples of the epoch, over all;
* `proxy_loss`, `proxy_gradient_norm` with a proxy, 0 where it is not trained;
* `bad_gradient`, int32: the index of the first parameter whose gradient is not
  finite, or -1; `nonfinite`, int32, and `skipped`: see `guard.guard`.

With a selection, 0 where the step scores nothing:

* `scored`: 1 where it does;
* `pool_error`, `batch_error`: fractions that the scoring forward misclassifies;
* `mean_mms_scoring`: `mean_mms` from the scoring forward, in its mode (of a
  proxy, in its feature space): what the authors' code traces;
* `nan_scores` (also where scores are remembered), and the quantiles `score_min`
  to `score_max` of the others;
* `scores`, (B,): of the pool, the lowest first;
* `pool_classes`, `batch_classes`, (C,): examples of each class in the pool, and
  in the reuse * b selected from it.

With a short backward pass of trimming, those of the batch are over the examples
that it runs on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from margin_jax import margins, selection
from margin_jax.train import guard
from margin_jax.train.spec import StepSpec

PyTree = Any
Metrics = dict[str, Array]

QUANTILES = {
  'score_min': 0.0,
  'score_q25': 0.25,
  'score_median': 0.5,
  'score_q75': 0.75,
  'score_max': 1.0,
}
# Zero in the steps that score nothing, so averaged over the others.
SCORED_ONLY = ('pool_error', 'batch_error', 'mean_mms_scoring', *QUANTILES)
# Zero in the steps that do not train the proxy.
PROXY_ONLY = ('proxy_loss', 'proxy_gradient_norm')
# Summed over the steps.
SUMMED = ('nan_scores', 'scored', 'skipped')
# By class: reported as the fraction of each class's pool examples selected.
POOL_CLASSES, BATCH_CLASSES = 'pool_classes', 'batch_classes'
# Of the whole pool, for histograms.
SCORES = 'scores'
# Mean MMS is over the ten smallest (ICLR 4.1, Figure 3).
MEAN_MMS_EXAMPLES = 10


def no_scores(spec: StepSpec) -> Metrics:
  """Returns the metrics of selection of a step that scores nothing."""
  if spec.selection is None:
    return {}
  names = ('scored', 'nan_scores', *SCORED_ONLY)
  classes = jnp.zeros(spec.dataset.num_classes, jnp.float32)
  return {
    **{name: jnp.float32(0) for name in names},
    SCORES: jnp.zeros(spec.selection.pool_size, jnp.float32),
    POOL_CLASSES: classes,
    BATCH_CLASSES: classes,
  }


def of_selection(
  spec: StepSpec, pool: PyTree, scores: Array, wrong: Array, selected: PyTree
) -> Metrics:
  """Returns what there was to select from, over all devices."""
  gathered = jax.lax.all_gather(scores, spec.axis_name, tiled=True)
  total = gathered.shape[0]
  order = selection.select_lowest(gathered, total)
  # Of the numbers: one NaN, which ranks last, must not hide the largest.
  nan_scores = jnp.sum(jnp.isnan(gathered))
  last = jnp.maximum(total - nan_scores - 1, 0)
  ranks = jnp.round(jnp.array([*QUANTILES.values()]) * last).astype(jnp.int32)
  quantiles = gathered[order[ranks]]
  error = jnp.mean(wrong, dtype=jnp.float32)
  return {
    'scored': jnp.float32(1),
    'pool_error': jax.lax.pmean(error, spec.axis_name),
    'nan_scores': nan_scores.astype(jnp.float32),
    SCORES: gathered[order],
    POOL_CLASSES: _class_counts(spec, pool['label']),
    BATCH_CLASSES: _class_counts(spec, selected['label']),
    **dict(zip(QUANTILES, quantiles, strict=True)),
  }


def of_selected_batch(spec: StepSpec, wrong: Array, mms: Array) -> Metrics:
  """Returns what the scoring forward says of the batch, over all devices."""
  error = jnp.mean(wrong, dtype=jnp.float32)
  return {
    'batch_error': jax.lax.pmean(error, spec.axis_name),
    'mean_mms_scoring': _mean_mms(spec, mms),
  }


def _mean_mms(spec: StepSpec, mms: Array) -> Array:
  """Returns the mean of the ten smallest of all devices."""
  mms = jax.lax.all_gather(mms, spec.axis_name, tiled=True)
  count = min(MEAN_MMS_EXAMPLES, mms.shape[0])
  return jnp.mean(mms[selection.select_lowest(mms, count)])


def _class_counts(spec: StepSpec, labels: Array) -> Array:
  """Counts the examples of each class on all devices, (C,) float32."""
  counts = jnp.bincount(labels, length=spec.dataset.num_classes)
  return jax.lax.psum(counts.astype(jnp.float32), spec.axis_name)


def of_batch(
  spec: StepSpec, labels: Array, logits: Array, kernel: Array, means: Metrics
) -> Metrics:
  """Returns the metrics of the training-mode forward, over all devices.

  Args:
    spec: the step's.
    labels: (b,) of this device's batch.
    logits: (b, C).
    kernel: (D, C), of the last layer.
    means: the means of the losses, over this device.
  """
  correct = jnp.argmax(logits, axis=1) == labels
  means = {**means, 'accuracy': jnp.mean(correct, dtype=jnp.float32)}
  mms = margins.mms_scores(logits, kernel)
  return {
    **jax.lax.pmean(means, spec.axis_name),
    'mean_mms': _mean_mms(spec, mms),
  }


def of_update(
  spec: StepSpec, step: Array, gradient: PyTree, updates: PyTree, after: PyTree
) -> Metrics:
  """Returns the metrics of the update from `step` to the state `after`."""
  alpha = 0.0 if spec.alpha is None else spec.alpha(step)
  metrics = {
    'gradient_norm': optax.tree.norm(gradient),
    'bad_gradient': guard.first_bad_leaf(gradient),
    'learning_rate': jnp.float32(spec.learning_rate(step)),
    'alpha': jnp.float32(alpha),
    'update_norm': optax.tree.norm(updates),
  }
  statistics = after.batch_stats, after.proxy.get('batch_stats', {})
  if spec.memory is not None:
    metrics['epoch_fraction'] = after.sampler.epoch_fraction
  if jax.tree.leaves(statistics):
    metrics['statistics_norm'] = optax.tree.norm(statistics)
  return metrics


def to_json(calls: list[PyTree]) -> dict[str, list]:
  """Returns the steps of several calls, as `summarize` takes them, as lists.

  Counts of classes are summed over the steps, as it will do, since there may be
  many classes; of the scores those of the last pool are kept, as there.
  """
  steps = _steps(calls)
  for name in (POOL_CLASSES, BATCH_CLASSES):
    if name in steps:
      steps[name] = steps[name].sum(axis=0, keepdims=True, dtype=np.float64)
  if SCORES in steps:
    steps[SCORES] = _last_pool(steps[SCORES], steps['scored'])[None]
  return {name: array.tolist() for name, array in steps.items()}


def _steps(calls: list[PyTree]) -> dict[str, np.ndarray]:
  """Returns the metrics of several calls with one axis of steps."""
  calls = jax.device_get(calls)
  if any('skipped' in call for call in calls):
    # A resumed run may have another `on_nonfinite`, so only some calls have it.
    calls = [
      {**call, 'skipped': call.get('skipped', np.zeros_like(call['loss']))}
      for call in calls
    ]
  return {k: np.concatenate([call[k] for call in calls]) for k in calls[0]}


def from_json(steps: dict[str, list]) -> PyTree:
  """Returns what `to_json` has made lists of, as the metrics of one call."""
  exact = {POOL_CLASSES: np.float64, BATCH_CLASSES: np.float64}
  call = {
    name: np.asarray(values, exact.get(name, np.float32))
    for name, values in steps.items()
  }
  if SCORES in call:  # a row for each step again
    call[SCORES] = np.repeat(call[SCORES], len(call['scored']), axis=0)
  return call


def _last_pool(scores: np.ndarray, scored: np.ndarray) -> np.ndarray:
  """Returns the scores of the last pool of (steps, B), zeros without one."""
  steps = np.flatnonzero(scored)
  return scores[steps[-1] if steps.size else -1]


def summarize(
  calls: list[PyTree],
) -> tuple[dict[str, float], np.ndarray | None, np.ndarray | None]:
  """Summarizes the steps of several calls in one row.

  Args:
    calls: the metrics of each, with a leading axis of steps.

  Returns:
    Means over the steps, without those that were skipped; of pool metrics over
    the scored steps, NaN if there are none; sums of `SUMMED`. And, with a
    selection, (C,) rates: which fraction of each class's examples in the pools
    was selected, NaN for a class that was in none. And (B,), the scores of the
    last pool, None where no step scored one.
  """
  steps = _steps(calls)
  good = steps.pop('nonfinite') == 0
  del steps['bad_gradient']
  pooled = steps.pop(POOL_CLASSES, None)
  selected = steps.pop(BATCH_CLASSES, None)
  scores = steps.pop(SCORES, None)
  scored = steps.get('scored', np.zeros(1)) > 0
  trained = steps.pop('proxy_trained', np.zeros(1)) > 0
  row = {}
  for name, values in steps.items():
    if name in SUMMED:
      row[name] = float(values.sum(dtype=np.float64))
      continue
    counted = scored if name in SCORED_ONLY else good
    values = values[counted & trained if name in PROXY_ONLY else counted]
    row[name] = float(values.mean(dtype=np.float64)) if values.size else np.nan
  if pooled is None:
    return row, None, None
  in_pool = pooled.sum(axis=0, dtype=np.float64)
  in_batch = selected.sum(axis=0, dtype=np.float64)
  rates = np.full(in_pool.shape, np.nan)
  rates = np.divide(in_batch, in_pool, out=rates, where=in_pool > 0)
  if scores is None or not scored.any():
    return row, rates, None
  return row, rates, _last_pool(scores, scored)
