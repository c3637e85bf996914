"""Trains one config.

    python -m margin_jax.train --config=configs/digits.py --workdir=/tmp/digits

Any field can be set on the command line: --config.steps=300.
"""

import errno
import functools
import re
import sys
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from margin_jax import (
  checkpoints,
  console,
  cpu,
  data,
  interrupts,
  loop,
  nonfinite,
  parallel,
)
from margin_jax import config as config_lib

# What a disk says that is full, or broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of checkpoints, metrics and result.json.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of process 0, where there are several processes; or "auto" on a '
  'TPU pod or a cluster that JAX knows.',
)
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With --coordinator.')
_PROCESS = flags.DEFINE_integer('process_id', None, 'With --coordinator.')


def main(argv: list[str]) -> None:
  """Runs the trainer; what the user can mend is one line, not a traceback."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Orbax logs tracebacks of what it raises as well.
  logging.set_verbosity(logging.FATAL)
  if _COORDINATOR.value is not None:
    try:
      parallel.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    except (ValueError, RuntimeError) as error:
      sys.exit(f'error: {error}')
  elif (_PROCESSES.value, _PROCESS.value) != (None, None):
    sys.exit('error: --num_processes and --process_id need --coordinator')
  cpu.tune()
  parallel.use_compilation_cache()
  try:
    # Flushed, so that a pipe or a log file shows each line at once.
    log = functools.partial(print, flush=True)
    loop.train(_CONFIG.value, _WORKDIR.value, log=log)
  except (
    config_lib.ConfigError,
    data.DatasetError,
    nonfinite.NonFiniteError,
    checkpoints.DamagedError,
    checkpoints.SaveError,
  ) as error:
    _stop(str(error))
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1 or 'RESOURCE_EXHAUSTED' in str(error):
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
  if jax.process_count() == 1 and not at_once:
    sys.exit(f'error: {message}')
  # To leave in good order would be to wait for the others.
  print(f'error: {message}', file=sys.stderr, flush=True)
  interrupts.leave(1)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a mistake in them, or in the config file, is one line."""
  try:
    rest = flags.FLAGS(argv)
    dict(_CONFIG.value)  # a file that could not be read raises only now
  except flags.Error as error:
    # Errors inside a config file arrive as text that ends a traceback.
    last = str(error).strip().splitlines()[-1]
    sys.exit('error: ' + last.removeprefix('margin_jax.config.ConfigError: '))
  except (AttributeError, KeyError) as error:  # of a field, of a group
    if not re.match(r"""['"\\]+\w+""", str(error.args[0])):
      raise  # a mistake in the config file's own code: show where
    text = str(error.args[0]).replace('\\n', ' ')
    name, *hint = re.findall(r'\w+(?: \w+)*', text)
    sys.exit(f'error: unknown config field {name!r}. {" ".join(hint)}'.strip())
  except OSError as error:
    sys.exit(f'error: --config: {str(error).strip().splitlines()[-1].strip()}')
  return rest


def run() -> None:
  """The command line."""
  console.adopt_flags(__name__, __doc__)
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=_parse_flags)


if __name__ == '__main__':
  run()
