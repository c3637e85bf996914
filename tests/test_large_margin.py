"""The large-margin loss and its gradients against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from margin_jax import at_layers, large_margin_loss, models
from tests import references
from tests.custom import small_network
from tests.helpers import slow

DEFAULTS = {
  'gamma': 2.0, 'alpha': 3.0, 'norm': 'l2', 'top_k': 1, 'worst_case': False,
  'difference': 'softmax', 'epsilon': 1e-3, 'normalize_by_size': False,
  'layer_weights': None,
}  # fmt: skip
WEIGHTS = {'input': 2.0, 'hidden': 0.3}
OPTIONS = [
  {},
  {'norm': 'l1', 'top_k': 2},
  {'norm': 'l_inf', 'normalize_by_size': True, 'gamma': 5.0},
  {'norm': 'l_inf', 'difference': 'logits', 'top_k': 3},
  {'norm': 'l2', 'difference': 'logits', 'top_k': 3, 'worst_case': True},
  {'norm': 'l1', 'difference': 'logits', 'gamma': 4.0, 'alpha': 3.5},
  {'norm': 3, 'difference': 'logits', 'layer_weights': WEIGHTS},
  {'norm': 1.2, 'top_k': 2, 'layer_weights': WEIGHTS},
]
LAYERS = ('input', 'hidden')

each_option = pytest.mark.parametrize('options', OPTIONS, ids=str)


def losses(weights, inputs, labels, layers=LAYERS, **options):
  """The loss of `references.random_network` at these layers."""
  perturbations = {
    'input': jnp.zeros_like(inputs),
    'hidden': jnp.zeros((len(inputs), 5), inputs.dtype),
  }

  def logits_fn(perturbations):
    shifted = inputs + perturbations.get('input', 0)
    return small_network(weights, shifted, perturbations.get('hidden', 0))

  chosen = {name: perturbations[name] for name in layers}
  if options['layer_weights'] is not None:
    weights_of = options['layer_weights']
    options['layer_weights'] = {name: weights_of[name] for name in layers}
  return large_margin_loss(logits_fn, chosen, labels, **options)


@each_option
@pytest.mark.parametrize('layers', [('input',), ('hidden',), LAYERS])
def test_losses_agree_with_oracle(options, layers):
  options = DEFAULTS | options
  weights, inputs, labels = references.random_network(seed=1, batch=8)
  found = jax.jit(functools.partial(losses, layers=layers, **options))(
    weights, inputs, labels
  )
  assert found.shape == (8,)
  expected = references.large_margin_losses(
    weights, inputs, labels, layers, **options
  )
  assert len({*np.round(expected, 4)}) > 3  # not all at a bound
  np.testing.assert_allclose(found, expected, 2e-3, 2e-3)


@each_option
@pytest.mark.parametrize('second_order', [False, True])
def test_gradients_agree_with_finite_differences(options, second_order):
  """First order holds the norms of the gradients, second order does not."""
  options = DEFAULTS | options
  weights, inputs, labels = references.random_network(seed=1)

  def loss(weights):
    return jnp.sum(
      losses(weights, inputs, labels, second_order=second_order, **options)
    )

  with jax.enable_x64(True):
    wide = {k: jnp.asarray(v, jnp.float64) for k, v in weights.items()}
    found = jax.jit(jax.grad(loss))(wide)
  rng = np.random.default_rng(0)
  for name in ('w1', 'scale', 'w2'):
    direction = rng.normal(size=weights[name].shape)
    step = 1e-4

    def moved(sign, name=name, direction=direction, step=step):
      there = {k: references.float64(v) for k, v in weights.items()}
      there[name] = there[name] + sign * step * direction
      return references.large_margin_losses(
        there, inputs, labels, LAYERS,
        frozen=None if second_order else weights, **options,
      ).sum()  # fmt: skip

    expected = (moved(1) - moved(-1)) / (2 * step)
    slope = np.sum(np.asarray(found[name]) * direction)
    np.testing.assert_allclose(slope, expected, 1e-3, 1e-3)


def test_the_two_orders_differ():
  """Or the test above would not tell them apart."""
  weights, inputs, labels = references.random_network(seed=1)

  def gradient(second_order):
    def loss(w1):
      options = DEFAULTS | {'second_order': second_order}
      return jnp.sum(losses({**weights, 'w1': w1}, inputs, labels, **options))

    return jax.jit(jax.grad(loss))(weights['w1'])

  assert np.abs(gradient(True) - gradient(False)).max() > 1e-2


@pytest.mark.parametrize('norm', ['l2', 1.5, *slow('l1', 'l_inf', 4.0)])
def test_jvp_and_vjp_agree(norm):
  weights, inputs, labels = references.random_network(seed=2)
  with jax.enable_x64(True):
    wide = {k: jnp.asarray(v, jnp.float64) for k, v in weights.items()}
    options = DEFAULTS | {'norm': norm, 'difference': 'logits'}

    def loss(w1, w2):
      there = wide | {'w1': w1, 'w2': w2}
      return losses(
        there, jnp.asarray(inputs, jnp.float64), labels, second_order=True,
        **options,
      )  # fmt: skip

    check_grads(loss, (wide['w1'], wide['w2']), order=1, rtol=1e-3)


@pytest.mark.parametrize('second_order', [False, True])
@pytest.mark.slow
def test_flax_models_with_batch_norm(second_order):
  """A small step against the gradient lowers the loss; bfloat16 is finite."""
  inputs = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  labels = jnp.array([0, 1, 2, 3])
  model = models.build('resnet8', 4)
  variables = model.init(jax.random.key(1), inputs, train=False)

  @functools.partial(jax.jit, static_argnums=1)
  def value_and_grad(params, dtype):
    def loss(params):
      logits_fn, perturbations = at_layers(
        models.build('resnet8', 4, dtype=dtype),
        {**variables, 'params': params},
        inputs.astype(dtype),
        ('input', 'norm_stem', 'stage3_block1'),
      )
      options = DEFAULTS | {'gamma': 100.0, 'second_order': second_order}
      return jnp.mean(
        large_margin_loss(logits_fn, perturbations, labels, **options)
      )

    return jax.value_and_grad(loss)(params)

  params = variables['params']
  value, gradient = value_and_grad(params, 'float32')
  size = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient))
  assert size > 0
  step = 1e-3 / size**0.5
  lower, _ = value_and_grad(
    jax.tree.map(lambda p, g: p - step * g, params, gradient), 'float32'
  )
  if second_order:  # only then is it the gradient of the loss
    np.testing.assert_allclose(value - lower, 1e-3 * size**0.5, 0.1)
  value, gradient = value_and_grad(params, 'bfloat16')
  assert value.dtype == jnp.float32
  assert np.isfinite(value)
  for leaf in jax.tree.leaves(gradient):
    assert np.isfinite(leaf).all()


def test_saturated_and_tied_examples_have_no_nan():
  """Softmax that rounds to 0 and 1 has gradient 0: epsilon bounds d."""
  logits = jnp.array([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0], [1.0, 1.0, 1.0]])
  labels = jnp.zeros(3, jnp.int32)

  def loss(scale, norm):
    return large_margin_loss(
      lambda x: scale * x, logits, labels, norm=norm, second_order=True,
      gamma=10.0, alpha=4.0,
    )  # fmt: skip

  for norm in ('l1', 'l2', 'l_inf', 1.5, 3.0):
    found = jax.jit(loss, static_argnums=1)(1.0, norm)
    np.testing.assert_allclose(found, [-10, 30, 0], atol=1e-6)
    slope = jax.jit(jax.grad(lambda s, n=norm: jnp.sum(loss(s, n))))(1.0)
    assert np.isfinite(slope)


@pytest.mark.parametrize('second_order', [False, True])
def test_the_least_epsilon_gives_finite_gradients(second_order):
  logits = jnp.array([[300.0, 0.0], [0.0, 300.0], [1.0, 1.0]])

  def loss(scale):
    return jnp.sum(
      large_margin_loss(
        lambda x: scale * x,
        logits,
        jnp.zeros(3, jnp.int32),
        epsilon=1e-12,
        second_order=second_order,
      )
    )

  assert np.isfinite(jax.jit(jax.grad(loss))(1.0))


def test_narrow_labels_are_labels():
  labels = np.array([0, 3], np.uint8)
  found = large_margin_loss(
    lambda x: x, jnp.ones((2, 256)), labels, difference='logits'
  )
  np.testing.assert_array_equal(found, [0, 0])


def test_bad_labels_and_nan_logits_give_nan():
  logits = jnp.array([[0.0, 1.0], [0.0, 1.0], [jnp.nan, 0.0], [0.0, 1.0]])
  found = large_margin_loss(
    lambda x: x, logits, jnp.array([-1, 2, 0, 1]), difference='logits'
  )
  np.testing.assert_array_equal(np.isnan(found), [True, True, True, False])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'norm': 0.5}, r"norm must be .*'l_inf'\), or .* at least 1, got 0\.5"),
    ({'norm': 'l3'}, "norm must be .*, got 'l3'"),
    ({'norm': np.nan}, 'norm must be .*, got nan'),
    ({'norm': True}, 'norm must be .*, got True'),
    ({'layer_weights': 0.0}, r'layer_weights must be in \[.*, got 0\.0'),
    ({'difference': 'probability'}, 'difference must be one of'),
    ({'gamma': 0.0}, r'gamma must be in \[1e-12, .*\], got 0\.0'),
    ({'alpha': -1.0}, r'alpha must be in \['),
    ({'epsilon': 0.0}, r'epsilon must be in \['),
    ({'top_k': 0}, r'top_k must be in \[1, 2\], got 0'),
    ({'top_k': 3}, r'top_k must be in \[1, 2\], got 3'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    large_margin_loss(
      lambda x: x, jnp.ones((2, 3)), jnp.array([0, 1]), **options
    )


@pytest.mark.slow
def test_a_layer_of_weight_w_has_bounds_of_its_own():
  """Those of gamma / w; what lies between them weighs w."""
  weights, inputs, labels = references.random_network(seed=1, batch=8)
  options = DEFAULTS | {'epsilon': 1e-12}
  for w in (0.3, 2.0):
    found = losses(
      weights, inputs, labels, ('hidden',),
      **options | {'layer_weights': {'hidden': w}},
    )  # fmt: skip
    own = losses(
      weights, inputs, labels, ('hidden',),
      **options | {'gamma': options['gamma'] / w},
    )  # fmt: skip
    np.testing.assert_allclose(found, w * own, 1e-5)


def test_bad_shapes_are_refused():
  labels = jnp.array([0, 1])
  with pytest.raises(ValueError, match='layer_weights must have one number'):
    large_margin_loss(
      lambda x: x['a'], {'a': jnp.ones((2, 3))}, labels, layer_weights={'b': 1}
    )
  with pytest.raises(ValueError, match='at least one layer'):
    large_margin_loss(lambda x: jnp.ones((2, 3)), {}, labels)
  with pytest.raises(ValueError, match=r'labels must have shape \(2,\)'):
    large_margin_loss(lambda x: x, jnp.ones((2, 3)), labels[:1])
  with pytest.raises(TypeError, match='labels must be integers'):
    large_margin_loss(lambda x: x, jnp.ones((2, 3)), jnp.ones(2))
  with pytest.raises(ValueError, match='logits must have 2 dimension'):
    large_margin_loss(lambda x: x[:, 0], jnp.ones((2, 3)), labels)
  with pytest.raises(ValueError, match='logits must have at least two'):
    large_margin_loss(lambda x: x[:, :1], jnp.ones((2, 3)), labels)
  with pytest.raises(ValueError, match='activations must not be empty'):
    large_margin_loss(
      lambda x: jnp.ones((2, 3)) + x.sum(), jnp.ones((2, 0)), labels
    )
