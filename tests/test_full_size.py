"""Every config at full model size: one step, on made-up data of its shape.

WRN-28-10, MobileNet at 224x224, ResNet-34 and DenseNet-121 are traced only,
for shapes and dtypes: compiling their steps takes too long here.
"""

import functools
import importlib

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
  'cifar10': ((32, 32, 3), 10),
  'cifar100': ((32, 32, 3), 100),
  'svhn_cropped': ((32, 32, 3), 10),
  'imagenet2012': ((224, 224, 3), 1000),
}
RUN = (
  ('digits', None),
  ('mnist_large_margin', None),
  ('cifar10_resnet44', 'mms_mmr'),
  ('cifar_vgg', 'mmr,dataset=cifar100'),
  ('glue_tiny', None),
)
TRACED = (
  ('glue_bert', 'mrpc'),
  ('glue_bert', 'mnli,method=baseline'),
  ('cifar100_wrn28_10', 'mms_mmr'),
  ('imagenet_mobilenet', 'mmr'),
  ('figures', 'figure5c'),
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
  config.devices = 1
  if config.model.batch_norm_examples is not None:
    config.model.batch_norm_examples = 2
  schema.validate(config)
  rng = np.random.default_rng(0)
  if config.data.name in data.SENTENCES:
    dataset = sentences(config, rng)
    return config, dataset, setup_lib.make_spec(config, dataset, 1)
  shape, classes = SHAPES[config.data.name]
  split = {
    'inputs': rng.integers(0, 256, (ROWS, *shape)).astype(np.uint8),
    'label': rng.integers(0, classes, ROWS).astype(np.int32),
  }
  dataset = data.InMemory(
    name=config.data.name,
    num_classes=classes,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(ROWS), 'test': np.arange(ROWS)},
    augment=data.augment.compose(tuple(config.data.augmentations), 4, 16, 0),
    prepare=data.normalization.normalizer(split['inputs'], 'dataset'),
  )
  return config, dataset, setup_lib.make_spec(config, dataset, 1)


def sentences(config, rng):
  """Words at random, all of the full length, in one bucket."""
  classes = 3 if config.data.name == 'glue/mnli' else 2
  inputs = rng.integers(1, 100, (ROWS, config.data.max_length, 2))
  inputs[..., 1] = 1 + (np.arange(config.data.max_length) > 9)
  split = {
    'inputs': inputs.astype(np.uint16),
    'label': rng.integers(0, classes, ROWS).astype(np.int32),
  }
  everything = [(config.data.max_length, np.arange(ROWS))]
  return data.Bucketed(
    name=config.data.name,
    num_classes=classes,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(ROWS), 'test': np.arange(ROWS)},
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
