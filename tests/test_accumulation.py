"""A batch in parts is the same step, in less memory."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import margin_jax
from margin_jax import config as config_lib
from margin_jax import losses, models
from margin_jax.train import accumulation, schema
from tests import helpers

UNIFORM = {'selection.rule': 'uniform', 'mmr.alpha': 0.0}
PRUNE = {
  'selection.rule': 'signed_margin',
  'selection.memory': True,
  'selection.warmup': 0,
  'selection.unbiased': True,
}
TRIMMED = {'trimming.first': 0.5, 'trimming.last': 0.5}
# What a batch is trained on; the first is fast.
STEPS = {
  'mmr_and_selection': {'mmr.alpha': 0.1},
  'mean_weights_memory': {
    **PRUNE, 'mmr.alpha': 0.1, 'mmr.reduction': 'square_of_mean',
  },
  'trimming': {**UNIFORM, **TRIMMED, 'mmr.alpha': 0.1},
  'trimming_kept': {
    **UNIFORM, **TRIMMED, 'trimming.backward': 'kept', 'batch_size': 32,
  },
  'hinge_reuse_proxy': {
    'loss.risk': 'hinge', 'selection.reuse': 2, 'selection.proxy': 'cnn',
    'mmr.alpha': 0.01,
  },
  'large_margin': {
    **UNIFORM, 'large_margin.weight': 1e-2, 'large_margin.gamma': 1.0,
    'large_margin.layers': ('input', 'features'), 'mmr.alpha': 0.01,
  },
  'dropout_own_losses': {
    **UNIFORM, 'model.name': 'dropping',
    'loss.names': ('of_examples', 'of_batch'), 'loss.weights': (0.1, 0.2),
  },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
  """Losses and a model of the tests' own."""
  monkeypatch.setattr(losses, 'REGISTERED', {**losses.REGISTERED})
  monkeypatch.setattr(models, 'REGISTERED', {**models.REGISTERED})

  def of_batch(outputs):
    gathered = jax.lax.all_gather(outputs.logits, outputs.axis_name, tiled=True)
    return jnp.var(gathered) + jnp.var(outputs.kernel)

  margin_jax.register_loss('of_batch', of_batch)
  margin_jax.register_loss(
    'of_examples', lambda outputs: jnp.sum(outputs.features**2, axis=1)
  )
  margin_jax.register_model('dropping', Dropping)


class Dropping(nn.Module):
  """Drops what it reads, and what its head reads."""

  num_classes: int

  @nn.compact
  def __call__(self, inputs, *, train):
    x = nn.Dropout(0.3, deterministic=not train)(inputs)
    x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
    features = nn.Dropout(0.3, deterministic=not train)(x)
    return nn.Dense(self.num_classes, name='head')(features), features


def setup(parts, devices=1, **fields):
  return helpers.Setup(**{'accumulate': parts, **fields}, devices=devices)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'parts', 'devices'),
  [
    ('mmr_and_selection', 4, 1),
    ('hinge_reuse_proxy', 4, 2),
    ('dropout_own_losses', 4, 2),
    *helpers.long(
      ('mean_weights_memory', 4, 2),
      ('trimming_kept', 4, 2),
      ('large_margin', 4, 2),
      ('trimming', 4, 2),
    ),
  ],
)
def test_a_batch_in_parts_is_the_same_step(name, parts, devices):
  """Parameters, memory, buffer, proxy and metrics, within rounding."""
  fields = STEPS[name]
  (one, before), (many, after) = (
    setup(n, devices, **fields).run(3) for n in (1, parts)
  )
  helpers.assert_trees_close(one, many, 1e-5)
  assert {*before} == {*after}
  for metric, values in before.items():
    np.testing.assert_allclose(
      values, after[metric], 1e-4, 1e-5, err_msg=metric
    )


@pytest.mark.parametrize('group', [None, 2])
def test_parts_take_turns_and_are_put_together_again(group):
  """Part j has examples j, j + n, ... or groups, on any number of devices."""

  class Spec:
    accumulate, batch_norm_examples = 2, group

  rows = np.arange(8)
  expected = {
    None: [[0, 2, 4, 6], [1, 3, 5, 7]],
    2: [[0, 1, 4, 5], [2, 3, 6, 7]],
  }
  np.testing.assert_array_equal(accumulation.split(Spec, rows), expected[group])
  tree = {'a': rows, 'b': np.arange(24).reshape(8, 3)}
  merged = accumulation.merge(Spec, accumulation.split(Spec, tree))
  helpers.assert_trees_equal(merged, tree)


NORMALIZED = {
  **UNIFORM, 'model.name': 'mnist_cnn', 'optimizer.learning_rates': (0.01,),
}  # fmt: skip


@pytest.mark.slow
def test_batch_norm_in_groups_is_the_same_in_parts():
  """Its groups are those of before, and so are the running statistics."""
  fields = {**NORMALIZED, 'model.batch_norm_examples': 2, 'mmr.alpha': 0.1}
  one, four = (setup(n, **fields).run(2)[0] for n in (1, 4))
  helpers.assert_trees_close(one, four, 1e-4)


@pytest.mark.slow
def test_batch_norm_of_a_part_is_by_itself_on_any_number_of_devices():
  """Which examples are a part does not depend on these."""
  one, two = (setup(2, devices, **NORMALIZED).run(2)[0] for devices in (1, 2))
  helpers.assert_trees_close(one, two, 1e-4)
  whole = setup(1, **NORMALIZED).run(2)[0]
  apart = jax.tree.map(
    lambda x, y: np.abs(x - y).max(), whole.batch_stats, one.batch_stats
  )
  assert max(jax.tree.leaves(apart)) > 1e-4


@pytest.mark.slow
def test_the_batch_is_divided_by_turns_against_a_plain_loop():
  """optax.MultiSteps does the same with SGD, a part a step."""
  this = setup(2, **UNIFORM)
  state, _ = this.run(1)
  batch = helpers.first_pool(this, 8)

  def loss(params, part):
    logits, _ = this.spec.model.apply(
      {'params': params}, this.dataset.prepare(part['inputs']), train=True
    )
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, part['label']
    ).mean()

  optimizer = optax.MultiSteps(this.spec.optimizer, 2)
  params = this.first.params
  opt_state = optimizer.init(params)
  for j in (0, 1):
    part = jax.tree.map(lambda x, j=j: x[j::2], batch)
    gradient = jax.grad(loss)(params, part)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
  helpers.assert_trees_close(state.params, params, 1e-6)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'accumulate': 3}, r'accumulate=3 .* a divisor of 8, the examples'),
    (
      {**NORMALIZED, 'accumulate': 4, 'model.batch_norm_examples': 4},
      r'a divisor of 2, .* with accumulate=4',
    ),
  ],
)
def test_what_parts_do_not_fit_is_refused(fields, message):
  config = helpers.small_config(**fields)
  with pytest.raises(config_lib.ConfigError, match=message):
    schema.validate_devices(schema.effective(config), 1)


def test_a_loss_of_the_batch_cannot_linearize():
  def linearized(outputs):
    logits_fn, activations = outputs.linearize(('input',))
    return jnp.mean(logits_fn(activations))

  margin_jax.register_loss('linearized', linearized)
  fields = {'loss.names': ('linearized',), 'loss.weights': (1.0,)}
  with pytest.raises(
    config_lib.ConfigError, match=r"linearizes at \('input',\)"
  ):
    setup(2, **UNIFORM, **fields)


@pytest.mark.slow
def test_less_memory_is_needed():
  """Of the program's temporary buffers, as XLA tells."""
  fields = {**UNIFORM, 'batch_size': 64}
  one, four = (setup(n, **fields).program.programs[0] for n in (1, 4))
  sizes = [x.memory_analysis().temp_size_in_bytes for x in (one, four)]
  assert sizes[1] < 0.75 * sizes[0]


def test_parts_that_are_not_finite_do_not_spoil_the_next():
  """A model may mask a class with -inf."""
  xs = jnp.array([[0.0, 1.0], [2.0, 3.0]])

  def part(carry, x):
    return carry + x[1], jnp.array([-jnp.inf, x[0]])

  total, outputs = accumulation.unrolled(part, jnp.float32(0), xs)
  assert total == 4
  np.testing.assert_array_equal(outputs[:, 1], xs[:, 0])


@pytest.mark.long
@pytest.mark.slow
def test_a_loop_is_the_same_and_needs_less_and_has_all_flops():
  """What accelerators run; XLA counts the body of a loop once."""
  fields = {**UNIFORM, 'batch_size': 64, 'mmr.alpha': 0.1}
  one, copies, loop = (setup(n, **fields) for n in (1, 4, 4))
  assert copies.spec.unrolled
  loop.spec = dataclasses.replace(loop.spec, unrolled=False)
  states = [this.run(2)[0] for this in (one, copies, loop)]
  for state in states[1:]:
    helpers.assert_trees_close(states[0], state, 1e-5)
  sizes = [
    this.program.programs[0].memory_analysis().temp_size_in_bytes
    for this in (one, loop)
  ]
  assert sizes[1] < 0.5 * sizes[0]
  flops = [this.program.cost(0, 1).flops for this in (one, copies, loop)]
  # MMR needs a forward more.
  assert flops[1] == pytest.approx(flops[2], rel=1e-3)
  assert 1.2 * flops[0] < flops[1] < 1.4 * flops[0]
