"""What the compiled step reads: arrays on the device, or pools sent to it."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from margin_jax import data
from margin_jax.train import devices as devices_lib
from margin_jax.train.spec import AGAIN, StepSpec

PyTree = Any


class Resident:
  """The whole training split on every device, an argument of every call.

  Attributes:
    seconds_waited: for data.
    undecodable: images that another took the place of.
  """

  seconds_waited = 0.0
  undecodable = 0

  def __init__(
    self, devices: devices_lib.Devices, dataset: data.Source, spec: StepSpec
  ):
    """Copies the split, part by part, to the devices."""
    self._parts = [devices.replicate(p) for p in dataset.parted('train')]
    self._method = spec

  def example(self, kind: tuple[int | None, int]) -> PyTree:
    """What a call of this branch and part is compiled for."""
    return self._parts[kind[1]]

  def __call__(self, step: int) -> PyTree:
    """The data of the call at `step`."""
    return self._parts[self._method.part_of(step)]

  def close(self) -> None:
    """Nothing to stop."""


class Streamed:
  """One draw a step, decoded by worker processes ahead of time.

  A call is dispatched before the last has ended, so that while the devices
  compute this process already waits for later draws and sends them.

  Attributes:
    seconds_waited: for the workers, while there may have been work to do.
    undecodable: images that another took the place of, in this process's share.
  """

  def __init__(
    self,
    devices: devices_lib.Devices,
    dataset: data.Streamed,
    spec: StepSpec,
    start: int,
    steps: int,
    seed: int,
  ):
    """Plans the draws; the workers start with the first call.

    Args:
      devices: that the draws are sent to.
      dataset: of the draws.
      spec: how many examples each step draws.
      start: the first step that will be asked for; they come in order.
      steps: of the whole run.
      seed: of the run.
    """
    self._devices = devices
    self._source = dataset
    self._method = spec
    self.seconds_waited = 0.0
    self.undecodable = 0
    sizes = [spec.examples_drawn(spec.branch_of(s)) for s in range(steps)]
    self._batches: Iterator = dataset.training(
      sizes, start, seed, devices.process_shard
    )

  def example(self, kind: tuple[int, int]) -> PyTree:
    """Zeros of the shape of what a step of this branch draws."""
    rows = (
      self._method.examples_drawn(kind[0]) // self._devices.process_shard.count
    )
    if not rows:
      return {}
    batch = {
      'inputs': np.zeros((rows, *self._source.input_shape), np.uint8),
      **{k: np.zeros(rows, np.int32) for k in ('label', 'index', 'epoch')},
    }
    return self._devices.shard(batch)

  def __call__(self, step: int) -> PyTree:
    """The draw of `step`, on the devices."""
    if self._method.branch_of(step) == AGAIN:
      return {}
    started = time.perf_counter()
    batch = next(self._batches)
    self.seconds_waited += time.perf_counter() - started
    self.undecodable += int(batch.pop('undecodable').sum())
    return self._devices.shard(batch)

  def close(self) -> None:
    """Stops the workers."""
    with contextlib.suppress(AttributeError):
      self._batches.close()


def draw(
  stream: PyTree,
  batch: dict[str, jax.Array],
  size: int,
  *,
  key: jax.Array,
  step: jax.Array,
  lane: jax.Array,
  lanes: int,
  augment: Any,
) -> tuple[PyTree, dict[str, jax.Array]]:
  """What `data.draw` is for arrays on the device, for a draw that was sent.

  Args and returns: those of `data.draw`; `batch` holds this device's share of
    the draw, and the stream is `{'epoch'}`.
  """
  _, pixel_key = jax.random.split(key)
  keys = data.images.pixel_keys(pixel_key, step, size, lane, lanes)
  pool = {
    'inputs': jax.vmap(augment)(keys, batch['inputs']),
    'label': batch['label'],
    'index': batch['index'],
  }
  return stream.replace(epoch=batch['epoch'][0]), pool
