"""Datasets too large for memory: images, read and decoded by Grain workers.

What a step samples is a pure function of (seed, step), as it is for arrays on
the device, unless a sampler orders the epochs by remembered scores (`Ordered`).
Every process computes the same indices, and decodes its own shard of each
sample. So resuming needs no state of the workers, and no image depends on the
number of workers or processes.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from margin_jax.data import augment as augment_lib
from margin_jax.data import images, in_memory
from margin_jax.data import workers as workers_lib
from margin_jax.data.dataset import (
  DatasetError,
  Devices,
  Orders,
  Origins,
  PyTree,
  Shard,
  chunk_size,
)

Decode = Callable[[bytes, int, np.random.Generator | None], np.ndarray]
# In evaluation the shorter side is this many times the image that is read.
EVALUATION_SCALE = 256 / 224
# So many in a row that cannot be decoded are no accident.
MOST_SUBSTITUTES = 10


def crop_box(
  rng: np.random.Generator, width: int, height: int
) -> tuple[int, int, int, int]:
  """Samples a box of 8% to 100% of the area, ratio 3:4 to 4:3.

  Where ten attempts do not fit, the largest central box with a ratio allowed.
  """
  for _ in range(augment_lib.TRIES):
    area = width * height * rng.uniform(*augment_lib.AREAS)
    ratio = np.exp(rng.uniform(*np.log(augment_lib.RATIOS)))
    w = round(float(np.sqrt(area * ratio)))
    h = round(float(np.sqrt(area / ratio)))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(0, width - w + 1))
      top = int(rng.integers(0, height - h + 1))
      return left, top, left + w, top + h
  w = min(width, round(height * augment_lib.RATIOS[1]))
  h = min(height, round(width / augment_lib.RATIOS[0]))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def center_box(width: int, height: int) -> tuple[int, int, int, int]:
  """Returns the central square: 224 pixels of an image resized to 256."""
  side = max(round(min(width, height) / EVALUATION_SCALE), 1)
  left, top = (width - side) // 2, (height - side) // 2
  return left, top, left + side, top + side


def decode(
  encoded: bytes, size: int, rng: np.random.Generator | None
) -> np.ndarray:
  """Decodes a JPEG to (size, size, 3) uint8: a random crop, or the centre.

  Args:
    encoded: the file's bytes.
    size: the side of the result.
    rng: decides the crop; None is the central one of evaluation.
  """
  with images.open_encoded(encoded) as image:
    box = center_box(*image.size) if rng is None else crop_box(rng, *image.size)
    # Not resize(box=...), whose filter reads pixels outside of the box.
    resized = (
      image.crop(box)
      .convert('RGB')
      .resize((size, size), Image.Resampling.BILINEAR)
    )
  return np.asarray(resized)


def decode_whole(
  encoded: bytes, size: int, rng: np.random.Generator | None
) -> np.ndarray:
  """Decodes an image to (size, size, 3) uint8, the same every time."""
  del rng
  return images.resize(encoded, size)


def epoch_positions(sizes: Sequence[int], examples: int) -> np.ndarray:
  """Returns where in the endless epochs each step samples.

  Like `InMemory.sample`: an epoch's last examples that do not fill a sample are
  left for another epoch.

  Args:
    sizes: how many examples each step samples, from step 0; 0 is none.
    examples: in an epoch.

  Returns:
    (steps, 2) int64: epoch, and cursor in its order.
  """
  positions = np.zeros((len(sizes), 2), np.int64)
  epoch, cursor = -1, examples
  for step, size in enumerate(sizes):
    if size and cursor + size > examples:
      epoch, cursor = epoch + 1, 0
    positions[step] = epoch, cursor
    cursor += size
  return positions


class SamplerState(flax.struct.PyTreeNode):
  """A position in the epochs; the order is known to what reads the records.

  Attributes:
    epoch: () int32, of the last sample; -1 before the first.
  """

  epoch: Array

  @classmethod
  def create(cls) -> 'SamplerState':
    """Returns the state before the first step."""
    return cls(epoch=jnp.int32(-1))


class _Reader:
  """Records -> arrays; one in every worker."""

  def __init__(
    self,
    records: Any,
    rows: np.ndarray,
    shift: np.ndarray,
    num_classes: int,
    image_size: int,
    skip: bool,
    decode: Decode,
    labels: np.ndarray | None,
  ):
    self._skip = skip
    self._decode = decode
    self._labels = labels
    self._records = records
    self._rows = rows
    self._shift = shift
    self._num_classes = num_classes
    self._image_size = image_size

  def _one(
    self, record: Any, position: int, rng: np.random.Generator | None
  ) -> np.ndarray | None:
    """Returns a record's image; None where it is none and may be skipped."""
    row = self._rows[position]
    if not 0 <= record['label'] < self._num_classes:
      raise DatasetError(
        f'the label of record {row} is {record["label"]}, outside '
        f'[0, {self._num_classes})'
      )
    try:
      return self._decode(record['image'], self._image_size, rng)
    except images.UNDECODABLE as error:
      if self._skip:
        return None
      raise DatasetError(
        f'{images.name_of(record, row)} cannot be decoded ({error}); '
        "data.undecodable='skip' goes on without it"
      ) from error

  def read(
    self,
    positions: np.ndarray,
    rngs: list[np.random.Generator | None],
    substitute: bool,
  ) -> dict[str, np.ndarray]:
    """Returns the examples at positions of `rows`.

    Args:
      positions: which.
      rngs: decide the crop of each.
      substitute: whether the next example takes the place of one that cannot
        be decoded, or a black image, with 'undecodable' as 1.
    """
    records = self._records.__getitems__(
      [int(row) for row in self._rows[positions]]
    )
    inputs, labels, index, undecodable = [], [], [], []
    for record, rng, position in zip(records, rngs, positions, strict=True):
      current = int(position)
      image = first = self._one(record, current, rng)
      for _ in range(MOST_SUBSTITUTES if substitute else 0):
        if image is not None:
          break
        current = (current + 1) % len(self._rows)
        record = self._records.__getitems__([int(self._rows[current])])[0]
        image = self._one(record, current, rng)
      if image is None:
        if substitute:
          raise DatasetError(
            f'{MOST_SUBSTITUTES + 1} images in a row, from record '
            f'{self._rows[position]} on, cannot be decoded'
          )
        image = np.zeros((self._image_size, self._image_size, 3), np.uint8)
      inputs.append(image)
      label = record['label']
      if self._labels is not None:
        label = self._labels[current]
      labels.append((label + self._shift[current]) % self._num_classes)
      index.append(current)
      undecodable.append(first is None)
    return {
      'inputs': np.stack(inputs),
      'label': np.array(labels, np.int32),
      'index': np.array(index, np.int32),
      'undecodable': np.array(undecodable, np.int32),
    }


class _TrainingUnits:
  """What Grain reads: unit i of this process's shard of all samples."""

  def __init__(
    self,
    reader: _Reader,
    examples: int,
    sizes: Sequence[int],
    start: int,
    shard: Shard,
    unit: int,
    seed: int,
  ):
    self._reader = reader
    self._examples = examples
    self._shard = shard
    self._unit = unit
    self._seed = seed
    self._sizes = np.asarray(sizes)
    self._positions = epoch_positions(sizes, examples)
    units = self._sizes // shard.count // unit
    units[:start] = 0
    self._ends = np.cumsum(units)
    self._order: tuple[int, np.ndarray | None] = (-1, None)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def _epoch(self, epoch: int) -> np.ndarray:
    if self._order[0] != epoch:
      rng = np.random.default_rng((self._seed, 2, epoch))
      self._order = epoch, rng.permutation(self._examples)
    return self._order[1]

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    step = int(np.searchsorted(self._ends, i, 'right'))
    before = self._ends[step - 1] if step else 0
    local = self._sizes[step] // self._shard.count
    first = self._shard.index * local + (i - before) * self._unit
    index = first + np.arange(self._unit)
    epoch, cursor = (int(x) for x in self._positions[step])
    rngs = _crops(self._seed, step, index)
    batch = self._reader.read(self._epoch(epoch)[cursor + index], rngs, True)
    return {**batch, 'epoch': np.full(self._unit, epoch, np.int32)}


def _crops(
  seed: int, step: int, index: np.ndarray
) -> list[np.random.Generator]:
  """Returns what decides the crops of a step's examples: their index in it."""
  return [np.random.default_rng((seed, 3, step, int(k))) for k in index]


class _OrderedSteps:
  """What Grain reads: this process's shard of the i-th step from `start` on."""

  def __init__(
    self,
    reader: _Reader,
    rows: np.ndarray,
    size: int,
    start: int,
    shard: Shard,
    seed: int,
  ):
    self._reader = reader
    self._rows = rows
    self._size = size
    self._start = start
    self._shard = shard
    self._seed = seed

  def __len__(self) -> int:
    return len(self._rows) // self._size

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    local = self._size // self._shard.count
    index = self._shard.index * local + np.arange(local)
    rngs = _crops(self._seed, self._start + i, index)
    rows = self._rows[i * self._size + index]
    # Of an image that another takes the place of, the other's score is
    # remembered: else it would be the lowest for ever.
    index = rows.astype(np.int32)
    return {**self._reader.read(rows, rngs, True), 'index': index}


class _EvaluationChunks:
  """What Grain reads: this process's shard of chunk i of a split."""

  def __init__(self, reader: _Reader, examples: int, size: int, shard: Shard):
    self._reader = reader
    self._examples = examples
    self._size = size
    self._shard = shard

  def __len__(self) -> int:
    return -(-self._examples // self._size)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    local = self._size // self._shard.count
    start = i * self._size + self._shard.index * local
    positions = start + np.arange(local)
    real = positions < self._examples
    rngs = [None] * local
    batch = self._reader.read(np.where(real, positions, 0), rngs, False)
    return {**batch, 'real': real & (batch['undecodable'] == 0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
  """A `Dataset` whose examples are read while training.

  Attributes:
    name: the name of the dataset.
    num_classes: C.
    records: for each split, a random-access dataset of
      `{'image': JPEG bytes, 'label': int}`.
    rows: for each split, which of the records it has.
    shift: for each split and row, what is added to its label, modulo C: 0 but
      for labels made wrong on purpose.
    labels: for each split that has labels of the user's own, these, by row.
    image_size: side of the images that the model reads.
    workers: processes that decode; 0 decodes in the training process.
    augment: (key, image) -> image, for one training example, in the step.
    prepare: batch of inputs as stored -> what the model reads.
    decode: the bytes of an image, its side, what decides its crop or None ->
      its pixels.
    skip: whether an image that cannot be decoded is left out: in training the
      next one takes its place, and evaluation does not count it. Else it ends
      the run.
    class_names: C of them; None where they have none.
    origins: where in the user's own files the rows are; None if there are none.
  """

  name: str
  num_classes: int
  records: dict[str, Any]
  rows: dict[str, np.ndarray]
  shift: dict[str, np.ndarray]
  image_size: int
  workers: int
  augment: augment_lib.Augmentation
  prepare: Callable[[Any], Any]
  labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  decode: Decode = decode
  skip: bool = False
  class_names: tuple[str, ...] | None = None
  origins: Origins | None = None

  input_dtype = np.dtype(np.uint8)
  vocabulary = None
  f1 = False
  most_steps_per_call = 1
  bucket_count = 1
  weighted = False

  @property
  def input_shape(self) -> tuple[int, ...]:
    """The shape of one example's inputs."""
    return self.image_size, self.image_size, 3

  @property
  def counts(self) -> dict[str, int]:
    """The number of examples of each split."""
    return {name: len(rows) for name, rows in self.rows.items()}

  def inputs(self, split: str, rows: np.ndarray) -> np.ndarray:
    """See `Dataset.inputs`; these are the central crops of evaluation."""
    return self.reader(split).read(rows, [None] * len(rows), False)['inputs']

  def state(self, sampler_weights: bool = False) -> PyTree:
    """See `Dataset.state`."""
    del sampler_weights
    return SamplerState.create()

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
    """See `Dataset.sample`; `data` are this device's shard already."""
    del orders
    examples = self.augmented(data, size, key, step, axis_name)
    return state.replace(epoch=data['epoch'][0]), examples

  def augmented(
    self,
    data: dict[str, Array],
    size: int,
    key: Array,
    step: Array,
    axis_name: str,
  ) -> dict[str, Array]:
    """Returns this device's shard of the examples of `data`, augmented."""
    _, augment_key = jax.random.split(key)
    local = size // jax.lax.axis_size(axis_name)
    first = jax.lax.axis_index(axis_name) * local
    keys = augment_lib.example_keys(
      augment_key, step, first + jnp.arange(local)
    )
    return {
      'inputs': jax.vmap(self.augment)(keys, data['inputs']),
      'label': data['label'],
      'index': data['index'],
    }

  def fit(
    self, examples: dict[str, Array], data: dict[str, Array]
  ) -> dict[str, Array]:
    """Returns the examples: all inputs have one shape."""
    del data
    return examples

  def loader(
    self, devices: Devices, sizes: Sequence[int], start: int, seed: int
  ) -> 'Loader':
    """See `Dataset.loader`; the workers start with the first call."""
    return Loader(self, devices, sizes, start, seed)

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
    return Splits(self, devices, names, batch_size, examples)

  def reader(self, split: str) -> _Reader:
    """Returns what reads the records of a split."""
    return _Reader(
      self.records[split],
      self.rows[split],
      self.shift[split],
      self.num_classes,
      self.image_size,
      self.skip,
      self.decode,
      self.labels.get(split),
    )

  def training(
    self, sizes: Sequence[int], start: int, seed: int, shard: Shard
  ) -> Iterator[dict[str, np.ndarray]]:
    """Reads this process's shard of what each step from `start` on samples.

    Args:
      sizes: how many examples every step of the run samples, over all
        processes; steps that sample none are skipped.
      start: the first step that is needed.
      seed: the seed of the order of epochs and of the crops.
      shard: which part of each sample.

    Yields:
      {'inputs', 'label', 'index', 'epoch', 'undecodable'}, arrays of as many
      rows.
    """
    local = [size // shard.count for size in sizes]
    unit = int(np.gcd.reduce([size for size in local if size]))
    units = workers_lib.iterate(
      _TrainingUnits(
        self.reader('train'), self.counts['train'], sizes, start, shard,
        unit, seed,
      ),
      self.workers,
    )  # fmt: skip
    with contextlib.closing(units):
      for size in local[start:]:
        batches = [next(units) for _ in range(size // unit)]
        if batches:
          yield {k: np.concatenate([x[k] for x in batches]) for k in batches[0]}

  def evaluation(
    self, split: str, size: int, shard: Shard
  ) -> Iterator[dict[str, np.ndarray]]:
    """Reads this process's shard of each chunk of `size` examples of a split.

    Yields:
      {'inputs', 'label', 'index', 'real'}; over all chunks every example of
      the split is 'real' exactly once.
    """
    chunks = _EvaluationChunks(
      self.reader(split), self.counts[split], size, shard
    )
    with contextlib.closing(
      workers_lib.iterate(chunks, self.workers)
    ) as batches:
      yield from batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ordered(Streaming):
  """A `Streaming` dataset whose epochs a sampler orders, on the devices.

  The order is in the state, and so in checkpoints. Whenever an epoch begins the
  host waits for it, and the workers decode its examples.
  """

  def state(self, sampler_weights: bool = False) -> PyTree:
    """See `Dataset.state`."""
    state = in_memory.SamplerState
    return state.create(self.counts['train'], sampler_weights)

  def begin_epoch(
    self, state: PyTree, size: int, *, key: Array, orders: Orders
  ) -> PyTree:
    """See `Dataset.begin_epoch`."""
    order_key, _ = jax.random.split(key)
    return in_memory.advance(state, size, order_key, orders)

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
    """See `Dataset.sample`; the epoch has begun, and is decoded."""
    del orders
    examples = self.augmented(data, size, key, step, axis_name)
    return in_memory.take_weights(state, examples, size, axis_name)

  def loader(
    self, devices: Devices, sizes: Sequence[int], start: int, seed: int
  ) -> 'OrderedLoader':
    """See `Dataset.loader`; the workers start with every epoch."""
    return OrderedLoader(self, devices, sizes, start, seed)


class Loader:
  """One sample a step, decoded by worker processes ahead of time.

  A call is dispatched before the last has ended, so that while the devices
  compute this process already waits for later samples and sends them.

  Attributes:
    seconds_waited: for the workers, while there may have been work to do.
    undecodable: images that another took the place of, in this process's shard.
  """

  ordered = False

  def __init__(
    self,
    dataset: Streaming,
    devices: Devices,
    sizes: Sequence[int],
    start: int,
    seed: int,
  ):
    """Starts nothing yet; the arguments are those of `Dataset.loader`."""
    self._args = dataset, devices, sizes, seed
    self._devices = devices
    self._input_shape = dataset.input_shape
    self._sizes = sizes
    self.seconds_waited = 0.0
    self.undecodable = 0
    self._batches = dataset.training(sizes, start, seed, devices.process_shard)

  def bucket(self, step: int) -> int:
    """Returns 0: there are no buckets."""
    del step
    return 0

  def example(self, bucket: int, size: int) -> PyTree:
    """Returns a sample of zeros, {} of no examples."""
    del bucket
    rows = size // self._devices.process_shard.count
    if not rows:
      return {}
    batch = {
      'inputs': np.zeros((rows, *self._input_shape), np.uint8),
      **{k: np.zeros(rows, np.int32) for k in ('label', 'index', 'epoch')},
    }
    return self._devices.shard(batch)

  def __call__(self, step: int) -> PyTree:
    """Returns the sample of the step, {} where it has none."""
    if not self._sizes[step]:
      return {}
    started = time.perf_counter()
    batch = next(self._batches)
    self.seconds_waited += time.perf_counter() - started
    self.undecodable += int(batch.pop('undecodable').sum())
    return self._devices.shard(batch)

  def replay(self, step: int, sampler: PyTree) -> PyTree:
    """Reads the sample of the step once more, with workers of its own."""
    del sampler
    dataset, devices, sizes, seed = self._args
    with contextlib.closing(
      Loader(dataset, devices, sizes, step, seed)
    ) as again:
      return again(step)

  def close(self) -> None:
    """Stops the workers."""
    self._batches.close()


class OrderedLoader(Loader):
  """One sample a step, of the epochs that a sampler orders."""

  ordered = True

  def __init__(
    self,
    dataset: Ordered,
    devices: Devices,
    sizes: Sequence[int],
    start: int,
    seed: int,
  ):
    """Starts nothing yet; the arguments are those of `Dataset.loader`."""
    super().__init__(dataset, devices, sizes, start, seed)
    self._dataset = dataset
    self._seed = seed
    self._left = 0

  def begins_epoch(self, step: int, tail: bool) -> bool:
    """See `dataset.Loader`."""
    return tail or self._left < self._sizes[step]

  def read_epoch(self, step: int, sampler: PyTree) -> None:
    """See `dataset.Loader`; the workers start with the rest of the epoch."""
    self._batches.close()
    rows = sampler.order[int(sampler.cursor) : int(sampler.count)]
    self._left = len(rows)
    steps = _OrderedSteps(
      self._dataset.reader('train'),
      rows,
      self._sizes[step],
      step,
      self._devices.process_shard,
      self._seed,
    )
    self._batches = workers_lib.iterate(steps, self._dataset.workers)

  def example(self, bucket: int, size: int) -> PyTree:
    """Returns a sample of zeros; the epoch is in the state."""
    data = super().example(bucket, size)
    data.pop('epoch', None)
    return data

  def __call__(self, step: int) -> PyTree:
    """Returns the sample of the step."""
    self._left -= self._sizes[step]
    return super().__call__(step)

  def replay(self, step: int, sampler: PyTree) -> PyTree:
    """Reads the sample of the step that the sampler is at once more."""
    dataset, devices, sizes, seed = self._args
    again = OrderedLoader(dataset, devices, sizes, step, seed)
    with contextlib.closing(again):
      again.read_epoch(step, sampler)
      return again(step)


class Splits:
  """Splits that are read while they are evaluated: see `dataset.Splits`."""

  def __init__(
    self,
    dataset: Streaming,
    devices: Devices,
    names: Sequence[str],
    batch_size: int,
    examples: int | None,
  ):
    """Reads nothing yet; the arguments are those of `Dataset.chunks`."""
    self.devices = devices
    self.counts = {
      name: min(examples or dataset.counts[name], dataset.counts[name])
      for name in names
    }
    longest = max(self.counts.values())
    self.sizes = [chunk_size(devices, batch_size, longest)]
    self._dataset = dataset

  def example(self, program: int) -> PyTree:
    """Returns a chunk of zeros."""
    rows = self.sizes[program] // self.devices.process_shard.count
    chunk = {
      'inputs': np.zeros((rows, *self._dataset.input_shape), np.uint8),
      'label': np.zeros(rows, np.int32),
      'real': np.zeros(rows, bool),
    }
    return self.devices.shard(chunk)

  def chunks(self, name: str) -> Iterator[tuple[int, PyTree, int, np.ndarray]]:
    """See `dataset.Splits.chunks`; the data are one chunk."""
    (size,), count = self.sizes, self.counts[name]
    batches = self._dataset.evaluation(name, size, self.devices.process_shard)
    with contextlib.closing(batches):
      for start in range(0, count, size):
        batch = next(batches)
        chunk = {k: batch[k] for k in ('inputs', 'label', 'real')}
        chunk['real'] &= batch['index'] < count
        rows = np.arange(start, min(start + size, count))
        yield 0, self.devices.shard(chunk), 0, rows

  def read(
    self, data: PyTree, chunk: Array, size: int, axis_name: str
  ) -> tuple[Array, Array, Array]:
    """Returns the data: each device has its shard already."""
    del chunk, size, axis_name
    return data['inputs'], data['label'], data['real']
