"""Trimming, the ramp of hard negatives, and Selective-Backprop's draw."""

import fractions
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from margin_jax import select_lowest, selection, trimmed_mean
from tests import references

INF, NAN = np.inf, np.nan
SIZES = [1, 2, 7, 64]

jit_trimmed = jax.jit(trimmed_mean)
jit_gradient = jax.jit(jax.grad(trimmed_mean))


def random_losses(size, seed=0):
  """Losses of which many are equal and some are zero."""
  rng = np.random.default_rng(seed)
  losses = rng.gamma(1.0, size=size) * rng.integers(0, 2, size)
  losses[::3] = 0.5
  return losses.astype(np.float32)


@pytest.mark.parametrize('size', SIZES)
def test_trimmed_mean_is_that_of_the_largest_and_compiles_once(size):
  traces = 0

  @jax.jit
  def value_and_gradient(losses, keep):
    nonlocal traces
    traces += 1
    return jax.value_and_grad(trimmed_mean)(losses, keep)

  losses = random_losses(size)
  # Below, within and beyond the range that makes sense.
  for keep in (-3, *range(size + 2), 10 * size):
    value, gradient = value_and_gradient(losses, keep)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
      value, references.trimmed_mean(losses, keep), 1e-6
    )
    # Which of the equal ones count shows in the gradient only: the first.
    kept = min(max(keep, 1), size)
    expected = np.zeros(size, np.float32)
    expected[references.select_lowest(-losses, kept)] = np.float32(1 / kept)
    np.testing.assert_allclose(gradient, expected, 1e-6)
  assert traces == 1


def test_trimmed_mean_of_hand_made_losses():
  losses = np.array([1, 4, 2, 4, 0], np.float32)
  values = [jit_trimmed(losses, keep) for keep in range(1, 6)]
  np.testing.assert_allclose(values, [4, 4, 10 / 3, 11 / 4, 11 / 5], 1e-6)
  np.testing.assert_array_equal(jit_gradient(losses, 1), [0, 1, 0, 0, 0])
  np.testing.assert_array_equal(jit_gradient(losses, 2), [0, 0.5, 0, 0.5, 0])
  for keep in (np.int32(4), np.int64(4), jnp.int32(4), jnp.uint8(4)):
    assert jit_trimmed(losses, keep) == 11 / 4


def test_trimmed_mean_gradients_are_right_numerically():
  # Further apart than the step of the finite difference.
  losses = np.random.default_rng(1).permutation(9).astype(np.float32)
  for keep in (1, 4, 9):
    check_grads(
      functools.partial(jit_trimmed, keep=keep), (losses,), order=1, atol=1e-2
    )


def test_trimmed_mean_of_nan_is_nan_wherever_it_ranks():
  for place, keep in itertools.product(range(4), range(1, 5)):
    for nan in (NAN, -NAN):
      losses = np.array([3, 1, 2, 0], np.float32)
      losses[place] = nan
      assert np.isnan(jit_trimmed(losses, keep))


def test_trimmed_mean_of_infinite_losses():
  for losses in ([INF, 1, -INF, 2], [-INF, INF, 0, INF], [-INF] * 4):
    losses = np.array(losses, np.float32)
    for keep in range(1, 5):
      np.testing.assert_array_equal(
        jit_trimmed(losses, keep), references.trimmed_mean(losses, keep)
      )
      expected = np.zeros(4)
      expected[references.select_lowest(-losses, keep)] = 1 / keep
      np.testing.assert_allclose(jit_gradient(losses, keep), expected, 1e-6)


def test_trimmed_mean_computes_wide_and_rounds_once():
  # In 16 bits, the sum of float16 is inf and that of bfloat16 stops at 256.
  for dtype, factor in ((jnp.float16, 1000), (jnp.bfloat16, 1)):
    losses = jnp.asarray(1 + random_losses(1024), dtype) * factor
    for keep in (100, 1024):
      value = jit_trimmed(losses, keep)
      assert value.dtype == dtype
      expected = references.trimmed_mean(losses, keep)
      assert value == jnp.float32(expected).astype(dtype)
    assert jit_gradient(losses, 100).dtype == dtype


def test_trimmed_mean_of_float64():
  losses = np.random.default_rng(2).gamma(1.0, size=9)
  with jax.enable_x64(True):
    value = jit_trimmed(losses, 5)
  assert value.dtype == jnp.float64
  np.testing.assert_allclose(value, references.trimmed_mean(losses, 5), 1e-14)


def test_trimmed_mean_under_vmap():
  losses = np.stack([random_losses(7, seed) for seed in range(3)])
  keeps = np.array([1, 4, 7])
  expected = [
    references.trimmed_mean(row, keep)
    for row, keep in zip(losses, keeps, strict=True)
  ]
  np.testing.assert_allclose(
    jax.jit(jax.vmap(trimmed_mean))(losses, keeps), expected, 1e-6
  )


@pytest.mark.parametrize(
  ('losses', 'error', 'message'),
  [
    (np.arange(3), TypeError, 'losses must be a floating-point'),
    (np.ones((3, 1), np.float32), ValueError, 'losses must have 1 dim'),
    (np.float32(1), ValueError, 'losses must have 1 dim'),
    (np.ones(0, np.float32), ValueError, 'losses must hold at least one'),
  ],
)
def test_trimmed_mean_bad_arguments_raise(losses, error, message):
  with pytest.raises(error, match=message):
    trimmed_mean(losses, 1)


@pytest.mark.parametrize(
  ('keep', 'error'),
  [
    (2.5, TypeError),
    (2.0, TypeError),
    (np.float32(2), TypeError),
    (True, TypeError),
    (None, TypeError),
    ('2', TypeError),
    ([2], TypeError),
    (np.array([2]), ValueError),
  ],
)
def test_trimmed_mean_keeps_a_number_of_losses(keep, error):
  losses = jnp.array([4.0, 3.0, 2.0, 1.0])
  with pytest.raises(error, match='keep must be one integer, got'):
    trimmed_mean(losses, keep)
  if isinstance(keep, float):
    with pytest.raises(error, match='keep must be one integer, got'):
      jit_trimmed(losses, keep)


@pytest.mark.parametrize('keep', [2**40, -(2**40), 7, 0, np.uint8(200)])
def test_trimmed_mean_clips_any_integer(keep):
  losses = random_losses(300)
  np.testing.assert_allclose(
    trimmed_mean(losses, keep), references.trimmed_mean(losses, keep), 1e-6
  )


def test_trimmed_mean_of_gathered_losses_has_the_gradient_of_one_device():
  # A parameter an example, and equal losses on different devices.
  params = np.array([3, 1, 2, 3] * 4, np.float32)
  scale = np.linspace(1, 2, 4).repeat(4).astype(np.float32)[::-1]
  scale[4:8] = scale[:4]

  def losses_of(params, rows):
    return (params * scale)[rows] ** 2

  def gradient(params, rows, keep):
    def loss(params):
      everywhere = jax.lax.all_gather(
        losses_of(params, rows), 'device', tiled=True
      )
      return trimmed_mean(everywhere, keep)

    return jax.lax.pmean(jax.grad(loss)(params), 'device')

  mapped = jax.pmap(
    gradient,
    axis_name='device',
    in_axes=(None, 0, None),
    devices=jax.devices()[:4],
  )
  alone = jax.jit(
    jax.grad(lambda p, keep: trimmed_mean(losses_of(p, np.arange(16)), keep))
  )
  for keep in (1, 5, 16):
    expected = alone(params, keep)
    assert np.count_nonzero(expected) == keep
    for actual in mapped(params, np.arange(16).reshape(4, 4), keep):
      np.testing.assert_allclose(actual, expected, 1e-6)


CLASSES = 5
# The last is well beyond the end of every ramp below.
EPOCHS = np.array([0, 1, 2, 4, 6, 8, 9, 50])


@jax.jit
@jax.vmap
def class_orders(key):
  """The classes in the order of their turns, for a stack of keys."""
  return jnp.argsort(jax.random.permutation(key, CLASSES))


def make_pool(kind, size, rng):
  """float32 scores and int32 labels of a pool that is special in one way."""
  scores = rng.normal(size=size)
  labels = rng.permutation(np.arange(size) % CLASSES)
  if kind == 'unbalanced':
    labels = np.minimum(rng.geometric(0.5, size) - 1, CLASSES - 1)
  elif kind == 'missing':
    labels = rng.choice([1, 3], size)
  elif kind == 'ties':
    scores = rng.choice([-INF, -1, -0.0, 0.0, 1, INF], size)
  elif kind == 'NaN':
    scores[rng.random(size) < 0.3] = NAN
  elif kind == 'NaN class':
    scores[labels < 2] = NAN
  elif kind == 'mostly NaN':
    scores[3:] = NAN
  return scores.astype(np.float32), labels.astype(np.int32)


@functools.cache
def ramp_chooser(k, growth):
  """Which k each of a stack of pools chooses, and the arranged scores."""

  @jax.jit
  @jax.vmap
  def choose(scores, labels, draws, key, epoch):
    arranged = selection.balanced_ramp(
      scores,
      labels,
      draws,
      key,
      epoch,
      k=k,
      growth=growth,
      num_classes=CLASSES,
    )
    return select_lowest(arranged, k), arranged

  return choose


@pytest.mark.parametrize(
  'kind',
  [
    'balanced',
    'unbalanced',
    'missing',
    'ties',
    'NaN',
    'NaN class',
    'mostly NaN',
  ],
)
@pytest.mark.parametrize(('k', 'growth'), [(10, 0.1), (7, 0.3), (24, 0.1)])
def test_balanced_ramp_chooses_as_classes_taking_turns(kind, k, growth):
  size, copies = 24, 3
  rng = np.random.default_rng(0)
  epochs = EPOCHS.repeat(copies)
  pools = [make_pool(kind, size, rng) for _ in epochs]
  scores, labels = map(np.stack, zip(*pools, strict=True))
  # Few values, so that some draws are equal.
  draws = rng.integers(0, 2 * size, scores.shape) / np.float32(2 * size)
  keys = jax.random.split(jax.random.key(0), len(epochs))
  chosen, arranged = ramp_chooser(k, growth)(
    scores, labels, draws.astype(np.float32), keys, epochs
  )
  np.testing.assert_array_equal(np.isnan(arranged), np.isnan(scores))
  orders = class_orders(keys).tolist()
  for i, epoch in enumerate(epochs.tolist()):
    share = min(1, fractions.Fraction(str(growth)) * (epoch + 1))
    expected = references.balanced_ramp(
      scores[i], labels[i], draws[i], orders[i], k,
      hard=math.ceil(share * k),
    )  # fmt: skip
    # Which are chosen is promised; in what order is not.
    assert sorted(chosen[i].tolist()) == sorted(expected), (i, epoch)


@pytest.mark.parametrize('k', [10, 12800])
def test_balanced_ramp_share_is_exact_at_every_pass(k):
  # One class; the random rest comes from the other end than the hard ones.
  size = 2 * k
  scores = np.arange(size, dtype=np.float32)
  draws = scores[::-1] / size
  epochs = np.arange(12)
  chosen, _ = jax.vmap(ramp_chooser(k, 0.1), (None, None, None, None, 0))(
    *(x[None] for x in (scores, np.zeros(size, np.int32), draws)),
    jax.random.key(0)[None],
    epochs[:, None],
  )
  hard = np.sum(np.asarray(chosen)[:, 0] < k, axis=1)
  expected = [min(k, -(-k * (epoch + 1) // 10)) for epoch in range(12)]
  np.testing.assert_array_equal(hard, expected)


def test_balanced_ramp_gives_every_class_the_first_turn_equally_often():
  trials = 5000
  one = np.ones(trials, np.int32)[:, None]
  labels = one * np.arange(CLASSES)
  # Alike but for the label, so that only the order of the classes decides.
  alike = np.zeros(labels.shape, np.float32)
  keys = jax.random.split(jax.random.key(0), trials)
  for epoch in (0, 9):  # by a random example and by a hard one
    chosen, _ = ramp_chooser(1, 0.1)(
      alike, labels, alike, keys, one[:, 0] * epoch
    )
    assert_frequencies(np.asarray(chosen)[:, 0], np.full(CLASSES, 1 / CLASSES))


def assert_frequencies(outcomes, probabilities):
  """Every outcome is within five sigma, and so is chi-square."""
  trials = len(outcomes)
  counts = np.bincount(outcomes, minlength=len(probabilities))
  expected = trials * np.asarray(probabilities)
  sigma = np.sqrt(expected * (1 - expected / trials))
  assert (np.abs(counts - expected) <= 5 * sigma).all(), (counts, expected)
  possible = expected > 0
  freedom = possible.sum() - 1
  chi_square = np.sum((counts - expected)[possible] ** 2 / expected[possible])
  assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


@functools.cache
def percentile_chooser(k):
  """The k chosen of one pool for each row of draws, and their scores."""

  def choose(scores, draws, beta):
    labels = jnp.zeros(scores.shape, jnp.int32)
    drawn = selection.loss_percentile_sampler(
      scores, labels, draws, jax.random.key(0), jnp.int32(0), beta=beta
    )
    return select_lowest(drawn, k), drawn

  return jax.jit(jax.vmap(choose, (None, 0, None)))


def uniform_draws(trials, size, seed=0):
  return jax.random.uniform(jax.random.key(seed), (trials, size))


def chosen_of(losses, k, beta, trials=40_000):
  scores = -np.array(losses, np.float32)
  draws = uniform_draws(trials, len(losses))
  return np.asarray(percentile_chooser(k)(scores, draws, beta)[0])


LOSSES = {
  'distinct': [0.3, 2.0, 0.1, 5.0, 0.7, 1.0],
  'ties': [0.5, 0.5, 2.0, 0.0, 2.0, 2.0],
  'infinite': [INF, 1.0, 0.0, INF, 3.0, 0.5],
  'NaN': [0.3, NAN, 2.0, NAN, 1.0, 0.1],
}


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize('kind', LOSSES)
def test_percentile_sampler_of_one_has_the_stated_probabilities(kind, beta):
  losses = LOSSES[kind]
  weights = np.array(references.percentiles(losses)) ** beta
  weights[np.isnan(losses)] = 0
  chosen = chosen_of(losses, 1, beta)
  assert_frequencies(chosen[:, 0], weights / weights.sum())


@pytest.mark.parametrize('beta', [0.0, 2.0])
def test_loss_percentile_sampler_of_two_is_without_replacement(beta):
  losses = LOSSES['ties']
  weights = np.array(references.percentiles(losses)) ** beta
  p = weights / weights.sum()
  # The second is drawn from what the first has left.
  pairs = np.outer(p, p) / (1 - p)[:, None]
  np.fill_diagonal(pairs, 0)
  chosen = chosen_of(losses, 2, beta)
  assert_frequencies(chosen @ [len(p), 1], pairs.ravel())


def test_loss_percentile_sampler_without_power_draws_sets_uniformly():
  sets = list(itertools.combinations(range(6), 3))
  chosen = np.sort(chosen_of(LOSSES['distinct'], 3, 0.0), axis=1).tolist()
  outcomes = np.array([sets.index(tuple(row)) for row in chosen])
  assert_frequencies(outcomes, np.full(len(sets), 1 / len(sets)))


def test_loss_percentile_sampler_with_a_large_power_takes_the_hardest():
  losses = LOSSES['distinct']
  hardest = references.select_lowest(-np.array(losses), 3)
  chosen = chosen_of(losses, 3, 1e4, trials=100)
  np.testing.assert_array_equal(chosen, np.tile(hardest, (100, 1)))
  # Of those that share the highest loss, all are taken equally often.
  chosen = chosen_of(LOSSES['ties'], 1, 1e4)
  assert_frequencies(chosen[:, 0], np.array([0, 0, 1, 0, 1, 1]) / 3)


def test_loss_percentile_sampler_of_extreme_draws():
  losses = np.array(LOSSES['NaN'], np.float32)
  nan = np.isnan(losses)
  # The least and the largest that jax.random.uniform returns.
  ends = np.array([0, 1 - 2**-23], np.float32)
  draws = np.concatenate(
    [ends.repeat(6).reshape(2, 6), ends[[[0, 0, 0, 1, 1, 0]]]]
  )
  for beta in (0.0, 1.0, 50.0):
    chosen, drawn = percentile_chooser(4)(-losses, draws, beta)
    np.testing.assert_array_equal(np.isnan(drawn), np.tile(nan, (3, 1)))
    # A draw of zero is the last choice, but for NaN.
    for row in np.sort(chosen, axis=1):
      np.testing.assert_array_equal(row, np.flatnonzero(~nan))
    assert np.isfinite(drawn[1][~nan]).all()
    assert chosen[2][0] == 4
