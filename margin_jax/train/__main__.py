"""Trains one config.

    python -m margin_jax.train --config=configs/digits.py --workdir=/tmp/digits

Any field can be set on the command line: --config.steps=300.
"""

import functools
import sys

from absl import flags

from margin_jax import cpu
from margin_jax.train import devices as devices_lib
from margin_jax.train import flags as flags_lib
from margin_jax.train import loop, process, progress

flags.adopt_module_key_flags(flags_lib)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of process 0, where there are several processes; or "auto" on a '
  'TPU pod or a cluster that JAX knows.',
)
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With --coordinator.')
_PROCESS = flags.DEFINE_integer('process_id', None, 'With --coordinator.')
_JOIN_SECONDS = flags.DEFINE_integer(
  'join_seconds',
  devices_lib.JOIN_SECONDS,
  'With --coordinator: how long all processes may take to find each other.',
  lower_bound=1,
)


def main(argv: list[str]) -> None:
  """Runs the trainer; what the user can mend is one line, not a traceback."""
  flags_lib.begin(argv)
  if _COORDINATOR.value is not None:
    try:
      devices_lib.join(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS.value,
        _JOIN_SECONDS.value,
      )
    except (ValueError, RuntimeError) as error:
      sys.exit(f'error: {error}')
  elif (_PROCESSES.value, _PROCESS.value) != (None, None):
    sys.exit('error: --num_processes and --process_id need --coordinator')
  cpu.tune()
  devices_lib.use_compilation_cache()
  with process.one_line_errors():
    # Flushed, so that a pipe or a log file shows each line at once.
    log = functools.partial(print, flush=True)
    view = progress.on_terminal()
    loop.train(
      flags_lib.CONFIG.value, flags_lib.WORKDIR.value, log=log, view=view
    )


# The command line.
run = functools.partial(flags_lib.run, main, __doc__)

if __name__ == '__main__':
  run()
