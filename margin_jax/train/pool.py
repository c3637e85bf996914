"""Where a step's batch comes from: draw a pool, score it, keep the lowest.

Per-device functions, mapped over devices like the step that calls them.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from margin_jax import selection
from margin_jax.train.spec import AGAIN, FRESH, PLAIN, StepSpec

PyTree = Any

QUANTILES = {
  'score_min': 0.0,
  'score_q25': 0.25,
  'score_median': 0.5,
  'score_q75': 0.75,
  'score_max': 1.0,
}


class Choice(NamedTuple):
  """A batch, and what changed in choosing it.

  Attributes:
    batch: this device's share: 'inputs', 'label', 'index'.
    stream: the place in the data.
    reserve: selected examples that later steps train on.
    batch_stats: the model's running statistics.
    metrics: what selection did; zeros where nothing was scored.
  """

  batch: PyTree
  stream: PyTree
  reserve: PyTree
  batch_stats: PyTree
  metrics: dict[str, Array]


def head_kernel(params: PyTree) -> Array:
  """The kernel of the last layer, (D, C) float32."""
  return params['head']['kernel'].astype(jnp.float32)


def no_scores(num_classes: int) -> dict[str, Array]:
  """The metrics of a step that scores nothing."""
  names = ('scored', 'pool_error', 'batch_error', 'nan_scores', *QUANTILES)
  zeros = {name: jnp.float32(0) for name in names}
  classes = jnp.zeros(num_classes, jnp.float32)
  return {**zeros, 'pool_classes': classes, 'batch_classes': classes}


def class_counts(labels: Array, num_classes: int, axis: str) -> Array:
  """How many examples of each class all devices hold, (C,) float32."""
  counts = jnp.bincount(labels, length=num_classes).astype(jnp.float32)
  return jax.lax.psum(counts, axis)


def without_dropout(next_function, args, kwargs, context):
  """Makes `nn.Dropout` hand on what it reads, for `nn.intercept_methods`."""
  is_call = context.method_name == '__call__'
  if is_call and isinstance(context.module, nn.Dropout):
    return args[0] if args else kwargs['inputs']
  return next_function(*args, **kwargs)


def _seen(spec: StepSpec, inputs: PyTree) -> PyTree:
  """What the scorer reads of a pool as stored."""
  inputs = spec.prepare(inputs)
  side = spec.selection.resolution
  if side is None:
    return inputs
  shape = (inputs.shape[0], side, side, inputs.shape[-1])
  return jax.image.resize(inputs, shape, 'linear')


def _by_rows(function: Any, inputs: PyTree, rows: int | None) -> Array:
  """`function(inputs)`, of so many rows at a time."""
  if rows is None:
    return function(inputs)
  parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), inputs)
  found = jax.lax.map(function, parts)
  return found.reshape(-1, *found.shape[2:])


def _score(
  spec: StepSpec, state: PyTree, inputs: PyTree
) -> tuple[Array, Array, PyTree]:
  """Logits of this device's pool, the kernel, the model's batch_stats."""
  chosen = spec.selection
  params, batch_stats = state.params, state.batch_stats
  if spec.proxy is not None:
    params, batch_stats = state.proxy['params'], state.proxy['batch_stats']
  variables = {'params': params, 'batch_stats': batch_stats}

  def forward(inputs: PyTree) -> Array:
    inputs = _seen(spec, inputs)
    return chosen.scorer.apply(variables, inputs, train=False)[0]

  if chosen.pool_statistics:
    inputs = _seen(spec, inputs)
    with nn.intercept_methods(without_dropout):
      (logits, _), updates = chosen.scorer.apply(
        variables, inputs, train=True, mutable=['batch_stats']
      )
    batch_stats = updates.get('batch_stats', {})
    if spec.average_batch_stats:
      batch_stats = jax.lax.pmean(batch_stats, spec.axis)
  else:
    logits = _by_rows(forward, inputs, chosen.rows)
    batch_stats = state.batch_stats
  return logits.astype(jnp.float32), head_kernel(params), batch_stats


def _arrange(
  spec: StepSpec,
  scores: Array,
  labels: Array,
  keys: Array,
  key: Array,
  epoch: Array,
  lane: Array,
) -> Array:
  """Applies the rule's arrangement to the pool that is ranked together."""
  arrange = spec.selection.arrange
  if arrange is None:
    return scores
  draws = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(keys)
  if spec.selection.scope == 'device':
    return arrange(scores, labels, draws, jax.random.fold_in(key, lane), epoch)
  everywhere = jax.lax.all_gather(
    (scores, labels, draws), spec.axis, tiled=True
  )
  arranged = arrange(*everywhere, key, epoch)
  rows = scores.shape[0]
  return jax.lax.dynamic_slice_in_dim(arranged, lane * rows, rows)


def _metrics(
  spec: StepSpec, pool: PyTree, scores: Array, wrong: Array
) -> dict[str, Array]:
  """What there was to choose from, over all devices."""
  everywhere = jax.lax.all_gather(scores, spec.axis, tiled=True)
  total = everywhere.shape[0]
  order = selection.select_lowest(everywhere, total)
  # Of the numbers: one NaN, which ranks last, must not hide the largest.
  nan_scores = jnp.sum(jnp.isnan(everywhere))
  last = jnp.maximum(total - nan_scores - 1, 0)
  places = jnp.round(jnp.array([*QUANTILES.values()]) * last).astype(jnp.int32)
  quantiles = everywhere[order[places]]
  return {
    'scored': jnp.float32(1),
    'pool_error': jax.lax.pmean(jnp.mean(wrong, dtype=jnp.float32), spec.axis),
    'nan_scores': nan_scores.astype(jnp.float32),
    'pool_classes': class_counts(pool['label'], spec.num_classes, spec.axis),
    **dict(zip(QUANTILES, quantiles, strict=True)),
  }


def _select(
  spec: StepSpec, state: PyTree, pool: PyTree, key: Array, lane: Array, epoch
) -> tuple[PyTree, PyTree, dict[str, Array]]:
  """This device's share of the reuse * b lowest, batch_stats, metrics."""
  chosen = spec.selection
  logits, kernel, batch_stats = _score(spec, state, pool['inputs'])
  rows = logits.shape[0]
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    key, lane * rows + jnp.arange(rows)
  )
  scores = jnp.asarray(chosen.rule(logits, kernel, pool['label'], keys))
  if scores.shape != (rows,):
    raise ValueError(
      f'selection.rule must return scores of shape ({rows},), got '
      f'{scores.shape}'
    )
  # Own rules may give integers, or bfloat16: every branch has one dtype. And
  # what has no logits has no score, also with rules that do not read them.
  bad = ~jnp.all(jnp.isfinite(logits), axis=1)
  scores = jnp.where(bad, jnp.nan, scores.astype(jnp.float32))
  ranked = _arrange(spec, scores, pool['label'], keys, key, epoch, lane)
  wrong = jnp.argmax(logits, axis=1) != pool['label']
  count = chosen.reuse * spec.batch_size
  if chosen.scope == 'device':
    count, axis = count // spec.lanes, None
  else:
    axis = spec.axis
  taken = selection.take_lowest(
    ranked, {**pool, 'wrong': wrong}, count, axis_name=axis
  )
  metrics = _metrics(spec, pool, scores, wrong)
  metrics['batch_classes'] = class_counts(
    taken['label'], spec.num_classes, spec.axis
  )
  return taken, batch_stats, metrics


def empty_reserve(spec: StepSpec, inputs: PyTree) -> PyTree:
  """What `TrainState.reserve` holds before the first pool: zeros, or {}.

  Args:
    spec: the spec.
    inputs: any examples' inputs as stored; only their shapes count.
  """
  if spec.selection is None or spec.selection.reuse == 1:
    return {}
  rows = spec.selection.reuse * spec.batch_size
  return {
    'inputs': jax.tree.map(
      lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), inputs
    ),
    'label': jnp.zeros(rows, jnp.int32),
    'index': jnp.zeros(rows, jnp.int32),
    'wrong': jnp.zeros(rows, bool),
  }


def _from_reserve(
  spec: StepSpec, reserve: PyTree, phase: Array, lane: Array
) -> PyTree:
  """This device's share of the reserve's ranks phase * b onwards."""
  share = spec.batch_size // spec.lanes
  if spec.selection.scope == 'device':
    start = (lane * spec.selection.reuse + phase) * share
  else:
    start = phase * spec.batch_size + lane * share
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, share), reserve
  )


def _draw(
  spec: StepSpec,
  state: PyTree,
  data: PyTree,
  size: int,
  key: Array,
  lane: Array,
) -> tuple[PyTree, PyTree]:
  """The stream after a draw, and this device's share of what was drawn."""
  del lane
  return spec.sample(
    state.stream,
    data,
    size,
    key=jax.random.fold_in(key, 2),
    step=state.step,
    axis_name=spec.axis,
  )


def drawn(
  spec: StepSpec, state: PyTree, data: PyTree, key: Array, lane: Array
) -> PyTree:
  """The examples that a step reads, of all devices: its pool, or its batch.

  Args:
    spec: at the branch and the part of the step.
    state, data, key, lane: those of `next_batch`.
  """
  if spec.selection is not None and spec.branch == AGAIN:
    phase = (state.step - spec.selection.start) % spec.selection.reuse
    found = _from_reserve(spec, state.reserve, phase, lane)
  else:
    size = spec.examples_drawn(spec.branch)
    _, found = _draw(spec, state, data, size, key, lane)
  return jax.lax.all_gather(found, spec.axis, tiled=True)


def next_batch(
  spec: StepSpec, state: PyTree, data: PyTree, key: Array, lane: Array
) -> Choice:
  """The batch of a step, by whichever branch the step takes.

  A plain step draws b examples. A fresh one draws B, scores them and keeps
  reuse * b: the first b are its batch, the others wait in the reserve. A step
  in between takes the next b from the reserve. `key` is the run's.
  """

  def draw(size: int) -> tuple[PyTree, PyTree]:
    return _draw(spec, state, data, size, key, lane)

  def plain() -> Choice:
    stream, batch = draw(spec.batch_size)
    metrics = no_scores(spec.num_classes)
    return Choice(batch, stream, state.reserve, state.batch_stats, metrics)

  def fresh() -> Choice:
    stream, pool = draw(spec.selection.pool_size)
    rule_key = jax.random.fold_in(jax.random.fold_in(key, 3), state.step)
    taken, batch_stats, metrics = _select(
      spec, state, pool, rule_key, lane, stream.epoch
    )
    reserve = {}
    if spec.selection.reuse > 1:
      reserve = jax.lax.all_gather(taken, spec.axis, tiled=True)
      taken = _from_reserve(spec, reserve, jnp.int32(0), lane)
      reserve = spec.fit(reserve, state.reserve)
    metrics['batch_error'] = jax.lax.pmean(
      jnp.mean(taken.pop('wrong'), dtype=jnp.float32), spec.axis
    )
    return Choice(taken, stream, reserve, batch_stats, metrics)

  def again() -> Choice:
    chosen = spec.selection
    phase = (state.step - chosen.start) % chosen.reuse
    batch = _from_reserve(spec, state.reserve, phase, lane)
    batch = spec.fit(batch, data)
    del batch['wrong']
    metrics = no_scores(spec.num_classes)
    return Choice(
      batch, state.stream, state.reserve, state.batch_stats, metrics
    )

  if spec.selection is None:
    return plain()
  table = {PLAIN: plain, FRESH: fresh, AGAIN: again}
  return switch(spec, state.step, table)


def switch(spec: StepSpec, step: Array, table: dict[int, Any]) -> PyTree:
  """The branch that `spec` is compiled for, or the step's own."""
  used = spec.branches()
  if spec.branch is not None or len(used) == 1:
    return table[used[0] if spec.branch is None else spec.branch]()
  place = sum(
    (spec.branch_of(step) == branch) * i for i, branch in enumerate(used)
  )
  return jax.lax.switch(place, [table[branch] for branch in used])
