"""A trained BERT in the layout of Hugging Face.

    python -m margin_jax.export --workdir=/tmp/glue_rte --out=/tmp/rte_model

writes config.json, model.safetensors and, if the run read words of a vocab.txt,
vocab.txt and tokenizer_config.json:
`BertForSequenceClassification.from_pretrained('/tmp/rte_model')` loads it, and
so does `--config.model.pretrained=/tmp/rte_model`.
"""

import argparse
import os
import pathlib

from margin_jax import config as config_lib
from margin_jax import models
from margin_jax.models import bert_weights
from margin_jax.train import process, runs
from margin_jax.train import setup as setup_lib


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
  workdir = os.path.abspath(os.path.expanduser(workdir))
  checkpoints = runs.checkpoints(workdir, None if step is None else [step])
  try:
    config = runs.saved_config(checkpoints.info(), data_dir)
    config_lib.require(
      models.find(config.model.name).reads == 'sentences', 'model.name',
      config.model.name, 'a BERT to be exported',
    )  # fmt: skip
    devices, dataset = setup_lib.load(
      config, None, training=False, workdir=workdir
    )
    spec = setup_lib.make_spec(config, dataset, devices.total)
    state = setup_lib.init_state(config, dataset, spec, restoring=True)
    state, _ = checkpoints.restore(state, step)
  finally:
    checkpoints.close()
  folder = runs.make_folder(out)
  bert_weights.write(
    folder,
    {'params': state.params},
    bert_weights.sizes_of(spec.model),
    setup_lib.vocabulary(config, workdir),
  )
  return folder


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m margin_jax.export',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', required=True, help='of the run')
  parser.add_argument('--out', required=True, help='the folder to write to')
  parser.add_argument('--step', type=int, help='default: the last checkpoint')
  parser.add_argument('--data_dir', help='default: where the run found it')
  args = parser.parse_args(argv)
  with process.one_line_errors():
    folder = export(
      args.workdir, args.out, step=args.step, data_dir=args.data_dir
    )
    print(f'written to {folder}')


if __name__ == '__main__':
  main()
