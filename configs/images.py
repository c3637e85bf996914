"""Your own images, or any image dataset of TFDS: where to begin.

    python -m margin_jax.train --config=configs/images.py \\
        --workdir=/tmp/pets --config.data.name=folder:PATH

Argument: how to select examples, `selection=memory` (soft pruning by remembered
margins; no pool), `fresh` (MMS of pools of 256) or `uniform` (plain training).

PATH has a folder of images for each class (docs/howto/own_data.md). This trains
a small ResNet on images of 32x32. Set data.image_size, model.name, steps and
the learning rates to suit your images. No paper has this row.
"""

from margin_jax import config as config_lib


def get_config(argument: str | None = None):
  """ResNet-8, b=64, the learning rate falls once."""
  args = config_lib.parse_arguments(
    argument, selection=('memory', 'fresh', config_lib.UNIFORM)
  )
  config = config_lib.default()
  config.steps = 2000
  config.batch_size = 64
  if args.selection == 'fresh':
    config.pool_size = 4 * config.get_ref('batch_size')
  config.eval_every = 500
  config.checkpoint_every = 500
  config.data.name = 'fashion_mnist'
  config.data.image_size = 32
  config.data.augmentations = ('crop',)
  config.data.crop_padding = 2
  config.model.name = 'resnet8'
  config.optimizer.learning_rates = (0.1, 0.01)
  config.optimizer.boundaries = (1500,)
  config.optimizer.weight_decay = 1e-4
  if args.selection != config_lib.UNIFORM:
    config.update_from_flattened_dict(
      config_lib.preset(args.selection, config.data.name)
    )
  return config
