"""Image datasets that live on the device as uint8 arrays.

A split is `{'inputs': (N, H, W, channels) uint8, 'label': (N,) int32}`. The
arrays are arguments of the compiled step: drawing a pool, cropping, flipping
and normalising happen there, and pixels stay uint8 until the model reads them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from margin_jax.data import augment as augment_lib

Split = dict[str, np.ndarray]

# Over [0, 1], the statistics that networks trained on ImageNet expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Stream(flax.struct.PyTreeNode):
  """Place in an endless stream of epochs, each in an order of its own.

  Attributes:
    epoch: () int32, the epoch that `order` belongs to; -1 before the first.
    cursor: () int32, how much of `order` is drawn.
    order: (N,) int32, a permutation: kept because sorting N keys at every
      step costs more than a small model's step.
  """

  epoch: Array
  cursor: Array
  order: Array

  @classmethod
  def create(cls, examples: int) -> 'Stream':
    """The stream before its first draw."""
    return cls(
      epoch=jnp.int32(-1),
      cursor=jnp.int32(examples),
      order=jnp.arange(examples, dtype=jnp.int32),
    )


class Epoch(flax.struct.PyTreeNode):
  """The stream of a dataset that does not lie on the device.

  Attributes:
    epoch: () int32, of the last draw; -1 before the first.
  """

  epoch: Array

  @classmethod
  def create(cls) -> 'Epoch':
    """The stream before its first draw."""
    return cls(epoch=jnp.int32(-1))


def pixel_keys(
  key: Array, step: Array, size: int, lane: Array, lanes: int
) -> Array:
  """A key for each example of this device's share of a draw.

  It depends on the example's place among all `size`, and so not on the number
  of devices.
  """
  share = size // lanes
  place = lane * share + jnp.arange(share)
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.fold_in(key, step), place
  )


def draw(
  stream: Stream,
  split: dict[str, Array],
  size: int,
  *,
  key: Array,
  step: Array,
  lane: Array,
  lanes: int,
  augment: augment_lib.Augmentation,
) -> tuple[Stream, dict[str, Array]]:
  """Draws the next `size` examples and returns this device's share of them.

  The order of an epoch depends on (key, epoch), the pixels of an example on
  (key, step, its place among the `size`): never on the number of devices. An
  epoch's last examples that do not fill a draw are left for another epoch.

  Args:
    stream: where the last draw ended.
    split: arrays with N rows: 'inputs' and 'label'.
    size: how many over all devices; static, at most N, divisible by `lanes`.
    key: the run's PRNG key.
    step: () int32.
    lane: () int32, which device this is, of `lanes`.
    lanes: the number of devices; static.
    augment: (key, image) -> image.

  Returns:
    The stream after the draw, and `{'inputs', 'label', 'index'}` with
    size / lanes rows; 'index' is the row in `split`.
  """
  order_key, pixel_key = jax.random.split(key)
  spent = stream.cursor + size > stream.order.shape[0]
  epoch = stream.epoch + spent
  cursor = jnp.where(spent, 0, stream.cursor)
  order = jax.lax.cond(
    spent,
    lambda: jax.random.permutation(
      jax.random.fold_in(order_key, epoch), stream.order.shape[0]
    ).astype(jnp.int32),
    lambda: stream.order,
  )
  share = size // lanes
  index = jax.lax.dynamic_slice_in_dim(order, cursor + lane * share, share)
  keys = pixel_keys(pixel_key, step, size, lane, lanes)
  pool = {
    'inputs': jax.vmap(augment)(keys, split['inputs'][index]),
    'label': split['label'][index],
    'index': index,
  }
  return Stream(epoch=epoch, cursor=cursor + size, order=order), pool


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Exact mean and standard deviation per channel of uint8 images, in [0, 1].

  From sums that float32 holds exactly: of 256 images, whose squares stay below
  2**24. A float copy of all images would be four times their size, and
  histograms took 30 times as long (1.8 s for CIFAR-10).
  """
  rows = images.reshape(len(images), -1)
  totals, squares = np.zeros((2, rows.shape[1]))
  for start in range(0, len(rows), 256):
    values = rows[start : start + 256].astype(np.float32)
    totals += values.sum(axis=0)
    squares += np.einsum('ij,ij->j', values, values)
  channels = images.shape[-1]
  count = images.size // channels
  mean, std = [], []
  for channel in range(channels):
    total = int(totals[channel::channels].sum())
    square = int(squares[channel::channels].sum())
    mean.append(total / (255 * count))
    # Of integers of any size, so that nothing cancels.
    std.append(np.sqrt((count * square - total**2) / count**2) / 255)
  return np.array(mean), np.array(std)


def subset(rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """round(fraction * N) of the rows, drawn by the seed, in their order."""
  count = round(fraction * len(rows))
  drawn = np.random.default_rng((seed, 0)).choice(
    len(rows), count, replace=False
  )
  return rows[np.sort(drawn)]


def label_shift(
  examples: int, share: float, num_classes: int, seed: int
) -> np.ndarray:
  """What to add to labels, modulo C, to make some of them wrong.

  Not 0 for round(share * N) of them, drawn by the seed; each wrong one is then
  uniform over the other classes.
  """
  rng = np.random.default_rng((seed, 1))
  count = round(share * examples)
  chosen = rng.choice(examples, count, replace=False)
  shift = np.zeros(examples, np.int32)
  shift[chosen] = rng.integers(1, num_classes, count)
  return shift


@dataclasses.dataclass(frozen=True)
class Source:
  """A dataset and the two functions the compiled step applies to its inputs.

  Attributes:
    name: of the dataset.
    num_classes: C.
    splits: 'train', 'test' and, unless it is empty, 'validation'.
    rows: for each split, which rows of the dataset's own training or test
      split, in the order in which it is loaded, these are.
    augment: (key, image) -> image, for one training example.
    prepare: batch of inputs as stored -> what the model reads.
    parts: of sentences, for each split its parts: width, and examples in it;
      see `parts.assign`.
    vocabulary: of sentences, how many different tokens there are.
    f1: whether F1 of class 1 is reported beside accuracy.
  """

  name: str
  num_classes: int
  splits: dict[str, Split]
  rows: dict[str, np.ndarray]
  augment: augment_lib.Augmentation
  prepare: Callable[[Any], Any]
  parts: dict[str, list[tuple[int, np.ndarray]]] | None = None
  vocabulary: int | None = None
  f1: bool = False

  resident = True

  @property
  def widths(self) -> tuple[int, ...]:
    """The widths of the parts of the training split; () of images."""
    parts = self.parts['train'] if self.parts else ()
    return tuple(width for width, _ in parts)

  def parted(self, name: str) -> list[Split]:
    """The parts of a split, each with 'row', its examples' places in it."""
    split = self.splits[name]
    rows = np.arange(len(split['label']), dtype=np.int32)
    if self.parts is None:
      return [{**split, 'row': rows}]
    return [
      {
        'inputs': split['inputs'][where, :width],
        'label': split['label'][where],
        'row': rows[where],
      }
      for width, where in self.parts[name]
    ]

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


def normalizer(
  images: np.ndarray, normalization: str
) -> Callable[[Array], Array]:
  """uint8 -> float32 with mean 0 and variance 1 per channel.

  Args:
    images: the training images, whose statistics 'dataset' uses.
    normalization: 'dataset', or 'imagenet' as in the authors' code.

  Raises:
    ValueError: 'imagenet' for images that are not RGB.
  """
  if normalization == 'imagenet':
    if images.shape[-1] != 3:
      raise ValueError(
        "data.normalization='imagenet' needs RGB images, these have "
        f"{images.shape[-1]} channel(s); use 'dataset'"
      )
    mean, std = IMAGENET_MEAN, IMAGENET_STD
  else:
    mean, std = statistics(images)
    std = np.where(std == 0, 1, std)  # a constant channel becomes all zeros
  scale = np.asarray(1 / (255 * np.asarray(std)), np.float32)
  shift = np.asarray(-np.asarray(mean) / np.asarray(std), np.float32)

  def prepare(inputs: Array) -> Array:
    shape = (1,) * (inputs.ndim - 1) + (-1,)
    return inputs.astype(jnp.float32) * scale.reshape(shape) + shift.reshape(
      shape
    )

  return prepare


def zero_pixel(prepare: Callable[[Array], Array], channels: int) -> np.ndarray:
  """(channels,) uint8: the pixel that is nearest to zero after `prepare`.

  Of a `normalizer` that is its mean, rounded: the mean pixel of the training
  split, or ImageNet's.
  """
  levels = np.arange(256, dtype=np.uint8)[:, None]
  levels = np.broadcast_to(levels, (256, channels))
  distances = np.abs(prepare(jnp.asarray(levels)))
  return np.argmin(distances, axis=0).astype(np.uint8)
