"""The schedule of a config, scaled to another number of steps."""

import copy
from collections.abc import Callable, Collection

import ml_collections

from margin_jax import config as config_lib

# What is scaled: all that counts steps from the start of a run.
FIELDS = (
  'optimizer.boundaries',
  'optimizer.warmup',
  'selection.start',
  'selection.stop',
)


def scaled(
  config: ml_collections.ConfigDict,
  steps: int,
  before: int | None = None,
  keep: Collection[str] = (),
) -> ml_collections.ConfigDict:
  """Returns the config with another number of steps and a scaled schedule.

  Multiplies each of `FIELDS` by steps / before, and rounds. If boundaries then
  coincide, the last one counts. Boundaries at the first step or at the end are
  removed, with the learning rates that are never used.

  Args:
    config: the config whose schedule to scale.
    steps: the new number of steps.
    before: the steps that the schedule is for; None is the steps of the config.
    keep: those of `FIELDS` to leave as they are.
  """
  before = before or config.steps
  ratio = steps / before
  config = copy.deepcopy(config)
  config.steps = steps

  def scale(step: int) -> int:
    return round(step * ratio)

  optimizer, selection = config.optimizer, config.selection
  if 'optimizer.boundaries' not in keep:
    _scale_boundaries(optimizer, scale, before, steps)
  if 'optimizer.warmup' not in keep:
    optimizer.warmup = min(scale(optimizer.warmup), steps - 1)
  if 'selection.start' not in keep:
    selection.start = min(scale(selection.start), steps - 1)
  if 'selection.stop' not in keep and selection.stop is not None:
    selection.stop = max(scale(selection.stop), selection.start + 1)
  return config


def shortened(
  config: ml_collections.ConfigDict, before: int, keep: Collection[str]
) -> ml_collections.ConfigDict:
  """Returns the config, scaled if it asks for that and has fewer steps.

  Args:
    config: whose steps may have been set; a wrong value, or a missing field, is
      left to be refused by its name.
    before: the steps that its schedule is for.
    keep: as `scaled` takes it.
  """
  fields, flat = config_lib.FIELDS, config_lib.flatten(config)
  if not all(
    name in flat and x.check.holds(flat[name]) for name, x in fields.items()
  ):
    return config
  if not config.scale_schedule or config.steps >= before:
    return config
  return scaled(config, config.steps, before, keep)


def _scale_boundaries(
  optimizer: ml_collections.ConfigDict,
  scale: Callable[[int], int],
  before: int,
  steps: int,
) -> None:
  rates, boundaries = optimizer.learning_rates, optimizer.boundaries
  if len(rates) != len(boundaries) + 1:
    return  # which is refused later
  rate_from = {0: rates[0]}  # by step
  for boundary, rate in zip(boundaries, rates[1:], strict=True):
    # One that was never reached still is not.
    if scale(boundary) < steps or boundary >= before:
      rate_from[scale(boundary)] = rate
  optimizer.boundaries = tuple(rate_from)[1:]
  optimizer.learning_rates = tuple(rate_from.values())
