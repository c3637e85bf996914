"""A folder of an object store, gs:// or s3://, through fsspec.

An object exists whole or not at all, and you can neither append to it nor
rename it. `etils.epath` uses fsspec if there is no TensorFlow. We call fsspec
directly, because then it can keep no listings, and can create an object only if
it does not exist.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import fsspec
import psutil

from margin_jax.config import ConfigError

Value = TypeVar('Value')

# How long a store may be silent at the start.
ANSWER_SECONDS = 5
# How often an owner writes that it lives, and how long others believe it.
BEAT_SECONDS = 10
STALE_SECONDS = 60
LOCK, CLOCK = '.lock', '.lock.clock'


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a kind of store is reached.

  Attributes:
    extra: the extra of margin_jax that installs `package`.
    package: fsspec's for this kind.
    login: how a user gets credentials.
  """

  extra: str
  package: str
  login: str


SCHEMES = {
  'gs': Scheme(
    'gcs',
    'gcsfs',
    "'gcloud auth application-default login' or GOOGLE_APPLICATION_CREDENTIALS",
  ),
  's3': Scheme(
    's3', 's3fs', "'aws configure' or AWS_ACCESS_KEY_ID and _SECRET_ACCESS_KEY"
  ),
}


class BucketError(ConfigError):
  """A store does not do what it is asked; one line says what and where."""


class Bucket:
  """A folder of a bucket. Names are relative to it.

  Attributes:
    url: 'gs://bucket/folder', without a slash at the end.
  """

  def __init__(self, url: str):
    """Asks the store for what it has there.

    Raises:
      BucketError: a package or credentials are missing, there is no such
        bucket, or nobody answers.
    """
    self.url = url
    name = url.partition('://')[0]
    scheme = SCHEMES[name]
    # gcsfs asks what kind of bucket it is, by another client: folders are not
    # needed here.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    try:
      client = fsspec.get_filesystem_class(name)
    except ImportError as error:
      raise BucketError(
        f'{url}: {scheme.package} is missing; '
        f"pip install 'margin_jax[{scheme.extra}]'"
      ) from error
    self._login = f'log in with {scheme.login}'
    self._root = client._strip_protocol(url)
    with self._explained():
      self._fs = _in_time(lambda: self._connect(client))

  def child(self, name: str) -> Self:
    """Returns a folder of this one."""
    other = object.__new__(type(self))
    other.__dict__ = {**self.__dict__, 'url': f'{self.url}/{name}'}
    other._root = f'{self._root}/{name}'
    return other

  def _connect(self, client: type) -> fsspec.AbstractFileSystem:
    """Returns a client that has seen the bucket."""
    fs = client(use_listings_cache=False)
    bucket = self._root.partition('/')[0]
    if not _find(fs, self._root) and not fs.exists(bucket):
      raise FileNotFoundError(f'there is no bucket {bucket!r} that you may see')
    return fs

  def _path(self, name: str) -> str:
    return f'{self._root}/{name}'

  def find(self, under: str = '') -> dict[str, dict[str, Any]]:
    """Returns the objects below a folder, and what is known of each."""
    with self._explained():
      found = _find(self._fs, self._path(under).rstrip('/'))
    start = len(self._root) + 1
    return {path[start:]: about for path, about in found.items()}

  def read(self, name: str) -> bytes | None:
    """Returns an object, None where there is none."""
    with self._explained():
      try:
        return self._fs.cat_file(self._path(name))
      except FileNotFoundError:
        return None

  def write(self, name: str, content: bytes) -> None:
    """Writes an object, at once."""
    with self._explained():
      self._fs.pipe_file(self._path(name), content)

  def create(self, name: str, content: bytes) -> bool:
    """Writes an object if there is none; returns whether it did."""
    with self._explained():
      try:
        self._fs.pipe_file(self._path(name), content, mode='create')
      except FileExistsError:
        return False
    return True

  def upload(self, folder: pathlib.Path, names: Sequence[str]) -> None:
    """Writes objects from the files of these names in a folder."""
    if names:
      with self._explained():
        self._fs.put(
          [str(folder / name) for name in names],
          [self._path(name) for name in names],
        )

  def download(self, folder: pathlib.Path, names: Sequence[str]) -> None:
    """Writes files of these names in a folder from objects."""
    for name in names:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if names:
      with self._explained():
        self._fs.get(
          [self._path(name) for name in names],
          [str(folder / name) for name in names],
        )

  def remove(self, names: Sequence[str]) -> None:
    """Removes objects; of those that are not there nothing is said."""
    with self._explained():
      for name in names:
        with contextlib.suppress(FileNotFoundError):
          self._fs.rm_file(self._path(name))

  def age(self, name: str) -> float:
    """Returns the seconds since an object was written, by the store's clock.

    To read that clock it writes an object of its own, `CLOCK`.
    """
    self.write(CLOCK, b'')
    with self._explained():
      now, then = (self._fs.modified(self._path(x)) for x in (CLOCK, name))
    return (now - then).total_seconds()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Makes one line of whatever a client raises."""
    try:
      yield
    except (BucketError, FileNotFoundError, FileExistsError) as error:
      if isinstance(error, BucketError):
        raise
      raise BucketError(f'{self.url}: {_first_line(error)}') from error
    except Exception as error:
      raise BucketError(
        f'{self.url}: {_first_line(error)}; {self._login}, unless the network '
        'is at fault'
      ) from error


def _find(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
  try:
    return fs.find(path, detail=True)
  except FileNotFoundError:
    return {}


def _in_time(ask: Callable[[], Value]) -> Value:
  """Returns what a function returns, or raises what it raises, in time.

  Clients without a network or credentials try again for minutes.
  """
  answer: list[Value] = []
  problem: list[Exception] = []

  def run() -> None:
    try:
      answer.append(ask())
    except Exception as error:
      problem.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(ANSWER_SECONDS)
  if problem:
    raise problem[0]
  if not answer:
    raise TimeoutError(f'no answer within {ANSWER_SECONDS} s')
  return answer[0]


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:200]}'


class Lock:
  """An object that says who owns a folder, written anew every few seconds.

  Object stores have no locks. The owner's object is created only where there is
  none, and believed for a minute by the store's clock; not at all, if its
  process was on this machine and is gone.
  """

  def __init__(self, bucket: Bucket):
    """Takes nothing yet."""
    self._bucket = bucket
    self._content = json.dumps(this_process()).encode()
    self._ended = threading.Event()

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Owns the folder.

    Raises:
      BlockingIOError: somebody else does; the message says who.
      BucketError: the store fails.
    """
    self._take()
    thread = threading.Thread(target=self._beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      self._ended.set()
      thread.join()
      with contextlib.suppress(BucketError):
        if self._is_mine():
          self._bucket.remove([CLOCK, LOCK])

  def check(self) -> None:
    """Raises a BucketError if another process has taken the folder over."""
    other = self._bucket.read(LOCK)
    if other is not None and other != self._content:
      raise BucketError(
        f'{self._bucket.url}: {_name(other)} has taken it over, because this '
        f'process was silent for {STALE_SECONDS} s'
      )

  def _take(self) -> None:
    for _ in range(3):
      other = self._bucket.read(LOCK)
      if other is not None:
        self._refuse_if_alive(other)
        if self._bucket.read(LOCK) == other:
          self._bucket.remove([LOCK])
      if self._bucket.create(LOCK, self._content):
        return
    raise BlockingIOError('in use by several runs that start at once')

  def _refuse_if_alive(self, owner: bytes) -> None:
    if is_gone(owner):
      return
    try:
      age = self._bucket.age(LOCK)
    except BucketError:
      if self._bucket.read(LOCK) is None:  # it has just ended
        return
      raise
    if age < STALE_SECONDS:
      raise BlockingIOError(
        f'in use by {_name(owner)}, seen {max(age, 0):.0f} s ago; if it is '
        f'gone, try again in {STALE_SECONDS} s'
      )

  def _is_mine(self) -> bool:
    return self._bucket.read(LOCK) == self._content

  def _beat(self) -> None:
    while not self._ended.wait(BEAT_SECONDS):
      with contextlib.suppress(BucketError):  # the next save will tell
        if self._bucket.read(LOCK) in (None, self._content):
          self._bucket.write(LOCK, self._content)


def this_process() -> dict[str, Any]:
  """Returns what tells this process from all others, of all machines."""
  return {
    'process': os.getpid(),
    'host': socket.gethostname(),
    'machine': _machine(),
    'started': psutil.Process().create_time(),
    'token': secrets.token_hex(8),
    'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
  }


def _machine() -> str | None:
  """Returns what process ids of this machine are unique in, None if unknown.

  Host names do not tell containers apart.
  """
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return None


def _read(owner: bytes) -> dict[str, Any]:
  try:
    about = json.loads(owner)
  except ValueError:
    return {}
  return about if isinstance(about, dict) else {}


def is_gone(owner: bytes) -> bool:
  """Returns whether an owner was a process of this machine that has ended."""
  about = _read(owner)
  machine = _machine()
  if machine is None or about.get('machine') != machine:
    return False
  try:
    started = psutil.Process(about.get('process')).create_time()
  except (psutil.NoSuchProcess, TypeError, ValueError):
    return True
  return started != about.get('started')


def _name(owner: bytes) -> str:
  about = _read(owner)
  if {'process', 'host'} <= {*about}:
    return f'process {about["process"]} on {about["host"]}'
  return f'the owner of its {LOCK}'
