"""BERT, with a head for sentences and pairs of sentences (Devlin et al. 2019).

As published: normalization comes after each residual, GELU is exact, and the
head reads the pooled first token.
"""

import functools
import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from margin_jax.models.model import Family, Model
from margin_jax.models.weights import Path, Published

PATTERN = 'bert{layers}_{width}_{heads}'
# Layers, width, heads.
SIZES = {'bert_base': (12, 768, 12), 'bert_large': (24, 1024, 16)}

# Of the published sizes.
MAX_LENGTH = 512

Inputs = dict[str, Array]

_init = nn.initializers.truncated_normal(0.02)


def parse(name: str) -> tuple[int, int, int] | None:
  """Parses 'bert6_384_12' as (6, 384, 12): layers, width and heads.

  'bert_base' and 'bert_large' have the published sizes. None for what is no
  such name; the width must be a multiple of the heads.
  """
  if name in SIZES:
    return SIZES[name]
  match = re.fullmatch(r'bert([1-9]\d*)_([1-9]\d*)_([1-9]\d*)', name)
  if match is None:
    return None
  layers, width, heads = map(int, match.groups())
  return None if width % heads else (layers, width, heads)


def _norm(module: nn.Module, name: str) -> nn.Module:
  """Statistics in float32, whatever the dtype of the computation.

  Of the differences, because E[x^2] - E[x]^2 loses digits.
  """
  return nn.LayerNorm(
    epsilon=module.epsilon,
    dtype=module.dtype,
    use_fast_variance=False,
    name=name,
  )


def _dense(module: nn.Module) -> Callable[..., nn.Module]:
  """Takes the number of outputs, and `name`."""
  return functools.partial(nn.Dense, kernel_init=_init, dtype=module.dtype)


class Embeddings(nn.Module):
  """The sum of a token's, its position's and its segment's row, normalized."""

  vocab_size: int
  width: int
  max_length: int
  segments: int
  dropout: float
  dtype: jnp.dtype
  epsilon: float

  @nn.compact
  def __call__(self, ids: Array, segments: Array, train: bool) -> Array:
    """(B, L) and (B, L) integers -> (B, L, width)."""
    length = ids.shape[1]
    if length > self.max_length:
      raise ValueError(
        f'inputs of {length} tokens are longer than max_length = '
        f'{self.max_length}'
      )
    embed = functools.partial(
      nn.Embed,
      features=self.width,
      embedding_init=_init,
      dtype=self.dtype,
    )
    x = embed(self.vocab_size, name='word')(ids)
    x = x + embed(self.segments, name='segment')(segments)
    # A slice, and not a look-up: its gradient is no scatter.
    positions = embed(self.max_length, name='position').embedding[:length]
    x = _norm(self, 'norm')(x + positions[None].astype(self.dtype))
    return nn.Dropout(self.dropout, deterministic=not train, name='dropout')(x)


class Attention(nn.Module):
  """Every token looks at all tokens that are no padding."""

  heads: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array, train: bool) -> Array:
    """(B, L, width) activations and (B, L) bool -> (B, L, width)."""
    batch, length, width = x.shape
    dense = functools.partial(_dense(self), width)
    shape = (batch, length, self.heads, width // self.heads)
    query, key, value = (
      dense(name=name)(x).reshape(shape) for name in ('query', 'key', 'value')
    )
    mask = mask[:, None, None, :]
    if train and self.dropout > 0:
      x = self._attend_with_dropout(query, key, value, mask)
    else:
      x = jax.nn.dot_product_attention(query, key, value, mask=mask)
    return dense(name='out')(x.reshape(batch, length, width))

  def _attend_with_dropout(
    self, query: Array, key: Array, value: Array, mask: Array
  ) -> Array:
    """What `dot_product_attention` has no option for: BERT drops who looks
    at whom, which needs the (B, heads, L, L) probabilities themselves.
    """
    scores = jnp.einsum(
      'bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32
    )
    scores = scores / math.sqrt(query.shape[-1])
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    probabilities = nn.softmax(scores).astype(self.dtype)
    probabilities = nn.Dropout(
      self.dropout, deterministic=False, name='dropout'
    )(probabilities)
    return jnp.einsum('bhqk,bkhd->bqhd', probabilities, value)


class Layer(nn.Module):
  """Attention and two linear maps, each with a residual, then normalized."""

  heads: int
  hidden: int
  dropout: float
  dtype: jnp.dtype
  epsilon: float

  @nn.compact
  def __call__(self, x: Array, mask: Array, train: bool) -> Array:
    """(B, L, width) activations and (B, L) bool -> (B, L, width)."""
    dense = _dense(self)
    drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
    attention = Attention(
      self.heads, self.dropout, self.dtype, name='attention'
    )
    y = drop(name='dropout1')(attention(x, mask, train))
    x = _norm(self, 'norm1')(x + y)
    y = nn.gelu(dense(self.hidden, name='hidden')(x), approximate=False)
    y = drop(name='dropout2')(dense(x.shape[-1], name='out')(y))
    return _norm(self, 'norm2')(x + y)


class Pooler(nn.Module):
  """tanh of a linear map of the first token, [CLS]."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """(B, L, width) -> (B, width)."""
    return nn.tanh(_dense(self)(x.shape[-1], name='dense')(x[:, 0]))


class Bert(nn.Module):
  """BERT with a classifier of the pooled first token.

  Its inputs are a dictionary of (B, L) arrays, L up to `max_length`:

      ids: integers below vocab_size, the first of a row [CLS]
      segments: integers below `segments`, 0 for the first sentence, 1 for the
        second
      mask: bool, False for padding, which no token looks at

  They are `input_ids`, `token_type_ids` and `attention_mask` elsewhere.

  Attributes:
    num_classes: C.
    vocab_size: number of tokens.
    layers: number of layers.
    width: width of the activations; a multiple of `heads`.
    heads: the number of heads of each attention layer.
    hidden: the width between the two linear maps of a layer; None is 4 * width.
    max_length: the number of positions that have an embedding.
    segments: the number of kinds of segments.
    dropout: the fraction dropped in training: of the embeddings, of what each
      half of a layer adds, of the attention's probabilities, of the features.
    dtype: of the computation; parameters and the head stay float32, and so do
      normalization and softmax.
    epsilon: the epsilon of the normalization.
  """

  num_classes: int
  vocab_size: int = 30522
  layers: int = 12
  width: int = 768
  heads: int = 12
  hidden: int | None = None
  max_length: int = MAX_LENGTH
  segments: int = 2
  dropout: float = 0.1
  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-12

  def setup(self):
    if self.width % self.heads:
      raise ValueError(
        f'width must be a multiple of heads, got {self.width} and {self.heads}'
      )
    self.embeddings = Embeddings(
      vocab_size=self.vocab_size,
      width=self.width,
      max_length=self.max_length,
      segments=self.segments,
      dropout=self.dropout,
      dtype=self.dtype,
      epsilon=self.epsilon,
    )
    # One attribute a layer: of a list Flax would make layer_0, layer_1, ...
    for index in range(self.layers):
      layer = Layer(
        heads=self.heads,
        hidden=self.hidden or 4 * self.width,
        dropout=self.dropout,
        dtype=self.dtype,
        epsilon=self.epsilon,
      )
      setattr(self, f'layer{index}', layer)
    self.pooler = Pooler(self.dtype)
    self.feature_dropout = nn.Dropout(self.dropout)
    self.head = nn.Dense(self.num_classes, kernel_init=_init)

  def hidden_states(self, inputs: Inputs, *, train: bool) -> Array:
    """What the last layer returns, (B, L, width), in `dtype`.

    For embeddings of tokens and sentences: `model.apply(variables, inputs,
    train=False, method='hidden_states')`. Rows of padding mean nothing.
    """
    mask = inputs['mask'].astype(bool)
    x = self.embeddings(inputs['ids'], inputs['segments'], train)
    for index in range(self.layers):
      x = getattr(self, f'layer{index}')(x, mask, train)
    return x

  def __call__(self, inputs: Inputs, *, train: bool) -> tuple[Array, Array]:
    """Inputs -> logits (B, C), features (B, width), both float32."""
    x = self.pooler(self.hidden_states(inputs, train=train))
    features = self.feature_dropout(
      x.astype(jnp.float32), deterministic=not train
    )
    return self.head(features), features


_MODULES = {
  'embeddings/word': 'bert.embeddings.word_embeddings',
  'embeddings/position': 'bert.embeddings.position_embeddings',
  'embeddings/segment': 'bert.embeddings.token_type_embeddings',
  'embeddings/norm': 'bert.embeddings.LayerNorm',
  'pooler/dense': 'bert.pooler.dense',
  'head': 'classifier',
}
_LAYER_MODULES = {
  'attention/query': 'attention.self.query',
  'attention/key': 'attention.self.key',
  'attention/value': 'attention.self.value',
  'attention/out': 'attention.output.dense',
  'norm1': 'attention.output.LayerNorm',
  'hidden': 'intermediate.dense',
  'out': 'output.dense',
  'norm2': 'output.LayerNorm',
}


def _published_name(module: Path) -> str:
  """transformers' name of a module."""
  if not module[0].startswith('layer'):
    return _MODULES['/'.join(module)]
  index = module[0].removeprefix('layer')
  return f'bert.encoder.layer.{index}.{_LAYER_MODULES["/".join(module[1:])]}'


PUBLISHED = Published(
  name_of=_published_name,
  # Of the bare `BertModel`, and TensorFlow's of a norm.
  spellings=(
    (r'^(embeddings|encoder|pooler)\.', r'bert.\1.'),
    (r'LayerNorm\.gamma$', 'LayerNorm.weight'),
    (r'LayerNorm\.beta$', 'LayerNorm.bias'),
  ),
  # The heads of pretraining, and a constant that old files have.
  ignored=r'cls\..*|bert\.embeddings\.position_ids',
  folder=True,
)


def _model(layers: int, width: int, heads: int) -> Model:
  return Model(
    make=functools.partial(Bert, layers=layers, width=width, heads=heads),
    options=frozenset({'dtype', 'dropout'}),
    reads='sentences',
    batch_norm=False,
    published=PUBLISHED,
  )


FAMILY = Family(
  names=(*SIZES, f'{PATTERN} (layers, width, heads)'),
  parse=parse,
  model=_model,
)
