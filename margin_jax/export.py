"""Writes a trained BERT in the layout of Hugging Face.

    python -m margin_jax.export --workdir=/tmp/glue_rte --out=/tmp/rte_model

This writes config.json, model.safetensors and, if the run read the words of a
vocab.txt, vocab.txt and tokenizer_config.json.
`BertForSequenceClassification.from_pretrained('/tmp/rte_model')` loads the
model, and so does `--config.model.pretrained=/tmp/rte_model`.
"""

import pathlib
import shlex

from margin_jax import commands, terminal


def export(
  workdir: str,
  out: str,
  *,
  step: int | None = None,
) -> pathlib.Path:
  """Writes the model of a run for Hugging Face.

  Args:
    workdir: the run's folder.
    out: the folder to write to, created if need be.
    step: which checkpoint; None is the last.

  Returns:
    The folder.

  Raises:
    ConfigError: there is no such checkpoint, or the model is not a BERT.
    CorruptError: the checkpoint cannot be read.
  """
  from margin_jax import config as config_lib
  from margin_jax import models
  from margin_jax.models import bert_weights
  from margin_jax.train import runs, vocabulary

  steps = None if step is None else [step]
  with runs.open_run(workdir, steps, reads_data=False) as run:
    config_lib.require(
      models.find(run.config.model.name).reads == 'sentences', 'model.name',
      run.config.model.name, 'a BERT to be exported',
    )  # fmt: skip
    state = run.restore(step)
    folder, source = runs.make_folder(out), str(run.workdir.folder)
    bert_weights.write(
      folder,
      {'params': state.evaluated['params']},
      bert_weights.sizes_of(run.spec.model),
      vocabulary.kept(source) or vocabulary.find(run.config, source),
    )
  return folder


@commands.command
def main(argv: list[str]) -> None:
  """Runs the command line."""
  parser = commands.Parser('export', __doc__)
  parser.require('--workdir', metavar='FOLDER', help='the run to read')
  parser.require('--out', metavar='FOLDER', help='where to write the model')
  parser.option(
    '--step', type=commands.integer, help='which checkpoint; default: the last'
  )
  args = parser.parse(argv)
  with terminal.wait('loading JAX'):
    from margin_jax.train import process
  with process.one_line_errors():
    with terminal.wait('exporting'):
      folder = export(args.workdir, args.out, step=args.step)
    load = (
      'from transformers import BertForSequenceClassification as Bert; '
      f'print(Bert.from_pretrained({str(folder)!r}))'
    )
    commands.finish(folder, shlex.join(['python', '-c', load]))


if __name__ == '__main__':
  main()
