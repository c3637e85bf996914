"""CIFAR-10, large-margin loss: the rows of Elsayed et al. 2018.

    python -m margin_jax.train --config=configs/cifar10_large_margin.py \\
        --workdir=/tmp/cifar10_large_margin

Arguments: loss=large_margin, or cross_entropy as the control; norm=l_inf, l1 or
l2; small=1.0, the fraction of the training set to use; noisy=0.0, the fraction
of wrong labels; attack=none, fgsm, ifgsm or pgd, with epsilon=0.03 and source=,
the workdir of another run for a black-box attack.

The paper's rows compare cross-entropy with the loss in each norm, for few
labels, corrupted labels, and white- and black-box attacks. The paper's text was
not at hand, and its released code has only MNIST, so none of its numbers are
here. From the code for MNIST: images in [0, 1], Glorot's initialization, no
cross-entropy, gamma 1e4, alpha 4, RMSProp at 0.1 times 0.96 every 2,000 steps,
clipping to 5. Chosen: a wide ResNet of depth 28 and width 4, margins at the
input and after each of its three stages, 45,000 training images, crops and
flips, 200 epochs with batches of 128.

Expected: nothing yet; not yet run at full length.

Cost, calculated from XLA's FLOP count of the step (1.38 TFLOP): 97 PFLOP, at
50 TFLOP/s 0.5 GPU-hours; 2.3 times those of cross-entropy.
"""

import pathlib
import runpy
import types

from margin_jax import config as config_lib

# The file beside this one, wherever they are.
_PATH = pathlib.Path(__file__).with_name('mnist_large_margin.py')
mnist_large_margin = types.SimpleNamespace(**runpy.run_path(str(_PATH)))

STEPS_PER_EPOCH = 351  # batches of 128 of 45,000 images
LAYERS = ('input', 'stage1_block4', 'stage2_block4', 'stage3_block4')


def get_config(argument: str | None = None):
  """The config of one row."""
  args = config_lib.parse_arguments(
    argument,
    loss=('large_margin', 'cross_entropy'),
    norm=config_lib.Argument(
      ('l_inf', 'l1', 'l2'), needs=('loss', ('large_margin',))
    ),
    small=1.0,
    noisy=0.0,
    **mnist_large_margin.attack_arguments(0.03),
  )
  config = config_lib.default()
  config.steps = 200 * STEPS_PER_EPOCH
  config.batch_size = 128
  config.data.name = 'cifar10'
  config.data.validation_examples = 5000
  config.data.fraction = args.small
  config.data.label_noise = args.noisy
  config.data.normalization = 'unit'
  config.data.augmentations = ('crop', 'flip')
  config.model.name = 'wrn28_4'
  config.model.kernel_init = 'glorot'
  mnist_large_margin.rmsprop(config)
  if args.loss == 'large_margin':
    mnist_large_margin.large_margin(config, LAYERS, args.norm)
  mnist_large_margin.attack(config, args)
  return config
