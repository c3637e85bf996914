"""Errors in the user's own rules, losses, models and config files."""

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator

import margin_jax
from margin_jax.config import ConfigError

# What is in these is no code of the user's.
_LIBRARIES = tuple(
  os.path.join(os.path.realpath(folder), '')
  for folder in (
    os.path.dirname(margin_jax.__file__),
    *(sysconfig.get_path(x) for x in ('stdlib', 'purelib', 'platlib')),
  )
)


class UserCodeError(ConfigError):
  """Code of the user's own raised; the message says which, what and where.

  Attributes:
    frames: the frames of the traceback that are the user's, as text.
  """

  def __init__(self, message: str, frames: str):
    """Takes the line and the frames."""
    super().__init__(message)
    self.frames = frames


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
  """Says of what is raised here that `what` did, and where.

  Args:
    what: the field and its value, such as "selection.rule='mine'".

  Raises:
    UserCodeError: from what was raised.
  """
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _of_library(frame.filename)]
    where = f' in {own[-1].filename}, line {own[-1].lineno}' if own else ''
    message = ' '.join(str(error).split())
    if os.path.realpath(frames[-1].filename).startswith(_LIBRARIES[0]):
      # We say what is wrong with what we were given: that is enough.
      raise UserCodeError(f'{what} failed{where}: {message}', '') from error
    raise UserCodeError(
      f'{what} failed{where}: {type(error).__name__}: {message}',
      ''.join(traceback.format_list(own)),
    ) from error


def _of_library(filename: str) -> bool:
  """Returns whether a frame is of this package, another one or Python."""
  generated = filename.startswith('<') and not filename.startswith('<ipython')
  return generated or os.path.realpath(filename).startswith(_LIBRARIES)
