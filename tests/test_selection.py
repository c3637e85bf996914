"""Rules, the lowest k, and the exact exchange between devices."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import margins, select_lowest, selection, take_lowest
from tests import helpers, references

INF, NAN = np.inf, np.nan
POOL = 16
# (D, k): every k in 1, 2, 4, 8 that D devices can share.
SHARES = [(d, k) for d in (1, 2, 4, 8) for k in (1, 2, 4, 8) if k % d == 0]
# Each example of hypothesis is a new array, never a new shape.
settings = hypothesis.settings(deadline=None, max_examples=60)
jit_select = jax.jit(select_lowest, static_argnums=1)


def special_bits(dtype) -> list[int]:
  """Bit patterns of zeros, units, infinities, NaNs and subnormals."""
  info = jnp.finfo(dtype)
  sign, mantissa = 1 << (info.bits - 1), (1 << info.nmant) - 1
  infinity = sign - 1 - mantissa
  positive = [
    0,
    1,  # the smallest subnormal
    mantissa,  # the largest
    mantissa + 1,  # the smallest normal number
    infinity >> 1 & ~mantissa,  # near 1
    infinity - 1,  # the largest number
    infinity,
    infinity + 1,  # a signalling NaN
    infinity | mantissa,  # a NaN, all ones
  ]
  return positive + [bits | sign for bits in positive]


@st.composite
def score_vectors(draw, dtype, sizes=(1, 6)):
  """Scores in which ties, special values and any other bits are common."""
  bits = jnp.finfo(dtype).bits
  one = st.sampled_from(special_bits(dtype)) | st.integers(0, 2**bits - 1)
  # Both zeros always, because they must tie.
  few = [0, 1 << (bits - 1), *draw(st.lists(one, max_size=3))]
  size = draw(st.sampled_from(sizes))
  values = draw(
    st.lists(st.sampled_from(few) | one, min_size=size, max_size=size)
  )
  return np.array(values, f'uint{bits}').view(dtype)


@pytest.mark.parametrize(
  'dtype', [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64]
)
def test_select_lowest_is_numpy_stable_argsort(dtype):
  @settings
  @hypothesis.given(st.data())
  def check(data):
    scores = data.draw(score_vectors(dtype))
    k = data.draw(st.integers(0, len(scores)))
    with jax.enable_x64(dtype == jnp.float64):
      chosen = jit_select(scores, k)
    assert chosen.dtype == jnp.int32
    assert chosen.shape == (k,)
    np.testing.assert_array_equal(chosen, references.select_lowest(scores, k))
    # What the order is for: NaN only where nothing else is left.
    nans = np.isnan(references.float64(scores))
    assert nans[np.asarray(chosen)].sum() == max(0, k - (~nans).sum())

  check()


def test_select_lowest_of_hand_made_scores():
  scores = np.array([NAN, 2, 0.0, -0.0, INF, -INF, 2, -NAN, -3], np.float32)
  expected = [5, 8, 2, 3, 1, 6, 4, 0, 7]
  for k in range(len(scores) + 1):
    np.testing.assert_array_equal(select_lowest(scores, k), expected[:k])


def test_select_lowest_orders_float32_subnormals():
  # XLA on a CPU compares subnormal floats as if they were zero.
  scores = np.array([1e-40, 0, -1e-40, 2e-45, -0.0, -2e-45], np.float32)
  np.testing.assert_array_equal(select_lowest(scores, 6), [2, 5, 1, 4, 3, 0])


def test_select_lowest_of_many_under_jit_vmap_and_pmap():
  rng = np.random.default_rng(0)
  scores = rng.integers(-20, 20, size=(4, 300)).astype(np.float32)
  scores[rng.random(scores.shape) < 0.1] = NAN
  expected = [references.select_lowest(row, 100) for row in scores]
  select = functools.partial(select_lowest, k=100)
  np.testing.assert_array_equal(jax.jit(jax.vmap(select))(scores), expected)
  np.testing.assert_array_equal(jax.pmap(select)(scores), expected)


def test_select_lowest_takes_any_static_integer():
  scores = np.array([2, 1, 0], np.float32)
  np.testing.assert_array_equal(select_lowest(scores, np.int64(2)), [2, 1])
  assert select_lowest(scores[:0], 0).shape == (0,)


@pytest.mark.parametrize(
  ('scores', 'k', 'error', 'message'),
  [
    (np.arange(3), 1, TypeError, 'scores must be a floating-point'),
    (np.ones((3, 1), np.float32), 1, ValueError, 'scores must have 1 dim'),
    (np.float32(1), 1, ValueError, 'scores must have 1 dim'),
    (np.ones(3, np.float32), 1.0, TypeError, 'k must be a static int'),
    (np.ones(3, np.float32), True, TypeError, 'k must be a static int'),
    (np.ones(3, np.float32), None, TypeError, 'k must be a static int'),
    (np.ones(3, np.float32), 4, ValueError, r'k must be in \[0, 3\], got 4'),
    (np.ones(3, np.float32), -1, ValueError, r'k must be in \[0, 3\], got -1'),
  ],
)
def test_select_lowest_bad_arguments_raise(scores, k, error, message):
  with pytest.raises(error, match=message):
    select_lowest(scores, k)


def make_examples():
  """One array of each kind that a pool holds; every row is different."""
  rng = np.random.default_rng(0)
  dense = np.arange(2 * POOL, dtype=np.float32).reshape(POOL, 2) - 3
  dense[1:5, 0] = NAN, INF, -INF, NAN
  bits = np.arange(POOL)[:, None] >> np.arange(4) & 1
  return {
    'image': rng.integers(0, 256, (POOL, 2, 2, 1)).astype(np.uint8),
    'label': rng.integers(-(2**31), 2**31, POOL).astype(np.int32),
    'more': (bits == 1, dense),
    'half': np.asarray(jnp.arange(POOL, dtype=jnp.bfloat16) / 3 - 1),
  }


@functools.cache
def pmapped_take(devices, k, axis_name='device'):
  return jax.pmap(
    functools.partial(take_lowest, k=k, axis_name=axis_name),
    axis_name='device',
    devices=jax.devices()[:devices],
  )


def take_over_devices(scores, examples, devices, k, **kwargs):
  """Splits the pool over the devices; joins what they return."""

  def shard(x):
    return x.reshape(devices, len(x) // devices, *x.shape[1:])

  take = pmapped_take(devices, k, **kwargs)
  taken = take(*jax.tree.map(shard, (scores, examples)))
  return jax.tree.map(lambda x: np.concatenate(list(np.asarray(x))), taken)


def assert_rows(taken, examples, chosen):
  def check(actual, pool):
    assert actual.dtype == pool.dtype
    np.testing.assert_array_equal(
      references.float64(actual), references.float64(pool[chosen])
    )

  jax.tree.map(check, taken, examples)


@pytest.mark.parametrize(('devices', 'k'), SHARES)
def test_global_scope_is_selection_on_the_whole_pool(devices, k):
  examples = make_examples()

  @settings
  @hypothesis.given(score_vectors(np.float32, sizes=[POOL]))
  def check(scores):
    taken = take_over_devices(scores, examples, devices, k)
    assert_rows(taken, examples, references.select_lowest(scores, k))

  check()


# One device is its own shard: that is the test above.
@pytest.mark.parametrize(('devices', 'k'), [s for s in SHARES if s[0] > 1])
def test_device_scope_is_selection_on_each_shard(devices, k):
  # The rows' own places; the test above moves every kind of array.
  places = np.arange(POOL)

  @settings
  @hypothesis.given(score_vectors(np.float32, sizes=[POOL]))
  def check(scores):
    taken = take_over_devices(
      scores, places, devices, k // devices, axis_name=None
    )
    expected = [
      places[shard][references.select_lowest(scores[shard], k // devices)]
      for shard in np.split(places, devices)
    ]
    np.testing.assert_array_equal(taken, np.concatenate(expected))

  check()


def test_take_lowest_where_one_device_holds_all():
  examples = make_examples()
  scores = np.array([9] * 12 + [9, 3, 1, 0], np.float32)
  taken = take_over_devices(scores, examples, 4, 4)
  assert_rows(taken, examples, [15, 14, 13, 0])


def test_take_lowest_without_axis_name():
  examples = make_examples()
  scores = np.array([1, 0, NAN, 0, -INF, 1, 2, INF] + [NAN] * 8, np.float32)
  take = jax.jit(take_lowest, static_argnums=2)
  assert_rows(take(scores, examples, 3), examples, [4, 1, 3])
  order = [4, 1, 3, 0, 5, 6, 7, 2, *range(8, POOL)]
  assert_rows(take(scores, examples, POOL), examples, order)
  assert_rows(take(scores, examples, 0), examples, [])


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_take_lowest_moves_every_bit(devices, dtype):
  # A sum of floats loses the sign of zero, and a CPU flushes subnormals.
  bits = f'uint{jnp.finfo(dtype).bits}'
  pool = np.array([*special_bits(dtype), *range(2, 8)], bits)
  scores = np.arange(len(pool))[::-1].astype(np.float32)
  taken = take_over_devices(scores, pool.view(dtype), devices, len(pool))
  np.testing.assert_array_equal(taken.view(bits), pool[::-1])


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_take_lowest_of_none(devices):
  examples = make_examples()
  scores = np.arange(POOL, dtype=np.float32)
  assert_rows(take_over_devices(scores, examples, devices, 0), examples, [])


def test_take_lowest_bad_arguments_raise():
  scores = np.arange(POOL, dtype=np.float32)
  rows = np.arange(POOL)
  for k in (-1, POOL + 1):
    with pytest.raises(ValueError, match=r'k must be in \[0, 16\]'):
      take_lowest(scores, rows, k)
  for k in (-2, POOL + 2):
    with pytest.raises(ValueError, match=r'k must be in \[0, 16\]'):
      take_over_devices(scores, rows, 2, k)
  with pytest.raises(ValueError, match='k must be divisible by 4 devices'):
    take_over_devices(scores, rows, 4, 6)
  for examples in ({'a': rows, 'b': rows[:3]}, np.float32(1)):
    with pytest.raises(ValueError, match='examples must hold arrays with 16'):
      take_lowest(scores, examples, 2)


SHAPES = [(1, 2, 1), (6, 2, 3), (4, 100, 7), (16, 10, 8)]


def example_keys(size, seed=0):
  return jax.random.split(jax.random.key(seed), size)


@jax.jit
def all_scores(logits, kernel, labels, keys):
  return {
    name: rule.score(helpers.scored(logits, kernel, labels, keys))
    for name, rule in selection.RULES.items()
  }


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('shape', SHAPES)
def test_rules_agree_with_oracles(shape, dtype):
  _, logits, kernel, labels = references.random_head(shape)
  logits = jnp.asarray(logits, dtype)
  expected = {
    'mms': references.mms_scores(logits, kernel),
    'signed_margin': references.signed_margins(logits, kernel, labels),
    'loss': references.loss_scores(logits, labels),
    'entropy': references.entropy_scores(logits),
    'margin': references.margin_scores(logits),
    'selective_backprop': references.loss_scores(logits, labels),
  }
  actual = all_scores(logits, kernel, labels, example_keys(shape[0]))
  # Written out, so that a rule nobody tests is noticed.
  assert set(actual) == {*expected, 'random'}
  for name, oracle in expected.items():
    scores = actual[name]
    assert scores.shape == shape[:1]
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, oracle, 1e-5, 1e-6, err_msg=name)


def test_rules_select_what_they_are_named_for():
  # Row 0 is sure and right, row 1 sure and wrong, row 2 unsure and right.
  logits = jnp.array([[9.0, 0, 0], [0, 0, 9.0], [0.2, 0.1, 0]])
  kernel = jnp.eye(3)
  labels = jnp.array([0, 0, 0])
  hardest = {
    'mms': 2,
    'loss': 1,
    'entropy': 2,
    'margin': 2,
    'selective_backprop': 1,
  }
  scores = all_scores(logits, kernel, labels, example_keys(3))
  for name, row in hardest.items():
    assert np.argmin(scores[name]) == row, name


def test_mms_rule_ignores_labels():
  _, logits, kernel, labels = references.random_head((6, 5, 4))
  rule, mms_scores = jax.jit(selection.mms), jax.jit(margins.mms_scores)
  scores = [
    rule(helpers.scored(logits, kernel, (labels + i) % 5, example_keys(6)))
    for i in range(2)
  ]
  np.testing.assert_array_equal(*scores)
  np.testing.assert_array_equal(scores[0], mms_scores(logits, kernel))


def test_rules_of_infinite_and_extreme_logits():
  logits = jnp.array(
    [[1, -INF, 2], [-INF, -INF, 0], [0, 1e30, 0], [0, -300, 300]], jnp.float32
  )
  labels = jnp.array([0, 0, 0, 1])
  scored = helpers.scored(logits, None, labels, example_keys(4))
  scores = jax.jit(selection.entropy)(scored)
  assert np.isfinite(scores).all()
  np.testing.assert_allclose(
    scores, references.entropy_scores(logits), 1e-5, 1e-6
  )
  np.testing.assert_allclose(
    jax.jit(selection.loss)(scored),
    references.loss_scores(logits, labels),
    1e-5,
  )
  np.testing.assert_allclose(
    jax.jit(selection.margin)(scored),
    references.margin_scores(logits),
    1e-5,
  )


@pytest.mark.parametrize('name', sorted({*selection.RULES} - {'random'}))
def test_a_rule_of_one_class_is_refused(name):
  one = jnp.zeros((4, 1)), jnp.zeros((2, 1)), jnp.zeros(4, jnp.int32)
  with pytest.raises(ValueError, match='logits must have at least two classes'):
    selection.find(name).score(helpers.scored(*one, example_keys(4)))


def test_random_rule_depends_on_nothing_but_the_key_of_the_example():
  logits = jnp.zeros((64, 3))
  labels = jnp.zeros(64, jnp.int32)
  keys = example_keys(64)

  def rule(*args):
    return jax.jit(selection.random)(helpers.scored(*args))

  scores = rule(logits, None, labels, keys)
  assert scores.shape == (64,)
  assert jnp.issubdtype(scores.dtype, jnp.floating)
  assert len(np.unique(scores)) == 64
  assert 0 <= scores.min() < 0.2 < 0.8 < scores.max() < 1
  again = rule(logits + 7, None, labels + 1, keys)
  np.testing.assert_array_equal(scores, again)
  # An example draws the same number wherever it is in the pool.
  part = rule(logits[:8], None, labels[:8], keys[40:48])
  np.testing.assert_array_equal(scores[40:48], part)
  other = rule(logits, None, labels, example_keys(64, seed=1))
  assert not np.isclose(scores, other, atol=1e-6).any()


@pytest.mark.parametrize('epoch', [0, 2, 6, 9])
def test_balanced_ramp_mixes_every_batch_of_a_reserve(epoch):
  # One class, random draws from the other end; three batches of ten.
  size, k, batches = 60, 30, 3
  scores = np.arange(size, dtype=np.float32)
  arranged = jax.jit(
    functools.partial(
      selection.balanced_ramp,
      k=k,
      growth=0.1,
      num_classes=1,
      batches=batches,
    )
  )(
    scores,
    np.zeros(size, np.int32),
    scores[::-1] / size,
    jax.random.key(0),
    epoch,
  )
  hard, chosen = 1 + epoch, np.asarray(select_lowest(arranged, k))
  for i, batch in enumerate(chosen.reshape(batches, -1)):
    easy = 10 - hard
    expected = [*range(i * hard, (i + 1) * hard)]
    expected += [size - 1 - j for j in range(i * easy, (i + 1) * easy)]
    assert batch.tolist() == expected
