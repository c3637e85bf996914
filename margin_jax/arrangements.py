"""What is done with the scores of a whole pool before the lowest are taken."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Integer

from margin_jax.selection import Labels, Scores

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
