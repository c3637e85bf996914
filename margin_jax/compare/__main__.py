"""Compares methods: the same config, several rules and seeds, one budget.

    python -m margin_jax.compare --config=configs/digits.py \\
        --methods=uniform,random,mms,loss --workdir=/tmp/compare

It writes tables and plots to the workdir. The same command again keeps complete
runs. --sweep=mmr.alpha=1e-5,1e-4,1e-3 sweeps a config field. A config file may
define its own methods (`get_methods`), a baseline (`get_baseline`), and lines
to print below the table (`get_summary`).
"""

import functools

from margin_jax import commands, terminal


@commands.command
def main(argv: list[str]) -> None:
  """Runs the comparison; a mistake of the user is one line."""
  parser = commands.Parser('compare', __doc__, fields=True)
  parser.require(
    '--workdir', metavar='FOLDER', help='where to write everything'
  )
  parser.option(
    '--methods',
    help='comma-separated rules, or presets (memory, proxy, fresh); config '
    'fields may follow, as in mms+reuse=5+pool_size=320. Default: those of the '
    'config file, or uniform,random,mms,loss,entropy',
  )
  parser.option(
    '--seeds',
    type=commands.integer,
    default=3,
    help='how many seeds; the first is config.seed. Default: 3',
  )
  parser.option(
    '--budget',
    choices=('steps', 'flops', 'seconds'),
    default='steps',
    help='what all methods may spend: the same steps, or the FLOPs or seconds '
    'of the baseline. Default: steps',
  )
  parser.option(
    '--baseline',
    help='the method that the others are compared with. Default: that of the '
    'config file, or uniform',
  )
  parser.option(
    '--sweep',
    action='append',
    default=[],
    help='a config field and its values: mmr.alpha=1e-5,1e-4. Several flags '
    'make a grid',
  )
  parser.option(
    '--split',
    choices=('test', 'validation'),
    default='test',
    help='the split whose errors the curves show. Default: test',
  )
  args = parser.parse(argv)

  from margin_jax import cpu
  from margin_jax.compare import experiment
  from margin_jax.compare import methods as methods_lib
  from margin_jax.train import devices as devices_lib
  from margin_jax.train import process, runs

  process.silence_libraries()
  file = args.config_file
  summary = getattr(file.module, 'get_summary', None)
  with process.one_line_errors():
    cpu.tune()
    devices_lib.use_compilation_cache()
    baseline = args.baseline or methods_lib.baseline_of(file)
    experiment.compare(
      file.config,
      args.workdir,
      methods=methods_lib.of_command_line(args.methods, file, baseline),
      seeds=args.seeds,
      budget=args.budget,
      baseline=baseline,
      sweep=args.sweep,
      split=args.split,
      command=commands.line('compare', *argv),
      summary=summary and functools.partial(summary, argument=file.argument),
      log=terminal.say,
      wait=terminal.wait,
    )
    best = runs.find_best(args.workdir)
    commands.finish(
      f'{args.workdir}/compare.md, and the tables and plots beside it',
      best and file.analyze_line(best),
    )


if __name__ == '__main__':
  main()
