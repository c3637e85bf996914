"""Linearised margins: exact where the network is linear, by hand elsewhere."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from margin_jax import (
  large_margin_loss,
  layer_margins,
  linearized,
  mms_scores,
  models,
  signed_margins,
)
from tests import references
from tests.custom import small_network
from tests.helpers import slow

NORMS = ('l1', 'l2', 'l_inf')


@functools.cache
def network(name='resnet8'):
  """A model, its variables with lived-in BatchNorm statistics, inputs."""
  model = models.build(name, 5)
  inputs = jax.random.normal(jax.random.key(0), (6, 8, 8, 3))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(1), inputs)
  train = jax.jit(
    functools.partial(model.apply, train=True, mutable=['batch_stats'])
  )
  for _ in range(3):
    _, updates = train(variables, inputs)
    variables = {**variables, **updates}
  return model, variables, inputs


LABELS = jnp.array([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize('name', [*slow('resnet8', 'mnist_cnn'), 'cnn'])
def test_at_the_features_the_linear_margins_come_out(name):
  model, variables, inputs = network(name)
  logits, _ = model.apply(variables, inputs, train=False)
  kernel = variables['params']['head']['kernel']
  logits_fn, perturbations = linearized.at_layers(
    model, variables, inputs, ('features',)
  )
  for labels, expected in (
    (None, mms_scores(logits, kernel)),
    (LABELS, signed_margins(logits, kernel, LABELS)),
  ):
    margins = functools.partial(layer_margins, logits_fn, labels=labels)
    found = jax.jit(margins)(perturbations)['features']
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6)


@pytest.mark.parametrize('norm', [*NORMS, 1.2, 3, 50.0])
def test_hidden_layers_agree_with_finite_differences(norm):
  weights, inputs, labels = references.random_network(seed=3)
  arrays = jax.tree.map(jnp.asarray, weights)

  def logits_fn(activations):
    return small_network(arrays, activations['input'], activations['hidden'])

  activations = {'input': inputs, 'hidden': jnp.zeros((len(inputs), 5))}
  found = layer_margins(logits_fn, activations, labels, norm=norm)
  for layer in ('input', 'hidden'):
    expected = references.layer_margins(weights, inputs, labels, layer, norm)
    np.testing.assert_allclose(found[layer], expected, 1e-3)


def test_the_norm_of_a_linear_network_is_the_dual():
  kernel = jnp.array([[3.0, 0.0], [-4.0, 0.0]])
  inputs = jnp.array([[1.0, -1.0]])
  cube = (3**1.5 + 4**1.5) ** (2 / 3)
  for norm, expected in (
    ('l1', 7 / 4), (1, 7 / 4), (1 + 1e-9, 7 / 4), ('l2', 7 / 5), (2.0, 7 / 5),
    (3, 7 / cube), ('l_inf', 7 / 7), (np.inf, 7 / 7), (1e30, 7 / 7),
  ):  # fmt: skip
    found = layer_margins(lambda x: x @ kernel, inputs, norm=norm)
    np.testing.assert_allclose(found, [expected], 1e-6)


@pytest.mark.parametrize('p', [1.01, 1.5, 4, 100])
@pytest.mark.parametrize('size', [1e-30, 1.0, 1e30])
def test_no_power_of_a_gradient_over_or_underflows(p, size):
  kernel = size * np.random.default_rng(0).normal(size=(20, 2))
  kernel = kernel.astype(np.float32)
  inputs = np.ones((1, 20), np.float32)
  found = layer_margins(lambda x: x @ kernel, inputs, norm=p)
  first, second = references.float64(kernel).T / size  # the ratio is the same
  difference = first - second
  expected = abs(difference.sum()) / np.linalg.norm(difference, p / (p - 1))
  np.testing.assert_allclose(found, [expected], 1e-5)


@pytest.mark.parametrize('p', [1.2, 3.0, 50.0])
def test_the_gradient_of_a_norm_is_its_dual_vector(p):
  """And 0 at a row of zeros, and for entries of zero."""
  q = p / (p - 1)
  rows = np.array([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1e-3, 2e3, -1.0]])
  with jax.enable_x64(True):
    norms = functools.partial(linearized.q_norms, q=q)
    value, pull = jax.vjp(norms, jnp.asarray(rows))
    (found,) = pull(jnp.ones(3))
    np.testing.assert_allclose(value, np.linalg.norm(rows, q, axis=1), 1e-12)
    check_grads(norms, (jnp.asarray(rows[[0, 2]]) + 0.5,), order=1, rtol=1e-6)
  norm = np.linalg.norm(rows, q, axis=1, keepdims=True)
  norm[1] = 1
  expected = np.sign(rows) * (np.abs(rows) / norm) ** (q - 1)
  np.testing.assert_allclose(found, expected, 1e-9)


def test_edges_of_layer_margins():
  inputs = jnp.ones((4, 2))
  constant = jnp.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0], [jnp.nan, 1.0]])

  def logits_fn(x):
    return constant + 0 * jnp.sum(x, axis=1, keepdims=True)

  labels = jnp.zeros(4, jnp.int32)
  found = layer_margins(logits_fn, inputs, labels)
  np.testing.assert_array_equal(found, [0, np.inf, -np.inf, np.nan])
  found = layer_margins(lambda x: x, inputs, labels - 1)
  assert np.isnan(found).all()
  with pytest.raises(ValueError, match=r"norm must be .*, got 'l3'"):
    layer_margins(logits_fn, inputs, labels, norm='l3')
  with pytest.raises(ValueError, match='labels must have shape'):
    layer_margins(logits_fn, inputs, labels[:2])
  with pytest.raises(ValueError, match='logits must have at least two'):
    layer_margins(lambda x: x[:, :1], inputs, labels)
  with pytest.raises(
    ValueError, match=r'must not be empty, got shape \(4, 0\)'
  ):
    layer_margins(logits_fn, inputs[:, :0], labels)


@pytest.mark.parametrize('norm', ['l1', 'l2', 'l_inf', 3.0])
def test_of_no_examples_there_is_nothing(norm):
  none, labels = jnp.ones((0, 3)), jnp.zeros(0, jnp.int32)
  assert layer_margins(lambda x: x, none, norm=norm).shape == (0,)
  assert layer_margins(lambda x: x, none, labels, norm=norm).shape == (0,)
  found = large_margin_loss(lambda x: x, none, labels, norm=norm)
  assert found.shape == (0,)


@pytest.mark.slow
def test_bfloat16_models_give_float32_margins():
  _, variables, inputs = network()
  model = models.build('resnet8', 5, dtype='bfloat16')
  names = ('input', 'stage2_block1', 'features')
  logits_fn, perturbations = linearized.at_layers(
    model, variables, inputs, names
  )
  for found in layer_margins(logits_fn, perturbations).values():
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()


@pytest.mark.slow
def test_layers_are_found_and_named():
  model, variables, inputs = network()
  shapes = linearized.layer_shapes(model, variables, inputs)
  assert shapes['input'] == (6, 8, 8, 3)
  assert shapes['stage1_block1/conv1'] == (6, 8, 8, 16)
  assert shapes['stage3_block1'] == (6, 2, 2, 64)
  assert shapes['features'] == (6, 64)
  for function in (linearized.at_layers, linearized.activations_at):
    with pytest.raises(ValueError, match=r"called 'conv9'; .*'stage3_block1'"):
      function(model, variables, inputs, ('conv9',))


@pytest.mark.slow
def test_activations_and_offsets_are_of_the_same_layer():
  """A perturbation that undoes the activations makes them zero."""
  model, variables, inputs = network()
  # Inside a block a shortcut carries the examples past the layer.
  whole = ('input', 'norm_stem', 'stage2_block1')
  for name in (*whole, 'stage2_block1/conv1', 'features', 'head'):
    found = linearized.activations_at(model, variables, inputs, (name,))
    logits_fn, perturbations = linearized.at_layers(
      model, variables, inputs, (name,)
    )
    assert found[name].shape == perturbations[name].shape
    logits = logits_fn({name: -found[name].astype(jnp.float32)})
    if name == 'features':
      bias = variables['params']['head']['bias']
      np.testing.assert_allclose(logits, np.tile(bias, (6, 1)), atol=1e-6)
    elif name == 'head':
      np.testing.assert_array_equal(logits, np.zeros((6, 5)))
    else:
      # With nothing left of them, all examples look alike.
      alike = np.allclose(logits, logits[:1], atol=1e-5)
      assert alike == (name in whole), name


class Twice(nn.Module):
  """Calls one layer twice, and one that returns a pair."""

  @nn.compact
  def __call__(self, inputs, *, train):
    del train
    shared = nn.Dense(3, name='shared')
    x = shared(shared(inputs))
    return nn.Dense(2, name='head')(x), x


def test_layers_called_twice_and_integer_inputs_are_not_offered():
  inputs = jnp.ones((4, 3))
  variables = Twice().init(jax.random.key(0), inputs, train=False)
  assert {*linearized.layer_shapes(Twice(), variables, inputs)} == {
    'input', 'features', 'head',
  }  # fmt: skip


class Jitted(nn.Module):
  """Two twins, of which Flax traces the first only; and a head's name."""

  head: str = 'head'

  @nn.compact
  def __call__(self, inputs, *, train):
    del train
    block = nn.jit(nn.Dense)
    x = block(3, name='second')(block(3, name='first')(inputs))
    return nn.Dense(2, name=self.head)(inputs=x), x


def test_layers_that_flax_cannot_see_are_refused():
  inputs = jnp.ones((4, 3))
  model = Jitted()
  variables = model.init(jax.random.key(0), inputs, train=False)
  with pytest.raises(ValueError, match="layer 'second' is called 0 times"):
    linearized.at_layers(model, variables, inputs, ('second',))
  linearized.at_layers(model, variables, inputs, ('features',))
  model = Jitted(head='classifier')
  variables = model.init(jax.random.key(0), inputs, train=False)
  with pytest.raises(ValueError, match="last layer is not called 'head'"):
    linearized.at_layers(model, variables, inputs, ('features',))


@pytest.mark.parametrize('name', ['resnet8', 'mnist_cnn'])
def test_batch_statistics_make_evaluation_compute_what_training_does(name):
  model, variables, inputs = network(name)
  other = 3 * inputs + 1
  (expected, _), updates = model.apply(
    variables, other, train=True, mutable=['batch_stats']
  )
  statistics = linearized.batch_statistics(
    model, variables, other, updates['batch_stats']
  )
  found, _ = model.apply(
    {**variables, 'batch_stats': statistics}, other, train=False
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_batch_norm_has_no_statistics():
  model, variables, inputs = network('cnn')
  variables = {**variables, 'batch_stats': {}}
  assert linearized.batch_statistics(model, variables, inputs, {}) == {}


def tiny(kernels, inputs, add):
  """A network of no library: two layers, named."""
  inputs = add('input', inputs)
  hidden = add('hidden', jnp.tanh(inputs @ kernels[0]))
  return add('logits', hidden @ kernels[1])


@pytest.mark.slow
def test_a_function_that_names_its_layers_is_a_network():
  keys = jax.random.split(jax.random.key(0), 3)
  kernels = [
    jax.random.normal(key, shape)
    for key, shape in zip(keys[:2], [(3, 5), (5, 4)], strict=True)
  ]
  inputs, labels = jax.random.normal(keys[2], (6, 3)), jnp.arange(6) % 4
  found = linearized.at_layers(tiny, kernels, inputs, ('input', 'hidden'))
  margins = linearized.layer_margins(*found, labels)
  logits = tiny(kernels, inputs, lambda name, x: x)
  np.testing.assert_allclose(
    margins['hidden'], signed_margins(logits, kernels[1], labels), 1e-5
  )
  by_hand = linearized.layer_margins(
    lambda x: tiny(kernels, x, lambda name, x: x), inputs, labels
  )
  np.testing.assert_allclose(margins['input'], by_hand, 1e-5)


def test_a_layer_that_a_function_does_not_name_once_is_refused():
  kernels, inputs = [jnp.ones((3, 3))] * 2, jnp.ones((2, 3))
  with pytest.raises(ValueError, match=r"'conv'; .* \('input', 'hidden', "):
    linearized.at_layers(tiny, kernels, inputs, ('conv',))

  def twice(kernels, inputs, add):
    return tiny(kernels, add('hidden', inputs), add)

  with pytest.raises(ValueError, match="'hidden' is called 2 times, but must"):
    linearized.at_layers(twice, kernels, inputs, ('hidden',))


def test_what_a_function_names_is_floating_and_has_a_row_an_example():
  kernels = [jnp.ones((3, 3))] * 2
  with pytest.raises(TypeError, match="layer 'input' must be floating, got ui"):
    linearized.at_layers(tiny, kernels, jnp.ones((2, 3), jnp.uint8), ('input',))

  def shared(kernels, inputs, add):
    return tiny(kernels, inputs * add('scale', jnp.ones((1, 3))), add)

  with pytest.raises(ValueError, match=r"'scale' must have a row for each"):
    linearized.at_layers(shared, kernels, jnp.ones((2, 3)), ('scale',))
