"""Selection: rules make scores, the lowest k are kept, on any devices.

A rule is a pure function `(logits, kernel, labels, keys) -> (B,) scores`; the
lowest scores are selected. `RULES` is the table: adding a rule is one function
and one line there, or `register`. `keys` holds one PRNG key an example, so that
what a rule draws for an example does not depend on the device it is on.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32, Integer, Key, PyTree, Shaped

from margin_jax import margins

Logits, Kernel = Float[Array, 'B C'], Float[Array, 'D C']
Labels, Scores = Integer[Array, ' B'], Float[Array, ' B']
Keys = Key[Array, ' B']
Rule = Callable[[Logits, Kernel, Labels, Keys], Scores]


def _order_keys(scores: Array) -> Array:
  """Signed integers in the order of the floats, every NaN above +inf."""
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
  """Indices of the k lowest scores, ascending, ties by index, NaN last.

  The order is that of NumPy's stable argsort: -inf first, +inf after every
  finite score, NaN after everything, equal scores (-0 and +0 are equal) by
  index. So a NaN is selected only when there are fewer than k other scores.
  (`lax.top_k` on negated floats would put NaN first; hence integer keys.)

  Args:
    scores: (B,) floating.
    k: how many, 0 <= k <= B; static.

  Returns:
    (k,) int32 indices into `scores`.

  Raises:
    TypeError: `scores` is not floating or `k` is not an int.
    ValueError: `scores` is not a vector or `k` is out of range.
  """
  scores = jnp.asarray(scores)
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
  """What an annotator should label next: the k lowest-scored examples.

  With `mms_scores` those nearest to a decision boundary, with another rule's
  scores those that the rule would train on; with `layer_margins` without
  labels those nearest at another layer.

  Args:
    scores: (N,) floating; ties go by index, NaN ranks last.
    k: how many; static.
    labelled: (N,) bool, examples that have a label and are left out.

  Returns:
    (k,) int32 indices, ascending by score. Under `jit`, where the number of
    labelled examples is unknown, labelled ones come last, by index, if there
    are fewer than k others.

  Raises:
    TypeError: `scores` is not floating, `k` no integer or `labelled` not bool.
    ValueError: a shape does not fit, or there are fewer than k examples.

  Source: Weinstein et al. 2020 and the ICLR 2020 submission, which name active
    learning as a use of MMS.
  """
  scores = jnp.asarray(scores)
  margins.check_floating('scores', scores, 1)
  if labelled is None:
    return select_lowest(scores, k)
  labelled = jnp.asarray(labelled)
  if labelled.dtype != bool:
    raise TypeError(f'labelled must be bool, got dtype {labelled.dtype}')
  if labelled.shape != scores.shape:
    raise ValueError(
      f'labelled must have shape {scores.shape}, one a score, got '
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
  """The k lowest-scored examples, exactly, over one device or many.

  Without `axis_name`, the rows of `examples` at `select_lowest(scores, k)`.
  Under `pmap` with `axis_name`, `scores` and `examples` are this device's
  share of the pool, k counts over all D devices, and device d returns the
  examples of global ranks `[d*k/D, (d+1)*k/D)`. The selected set does not
  depend on D: ties go to the lower index in the pool, that is in device order.

  Every device gathers all scores (4 bytes each) and finds the same ranking.
  It then writes the selected examples that it holds at their ranks into a
  buffer of zeros, and a reduce-scatter hands every device its ranks: only the
  k selected examples travel, never the pool.

  Args:
    scores: (n,) floating, on every device.
    examples: pytree of arrays (n, ...), of any numeric or bool dtype.
    k: how many over all devices; static, divisible by the number of devices.
    axis_name: the mapped axis that the pool is split over, if any.

  Returns:
    The pytree with k/D rows in each array.

  Raises:
    TypeError: `scores` is not floating, or `k` no integer.
    ValueError: k is out of range or not divisible by the number of devices,
      or the arrays of `examples` do not have n rows.
  """
  scores = jnp.asarray(scores)
  margins.check_floating('scores', scores, 1)
  examples = jax.tree.map(jnp.asarray, examples)
  rows = scores.shape[0]
  for leaf in jax.tree.leaves(examples):
    if leaf.shape[:1] != (rows,):
      raise ValueError(
        f'examples must hold arrays with {rows} rows, one a score, got shape '
        f'{leaf.shape}'
      )
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  if devices == 1 or not k:
    chosen = select_lowest(scores, k)
    return jax.tree.map(lambda x: x[chosen], examples)
  if k % devices:
    raise ValueError(f'k must be divisible by {devices} devices, got {k}')

  everywhere = jax.lax.all_gather(scores, axis_name, tiled=True)
  chosen = select_lowest(everywhere, k)
  local = chosen - jax.lax.axis_index(axis_name) * rows
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


def mms(logits: Logits, kernel: Kernel, labels: Labels, keys: Keys) -> Scores:
  """Minimal margin score: nearest to the decision boundary first.

  (n,) `mms_scores` of logits (n, C) and kernel (D, C). Source: Weinstein et al.
  2020, Eq. 9.
  """
  del labels, keys
  return margins.mms_scores(logits, kernel)


def loss(logits: Logits, kernel: Kernel, labels: Labels, keys: Keys) -> Scores:
  """Minus the cross-entropy: hard-negative mining.

      log p_y,    p = softmax(logits)

  (n,) float32 of logits (n, C) and labels (n,) in [0, C). Source: the
  "NM-samples" of the ICLR 2020 submission.
  """
  del kernel, keys
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]


def entropy(
  logits: Logits, kernel: Kernel, labels: Labels, keys: Keys
) -> Scores:
  """Minus the entropy of the softmax: most uncertain first.

      sum_j p_j log p_j,    p = softmax(logits)

  (n,) float32 of logits (n, C). Source: ICLR 2020 submission, section 4.2.
  """
  del kernel, labels, keys
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  # p log p tends to 0 where log p is -inf; the product alone would be NaN.
  terms = jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p)
  return jnp.sum(terms, axis=1)


def margin(
  logits: Logits, kernel: Kernel, labels: Labels, keys: Keys
) -> Scores:
  """The difference of the two highest softmax probabilities: smallest first.

      p_j1 - p_j2,    p = softmax(logits)

  (n,) float32 of logits (n, C).
  """
  del kernel, labels, keys
  p = jax.nn.softmax(logits.astype(jnp.float32))
  top = jax.lax.top_k(p, 2)[0]
  return top[:, 0] - top[:, 1]


def random(
  logits: Logits, kernel: Kernel, labels: Labels, keys: Keys
) -> Scores:
  """A uniform draw: the control that pays for scoring and ignores it.

  (n,) float32 in [0, 1), one of each of the keys (n,).
  """
  del logits, kernel, labels
  return jax.vmap(jax.random.uniform)(keys)


RULES: dict[str, Rule] = {
  'mms': mms,
  'loss': loss,
  'entropy': entropy,
  'margin': margin,
  'random': random,
  # With `percentile_draw` over the pool.
  'selective_backprop': loss,
}
# Those of the user's own, by name.
REGISTERED: dict[str, Rule] = {}


def find(name: str) -> Rule:
  """The rule called `name`."""
  return RULES[name] if name in RULES else REGISTERED[name]


def trimmed_mean(
  losses: Float[Array, ' M'], keep: int | Integer[Array, '']
) -> Float[Array, '']:
  """The mean of the `keep` largest losses: mini-batch trimming.

  `keep` may be traced: which losses count is a mask by rank, so another
  `keep` compiles nothing. Equal losses rank by index. A NaN loss makes the
  result NaN.

  Args:
    losses: (M,) floating, M >= 1.
    keep: how many; outside [1, M] it counts as the nearer end.

  Returns:
    () in the dtype of `losses`; computed in float32.

  Raises:
    TypeError: `losses` is not floating.
    ValueError: `losses` is not a vector, or empty.

  Source: Fassold, section 2.
  """
  losses = jnp.asarray(losses)
  margins.check_floating('losses', losses, 1)
  size = losses.shape[0]
  if not size:
    raise ValueError('losses must hold at least one loss, got none')
  dtype, wide = margins.compute_dtype(losses)
  losses = losses.astype(wide)
  keep = jnp.clip(keep, 1, size)
  order = select_lowest(-losses, size)
  counts = jnp.zeros(size, bool).at[order].set(jnp.arange(size) < keep)
  # NaN ranks last, so it has to be let in for it to be seen.
  total = jnp.sum(jnp.where(counts | jnp.isnan(losses), losses, 0))
  return (total / keep).astype(dtype)


# (scores, labels, draws, key, epoch) -> scores, of a whole pool.
Arrange = Callable[[Scores, Labels, Scores, Array, Array], Scores]


def _rank_in_class(scores: Scores, labels: Labels) -> Integer[Array, ' B']:
  """How many of the same label score lower (ties by index, NaN last)."""
  order = jnp.lexsort((scores, labels))
  ordered = labels[order]
  first = jnp.searchsorted(ordered, ordered, side='left')
  rank = jnp.arange(labels.shape[0]) - first
  return jnp.zeros_like(rank).at[order].set(rank)


def _round_robin(
  scores: Scores, labels: Labels, turns: Array
) -> Integer[Array, ' B']:
  """Places when classes take turns, each giving its lowest score first."""
  # NaN has no turn: a class with nothing else left is passed over.
  order = jnp.lexsort(
    (turns[labels], _rank_in_class(scores, labels), jnp.isnan(scores))
  )
  places = jnp.arange(labels.shape[0])
  return jnp.zeros_like(places).at[order].set(places)


def balanced_ramp(
  scores: Scores,
  labels: Labels,
  draws: Scores,
  key: Array,
  epoch: Array,
  *,
  k: int,
  growth: float,
  num_classes: int,
  batches: int = 1,
) -> Scores:
  """The authors' schedule of hard-negative mining, over a whole pool.

  A share of the batch, min(1, growth * (epoch + 1)), is hard: classes take
  turns in a random order, each giving its hardest example left. The rest is
  random: classes take turns again, each giving a random example of those left.

  Args:
    scores: (B,) the rule's scores, lowest is hardest.
    labels: (B,) integers in [0, num_classes).
    draws: (B,) uniform.
    key: for the order of the classes; the same on all devices.
    epoch: () passes of pools over the data done.
    k: how many will be selected; static.
    growth: of the hard share, per pass.
    num_classes: C.
    batches: how many batches of k / batches are taken, in order of rank; each
      has the same hard share.

  Returns:
    (B,) scores whose k lowest are that choice; NaN where `scores` is.

  Source: the code of the ICLR 2020 submission ("NM-samples").
  """
  turns = jax.random.permutation(key, num_classes)
  share = jnp.minimum(1.0, growth * (epoch + 1))
  # A little less than exact: 0.7 * 10 must not become 8 by rounding.
  size = k // batches
  hard = jnp.ceil(share * size * (1 - 1e-6)).astype(jnp.int32)
  easy = size - hard
  places = _round_robin(scores, labels, turns)
  is_hard = places < hard * batches
  # Hard examples and NaN are out of the second draw.
  draws = jnp.where(is_hard | jnp.isnan(scores), jnp.nan, draws)
  rest = _round_robin(draws, labels, turns)
  # Every batch first its hard examples, then its random ones.
  hard_rank = places // hard * size + places % hard
  divisor = jnp.maximum(easy, 1)
  easy_rank = rest // divisor * size + hard + rest % divisor
  easy_rank = jnp.where(rest < easy * batches, easy_rank, k + rest)
  ranks = jnp.where(is_hard, hard_rank, easy_rank).astype(jnp.float32)
  return jnp.where(jnp.isnan(scores), jnp.nan, ranks)


def percentile_draw(
  scores: Scores,
  labels: Labels,
  draws: Scores,
  key: Array,
  epoch: Array,
  *,
  beta: float,
) -> Scores:
  """Selective-Backprop: keeps with probability growing in the loss.

      weight_i = percentile(loss_i) ^ beta

  The k lowest of the returned scores are a draw of k examples without
  replacement, with these weights (the Gumbel trick). The authors toss a
  coin per example, with percentiles over the last losses seen; here the
  percentile is over the pool, and the batch always has its size.

  Args:
    scores: (B,) minus the loss.
    labels: unused.
    draws: (B,) uniform in [0, 1).
    key: unused.
    epoch: unused.
    beta: 0 draws uniformly; the larger, the harder.

  Returns:
    (B,) scores; NaN where `scores` is.

  Source: A. H. Jiang et al. 2019, arXiv 1910.00762.
  """
  del labels, key, epoch
  ordered = jnp.sort(scores)
  # Share of the pool with a loss at most this one, ties counted.
  below = jnp.searchsorted(ordered, scores, side='left')
  percentile = (jnp.sum(~jnp.isnan(scores)) - below) / scores.shape[0]
  gumbel = -jnp.log(-jnp.log(draws))
  drawn = -(beta * jnp.log(percentile) + gumbel)
  return jnp.where(jnp.isnan(scores), jnp.nan, drawn)
