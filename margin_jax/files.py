"""Files that are there whole or not at all, locks, the cache folder."""

import contextlib
import csv
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator
from typing import Any

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None


def cache_dir() -> pathlib.Path:
  """Returns $XDG_CACHE_HOME/margin_jax, or the same under ~/.cache."""
  base = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(base):  # as the XDG specification demands
    base = os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'margin_jax'


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
  """Keeps other processes that ask for it out of a folder.

  The lock goes with the process, however it ends. Where the file system has no
  locks, nobody is kept out.

  Raises:
    BlockingIOError: somebody has it; the message says who.
    OSError: the folder is not writable.
  """
  path = pathlib.Path(folder, '.lock')
  with path.open('a+') as file:
    if fcntl is None:
      yield
      return
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise BlockingIOError(f'in use by {file.read().strip()}') from error
    except OSError:  # of a network
      yield
      return
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the path of a file to write aside, renamed to `path` at the end.

  After an error, and after a kill, `path` is what it was before.
  """
  # Not tempfile: its files are for their owner only.
  aside = path.with_name(f'.{path.name}.{os.getpid()}.{secrets.token_hex(4)}')
  try:
    yield aside
    os.replace(aside, path)
  finally:
    with contextlib.suppress(OSError):
      aside.unlink()


def write_csv(
  path: pathlib.Path, fields: list[str], rows: list[dict[str, Any]]
) -> None:
  """Writes a CSV file with a header."""
  with whole(path) as aside, aside.open('w', newline='') as file:
    writer = csv.DictWriter(file, fields)
    writer.writeheader()
    writer.writerows(rows)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes a JSON file at once, or not at all."""
  with whole(path) as aside:
    aside.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
