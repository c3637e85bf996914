"""What selection can be asked to do, in the compiled step and in a run."""

import functools

import jax
import numpy as np
import pytest

from margin_jax import config as config_lib
from margin_jax import models, registry, selection
from margin_jax.train import loop
from margin_jax.train import metrics as metrics_lib
from tests import helpers, references

# Those that draw, or rank by a score of the whole pool, and one of the others.
RULES = ['mms', 'random', 'selective_backprop', 'balanced']


@functools.cache
def run(calls, devices=1, **fields):
  return helpers.Setup(devices=devices, **fields).run(calls)


@pytest.mark.parametrize(
  ('rule', 'reuse'), [*((rule, 1) for rule in RULES), ('mms', 2)]
)
@pytest.mark.slow
def test_device_count_changes_nothing(rule, reuse):
  """Draws, arrangements and the reserve are of the whole pool."""
  fields = {'selection.rule': rule, 'selection.reuse': reuse}
  if rule == 'balanced':
    fields |= {'selection.rule': 'loss', 'selection.ramp': 0.3}
  one, _ = run(4, **fields, **{'selection.log_counts': True})
  four, _ = run(4, devices=4, **fields, **{'selection.log_counts': True})
  np.testing.assert_array_equal(one.counts, four.counts)
  helpers.assert_trees_close(one.params, four.params, 1e-5)


@pytest.mark.slow
def test_device_scope_ranks_within_each_device():
  """Another set than the global one, the same as four small pools."""
  fields = {'selection.rule': 'mms', 'selection.log_counts': True}
  this = helpers.Setup(devices=4, **fields, **{'selection.scope': 'device'})
  state, _ = this.run(1)
  pool = helpers.first_pool(this)
  logits, _ = this.spec.model.apply(
    {'params': this.first.params},
    this.dataset.prepare(pool['inputs']),
    train=False,
  )
  scores = np.asarray(
    selection.mms(
      helpers.scored(logits, this.first.params['head']['kernel'], None, None)
    )
  )
  chosen = [
    8 * d + i for d in range(4) for i in np.argsort(scores[8 * d :][:8])[:2]
  ]
  expected = np.zeros(1257, np.int32)
  expected[np.asarray(pool['index'])[chosen]] = 1
  np.testing.assert_array_equal(state.counts, expected)
  whole, _ = run(1, devices=4, **fields)
  assert not np.array_equal(whole.counts, expected)


@pytest.mark.slow
def test_reuse_feeds_ranks_in_order():
  """Two steps of one pool train on what one step of twice the batch would."""
  fields = {'selection.rule': 'mms', 'selection.log_counts': True}
  this = helpers.Setup(**fields, **{'selection.reuse': 2})
  state, metrics = this.run(2)
  assert metrics['scored'].tolist() == [1, 0]
  assert int(state.sampler.cursor) == 32
  twice, _ = run(1, batch_size=16, **fields)
  np.testing.assert_array_equal(state.counts, twice.counts)
  first, _ = run(1, **fields)
  assert np.all(first.counts <= state.counts)
  cost = [this.program.cost(i, i + 1) for i in range(3)]
  assert [c.examples_scored for c in cost] == [32, 0, 32]
  assert cost[1].flops < 0.6 * cost[0].flops
  assert cost[0].flops == cost[2].flops


@pytest.mark.slow
def test_every_start_and_stop_say_which_steps_score():
  this = helpers.Setup(
    **{
      'selection.every': 2,
      'selection.start': 1,
      'selection.stop': 6,
      'selection.rule': 'loss',
    }
  )
  state, metrics = this.run(8)
  assert metrics['scored'].tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
  assert int(state.sampler.cursor) == 3 * 32 + 5 * 8
  cost = this.program.cost(0, 8)
  assert cost.examples_scored == 3 * 32
  assert cost.examples_trained == 8 * 8
  assert np.all(metrics['pool_error'][metrics['scored'] == 0] == 0)


@pytest.mark.parametrize(
  'fields',
  [
    {'selection.every': 2, 'selection.start': 1},
    # Three steps an epoch: the first eight keep 400, 293 and 187.
    *helpers.long(
      {
        'trimming.last': 0.2,
        'trimming.backward': 'kept',
        'steps': 12,
        'batch_size': 400,
      }
    ),
  ],
)
@pytest.mark.slow
def test_a_switch_on_the_device_equals_the_host_picking(fields):
  """Several steps a call switch inside the program; the costs are the same."""
  rule = 'uniform' if 'trimming.last' in fields else 'mms'
  fields = {**fields, 'selection.rule': rule, 'mmr.alpha': 0.0}
  every = {'log_every': 4, 'eval_every': 4, 'checkpoint_every': 4}
  host = helpers.Setup(**fields)
  device = helpers.Setup(steps_per_call=4, **fields, **every)
  assert len(device.program.programs) == 1
  variants = {host.program.variant(step) for step in range(12)}
  assert len(host.program.programs) == len(variants) > 1
  one, _ = host.run(8)
  many, _ = device.run(2)
  # Rounding may swap two examples at the edge of what trimming keeps, which
  # moves parameters by up to 1e-3; a wrong branch moves them by 1e-2.
  tolerance = 3e-3 if 'trimming.last' in fields else 1e-5
  helpers.assert_trees_close(one.params, many.params, tolerance)
  assert host.program.cost(0, 12) == device.program.cost(0, 12)


@pytest.mark.slow
def test_bfloat16_scores_train_the_same_float32_model():
  plain, _ = run(3, **{'selection.rule': 'mms'})
  cheap = helpers.Setup(**{'selection.score_dtype': 'bfloat16'})
  state, metrics = cheap.run(3)
  assert 'bf16' in cheap.program.programs[0].lowered.as_text()
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
  assert np.isfinite(metrics['loss']).all()
  # The same pools and nearly the same scores, so nearly the same steps.
  kernel, other = plain.params['head'], state.params['head']
  np.testing.assert_allclose(kernel['kernel'], other['kernel'], atol=0.05)


@pytest.mark.long
@pytest.mark.slow
def test_low_resolution_scoring_costs_less():
  fields = {'model.name': 'resnet8', 'data.validation_examples': 0}
  small = helpers.Setup(
    dataset=helpers.noise(), **fields, **{'selection.score_resolution': 6}
  )
  full = helpers.Setup(dataset=helpers.noise(), **fields)
  _, metrics = small.run(1)
  assert np.isfinite(metrics['loss']).all()
  assert small.program.cost(0, 1).flops < 0.7 * full.program.cost(0, 1).flops


@pytest.mark.slow
def test_a_proxy_scores_and_is_trained_along():
  """With an identical twin as proxy, the choice is that of the proxy."""
  fields = {'selection.rule': 'mms', 'selection.proxy': 'cnn'}
  this = helpers.Setup(**fields, **{'selection.log_counts': True})
  state, _ = this.run(2)
  before = this.first.proxy['params']['head']['kernel']
  assert not np.array_equal(before, state.proxy['params']['head']['kernel'])
  assert not np.array_equal(
    this.first.params['head']['kernel'], this.first.proxy['params']['head']
    ['kernel'],
  )  # fmt: skip
  # A model with the proxy's parameters chooses the same first batch.
  first, _ = this.run(1)
  twin = helpers.Setup(
    **{'selection.rule': 'mms', 'selection.log_counts': True}
  )
  twin.first = twin.first.replace(params=this.first.proxy['params'])
  chosen, _ = twin.run(1)
  np.testing.assert_array_equal(first.counts, chosen.counts)


@pytest.mark.slow
def test_pool_statistics_follow_the_pool():
  """One momentum step towards the statistics of all 32 examples."""
  fields = {
    'model.name': 'resnet8',
    'data.validation_examples': 0,
    'selection.batch_stats': 'pool',
  }
  this = helpers.Setup(dataset=helpers.noise(), devices=4, **fields)
  state, _ = this.run(1)
  pool = helpers.first_pool(this)
  model = models.build('resnet8', 2)
  _, updates = model.apply(
    {'params': this.first.params, 'batch_stats': this.first.batch_stats},
    this.dataset.prepare(pool['inputs']),
    train=True,
    mutable=['batch_stats'],
  )
  helpers.assert_trees_close(state.batch_stats, updates['batch_stats'], 1e-4)


@pytest.mark.slow
def test_trimming_keeps_what_the_schedule_says():
  """p from 1 to 0.2 by epoch, half to even, no recompilation."""
  fields = {'trimming.last': 0.2, 'selection.rule': 'uniform', 'steps': 785}
  this = helpers.Setup(**fields)
  trimming = this.spec.trimming
  assert trimming.steps_per_epoch == 157  # 1257 // 8
  # 8, 6.4, 4.8, 3.2, 1.6 examples.
  assert trimming.keep == (8, 6, 5, 3, 2)
  assert [trimming.epoch(s) for s in (0, 156, 157, 784, 10**6)] == [
    0, 0, 1, 4, 4,
  ]  # fmt: skip
  assert len(this.program.programs) == 1
  _, metrics = this.run(1)
  np.testing.assert_allclose(metrics['trimmed_loss'], metrics['loss'])
  this.first = this.first.replace(step=np.int32(784))
  _, metrics = this.run(1)
  assert metrics['trimmed_loss'] > metrics['loss']


@pytest.mark.long
@pytest.mark.slow
def test_trimming_with_a_short_backward_pass_gives_the_same_update():
  """Without BatchNorm, the kept examples are all that the gradient sees."""
  fields = {
    'trimming.last': 0.2, 'selection.rule': 'uniform', 'steps': 785,
    'mmr.alpha': 0.0,
  }  # fmt: skip
  states = []
  for backward in ('all', 'kept'):
    for devices in (1, 4):
      this = helpers.Setup(
        devices=devices, **fields, **{'trimming.backward': backward}
      )
      this.first = this.first.replace(step=np.int32(784))
      state = this.devices.replicate(this.first)
      state, _ = this.program(784, state)
      states.append(jax.device_get(state.params))
  for other in states[1:]:
    helpers.assert_trees_close(states[0], other, 1e-5)
  # 785 steps are five epochs; the last keep 5, 3 and 2 of 8.
  whole, short = this.program.cost(0, 1), this.program.cost(784, 785)
  assert short.flops < whole.flops
  assert (whole.examples_scored, whole.examples_trained) == (0, 8)
  assert (short.examples_scored, short.examples_trained) == (8, 4)


@pytest.mark.slow
def test_random_selection_uses_every_example_equally_often():
  """Chi-square over 1,257 examples and ten passes of pools."""
  fields = {'selection.rule': 'random', 'selection.log_counts': True}
  this = helpers.Setup(**fields, steps=400, **{'optimizer.momentum': 0.0})
  state, _ = this.run(390)
  counts = np.asarray(state.counts, np.float64)
  assert counts.sum() == 390 * 8
  mean = counts.mean()
  # Ten passes, each selecting an example with probability 1/4 (and missing
  # it now and then): a binomial, whose variance is below its mean.
  variance = mean * (1 - 1 / 4)
  chi_square = np.sum((counts - mean) ** 2 / variance)
  # 1,256 degrees of freedom: standard deviation sqrt(2 * 1256) = 50.
  assert abs(chi_square - 1256) < 4 * 50
  # The hard rule is not uniform, and the test sees it.
  hard = helpers.Setup(
    steps=400, **{'selection.rule': 'loss', 'selection.log_counts': True}
  )
  counts = np.asarray(hard.run(390)[0].counts, np.float64)
  assert np.sum((counts - mean) ** 2 / variance) > 1256 + 4 * 50


def test_metrics_tell_what_selection_did():
  _, metrics = run(3, **{'selection.rule': 'loss'})
  assert np.all(metrics['batch_error'] >= metrics['pool_error'])
  names = ['score_min', 'score_q25', 'score_median', 'score_q75', 'score_max']
  assert np.all(np.diff([metrics[n] for n in names], axis=0) >= 0)
  assert metrics['pool_classes'].sum(axis=1).tolist() == [32] * 3
  assert metrics['batch_classes'].sum(axis=1).tolist() == [8] * 3
  assert np.all(metrics['batch_classes'] <= metrics['pool_classes'])


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 4])
def test_mean_mms_of_the_scoring_forward(devices):
  """The ten smallest of the batch, by the forward that selected it."""
  this = helpers.Setup(
    dataset=helpers.noise(), devices=devices, batch_size=16,
    **{'data.validation_examples': 0, 'model.name': 'resnet8'},
    **{'selection.rule': 'loss'},
  )  # fmt: skip
  _, metrics = this.run(1)
  pool = helpers.first_pool(this)
  first = this.first
  logits, _ = this.spec.model.apply(
    {'params': first.params, 'batch_stats': first.batch_stats},
    this.dataset.prepare(pool['inputs']),
    train=False,
  )
  log_p = jax.nn.log_softmax(logits)
  hardest = np.argsort(log_p[np.arange(32), pool['label']])[:16]
  mms = references.mms_scores(logits, first.params['head']['kernel'])
  expected = np.sort(mms[hardest])[:10].mean()
  np.testing.assert_allclose(metrics['mean_mms_scoring'], expected, rtol=1e-4)
  # In training mode BatchNorm has other statistics.
  assert abs(metrics['mean_mms'][0] / expected - 1) > 0.1


@pytest.mark.slow
def test_class_rates_count_all_that_a_pool_feeds():
  state, metrics = run(4, **{'selection.rule': 'mms', 'selection.reuse': 2})
  # The CNN has no training mode: both forwards see the same margins.
  mms, scoring = metrics['mean_mms'], metrics['mean_mms_scoring']
  np.testing.assert_allclose(scoring, mms * [1, 0, 1, 0], rtol=1e-5)
  row, *_ = metrics_lib.summarize([metrics])
  assert row['mean_mms_scoring'] == pytest.approx(mms[[0, 2]].mean())
  assert 'mms' not in state.buffer
  pools, batches = metrics['pool_classes'], metrics['batch_classes']
  assert pools.sum(axis=1).tolist() == [32, 0, 32, 0]
  assert batches.sum(axis=1).tolist() == [16, 0, 16, 0]
  assert np.all(batches <= pools)


@pytest.mark.parametrize(
  'fields', [{'selection.ramp': 0.3}, {'selection.rule': 'selective_backprop'}]
)
@pytest.mark.slow
def test_score_quantiles_are_of_the_rule_whatever_the_transform(fields):
  names = ['score_min', 'score_q25', 'score_median', 'score_q75', 'score_max']
  _, plain = run(1, **{'selection.rule': 'loss'})
  _, transformed = run(1, **{'selection.rule': 'loss', **fields})
  for name in names:
    np.testing.assert_allclose(plain[name], transformed[name], 1e-6)


@pytest.mark.slow
def test_a_custom_rule_may_give_any_numbers():
  """Every branch of the switch has one dtype of metrics."""
  for dtype in (np.float16, jax.numpy.bfloat16):
    this = helpers.Setup(
      rule=lambda scored, dtype=dtype: -scored.labels.astype(dtype),
      steps_per_call=2,
      log_every=2,
      eval_every=2,
      checkpoint_every=2,
      **{'selection.rule': 'random', 'selection.every': 2},
    )
    _, metrics = this.run(1)
    assert metrics['score_min'][0] == -9


def own_rule(scored):
  """Prefers high labels."""
  return -scored.labels.astype(np.float32)


@pytest.mark.slow
def test_a_rule_of_ones_own(tmp_path):
  config = helpers.small_config(**{'selection.rule': 'random'}, steps=10)
  result = loop.train(config, str(tmp_path), rule=own_rule, log=lambda _: None)
  assert result['config']['selection.rule'] == 'custom: own_rule'
  lines = (tmp_path / 'classes.csv').read_text().splitlines()
  rates = [float(x) for x in lines[-1].split(',')[1:]]
  assert rates[9] == 1
  assert rates[0] == 0
  # The workdir is of that rule.
  with pytest.raises(config_lib.ConfigError, match='custom: own_rule'):
    loop.train(config, str(tmp_path), log=lambda _: None)
  for name in ('uniform', 'selective_backprop'):
    config.selection.rule = name
    with pytest.raises(config_lib.ConfigError, match='rule of your own'):
      loop.train(config, str(tmp_path / 'b'), rule=own_rule)
  partial = functools.partial(functools.partial(own_rule))
  assert registry.name_of(partial) == 'own_rule'

  def bad_rule(scored):
    return scored.logits

  with pytest.raises(
    ValueError, match=r'array of shape \(32,\), got \(32, 10\)'
  ):
    helpers.Setup(rule=bad_rule).program  # noqa: B018
