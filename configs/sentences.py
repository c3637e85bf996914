"""Your own sentences: a small BERT from random weights.

    python -m margin_jax.train --config=configs/sentences.py \\
        --workdir=/tmp/reviews --config.data.name=csv:PATH \\
        --config.data.vocabulary=vocab.txt

Argument: how to select examples, `selection=memory` (soft pruning by remembered
margins; no pool) or `uniform` (plain training).

PATH is a CSV file with the columns text, or text_a and text_b, and label. The
vocabulary is the vocab.txt of any uncased BERT, or one made from your own
sentences (docs/howto/own_data.md). To fine-tune published weights, use
configs/glue_bert.py. Without a PATH, this trains on the generated entailment
task. No paper has this row.
"""

from margin_jax import config as config_lib


def get_config(argument: str | None = None):
  """BERT of two layers, b=32, Adam with warm-up and linear decay."""
  args = config_lib.parse_arguments(
    argument, selection=('memory', config_lib.UNIFORM)
  )
  config = config_lib.default()
  config.steps = 1000
  config.batch_size = 32
  config.eval_every = 500
  config.checkpoint_every = 500
  config.data.name = 'entailment'
  config.data.max_length = 64
  config.data.buckets = (16, 32)
  config.model.name = 'bert2_64_4'
  config.optimizer.name = 'adam'
  config.optimizer.learning_rates = (5e-4,)
  config.optimizer.warmup = 100
  config.optimizer.decay = 'linear'
  if args.selection != config_lib.UNIFORM:
    config.update_from_flattened_dict(
      config_lib.preset(args.selection, config.data.name)
    )
  return config
