"""What every entry may spend: the same steps, FLOPs or seconds."""

import contextlib
import copy
import dataclasses
import json
import math
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from margin_jax import config as config_lib
from margin_jax import files
from margin_jax.compare.methods import Entry
from margin_jax.config import ConfigError
from margin_jax.train import checkpoints, guard, loop
from margin_jax.train import setup as setup_lib
from margin_jax.train.process import Interrupted, Interrupts

BUDGETS = ('steps', 'flops', 'seconds')
# Enough for a mean that a slow step does not move much.
PILOT_STEPS = 100


def scaled(
  config: ml_collections.ConfigDict, steps: int, grain: int = 1
) -> ml_collections.ConfigDict:
  """The config with other steps, and its schedule as a whole in them.

  The boundaries of the learning rate, its warm-up, the start and stop of
  selection and the interval between evaluations are scaled along; MMR's alpha
  and a linear learning rate depend on `steps` anyhow. `keep_every` is dropped
  if it would keep nothing.

  Args:
    config: whose schedule it is.
    steps: the new number of steps.
    grain: the interval between evaluations stays a multiple of it.

  Raises:
    ConfigError: so few that two boundaries, or a boundary and an end, meet.
  """
  made = copy.deepcopy(config)
  share = steps / config.steps

  def times(step: int) -> int:
    return round(step * share)

  made.steps = steps
  made.eval_every = grain * max(1, round(config.eval_every * share / grain))
  made.optimizer.boundaries = tuple(map(times, config.optimizer.boundaries))
  inside = [0, *(x for x in made.optimizer.boundaries if x < steps), steps]
  ends = [x for x in config.optimizer.boundaries if x < config.steps]
  if sorted({*inside}) != inside or len(inside) != len(ends) + 2:
    raise ConfigError(
      f'steps={steps} is not allowed: it must be more, or the schedule of '
      f'{config.steps:,} with optimizer.boundaries='
      f'{tuple(config.optimizer.boundaries)} does not fit'
    )
  made.optimizer.warmup = min(times(config.optimizer.warmup), steps - 1)
  if made.keep_every is not None and made.keep_every > steps:
    made.keep_every = None  # of those there would be none
  made.selection.start = min(times(config.selection.start), steps - 1)
  if config.selection.stop is not None:
    stop = times(config.selection.stop)
    stop = max(made.selection.start + 1, stop)
    made.selection.stop = stop if stop < steps else None
  return made


def steps_within(total: float, per_step: float, grain: int) -> int:
  """The most steps, in multiples of `grain`, that cost at most `total`."""
  # Where the two are equal but for rounding, none is lost.
  return int(total / per_step * (1 + 1e-9)) // grain * grain


@dataclasses.dataclass(frozen=True)
class Facts:
  """What only the data and the devices tell of a config.

  Attributes:
    grain: steps in a call; numbers of steps should be multiples of it.
    epoch: batches in a pass over the training examples.
  """

  grain: int
  epoch: int


def check(config: ml_collections.ConfigDict) -> Facts:
  """Checks all that can be checked before anything is compiled.

  Raises:
    ConfigError: the config is bad, or does not fit the data or the devices.
    DatasetError: the dataset is missing or broken.
  """
  devices, dataset = setup_lib.load(config, None)
  setup_lib.make_spec(config, dataset, devices.total)
  grain = setup_lib.steps_per_call(
    config, devices.platform, chained=setup_lib.chained(dataset)
  )
  return Facts(grain, dataset.counts['train'] // config.batch_size)


def flops(config: ml_collections.ConfigDict) -> float:
  """What a run will have counted in the end, without running it."""
  devices, dataset = setup_lib.load(config, None)
  method = setup_lib.make_spec(config, dataset, devices.total)
  with (
    tempfile.TemporaryDirectory() as folder,
    contextlib.closing(checkpoints.Checkpoints(folder, writing=True)) as none,
  ):
    run = loop.Trainer(config, dataset, devices, none, method, None, print)
    with contextlib.closing(run.feed):
      return run.program.cost(0, config.steps).flops


def _unit(config: ml_collections.ConfigDict, facts: Facts) -> int:
  """Steps in whole calls, and in whole periods from one pool to the next."""
  period = config.selection.every * config.selection.reuse
  return math.lcm(facts.grain, period)


def pilot(
  config: ml_collections.ConfigDict, facts: Facts
) -> ml_collections.ConfigDict:
  """A short run whose steps are as those of `config`, in the same shares."""
  made = copy.deepcopy(config)
  made.optimizer.learning_rates = config.optimizer.learning_rates[:1]
  made.optimizer.boundaries = ()
  made.optimizer.warmup = 0
  made.attack = config_lib.default().attack
  made.keep_every = None
  # It costs the same, and begins without the warm-up that `config` may need.
  made.on_nonfinite = guard.SKIP
  unit = _unit(config, facts)
  least = PILOT_STEPS
  if config.trimming.first != config.trimming.last:
    least = max(least, 2 * facts.epoch)  # what is kept changes by the epoch
  made = scaled(made, min(unit * math.ceil(least / unit), config.steps))
  made.log_every = made.eval_every = made.checkpoint_every = made.steps
  made.steps_per_call = facts.grain
  return made


def seconds(
  config: ml_collections.ConfigDict, facts: Facts, folder: pathlib.Path
) -> float:
  """What a run will take, from a short one in `folder`, which is removed."""
  shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
  short = pilot(config, facts)
  try:
    result = loop.train(short, str(folder), log=lambda line: None)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  return result['seconds'] / short.steps * config.steps


class Costs:
  """What entries cost, kept in WORKDIR/costs.json.

  A comparison that is started again must come to the same numbers of steps.

  Attributes:
    budget: one of `BUDGETS`.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    budget: str,
    interrupts: Interrupts,
    log: Callable[[str], None],
  ):
    """Reads what was measured before."""
    self._path = workdir / 'costs.json'
    self._pilots = workdir / 'pilots'
    self.budget = budget
    self._interrupts = interrupts
    self._log = log
    self._warm = False
    self._known: dict[str, Any] = {}
    if self._path.exists():
      self._known = _read(self._path)

  def __call__(self, entry: Entry, facts: Facts) -> float:
    """FLOPs or seconds of the entry's own schedule."""
    key = f'{self.budget} of {entry.name}'
    config = config_lib.as_json(entry.config)
    known = self._known.get(key)
    if known is None or not _same(known['config'], config):
      self._interrupts.check()
      self._log(f'measuring {key}')
      cost = self._measure(entry, facts)
      known = self._known[key] = {'cost': cost, 'config': config}
      files.write_json(self._path, self._known)
    return known['cost']

  def _measure(self, entry: Entry, facts: Facts) -> float:
    if self.budget == 'flops':
      return flops(entry.config)
    folder = self._pilots / entry.folder
    try:
      if not self._warm:  # the first of a process is slow
        seconds(entry.config, facts, folder)
        self._warm = True
      return seconds(entry.config, facts, folder)
    except Interrupted as stopped:
      raise Interrupted(
        f'stopped while {entry.name} was measured, which the same command does '
        'again',
        stopped.status - 128,
      ) from stopped


def _read(path: pathlib.Path) -> dict[str, Any]:
  """What costs.json holds."""
  try:
    known = json.loads(path.read_text(encoding='utf-8'))
    if all({'cost', 'config'} == {*cost} for cost in known.values()):
      return known
    problem = 'it is none of margin_jax'
  except (ValueError, TypeError, AttributeError) as error:
    problem = str(error)
  raise ConfigError(
    f'{path} cannot be read ({problem}): remove it, and use another workdir if '
    'steps come out otherwise'
  )


def _same(saved: dict[str, Any], config: dict[str, Any]) -> bool:
  """Whether a run of one costs what a run of the other does."""
  changed = config_lib.differences(saved, config)
  return not changed and saved['steps'] == config['steps']


def share(
  entries: Sequence[Entry],
  baseline: str,
  costs: Costs,
  log: Callable[[str], None],
) -> list[Entry]:
  """The entries with the steps that the budget gives them.

  The budget is what the baseline's own schedule costs; where a sweep gives it
  several, the most that one costs. With 'steps', everyone has its own schedule.

  Raises:
    ConfigError: an entry cannot do a step in it, or its schedule does not fit.
  """
  facts = [_named(entry, check) for entry in entries]
  if costs.budget == 'steps':
    return [*entries]
  base = entries[[entry.method for entry in entries].index(baseline)].config
  for entry in entries:
    if entry.config.steps != base.steps:
      raise ConfigError(
        f'{entry.name}: steps={entry.config.steps} is not allowed with budget='
        f'{costs.budget!r}, which decides that: it must be {base.steps}'
      )
  spent = {e.name: costs(e, f) for e, f in zip(entries, facts, strict=True)}
  total = max(spent[e.name] for e in entries if e.method == baseline)
  shared = []
  for entry, fact in zip(entries, facts, strict=True):
    if entry.method == baseline and spent[entry.name] == total:
      shared.append(entry)
      continue
    per_step = spent[entry.name] / entry.config.steps
    unit = _unit(entry.config, fact)
    steps = steps_within(total, per_step, unit)
    if not steps:
      raise ConfigError(
        f'{entry.name}: budget={costs.budget!r} is not allowed: {unit} step(s) '
        f'need {unit * per_step:.3g} of the {total:.3g} that {baseline!r} '
        'spends'
      )
    config = _named(entry, scaled, steps, fact.grain)
    shared.append(dataclasses.replace(entry, config=config))
    _named(shared[-1], check)
    log(f'{entry.name}: {steps:,} steps have the {costs.budget} of {baseline}')
  return shared


def _named(entry: Entry, function: Callable, *args: Any) -> Any:
  """Calls with the entry's config; an error says whose it is."""
  try:
    return function(entry.config, *args)
  except ConfigError as error:
    raise ConfigError(f'{entry.name}: {error}') from error
