"""The compiled train step, and what its steps cost."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from margin_jax.data import Loader
from margin_jax.train import devices as devices_lib
from margin_jax.train import step as step_lib
from margin_jax.train.spec import StepKind, StepSpec, Variant

PyTree = Any


@dataclasses.dataclass
class Counters:
  """What a run has cost so far; cumulative, kept in checkpoints.

  `data_wait` is the part of `seconds` that Python waited for data; `skipped`
  counts steps in which a number was not finite, `undecodable` images that could
  not be read.
  """

  examples_scored: int = 0
  examples_trained: int = 0
  flops: float = 0.0
  seconds: float = 0.0
  data_wait: float = 0.0
  skipped: int = 0
  undecodable: int = 0

  def plus(self, other: 'Counters') -> 'Counters':
    """Returns the sum, field by field."""
    ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
    return Counters(**{name: ours[name] + theirs[name] for name in ours})


class Program:
  """A train step for every step of a run, compiled before the first.

  Steps may be of several variants: plain and scored ones, say. On accelerators
  one program switches between them on the device. On CPU each is a program of
  its own and the host picks, since XLA:CPU runs the gradient of a convolution
  inside a conditional eight times slower than outside; but where a call has
  several steps, one program switches there, too. Variants that read data of
  other shapes always have a program each. Which variant a step is depends on
  the step alone, so neither host nor device waits for the other.

  Attributes:
    steps_per_call: how many steps one call runs.
  """

  def __init__(
    self,
    spec: StepSpec,
    devices: devices_lib.Devices,
    loader: Loader,
    state: step_lib.TrainState,
    steps: int,
    steps_per_call: int,
  ):
    """Compiles the variants of all steps, for arguments like these.

    With several processes each is compiled by its first call instead.

    Args:
      spec: what a step does.
      devices: to compile for.
      loader: the loader of the run's data.
      state: like the one that calls will be given.
      steps: the steps of the whole run.
      steps_per_call: how many of them one call runs.
    """
    started = time.perf_counter()
    self.steps_per_call = steps_per_call
    self._spec = spec
    self._loader = loader
    self._begin_epoch: devices_lib.Compiled | None = None
    if loader.ordered:
      begin = functools.partial(step_lib.begin_epoch, spec)
      self._begin_epoch = devices.compile(begin, state, donate_first=True)
    examples = self._examples(steps)
    one_shape = len({_shapes(data) for data in examples.values()}) == 1
    switches = steps_per_call > 1 or devices.platform != 'cpu'
    self._switches = len(examples) > 1 and one_shape and switches

    def step(spec: StepSpec, variant: Variant | None, times: int):
      one = functools.partial(step_lib.train_step, spec.specialize(variant))
      return step_lib.repeat(one, times)

    first = next(iter(examples))
    compiled = {None: examples[first]} if self._switches else examples
    self._programs: dict[Variant | None, devices_lib.Compiled] = {}
    for variant, data in compiled.items():
      self._programs[variant] = devices.compile(
        step(spec, variant, steps_per_call), state, data, donate_first=True
      )
    # XLA counts the body of a loop once: a program of many steps has the FLOPs
    # of one, and one that scores in chunks, or differentiates in parts, too
    # few. Of a switch it cannot tell which branch runs.
    whole = spec.without_loops()
    self._flops = {
      variant: devices.flops(step(whole, variant, 1), state, data)
      if self._switches or spec.has_loops(variant.kind)
      else self._programs[variant].flops
      for variant, data in examples.items()
    }
    self._seconds = time.perf_counter() - started

  def _examples(self, steps: int) -> dict[Variant, PyTree]:
    """Returns data like those of each variant that the run has."""
    every = np.arange(steps)
    columns = (
      self._spec.kind_of(every),
      self._spec.backward_size(every),
      [self._loader.bucket(step) for step in range(steps)],
      self._spec.trains_proxy(every),
      self._spec.examples_sampled(every),
    )
    rows = np.unique(np.stack(columns, axis=1), axis=0)
    return {
      Variant(
        StepKind(kind), int(backward), int(bucket), int(proxy)
      ): self._loader.example(int(bucket), int(sampled))
      for kind, backward, bucket, proxy, sampled in rows
    }

  @property
  def compile_seconds(self) -> float:
    """Seconds spent on compiling so far."""
    programs = [*self.programs, self._begin_epoch]
    late = (x.first_call_seconds for x in programs if x is not None)
    return self._seconds + sum(late)

  @property
  def programs(self) -> list[devices_lib.Compiled]:
    """The compiled programs: one, or one for each variant."""
    return list(self._programs.values())

  def variant(self, step: int) -> Variant:
    """Returns which variant a step is."""
    return Variant(
      StepKind(self._spec.kind_of(step)),
      self._spec.backward_size(step),
      self._loader.bucket(step),
      int(self._spec.trains_proxy(step)),
    )

  def __call__(
    self, step: int, state: step_lib.TrainState
  ) -> tuple[step_lib.TrainState, dict[str, jax.Array]]:
    """Runs the call that starts at `step`, which `state` is at.

    Returns:
      The state and the metrics, without waiting for them.
    """
    if self._loader.ordered:
      state = self._in_epoch(step, state)
    variant = None if self._switches else self.variant(step)
    return self._programs[variant](state, self._loader(step))

  def _in_epoch(
    self, step: int, state: step_lib.TrainState
  ) -> step_lib.TrainState:
    """Begins an epoch where the last one is over; the loader then reads it."""
    if self._loader.begins_epoch(step, step == self._spec.memory.tail_start):
      state = self._begin_epoch(state)
      self._loader.read_epoch(step, jax.device_get(state.sampler))
    return state

  def cost(self, first: int, last: int) -> Counters:
    """Returns the cost of steps first, ..., last - 1, without the seconds."""
    total = Counters()
    for step in range(first, last):
      variant = self.variant(step)
      total = total.plus(
        Counters(
          examples_scored=self._spec.examples_scored(variant),
          examples_trained=variant.backward_size,
          flops=self._flops[variant],
        )
      )
    return total


def _shapes(data: PyTree) -> str:
  """Describes the arrays of a call's data, for comparison."""
  return str(jax.tree.map(lambda x: (x.shape, x.dtype), data))
