"""Published weights: a PyTorch state dict in a local file -> variables.

It reads the tensor names of torchvision and timm (ImageNet ResNets, DenseNets),
of Hugging Face transformers (ResNets, MobileNet v1, BERT), and of sequential
VGGs (`features.N`, and `classifier` or `classifier.0`, `.3` and `.6`). Each
model's `published` field has its names. Only weights named on the Hugging Face
hub are ever downloaded: see `bert_weights`.

Published ImageNet weights want images normalized with ImageNet's statistics
(`data.normalization='imagenet'`), and MobileNet's from TensorFlow want its
ReLU6, padding and epsilon, which `MobileNet` does not have.
"""

from typing import Any

import numpy as np
from flax import traverse_util

from margin_jax import models
from margin_jax.models import bert_weights, weights
from margin_jax.models.weights import Path, PretrainedError

__all__ = ['PretrainedError', 'load', 'put', 'read']

PyTree = Any


def read(
  path: str, model_name: str, variables: PyTree
) -> dict[Path, np.ndarray]:
  """Reads the weights of a model; `put` puts them into its variables.

  Args:
    path, model_name: as `load` takes them.
    variables: the model's, or their `jax.ShapeDtypeStruct`s.

  Returns:
    Arrays by path, without those of a head of another number of classes.

  Raises:
    PretrainedError: as `load`.
  """
  model = models.find(model_name)
  if model is None or model.published is None:
    raise PretrainedError(f'no published weights are known for {model_name!r}')
  if model.published.folder:
    return bert_weights.read(path, variables, model_name)
  state = weights.read_state(path, model.published)
  shapes = traverse_util.flatten_dict(variables)
  names = {x: model.published.tensor_name(x) for x in shapes}
  return weights.fit(path, model_name, state, names, shapes)


def put(variables: PyTree, arrays: dict[Path, Any]) -> PyTree:
  """Returns `variables` with the arrays that `read` returns in them."""
  flat = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict({**flat, **arrays})


def load(path: str, model_name: str, variables: PyTree) -> PyTree:
  """Returns variables with the weights of a local PyTorch state dict.

  Every tensor of the file must have its variable, and every variable its
  tensor: convolutions OIHW -> HWIO, linear layers (out, in) -> (in, out),
  BatchNorm's scale, bias, mean and variance. A head of another number of
  classes is left as it is in `variables`, and a line of the log says so: that
  is how a network is fine-tuned on other data. Biases of a VGG's convolutions,
  which ours are without, move into BatchNorm's means.

  Args:
    path: a `.safetensors` file, or one of PyTorch's (`.pth`, `.pt`, `.bin`),
      which PyTorch must be installed for; "~" is expanded. Of a BERT a folder,
      or a name on the Hugging Face hub: see `bert_weights.resolve`.
    model_name: one whose `published` field is set: 'imagenet_resnetN',
      'densenetN', 'mobilenet', 'vggN', or a BERT.
    variables: {'params': ..., 'batch_stats': ...}, as initialized.

  Returns:
    A tree like `variables`.

  Raises:
    PretrainedError: the file is missing, broken or of another kind, no
      published weights are known of the model, or tensors are missing,
      unexpected or of another shape: one message lists them all.
  """
  return put(variables, read(path, model_name, variables))
