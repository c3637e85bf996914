"""The train step: selective sampling (MMS) and multi-margin regularization.

`train_step` is the algorithm, and runs on every device. The functions that it
calls follow, in calling order; the initial state and other helpers come last.
`train/devices.py` maps it over the devices under one `pmap`: the forward pass
on the pool, selection and gradient step are one program. Nothing here knows the
number of hosts, or where arrays are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from margin_jax import linearized, losses, margins, selection
from margin_jax.train import accumulation, batch_norm, dropout, ema, guard
from margin_jax.train import memory as memory_lib
from margin_jax.train import metrics as metrics_lib
from margin_jax.train import proxy as proxy_lib
from margin_jax.train.spec import LossTerm, StepKind, StepSpec

PyTree = Any
Metrics = dict[str, Array]

# What is folded into the run's key: everything random has a key of its own.
INIT, DROPOUT, DATA, RULE = range(4)


class TrainState(flax.struct.PyTreeNode):
  """Everything that a step reads and writes, and that a checkpoint must hold.

  Attributes:
    step: () int32, steps done.
    seed: () uint32: what is sampled is a pure function of (seed, step) and,
      with a memory, of `memory` when the epoch began.
    sampler: the dataset's sampler state.
    buffer: selected examples that later steps train on; {} without reuse.
    params, batch_stats: the model's variables.
    opt_state: the optimizer's.
    proxy: the same three of the proxy model; {} without one.
    ema: the average of the model's variables; {} without one.
    memory: a `memory.Memory`, with a score of each training example; {} where
      none is kept.
    counts: (N,) int32, how often each training example was in a batch; ()
      where that is not counted.
    nonfinite: () int32, what has stopped the run, see `guard.guard`; 0 while
      all is well.
  """

  step: Array
  seed: Array
  sampler: PyTree
  buffer: PyTree
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  proxy: PyTree
  ema: PyTree
  memory: PyTree
  counts: PyTree
  nonfinite: Array

  @property
  def evaluated(self) -> dict[str, PyTree]:
    """The variables to evaluate and predict with: averaged, if they are."""
    source = self.ema or self
    return {'params': source.params, 'batch_stats': source.batch_stats}


def train_step(
  spec: StepSpec, state: TrainState, data: PyTree
) -> tuple[TrainState, Metrics]:
  """Samples a pool, scores it, selects the batch and trains on it.

  Steps that score no pool sample their batch, from the shuffled examples or
  from an order made of remembered scores, or take it from the last pool. With
  remembered scores, the training forward pass also scores the batch, for later
  orders.

  Args:
    spec: what to do; static.
    state: the same on all devices.
    data: what the dataset's loader has for the step.

  Returns:
    The new state and the metrics, both equal on all devices; train/metrics.py
    lists them.
  """
  before, key = state, jax.random.key(state.seed)

  sampled = next_batch(spec, state, data, key)
  batch = sampled.batch
  state = state.replace(
    sampler=sampled.sampler,
    buffer=sampled.buffer,
    batch_stats=sampled.batch_stats,
  )
  gradient, batch_stats, scores, metrics = batch_gradient(
    spec, state, batch, key
  )
  updates, opt_state = spec.optimizer.update(
    gradient, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  proxy, proxy_metrics = train_proxy(spec, state, batch)
  state = state.replace(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    proxy=proxy,
    ema=ema.update(spec.ema_decay, state.ema, params, batch_stats),
    counts=count(spec, state.counts, batch),
  )
  metrics |= metrics_lib.of_update(spec, before.step, gradient, updates, state)
  metrics |= sampled.metrics | proxy_metrics
  state, metrics = guard.guard(
    spec.on_nonfinite, spec.checked(), before, state, metrics
  )
  memory = memory_lib.write(
    spec.memory, before.memory, before.step, scores, metrics['nonfinite'] == 0
  )
  return state.replace(memory=memory), metrics


class Sampled(NamedTuple):
  """A step's batch, and what has changed by sampling it.

  Attributes:
    batch: this device's shard: 'inputs', 'label', 'index', and 'weights' where
      examples have some.
    sampler, buffer, batch_stats: of the new state.
    metrics: the metrics of the selection; {} without a selection.
  """

  batch: PyTree
  sampler: PyTree
  buffer: PyTree
  batch_stats: PyTree
  metrics: Metrics


def next_batch(
  spec: StepSpec, state: TrainState, data: PyTree, key: Array
) -> Sampled:
  """Returns the batch of a step, by the step's kind; `key` is the run's."""
  table = {
    StepKind.PLAIN: plain_batch,
    StepKind.SCORE: selected_batch,
    StepKind.REUSE: buffered_batch,
  }
  return switch(
    None if spec.variant is None else spec.variant.kind,
    spec.kind_of(state.step),
    {
      kind: functools.partial(table[kind], spec, state, data, key)
      for kind in spec.kinds()
    },
  )


def plain_batch(
  spec: StepSpec, state: TrainState, data: PyTree, key: Array
) -> Sampled:
  """Samples b examples."""
  sampler, batch = sample(spec, state, data, spec.batch_size, key)
  return Sampled(
    batch, sampler, state.buffer, state.batch_stats, metrics_lib.no_scores(spec)
  )


def selected_batch(
  spec: StepSpec, state: TrainState, data: PyTree, key: Array
) -> Sampled:
  """Samples B examples, scores them, and selects the lowest reuse * b.

  The first b of them form the batch. With reuse, the buffer keeps all of them,
  and the next steps train on the others.
  """
  rule_key = jax.random.fold_in(jax.random.fold_in(key, RULE), state.step)
  sampler, pool = sample(spec, state, data, spec.selection.pool_size, key)
  scored, batch_stats = score(spec, state, pool, rule_key)
  whole = spec.selection.scope == 'global'
  scores = rule_scores(spec, spec.selection.rule, scored, whole)
  ranked = transform(spec, scores, scored, rule_key, sampler.epoch)
  wrong = jnp.argmax(scored.logits, axis=1) != pool['label']
  mms = margins.mms_scores(scored.logits, scored.kernel)
  selected = select(spec, ranked, {**pool, 'wrong': wrong, 'mms': mms})
  metrics = metrics_lib.of_selection(spec, pool, scores, wrong, selected)
  buffer, batch = {}, {**selected}
  if spec.selection.reuse > 1:
    buffer = jax.lax.all_gather(selected, spec.axis_name, tiled=True)
    batch = from_buffer(spec, buffer, jnp.int32(0))
    del buffer['mms'], buffer['wrong']
    buffer = spec.dataset.fit(buffer, state.buffer)
  wrong, mms = batch.pop('wrong'), batch.pop('mms')
  metrics |= metrics_lib.of_selected_batch(spec, wrong, mms)
  return Sampled(batch, sampler, buffer, batch_stats, metrics)


def buffered_batch(
  spec: StepSpec, state: TrainState, data: PyTree, key: Array
) -> Sampled:
  """Takes the next b examples of the last pool from the buffer."""
  del key
  position = spec.selection.batch_in_buffer(state.step)
  batch = from_buffer(spec, state.buffer, position)
  batch = spec.dataset.fit(batch, data)
  return Sampled(
    batch,
    state.sampler,
    state.buffer,
    state.batch_stats,
    metrics_lib.no_scores(spec),
  )


def sample(
  spec: StepSpec, state: TrainState, data: PyTree, size: int, key: Array
) -> tuple[PyTree, PyTree]:
  """Returns the new sampler state and this device's shard of new examples."""
  return spec.dataset.sample(
    state.sampler,
    data,
    size,
    key=jax.random.fold_in(key, DATA),
    step=state.step,
    axis_name=spec.axis_name,
    orders=memory_lib.orders(spec, state.memory, state.step),
  )


def begin_epoch(spec: StepSpec, state: TrainState) -> TrainState:
  """Returns the state with the order of a new epoch, if one begins.

  Streamed data with a memory needs the order before the step, to decode its
  examples. Elsewhere `sample` begins the epochs itself.
  """
  sampler = spec.dataset.begin_epoch(
    state.sampler,
    spec.batch_size,
    key=jax.random.fold_in(jax.random.key(state.seed), DATA),
    orders=memory_lib.orders(spec, state.memory, state.step),
  )
  return state.replace(sampler=sampler)


def score(
  spec: StepSpec, state: TrainState, pool: PyTree, key: Array
) -> tuple[selection.Scored, PyTree]:
  """Runs the scoring forward on this device's shard of the pool.

  It runs in evaluation mode and leaves the running statistics alone, unless
  these follow the pool.

  Returns:
    What the rule reads, and the model's batch_stats.
  """
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  if spec.proxy is not None:
    variables = {x: state.proxy[x] for x in ('params', 'batch_stats')}
  scorer, batch_stats = spec.selection.scorer, state.batch_stats

  def eval_forward(inputs: Array) -> tuple[Array, Array]:
    return scorer.apply(variables, scorer_inputs(spec, inputs), train=False)

  if spec.selection.pool_statistics:
    groups = batch_norm.in_groups(spec.batch_norm_examples, spec.axis_name)
    with nn.intercept_methods(dropout.off), nn.intercept_methods(groups):
      (logits, features), updates = scorer.apply(
        variables,
        scorer_inputs(spec, pool['inputs']),
        train=True,
        mutable=['batch_stats'],
      )
    batch_stats = updates.get('batch_stats', {})
    if spec.average_batch_stats:
      batch_stats = jax.lax.pmean(batch_stats, spec.axis_name)
  else:
    logits, features = in_chunks(
      eval_forward, pool['inputs'], spec.selection.chunk_size
    )
  kernel = head_kernel(variables['params'])
  scored = scored_examples(spec, logits, features, kernel, pool, key)
  return scored, batch_stats


def scorer_inputs(spec: StepSpec, inputs: PyTree) -> PyTree:
  """Returns what the scorer reads of inputs as stored."""
  inputs = spec.dataset.prepare(inputs)
  side = spec.selection.resolution
  if side is None:
    return inputs
  shape = (inputs.shape[0], side, side, inputs.shape[-1])
  return jax.image.resize(inputs, shape, 'linear')


def in_chunks(function: Callable, inputs: PyTree, size: int | None) -> PyTree:
  """Returns `function(inputs)`, computed for `size` examples at a time."""
  if size is None:
    return function(inputs)
  chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), inputs)
  outputs = jax.lax.map(function, chunks)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def head_kernel(params: PyTree) -> Array:
  """Returns the kernel of the last layer, (D, C) float32."""
  return params['head']['kernel'].astype(jnp.float32)


def scored_examples(
  spec: StepSpec,
  logits: Array,
  features: Array,
  kernel: Array,
  examples: PyTree,
  key: Array,
) -> selection.Scored:
  """Returns what is known of this device's examples; `key` is the step's."""
  positions = own_positions(spec, logits.shape[0])
  return selection.Scored(
    logits=logits.astype(jnp.float32),
    features=features,
    kernel=kernel,
    labels=examples['label'],
    index=examples['index'],
    keys=jax.vmap(jax.random.fold_in, (None, 0))(key, positions),
  )


def rule_scores(
  spec: StepSpec,
  rule: selection.Rule,
  scored: selection.Scored,
  whole: bool,
) -> Array:
  """Returns the rule's scores of this device's examples, (n,) float32.

  An example with a logit that is not finite scores NaN, whatever the rule
  reads.

  Args:
    spec: the step's.
    rule: scores the examples.
    scored: what it reads.
    whole: whether it may read the examples of all devices, if it wants to.
  """
  read, whole = scored, whole and rule.whole_pool
  if whole:
    # All but the kernel, which every device has.
    shared = scored._replace(kernel=None)
    read = jax.lax.all_gather(shared, spec.axis_name, tiled=True)
    read = read._replace(kernel=scored.kernel)
  # A registered rule may return bfloat16.
  scores = jnp.asarray(rule.score(read)).astype(jnp.float32)
  if whole:
    scores = own_shard(spec, scores, scored.labels.shape[0])
  bad = ~jnp.all(jnp.isfinite(scored.logits), axis=1)
  return jnp.where(bad, jnp.nan, scores)


def own_shard(spec: StepSpec, gathered: Array, rows: int) -> Array:
  """Returns this device's rows of an array gathered from all devices."""
  start = jax.lax.axis_index(spec.axis_name) * rows
  return jax.lax.dynamic_slice_in_dim(gathered, start, rows)


def transform(
  spec: StepSpec,
  scores: Array,
  scored: selection.Scored,
  key: Array,
  epoch: Array,
) -> Array:
  """Returns this device's scores after the score transform.

  The transform reads all examples that are ranked together.
  """
  function = spec.selection.transform
  if function is None:
    return scores
  uniforms = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(
    scored.keys
  )
  if spec.selection.scope == 'device':
    key = jax.random.fold_in(key, jax.lax.axis_index(spec.axis_name))
    return function(scores, scored.labels, uniforms, key, epoch)
  gathered = jax.lax.all_gather(
    (scores, scored.labels, uniforms), spec.axis_name, tiled=True
  )
  return own_shard(spec, function(*gathered, key, epoch), scores.shape[0])


def select(spec: StepSpec, scores: Array, examples: PyTree) -> PyTree:
  """Returns this device's shard of the reuse * b lowest-scored examples.

  With scope 'device', every device ranks its own shard of the pool.
  """
  size, axis_name = spec.selection.reuse * spec.batch_size, spec.axis_name
  if spec.selection.scope == 'device':
    size, axis_name = size // jax.lax.axis_size(axis_name), None
  return selection.take_lowest(scores, examples, size, axis_name)


def from_buffer(spec: StepSpec, buffer: PyTree, position: Array) -> PyTree:
  """Returns this device's shard of a batch in the buffer: the position-th."""
  device = jax.lax.axis_index(spec.axis_name)
  rows = spec.batch_size // jax.lax.axis_size(spec.axis_name)
  if spec.selection.scope == 'device':
    start = (device * spec.selection.reuse + position) * rows
  else:
    start = position * spec.batch_size + device * rows
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), buffer
  )


def batch_gradient(
  spec: StepSpec, state: TrainState, batch: PyTree, key: Array
) -> tuple[PyTree, PyTree, PyTree, Metrics]:
  """Returns the mean gradient over devices, and what else the batch gives.

  With a short backward pass of trimming, all are of the examples that it runs
  on.

  Returns:
    The gradient, batch_stats, the scores to remember, and metrics.
  """
  keep = None
  if spec.trimming is not None:
    table = jnp.array(spec.trimming.keep, jnp.int32)
    keep = table[spec.trimming.epoch(state.step)]

  def of_hardest(size: int) -> tuple[PyTree, PyTree, PyTree, Metrics]:
    examples = hardest(spec, state, batch, size)
    return gradient_of(spec, state, examples, key, keep)

  gradient, batch_stats, scores, metrics = switch(
    None if spec.variant is None else spec.variant.backward_size,
    spec.backward_size(state.step),
    {n: functools.partial(of_hardest, n) for n in spec.backward_sizes()},
  )
  if spec.selection is not None and spec.selection.pool_statistics:
    # Where a pool was scored, or its examples are used again, the running
    # statistics are the pool's already.
    plain = spec.kind_of(state.step) == StepKind.PLAIN.value
    batch_stats = jax.tree.map(
      lambda new, old: jnp.where(plain, new, old),
      batch_stats,
      state.batch_stats,
    )
  return gradient, batch_stats, scores, metrics


def hardest(
  spec: StepSpec, state: TrainState, batch: PyTree, size: int
) -> PyTree:
  """Returns this device's shard of the `size` examples of largest loss.

  They are the largest over all devices, by an eval-mode forward.
  """
  if size == spec.batch_size:
    return batch
  logits, _ = spec.model.apply(
    {'params': state.params, 'batch_stats': state.batch_stats},
    spec.dataset.prepare(batch['inputs']),
    train=False,
  )
  risks = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), batch['label']
  )
  risks = weigh(risks, batch.get('weights'))
  # NaN counts as hardest: it must reach the loss, and stop the run.
  risks = jnp.where(jnp.isnan(risks), jnp.inf, risks)
  return selection.take_lowest(-risks, batch, size, spec.axis_name)


def gradient_of(
  spec: StepSpec,
  state: TrainState,
  batch: PyTree,
  key: Array,
  keep: Array | None,
) -> tuple[PyTree, PyTree, PyTree, Metrics]:
  """Differentiates the loss of the batch, and scores the batch for the memory.

  Returns:
    See `batch_gradient`.
  """
  differentiate = at_once if spec.accumulate == 1 else in_parts
  gradient, made = differentiate(spec, state, batch, key, keep)
  batch_stats, logits, features, risks, means = made
  gradient = jax.lax.pmean(gradient, spec.axis_name)
  if spec.average_batch_stats:
    batch_stats = jax.lax.pmean(batch_stats, spec.axis_name)
  kernel = head_kernel(state.params)
  metrics = metrics_lib.of_batch(spec, batch['label'], logits, kernel, means)
  scores, score_metrics = batch_scores(
    spec, state, batch, logits, features, kernel, key
  )
  metrics |= score_metrics
  if keep is not None:
    risks = weigh(risks, batch.get('weights'))
    metrics['trimmed_loss'] = mean_risk(spec, risks, keep)
  return gradient, batch_stats, scores, metrics


class Made(NamedTuple):
  """What the forward passes of a gradient made, on this device.

  Attributes:
    batch_stats: the model's new ones.
    logits, features, risks: of the examples.
    means: the means of the losses.
  """

  batch_stats: PyTree
  logits: Array
  features: Array
  risks: Array
  means: Metrics


def at_once(
  spec: StepSpec,
  state: TrainState,
  batch: PyTree,
  key: Array,
  keep: Array | None,
) -> tuple[PyTree, Made]:
  """Differentiates the loss of this device's shard of the batch.

  Returns:
    This device's gradient, and what the forward pass made.
  """
  positions = own_positions(spec, batch['label'].shape[0])

  def loss_function(params: PyTree):
    outputs, batch_stats = training_forward(
      spec, params, state, batch, positions, key
    )
    total, risks, means = total_loss(spec, state, outputs, keep, spec.terms)
    made = outputs.logits, outputs.features, risks, means
    return total, Made(batch_stats, *made)

  return jax.grad(loss_function, has_aux=True)(state.params)


def in_parts(
  spec: StepSpec,
  state: TrainState,
  batch: PyTree,
  key: Array,
  keep: Array | None,
) -> tuple[PyTree, Made]:
  """Differentiates as `at_once` does, but a part of the batch at a time.

  So only the activations of a part are in memory. A loss that is a mean over
  examples is differentiated part by part. A loss of the whole batch (MMR with
  its largest norm, trimming with its ranks) needs the outputs of all parts: a
  forward without a gradient makes them, the loss is differentiated with respect
  to logits, features and kernel, and the backward of each part goes on from
  there (Gao et al. 2021).
  """
  positions = own_positions(spec, batch['label'].shape[0])
  parts = accumulation.split(spec, (batch, positions))
  in_turn = accumulation.unrolled if spec.unrolled else jax.lax.scan

  def forward(params: PyTree, part: PyTree) -> tuple[losses.Outputs, PyTree]:
    return training_forward(spec, params, state, *part, key)

  example_terms, batch_terms = divide_terms(
    spec, lambda part: forward(state.params, part)[0], parts
  )

  def batch_loss(logits: Array, features: Array, kernel: Array):
    outputs = batch_outputs(spec, batch, logits, features, kernel)
    total, _, means = total_loss(
      spec, state, outputs, keep, batch_terms, adds_risk=keep is not None
    )
    return total, means

  kernel = head_kernel(state.params)
  cotangents = ()
  weighted = [term for term in batch_terms if term.weight is not None]
  if weighted or keep is not None:

    def outputs_of(carry: None, part: PyTree):
      outputs, _ = forward(state.params, part)
      return carry, (outputs.logits, outputs.features)

    _, outputs = in_turn(outputs_of, None, parts)
    gradients, _ = jax.grad(batch_loss, (0, 1, 2), has_aux=True)(
      *accumulation.merge(spec, outputs), kernel
    )
    *cotangents, kernel_cotangent = gradients
    cotangents = accumulation.split(spec, cotangents)

  def loss_function(params: PyTree, part: PyTree, cotangents: PyTree):
    outputs, batch_stats = forward(params, part)
    total, risks, means = total_loss(
      spec, state, outputs, None, example_terms, adds_risk=keep is None
    )
    total = total / spec.accumulate
    made = outputs.logits, outputs.features
    if cotangents:
      for cotangent, output in zip(cotangents, made, strict=True):
        total = total + jnp.sum(cotangent * output)
    return total, Made(batch_stats, *made, risks, means)

  def add(gradient: PyTree, xs: PyTree):
    more, made = jax.grad(loss_function, has_aux=True)(state.params, *xs)
    return jax.tree.map(jnp.add, gradient, more), made

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  gradient, made = in_turn(add, zeros, (parts, cotangents))
  if cotangents:
    head = gradient['head']
    total = head['kernel'] + kernel_cotangent.astype(head['kernel'].dtype)
    gradient = {**gradient, 'head': {**head, 'kernel': total}}
  batch_stats, means = jax.tree.map(
    lambda x: jnp.mean(x, axis=0), (made.batch_stats, made.means)
  )
  of_examples = accumulation.merge(
    spec, (made.logits, made.features, made.risks)
  )
  means = batch_loss(*of_examples[:2], kernel)[1] | means
  return gradient, Made(batch_stats, *of_examples, means)


def divide_terms(
  spec: StepSpec, outputs_of: Callable, parts: PyTree
) -> tuple[list[LossTerm], list[LossTerm]]:
  """Returns the losses that are means over examples, and those of a batch."""
  part = jax.tree.map(lambda x: x[0], parts)

  def values(part: PyTree) -> list[Array]:
    outputs = outputs_of(part)
    return [jnp.asarray(term.loss(outputs)) for term in spec.terms]

  shapes = jax.eval_shape(values, part)
  example_terms, batch_terms = [], []
  for term, value in zip(spec.terms, shapes, strict=True):
    (example_terms if value.ndim else batch_terms).append(term)
  return example_terms, batch_terms


def batch_outputs(
  spec: StepSpec, batch: PyTree, logits: Array, features: Array, kernel: Array
) -> losses.Outputs:
  """Returns the outputs of all parts as those of one forward."""
  return losses.Outputs(
    logits=logits,
    features=features,
    kernel=kernel,
    labels=batch['label'],
    index=batch['index'],
    weights=batch.get('weights'),
    linearize=accumulation.no_linearize,
    axis_name=spec.axis_name,
  )


def total_loss(
  spec: StepSpec,
  state: TrainState,
  outputs: losses.Outputs,
  keep: Array | None,
  terms: Sequence[LossTerm],
  adds_risk: bool = True,
) -> tuple[Array, Array, Metrics]:
  """Returns the sum of weighted losses, the risks, and the losses' means."""
  risks = spec.risk(outputs)
  means = {'loss': jnp.mean(risks)}
  total = jnp.float32(0)
  if adds_risk:
    total = mean_risk(spec, weigh(risks, outputs.weights), keep)
    if spec.risk_weight is not None:
      total = spec.risk_weight * total
  for term in terms:
    means[term.metric] = value = mean_loss(term, outputs)
    if term.weight is not None:
      total = total + term.weight(state.step) * value
  return total, risks, means


def own_positions(spec: StepSpec, rows: int) -> Array:
  """Returns where this device's rows are in the batch, or pool, of all."""
  return jax.lax.axis_index(spec.axis_name) * rows + jnp.arange(rows)


def training_forward(
  spec: StepSpec,
  params: PyTree,
  state: TrainState,
  batch: PyTree,
  positions: Array,
  key: Array,
) -> tuple[losses.Outputs, PyTree]:
  """Runs the model in training mode; returns its outputs and batch_stats."""
  variables = {'params': params, 'batch_stats': state.batch_stats}
  inputs = spec.dataset.prepare(batch['inputs'])
  key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), state.step)
  masks = dropout.by_position(positions)
  groups = batch_norm.in_groups(spec.batch_norm_examples, spec.axis_name)
  with nn.intercept_methods(masks), nn.intercept_methods(groups):
    (logits, features), updates = spec.model.apply(
      variables,
      inputs,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': key},
    )
  batch_stats = updates.get('batch_stats', {})

  def linearize(layers: tuple[str, ...]):
    statistics = linearized.batch_statistics(
      spec.model, variables, inputs, batch_stats
    )
    fixed = {**variables, 'batch_stats': statistics}
    return linearized.at_layers(spec.model, fixed, inputs, layers)

  outputs = losses.Outputs(
    logits=logits.astype(jnp.float32),
    features=features,
    kernel=head_kernel(params),
    labels=batch['label'],
    index=batch['index'],
    weights=batch.get('weights'),
    linearize=linearize,
    axis_name=spec.axis_name,
  )
  return outputs, batch_stats


def mean_loss(term: LossTerm, outputs: losses.Outputs) -> Array:
  """Returns a loss of the batch, or the weighted mean of the examples'."""
  value = jnp.asarray(term.loss(outputs))
  return jnp.mean(weigh(value, outputs.weights)) if value.ndim else value


def weigh(values: Array, weights: Array | None) -> Array:
  """Returns the examples' values times their weights, if they have any."""
  return values if weights is None else weights * values


def mean_risk(spec: StepSpec, risks: Array, keep: Array | None) -> Array:
  """Returns the mean risk, or that of the `keep` largest over all devices."""
  if keep is None:
    return jnp.mean(risks)
  gathered = jax.lax.all_gather(risks, spec.axis_name, tiled=True)
  return losses.trimmed_mean(gathered, keep)


def batch_scores(
  spec: StepSpec,
  state: TrainState,
  batch: PyTree,
  logits: Array,
  features: Array,
  kernel: Array,
  key: Array,
) -> tuple[PyTree, Metrics]:
  """Returns what the memory keeps of the batch, of all devices, and metrics.

  Without a memory it returns {} and no metrics.
  """
  if spec.memory is None:
    return {}, {}
  # With a memory no pool is scored, so nothing else uses this key.
  key = jax.random.fold_in(jax.random.fold_in(key, RULE), state.step)
  scored = scored_examples(spec, logits, features, kernel, batch, key)
  scores = rule_scores(spec, spec.memory.rule, scored, True)
  nan_scores = jnp.sum(jnp.isnan(scores), dtype=jnp.float32)
  nan_scores = jax.lax.psum(nan_scores, spec.axis_name)
  gathered = memory_lib.gather(scores, scored, spec.axis_name)
  return gathered, {'nan_scores': nan_scores}


def train_proxy(
  spec: StepSpec, state: TrainState, batch: PyTree
) -> tuple[PyTree, Metrics]:
  """Returns the proxy's new variables and metrics.

  In other than every n-th step, the proxy stays and the metrics are 0.
  """
  table = (proxy_lib.keep, proxy_lib.train)
  return switch(
    None if spec.variant is None else spec.variant.trains_proxy,
    spec.trains_proxy(state.step),
    {
      x: functools.partial(table[x], spec, state.proxy, batch)
      for x in spec.proxy_branches()
    },
  )


def count(spec: StepSpec, counts: PyTree, batch: PyTree) -> PyTree:
  """Returns the counts with the batch added, where examples are counted."""
  if isinstance(counts, tuple):
    return counts
  index = jax.lax.all_gather(batch['index'], spec.axis_name, tiled=True)
  return counts.at[index].add(1)


def switch(
  fixed: int | None, current: Array, branches: dict[int, Callable]
) -> PyTree:
  """Returns the result of one branch.

  It is the branch that the program is compiled for, or else the step's own.

  Args:
    fixed: the branch to compile alone; None compiles all.
    current: () int32, the branch of the step.
    branches: functions without arguments.
  """
  keys = list(branches)
  if fixed is not None or len(keys) == 1:
    return branches[keys[0] if fixed is None else fixed]()
  position = sum((current == key) * i for i, key in enumerate(keys))
  return jax.lax.switch(position, [branches[key] for key in keys])


def repeat(step: Callable, times: int) -> Callable:
  """Returns a function of `times` steps; metrics have an axis of steps."""

  def many(state: TrainState, data: PyTree):
    return jax.lax.scan(
      lambda carry, _: step(carry, data), state, None, length=times
    )

  def one(state: TrainState, data: PyTree):
    state, metrics = step(state, data)
    return state, jax.tree.map(lambda x: x[None], metrics)

  return one if times == 1 else many


def init_state(
  spec: StepSpec, seed: int, inputs: PyTree, counted: int | None
) -> TrainState:
  """Returns the state before the first step.

  Args:
    spec: the step's.
    seed: the seed of everything random in the run.
    inputs: a batch of one, as stored; only shapes count.
    counted: the number of training examples, to count how often each is in a
      batch; None does not count.
  """
  example = spec.dataset.prepare(inputs)

  def variables(
    model: nn.Module, optimizer: optax.GradientTransformation, key: Array
  ) -> dict[str, PyTree]:
    initial = model.init({'params': key}, example, train=False)
    return {
      'params': initial['params'],
      'batch_stats': initial.get('batch_stats', {}),
      'opt_state': optimizer.init(initial['params']),
    }

  @jax.jit
  def init(seed: Array) -> tuple[dict[str, PyTree], PyTree]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), INIT))
    proxy = {}
    if spec.proxy is not None:
      proxy = variables(spec.proxy, spec.proxy_optimizer, keys[1])
    return variables(spec.model, spec.optimizer, keys[0]), proxy

  seed = jnp.uint32(seed)
  model, proxy = init(seed)
  return TrainState(
    step=jnp.int32(0),
    seed=seed,
    sampler=spec.dataset.state(
      spec.memory is not None and spec.memory.has_weights
    ),
    buffer=empty_buffer(spec, inputs),
    proxy=proxy,
    ema=ema.create(spec.ema_decay, model['params'], model['batch_stats']),
    memory=memory_lib.create(spec.memory, spec.dataset.counts['train']),
    counts=() if counted is None else jnp.zeros(counted, jnp.int32),
    nonfinite=jnp.int32(0),
    **model,
  )


def empty_buffer(spec: StepSpec, inputs: PyTree) -> PyTree:
  """Returns the buffer before the first pool: zeros, or {} without reuse."""
  if spec.selection is None or spec.selection.reuse == 1:
    return {}
  rows = spec.selection.reuse * spec.batch_size
  buffer = {
    'inputs': jax.tree.map(
      lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), inputs
    ),
    'label': jnp.zeros(rows, jnp.int32),
    'index': jnp.zeros(rows, jnp.int32),
  }
  if spec.weighted:
    buffer['weights'] = jnp.zeros(rows, jnp.float32)
  return buffer


def examples_of_step(spec: StepSpec, state: TrainState, data: PyTree) -> PyTree:
  """Returns the examples that a step reads, of all devices: its pool or batch.

  For replay: `spec` is specialized to the step's variant.
  """
  if spec.variant.kind == StepKind.REUSE:
    position = spec.selection.batch_in_buffer(state.step)
    examples = from_buffer(spec, state.buffer, position)
  else:
    size = spec.batch_size
    if spec.variant.kind == StepKind.SCORE:
      size = spec.selection.pool_size
    key = jax.random.key(state.seed)
    _, examples = sample(spec, state, data, size, key)
  return jax.lax.all_gather(examples, spec.axis_name, tiled=True)
