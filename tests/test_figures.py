"""configs/figures.py: the regimes and the curves of the paper's figures."""

import pathlib
import runpy

import pytest

from margin_jax import config as config_lib
from margin_jax.compare import methods as methods_lib
from margin_jax.config import ConfigError
from tests.helpers import ROOT

FIGURES = runpy.run_path(str(pathlib.Path(ROOT, 'configs', 'figures.py')))
BOUNDARIES, RATES = 'optimizer.boundaries', 'optimizer.learning_rates'
# Design, section 6: epochs of 781 steps.
STANDARD = {
  'cifar10': (156_200, (81 * 781, 122 * 781, 164 * 781)),
  'cifar100': (156_200, (60 * 781, 120 * 781, 160 * 781)),
}
EARLY = {
  'cifar10': (44_000, (24_992, 27_335, 29_678)),
  'cifar100': (80_000, (39_050, 41_393, 43_736)),
}
HARD = 'loss+ramp=0.1'
MMR = {'mmr.alpha': 1e-5, 'mmr.alpha_end': 1e-3}
CURVES = {
  '2': ['uniform', 'random', HARD, 'mms'],
  '3': ['uniform', 'random', HARD, 'mms'],
  '4': ['uniform', 'random', 'entropy', 'mms'],
  '5': ['uniform', 'random', HARD, 'mms', 'uniform (standard)'],
}


def compared(argument):
  """Every curve's config, flat, by its name."""
  methods = FIGURES['get_methods'](argument)
  found = methods_lib.make_trials(FIGURES['get_config'](argument), methods, {})
  return {x.method: config_lib.flatten(x.config) for x in found}


@pytest.mark.parametrize('figure', FIGURES['FIGURES'])
def test_a_figure_has_the_regime_and_the_curves_of_the_paper(figure):
  if figure.startswith('2020'):
    return  # below
  number, panel = figure.removeprefix('figure')
  found = compared(figure)
  assert [*found] == CURVES[number]
  data = 'cifar10' if panel in 'ab' else 'cifar100'
  model = {'cifar10': 'resnet44', 'cifar100': 'wrn28_10'}[data]
  for name, config in found.items():
    early = number == '5' and name != 'uniform (standard)'
    steps, boundaries = (EARLY if early else STANDARD)[data]
    assert (config['steps'], config[BOUNDARIES]) == (steps, boundaries)
    assert (config['data.name'], config['model.name']) == (data, model)
    assert config['data.validation_examples'] == 0
    assert (config['batch_size'], config['pool_size']) == (64, 640)
    rule = name.split('+')[0].split(' ')[0]
    assert config['selection.rule'] == rule
    assert config['selection.ramp'] == (0.1 if name == HARD else 0.0)
  baseline = 'uniform (standard)' if number == '5' else 'uniform'
  assert FIGURES['get_baseline'](figure) == baseline


def test_figure_2_of_2020_is_mmr_in_the_standard_regime():
  found = compared('2020figure2')
  assert [*found] == ['uniform', 'mmr']
  for config in found.values():
    steps, boundaries = STANDARD['cifar100']
    assert (config['steps'], config[BOUNDARIES]) == (steps, boundaries)
    assert config['model.name'] == 'wrn28_10'
    assert config['data.name'] == 'cifar100'
    assert config['data.validation_examples'] == 5000
    assert config['selection.rule'] == 'uniform'
  assert found['uniform']['mmr.alpha'] == 0
  assert found['mmr'].items() >= MMR.items()
  assert FIGURES['get_baseline']('2020figure2') == 'uniform'


@pytest.mark.parametrize('panel', 'ac')
def test_figure_3_of_2020_is_figure_5_of_iclr_on_a_validation_split(panel):
  found = compared(f'2020figure3{panel}')
  before = compared(f'figure5{panel}')
  assert [*found] == [*before]
  for name, config in found.items():
    assert config.pop('data.validation_examples') == 5000
    assert before[name].pop('data.validation_examples') == 0
    assert config == before[name]
  baseline = FIGURES['get_baseline'](f'2020figure3{panel}')
  assert baseline == 'uniform (standard)'


def test_the_names_are_what_methods_would_say():
  config = FIGURES['get_config']()
  for name, fields in FIGURES['get_methods']().items():
    assert methods_lib.parse_method(name, config) == fields


def test_a_figure_on_a_small_scale():
  found = compared('figure5a,scale=0.01,model=resnet8')
  assert found['mms']['steps'] == 440
  assert found['mms'][BOUNDARIES] == (250, 273, 297)
  assert found['mms']['eval_every'] == 22
  assert found['uniform (standard)']['steps'] == 1562
  assert found['uniform (standard)'][BOUNDARIES] == (633, 953, 1281)
  assert {config['model.name'] for config in found.values()} == {'resnet8'}


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('figure1', "figure='figure1' must be one of"),
    ('figure2a,scale=0', 'scale=0.0 is not allowed'),
    ('figure2a,scale=2', 'scale=2.0 is not allowed'),
    ('figure5a,scale=0.0001', 'steps=4 is not allowed: it must be larger'),
  ],
)
def test_bad_arguments_are_refused(argument, message):
  with pytest.raises(ConfigError, match=message):
    FIGURES['get_config'](argument)
