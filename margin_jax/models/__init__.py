"""Models by name. Each returns `(logits, features)`; its head is `head`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from margin_jax.models import (
  bert,
  densenet,
  imagenet_resnet,
  own,
  vgg,
  wide_resnet,
)
from margin_jax.models.bert import Bert
from margin_jax.models.cnn import CNN, MnistCNN
from margin_jax.models.common import STEMS
from margin_jax.models.densenet import DenseNet
from margin_jax.models.imagenet_resnet import ImageNetResNet
from margin_jax.models.mobilenet import MobileNet
from margin_jax.models.resnet import DEPTHS, ResNet
from margin_jax.models.vgg import VGG
from margin_jax.models.wide_resnet import WideResNet

# By family, how deep its models are; '' where there is one model only.
_DEPTHS = {
  'cnn': ('',),
  'mnist_cnn': ('',),
  'resnet': DEPTHS,
  'vgg': tuple(vgg.STAGES),
  'imagenet_resnet': tuple(imagenet_resnet.STAGES),
  'densenet': tuple(densenet.BLOCKS),
  'mobilenet': ('',),
}
_FAMILIES = {
  f'{family}{depth}': family
  for family, depths in _DEPTHS.items()
  for depth in depths
}
# All names but those of wide ResNets and BERTs, of which there is no end.
NAMES = tuple(_FAMILIES)
# What a message lists.
ALLOWED = (
  *NAMES,
  f'{wide_resnet.PATTERN} (depth 6n+4, such as wrn28_10)',
  *bert.SIZES,
  f'{bert.PATTERN} (layers, width, heads)',
)
VARIANTS = ('he', 'authors')
DTYPES = ('float32', 'bfloat16')

__all__ = [
  'ALLOWED',
  'DTYPES',
  'NAMES',
  'STEMS',
  'VARIANTS',
  'build',
  'own',
]


def allowed() -> tuple[str, ...]:
  """What a message lists: those here, and those that are registered."""
  return (*ALLOWED, *own.MODELS)


def exists(name: Any) -> bool:
  """Whether there is a model of that name."""
  if not isinstance(name, str):
    return False
  return name in _FAMILIES or _family(name) is not None


def _family(name: str) -> str | None:
  if name in own.MODELS:
    return 'own'
  if bert.parse(name) is not None:
    return 'bert'
  return _FAMILIES.get(name, wide_resnet.parse(name) and 'wrn')


def build(
  name: str,
  num_classes: int,
  *,
  variant: str = 'he',
  dtype: str = 'float32',
  batch_norm_axis: str | None = None,
  dropout: float = 0.0,
  stem: str = 'imagenet',
  width: float = 1.0,
  vocabulary: int | None = None,
) -> nn.Module:
  """The Flax module called `name`.

  Args:
    name: one of `NAMES`: 'cnn', 'mnist_cnn', 'resnetN' (of CIFAR, N = 8, 14,
      ..., 110), 'vggN', 'imagenet_resnetN', 'densenetN', 'mobilenet';
      'wrnD_K', a wide ResNet of depth D = 6n + 4 and width K; 'bert_base',
      'bert_large', or 'bertL_H_A', a BERT of L layers of width H with A heads.
    num_classes: C.
    variant: of the CIFAR ResNets: 'he' or 'authors'.
    dtype: of the computation: 'float32' or 'bfloat16'.
    batch_norm_axis: mapped axis that BatchNorm statistics are averaged over.
    dropout: of wide ResNets and BERTs: the share of activations dropped.
    stem: of ImageNet ResNets and DenseNets: 'imagenet' or 'small'.
    width: of MobileNet: multiplier of the numbers of channels.
    vocabulary: of BERTs: how many different tokens there are.

  An option of other models is ignored; the trainer refuses it.

  Returns:
    A module with `__call__(inputs, *, train) -> (logits, features)`.

  Raises:
    ValueError: there is no such model, variant, dtype or stem, or a number is
      out of its range.
  """
  if not exists(name):
    raise ValueError(f'no model is called {name!r}; there are {allowed()}')
  if variant not in VARIANTS:
    raise ValueError(f'no variant is called {variant!r}; there are {VARIANTS}')
  if dtype not in DTYPES:
    raise ValueError(f'no dtype is called {dtype!r}; there are {DTYPES}')
  if stem not in STEMS:
    raise ValueError(f'no stem is called {stem!r}; there are {STEMS}')
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout must be in [0, 1), got {dropout!r}')
  if not width > 0:
    raise ValueError(f'width must be above 0, got {width!r}')
  family = _family(name)
  options = {'num_classes': num_classes, 'dtype': jnp.dtype(dtype)}
  if family == 'cnn':
    return CNN(**options)
  if family == 'bert':
    return _bert(name, vocabulary, dropout=dropout, **options)
  options['batch_norm_axis'] = batch_norm_axis
  if family == 'own':
    return own.build(name, dropout=dropout, width=width, **options)
  if family == 'mnist_cnn':
    return MnistCNN(**options)
  if family == 'mobilenet':
    return MobileNet(width=width, **options)
  if family == 'wrn':
    depth, widening = wide_resnet.parse(name)
    return WideResNet(depth, widening, dropout=dropout, **options)
  depth = int(name.removeprefix(family))
  if family == 'resnet':
    return ResNet(depth, variant=variant, **options)
  if family == 'vgg':
    return VGG(depth, **options)
  if family == 'imagenet_resnet':
    return ImageNetResNet(depth, stem=stem, **options)
  return DenseNet(depth, stem=stem, **options)


def _bert(name: str, vocabulary: int | None, **options: Any) -> Bert:
  if vocabulary is None:
    raise ValueError(f'{name!r} reads sentences: vocabulary must be given')
  layers, width, heads = bert.parse(name)
  return Bert(
    vocab_size=vocabulary, layers=layers, width=width, heads=heads, **options
  )


def reads_sentences(name: str) -> bool:
  """Whether the model reads sentences; the others read images."""
  return _family(name) == 'bert'


def has_variants(name: str) -> bool:
  """Whether `variant` means something to the model."""
  return _family(name) == 'resnet'


def has_dropout(name: str) -> bool:
  """Whether `dropout` means something to the model."""
  return _family(name) in ('wrn', 'bert') or _own_has(name, 'dropout')


def has_stems(name: str) -> bool:
  """Whether `stem` means something to the model."""
  return _family(name) in ('imagenet_resnet', 'densenet')


def has_widths(name: str) -> bool:
  """Whether `width` means something to the model."""
  return _family(name) == 'mobilenet' or _own_has(name, 'width')


def has_dtypes(name: str) -> bool:
  """Whether `dtype` means something to the model."""
  return _family(name) != 'own' or _own_has(name, 'dtype')


def has_batch_norm(name: str) -> bool:
  """Whether the model's examples meet in BatchNorm."""
  if _family(name) == 'own':
    return _own_has(name, own.BATCH_NORM_AXIS)
  return _family(name) not in ('cnn', 'bert')


def takes_any_resolution(name: str) -> bool:
  """Whether the same parameters read images of another size.

  Global average pooling does; see `least_side` for how small they may be.
  """
  if _family(name) == 'own':
    return own.MODELS[name].any_size
  return _family(name) not in ('cnn', 'mnist_cnn', 'bert')


def least_side(name: str, stem: str = 'imagenet') -> int:
  """The smallest side of an image of which something is left at the end."""
  family = _family(name)
  if family == 'vgg':
    return 32
  if family == 'densenet':
    # Three halvings that round down, after two that round up.
    return 29 if stem == 'imagenet' else 8
  return {'cnn': 2, 'own': 1}.get(family, 4)


def _own_has(name: str, field: str) -> bool:
  return name in own.MODELS and own.MODELS[name].has(field)
