"""The compiled train step, and what its steps cost."""

import dataclasses
import functools
import time

import jax

from margin_jax import data as data_lib
from margin_jax.train import devices as devices_lib
from margin_jax.train import step as step_lib
from margin_jax.train.spec import FRESH, StepSpec

# The kind of a program that switches between branches itself.
SWITCH = (None, 0)


@dataclasses.dataclass
class Counters:
  """What a run has cost so far; cumulative, kept in checkpoints.

  `data_wait` is the part of `seconds` that Python waited for data;
  `skipped` counts steps in which a number was not finite, `undecodable` images
  that could not be read.
  """

  examples_scored: int = 0
  examples_trained: int = 0
  flops: float = 0.0
  seconds: float = 0.0
  data_wait: float = 0.0
  skipped: int = 0
  undecodable: int = 0

  def plus(self, other: 'Counters') -> 'Counters':
    """The sum, field by field."""
    mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
    return Counters(**{name: mine[name] + theirs[name] for name in mine})


class Program:
  """A train step for every step of a run, compiled before the first.

  A spec may have several branches: plain steps and scored ones, say. On
  accelerators one program switches between them on the device. On CPU each is
  a program of its own and the host picks, since XLA:CPU runs the gradient of
  a convolution inside a conditional eight times slower than outside. Parts of
  sentences of like length have a program each, too. Which branch and part a
  step takes is a function of the step alone, so neither has to wait for the
  other.

  Attributes:
    steps_per_call: how many steps one call runs.
    compile_seconds: spent on lowering and compiling.
  """

  def __init__(
    self,
    spec: StepSpec,
    devices: devices_lib.Devices,
    steps_per_call: int,
    state: step_lib.TrainState,
    feed: data_lib.Loader,
    steps: int,
  ):
    """Compiles the branches that `spec` has for arguments like these.

    With several processes each is compiled by its first call instead.
    """
    started = time.perf_counter()
    self.steps_per_call = steps_per_call
    self._method = spec
    self._feed = feed

    def per_device(spec: StepSpec, kind: tuple[int | None, int], times: int):
      step = functools.partial(step_lib.train_step, spec.at(kind[0]))
      return step_lib.repeat(step, times)

    kinds = sorted({self._kind(step) for step in range(steps)})
    examples = {
      kind: feed.example(kind[1], spec.examples_drawn(kind[0]))
      for kind in kinds
    }
    shapes = {str(jax.tree.map(jax.typeof, x)) for x in examples.values()}
    examples[SWITCH] = examples[kinds[0]]
    self._switching = (
      len(kinds) > 1
      and len(shapes) == 1
      and (steps_per_call > 1 or devices.platform != 'cpu')
    )
    compiled = [SWITCH] if self._switching else kinds
    self._programs = {
      kind: devices.compile(
        per_device(spec, kind, steps_per_call),
        state,
        examples[kind],
        donate_first=True,
      )
      for kind in compiled
    }
    # XLA's analysis counts the body of a loop once: a program of many steps
    # gives the cost of one, and one that scores some rows at a time too little.
    # Of a switch it cannot tell which branch runs.
    whole = spec.at_once()
    self._flops = {
      kind: devices.flops(per_device(whole, kind, 1), state, examples[kind])
      if self._switching or (whole is not spec and kind[0] == FRESH)
      else self._programs[kind].flops
      for kind in kinds
    }
    self._seconds = time.perf_counter() - started

  @property
  def compile_seconds(self) -> float:
    """Seconds spent on compiling so far."""
    late = (compiled.first_call_seconds for compiled in self.programs)
    return self._seconds + sum(late)

  @property
  def programs(self) -> list[devices_lib.Compiled]:
    """The compiled programs: one, or one for each branch and part."""
    return list(self._programs.values())

  def __call__(
    self, step: int, state: step_lib.TrainState, data: dict
  ) -> tuple[step_lib.TrainState, dict]:
    """Runs a call that starts at `step`, which `state` is at."""
    kind = SWITCH if self._switching else self._kind(step)
    return self._programs[kind](state, data)

  def _kind(self, step: int) -> tuple[int, int]:
    return self._method.branch_of(step), self._feed.bucket(step)

  def cost(self, first: int, last: int) -> Counters:
    """The cost of steps first, ..., last - 1, without the seconds."""
    total = Counters()
    for step in range(first, last):
      kind = self._kind(step)
      total = total.plus(
        Counters(
          examples_scored=self._method.examples_scored(kind[0]),
          examples_trained=self._method.examples_trained(kind[0]),
          flops=self._flops[kind],
        )
      )
    return total
