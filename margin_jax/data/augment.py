"""Augmentations: pure functions of one key and one uint8 image.

They are vmapped inside the compiled step, with one key for each example. So the
pixels of an example depend only on (seed, step, index in the pool).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from margin_jax.data import image_ops
from margin_jax.data.autoaugment import autoaugment

Augmentation = Callable[[Array, Array], Array]

# Of random_resized_crop: the area of the crop as a fraction of the image's, its
# width over its height, and how often a crop that does not fit is sampled anew.
AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
TRIES = 10


def example_keys(key: Array, step: Array, index: Array) -> Array:
  """Returns a key for each example of this device's shard of a sample.

  Args:
    key: the PRNG key of all augmentations.
    step: () int32.
    index: (n,) of the examples among all that the step samples, so that the
      number of devices does not matter.
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.fold_in(key, step), index
  )


def crop(key: Array, image: Array, padding: int) -> Array:
  """Cuts a crop of the image's size, uniform over the zero-padded image."""
  height, width, channels = image.shape
  padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
  return jax.lax.dynamic_slice(
    padded, (top, left, 0), (height, width, channels)
  )


def flip(key: Array, image: Array) -> Array:
  """Mirrors the image with probability one half."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cutout(
  key: Array, image: Array, size: int, fill: np.ndarray | int = 0
) -> Array:
  """Covers a square (DeVries & Taylor, 2017, arXiv:1708.04552).

  Its centre is uniform over the pixels of the image, at whose borders it is
  clipped. With an even side the centre is the first pixel of its second half.

  Args:
    key: PRNG key.
    image: (H, W, C) uint8.
    size: the side of the square.
    fill: (C,) or (), the value that covers. The paper's is zero after
      normalization: `normalization.zero_pixel`, the mean pixel, rounded.

  Returns:
    (H, W, C) uint8.
  """
  height, width, channels = image.shape
  row_key, column_key = jax.random.split(key)
  top = jax.random.randint(row_key, (), 0, height) - size // 2
  left = jax.random.randint(column_key, (), 0, width) - size // 2
  y = jnp.arange(height)[:, None, None] - top
  x = jnp.arange(width)[None, :, None] - left
  covered = (y >= 0) & (y < size) & (x >= 0) & (x < size)
  color = jnp.broadcast_to(jnp.asarray(fill, jnp.uint8), (1, 1, channels))
  return jnp.where(covered, color, image)


def sample_box(key: Array, height: int, width: int) -> Array:
  """Samples the box of `random_resized_crop`.

  Area and logarithm of the aspect ratio are uniform over `AREAS` and `RATIOS`;
  the first of `TRIES` crops that fits is taken. If none does, it is the
  largest one in the middle whose ratio is allowed.

  Args:
    key: PRNG key.
    height: H; static.
    width: W; static.

  Returns:
    (4,) int32: top, left, height, width.
  """
  area_key, ratio_key, place_key = jax.random.split(key, 3)
  fractions = jax.random.uniform(
    area_key, (TRIES,), minval=AREAS[0], maxval=AREAS[1]
  )
  low, high = np.log(RATIOS)
  ratios = jnp.exp(
    jax.random.uniform(ratio_key, (TRIES,), minval=low, maxval=high)
  )
  area = height * width * fractions
  heights = jnp.round(jnp.sqrt(area / ratios)).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(area * ratios)).astype(jnp.int32)
  fits = (heights >= 1) & (heights <= height)
  fits &= (widths >= 1) & (widths <= width)
  first, some = jnp.argmax(fits), jnp.any(fits)
  tall = min(height, round(width / RATIOS[0]))
  wide = min(width, round(height * RATIOS[1]))
  size = jnp.where(
    some, jnp.stack([heights[first], widths[first]]), jnp.array([tall, wide])
  )
  room = jnp.array([height, width]) - size
  place = jax.random.randint(place_key, (2,), 0, room + 1)
  return jnp.concatenate([jnp.where(some, place, room // 2), size])


def random_resized_crop(key: Array, image: Array) -> Array:
  """Resizes a crop of random area and aspect ratio to the image's size.

  The crop of Inception (Szegedy et al., 2015, arXiv:1409.4842), bilinear, from
  an image that is decoded already: see `sample_box` and `image_ops.resize_box`.
  """
  height, width, _ = image.shape
  return image_ops.resize_box(image, sample_box(key, height, width))


AUGMENTATIONS = (
  'crop',
  'flip',
  'cutout',
  'autoaugment',
  'random_resized_crop',
)


def compose(
  names: tuple[str, ...],
  crop_padding: int,
  cutout_size: int = 16,
  cutout_fill: np.ndarray | int = 0,
) -> Augmentation:
  """Composes augmentations, in order, to one function of (key, image).

  Args:
    names: of `AUGMENTATIONS`. The order of the AutoAugment paper is crop, flip,
      autoaugment, cutout; its released code begins with autoaugment.
    crop_padding: the padding of `crop`.
    cutout_size: the size of `cutout`.
    cutout_fill: the fill value of `cutout`.

  Returns:
    The function; every augmentation in it gets a key of its own.

  Raises:
    ValueError: a name is unknown.
  """
  table = {
    'crop': lambda key, image: crop(key, image, crop_padding),
    'flip': flip,
    'cutout': lambda key, image: cutout(key, image, cutout_size, cutout_fill),
    'autoaugment': autoaugment,
    'random_resized_crop': random_resized_crop,
  }
  for name in names:
    if name not in AUGMENTATIONS:
      raise ValueError(
        f'no augmentation is called {name!r}; there are {AUGMENTATIONS}'
      )
  functions = [table[name] for name in names]

  def augment(key: Array, image: Array) -> Array:
    keys = jax.random.split(key, max(len(functions), 1))
    for function, subkey in zip(functions, keys, strict=False):
      image = function(subkey, image)
    return image

  return augment
