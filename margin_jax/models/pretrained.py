"""Published weights: a PyTorch state dict in a local file -> variables.

Read are the names of torchvision and timm (ImageNet ResNets, DenseNets), of
Hugging Face transformers (ResNets, MobileNet v1, BERT), and of sequential VGGs
(`features.N`, `classifier`). Nothing is ever downloaded, but what is named on
the Hugging Face hub: see `bert_weights`.

Published ImageNet weights want images normalised with ImageNet's statistics
(`data.normalization='imagenet'`), and MobileNet's from TensorFlow want its
ReLU6, padding and epsilon, which `MobileNet` does not have.
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from margin_jax.models import bert, vgg

PyTree = Any
Path = tuple[str, ...]
State = dict[str, np.ndarray]

PYTORCH = ('.pth', '.pt', '.bin')
SAFETENSORS = '.safetensors'
# What a variable is called in a state dict.
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
HEAD_KERNEL = ('params', 'head', 'kernel')
HEAD_BIAS = ('params', 'head', 'bias')


class PretrainedError(ValueError):
  """A file of weights cannot be read, or does not fit the model."""


def _resnet(module: Path) -> str:
  """torchvision's name of a module of an ImageNet ResNet."""
  table = {
    'conv_stem': 'conv1',
    'norm_stem': 'bn1',
    'conv_proj': 'downsample.0',
    'norm_proj': 'downsample.1',
    'head': 'fc',
  }
  *block, leaf = module
  leaf = table.get(leaf, leaf.replace('norm', 'bn'))
  if not block:
    return leaf
  stage, index = re.findall(r'\d+', block[0])
  return f'layer{stage}.{int(index) - 1}.{leaf}'


def _densenet(module: Path) -> str:
  """torchvision's name of a module of a DenseNet."""
  table = {
    'conv_stem': 'features.conv0',
    'norm_stem': 'features.norm0',
    'norm_final': 'features.norm5',
    'head': 'classifier',
  }
  if len(module) == 1:
    return table[module[0]]
  block = re.sub(r'block(\d+)_layer', r'denseblock\1.denselayer', module[0])
  return f'features.{block}.{module[1]}'


def _mobilenet(module: Path) -> str:
  """transformers' name: its layers alternate, depthwise and pointwise."""
  if module == ('head',):
    return 'classifier'
  kind, _, place = module[-1].partition('_')
  kind = {'conv': 'convolution', 'norm': 'normalization'}[kind]
  if place == 'stem':
    return f'mobilenet_v1.conv_stem.{kind}'
  index = 2 * int(module[0].removeprefix('block')) - 2 + (place == 'point')
  return f'mobilenet_v1.layer.{index}.{kind}'


def _vgg(module: Path, depth: int) -> str:
  """Its place in a sequence of convolution, BatchNorm, ReLU, ..., pooling."""
  if module == ('head',):
    return 'classifier'
  kind, stage, index = re.fullmatch(r'(\D+)(\d)_(\d)', module[0]).groups()
  stage, index = int(stage) - 1, int(index) - 1
  before = sum(3 * count + 1 for count in vgg.STAGES[depth][:stage])
  return f'features.{before + 3 * index + (kind == "norm")}'


def _naming(model_name: str) -> Callable[[Path], str] | None:
  if model_name.startswith('vgg'):
    depth = int(model_name.removeprefix('vgg'))
    return lambda module: _vgg(module, depth)
  for family, function in (
    ('imagenet_resnet', _resnet),
    ('densenet', _densenet),
    ('mobilenet', _mobilenet),
  ):
    if model_name.startswith(family):
      return function
  return None


def supports(model_name: str) -> bool:
  """Whether there are weights of the model that `load` can read."""
  return bert.parse(model_name) is not None or _naming(model_name) is not None


# Other spellings of the same modules: what DataParallel puts in front, the
# parts that old torchvision DenseNets are stored in, transformers' ResNets.
_SPELLINGS = {
  '': ((r'^module\.', ''),),
  'densenet': ((r'(denselayer\d+\.(?:norm|conv))\.(\d)\.', r'\1\2.'),),
  'imagenet_resnet': (
    (r'^resnet\.embedder\.embedder\.convolution\.', 'conv1.'),
    (r'^resnet\.embedder\.embedder\.normalization\.', 'bn1.'),
    (r'^resnet\.encoder\.stages\.(\d+)\.layers\.', r'layer+\1.'),
    (r'\.shortcut\.convolution\.', '.downsample.0.'),
    (r'\.shortcut\.normalization\.', '.downsample.1.'),
    (r'\.layer\.(\d)\.convolution\.', r'.conv+\1.'),
    (r'\.layer\.(\d)\.normalization\.', r'.bn+\1.'),
    (r'^classifier\.1\.', 'fc.'),
  ),
}


def _respell(name: str, model_name: str) -> str:
  for family, table in _SPELLINGS.items():
    if model_name.startswith(family):
      for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
  # transformers counts from 0, torchvision from 1.
  return re.sub(r'\+(\d+)', lambda found: str(int(found[1]) + 1), name)


def _read_pytorch(path: str) -> State:
  try:
    import torch
  except ImportError:
    raise PretrainedError(
      f'{path!r} needs PyTorch to be read: pip install torch, or convert it to '
      f'{SAFETENSORS}'
    ) from None
  state = torch.load(path, map_location='cpu', weights_only=True)
  state = state.get('state_dict', state)
  return {
    name: x.float().numpy() for name, x in state.items() if hasattr(x, 'float')
  }


def _read_safetensors(path: str) -> State:
  import safetensors.numpy

  return safetensors.numpy.load_file(path)


def read_state(path: str, model_name: str) -> State:
  """The state dict in torchvision's spelling, without what only trains.

  Raises:
    PretrainedError: the file is missing, broken or of another kind.
  """
  suffix = pathlib.Path(path).suffix
  if suffix not in (SAFETENSORS, *PYTORCH):
    raise PretrainedError(
      f'{path!r} must end in one of {(SAFETENSORS, *PYTORCH)}'
    )
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise PretrainedError(f'there is no file {path!r}')
  reader = _read_safetensors if suffix == SAFETENSORS else _read_pytorch
  try:
    state = reader(path)
  except PretrainedError:
    raise
  except Exception as error:  # whatever a broken file makes the library raise
    first = str(error).strip().partition('\n')[0]
    raise PretrainedError(f'{path!r} cannot be read: {first}') from error
  return {
    _respell(name, model_name): np.asarray(x)
    for name, x in state.items()
    if not name.endswith('num_batches_tracked')
  }


def _without_biases(state: State) -> State:
  """A VGG without biases of convolutions: BatchNorm's mean takes them over.

  BatchNorm subtracts the mean of what it reads, so that a bias in front of it
  changes nothing but the running mean.
  """
  state = dict(state)
  for name in [*state]:
    found = re.fullmatch(r'features\.(\d+)\.weight', name)
    if not found or state[name].ndim != 4:
      continue
    mean = f'features.{int(found[1]) + 1}.running_mean'
    bias = f'features.{found[1]}.bias'
    if {mean, bias} <= {*state} and state[mean].shape == state[bias].shape:
      state[mean] = state[mean] - state.pop(bias)
  return state


def _as_flax(place: Path, x: np.ndarray) -> np.ndarray:
  """OIHW -> HWIO and (out, in) -> (in, out) for kernels."""
  if place[-1] != 'kernel':
    return x
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _torch_shape(place: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
  """HWIO -> OIHW and (in, out) -> (out, in) for kernels."""
  if place[-1] != 'kernel':
    return shape
  *window, inputs, outputs = shape
  return (outputs, inputs, *window)


def _other_classes(
  state: State, names: dict[Path, str], shapes: dict[Path, Any]
) -> int | None:
  """How many classes the file has, if its head differs in nothing else."""
  kernel = state.get(names[HEAD_KERNEL])
  bias = state.get(names[HEAD_BIAS])
  features, classes = shapes[HEAD_KERNEL].shape
  if kernel is None or bias is None or kernel.shape[1:] != (features,):
    return None
  found = kernel.shape[0]
  return found if bias.shape == (found,) and found != classes else None


def _check(
  path: str,
  model_name: str,
  state: State,
  names: dict[Path, str],
  shapes: dict[Path, Any],
) -> None:
  """Raises unless the file has every tensor, in its shape, and no other."""
  expected = {*names.values()}
  wrong = []
  for place, name in names.items():
    if name in state:
      shape = _torch_shape(place, shapes[place].shape)
      if state[name].shape != shape:
        wrong.append(f'{name} {state[name].shape}, not {shape}')
  problems = {
    'missing': [name for name in names.values() if name not in state],
    'unexpected': [name for name in state if name not in expected],
    'of the wrong shape': wrong,
  }
  found = [f'{k}: {", ".join(v)}' for k, v in problems.items() if v]
  if found:
    raise PretrainedError(
      f'{path!r} does not fit {model_name!r}: {"; ".join(found)}'
    )


def read(path: str, model_name: str, variables: PyTree) -> dict[Path, Any]:
  """What a file has for a model; `load` puts it in place.

  Args:
    path, model_name: as `load` takes them.
    variables: the model's, or their `jax.ShapeDtypeStruct`s.

  Returns:
    Arrays by path, without those of a head of another number of classes.

  Raises:
    PretrainedError: as `load`.
  """
  if bert.parse(model_name) is not None:
    from margin_jax.models import bert_weights  # it imports this module

    return bert_weights.read(path, variables, model_name)
  naming = _naming(model_name)
  if naming is None:
    raise PretrainedError(f'no published weights are known of {model_name!r}')
  state = read_state(path, model_name)
  if model_name.startswith('vgg'):
    state = _without_biases(state)
  shapes = traverse_util.flatten_dict(variables)
  names = {
    place: f'{naming(place[1:-1])}.{_LEAVES[place[-1]]}' for place in shapes
  }
  return fit(path, model_name, state, names, shapes)


def fit(
  path: str,
  model_name: str,
  state: State,
  names: dict[Path, str],
  shapes: dict[Path, Any],
) -> dict[Path, Any]:
  """A state dict as arrays by path, without a head of other classes.

  Args:
    path, model_name: for messages.
    state: arrays by name; changed.
    names: of what must be in `state`, by path; without a head it stays as it
      is; changed.
    shapes: the model's variables, or their shapes, by path.

  Raises:
    PretrainedError: tensors are missing, unexpected or of another shape.
  """
  classes = None
  if HEAD_KERNEL in names:
    classes = _other_classes(state, names, shapes)
  if classes is not None:
    logging.warning(
      '%s has %d classes: the head stays as it is initialised', path, classes
    )
    for place in (HEAD_KERNEL, HEAD_BIAS):
      del state[names.pop(place)]
  _check(path, model_name, state, names, shapes)
  return {
    place: _as_flax(place, state[name]).astype(shapes[place].dtype)
    for place, name in names.items()
  }


def load(path: str, model_name: str, variables: PyTree) -> PyTree:
  """Variables with the weights of a local PyTorch state dict.

  Every tensor of the file must have its place, and every variable its tensor:
  convolutions OIHW -> HWIO, linear layers (out, in) -> (in, out), BatchNorm's
  scale, bias, mean and variance. A head of another number of classes is left
  as it is in `variables`, and a line of the log says so: that is how a
  network is fine-tuned on other data. Biases of a VGG's convolutions, which
  ours are without, move into BatchNorm's means.

  Args:
    path: a `.safetensors` file, or one of PyTorch's (`.pth`, `.pt`, `.bin`),
      which PyTorch must be installed for; "~" is expanded. Of a BERT a folder,
      or a name on the Hugging Face hub: see `bert_weights.resolve`.
    model_name: 'imagenet_resnetN', 'densenetN', 'mobilenet', 'vggN', or one
      that `bert.parse` knows.
    variables: {'params': ..., 'batch_stats': ...}, as initialised.

  Returns:
    A tree like `variables`.

  Raises:
    PretrainedError: the file is missing, broken or of another kind, no
      published weights are known of the model, or tensors are missing,
      unexpected or of another shape: one message lists them all.
  """
  return put(variables, read(path, model_name, variables))


def put(variables: PyTree, weights: dict[Path, Any]) -> PyTree:
  """`variables` with what `read` found in place."""
  flat = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict({**flat, **weights})
