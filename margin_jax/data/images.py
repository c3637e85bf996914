"""Images of any size, resized: records -> one square of pixels each."""

import contextlib
import dataclasses
import io
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageOps, UnidentifiedImageError

from margin_jax.data.dataset import DatasetError, Origins, Split

# What Pillow raises of what is no image, half of one, or far too large.
UNDECODABLE = (
  OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError
)  # fmt: skip
# And of EXIF data that are damaged.
_NO_EXIF = (
  SyntaxError, ValueError, struct.error, KeyError, TypeError, ZeroDivisionError
)  # fmt: skip
# So many training images tell the colours of all that are streamed.
SAMPLE = 1000


@dataclasses.dataclass(frozen=True)
class Source:
  """Images that lie on disk, as they were encoded.

  Attributes:
    records: for each split, a random-access dataset of `{'image': bytes,
      'label': int}`, and maybe 'path', for messages.
    num_classes: C.
    class_names: the names of the classes, if they are known.
    origins: the files of the records, if each has its own.
  """

  records: dict[str, Any]
  num_classes: int
  class_names: tuple[str, ...] | None
  origins: Origins | None = None


def open_encoded(encoded: bytes) -> Image.Image:
  """Opens an image; Pillow's own error would name the bytes' address."""
  try:
    return Image.open(io.BytesIO(encoded))
  except UnidentifiedImageError:
    raise UnidentifiedImageError('it is in no format of images') from None


def resize(encoded: bytes, side: int) -> np.ndarray:
  """Decodes an image to its central square, resized to (side, side, 3) uint8.

  Bilinear, with antialiasing. A photo is turned as its EXIF data say, if they
  can be read. Grey levels become RGB, and what is transparent lies on black.
  """
  with open_encoded(encoded) as image:
    with contextlib.suppress(*_NO_EXIF):
      image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # of 16 bits, which Pillow would clip
      image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
      image = image.convert('RGBA')
      black = Image.new('RGBA', image.size, (0, 0, 0, 255))
      image = Image.alpha_composite(black, image)
    size = (side, side)
    image = ImageOps.fit(image.convert('RGB'), size, Image.Resampling.BILINEAR)
  return np.asarray(image)


def read_files(paths: Sequence[str | os.PathLike], side: int) -> np.ndarray:
  """Returns the images of files, resized: (N, side, side, 3) uint8.

  Raises:
    ValueError: one is no image.
  """
  images = []
  for path in paths:
    encoded = pathlib.Path(path).read_bytes()
    try:
      images.append(resize(encoded, side))
    except UNDECODABLE as error:
      raise ValueError(
        f'image {os.fspath(path)!r} cannot be decoded ({error})'
      ) from error
  return np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8)


def resize_all(records: Any, side: int) -> Split:
  """Decodes all images of a split into memory.

  Raises:
    DatasetError: an image cannot be decoded, or they are too many.
  """
  count = len(records)
  check_memory(count * side * side * 3)
  inputs = np.empty((count, side, side, 3), np.uint8)
  label = np.empty(count, np.int32)
  for row in range(count):
    record = records[row]
    label[row] = record['label']
    try:
      inputs[row] = resize(record['image'], side)
    except UNDECODABLE as error:
      raise DatasetError(
        f'{name_of(record, row)} cannot be decoded ({error}): remove it, or '
        "leave it out with data.streamed=True and data.undecodable='skip'"
      ) from error
  return {'inputs': inputs, 'label': label}


def name_of(record: dict[str, Any], row: int) -> str:
  """Names a record in a message: by its file, or by its row."""
  if 'path' in record:
    return f'image {record["path"]!r}'
  return f'the image of record {row}'


def check_memory(needed: int) -> None:
  """Raises a DatasetError unless so many bytes of memory are free."""
  free = psutil.virtual_memory().available
  if needed > free:
    raise DatasetError(
      f'the images would take {needed / 2**30:.1f} GiB, but only '
      f'{free / 2**30:.1f} GiB of memory are free: read them while training '
      'with data.streamed=True, or make them smaller with data.image_size'
    )


def sample(records: Any, rows: np.ndarray, side: int) -> np.ndarray:
  """Decodes at most `SAMPLE` images, evenly spaced over `rows`.

  What cannot be decoded is left out; whoever reads the others will see it.

  Returns:
    (n, side, side, 3) uint8.
  """
  spaced = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))
  images = []
  for row in rows[spaced]:
    try:
      images.append(resize(records[int(row)]['image'], side))
    except UNDECODABLE:
      continue
  if not images:
    raise DatasetError('no image can be decoded')
  return np.stack(images)
