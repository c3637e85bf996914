"""GLUE, BERT-base: multi-margin regularization in fine-tuning.

    python -m margin_jax.train --config=configs/glue_bert.py:rte \\
        --config.model.pretrained=FOLDER --config.data.data_dir=DIR \\
        --workdir=/tmp/glue_rte

FOLDER has config.json, vocab.txt and model.safetensors (or
pytorch_model.bin), or is a name on the Hugging Face hub, which is downloaded:
google-bert/bert-base-uncased. DIR is where TFDS prepared the task.

One command runs a whole row, baseline and MMR with three seeds. For MNLI, MMR
is two runs, and the last line is the mean of matched and mismatched accuracy:

    python -m margin_jax.compare --config=configs/glue_bert.py:mnli \\
        --config.model.pretrained=FOLDER --config.data.data_dir=DIR \\
        --workdir=/tmp/glue_mnli

Arguments: the task `rte`, `mrpc`, `sst2`, `qnli`, `qqp` or `mnli`; method=mmr
or baseline; epochs=3; model=bert_base, or the sizes of the weights in FOLDER,
such as bert6_384_12.

Paper's results (Weinstein et al. 2020, Table 1), baseline and MMR. The paper
calls them test results. Ours are for the validation splits, because the labels
of GLUE's test splits are secret:

    qnli  accuracy  91.06  91.48      sst2  accuracy  92.08  92.43
    mrpc  F1        90.68  91.43      rte   accuracy  68.23  69.67
    qqp   F1        87.9   88.04      mnli  accuracy  84.5   84.70 (mean of two)

Adam as in BERT's pre-training (decoupled weight decay 0.01, except for biases
and LayerNorm; epsilon 1e-6) at 2e-5, 3 epochs, dropout 0.1, alpha 1e-5. For
MNLI mismatched, the paper has 1e-6: --config.mmr.alpha=1e-6. The paper names
neither batch size nor schedule: batches of 32, linear warm-up over a tenth of
the steps and linear decay, clipping at norm 1 are BERT's own.

Unlike in the paper, a batch has sentences of similar length: a step samples
from those of up to 32, 64 or 128 tokens. --config.data.buckets="()" pads all
sentences to 128 and samples from all of them.

Ours: not yet run with BERT-base. With a small pretrained BERT (6 layers of 384)
and Adam without weight decay, MRPC has F1 83.05 +- 0.71 and accuracy 73.61 +-
1.21, with and without MMR, over 3 seeds: benchmarks/glue_minilm.md.

Cost, calculated from XLA's FLOP count of the step at the full 128 tokens (68
GFLOP an example): 0.5 PFLOP for RTE, 80 PFLOP for MNLI: at 50 TFLOP/s from ten
seconds to half an hour. Shorter sentences are padded to 32 or 64 tokens, and
cost less.
"""

from margin_jax import config as config_lib
from margin_jax.compare import report
from margin_jax.config import UNIFORM

EXAMPLES = {
  'rte': 2_490,
  'mrpc': 3_668,
  'sst2': 67_349,
  'qnli': 104_743,
  'qqp': 363_846,
  'mnli': 392_702,
}


# Methods whose runs MNLI's row is the mean of.
MATCHED, MISMATCHED = 'matched', 'mismatched'


def _parse(argument: str | None):
  return config_lib.parse_arguments(
    argument,
    task=tuple(EXAMPLES),
    method=('mmr', 'baseline'),
    epochs=3,
    model='bert_base',
  )


def get_config(argument: str | None = None):
  """The config of one task."""
  args = _parse(argument)
  config = config_lib.default()
  config.batch_size = 32
  epoch = EXAMPLES[args.task] // config.batch_size
  config.steps = args.epochs * epoch
  config.log_every = min(epoch, 100)
  config.eval_every = epoch
  config.checkpoint_every = epoch
  config.eval_batch_size = 128
  config.data.name = f'glue/{args.task}'
  config.model.name = args.model
  config.model.dropout = 0.1
  config.optimizer.name = 'adamw'
  config.optimizer.weight_decay = 0.01
  config.optimizer.epsilon = 1e-6
  config.optimizer.learning_rates = (2e-5,)
  config.optimizer.warmup = config.steps // 10
  config.optimizer.decay = 'linear'
  config.optimizer.clip_norm = 1.0
  if args.method == 'mmr':
    config.mmr.alpha = 1e-5
  return config


def get_methods(argument: str | None = None):
  """The fields of the runs of a row, by name, for margin_jax.compare."""
  alphas = {'mmr': 1e-5}
  if _parse(argument).task == 'mnli':
    alphas = {MATCHED: 1e-5, MISMATCHED: 1e-6}
  return {
    name: {'mmr.alpha': alpha}
    for name, alpha in {UNIFORM: 0.0, **alphas}.items()
  }


def get_summary(rows: list, argument: str | None = None) -> list[str]:
  """The line of MNLI: the mean of its two test splits, over the seeds."""
  if _parse(argument).task != 'mnli':
    return []
  runs = {(row['method'], row['seed']): row for row in rows}
  seeds = list(dict.fromkeys(row['seed'] for row in rows))

  def accuracy(matched: str, mismatched: str) -> str | None:
    means = [
      1
      - runs[matched, seed]['test_error'] / 2
      - runs[mismatched, seed]['test_mismatched_error'] / 2
      for seed in seeds
      if {(matched, seed), (mismatched, seed)} <= {*runs}
    ]
    return report.percent(*report.mean_and_deviation(means)) if means else None

  parts = [
    (f'`{UNIFORM}`', accuracy(UNIFORM, UNIFORM)),
    (
      f'MMR, of `{MATCHED}` and `{MISMATCHED}`,',
      accuracy(MATCHED, MISMATCHED),
    ),
  ]
  texts = [f'{name} {mean}' for name, mean in parts if mean is not None]
  title = 'Mean of matched and mismatched accuracy, %'
  return [f'{title}: {"; ".join(texts)}.'] if texts else []
