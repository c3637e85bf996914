"""Sampling: which examples an epoch has, in which order, by remembered scores.

`shuffle`, `prune`, `weighted` and `pools` return an `Order`, once per epoch,
from the scores that earlier steps left in the score memory; the other functions
help them. So no example needs scoring, and the loader knows the whole epoch
before it begins. As elsewhere, examples with the lowest
scores are trained on, and those with the largest are easy. Examples that were
never in a batch have the score -inf.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32, Key

# Largest weight of an example, in batch means; larger ones are clipped to it.
LARGEST_WEIGHT = 10.0

Scores = Float[Array, ' N']


class Remembered(NamedTuple):
  """What is remembered of every training example.

  Attributes:
    scores: (N,) float32; -inf for examples that were in no batch yet.
    visited: (N,) int32, the step at which each was in a batch last, -1 for
      none; () if no sampler reads it.
    wrong: (N,) bool, whether each was misclassified then, or was in none; ()
      if no sampler reads it.
  """

  scores: Float32[Array, ' N']
  visited: Int32[Array, ' N'] | tuple[()]
  wrong: Bool[Array, ' N'] | tuple[()]


class Order(NamedTuple):
  """The examples of an epoch, in order.

  Attributes:
    rows: (N,) int32, indices of examples; only the first `count` are used.
    count: () int32, the examples of the epoch.
    weights: (N,) float32, the weights of the examples at the same positions; ()
      if every weight is 1.
  """

  rows: Int32[Array, ' N']
  count: Int32[Array, '']
  weights: Float32[Array, ' N'] | tuple[()]


def shuffle(
  key: Key[Array, ''], examples: int, weighted: bool = False
) -> Order:
  """Returns an epoch of all examples, in random order.

  Args:
    key: decides the order.
    examples: N; static.
    weighted: whether the order has weights, which are 1; static.

  Examples:
    >>> order = shuffle(jax.random.key(0), 4)
    >>> sorted(order.rows.tolist()), int(order.count)
    ([0, 1, 2, 3], 4)
  """
  rows = jax.random.permutation(key, examples).astype(jnp.int32)
  weights = jnp.ones(examples, jnp.float32) if weighted else ()
  return Order(rows, jnp.int32(examples), weights)


def prune(
  scores: Scores,
  key: Key[Array, ''],
  *,
  share: float | Float32[Array, ''] | None,
  drop: float = 0.5,
  least: int = 1,
  unbiased: bool = False,
) -> Order:
  """Returns an epoch without a part of the easy examples: soft pruning.

  The epoch leaves out a random fraction `drop` of the easy examples. It visits
  all others once, in random order.

  Args:
    scores: (N,) floating. The largest are easy; -inf and NaN never are.
    key: decides which examples are dropped, and the order.
    share: the fraction of examples that are easy: those with the largest
      scores, ties at random. With None, examples above the mean score are easy.
    drop: the fraction of the easy examples that is dropped, below 1; one of
      them always stays, so that over the epochs all of them come back.
    least: an epoch has at least this many examples.
    unbiased: whether the easy examples that stay have the weight 1 / (1 -
      drop), up to rounding. The sum of the losses over an epoch is then, in
      expectation, that over all examples. The epoch has fewer steps, so the
      expected loss of a step is N / count times the mean over all examples.

  Returns:
    The order; its `count` is N - ceil(drop * easy), or more: see `drop` and
    `least`.

  References:
    Qin et al. 2024 (InfoBatch), with `share=None` and minus the loss as scores.

  Examples:
    >>> scores = jnp.array([0.1, 3.0, 0.2, 4.0])
    >>> order = prune(scores, jax.random.key(0), share=0.5, drop=0.5)
    >>> epoch = order.rows[: order.count].tolist()
    >>> len(epoch), {0, 2} < {*epoch}
    (3, True)
  """
  n = scores.shape[0]
  easy = above_mean(scores)
  if share is not None:
    easy = largest(scores, share, jax.random.fold_in(key, 2))
  dropping, ordering = jax.random.split(key)
  total = jnp.sum(easy)
  staying = jnp.maximum(rounded_down((1 - drop) * total), 1)
  staying = jnp.clip(staying, least - (n - total), total)
  # Easy examples first, in random order: the first `staying` of them stay.
  shuffled = jnp.lexsort((jax.random.bits(dropping, (n,)), ~easy))
  position = jnp.zeros(n, jnp.int32).at[shuffled].set(jnp.arange(n))
  dropped = easy & (position >= staying)
  rows = jnp.lexsort((jax.random.bits(ordering, (n,)), dropped))
  weights = ()
  if unbiased:
    weight = total / jnp.maximum(staying, 1)
    weights = jnp.where(easy, weight, 1).astype(jnp.float32)[rows]
  count = n - (total - staying)
  return Order(rows.astype(jnp.int32), count.astype(jnp.int32), weights)


def rounded_down(value: Float32[Array, '']) -> Int32[Array, '']:
  """Rounds down, but for float32's own rounding: 0.1 * 50 is 5, not 4.

  A large result may be one too large: 32,770 for 0.99 * 33,101.
  """
  return jnp.floor(value * (1 + 2.5e-7)).astype(jnp.int32)


def above_mean(scores: Scores) -> Bool[Array, ' N']:
  """Returns which scores are above the mean of those that are finite.

  Examples:
    >>> above_mean(jnp.array([1.0, 2.0, 6.0, -jnp.inf])).tolist()
    [False, False, True, False]
  """
  known = jnp.isfinite(scores)
  mean = jnp.sum(jnp.where(known, scores, 0)) / jnp.maximum(jnp.sum(known), 1)
  return scores > mean


def largest(
  scores: Scores, share: float | Float32[Array, ''], key: Key[Array, '']
) -> Bool[Array, ' N']:
  """Returns which examples are the `share` of largest scores.

  Ties go by `key`; -inf and NaN are never among them.

  Examples:
    >>> scores = jnp.array([0.1, 3.0, 0.2, 4.0])
    >>> largest(scores, 0.5, jax.random.key(0)).tolist()
    [False, True, False, True]
  """
  n = scores.shape[0]
  many = rounded_down(jnp.float32(share) * n)
  known = scores > -jnp.inf
  return known & (ranks(jnp.where(known, scores, -jnp.inf), key) >= n - many)


def ranks(scores: Scores, key: Key[Array, '']) -> Int32[Array, ' N']:
  """Returns the rank of each score: 0 is the lowest, NaN last, ties by `key`.

  Ties do not go by index. Before the first epoch many scores are equal, and the
  order of the examples would decide which are trained on.

  Examples:
    >>> ranks(jnp.array([0.3, jnp.nan, 0.1]), jax.random.key(0)).tolist()
    [1, 2, 0]
  """
  n = scores.shape[0]
  order = jnp.lexsort((jax.random.bits(key, (n,)), scores))
  return jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))


def learned_share(wrong: Bool[Array, ' N'], drop: float) -> Float32[Array, '']:
  r"""Returns a share of easy examples that follows what is learned.

  $$\mathrm{share} = \min(1 - e, \; (1 - \sqrt{e})^2 / \mathrm{drop})$$

  e is the fraction of examples that were misclassified when they were last in a
  batch, or that were never in one. So an epoch drops the fraction $(1 -
  \sqrt{e})^2$ of all examples, at most $\mathrm{drop} \, (1 - e)$. That is a
  quarter of them if a quarter is misclassified; if 1% is, 81%, or half of them
  with drop = 0.5.

  Args:
    wrong: (N,) bool.
    drop: the fraction of the easy examples that is dropped, above 0.

  Examples:
    >>> wrong = jnp.array([True, False, False, False])
    >>> round(float(learned_share(wrong, drop=0.5)), 3)
    0.5
  """
  error = jnp.mean(wrong, dtype=jnp.float32)
  return jnp.minimum(1 - error, jnp.square(1 - jnp.sqrt(error)) / drop)


def weighted(
  scores: Scores,
  key: Key[Array, ''],
  *,
  batch_size: int,
  pressure: float | Float32[Array, ''],
  unbiased: bool = False,
) -> Order:
  r"""Returns an epoch of batches sampled by rank, the lowest scores most often.

  $$p_i \propto \mathrm{pressure}^{-\mathrm{rank}_i / N}$$

  The lowest score has rank 0.

  Every batch is a sample of all N examples without replacement (Gumbel top-k);
  an example may be in several batches of the epoch.

  Args:
    scores: (N,) floating; NaN ranks last.
    key: decides the sample.
    batch_size: b; static. An epoch has N // b batches.
    pressure: how many times more often the lowest score is sampled than the
      largest; 1 samples all scores equally often.
    unbiased: whether example i has the weight min(b / (N pi_i),
      `LARGEST_WEIGHT`). pi_i is the probability that the example is in a batch:
      see `inclusion_probabilities`.

  References:
    Song et al. 2018 (Ada-Boundary).

  Examples:
    >>> order = weighted(
    ...   jnp.arange(6.0), jax.random.key(0), batch_size=2, pressure=100.0
    ... )
    >>> int(order.count)
    6
  """
  n = scores.shape[0]
  batches = n // batch_size
  ranking, sampling = jax.random.split(key)
  fractions = ranks(scores, ranking).astype(jnp.float32) / n
  log_p = jax.nn.log_softmax(-jnp.log(pressure) * fractions)

  def sample(key: Array) -> Array:
    perturbed = log_p + jax.random.gumbel(key, (n,))
    return jax.lax.top_k(perturbed, batch_size)[1].astype(jnp.int32)

  sampled = jax.lax.map(sample, jax.random.split(sampling, batches)).reshape(-1)
  count = batches * batch_size
  # XLA:CPU of jax 0.11 crashes where zeros are updated here, on 2 devices.
  rows = jnp.concatenate([sampled, jnp.zeros(n - count, jnp.int32)])
  weights = ()
  if unbiased:
    included = inclusion_probabilities(jnp.exp(log_p), batch_size)
    weights = batch_size / (n * included)
    weights = jnp.minimum(weights, LARGEST_WEIGHT)[rows]
  return Order(rows, jnp.int32(count), weights)


def inclusion_probabilities(
  p: Float32[Array, ' N'], k: int
) -> Float32[Array, ' N']:
  r"""Returns the probability that each example is in a sample of k.

  $$\pi_i = 1 - \exp(-t \, p_i), \quad t \text{ such that } \sum_i \pi_i = k$$

  The sample is without replacement. Gumbel top-k takes the first k arrivals of
  Poisson processes with rates p_i, and t is about the time of the k-th arrival.
  So this is an approximation, within a few percent if no p_i is large.

  Args:
    p: (N,) probabilities of a sample of one; their sum is 1.
    k: how many examples are sampled, at most N; static.

  Examples:
    >>> inclusion_probabilities(jnp.full(4, 0.25), 2).round(3).tolist()
    [0.5, 0.5, 0.5, 0.5]
  """

  def newton(_: int, t: Array) -> Array:
    stays = jnp.exp(-t * p)
    return t + (k + jnp.sum(jnp.expm1(-t * p))) / jnp.sum(p * stays)

  # The sum is concave in t, so that this rises to the root and never passes it.
  t = jax.lax.fori_loop(0, 20, newton, jnp.float32(0))
  return -jnp.expm1(-t * p)


def pools(
  scores: Scores,
  visited: Int32[Array, ' N'] | tuple[()],
  key: Key[Array, ''],
  *,
  pool_size: int,
  batch_size: int,
  explore: float = 0.0,
) -> Order:
  """Returns an epoch made of the lowest scores of small pools.

  Divides all examples at random into pools of B, and leaves out the remainder.
  Each pool gives one batch: the round(explore * b) examples that were trained
  on longest ago, and the lowest scores of the others.

  Args:
    scores: (N,) floating; NaN ranks last.
    visited: (N,) int32, the step at which each example was last in a batch, -1
      for never; () without `explore`.
    key: decides the pools.
    pool_size: B; static.
    batch_size: b; static.
    explore: fraction of the batch by age; static.

  Examples:
    >>> order = pools(
    ...   jnp.arange(8.0), (), jax.random.key(0), pool_size=8, batch_size=2
    ... )
    >>> order.rows[: order.count].tolist()
    [0, 1]
  """
  n = scores.shape[0]
  many = n // pool_size
  members = jax.random.permutation(key, n)[: many * pool_size]
  members = members.astype(jnp.int32).reshape(many, pool_size)
  oldest = round(explore * batch_size)

  def select(pool: Array) -> Array:
    # Of equals the first in the pool, whose order is random.
    by_score = jnp.ones(pool_size, bool)
    if oldest:
      by_age = jnp.argsort(visited[pool])[:oldest]
      by_score = by_score.at[by_age].set(False)
    return pool[jnp.lexsort((scores[pool], by_score))[:batch_size]]

  selected = jax.vmap(select)(members).reshape(-1)
  count = many * batch_size
  rows = jnp.zeros(n, jnp.int32).at[:count].set(selected)
  return Order(rows, jnp.int32(count), ())
