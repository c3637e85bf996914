"""Competitors, signed margins and MMS scores against the float64 oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from margin_jax import competitors, mms_scores, signed_margins
from tests import references

INF, NAN = np.inf, np.nan
# (B, C, D): one example, two classes, many classes, one feature.
SHAPES = [(1, 2, 1), (1, 5, 4), (6, 2, 3), (4, 100, 7), (16, 10, 8)]
# Half a unit in the last place of bfloat16 is 2^-9 of the value: a result
# that was computed wider and rounded once is within this, others are not.
BFLOAT16_RTOL = 2.0**-8

jit_competitors = jax.jit(competitors)
jit_signed = jax.jit(signed_margins)
jit_mms = jax.jit(mms_scores)


@pytest.mark.parametrize('shape', SHAPES)
def test_random_inputs_agree_with_oracle(shape):
  _, logits, kernel, labels = references.random_head(shape)
  competing = jit_competitors(logits, labels)
  assert competing.dtype == jnp.int32
  np.testing.assert_array_equal(
    competing, references.competitors(logits, labels)
  )
  signed = jit_signed(logits, kernel, labels)
  assert signed.dtype == jnp.float32
  np.testing.assert_allclose(
    signed, references.signed_margins(logits, kernel, labels), 1e-5
  )
  scores = jit_mms(logits, kernel)
  assert scores.dtype == jnp.float32
  np.testing.assert_allclose(
    scores, references.mms_scores(logits, kernel), 1e-5
  )


def test_ties_and_equal_columns_agree_with_oracle():
  # Small integers: most rows have ties, many columns of the kernel are equal.
  rng = np.random.default_rng(0)
  logits = rng.integers(0, 3, size=(64, 5)).astype(np.float32)
  kernel = rng.integers(0, 2, size=(2, 5)).astype(np.float32)
  labels = rng.integers(0, 5, size=64)
  expected = references.signed_margins(logits, kernel, labels)
  assert {-INF, 0, INF} <= set(expected)
  np.testing.assert_allclose(jit_signed(logits, kernel, labels), expected, 1e-5)
  np.testing.assert_array_equal(
    jit_competitors(logits, labels), references.competitors(logits, labels)
  )
  np.testing.assert_allclose(
    jit_mms(logits, kernel), references.mms_scores(logits, kernel), 1e-5
  )


def test_infinities_nans_and_invalid_labels_agree_with_oracle():
  rng = np.random.default_rng(0)
  values = np.array([-INF, -INF, INF, INF, NAN, 0, 1], np.float32)
  logits = rng.choice(values, size=(256, 3))
  kernel = np.array([[1, 1, 0], [2, 2, 1]], np.float32)
  labels = rng.integers(-1, 4, size=256)
  expected = references.signed_margins(logits, kernel, labels)
  assert np.isnan(expected).any()
  assert {-INF, 0, INF} <= set(expected)
  np.testing.assert_allclose(jit_signed(logits, kernel, labels), expected, 1e-5)
  np.testing.assert_array_equal(
    jit_competitors(logits, labels), references.competitors(logits, labels)
  )
  np.testing.assert_allclose(
    jit_mms(logits, kernel), references.mms_scores(logits, kernel), 1e-5
  )


@pytest.mark.parametrize(
  ('logits', 'label', 'competing', 'signed', 'score'),
  [
    ([3, 1, 0], 0, 1, 0.4, 0.4),  # the columns of 0 and 1 are 5 apart
    ([3, 1, 0], 1, 0, -0.4, 0.4),
    ([2, 2, 0], 1, 0, 0, 0),  # a tie
    ([2, 0, 1], 0, 2, INF, INF),  # columns 0 and 2 are equal: no boundary
    ([2, 0, 1], 2, 0, -INF, INF),
    ([2, 0, 2], 2, 0, 0, 0),  # a tie and no boundary
    ([INF, 1, 0], 0, 1, INF, INF),
    ([INF, INF, 0], 0, 1, 0, 0),
    ([-INF, 1, -INF], 0, 1, -INF, INF),
    ([-INF, -INF, -INF], 0, 1, 0, 0),
    ([-INF, -INF, -INF], 1, 0, 0, 0),
    ([0, -INF, -INF], 0, 1, INF, INF),
    ([0, 1, NAN], 0, 2, NAN, NAN),
    ([NAN, 1, 0], 0, 1, NAN, NAN),
    ([NAN, 1, NAN], 1, 0, NAN, NAN),
    ([3, 1, 0], 3, -1, NAN, 0.4),
    ([3, 1, 0], -1, -1, NAN, 0.4),
    ([3, 1, 0], 2**31 - 1, -1, NAN, 0.4),
    ([3, 1, 0], -(2**31), -1, NAN, 0.4),
  ],
)
def test_documented_edge_cases(logits, label, competing, signed, score):
  logits = np.array([logits], np.float32)
  kernel = np.array([[4, 1, 4], [5, 1, 5]], np.float32)
  labels = np.array([label], np.int32)
  assert jit_competitors(logits, labels)[0] == competing
  np.testing.assert_allclose(
    jit_signed(logits, kernel, labels)[0], signed, 1e-6
  )
  np.testing.assert_allclose(jit_mms(logits, kernel)[0], score, 1e-6)


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.uint32])
def test_labels_of_any_integer_dtype(dtype):
  logits = np.array([[3, 1, 0], [0, 1, 2], [0, 1, 2]], np.float32)
  labels = np.array([0, 2, np.iinfo(dtype).max], dtype)
  np.testing.assert_array_equal(competitors(logits, labels), [1, 1, -1])


@pytest.mark.parametrize('scale', [1e25, 1e-25])
def test_huge_and_tiny_kernels_neither_overflow_nor_underflow(scale):
  _, logits, kernel, labels = references.random_head((16, 10, 8))
  kernel = (kernel * scale).astype(np.float32)
  np.testing.assert_allclose(
    jit_signed(logits, kernel, labels),
    references.signed_margins(logits, kernel, labels),
    1e-5,
  )
  np.testing.assert_allclose(
    jit_mms(logits, kernel), references.mms_scores(logits, kernel), 1e-5
  )


def test_mms_is_signed_margin_of_prediction_and_never_negative():
  _, logits, kernel, _ = references.random_head((16, 10, 8))
  scores = jit_mms(logits, kernel)
  np.testing.assert_array_equal(
    scores, jit_signed(logits, kernel, np.argmax(logits, axis=1))
  )
  assert (scores >= 0).all()


def test_margin_is_the_displacement_that_reaches_the_boundary():
  features, _, kernel, labels = references.random_head((16, 10, 8))
  rng = np.random.default_rng(1)
  bias = rng.normal(size=(1, 10)).astype(np.float32)
  logits = features @ kernel + bias
  competing = references.competitors(logits, labels)
  normal = (kernel[:, labels] - kernel[:, competing]).T
  normal = normal / np.linalg.norm(normal, axis=1, keepdims=True)
  distance = np.asarray(jit_signed(logits, kernel, labels))[:, None]
  moved = (features - distance * normal) @ kernel + bias
  rows = np.arange(16)
  np.testing.assert_allclose(
    moved[rows, labels], moved[rows, competing], rtol=0, atol=1e-5
  )


@pytest.mark.parametrize('shape', [(1, 2, 1), (16, 10, 8)])
def test_bfloat16_is_computed_wider_and_rounded_once(shape):
  _, logits, kernel, labels = references.random_head(shape, seed=1)
  logits, kernel = jnp.bfloat16(logits), jnp.bfloat16(kernel)
  signed = jit_signed(logits, kernel, labels)
  scores = jit_mms(logits, kernel)
  assert signed.dtype == scores.dtype == jnp.bfloat16
  expected = references.signed_margins(logits, kernel, labels)
  assert np.isfinite(expected).all()
  np.testing.assert_allclose(
    references.float64(signed), expected, BFLOAT16_RTOL
  )
  np.testing.assert_allclose(
    references.float64(scores),
    references.mms_scores(logits, kernel),
    BFLOAT16_RTOL,
  )
  np.testing.assert_array_equal(
    jit_competitors(logits, labels), references.competitors(logits, labels)
  )


def test_mixed_dtypes_promote():
  _, logits, kernel, labels = references.random_head((4, 3, 2))
  half = jnp.bfloat16(logits)
  assert jit_signed(half, kernel, labels).dtype == jnp.float32
  assert jit_mms(logits, jnp.bfloat16(kernel)).dtype == jnp.float32
  with jax.enable_x64(True):
    wide = logits.astype(np.float64), kernel.astype(np.float64)
    signed = jit_signed(*wide, labels)
    assert signed.dtype == jnp.float64
    np.testing.assert_allclose(
      signed, references.signed_margins(*wide, labels), 1e-13
    )


@pytest.mark.parametrize('shape', [(1, 2, 1), (6, 5, 4)])
def test_gradients_agree_with_finite_differences(shape):
  _, logits, kernel, labels = references.random_head(shape)
  # float64, where the tolerance can be tight.
  with jax.enable_x64(True):
    args = logits.astype(np.float64), kernel.astype(np.float64)
    signed = jax.jit(lambda s, w: signed_margins(s, w, labels))
    for function in (signed, mms_scores):
      check_grads(
        jax.jit(function), args, 1, ('fwd', 'rev'), 1e-6, 1e-6, eps=1e-5
      )


def gradient_cases():
  """Finite logits (N, 1, 3) and kernels (N, 2, 3) with trouble in them."""
  logits = [[3, 1, 0], [2, 2, 0], [1, 1, 1], [0, 1, 3]]
  kernels = [
    [[4, 1, 4], [5, 1, 5]],  # two equal columns
    [[1, 2, 3], [0, 0, 5]],  # a zero in a difference of columns
    [[1, 1, 1], [2, 2, 2]],
    [[0, 0, 0], [0, 0, 0]],
  ]
  cases = [
    (s, w, scale) for s in logits for w in kernels for scale in (1, 1e25, 1e-25)
  ]
  return (
    np.array([[s] for s, _, _ in cases], np.float32),
    np.array([np.multiply(w, scale) for _, w, scale in cases], np.float32),
  )


@pytest.mark.parametrize('label', [0, 2, None])
def test_no_gradient_is_nan_for_finite_inputs(label):
  # Of single examples: gradients beyond float32 are infinite, and a sum over
  # examples of infinities of both signs would be NaN with nobody to blame.
  def total(logits, kernel):
    if label is None:
      return mms_scores(logits, kernel)[0]
    return signed_margins(logits, kernel, jnp.array([label]))[0]

  logits, kernels = gradient_cases()
  gradients = jax.jit(jax.vmap(jax.grad(total, (0, 1))))(logits, kernels)
  for name, gradient in zip(('logits', 'kernel'), gradients, strict=True):
    bad = np.flatnonzero(np.isnan(gradient).any(axis=(1, 2)))
    found = [(logits[i].tolist(), kernels[i].tolist()) for i in bad]
    assert not found, f'NaN gradient of {name} at {found}'


@pytest.mark.parametrize('function', [signed_margins, mms_scores])
def test_transformations_agree(function):
  groups = [references.random_head((3, 5, 4), seed) for seed in range(4)]
  logits = np.stack([g[1] for g in groups])
  labels = np.stack([g[3] for g in groups])
  kernel = groups[0][2]

  def values(logits, kernel, labels):
    args = (logits, kernel, labels)
    return function(*(args if function is signed_margins else args[:2]))

  def both(*args):
    return values(*args), jax.grad(lambda *a: values(*a).sum(), (0, 1))(*args)

  plain = [both(s, kernel, y) for s, y in zip(logits, labels, strict=True)]
  expected = jax.tree.map(lambda *x: np.stack(x), *plain)
  axes = (0, None, 0)
  for transformed in (
    jax.jit(jax.vmap(both, axes)),
    jax.pmap(both, in_axes=axes),
  ):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6),
      transformed(logits, kernel, labels),
      expected,
    )


def test_competitors_under_vmap_and_pmap():
  groups = [references.random_head((3, 5, 4), seed) for seed in range(4)]
  logits = np.stack([g[1] for g in groups])
  labels = np.stack([g[3] for g in groups])
  expected = [references.competitors(g[1], g[3]) for g in groups]
  np.testing.assert_array_equal(jax.vmap(competitors)(logits, labels), expected)
  np.testing.assert_array_equal(jax.pmap(competitors)(logits, labels), expected)


LOGITS = np.zeros((4, 3), np.float32)
KERNEL = np.zeros((2, 3), np.float32)
LABELS = np.zeros(4, np.int32)
BAD_LOGITS = [
  (LOGITS.astype(np.int32), TypeError, 'logits must be a floating-point'),
  (LOGITS[0], ValueError, 'logits must have 2 dimension'),
  (LOGITS[:, :1], ValueError, 'logits must have at least two classes'),
]
BAD_KERNELS = [
  (KERNEL.astype(np.int32), TypeError, 'kernel must be a floating-point'),
  (KERNEL[0], ValueError, 'kernel must have 2 dimension'),
  (
    KERNEL.T,
    ValueError,
    r'^kernel must have shape \(D, 3\), one column for each class of the '
    r'logits; got \(3, 2\)$',
  ),
  (KERNEL[:0], ValueError, 'kernel must have at least one row, of a feature'),
]
BAD_LABELS = [
  (LABELS.astype(np.float32), TypeError, 'labels must be integers'),
  (LABELS[:, None], ValueError, r'labels must have shape \(4,\)'),
  (LABELS[:3], ValueError, r'labels must have shape \(4,\)'),
  (np.zeros((4, 3), np.int32), ValueError, r'labels must have shape \(4,\)'),
]


@pytest.mark.parametrize(('logits', 'error', 'message'), BAD_LOGITS)
def test_bad_logits_raise(logits, error, message):
  with pytest.raises(error, match=message):
    competitors(logits, LABELS)
  with pytest.raises(error, match=message):
    signed_margins(logits, KERNEL, LABELS)
  with pytest.raises(error, match=message):
    mms_scores(logits, KERNEL)


@pytest.mark.parametrize(('kernel', 'error', 'message'), BAD_KERNELS)
def test_bad_kernels_raise(kernel, error, message):
  with pytest.raises(error, match=message):
    signed_margins(LOGITS, kernel, LABELS)
  with pytest.raises(error, match=message):
    mms_scores(LOGITS, kernel)


def test_of_no_examples_there_is_nothing():
  logits, labels = LOGITS[:0], LABELS[:0]
  assert competitors(logits, labels).shape == (0,)
  assert signed_margins(logits, KERNEL, labels).shape == (0,)
  assert mms_scores(logits, KERNEL).shape == (0,)


@pytest.mark.parametrize(('labels', 'error', 'message'), BAD_LABELS)
def test_bad_labels_raise(labels, error, message):
  with pytest.raises(error, match=message):
    competitors(LOGITS, labels)
  with pytest.raises(error, match=message):
    signed_margins(LOGITS, KERNEL, labels)


@pytest.mark.parametrize(
  ('logits', 'kernel'),
  [
    ([3e38, -3e38, 0], [[1, 2, 4]]),
    ([1e30, 0, 0], [[1e-30, 2e-30, 4e-30]]),
    ([2e9, 1e9, 0], [[3e38, -3e38, 0]]),
  ],
)
def test_the_largest_floats_give_no_nan(logits, kernel):
  logits = jnp.array([logits], jnp.float32)
  kernel = jnp.array(kernel, jnp.float32)
  labels = jnp.array([0])

  def margin(logits, kernel):
    return signed_margins(logits, kernel, labels)[0]

  value, gradients = jax.value_and_grad(margin, (0, 1))(logits, kernel)
  (exact,) = references.signed_margins(logits, kernel, labels)
  with np.errstate(over='ignore'):
    np.testing.assert_allclose(value, np.float32(exact), 1e-5)
  for gradient in gradients:
    assert not np.isnan(gradient).any()


@pytest.mark.parametrize('label', [2**32, -(2**31) - 1])
@pytest.mark.parametrize('cast', [np.array, list])
def test_labels_beyond_int32_are_refused_and_not_wrapped(label, cast):
  """JAX would take the lower 32 bits: class 0 of 2**32."""
  logits, kernel = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
  with pytest.raises(ValueError, match=rf'labels must be .*, got {label}'):
    signed_margins(logits, kernel, cast([0, label]))


def test_labels_of_numpy_int64_are_labels():
  _, logits, kernel, labels = references.random_head((6, 4, 3))
  np.testing.assert_array_equal(
    signed_margins(logits, kernel, np.asarray(labels, np.int64)),
    signed_margins(logits, kernel, labels),
  )


@pytest.mark.parametrize('missing', ['logits', 'kernel', 'labels'])
def test_none_is_no_array(missing):
  _, logits, kernel, labels = references.random_head((6, 4, 3))
  arguments = {'logits': logits, 'kernel': kernel, 'labels': labels}
  with pytest.raises(TypeError, match=f'{missing} must be an array, got None'):
    signed_margins(**{**arguments, missing: None})
