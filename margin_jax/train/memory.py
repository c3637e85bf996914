"""The score memory: a score of every training example, from its last batch.

With a decay, it is an average over the batches that had the example. A step
scores its own batch with the training forward pass that it runs anyway, so a
score costs nothing. When an epoch begins, a sampler chooses its examples by
these scores.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from margin_jax import margins, sampling, selection
from margin_jax.train.spec import MemorySpec, StepSpec

PyTree = Any

# Decay of the running mean of feature norms, over about 100 steps.
NORM_DECAY = 0.99


class Memory(flax.struct.PyTreeNode):
  """What is remembered of every training example; the same on all devices.

  Attributes:
    examples: of each its score, and what else a sampler asks for.
    feature_norm: () float32, the running mean of the feature norms; 0 before
      the first batch. Distances are divided by it: features grow during
      training, and this keeps old and new scores comparable.
  """

  examples: sampling.Remembered
  feature_norm: Array


def create(spec: MemorySpec | None, examples: int) -> PyTree:
  """Returns the memory before the first step; {} where none is kept."""
  if spec is None:
    return {}
  remembered = sampling.Remembered(
    scores=jnp.full(examples, -jnp.inf, jnp.float32),
    visited=jnp.full(examples, -1, jnp.int32) if spec.visits else (),
    wrong=jnp.ones(examples, bool) if spec.errors else (),
  )
  return Memory(remembered, jnp.float32(0))


class Orders:
  """Makes orders of epochs from the memory: see `data.dataset.Orders`."""

  def __init__(self, spec: MemorySpec, memory: Memory, step: Array):
    """Reads the memory as it is before `step`."""
    self._spec = spec
    self._memory = memory
    self._step = step
    self.tail = step >= spec.tail_start

  def order(
    self, key: Array, epoch: Array, rows: Array | None
  ) -> sampling.Order:
    """See `data.dataset.Orders`; the first epochs and the tail are shuffled."""
    remembered = self._memory.examples
    if rows is not None:
      remembered = jax.tree.map(lambda x: x[rows], remembered)
    examples = len(remembered.scores)
    return jax.lax.cond(
      (epoch < self._spec.warmup) | self.tail,
      lambda: sampling.shuffle(key, examples, self._spec.has_weights),
      lambda: self._spec.sample(remembered, key, self._step),
    )


def orders(spec: StepSpec, memory: PyTree, step: Array) -> Orders | None:
  """Returns what orders the epochs; None shuffles."""
  if spec.memory is None:
    return None
  return Orders(spec.memory, memory, step)


class BatchScores(NamedTuple):
  """What the memory keeps of a batch, over all devices.

  Attributes:
    index: (b,) int32, the training examples of the batch.
    scores: (b,) float32, the rule's.
    wrong: (b,) bool, whether each was misclassified.
    feature_norm: () float32, the mean of the feature norms.
  """

  index: Array
  scores: Array
  wrong: Array
  feature_norm: Array


def gather(
  scores: Array, scored: selection.Scored, axis_name: str
) -> BatchScores:
  """Returns the scores of the batch of all devices.

  Args:
    scores: (b,) of this device's shard of the batch.
    scored: what they are scores of.
    axis_name: the name of the mapped axis.
  """
  norms = margins.row_norms(scored.features.astype(jnp.float32))
  wrong = jnp.argmax(scored.logits, axis=1) != scored.labels
  # Gathered first: a mean of the devices' means would depend on their number.
  scores, norms, wrong, index = jax.lax.all_gather(
    (scores, norms, wrong, scored.index), axis_name, tiled=True
  )
  return BatchScores(index, scores, wrong, jnp.mean(norms))


def write(
  spec: MemorySpec | None,
  memory: PyTree,
  step: Array,
  batch: BatchScores | dict,
  good: Array,
) -> PyTree:
  """Returns the memory with the scores of a batch, which XLA writes in place.

  Args:
    spec: what is kept; None keeps nothing.
    memory: the memory of the step before; {} where none is kept.
    step: () int32.
    batch: its `BatchScores`; {} where none is kept.
    good: () bool, whether the step counts. If it does not, the old scores are
      written again: a choice between two whole memories would copy them.
  """
  if spec is None:
    return memory
  old = memory.examples
  running = NORM_DECAY * memory.feature_norm + (1 - NORM_DECAY) * (
    batch.feature_norm
  )
  running = jnp.where(memory.feature_norm == 0, batch.feature_norm, running)
  scores = batch.scores
  if spec.rule.distance:
    scores = scores / jnp.where(running > 0, running, 1)
  if spec.decay:
    last = old.scores[batch.index]
    average = spec.decay * last + (1 - spec.decay) * scores
    scores = jnp.where(jnp.isfinite(last), average, scores)

  def put(array: Array, values: Array) -> Array:
    values = jnp.where(good, values, array[batch.index])
    return array.at[batch.index].set(values)

  examples = sampling.Remembered(
    scores=put(old.scores, scores),
    visited=put(old.visited, step) if spec.visits else (),
    wrong=put(old.wrong, batch.wrong) if spec.errors else (),
  )
  return Memory(examples, jnp.where(good, running, memory.feature_norm))
