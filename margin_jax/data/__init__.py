"""Datasets by name."""

from collections.abc import Callable

import numpy as np
from jax import Array

from margin_jax.data import (
  augment,
  autoaugment,
  digits,
  images,
  tfds_images,
)
from margin_jax.data.images import Source, Stream, draw
from margin_jax.data.tfds_images import DatasetError

__all__ = ['NAMES', 'DatasetError', 'Source', 'Stream', 'draw', 'load']

NAMES = ('digits', *tfds_images.NAMES)
NORMALIZATIONS = ('dataset', 'imagenet')


def _augmentation(
  names: tuple[str, ...],
  crop_padding: int,
  cutout_size: int,
  prepare: Callable[[Array], Array],
  channels: int,
) -> augment.Augmentation:
  """The augmentations of images that `prepare` normalises."""
  if 'autoaugment' in names:
    autoaugment.check_channels(channels)
  fill = images.zero_pixel(prepare, channels) if 'cutout' in names else 0
  return augment.compose(names, crop_padding, cutout_size, fill)


def load(
  name: str,
  *,
  data_dir: str | None = None,
  validation_examples: int = 0,
  augmentations: tuple[str, ...] = (),
  crop_padding: int = 4,
  cutout_size: int = 16,
  normalization: str = 'dataset',
  fraction: float = 1.0,
  label_noise: float = 0.0,
  seed: int = 0,
) -> Source:
  """Loads a dataset into host memory.

  Args:
    name: one of `NAMES`.
    data_dir: where TFDS has it prepared, or None for TFDS's own folder.
    validation_examples: how many of the last training examples, in the
      dataset's original order, are held out for validation.
    augmentations: names from `augment.AUGMENTATIONS`, applied in order.
    crop_padding: pixels of zeros around the image before a random crop.
    cutout_size: the side of the square that cutout covers.
    normalization: 'dataset' (statistics of the training split) or 'imagenet'.
    fraction: share of the training examples that are used, without those held
      out.
    label_noise: share of those whose labels are replaced by wrong ones.
    seed: decides which.

  Returns:
    The source, with splits 'train', 'test' and, if asked for, 'validation'.

  Raises:
    ValueError: the name is unknown, or an argument does not fit the data.
    DatasetError: the dataset is missing or broken.
  """
  if name not in NAMES:
    raise ValueError(f'data.name: no dataset is called {name!r}; try {NAMES}')
  if normalization not in NORMALIZATIONS:
    raise ValueError(
      f'data.normalization={normalization!r} must be one of {NORMALIZATIONS}'
    )
  if name == 'digits':
    train, test, num_classes = digits.load()
  else:
    train, test, num_classes = tfds_images.load(name, data_dir)
  examples = len(train['label'])
  if not 0 <= validation_examples < examples:
    raise ValueError(
      f'data.validation_examples={validation_examples} must be at least 0 and '
      f'leave something to train on: {name!r} has {examples} training examples'
    )
  cut = examples - validation_examples
  kept = images.subset(np.arange(cut), fraction, seed)
  if not kept.size:
    raise ValueError(
      f'data.fraction={fraction} must leave something to train on: it is of '
      f'{cut} training examples'
    )
  rows = {
    'train': kept,
    'validation': np.arange(cut, examples),
    'test': np.arange(len(test['label'])),
  }
  splits = {
    'train': {key: value[kept] for key, value in train.items()},
    'validation': {key: value[cut:] for key, value in train.items()},
    'test': test,
  }
  splits['train']['label'] = images.corrupt(
    splits['train']['label'], label_noise, num_classes, seed
  )
  prepare = images.normalizer(splits['train']['inputs'], normalization)
  if not validation_examples:
    del splits['validation'], rows['validation']
  return Source(
    name=name,
    num_classes=num_classes,
    splits=splits,
    rows=rows,
    augment=_augmentation(
      tuple(augmentations),
      crop_padding,
      cutout_size,
      prepare,
      train['inputs'].shape[-1],
    ),
    prepare=prepare,
  )
