"""The per-device train step and eval step: score -> select -> update.

Pure functions of (state, data), meant to be mapped over devices under
`spec.axis`; nothing here knows how many hosts there are or where arrays live.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from margin_jax import linearized as layers_lib
from margin_jax import margins
from margin_jax.train import gradients, guard, pool
from margin_jax.train.spec import PLAIN, StepSpec

PyTree = Any
Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
  """Everything a step reads and writes, and all that a checkpoint must hold.

  Attributes:
    step: () int32, steps done.
    seed: () uint32: batches are a pure function of (seed, step).
    stream: the place in the data.
    reserve: selected examples that later steps train on; {} without reuse.
    params, batch_stats: the model's variables.
    opt_state: the optimizer's.
    proxy: the same three of the proxy model; {} without one.
    counts: (N,) int32, how often each training example was in a batch; ()
      where that is not counted.
    nonfinite: () int32, what has stopped the run, see `guard.guard`; 0
      while all is well.
  """

  step: Array
  seed: Array
  stream: PyTree
  reserve: PyTree
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  proxy: PyTree
  counts: PyTree
  nonfinite: Array


def init_state(
  spec: StepSpec,
  stream: PyTree,
  seed: int,
  inputs: PyTree,
  counted: int | None,
) -> TrainState:
  """The state before the first step.

  Args:
    spec: the spec.
    stream: the data's stream before its first draw.
    seed: of everything random in the run.
    inputs: a batch of one, as stored; only shapes count.
    counted: the number of training examples, to count their selections.
  """
  example = spec.prepare(inputs)

  def variables(model: Any, key: Array) -> dict[str, PyTree]:
    found = model.init({'params': key}, example, train=False)
    params = found['params']
    return {
      'params': params,
      'batch_stats': found.get('batch_stats', {}),
      'opt_state': spec.optimizer.init(params),
    }

  @jax.jit
  def init(seed: Array) -> tuple[dict[str, PyTree], PyTree]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
    proxy = {} if spec.proxy is None else variables(spec.proxy, keys[1])
    return variables(spec.model, keys[0]), proxy

  seed = jnp.uint32(seed)
  model, proxy = init(seed)
  return TrainState(
    step=jnp.int32(0),
    seed=seed,
    stream=stream,
    reserve=pool.empty_reserve(spec, inputs),
    proxy=proxy,
    counts=() if counted is None else jnp.zeros(counted, jnp.int32),
    nonfinite=jnp.int32(0),
    **model,
  )


def _train_proxy(
  spec: StepSpec, state: TrainState, batch: PyTree
) -> tuple[PyTree, Metrics]:
  """One cross-entropy step of the proxy on the same batch; its loss."""
  proxy = state.proxy
  if spec.proxy is None:
    return proxy, {}

  def loss_function(params: PyTree):
    variables = {'params': params, 'batch_stats': proxy['batch_stats']}
    # A proxy is small, and has no key to drop anything by.
    with nn.intercept_methods(pool.without_dropout):
      (logits, _), updates = spec.proxy.apply(
        variables,
        spec.prepare(batch['inputs']),
        train=True,
        mutable=['batch_stats'],
      )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32), batch['label']
    )
    return jnp.mean(losses), updates.get('batch_stats', {})

  (loss, batch_stats), gradient = jax.value_and_grad(
    loss_function, has_aux=True
  )(proxy['params'])
  gradient = jax.lax.pmean(gradient, spec.axis)
  norm = optax.tree.norm(gradient)
  if spec.average_batch_stats:
    batch_stats = jax.lax.pmean(batch_stats, spec.axis)
  change, opt_state = spec.optimizer.update(
    gradient, proxy['opt_state'], proxy['params']
  )
  proxy = {
    'params': optax.apply_updates(proxy['params'], change),
    'batch_stats': batch_stats,
    'opt_state': opt_state,
  }
  loss = jax.lax.pmean(loss, spec.axis)
  return proxy, {'proxy_loss': loss, 'proxy_gradient_norm': norm}


def _update(
  spec: StepSpec, state: TrainState, batch: PyTree, key: Array, lane: Array
) -> tuple[TrainState, Metrics]:
  """One gradient step on the batch, averaged over devices."""
  gradient, batch_stats, metrics = gradients.of_batch(
    spec, state, batch, key, lane
  )
  if spec.selection is not None and spec.selection.pool_statistics:
    # Where a pool was scored, or its examples are used again, the running
    # statistics are the pool's already.
    plain = spec.branch_of(state.step) == PLAIN
    batch_stats = jax.tree.map(
      lambda new, old: jnp.where(plain, new, old),
      batch_stats,
      state.batch_stats,
    )
  alpha = 0.0 if spec.alpha is None else spec.alpha(state.step)
  metrics['gradient_norm'] = optax.tree.norm(gradient)
  metrics['bad_gradient'] = guard.first_bad_leaf(gradient)
  metrics['learning_rate'] = jnp.float32(spec.learning_rate(state.step))
  metrics['alpha'] = jnp.float32(alpha)
  change, opt_state = spec.optimizer.update(
    gradient, state.opt_state, state.params
  )
  metrics['update_norm'] = optax.tree.norm(change)
  proxy, proxy_metrics = _train_proxy(spec, state, batch)
  metrics |= proxy_metrics
  state = state.replace(
    step=state.step + 1,
    proxy=proxy,
    params=optax.apply_updates(state.params, change),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  statistics = batch_stats, proxy.get('batch_stats', {})
  if jax.tree.leaves(statistics):
    metrics['statistics_norm'] = optax.tree.norm(statistics)
  return state, metrics


def train_step(
  spec: StepSpec, state: TrainState, data: PyTree
) -> tuple[TrainState, Metrics]:
  """Forward on the pool, scores, lowest b, gradient step on those.

  Args:
    spec: what to do; static.
    state: replicated.
    data: the training split, replicated.

  Returns:
    The new state and float32 metrics, both equal on all devices. Of every
    step: 'loss' (mean cross-entropy of the batch, train-mode), 'penalty'
    (MMR, never part of 'loss'), with a large-margin loss 'large_margin' (nor is
    that), 'accuracy', 'mean_mms' (the ten smallest MMS
    of the batch, from the train-mode forward, so that every rule and plain
    training have the same quantity), 'gradient_norm', 'update_norm' (of the
    change of the parameters), 'learning_rate', 'alpha', with trimming
    'trimmed_loss', with a proxy 'proxy_loss' and 'proxy_gradient_norm', with
    BatchNorm 'statistics_norm' (of its running statistics). Two
    integers: 'bad_gradient', the place of the first parameter whose gradient is
    not finite, or -1, and 'nonfinite', see `guard.guard`. With a selection
    also 'scored' (0 or 1) and, 0 where nothing was scored: 'pool_error' and
    'batch_error' (shares misclassified by the scoring forward, that is by the
    proxy if there is one), 'nan_scores', quantiles of the rule's scores without
    NaN, and (C,) 'pool_classes' and 'batch_classes': examples of each class in
    the pool, and in the reuse * b selected from it.

    With a short backward pass of trimming, 'loss', 'penalty', 'accuracy' and
    'mean_mms' are over the part of the batch that it runs on.
  """
  before = state
  lane = jax.lax.axis_index(spec.axis)
  key = jax.random.key(state.seed)
  step_key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
  choice = pool.next_batch(spec, state, data, key, lane)
  state = state.replace(
    stream=choice.stream,
    reserve=choice.reserve,
    batch_stats=choice.batch_stats,
  )
  if not isinstance(state.counts, tuple):
    chosen = jax.lax.all_gather(choice.batch['index'], spec.axis, tiled=True)
    state = state.replace(counts=state.counts.at[chosen].add(1))
  state, metrics = _update(spec, state, choice.batch, step_key, lane)
  if spec.selection is not None:
    metrics |= choice.metrics
  # Without MMR nothing depends on the penalty.
  free = ('penalty',) if spec.alpha is None else ()
  return guard.guard(spec.on_nonfinite, before, state, metrics, free)


def repeat(step: Callable, times: int) -> Callable:
  """`times` steps in one call; metrics get a leading axis of that length."""

  def many(state: TrainState, data: PyTree):
    return jax.lax.scan(
      lambda carry, _: step(carry, data), state, None, length=times
    )

  def one(state: TrainState, data: PyTree):
    state, metrics = step(state, data)
    return state, jax.tree.map(lambda x: x[None], metrics)

  return one if times == 1 else many


def _examples(
  spec: StepSpec, size: int, split: PyTree, chunk: Array
) -> tuple[PyTree, Array, Array]:
  """This device's inputs and labels of a chunk, and which are not padding."""
  if 'real' in split:  # the chunk itself, already shared out
    return split['inputs'], split['label'], split['real']
  share = size // spec.lanes
  lane = jax.lax.axis_index(spec.axis)
  index = chunk * size + lane * share + jnp.arange(share)
  real = index < split['count']
  index = jnp.where(real, index, 0)
  return split['inputs'][index], split['label'][index], real


def eval_step(
  spec: StepSpec,
  size: int,
  attack: Callable | None,
  variables: PyTree,
  split: PyTree,
  chunk: Array,
  epsilon: Array,
) -> Metrics:
  """Sums over examples [chunk * size, (chunk + 1) * size) of a split.

  Args:
    spec: holds the model; static.
    size: examples a call over all devices; static, divisible by the lanes.
    attack: (logits_fn, inputs, labels, epsilon, bounds=) -> inputs, applied to
      the images first, or None; static.
    variables: 'params' and 'batch_stats'.
    split: 'inputs', 'label' and 'count', how many of their rows are real:
      the others are padding, so that splits of any size share one program. Or
      this device's share of the chunk alone: 'inputs', 'label' and 'real'.
    chunk: () int32.
    epsilon: () float32, the radius of the attack; images are in [0, 1].

  Returns:
    'loss' (summed cross-entropy), 'correct' and 'count', over all devices;
    over all chunks every real example counts exactly once. With F1 also
    'hits', true positives, and 'positives', those predicted plus those true.
  """
  inputs, label, real = _examples(spec, size, split, chunk)

  def logits_fn(inputs: PyTree) -> Array:
    logits, _ = spec.model.apply(variables, spec.prepare(inputs), train=False)
    return logits.astype(jnp.float32)

  if attack is not None:
    # Pixels are stored as 0, ..., 255.
    pixels = inputs.astype(jnp.float32)
    inputs = attack(logits_fn, pixels, label, 255 * epsilon, bounds=(0, 255))
  logits = logits_fn(inputs)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  sums = {
    'loss': jnp.sum(jnp.where(real, losses, 0)),
    'correct': jnp.sum(real & (jnp.argmax(logits, axis=1) == label)),
    'count': jnp.sum(real),
  }
  if spec.f1:
    positive = jnp.argmax(logits, axis=1) == 1
    sums['hits'] = jnp.sum(real & positive & (label == 1))
    # Both those predicted and those that are: 2 TP + FP + FN.
    sums['positives'] = jnp.sum(real & positive) + jnp.sum(real & (label == 1))
  return jax.lax.psum(sums, spec.axis)


def measure_step(
  spec: StepSpec,
  size: int,
  layers: tuple[str, ...],
  variables: PyTree,
  split: PyTree,
  chunk: Array,
  reference: PyTree,
) -> PyTree:
  """Margins of examples [chunk * size, (chunk + 1) * size) of a split.

  Args:
    spec, size, variables, split, chunk: as `eval_step` takes them.
    layers: at which to measure; static.
    reference: for each layer what is subtracted from its activations before
      they are squared and summed, near their mean, or digits are lost.

  Returns:
    'examples': arrays of `size` rows, padding included, over all devices, see
    `evaluation.Measurer`, and 'square/LAYER', the squared norms of the
    activations; and 'sums': the activations summed over the real examples.
  """
  inputs, label, real = _examples(spec, size, split, chunk)
  inputs = spec.prepare(inputs)
  logits, features = spec.model.apply(variables, inputs, train=False)
  logits = logits.astype(jnp.float32)
  kernel = pool.head_kernel(variables['params'])
  examples = {
    'real': real,
    'label': label,
    'prediction': jnp.argmax(logits, axis=1),
    'margin': margins.signed_margins(logits, kernel, label),
    'mms': margins.mms_scores(logits, kernel),
    'radius': margins.row_norms(features.astype(jnp.float32)),
  }
  found = layers_lib.activations_at(spec.model, variables, inputs, layers)
  logits_fn, perturbations = layers_lib.at_layers(
    spec.model, variables, inputs, layers
  )
  signed = layers_lib.layer_margins(logits_fn, perturbations, label)
  free = layers_lib.layer_margins(logits_fn, perturbations)
  sums = {}
  for name in layers:
    flat = found[name].astype(jnp.float32).reshape(label.shape[0], -1)
    flat = flat - reference[name][None, :]
    sums[name] = jnp.sum(jnp.where(real[:, None], flat, 0), axis=0)
    examples[f'margin/{name}'] = signed[name]
    examples[f'mms/{name}'] = free[name]
    examples[f'square/{name}'] = jnp.sum(jnp.square(flat), axis=1)
  return {
    'examples': jax.lax.all_gather(examples, spec.axis, tiled=True),
    'sums': jax.lax.psum(sums, spec.axis),
  }
