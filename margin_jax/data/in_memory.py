"""Datasets that the devices hold as a whole.

A split is `{'inputs': (N, ...), 'label': (N,) int32}`, images as uint8 pixels.
The arrays are arguments of the compiled step: sampling a pool, cropping,
flipping and normalizing happen there, and pixels stay uint8 until the model
reads them.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from margin_jax import sampling
from margin_jax.data import augment as augment_lib
from margin_jax.data.dataset import (
  Devices,
  Orders,
  Origins,
  PyTree,
  Split,
  chunk_size,
)


class SamplerState(flax.struct.PyTreeNode):
  """A position in endless epochs, each in an order of its own.

  Attributes:
    epoch: () int32, the epoch that `order` belongs to; -1 before the first.
    cursor: () int32, how much of `order` is sampled.
    order: (N,) int32, the examples of the epoch: kept because sorting N keys at
      every step costs more than a small model's step.
    count: () int32, how many of `order` the epoch has.
    weights: (N,) float32, those of `order`; () where all examples weigh 1.
    tail: () bool, whether `order` was made in the plain tail of the run.
  """

  epoch: Array
  cursor: Array
  order: Array
  count: Array
  weights: PyTree
  tail: Array

  @classmethod
  def create(cls, examples: int, weighted: bool = False) -> 'SamplerState':
    """Returns the state before the first step."""
    return cls(
      epoch=jnp.int32(-1),
      cursor=jnp.int32(examples),
      order=jnp.arange(examples, dtype=jnp.int32),
      count=jnp.int32(examples),
      weights=jnp.ones(examples, jnp.float32) if weighted else (),
      tail=jnp.zeros((), bool),
    )

  @property
  def epoch_fraction(self) -> Array:
    """The examples of the epoch, as a fraction of all."""
    return self.count / self.order.shape[0]


def advance(
  state: SamplerState,
  size: int,
  key: Array,
  orders: Orders | None = None,
  rows: Array | None = None,
) -> SamplerState:
  """Returns the state at which `size` examples can be read from its cursor.

  That is the same state or, where too few are left of the epoch, or the plain
  tail begins, one at the beginning of the next.

  Args:
    state: the state of the sampler.
    size: how many examples; static.
    key: the key of the order of all epochs.
    orders: makes the order of an epoch; None shuffles.
    rows: see `Orders.order`.
  """
  n = state.order.shape[0]
  spent = state.cursor + size > state.count
  if orders is not None:
    spent = spent | (orders.tail != state.tail)
  epoch = state.epoch + spent

  def next_order() -> sampling.Order:
    epoch_key = jax.random.fold_in(key, epoch)
    if orders is None:
      return sampling.shuffle(epoch_key, n)
    return orders.order(epoch_key, epoch, rows)

  order = jax.lax.cond(
    spent,
    next_order,
    lambda: sampling.Order(state.order, state.count, state.weights),
  )
  return SamplerState(
    epoch=epoch,
    cursor=jnp.where(spent, 0, state.cursor),
    order=order.rows,
    count=order.count,
    weights=order.weights,
    tail=state.tail if orders is None else orders.tail,
  )


def take_weights(
  state: SamplerState, examples: dict[str, Array], size: int, axis_name: str
) -> tuple[SamplerState, dict[str, Array]]:
  """Moves the cursor on, and weighs the examples that it was at.

  Args:
    state: its cursor is at the examples of all devices.
    examples: this device's shard of them.
    size: how many examples there are over all devices; static.
    axis_name: the name of the mapped axis.
  """
  after = state.replace(cursor=state.cursor + size)
  if isinstance(state.weights, tuple):
    return after, examples
  local = size // jax.lax.axis_size(axis_name)
  start = state.cursor + jax.lax.axis_index(axis_name) * local
  weights = jax.lax.dynamic_slice_in_dim(state.weights, start, local)
  if 'weights' in examples:
    weights = weights * examples['weights']
  return after, {**examples, 'weights': weights}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemory:
  """A `Dataset` whose splits lie on every device.

  Attributes:
    name: the name of the dataset.
    num_classes: C.
    splits: 'train', 'test' and, unless it is empty, 'validation'.
    rows: for each split, which rows of the dataset's own training or test
      split, in the order in which it is loaded, these are.
    augment: (key, image) -> image, for one training example.
    prepare: batch of inputs as stored -> what the model reads.
    class_names: C of them; None where they have none.
    origins: where in the user's own files the rows are; None if there are none.
  """

  name: str
  num_classes: int
  splits: dict[str, Split]
  rows: dict[str, np.ndarray]
  augment: augment_lib.Augmentation
  prepare: Callable[[Any], Any]
  class_names: tuple[str, ...] | None = None
  origins: Origins | None = None

  vocabulary = None
  f1 = False
  most_steps_per_call = sys.maxsize
  bucket_count = 1

  @property
  def counts(self) -> dict[str, int]:
    """The number of examples of each split."""
    return {name: len(x['label']) for name, x in self.splits.items()}

  @property
  def input_shape(self) -> tuple[int, ...]:
    """The shape of one example's inputs."""
    return self.splits['train']['inputs'].shape[1:]

  @property
  def input_dtype(self) -> np.dtype:
    """The dtype in which inputs are stored."""
    return self.splits['train']['inputs'].dtype

  @property
  def weighted(self) -> bool:
    """Whether examples have weights of their own."""
    return 'weights' in self.splits['train']

  def inputs(self, split: str, rows: np.ndarray) -> np.ndarray:
    """See `Dataset.inputs`."""
    return self.splits[split]['inputs'][rows]

  def state(self, sampler_weights: bool = False) -> PyTree:
    """See `Dataset.state`."""
    return SamplerState.create(self.counts['train'], sampler_weights)

  def sample(
    self,
    state: PyTree,
    data: dict[str, Array],
    size: int,
    *,
    key: Array,
    step: Array,
    axis_name: str,
    orders: Orders | None = None,
  ) -> tuple[PyTree, dict[str, Array]]:
    """See `Dataset.sample`; `data` has at least `size` rows."""
    order_key, augment_key = jax.random.split(key)
    state = advance(state, size, order_key, orders, data.get('row'))
    local = size // jax.lax.axis_size(axis_name)
    first = jax.lax.axis_index(axis_name) * local
    index = jax.lax.dynamic_slice_in_dim(
      state.order, state.cursor + first, local
    )
    keys = augment_lib.example_keys(
      augment_key, step, first + jnp.arange(local)
    )
    examples = {
      'inputs': jax.vmap(self.augment)(keys, data['inputs'][index]),
      'label': data['label'][index],
      'index': index,
    }
    if self.weighted:
      examples['weights'] = data['weights'][index]
    return take_weights(state, examples, size, axis_name)

  def fit(
    self, examples: dict[str, Array], data: dict[str, Array]
  ) -> dict[str, Array]:
    """Returns the examples: all inputs have one shape."""
    del data
    return examples

  def loader(
    self, devices: Devices, sizes: Sequence[int], start: int, seed: int
  ) -> 'Loader':
    """Returns a loader that has the whole training split for every step."""
    del sizes, start, seed
    return Loader(devices, self.splits['train'])

  def chunks(
    self,
    devices: Devices,
    names: Sequence[str],
    batch_size: int,
    examples: int | None = None,
    whole: bool = False,
  ) -> 'Splits':
    """See `Dataset.chunks`; every split is gone through in its order."""
    del whole
    arrays = {
      name: [first_examples(self.splits[name], examples)] for name in names
    }
    return Splits(devices, arrays, batch_size)


class Loader:
  """The training split on every device, an argument of every call."""

  seconds_waited = 0.0
  undecodable = 0
  ordered = False

  def __init__(self, devices: Devices, split: Split):
    """Copies the split to the devices."""
    self._data = devices.replicate(split)

  def bucket(self, step: int) -> int:
    """Returns 0: there are no buckets."""
    del step
    return 0

  def example(self, bucket: int, size: int) -> PyTree:
    """Returns the split."""
    del bucket, size
    return self._data

  def __call__(self, step: int) -> PyTree:
    """Returns the split."""
    del step
    return self._data

  def replay(self, step: int, sampler: PyTree) -> PyTree:
    """Returns the split."""
    del sampler
    return self(step)

  def close(self) -> None:
    """Does nothing: no process reads."""


class Splits:
  """Splits that lie on the devices, to evaluate: see `dataset.Splits`."""

  def __init__(
    self,
    devices: Devices,
    splits: dict[str, list[Split]],
    batch_size: int,
  ):
    """Copies the splits to the devices.

    What has inputs of one shape shares a program, and so is padded to one
    length.

    Args:
      devices: to evaluate on.
      splits: for each split its arrays, in one or several pieces: 'inputs',
        'label', and 'row', where in the split these are.
      batch_size: examples of a chunk over all devices, at most.
    """
    self.devices = devices
    self.counts = {
      name: sum(len(piece['label']) for piece in pieces)
      for name, pieces in splits.items()
    }
    longest: dict[tuple[int, ...], int] = {}
    for pieces in splits.values():
      for piece in pieces:
        shape = piece['inputs'].shape[1:]
        longest[shape] = max(longest.get(shape, 0), len(piece['label']))
    programs = {shape: program for program, shape in enumerate(longest)}
    self.sizes = [chunk_size(devices, batch_size, n) for n in longest.values()]
    self._pieces: dict[str, list[tuple[int, PyTree, np.ndarray]]] = {}
    for name, pieces in splits.items():
      self._pieces[name] = []
      for piece in pieces:
        shape = piece['inputs'].shape[1:]
        data = devices.replicate(_pad(piece, longest[shape]))
        self._pieces[name].append((programs[shape], data, piece['row']))

  def example(self, program: int) -> PyTree:
    """Returns arrays that the program goes through."""
    return next(
      data
      for pieces in self._pieces.values()
      for index, data, _ in pieces
      if index == program
    )

  def chunks(self, name: str) -> Iterator[tuple[int, PyTree, int, np.ndarray]]:
    """See `dataset.Splits.chunks`; the data are whole, `chunk` counts."""
    for program, data, rows in self._pieces[name]:
      size = self.sizes[program]
      for chunk in range(-(-len(rows) // size)):
        yield program, data, chunk, rows[chunk * size : (chunk + 1) * size]

  def read(
    self, data: PyTree, chunk: Array, size: int, axis_name: str
  ) -> tuple[Array, Array, Array]:
    """See `dataset.Splits.read`."""
    local = size // jax.lax.axis_size(axis_name)
    start = chunk * size + jax.lax.axis_index(axis_name) * local
    index = start + jnp.arange(local)
    real = index < data['count']
    index = jnp.where(real, index, 0)
    return data['inputs'][index], data['label'][index], real


def first_examples(split: Split, examples: int | None) -> Split:
  """Returns the first examples of a split, or all, with their 'row'."""
  split = {name: split[name][:examples] for name in ('inputs', 'label')}
  return {**split, 'row': np.arange(len(split['label']), dtype=np.int32)}


def _pad(split: Split, length: int) -> PyTree:
  """Returns arrays with zeros at their end, and 'count' of what is none."""
  count = len(split['label'])
  padded = {
    name: np.pad(split[name], [(0, length - count)] + [(0, 0)] * (ndim - 1))
    for name, ndim in (('inputs', split['inputs'].ndim), ('label', 1))
  }
  return {**padded, 'count': np.int32(count)}
