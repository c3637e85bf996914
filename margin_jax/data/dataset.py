"""What every dataset answers, whatever its kind.

There are four kinds. `InMemory` is held on the devices as a whole, and
`Bucketed` in buckets of sentences of similar length. `Streaming` is read while
training, in an order that the host knows, and `Ordered` in an order that the
devices make. `load` chooses the class; code that uses a dataset never asks
which one it is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array

from margin_jax import sampling

PyTree = Any
# 'inputs', (N, ...), and 'label', (N,) int32; of a training split there may be
# 'weights', (N,) float32.
Split = dict[str, np.ndarray]


class DatasetError(Exception):
  """A dataset is missing, broken, or in a format that is not read here."""


class Origins(NamedTuple):
  """Where the examples lie in the user's own data.

  Attributes:
    column: what tells it: 'file', the path in a folder, or 'line', at which a
      record of a CSV file begins, from 1.
    values: for each of the dataset's own splits, by row.
  """

  column: str
  values: dict[str, Sequence[Any]]


class Shard(Protocol):
  """A process's part of all examples: the index-th of `count` equal ones."""

  index: int
  count: int


class Devices(Protocol):
  """What a dataset must know of the devices: see `train.devices.Devices`."""

  total: int
  process_shard: Shard
  replicate: Callable[[PyTree], PyTree]
  shard: Callable[[PyTree], PyTree]


class Orders(Protocol):
  """Makes the order of an epoch, at its beginning.

  Attributes:
    tail: () bool, whether the run has come to its plain tail, where a new epoch
      begins.
  """

  tail: Array

  def order(
    self, key: Array, epoch: Array, rows: Array | None
  ) -> sampling.Order:
    """Returns the order of an epoch.

    Args:
      key: the key of the epoch.
      epoch: () int32, from 0.
      rows: (n,) the training examples to order, positions in which the order
        names; None is all.
    """


class Loader(Protocol):
  """Hands each call of the train step its data.

  Attributes:
    seconds_waited: for data, while there may have been work to do.
    undecodable: images that another took the place of, in this process.
    ordered: whether a sampler on the devices orders what this must read first.
      The host then begins the epochs, by `Dataset.begin_epoch`, whenever
      `begins_epoch` says so. Else the steps do it themselves.
  """

  seconds_waited: float
  undecodable: int
  ordered: bool

  def bucket(self, step: int) -> int:
    """Returns which bucket the step samples from; 0 where there are none."""

  def example(self, bucket: int, size: int) -> PyTree:
    """Returns data like those of a step, to compile it for.

    Args:
      bucket: the bucket that the step samples from.
      size: how many examples it samples, over all devices; 0 is none.
    """

  def begins_epoch(self, step: int, tail: bool) -> bool:
    """Returns whether the host must begin an epoch before the step.

    Args:
      step: the step that comes next.
      tail: whether the plain tail of the run begins at it.
    """

  def read_epoch(self, step: int, sampler: PyTree) -> None:
    """Begins to read the epoch of a sampler state, on the host, from `step`."""

  def __call__(self, step: int) -> PyTree:
    """Returns the data of the call that starts at `step`."""

  def replay(self, step: int, sampler: PyTree) -> PyTree:
    """Returns the data of the call at an earlier step again.

    Args:
      step: the call's first.
      sampler: the sampler state that the step reads, on the host.
    """

  def close(self) -> None:
    """Ends the processes that read the data, if there are any."""


class Splits(Protocol):
  """Whole splits in chunks, to evaluate; one program for each shape of chunk.

  Attributes:
    devices: the devices that hold the chunks.
    sizes: for each program, the examples of a chunk, over all devices.
    counts: for each split, its number of examples.
  """

  devices: Devices
  sizes: list[int]
  counts: dict[str, int]

  def example(self, program: int) -> PyTree:
    """Returns data like those that `chunks` yields for a program."""

  def chunks(self, name: str) -> Iterator[tuple[int, PyTree, int, np.ndarray]]:
    """Goes once through the split called `name`.

    Yields:
      The index of the program, its arguments `data` and `chunk`, and which
      examples of the split the chunk's first rows are; the rest is padding.
    """

  def read(
    self, data: PyTree, chunk: Array, size: int, axis_name: str
  ) -> tuple[Array, Array, Array]:
    """Returns this device's inputs and labels of a chunk, and which count.

    Args:
      data: as `chunks` yields it.
      chunk: () int32, as `chunks` yields it.
      size: the examples of a chunk over all devices; static.
      axis_name: the name of the mapped axis.
    """


class Dataset(Protocol):
  """Examples, how to sample them, and how to go through them.

  Attributes:
    name: the name of the dataset.
    num_classes: C.
    counts: for each split, its number of examples.
    rows: for each split, which rows of the dataset's own training or test
      split, in the order in which it is loaded, these are.
    origins: where in the user's own files these rows are; None if there are
      none.
    input_shape: the shape of one example's inputs, as stored.
    input_dtype: the dtype of the inputs, as stored.
    prepare: batch of inputs as stored -> what the model reads.
    vocabulary: of sentences, how many different tokens there are; else None.
    f1: whether F1 of class 1 is reported beside accuracy.
    most_steps_per_call: how many steps one call may run on the same data.
    bucket_count: the buckets of the training examples; 1 where there are none.
    weighted: whether the training examples have weights of their own.
    class_names: C of them; None where the classes have none.
  """

  name: str
  num_classes: int
  counts: dict[str, int]
  rows: dict[str, np.ndarray]
  origins: Origins | None
  input_shape: tuple[int, ...]
  input_dtype: np.dtype
  prepare: Callable[[Any], Any]
  vocabulary: int | None
  f1: bool
  most_steps_per_call: int
  bucket_count: int
  weighted: bool
  class_names: tuple[str, ...] | None

  def inputs(self, split: str, rows: np.ndarray) -> np.ndarray:
    """Returns inputs as stored, not augmented.

    Args:
      split: the split of the examples.
      rows: (n,) which of its examples.
    """

  def state(self, sampler_weights: bool = False) -> PyTree:
    """Returns the sampler state before the first step.

    Args:
      sampler_weights: whether the sampler gives examples weights.

    Returns:
      A state with `epoch`, and `epoch_fraction`, the examples of the epoch as a
      fraction of all.
    """

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
    """Samples the next `size` training examples; per device.

    The order of an epoch depends on (key, epoch) and on `orders`, the pixels of
    an example on (key, step, its index among the `size`): never on the number
    of devices. An epoch's last examples that do not fill a sample are left for
    another epoch.

    Args:
      state: the sampler state.
      data: what the loader has for the step.
      size: how many over all devices; static, and divisible by their number.
      key: the run's PRNG key for data.
      step: () int32.
      axis_name: the name of the mapped axis.
      orders: makes the order of an epoch; None shuffles.

    Returns:
      The new sampler state, and this device's shard of the examples:
      'inputs', 'label', 'index', their rows in the training split, and, where
      dataset or sampler give some, 'weights'.
    """

  def begin_epoch(
    self, state: PyTree, size: int, *, key: Array, orders: Orders
  ) -> PyTree:
    """Returns the sampler state in an epoch that has `size` examples left.

    Only of data whose loader is `ordered`.

    Args:
      state: the sampler state.
      size: how many examples the next step samples, over all devices.
      key: the run's PRNG key for data.
      orders: makes the order of an epoch.
    """

  def fit(
    self, examples: dict[str, Array], data: dict[str, Array]
  ) -> dict[str, Array]:
    """Returns examples of other steps with inputs as wide as those of `data`.

    Args:
      examples: sampled before: 'inputs', and whatever else.
      data: what the loader has for a step, or other examples.
    """

  def loader(
    self, devices: Devices, sizes: Sequence[int], start: int, seed: int
  ) -> Loader:
    """Returns what feeds the train step.

    Args:
      devices: the devices that train.
      sizes: how many examples each step of the run samples, over all devices;
        0 where a step trains on examples of an earlier one.
      start: the first step that will be asked for; they come in order.
      seed: the seed of the run.
    """

  def chunks(
    self,
    devices: Devices,
    names: Sequence[str],
    batch_size: int,
    examples: int | None = None,
    whole: bool = False,
  ) -> Splits:
    """Returns what goes through whole splits.

    Args:
      devices: to evaluate on.
      names: the names of the splits.
      batch_size: examples of a chunk over all devices, at most.
      examples: only so many of each split, its first; None is all.
      whole: whether every split is gone through in its order, and inputs keep
        their full width.
    """


def chunk_size(devices: Devices, batch_size: int, longest: int) -> int:
  """Returns the examples of a chunk: as many on each device, few as padding.

  Args:
    devices: to evaluate on.
    batch_size: the most examples.
    longest: the number of examples of the longest split.
  """
  size = max(min(batch_size, longest), 1)
  return -(-size // devices.total) * devices.total
