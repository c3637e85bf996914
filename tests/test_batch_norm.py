"""BatchNorm over groups of a batch's examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax.config import ConfigError
from margin_jax.train import batch_norm, schema
from margin_jax.train import setup as setup_lib
from tests import helpers, references

NETWORK = {
  'data.validation_examples': 0,
  'data.augmentations': (),
  'data.crop_padding': 4,
  'optimizer.learning_rates': (0.01,),
}
GROUPS = 'model.batch_norm_examples'


@pytest.mark.parametrize('shape', [(12, 3), (12, 2, 5, 3)])
@pytest.mark.parametrize('size', [3, 4, 12])
def test_groups_agree_with_the_oracle(size, shape):
  rng = np.random.default_rng(0)
  x = (2 + rng.normal(size=shape)).astype(np.float32)
  scale, bias, mean = rng.normal(size=(3, 3)).astype(np.float32)
  variance = rng.uniform(1, 2, size=3).astype(np.float32)
  variables = {
    'params': {'scale': scale, 'bias': bias},
    'batch_stats': {'mean': mean, 'var': variance},
  }
  module = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)

  def forward(x):
    with nn.intercept_methods(batch_norm.in_groups(size, 'device')):
      return module.apply(variables, x, mutable=['batch_stats'])

  y, updates = jax.jit(forward)(x)
  expected = references.batch_norm(x, scale, bias, (mean, variance), size)
  found = y, updates['batch_stats']['mean'], updates['batch_stats']['var']
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, 1e-4, 1e-5)
  jax.test_util.check_grads(
    lambda x: forward(x)[0], (x,), 1, ['rev'], 3e-2, 3e-2
  )


@pytest.mark.parametrize('fields', [{}, {'dtype': jnp.bfloat16}])
def test_one_group_is_what_flax_computes(fields):
  x = jax.random.normal(jax.random.key(0), (8, 3, 3, 2))
  module = nn.BatchNorm(momentum=0.9, **fields)
  variables = module.init(jax.random.key(0), x, use_running_average=True)

  def forward(size, **options):
    with nn.intercept_methods(batch_norm.in_groups(size, 'device')):
      return module.apply(variables, x, mutable=['batch_stats'], **options)

  ours = forward(8, use_running_average=False)
  theirs = module.apply(
    variables, x, use_running_average=False, mutable=['batch_stats']
  )
  assert ours[0].dtype == theirs[0].dtype
  tolerance = 1e-2 if fields else 1e-5
  helpers.assert_trees_close(
    jax.tree.map(np.float32, ours), jax.tree.map(np.float32, theirs), tolerance
  )
  # In evaluation there are no groups, nor a size that must fit.
  y, _ = forward(7, use_running_average=True)
  np.testing.assert_array_equal(
    y, module.apply(variables, x, use_running_average=True)
  )


def trained(devices, **fields):
  """The state after three steps on noise."""
  this = helpers.Setup(
    dataset=helpers.noise(),
    devices=devices,
    batch_size=16,
    **{'selection.rule': 'uniform', **NETWORK, **fields},
  )
  return this.run(3)[0]


@pytest.mark.long
@pytest.mark.slow
def test_groups_are_what_devices_are():
  """Four devices with statistics of their own, or any number with groups."""
  fields = {
    'model.name': 'resnet8', 'selection.rule': 'mms',
    'selection.proxy': 'resnet8', 'mmr.alpha': 1e-4,
  }  # fmt: skip
  four = trained(4, **fields, **{'model.batch_norm': 'device'})
  for devices in (1, 8):  # 4 groups, or half a group on each
    state = trained(devices, **fields, **{GROUPS: 4})
    for name in ('params', 'batch_stats'):
      ours, theirs = getattr(state, name), getattr(four, name)
      helpers.assert_trees_close(ours, theirs, 1e-4)
    # Not its gradients: rounding, where a group is divided, turns a ReLU.
    ours, theirs = (x.proxy.get('params', {}) for x in (state, four))
    helpers.assert_trees_close(ours, theirs, 1e-4)
  whole = trained(1, **fields)
  difference = jax.tree.map(
    lambda x, y: np.abs(x - y).max(), four.batch_stats, whole.batch_stats
  )
  assert max(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.slow
def test_groups_of_a_pool():
  fields = {
    'model.name': 'resnet8', 'selection.rule': 'mms', GROUPS: 4,
    'selection.batch_stats': 'pool',
  }  # fmt: skip
  one, two = trained(1, **fields), trained(2, **fields)
  for name in ('params', 'batch_stats'):
    helpers.assert_trees_close(getattr(one, name), getattr(two, name), 1e-4)


@pytest.mark.parametrize(
  ('batch', 'size', 'devices', 'fits'),
  [
    (256, 64, 1, True), (256, 64, 4, True), (256, 64, 8, True),
    (256, 48, 1, False), (256, 64, 3, False), (96, 32, 6, True),
    (96, 64, 6, False), (96, 32, 4, False),
  ],
)  # fmt: skip
def test_groups_and_devices_must_divide_the_batch(batch, size, devices, fits):
  fields = {'model.name': 'resnet8', 'selection.rule': 'uniform', GROUPS: size}
  config = helpers.small_config(batch_size=batch, pool_size=batch, **fields)
  if fits:
    schema.validate_devices(config, devices)
    return
  with pytest.raises(ConfigError, match=r'^(model.batch_norm_ex|batch_size)'):
    schema.validate_devices(config, devices)


def test_groups_must_fit_a_pool():
  fields = {
    'model.name': 'resnet8', GROUPS: 4, 'selection.batch_stats': 'pool',
    'pool_size': 12,
  }  # fmt: skip
  config = helpers.small_config(**fields)
  schema.validate_devices(config, 1)
  words = (
    r'^model\.batch_norm_examples=4 .* divisor of 6, the examples of each '
    r'device in a pool, or .* divisor of all 12$'
  )
  with pytest.raises(ConfigError, match=words):
    schema.validate_devices(config, 2)


@pytest.mark.slow
def test_without_groups_nothing_is_intercepted():
  this = helpers.Setup(**{'model.name': 'resnet8'})
  assert this.spec.batch_norm_examples is None
  config = helpers.small_config(**{'model.name': 'resnet8', GROUPS: 2})
  spec = setup_lib.make_spec(config, helpers.noise(), 1)
  assert (spec.batch_norm_examples, spec.average_batch_stats) == (2, True)
  assert spec.model.batch_norm_axis is None
