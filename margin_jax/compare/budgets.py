"""Budgets: every trial may spend the same steps, FLOPs or seconds."""

import contextlib
import copy
import dataclasses
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from margin_jax import checks, data, files, schedules
from margin_jax import config as config_lib
from margin_jax.compare.methods import Trial, named_errors
from margin_jax.config import ConfigError
from margin_jax.train import guard, loop, schema
from margin_jax.train import runs as runs_lib
from margin_jax.train import setup as setup_lib
from margin_jax.train.devices import Devices
from margin_jax.train.process import Interrupted, Interrupts
from margin_jax.train.spec import StepSpec
from margin_jax.train.workdirs import Workdir

BUDGETS = ('steps', 'flops', 'seconds')
# Enough for a mean that a slow step does not move much.
PILOT_STEPS = 100
# What costs.json holds of each measurement.
COST = checks.mapping(
  cost=checks.number(above=0),
  config=checks.mapping(steps=checks.integer(1)),
)


@dataclasses.dataclass(frozen=True)
class Periods:
  """The periods of a run, in steps; only data and devices tell them.

  Attributes:
    call: steps that are compiled into one call.
    epoch: steps of a pass over the training examples.
  """

  call: int
  epoch: int


def allocate(
  trials: Sequence[Trial],
  budget: str,
  baseline: str,
  cost: Callable[[Trial, Periods], float],
  log: Callable[[str], None],
) -> list[Trial]:
  """Returns the trials with the steps that the budget pays.

  The budget is what the baseline's own schedule costs; where a sweep gives the
  baseline several, the dearest. Every other trial gets the most steps that
  cost no more, and its schedule is scaled to them. With 'steps' every trial
  keeps its own schedule.

  Args:
    trials: all of them.
    budget: one of `BUDGETS`.
    baseline: the name of a method.
    cost: returns what a trial's own schedule costs, as `Costs` does.
    log: takes the progress lines.

  Raises:
    ConfigError: a trial does not fit the data or the devices; the budget pays
      none of its steps, or too few for its schedule.
    DatasetError: the dataset is missing or broken.
  """
  periods = {}
  for trial in trials:
    with named_errors(trial.name):
      periods[trial.name] = check(trial.config)
  if budget == 'steps':
    return [*trials]
  own = next(t.config.steps for t in trials if t.method == baseline)
  for trial in trials:
    if trial.config.steps != own:
      raise ConfigError(
        f'{trial.name}: steps={trial.config.steps} is not allowed with budget='
        f'{budget!r}, which decides the steps: it must be {own}'
      )
  costs = {}
  for trial in trials:
    with named_errors(trial.name):
      costs[trial.name] = cost(trial, periods[trial.name])
  total = max(costs[t.name] for t in trials if t.method == baseline)
  allocated = []
  for trial in trials:
    if trial.method == baseline and costs[trial.name] == total:
      allocated.append(trial)
      continue
    per_step = costs[trial.name] / trial.config.steps
    multiple = _multiple(trial.config, periods[trial.name])
    steps = steps_within(total, per_step, multiple)
    if not steps:
      raise ConfigError(
        f'{trial.name}: budget={budget!r} is not allowed: {multiple} step(s) '
        f'need {multiple * per_step:.3g}, but {baseline!r} spends only '
        f'{total:.3g}'
      )
    with named_errors(trial.name):
      config = scaled(trial.config, steps, periods[trial.name].call)
      check(config)
    allocated.append(dataclasses.replace(trial, config=config))
    log(f'{trial.name}: {steps:,} steps have the {budget} of {baseline}')
  return allocated


def steps_within(total: float, per_step: float, multiple: int) -> int:
  """Returns the most steps, in whole multiples, that cost at most `total`."""
  # A total that is a whole number of steps but for rounding pays them all.
  return int(total / per_step * (1 + 1e-9)) // multiple * multiple


def _multiple(config: ml_collections.ConfigDict, periods: Periods) -> int:
  """Returns the steps of whole calls that are whole periods between pools."""
  selection = schema.effective(config).selection
  return math.lcm(periods.call, selection.every * selection.reuse)


def scaled(
  config: ml_collections.ConfigDict, steps: int, multiple: int = 1
) -> ml_collections.ConfigDict:
  """Returns the config with other steps, to which its schedule is scaled.

  The schedule is the boundaries of the learning rate and its warm-up, the start
  and stop of selection, and the interval between evaluations. MMR's alpha and a
  linear learning rate depend on `steps` already.

  Args:
    config: the config with the schedule.
    steps: the new number of steps.
    multiple: the interval between evaluations stays a multiple of it.

  Raises:
    ConfigError: so few steps that two boundaries, or a boundary and an end,
      coincide.
  """
  before, config = config, schedules.scaled(config, steps)
  ratio = steps / before.steps
  interval = max(1, round(before.eval_every * ratio / multiple))
  config.eval_every = multiple * interval
  boundaries = before.optimizer.boundaries
  reached = [x for x in boundaries if x < before.steps]
  inside = [0, *(round(x * ratio) for x in reached), steps]
  if sorted({*inside}) != inside:
    raise ConfigError(
      f'steps={steps} is not allowed: it must be larger, or the schedule of '
      f'{before.steps:,} steps with optimizer.boundaries={tuple(boundaries)} '
      'does not fit'
    )
  return config


class Costs:
  """Measures what trials cost, and remembers it in WORKDIR/costs.json.

  A comparison that is started again must come to the same numbers of steps.
  """

  def __init__(
    self,
    workdir: Workdir,
    budget: str,
    interrupts: Interrupts,
    log: Callable[[str], None],
  ):
    """Reads what was measured before.

    Args:
      workdir: the workdir of the comparison.
      budget: 'flops' or 'seconds', or 'steps', which needs no costs.
      interrupts: are checked before every measurement.
      log: takes the progress lines.
    """
    self._workdir = workdir
    self._path = workdir.folder / 'costs.json'
    self._pilots = workdir.folder / 'pilots'
    self._budget = budget
    self._interrupts = interrupts
    self._log = log
    self._warm = False
    self._measured = _read_costs(self._path)

  def __call__(self, trial: Trial, periods: Periods) -> float:
    """Returns the FLOPs or seconds of the trial's own schedule."""
    key = f'{self._budget} of {trial.name}'
    config = runs_lib.to_save(trial.config)
    measured = self._measured.get(key)
    if measured is None or not _cost_the_same(measured['config'], config):
      self._interrupts.check()
      self._log(f'measuring {key}')
      cost = self._measure(trial, periods)
      measured = self._measured[key] = {'cost': cost, 'config': config}
      files.write_json(self._path, self._measured)
      self._workdir.publish()
    return measured['cost']

  def _measure(self, trial: Trial, periods: Periods) -> float:
    if self._budget == 'flops':
      return flops(trial.config)
    folder = self._pilots / trial.folder
    try:
      if not self._warm:  # the first run of a process is slow
        seconds(trial.config, periods, folder)
        self._warm = True
      return seconds(trial.config, periods, folder)
    except Interrupted as stopped:
      raise Interrupted(
        f'stopped while {trial.name} was measured; the same command measures '
        'it again',
        stopped.status - 128,
      ) from stopped


def _read_costs(path: pathlib.Path) -> dict[str, Any]:
  """Returns what costs.json holds; {} where there is none.

  Raises:
    FileError: it cannot be read.
  """
  remedy = (
    'move it away, and use another workdir if the numbers of steps change'
  )
  try:
    return files.read_json(path, COST, remedy)
  except FileNotFoundError:
    return {}


def _cost_the_same(saved: dict[str, Any], config: dict[str, Any]) -> bool:
  """Returns whether a run of one config costs what a run of the other does."""
  changed = config_lib.differences(saved, config)
  return not changed and saved['steps'] == config['steps']


def seconds(
  config: ml_collections.ConfigDict, periods: Periods, folder: pathlib.Path
) -> float:
  """Returns the seconds that a run would take, from a pilot.

  Args:
    config: the config of the run.
    periods: the periods of the run.
    folder: the pilot's workdir, which is removed.
  """
  shutil.rmtree(folder, ignore_errors=True)  # of a pilot that was killed
  short = pilot(config, periods)
  try:
    result = loop.train(short, str(folder), log=lambda line: None)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  return result['seconds'] / short.steps * config.steps


def pilot(
  config: ml_collections.ConfigDict, periods: Periods
) -> ml_collections.ConfigDict:
  """Returns the config of a short run whose steps cost the same on average.

  The same fraction of them scores and, up to rounding, trains the proxy.

  Args:
    config: the config of the whole run.
    periods: the periods of the whole run.
  """
  least = PILOT_STEPS
  if config.trimming.first != config.trimming.last:
    # What trimming keeps changes by the epoch.
    least = max(least, 2 * periods.epoch)
  multiple = _multiple(config, periods)
  if schema.effective(config).selection.proxy is not None:
    whole = math.lcm(multiple, config.selection.proxy_every)
    multiple = whole if whole <= 10 * least else multiple
  steps = min(multiple * math.ceil(least / multiple), config.steps)
  short = copy.deepcopy(config)
  # A constant rate costs the same, and its schedule fits any number of steps.
  short.optimizer.learning_rates = config.optimizer.learning_rates[:1]
  short.optimizer.boundaries = ()
  short.optimizer.warmup = 0
  # Without the warm-up that `config` may need, it may diverge.
  short.on_nonfinite = guard.SKIP
  short.attack = config_lib.default().attack
  # Another schedule of alpha may need more steps, and costs the same.
  short.mmr.schedule = config_lib.default().mmr.schedule
  if short.selection.memory:
    # A tail would begin another epoch.
    short.selection.tail = 0.0
  short = scaled(short, steps)
  short.log_every = short.eval_every = short.checkpoint_every = steps
  short.keep_every = None
  short.steps_per_call = periods.call
  return short


# The trainer, asked without training.


def check(config: ml_collections.ConfigDict) -> Periods:
  """Checks all that can be checked before anything is compiled.

  Raises:
    ConfigError: the config is bad, or does not fit the data or the devices.
    DatasetError: the dataset is missing or broken.
  """
  config, devices, dataset, _ = _set_up(config)
  call = setup_lib.steps_per_call(config, devices.platform, dataset)
  return Periods(call, dataset.counts['train'] // config.batch_size)


def flops(config: ml_collections.ConfigDict) -> float:
  """Returns the FLOPs that a run would count in the end; trains nothing."""
  config, devices, dataset, spec = _set_up(config)
  state = setup_lib.init_state(config, dataset, spec, restoring=True)
  loader, program = loop.compile_steps(
    config, devices, dataset, spec, devices.replicate(state)
  )
  with contextlib.closing(loader):
    return program.cost(0, config.steps).flops


def _set_up(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, Devices, data.Dataset, StepSpec]:
  """Returns what the trainer makes of a config before it trains."""
  schema.validate(config)
  config = schema.effective(config)
  devices, dataset = setup_lib.load(config, None)
  spec = setup_lib.make_spec(config, dataset, devices.total)
  return config, devices, dataset, spec
