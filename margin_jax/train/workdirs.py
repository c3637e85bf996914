"""Where a run writes: a folder of this machine, or one of a bucket."""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Self

from margin_jax import config as config_lib
from margin_jax import files

# One letter is a drive of Windows.
_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/')


class Workdir:
  """A folder of this machine.

  Attributes:
    folder: absolute; everything is read and written here.
    remote: whether `folder` is only a copy, which each process has for itself.
  """

  remote = False

  def __init__(self, folder: str | os.PathLike):
    """Creates nothing; "~" is expanded."""
    self.folder = pathlib.Path(os.path.abspath(os.path.expanduser(folder)))

  def __str__(self) -> str:
    """Returns the name that the user knows."""
    return str(self.folder)

  def child(self, name: str) -> Self:
    """Returns a folder in this one."""
    return type(self)(self.folder / name)

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Creates the folder and keeps other programs out of it.

    Raises:
      OSError: it cannot be created, or another program uses it.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    with files.locked(str(self.folder)):
      yield

  def refresh(self) -> None:
    """Copies what is new elsewhere: nothing, since this is the original."""

  def fetch(self, step: int) -> None:
    """Copies the arrays of a checkpoint: nothing, since they are here."""

  def commit(self, busy: Callable[[], bool] = lambda: False) -> None:
    """Begins to copy what is new to where it stays: nothing, it is there.

    Args:
      busy: whether a checkpoint is still being written.
    """

  def wait(self) -> None:
    """Waits for `commit`."""

  def named(self, text: str) -> str:
    """Returns a text with the names of files as the user knows them."""
    return text


@contextlib.contextmanager
def opened(workdir: str | os.PathLike) -> Iterator[Workdir]:
  """Opens a workdir to be read; see `Workdir.locked` to write.

  Args:
    workdir: a folder, which need not exist; "~" is expanded.

  Raises:
    ConfigError: it is empty, of no user, or a URL of a kind that is not known.
  """
  name = os.fspath(workdir)
  if not name:
    raise config_lib.ConfigError(
      "workdir='' is not allowed: it names no folder"
    )
  if os.path.expanduser(name).startswith('~'):
    user = name.split('/')[0]
    raise config_lib.ConfigError(
      f'workdir={name!r} is not allowed: there is no user {user[1:]!r}; '
      f'./{name} is a folder of that name'
    )
  if _SCHEME.match(name):
    raise config_lib.ConfigError(
      f'workdir={name!r} is not allowed: it must be a folder of this machine'
    )
  yield Workdir(name)
