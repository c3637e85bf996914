"""Every config at full model size: one step, on made-up data of its shape.

Large networks are traced only, for shapes and dtypes: compiling their steps
takes too long here.
"""

import functools
import importlib
import math
import re

import jax
import numpy as np
import pytest

from margin_jax import data
from margin_jax.train import devices as devices_lib
from margin_jax.train import schema
from margin_jax.train import setup as setup_lib
from margin_jax.train import step as step_lib
from tests import helpers

pytestmark = pytest.mark.slow

# Shape of the images, classes.
SHAPES = {
  'digits': ((8, 8, 1), 10),
  'mnist': ((28, 28, 1), 10),
  'fashion_mnist': ((28, 28, 1), 10),
  'cifar10': ((32, 32, 3), 10),
  'cifar100': ((32, 32, 3), 100),
  'svhn_cropped': ((32, 32, 3), 10),
  'imagenet2012': ((224, 224, 3), 1000),
}
RUN = (
  ('digits', None),
  ('mnist_large_margin', None),
  ('glue_tiny', None),
)
TRACED = (
  ('cifar10_resnet44', 'mms_mmr'),
  ('cifar_vgg', 'mmr,dataset=cifar100'),
  ('glue_bert', 'mrpc'),
  ('glue_bert', 'mnli,method=baseline'),
  ('cifar100_wrn28_10', 'mms_mmr'),
  ('imagenet_mobilenet', 'mmr'),
  ('cifar10_large_margin', 'loss=large_margin,norm=l1'),
  ('imagenet_large_margin', None),
  ('figures', 'figure5c'),
  ('images', None),
  ('sentences', None),
  ('trimming', 'on,dataset=cifar100,model=resnet34'),
  ('trimming', 'on,dataset=svhn_cropped,model=densenet121'),
)
ROWS = 12


def tiny(name, argument):
  """The config with b=2 of B=6, its dataset's twin, and its spec."""
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config(*filter(None, [argument]))
  config.batch_size = 2
  config.pool_size = 6
  return made_up(config, ROWS)


def made_up(config, rows):
  """The config on one device, a twin of its dataset, and its spec."""
  config.devices = 1
  if config.model.batch_norm_examples is not None:
    config.model.batch_norm_examples = 2
  schema.validate(config)
  rng = np.random.default_rng(0)
  if data.kinds.is_sentences(config.data.name):
    dataset = sentences(config, rng, rows)
    return config, dataset, setup_lib.make_spec(config, dataset, 1)
  shape, classes = SHAPES[config.data.name]
  split = {
    'inputs': rng.integers(0, 256, (rows, *shape)).astype(np.uint8),
    'label': rng.integers(0, classes, rows).astype(np.int32),
  }
  dataset = data.InMemory(
    name=config.data.name,
    num_classes=classes,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(rows), 'test': np.arange(rows)},
    augment=data.augment.compose(tuple(config.data.augmentations), 4, 16, 0),
    prepare=data.normalization.normalizer(split['inputs'], 'dataset'),
  )
  return config, dataset, setup_lib.make_spec(config, dataset, 1)


def sentences(config, rng, rows):
  """Words at random, all of the full length, in one bucket."""
  classes = 3 if config.data.name == 'glue/mnli' else 2
  inputs = rng.integers(1, 100, (rows, config.data.max_length, 2))
  inputs[..., 1] = 1 + (np.arange(config.data.max_length) > 9)
  split = {
    'inputs': inputs.astype(np.uint16),
    'label': rng.integers(0, classes, rows).astype(np.int32),
  }
  everything = [(config.data.max_length, np.arange(rows))]
  return data.Bucketed(
    name=config.data.name,
    num_classes=classes,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(rows), 'test': np.arange(rows)},
    augment=lambda key, sentence: sentence,
    prepare=data.tokens.unpack,
    buckets={'train': everything, 'test': everything},
    vocabulary=30_522,
  )


def test_every_config_is_here():
  files = {p.stem for p in (helpers.ROOT / 'configs').glob('*.py')}
  assert files == {name for name, _ in RUN + TRACED}


@pytest.mark.parametrize(('name', 'argument'), RUN)
def test_one_step_at_full_size(name, argument):
  config, dataset, spec = tiny(name, argument)
  devices = devices_lib.Devices(1)
  state = devices.replicate(setup_lib.init_state(config, dataset, spec))
  batch = dataset.loader(devices, spec.sizes(1), 0, 0)(0)
  compiled = devices.compile(
    functools.partial(step_lib.train_step, spec), state, batch
  )
  state, metrics = jax.device_get(compiled(state, batch))
  assert int(state.step) == 1
  assert np.isfinite(metrics['loss'])
  assert np.isfinite(metrics['gradient_norm'])


@pytest.mark.parametrize(('name', 'argument'), TRACED)
def test_one_step_has_the_shapes_of_the_state(name, argument):
  config, dataset, spec = tiny(name, argument)
  state = jax.eval_shape(lambda: setup_lib.init_state(config, dataset, spec))
  batch = dataset.loader(devices_lib.Devices(1), spec.sizes(1), 0, 0)(0)
  mapped = jax.vmap(
    functools.partial(step_lib.train_step, spec),
    axis_name=devices_lib.AXIS,
    axis_size=1,
    in_axes=None,
  )
  after, metrics = jax.eval_shape(mapped, state, batch)
  # With an axis of one device.
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: ((1, *x.shape), x.dtype), state
  )
  assert metrics['loss'].shape == (1,)


@functools.cache
def step_flops(name, argument=None):
  """FLOPs of a step of the config, by XLA's count, and its steps."""
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config(*filter(None, [argument]))
  rows = max(config.batch_size, config.pool_size)
  config, dataset, spec = made_up(config, rows)
  devices = devices_lib.Devices(1)
  state = jax.eval_shape(lambda: setup_lib.init_state(config, dataset, spec))
  batch = dataset.loader(devices, spec.sizes(1), 0, 0)(0)
  step = functools.partial(step_lib.train_step, spec.without_loops())
  return devices.flops(step, state, batch), config.steps


# What the docstrings of configs say that a step or a run costs: N stands for
# the number.
RESNET, WRN, EARLY = (
  'cifar10_resnet44',
  'cifar100_wrn28_10',
  'regime=early_drop',
)
OFF = 'off,dataset=cifar10,model='
GFLOP, TFLOP, PFLOP = 1e9, 1e12, 1e15  # of a step, of a step, of a run
COSTS = (
  (RESNET, 'baseline', 'of the step: N GFLOP for a plain step', GFLOP),
  (RESNET, 'mms', 'N for an MMS step', GFLOP),
  (RESNET, 'baseline', 'baseline standard N 0.03', PFLOP),
  (RESNET, f'baseline,{EARLY}', 'baseline early_drop N 0.01', PFLOP),
  (RESNET, f'mms,{EARLY}', 'mms early_drop N 0.04', PFLOP),
  (RESNET, 'mms', 'mms standard N 0.13', PFLOP),
  (WRN, 'baseline', 'of the step (N TFLOP', TFLOP),
  (WRN, 'mms', 'with MMS N)', TFLOP),
  (WRN, 'baseline', 'baseline standard N 1.6', PFLOP),
  (WRN, f'mms,{EARLY}', 'mms early_drop N 3.5', PFLOP),
  (WRN, 'mms', 'mms standard N 6.9', PFLOP),
  ('cifar_vgg', 'mmr', 'of the step (N GFLOP)', GFLOP),
  ('cifar_vgg', 'mmr', 'GFLOP): N PFLOP', PFLOP),
  ('imagenet_mobilenet', 'mmr', 'of the step (N TFLOP)', TFLOP),
  ('imagenet_mobilenet', 'mmr', 'TFLOP): N PFLOP', PFLOP),
  ('mnist_large_margin', None, 'FLOP count: N GFLOP a step', GFLOP),
  ('mnist_large_margin', None, 'a step of 256, N PFLOP', PFLOP),
  ('cifar10_large_margin', None, 'of the step (N TFLOP)', TFLOP),
  ('cifar10_large_margin', None, 'TFLOP): N PFLOP', PFLOP),
  ('imagenet_large_margin', None, 'of the step (N TFLOP)', TFLOP),
  ('imagenet_large_margin', None, 'TFLOP): N PFLOP', PFLOP),
  ('trimming', f'{OFF}resnet34', 'of the step: resnet34 N PFLOP', PFLOP),
  ('trimming', f'{OFF}densenet121', 'densenet121 N PFLOP', PFLOP),
  ('glue_bert', 'rte', 'N PFLOP for RTE', PFLOP),
  ('glue_bert', 'mnli', 'N PFLOP for MNLI', PFLOP),
)


def cost_of(name, words):
  """The number that the docstring of a config has in place of N."""
  text = ' '.join(importlib.import_module(f'configs.{name}').__doc__.split())
  pattern = re.sub(r'\bN\b', r'([0-9.,]*[0-9])', re.escape(words))
  (number,) = re.findall(rf'(?<![0-9.,]){pattern}', text)
  # Half of its last digit, and what versions of jax count differently.
  rounding = 0.5 * 10.0 ** -len(number.partition('.')[2])
  value = float(number.replace(',', ''))
  return pytest.approx(value, rel=0.005, abs=rounding + 0.005 * value)


@pytest.mark.long
@pytest.mark.parametrize(('name', 'argument', 'words', 'unit'), COSTS)
def test_docstrings_say_what_it_costs(name, argument, words, unit):
  flops, steps = step_flops(name, argument)
  assert flops * (steps if unit == PFLOP else 1) / unit == cost_of(name, words)


@pytest.mark.parametrize(
  ('config', 'standard', 'early'),
  [
    (RESNET, 'CIFAR-10 N 0.4', 'CIFAR-10 N 0.1'),
    (WRN, 'CIFAR-100 N 22.2', 'CIFAR-100 N 13.0'),
  ],
)
def test_figures_cost_what_their_runs_cost(config, standard, early):
  """Any rule that scores costs what MMS does."""

  def run(method, regime):
    return math.prod(step_flops(config, f'{method},regime={regime}')) / PFLOP

  plain = run('baseline', 'standard')
  whole = plain + 3 * run('mms', 'standard')
  assert whole == cost_of('figures', standard)
  dropped = run('baseline', 'early_drop') + 3 * run('mms', 'early_drop')
  assert plain + dropped == cost_of('figures', early)
