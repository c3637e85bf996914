"""The loss of a batch, and its mean gradient over devices.

Per-device functions, mapped over devices like the step that calls them.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from margin_jax import linearized, margins, selection
from margin_jax import losses as losses_lib
from margin_jax.train import pool
from margin_jax.train.spec import StepSpec

PyTree = Any

# Mean MMS is over the ten smallest (ICLR 4.1, Figure 3).
MEAN_MMS_EXAMPLES = 10


def _mean_mms(logits: Array, kernel: Array, axis: str) -> Array:
  """The mean of the ten smallest MMS over the devices' batch (ICLR 4.1)."""
  scores = margins.mms_scores(logits, kernel)
  scores = jax.lax.all_gather(scores, axis, tiled=True)
  count = min(MEAN_MMS_EXAMPLES, scores.shape[0])
  return jnp.mean(scores[selection.select_lowest(scores, count)])


def _batch_loss(spec: StepSpec, losses: Array, keep: Array | None) -> Array:
  """The mean loss, or that of the `keep` hardest over all devices."""
  if keep is None:
    return jnp.mean(losses)
  everywhere = jax.lax.all_gather(losses, spec.axis, tiled=True)
  return selection.trimmed_mean(everywhere, keep)


def _large_margin(
  spec: StepSpec, variables: PyTree, updated: PyTree, batch: PyTree
) -> Array:
  """The mean large-margin loss of this device's share of the batch.

  In evaluation mode, because in training mode the examples leak into each
  other's gradients through BatchNorm, but with the statistics of the batch
  itself: the running ones lag behind weights that move fast.

  Args:
    spec: names the layers and options.
    variables: of the training-mode forward.
    updated: its new batch_stats.
    batch: 'inputs' and 'label'.
  """
  inputs = spec.prepare(batch['inputs'])
  statistics = linearized.batch_statistics(
    spec.model, variables, inputs, updated
  )
  logits_fn, perturbations = linearized.at_layers(
    spec.model,
    {**variables, 'batch_stats': statistics},
    inputs,
    spec.large_margin.layers,
  )
  losses = losses_lib.large_margin_loss(
    logits_fn, perturbations, batch['label'], **spec.large_margin.options
  )
  return jnp.mean(losses)


def dropout_by_place(lane: Array) -> Callable:
  """Gives each example a dropout mask of its own, by its place in the batch.

  So that the masks, like the batch, do not depend on the number of devices. A
  layer that drops the same activations of all examples is left as it is: its
  key is the same on all devices.

  Args:
    lane: () int32, this device's index.

  Returns:
    An interceptor of `nn.Dropout`, for `nn.intercept_methods`. The layer's key
    must be the same on all devices. What it drops from has a device's examples
    on its first axis, or a multiple of them in their order.
  """

  def intercept(next_function, args, kwargs, context):
    module = context.module
    if not isinstance(module, nn.Dropout) or context.method_name != '__call__':
      return next_function(*args, **kwargs)
    return _drop(module, lane, next_function, *args, **kwargs)

  return intercept


def _drop(
  module: nn.Dropout,
  lane: Array,
  next_function: Callable,
  inputs: Array,
  deterministic: bool | None = None,
  rng: Array | None = None,
) -> Array:
  """What `nn.Dropout` returns, but for the mask; see `dropout_by_place`."""
  off = nn.merge_param('deterministic', module.deterministic, deterministic)
  shared = {axis % inputs.ndim for axis in module.broadcast_dims}
  if off or 0 in shared or not 0 < module.rate < 1:
    return next_function(inputs, deterministic, rng)
  # Of the layer: make_rng folds the layer's path into the step's key.
  key = module.make_rng(module.rng_collection) if rng is None else rng
  rows = inputs.shape[0]  # of examples, or of their tokens
  places = lane * rows + jnp.arange(rows)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
  shape = [1 if i in shared else n for i, n in enumerate(inputs.shape)]
  level = max(round((1 - module.rate) * 2**16), 1)  # of 65,536
  if level == 2**16:
    return inputs
  mask = jax.vmap(lambda k: _below(k, level, shape[1:]))(keys)
  mask = jnp.broadcast_to(mask, inputs.shape)
  return jnp.where(mask, inputs / (level / 2**16), jnp.zeros_like(inputs))


def _below(key: Array, level: int, shape: list[int]) -> Array:
  """True with probability level / 2**16.

  Two from each word: `jax.random.bernoulli` takes a word for each, and three
  to four times as long on CPU.
  """
  count = math.prod(shape)
  words = jax.random.bits(key, (-(-count // 2),), jnp.uint32)
  halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
  return (halves[:count] < level).reshape(shape)


def _gradient(
  spec: StepSpec, state: PyTree, batch: PyTree, key: Array, lane: Array, keep
) -> tuple[PyTree, PyTree, dict[str, Array]]:
  """Mean gradient over devices, batch_stats, and what the metrics need."""

  def loss_function(params: PyTree):
    variables = {'params': params, 'batch_stats': state.batch_stats}
    with nn.intercept_methods(dropout_by_place(lane)):
      (logits, features), updates = spec.model.apply(
        variables,
        spec.prepare(batch['inputs']),
        train=True,
        mutable=['batch_stats'],
        rngs={'dropout': key},
      )
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    penalty = losses_lib.mmr_penalty(
      features,
      logits,
      pool.head_kernel(params),
      batch['label'],
      axis_name=spec.axis,
      **spec.mmr,
    )
    total = _batch_loss(spec, losses, keep)
    batch_stats = updates.get('batch_stats', {})
    means = {'loss': jnp.mean(losses), 'penalty': penalty}
    if spec.large_margin is not None:
      large_margin = _large_margin(spec, variables, batch_stats, batch)
      means['large_margin'] = large_margin
      total = spec.large_margin.cross_entropy * total
      total = total + spec.large_margin.weight * large_margin
    if spec.alpha is not None:
      total = total + spec.alpha(state.step) * penalty
    return total, (batch_stats, logits, losses, means)

  gradient, (batch_stats, logits, losses, means) = jax.grad(
    loss_function, has_aux=True
  )(state.params)
  gradient = jax.lax.pmean(gradient, spec.axis)
  if spec.average_batch_stats:
    batch_stats = jax.lax.pmean(batch_stats, spec.axis)
  correct = jnp.argmax(logits, axis=1) == batch['label']
  means['accuracy'] = jnp.mean(correct, dtype=jnp.float32)
  metrics = jax.lax.pmean(means, spec.axis)
  if keep is not None:
    metrics['trimmed_loss'] = _batch_loss(spec, losses, keep)
  kernel = pool.head_kernel(state.params)
  metrics['mean_mms'] = _mean_mms(logits, kernel, spec.axis)
  return gradient, batch_stats, metrics


def _kept_part(
  spec: StepSpec, state: PyTree, batch: PyTree, size: int
) -> PyTree:
  """The `size` hardest of the batch, by an eval-mode forward."""
  if size == spec.batch_size:
    return batch
  logits, _ = spec.model.apply(
    {'params': state.params, 'batch_stats': state.batch_stats},
    spec.prepare(batch['inputs']),
    train=False,
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), batch['label']
  )
  # NaN counts as hardest: it must reach the loss, and stop the run.
  losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
  return selection.take_lowest(-losses, batch, size, spec.axis)


def of_batch(
  spec: StepSpec, state: PyTree, batch: PyTree, key: Array, lane: Array
) -> tuple[PyTree, PyTree, dict[str, Array]]:
  """The gradient of a batch, trimmed where the spec says so.

  Args:
    spec: what the loss is; static.
    state: `params`, `batch_stats` and `step` are read.
    batch: this device's share: 'inputs' and 'label'.
    key: of the step, for dropout; the same on all devices.
    lane: () int32, this device's index.

  Returns:
    The mean gradient over devices, the new batch_stats, and metrics.
  """
  trimming = spec.trimming
  if trimming is None:
    return _gradient(spec, state, batch, key, lane, None)
  table = jnp.array(trimming.keep, jnp.int32)
  keep = table[trimming.epoch(state.step)]
  if not trimming.kept_only:
    return _gradient(spec, state, batch, key, lane, keep)

  def branch(size: int) -> Callable:
    return lambda: _gradient(
      spec, state, _kept_part(spec, state, batch, size), key, lane, keep
    )

  sizes = dict(enumerate(trimming.sizes))
  branches = {index: branch(size) for index, size in sizes.items()}
  return pool.switch(spec, state.step, branches)
