"""Files of weights: what is read, what is refused, where a run starts."""

import functools
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from margin_jax import config, data, models
from margin_jax.models import pretrained
from margin_jax.train import loop
from margin_jax.train import setup as setup_lib
from tests import helpers

# VGG-11's convolutions, by their indices in torchvision's sequence.
CONVOLUTIONS = {
  0: (64, 3), 4: (128, 64), 8: (256, 128), 11: (256, 256), 15: (512, 256),
  18: (512, 512), 22: (512, 512), 25: (512, 512),
}  # fmt: skip


def state_dict(classes=10, biases=False):
  """A VGG-11's, random."""
  rng = np.random.default_rng(0)
  shapes = {'classifier.weight': (classes, 512), 'classifier.bias': (classes,)}
  for index, (outputs, inputs) in CONVOLUTIONS.items():
    shapes[f'features.{index}.weight'] = (outputs, inputs, 3, 3)
    if biases:
      shapes[f'features.{index}.bias'] = (outputs,)
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      shapes[f'features.{index + 1}.{leaf}'] = (outputs,)
  state = {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }
  state['features.1.num_batches_tracked'] = np.array(7)
  return state


@functools.cache
def variables(name='vgg11', classes=10, head='linear'):
  model = models.build(name, classes, head=head)
  init = functools.partial(model.init, train=False)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  return jax.eval_shape(init, jax.random.key(0), image)


@pytest.fixture
def path(tmp_path):
  return str(tmp_path / 'weights.safetensors')


def test_every_tensor_has_its_variable(path):
  state = state_dict()
  save_file(state, path)
  loaded = pretrained.load(path, 'vgg11', variables())
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), loaded)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), variables())
  params, stats = loaded['params'], loaded['batch_stats']
  # VGG-11's stages have 1, 1, 2, 2, 2 convolutions.
  third = state['features.11.weight']
  np.testing.assert_array_equal(
    params['conv3_2']['kernel'][2, 1, 5, 7], third[7, 5, 2, 1]
  )
  np.testing.assert_array_equal(
    params['head']['kernel'], state['classifier.weight'].T
  )
  for ours, collection, theirs in (
    ('scale', params, 'weight'),
    ('bias', params, 'bias'),
    ('mean', stats, 'running_mean'),
    ('var', stats, 'running_var'),
  ):
    np.testing.assert_array_equal(
      collection['norm5_2'][ours], state[f'features.26.{theirs}']
    )


def test_biases_before_batch_norm_move_into_its_mean(path):
  state = state_dict(biases=True)
  save_file(state, path)
  loaded = pretrained.load(path, 'vgg11', variables())
  np.testing.assert_array_equal(
    loaded['batch_stats']['norm2_1']['mean'],
    state['features.5.running_mean'] - state['features.4.bias'],
  )


def test_half_precision_becomes_float32(path):
  state = {k: v.astype(ml_dtypes.bfloat16) for k, v in state_dict().items()}
  save_file(state, path)
  loaded = pretrained.load(path, 'vgg11', variables())
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype('float32')}


def test_a_head_of_other_classes_is_left_alone(path, caplog):
  save_file(state_dict(classes=1000), path)
  start = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), variables())
  with caplog.at_level('WARNING'):
    loaded = pretrained.load(path, 'vgg11', start)
  assert f'{path} has 1000 classes: the head stays' in caplog.text
  head = loaded['params']['head']
  assert all(np.all(x == 0.5) for x in head.values())
  assert head['kernel'].shape == (512, 10)
  rest = {k: v for k, v in loaded['params'].items() if k != 'head'}
  assert not any(np.any(x == 0.5) for x in jax.tree.leaves(rest))


def released(inputs=512, classes=10):
  """A VGG-11's with three linear layers."""
  state = state_dict()
  del state['classifier.weight'], state['classifier.bias']
  rng = np.random.default_rng(1)
  sizes = {0: (4096, inputs), 3: (4096, 4096), 6: (classes, 4096)}
  for index, shape in sizes.items():
    for leaf, size in (('weight', shape), ('bias', shape[:1])):
      value = rng.standard_normal(size, np.float32)
      state[f'classifier.{index}.{leaf}'] = value
  return state


def test_the_released_head_of_vgg(path):
  state = released()
  save_file(state, path)
  loaded = pretrained.load(path, 'vgg11', variables(head='released'))
  for ours, index in (('hidden1', 0), ('hidden2', 3), ('head', 6)):
    for leaf, theirs in (('kernel', 'weight'), ('bias', 'bias')):
      np.testing.assert_array_equal(
        loaded['params'][ours][leaf], state[f'classifier.{index}.{theirs}'].T
      )


@pytest.mark.parametrize(
  ('state', 'head', 'words'),
  [
    (released(), 'linear',
     r'unexpected: .*classifier\.0\.weight.*classifier\.weight '
     r'\(10, 4096\), not \(10, 512\)'),
    (state_dict(), 'released',
     r'missing: .*classifier\.0\.weight.*classifier\.weight '
     r'\(10, 512\), not \(10, 4096\)'),
    # torchvision's, for images of 224x224.
    (released(inputs=25088, classes=1000), 'released',
     r'of the wrong shape: classifier\.0\.weight \(4096, 25088\), not '
     r'\(4096, 512\)$'),
  ],
)  # fmt: skip
def test_another_head_of_vgg_is_refused(state, head, words, path):
  save_file(state, path)
  with pytest.raises(pretrained.PretrainedError, match=words):
    pretrained.load(path, 'vgg11', variables(head=head))


def test_one_message_lists_all_that_does_not_fit(path):
  state = state_dict()
  del state['features.26.running_var'], state['features.4.weight']
  state['features.0.weight'] = np.ones((64, 1, 3, 3), np.float32)
  state['classifier.weight'] = np.ones((10, 511), np.float32)
  state['features.28.weight'] = state['classifier.0.weight'] = np.ones(2)
  save_file(state, path)
  with pytest.raises(pretrained.PretrainedError) as caught:
    pretrained.load(path, 'vgg11', variables())
  message = str(caught.value)
  assert '\n' not in message
  missing, unexpected, wrong = re.fullmatch(
    r".*weights\.safetensors' does not fit 'vgg11': missing: (.*); "
    r'unexpected: (.*); of the wrong shape: (.*)',
    message,
  ).groups()
  assert {*missing.split(', ')} == {
    'features.4.weight', 'features.26.running_var',
  }  # fmt: skip
  assert {*unexpected.split(', ')} == {
    'features.28.weight', 'classifier.0.weight',
  }  # fmt: skip
  assert wrong == (
    'features.0.weight (64, 1, 3, 3), not (64, 3, 3, 3), '
    'classifier.weight (10, 511), not (10, 512)'
  )


@pytest.mark.parametrize('name', ['cnn', 'resnet50', 'wrn28_10'])
def test_models_that_nobody_publishes(name, path):
  assert models.find(name).published is None
  with pytest.raises(pretrained.PretrainedError, match=f'known for {name!r}'):
    pretrained.load(path, name, {})


def test_files_that_cannot_be_read(tmp_path):
  broken = tmp_path / 'broken.safetensors'
  broken.write_bytes(b'no tensors here')
  for path, words in (
    (broken, 'cannot be read: '),
    (tmp_path / 'gone.pth', 'there is no file'),
    (tmp_path, 'must end in one of'),
  ):
    with pytest.raises(pretrained.PretrainedError, match=words) as caught:
      pretrained.load(str(path), 'vgg11', variables())
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('name', 'theirs', 'plain'),
  [
    ('densenet121',
     'features.denseblock2.denselayer12.norm.2.weight',
     'features.denseblock2.denselayer12.norm2.weight'),
    ('imagenet_resnet101',
     'module.layer1.0.downsample.1.bias', 'layer1.0.downsample.1.bias'),
    ('imagenet_resnet101',
     'resnet.encoder.stages.2.layers.10.layer.2.normalization.bias',
     'layer3.10.bn3.bias'),
    ('imagenet_resnet101',
     'resnet.encoder.stages.0.layers.0.shortcut.convolution.weight',
     'layer1.0.downsample.0.weight'),
    ('imagenet_resnet18', 'classifier.1.bias', 'fc.bias'),
    ('vgg11', 'classifier.1.bias', 'classifier.1.bias'),
  ],
)  # fmt: skip
def test_other_spellings(name, theirs, plain, path):
  save_file({theirs: np.ones(1, np.float32)}, path)
  with pytest.raises(pretrained.PretrainedError) as caught:
    pretrained.load(path, name, variables(name))
  missing = str(caught.value).partition('missing: ')[2].partition(';')[0]
  unexpected = 'unexpected' in str(caught.value)
  assert unexpected == (name == 'vgg11')
  assert unexpected or plain not in missing.split(', ')


def vgg_config(path):
  return helpers.small_config(
    **{'model.name': 'vgg11', 'model.pretrained': path, 'steps': 10}
  )


def dataset():
  """Images of 32x32."""
  rng = np.random.default_rng(0)
  split = {
    'inputs': rng.integers(0, 255, (40, 32, 32, 3)).astype(np.uint8),
    'label': rng.integers(0, 10, 40).astype(np.int32),
  }
  return data.InMemory(
    name='noise', num_classes=10, splits={'train': split, 'test': split},
    rows={'train': np.arange(40), 'test': np.arange(40)},
    augment=lambda key, image: image,
    prepare=data.normalizer(split['inputs'], 'dataset'),
  )  # fmt: skip


def test_a_run_starts_from_the_file_or_from_its_checkpoint(path, monkeypatch):
  save_file(state_dict(), path)
  images = dataset()
  # The initial values take a minute to compile, and do not matter.
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables())
  monkeypatch.setattr(
    setup_lib.step_lib,
    'init_state',
    lambda *args: setup_lib.step_lib.TrainState(
      step=0, seed=0, sampler=(), buffer={}, proxy={}, memory={}, ema={},
      counts=(), opt_state=(), nonfinite=0, **zeros,
    ),
  )  # fmt: skip
  chosen = vgg_config(path)
  spec = setup_lib.make_spec(chosen, images, 1)
  state = setup_lib.init_state(chosen, images, spec)
  expected = pretrained.load(path, 'vgg11', variables())
  helpers.assert_trees_equal(state.params, expected['params'])
  helpers.assert_trees_equal(state.batch_stats, expected['batch_stats'])
  structure = jax.tree.structure(spec.optimizer.init(state.params))
  assert jax.tree.structure(state.opt_state) == structure
  # A run that continues does not need the file any more.
  chosen = vgg_config('/nowhere/weights.safetensors')
  state = setup_lib.init_state(chosen, images, spec, restoring=True)
  assert not any(np.any(x) for x in jax.tree.leaves(state.params))
  with pytest.raises(config.ConfigError, match=r'^model.pretrained: .*no file'):
    setup_lib.init_state(chosen, images, spec)


def test_the_trainer_stops_before_anything_is_compiled(
  path, tmp_path, monkeypatch
):
  state = state_dict()
  del state['classifier.bias']
  save_file(state, path)
  monkeypatch.setattr(setup_lib.data, 'load', lambda *args, **kwargs: dataset())
  monkeypatch.setattr(setup_lib.step_lib, 'init_state', None)
  with pytest.raises(config.ConfigError) as caught:
    loop.train(vgg_config(path), str(tmp_path / 'run'))
  assert str(caught.value) == (
    f"model.pretrained: {path!r} does not fit 'vgg11': missing: classifier.bias"
  )
