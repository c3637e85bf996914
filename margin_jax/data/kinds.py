"""What the name of a dataset says about it, before anything is read."""

import os
import re

from margin_jax.checks import nearest
from margin_jax.data import entailment, glue, imagenet, tfds_images
from margin_jax.data.registered import REGISTERED

# What stands before a path, where the name is one.
FOLDER, CSV = 'folder:', 'csv:'
# The built-in ones; others of TFDS work too.
IMAGES = ('digits', *tfds_images.NAMES, *imagenet.NAMES)
SENTENCES = (*entailment.NAMES, *glue.NAMES)
NAMES = (*IMAGES, *SENTENCES)
# As TFDS writes them: a name, and of some a config.
_TFDS_NAME = re.compile(r'[A-Za-z]\w*(/[\w.+-]+)?')


def path(name: str, data_dir: str | None) -> str:
  """Returns the path of a `folder:PATH` or `csv:PATH`, below `data_dir`."""
  below = os.path.expanduser(name.partition(':')[2])
  return os.path.join(os.path.expanduser(data_dir or ''), below)


def is_known(name: str, data_dir: str | None) -> bool:
  """Returns whether there is such a dataset, or a path is given for it."""
  if name in NAMES or name in REGISTERED:
    return True
  for prefix in (FOLDER, CSV):
    if name.startswith(prefix):
      return name != prefix
  is_name = _TFDS_NAME.fullmatch(name) is not None
  return is_name and tfds_images.is_known(name, data_dir)


def names() -> tuple[str, ...]:
  """Returns the built-in and the registered names."""
  return (*NAMES, *REGISTERED)


def near(name: str) -> list[str]:
  """Returns the names that somebody may have meant."""
  if name.endswith('.csv'):
    return [CSV + name]
  if name.startswith(('/', '.', '~')) or os.path.isdir(name):
    return [FOLDER + name]
  whole = [x for x in names() if x.endswith(f'/{name}')]  # of GLUE
  return whole or nearest(name, names())


def allowed() -> str:
  """Returns what a name may be, to follow 'it must be'."""
  return (
    f"one of {names()}, 'folder:PATH', 'csv:PATH', or the name in "
    'TFDS of a dataset of images with one label each'
  )


def is_path(name: str) -> bool:
  """Returns whether it names a folder or a file of the user's own."""
  return name.startswith((FOLDER, CSV))


def is_sentences(name: str) -> bool:
  """Returns whether examples are sentences or pairs of them."""
  return name in SENTENCES or name.startswith(CSV)


def needs_vocabulary(name: str) -> bool:
  """Returns whether examples are sentences as people wrote them."""
  return name in glue.NAMES or name.startswith(CSV)


def is_images(name: str) -> bool:
  """Returns whether examples are images as uint8 pixels."""
  if name in REGISTERED:
    return REGISTERED[name].pixels
  return not is_sentences(name)


def is_read(name: str) -> bool:
  """Returns whether the dataset lies in a folder."""
  return name not in ('digits', *entailment.NAMES, *REGISTERED)


def may_be_resized(name: str) -> bool:
  """Returns whether images may have sizes of their own."""
  if name in REGISTERED or is_sentences(name):
    return False
  return name in imagenet.NAMES or name not in IMAGES


def is_streamed(name: str, streamed: bool) -> bool:
  """Returns whether images are read while training.

  Args:
    name: the name of the dataset.
    streamed: the field `data.streamed`.
  """
  return name in imagenet.NAMES or (streamed and may_be_resized(name))
