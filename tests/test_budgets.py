"""Budgets: scaled schedules, pilots, the steps that everyone gets."""

import numpy as np
import pytest

from margin_jax import optimizers
from margin_jax.compare import budgets
from margin_jax.config import ConfigError
from margin_jax.train import schema
from tests.helpers import small_config, trials_of

RATES, BOUNDARIES = 'optimizer.learning_rates', 'optimizer.boundaries'


SCHEDULE = {
  'steps': 1000, 'eval_every': 100, 'optimizer.warmup': 50,
  RATES: (1.0, 0.1, 0.01), BOUNDARIES: (500, 800),
  'selection.start': 100, 'selection.stop': 900,
}  # fmt: skip


@pytest.mark.parametrize('steps', [200, 1000, 3000])
def test_a_schedule_is_scaled_as_a_whole(steps):
  config = small_config(**SCHEDULE)
  found = budgets.scaled(config, steps)

  def rates(config):
    optimizer = config.optimizer
    rate = optimizers.learning_rate(
      optimizer.learning_rates, optimizer.boundaries, warmup=optimizer.warmup
    )
    places = np.linspace(0, config.steps, 20, endpoint=False)
    return [float(rate(round(place))) for place in places]

  assert found.steps == steps
  np.testing.assert_allclose(rates(found), rates(config), rtol=1e-6)
  selection = found.selection
  assert (selection.start, selection.stop) == (steps // 10, steps * 9 // 10)
  assert found.eval_every == steps // 10
  assert budgets.scaled(config, steps, multiple=40).eval_every % 40 == 0


def test_a_late_start_and_a_long_warm_up_stay_within_the_run():
  config = small_config(
    steps=1000, **{'selection.start': 999, 'optimizer.warmup': 998}
  )
  found = budgets.scaled(config, 100)
  assert (found.selection.start, found.optimizer.warmup) == (99, 99)


def test_a_selection_that_stops_with_the_run_does_not_stop():
  config = small_config(steps=1000, **{'selection.stop': 999})
  scaled = budgets.scaled(config, 100)
  schema.validate(scaled)
  assert scaled.selection.stop >= scaled.steps
  assert budgets.scaled(config, 1000) == config
  assert config.steps == 1000


@pytest.mark.parametrize('steps', [0, 1, 2, 5])
def test_a_schedule_that_does_not_fit_is_refused(steps):
  config = small_config(
    **{'steps': 1000, RATES: (1.0, 0.1, 0.01), BOUNDARIES: (900, 950)}
  )
  with pytest.raises(ConfigError, match=rf'^steps={steps} is not allowed'):
    budgets.scaled(config, steps)


@pytest.mark.parametrize(
  ('total', 'per_step', 'multiple', 'steps'),
  [(10, 1, 1, 10), (10.9, 1, 1, 10), (0.3, 0.1, 1, 3), (99, 1, 10, 90),
   (9, 1, 10, 0)],
)  # fmt: skip
def test_steps_within_a_budget(total, per_step, multiple, steps):
  assert budgets.steps_within(total, per_step, multiple) == steps


def price(trial, periods):
  """In place of `budgets.Costs`."""
  return {'uniform': 20.0, 'mms': 80.0}.get(trial.method, 30.0)


@pytest.mark.parametrize(
  ('method', 'steps'),
  [('uniform', 20), ('mms', 5), ('loss', 13), ('mms+reuse=4', 12)],
)
def test_a_budget_is_allocated_in_whole_pools(monkeypatch, method, steps):
  monkeypatch.setattr(budgets, 'check', lambda config: budgets.Periods(1, 10))
  trials = trials_of(small_config(), ['uniform', method][method == 'uniform' :])
  allocated = budgets.allocate(trials, 'flops', 'uniform', price, print)
  assert [x.config.steps for x in allocated][-1] == steps
  assert allocated[0].config.steps == 20


def test_a_budget_for_no_step_is_refused(monkeypatch):
  monkeypatch.setattr(budgets, 'check', lambda config: budgets.Periods(10, 10))
  trials = trials_of(small_config(), ['uniform', 'mms'])
  with pytest.raises(ConfigError, match=r"^mms: budget='flops' .* 10 step"):
    budgets.allocate(trials, 'flops', 'uniform', price, print)


@pytest.mark.parametrize(
  'fields',
  [
    {'selection.reuse': 3},
    {'selection.every': 7},
    {'selection.start': 500, 'selection.stop': 750},
  ],
)
def test_a_pilot_scores_the_same_fraction_of_steps(fields):
  config = small_config(
    **{'steps': 1000, RATES: (1.0, 0.1), BOUNDARIES: (999,), **fields}
  )
  found = budgets.pilot(config, budgets.Periods(call=4, epoch=10))
  assert found.steps % 4 == 0
  assert 100 <= found.steps < 200

  def scored(config):
    since = np.arange(config.steps) - config.selection.start
    stop = config.selection.stop or config.steps
    period = config.selection.every * config.selection.reuse
    active = (since >= 0) & (since < stop - config.selection.start)
    return np.mean(active & (since % period == 0))

  assert scored(found) == pytest.approx(scored(config), rel=2e-3)
  assert found.steps_per_call == 4


def test_a_pilot_trains_the_proxy_as_often():
  """Every 30th step: 100 steps would train it in 4% instead of 3.3%."""
  fields = {'selection.proxy': 'cnn', 'selection.proxy_every': 30}
  config = small_config(**{'steps': 9000, **fields})
  found = budgets.pilot(config, budgets.Periods(call=4, epoch=10))
  assert found.steps == 120
  # Whole periods would take as long as the run.
  config.selection.proxy_every = 4001
  found = budgets.pilot(config, budgets.Periods(call=4, epoch=10))
  assert found.steps == 100


def test_a_pilot_of_trimming_has_two_epochs():
  config = small_config(
    **{'steps': 1000, 'selection.rule': 'uniform', 'trimming.last': 0.2}
  )
  periods = budgets.Periods(call=1, epoch=179)
  assert budgets.pilot(config, periods).steps == 2 * 179


def test_a_pilot_that_would_diverge_ends_nothing():
  """It begins without the warm-up, and only its seconds matter."""
  config = small_config(steps=400, **{'optimizer.warmup': 300})
  made = budgets.pilot(config, budgets.Periods(call=1, epoch=100))
  assert made.optimizer.warmup == 0
  assert made.on_nonfinite == 'skip'


def test_a_pilot_may_be_shorter_than_what_a_schedule_needs():
  """MMR's released schedule needs an epoch without MMR, and a step costs it."""
  fields = {
    'mmr.schedule': 'released',
    'mmr.alpha': 1e-4,
    'mmr.alpha_end': 0.01,
  }
  config = small_config(steps=4000, batch_size=8, **fields)
  periods = budgets.check(config)
  made = budgets.pilot(config, periods)
  assert made.steps < periods.epoch
  budgets.check(made)


def test_a_pilot_of_remembered_scores_has_no_tail():
  config = small_config(
    steps=1000, **{'selection.memory': True, 'selection.tail': 0.125}
  )
  made = budgets.pilot(config, budgets.Periods(call=1, epoch=1000))
  assert made.selection.tail == 0


def test_what_cannot_be_priced_is_named(monkeypatch):
  monkeypatch.setattr(budgets, 'check', lambda config: budgets.Periods(10, 10))

  def cost(trial, periods):
    raise ConfigError('steps=1 is not allowed')

  trials = trials_of(small_config(), ['uniform', 'mms'])
  with pytest.raises(ConfigError, match=r'^uniform: steps=1 is'):
    budgets.allocate(trials, 'seconds', 'uniform', cost, print)


def test_a_checkpoint_that_is_never_reached_is_not_kept():
  config = small_config(steps=400, keep_every=200)
  scaled = budgets.scaled(config, 100)
  schema.validate(scaled)
  assert schema.effective(scaled).keep_every is None
  assert budgets.scaled(config, 300).keep_every == 200
