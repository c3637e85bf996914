"""Your own labels for the training examples of any dataset."""

import os

import numpy as np

from margin_jax import files
from margin_jax.data.dataset import DatasetError


def read(path: str, examples: int, num_classes: int) -> np.ndarray:
  """Reads the labels of all training examples from a .npy file.

  Args:
    path: the path of an array (examples,) of integers in [0, num_classes).
    examples: how many the dataset's own training split has, those that are held
      out for validation among them.
    num_classes: C.

  Returns:
    (examples,) int32.

  Raises:
    DatasetError: the file is not there, is no array, or no such one.
  """
  where = f'data.labels={path!r}'
  labels = _array(path)
  if labels.shape != (examples,):
    raise DatasetError(
      f'{where} has shape {labels.shape}: it must be ({examples},), a label '
      'for each training example'
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise DatasetError(
      f'{where} has dtype {labels.dtype}: it must hold integers'
    )
  if labels.min() < 0 or labels.max() >= num_classes:
    row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
    raise DatasetError(
      f'{where} has labels from {labels.min()} to {labels.max()} (row {row} '
      f'has {labels[row]}): they must be in [0, {num_classes})'
    )
  return labels.astype(np.int32)


def digest(path: str) -> str:
  """Returns a digest of the file: it may hold other labels tomorrow."""
  try:
    return files.digest(os.path.expanduser(path))
  except OSError as error:
    raise DatasetError(
      f'data.labels={path!r} cannot be read: {error}'
    ) from error


def _array(path: str) -> np.ndarray:
  try:
    with open(os.path.expanduser(path), 'rb') as file:
      return np.lib.format.read_array(file, allow_pickle=False)
  # A damaged header may ask for more than there is memory.
  except (OSError, ValueError, EOFError, MemoryError) as error:
    raise DatasetError(
      f'data.labels={path!r} cannot be read as a .npy file: {error}'
    ) from error
