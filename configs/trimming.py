"""Mini-batch trimming on SVHN, CIFAR-10 and CIFAR-100.

    python -m margin_jax.train \\
        --config=configs/trimming.py:on,dataset=cifar10,model=resnet34 \\
        --workdir=/tmp/trimming

One command makes the paper's table, with every cell without and with trimming.
Its last lines are the table:

    python -m margin_jax.compare --seeds=10 \\
        --config=configs/trimming.py:dataset=all,model=all \\
        --workdir=/tmp/trimming_table

Arguments: trimming `on` or `off` (a comparison runs both);
dataset=svhn_cropped, cifar10 or cifar100; model=resnet34 or densenet121, both
in their 32x32 form. In a comparison, dataset and model may be `all`. scale=0.01
runs that fraction of the steps.

Paper's test error, off and on, means of ten seeds (Fassold, Table 1):

    svhn_cropped  resnet34  5.87%   5.76%   densenet121  4.62%   4.42%
    cifar10       resnet34  17.43%  17.01%  densenet121  10.10%  10.19%
    cifar100      resnet34  48.19%  47.72%  densenet121  32.95%  32.18%

Adam at 0.001, halved at epochs 50 and 100 of 150, weight decay 1e-4, batch 128.
The paper names no augmentation, and its errors are those of training without
augmentation. It does not say which parameters decay either: here all of them
do, as in PyTorch's Adam, which the paper used.

Ours: not yet run at full length.

Cost on CIFAR, calculated from XLA's FLOP count of the step: resnet34 45 PFLOP,
densenet121 39 PFLOP; at 50 TFLOP/s 0.25 and 0.22 GPU-hours a seed. SVHN, with
572 steps an epoch instead of 390, takes 1.47 times that. The table is 5,830
PFLOP, 32 GPU-hours.
"""

import itertools

from margin_jax import config as config_lib
from margin_jax.compare import report
from margin_jax.compare.budgets import scaled

EXAMPLES = {'svhn_cropped': 73_257, 'cifar10': 50_000, 'cifar100': 50_000}
MODELS = {'resnet34': 'imagenet_resnet34', 'densenet121': 'densenet121'}
OFF, ON = 'off', 'on'
ALL = 'all'


def _parse(argument: str | None):
  args = config_lib.parse_arguments(
    argument,
    trimming=(ON, OFF),
    dataset=('cifar10', 'cifar100', 'svhn_cropped', ALL),
    model=(*MODELS, ALL),
    scale=1.0,
  )
  holds = 0 < args.scale <= 1
  config_lib.require(holds, 'scale', args.scale, 'above 0, at most 1')
  return args


def _cells(args) -> list[tuple[str, str]]:
  """The datasets and networks that are asked for, in the table's order."""
  datasets = EXAMPLES if args.dataset == ALL else (args.dataset,)
  models = MODELS if args.model == ALL else (args.model,)
  return [*itertools.product(datasets, models)]


def _name(dataset: str, model: str, trimming: str) -> str:
  return f'{dataset} {model} {trimming}'


def get_config(argument: str | None = None):
  """The config of one cell of the table; of several, of the first."""
  args = _parse(argument)
  dataset, model = _cells(args)[0]
  return _config(dataset, model, args.trimming, args.scale)


def _config(dataset: str, model: str, trimming: str, scale: float):
  config = config_lib.default()
  config.batch_size = 128
  epoch = EXAMPLES[dataset] // config.batch_size
  config.steps = 150 * epoch
  config.eval_every = 10 * epoch
  config.data.name = dataset
  config.model.name = MODELS[model]
  config.model.stem = 'small'
  config.optimizer.name = 'adam'
  config.optimizer.learning_rates = (1e-3, 5e-4, 2.5e-4)
  config.optimizer.boundaries = (50 * epoch, 100 * epoch)
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = 'all'
  if trimming == ON:
    config.trimming.first = 1.0
    config.trimming.last = 0.2
  config = scaled(config, round(config.steps * scale))
  config.checkpoint_every = config.eval_every
  config.log_every = min(config.log_every, config.eval_every)
  return config


def get_methods(argument: str | None = None):
  """The fields of every cell, without and with trimming, by its name."""
  args = _parse(argument)
  common = config_lib.flatten(get_config(argument))
  methods = {}
  for dataset, model in _cells(args):
    for trimming in (OFF, ON):
      fields = config_lib.flatten(_config(dataset, model, trimming, args.scale))
      methods[_name(dataset, model, trimming)] = {
        name: value for name, value in fields.items() if value != common[name]
      }
  return methods


def get_baseline(argument: str | None = None) -> str:
  """The first cell, without trimming."""
  return _name(*_cells(_parse(argument))[0], OFF)


def get_summary(rows: list, argument: str | None = None) -> list[str]:
  """The paper's table: every cell's test error without and with trimming."""
  errors: dict[str, list[float]] = {}
  for row in rows:
    errors.setdefault(row['method'], []).append(row['test_error'])
  lines = []
  for dataset, model in _cells(_parse(argument)):
    off, on = (errors.get(_name(dataset, model, x)) for x in (OFF, ON))
    if off and on:
      means = [report.mean_and_deviation(x) for x in (off, on)]
      (before, _), (after, _) = means
      reduction = f'{100 * (before - after) / before:+.1f}' if before else '-'
      p = report.significance(report.welch(off, on))
      cells = [report.percent(*x) for x in means]
      lines.append([dataset, model, *cells, reduction, p])
  header = ('dataset', 'network', 'off, %', 'on, %', 'reduction, %', 'p')
  return ['\n'.join(report.markdown(header, lines))] if lines else []
