"""Exact evaluation of whole splits on the device."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from margin_jax import data, parallel
from margin_jax import step as step_lib
from margin_jax.method import Method

PyTree = Any

# Relative to the squared norm of activations, of their total variation.
ROUNDING = 1e-12
Split = dict[str, np.ndarray]


def make_splits(
  devices: parallel.Devices,
  source: data.Source | data.Streamed,
  names: tuple[str, ...],
  batch_size: int,
  examples: int | None = None,
) -> 'Splits | StreamedSplits':
  """What goes through whole splits of a source.

  Args:
    devices: to evaluate on.
    source: of the splits.
    names: of the splits.
    batch_size: examples a call over all devices, at most.
    examples: only so many of each split, its first; None is all.
  """
  longest = max(source.counts[name] for name in names)
  largest = min(batch_size, longest, examples or longest)
  size = math.ceil(largest / devices.total) * devices.total
  if not source.resident:
    return StreamedSplits(devices, source, names, size, examples)
  splits = {
    name: {k: v[:examples] for k, v in source.splits[name].items()}
    for name in names
  }
  return Splits(devices, splits, size)


class StreamedSplits:
  """Whole splits that are read chunk by chunk, with the interface of `Splits`.

  Attributes:
    size: examples a chunk, over all devices.
    counts: examples of each split.
  """

  def __init__(
    self,
    devices: parallel.Devices,
    source: data.Streamed,
    names: tuple[str, ...],
    size: int,
    examples: int | None,
  ):
    """Reads nothing yet."""
    self.size = size
    self.counts = {
      name: min(examples or source.counts[name], source.counts[name])
      for name in names
    }
    self._source = source
    self._devices = devices

  def compile(
    self, step: Callable, variables: PyTree, *rest: PyTree
  ) -> parallel.Compiled:
    """As `Splits.compile`; the split is a chunk, and the devices share it."""
    rows = self.size // self._devices.share.count
    chunk = {
      'inputs': np.zeros((rows, *self._source.input_shape), np.uint8),
      'label': np.zeros(rows, np.int32),
      'real': np.zeros(rows, bool),
    }
    args = (variables, self._devices.shard(chunk), np.int32(0), *rest)
    return self._devices.compile(step, *args, sharded=(1,))

  def run(
    self,
    program: parallel.Compiled,
    name: str,
    variables: PyTree,
    *rest: PyTree,
    chunks: int | None = None,
  ) -> list[PyTree]:
    """What `program` returns for the chunks of a split, on the host.

    Args:
      program: that `compile` made.
      name: of the split.
      variables: its first argument.
      *rest: its last arguments.
      chunks: how many, the first; None is all.
    """
    results = []
    read = self._source.evaluation(name, self.size, self._devices.share)
    with contextlib.closing(read):
      for chunk in itertools.islice(
        read, chunks or math.ceil(self.counts[name] / self.size)
      ):
        fed = {k: chunk[k] for k in ('inputs', 'label', 'real')}
        fed['real'] &= chunk['index'] < self.counts[name]
        results.append(
          program(variables, self._devices.shard(fed), np.int32(0), *rest)
        )
        parallel.wait_for_old(results)
    return jax.device_get(results)


class Splits:
  """Whole splits on the devices, gone through in chunks of one size.

  Attributes:
    size: examples a chunk, over all devices.
    counts: examples of each split.
  """

  def __init__(
    self, devices: parallel.Devices, splits: dict[str, Split], size: int
  ):
    """Pads the splits to one length and places them on the devices."""
    longest = max(len(split['label']) for split in splits.values())
    self.size = size
    self.counts = {name: len(s['label']) for name, s in splits.items()}
    self._splits = {
      name: devices.replicate(self._pad(split, longest))
      for name, split in splits.items()
    }
    self._devices = devices

  @staticmethod
  def _pad(split: Split, length: int) -> PyTree:
    count = len(split['label'])
    padded = {
      name: np.pad(x, [(0, length - count)] + [(0, 0)] * (x.ndim - 1))
      for name, x in split.items()
    }
    return {**padded, 'count': np.int32(count)}

  def compile(
    self, step: Callable, variables: PyTree, *rest: PyTree
  ) -> parallel.Compiled:
    """Compiles `step(variables, split, chunk, *rest, lane)` for all splits."""
    split = next(iter(self._splits.values()))
    return self._devices.compile(step, variables, split, np.int32(0), *rest)

  def run(
    self,
    program: parallel.Compiled,
    name: str,
    variables: PyTree,
    *rest: PyTree,
    chunks: int | None = None,
  ) -> list[PyTree]:
    """What `program` returns for the chunks of a split, on the host.

    Args:
      program: that `compile` made.
      name: of the split.
      variables: its first argument.
      *rest: its last arguments.
      chunks: how many, the first; None is all.
    """
    results = []
    for chunk in range(chunks or math.ceil(self.counts[name] / self.size)):
      results.append(
        program(variables, self._splits[name], np.int32(chunk), *rest)
      )
      parallel.wait_for_old(results)
    return jax.device_get(results)


class Evaluator:
  """Loss and accuracy over whole splits, one compiled program for all.

  Under attack there is a second program.
  """

  def __init__(
    self,
    method: Method,
    splits: Splits | StreamedSplits,
    attack: Callable | None = None,
  ):
    """Compiles nothing yet.

    Args:
      method: holds the model.
      splits: to evaluate.
      attack: as `eval_step` takes it, for calls with an `epsilon`.
    """
    self._splits = splits
    self._method = method
    self._attack = attack
    self._programs: dict[Callable | None, parallel.Compiled] = {}

  def __call__(
    self, name: str, state: step_lib.TrainState, epsilon: float | None = None
  ) -> dict[str, Any]:
    """'loss', 'accuracy' and 'count' of the split called `name`.

    Args:
      name: of the split.
      state: the model's.
      epsilon: the radius of the attack to evaluate under; None is no attack.
    """
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    attack = None if epsilon is None else self._attack
    radius = np.float32(epsilon or 0)
    if attack not in self._programs:
      step = functools.partial(
        step_lib.eval_step, self._method, self._splits.size, attack
      )
      self._programs[attack] = self._splits.compile(step, variables, radius)
    sums = self._splits.run(self._programs[attack], name, variables, radius)
    total = {key: sum(float(x[key]) for x in sums) for key in sums[0]}
    return {
      'loss': total['loss'] / total['count'],
      'accuracy': total['correct'] / total['count'],
      'count': int(total['count']),
    }


class Measurer:
  """The margins of every example of whole splits, at the head and at layers."""

  def __init__(
    self,
    method: Method,
    splits: Splits | StreamedSplits,
    layers: dict[str, tuple[int, ...]],
  ):
    """Compiles nothing yet.

    Args:
      method: holds the model.
      splits: to measure.
      layers: some of what `layers.layer_shapes` returns.
    """
    self._sizes = {k: math.prod(shape[1:]) for k, shape in layers.items()}
    layers = tuple(layers)
    self._splits = splits
    self._step = functools.partial(
      step_lib.measure_step, method, splits.size, layers
    )
    self._layers = layers
    self._program: parallel.Compiled | None = None

  def __call__(self, name: str, variables: PyTree) -> dict[str, Any]:
    """Measures the split called `name`.

    Returns:
      'label', 'prediction', 'margin', 'mms' and 'radius' (the norm of the
      features), each (N,), and at each layer 'margin/LAYER' (signed) and
      'mms/LAYER' (label-free), (N,), and 'total_variation/LAYER', a float.
    """
    reference = {k: np.zeros(n, np.float32) for k, n in self._sizes.items()}
    if self._program is None:
      self._program = self._splits.compile(self._step, variables, reference)
    run = functools.partial(self._splits.run, self._program, name, variables)
    count = self._splits.counts[name]
    (first,) = run(reference, chunks=1)
    rows = min(count, self._splits.size)
    reference = {k: x / np.float32(rows) for k, x in first['sums'].items()}
    chunks = run(reference)
    found = {
      key: np.concatenate([chunk['examples'][key] for chunk in chunks])[:count]
      for key in chunks[0]['examples']
    }
    for layer in self._layers:
      total = sum(chunk['sums'][layer].astype(np.float64) for chunk in chunks)
      squares = np.mean(found.pop(f'square/{layer}'), dtype=np.float64)
      variation = squares - np.sum((total / count) ** 2)
      size = np.sum(reference[layer].astype(np.float64) ** 2)
      # What rounding leaves of activations that do not vary is no variation.
      found[f'total_variation/{layer}'] = float(
        variation if variation > ROUNDING * size else 0
      )
    return found
