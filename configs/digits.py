"""Digits: MMS selection and MMR on scikit-learn's 8x8 digits, no download.

    python -m margin_jax.train --config=configs/digits.py --workdir=/tmp/digits

Argument: how to select examples, `selection=fresh` (MMS of a pool of 128),
`memory` (soft pruning by remembered margins; no pool) or `proxy`.

Expected: at least 98% test accuracy (benchmarks/rules_on_digits.md). No paper
has this row; it is the first thing to run.
"""

from margin_jax import config as config_lib


def get_config(argument: str | None = None):
  """A small CNN, b=32 of B=128, MMR rising linearly."""
  args = config_lib.parse_arguments(
    argument, selection=('fresh', 'memory', 'proxy')
  )
  config = config_lib.default()
  config.steps = 1000
  config.batch_size = 32
  if args.selection != 'memory':
    config.pool_size = 4 * config.get_ref('batch_size')
  config.eval_every = 250
  config.checkpoint_every = 250
  config.data.name = 'digits'
  config.data.validation_examples = 180
  config.data.augmentations = ('crop',)
  config.data.crop_padding = 1
  config.model.name = 'cnn'
  config.optimizer.learning_rates = (0.05, 0.005)
  config.optimizer.boundaries = (700,)
  config.optimizer.weight_decay = 1e-4
  config.update_from_flattened_dict(
    config_lib.preset(args.selection, config.data.name)
  )
  config.mmr.alpha = 1e-5
  config.mmr.alpha_end = 1e-3
  return config
