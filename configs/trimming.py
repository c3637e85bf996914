"""Mini-batch trimming on SVHN, CIFAR-10 and CIFAR-100.

    python -m margin_jax.train \\
        --config=configs/trimming.py:on,dataset=cifar10,model=resnet34 \\
        --workdir=/tmp/trimming

Arguments: trimming `on` or `off`; dataset=svhn_cropped, cifar10 or cifar100;
model=resnet34 or densenet121, both in their 32x32 form.

Paper's test error, off and on, means of ten seeds (Fassold, Table 1):

    svhn_cropped  resnet34  5.87%   5.76%   densenet121  4.62%   4.42%
    cifar10       resnet34  17.43%  17.01%  densenet121  10.10%  10.19%
    cifar100      resnet34  48.19%  47.72%  densenet121  32.95%  32.18%

Adam at 0.001, halved at epochs 50 and 100 of 150, weight decay 1e-4, batch 128.
The paper names no augmentation, and its errors are those of training without;
nor does it say which parameters weight decay acts on: all of them here, as by
the Adam of PyTorch, which it used.

Ours: not run at full length yet.

Cost on CIFAR, calculated from XLA's FLOP count of the step: resnet34 45 PFLOP,
densenet121 39 PFLOP; at 50 TFLOP/s 0.25 and 0.22 GPU-hours a seed. SVHN, with
572 steps an epoch instead of 390, takes 1.47 times that.
"""

from margin_jax import config as config_lib

EXAMPLES = {'cifar10': 50_000, 'cifar100': 50_000, 'svhn_cropped': 73_257}


def get_config(argument: str | None = None):
  """The config of one cell of the table."""
  args = config_lib.parse_arguments(
    argument,
    trimming=('on', 'off'),
    dataset=('cifar10', 'cifar100', 'svhn_cropped'),
    model=('resnet34', 'densenet121'),
  )
  config = config_lib.default()
  config.batch_size = 128
  epoch = EXAMPLES[args.dataset] // config.batch_size
  config.steps = 150 * epoch
  config.eval_every = 10 * epoch
  config.checkpoint_every = 10 * epoch
  config.data.name = args.dataset
  models = {'resnet34': 'imagenet_resnet34', 'densenet121': 'densenet121'}
  config.model.name = models[args.model]
  config.model.stem = 'small'
  config.optimizer.name = 'adam'
  config.optimizer.learning_rates = (1e-3, 5e-4, 2.5e-4)
  config.optimizer.boundaries = (50 * epoch, 100 * epoch)
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = 'all'
  if args.trimming == 'on':
    config.trimming.first = 1.0
    config.trimming.last = 0.2
  return config
