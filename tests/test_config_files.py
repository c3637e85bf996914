"""The files in configs/: good, complete, and with the papers' numbers."""

import importlib.util
import itertools
import pathlib

import pytest
import scipy.stats

from margin_jax import config as config_lib
from margin_jax import config_files, data
from margin_jax.compare import methods as methods_lib
from margin_jax.train import schema
from margin_jax.train import setup as setup_lib
from tests.bad_configs import BOUNDARIES, RATES

REPOSITORY = pathlib.Path(__file__).parents[1]
CONFIG_FILES = sorted((REPOSITORY / 'configs').glob('*.py'))


def load_config_file(path):
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def arguments_of(module, monkeypatch):
  """No argument, and every combination of arguments."""
  seen = {}
  parse_arguments = config_lib.parse_arguments

  def spy(text, **fields):
    defaults = {
      name: getattr(field, 'default', field) for name, field in fields.items()
    }
    seen.update({} if seen else defaults)  # not what another file asks for
    return parse_arguments(text, **fields)

  with monkeypatch.context() as patch:
    patch.setattr(config_lib, 'parse_arguments', spy)
    module.get_config()
  choices = [
    [f'{name}={value}' for value in values]
    for name, values in seen.items()
    if isinstance(values, tuple)  # a set of values, not a default
  ]
  combinations = [','.join(parts) for parts in itertools.product(*choices)]
  return [None, *filter(None, combinations)]


def refused(argument):
  """Returns what it says of what the method or loss has not, or None."""
  parts = dict(x.split('=') for x in filter(None, (argument or '').split(',')))
  if 'norm' in parts and parts['loss'] == 'cross_entropy':
    return 'norm=.* needs loss=large_margin'
  if 'method' not in parts:
    return None
  method = parts['method'].split('_')
  if 'selection' in parts and 'mms' not in method:
    return 'selection=.* needs method=mms'
  if 'penalty' in parts and 'mmr' not in method:
    return 'penalty=.* needs method=mmr'
  return None


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.stem)
def test_config_files_are_valid(path, monkeypatch):
  module = load_config_file(path)
  assert f'--config=configs/{path.name}' in module.__doc__
  for argument in arguments_of(module, monkeypatch):
    if refused(argument):
      with pytest.raises(config_lib.ConfigError, match=refused(argument)):
        module.get_config(argument)
      continue
    config = module.get_config(*filter(None, [argument]))
    schema.validate(config)


# Design, section 6: epochs of 781 steps; drops by 10; where the run ends.
REGIMES = {
  'standard': (200 * 781, (81 * 781, 122 * 781, 164 * 781)),
  'early_drop': (44_000, (24_992, 27_335, 29_678)),
}
MMR = {'mmr.alpha': 1e-5, 'mmr.alpha_end': 1e-3}
RELEASED = {
  'mmr.alpha': 1e-4, 'mmr.alpha_end': 1e-2, 'mmr.schedule': 'released',
  'mmr.reduction': 'square_of_mean',
}  # fmt: skip
# What a method changes of plain training.
METHODS = {
  'baseline': {'selection.rule': 'uniform', 'mmr.alpha': 0.0},
  'mms': {'selection.rule': 'mms', 'mmr.alpha': 0.0, 'mmr.alpha_end': None},
  'mmr': {'selection.rule': 'uniform', **MMR},
  'mms_mmr': {'selection.rule': 'mms', **MMR},
}


@pytest.mark.parametrize('regime', REGIMES)
@pytest.mark.parametrize('method', METHODS)
def test_cifar10_resnet44_has_the_numbers_of_the_papers(method, regime):
  module = load_config_file(REPOSITORY / 'configs/cifar10_resnet44.py')
  config = config_lib.flatten(module.get_config(f'{method},regime={regime}'))
  steps, boundaries = REGIMES[regime]
  expected = {
    'steps': steps, BOUNDARIES: boundaries, RATES: (0.1, 0.01, 0.001, 0.0001),
    'batch_size': 64, 'pool_size': 640, 'model.name': 'resnet44',
    'optimizer.name': 'sgd', 'optimizer.momentum': 0.9,
    'optimizer.nesterov': False, 'optimizer.weight_decay': 1e-4,
    'data.name': 'cifar10', 'data.validation_examples': 5000,
    'data.augmentations': ('crop', 'flip'), 'data.crop_padding': 4,
  } | METHODS[method]  # fmt: skip
  assert config.items() >= expected.items()


SELECTING = [
  ('cifar10_resnet44', 'mms', 10), ('cifar100_wrn28_10', 'mms', 10),
  ('figures', 'figure2a', 10), ('glue_bert', 'rte', 10),
  ('digits', None, 4), ('glue_tiny', 'mms', 4),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'argument', 'factor'), SELECTING)
def test_pools_follow_the_batches(name, argument, factor):
  """As --config.batch_size does it, after get_config."""
  module = load_config_file(REPOSITORY / f'configs/{name}.py')
  config = module.get_config(argument)
  assert config.pool_size == factor * config.batch_size
  config.batch_size = 24
  assert config.pool_size == factor * 24
  config.pool_size = 50
  assert config.pool_size == 50


def glue_runs(task):
  """The module, and of every method what its runs train with."""
  module = load_config_file(REPOSITORY / 'configs/glue_bert.py')
  config = module.get_config(task)
  trials = methods_lib.make_trials(config, module.get_methods(task), {})
  return module, {x.method: x.config.mmr.alpha for x in trials}


def test_a_task_is_one_comparison():
  _, alphas = glue_runs('rte')
  assert alphas == {'uniform': 0.0, 'mmr': 1e-5}


def test_mnli_is_the_mean_of_two_runs():
  """2020, Table 1: matched with alpha 1e-5, mismatched with 1e-6."""
  module, alphas = glue_runs('mnli')
  assert alphas == {'uniform': 0.0, 'matched': 1e-5, 'mismatched': 1e-6}
  errors = {
    'uniform': [(0.16, 0.15), (0.18, 0.17)],
    'matched': [(0.10, 0.50), (0.12, 0.50)],
    'mismatched': [(0.50, 0.14), (0.50, 0.20)],
  }
  rows = [
    {
      'method': method, 'seed': seed,
      'test_error': pairs[seed][0], 'test_mismatched_error': pairs[seed][1],
    }
    for seed in (0, 1)
    for method, pairs in errors.items()
  ]  # fmt: skip
  # Accuracies of 84.5 and 82.5; of 88 and 84.
  assert module.get_summary(rows, 'mnli') == [
    'Mean of matched and mismatched accuracy, %: `uniform` 83.50 ± 1.41; MMR, '
    'of `matched` and `mismatched`, 86.00 ± 2.83.'
  ]
  # A seed that one of the two runs did not end is left out.
  (line,) = module.get_summary(rows[:-1], 'mnli')
  assert line.endswith('`uniform` 83.50 ± 1.41; MMR, of `matched` and '
                       '`mismatched`, 88.00.')  # fmt: skip
  assert module.get_summary([], 'mnli') == []
  assert module.get_summary(rows[:1], 'rte') == []


TRIMMED = {'trimming.first': 1.0, 'trimming.last': 0.2}
PLAIN = {'trimming.first': 1.0, 'trimming.last': 1.0}


def test_the_table_of_trimming_is_one_comparison():
  """Fassold, Table 1: six cells, each without and with trimming."""
  module = load_config_file(REPOSITORY / 'configs/trimming.py')
  argument = 'dataset=all,model=all'
  config = module.get_config(argument)
  methods = module.get_methods(argument)
  trials = methods_lib.make_trials(config, methods, {})
  assert len(trials) == 12
  assert trials[0].method == module.get_baseline(argument)
  for trial in trials:
    dataset, model, trimming = trial.method.split()
    alone = f'{trimming},dataset={dataset},model={model}'
    assert trial.config == module.get_config(alone)
    found = config_lib.flatten(trial.config)
    assert found.items() >= (TRIMMED if trimming == 'on' else PLAIN).items()
  # A cell, or a column, is a comparison of its own.
  assert [*module.get_methods('model=densenet121')] == [
    'cifar10 densenet121 off', 'cifar10 densenet121 on'
  ]  # fmt: skip
  assert len(module.get_methods('off,dataset=all')) == 6
  small = module.get_config('dataset=svhn_cropped,scale=0.001')
  assert (small.steps, small[BOUNDARIES]) == (86, (29, 57))
  with pytest.raises(config_lib.ConfigError, match=r'scale=2\.0 is not'):
    module.get_config('scale=2')


def test_the_summary_of_trimming_is_the_table():
  module = load_config_file(REPOSITORY / 'configs/trimming.py')
  errors = {
    'svhn_cropped resnet34 off': [0.05, 0.07],
    'svhn_cropped resnet34 on': [0.04, 0.05],
    'cifar10 densenet121 off': [0.10],
    'cifar10 densenet121 on': [0.12],
    'cifar100 resnet34 off': [0.48],  # and the other half is missing
  }
  rows = [
    {'method': method, 'seed': seed, 'test_error': error}
    for method, values in errors.items()
    for seed, error in enumerate(values)
  ]
  p = scipy.stats.ttest_ind([0.05, 0.07], [0.04, 0.05], equal_var=False).pvalue
  (table,) = module.get_summary(rows, 'dataset=all,model=all')
  assert table.splitlines() == [
    '| dataset | network | off, % | on, % | reduction, % | p |',
    '| --- | --- | --- | --- | --- | --- |',
    '| svhn_cropped | resnet34 | 6.00 ± 1.41 | 4.50 ± 0.71 | +25.0 | '
    f'{p:.3f} |',
    '| cifar10 | densenet121 | 10.00 | 12.00 | -20.0 | - |',
  ]
  assert module.get_summary([], 'dataset=all') == []


SGD = {'optimizer.name': 'sgd', 'optimizer.nesterov': False}
# Design, section 6, for the other rows: file, argument, and what it must have.
ROWS = [
  (
    'cifar100_wrn28_10', 'mms,regime=early_drop',
    {
      **SGD, 'steps': 80_000, BOUNDARIES: (39_050, 41_393, 43_736),
      RATES: (0.1, 0.02, 0.004, 0.0008), 'optimizer.weight_decay': 5e-4,
      'batch_size': 64, 'pool_size': 640, 'selection.rule': 'mms',
      'data.name': 'cifar100', 'data.cutout_size': 16,
      'data.augmentations': ('crop', 'flip', 'autoaugment', 'cutout'),
    },
  ),
  (
    'cifar100_wrn28_10', 'mmr',
    {
      **SGD, **MMR, 'steps': 156_200,
      BOUNDARIES: (60 * 781, 120 * 781, 160 * 781),
    },
  ),
  (
    'imagenet_mobilenet', 'mmr',
    {
      **SGD, 'batch_size': 256, 'steps': 90 * 5004, 'mmr.alpha': 1e-5,
      RATES: (0.1, 0.01, 0.001, 0.0001),
      BOUNDARIES: (30 * 5004, 60 * 5004, 80 * 5004),
      'optimizer.weight_decay_mask': 'convolutions', 'model.name': 'mobilenet',
      'model.batch_norm_examples': 64,
    },
  ),
  (
    'cifar_vgg', 'mmr,dataset=cifar10',
    {
      **SGD, **MMR, 'model.name': 'vgg16', 'data.name': 'cifar10',
      'model.head': 'released', 'model.dropout': 0.5, 'steps': 156_200,
      BOUNDARIES: (60 * 781, 120 * 781, 160 * 781),
      RATES: tuple(pytest.approx(0.1 * 0.2**i) for i in range(4)),
      'optimizer.weight_decay': 5e-4, 'optimizer.weight_decay_mask': 'all',
    },
  ),
  ('cifar_vgg', 'mmr,penalty=released', RELEASED),
  ('cifar10_resnet44', 'mms_mmr,penalty=released', RELEASED),
  ('cifar100_wrn28_10', 'mmr,penalty=released', RELEASED),
  (
    'trimming', 'on,dataset=svhn_cropped,model=densenet121',
    {
      'optimizer.name': 'adam', RATES: (1e-3, 5e-4, 2.5e-4),
      BOUNDARIES: (50 * 572, 100 * 572), 'steps': 150 * 572,
      'optimizer.weight_decay': 1e-4, 'batch_size': 128,
      'trimming.first': 1.0, 'trimming.last': 0.2,
      'model.name': 'densenet121', 'model.stem': 'small',
    },
  ),
  (
    'glue_bert', 'mrpc',
    {
      'optimizer.name': 'adamw', RATES: (2e-5,), 'model.dropout': 0.1,
      'optimizer.weight_decay': 0.01, 'optimizer.weight_decay_mask': 'kernels',
      'optimizer.epsilon': 1e-6,
      'optimizer.decay': 'linear', 'mmr.alpha': 1e-5, 'batch_size': 32,
      'steps': 3 * (3668 // 32), 'model.name': 'bert_base',
      'data.name': 'glue/mrpc', 'data.max_length': 128,
    },
  ),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'argument', 'expected'), ROWS)
def test_configs_have_the_numbers_of_the_papers(name, argument, expected):
  module = load_config_file(REPOSITORY / f'configs/{name}.py')
  config = config_lib.flatten(module.get_config(argument))
  assert {k: config[k] for k in expected} == expected


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.stem)
def test_a_missing_dataset_is_one_message(path, tmp_path, capfd):
  config = load_config_file(path).get_config()
  if not data.kinds.is_read(config.data.name):
    return  # always there
  config.data.data_dir = str(tmp_path)
  if data.kinds.needs_vocabulary(config.data.name):
    vocabulary = tmp_path / 'vocab.txt'
    vocabulary.write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n')
    config.data.vocabulary = str(vocabulary)
  with pytest.raises(data.DatasetError) as caught:
    setup_lib.load(config, None)
  words = f'margin_jax.prepare {config.data.name}'
  assert words in str(caught.value)
  assert '\n' not in str(caught.value)
  assert not capfd.readouterr().err


def test_config_files_need_nothing_but_the_package():
  """Where margin_jax is installed, `configs` cannot be imported."""
  for path in CONFIG_FILES:
    text = path.read_text()
    assert 'from configs' not in text, path
    assert 'import configs' not in text, path


def test_the_baseline_of_a_config_file_is_among_its_methods():
  file = config_files.load(str(REPOSITORY / 'configs' / 'figures.py:figure5a'))
  baseline = methods_lib.baseline_of(file)
  found = methods_lib.of_command_line('mms', file, baseline)
  assert [*found] == [baseline, 'mms']
