"""AutoAugment (Cubuk et al., 2019, arXiv:1805.09501): the CIFAR-10 policy.

Under `jax.vmap` a switch computes every branch. So the fourteen operations
share three stages, each of which is one pass that may do nothing: a gather
(shears, translations, rotation), a lookup table (auto-contrast, invert,
equalize, solarize, posterize) and a blend (contrast, color, brightness,
sharpness).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from margin_jax.data import image_ops

OPERATIONS = (
  'shear_x',
  'shear_y',
  'translate_x',
  'translate_y',
  'rotate',
  'auto_contrast',
  'invert',
  'equalize',
  'solarize',
  'posterize',
  'contrast',
  'color',
  'brightness',
  'sharpness',
)
# The index of the operation that does nothing.
IDENTITY = len(OPERATIONS)

# The sub-policies of the paper's table: operation, probability, magnitude.
POLICY = (
  (('invert', 0.1, 7), ('contrast', 0.2, 6)),
  (('rotate', 0.7, 2), ('translate_x', 0.3, 9)),
  (('sharpness', 0.8, 1), ('sharpness', 0.9, 3)),
  (('shear_y', 0.5, 8), ('translate_y', 0.7, 9)),
  (('auto_contrast', 0.5, 8), ('equalize', 0.9, 2)),
  (('shear_y', 0.2, 7), ('posterize', 0.3, 7)),
  (('color', 0.4, 3), ('brightness', 0.6, 7)),
  (('sharpness', 0.3, 9), ('brightness', 0.7, 9)),
  (('equalize', 0.6, 5), ('equalize', 0.5, 1)),
  (('contrast', 0.6, 7), ('sharpness', 0.6, 5)),
  (('color', 0.7, 7), ('translate_x', 0.5, 8)),
  (('equalize', 0.3, 7), ('auto_contrast', 0.4, 8)),
  (('translate_y', 0.4, 3), ('sharpness', 0.2, 6)),
  (('brightness', 0.9, 6), ('color', 0.2, 8)),
  (('solarize', 0.5, 2), ('invert', 0.0, 3)),
  (('equalize', 0.2, 0), ('auto_contrast', 0.6, 0)),
  (('equalize', 0.2, 8), ('equalize', 0.6, 4)),
  (('color', 0.9, 9), ('equalize', 0.6, 6)),
  (('auto_contrast', 0.8, 4), ('solarize', 0.2, 8)),
  (('brightness', 0.1, 3), ('color', 0.7, 0)),
  (('solarize', 0.4, 5), ('auto_contrast', 0.9, 3)),
  (('translate_y', 0.9, 9), ('translate_y', 0.7, 9)),
  (('auto_contrast', 0.9, 2), ('solarize', 0.8, 3)),
  (('equalize', 0.8, 8), ('invert', 0.1, 3)),
  (('translate_y', 0.7, 9), ('auto_contrast', 0.9, 1)),
)

# The ten magnitudes are spread evenly over the ranges of the paper's table of
# operations, both ends included. The released CIFAR code differs from the
# table: it divides by 10, not 9, moves by at most 9 pixels, and leaves 4 to
# 1 bits. Translations are fractions of the side: the table's 150 pixels are of
# images of 331.
MAGNITUDES = 10
SHEARS = np.linspace(0, 0.3, MAGNITUDES)
TRANSLATIONS = np.linspace(0, 150 / 331, MAGNITUDES)
ROTATIONS = np.linspace(0, 30, MAGNITUDES)
# From this value on, solarize inverts.
THRESHOLDS = np.ceil(np.linspace(256, 0, MAGNITUDES)).astype(np.int32)
POSTERIZE_BITS = np.round(np.linspace(8, 4, MAGNITUDES)).astype(np.int32)
FACTORS = tuple(float(x) for x in np.linspace(0.1, 1.9, MAGNITUDES))
# What geometric operations draw in from outside: as usual reimplementations
# have it. The released CIFAR code has the mean pixel there.
FILL = 128

_INDEX = {name: i for i, name in enumerate(OPERATIONS)}
_OPERATIONS = np.array([[_INDEX[x[0]] for x in pair] for pair in POLICY])
_PROBABILITIES = np.array([[x[1] for x in pair] for pair in POLICY], np.float32)
_LEVELS = np.array([[x[2] for x in pair] for pair in POLICY])


class Sample(NamedTuple):
  """What chance decides about one image.

  Attributes:
    sub_policy: () int32, row of `POLICY`.
    applied: (2,) bool, which of its two operations are done.
    negated: (2,) bool, whether a geometric one goes the other way.
  """

  sub_policy: Array
  applied: Array
  negated: Array


def sample(key: Array) -> Sample:
  """Samples a sub-policy, its operations by their probabilities, and signs."""
  policy_key, applied_key, negated_key = jax.random.split(key, 3)
  sub_policy = jax.random.randint(policy_key, (), 0, len(POLICY))
  probabilities = jnp.asarray(_PROBABILITIES)[sub_policy]
  return Sample(
    sub_policy=sub_policy,
    applied=jax.random.uniform(applied_key, (2,)) < probabilities,
    negated=jax.random.bernoulli(negated_key, shape=(2,)),
  )


def matrix(
  name: str, level: int, negated: bool, height: int, width: int
) -> np.ndarray:
  """Returns the (6,) affine matrix of an operation, or the identity.

  Shears keep the upper left corner where it is, as in the authors' code.
  """
  sign = -1 if negated else 1
  if name == 'rotate':
    return image_ops.rotation(sign * ROTATIONS[level], height, width)
  entries = {
    'shear_x': (1, SHEARS[level]),
    'shear_y': (3, SHEARS[level]),
    'translate_x': (2, int(TRANSLATIONS[level] * width)),
    'translate_y': (5, int(TRANSLATIONS[level] * height)),
  }
  found = np.array([1.0, 0, 0, 0, 1, 0])
  if name in entries:
    place, value = entries[name]
    found[place] = sign * value
  return found


@functools.cache
def _coefficients(height: int, width: int) -> np.ndarray:
  """Returns (operations, magnitudes, 2, 6) int32, for all of `sample`."""
  return image_ops.fixed_point(
    [
      [
        [matrix(name, level, negated, height, width) for negated in (0, 1)]
        for level in range(MAGNITUDES)
      ]
      for name in (*OPERATIONS, 'identity')
    ]
  )


def _choose(
  default: Array, arrays: dict[str, Array], operation: Array
) -> Array:
  """Returns the array of the operation, or the default if it has none.

  A gather, not a chain of `where`: XLA would fuse that into all that reads the
  result, and compute every array again for each read.
  """
  row = sum(
    (i + 1) * (operation == _INDEX[name]) for i, name in enumerate(arrays)
  )
  arrays = [jnp.broadcast_to(x, default.shape) for x in arrays.values()]
  return jnp.stack([default, *arrays])[row]


def _tables(image: Array, operation: Array, level: Array) -> Array:
  """Returns the (C, 256) uint8 lookup tables of an operation."""
  counts = image_ops.histograms(image)
  threshold = jnp.where(operation == _INDEX['invert'], 0, 256)
  threshold = jnp.where(
    operation == _INDEX['solarize'], jnp.asarray(THRESHOLDS)[level], threshold
  )
  dropped = jnp.where(
    operation == _INDEX['posterize'], 8 - jnp.asarray(POSTERIZE_BITS)[level], 0
  )
  values = jnp.arange(256)
  values = jnp.where(values < threshold, values, 255 - values)
  values = (values >> dropped) << dropped
  fixed = jnp.broadcast_to(values.astype(jnp.uint8), counts.shape)
  adaptive = {
    'auto_contrast': image_ops.auto_contrast_tables(counts),
    'equalize': image_ops.equalize_tables(counts),
  }
  return _choose(fixed, adaptive, operation)


def _enhance(image: Array, operation: Array, level: Array) -> Array:
  """Changes contrast, color, brightness or sharpness, or nothing."""
  start = _choose(
    jnp.zeros_like(image),  # brightness
    {
      'contrast': image_ops.mean_luminance(image),
      'color': image_ops.luminance(image),
      'sharpness': image_ops.smooth(image),
    },
    operation,
  )
  enhances = (operation >= _INDEX['contrast']) & (operation != IDENTITY)
  factor = jnp.where(enhances, level, MAGNITUDES)
  return image_ops.blend(start, image, (*FACTORS, 1.0), factor)


def operate(
  image: Array, operation: Array, level: Array, negated: Array
) -> Array:
  """Does one operation, whose number may be traced.

  Args:
    image: (H, W, 3) uint8.
    operation: () int, index in `OPERATIONS`, or `IDENTITY`.
    level: () int, the magnitude, 0 to 9; ignored by operations without one.
    negated: () bool, whether a shear, translation or rotation goes the other
      way; ignored by the others.

  Returns:
    (H, W, 3) uint8.
  """
  height, width, _ = image.shape
  coefficients = jnp.asarray(_coefficients(height, width))
  coefficients = coefficients[operation, level, negated.astype(jnp.int32)]
  image = image_ops.affine(image, coefficients, FILL)
  image = image_ops.lookup(image, _tables(image, operation, level))
  return _enhance(image, operation, level)


def apply(image: Array, sampled: Sample) -> Array:
  """Does the two operations of a sample."""
  for i in range(2):
    operation = jnp.asarray(_OPERATIONS)[sampled.sub_policy, i]
    image = operate(
      image,
      jnp.where(sampled.applied[i], operation, IDENTITY),
      jnp.asarray(_LEVELS)[sampled.sub_policy, i],
      sampled.negated[i],
    )
  return image


def autoaugment(key: Array, image: Array) -> Array:
  """Does a random sub-policy of the CIFAR-10 policy (Cubuk et al., 2019).

  The pixels are those of Pillow's operations, but for single grey levels of
  auto-contrast (see `image_ops.auto_contrast_tables`).

  Args:
    key: PRNG key.
    image: (H, W, 3) uint8.

  Returns:
    (H, W, 3) uint8.

  Raises:
    ValueError: the image is not RGB.
  """
  check_channels(image.shape[-1])
  return apply(image, sample(key))


def check_channels(channels: int) -> None:
  """Raises a ValueError unless images of so many channels are RGB."""
  if channels != 3:
    raise ValueError(
      "data.augmentations: 'autoaugment' needs RGB images, these have "
      f'{channels} channel(s); leave it out'
    )
