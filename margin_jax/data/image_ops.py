"""Image operations that give the same pixels as Pillow's.

They are pure functions of one uint8 image (H, W, C), made for `jax.vmap`. Each
costs about one pass over the pixels, whether or not its result is used.
Integers are exact. Where Pillow works in floating point, its roundings are
looked up in tables made with NumPy, because a compiled multiply-add rounds
once, not twice, and differently on every device.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Pillow's affine transforms are in 16.16 fixed point.
FRACTION_BITS = 16


def fixed_point(matrix: np.ndarray) -> np.ndarray:
  """Returns the coefficients that `affine` takes, of a matrix in pixels.

  Args:
    matrix: (..., 6) a, b, c, d, e, f: the pixel whose centre is (x, y) comes
      from (a x + b y + c, d x + e y + f), as in `PIL.Image.transform`.

  Returns:
    (..., 6) int32, offset to the centre of the first pixel.
  """
  matrix = np.array(matrix, np.float64)
  matrix[..., 2] += (matrix[..., 0] + matrix[..., 1]) / 2
  matrix[..., 5] += (matrix[..., 3] + matrix[..., 4]) / 2
  return np.floor(matrix * 2**FRACTION_BITS + 0.5).astype(np.int32)


def rotation(degrees: float, height: int, width: int) -> np.ndarray:
  """Returns the (6,) matrix of a counterclockwise rotation about the centre."""
  angle = -math.radians(degrees)
  cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
  x, y = width / 2, height / 2
  return np.array(
    [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
  )


def affine(image: Array, coefficients: Array, fill: int) -> Array:
  """Transforms affinely, nearest pixel, as `PIL.Image.transform`.

  One gather does every geometric operation.

  Args:
    image: (H, W, C) uint8.
    coefficients: (6,) int32, of `fixed_point`.
    fill: the value of pixels that come from outside of the image.

  Returns:
    (H, W, C) uint8.
  """
  height, width, channels = image.shape
  y = jnp.arange(height)[:, None]
  x = jnp.arange(width)[None, :]
  a, b, c, d, e, f = coefficients
  column = (a * x + b * y + c) >> FRACTION_BITS
  row = (d * x + e * y + f) >> FRACTION_BITS
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  index = jnp.where(inside, row * width + column, 0)
  pixels = image.reshape(-1, channels)[index]
  return jnp.where(inside[..., None], pixels, jnp.uint8(fill))


def histograms(image: Array) -> Array:
  """Counts the pixels of each value in each channel, (C, 256) int32."""
  channels = image.shape[-1]
  channel = jnp.broadcast_to(jnp.arange(channels), image.shape)
  # Indices other than those of `lookup`: XLA:CPU would store what both share,
  # and an operation of AutoAugment would take three times as long.
  entries = (256 * channel + image).reshape(-1)
  counts = jnp.zeros(channels * 256, jnp.int32).at[entries].add(1)
  return counts.reshape(channels, 256)


def lookup(image: Array, tables: Array) -> Array:
  """Replaces value v of channel c by tables[c, v]; tables (C, 256) uint8."""
  channel = jnp.broadcast_to(jnp.arange(image.shape[-1]), image.shape)
  return tables[channel, image]


def _highest(counts: Array) -> Array:
  """Returns the largest value that occurs, (C, 1)."""
  return 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)


def _tables(numerators: Array, denominators: Array, usable: Array) -> Array:
  """Returns (C, 256) uint8: whole parts up to 255, or the identity."""
  denominators = jnp.where(usable, denominators, 1)
  values = jnp.broadcast_to(jnp.arange(256), numerators.shape)
  numerators = jnp.where(usable, numerators, values)
  # Nothing is negative, so that `//` would be twice the work.
  whole = jax.lax.div(
    numerators, jnp.broadcast_to(denominators, numerators.shape)
  )
  return jnp.minimum(whole, 255).astype(jnp.uint8)


def auto_contrast_tables(counts: Array) -> Array:
  """Stretches every channel to 0..255, as `PIL.ImageOps.autocontrast`.

  Pillow scales in double precision and truncates: where the exact result is a
  whole number it is now and then one grey level below this.

  Args:
    counts: (C, 256), the `histograms` of the image.

  Returns:
    (C, 256) uint8, for `lookup`; a constant channel stays as it is.
  """
  low = jnp.argmax(counts > 0, axis=1, keepdims=True)
  extent = _highest(counts) - low
  above = jnp.maximum(jnp.arange(256)[None] - low, 0)
  return _tables(255 * above, extent, extent > 0)


def equalize_tables(counts: Array) -> Array:
  """Flattens the histogram of every channel, as `PIL.ImageOps.equalize`.

  Args:
    counts: (C, 256), the `histograms` of the image.

  Returns:
    (C, 256) uint8, for `lookup`; a channel that has almost one value only
    stays as it is.
  """
  last = jnp.take_along_axis(counts, _highest(counts), axis=1)
  step = (jnp.sum(counts, axis=1, keepdims=True) - last) // 255
  below = jnp.cumsum(counts, axis=1) - counts
  return _tables(step // 2 + below, step, step > 0)


def luminance(image: Array) -> Array:
  """Returns the grey levels of an RGB image, (H, W, 1), as `convert('L')`."""
  red, green, blue = jnp.split(image.astype(jnp.int32), 3, axis=-1)
  grey = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
  return grey.astype(jnp.uint8)


def mean_luminance(image: Array) -> Array:
  """Returns the mean grey level of an RGB image, (1, 1, 1), rounded."""
  grey = luminance(image)
  total = jnp.sum(grey, keepdims=True, dtype=jnp.int32)
  return ((2 * total + grey.size) // (2 * grey.size)).astype(jnp.uint8)


def smooth(image: Array) -> Array:
  """Smooths as `PIL.ImageFilter.SMOOTH`, which keeps the border."""
  height, width, _ = image.shape
  values = image.astype(jnp.int32)
  padded = jnp.pad(values, ((1, 1), (1, 1), (0, 0)))
  total = 4 * values + sum(
    padded[i : i + height, j : j + width] for i in range(3) for j in range(3)
  )
  y = jnp.arange(height)[:, None, None]
  x = jnp.arange(width)[None, :, None]
  inner = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
  return jnp.where(inner, (2 * total + 13) // 26, values).astype(jnp.uint8)


@functools.cache
def _products(factors: tuple[float, ...]) -> np.ndarray:
  """Returns each factor times -255..255, (factors, 511) float32."""
  differences = np.arange(-255, 256, dtype=np.float32)
  return np.float32(factors)[:, None] * differences


def blend(
  start: Array, image: Array, factors: tuple[float, ...], index: Array
) -> Array:
  """Returns start + factor (image - start), as `PIL.Image.blend` of uint8.

  Args:
    start: (H, W, C) uint8, the values that a factor of 0 gives.
    image: (H, W, C) uint8, the values that a factor of 1 gives.
    factors: the factors there are; static.
    index: () which one it is.

  Returns:
    (H, W, C) uint8.
  """
  products = jnp.asarray(_products(factors))[index]
  difference = image.astype(jnp.int32) - start.astype(jnp.int32)
  mixed = start.astype(jnp.float32) + products[difference + 255]
  return jnp.clip(mixed, 0, 255).astype(jnp.uint8)


def resize_box(image: Array, box: Array) -> Array:
  """Resizes a box of an image to the image's size, as `PIL.Image.resize`.

  Bilinear. A box is never larger than the image, so that nothing is
  downsampled and antialiasing has nothing to do. As in Pillow, the pixels at
  the border of the box mix with those beyond it, rows are resized before
  columns, and values are rounded after each.

  Args:
    image: (H, W, C) uint8.
    box: (4,) int32: top, left, height, width.

  Returns:
    (H, W, C) uint8.
  """
  start, extent = box[:2], box[2:].astype(jnp.float32)
  for axis in (1, 0):
    scale = image.shape[axis] / extent[axis]
    resized = jax.image.scale_and_translate(
      image.astype(jnp.float32),
      image.shape,
      (axis,),
      scale[None],
      (-start[axis] * scale)[None],
      'bilinear',
      antialias=False,
    )
    image = jnp.clip(jnp.floor(resized + 0.5), 0, 255).astype(jnp.uint8)
  return image
