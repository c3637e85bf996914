"""The figures of the ICLR submission and the 2020 paper, one command each.

    python -m margin_jax.compare --config=configs/figures.py:figure2a \\
        --workdir=/tmp/figure2a --config.data.data_dir=DIR
    python -m margin_jax.compare --config=configs/figures.py:2020figure3a \\
        --split=validation --workdir=/tmp/figure3a --config.data.data_dir=DIR

Arguments: the figure; scale=0.01 runs that fraction of the steps, and scales
the drops of the learning rate too; model=resnet8 replaces the paper's network.
Panels a and b are the training and the test error of ResNet-44 on CIFAR-10,
panels c and d those of WRN-28-10 on CIFAR-100. The panels of a pair come from
the same runs and are in the same plot, so both letters do the same.

    figure2a  figure2b  figure2c  figure2d   plain, hard negatives, MMS
    figure3a  figure3c                       their mean MMS: mean_mms.png
    figure4a  figure4b  figure4c  figure4d   plain, entropy, MMS
    figure5a  figure5b  figure5c  figure5d   as 2, the learning rate drops early

    2020figure2                              plain, MMR (WRN-28-10)
    2020figure3a 2020figure3c                as 5, on a validation split

The papers' figures 3 have no letters: here a is CIFAR-10 and c is CIFAR-100.
The figures of 2020 show validation errors, on the last 5,000 training images.
Those of ICLR show test errors, after training on all 50,000. Hard negatives are
`loss+ramp=0.1`, the schedule of the authors' code. The papers do not have
`random`. ICLR's figure 5 and 2020's figure 3 also have plain training in the
standard regime: it is the baseline, and the dotted line marks where it ends.
ICLR's figure 3 is drawn for both forward passes: see `mean_mms` in
margin_jax/train/metrics.py.

ICLR's test accuracy (Table 1, 4.1, 4.3), in %:

    CIFAR-10   standard    plain 93.24; MMS 0.1 points above
    CIFAR-10   early drop  MMS 93 at 44K steps; below the standard baseline:
                           plain by 1.57, hard negatives by 1.22
    CIFAR-100  standard    plain 82.26
    CIFAR-100  early drop  MMS 82.2 at 80K steps; below the standard baseline:
                           plain by about 1, hard negatives by 2.97

In the 2020 paper, the networks of figure 2 have test accuracies (Table 1) of
82.51 and, with MMR, 83.52. In figure 3, MMS has 93 at 44K steps, 0.25 points
below the standard baseline, and 82.2 at 80K steps, 0.07 points below. The
others lose as above.

In ICLR's figure 4, entropy does as well as MMS on CIFAR-10, and fails on
CIFAR-100.

Ours: not yet run at full length.

Cost of a seed, calculated from the costs of both networks' configs, in PFLOP
and in GPU-hours at 50 TFLOP/s; any rule that scores costs as much as MMS:

    2, 3, 4  CIFAR-10    75   0.4    CIFAR-100  4,003  22.2
    5        CIFAR-10    26   0.1    CIFAR-100  2,338  13.0
    2020, 2                          CIFAR-100    572   3.2
    2020, 3  as 5
"""

import pathlib
import runpy

from margin_jax import config as config_lib
from margin_jax.compare.budgets import scaled
from margin_jax.config import UNIFORM

CIFAR10, CIFAR100 = 'cifar10_resnet44', 'cifar100_wrn28_10'
FIGURES = (
  *('figure2a', 'figure2b', 'figure2c', 'figure2d'),
  *('figure3a', 'figure3c'),
  *('figure4a', 'figure4b', 'figure4c', 'figure4d'),
  *('figure5a', 'figure5b', 'figure5c', 'figure5d'),
  *('2020figure2', '2020figure3a', '2020figure3c'),
)
MMR = '2020figure2'
EARLY = (
  *('figure5a', 'figure5b', 'figure5c', 'figure5d'),
  *('2020figure3a', '2020figure3c'),
)
HARD = {'selection.rule': 'loss', 'selection.ramp': 0.1}
STANDARD = 'uniform (standard)'
# Of a figure that is made shorter.
EVALUATIONS = 20


def _parse(argument: str | None):
  args = config_lib.parse_arguments(
    argument, figure=FIGURES, scale=1.0, model=''
  )
  holds = 0 < args.scale <= 1
  config_lib.require(holds, 'scale', args.scale, 'above 0, at most 1')
  return args


def _panel(args, regime: str):
  """The config of a panel's network, in a regime, as long as asked for."""
  name = CIFAR10 if args.figure[-1] in 'ab' else CIFAR100
  path = pathlib.Path(__file__).with_name(f'{name}.py')
  module = runpy.run_path(str(path))
  config = module['get_config'](f'baseline,regime={regime}')
  return scaled(config, round(config.steps * args.scale))


def get_config(argument: str | None = None):
  """What all curves of a figure have in common."""
  args = _parse(argument)
  config = _panel(args, 'early_drop' if args.figure in EARLY else 'standard')
  if args.scale < 1:
    interval = -(-config.steps // EVALUATIONS)
    config.eval_every = config.checkpoint_every = interval
    config.log_every = min(config.log_every, interval)
  if not args.figure.startswith('2020'):
    # ICLR's epoch, 781 batches, is of all 50,000 training images.
    config.data.validation_examples = 0
  config.model.name = args.model or config.model.name
  return config


def get_methods(argument: str | None = None):
  """The fields of every curve, by its name."""
  args = _parse(argument)
  if args.figure == MMR:
    return {UNIFORM: {}, 'mmr': config_lib.MMR_ON_CIFAR['paper']}
  methods = {
    UNIFORM: {'selection.rule': UNIFORM},
    'random': {'selection.rule': 'random'},
  }
  if args.figure.startswith('figure4'):
    methods['entropy'] = {'selection.rule': 'entropy'}
  else:
    methods['loss+ramp=0.1'] = HARD
  methods['mms'] = {'selection.rule': 'mms'}
  if args.figure in EARLY:
    standard = _panel(args, 'standard')
    methods[STANDARD] = {
      'selection.rule': UNIFORM,
      'steps': standard.steps,
      'optimizer.boundaries': standard.optimizer.boundaries,
    }
  return methods


def get_baseline(argument: str | None = None) -> str:
  """The curve that the others are compared with."""
  return STANDARD if _parse(argument).figure in EARLY else UNIFORM
