"""ResNet-44 on CIFAR-10: the rows of both papers.

    python -m margin_jax.train --config=configs/cifar10_resnet44.py:mms \\
        --workdir=/tmp/cifar10_mms

Arguments: `baseline`, `mmr`, `mms` or `mms_mmr`, then `regime=standard` (156K
steps, the papers' 200 epochs of 50,000 images; 5,000 are held out here) or
`regime=early_drop` (44K steps), and `selection=fresh` (the papers' pools),
`memory` (soft pruning by remembered margins; no pool) or `proxy`, and
`penalty=paper` or `released`. `released` is MMR as in its authors' code (alpha
changes by epoch, 0 first and then from 1e-4 to 1e-2; the square of the mean).

The network is He's. --config.model.variant=mms_select uses the network of the
authors' repository mms-select, whose bias is part of the norm in MMS and decays
with the weights.

Papers' test accuracy (Weinstein et al. 2020, Table 1 and 5.1; ICLR 2020
submission, Table 1):

    baseline  standard    93.22% (2020), 93.24% (ICLR)
    mmr       standard    93.83%
    mms       early_drop  93% after 44K steps
    baseline  early_drop  1.57 points below the standard regime

Ours: not yet run at full length.

Cost, from XLA's FLOP count of the step: 34 GFLOP for a plain step (b=64), 149
for an MMS step (B=640). So a run takes (calculated, in PFLOP, and in GPU-hours
at 50 TFLOP/s):

    baseline  standard    5.4  0.03
    mms       early_drop  6.5  0.04
    baseline  early_drop  1.5  0.01
    mms       standard   23.2  0.13

MMS needs 28% of the steps of the standard baseline and 1.2 times its FLOPs.
"""

from margin_jax import config as config_lib

# step -> learning rate; 781 steps of 64 are one pass of 50,000 images.
REGIMES = {
  'standard': {
    'steps': 156_200,  # 200 epochs
    'boundaries': (63_261, 95_282, 128_084),  # epochs 81, 122, 164
  },
  'early_drop': {
    'steps': 44_000,
    'boundaries': (24_992, 27_335, 29_678),
  },
}


def get_config(argument: str | None = None):
  """The config of one row."""
  args = config_lib.parse_arguments(
    argument,
    method=('baseline', 'mmr', 'mms', 'mms_mmr'),
    regime=('standard', 'early_drop'),
    selection=config_lib.Argument(
      ('fresh', 'memory', 'proxy'), needs=('method', ('mms', 'mms_mmr'))
    ),
    penalty=config_lib.Argument(
      tuple(config_lib.MMR_ON_CIFAR), needs=('method', ('mmr', 'mms_mmr'))
    ),
  )
  regime = REGIMES[args.regime]
  config = config_lib.default()
  config.steps = regime['steps']
  config.batch_size = 64
  config.eval_every = 1000
  config.checkpoint_every = 1000
  config.data.name = 'cifar10'
  config.data.validation_examples = 5000
  config.data.augmentations = ('crop', 'flip')
  config.model.name = 'resnet44'
  config.optimizer.learning_rates = (0.1, 0.01, 0.001, 0.0001)
  config.optimizer.boundaries = regime['boundaries']
  config.optimizer.weight_decay = 1e-4
  if 'mms' in args.method.split('_'):
    config.update_from_flattened_dict(
      config_lib.preset(args.selection, config.data.name)
    )
  if 'mmr' in args.method.split('_'):
    config.update_from_flattened_dict(config_lib.MMR_ON_CIFAR[args.penalty])
  return config
