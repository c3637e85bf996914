"""A folder of images, with a folder for each class.

    PATH/train/cat/1.png        PATH/cat/1.png
    PATH/train/dog/2.jpg   or   PATH/dog/2.jpg
    PATH/test/cat/3.png

Beside `train` there may be `test`, and `val` or `validation`, which is the
validation split. Without `test`, it is the test split. With neither, a fifth of
each class is the test split: see `splits.hold_out`.
"""

import hashlib
import os
import pathlib

import numpy as np

from margin_jax.data import images, splits
from margin_jax.data.dataset import DatasetError, Origins

SUFFIXES = ('.png', '.jpg', '.jpeg')
# The first that is there is the test split, the second the validation split.
_OTHERS = ('test', 'val', 'validation')


class Records:
  """Encoded images and their labels, by row."""

  def __init__(self, folder: str, files: list[str], labels: np.ndarray):
    """Reads nothing yet.

    Args:
      folder: the folder of the files.
      files: N paths, relative to the folder.
      labels: (N,) of them.
    """
    self.folder = folder
    self.files = files
    self.labels = labels

  @property
  def paths(self) -> list[str]:
    """The paths of the files."""
    return [os.path.join(self.folder, file) for file in self.files]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, row: int) -> dict:
    path = os.path.join(self.folder, self.files[row])
    try:
      with open(path, 'rb') as file:
        image = file.read()
    except OSError as error:
      raise DatasetError(f'image {path!r} cannot be read: {error}') from error
    return {'image': image, 'label': int(self.labels[row]), 'path': path}

  def __getitems__(self, rows: list[int]) -> list[dict]:
    """Returns the records of several rows."""
    return [self[row] for row in rows]


def load(path: str) -> images.Source:
  """Lists the images of a folder; see above.

  Classes are the folders of the training split, in the order of their names,
  and so are the images in each. What begins with a dot, and files with other
  suffixes than `SUFFIXES`, are no images.

  Raises:
    DatasetError: the folder or an image is not there or cannot be read, a class
      has no images, there are fewer than two, one has a name that is not UTF-8,
      or the test split has one that is not trained on.
  """
  found = {
    split: _files_by_class(folder) for split, folder in _folders(path).items()
  }
  classes = sorted(found['train'])
  if not classes and _images(path):
    raise DatasetError(
      f'folder {path!r} holds images itself: name the folder above, which must '
      'have a folder of images for each class'
    )
  if len(classes) < 2:
    raise DatasetError(
      f'folder {path!r} has {len(classes)} class(es), {classes}: it must have '
      'two or more, each a folder of images, or such folders in train and test'
    )
  records = {}
  for split, files in found.items():
    if not files:
      raise DatasetError(
        f'folder {path!r}: {split} must have a folder of images for each class'
      )
    unknown = sorted({*files} - {*classes})
    if unknown:
      raise DatasetError(
        f'folder {path!r}: class {unknown[0]!r} of {split} is not among those '
        f'of the training split, {classes}'
      )
    paths = [
      os.path.relpath(file, path)
      for name in classes
      for file in files.get(name, ())
    ]
    counts = [len(files.get(name, ())) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    records[split] = Records(path, paths, labels)
  if 'test' not in records:
    train = records['train']
    try:
      rows = splits.hold_out(train.labels)
    except ValueError as error:
      raise DatasetError(f'folder {path!r}: {error}') from error
    records = {
      split: Records(path, [train.files[i] for i in which], train.labels[which])
      for split, which in rows.items()
    }
  origins = Origins('file', {split: x.files for split, x in records.items()})
  return images.Source(records, len(classes), tuple(classes), origins)


def digest(path: str) -> str:
  """Returns a digest of the images' paths in the folder, and of their sizes."""
  found = hashlib.sha256()
  for split, records in load(path).records.items():
    for file, whole in zip(records.files, records.paths, strict=True):
      line = f'{split}\0{file}\0{os.stat(whole).st_size}\n'
      found.update(line.encode(errors='surrogateescape'))
  return found.hexdigest()[:16]


def order(records: Records) -> str:
  """Returns a digest of which file each row is, whatever links lead to it."""
  found = hashlib.sha256()
  for path in records.paths:
    found.update(os.fsencode(os.path.realpath(path)) + b'\0')
  return found.hexdigest()[:16]


def _folders(path: str) -> dict[str, str]:
  """Returns the folder of each split; of one alone, 'train' is all there is."""
  present = _subfolders(path)
  train = os.path.join(path, 'train')
  # Of a class that is called train there are images in it, and no folders.
  if 'train' not in present or not _subfolders(train):
    return {'train': path}
  others = [name for name in _OTHERS if name in present]
  if {'val', 'validation'} <= {*others}:
    raise DatasetError(
      f"folder {path!r} has both 'val' and 'validation': remove or rename one"
    )
  folders = dict(zip(('test', 'validation'), others, strict=False))
  return {'train': train} | {
    split: os.path.join(path, name) for split, name in folders.items()
  }


def _entries(path: str) -> list[os.DirEntry]:
  """Returns what lies in a folder and does not begin with a dot, by name."""
  try:
    with os.scandir(path) as entries:
      shown = [x for x in entries if not x.name.startswith('.')]
  except OSError as error:
    raise DatasetError(f'folder {path!r} cannot be read: {error}') from error
  return sorted(shown, key=lambda entry: entry.name)


def _subfolders(path: str) -> list[str]:
  return [entry.name for entry in _entries(path) if entry.is_dir()]


def _images(path: str) -> list[str]:
  return [
    entry.path
    for entry in _entries(path)
    if pathlib.PurePath(entry.name).suffix.lower() in SUFFIXES
  ]


def _files_by_class(path: str) -> dict[str, list[str]]:
  """Returns the paths of the images of each class, in order."""
  found = {}
  for name in _subfolders(path):
    folder = os.path.join(path, name)
    try:
      name.encode()
    except UnicodeEncodeError as error:
      raise DatasetError(
        f'folder {path!r}: the name of class {os.fsencode(name)!r} is not '
        'UTF-8; rename it'
      ) from error
    found[name] = _images(folder)
    if not found[name]:
      raise DatasetError(
        f'folder {folder!r} has no images: the folder of a class holds '
        f'{", ".join(SUFFIXES)} files'
      )
    broken = [x for x in found[name] if not os.path.exists(x)]
    if broken:
      raise DatasetError(f'{broken[0]!r} is a broken link: remove it')
  return found
