"""Exact evaluation of whole splits on the device."""

import abc
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from margin_jax import data
from margin_jax.train import devices as devices_lib
from margin_jax.train import step as step_lib
from margin_jax.train.spec import StepSpec

PyTree = Any

# Relative to the squared norm of activations, of their total variation.
ROUNDING = 1e-12
Split = dict[str, np.ndarray]


def make_splits(
  devices: devices_lib.Devices,
  dataset: data.Source | data.Streamed,
  names: tuple[str, ...],
  batch_size: int,
  examples: int | None = None,
  parted: bool = True,
) -> 'Splits':
  """What goes through whole splits of a dataset.

  Args:
    devices: to evaluate on.
    dataset: of the splits.
    names: of the splits.
    batch_size: examples a call over all devices, at most.
    examples: only so many of each split, its first; None is all.
    parted: whether sentences go through in parts of like length.
  """
  if not dataset.resident:
    return StreamedSplits(devices, dataset, names, batch_size, examples)
  splits = {}
  for name in names:
    if parted and examples is None:
      splits[name] = dataset.parted(name)
      continue
    whole = {k: v[:examples] for k, v in dataset.splits[name].items()}
    rows = np.arange(len(whole['label']), dtype=np.int32)
    splits[name] = [{**whole, 'row': rows}]
  return ResidentSplits(devices, splits, batch_size)


def _chunk_size(
  devices: devices_lib.Devices, batch_size: int, longest: int
) -> int:
  """Examples a call: no more than there are, and the same on all devices."""
  size = max(min(batch_size, longest), 1)
  return math.ceil(size / devices.total) * devices.total


class Splits(abc.ABC):
  """Whole splits, gone through in chunks; one program for each width.

  Attributes:
    sizes: for each program, the examples of a chunk, over all devices.
    counts: examples of each split.
  """

  sizes: list[int]
  counts: dict[str, int]
  _devices: devices_lib.Devices

  @abc.abstractmethod
  def compile(
    self, make_step: Callable, variables: PyTree, *rest: PyTree
  ) -> list[devices_lib.Compiled]:
    """Compiles `make_step(size)(variables, split, chunk, *rest)`."""

  @abc.abstractmethod
  def chunks(self, name: str) -> Iterator[tuple[int, PyTree, int, np.ndarray]]:
    """The chunks of a split: what to call, and with what.

    Yields:
      The program's place, its arguments `split` and `chunk`, and which
      examples of the split its rows are, without the padding at their end.
    """

  def run(
    self,
    programs: list[devices_lib.Compiled],
    name: str,
    variables: PyTree,
    *rest: PyTree,
    most: int | None = None,
  ) -> list[tuple[np.ndarray, PyTree]]:
    """What the programs return for the chunks of a split, on the host.

    Args:
      programs: that `compile` made.
      name: of the split.
      variables: their first argument.
      *rest: their last arguments.
      most: only so many chunks, the first; None is all.

    Returns:
      For each chunk, which examples of the split it has, and the result, whose
      first rows are these.
    """
    rows, results = [], []
    with contextlib.closing(self.chunks(name)) as chunks:
      for place, split, chunk, where in itertools.islice(chunks, most):
        rows.append(where)
        results.append(
          programs[place](variables, split, np.int32(chunk), *rest)
        )
        devices_lib.wait_for_old(results)
    return list(zip(rows, jax.device_get(results), strict=True))


class StreamedSplits(Splits):
  """Splits that are read while they are gone through."""

  def __init__(
    self,
    devices: devices_lib.Devices,
    dataset: data.Streamed,
    names: tuple[str, ...],
    batch_size: int,
    examples: int | None,
  ):
    """Reads nothing yet."""
    self.counts = {
      name: min(examples or dataset.counts[name], dataset.counts[name])
      for name in names
    }
    longest = max(self.counts.values())
    self.sizes = [_chunk_size(devices, batch_size, longest)]
    self._source = dataset
    self._devices = devices

  def compile(
    self, make_step: Callable, variables: PyTree, *rest: PyTree
  ) -> list[devices_lib.Compiled]:
    """As `Splits.compile`; the split is a chunk, and the devices share it."""
    (size,) = self.sizes
    rows = size // self._devices.process_shard.count
    chunk = {
      'inputs': np.zeros((rows, *self._source.input_shape), np.uint8),
      'label': np.zeros(rows, np.int32),
      'real': np.zeros(rows, bool),
    }
    args = (variables, self._devices.shard(chunk), np.int32(0), *rest)
    return [self._devices.compile(make_step(size), *args)]

  def chunks(self, name: str) -> Iterator[tuple[int, PyTree, int, np.ndarray]]:
    """As `Splits.chunks`."""
    (size,), count = self.sizes, self.counts[name]
    read = self._source.evaluation(name, size, self._devices.process_shard)
    with contextlib.closing(read):
      for start in range(0, count, size):
        chunk = next(read)
        fed = {k: chunk[k] for k in ('inputs', 'label', 'real')}
        fed['real'] &= chunk['index'] < count
        where = np.arange(start, min(start + size, count))
        yield 0, self._devices.shard(fed), 0, where


class ResidentSplits(Splits):
  """Splits that lie on the devices."""

  def __init__(
    self,
    devices: devices_lib.Devices,
    splits: dict[str, list[Split]],
    batch_size: int,
  ):
    """Places the splits on the devices, parts of one width in one length.

    Args:
      devices: to evaluate on.
      splits: the parts of each: 'inputs', 'label' and 'row'.
      batch_size: examples a call over all devices, at most.
    """
    self._devices = devices
    self.counts = {
      name: sum(len(part['label']) for part in parts)
      for name, parts in splits.items()
    }
    longest: dict[tuple, int] = {}
    for part in itertools.chain(*splits.values()):
      shape = part['inputs'].shape[1:]
      longest[shape] = max(longest.get(shape, 0), len(part['label']))
    shapes = list(longest)
    self.sizes = [_chunk_size(devices, batch_size, n) for n in longest.values()]
    self._parts = {
      name: [
        (
          shapes.index(part['inputs'].shape[1:]),
          devices.replicate(_pad(part, longest[part['inputs'].shape[1:]])),
          part['row'],
        )
        for part in parts
      ]
      for name, parts in splits.items()
    }

  def compile(
    self, make_step: Callable, variables: PyTree, *rest: PyTree
  ) -> list[devices_lib.Compiled]:
    """As `Splits.compile`."""
    examples = {
      place: part for parts in self._parts.values() for place, part, _ in parts
    }
    return [
      self._devices.compile(
        make_step(size), variables, examples[place], np.int32(0), *rest
      )
      for place, size in enumerate(self.sizes)
    ]

  def chunks(self, name: str) -> Iterator[tuple[int, PyTree, int, np.ndarray]]:
    """As `Splits.chunks`."""
    for place, part, rows in self._parts[name]:
      size = self.sizes[place]
      for chunk in range(math.ceil(len(rows) / size)):
        yield place, part, chunk, rows[chunk * size : (chunk + 1) * size]


def _pad(split: Split, length: int) -> PyTree:
  """The split's arrays with rows of zeros at their end, and 'count'."""
  count = len(split['label'])
  padded = {
    name: np.pad(split[name], [(0, length - count)] + [(0, 0)] * (ndim - 1))
    for name, ndim in (('inputs', split['inputs'].ndim), ('label', 1))
  }
  return {**padded, 'count': np.int32(count)}


class Evaluator:
  """Loss and accuracy over whole splits, the same programs for all.

  Under attack there are others.
  """

  def __init__(
    self,
    spec: StepSpec,
    splits: Splits,
    attack: Callable | None = None,
  ):
    """Compiles nothing yet.

    Args:
      spec: holds the model.
      splits: to evaluate.
      attack: as `eval_step` takes it, for calls with an `epsilon`.
    """
    self._splits = splits
    self._method = spec
    self._attack = attack
    self._programs: dict[Callable | None, list[devices_lib.Compiled]] = {}

  def __call__(
    self, name: str, state: step_lib.TrainState, epsilon: float | None = None
  ) -> dict[str, Any]:
    """'loss', 'accuracy', 'count' and maybe 'f1' of the split called `name`.

    F1 is 2 TP / (2 TP + FP + FN) over the whole split, of class 1, and 0 where
    there is none; it is of the methods that ask for it.

    Args:
      name: of the split.
      state: the model's.
      epsilon: the radius of the attack to evaluate under; None is no attack.
    """
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    attack = None if epsilon is None else self._attack
    radius = np.float32(epsilon or 0)
    if attack not in self._programs:

      def make_step(size: int) -> Callable:
        return functools.partial(step_lib.eval_step, self._method, size, attack)

      self._programs[attack] = self._splits.compile(
        make_step, variables, radius
      )
    sums = self._splits.run(self._programs[attack], name, variables, radius)
    total = {key: sum(float(x[key]) for _, x in sums) for key in sums[0][1]}
    found = {
      'loss': total['loss'] / total['count'],
      'accuracy': total['correct'] / total['count'],
      'count': int(total['count']),
    }
    if 'hits' in total:
      found['f1'] = 2 * total['hits'] / max(total['positives'], 1)
    return found


class Measurer:
  """The margins of every example of whole splits, at the head and at layers."""

  def __init__(
    self,
    spec: StepSpec,
    splits: Splits,
    layers: dict[str, tuple[int, ...]],
  ):
    """Compiles nothing yet.

    Args:
      spec: holds the model.
      splits: to measure, each in one part.
      layers: some of what `layers.layer_shapes` returns.
    """
    self._sizes = {k: math.prod(shape[1:]) for k, shape in layers.items()}
    layers = tuple(layers)
    self._splits = splits
    self._make_step = lambda size: functools.partial(
      step_lib.measure_step, spec, size, layers
    )
    self._layers = layers
    self._programs: list[devices_lib.Compiled] | None = None

  def __call__(self, name: str, variables: PyTree) -> dict[str, Any]:
    """Measures the split called `name`.

    Returns:
      'row' (which examples of the split these are: not those that cannot be
      decoded), 'label', 'prediction', 'margin', 'mms' and 'radius' (the norm of
      the features), each (N,), and at each layer 'margin/LAYER' (signed) and
      'mms/LAYER' (label-free), (N,), and 'total_variation/LAYER', a float.
    """
    reference = {k: np.zeros(n, np.float32) for k, n in self._sizes.items()}
    if self._programs is None:
      self._programs = self._splits.compile(
        self._make_step, variables, reference
      )
    run = functools.partial(self._splits.run, self._programs, name, variables)
    ((rows, first),) = run(reference, most=1)
    reference = {k: x / np.float32(len(rows)) for k, x in first['sums'].items()}
    chunks = run(reference)
    found = {
      key: np.concatenate([x['examples'][key][: len(w)] for w, x in chunks])
      for key in chunks[0][1]['examples']
    }
    found['row'] = np.concatenate([where for where, _ in chunks])
    real = found.pop('real')  # but for images that could not be decoded
    found = {key: values[real] for key, values in found.items()}
    count = len(found['row'])
    for layer in self._layers:
      total = sum(x['sums'][layer].astype(np.float64) for _, x in chunks)
      squares = np.mean(found.pop(f'square/{layer}'), dtype=np.float64)
      variation = squares - np.sum((total / count) ** 2)
      size = np.sum(reference[layer].astype(np.float64) ** 2)
      # What rounding leaves of activations that do not vary is no variation.
      found[f'total_variation/{layer}'] = float(
        variation if variation > ROUNDING * size else 0
      )
    return found
