"""Orders of an epoch by remembered scores: against their oracles."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from margin_jax import sampling
from tests import references
from tests.helpers import slow

N = 60
EPOCHS = 400


def keys(count=EPOCHS):
  return jax.random.split(jax.random.key(0), count)


@pytest.fixture
def scores():
  """Distinct; the example of index 7 was never seen."""
  found = np.random.default_rng(0).normal(size=N).astype(np.float32)
  found[7] = -math.inf
  return found


def epoch_of(order):
  return np.asarray(order.rows)[: int(order.count)]


@pytest.mark.parametrize('drop', [0.5, 0.25, 0.75])
def test_with_a_mean_threshold_pruning_is_infobatch(drop):
  """The same kept sets and weights, for the same losses and draws."""
  losses = np.random.default_rng(1).gamma(1, size=N).astype(np.float32)
  easy = int((losses < losses.mean()).sum())
  prune = jax.jit(
    functools.partial(sampling.prune, share=None, drop=drop, unbiased=True)
  )
  for key in keys(20):
    order = prune(-losses, key)
    draws = np.asarray(jax.random.bits(jax.random.split(key)[0], (N,)))
    kept, weights = references.infobatch(losses, 1 - drop, np.argsort(draws))
    epoch = epoch_of(order)
    assert sorted(epoch) == sorted(kept)
    found = np.asarray(order.weights)[: len(epoch)]
    # Ours is easy / staying: InfoBatch's 1 / (1 - drop) but for rounding.
    exact = len(kept) - (N - easy) == (1 - drop) * easy
    np.testing.assert_allclose(
      found, weights[epoch], 1e-6 if exact else 1 / (1 - drop) / easy
    )


@pytest.mark.parametrize(
  ('share', 'drop'), [(0.0, 0.5), (0.3, 0.7), (0.5, 0.0), (0.9, 0.9), (1, 0.5)]
)
def test_an_epoch_keeps_what_share_and_drop_say(scores, share, drop):
  """Each example once; only easy ones are dropped, each as often as others."""
  prune = functools.partial(sampling.prune, share=share, drop=drop)
  orders = jax.jit(jax.vmap(prune, (None, 0)))(scores, keys())
  expected = references.pruned_count(scores, share, drop)
  assert {*orders.count.tolist()} == {expected}
  assert orders.weights == ()
  visits = np.zeros(N)
  for rows in np.asarray(orders.rows)[:, :expected]:
    assert len({*rows.tolist()}) == expected
    visits[rows] += 1
  easy = np.argsort(scores)[N - min(int(share * N + 1e-9), N - 1) :]
  hard = np.setdiff1d(np.arange(N), easy)
  assert (visits[hard] == EPOCHS).all()
  if len(easy):
    stays = 1 - (N - expected) / len(easy)
    spread = 4.5 * math.sqrt(EPOCHS * stays * (1 - stays)) + 1e-6
    assert (abs(visits[easy] - EPOCHS * stays) <= spread).all()


def test_nothing_that_is_unknown_is_easy():
  """Neither what was never in a batch nor NaN."""
  scores = jnp.array([0.0, -math.inf, math.nan, 2.0, -math.inf, 2.1, 2.2])
  for share, count in ((1.0, 4), (None, 5)):
    order = sampling.prune(scores, jax.random.key(0), share=share, drop=0.99)
    assert {1, 2, 4} <= {*epoch_of(order).tolist()}
    assert int(order.count) == count


@pytest.mark.slow
def test_positions_are_random(scores):
  """The first example of an epoch is any of those that stay, equally often."""
  prune = functools.partial(sampling.prune, share=0.5, drop=0.0)
  orders = jax.vmap(prune, (None, 0))(scores, keys(6000))
  first = np.bincount(np.asarray(orders.rows)[:, 0], minlength=N)
  assert scipy.stats.chisquare(first).pvalue > 1e-3


@pytest.mark.parametrize(
  ('wrong', 'dropped'), [(0.25, 0.25), (0.01, 0.81), (1.0, 0.0), (0.0, 0.9)]
)
def test_the_share_follows_what_is_learned(wrong, dropped):
  """(1 - sqrt(e))^2 is dropped, but at most `drop` of what is learned."""
  flags = jnp.arange(400) < 400 * wrong
  share = sampling.learned_share(flags, 0.9)
  np.testing.assert_allclose(0.9 * share, dropped, 1e-5, 1e-6)


def weighted(scores, count, **options):
  sample = functools.partial(sampling.weighted, **options)
  return jax.jit(jax.vmap(sample, (None, 0)))(scores, keys(count))


def probabilities(scores, pressure):
  ranks = np.argsort(np.argsort(scores, kind='stable'))
  p = pressure ** (-ranks / len(scores))
  return p / p.sum()


@pytest.mark.parametrize('pressure', [4.0, *slow(100.0, 1.0)])
def test_weighted_sampling_has_its_probabilities(scores, pressure):
  """Chi-square: of batches of one, and of the first of batches of five."""
  p = probabilities(scores, pressure)
  for batch_size in (1, 5):
    orders = weighted(scores, 200, batch_size=batch_size, pressure=pressure)
    assert {*orders.count.tolist()} == {N}
    batches = np.asarray(orders.rows).reshape(-1, batch_size)
    first = np.bincount(batches[:, 0], minlength=N)
    assert scipy.stats.chisquare(first, p * len(batches)).pvalue > 1e-3
    assert all(len({*batch}) == batch_size for batch in batches.tolist())


def test_the_chi_square_sees_other_probabilities(scores):
  """The test above can fail."""
  orders = weighted(scores, 200, batch_size=1, pressure=5.0)
  counts = np.bincount(np.asarray(orders.rows).ravel(), minlength=N)
  p = probabilities(scores, 4.0)
  assert scipy.stats.chisquare(counts, p * counts.sum()).pvalue < 1e-3


@pytest.mark.slow
def test_weights_make_the_sum_over_an_epoch_unbiased(scores):
  """Over many draws, within four standard errors; without weights it is not.

  Of weighted sampling, whose probabilities are an approximation, within 2%.
  """
  losses = np.exp(-np.where(np.isfinite(scores), scores, 3))
  samplers = {
    'prune': functools.partial(sampling.prune, share=0.4, drop=0.75),
    'weighted': functools.partial(
      sampling.weighted, batch_size=10, pressure=30.0
    ),
  }
  for name, sampler in samplers.items():
    slack = 0.02 * losses.mean() * (name == 'weighted')
    for unbiased in (True, False):
      sample = functools.partial(sampler, unbiased=unbiased)
      orders = jax.jit(jax.vmap(sample, (None, 0)))(scores, keys(1000))
      inside = np.arange(N) < np.asarray(orders.count)[:, None]
      values = losses[np.asarray(orders.rows)] * inside
      if unbiased:
        values = values * np.asarray(orders.weights)
      epochs = values.sum(axis=1) / N
      error = epochs.std() / math.sqrt(len(epochs))
      difference = abs(epochs.mean() - losses.mean())
      assert (difference < 4 * error + slack) == unbiased


def test_one_easy_example_always_stays(scores):
  """A tenth of three is none: without it, the three would never come back."""
  easy = {*np.argsort(scores)[-3:].tolist()}
  prune = functools.partial(sampling.prune, share=0.05, drop=0.9, unbiased=True)
  orders = jax.jit(jax.vmap(prune, (None, 0)))(scores, keys(50))
  stayed = set()
  for rows, count, weights in zip(*map(np.asarray, orders), strict=True):
    (one,) = easy & {*rows[:count].tolist()}
    assert count == N - 2
    assert weights[:count][rows[:count] == one] == 3
    stayed.add(one)
  assert stayed == easy


@pytest.mark.parametrize('drop', [0.1, 0.3, 0.5, 0.64, 0.75, 0.9])
def test_counts_are_rounded_down(drop):
  for easy in (99_999, 50_000, 999, 50, 20):
    exact = (100 - round(100 * drop)) * easy // 100
    staying = jax.jit(lambda easy: sampling.rounded_down((1 - drop) * easy))
    assert int(staying(jnp.int32(easy))) == exact


def test_inverse_probabilities_are_clipped(scores):
  order = sampling.weighted(
    scores, jax.random.key(0), batch_size=1, pressure=1e6, unbiased=True
  )
  weights = np.asarray(order.weights)
  p = probabilities(scores, 1e6).astype(np.float32)
  included = np.asarray(sampling.inclusion_probabilities(p, 1))
  expected = np.minimum(1 / (N * included), sampling.LARGEST_WEIGHT)
  np.testing.assert_allclose(weights, expected[np.asarray(order.rows)], 1e-4)
  assert expected.max() == sampling.LARGEST_WEIGHT


@pytest.mark.parametrize('explore', [0.0, 0.4, 1.0])
def test_pools_agree_with_their_oracle(scores, explore):
  visited = np.random.default_rng(2).permutation(N).astype(np.int32)
  key = jax.random.key(3)
  order = jax.jit(
    functools.partial(
      sampling.pools, pool_size=16, batch_size=5, explore=explore
    )
  )(scores, visited, key)
  expected = references.pool_batches(
    scores, visited, np.asarray(jax.random.permutation(key, N)), 16, 5, explore
  )
  assert epoch_of(order).size == 15
  found = epoch_of(order).reshape(3, 5).tolist()
  assert [{*x} for x in found] == [{*x} for x in expected]


@pytest.mark.slow
def test_ties_go_at_random():
  """Of equal scores no example is preferred, as none is before the first."""
  scores = jnp.array([0.5, 2.0, 0.5, -1.0])
  ranks = jax.vmap(sampling.ranks, (None, 0))(scores, keys())
  assert {*map(tuple, ranks.tolist())} == {(1, 3, 2, 0), (2, 3, 1, 0)}
  easy = jax.vmap(sampling.largest, (None, None, 0))(scores, 0.5, keys())
  assert {tuple(x) for x in easy.tolist()} == {
    (False, True, True, False),
    (True, True, False, False),
  }
  for equal in (jnp.zeros(N), jnp.full(N, -jnp.inf)):
    orders = weighted(equal, EPOCHS, batch_size=5, pressure=100.0)
    # The first of each epoch: those of one epoch are not independent.
    visits = np.bincount(np.asarray(orders.rows)[:, 0], minlength=N)
    assert scipy.stats.chisquare(visits).pvalue > 1e-3


@pytest.mark.parametrize(('share', 'drop'), [(1.0, 0.999), (0.9, 0.9)])
def test_an_epoch_has_at_least_a_batch(share, drop):
  """And the weights are of the examples that stay."""
  scores = jnp.arange(40.0)
  order = sampling.prune(
    scores, jax.random.key(0), share=share, drop=drop, least=32, unbiased=True
  )
  assert int(order.count) == 32
  np.testing.assert_allclose(order.weights[:32].sum(), 40, 1e-5)


@pytest.mark.parametrize('k', [5, *slow(1, 20)])
def test_inclusion_probabilities_are_those_of_gumbel_top_k(scores, k):
  p = probabilities(scores, 30.0)
  expected = sampling.inclusion_probabilities(jnp.asarray(p, jnp.float32), k)
  np.testing.assert_allclose(expected.sum(), k, 1e-4)
  orders = weighted(scores, 4000 // (N // k), batch_size=k, pressure=30.0)
  batches = np.asarray(orders.rows)[:, : N // k * k].reshape(-1, k)
  found = np.bincount(batches.ravel(), minlength=N) / len(batches)
  spread = np.sqrt(found * (1 - found) / len(batches))
  assert (abs(found - expected) < 4.5 * spread + 0.06 * expected).all()
