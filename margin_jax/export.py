"""A trained BERT in the layout of Hugging Face.

    python -m margin_jax.export --workdir=/tmp/glue_rte --out=/tmp/rte_model

writes config.json, model.safetensors and, if the run read words of a vocab.txt,
vocab.txt and tokenizer_config.json:
`BertForSequenceClassification.from_pretrained('/tmp/rte_model')` loads it, and
so does `--config.model.pretrained=/tmp/rte_model`.
"""

import argparse
import pathlib

from margin_jax import config as config_lib
from margin_jax import models
from margin_jax.models import bert_weights
from margin_jax.train import process, runs, vocabulary


def export(
  workdir: str,
  out: str,
  *,
  step: int | None = None,
  data_dir: str | None = None,
) -> pathlib.Path:
  """Writes the model of a run for Hugging Face.

  Args:
    workdir: of the run.
    out: the folder to write to, created if need be.
    step: which checkpoint; None is the last.
    data_dir: where the dataset lies now, if not where the run found it.

  Returns:
    The folder.

  Raises:
    ConfigError: there is no such checkpoint, or the model is no BERT.
    DatasetError: the dataset is missing or broken.
    CorruptError: the checkpoint cannot be read.
  """
  steps = None if step is None else [step]
  with runs.open_run(workdir, steps, data_dir) as run:
    config_lib.require(
      models.find(run.config.model.name).reads == 'sentences', 'model.name',
      run.config.model.name, 'a BERT to be exported',
    )  # fmt: skip
    state = run.restore(step)
    folder = runs.make_folder(out)
    bert_weights.write(
      folder,
      {'params': state.params},
      bert_weights.sizes_of(run.spec.model),
      vocabulary.find(run.config, str(run.workdir.folder)),
    )
  return folder


def main(argv: list[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m margin_jax.export',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', required=True, help='of the run')
  parser.add_argument('--out', required=True, help='the folder to write to')
  parser.add_argument('--step', type=int, help='default: the last checkpoint')
  parser.add_argument('--data_dir', help='default: where the run found it')
  parser.add_argument(
    '--config', help='the config file, if it registers a model or a dataset'
  )
  args = parser.parse_args(argv)
  with process.one_line_errors():
    if args.config is not None:
      runs.register_from(args.config.partition(':')[0])
    folder = export(
      args.workdir, args.out, step=args.step, data_dir=args.data_dir
    )
    print(f'written to {folder}')


if __name__ == '__main__':
  main()
