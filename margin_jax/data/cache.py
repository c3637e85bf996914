"""Decoded splits on disk, so that a second start need not decode them again.

There is one uncompressed .npz per split, whose checksums NumPy verifies on
reading. Nothing here ever raises an error. If a file cannot be read, or holds
other data, the dataset is decoded again and the file replaced. If no file can
be written, there is no cache.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from margin_jax import files as files_lib
from margin_jax.data.dataset import Split

# To be raised whenever what is stored, or its order, changes.
FORMAT = 1

_log = logging.getLogger(__name__)


def fingerprint(paths: Sequence[os.PathLike | str]) -> str:
  """Returns a digest of the files' paths, sizes and times.

  Raises:
    OSError: a file is not there.
  """
  digest = hashlib.sha256()
  for path in sorted(os.path.realpath(path) for path in paths):
    status = os.stat(path)
    line = f'{path}\0{status.st_size}\0{status.st_mtime_ns}\n'
    digest.update(line.encode(errors='surrogateescape'))
  return digest.hexdigest()


def read(
  path: pathlib.Path,
  source: str,
  examples: int,
  dtype: np.dtype | type = np.uint8,
) -> Split | None:
  """Reads a split; None if it is not there, broken or of other data.

  It is read whole, not mapped: the checksum needs every byte, and a mapped
  file that somebody truncates kills the process that reads it.

  Args:
    path: the path of the file.
    source: the `fingerprint` of the files that were decoded.
    examples: how many rows the split has.
    dtype: the dtype of its inputs.
  """
  try:
    # Opened here, because NumPy leaves a file open that is no archive.
    with open(path, 'rb') as file, np.load(file) as stored:
      if str(stored['source']) != source:
        return None
      split = {name: stored[name] for name in ('inputs', 'label')}
  except Exception as error:  # zipfile, zlib and NumPy raise many kinds
    if not isinstance(error, FileNotFoundError):
      _log.info('%s is ignored: %s', path, error)
    return None
  dtypes = {name: array.dtype for name, array in split.items()}
  if dtypes != {'inputs': dtype, 'label': np.int32}:
    return None
  if {len(array) for array in split.values()} != {examples}:
    return None
  return split


def _is_ours(name: str) -> bool:
  return name.startswith('margin_jax-') and name.endswith('.npz')


def write(path: pathlib.Path, source: str, split: Split) -> bool:
  """Writes a file whole or not at all, and says which."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other hosts may have the folder, too.
    files_lib.remove_leftovers(path.parent, _is_ours, seconds=86_400)
    with files_lib.whole(path) as aside, open(aside, 'xb') as file:
      np.savez(file, source=np.array(source), **split)
  except OSError as error:  # not writable, or full
    _log.info('%s is not written: %s', path, error)
    return False
  return True


def cached(
  name: str,
  files: Sequence[os.PathLike | str],
  examples: int,
  decode: Callable[[], Split],
  dtype: np.dtype | type = np.uint8,
) -> Split:
  """Reads a split from the cache, or decodes it and puts it there.

  The cache lies in `files.cache_dir()`: the dataset's folder may be somebody
  else's. What earlier versions put there is read.

  Args:
    name: what the split is called: dataset, version, split, and whatever else
      `decode` depends on.
    files: what holds it.
    examples: how many rows it has.
    decode: makes `{'inputs': dtype, 'label': int32}` of the files.
    dtype: the dtype of the inputs.

  Returns:
    The split; its arrays are writable and nobody else's.
  """
  split = stored(name, files, examples, dtype)
  if split is not None:
    return split
  try:
    source = fingerprint(files)
  except OSError:
    return decode()  # whose error says more
  split = decode()
  write(_paths(name, files, examples)[0], source, split)
  return split


def stored(
  name: str,
  files: Sequence[os.PathLike | str],
  examples: int,
  dtype: np.dtype | type = np.uint8,
) -> Split | None:
  """Returns what `cached` has put there for these files, or None."""
  with contextlib.suppress(OSError):
    source = fingerprint(files)
    for path in _paths(name, files, examples):
      split = read(path, source, examples, dtype)
      if split is not None:
        return split
  return None


def _paths(
  name: str, files: Sequence[os.PathLike | str], examples: int
) -> list[pathlib.Path]:
  """Returns where to look: in the user's cache, beside the split's files."""
  file_name = f'margin_jax-{name}-{examples}-v{FORMAT}'
  beside = pathlib.Path(os.fspath(files[0])).resolve().parent
  # Copies of a dataset must not take each other's place.
  copy = hashlib.sha256(os.fsencode(beside)).hexdigest()[:8]
  return [
    files_lib.cache_dir() / 'data' / f'{file_name}-{copy}.npz',
    beside / f'{file_name}.npz',
  ]
