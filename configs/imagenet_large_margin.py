"""ImageNet, large-margin loss: the row of Elsayed et al. 2018.

    python -m margin_jax.train --config=configs/imagenet_large_margin.py \\
        --workdir=/tmp/imagenet_large_margin --config.data.data_dir=DIR

Arguments: loss=large_margin, or cross_entropy as the control; attack=none,
fgsm, ifgsm or pgd, with epsilon=0.03 and source=, the workdir of another run
for a black-box attack. DIR holds `imagenet2012` as TFDS prepares it in the
array_record format.

The paper's row compares a network trained with l1 margins with one trained with
cross-entropy: their accuracy, and their robustness against white- and black-box
attacks. The paper's text was not at hand, and its released code has only MNIST,
so none of its numbers are here. The network is not the paper's Inception, which
margin_jax does not have. Chosen: ResNet-50, l1 margins at the input and after
the second and the last of its four stages, added to cross-entropy with weight
0.1, on logits, so that gamma (1) is in units of pixels, summed over the image;
90 epochs with batches of 256, SGD.

Expected: nothing yet; not yet run at full length.

Cost, calculated from XLA's FLOP count of the step (14.1 TFLOP): 6,370 PFLOP, at
50 TFLOP/s 35 GPU-hours; 2.3 times those of cross-entropy. Decoding 115 million
JPEGs takes longer than that.
"""

import pathlib
import runpy
import types

from margin_jax import config as config_lib

# The file beside this one, wherever they are.
_PATH = pathlib.Path(__file__).with_name('mnist_large_margin.py')
mnist_large_margin = types.SimpleNamespace(**runpy.run_path(str(_PATH)))

STEPS_PER_EPOCH = 5004  # 1,281,167 images in batches of 256


def get_config(argument: str | None = None):
  """The config of one row."""
  args = config_lib.parse_arguments(
    argument,
    loss=('large_margin', 'cross_entropy'),
    **mnist_large_margin.attack_arguments(0.03),
  )
  config = config_lib.default()
  config.steps = 90 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.eval_every = STEPS_PER_EPOCH
  config.checkpoint_every = STEPS_PER_EPOCH
  config.data.name = 'imagenet2012'
  config.data.normalization = 'unit'
  config.data.augmentations = ('flip',)
  config.model.name = 'imagenet_resnet50'
  config.optimizer.learning_rates = (0.1, 0.01, 0.001, 0.0001)
  config.optimizer.boundaries = tuple(
    epoch * STEPS_PER_EPOCH for epoch in (30, 60, 80)
  )
  config.optimizer.weight_decay = 1e-4
  if args.loss == 'large_margin':
    config.large_margin.weight = 0.1
    config.large_margin.layers = ('input', 'stage2_block4', 'stage4_block3')
    config.large_margin.norm = 'l1'
    config.large_margin.difference = 'logits'
    config.large_margin.gamma = 1.0
  mnist_large_margin.attack(config, args)
  return config
