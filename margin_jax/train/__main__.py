"""Trains one config.

    python -m margin_jax.train --config=configs/digits.py --workdir=/tmp/digits

You can set any field on the command line: --config.steps=300. If the run
stopped, the same command resumes it.
"""

from margin_jax import commands, terminal


@commands.command
def main(argv: list[str]) -> None:
  """Runs the trainer; what the user can mend is one line, not a traceback."""
  parser = commands.Parser('train', __doc__, fields=True)
  parser.require(
    '--workdir', metavar='FOLDER', help='where to write everything'
  )
  parser.option(
    '--coordinator',
    metavar='HOST:PORT',
    help='address of process 0, if there are several processes; or "auto" on a '
    'TPU pod or a cluster that JAX knows',
  )
  parser.option(
    '--num_processes',
    type=commands.integer,
    help='with --coordinator: how many processes train together',
  )
  parser.option(
    '--process_id',
    type=commands.integer,
    help='with --coordinator: the number of this process, from 0',
  )
  parser.option(
    '--join_seconds',
    type=commands.integer,
    default=300,
    help='with --coordinator: how long all processes may take to find each '
    'other. Default: 300',
  )
  args = parser.parse(argv)
  processes = args.num_processes, args.process_id
  if args.coordinator is None and processes != (None, None):
    parser.error('--num_processes and --process_id need --coordinator')
  if args.join_seconds < 1:
    parser.error('--join_seconds must be at least 1')

  from margin_jax import cpu
  from margin_jax.train import devices as devices_lib
  from margin_jax.train import loop, process, progress

  process.silence_libraries()
  file = args.config_file
  config = file.config
  with process.one_line_errors():
    if args.coordinator is not None:
      try:
        devices_lib.join(args.coordinator, *processes, args.join_seconds)
      except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    elif loop.say_if_complete(config, args.workdir, terminal.say):
      commands.finish(args.workdir, file.analyze_line(args.workdir))
      return
    cpu.tune()
    devices_lib.use_compilation_cache()
    loop.train(
      config,
      args.workdir,
      log=terminal.say,
      view=progress.on_terminal(),
      wait=terminal.wait,
    )
    if devices_lib.is_main_process():
      commands.finish(args.workdir, file.analyze_line(args.workdir))


if __name__ == '__main__':
  main()
