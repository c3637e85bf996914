"""Multi-margin regularization against its oracle, on one device and on four."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from margin_jax import mmr_penalty
from tests import references

REDUCTIONS = ('mean_of_squares', 'square_of_mean')
SHAPES = [(1, 2, 1), (1, 5, 4), (6, 2, 3), (4, 100, 7), (16, 10, 8)]

each_reduction = pytest.mark.parametrize('reduction', REDUCTIONS)
jit_mmr = jax.jit(
  mmr_penalty, static_argnames=('reduction', 'stop_feature_gradient')
)


def gradients(features, logits, kernel, labels, reduction):
  """The gradient of the penalty by features, logits and kernel."""
  return jax.grad(mmr_penalty, (0, 1, 2))(
    features, logits, kernel, labels, reduction=reduction
  )


jit_gradients = jax.jit(gradients, static_argnums=4)


@each_reduction
@pytest.mark.parametrize('shape', SHAPES)
def test_random_inputs_agree_with_oracle(shape, reduction):
  head = references.random_head(shape)
  penalty = jit_mmr(*head, reduction=reduction)
  assert penalty.shape == ()
  assert penalty.dtype == jnp.float32
  expected = references.mmr_penalty(*head, reduction)
  np.testing.assert_allclose(penalty, expected, 1e-5)


def test_hand_computed_values_and_the_default_reduction():
  features = np.array([[3, 4], [1, 0]], np.float32)  # the largest norm is 5
  kernel = np.array([[0, 3, 0], [0, 0, 1]], np.float32)
  # Example 0: column 0 to column 1, 3 apart; example 1: 0 to 2, 1 apart.
  logits = np.array([[9, 5, 0], [5, 0, 9]], np.float32)
  labels = np.array([0, 2])
  assert jit_mmr(features, logits, kernel, labels) == 25 * (9 + 1) / 2
  assert (
    jit_mmr(features, logits, kernel, labels, reduction='square_of_mean')
    == (5 * (3 + 1) / 2) ** 2
  )


@each_reduction
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_float32(dtype, reduction):
  *arrays, labels = references.random_head((16, 10, 8), seed=1)
  # Of float16 the penalty overflows, which a gradient must not hide.
  arrays = [dtype(x * np.float32(100)) for x in arrays]
  penalty = jit_mmr(*arrays, labels, reduction=reduction)
  assert penalty.dtype == jnp.float32
  expected = references.mmr_penalty(*arrays, labels, reduction)
  assert expected > 65_504  # float16 ends here
  np.testing.assert_allclose(penalty, expected, 1e-5)
  gradient = jit_gradients(*arrays, labels, reduction)[2]
  assert gradient.dtype == dtype


@each_reduction
@pytest.mark.parametrize('shape', [(1, 2, 1), (6, 5, 4)])
def test_gradients_agree_with_finite_differences(shape, reduction):
  features, logits, kernel, labels = references.random_head(shape)
  with jax.enable_x64(True):

    def penalty(features, kernel):
      return mmr_penalty(features, logits, kernel, labels, reduction=reduction)

    args = features.astype(np.float64), kernel.astype(np.float64)
    check_grads(jax.jit(penalty), args, 1, ('fwd', 'rev'), 1e-6, 1e-6, eps=1e-5)


@pytest.mark.slow
@each_reduction
def test_stopped_features_give_the_gradient_at_a_frozen_radius(reduction):
  """The features are a function of a parameter that the kernel shares."""
  features, logits, kernel, labels = references.random_head((6, 5, 4))
  competing = references.competitors(logits, labels)
  with jax.enable_x64(True):
    features, kernel = features.astype(np.float64), kernel.astype(np.float64)
    radius = np.square(features).sum(axis=1).max()

    def frozen(t):
      width = t**2 * jnp.square(kernel[:, labels] - kernel[:, competing])
      width = jnp.sum(width, axis=0)
      if reduction == 'square_of_mean':
        return radius * jnp.mean(jnp.sqrt(width)) ** 2
      return radius * jnp.mean(width)

    def penalty(t, stop):
      return mmr_penalty(
        t * features,
        logits,
        t * kernel,
        labels,
        reduction=reduction,
        stop_feature_gradient=stop,
      )

    for stop, power in ((True, 1), (False, 2)):
      value, gradient = jax.value_and_grad(penalty)(1.0, stop)
      np.testing.assert_allclose(value, frozen(1.0), 1e-12)
      # Homogeneous of degree 2 in each factor that is free.
      np.testing.assert_allclose(gradient, power * jax.grad(frozen)(1.0), 1e-12)
    check_grads(frozen, (1.0,), 1, ('fwd', 'rev'), 1e-6, 1e-6, eps=1e-5)


@each_reduction
def test_stopped_features_keep_the_kernel_gradient(reduction):
  features, logits, kernel, labels = references.random_head((6, 5, 4))

  def gradient(features, kernel, stop):
    return jax.grad(mmr_penalty, (0, 2))(
      features,
      logits,
      kernel,
      labels,
      reduction=reduction,
      stop_feature_gradient=stop,
    )

  gradient = jax.jit(gradient, static_argnums=2)
  free, stopped = (gradient(features, kernel, s) for s in (False, True))
  np.testing.assert_allclose(stopped[1], free[1], 1e-6, 1e-6)
  assert np.abs(stopped[1]).max() > 0.1
  np.testing.assert_array_equal(stopped[0], np.zeros_like(features))
  # Only the features with the largest norm have a gradient, along themselves.
  largest = np.argmax(np.square(features).sum(axis=1))
  expected = np.zeros_like(features)
  expected[largest] = features[largest]
  expected *= 2 / np.square(expected).sum()
  expected *= references.mmr_penalty(
    features, logits, kernel, labels, reduction
  )
  np.testing.assert_allclose(free[0], expected, 1e-5, 1e-6)


@each_reduction
def test_logits_only_decide_the_competitors(reduction):
  head = references.random_head((6, 5, 4))
  by_logits = jit_gradients(*head, reduction)[1]
  np.testing.assert_array_equal(by_logits, np.zeros_like(by_logits))


def edge_cases():
  features, logits, kernel, labels = references.random_head((6, 5, 4))
  return {
    'equal columns': (features, logits, kernel * 0 + kernel[:, :1], labels),
    'zero kernel': (features, logits, kernel * 0, labels),
    'some equal columns': (
      features,
      logits,
      kernel[:, [0, 0, 2, 2, 4]],
      labels,
    ),
    'tied logits': (features, logits * 0, kernel, labels),
    'zero features': (features * 0, logits, kernel, labels),
    'infinite logits': (
      features,
      np.where(np.arange(5) % 2, logits, -np.inf).astype(np.float32),
      kernel,
      labels,
    ),
    'NaN logits': (
      features,
      np.where(np.arange(5) % 2, logits, np.nan).astype(np.float32),
      kernel,
      labels,
    ),
  }


@each_reduction
@pytest.mark.parametrize('case', edge_cases())
def test_edge_cases_agree_with_oracle_and_have_gradients(case, reduction):
  head = edge_cases()[case]
  penalty = jit_mmr(*head, reduction=reduction)
  expected = references.mmr_penalty(*head, reduction)
  assert np.isfinite(expected)
  np.testing.assert_allclose(penalty, expected, 1e-5)
  by_features, by_logits, by_kernel = jit_gradients(*head, reduction)
  for gradient in (by_features, by_logits, by_kernel):
    assert np.isfinite(gradient).all()
  if case in ('equal columns', 'zero kernel', 'zero features'):
    assert not by_features.any()
    assert not by_kernel.any()


@each_reduction
def test_tiny_kernels_have_finite_gradients(reduction):
  features, logits, kernel, labels = references.random_head((6, 5, 4))
  head = features, logits, kernel * np.float32(1e-25), labels
  for gradient in jit_gradients(*head, reduction):
    assert np.isfinite(gradient).all()


@each_reduction
@pytest.mark.parametrize(('big', 'size'), [(0, 3e19), (2, 1e25), (2, 1e38)])
def test_an_overflow_is_infinite_with_gradient_zero(reduction, big, size):
  # Squares, or even differences, beyond float32; no 0 * inf may come of it.
  head = [*references.random_head((6, 5, 4))]
  head[big] = head[big] * np.float32(size)
  assert jit_mmr(*head, reduction=reduction) == np.inf
  # Not compiled: XLA may rewrite 0 * inf, which is NaN, to 0.
  for gradient in gradients(*head, reduction):
    np.testing.assert_array_equal(gradient, 0)


@each_reduction
@pytest.mark.parametrize(
  ('grown', 'shrunk'),
  [(1e20, 1e-20), (1e-25, 1e25), (1e20, 1e-10), (1e-20, 1e10), (1e36, 1e-36)],
)
def test_one_factor_may_leave_the_range_of_float32(grown, shrunk, reduction):
  """Only the penalty itself over- or underflows."""
  features, logits, kernel, labels = references.random_head((6, 5, 4))
  features = features * np.float32(grown)
  kernel = kernel * np.float32(shrunk)
  head = features, logits, kernel, labels
  expected = references.mmr_penalty(*head, reduction)
  np.testing.assert_allclose(
    jit_mmr(*head, reduction=reduction), expected, 1e-5
  )
  by_features, _, by_kernel = gradients(*head, reduction)
  # Homogeneous of degree 2 in each of the two.
  for x, gradient in ((features, by_features), (kernel, by_kernel)):
    along = np.sum(references.float64(x) * references.float64(gradient))
    np.testing.assert_allclose(along, 2 * expected, 1e-4)


@each_reduction
@pytest.mark.parametrize('weighted', [False, True])
def test_equal_columns_cost_nothing_at_any_feature_norm(reduction, weighted):
  features, logits, kernel, labels = references.random_head((6, 5, 4))
  features *= np.float32(3e37)
  head = features, logits, kernel * 0 + kernel[:, :1], labels
  weights = np.arange(6, dtype=np.float32) if weighted else None
  assert references.mmr_penalty(*head, reduction, weights) == 0

  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def penalty(features, kernel):
    return mmr_penalty(
      features, logits, kernel, labels, reduction=reduction, weights=weights
    )

  value, by = penalty(features, head[2])
  assert value == 0
  for gradient in by:
    np.testing.assert_array_equal(gradient, 0)


@each_reduction
def test_an_example_of_weight_zero_may_overflow(reduction):
  features, logits, kernel, labels = references.random_head((6, 5, 4))
  features *= 0
  features[:, 0] = 1
  labels = np.array([0, 1, 1, 1, 1, 2], np.int32)
  logits = np.where(np.arange(5) == 3, 9, 0).astype(np.float32)  # competitor
  logits = np.tile(logits, (6, 1))
  kernel[:, 0] = 1e30
  features[0] = 1e10  # nor is it the largest
  weights = np.array([0, 1, 1, 1, 1, 2], np.float32)
  expected = references.mmr_penalty(
    features, logits, kernel, labels, reduction, weights
  )
  assert expected < 1e3

  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def penalty(features, kernel):
    return mmr_penalty(
      features, logits, kernel, labels, reduction=reduction, weights=weights
    )

  value, by = penalty(features, kernel)
  np.testing.assert_allclose(value, expected, 1e-5)
  for gradient in by:
    assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(by[0][0], 0)


@each_reduction
@pytest.mark.parametrize('label', [-1, 5, 2**31 - 1])
def test_invalid_label_makes_it_nan(label, reduction):
  *arrays, labels = references.random_head((6, 5, 4))
  labels[3] = label
  assert np.isnan(jit_mmr(*arrays, labels, reduction=reduction))


@each_reduction
def test_transformations_agree(reduction):
  groups = [references.random_head((3, 5, 4), seed) for seed in range(4)]
  stacked = [np.stack(x) for x in zip(*groups, strict=True)]

  def both(features, logits, kernel, labels):
    def penalty(features, kernel):
      return mmr_penalty(features, logits, kernel, labels, reduction=reduction)

    return jax.value_and_grad(penalty, (0, 1))(features, kernel)

  plain = [both(*group) for group in groups]
  expected = jax.tree.map(lambda *x: np.stack(x), *plain)
  for transformed in (
    jax.jit(jax.vmap(both)),
    jax.pmap(both),
  ):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5),
      transformed(*stacked),
      expected,
    )


@pytest.mark.parametrize('stop', [False, True])
@each_reduction
@pytest.mark.parametrize('largest', [0, 5])
def test_four_devices_equal_one(reduction, stop, largest):
  devices, rows = 4, 2
  features, logits, kernel, labels = references.random_head((8, 5, 4))
  features[largest] *= 3  # on a device of its own
  penalty = functools.partial(
    mmr_penalty, reduction=reduction, stop_feature_gradient=stop
  )

  @jax.jit
  def single(features, kernel):
    return jax.value_and_grad(penalty, (0, 2))(features, logits, kernel, labels)

  def sharded(features, logits, kernel, labels):
    return penalty(features, logits, kernel, labels, axis_name='device')

  @functools.partial(jax.pmap, axis_name='device')
  def per_device(index, logits, labels):
    # Every device has a copy of all features and uses its own share, as if
    # the features were a parameter: pmean of the gradients is to be exact.
    def penalty_of_copy(all_features, kernel):
      share = lax.dynamic_slice_in_dim(all_features, index * rows, rows)
      return sharded(share, logits, kernel, labels)

    value, copies = jax.value_and_grad(penalty_of_copy, (0, 1))(
      jnp.asarray(features), jnp.asarray(kernel)
    )
    share = lax.dynamic_slice_in_dim(jnp.asarray(features), index * rows, rows)
    by_share = jax.grad(sharded)(share, logits, jnp.asarray(kernel), labels)
    return value, lax.pmean(copies, 'device'), by_share

  values, (by_copy, by_kernel), by_share = per_device(
    np.arange(devices),
    logits.reshape(devices, rows, -1),
    labels.reshape(devices, rows),
  )
  value, (by_features, by_single_kernel) = single(features, kernel)
  assert np.abs(by_single_kernel).max() > 0.1
  assert stop or np.abs(by_features).max() > 0.1
  np.testing.assert_allclose(values, np.full(devices, value), 1e-5)
  for device in range(devices):
    np.testing.assert_allclose(by_copy[device], by_features, 1e-5, 1e-5)
    np.testing.assert_allclose(by_kernel[device], by_single_kernel, 1e-5, 1e-5)
  # What pmean would divide by: nothing else adds to the gradient of a share.
  by_share = np.reshape(by_share, features.shape) / devices
  np.testing.assert_allclose(by_share, by_features, 1e-5, 1e-5)


FEATURES = np.zeros((4, 2), np.float32)
LOGITS = np.zeros((4, 3), np.float32)
KERNEL = np.zeros((2, 3), np.float32)
LABELS = np.zeros(4, np.int32)


@pytest.mark.parametrize(
  ('name', 'value', 'error', 'message'),
  [
    ('features', FEATURES.astype(int), TypeError, 'features must be a float'),
    ('features', FEATURES[0], ValueError, 'features must have 2 dimension'),
    ('features', FEATURES[:3], ValueError, r'features must have shape \(4, 2'),
    ('features', FEATURES[:, :1], ValueError, r'features must have shape'),
    ('logits', LOGITS.astype(int), TypeError, 'logits must be a float'),
    ('logits', LOGITS[0], ValueError, 'logits must have 2 dimension'),
    ('logits', LOGITS[:, :1], ValueError, 'logits must have at least two'),
    ('kernel', KERNEL.astype(int), TypeError, 'kernel must be a float'),
    ('kernel', KERNEL[0], ValueError, 'kernel must have 2 dimension'),
    ('kernel', KERNEL[:, :2], ValueError, r'kernel must have shape \(D, 3\)'),
    ('kernel', KERNEL[:0], ValueError, 'kernel must have at least one row'),
    ('labels', LABELS.astype(float), TypeError, 'labels must be integers'),
    ('labels', LABELS[:3], ValueError, r'labels must have shape \(4,\)'),
    ('reduction', 'sum', ValueError, "reduction must be one of .* got 'sum'"),
    ('reduction', None, ValueError, 'reduction must be one of .* got None'),
  ],
)
def test_bad_arguments_raise(name, value, error, message):
  arguments = {
    'features': FEATURES,
    'logits': LOGITS,
    'kernel': KERNEL,
    'labels': LABELS,
  }
  with pytest.raises(error, match=message):
    mmr_penalty(**(arguments | {name: value}))


def test_no_examples_raise():
  with pytest.raises(ValueError, match='features must hold at least one'):
    mmr_penalty(FEATURES[:0], LOGITS[:0], KERNEL, LABELS[:0])
