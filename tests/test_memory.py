"""The score memory: what a step writes, and what an epoch makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import margin_jax
from margin_jax import data
from margin_jax.data import in_memory
from margin_jax.train import loop
from tests import helpers, references
from tests.helpers import slow

MEMORY = {
  'selection.memory': True,
  'selection.sampler': 'pool',
  'pool_size': 32,
}
PRUNE = {
  **MEMORY,
  'selection.rule': 'signed_margin',
  'selection.sampler': 'prune',
  'selection.share': 0.5,
  'selection.drop': 0.6,
  'pool_size': 640,
}
WEIGHTED = {**MEMORY, 'selection.sampler': 'weighted', 'pool_size': 640}
POOLS = {**MEMORY, 'selection.explore': 0.25}
SAMPLERS = {
  'prune': {**PRUNE, 'selection.unbiased': True},
  'auto': {**PRUNE, 'selection.share': 'auto', 'selection.drop': 0.9},
  'infobatch': {
    **PRUNE,
    'selection.rule': 'loss',
    'selection.threshold': 'mean',
    'selection.share': 0.5,
  },
  'weighted': {**WEIGHTED, 'selection.unbiased': True},
  'pool': POOLS,
}


@functools.cache
def small(examples=96):
  """So few digits that an epoch is a dozen steps."""
  whole = helpers.digits()
  train = {k: x[:examples] for k, x in whole.splits['train'].items()}
  rows = {**whole.rows, 'train': np.arange(examples)}
  return data.InMemory(
    name='few',
    num_classes=10,
    splits={**whole.splits, 'train': train},
    rows=rows,
    augment=whole.augment,
    prepare=whole.prepare,
  )


def setup(devices=1, dataset=None, rule=None, **fields):
  fields = {'steps': 60, 'data.validation_examples': 180, **fields}
  dataset = dataset or small()
  return helpers.Setup(dataset=dataset, devices=devices, rule=rule, **fields)


def scored_batch(this, state, step):
  """The training-mode logits and features of the batch of a step."""
  key = jax.random.fold_in(jax.random.key(0), 2)
  _, batch = helpers.sampler(this.dataset, 8)(
    state.sampler, this.data, key, step
  )
  logits, features = this.spec.model.apply(
    {'params': state.params},
    this.dataset.prepare(batch['inputs']),
    train=True,
  )
  return batch, np.asarray(logits), np.asarray(features)


@pytest.mark.parametrize(
  'rule', ['signed_margin', *slow('mms', 'loss', 'entropy')]
)
def test_a_step_writes_the_scores_of_its_batch(rule):
  """By the forward that it trains on; distances over the mean feature norm."""
  this = setup(**{**PRUNE, 'selection.rule': rule})
  batch, logits, features = scored_batch(this, this.first, 0)
  kernel = this.first.params['head']['kernel']
  expected = {
    'signed_margin': lambda: references.signed_margins(
      logits, kernel, batch['label']
    ),
    'mms': lambda: references.mms_scores(logits, kernel),
    'loss': lambda: references.loss_scores(logits, batch['label']),
    'entropy': lambda: references.entropy_scores(logits),
  }[rule]()
  norm = np.linalg.norm(features.astype(np.float64), axis=1).mean()
  if rule in ('signed_margin', 'mms'):
    expected = expected / norm
  state, _ = this.run(1)
  found = state.memory.examples.scores
  np.testing.assert_allclose(found[batch['index']], expected, 1e-4, 1e-5)
  others = np.setdiff1d(np.arange(96), batch['index'])
  assert (found[others] == -np.inf).all()
  np.testing.assert_allclose(state.memory.feature_norm, norm, 1e-5)


@pytest.mark.slow
def test_an_average_of_scores_decays():
  """The first score of an example stands; later ones are averaged in."""
  last, average = (
    setup(**{**PRUNE, 'selection.decay': decay}) for decay in (0.0, 0.75)
  )
  before, _ = last.run(12)  # the whole first epoch
  helpers.assert_trees_equal(before.memory, average.run(12)[0].memory)
  old = before.memory.examples.scores
  new = last.run(13)[0].memory.examples.scores
  index = np.flatnonzero(old != new)
  assert len(index) == 8
  np.testing.assert_allclose(
    average.run(13)[0].memory.examples.scores[index],
    0.75 * old[index] + 0.25 * new[index],
    1e-5,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('sampler', 'devices'),
  [('prune', 2), *((sampler, 4) for sampler in SAMPLERS)],
)
def test_devices_change_neither_order_nor_memory(sampler, devices):
  """Over four epochs: the same examples of every step, the same memory."""
  (one, first), (many, other) = (
    setup(count, **{**SAMPLERS[sampler], 'selection.log_counts': True}).run(40)
    for count in (1, devices)
  )
  for name in ('order', 'count', 'cursor', 'epoch'):
    np.testing.assert_array_equal(
      getattr(one.sampler, name), getattr(many.sampler, name)
    )
  np.testing.assert_array_equal(one.counts, many.counts)
  helpers.assert_trees_close(one.memory, many.memory, 1e-2)
  np.testing.assert_allclose(first['loss'], other['loss'], 1e-2, 1e-3)
  assert int(one.sampler.epoch) >= 3


def test_epochs_are_plain_at_first_and_at_last():
  """60 steps: 12 of the first epoch, then pruned ones, then an eighth."""
  this = setup(**PRUNE)
  _, metrics = this.run(60)
  fractions = metrics['epoch_fraction'].round(4)
  kept = round(1 - (48 - int(0.4 * 48 + 1e-9)) / 96, 4)
  np.testing.assert_array_equal(fractions[:12], 1)
  assert {*fractions[12:52].tolist()} == {np.float32(kept)}
  # round(0.125 * 60) = 8 steps: a new epoch begins there, and is whole.
  np.testing.assert_array_equal(fractions[52:], 1)


def test_a_pruned_epoch_leaves_out_the_easiest_only():
  """In the second epoch every example above the share is visited once."""
  this = setup(**PRUNE, **{'selection.log_counts': True})
  before, _ = this.run(12)
  state, _ = this.run(13)
  order = np.asarray(state.sampler.order)[: int(state.sampler.count)]
  hardest = np.argsort(before.memory.examples.scores)[:48]
  assert {*hardest.tolist()} <= {*order.tolist()}
  assert len({*order.tolist()}) == len(order)


@pytest.mark.slow
def test_pools_are_of_the_lowest_remembered():
  this = setup(**{**MEMORY, 'selection.tail': 0.0})
  before, _ = this.run(12)
  state, _ = this.run(13)
  key = jax.random.split(jax.random.fold_in(jax.random.key(0), 2))[0]
  order = jax.random.permutation(jax.random.fold_in(key, 1), 96)
  expected = references.pool_batches(
    before.memory.examples.scores, None, np.asarray(order), 32, 8
  )
  found = np.asarray(state.sampler.order)[:24].reshape(3, 8).tolist()
  assert [{*x} for x in found] == [{*x} for x in expected]


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['prune', 'auto', 'weighted', 'pool'])
def test_a_stopped_run_ends_with_the_same_bits(sampler, tmp_path):
  """Stopped within the second epoch; the order and the memory are saved."""
  fields = {
    **SAMPLERS[sampler],
    'steps': 240,
    'log_every': 1,
    'checkpoint_every': 200,
    'eval_every': 240,
  }
  helpers.train(tmp_path / 'whole', **fields)
  with pytest.raises(helpers.Interrupted):
    helpers.train(tmp_path / 'stopped', interrupt_at=201, **fields)
  helpers.train(tmp_path / 'stopped', **fields)
  whole, stopped = (
    helpers.saved_state(tmp_path / name, **fields)[0]
    for name in ('whole', 'stopped')
  )
  helpers.assert_trees_equal(whole, stopped)
  assert int(whole.sampler.epoch) >= 1
  # All but what fills no batch.
  assert np.isfinite(whole.memory.examples.scores).mean() > 0.99


@pytest.mark.slow
def test_a_memory_step_is_a_plain_step(tmp_path):
  """The same parameters as plain training, while epochs are whole."""
  fields = {'steps': 12, 'log_every': 12}
  whole = {'selection.tail': 0.0}
  (plain, _), (memory, _) = (
    setup(**{**fields, **more}).run(12)
    for more in ({'selection.rule': 'uniform'}, {**PRUNE, **whole})
  )
  helpers.assert_trees_close(plain.params, memory.params, 1e-6)
  cost = setup(**PRUNE).program.cost(0, 12)
  assert cost.examples_scored == 0
  assert cost.examples_trained == 96


def test_the_memory_is_donated():
  this = setup(**PRUNE)
  state = this.devices.replicate(this.first)
  scores = state.memory.examples.scores
  state, _ = this.program(0, state)
  assert scores.is_deleted()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('sampler', 'steps_per_call'), [('auto', 1), ('auto', 10), ('weighted', 1)]
)
def test_the_memory_is_written_in_place(sampler, steps_per_call):
  """It adds no temporaries; only the weights of an order do."""

  def bytes_per_example(fields):
    few, many = (
      helpers.Setup(steps_per_call, small(n), steps=60, **fields)
      .program.programs[0]
      .memory_analysis()
      for n in (200, 1200)
    )
    return (many.temp_size_in_bytes - few.temp_size_in_bytes) / 1000

  weights = 4 * SAMPLERS[sampler].get('selection.unbiased', False)
  uniform = bytes_per_example({'selection.rule': 'uniform'})
  added = bytes_per_example(SAMPLERS[sampler]) - uniform
  assert added == pytest.approx(weights, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('action', ['skip', 'stop'])
def test_a_step_without_effect_is_not_remembered(action):
  """Its scores may be NaN."""
  margin_jax.register_loss(
    'fails_later',
    lambda outputs: jnp.where(outputs.index[0] >= 0, jnp.nan, 0.0),
  )
  this = setup(**{
    **PRUNE,
    'on_nonfinite': action,
    'loss.names': ('fails_later',),
    'loss.weights': (1.0,),
  })  # fmt: skip
  state, metrics = this.run(2)
  assert metrics['nonfinite'].all()
  assert (state.memory.examples.scores == -np.inf).all()
  assert state.memory.feature_norm == 0
  cursor = 16 if action == 'skip' else this.first.sampler.cursor
  assert int(state.sampler.cursor) == cursor


@pytest.mark.slow
def test_steps_in_one_call_remember_alike():
  one, _ = setup(**PRUNE).run(30)
  many, _ = setup(**PRUNE, steps_per_call=10).run(3)
  np.testing.assert_array_equal(one.sampler.order, many.sampler.order)
  helpers.assert_trees_close(one.memory, many.memory, 1e-3)


@pytest.mark.slow
def test_a_proxy_is_trained_at_every_nth_step():
  fields = {'selection.proxy': 'cnn', 'selection.proxy_every': 3}
  this = helpers.Setup(**fields)
  states = [this.run(calls)[0].proxy['params'] for calls in range(1, 5)]
  first, second, third, fourth = states
  helpers.assert_trees_equal(first, second)
  helpers.assert_trees_equal(second, third)
  assert any(
    (x != y).any()
    for x, y in zip(
      jax.tree.leaves(third), jax.tree.leaves(fourth), strict=True
    )
  )
  _, metrics = this.run(4)
  assert (metrics['proxy_loss'] > 0).tolist() == [True, False, False, True]
  cheap = this.program.cost(1, 2).flops
  assert cheap < this.program.cost(0, 1).flops


def test_the_proxy_has_the_learning_rate_of_the_step():
  """At its third training, with every=3, the step is 6."""
  fields = {'selection.proxy': 'cnn', 'selection.proxy_every': 3}
  spec = helpers.Setup(
    **fields,
    **{
      'steps': 9,
      'optimizer.learning_rates': (1.0, 0.0),
      'optimizer.boundaries': (5,),
      'optimizer.momentum': 0.0,
    },
  ).spec
  params = {'w': jnp.ones(2)}
  state = spec.proxy_optimizer.init(params)
  sizes = []
  for _ in range(3):
    updates, state = spec.proxy_optimizer.update(params, state, params)
    sizes.append(float(updates['w'][0]))
  assert sizes == [-1, -1, 0]


def test_the_proxy_rests_once_nothing_is_scored():
  spec = helpers.Setup(
    **{'selection.proxy': 'cnn', 'selection.stop': 4, 'steps': 8}
  ).spec
  assert spec.trains_proxy(np.arange(8)).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
  assert spec.proxy_branches() == (0, 1)


# Weights of examples.


def of_vectors(name, weights=None, examples=64):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(examples, 8, 8, 1))
  labels = rng.integers(0, 3, examples)
  train = (inputs, labels) if weights is None else (inputs, labels, weights)
  margin_jax.register_dataset(name, train=train, test=(inputs, labels))
  return data.load(name)


@pytest.mark.slow
def test_weights_of_a_dataset_multiply_every_loss():
  """The first step against the hand formula: mean(w * loss) + a * MMR."""
  weights = np.random.default_rng(1).uniform(0, 3, 64)
  margin_jax.register_loss(
    'norms', lambda outputs: jnp.sum(outputs.features**2, axis=1)
  )
  margin_jax.register_loss(
    'by_hand', lambda outputs: jnp.mean(outputs.weights * outputs.logits[:, 0])
  )
  fields = {
    'data.name': 'weighted',
    'data.validation_examples': 0,
    'data.augmentations': (),
    'selection.rule': 'uniform',
    'loss.names': ('norms', 'by_hand'),
    'loss.weights': (0.01, 0.1),
    'mmr.alpha': 1e-3,
    'optimizer.momentum': 0.0,
    'optimizer.weight_decay': 0.0,
  }
  dataset = of_vectors('weighted', weights)
  this = helpers.Setup(dataset=dataset, devices=4, **fields)
  state, metrics = this.run(1)
  batch = helpers.first_pool(this, 8)
  w = jnp.asarray(weights, jnp.float32)[batch['index']]
  np.testing.assert_array_equal(batch['weights'], w)

  def expected(params):
    logits, features = this.spec.model.apply(
      {'params': params}, batch['inputs'], train=True
    )
    risks = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    mmr = margin_jax.mmr_penalty(
      features, logits, params['head']['kernel'], batch['label'], weights=w
    )
    norms = jnp.mean(w * jnp.sum(features**2, axis=1))
    by_hand = jnp.mean(w * logits[:, 0])
    return jnp.mean(w * risks) + 1e-3 * mmr + 0.01 * norms + 0.1 * by_hand

  gradient = jax.grad(expected)(this.first.params)
  updated = jax.tree.map(lambda p, g: p - 0.05 * g, this.first.params, gradient)
  helpers.assert_trees_close(state.params, updated, 1e-5)
  assert metrics['loss'][0] > 0


@pytest.mark.parametrize('reduction', ['mean_of_squares', 'square_of_mean'])
def test_mmr_with_weights_agrees_with_its_oracle(reduction):
  head = references.random_head((6, 5, 4))
  weights = np.random.default_rng(2).uniform(0, 2, 6).astype(np.float32)
  found = margin_jax.mmr_penalty(*head, reduction=reduction, weights=weights)
  expected = references.mmr_penalty(*head, reduction, weights=weights)
  np.testing.assert_allclose(found, expected, 1e-5)
  with pytest.raises(ValueError, match='weights must have shape'):
    margin_jax.mmr_penalty(*head, weights=weights[:3])


@pytest.mark.slow
def test_weights_follow_the_selected_examples():
  """From the pool into the batch, and through the buffer."""
  weights = np.arange(64) + 1.0
  fields = {
    'data.name': 'counted',
    'data.validation_examples': 0,
    'data.augmentations': (),
    'selection.reuse': 2,
  }
  this = helpers.Setup(dataset=of_vectors('counted', weights), **fields)
  state, _ = this.run(1)
  np.testing.assert_array_equal(
    state.buffer['weights'], state.buffer['index'] + 1
  )


@pytest.mark.slow
def test_weights_of_sampler_and_dataset_multiply():
  weights = np.arange(64) + 1.0
  fields = {
    'data.name': 'both',
    'data.validation_examples': 0,
    'data.augmentations': (),
    **SAMPLERS['prune'],
    'steps': 60,
  }
  this = helpers.Setup(dataset=of_vectors('both', weights), **fields)
  state, _ = this.run(9)  # one step into the second epoch
  rows, given = (
    np.asarray(x)[:8] for x in (state.sampler.order, state.sampler.weights)
  )
  # Of 32 easy examples 12 stay.
  assert {*given.round(3).tolist()} == {1.0, np.float32(2.667)}

  def take():
    return in_memory.take_weights(
      state.sampler.replace(cursor=0), {'weights': weights[rows]}, 8, 'device'
    )

  _, batch = jax.vmap(take, axis_name='device', axis_size=1)()
  np.testing.assert_allclose(batch['weights'][0], given * weights[rows])


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    (np.ones(63), r'weights must have shape \(64,\)'),
    (np.ones(64, int), 'weights must be floating'),
    (-np.ones(64), 'at least 0, row 0 is -1'),
    (np.full(64, np.nan), 'finite and at least 0, row 0 is nan'),
  ],
)
def test_bad_weights_are_refused(weights, message):
  with pytest.raises(ValueError, match=message):
    of_vectors('bad', weights)


@pytest.mark.slow
def test_other_weights_are_another_dataset(tmp_path):
  """A run is not continued on them."""
  fields = {
    'data.name': 'reweighted',
    'data.validation_examples': 0,
    'data.augmentations': (),
    'selection.rule': 'uniform',
  }
  of_vectors('reweighted', np.ones(64))
  config = helpers.small_config(**fields)
  loop.train(config, str(tmp_path), log=lambda line: None)
  of_vectors('reweighted', np.full(64, 2.0))
  with pytest.raises(ValueError, match='another config'):
    loop.train(config, str(tmp_path), log=lambda line: None)


@pytest.mark.slow
def test_an_epoch_is_never_shorter_than_a_batch():
  """All examples are easy, and 90% would be dropped: of 24, 8 are left."""
  fields = {**PRUNE, 'selection.share': 1.0, 'selection.drop': 0.9}
  this = setup(
    dataset=small(24),
    **{**fields, 'selection.unbiased': True, 'selection.tail': 0.0},
  )
  state, metrics = this.run(20)
  assert int(state.sampler.count) == 8
  assert metrics['epoch_fraction'].min() == np.float32(8 / 24)
  order = np.asarray(state.sampler.order)[:8]
  assert len({*order.tolist()}) == 8
  np.testing.assert_allclose(state.sampler.weights[:8], 3)


@pytest.mark.slow
def test_a_nan_score_of_a_batch_stops_the_run(tmp_path):
  """As one of a pool does."""

  def rule(scored):
    return jnp.where(scored.index % 3 == 0, jnp.nan, 0.0)

  margin_jax.register_rule('sometimes_nan', rule)
  config = helpers.small_config(
    **{**PRUNE, 'selection.rule': 'sometimes_nan', 'log_every': 1}
  )
  with pytest.raises(ArithmeticError, match=r'score\(s\) are nan at step 1'):
    loop.train(config, str(tmp_path), log=lambda line: None)


@pytest.mark.slow
def test_a_short_backward_pass_ranks_weighted_losses():
  """'kept' is 'all', but for the time it takes, with weights too."""
  weights = np.random.default_rng(3).choice([0.0, 1.0, 5.0], 64)
  dataset = of_vectors('trimmed', weights)
  fields = {
    'data.name': 'trimmed',
    'data.validation_examples': 0,
    'data.augmentations': (),
    'selection.rule': 'uniform',
    'mmr.alpha': 0.0,
    'trimming.first': 0.5,
    'trimming.last': 0.4,
  }
  states = [
    helpers.Setup(
      dataset=dataset, **{**fields, 'trimming.backward': backward}
    ).run(1)[0]
    for backward in ('all', 'kept')
  ]
  helpers.assert_trees_close(states[0].params, states[1].params, 1e-6)


@pytest.mark.slow
def test_a_custom_rule_of_the_whole_batch_remembers():
  """On one device or several; so does a function without a name."""
  margin_jax.register_rule(
    'far_from_mean',
    lambda scored: jnp.linalg.norm(
      scored.features - scored.features.mean(axis=0)[None], axis=1
    ),
    whole_pool=True,
    distance=True,
  )
  one, four = (
    setup(devices=n, **{**PRUNE, 'selection.rule': 'far_from_mean'}).run(12)[0]
    for n in (1, 4)
  )
  helpers.assert_trees_close(one.memory, four.memory, 1e-3)
  this = setup(rule=lambda scored: scored.logits[:, 0], **PRUNE)
  state, _ = this.run(1)
  assert np.isfinite(state.memory.examples.scores).sum() == 8
