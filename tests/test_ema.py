"""The average of the variables against NumPy, and what reads it."""

import chex
import jax
import numpy as np
import pytest

import margin_jax
from margin_jax.train import ema
from tests import helpers

UNIFORM = {'selection.rule': 'uniform', 'mmr.alpha': 0.0}
BATCH_NORM = {
  **UNIFORM,
  'model.name': 'resnet8',
  'data.augmentations': (),
  'ema.decay': 0.7,
}


def averages(values, decay):
  """The average after each step, by its definition, in float64."""
  for t in range(1, len(values) + 1):
    weights = decay ** np.arange(t - 1, -1, -1, dtype=np.float64)
    yield np.tensordot(weights / weights.sum(), np.float64(values[:t]), axes=1)


@pytest.mark.parametrize('decay', [0.5, 0.9, 0.9999])
def test_an_average_has_no_bias_to_the_first_variables(decay):
  values = np.random.default_rng(0).normal(3, 1, (40, 5)).astype(np.float32)
  average = ema.create(decay, {'w': np.float32([1e3] * 5)}, {'m': values[0]})
  update = jax.jit(lambda a, x, y: ema.update(decay, a, {'w': x}, {'m': y}))
  expected = zip(averages(values, decay), averages(-values, decay), strict=True)
  for x, (params, batch_stats) in zip(values, expected, strict=True):
    average = update(average, x, -x)
    np.testing.assert_allclose(average.params['w'], params, 1e-5, 1e-5)
    np.testing.assert_allclose(average.batch_stats['m'], batch_stats, 1e-5)
  assert average.steps == len(values)


def test_without_a_decay_there_is_nothing():
  assert ema.create(0.0, {'w': np.ones(2)}, {}) == {}
  assert ema.update(0.0, {}, {'w': np.ones(2)}, {}) == {}


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 2])
def test_a_step_averages_parameters_and_statistics(devices):
  """Those of each step, as the run would be without an average."""
  this = helpers.Setup(dataset=helpers.noise(), devices=devices, **BATCH_NORM)
  states = [this.run(steps)[0] for steps in (1, 2, 3)]
  for name in ('params', 'batch_stats'):
    leaves = [jax.tree.leaves(getattr(s, name)) for s in states]
    columns = zip(*leaves, strict=True)
    found = jax.tree.leaves(getattr(states[-1].ema, name))
    assert found
    for average, column in zip(found, columns, strict=True):
      *_, expected = averages(np.stack(column), 0.7)
      np.testing.assert_allclose(average, expected, 1e-5, 1e-6)
  evaluated = states[-1].evaluated
  helpers.assert_trees_equal(evaluated['params'], states[-1].ema.params)
  helpers.assert_trees_equal(
    evaluated['batch_stats'], states[-1].ema.batch_stats
  )


@pytest.mark.slow
def test_the_average_is_evaluated_loaded_and_resumed(tmp_path):
  """It changes no step, and a run that stopped ends with the same bits."""
  fields = {**UNIFORM, 'ema.decay': 0.9, 'eval_every': 20}
  result, _ = helpers.train(tmp_path / 'whole', **fields)
  with pytest.raises(helpers.Interrupted):
    helpers.train(tmp_path / 'parts', interrupt_at=20, **fields)
  helpers.train(tmp_path / 'parts', **fields)
  state, _ = helpers.saved_state(tmp_path / 'whole', **fields)
  resumed, _ = helpers.saved_state(tmp_path / 'parts', **fields)
  helpers.assert_trees_equal(state, resumed)

  trained = margin_jax.load(tmp_path / 'whole', 'best')
  helpers.assert_trees_equal(trained.variables['params'], state.ema.params)
  test = helpers.digits().splits['test']
  correct = trained.predict(test['inputs']) == test['label']
  assert result['test']['accuracy'] == pytest.approx(correct.mean())

  helpers.train(tmp_path / 'without', **{**fields, 'ema.decay': 0.0})
  plain, _ = helpers.saved_state(
    tmp_path / 'without', **{**fields, 'ema.decay': 0.0}
  )
  helpers.assert_trees_equal(plain.params, state.params)
  assert plain.ema == {}
  assert plain.evaluated['params'] is plain.params


@pytest.mark.slow
def test_a_skipped_step_leaves_the_average_alone():
  """It is that of the steps that were done: here of none."""
  this = helpers.Setup(**{
    **UNIFORM, 'ema.decay': 0.7, 'on_nonfinite': 'skip',
    'optimizer.learning_rates': (1e38,), 'optimizer.boundaries': (),
  })  # fmt: skip
  state, metrics = this.run(3)
  assert metrics['skipped'].tolist() == [1, 1, 1]
  chex.assert_trees_all_equal(state.ema, this.first.ema)
