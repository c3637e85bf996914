"""Measures the margins of a trained run and ranks its examples by margin.

    python -m margin_jax.analyze --workdir=/tmp/digits

Writes to WORKDIR/analysis: distributions.csv (signed margins, MMS, and
normalised margins at the layers, at every checkpoint), signatures.csv (of the
normalised margins), margins.png, and for the last checkpoint train.csv and
test.csv (of MNLI also test_mismatched.csv): every example, the most negative
margin first. The first 32 of each, candidates for label errors, are also a
sheet of images, most_negative_train.png, or a table of sentences. The examples
with the smallest MMS are those that an annotator should see next. Figures are
written as PNG and as PDF.
"""

import argparse

from margin_jax import config as config_lib
from margin_jax.analyze.report import analyze
from margin_jax.train import process, runs


def main(argv: list[str] | None = None) -> None:
  """Runs the command line; a mistake of the user is one line."""
  parser = argparse.ArgumentParser(
    prog='python -m margin_jax.analyze',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', required=True, help='of the run')
  parser.add_argument(
    '--layers', help='comma-separated; default: input,features'
  )
  parser.add_argument(
    '--steps', help='comma-separated checkpoints; default: all that the run has'
  )
  parser.add_argument(
    '--examples', type=int, help='the first of each split; default: all'
  )
  parser.add_argument('--data_dir', help='default: where the run read it')
  parser.add_argument('--out', help='default: WORKDIR/analysis')
  parser.add_argument(
    '--config', help='the config file, if it registers a model or a dataset'
  )
  args = parser.parse_args(argv)
  layers = None if args.layers is None else tuple(args.layers.split(','))
  with process.one_line_errors():
    if args.config is not None:
      runs.register_from(args.config.partition(':')[0])
    analyze(
      args.workdir,
      layer_names=layers,
      steps=_parse_steps(args.steps),
      examples=args.examples,
      data_dir=args.data_dir,
      out=args.out,
    )


def _parse_steps(text: str | None) -> list[int] | None:
  """Returns the integers of '500,1000'."""
  if text is None:
    return None
  try:
    return [int(part) for part in text.split(',')]
  except ValueError:
    raise config_lib.ConfigError(
      f'steps={text!r} is not allowed: it must be integers, as in 500,1000'
    ) from None


if __name__ == '__main__':
  main()
