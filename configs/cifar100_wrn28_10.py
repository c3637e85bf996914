"""WRN-28-10 on CIFAR-100: plain, MMR and MMS.

    python -m margin_jax.train \\
        --config=configs/cifar100_wrn28_10.py:mms,regime=early_drop \\
        --workdir=/tmp/wrn

Arguments: the method (`baseline`, `mmr`, `mms`, `mms_mmr`), regime=standard
(156.2K steps) or early_drop (80K steps), selection=fresh (the papers' pools),
memory (soft pruning by remembered margins; no pool) or proxy, and penalty=paper
or released. `released` is MMR as in its authors' code (alpha changes by epoch,
0 first and then from 1e-4 to 1e-2; the square of the mean).

Papers' test accuracy (Weinstein et al. 2020, Table 1; ICLR 2020 submission,
Table 1):

    baseline  standard    82.51% (2020), 82.26% (ICLR)
    mmr       standard    83.52%
    mms       early_drop  82.2% after 80K steps

SGD has momentum 0.9 without Nesterov's form, as in the authors' code. The
network is that of Zagoruyko & Komodakis (activation first), which the papers
cite. The command in the authors' repository trains a ResNet of that depth and
width.

Ours: not yet run at full length.

Cost, calculated from XLA's FLOP count of the step (1.83 TFLOP, with MMS 7.93),
in PFLOP and in GPU-hours at 50 TFLOP/s:

    baseline  standard     286   1.6
    mms       early_drop   635   3.5
    mms       standard   1,239   6.9
"""

from margin_jax import config as config_lib

REGIMES = {
  'standard': {
    'steps': 156_200,  # 200 epochs of 781
    'boundaries': (46_860, 93_720, 124_960),  # epochs 60, 120, 160
  },
  'early_drop': {
    'steps': 80_000,
    'boundaries': (39_050, 41_393, 43_736),
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
  config.data.name = 'cifar100'
  config.data.validation_examples = 5000
  config.data.augmentations = ('crop', 'flip', 'autoaugment', 'cutout')
  config.model.name = 'wrn28_10'
  config.optimizer.learning_rates = (0.1, 0.02, 0.004, 0.0008)
  config.optimizer.boundaries = regime['boundaries']
  config.optimizer.weight_decay = 5e-4
  if 'mms' in args.method.split('_'):
    config.update_from_flattened_dict(
      config_lib.preset(args.selection, config.data.name)
    )
  if 'mmr' in args.method.split('_'):
    config.update_from_flattened_dict(config_lib.MMR_ON_CIFAR[args.penalty])
  return config
