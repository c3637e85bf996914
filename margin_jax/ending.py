"""What the user can mend ends a command with one line, not a traceback."""

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax

from margin_jax import checkpoints, data, interrupts, nonfinite, parallel
from margin_jax import config as config_lib

# What a disk says that is full, or broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """What the user can mend ends the process with a line, not a traceback."""
  try:
    yield
  except (
    config_lib.ConfigError,
    data.DatasetError,
    nonfinite.NonFiniteError,
    checkpoints.DamagedError,
    checkpoints.SaveError,
  ) as error:
    _stop(str(error))
  except jax.errors.JaxRuntimeError as error:
    if not parallel.several_processes() or 'RESOURCE_EXHAUSTED' in str(error):
      raise
    line = str(error).strip().splitlines()[0]
    _stop(
      f'another process of this run is gone ({line}); start all of them again, '
      'and they go on from the last checkpoint'
    )
  except OSError as error:
    if error.errno not in FULL:
      raise
    # TensorBoard's writer would try once more at exit, and complain at length.
    _stop(f'{error}; what was saved before is as it was', at_once=True)
  except interrupts.Interrupted as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.status)


def _stop(message: str, at_once: bool = False) -> NoReturn:
  """Ends with one line; where there are several processes, without them."""
  # Asked first, because the other question starts a backend.
  alone = not jax.distributed.is_initialized()
  if (alone or not parallel.several_processes()) and not at_once:
    sys.exit(f'error: {message}')
  # To leave in good order would be to wait for the others.
  print(f'error: {message}', file=sys.stderr, flush=True)
  interrupts.leave(1)
