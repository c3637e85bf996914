"""MobileNet on ImageNet: plain and with MMR.

    python -m margin_jax.train --config=configs/imagenet_mobilenet.py:mmr \\
        --workdir=/tmp/mobilenet --config.data.data_dir=DIR

Argument: the method, `baseline` or `mmr`. DIR holds `imagenet2012` as TFDS
prepares it in the array_record format.

Paper's test accuracy (Weinstein et al. 2020, Table 1): baseline 71.17%, mmr
71.44%. It trains for 90 epochs with batches of 256 over four devices, so
BatchNorm sees 64 examples, as it does here on any number of devices
(model.batch_norm_examples). The learning rate is 0.1, divided by 10 at epochs
30, 60 and 80, and L2 is on convolution kernels only. The coefficient of 1e-4 is
not in the paper. Depthwise kernels count as convolutions here.

The code that the authors build on (convNet.pytorch) differs. It decays the last
layer too, but no depthwise kernel. It trains on random 224x224 crops of images
whose shorter side is 256. Crops here have random size and shape: the paper's
"standard data augmentation", as in Goyal et al. 2017.

Ours: not yet run at full length.

Cost, calculated from XLA's FLOP count of the step (0.89 TFLOP): 402 PFLOP, at
50 TFLOP/s 2.2 GPU-hours; decoding 115 million JPEGs takes longer than that.
"""

from margin_jax import config as config_lib

STEPS_PER_EPOCH = 5004  # 1,281,167 images in batches of 256


def get_config(argument: str | None = None):
  """The config of one row."""
  args = config_lib.parse_arguments(argument, method=('baseline', 'mmr'))
  config = config_lib.default()
  config.steps = 90 * STEPS_PER_EPOCH
  config.batch_size = 256
  config.log_every = 100
  config.eval_every = STEPS_PER_EPOCH
  config.checkpoint_every = STEPS_PER_EPOCH
  config.data.name = 'imagenet2012'
  config.data.augmentations = ('flip',)
  config.model.name = 'mobilenet'
  config.model.batch_norm_examples = 64  # 256 over four devices
  config.optimizer.learning_rates = (0.1, 0.01, 0.001, 0.0001)
  config.optimizer.boundaries = tuple(
    epoch * STEPS_PER_EPOCH for epoch in (30, 60, 80)
  )
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = 'convolutions'
  if args.method == 'mmr':
    config.mmr.alpha = 1e-5
  return config
