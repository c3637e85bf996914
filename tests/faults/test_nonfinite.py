"""NaN and infinity: the run stops, or the step is skipped; nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax.train import guard, loop
from tests import helpers
from tests.faults import runs
from tests.helpers import read_csv, saved_state, slow

# The update of step 13 is infinite.
EXPLODES = {
  'optimizer.learning_rates': (0.01, 1e37, 0.01),
  'optimizer.boundaries': (12, 13),
}


def train(workdir, rule=None, **fields):
  lines = []
  config = helpers.small_config(**fields)
  return loop.train(config, str(workdir), rule=rule, log=lines.append), lines


@pytest.mark.parametrize(
  'fields',
  [
    {},
    *slow(
      {'selection.rule': 'uniform'},
      # Step 13 is one of those that train on what step 12 has left.
      {'selection.reuse': 2, 'selection.start': 1},
      {'devices': 4},
    ),
  ],
)
def test_the_first_bad_step_is_named_and_its_pool_is_kept(tmp_path, fields):
  with pytest.raises(guard.NonFiniteError) as caught:
    train(tmp_path, **EXPLODES, **fields)
  text = str(caught.value)
  assert text.startswith('update_norm is inf at step 13; ')
  assert 'the last checkpoint is at step 10' in text
  assert caught.value.step == 13
  path = tmp_path / 'nonfinite_step_13.npz'
  assert str(path) in text
  with np.load(path) as pool:
    scored = fields == {} or 'devices' in fields
    assert len(pool['label']) == (32 if scored else 8)
    dataset = helpers.digits().splits['train']
    np.testing.assert_array_equal(
      pool['label'], dataset['label'][pool['index']]
    )
  assert runs.digest(tmp_path, 10)
  state, info = saved_state(tmp_path, **EXPLODES, **fields)
  assert info['step'] == 10
  assert int(state.nonfinite) == 0
  # The same command comes to the same end.
  with pytest.raises(guard.NonFiniteError, match='at step 13'):
    train(tmp_path, **EXPLODES, **fields)


@pytest.mark.slow
@pytest.mark.parametrize('steps_per_call', [1, 5])
def test_the_state_stays_as_it_was_before_the_bad_step(steps_per_call):
  """Also where later calls come before the host has looked."""
  setup = helpers.Setup(
    steps_per_call=steps_per_call, **EXPLODES, **{'selection.every': 2}
  )
  good = helpers.Setup(**EXPLODES, **{'selection.every': 2}).run(12)[0]
  state, metrics = setup.run(20 // steps_per_call)
  assert (metrics['nonfinite'][:12] == 0).all()
  code = setup.spec.checked().index('update_norm') + 1
  assert (metrics['nonfinite'][12:] == code).all()
  assert int(state.nonfinite) == code
  assert int(state.step) == 12
  compare = (
    helpers.assert_trees_equal
    if steps_per_call == 1
    else lambda x, y: helpers.assert_trees_close(x, y, 1e-6)
  )
  compare(state.replace(nonfinite=good.nonfinite), good)


@pytest.mark.slow
def test_statistics_that_overflow_are_found_though_the_loss_is_finite():
  """Squares of 1e25 do not fit float32: the variance is infinite."""
  setup = helpers.Setup(
    **{'model.name': 'resnet8', 'optimizer.weight_decay': 0.0}
  )
  kernel = setup.first.params['conv_stem']['kernel']
  kernel *= 1e25 / np.abs(kernel).max()
  state, metrics = setup.run(1)
  assert np.isfinite(metrics['loss']).all()
  assert np.isfinite(metrics['gradient_norm']).all()
  code = setup.spec.checked().index('statistics_norm') + 1
  assert metrics['nonfinite'].tolist() == [code]
  assert int(state.step) == 0
  for leaf in jax.tree.leaves(state.batch_stats):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize('alpha', [0.0, 1e-9])
@pytest.mark.slow
def test_a_penalty_that_is_in_no_loss_may_overflow(alpha):
  """Features and kernel fit float32, the product of their squares does not."""
  fields = {'selection.rule': 'uniform', 'optimizer.weight_decay': 0.0}
  setup = helpers.Setup(**fields, **{'mmr.alpha': alpha})
  for layer in setup.first.params.values():
    layer['kernel'] *= 1e5
  state, metrics = setup.run(1)
  assert np.isinf(metrics['penalty']).all()
  assert np.isfinite(metrics['loss']).all()
  assert int(state.step) == (alpha == 0)


def nan_scores(scored):
  """A custom rule that fails for one class."""
  return jnp.where(scored.labels == 3, jnp.nan, scored.logits[:, 0])


@pytest.mark.slow
def test_a_nan_score_stops_the_run_at_once(tmp_path):
  with pytest.raises(
    guard.NonFiniteError, match=r'[1-9]\d* score\(s\) are nan at step 1;'
  ):
    train(tmp_path, rule=nan_scores)
  setup = helpers.Setup(rule=nan_scores)
  first = helpers.first_pool(setup)
  with np.load(tmp_path / 'nonfinite_step_1.npz') as pool:
    for name, values in first.items():
      np.testing.assert_array_equal(pool[name], values)


@pytest.mark.slow
def test_skipping_ranks_nan_scores_last_and_goes_on(tmp_path):
  train(tmp_path, rule=nan_scores, on_nonfinite='skip')
  rows = read_csv(tmp_path / 'train.csv')
  assert sum(float(row['nan_scores']) for row in rows) > 0
  assert {int(row['skipped']) for row in rows} == {0}


@pytest.mark.slow
def test_a_skipped_step_leaves_parameters_and_averages_alone():
  fields = {**EXPLODES, 'on_nonfinite': 'skip', 'optimizer.momentum': 0.9}
  setup = helpers.Setup(**fields)
  before, _ = setup.run(12)
  after, metrics = setup.run(13)
  assert metrics['skipped'].tolist() == [0] * 12 + [1]
  helpers.assert_trees_equal(before.params, after.params)
  assert int(after.step) == 13
  # The next draw is another one: the step is done.
  assert int(after.sampler.cursor) != int(before.sampler.cursor)
  end, metrics = setup.run(20)
  assert metrics['skipped'].sum() == 1
  assert all(np.isfinite(x).all() for x in end.params['head'].values())
  assert np.isfinite(metrics['loss'][13:]).all()


@pytest.mark.slow
def test_skipped_steps_are_counted_and_not_averaged(tmp_path):
  train(tmp_path, **EXPLODES, on_nonfinite='skip')
  result, _ = train(tmp_path, **EXPLODES, on_nonfinite='skip')
  assert result['skipped'] == 1
  rows = read_csv(tmp_path / 'train.csv')
  assert [int(row['skipped']) for row in rows] == [0, 0, 1, 1]
  assert all(np.isfinite(float(row['update_norm'])) for row in rows)


def test_the_parameter_with_a_bad_gradient_is_named():
  tree = {'a': np.ones(3, np.float32), 'b': np.ones(2, np.float32)}
  assert int(guard.first_bad_leaf(tree)) == -1
  tree['b'][1] = np.inf
  assert int(guard.first_bad_leaf(tree)) == 1
  place = guard.checked(()).index('gradient_norm') + 1
  metrics = {
    'nonfinite': np.array([0, place]),
    'bad_gradient': np.array([-1, 1]),
    'gradient_norm': np.array([1.0, np.inf]),
  }
  with pytest.raises(
    guard.NonFiniteError,
    match=r'gradient_norm is inf, of the gradient of b, at step 8; try a lower '
    'optimizer.learning_rates',
  ):
    guard.check(6, metrics, guard.checked(()), ['a', 'b'])
