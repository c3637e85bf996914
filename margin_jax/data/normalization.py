"""Turns pixels into what networks read: normalized by channel, or in [0, 1]."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

NORMALIZATIONS = ('dataset', 'imagenet', 'unit')

# Over [0, 1], the statistics that networks trained on ImageNet expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the exact mean and deviation of each channel, in [0, 1].

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


@dataclasses.dataclass(frozen=True, eq=False)
class Normalizer:
  """Makes pixels float32: `pixels * scale + shift`.

  Attributes:
    scale, shift: (channels,) float32.
  """

  scale: np.ndarray
  shift: np.ndarray

  def __call__(self, inputs: Array) -> Array:
    shape = (1,) * (inputs.ndim - 1) + (-1,)
    scale, shift = self.scale.reshape(shape), self.shift.reshape(shape)
    return inputs.astype(jnp.float32) * scale + shift


def normalizer(images: np.ndarray, normalization: str) -> Normalizer:
  """Returns uint8 -> float32: mean 0 and variance 1 per channel, or [0, 1].

  Args:
    images: the training images, whose statistics 'dataset' uses.
    normalization: 'dataset', 'imagenet' as in the authors' code, or 'unit':
      divided by 255, so that distances at the input are in units of pixels, as
      the epsilon of an attack is.

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
  elif normalization == 'unit':
    mean, std = np.zeros(images.shape[-1]), np.ones(images.shape[-1])
  else:
    mean, std = statistics(images)
    std = np.where(std == 0, 1, std)  # a constant channel becomes all zeros
  return Normalizer(
    np.asarray(1 / (255 * np.asarray(std)), np.float32),
    np.asarray(-np.asarray(mean) / np.asarray(std), np.float32),
  )


def zero_pixel(prepare: Callable[[Array], Array], channels: int) -> np.ndarray:
  """Returns the (channels,) pixel that is nearest to zero after `prepare`.

  Of a `normalizer` that is its mean, rounded: the mean pixel of the training
  split, or ImageNet's.
  """
  levels = np.arange(256, dtype=np.uint8)[:, None]
  levels = np.broadcast_to(levels, (256, channels))
  distances = np.abs(prepare(jnp.asarray(levels)))
  return np.argmin(distances, axis=0).astype(np.uint8)
