"""Image classification datasets of TFDS, read without TensorFlow."""

import contextlib
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator

import numpy as np
from absl import logging

from margin_jax import files
from margin_jax.data import cache
from margin_jax.data.dataset import DatasetError, Split

CLASSES = {'cifar10': 10, 'cifar100': 100, 'mnist': 10, 'svhn_cropped': 10}
NAMES = tuple(CLASSES)
SPLITS = ('train', 'test')


def class_names(name: str, data_dir: str | None) -> tuple[str, ...] | None:
  """Returns what TFDS calls the classes of a prepared dataset, if it does.

  Args:
    name: of any dataset of TFDS, `glue/rte` too.
    data_dir: as `load` takes it.
  """
  found = sorted(_folder(name, data_dir).glob('*/label.labels.txt'))
  if not found:
    return None
  return tuple(found[-1].read_text(encoding='utf-8').splitlines())


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
      f'Prepare it (once, needs the network and tensorflow-cpu) with: '
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


def _decode(builder, split: str) -> Split:
  """Decodes all images and labels of a split, in the order of their ids."""
  source = builder.as_data_source(split=split)
  classes = CLASSES[builder.name]
  shape = builder.info.features['image'].shape
  inputs = np.empty((len(source), *shape), np.uint8)
  label = np.empty(len(source), np.int32)
  numbers = []
  for start in range(0, len(source), 1000):
    rows = range(start, min(start + 1000, len(source)))
    for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
      inputs[row], label[row] = record['image'], record['label']
      if 'id' in record:
        numbers.append(int(record['id'].decode().rsplit('_', 1)[1]))
  if label.size and not (label.min() >= 0 and label.max() < classes):
    raise DatasetError(
      f'dataset {builder.name!r}, split {split!r}: labels run from '
      f'{label.min()} to {label.max()}, outside [0, {classes})'
    )
  split = {'inputs': inputs, 'label': label}
  if numbers:
    order = np.argsort(numbers, kind='stable')
    split = {key: value[order] for key, value in split.items()}
  return split


def _cached(builder, split: str) -> Split:
  """Returns the decoded split; CIFAR-10 takes ten seconds without the cache."""
  info = builder.info.splits[split]
  return cache.cached(
    f'{builder.name}-{builder.version}-{split}',
    info.filepaths,
    info.num_examples,
    lambda: _decode(builder, split),
  )


def _stored(name: str, data_dir: str | None) -> tuple[Split, Split, int] | None:
  """Returns what `load` does, if all is cached, without importing TFDS.

  Which takes longer than reading the cache. Of a folder that is not just as
  expected nothing is said here: TFDS opens it, and explains.
  """
  folder = _folder(name, data_dir)
  try:
    (version,) = (path.parent for path in folder.glob('*/dataset_info.json'))
    info = files.read_json(version / 'dataset_info.json', {}, '')
    lengths = {x['name']: x['shardLengths'] for x in info['splits']}
    splits = [
      cache.stored(
        f'{name}-{version.name}-{split}',
        [*version.glob(f'{name}-{split}.{info["fileFormat"]}-*')],
        sum(int(length) for length in lengths[split]),
      )
      for split in SPLITS
    ]
  except (OSError, ValueError, LookupError, TypeError):
    return None
  return None if None in splits else (*splits, CLASSES[name])


def load(name: str, data_dir: str | None) -> tuple[Split, Split, int]:
  """Decodes the training and the test split, once: see `cache`.

  TFDS stores CIFAR shuffled; the images come back in the order of their ids,
  which is the original one, so that "the last 5,000 training images" means
  what the papers mean by it.

  Args:
    name: one of `NAMES`.
    data_dir: the folder that TFDS prepares datasets in, or None for its own.

  Returns:
    The training split, the test split and the number of classes.

  Raises:
    DatasetError: the dataset is not there (the message holds the command that
      prepares it), is in another format, or has labels out of range.
  """
  found = _stored(name, data_dir)
  if found is not None:
    return found
  builder, command = open_builder(name, data_dir)
  with explained(name, builder, command):
    train, test = (_cached(builder, split) for split in SPLITS)
  return train, test, CLASSES[name]
