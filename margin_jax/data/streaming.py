"""Datasets too large for memory: JPEGs, read and decoded by Grain workers.

What a step draws is a pure function of (seed, step), as it is for arrays on
the device: every process computes the same plan, and decodes its own share of
each draw. So resuming needs no state of the workers, and neither the number of
workers nor the number of processes changes an image.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from margin_jax.data import augment as augment_lib
from margin_jax.data import workers as workers_lib
from margin_jax.data.tfds_images import DatasetError

PyTree = Any

# In evaluation the shorter side is this many times the image that is read.
EVALUATION_SCALE = 256 / 224
# So many in a row that cannot be decoded are no accident.
MOST_SUBSTITUTES = 10


def crop_box(
  rng: np.random.Generator, width: int, height: int
) -> tuple[int, int, int, int]:
  """A random box of 8% to 100% of the area, ratio 3:4 to 4:3.

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
  """The central square that remains of 224 pixels when resized to 256."""
  side = max(round(min(width, height) / EVALUATION_SCALE), 1)
  left, top = (width - side) // 2, (height - side) // 2
  return left, top, left + side, top + side


def decode(
  encoded: bytes, size: int, rng: np.random.Generator | None
) -> np.ndarray:
  """(size, size, 3) uint8 of a JPEG: a random crop, or the central one.

  Args:
    encoded: the file's bytes.
    size: the side of the result.
    rng: decides the crop; None is the central one of evaluation.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    box = center_box(*image.size) if rng is None else crop_box(rng, *image.size)
    # Not resize(box=...), whose filter reads pixels outside of the box.
    resized = (
      image.crop(box)
      .convert('RGB')
      .resize((size, size), Image.Resampling.BILINEAR)
    )
  return np.asarray(resized)


def places(sizes: Sequence[int], examples: int) -> np.ndarray:
  """Where in the stream of epochs each step draws.

  Like `images.draw`: an epoch's last examples that do not fill a draw are left
  for another epoch.

  Args:
    sizes: how many examples each step draws, from step 0; 0 is none.
    examples: in an epoch.

  Returns:
    (steps, 2) int64: epoch, and cursor in its order.
  """
  found = np.zeros((len(sizes), 2), np.int64)
  epoch, cursor = -1, examples
  for step, size in enumerate(sizes):
    if size and cursor + size > examples:
      epoch, cursor = epoch + 1, 0
    found[step] = epoch, cursor
    cursor += size
  return found


class Share(Protocol):
  """Which part of every draw a process decodes: the index-th of `count`."""

  index: int
  count: int


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
  ):
    self._skip = skip
    self._records = records
    self._rows = rows
    self._shift = shift
    self._num_classes = num_classes
    self._image_size = image_size

  def _one(
    self, record: Any, position: int, rng: np.random.Generator | None
  ) -> np.ndarray | None:
    """The image of a record, or None where it is none and may be skipped."""
    row = self._rows[position]
    if not 0 <= record['label'] < self._num_classes:
      raise DatasetError(
        f'the label of record {row} is {record["label"]}, outside '
        f'[0, {self._num_classes})'
      )
    try:
      return decode(record['image'], self._image_size, rng)
    except (OSError, Image.DecompressionBombError) as error:
      # Pillow's, of what is no image, half of one, or far too large.
      if self._skip:
        return None
      raise DatasetError(
        f'the JPEG of record {row} cannot be decoded ({error}); '
        "data.undecodable='skip' goes on without it"
      ) from error

  def read(
    self,
    positions: np.ndarray,
    rngs: list[np.random.Generator | None],
    substitute: bool,
  ) -> dict[str, np.ndarray]:
    """The examples at positions of `rows`.

    Args:
      positions: which.
      rngs: decide the crop of each.
      substitute: whether the next example takes the place of one that cannot
        be decoded, or a black image, with 'undecodable' as 1.
    """
    found = self._records.__getitems__([int(r) for r in self._rows[positions]])
    inputs, labels, index, bad = [], [], [], []
    for record, rng, position in zip(found, rngs, positions, strict=True):
      place = int(position)
      image = first = self._one(record, place, rng)
      for _ in range(MOST_SUBSTITUTES if substitute else 0):
        if image is not None:
          break
        place = (place + 1) % len(self._rows)
        record = self._records.__getitems__([int(self._rows[place])])[0]
        image = self._one(record, place, rng)
      if image is None:
        if substitute:
          raise DatasetError(
            f'{MOST_SUBSTITUTES + 1} JPEGs in a row, from record '
            f'{self._rows[position]} on, cannot be decoded'
          )
        image = np.zeros((self._image_size, self._image_size, 3), np.uint8)
      inputs.append(image)
      labels.append((record['label'] + self._shift[place]) % self._num_classes)
      index.append(place)
      bad.append(first is None)
    return {
      'inputs': np.stack(inputs),
      'label': np.array(labels, np.int32),
      'index': np.array(index, np.int32),
      'undecodable': np.array(bad, np.int32),
    }


class _TrainingUnits:
  """What Grain reads: unit i of this process's share of all draws."""

  def __init__(
    self,
    reader: _Reader,
    examples: int,
    sizes: Sequence[int],
    start: int,
    share: Share,
    unit: int,
    seed: int,
  ):
    self._reader = reader
    self._examples = examples
    self._share = share
    self._unit = unit
    self._seed = seed
    self._sizes = np.asarray(sizes)
    self._places = places(sizes, examples)
    units = self._sizes // share.count // unit
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
    local = self._sizes[step] // self._share.count
    first = self._share.index * local + (i - before) * self._unit
    # An example's place among all that the step draws decides its pixels.
    place = first + np.arange(self._unit)
    epoch, cursor = (int(x) for x in self._places[step])
    rngs = [np.random.default_rng((self._seed, 3, step, int(p))) for p in place]
    batch = self._reader.read(self._epoch(epoch)[cursor + place], rngs, True)
    return {**batch, 'epoch': np.full(self._unit, epoch, np.int32)}


class _EvaluationChunks:
  """What Grain reads: this process's share of chunk i of a split."""

  def __init__(self, reader: _Reader, examples: int, size: int, share: Share):
    self._reader = reader
    self._examples = examples
    self._size = size
    self._share = share

  def __len__(self) -> int:
    return -(-self._examples // self._size)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    local = self._size // self._share.count
    positions = i * self._size + self._share.index * local + np.arange(local)
    real = positions < self._examples
    rngs = [None] * local
    batch = self._reader.read(np.where(real, positions, 0), rngs, False)
    return {**batch, 'real': real & (batch['undecodable'] == 0)}


@dataclasses.dataclass(frozen=True)
class Streamed:
  """A dataset whose examples are read while training.

  Attributes:
    name: of the dataset.
    num_classes: C.
    records: for each split, a random-access dataset of
      `{'image': JPEG bytes, 'label': int}`.
    rows: for each split, which of the records it has.
    shift: for each split and row, what is added to its label, modulo C: 0 but
      for labels made wrong on purpose.
    image_size: side of the images that the model reads.
    workers: processes that decode; 0 decodes in the training process.
    augment: (key, image) -> image, for one training example, in the step.
    prepare: batch of inputs as stored -> what the model reads.
    skip: whether an image that cannot be decoded is left out: in training the
      next one takes its place, and evaluation does not count it. Else it ends
      the run.
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
  skip: bool = False

  resident = False
  input_dtype = np.dtype(np.uint8)
  widths = ()
  vocabulary = None
  f1 = False

  @property
  def input_shape(self) -> tuple[int, ...]:
    """The shape of one example's inputs."""
    return self.image_size, self.image_size, 3

  @property
  def counts(self) -> dict[str, int]:
    """The number of examples of each split."""
    return {name: len(rows) for name, rows in self.rows.items()}

  def _reader(self, split: str) -> _Reader:
    return _Reader(
      self.records[split],
      self.rows[split],
      self.shift[split],
      self.num_classes,
      self.image_size,
      self.skip,
    )

  def training(
    self, sizes: Sequence[int], start: int, seed: int, share: Share
  ) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of what each step from `start` on draws.

    Args:
      sizes: how many examples every step of the run draws, over all
        processes; steps that draw none are skipped.
      start: the first step that is needed.
      seed: of the order of epochs and of the crops.
      share: which part of each draw.

    Yields:
      {'inputs', 'label', 'index', 'epoch', 'undecodable'}, arrays of as many
      rows.
    """
    local = [size // share.count for size in sizes]
    unit = int(np.gcd.reduce([size for size in local if size]))
    units = workers_lib.iterate(
      _TrainingUnits(
        self._reader('train'), self.counts['train'], sizes, start, share,
        unit, seed,
      ),
      self.workers,
    )  # fmt: skip
    with contextlib.closing(units):
      for size in local[start:]:
        parts = [next(units) for _ in range(size // unit)]
        if parts:
          names = parts[0]
          yield {k: np.concatenate([part[k] for part in parts]) for k in names}

  def evaluation(
    self, split: str, size: int, share: Share
  ) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of each chunk of `size` examples of a split.

    Yields:
      {'inputs', 'label', 'index', 'real'}; over all chunks every example of
      the split is 'real' exactly once.
    """
    chunks = _EvaluationChunks(
      self._reader(split), self.counts[split], size, share
    )
    with contextlib.closing(
      workers_lib.iterate(chunks, self.workers)
    ) as batches:
      yield from batches
