"""Published weights: from the tensors of a PyTorch file to a model's variables.

This is common to all models; `pretrained.read` is the entry point.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from absl import logging

Path = tuple[str, ...]
State = dict[str, np.ndarray]

PYTORCH = ('.pth', '.pt', '.bin')
SAFETENSORS = '.safetensors'
# Our name of a variable, and the one in a state dict.
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
HEAD_KERNEL = ('params', 'head', 'kernel')
HEAD_BIAS = ('params', 'head', 'bias')


class PretrainedError(ValueError):
  """Weights cannot be read, or do not fit the model."""


@dataclasses.dataclass(frozen=True)
class Published:
  """How published weights of a model are laid out.

  Attributes:
    name_of: the path of a module -> its name in the state dict.
    spellings: other spellings of the same names, as (pattern, replacement)
      pairs for `re.sub`, applied in this order. '+7' in a replacement becomes
      8: transformers counts from 0, torchvision from 1.
    ignored: a pattern of names that the model has no variables for.
    convert: what else has to be done to the state dict.
    folder: whether it is a folder as Hugging Face lays it out (see
      `bert_weights`), and not one file.
  """

  name_of: Callable[[Path], str]
  spellings: tuple[tuple[str, str], ...] = ()
  ignored: str = ''
  convert: Callable[[State], State] = lambda state: state
  folder: bool = False

  def tensor_name(self, path: Path) -> str:
    """Returns the name that a variable has in the state dict."""
    return f'{self.name_of(path[1:-1])}.{_LEAVES[path[-1]]}'

  def respell(self, name: str) -> str:
    """Returns the name that a tensor of a file should have."""
    name = re.sub(r'^module\.', '', name)  # of DataParallel
    for pattern, replacement in self.spellings:
      name = re.sub(pattern, replacement, name)
    return re.sub(r'\+(\d+)', lambda match: str(int(match[1]) + 1), name)


def _read_pytorch(path: str) -> State:
  try:
    import torch
  except ImportError:
    raise PretrainedError(
      f'reading {path!r} needs PyTorch: pip install torch, or convert it to '
      f'{SAFETENSORS}'
    ) from None
  state = torch.load(path, map_location='cpu', weights_only=True)
  state = state.get('state_dict', state)
  return {
    name: x.float().numpy() for name, x in state.items() if hasattr(x, 'float')
  }


def read_state(path: str, published: Published) -> State:
  """Reads a file of tensors.

  Args:
    path: a `.safetensors` file, or one of PyTorch's (`.pth`, `.pt`, `.bin`),
      which PyTorch must be installed for; "~" is expanded.
    published: its layout.

  Returns:
    The state dict in the spelling of `published.name_of`.

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
  is_safetensors = suffix == SAFETENSORS
  reader = safetensors.numpy.load_file if is_safetensors else _read_pytorch
  try:
    tensors = reader(path)
  except PretrainedError:
    raise
  except Exception as error:  # whatever a broken file makes the library raise
    first = str(error).strip().partition('\n')[0]
    raise PretrainedError(f'{path!r} cannot be read: {first}') from error
  state = {
    published.respell(name): np.asarray(x)
    for name, x in tensors.items()
    if not name.endswith('num_batches_tracked')
  }
  return published.convert(
    {
      name: x
      for name, x in state.items()
      if not re.fullmatch(published.ignored, name)
    }
  )


def _as_flax(path: Path, x: np.ndarray) -> np.ndarray:
  """OIHW -> HWIO and (out, in) -> (in, out) for kernels."""
  if path[-1] != 'kernel':
    return x
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
  """HWIO -> OIHW and (in, out) -> (out, in) for kernels."""
  if path[-1] != 'kernel':
    return shape
  *window, inputs, outputs = shape
  return (outputs, inputs, *window)


def _other_classes(
  state: State, names: dict[Path, str], shapes: dict[Path, Any]
) -> int | None:
  """Returns how many classes the file has, if only that sets its head apart."""
  kernel = state.get(names[HEAD_KERNEL])
  bias = state.get(names[HEAD_BIAS])
  features, classes = shapes[HEAD_KERNEL].shape
  if kernel is None or bias is None or kernel.shape[1:] != (features,):
    return None
  theirs = kernel.shape[0]
  return theirs if bias.shape == (theirs,) and theirs != classes else None


def _check(
  source: str,
  model_name: str,
  state: State,
  names: dict[Path, str],
  shapes: dict[Path, Any],
) -> None:
  """Raises unless the file has every tensor, in its shape, and no other."""
  expected = {*names.values()}
  misshapen = []
  for path, name in names.items():
    if name in state:
      shape = _torch_shape(path, shapes[path].shape)
      if state[name].shape != shape:
        misshapen.append(f'{name} {state[name].shape}, not {shape}')
  lists = {
    'missing': [name for name in names.values() if name not in state],
    'unexpected': [name for name in state if name not in expected],
    'of the wrong shape': misshapen,
  }
  problems = [f'{k}: {", ".join(v)}' for k, v in lists.items() if v]
  if problems:
    raise PretrainedError(
      f'{source!r} does not fit {model_name!r}: {"; ".join(problems)}'
    )


def fit(
  source: str,
  model_name: str,
  state: State,
  names: dict[Path, str],
  shapes: dict[Path, Any],
) -> dict[Path, np.ndarray]:
  """Fits a state dict to a model, without a head of other classes.

  Args:
    source, model_name: for messages.
    state: arrays by name; changed.
    names: of what must be in `state`, by path; without a head it stays as it
      is; changed.
    shapes: the model's variables, or their shapes, by path.

  Returns:
    Arrays by path, as Flax has them.

  Raises:
    PretrainedError: tensors are missing, unexpected or of another shape.
  """
  classes = None
  if HEAD_KERNEL in names:
    classes = _other_classes(state, names, shapes)
  if classes is not None:
    logging.warning(
      '%s has %d classes: the head stays as it is initialized', source, classes
    )
    for path in (HEAD_KERNEL, HEAD_BIAS):
      del state[names.pop(path)]
  _check(source, model_name, state, names, shapes)
  return {
    path: _as_flax(path, state[name]).astype(shapes[path].dtype)
    for path, name in names.items()
  }
