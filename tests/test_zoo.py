"""The larger models: published sizes and costs, shapes, options, dropout."""

import functools
import math

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import linearized, models, optimizers
from margin_jax.models import mobilenet
from margin_jax.train import dropout as dropout_lib
from tests import helpers
from tests.helpers import slow

SMALL = {'stem': 'small'}
RELEASED = {'head': 'released', 'dropout': 0.5}
# Name, options, side, classes; parameters and multiply-adds, as published,
# with as many digits.
PUBLISHED = [
  # Zagoruyko & Komodakis 2016, Table 4.
  *slow(('wrn28_10', {}, 32, 10, '36.5e6', '5.2e9')),
  ('wrn16_8', {}, 32, 10, '11.0e6', '1.55e9'),
  # The usual network without hidden layers.
  ('vgg16', {}, 32, 10, '14.7e6', '0.31e9'),
  # And with them: 512 * 4096 + 4096 * 4096 more, and as many multiply-adds.
  ('vgg16', RELEASED, 32, 10, '33.6e6', '0.33e9'),
  # torchvision.
  ('imagenet_resnet18', {}, 224, 1000, 11_689_512, '1.81e9'),
  *slow(('imagenet_resnet34', {}, 224, 1000, 21_797_672, '3.66e9')),
  ('imagenet_resnet50', {}, 224, 1000, 25_557_032, '4.09e9'),
  *slow(('imagenet_resnet101', {}, 224, 1000, 44_549_160, '7.80e9')),
  ('imagenet_resnet18', SMALL, 32, 10, 11_173_962, '0.56e9'),
  ('densenet121', {}, 224, 1000, 7_978_856, '2.83e9'),
  *slow(('densenet169', {}, 224, 1000, 14_149_480, '3.36e9')),
  *slow(('densenet201', {}, 224, 1000, 20_013_928, '4.29e9')),
  # Howard et al. 2017, Tables 6 and 8.
  ('mobilenet', {}, 224, 1000, 4_231_976, '569e6'),
  ('mobilenet', {'width': 0.5}, 224, 1000, '1.3e6', '149e6'),
]
# The smallest of each kind, with the width of its features.
MODELS = [
  ('wrn10_1', {}, 64),
  ('wrn16_2', {'dropout': 0.3}, 128),
  ('vgg11', {}, 512),
  ('vgg11', RELEASED, 4096),
  ('imagenet_resnet18', {}, 512),
  ('imagenet_resnet18', SMALL, 512),
  *slow(('imagenet_resnet50', SMALL, 2048)),
  *slow(('densenet121', SMALL, 1024)),
  ('mobilenet', {}, 1024),
  ('mobilenet', {'width': 0.25}, 256),
]


def rounded(number, text):
  """`number` with as many digits as '4.09e9' has, as such a text."""
  digits, power = text.split('e')
  decimals = len(digits.partition('.')[2])
  return f'{number / 10 ** int(power):.{decimals}f}e{power}'


def abstract(model, side=32, batch=2):
  """Inputs and variables, as shapes."""
  inputs = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
  init = functools.partial(model.init, train=False)
  return inputs, jax.eval_shape(init, jax.random.key(0), inputs)


def multiply_adds(jaxpr):
  """Of convolutions and products, padding included, as papers count."""
  total = 0
  for equation in jaxpr.eqns:
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      total += multiply_adds(inner)
    if equation.primitive.name == 'conv_general_dilated':
      *taps, inputs, _ = equation.invars[1].aval.shape  # (H, W, in, out)
      total += math.prod([*equation.outvars[0].aval.shape, *taps, inputs])
    elif equation.primitive.name == 'dot_general':
      rows, inner = equation.invars[0].aval.shape
      total += rows * inner * equation.invars[1].aval.shape[1]
  return total


@pytest.mark.parametrize(
  ('name', 'options', 'side', 'classes', 'parameters', 'cost'), PUBLISHED
)
def test_size_and_cost_are_the_published_ones(
  name, options, side, classes, parameters, cost
):
  model = models.build(name, classes, **options)
  inputs, variables = abstract(model, side, batch=1)
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  if isinstance(parameters, str):
    count = rounded(count, parameters)
  assert count == parameters
  traced = jax.jit(functools.partial(model.apply, train=False)).trace(
    variables, inputs
  )
  exact = multiply_adds(traced.jaxpr.jaxpr)
  assert rounded(exact, cost) == cost
  # What the trainer logs: XLA leaves out products with padding, which is most
  # of what a 3x3 convolution of 2x2 pixels does, and adds BatchNorm and ReLU.
  flops = traced.lower().cost_analysis()['flops']
  assert 0.78 * exact < flops / 2 < 1.04 * exact


@pytest.mark.parametrize('dtype', models.DTYPES)
@pytest.mark.parametrize(('name', 'options', 'width'), MODELS)
def test_every_model_returns_logits_and_features(name, options, width, dtype):
  model = models.build(name, 7, dtype=dtype, **options)
  inputs, variables = abstract(model)
  (logits, features), updates = jax.eval_shape(
    functools.partial(
      model.apply,
      train=dtype == 'bfloat16',
      mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(0)},
    ),
    variables,
    inputs,
  )
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  assert (features.shape, features.dtype) == ((2, width), jnp.float32)
  assert updates['batch_stats'] == variables['batch_stats']
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  head = variables['params']['head']
  assert {key: x.shape for key, x in head.items()} == {
    'kernel': (width, 7), 'bias': (7,),
  }  # fmt: skip


@pytest.mark.slow
def test_first_values_of_the_released_head_are_those_of_pytorch():
  """Uniform up to 1 / sqrt(inputs), biases too."""
  model = models.build('vgg11', 7, **RELEASED)
  images = jnp.zeros((1, 32, 32, 3))
  init = jax.jit(functools.partial(model.init, train=False))
  params = init(jax.random.key(0), images)['params']
  for name, inputs in (('hidden1', 512), ('hidden2', 4096), ('head', 4096)):
    for leaf in ('kernel', 'bias'):
      x = np.ravel(params[name][leaf]) * math.sqrt(inputs)
      assert np.abs(x).max() <= 1
      if x.size > 7:
        assert np.std(x) == pytest.approx(1 / math.sqrt(3), rel=0.05)
        assert np.mean(x) == pytest.approx(0, abs=0.05)


@pytest.mark.slow
def test_dropout_of_the_released_head():
  """The features are what the last layer reads: after ReLU and dropout."""
  model = models.build('vgg11', 7, **RELEASED)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
  variables = model.init(jax.random.key(0), images, train=False)
  outputs = {}
  for train in (False, True):
    (outputs[train], layers) = model.apply(
      variables, images, train=train, rngs={'dropout': jax.random.key(1)},
      mutable=['batch_stats', 'intermediates'], capture_intermediates=True,
    )  # fmt: skip
    logits, features = map(np.float64, outputs[train])
    head = {k: np.float64(x) for k, x in variables['params']['head'].items()}
    expected = features @ head['kernel'] + head['bias']
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    hidden = layers['intermediates']['hidden2']['__call__'][0]
    active = np.maximum(np.float64(hidden), 0)
    kept = features != 0
    np.testing.assert_allclose(
      features, active * kept * (2 if train else 1), rtol=1e-6
    )
    share = kept.sum() / (active > 0).sum()
    assert share == pytest.approx(0.5, abs=0.03) if train else share == 1


@pytest.mark.parametrize('name', ['wrn10_1', 'mobilenet'])
def test_bfloat16_is_of_the_computation_only(name):
  model = models.build(name, 7, dtype='bfloat16')
  inputs, variables = abstract(model)
  program = jax.make_jaxpr(functools.partial(model.apply, train=False))(
    variables, inputs
  )
  lines = str(program).splitlines()
  convolutions = [x for x in lines if 'conv_general_dilated' in x]
  assert convolutions
  assert all(':bf16[' in line for line in convolutions)
  assert ':f32[' in [x for x in lines if 'dot_general' in x][-1]  # the head


@pytest.mark.parametrize(
  ('name', 'layer', 'shape'),
  [
    ('wrn10_1', 'stage2_block1/conv_proj', (2, 16, 16, 32)),
    ('wrn10_1', 'stage3_block1/dropout', (2, 8, 8, 64)),
    ('vgg16', 'conv5_3', (2, 2, 2, 512)),
    ('imagenet_resnet34', 'stage4_block3', (2, 1, 1, 512)),
    ('imagenet_resnet50', 'stage1_block1/conv3', (2, 8, 8, 256)),
    *slow(('densenet121', 'block1_layer6', (2, 8, 8, 32))),
    *slow(('densenet121', 'transition3', (2, 1, 1, 512))),
    ('mobilenet', 'block13/norm_point', (2, 1, 1, 1024)),
  ],
)
def test_layers_are_found_by_name(name, layer, shape):
  model = models.build(name, 7)
  inputs, variables = abstract(model)
  found = linearized.layer_shapes(model, variables, inputs)
  assert found[layer] == shape
  # Every module that has parameters is a layer, and every block.
  assert {*variables['params']} <= {*found}


@pytest.mark.slow
def test_the_stems():
  for name in ('imagenet_resnet18', 'densenet121'):
    sides = []
    for stem in models.STEMS:
      model = models.build(name, 7, stem=stem)
      inputs, variables = abstract(model, 64)
      kernel = variables['params']['conv_stem']['kernel']
      found = linearized.layer_shapes(model, variables, inputs)
      first = 'stage1_block1' if 'resnet' in name else 'block1_layer1'
      sides.append((kernel.shape[0], found['conv_stem'][1], found[first][1]))
    assert sides == [(7, 32, 16), (3, 64, 64)]


@pytest.mark.parametrize(
  ('name', 'stem', 'last', 'left'),
  [
    ('vgg11', 'imagenet', 'conv5_2', 2),  # halved once more
    *slow(('densenet121', 'imagenet', 'transition3', 1)),
    *slow(('densenet121', 'small', 'transition3', 1)),
  ],
)
def test_the_least_side_leaves_something(name, stem, last, left):
  model = models.build(name, 7, stem=stem)
  least = models.find(name).least_side_with(stem)
  for side, expected in ((least, left), (least - 1, left - 1)):
    inputs, variables = abstract(model, side)
    shapes = linearized.layer_shapes(model, variables, inputs)
    assert shapes[last][1:3] == (expected, expected)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'stem': 'cifar'}, "'cifar'.*'imagenet', 'small'"),
    ({'dropout': 1.0}, r'dropout must be in \[0, 1\)'),
    ({'width': 0.0}, 'width must be above 0'),
    ({'head': 'mlp'}, "'mlp'.*'linear', 'released'"),
  ],
)
def test_unknown_options_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    models.build('mobilenet', 10, **options)


def test_what_the_models_can_do():
  names = ('cnn', 'mnist_cnn', 'resnet50', 'imagenet_resnet50', 'wrn16_1')
  names += ('vgg16', 'densenet121', 'mobilenet', 'bert_base')
  known = {name: models.find(name) for name in names}

  def which(holds):
    return {name for name, model in known.items() if holds(model)}

  deep = {'vgg16', 'densenet121', 'mobilenet', 'imagenet_resnet50'}
  deep |= {'resnet50', 'wrn16_1'}
  stems = {'imagenet_resnet50', 'densenet121'}
  assert which(lambda x: 'variant' in x.options) == {'resnet50'}
  assert which(lambda x: 'dropout' in x.options) == {
    'wrn16_1', 'vgg16', 'bert_base',
  }  # fmt: skip
  assert which(lambda x: 'head' in x.options) == {'vgg16'}
  assert which(lambda x: 'stem' in x.options) == stems
  assert which(lambda x: 'width' in x.options) == {'mobilenet'}
  assert which(lambda x: 'dtype' in x.options) == {*names}
  assert which(lambda x: x.any_size) == deep
  assert which(lambda x: x.batch_norm) == {'mnist_cnn', *deep}
  assert which(lambda x: x.reads == 'sentences') == {'bert_base'}
  assert which(lambda x: x.published) == {
    'vgg16', 'mobilenet', 'bert_base', *stems,
  }  # fmt: skip
  assert {x: known[x].least_side_with('small') for x in names[:-1]} == {
    'cnn': 2, 'mnist_cnn': 4, 'resnet50': 4, 'imagenet_resnet50': 4,
    'wrn16_1': 4, 'vgg16': 32, 'densenet121': 8, 'mobilenet': 4,
  }  # fmt: skip


@pytest.mark.parametrize(
  'name', ['wrn10_0', 'wrn010_1', 'wrn4_1', 'wrn12_1', 'wrn28_10x', 3, (), []]
)
def test_what_is_no_name(name):
  assert models.find(name) is None


def test_names_without_end():
  assert models.build('wrn1000_3', 2).depth == 1000
  patterns = [name for name in models.names() if '{' in name]
  assert [name[:4] for name in patterns] == ['wrn{', 'bert']


def masked(name, mask):
  """Paths of the parameters that are weight_decay_mask."""
  _, variables = abstract(models.build(name, 7))
  flags = jax.tree_util.tree_leaves_with_path(mask(variables['params']))
  return {'/'.join(key.key for key in path) for path, flag in flags if flag}


@pytest.mark.parametrize('name', ['mobilenet', 'wrn10_1', 'vgg11'])
def test_weight_decay_by_role(name):
  kernels = masked(name, optimizers.kernels_only)
  convolutions = masked(name, optimizers.convolutions_only)
  assert kernels - convolutions == {'head/kernel'}
  assert all(path.endswith('/kernel') for path in kernels)
  everything = masked(name, lambda x: jax.tree.map(lambda _: True, x))
  assert kernels == {path for path in everything if path.endswith('/kernel')}


def test_only_convolutions_are_decayed_on_request():
  params = {
    'a': jnp.ones((1, 1, 2, 2)),
    'b': jnp.ones((2, 2)),
    'c': jnp.ones(2),
  }
  optimizer = optimizers.make(
    'sgd', lambda step: 1.0, momentum=0.0, nesterov=False,
    weight_decay=0.5, weight_decay_mask='convolutions',
  )  # fmt: skip
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  largest = {name: float(jnp.abs(x).max()) for name, x in updates.items()}
  assert largest == {'a': 0.5, 'b': 0.0, 'c': 0.0}
  with pytest.raises(ValueError, match=r"must be one of .*got 'biases'"):
    optimizers.make(
      'sgd', lambda step: 1.0, momentum=0.0, nesterov=False,
      weight_decay=0.5, weight_decay_mask='biases',
    )  # fmt: skip


def test_first_values_of_a_depthwise_convolution_keep_the_variance():
  norm = functools.partial(nn.BatchNorm, use_running_average=True)
  block = mobilenet.Separable(8, 1, nn.Conv, norm)
  params = block.init(jax.random.key(0), jnp.ones((1, 2, 2, 512)))['params']
  kernel = params['conv_depth']['kernel']
  assert kernel.shape == (3, 3, 1, 512)
  assert np.std(kernel) == pytest.approx(math.sqrt(2 / 9), rel=0.05)


def wide(devices):
  """Two steps of a tiny wide ResNet with dropout: the state, the losses."""
  fields = {
    'model.name': 'wrn10_1', 'model.dropout': 0.3, 'devices': devices,
    'data.validation_examples': 0, 'data.augmentations': (), 'mmr.alpha': 0.0,
  }  # fmt: skip
  setup = helpers.Setup(dataset=helpers.noise(), **fields)
  assert setup.spec.model.dropout == 0.3
  state, metrics = setup.run(2)
  return state, metrics['loss']


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_number_of_devices():
  alone, losses = wide(1)
  together, other_losses = wide(4)
  np.testing.assert_allclose(losses, other_losses, 1e-5)
  helpers.assert_trees_close(alone.params, together.params, 1e-5)
  helpers.assert_trees_close(alone.batch_stats, together.batch_stats, 1e-5)


class Dropping(nn.Module):
  """Two layers of dropout of one kind."""

  options: dict

  @nn.compact
  def __call__(self, x):
    drop = functools.partial(nn.Dropout, **self.options)
    return drop(name='first')(x), drop(name='second')(x)


def drop(x, device=0, deterministic=False, **options):
  """What two layers return with the masks of the train step."""
  options = {'rate': 0.25, 'deterministic': deterministic, **options}
  positions = device * len(x) + jnp.arange(len(x))
  with nn.intercept_methods(dropout_lib.by_position(positions)):
    return Dropping(options).apply({}, x, rngs={'dropout': jax.random.key(3)})


@pytest.mark.slow
def test_dropout_masks_are_of_the_example_and_the_layer():
  x = jnp.ones((64, 40, 3))
  first, second = drop(x)
  assert {*np.unique(first)} == {0.0, np.float32(1 / 0.75)}
  assert np.mean(first == 0) == pytest.approx(0.25, abs=0.02)
  # Layers and examples differ, and neighbours do not share masks.
  agree = (0.25**2 + 0.75**2, 0.02)
  for other in (second, jnp.roll(first, 1, axis=0)):
    same = np.mean(first == other)
    assert same == pytest.approx(agree[0], abs=agree[1])
  # The same example in another device's share.
  np.testing.assert_array_equal(drop(x[48:], device=3)[0], first[48:])
  assert drop(x.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_dropout_keeps_the_options_of_the_layer():
  x = jnp.ones((4, 30, 5))
  for off in ({'deterministic': True}, {'rate': 0.0}, {'rate': 1e-9}):
    np.testing.assert_array_equal(drop(x, **off)[0], x)
  assert not np.any(drop(x, rate=1.0)[0])
  assert np.mean(drop(x, rate=0.9999)[0] != 0) < 0.01
  dropped, _ = drop(x, broadcast_dims=(-1,))
  np.testing.assert_array_equal(dropped, dropped[..., :1] * x)
  assert not np.array_equal(dropped[0], dropped[1])
  # One mask for all examples: the same on every device.
  dropped, _ = drop(x, device=8, broadcast_dims=(0,))
  np.testing.assert_array_equal(dropped, dropped[:1] * x)
