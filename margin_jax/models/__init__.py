"""Models by name. Each returns `(logits, features)`; its head is `head`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from margin_jax.models import (
  bert,
  cnn,
  densenet,
  imagenet_resnet,
  mobilenet,
  resnet,
  vgg,
  wide_resnet,
)
from margin_jax.models.common import STEMS, glorot
from margin_jax.models.model import Family, Model, unmet_requirement

__all__ = [
  'DTYPES',
  'FAMILIES',
  'HEADS',
  'KERNEL_INITS',
  'MODELS',
  'REGISTERED',
  'STEMS',
  'VARIANTS',
  'Family',
  'Model',
  'build',
  'find',
  'glorot',
  'names',
  'unmet_requirement',
]

VARIANTS = ('he', 'authors', 'mms_select')
HEADS = ('linear', 'released')
KERNEL_INITS = ('default', 'glorot')
DTYPES = ('float32', 'bfloat16')
# The fields that a registered model may have for the config to set, and what
# their defaults may be: the config's, or the record of a run would be wrong.
OPTIONAL = {
  'dtype': (jnp.float32, jnp.dtype('float32'), None),
  'dropout': (0,),
  'width': (1,),
}

MODELS: dict[str, Model] = {
  **cnn.MODELS,
  **resnet.MODELS,
  **vgg.MODELS,
  **imagenet_resnet.MODELS,
  **densenet.MODELS,
  **mobilenet.MODELS,
}
FAMILIES: tuple[Family, ...] = (
  wide_resnet.FAMILY,
  bert.FAMILY,
)
# See `margin_jax.register_model`.
REGISTERED: dict[str, Model] = {}


def find(name: Any) -> Model | None:
  """Returns the model of that name, built-in or registered, or None."""
  if not isinstance(name, str):
    return None
  model = REGISTERED.get(name) or MODELS.get(name)
  if model is not None:
    return model
  return next(filter(None, (family.find(name) for family in FAMILIES)), None)


def names() -> tuple[str, ...]:
  """Returns what a message lists: all names, and patterns of the endless."""
  families = (name for family in FAMILIES for name in family.names)
  return (*MODELS, *families, *REGISTERED)


def build(
  name: str,
  num_classes: int,
  *,
  variant: str = 'he',
  head: str = 'linear',
  dtype: str = 'float32',
  batch_norm_axis: str | None = None,
  dropout: float = 0.0,
  stem: str = 'imagenet',
  width: float = 1.0,
  vocabulary: int | None = None,
) -> nn.Module:
  """Builds the Flax module called `name`.

  Args:
    name: 'cnn', 'mnist_cnn', 'resnetN' (of CIFAR, N = 8, 14, ..., 110),
      'vggN', 'imagenet_resnetN', 'densenetN', 'mobilenet'; 'wrnD_K', a wide
      ResNet of depth D = 6n + 4 and width K; 'bert_base', 'bert_large', or
      'bertL_H_A', a BERT of L layers of width H with A heads; or a registered
      one.
    num_classes: C.
    variant: variant of the CIFAR ResNets: 'he', 'authors' or 'mms_select'.
    head: head of VGGs: 'linear' or 'released'.
    dtype: the dtype of the computation: 'float32' or 'bfloat16'.
    batch_norm_axis: mapped axis that BatchNorm statistics are averaged over.
    dropout: of wide ResNets, VGGs and BERTs: the fraction of activations
      dropped.
    stem: stem of ImageNet ResNets and DenseNets: 'imagenet' or 'small'.
    width: of MobileNet: multiplier of the numbers of channels.
    vocabulary: of BERTs: how many different tokens there are.

  An option that the model does not take is ignored.

  Returns:
    A module with `__call__(inputs, *, train) -> (logits, features)`.

  Raises:
    ValueError: there is no such model, variant, head, dtype or stem, or a
      number is out of its range.
  """
  model = find(name)
  if model is None:
    raise ValueError(f'no model is called {name!r}; there are {names()}')
  if variant not in VARIANTS:
    raise ValueError(f'no variant is called {variant!r}; there are {VARIANTS}')
  if head not in HEADS:
    raise ValueError(f'no head is called {head!r}; there are {HEADS}')
  if dtype not in DTYPES:
    raise ValueError(f'no dtype is called {dtype!r}; there are {DTYPES}')
  if stem not in STEMS:
    raise ValueError(f'no stem is called {stem!r}; there are {STEMS}')
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout must be in [0, 1), got {dropout!r}')
  if not width > 0:
    raise ValueError(f'width must be above 0, got {width!r}')
  options = {
    'variant': variant,
    'head': head,
    'dtype': jnp.dtype(dtype),
    'dropout': dropout,
    'stem': stem,
    'width': width,
  }
  options = {key: x for key, x in options.items() if key in model.options}
  if model.batch_norm:
    options['batch_norm_axis'] = batch_norm_axis
  if model.reads == 'sentences':
    if vocabulary is None:
      raise ValueError(f'{name!r} reads sentences: vocabulary must be given')
    options['vocab_size'] = vocabulary
  return model.make(num_classes=num_classes, **options)
