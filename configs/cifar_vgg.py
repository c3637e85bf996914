"""VGG-16 on CIFAR: plain and with MMR.

    python -m margin_jax.train --config=configs/cifar_vgg.py:mmr \\
        --workdir=/tmp/vgg

Arguments: the method (`baseline`, `mmr`); dataset=cifar10, or cifar100, which
adds AutoAugment and cutout; head=released, or linear, the usual VGG for 32x32
images without hidden layers; penalty=paper or released. `released` is MMR as in
the authors' code (alpha changes by epoch, 0 first and then from 1e-4 to 1e-2;
the square of the mean).

Papers' test accuracy (Weinstein et al. 2020, Table 1), baseline and mmr:

    cifar10    93.19%  93.34%
    cifar100   73.93%  74.19%

The paper gives neither depth nor schedule for VGG. This is what its authors
released: BatchNorm, three linear layers (512-4096-4096-C, so that the features
of MMR have 4096 entries) with dropout of 0.5 after the hidden ones, the
learning rate times 0.2 at epochs 60, 120 and 160, and weight decay of 5e-4 on
all parameters. The linear layers are initialized as in PyTorch. Unlike in the
authors' code, the convolutions have He's initialization and no biases, which
BatchNorm would cancel.

Ours: not yet run at full length.

Cost, calculated from XLA's FLOP count of the step (103 GFLOP): 16 PFLOP, at
50 TFLOP/s 0.1 GPU-hours.
"""

from margin_jax import config as config_lib

EPOCH = 781  # batches of 64 of 50,000 images


def get_config(argument: str | None = None):
  """The config of one row."""
  args = config_lib.parse_arguments(
    argument,
    method=('baseline', 'mmr'),
    dataset=('cifar10', 'cifar100'),
    head=('released', 'linear'),
    penalty=config_lib.Argument(
      tuple(config_lib.MMR_ON_CIFAR), needs=('method', ('mmr',))
    ),
  )
  config = config_lib.default()
  config.steps = 200 * EPOCH
  config.batch_size = 64
  config.eval_every = 1000
  config.checkpoint_every = 1000
  config.data.name = args.dataset
  config.data.validation_examples = 5000
  config.data.augmentations = ('crop', 'flip')
  if args.dataset == 'cifar100':
    config.data.augmentations = ('crop', 'flip', 'autoaugment', 'cutout')
  config.model.name = 'vgg16'
  config.model.head = args.head
  if args.head == 'released':
    config.model.dropout = 0.5
  config.optimizer.learning_rates = (0.1, 0.02, 0.004, 0.0008)
  config.optimizer.boundaries = (60 * EPOCH, 120 * EPOCH, 160 * EPOCH)
  config.optimizer.weight_decay = 5e-4
  config.optimizer.weight_decay_mask = 'all'
  if args.method == 'mmr':
    config.update_from_flattened_dict(config_lib.MMR_ON_CIFAR[args.penalty])
  return config
