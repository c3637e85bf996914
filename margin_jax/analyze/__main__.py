"""Measures the margins of a trained run and ranks its examples by margin.

    python -m margin_jax.analyze --workdir=/tmp/digits

It writes these files to WORKDIR/analysis: distributions.csv (signed margins,
MMS, and normalized margins at the layers, for every checkpoint), signatures.csv
(the signatures of the normalized margins), margins.png, and, for the last
checkpoint, train.csv and test.csv (for MNLI also test_mismatched.csv): every
example, the most negative margin first. The first 32 examples of each, which
are candidates for label errors, are also shown as images,
most_negative_train.png, or as a table of sentences. The examples with the
smallest MMS are the ones that an annotator should label next. Figures are
written as PNG and as PDF.
"""

import json
import shlex

from margin_jax import commands, terminal


@commands.command
def main(argv: list[str]) -> None:
  """Runs the command line; a mistake of the user is one line."""
  parser = commands.Parser('analyze', __doc__)
  parser.require('--workdir', metavar='FOLDER', help='the run to read')
  parser.option(
    '--layers', help='comma-separated layers; default: input,features'
  )
  parser.option(
    '--steps',
    type=commands.integers,
    help='comma-separated checkpoints; default: all of the run',
  )
  parser.option(
    '--examples',
    type=commands.integer,
    help='how many of each split, from its first; default: all',
  )
  parser.option(
    '--data_dir', help='folder of the dataset; default: where the run read it'
  )
  parser.option(
    '--out', metavar='FOLDER', help='where to write; default: WORKDIR/analysis'
  )
  parser.option(
    '--config',
    metavar='FILE',
    help='the config file, if it registers a model or a dataset',
  )
  args = parser.parse(argv)
  layers = None if args.layers is None else tuple(args.layers.split(','))

  with terminal.wait('loading JAX'):
    from margin_jax.analyze.report import analyze
    from margin_jax.train import process, runs
  with process.one_line_errors():
    if args.config is not None:
      runs.register_from(args.config)
    folder = analyze(
      args.workdir,
      layer_names=layers,
      steps=args.steps,
      examples=args.examples,
      data_dir=args.data_dir,
      out=args.out,
      log=terminal.say,
      wait=terminal.wait,
    )
    commands.finish(
      f'{folder}/margins.png, and the tables beside it',
      shlex.join(['python', '-i', '-c', _loading(args.workdir, args.config)]),
    )


def _loading(workdir: str, config: str | None) -> str:
  """Returns the Python code that loads the network of the run."""
  lines = [
    'import margin_jax',
    f'trained = margin_jax.load({json.dumps(workdir, ensure_ascii=False)})',
  ]
  if config is not None:
    register = f'runs.register_from({json.dumps(config, ensure_ascii=False)})'
    lines[1:1] = ['from margin_jax.train import runs', register]
  return '; '.join([*lines, 'print(trained)'])


if __name__ == '__main__':
  main()
