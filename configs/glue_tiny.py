"""A BERT of two layers on a generated entailment task: no download.

    python -m margin_jax.train --config=configs/glue_tiny.py \\
        --workdir=/tmp/glue_tiny

Arguments: method=uniform or any rule, as in `configs/glue_tiny.py:mms`;
mmr=true; seed=0.

margin_jax/data/entailment.py generates the pairs: 8,000 to train and 1,000 to
test, half of them entailed. The network learns everything from random weights.
At first the loss stays where guessing puts it, at 0.69; then it falls.
"""

from margin_jax import config as config_lib
from margin_jax import selection


def get_config(argument: str | None = None):
  """The config of one run."""
  args = config_lib.parse_arguments(
    argument,
    method=(config_lib.UNIFORM, *selection.RULES),
    mmr=False,
    seed=0,
  )
  config = config_lib.default()
  config.seed = args.seed
  config.steps = 2000
  config.batch_size = 64
  if args.method != config_lib.UNIFORM:
    config.pool_size = 4 * config.get_ref('batch_size')
  config.eval_every = 1000
  config.checkpoint_every = 1000
  config.data.name = 'entailment'
  config.data.max_length = 40
  config.data.buckets = (16, 24)
  config.data.validation_examples = 0
  config.model.name = 'bert2_64_4'
  config.optimizer.name = 'adam'
  config.optimizer.learning_rates = (5e-4,)
  config.optimizer.warmup = 500
  config.optimizer.decay = 'linear'
  config.selection.rule = args.method
  if args.mmr:
    config.mmr.alpha = 1e-5
  return config
