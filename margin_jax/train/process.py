"""How a process ends: signals, output that goes away, errors in one line."""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self, TextIO

import jax
from absl import logging

from margin_jax import config as config_lib
from margin_jax import cpu, data, files, user_code
from margin_jax.data.workers import HANGUP, SIGNALS
from margin_jax.train import checkpoints, guard
from margin_jax.train import devices as devices_lib


class Interrupted(KeyboardInterrupt):
  """Training stopped at a signal; all its steps are saved.

  Attributes:
    status: what the process should exit with: 128 plus the signal's number, as
      shells have it.
  """

  def __init__(self, message: str, number: int):
    """Says what is saved, and which signal it was."""
    super().__init__(message)
    self.status = 128 + number


def leave(status: int) -> NoReturn:
  """Ends the process at once; nothing is waited for."""
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(status)


class Interrupts:
  """While open, remembers the first signal; a second one ends the process.

  SIGHUP counts as a first signal, never as a second: of a terminal that closes,
  the kernel sends one, and the shell another.

  Only the main thread may handle signals; in another, nothing is remembered.
  Nor are those that the process was started to ignore.

  Attributes:
    number: the number of the signal that came, or None.
  """

  def __init__(self):
    """Starts without a signal."""
    self.number: int | None = None
    self._before: dict[int, Any] = {}
    self._pipe: tuple[int, int] | None = None
    self._old_wakeup = -1
    # Whether the first signal was seen by another one of these.
    self._passed_on = False

  def __enter__(self) -> Self:
    """Takes the signals over."""
    if threading.current_thread() is not threading.main_thread():
      return self
    self._pipe = os.pipe()
    os.set_blocking(self._pipe[1], False)
    self._old_wakeup = signal.set_wakeup_fd(self._pipe[1])
    for number in SIGNALS:
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._remember)
    self._passed_on = any(outer.number for outer in self._outer())
    # Python's handlers wait for what is computed in C++, and that may hang.
    threading.Thread(target=self._count, daemon=True).start()
    return self

  def __exit__(self, *error: object) -> None:
    """Gives them back."""
    if self._pipe is None:
      return
    for number, handler in self._before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_wakeup)
    os.close(self._pipe[1])  # which ends the thread

  def check(self) -> None:
    """Raises `Interrupted` if a signal came; for between two runs."""
    if self.number is not None:
      raise Interrupted(
        'stopped between two runs; the same command resumes from there',
        self.number,
      )

  def _remember(self, number: int, frame: object) -> None:
    self.number = self.number or number
    for outer in self._outer():  # which stops what comes after, too
      outer._passed_on = True
      outer._remember(number, frame)

  def _outer(self) -> list['Interrupts']:
    owners = {getattr(x, '__self__', None) for x in self._before.values()}
    return [owner for owner in owners if isinstance(owner, Interrupts)]

  def _count(self) -> None:
    came = 0
    while byte := os.read(self._pipe[0], 1):
      if byte[0] == HANGUP or byte[0] not in self._before:
        continue
      if came or self._passed_on:
        leave(128 + byte[0])
      came += 1
    os.close(self._pipe[0])


class _Output:
  """A standard stream that says no more once nobody takes what it says.

  A pipe without a reader, a full disk or a closed terminal is no reason to end
  hours of work.
  """

  def __init__(self, stream: TextIO):
    """Writes to a stream."""
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    """Returns what else the stream has."""
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes, or does not."""
    self._attempt(lambda: self._stream.write(text))
    return len(text)

  def flush(self) -> None:
    """Flushes, or does not."""
    self._attempt(self._stream.flush)

  def _attempt(self, function: Callable[[], Any]) -> None:
    try:
      function()
    except BlockingIOError:  # nobody reads now
      pass
    except OSError:
      # What is still in buffers is lost at exit, without complaints.
      with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
  """Goes on in silence where standard output, or error, goes away."""
  for number in range(3):  # else the next file that is opened would be it
    try:
      os.fstat(number)
    except OSError:
      nowhere = os.open(os.devnull, os.O_RDWR)
      if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
  before = sys.stdout, sys.stderr
  after = [stream and _Output(stream) for stream in before]
  sys.stdout, sys.stderr = after
  try:
    yield
  finally:
    for stream in filter(None, after):
      stream.flush()
    sys.stdout, sys.stderr = before


def silence_libraries() -> None:
  """Keeps libraries from logging: Orbax does what it raises as well."""
  logging.set_verbosity(logging.FATAL)


# What a disk says that is full, or broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# What is said of a path at which something else lies, or that is protected.
IN_THE_WAY = (
  errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP,
  errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
)  # fmt: skip


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Ends the process with one line where the user can mend what went wrong.

  Output that goes away does not end it: see `lasting_output`.
  """
  with lasting_output(), _explained():
    yield


@contextlib.contextmanager
def _explained() -> Iterator[None]:
  try:
    yield
  except user_code.UserCodeError as error:
    print(error.frames, end='', file=sys.stderr, flush=True)
    _stop(str(error))
  except (
    config_lib.ConfigError,
    cpu.BackendError,
    files.FileError,
    data.DatasetError,
    guard.NonFiniteError,
    checkpoints.CorruptError,
    checkpoints.SaveError,
  ) as error:
    _stop(str(error))
  except jax.errors.JaxRuntimeError as error:
    if not devices_lib.several_processes() or 'RESOURCE_EXHAUSTED' in str(
      error
    ):
      raise
    line = str(error).strip().splitlines()[0]
    _stop(
      f'another process of this run is gone ({line}); start all of them again, '
      'and they resume from the last checkpoint'
    )
  except OSError as error:
    if error.errno in IN_THE_WAY and error.filename is not None:
      _stop(f'{error}; what was saved before is intact')
    if error.errno not in FULL:
      raise
    # TensorBoard's writer would try once more at exit, and complain at length.
    _stop(f'{error}; what was saved before is intact', at_once=True)
  except Interrupted as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.status)


def _stop(message: str, at_once: bool = False) -> NoReturn:
  """Ends the process with one line, without waiting for other processes."""
  # Asked first, because the other question starts a backend.
  alone = not jax.distributed.is_initialized()
  if (alone or not devices_lib.several_processes()) and not at_once:
    sys.exit(f'error: {message}')
  # To leave in good order would be to wait for the others.
  print(f'error: {message}', file=sys.stderr, flush=True)
  leave(1)
