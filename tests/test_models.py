"""Models: sizes, shapes, dtypes, BatchNorm, and a float64 NumPy forward."""

import functools
import math
import re
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import mms_scores, models, optimizers
from margin_jax.models import common, resnet
from tests import helpers

BATCH = 3
RESNETS = list(resnet.MODELS)


def shapes(model, inputs=(BATCH, 32, 32, 3), **kwargs):
  """(logits, features), variables: shapes and dtypes, nothing computed."""
  function = functools.partial(model.init_with_output, train=False, **kwargs)
  return jax.eval_shape(
    function, jax.random.key(0), jax.ShapeDtypeStruct(inputs, jnp.float32)
  )


def size(params):
  return sum(x.size for x in jax.tree.leaves(params))


def expected_size(depth, num_classes, authors):
  """Parameters of a ResNet for RGB images, counted by hand."""
  stem = 9 * 3 * 16 + 2 * 16
  total = stem + 64 * num_classes + num_classes
  blocks = (depth - 2) // 6
  for before, width in ((16, 16), (16, 32), (32, 64)):
    total += 9 * before * width + 9 * width * width + 4 * width
    total += (blocks - 1) * (2 * 9 * width * width + 4 * width)
    if authors and before != width:
      total += before * width + 2 * width
  return total


@pytest.mark.parametrize(
  ('depth', 'millions'),
  # He et al. 2016, Table 6.
  [(20, '0.27'), (32, '0.46'), (44, '0.66'), (56, '0.85'), (110, '1.7')],
)
def test_sizes_are_the_published_ones(depth, millions):
  _, variables = shapes(models.build(f'resnet{depth}', 10))
  count = size(variables['params'])
  assert count == expected_size(depth, 10, authors=False)
  decimals = len(millions.partition('.')[2])
  assert f'{count / 1e6:.{decimals}f}' == millions


def test_names():
  depths = [int(name.removeprefix('resnet')) for name in RESNETS]
  assert models.names()[:2] == ('cnn', 'mnist_cnn')
  assert depths == [*range(8, 111, 6)]
  for name in ('resnet', 'resnet18', 'vgg', 'CNN', 'wrn28', 'wrn29_2', None):
    words = re.escape(f'{name!r}; there are {models.names()}')
    with pytest.raises(ValueError, match=words):
      models.build(name, 10)


@pytest.mark.parametrize(
  ('argument', 'value', 'allowed'),
  [('variant', 'He', models.VARIANTS), ('dtype', 'float', models.DTYPES)],
)
def test_unknown_variants_and_dtypes_are_refused(argument, value, allowed):
  words = f'{re.escape(repr(value))}.*{re.escape(str(allowed))}'
  with pytest.raises(ValueError, match=words):
    models.build('resnet8', 10, **{argument: value})


@pytest.mark.parametrize('variant', models.VARIANTS)
@pytest.mark.parametrize('name', ['cnn', 'mnist_cnn', *RESNETS])
def test_every_model_returns_logits_and_features(name, variant):
  model = models.build(name, 7, variant=variant)
  (logits, features), variables = shapes(model)
  width = {'cnn': 128, 'mnist_cnn': 512}.get(name, 64)
  folded = variant == 'mms_select' and name.startswith('resnet')
  width += folded  # a 1 that the bias is the weight of
  assert (logits.shape, logits.dtype) == ((BATCH, 7), jnp.float32)
  assert (features.shape, features.dtype) == ((BATCH, width), jnp.float32)
  head = variables['params']['head']
  assert {key: x.shape for key, x in head.items()} == {
    'kernel': (width, 7), **({} if folded else {'bias': (7,)}),
  }  # fmt: skip
  if name.startswith('resnet'):
    depth = int(name.removeprefix('resnet'))
    count = expected_size(depth, 7, variant != 'he')
    assert size(variables['params']) == count


@pytest.mark.parametrize('name', ['cnn', 'mnist_cnn', 'resnet8'])
def test_bfloat16_is_of_the_computation_only(name):
  model = models.build(name, 10, dtype='bfloat16')
  (logits, features), variables = shapes(model)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  assert (logits.dtype, features.dtype) == (jnp.float32, jnp.float32)
  program = jax.make_jaxpr(functools.partial(model.apply, train=False))(
    variables, jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
  )
  lines = str(program).splitlines()
  convolutions = [x for x in lines if 'conv_general_dilated' in x]
  assert convolutions
  assert all(':bf16[' in line for line in convolutions)
  products = [x for x in lines if 'dot_general' in x]
  assert ':f32[' in products[-1]  # the head


def random_variables(model, inputs):
  """Variables without the zeros and ones that they start with."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    scale = np.sqrt(2 / np.prod(x.shape[:-1])) if x.ndim > 1 else 0.3
    values = rng.normal(scale=scale, size=x.shape)
    if path[-1].key in ('scale', 'var'):
      values = 1 + np.abs(values)
    return values.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes(model, inputs)[1])


def convolve(x, kernel, stride=1):
  """Padded by half the kernel, as PyTorch does with padding=1."""
  size = kernel.shape[0]
  pad = size // 2
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  height, width = x.shape[1:3]
  total = 0
  for i in range(size):
    for j in range(size):
      rows = slice(i, i + height, stride)
      columns = slice(j, j + width, stride)
      total = total + padded[:, rows, columns] @ kernel[i, j]
  return total


class Oracle:
  """He's ResNet in float64, from the paper."""

  def __init__(self, variables, train):
    to64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    self.params = to64(variables['params'])
    self.stats = to64(variables['batch_stats'])
    self.train = train

  def norm(self, x, *path):
    params, stats = self.params, self.stats
    for name in path:
      params, stats = params[name], stats[name]
    mean, var = stats['mean'], stats['var']
    if self.train:
      mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
      stats['mean'] = 0.9 * stats['mean'] + 0.1 * mean
      stats['var'] = 0.9 * stats['var'] + 0.1 * var
    x = (x - mean) / np.sqrt(var + 1e-5)
    return x * params['scale'] + params['bias']

  def block(self, x, name, width, stride):
    params = self.params[name]
    y = convolve(x, params['conv1']['kernel'], stride)
    y = np.maximum(self.norm(y, name, 'norm1'), 0)
    y = convolve(y, params['conv2']['kernel'])
    y = self.norm(y, name, 'norm2')
    if 'conv_proj' in params:
      x = convolve(x, params['conv_proj']['kernel'], stride)
      x = self.norm(x, name, 'norm_proj')
    else:  # option A: every other pixel, and zeros for the new channels
      shortcut = np.zeros_like(y)
      shortcut[..., : x.shape[-1]] = x[:, ::stride, ::stride]
      x = shortcut
    return np.maximum(x + y, 0)

  def __call__(self, x):
    x = convolve(x, self.params['conv_stem']['kernel'])
    x = np.maximum(self.norm(x, 'norm_stem'), 0)
    for stage, width in ((1, 16), (2, 32), (3, 64)):
      x = self.block(x, f'stage{stage}_block1', width, min(stage, 2))
    features = x.mean(axis=(1, 2))
    head = self.params['head']
    if 'bias' not in head:  # folded into the weights
      features = np.concatenate([features, np.ones((len(features), 1))], 1)
      return features @ head['kernel'], features
    return features @ head['kernel'] + head['bias'], features


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('variant', models.VARIANTS)
def test_resnet8_agrees_with_the_oracle(variant, train):
  model = models.build('resnet8', 5, variant=variant)
  # Odd and unequal sides: padding and strides show.
  inputs = np.random.default_rng(1).normal(size=(BATCH, 9, 6, 3))
  inputs = inputs.astype(np.float32)
  variables = random_variables(model, inputs.shape)
  oracle = Oracle(variables, train)
  expected = oracle(inputs.astype(np.float64))
  outputs, updates = jax.jit(
    functools.partial(model.apply, train=train, mutable=['batch_stats'])
  )(variables, inputs)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-4), outputs, expected
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5),
    updates['batch_stats'],
    oracle.stats,
  )


@pytest.mark.slow
def test_a_folded_bias_is_in_the_norm_and_under_weight_decay():
  inputs = np.random.default_rng(1).normal(size=(BATCH, 8, 8, 3))
  model = models.build('resnet8', 5, variant='mms_select')
  variables = random_variables(model, inputs.shape)
  kernel = variables['params']['head']['kernel']
  logits, _ = model.apply(variables, inputs.astype(np.float32), train=False)
  scores = mms_scores(logits, jnp.asarray(kernel))
  for row, score in zip(np.float64(logits), scores, strict=True):
    second, first = np.argsort(row)[-2:]
    weights, biases = (kernel[:64], kernel[64])
    square = np.sum((weights[:, first] - weights[:, second]) ** 2)
    square += (biases[first] - biases[second]) ** 2
    expected = (row[first] - row[second]) / np.sqrt(square)
    np.testing.assert_allclose(score, expected, 1e-5)
  mask = optimizers.kernels_only(variables['params'])
  assert mask['head'] == {'kernel': True}


def test_cnn_agrees_with_the_oracle():
  model = models.build('cnn', 5)
  inputs = np.random.default_rng(1).normal(size=(BATCH, 8, 6, 1))
  variables = random_variables(model, inputs.shape)
  to64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
  params = to64(variables['params'])
  x = inputs
  for name in ('conv1', 'conv2'):
    x = np.maximum(
      convolve(x, params[name]['kernel']) + params[name]['bias'], 0
    )
  x = x.reshape(BATCH, 4, 2, 3, 2, 64).max(axis=(2, 4)).reshape(BATCH, -1)
  features = np.maximum(
    x @ params['hidden']['kernel'] + params['hidden']['bias'], 0
  )
  logits = features @ params['head']['kernel'] + params['head']['bias']
  outputs = jax.jit(functools.partial(model.apply, train=False))(
    variables, inputs.astype(np.float32)
  )
  np.testing.assert_allclose(outputs[0], logits, 1e-4, 1e-4)
  np.testing.assert_allclose(outputs[1], features, 1e-4, 1e-4)


@pytest.mark.parametrize('name', ['cnn', 'resnet8'])
def test_only_training_changes_batch_statistics(name):
  model = models.build(name, 5)
  inputs = np.random.default_rng(1).normal(size=(BATCH, 8, 8, 3))
  inputs = inputs.astype(np.float32)
  variables = random_variables(model, inputs.shape)
  logits, features = jax.jit(functools.partial(model.apply, train=False))(
    variables, inputs
  )
  head = variables['params']['head']
  np.testing.assert_allclose(
    logits, np.asarray(features) @ head['kernel'] + head['bias'], 1e-5, 1e-5
  )
  # Eval mode: an example does not see the others.
  alone = model.apply(variables, inputs[:1], train=False)
  np.testing.assert_allclose(logits[:1], alone[0], 1e-4, 1e-4)
  train = functools.partial(model.apply, variables, inputs, train=True)
  if name == 'cnn':
    np.testing.assert_allclose(train()[0], logits, 1e-5, 1e-5)
  else:
    with pytest.raises(flax.errors.ModifyScopeVariableError):
      train()


def test_batch_norm_over_an_axis_is_that_of_the_whole_batch():
  inputs = np.random.default_rng(1).normal(size=(2, BATCH, 8, 8, 3))
  inputs = inputs.astype(np.float32)
  whole = models.build('resnet8', 5)
  mapped = models.build('resnet8', 5, batch_norm_axis='device')
  variables = random_variables(whole, (BATCH, 8, 8, 3))

  def apply(model, x):
    return model.apply(variables, x, train=True, mutable=['batch_stats'])

  (expected, _), updates = jax.jit(functools.partial(apply, whole))(
    inputs.reshape(-1, 8, 8, 3)
  )
  (logits, _), synchronized = jax.jit(
    jax.vmap(functools.partial(apply, mapped), axis_name='device')
  )(inputs)
  np.testing.assert_allclose(logits.reshape(-1, 5), expected, 1e-3, 1e-3)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x[0], y, 1e-4, 1e-4),
    synchronized,
    updates,
  )


@pytest.mark.parametrize('variant', models.VARIANTS)
@pytest.mark.slow
def test_first_values(variant):
  model = models.build('resnet8', 100, variant=variant)
  params = jax.jit(functools.partial(model.init, train=False))(
    jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )['params']
  authors = variant != 'he'
  for stage, width in ((1, 16), (2, 32), (3, 64)):
    block = params[f'stage{stage}_block1']
    assert np.all(block['norm1']['scale'] == 1)
    # The authors' blocks start as their shortcut.
    assert np.all(block['norm2']['scale'] == (0 if authors else 1))
    assert ('conv_proj' in block) == (authors and stage > 1)
    # He et al. 2015, Eq. 14: the variance is 2 / (9 * outputs).
    kernel = np.asarray(block['conv2']['kernel'])
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * width)), 0.1)
    kernel = np.asarray(block['conv1']['kernel'])
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * width)), 0.1)
  head = np.asarray(params['head']['kernel'])
  bias = params['head'].get('bias', head[64:])
  np.testing.assert_allclose(head[:64].std(), 0.01 if authors else 1 / 8, 0.1)
  assert not np.any(bias)


def test_the_running_variance_is_the_mean_of_the_batches_own():
  """And not n / (n - 1) times that, as PyTorch's."""
  model = types.SimpleNamespace(dtype=None, batch_norm_axis=None)
  norm = common.make_norm(model, train=True)()
  x = np.random.default_rng(0).normal(size=(3, 1, 1, 2)).astype(np.float32)
  variables = norm.init(jax.random.key(0), x)
  _, updated = norm.apply(variables, x, mutable=['batch_stats'])
  np.testing.assert_allclose(
    updated['batch_stats']['var'], 0.9 + 0.1 * x.var(axis=(0, 1, 2)), 1e-5
  )


@pytest.mark.parametrize(
  'name', ['cnn', *helpers.slow('mobilenet', 'bert2_32_2')]
)
def test_glorot_draws_kernels_of_his_variance(name):
  """Uniform to sqrt(6 / (fan_in + fan_out)); nothing else changes."""
  if name.startswith('bert'):
    model = models.build(name, 3, vocabulary=50)
    tokens = jnp.ones((1, 6), jnp.int32)
    inputs = {'ids': tokens, 'segments': tokens, 'mask': tokens}
  else:
    model, inputs = models.build(name, 3), jnp.ones((1, 16, 16, 3))
  init = jax.jit(functools.partial(model.init, train=False))
  params = init(jax.random.key(0), inputs)['params']
  params = jax.tree.map(lambda x: x + 2, params)
  draw = jax.jit(models.glorot)
  found = draw(params, jax.random.key(1))
  before = flax.traverse_util.flatten_dict(params)
  seen, relative = set(), []
  for path, value in flax.traverse_util.flatten_dict(found).items():
    if path[-1] != 'kernel':
      np.testing.assert_array_equal(value, before[path])
      continue
    *receptive, fan_in, fan_out = value.shape
    bound = math.sqrt(6 / (math.prod(receptive) * (fan_in + fan_out)))
    assert np.abs(value).max() <= bound * (1 + 1e-6)
    relative.append(np.asarray(value).ravel() / bound)
    seen.add(float(value.ravel()[0]) / bound)
  assert len(seen) == len(relative) > 2  # no two layers have the same draw
  relative = np.concatenate(relative)
  # Of n uniform numbers the mean square is 1/3 with deviation 0.3 / sqrt(n).
  np.testing.assert_allclose(
    np.mean(relative**2), 1 / 3, 0, 1.5 / len(relative) ** 0.5
  )
  for other, same in ((jax.random.key(1), True), (jax.random.key(2), False)):
    again = flax.traverse_util.flatten_dict(draw(params, other))
    for path, value in flax.traverse_util.flatten_dict(found).items():
      if path[-1] == 'kernel':
        assert np.array_equal(again[path], value) == same


@pytest.mark.slow
def test_a_run_starts_as_its_config_says():
  fields = {'selection.rule': 'uniform', 'model.name': 'mnist_cnn'}
  states = [
    helpers.Setup(**fields, **{'model.kernel_init': kind}).first
    for kind in ('default', 'glorot')
  ]
  kernels = [state.params['hidden']['kernel'] for state in states]
  fan_in, fan_out = kernels[0].shape
  for kernel, variance in zip(
    kernels, (1 / fan_in, 2 / (fan_in + fan_out)), strict=True
  ):
    np.testing.assert_allclose(kernel.var(), variance, 0.02)
  assert np.abs(kernels[1]).max() <= math.sqrt(6 / (fan_in + fan_out))
  for name in ('batch_stats', 'opt_state'):
    helpers.assert_trees_equal(*(getattr(state, name) for state in states))
