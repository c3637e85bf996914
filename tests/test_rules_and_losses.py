"""Registered rules and losses: what they read, on any number of devices."""

import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import margin_jax
from margin_jax import config as config_lib
from margin_jax import losses, selection
from margin_jax.train import loop
from tests import helpers, references


@pytest.fixture(autouse=True)
def _forget():
  """What a test registers is gone after it."""
  with (
    unittest.mock.patch.dict(selection.REGISTERED),
    unittest.mock.patch.dict(losses.REGISTERED),
  ):
    yield


COUNTED = {'selection.log_counts': True}


@pytest.mark.slow
def test_a_rule_reads_features_and_index():
  """Largest feature norm first, of even examples only."""

  def rule(scored):
    norms = jnp.sum(scored.features**2, axis=1)
    return jnp.where(scored.index % 2 == 0, -norms, jnp.inf)

  margin_jax.register_rule('norm', rule)
  this = helpers.Setup(**{'selection.rule': 'norm'}, **COUNTED)
  state, _ = this.run(1)
  pool = helpers.first_pool(this, 32)
  inputs = this.dataset.prepare(pool['inputs'])
  _, features = this.spec.model.apply(
    {'params': this.first.params}, inputs, train=False
  )
  norms = np.where(pool['index'] % 2 == 0, np.sum(features**2, axis=1), -1)
  expected = pool['index'][np.argsort(-norms, kind='stable')[:8]]
  assert {*np.flatnonzero(state.counts)} == {*expected}


def rarest_class(scored):
  """Selects examples of the classes that the pool has fewest of."""
  counts = jnp.sum(scored.labels[:, None] == scored.labels[None], axis=1)
  uniforms = jax.vmap(jax.random.uniform)(scored.keys)
  return counts + uniforms


@pytest.mark.slow
def test_a_rule_of_the_whole_pool_does_not_depend_on_devices():
  margin_jax.register_rule('rarest', rarest_class, whole_pool=True)
  margin_jax.register_rule('rarest_of_shard', rarest_class)

  def selected(rule, devices):
    fields = {'selection.rule': rule, 'devices': devices}
    return helpers.Setup(**fields, **COUNTED).run(3)[0].counts

  alone = selected('rarest', 1)
  np.testing.assert_array_equal(alone, selected('rarest', 4))
  # Of one device's shard it would be another choice.
  assert not np.array_equal(alone, selected('rarest_of_shard', 4))
  np.testing.assert_array_equal(alone, selected('rarest_of_shard', 1))


@pytest.mark.parametrize('whole_pool', [False, True])
def test_a_rule_of_four_arguments_is_told_what_to_write(whole_pool, tmp_path):
  def old(logits, kernel, labels, keys):
    return logits[:, 0]

  message = r"'old' takes \('logits', .*write `def rule\(scored\)`"
  with pytest.raises(TypeError, match=message):
    margin_jax.register_rule('old', old, whole_pool=whole_pool)
  config = helpers.small_config(**{'selection.rule': 'random'})
  with pytest.raises(TypeError, match=r'write `def rule\(scored\)`'):
    loop.train(config, str(tmp_path), rule=old)
  assert not [*tmp_path.iterdir()]


def test_a_loss_of_two_arguments_is_told_what_to_write():
  with pytest.raises(TypeError, match=r'write `def loss\(outputs\)`'):
    margin_jax.register_loss('old', lambda logits, labels: logits)
  with pytest.raises(TypeError, match='must be a function'):
    margin_jax.register_loss('old', 3)
  with pytest.raises(ValueError, match='already exists'):
    margin_jax.register_loss('mmr', lambda outputs: outputs.logits)


def outputs_of(logits, labels):
  return losses.Outputs(
    logits=jnp.asarray(logits, jnp.float32),
    features=None,
    kernel=None,
    labels=jnp.asarray(labels),
    index=None,
    weights=None,
    linearize=None,
    axis_name='device',
  )


def test_hinge_agrees_with_its_oracle():
  _, logits, _, labels = references.random_head((32, 5, 4))
  logits = np.asarray(logits, np.float64)
  logits[np.arange(16), np.asarray(labels)[:16]] += 2
  expected = references.hinge(logits, labels)
  assert (expected == 0).any()
  assert (expected > 1).any()
  np.testing.assert_allclose(
    losses.hinge(outputs_of(logits, labels)), expected, 1e-5, 1e-6
  )


def plain(**fields):
  """A step without selection and MMR, after one step."""
  return helpers.Setup(
    **{'selection.rule': 'uniform', 'mmr.alpha': 0.0, **fields}
  )


def expected_params(this, loss):
  """The first step of SGD on the mean of a loss of logits and features."""
  batch = helpers.first_pool(this, 8)
  inputs = this.dataset.prepare(batch['inputs'])

  def mean(params):
    logits, features = this.spec.model.apply(
      {'params': params}, inputs, train=True
    )
    return jnp.mean(loss(logits, features, batch['label']))

  gradient = jax.grad(mean)(this.first.params)
  return jax.tree.map(
    lambda p, g: p - 0.05 * (g + (1e-4 * p if p.ndim > 1 else 0)),
    this.first.params,
    gradient,
  )


@pytest.mark.slow
def test_hinge_as_the_risk():
  this = plain(**{'loss.risk': 'hinge'})
  state, metrics = this.run(1)

  def hinge(logits, features, labels):
    one_hot = jax.nn.one_hot(labels, 10)
    others = jnp.max(jnp.where(one_hot == 1, -jnp.inf, logits), axis=1)
    return jax.nn.relu(1 - jnp.sum(one_hot * logits, axis=1) + others)

  expected = expected_params(this, hinge)
  helpers.assert_trees_close(state.params, expected, 1e-5)
  batch = helpers.first_pool(this, 8)
  logits, _ = this.spec.model.apply(
    {'params': this.first.params},
    this.dataset.prepare(batch['inputs']),
    train=True,
  )
  mean = references.hinge(logits, batch['label']).mean()
  np.testing.assert_allclose(metrics['loss'], [mean], 1e-5)


@pytest.mark.parametrize('devices', [1, *helpers.slow(4)])
def test_a_registered_loss_is_added_with_its_weight(devices):
  """Mean over devices of a loss an example; its column has its name."""
  margin_jax.register_loss(
    'small', lambda outputs: jnp.sum(outputs.features**2, axis=1)
  )
  fields = {'loss.names': ('small',), 'loss.weights': (0.01,)}
  this = plain(**fields, devices=devices)
  state, metrics = this.run(1)

  def loss(logits, features, labels):
    small = jnp.sum(features**2, axis=1)
    return 0.01 * small + optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    )

  helpers.assert_trees_close(state.params, expected_params(plain(), loss), 1e-5)
  assert metrics['loss_small'][0] > 0


@pytest.mark.slow
def test_a_loss_of_the_whole_batch_is_taken_as_it_is():
  """() is over all devices already."""

  def spread(outputs):
    gathered = jax.lax.all_gather(outputs.logits, outputs.axis_name, tiled=True)
    return jnp.var(gathered)

  margin_jax.register_loss('spread', spread)
  fields = {'loss.names': ('spread',), 'loss.weights': (0.1,)}
  (one, before), (four, after) = (
    plain(**fields, devices=devices).run(2) for devices in (1, 4)
  )
  np.testing.assert_allclose(before['loss_spread'], after['loss_spread'], 1e-5)
  helpers.assert_trees_close(one.params, four.params, 1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  margin_jax.register_loss(
    'bad', lambda outputs: jnp.log(-jnp.abs(outputs.logits[:, 0]))
  )
  config = helpers.small_config(
    **{'loss.names': ('bad',), 'loss.weights': (1.0,)}
  )
  with pytest.raises(ArithmeticError, match=r'^loss_bad is nan at step 1'):
    loop.train(config, str(tmp_path), log=lambda line: None)


@pytest.mark.slow
def test_a_loss_may_be_called_as_a_column_is(tmp_path):
  """It takes no other number's place, and a bad one is seen."""
  for name in ('skipped', 'loss', 'seconds', 'pool_classes'):
    margin_jax.register_loss(name, lambda outputs: jnp.mean(outputs.logits**2))
  names = ('skipped', 'loss', 'seconds', 'pool_classes')
  config = helpers.small_config(
    **{'loss.names': names, 'loss.weights': (0.0, 1e-3, 1e-3, 1e-3)}
  )
  result = loop.train(config, str(tmp_path), log=lambda line: None)
  assert result['skipped'] == 0
  rows = helpers.read_csv(tmp_path / 'train.csv')
  assert {f'loss_{name}' for name in names} < {*rows[0]}


def test_a_loss_of_another_shape_is_refused():
  margin_jax.register_loss('wide', lambda outputs: outputs.logits)
  fields = {'loss.names': ('wide',), 'loss.weights': (1.0,)}
  with pytest.raises(ValueError, match=r"'wide' must return .* \(\) or \(8,\)"):
    plain(**fields).program  # noqa: B018


def test_a_risk_is_of_every_example():
  margin_jax.register_loss('mean', lambda outputs: jnp.mean(outputs.logits))
  with pytest.raises(
    ValueError, match=r"loss\.risk='mean' .* shape \(8,\), got"
  ):
    plain(**{'loss.risk': 'mean'}).program  # noqa: B018


def test_losses_and_their_weights_go_together():
  for fields, message in (
    ({'loss.names': ('hinge',)}, r'loss\.weights=\(\) is not allowed'),
    ({'loss.names': ('nothing',), 'loss.weights': (1.0,)}, 'each one of'),
    (
      {'loss.names': ('cross_entropy',), 'loss.weights': (1.0,)},
      "without 'cross_entropy', which is the risk",
    ),
    ({'loss.risk': 'mmr'}, r"loss\.risk='mmr' is not allowed"),
  ):
    with pytest.raises(config_lib.ConfigError, match=message):
      helpers.small_config(**fields)
