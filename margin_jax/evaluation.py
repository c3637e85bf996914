"""Exact evaluation of whole splits on the device."""

import functools
import math
from typing import Any

import jax
import numpy as np

from margin_jax import parallel
from margin_jax import step as step_lib

PyTree = Any
Split = dict[str, np.ndarray]


class Evaluator:
  """Loss and accuracy over whole splits, one compiled program for all."""

  def __init__(
    self,
    method: step_lib.Method,
    devices: parallel.Devices,
    splits: dict[str, Split],
    batch_size: int,
  ):
    """Pads the splits to one length and places them on the devices."""
    longest = max(len(split['label']) for split in splits.values())
    lanes = devices.total
    self._size = math.ceil(min(batch_size, longest) / lanes) * lanes
    self._counts = {name: len(s['label']) for name, s in splits.items()}
    self._splits = {
      name: devices.replicate(self._pad(split, longest))
      for name, split in splits.items()
    }
    self._devices = devices
    self._step = functools.partial(step_lib.eval_step, method, self._size)
    self._program: parallel.Compiled | None = None

  @staticmethod
  def _pad(split: Split, length: int) -> PyTree:
    count = len(split['label'])
    padded = {
      name: np.pad(x, [(0, length - count)] + [(0, 0)] * (x.ndim - 1))
      for name, x in split.items()
    }
    return {**padded, 'count': np.int32(count)}

  def __call__(self, name: str, state: step_lib.TrainState) -> dict[str, Any]:
    """'loss', 'accuracy' and 'count' of the split called `name`."""
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    split = self._splits[name]
    if self._program is None:
      self._program = self._devices.compile(
        self._step, variables, split, np.int32(0)
      )
    sums = []
    for chunk in range(math.ceil(self._counts[name] / self._size)):
      sums.append(self._program(variables, split, np.int32(chunk)))
      parallel.wait_for_old(sums)
    sums = jax.device_get(sums)
    total = {key: sum(float(x[key]) for x in sums) for key in sums[0]}
    return {
      'loss': total['loss'] / total['count'],
      'accuracy': total['correct'] / total['count'],
      'count': int(total['count']),
    }
