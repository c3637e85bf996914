"""What a command shows while it works; imports nothing slow."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

# Opens while something takes its time: `with wait('compiling'): ...`.
Wait = Callable[..., contextlib.AbstractContextManager[None]]


class Terminal(Console):
  """A rich console that leaves the cursor where it can be seen.

  A process that is killed, or stopped by Ctrl-Z, could not show it again.
  """

  def show_cursor(self, show: bool = True) -> bool:
    """Does nothing."""
    del show
    return False


def find() -> Terminal | None:
  """Returns standard output, if it is a terminal that can show a live view.

  Not where TERM is dumb or TTY_INTERACTIVE is 0; NO_COLOR takes the colours.
  """
  if sys.stdout is None or not sys.stdout.isatty():
    return None
  terminal = Terminal()
  return terminal if terminal.is_terminal and terminal.is_interactive else None


@contextlib.contextmanager
def wait(text: str, line: bool = True) -> Iterator[None]:
  """Shows what is being done: a spinner on a terminal, elsewhere a line.

  Args:
    text: what that is.
    line: whether there is a line elsewhere.
  """
  terminal = find()
  if terminal is None:
    if line:
      say(f'{text} ...')
    yield
    return
  with terminal.status(
    f'{text} ...', spinner='dots' if _is_utf8(terminal) else 'line'
  ):
    yield


@contextlib.contextmanager
def do_not_show(text: str, line: bool = True) -> Iterator[None]:
  """Shows nothing; for calls from Python."""
  del text, line
  yield


def _is_utf8(terminal: Console) -> bool:
  return terminal.encoding.startswith('utf')


def say(line: str) -> None:
  """Prints a line, which a pipe or a log file shows at once.

  Where nobody takes it (a full disk, a closed pipe) it is lost.
  """
  with contextlib.suppress(OSError):
    print(line, flush=True)
