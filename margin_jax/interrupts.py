"""SIGTERM and SIGINT: the running call ends, the state is saved."""

import multiprocessing
import os
import signal
import threading
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
  """Training stopped at a signal; all its steps are saved.

  Attributes:
    status: what the process should exit with: 128 plus the signal's number, as
      shells have it.
  """

  def __init__(self, message: str, number: int):
    """What is saved, and which signal it was."""
    super().__init__(message)
    self.status = 128 + number


def leave(status: int) -> NoReturn:
  """Ends the process at once; nothing is waited for."""
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(status)


class Interrupts:
  """While open, remembers the first signal; a second one ends the process.

  Only the main thread may handle signals; in another, nothing is remembered.
  Nor are those that the process was started to ignore.

  Attributes:
    number: of the signal that came, or None.
  """

  def __init__(self):
    """Nothing has come."""
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
        'stopped between two runs; the same command goes on from there',
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
      if byte[0] not in self._before:
        continue
      if came or self._passed_on:
        leave(128 + byte[0])
      came += 1
    os.close(self._pipe[0])
