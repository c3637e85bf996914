"""Image classification datasets of TFDS, read without TensorFlow."""

import contextlib
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator

import numpy as np
from absl import logging

from margin_jax import files
from margin_jax.data import cache, images
from margin_jax.data.dataset import DatasetError, Split

# Those that nobody need ask TFDS about, which takes seconds to import.
NAMES = ('cifar10', 'cifar100', 'mnist', 'fashion_mnist', 'svhn_cropped')
# Of these, records have ids that tell the original order.
_WITH_IDS = ('cifar10', 'cifar100')
_SPLITS = ('train', 'test')


def is_known(name: str, data_dir: str | None) -> bool:
  """Returns whether TFDS can make such a dataset, or it is prepared."""
  if any(_folder(name, data_dir).glob('*/dataset_info.json')):
    return True
  import tensorflow_datasets as tfds

  names = tfds.list_builders(with_community_datasets=False)
  return name.partition('/')[0] in names


def class_names(
  name: str, data_dir: str | None, num_classes: int
) -> tuple[str, ...] | None:
  """Returns what TFDS calls the classes of a prepared dataset, if it does.

  Args:
    name: the name of any dataset of TFDS, `glue/rte` too.
    data_dir: as `load` takes it.
    num_classes: C.

  Raises:
    DatasetError: there are not C of them, or they cannot be read.
  """
  found = sorted(_folder(name, data_dir).glob('*/label.labels.txt'))
  if not found:
    return None
  try:
    lines = found[-1].read_text(encoding='utf-8').splitlines()
  except (OSError, ValueError) as error:
    raise DatasetError(f'{found[-1]} cannot be read: {error}') from error
  names = [line.strip() for line in lines if line.strip()]  # as TFDS reads it
  if len(names) != num_classes:
    raise DatasetError(
      f'{found[-1]} has {len(names)} names: it must have {num_classes}, one '
      'on each line'
    )
  return tuple(names)


def _folder(name: str, data_dir: str | None) -> pathlib.Path:
  """Returns the folder of the versions of a dataset."""
  default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')  # TFDS's
  return pathlib.Path(os.path.expanduser(data_dir or default), name)


def open_builder(name: str, data_dir: str | None):
  """Returns the builder of a prepared dataset, and what prepares it."""
  # Imported here: it takes a second, and the default dataset needs none of it.
  import tensorflow_datasets as tfds

  folder = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
  command = (
    f'{os.path.basename(sys.executable)} -m margin_jax.prepare {name} '
    f'--data_dir={shlex.quote(folder)}'
  )
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # of what our own message is about
  try:
    builder = tfds.builder(name, data_dir=folder, file_format='array_record')
  except ValueError as error:  # prepared, in another format
    raise DatasetError(
      f'dataset {name!r} in {folder} is not in the array_record format, the '
      f'only one that can be read without TensorFlow ({error}). Remove it and '
      f'prepare it again with: {command}'
    ) from error
  except Exception as error:
    raise DatasetError(
      f'dataset {name!r} in {folder} is broken ({error}). Remove it and '
      f'prepare it again with: {command}'
    ) from error
  finally:
    logging.set_verbosity(verbosity)
  if not builder.is_prepared():
    raise DatasetError(
      f'dataset {name!r} is not prepared: looked in {builder.data_path}. '
      f'Prepare it (once; this needs a network and tensorflow-cpu) with: '
      f'{command}'
      f' -- or name the folder that holds it with --config.data.data_dir'
    )
  return builder, command


@contextlib.contextmanager
def explained(name: str, builder, command: str) -> Iterator[None]:
  """Makes every error inside a DatasetError that says what to do."""
  try:
    yield
  except DatasetError:
    raise
  except Exception as error:  # array_record and Pillow raise many kinds
    raise DatasetError(
      f'dataset {name!r} in {builder.data_path} is broken ({error}). Remove it '
      f'and prepare it again with: {command}'
    ) from error


def check_features(builder) -> None:
  """Raises a DatasetError unless examples are an image and its class."""
  import tensorflow_datasets as tfds

  features = builder.info.features
  try:
    image, label = features['image'], features['label']
    holds = (
      isinstance(image, tfds.features.Image)
      and image.np_dtype == np.uint8
      and isinstance(label, tfds.features.ClassLabel)
    )
  except (KeyError, TypeError):
    holds = False
  if not holds:
    raise DatasetError(
      f'dataset {builder.name!r} of TFDS must have images with one class each, '
      f"'image' and 'label': it has {sorted(features)}"
    )


def split_names(builder) -> dict[str, str]:
  """Returns what TFDS calls each of our splits.

  'test' is the test split, or 'validation' where there is none; with both,
  'validation' is our validation split. With neither, the last fifth of the
  training examples, as they are stored, is the test split.
  """
  theirs = [x for x in ('test', 'validation') if x in builder.info.splits]
  if 'train' not in builder.info.splits:
    raise DatasetError(
      f"dataset {builder.name!r} of TFDS has no split 'train': it has "
      f'{[*builder.info.splits]}'
    )
  if not theirs:
    return {'train': 'train[:80%]', 'test': 'train[80%:]'}
  names = dict(zip(('test', 'validation'), theirs, strict=False))
  return {'train': 'train', **names}


def _decode(builder, split: str) -> Split:
  """Decodes all images and labels of a split, in the order of their ids."""
  source = builder.as_data_source(split=split)
  classes = builder.info.features['label'].num_classes
  shape = builder.info.features['image'].shape
  images.check_memory(len(source) * int(np.prod(shape)))
  inputs = np.empty((len(source), *shape), np.uint8)
  label = np.empty(len(source), np.int32)
  numbers = []
  for start in range(0, len(source), 1000):
    rows = range(start, min(start + 1000, len(source)))
    for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
      inputs[row], label[row] = record['image'], record['label']
      if builder.name in _WITH_IDS:
        numbers.append(int(record['id'].decode().rsplit('_', 1)[1]))
  _check_labels(builder, split, label, classes)
  split = {'inputs': inputs, 'label': label}
  if numbers:
    order = np.argsort(numbers, kind='stable')
    split = {key: value[order] for key, value in split.items()}
  return split


def _check_labels(builder, split: str, label: np.ndarray, classes: int) -> None:
  if label.size and not (label.min() >= 0 and label.max() < classes):
    raise DatasetError(
      f'dataset {builder.name!r}, split {split!r}: labels run from '
      f'{label.min()} to {label.max()}, outside [0, {classes})'
    )


def _cached(builder, split: str, side: int | None) -> Split:
  """Returns the decoded split; CIFAR-10 takes ten seconds without the cache.

  Args:
    builder: the builder of the dataset.
    split: as TFDS calls it.
    side: that images are resized to; None leaves them as they are.
  """
  info = builder.info.splits[split]
  size = '' if side is None else f'-{side}'
  name = f'{builder.info.full_name}-{split}{size}'

  def decode() -> Split:
    if side is None:
      return _decode(builder, split)
    decoded = images.resize_all(_records(builder, split), side)
    classes = builder.info.features['label'].num_classes
    _check_labels(builder, split, decoded['label'], classes)
    return decoded

  return cache.cached(
    re.sub(r'[/:\[\]%]+', '-', name),
    info.filepaths,
    info.num_examples,
    decode,
  )


def _records(builder, split: str):
  """Returns a random-access dataset of `{'image': bytes, 'label': int}`."""
  import tensorflow_datasets as tfds

  skip = {'image': tfds.decode.SkipDecoding()}
  return builder.as_data_source(split=split, decoders=skip)


def _stored(
  name: str, data_dir: str | None
) -> tuple[dict[str, Split], int] | None:
  """Returns what `load` does, if all is cached, without importing TFDS.

  Which takes longer than reading the cache. Of a folder that is not just as
  expected nothing is said here: TFDS opens it, and explains.
  """
  folder = _folder(name, data_dir)
  try:
    (version,) = (path.parent for path in folder.glob('*/dataset_info.json'))
    info = files.read_json(version / 'dataset_info.json', {}, '')
    lengths = {x['name']: x['shardLengths'] for x in info['splits']}
    splits = {
      split: cache.stored(
        f'{name}-{version.name}-{split}',
        [*version.glob(f'{name}-{split}.{info["fileFormat"]}-*')],
        sum(int(length) for length in lengths[split]),
      )
      for split in _SPLITS
    }
    features = files.read_json(version / 'features.json', {}, '')
    label = features['featuresDict']['features']['label']['classLabel']
    num_classes = int(label['numClasses'])
  except (OSError, ValueError, LookupError, TypeError):
    return None
  return None if None in splits.values() else (splits, num_classes)


def load(
  name: str, data_dir: str | None, side: int
) -> tuple[dict[str, Split], int]:
  """Decodes the splits, once: see `cache`.

  TFDS stores CIFAR shuffled; the images come back in the order of their ids,
  which is the original one, so that "the last 5,000 training images" means
  what the papers mean by it.

  Args:
    name: name of a dataset of TFDS whose examples are an image and its class.
    data_dir: the folder that TFDS prepares datasets in, or None for its own.
    side: that images are resized to where they have no common size: see
      `images.resize`.

  Returns:
    The splits of `split_names`, and the number of classes.

  Raises:
    DatasetError: the dataset is not there (the message holds the command that
      prepares it), is in another format, is not of images, or has labels out
      of range.
  """
  if name in NAMES:
    found = _stored(name, data_dir)
    if found is not None:
      return found
  builder, command = open_builder(name, data_dir)
  with explained(name, builder, command):
    check_features(builder)
    any_size = None in builder.info.features['image'].shape
    splits = {
      ours: _cached(builder, theirs, side if any_size else None)
      for ours, theirs in split_names(builder).items()
    }
  return splits, builder.info.features['label'].num_classes


def source(name: str, data_dir: str | None) -> images.Source:
  """Opens a dataset whose images are read while training.

  Arguments and errors are those of `load`.
  """
  builder, command = open_builder(name, data_dir)
  with explained(name, builder, command):
    check_features(builder)
    records = {
      ours: _records(builder, theirs)
      for ours, theirs in split_names(builder).items()
    }
    for split in records.values():
      split[0]
  classes = builder.info.features['label'].num_classes
  return images.Source(records, classes, class_names(name, data_dir, classes))
