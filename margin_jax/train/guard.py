"""Detects numbers that are not finite, and guards the state against them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PyTree = Any
Metrics = dict[str, Array]

STOP, SKIP = 'stop', 'skip'

_NAN_SCORES = 'nan_scores'
# What to try, by what was not finite.
_ADVICE = {
  'penalty': 'a lower mmr.alpha or optimizer.learning_rates',
  _NAN_SCORES: 'a lower optimizer.learning_rates, or another selection.rule',
}


def checked(losses: Sequence[str]) -> tuple[str, ...]:
  """Returns the metrics that must be finite, where a step has them.

  Of several, the first is named: the others follow from it.

  Args:
    losses: the metrics of the losses beside the risk.
  """
  return (
    _NAN_SCORES,
    'loss',
    *losses,
    'trimmed_loss',
    'gradient_norm',
    'update_norm',
    'proxy_loss',
    'proxy_gradient_norm',
    # Infinite ones normalize to 0, so that the loss may well be finite.
    'statistics_norm',
  )


class NonFiniteError(ArithmeticError):
  """A loss, a gradient, a score or a statistic became NaN or infinite.

  Attributes:
    step: the first that it happened in.
  """

  def __init__(self, message: str, step: int):
    """Says what happened, and when."""
    super().__init__(message)
    self.step = step


def first_bad_leaf(tree: PyTree) -> Array:
  """Returns the index of the first leaf whose norm is not finite, or -1."""
  finite = jnp.stack([
    jnp.isfinite(jnp.sum(jnp.square(leaf.astype(jnp.float32))))
    for leaf in jax.tree.leaves(tree)
  ])  # fmt: skip
  return jnp.where(jnp.all(finite), -1, jnp.argmin(finite)).astype(jnp.int32)


def guard(
  action: str,
  names: Sequence[str],
  before: PyTree,
  after: PyTree,
  metrics: Metrics,
) -> tuple[PyTree, Metrics]:
  """Returns the state after a step, unless something in it was not finite.

  'stop' then gives the state before it, but for its mark `nonfinite`; no later
  step changes that, until the host has seen it. So nothing is lost, and the
  pool can be sampled again. A NaN score counts.

  'skip' drops the update: step, sampler, buffer, counts and the optimizers'
  step counters advance; parameters, statistics and averages (the optimizers'
  too) stay. A NaN score skips nothing: it ranks last, and `nan_scores` counts
  it. The step writes the score memory after this, and guards it itself.

  Args:
    action: `STOP` or `SKIP`.
    names: the metrics that must be finite, see `checked`.
    before: the `TrainState` that the step read.
    after: the one it made.
    metrics: the metrics of the step.

  Returns:
    The state, and the metrics with 'nonfinite' () int32: 0, or of what was not
    finite the index in `names`, plus 1; with 'skip' also 'skipped', 0 or 1.
  """
  code = jnp.int32(0)
  for index, name in reversed([*enumerate(names)]):
    if name == _NAN_SCORES and action == SKIP:
      continue
    if name not in metrics:
      continue
    value = metrics[name]
    bad = value > 0 if name == _NAN_SCORES else ~jnp.isfinite(value)
    code = jnp.where(bad, index + 1, code)
  if action == STOP:
    code = jnp.where(before.nonfinite > 0, before.nonfinite, code)
    guarded = before.replace(nonfinite=code)
  else:
    metrics['skipped'] = (code > 0).astype(jnp.float32)
    guarded = after.replace(
      params=before.params,
      batch_stats=before.batch_stats,
      opt_state=_averages(before.opt_state, after.opt_state),
      proxy=_averages(before.proxy, after.proxy),
      ema=before.ema,
    )
  metrics = {**metrics, 'nonfinite': code}
  good = code == 0
  return jax.tree.map(
    lambda new, old: jnp.where(good, new, old), after, guarded
  ), metrics


def _averages(before: PyTree, after: PyTree) -> PyTree:
  """Returns `before`, but for counts of steps, which schedules read."""
  return jax.tree.map(
    lambda old, new: new if jnp.issubdtype(new.dtype, jnp.integer) else old,
    before,
    after,
  )


def check(
  first: int,
  metrics: dict[str, np.ndarray],
  names: Sequence[str],
  parameters: Sequence[str],
) -> None:
  """Raises if a step was not finite, and it was not skipped.

  Args:
    first: the step before the first of these.
    metrics: the metrics of some steps, each with a leading axis of steps.
    names: those that must be finite, as the step knew them.
    parameters: names of the leaves of the parameters.

  Raises:
    NonFiniteError: naming the first such step and what was not finite.
  """
  bad = np.flatnonzero(metrics['nonfinite'])
  if not bad.size or 'skipped' in metrics:
    return
  index, step = bad[0], first + int(bad[0]) + 1
  name = names[int(metrics['nonfinite'][index]) - 1]
  value = metrics[name][index]
  text = f'{name} is {value}'
  if name == _NAN_SCORES:
    text = f'{int(value)} score(s) are nan'
  if name == 'gradient_norm':
    leaf = int(metrics['bad_gradient'][index])
    where = parameters[leaf] if leaf >= 0 else 'all parameters together'
    text = f'{text}, of the gradient of {where},'
  advice = _ADVICE.get(name, 'a lower optimizer.learning_rates')
  raise NonFiniteError(f'{text} at step {step}; try {advice}', step)


class Watch:
  """Looks at the steps of every call once they are done.

  It keeps the host a few calls ahead of the devices, and no further.
  """

  def __init__(
    self, names: Sequence[str], parameters: PyTree, ahead: int, alone: bool
  ):
    """Lets so many calls run ahead.

    Args:
      names: the metrics that must be finite.
      parameters: whose leaves a message may name.
      ahead: how many.
      alone: whether there is one process. Of several, all must come to the
        same end at the same call, so that none may look early.
    """
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    self.parameters = [
      jax.tree_util.keystr(path, simple=True, separator='/')
      for path, _ in leaves
    ]
    self._names = names
    self._ahead = ahead
    self._alone = alone
    self._calls: list[tuple[int, Metrics]] = []

  def add(self, first: int, metrics: Metrics) -> None:
    """Notes that a call was dispatched, at step `first`.

    Raises:
      NonFiniteError: from an earlier call.
    """
    self._calls.append((first, metrics))
    while len(self._calls) > self._ahead or (
      self._alone
      and len(self._calls) > 1
      and self._calls[0][1]['nonfinite'].is_ready()
    ):
      first, metrics = self._calls.pop(0)
      if np.any(metrics['nonfinite']):
        check(first, jax.device_get(metrics), self._names, self.parameters)

  def finish(self, before: int) -> None:
    """Looks at all calls that began before this step; waits for them."""
    while self._calls and self._calls[0][0] < before:
      first, metrics = self._calls.pop(0)
      check(first, jax.device_get(metrics), self._names, self.parameters)
