"""Trains one config.

    python -m margin_jax.train --config=configs/digits.py --workdir=/tmp/digits

Any field can be set on the command line: --config.steps=300.
"""

import functools
import sys

from absl import flags

from margin_jax import command_line, cpu, ending, live, loop, parallel

flags.adopt_module_key_flags(command_line)
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
  command_line.begin(argv)
  if _COORDINATOR.value is not None:
    try:
      parallel.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    except (ValueError, RuntimeError) as error:
      sys.exit(f'error: {error}')
  elif (_PROCESSES.value, _PROCESS.value) != (None, None):
    sys.exit('error: --num_processes and --process_id need --coordinator')
  cpu.tune()
  parallel.use_compilation_cache()
  with ending.one_line_errors():
    # Flushed, so that a pipe or a log file shows each line at once.
    log = functools.partial(print, flush=True)
    view = live.on_terminal()
    loop.train(
      command_line.CONFIG.value, command_line.WORKDIR.value, log=log, view=view
    )


def run() -> None:
  """The command line."""
  command_line.run(main, __doc__)


if __name__ == '__main__':
  run()
