"""Logits of published architectures agree with PyTorch's, weight by weight.

    pip install margin-jax[torch]

Weights are random, and travel through a file and `models.pretrained`.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from safetensors.torch import save_file  # noqa: E402

from margin_jax import models  # noqa: E402
from margin_jax.models import pretrained  # noqa: E402
from tests import torch_twins as twins  # noqa: E402

pytestmark = pytest.mark.slow

CLASSES = 7


def transformers_resnet(layer_type, depths):
  grows = 4 if layer_type == 'bottleneck' else 1
  config = transformers.ResNetConfig(
    embedding_size=64,
    hidden_sizes=[width * grows for width in (64, 128, 256, 512)],
    depths=depths,
    layer_type=layer_type,
    hidden_act='relu',
    num_labels=CLASSES,
  )
  return transformers.ResNetForImageClassification(config)


def transformers_mobilenet(width):
  config = transformers.MobileNetV1Config(
    depth_multiplier=width,
    tf_padding=False,
    hidden_act='relu',
    layer_norm_eps=1e-5,
    num_labels=CLASSES,
  )
  return transformers.MobileNetV1ForImageClassification(config)


def vgg(counts, bias, hidden=None):
  plan = []
  for width, count in zip((64, 128, 256, 512, 512), counts, strict=True):
    plan += [width] * count + ['pool']
  return twins.VGG(plan, CLASSES, bias, hidden)


RESNET34 = [3, 4, 6, 3]
SMALL = {'stem': 'small'}
RELEASED = {'head': 'released', 'dropout': 0.5}
# Name, options, side of the images, the same network, the file's suffix.
CASES = [
  ('imagenet_resnet18', SMALL, 18, '.pth',
   lambda: twins.ResNet(twins.BasicBlock, [2, 2, 2, 2], CLASSES, True)),
  ('imagenet_resnet34', {}, 50, '.safetensors',
   lambda: transformers_resnet('basic', RESNET34)),
  ('imagenet_resnet50', {}, 50, '.bin',
   lambda: transformers_resnet('bottleneck', RESNET34)),
  ('imagenet_resnet50', SMALL, 17, '.pt',
   lambda: twins.ResNet(twins.Bottleneck, RESNET34, CLASSES, True)),
  ('densenet121', {}, 45, '.safetensors',
   lambda: twins.DenseNet([6, 12, 24, 16], CLASSES, False)),
  ('mobilenet', {'width': 0.5}, 45, '.safetensors',
   lambda: transformers_mobilenet(0.5)),
  ('vgg11', {}, 32, '.pth', lambda: vgg([1, 1, 2, 2, 2], bias=False)),
  ('vgg16', {}, 32, '.safetensors', lambda: vgg([2, 2, 3, 3, 3], bias=True)),
  ('vgg16', RELEASED, 32, '.pth',
   lambda: vgg([2, 2, 3, 3, 3], bias=True, hidden=4096)),
]  # fmt: skip


def with_random_weights(network):
  """No zeros, no ones: every tensor counts; activations stay near one."""
  generator = torch.Generator().manual_seed(0)

  def normal(x):
    return torch.randn(x.shape, generator=generator)

  with torch.no_grad():
    for name, x in network.state_dict().items():
      if x.ndim > 1:
        x.copy_(normal(x) * (2 / x[0].numel()) ** 0.5)
      elif name.endswith(('running_var', 'weight')):
        x.copy_(1 + 0.2 * normal(x).abs())
      elif x.ndim == 1:
        x.copy_(0.2 * normal(x))
  return network.eval()


def save(network, path):
  state = network.state_dict()
  if path.suffix == '.safetensors':
    save_file(state, path)
  else:
    torch.save(state, path)


def logits_of(network, images):
  with torch.no_grad():
    outputs = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  return getattr(outputs, 'logits', outputs).numpy()


@pytest.mark.parametrize(
  ('name', 'options', 'side', 'suffix', 'make'),
  CASES,
  ids=[f'{case[0]}-{case[2]}{case[3]}' for case in CASES],
)
def test_logits_agree(name, options, side, suffix, make, tmp_path):
  network = with_random_weights(make())
  path = tmp_path / f'weights{suffix}'
  save(network, path)
  # Unequal sides, odd ones where the network takes them: padding shows.
  shape = (2, side, side if name.startswith('vgg') else side + 3, 3)
  images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  model = models.build(name, CLASSES, **options)
  apply = functools.partial(model.apply, train=False)
  init = functools.partial(model.init, train=False)
  empty = jax.eval_shape(init, jax.random.key(0), images)
  variables = pretrained.load(str(path), name, empty)
  logits, _ = jax.jit(apply)(variables, images)
  expected = logits_of(network, images)
  assert np.std(expected) > 0.1
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits / scale, expected / scale, 0, 1e-4)
  parameters = sum(x.numel() for x in network.parameters())
  biases = sum(
    module.bias.numel()
    for module in network.modules()
    if isinstance(module, torch.nn.Conv2d) and module.bias is not None
  )
  count = sum(x.size for x in jax.tree.leaves(empty['params']))
  assert count == parameters - biases


def tiny(tmp_path):
  """A file with a VGG, and the shapes of the variables it is for."""
  network = with_random_weights(vgg([1, 1, 2, 2, 2], bias=False))
  path = tmp_path / 'weights.pth'
  init = functools.partial(models.build('vgg11', CLASSES).init, train=False)
  image = jnp.zeros((1, 32, 32, 3))
  return network, path, jax.eval_shape(init, jax.random.key(0), image)


def test_a_checkpoint_of_a_training_run_is_read(tmp_path):
  network, path, variables = tiny(tmp_path)
  state = torch.nn.DataParallel(network).half().state_dict()
  torch.save({'state_dict': state, 'epoch': 3}, path)
  loaded = pretrained.load(str(path), 'vgg11', variables)
  dtypes = {x.dtype for x in jax.tree.leaves(loaded)}
  assert dtypes == {np.dtype('float32')}


def test_code_in_a_file_is_not_run(tmp_path):
  network, path, variables = tiny(tmp_path)
  torch.save(network, path)  # the object, not its state
  with pytest.raises(pretrained.PretrainedError, match='cannot be read'):
    pretrained.load(str(path), 'vgg11', variables)


def test_without_pytorch_its_files_are_refused(tmp_path, monkeypatch):
  network, path, variables = tiny(tmp_path)
  save(network, path)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(pretrained.PretrainedError, match='needs PyTorch'):
    pretrained.load(str(path), 'vgg11', variables)
