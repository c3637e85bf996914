"""The fused step: against its parts, on several devices, as one program."""

import dataclasses
import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from margin_jax import models
from margin_jax.train import devices as devices_lib
from margin_jax.train import evaluation
from margin_jax.train import metrics as metrics_lib
from margin_jax.train import setup as setup_lib
from tests import helpers, references
from tests.helpers import slow


@functools.cache
def setup(**fields):
  return helpers.Setup(**fields)


def test_step_is_one_program_without_host_callbacks():
  (program,) = setup().program.programs
  lowered = program.lowered.as_text()
  assert lowered.count('func.func public @main') == 1
  assert 'top_k' in lowered
  optimized = program.as_text()
  assert optimized.count('\nENTRY') == 1
  targets = set(re.findall(r'custom_call_target="([^"]+)"', optimized))
  targets |= set(re.findall(r'custom_call @(\w+)', lowered))
  assert not [target for target in targets if 'callback' in target]
  for transfer in ('infeed', 'outfeed', 'send', 'recv'):
    assert f' {transfer}(' not in optimized


def test_the_search_for_callbacks_finds_one():
  """The check above can fail: a program with a callback has such a target."""
  text = (
    jax.jit(lambda x: jax.pure_callback(np.sin, x, x))
    .lower(np.float32(1))
    .compile()
    .as_text()
  )
  targets = re.findall(r'custom_call_target="([^"]+)"', text)
  assert [target for target in targets if 'callback' in target]


def test_step_donates_the_state():
  this = setup()
  state = this.devices.replicate(this.first)
  kernel = state.params['head']['kernel']
  new, _ = this.program(0, state)
  assert kernel.is_deleted()
  assert not new.params['head']['kernel'].is_deleted()


def test_one_step_equals_its_parts():
  """Pool, scores, choice, gradient and update, each by other means."""
  this = setup()
  state, metrics = this.run(1)
  first, method = this.first, this.spec
  pool = helpers.first_pool(this)
  apply = functools.partial(method.model.apply, train=False)
  inputs = this.dataset.prepare(pool['inputs'])
  logits, _ = apply({'params': first.params}, inputs)
  scores = references.mms_scores(
    np.asarray(logits), first.params['head']['kernel']
  )
  chosen = np.argsort(scores, kind='stable')[:8]
  label = np.asarray(pool['label'])[chosen]
  # The CNN has no train mode, so these are the gradient step's logits too.
  competing = references.competitors(np.asarray(logits)[chosen], label)

  def loss(params):
    logits, features = apply({'params': params}, inputs[chosen])
    log_p = jax.nn.log_softmax(logits)
    kernel = params['head']['kernel']
    width = jnp.sum((kernel[:, label] - kernel[:, competing]) ** 2, axis=0)
    penalty = jnp.mean(width) * jnp.max(jnp.sum(features**2, axis=1))
    return -jnp.mean(log_p[np.arange(8), label]) + 1e-4 * penalty

  gradient = jax.grad(loss)(first.params)
  expected = jax.tree.map(
    lambda p, g: p - 0.05 * (g + (1e-4 * p if p.ndim > 1 else 0)),
    first.params,
    gradient,
  )
  helpers.assert_trees_close(state.params, expected, 1e-6)
  wrong = np.argmax(logits, axis=1) != np.asarray(pool['label'])
  np.testing.assert_allclose(metrics['pool_error'], [wrong.mean()])
  np.testing.assert_allclose(
    metrics['gradient_norm'], [optax.tree.norm(gradient)], rtol=1e-5
  )
  assert metrics['nan_scores'] == [0]


@pytest.mark.parametrize('rule', ['mms', *slow('random', 'uniform')])
def test_four_devices_agree_with_one(rule):
  fields = {'selection.rule': rule, 'steps': 20}
  one, metrics_one = helpers.Setup(**fields, devices=1).run(20)
  four, metrics_four = helpers.Setup(**fields, devices=4).run(20)
  helpers.assert_trees_close(one.params, four.params, 1e-5)
  helpers.assert_trees_equal(one.sampler, four.sampler)
  for name, values in metrics_one.items():
    np.testing.assert_allclose(
      values, metrics_four[name], rtol=1e-4, atol=1e-5, err_msg=name
    )


@pytest.mark.slow
def test_device_count_does_not_change_batch_norm_networks():
  """Statistics are over all devices' examples, scoring leaves them alone."""
  fields = {
    'model.name': 'resnet8',
    'data.validation_examples': 0,
    'optimizer.learning_rates': (0.01,),
  }
  dataset = helpers.noise()
  one, _ = helpers.Setup(dataset=dataset, devices=1, **fields).run(3)
  four, _ = helpers.Setup(dataset=dataset, devices=4, **fields).run(3)
  helpers.assert_trees_close(one.batch_stats, four.batch_stats, 1e-4)
  helpers.assert_trees_close(one.params, four.params, 1e-4)

  # Statistics per device are another computation, averaged to one state.
  own, _ = helpers.Setup(
    dataset=dataset, devices=4, **fields, **{'model.batch_norm': 'device'}
  ).run(3)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(own))
  difference = jax.tree.map(
    lambda x, y: np.abs(x - y).max(), own.batch_stats, four.batch_stats
  )
  assert max(jax.tree.leaves(difference)) > 1e-4


@pytest.mark.slow
def test_steps_in_one_call_equal_steps_one_by_one():
  one, metrics_one = setup().run(6)
  many, metrics_many = helpers.Setup(steps_per_call=3).run(2)
  helpers.assert_trees_close(one.params, many.params, 1e-6)
  helpers.assert_trees_equal(one.sampler, many.sampler)
  assert int(many.step) == 6
  np.testing.assert_allclose(metrics_one['loss'], metrics_many['loss'], 1e-5)


def test_uniform_scores_nothing_and_costs_less():
  plain = setup(**{'selection.rule': 'uniform'})
  _, metrics = plain.run(1)
  assert 'pool_error' not in metrics
  assert plain.program.cost(0, 1).flops < 0.6 * setup().program.cost(0, 1).flops


def test_flops_count_the_forward_on_the_pool():
  """B=32, b=8: one forward on 32, and about three forwards' worth on 8."""
  this = setup()
  forward = jax.jit(
    lambda params, x: this.spec.model.apply({'params': params}, x, train=False)
  ).lower(this.first.params, np.zeros((32, 8, 8, 1), np.float32))
  flops = forward.cost_analysis()['flops']
  assert 1.6 * flops < this.program.cost(0, 1).flops < 1.9 * flops


@pytest.mark.parametrize('devices', [1, *slow(4)])
def test_evaluation_counts_every_example_once(devices):
  this = setup(devices=devices)
  splits = {k: v for k, v in this.dataset.splits.items() if k != 'train'}
  evaluator = evaluation.Evaluator(
    this.spec,
    this.dataset.chunks(devices_lib.Devices(devices), tuple(splits), 101),
  )
  for name, split in splits.items():
    result = evaluator(name, this.first)
    logits, _ = this.spec.model.apply(
      {'params': this.first.params},
      this.dataset.prepare(split['inputs']),
      train=False,
    )
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    rows = np.arange(len(log_p))
    assert result['count'] == len(split['label'])
    assert result['accuracy'] == pytest.approx(
      np.mean(log_p.argmax(1) == split['label']), abs=1e-12
    )
    assert result['loss'] == pytest.approx(
      -log_p[rows, split['label']].mean(), rel=1e-5
    )


def test_devices_out_of_range_are_refused():
  with pytest.raises(ValueError, match='devices must be between 1 and 8'):
    devices_lib.Devices(9)


def test_steps_per_call_divides_every_interval():
  def steps_per_call(config, platform, start=0):
    dataset = helpers.digits()
    return setup_lib.steps_per_call(config, platform, dataset, start)

  config = helpers.small_config(
    steps=1200, log_every=300, eval_every=600, checkpoint_every=1200
  )
  assert steps_per_call(config, 'gpu') == 100
  config.log_every = 14
  assert steps_per_call(config, 'tpu') == 2
  assert steps_per_call(config, 'cpu') == 1
  assert steps_per_call(config, 'gpu', start=7) == 1
  config.steps_per_call = 3
  assert steps_per_call(config, 'cpu') == 3


def test_batches_depend_on_the_seed():
  first, _ = setup().run(1)
  other, _ = setup(seed=1).run(1)
  assert not np.array_equal(first.sampler.order, other.sampler.order)


def test_mean_mms_is_over_the_ten_smallest():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(24, 5)).astype(np.float32)
  kernel = rng.normal(size=(3, 5)).astype(np.float32)
  expected = np.sort(references.mms_scores(logits, kernel))[:10].mean()
  labels = jnp.zeros(6, jnp.int32)
  spec = types.SimpleNamespace(axis_name='device')
  mean = jax.pmap(
    lambda x: metrics_lib.of_batch(spec, labels, x, jnp.asarray(kernel), {})[
      'mean_mms'
    ],
    axis_name='device',
  )(logits.reshape(4, 6, 5))
  np.testing.assert_allclose(mean, np.full(4, expected), rtol=1e-5)


class Linear(nn.Module):
  """No ReLU: XLA:CPU of jax 0.11 loses NaN where it fuses one with a sum."""

  @nn.compact
  def __call__(self, inputs, *, train):
    features = inputs.reshape(inputs.shape[0], -1)
    return nn.Dense(10, name='head')(features), features


@pytest.mark.slow
@pytest.mark.parametrize('rule', ['random', 'mms', 'selective_backprop'])
def test_examples_without_logits_are_not_selected(rule, monkeypatch):
  """NaN pixels give NaN logits: counted, and left out by every rule."""
  monkeypatch.setattr(models, 'build', lambda *args, **kwargs: Linear())
  dataset = helpers.digits()

  def prepare(inputs):
    bad = inputs[:, :1, :1, :1] == 255
    return jax.numpy.where(bad, jax.numpy.nan, dataset.prepare(inputs))

  train = dict(dataset.splits['train'])
  train['inputs'] = train['inputs'].copy()
  train['inputs'][::5, 0, 0] = 255
  broken = dataclasses.replace(
    dataset,
    splits={**dataset.splits, 'train': train},
    augment=lambda key, image: image,
    prepare=prepare,
  )
  this = helpers.Setup(
    dataset=broken,
    **{'selection.rule': rule, 'selection.log_counts': True},
    on_nonfinite='skip',
  )
  state, metrics = this.run(5)
  assert metrics['nan_scores'].min() > 0
  assert np.isfinite(metrics['loss']).all()
  assert np.isfinite(metrics['score_max']).all()
  assert state.counts[::5].sum() == 0
  assert state.counts.sum() == 5 * 8
