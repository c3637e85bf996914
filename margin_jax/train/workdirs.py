"""Where a run writes: a folder on this machine, or in a bucket."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from etils import epath

from margin_jax import buckets, files
from margin_jax import config as config_lib
from margin_jax.buckets import Bucket, Lock

# Of a workdir.
FOLDER = 'checkpoints'
QUARANTINE = 'corrupt_checkpoints'
RESULT = 'result.json'
# Of a comparison.
RUNS = 'runs'
# What is copied to a bucket besides checkpoints and the files of the workdir.
TREES = ('tensorboard', QUARANTINE)
# Orbax's own mark of a whole checkpoint in a bucket.
MARK = 'commit_success.txt'

# One letter is a drive of Windows.
_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')
_PART = r'(?!\.{1,2}(/|$))[^/*?\[\]#]+'
_URL = re.compile(rf'({"|".join(buckets.SCHEMES)})://{_PART}(/{_PART})*')
_SCRATCH = 'margin_jax-'


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
    self._locked: tuple[int, int] | None = None

  def __str__(self) -> str:
    """Returns the name that the user knows."""
    return str(self.folder)

  @property
  def path(self) -> pathlib.Path | epath.Path:
    """The folder, to be shown and opened."""
    return self.folder

  def child(self, name: str) -> Self:
    """Returns a folder in this one."""
    return type(self)(self.folder / name)

  def is_run(self) -> bool:
    """Returns whether it has checkpoints, as a run has."""
    return (self.folder / FOLDER).is_dir()

  def runs(self) -> list[Self]:
    """Returns the runs of a comparison, by name."""
    found = (self.folder / RUNS).glob(f'**/{FOLDER}')
    names = sorted(x.parent.relative_to(self.folder).as_posix() for x in found)
    return [self.child(name) for name in names]

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Creates the folder and keeps other programs out of it.

    Raises:
      FileError: it cannot be created, or .lock is not a lock of margin_jax.
      OSError: another program uses it.
    """
    files.make_folder(self.folder)
    with files.locked(str(self.folder)):
      self._locked = _identity(self.folder)
      yield

  def check(self) -> None:
    """Checks that the folder is still the one that was locked.

    Raises:
      FileError: it was moved or removed.
    """
    if self._locked is not None and _identity(self.folder) != self._locked:
      raise files.FileError(
        f'{self} is gone: was it moved or removed while the run was training? '
        'If you moved it, the same command with its new path resumes the run'
      )

  def refresh(self) -> None:
    """Copies what is new elsewhere: nothing, since this is the original."""

  def has(self, step: int) -> bool:
    """Returns whether a checkpoint is there now."""
    return (self.folder / FOLDER / str(step)).is_dir()

  def fetch(self, step: int) -> None:
    """Copies the arrays of a checkpoint: nothing, since they are here."""

  def forget(self, step: int) -> None:
    """Removes a checkpoint from where it stays: that was its only place."""

  def commit(self, busy: Callable[[], bool] = lambda: False) -> None:
    """Begins to copy what is new to where it stays: nothing, it is there.

    Args:
      busy: whether a checkpoint is still being written.
    """

  def wait(self) -> None:
    """Waits for `commit`."""

  def publish(self) -> None:
    """Copies what is new to where it stays."""
    self.commit()
    self.wait()

  def named(self, text: str) -> str:
    """Returns a text with the names of files as the user knows them."""
    return text


def _identity(folder: pathlib.Path) -> tuple[int, int] | None:
  """Returns what a folder keeps when it is moved; None if there is none."""
  try:
    found = folder.stat()
  except OSError:
    return None
  return found.st_dev, found.st_ino


class BucketWorkdir(Workdir):
  """A folder of a bucket, and a copy of it on this machine.

  The run reads and writes the copy. Each checkpoint is followed by
  TensorBoard's files, by the tables as they were when it was saved, then by its
  `MARK`: a checkpoint without it is not there. So the bucket always has all of
  some checkpoint, with all rows up to it.
  """

  remote = True

  def __init__(self, bucket: Bucket, folder: pathlib.Path):
    """Copies nothing yet."""
    super().__init__(folder)
    self._bucket = bucket
    self._lock: Lock | None = None
    # Tags of downloaded objects and stamps of copied files, by name: what has
    # another one is copied again.
    self._objects: dict[str, Any] = {}
    self._files: dict[str, Any] = {}
    self._steps: set[int] = set()
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None

  def __str__(self) -> str:
    """Returns the URL."""
    return self._bucket.url

  @property
  def path(self) -> epath.Path:
    """The folder, to be shown and opened."""
    return epath.Path(self._bucket.url)

  def child(self, name: str) -> Self:
    """Returns a folder in this one."""
    return type(self)(self._bucket.child(name), self.folder / name)

  def is_run(self) -> bool:
    """Returns whether it has checkpoints, as a run has."""
    return bool(self._bucket.find(FOLDER))

  def runs(self) -> list[Self]:
    """Returns the runs of a comparison, by name."""
    found = (x.partition(f'/{FOLDER}/') for x in self._bucket.find(RUNS))
    names = sorted({run for run, separator, _ in found if separator})
    return [self.child(name) for name in names]

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keeps other programs out of the folder.

    First it removes checkpoints without a mark; at the end, also after an
    error, it uploads what has changed.

    Raises:
      OSError: another program uses it.
      BucketError: the store fails.
    """
    lock = Lock(self._bucket)
    with lock.held():
      self._lock = lock
      try:
        self._remove_unfinished()
        yield
        self.publish()
      except BaseException:
        with contextlib.suppress(Exception):  # of two errors, the first
          self.publish()
        raise
      finally:
        self._lock = None

  def refresh(self) -> None:
    """Copies what has changed, of checkpoints all but the arrays."""
    found = self._bucket.find()
    steps = _marked(found)
    wanted = {
      name: _tag(about)
      for name, about in found.items()
      if _is_top_level(name) or _describes_checkpoint(name, steps)
    }
    for step in _steps(self.folder) - steps:
      shutil.rmtree(self.folder / FOLDER / str(step))
    for name in {*self._objects} - {*wanted}:
      (self.folder / name).unlink(missing_ok=True)
    changed = [
      name for name, tag in wanted.items() if tag != self._objects.get(name)
    ]
    try:
      self._bucket.download(self.folder, changed)
    except BaseException:
      # Half of a checkpoint must not be taken for one that is to be uploaded.
      for step in steps - self._steps:
        shutil.rmtree(self.folder / FOLDER / str(step), ignore_errors=True)
      raise
    self._steps, self._objects = steps, wanted
    self._files |= {name: _stamp(self.folder / name) for name in changed}

  def _remove_unfinished(self) -> None:
    """Removes what killed saves left: checkpoints without a mark."""
    found = self._bucket.find(FOLDER)
    marked = _marked(found)
    self._bucket.remove(
      [x for x in found if _is_of_save(x) and _step(x) not in marked]
    )

  def has(self, step: int) -> bool:
    """Returns whether a whole checkpoint is there now."""
    return step in _marked(self._bucket.find(f'{FOLDER}/{step}'))

  def fetch(self, step: int) -> None:
    """Copies the arrays of a checkpoint."""
    found = self._bucket.find(f'{FOLDER}/{step}')
    missing = [name for name in found if not (self.folder / name).exists()]
    self._bucket.download(self.folder, missing)

  def forget(self, step: int) -> None:
    """Removes a checkpoint that lies in quarantine here, and its copy there.

    Its step may be saved again.
    """
    self._upload_changed(QUARANTINE)
    self._remove_checkpoint(step)
    self._steps.discard(step)

  def commit(self, busy: Callable[[], bool] = lambda: False) -> None:
    """Begins to copy to the bucket what is new.

    Args:
      busy: whether a checkpoint is still being written.
    """
    self.wait()
    tables = {
      path.name: (_stamp(path), path.read_bytes())
      for path in _top_level_files(self.folder)
      if _stamp(path) != self._files.get(path.name)
    }

    def run() -> None:
      try:
        while busy():
          time.sleep(0.02)
        self._upload(tables)
      except Exception as error:
        self._error = error

    self._thread = threading.Thread(target=run, daemon=True)
    self._thread.start()

  def wait(self) -> None:
    """Waits for `commit`.

    Raises:
      BucketError: it failed.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def _upload(self, tables: Mapping[str, tuple[Any, bytes]]) -> None:
    """Copies to the bucket; in this order, whenever it is cut short."""
    self._check_owner()
    saved = _steps(self.folder)
    for step in saved - self._steps:
      self._upload_checkpoint(step)
    for tree in TREES:
      self._upload_changed(tree)
    for name, (stamp, content) in tables.items():
      if name != RESULT:
        self._write(name, stamp, content)
    self._check_owner()
    for step in saved - self._steps:
      self._bucket.write(f'{FOLDER}/{step}/{MARK}', b'')
    for step in self._steps - saved:
      self._remove_checkpoint(step)
    self._steps = saved
    if RESULT in tables:
      self._write(RESULT, *tables[RESULT])
    self._remove_lost()

  def _check_owner(self) -> None:
    if self._lock is not None:
      self._lock.check()

  def _upload_checkpoint(self, step: int) -> None:
    """Copies all but the mark, and clears what a killed save has left there."""
    names = _files_below(self.folder, f'{FOLDER}/{step}')
    before = self._bucket.find(f'{FOLDER}/{step}')
    self._bucket.remove(
      [x for x in before if _is_of_save(x) and x not in names]
    )
    mark = f'{FOLDER}/{step}/{MARK}'
    self._bucket.upload(self.folder, [name for name in names if name != mark])

  def _remove_checkpoint(self, step: int) -> None:
    names = self._bucket.find(f'{FOLDER}/{step}')
    mark = f'{FOLDER}/{step}/{MARK}'
    self._bucket.remove([mark, *(name for name in names if name != mark)])

  def _upload_changed(self, tree: str) -> None:
    stamps = {
      name: _stamp(self.folder / name)
      for name in _files_below(self.folder, tree)
    }
    changed = [x for x, stamp in stamps.items() if stamp != self._files.get(x)]
    self._bucket.upload(self.folder, changed)
    self._files |= stamps

  def _write(self, name: str, stamp: Any, content: bytes) -> None:
    self._bucket.write(name, content)
    self._files[name] = stamp

  def _remove_lost(self) -> None:
    """Removes the objects of files that the run has removed."""
    here = {path.name for path in _top_level_files(self.folder)}
    lost = [x for x in self._files if _is_top_level(x) and x not in here]
    self._bucket.remove(lost)
    for name in lost:
      del self._files[name]

  def named(self, text: str) -> str:
    """Returns a text with URLs where it names files of the copy."""
    return text.replace(str(self.folder), self._bucket.url)


def _step(name: str) -> int | None:
  """Returns the step of the checkpoint that an object is of."""
  folder, step, *rest = (*name.split('/'), '')
  return int(step) if folder == FOLDER and step.isdigit() and rest else None


def _is_of_save(name: str) -> bool:
  """Returns whether an object is one that a save writes, not a user."""
  parts = name.partition(f'{FOLDER}/{_step(name)}/')[2].split('/')
  return parts[0] in ('info', 'state', '_CHECKPOINT_METADATA')


def _marked(names: Iterable[str]) -> set[int]:
  """Returns the steps whose checkpoints are whole."""
  marks = {name for name in names if name.endswith(f'/{MARK}')}
  steps = {_step(name) for name in marks} - {None}
  return {step for step in steps if f'{FOLDER}/{step}/{MARK}' in marks}


def _describes_checkpoint(name: str, steps: set[int]) -> bool:
  """Returns whether a file is of one of these steps, but not of its arrays."""
  step = _step(name)
  return step in steps and not name.startswith(f'{FOLDER}/{step}/state')


def _is_top_level(name: str) -> bool:
  """Returns whether a file is one that runs read again."""
  return '/' not in name and not name.startswith('.')


def _top_level_files(folder: pathlib.Path) -> list[pathlib.Path]:
  if not folder.is_dir():
    return []
  paths = sorted(folder.iterdir())
  return [x for x in paths if x.is_file() and _is_top_level(x.name)]


def _files_below(folder: pathlib.Path, name: str) -> list[str]:
  paths = sorted((folder / name).rglob('*'))
  return [x.relative_to(folder).as_posix() for x in paths if x.is_file()]


def _steps(folder: pathlib.Path) -> set[int]:
  paths = (folder / FOLDER).glob('*')
  return {int(path.name) for path in paths if path.name.isdigit()}


def _tag(about: Mapping[str, Any]) -> tuple[Any, ...] | object:
  """Returns what changes with an object; never the same if nobody knows."""
  tags = [about.get(x) for x in ('ETag', 'etag', 'generation', 'mtime')]
  return (about['size'], *tags) if any(tags) else object()


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  """Returns what changes with a file."""
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _scratch() -> Iterator[pathlib.Path]:
  """Yields a new folder, and removes those of processes that were killed."""
  base = pathlib.Path(tempfile.gettempdir())
  for left in base.glob(f'{_SCRATCH}*/.owner'):
    with contextlib.suppress(OSError):
      if buckets.is_gone(left.read_bytes()):
        shutil.rmtree(left.parent)
  folder = pathlib.Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=base))
  try:
    owner = json.dumps(buckets.this_process())
    (folder / '.owner').write_text(owner, encoding='utf-8')
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def opened(workdir: str | os.PathLike) -> Iterator[Workdir]:
  """Opens a workdir to be read; see `Workdir.locked` to write.

  Args:
    workdir: a folder, which need not exist; "~" is expanded. Or
      'gs://BUCKET/FOLDER', or 's3://BUCKET/FOLDER'.

  Raises:
    ConfigError: it is empty, of no user, a file, or a URL of a kind that is not
      known.
    BucketError: there is no access to the bucket.
  """
  name = os.fspath(workdir)
  _check_name(name)
  if not is_url(name):
    yield Workdir(name)
    return
  bucket = Bucket(name.rstrip('/'))
  with _scratch() as folder:
    place = BucketWorkdir(bucket, folder)
    try:
      yield place
    except Exception as error:
      if error.args and isinstance(error.args[0], str):
        error.args = (place.named(error.args[0]), *error.args[1:])
      raise


def is_url(name: str) -> bool:
  """Returns whether a name begins with a scheme; 'C:/' is a drive."""
  return _SCHEME.match(name) is not None


def _check_name(name: str) -> None:
  """Raises a ConfigError where a name can be no workdir's."""
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
  if not is_url(name) and os.path.isfile(os.path.expanduser(name)):
    raise config_lib.ConfigError(
      f'workdir={name!r} is not allowed: it is a file'
    )
  if is_url(name) and not _URL.fullmatch(name.rstrip('/')):
    raise config_lib.ConfigError(
      f'workdir={name!r} is not allowed: it must be a folder, '
      'gs://BUCKET/FOLDER or s3://BUCKET/FOLDER'
    )
