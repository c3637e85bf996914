"""Augmentations: pure functions of one key and one uint8 image.

Vmapped with one key an example, inside the compiled step, so that the pixels
of an example depend on (seed, step, place in the pool) and on nothing else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Augmentation = Callable[[Array, Array], Array]


def crop(key: Array, image: Array, padding: int) -> Array:
  """A crop of the image's own size, uniform over the zero-padded image."""
  height, width, channels = image.shape
  padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
  return jax.lax.dynamic_slice(
    padded, (top, left, 0), (height, width, channels)
  )


def flip(key: Array, image: Array) -> Array:
  """The image or, with probability one half, its mirror image."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


AUGMENTATIONS = ('crop', 'flip')


def compose(names: tuple[str, ...], crop_padding: int) -> Augmentation:
  """The named augmentations in order, as one function of (key, image)."""
  table = {
    'crop': lambda key, image: crop(key, image, crop_padding),
    'flip': flip,
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
