"""Files that exist whole or not at all, and are checked when they are read.

Any file of a run, a model or a dataset that the program reads back may have
been truncated, swapped or written by somebody else. `read_json` and
`read_table` return what fits a schema, or raise a one-line `FileError`.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pathlib
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import psutil

from margin_jax.checks import Check

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


def digest(path: str | os.PathLike) -> str:
  """Returns a digest of what a file holds.

  Raises:
    OSError: it is not a file, or cannot be read.
  """
  path = pathlib.Path(path)
  if other := _other_than_file(path):
    raise OSError(errno.EINVAL, f'it is {other}', str(path))
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()[:16]


def _other_than_file(path: pathlib.Path) -> str | None:
  """Returns what lies in the place of a file: a pipe may never end."""
  if not path.exists() or path.is_file():
    return None
  return 'a folder' if path.is_dir() else 'not a file'


class FileError(ValueError):
  """A file is not what it should be; one line says which, and what to do."""


# More than any run writes: JSON, and a table of 1,000 classes' rates.
LARGEST_JSON, LARGEST_TABLE = 2**26, 2**30
LARGEST_LOCK = 2**12
# How many characters of a value a message shows.
_SHOWN = 60

# A row of a table, by column.
Row = dict[str, str]


def read(path: pathlib.Path, largest: int, remedy: str) -> bytes:
  """Reads a file.

  Args:
    path: the path of the file.
    largest: how many bytes it may have.
    remedy: what the user can do about a bad file, for the message.

  Raises:
    FileNotFoundError: there is none.
    FileError: it is no file, too large, or cannot be read.
  """
  with _explained(path, remedy):
    if other := _other_than_file(path):
      raise ValueError(f'it is {other}')
    with path.open('rb') as file:
      content = file.read(largest + 1)
    if len(content) > largest:
      raise ValueError(f'it has more than {largest:,} bytes')
    return content


def read_json(
  path: pathlib.Path, schema: Mapping[str, Check] | Check, remedy: str
) -> dict[str, Any]:
  """Reads a JSON object; keys that the schema does not name are kept.

  Args:
    path: the path of the file.
    schema: a check of each key's value, which is None where the key is missing;
      or one check of all values.
    remedy: what the user can do about a bad file, for the message.

  Raises:
    FileNotFoundError: there is none.
    FileError: it cannot be read, or is no such object.
  """
  encoded = read(path, LARGEST_JSON, remedy)
  with _explained(path, remedy):
    content = json.loads(encoded.decode('utf-8'))
    check_object(content, schema)
  return content


def check_object(content: Any, schema: Mapping[str, Check] | Check) -> None:
  """Raises a ValueError unless it is a dict that fits a schema."""
  if not isinstance(content, dict):
    raise ValueError('it must hold a JSON object')
  if isinstance(schema, Check):
    schema = dict.fromkeys(content, schema)
  for name, check in schema.items():
    value = content.get(name)
    if not check.holds(value):
      raise ValueError(
        f'its {name!r} is {shown(value)}, and must be {check.allowed()}'
      )


def shown(value: Any) -> str:
  """Returns a value as a message shows it: not all of a long one."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # of an integer of many digits
    return f'a {type(value).__name__}'
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'


def read_table(
  path: pathlib.Path,
  numbers: tuple[str, ...],
  remedy: str,
  texts: tuple[str, ...] = (),
) -> tuple[list[str], list[Row]]:
  """Reads a CSV file of numbers by step.

  A last line that does not end, cut by what stopped a run, is left out.

  Args:
    path: the path of the file.
    numbers: columns that must be there beside 'step', with numbers.
    remedy: what the user can do about a bad file, for the message.
    texts: columns that must be there, too, and hold no numbers. All others
      hold numbers, or nothing.

  Returns:
    The columns and the rows; none of an empty file.

  Raises:
    FileNotFoundError: there is none.
    FileError: it cannot be read, or is no such table.
  """
  encoded = read(path, LARGEST_TABLE, remedy)
  with _explained(path, remedy):
    lines = encoded[: encoded.rfind(b'\n') + 1].decode('utf-8')
    reader = csv.reader(io.StringIO(lines, newline=''), strict=True)
    columns = next(reader, [])
    if columns:
      _check_columns(columns, ('step', *numbers, *texts))
    rows = []
    for cells in reader:
      row = dict(zip(columns, cells, strict=False))
      holds = len(cells) == len(columns) and _is_step(row['step'])
      if not holds or not all(
        _is_number(cell) or name in texts or not (cell or name in numbers)
        for name, cell in row.items()
      ):
        raise ValueError(f'line {reader.line_num} is not a row of this table')
      rows.append(row)
  return columns, rows


def _check_columns(columns: list[str], needed: tuple[str, ...]) -> None:
  missing = [name for name in needed if name not in columns]
  if missing:
    raise ValueError(f'it has no column {missing[0]!r}')
  if len({*columns}) < len(columns):
    raise ValueError('it has the same column twice')


def _is_step(cell: str) -> bool:
  return cell.isascii() and cell.isdecimal() and len(cell) < 20


def _is_number(cell: str) -> bool:
  try:
    float(cell)
  except ValueError:
    return False
  return True


@contextlib.contextmanager
def _explained(path: pathlib.Path, remedy: str) -> Iterator[None]:
  """Makes one line of whatever is wrong with a file."""
  try:
    yield
  except FileNotFoundError:
    raise
  except FileError:
    raise
  except RecursionError as error:
    problem, cause = 'it is nested too deep', error
  except UnicodeDecodeError as error:
    problem, cause = 'it is not text', error
  except OSError as error:
    problem, cause = error.strerror or str(error), error
  except (ValueError, csv.Error) as error:
    problem, cause = str(error), error
  else:
    return
  problem = ' '.join(problem.split())
  raise FileError(f'{path} cannot be read ({problem}): {remedy}') from cause


def make_folder(folder: pathlib.Path) -> None:
  """Creates a folder, unless it is there.

  Raises:
    FileError: it cannot be created.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise FileError(f'the folder cannot be made ({error.strerror})') from error


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
  """Keeps other processes that ask for it out of a folder.

  The lock goes with the process, however it ends. Where the file system has no
  locks, nobody is kept out.

  Raises:
    BlockingIOError: somebody has it; the message says who.
    FileError: .lock is not a lock of margin_jax.
    OSError: the folder is not writable.
  """
  path = pathlib.Path(folder, '.lock')
  _check_lock(path)
  with path.open('a+b') as file:
    if fcntl is None:
      yield
      return
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      owner = file.read(LARGEST_LOCK).decode('utf-8', 'replace').strip()
      raise BlockingIOError(f'in use by {owner}') from error
    except OSError:  # of a network
      yield
      return
    file.truncate(0)
    line = f'process {os.getpid()} on {socket.gethostname()}\n'
    file.write(line.encode())
    file.flush()
    yield


def _check_lock(path: pathlib.Path) -> None:
  """Raises a FileError unless a lock, which is overwritten, is one of ours."""
  remedy = 'move it away'
  with contextlib.suppress(FileNotFoundError), _explained(path, remedy):
    content = b'' if path.is_symlink() else read(path, LARGEST_LOCK, remedy)
    begin = b'process '
    if path.is_symlink() or not content.startswith(begin[: len(content)]):
      raise ValueError('it is not a lock of margin_jax')


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the path of a file to write aside, renamed to `path` at the end.

  After an error, and after a kill, `path` is what it was before.
  """
  # Not tempfile: its files are for their owner only. See `_ASIDE`.
  aside = path.with_name(f'.{path.name}.{os.getpid()}.{secrets.token_hex(4)}')
  try:
    yield aside
    with aside.open('rb') as file:
      os.fsync(file.fileno())  # or a power cut may leave an empty file
    os.replace(aside, path)
  finally:
    with contextlib.suppress(OSError):
      aside.unlink()


# What `whole` calls a file that it writes: the name, the process, a token.
_ASIDE = re.compile(r'\.(?P<name>.+)\.(?P<process>\d{1,9})\.[0-9a-f]{8}')


def remove_leftovers(
  folder: pathlib.Path, is_ours: Callable[[str], bool], seconds: float = 0
) -> None:
  """Removes what killed processes were writing aside.

  Args:
    folder: the folder that may hold some.
    is_ours: whether a name is of a file that this program writes there.
    seconds: how long nothing was written to them; for a folder that processes
      of other hosts may be writing to.
  """
  for path in folder.iterdir():
    match = _ASIDE.fullmatch(path.name)
    if match is None or not is_ours(match['name']):
      continue
    if psutil.pid_exists(int(match['process'])):
      continue
    with contextlib.suppress(OSError):
      status = path.lstat()
      old = time.time() - status.st_mtime >= seconds
      if stat.S_ISREG(status.st_mode) and old:
        path.unlink()


def check_outputs(
  folder: pathlib.Path, names: Iterable[str], folders: Iterable[str]
) -> None:
  """Raises where something else lies in the place of what is to be written.

  Args:
    folder: to be written to.
    names: names of files in it. A link would be replaced, or what it leads to
      overwritten: it is refused.
    folders: of folders in it; links to folders are followed.

  Raises:
    FileError: it lists all that is wrong.
  """
  wrong = []
  for name in names:
    path = folder / name
    if path.is_symlink():
      wrong.append(f'{name} is a link')
    elif other := _other_than_file(path):
      wrong.append(f'{name} is {other}')
  for name in folders:
    path = folder / name
    if (path.exists() or path.is_symlink()) and not path.is_dir():
      wrong.append(f'{name} is not a folder')
  if wrong:
    raise FileError(f'{folder}: {", ".join(wrong)}: move it away')


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
