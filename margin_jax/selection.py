"""Selection: rules score examples, and the lowest k are kept, on any devices.

A rule is a pure function `scored -> scores`. It reads what is known of every
example, a `Scored`, and returns one number for each. The lowest scores are
selected. `RULES` is the table of the built-in rules. To add one, write a
function and add a line there, or call `register_rule`. A score transform then
changes the scores of a whole pool at once, for the rules that need it.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32, Integer, Key, PyTree, Shaped

from margin_jax import margins

Labels, Scores = Integer[Array, ' B'], Float[Array, ' B']


class Scored(NamedTuple):
  """The examples to score, of one device's shard or of all devices.

  Attributes:
    logits: (B, C) float32, from the scoring forward pass of the model or its
      proxy, in evaluation mode unless BatchNorm's statistics follow the pool;
      with a score memory, from the training forward pass.
    features: (B, D), what the last layer reads.
    kernel: (D, C) float32, the last layer's weights.
    labels: (B,) int32 in [0, C).
    index: (B,) int32, which training example each is.
    keys: (B,) one PRNG key per example. Samples drawn with it do not depend on
      the device that holds the example.
  """

  logits: Float[Array, 'B C']
  features: Float[Array, 'B D']
  kernel: Float[Array, 'D C']
  labels: Labels
  index: Int32[Array, ' B']
  keys: Key[Array, ' B']


RuleFunction = Callable[[Scored], Scores]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A function that scores examples, and its properties.

  Attributes:
    score: reads a `Scored` and returns (B,) scores.
    whole_pool: whether it reads the examples of all devices at once. Else it
      reads those of one device.
    distance: whether scores are distances between features and boundaries,
      which grow with the features: the score memory divides them by the mean
      norm of the features.
  """

  score: RuleFunction
  whole_pool: bool = False
  distance: bool = False


def _order_keys(scores: Array) -> Array:
  """Maps floats to signed integers in the same order, every NaN above +inf."""
  bits = jnp.finfo(scores.dtype).bits
  wide = jnp.int64 if bits == 64 else jnp.int32
  raw = jax.lax.bitcast_convert_type(scores, f'int{bits}').astype(wide)
  inf = jax.lax.bitcast_convert_type(
    jnp.array(jnp.inf, scores.dtype), f'int{bits}'
  ).astype(wide)
  magnitude = raw & jnp.iinfo(f'int{bits}').max
  keys = jnp.where(raw < 0, -magnitude, magnitude)
  return jnp.where(magnitude > inf, jnp.iinfo(wide).max, keys)


def select_lowest(scores: Float[Array, ' B'], k: int) -> Int32[Array, ' {k}']:
  """Returns the indices of the k lowest scores: ascending, NaN last.

  The order is that of NumPy's stable argsort: -inf first, +inf after every
  finite score, NaN after everything, equal scores (-0 and +0 are equal) by
  index. So a NaN is selected only when there are fewer than k other scores.
  (`lax.top_k` on negated floats would put NaN first, so this sorts integer
  keys.)

  Args:
    scores: (B,) floating.
    k: how many, 0 <= k <= B; static.

  Returns:
    (k,) int32 indices into `scores`.

  Raises:
    TypeError: `scores` is not floating or `k` is not an int.
    ValueError: `scores` is not a vector or `k` is out of range.

  Examples:
    >>> select_lowest(jnp.array([0.3, jnp.nan, 0.1, 0.3]), 3).tolist()
    [2, 0, 3]
  """
  scores = margins.to_array('scores', scores)
  margins.check_floating('scores', scores, 1)
  try:
    if isinstance(k, bool):
      raise TypeError('a bool')
    k = operator.index(k)
  except TypeError as error:  # a traced integer is one of these
    raise TypeError(f'k must be a static int, got {k!r}') from error
  if not 0 <= k <= scores.shape[0]:
    raise ValueError(f'k must be in [0, {scores.shape[0]}], got {k}')
  # ~x reverses the order of integers without overflowing at the smallest.
  return jax.lax.top_k(~_order_keys(scores), k)[1].astype(jnp.int32)


def query(
  scores: Float[Array, ' N'],
  k: int,
  labelled: Bool[Array, ' N'] | None = None,
) -> Int32[Array, ' {k}']:
  """Returns what an annotator should label next: the k lowest-scored examples.

  Pass `mms_scores` to find the examples nearest a decision boundary, or
  `layer_margins` without labels to find those nearest at another layer. With
  another rule's scores, you get the examples that the rule would train on.

  Args:
    scores: (N,) floating; ties go by index, NaN ranks last.
    k: how many; static.
    labelled: (N,) bool, the examples that already have a label; they are left
      out.

  Returns:
    (k,) int32 indices, ascending by score. Under `jit` the number of labelled
    examples is unknown. There, if fewer than k examples have no label, labelled
    ones follow, by index.

  Raises:
    TypeError: `scores` is not floating, `k` is not an integer, or `labelled` is
      not bool.
    ValueError: a shape does not fit, or there are fewer than k examples.

  References:
    Weinstein et al. 2020 and the ICLR 2020 submission, which name active
    learning as a use of MMS.

  Examples:
    >>> labelled = jnp.array([False, True, False])
    >>> query(jnp.array([0.3, 0.1, 0.2]), 1, labelled).tolist()
    [2]
  """
  scores = margins.to_array('scores', scores)
  margins.check_floating('scores', scores, 1)
  if labelled is None:
    return select_lowest(scores, k)
  labelled = margins.to_array('labelled', labelled)
  if labelled.dtype != bool:
    raise TypeError(f'labelled must be bool, got dtype {labelled.dtype}')
  if labelled.shape != scores.shape:
    raise ValueError(
      f'labelled must have shape {scores.shape}, one for each score, got '
      f'{labelled.shape}'
    )
  if not isinstance(labelled, jax.core.Tracer):
    left = int(np.sum(~np.asarray(labelled)))  # a device array is a constant
    if k > left:
      raise ValueError(
        f'k must be at most {left}, the number of examples without a label, '
        f'got {k}'
      )
  # Two passes, because NaN scores must rank before labelled examples.
  order = select_lowest(scores, scores.shape[0])
  first = select_lowest(labelled[order].astype(scores.dtype), k)
  return order[first]


def take_lowest(
  scores: Float[Array, ' n'],
  examples: PyTree[Shaped[Array, 'n ...'], ' T'],
  k: int,
  axis_name: str | None = None,
) -> PyTree[Shaped[Array, 'm ...'], ' T']:
  """Returns the k lowest-scored examples, exactly, of one device or many.

  Without `axis_name`, it returns the rows of `examples` at
  `select_lowest(scores, k)`. Under `pmap` with `axis_name`, `scores` and
  `examples` are this device's shard of the pool, k counts over all D devices,
  and device d returns the examples with the global ranks `[d*k/D, (d+1)*k/D)`.
  The selected set does not depend on D: ties go to the lower index in the pool,
  that is, in device order.

  Every device gathers all scores (4 bytes each) and finds the same ranking. It
  then writes the selected examples that it holds into a buffer of zeros, at
  their ranks. A reduce-scatter hands every device the examples of its ranks. So
  only the k selected examples travel, never the pool.

  Args:
    scores: (n,) floating, on every device.
    examples: pytree of arrays (n, ...), of any numeric or bool dtype.
    k: how many examples over all devices; static, divisible by the number of
      devices.
    axis_name: the mapped axis that the pool is split over, if any.

  Returns:
    The pytree with k/D rows in each array.

  Raises:
    TypeError: `scores` is not floating, or `k` is not an integer.
    ValueError: k is out of range or not divisible by the number of devices,
      or the arrays of `examples` do not have n rows.

  Examples:
    >>> pool = {'label': jnp.array([7, 8, 9])}
    >>> take_lowest(jnp.array([0.3, 0.1, 0.2]), pool, 2)['label'].tolist()
    [8, 9]
  """
  scores = margins.to_array('scores', scores)
  margins.check_floating('scores', scores, 1)
  examples = jax.tree.map(jnp.asarray, examples)
  rows = scores.shape[0]
  for leaf in jax.tree.leaves(examples):
    if leaf.shape[:1] != (rows,):
      raise ValueError(
        f'examples must hold arrays with {rows} rows, one for each score, got '
        f'shape {leaf.shape}'
      )
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  if devices == 1 or not k:
    lowest = select_lowest(scores, k)
    return jax.tree.map(lambda x: x[lowest], examples)
  if k % devices:
    raise ValueError(f'k must be divisible by {devices} devices, got {k}')

  everywhere = jax.lax.all_gather(scores, axis_name, tiled=True)
  lowest = select_lowest(everywhere, k)
  local = lowest - jax.lax.axis_index(axis_name) * rows
  held = (local >= 0) & (local < rows)
  local = jnp.where(held, local, 0)

  def exchange(x: Array) -> Array:
    dtype = x.dtype
    if jnp.issubdtype(dtype, jnp.floating):
      x = jax.lax.bitcast_convert_type(x, f'uint{jnp.finfo(dtype).bits}')
    mask = held.reshape((-1,) + (1,) * (x.ndim - 1))
    mine = jnp.where(mask, x[local], jnp.zeros((), x.dtype))
    is_bool = x.dtype == jnp.bool_
    ranked = jax.lax.psum_scatter(
      mine.astype(jnp.uint8) if is_bool else mine, axis_name, tiled=True
    )
    if jnp.issubdtype(dtype, jnp.floating):
      return jax.lax.bitcast_convert_type(ranked, dtype)
    return ranked.astype(dtype)

  return jax.tree.map(exchange, examples)


def mms(scored: Scored) -> Scores:
  """Scores by the minimal margin: nearest to the decision boundary first.

  (B,) `mms_scores` of the logits and the kernel.

  References:
    Weinstein et al. 2020, Eq. 9.
  """
  return margins.mms_scores(scored.logits, scored.kernel)


def signed_margin(scored: Scored) -> Scores:
  """Scores by the signed margin of the label: misclassified first.

  (B,) `signed_margins` of the logits, the kernel and the labels.

  References:
    Weinstein et al. 2020, Eq. 7.
  """
  return margins.signed_margins(scored.logits, scored.kernel, scored.labels)


def loss(scored: Scored) -> Scores:
  r"""Scores by minus the cross-entropy: hard-negative mining.

  $$\log p_y, \quad p = \mathrm{softmax}(\mathrm{logits})$$

  References:
    The "NM-samples" of the ICLR 2020 submission.
  """
  margins.check_logits(scored.logits)
  log_p = jax.nn.log_softmax(scored.logits.astype(jnp.float32))
  return jnp.take_along_axis(log_p, scored.labels[:, None], axis=1)[:, 0]


def entropy(scored: Scored) -> Scores:
  r"""Scores by minus the entropy of the softmax: most uncertain first.

  $$\sum_j p_j \log p_j, \quad p = \mathrm{softmax}(\mathrm{logits})$$

  References:
    ICLR 2020 submission, section 4.2.
  """
  margins.check_logits(scored.logits)
  log_p = jax.nn.log_softmax(scored.logits.astype(jnp.float32))
  # p log p tends to 0 where log p is -inf; the product alone would be NaN.
  terms = jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p)
  return jnp.sum(terms, axis=1)


def margin(scored: Scored) -> Scores:
  r"""Scores by the gap of the two highest probabilities: smallest first.

  $$p_{j_1} - p_{j_2}, \quad p = \mathrm{softmax}(\mathrm{logits})$$
  """
  margins.check_logits(scored.logits)
  p = jax.nn.softmax(scored.logits.astype(jnp.float32))
  top = jax.lax.top_k(p, 2)[0]
  return top[:, 0] - top[:, 1]


def random(scored: Scored) -> Scores:
  """Scores at random: the control that pays for scores and ignores them."""
  return jax.vmap(jax.random.uniform)(scored.keys)


RULES: dict[str, Rule] = {
  'mms': Rule(mms, distance=True),
  'signed_margin': Rule(signed_margin, distance=True),
  'loss': Rule(loss),
  'entropy': Rule(entropy),
  'margin': Rule(margin),
  'random': Rule(random),
  # With `loss_percentile_sampler` over the pool.
  'selective_backprop': Rule(loss),
}
# Those that `register_rule` has added, by name.
REGISTERED: dict[str, Rule] = {}


def find(name: str) -> Rule:
  """Returns the rule called `name`, built-in or registered."""
  return RULES[name] if name in RULES else REGISTERED[name]


# (scores, labels, uniforms, key, epoch) -> scores, of a whole pool. `uniforms`
# are (B,) in [0, 1); `key` and `epoch` are the same for all examples that are
# ranked together.
ScoreTransform = Callable[[Scores, Labels, Scores, Array, Array], Scores]


def balanced_ramp(
  scores: Scores,
  labels: Labels,
  uniforms: Scores,
  key: Array,
  epoch: Array,
  *,
  k: int,
  growth: float,
  num_classes: int,
  batches: int = 1,
) -> Scores:
  """Ramps in hard-negative mining, with balanced classes, as the authors do.

  A fraction of the batch, min(1, growth * (epoch + 1)), is hard: classes take
  turns in a random order, and each gives the hardest of its examples that are
  left. The rest is random: classes take turns again, and each gives a random
  one of the examples left.

  Args:
    scores: (B,) the rule's scores, lowest is hardest.
    labels: (B,) integers in [0, num_classes).
    uniforms: (B,) uniform in [0, 1).
    key: decides the order of the classes; the same for all examples that are
      ranked together.
    epoch: (), the number of completed passes of pools over the data.
    k: how many examples will be selected; static.
    growth: how much the hard fraction grows in a pass.
    num_classes: C.
    batches: how many batches of k / batches are taken, in order of rank; each
      has the same hard fraction.

  Returns:
    (B,) scores whose k lowest belong to those examples; NaN where `scores` is
    NaN.

  References:
    The code of the ICLR 2020 submission ("NM-samples").
  """
  turns = jax.random.permutation(key, num_classes)
  fraction = jnp.minimum(1.0, growth * (epoch + 1))
  # A little less than exact: 0.7 * 10 must not become 8 by rounding.
  size = k // batches
  hard = jnp.ceil(fraction * size * (1 - 1e-6)).astype(jnp.int32)
  easy = size - hard
  by_score = _round_robin(scores, labels, turns)
  is_hard = by_score < hard * batches
  # Hard examples and NaN take no part in the random turns.
  uniforms = jnp.where(is_hard | jnp.isnan(scores), jnp.nan, uniforms)
  at_random = _round_robin(uniforms, labels, turns)
  # Every batch first its hard examples, then its random ones.
  hard_rank = by_score // hard * size + by_score % hard
  divisor = jnp.maximum(easy, 1)
  easy_rank = at_random // divisor * size + hard + at_random % divisor
  easy_rank = jnp.where(at_random < easy * batches, easy_rank, k + at_random)
  ranks = jnp.where(is_hard, hard_rank, easy_rank).astype(jnp.float32)
  return jnp.where(jnp.isnan(scores), jnp.nan, ranks)


def _round_robin(
  scores: Scores, labels: Labels, turns: Array
) -> Integer[Array, ' B']:
  """Ranks examples as classes take turns, each giving its lowest score left."""
  # NaN has no turn: a class with nothing else left is passed over.
  order = jnp.lexsort(
    (turns[labels], _rank_in_class(scores, labels), jnp.isnan(scores))
  )
  ranks = jnp.arange(labels.shape[0])
  return jnp.zeros_like(ranks).at[order].set(ranks)


def _rank_in_class(scores: Scores, labels: Labels) -> Integer[Array, ' B']:
  """Counts the examples of the same label that score lower (NaN ranks last)."""
  order = jnp.lexsort((scores, labels))
  ordered = labels[order]
  first = jnp.searchsorted(ordered, ordered, side='left')
  rank = jnp.arange(labels.shape[0]) - first
  return jnp.zeros_like(rank).at[order].set(rank)


def loss_percentile_sampler(
  scores: Scores,
  labels: Labels,
  uniforms: Scores,
  key: Array,
  epoch: Array,
  *,
  beta: float,
) -> Scores:
  r"""Samples examples with a probability that grows with the loss.

  $$\mathrm{weight}_i = \mathrm{percentile}(\mathrm{loss}_i)^\beta$$

  The k lowest of the returned scores are a sample of k examples without
  replacement, with these weights (the Gumbel trick). The authors of
  Selective-Backprop toss a coin for each example, with percentiles over the
  last losses seen. Here the percentile is over the pool, and the batch always
  has the same size.

  Args:
    scores: (B,) minus the loss.
    labels: unused.
    uniforms: (B,) uniform in [0, 1).
    key: unused.
    epoch: unused.
    beta: 0 samples uniformly; the larger, the harder the examples.

  Returns:
    (B,) scores; NaN where `scores` is NaN.

  References:
    A. H. Jiang et al. 2019, arXiv 1910.00762.
  """
  del labels, key, epoch
  ordered = jnp.sort(scores)
  # Fraction of the pool with a loss at most this one, ties counted.
  below = jnp.searchsorted(ordered, scores, side='left')
  percentile = (jnp.sum(~jnp.isnan(scores)) - below) / scores.shape[0]
  gumbel = -jnp.log(-jnp.log(uniforms))
  sampled = -(beta * jnp.log(percentile) + gumbel)
  return jnp.where(jnp.isnan(scores), jnp.nan, sampled)
