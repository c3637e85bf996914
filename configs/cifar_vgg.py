"""VGG-16 on CIFAR: plain and with MMR.

    python -m margin_jax.train --config=configs/cifar_vgg.py:mmr \\
        --workdir=/tmp/vgg

Arguments: the method (`baseline`, `mmr`), dataset=cifar10 or cifar100, which
adds AutoAugment and cutout.

Papers' test accuracy (Weinstein et al. 2020, Table 1), baseline and mmr:

    cifar10    93.19%  93.34%
    cifar100   73.93%  74.19%

The paper gives neither depth nor schedule for VGG; this is VGG-16 with the
schedule of its ResNet-44, and the weight decay of 5e-4 that is usual for VGG.
Ours: not run at full length yet.

Cost, calculated from XLA's FLOP count of the step (95 GFLOP): 15 PFLOP, at
50 TFLOP/s 0.1 GPU-hours.
"""

from margin_jax import config as config_lib


def get_config(argument: str | None = None):
  """The config of one row."""
  args = config_lib.parse_arguments(
    argument, method=('baseline', 'mmr'), dataset=('cifar10', 'cifar100')
  )
  config = config_lib.default()
  config.steps = 156_200  # 200 epochs of 781
  config.batch_size = 64
  config.eval_every = 1000
  config.checkpoint_every = 1000
  config.data.name = args.dataset
  config.data.validation_examples = 5000
  config.data.augmentations = ('crop', 'flip')
  if args.dataset == 'cifar100':
    config.data.augmentations = ('crop', 'flip', 'autoaugment', 'cutout')
  config.model.name = 'vgg16'
  config.optimizer.learning_rates = (0.1, 0.01, 0.001, 0.0001)
  config.optimizer.boundaries = (63_261, 95_282, 128_084)
  config.optimizer.weight_decay = 5e-4
  if args.method == 'mmr':
    config.mmr.alpha = 1e-5
    config.mmr.alpha_end = 1e-3
  return config
