"""BERT: its sizes, its arithmetic by hand, padding, dropout, layers."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from margin_jax import layer_margins, linearized, optimizers, signed_margins
from margin_jax.models import bert
from margin_jax.train import dropout as dropout_lib

TINY = {
  'num_classes': 3, 'vocab_size': 50, 'layers': 2, 'width': 12, 'heads': 3,
  'hidden': 20, 'max_length': 32,
}  # fmt: skip


def make_inputs(lengths=(7, 16, 3), width=16):
  """Pairs of random sentences, padded to `width`."""
  rng = np.random.default_rng(0)
  rows, positions = (len(lengths), width), np.arange(width)
  mask = positions[None] < np.array(lengths)[:, None]
  second = positions[None] >= np.array(lengths)[:, None] // 2
  return {
    'ids': np.where(mask, rng.integers(1, 50, rows), 0).astype(np.int32),
    'segments': np.where(mask, second, 0).astype(np.int32),
    'mask': mask,
  }


@functools.cache
def random_params():
  """Of no zeros and no ones, so that every one of them counts."""
  init = functools.partial(bert.Bert(**TINY).init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), make_inputs())
  rng = np.random.default_rng(1)

  def fill(path, x):
    noise = rng.standard_normal(x.shape, np.float32)
    if path[-1].key == 'kernel':
      return 1.5 * noise / np.sqrt(x.shape[0], dtype=np.float32)
    return noise if path[-1].key == 'embedding' else 1 + 0.3 * noise

  return jax.tree_util.tree_map_with_path(fill, shapes)


def test_weight_decay_as_in_pretraining():
  """BERT leaves out what has LayerNorm or bias in its name; rows it decays."""
  flat = traverse_util.flatten_dict(random_params()['params'], sep='/')
  mask = optimizers.kernels_only(flat)
  left_out = {path for path, decayed in mask.items() if not decayed}
  assert left_out == {
    path for path in flat if re.search(r'norm\d?/|/bias$', path)
  }
  assert mask['embeddings/word/embedding']


def test_biases_of_flax_attention_do_not_decay():
  attention = nn.MultiHeadDotProductAttention(num_heads=2)
  params = attention.init(jax.random.key(0), jnp.ones((1, 3, 8)))['params']
  mask = optimizers.kernels_only(params)
  assert params['query']['bias'].shape == (2, 4)
  for layer in mask.values():
    assert layer == {'kernel': True, 'bias': False}


def apply(inputs, train=False, key=0, device=0, **fields):
  """Logits and features, in training with the masks of the train step."""
  model = bert.Bert(**{**TINY, **fields})
  rows = jax.tree.leaves(inputs)[0].shape[0]
  positions = device * rows + jnp.arange(rows)

  def forward(variables, inputs, key):
    with nn.intercept_methods(dropout_lib.by_position(positions)):
      return model.apply(variables, inputs, train=train, rngs={'dropout': key})

  forward = jax.jit(forward) if train else forward
  return forward(random_params(), inputs, jax.random.key(key))


@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('bert_base', (12, 768, 12)),
    ('bert_large', (24, 1024, 16)),
    ('bert6_384_12', (6, 384, 12)),
    ('bert2_128_2', (2, 128, 2)),
    ('bert2_128_3', None),
    ('bert0_128_2', None),
    ('bert02_128_2', None),
    ('bert2_128', None),
    ('bert2_128_2x', None),
    ('bert', None),
    ('wrn10_1', None),
  ],
)
def test_names(name, sizes):
  assert bert.parse(name) == sizes
  if sizes:
    pattern = dict(zip(('layers', 'width', 'heads'), sizes, strict=True))
    assert bert.parse(bert.PATTERN.format(**pattern)) == sizes


@pytest.mark.parametrize(
  ('name', 'count'), [('bert_base', 109_482_240), ('bert_large', 335_141_888)]
)
def test_sizes_are_the_published_ones(name, count):
  depth, width, heads = bert.parse(name)
  model = bert.Bert(2, layers=depth, width=width, heads=heads)
  init = functools.partial(model.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), make_inputs())
  assert {*variables} == {'params'}
  head = variables['params'].pop('head')
  assert {k: x.shape for k, x in head.items()} == {
    'kernel': (width, 2), 'bias': (2,),
  }  # fmt: skip
  assert sum(x.size for x in jax.tree.leaves(variables)) == count


def test_first_values():
  init = jax.jit(functools.partial(bert.Bert(**TINY).init, train=False))
  params = init(jax.random.key(0), make_inputs())['params']
  for path, x in traverse_util.flatten_dict(params).items():
    if path[-1] in ('kernel', 'embedding'):
      # A normal distribution cut at two deviations has 0.88 of its deviation.
      assert np.abs(x).max() <= 0.04
      assert np.std(x) == pytest.approx(0.0176, rel=0.25), path
    else:
      assert np.all(x == (path[-1] == 'scale')), path


def normalize(x, norm):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
  return centred / deviation * norm['scale'] + norm['bias']


def linear(x, dense):
  return x @ dense['kernel'] + dense['bias']


def attend(x, params, heads):
  """One example without padding, (L, width)."""
  parts = {
    name: np.split(linear(x, params[name]), heads, axis=1)
    for name in ('query', 'key', 'value')
  }
  found = []
  for query, key, value in zip(*parts.values(), strict=True):
    scores = np.exp(query @ key.T / math.sqrt(query.shape[1]))
    found.append(scores / scores.sum(1, keepdims=True) @ value)
  return linear(np.concatenate(found, axis=1), params['out'])


def reference(params, ids, segments):
  """One example without padding, in float64: logits and features."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  tables = params['embeddings']
  x = tables['word']['embedding'][ids]
  x = x + tables['segment']['embedding'][segments]
  x = x + tables['position']['embedding'][: len(ids)]
  x = normalize(x, tables['norm'])
  erf = np.vectorize(math.erf)
  for index in range(TINY['layers']):
    layer = params[f'layer{index}']
    y = attend(x, layer['attention'], TINY['heads'])
    x = normalize(x + y, layer['norm1'])
    y = linear(x, layer['hidden'])
    y = y * (1 + erf(y / math.sqrt(2))) / 2
    x = normalize(x + linear(y, layer['out']), layer['norm2'])
  features = np.tanh(linear(x[0], params['pooler']['dense']))
  return linear(features, params['head']), features


# With a rate that drops nothing the other way to attend is taken.
@pytest.mark.parametrize(
  'options', [{}, {'train': True, 'dropout': 1e-9}], ids=['eval', 'train']
)
def test_arithmetic_agrees_with_float64(options):
  inputs = make_inputs()
  logits, features = apply(inputs, **options)
  for row, mask in enumerate(inputs['mask']):
    expected = reference(
      random_params()['params'],
      inputs['ids'][row][mask],
      inputs['segments'][row][mask],
    )
    np.testing.assert_allclose(logits[row], expected[0], 1e-4, 1e-4)
    np.testing.assert_allclose(features[row], expected[1], 1e-4, 1e-4)


def test_padding_changes_nothing():
  inputs = make_inputs()
  wide = {
    name: np.pad(x, ((0, 0), (0, 16)), constant_values=x.dtype.type(0))
    for name, x in inputs.items()
  }
  # Whatever stands where nothing is looked at.
  wide['ids'] = np.where(wide['mask'], wide['ids'], 17)
  for options in ({}, {'train': True, 'dropout': 1e-9}):
    for one, other in zip(
      apply(inputs, **options), apply(wide, **options), strict=True
    ):
      np.testing.assert_allclose(one, other, 1e-5, 1e-5)
  # A row of nothing but padding, as a last batch is filled up with.
  empty = {**inputs, 'mask': np.zeros_like(inputs['mask'])}
  assert np.isfinite(apply(empty)[0]).all()


def test_segments_and_positions_count():
  inputs = make_inputs()
  logits, _ = apply(inputs)
  other, _ = apply({**inputs, 'segments': 1 - inputs['segments']})
  assert np.abs(logits - other).max() > 0.1
  swapped = inputs['ids'].copy()
  swapped[:, [1, 2]] = swapped[:, [2, 1]]
  other, _ = apply({**inputs, 'ids': swapped})
  assert np.abs(logits - other).max() > 0.01


def test_hidden_states_are_of_the_last_layer():
  inputs, model = make_inputs(), bert.Bert(**TINY)
  states = model.apply(
    random_params(), inputs, train=False, method='hidden_states'
  )
  assert states.shape == (3, 16, 12)
  found = linearized.activations_at(model, random_params(), inputs, ('layer1',))
  np.testing.assert_array_equal(states, found['layer1'])


def test_sentences_that_are_too_long_are_refused():
  with pytest.raises(ValueError, match=r'33 tokens .* max_length = 32'):
    apply(make_inputs(width=33))
  with pytest.raises(ValueError, match='multiple of heads, got 12 and 5'):
    apply(make_inputs(), heads=5)


@pytest.mark.slow
def test_dropout_is_of_training_only():
  inputs = make_inputs()
  logits, _ = apply(inputs)
  np.testing.assert_array_equal(apply(inputs, dropout=0.5)[0], logits)
  np.testing.assert_allclose(
    apply(inputs, train=True, dropout=0.0)[0], logits, 1e-5, 1e-5
  )
  dropped, _ = apply(inputs, train=True, dropout=0.5)
  assert np.abs(dropped - logits).max() > 0.1
  other, _ = apply(inputs, train=True, dropout=0.5, key=1)
  assert np.abs(dropped - other).max() > 0.1


@pytest.mark.slow
def test_dropout_masks_are_of_the_index_in_the_batch():
  inputs = make_inputs((5, 5, 5, 5))
  same = jax.tree.map(lambda x: np.repeat(x[:1], 4, axis=0), inputs)
  logits, features = apply(same, train=True, dropout=0.3)
  assert len(np.unique(np.asarray(logits)[:, 0])) == 4
  # Another device's share.
  share = jax.tree.map(lambda x: x[2:], same)
  others = apply(share, train=True, dropout=0.3, device=1)
  np.testing.assert_allclose(others[0], logits[2:], 1e-5, 1e-5)
  np.testing.assert_allclose(others[1], features[2:], 1e-5, 1e-5)


@pytest.mark.slow
def test_every_kind_of_dropout_is_there():
  """Embeddings, probabilities, both halves of a layer, features."""
  seen = {}

  def record(next_function, args, kwargs, context):
    found = next_function(*args, **kwargs)
    if isinstance(context.module, nn.Dropout) and np.any(found == 0):
      seen['/'.join(context.module.path)] = found.shape
    return found

  params = random_params()
  with nn.intercept_methods(record):
    bert.Bert(**TINY, dropout=0.3).apply(
      params, make_inputs((16, 16, 16)), train=True,
      rngs={'dropout': jax.random.key(0)},
    )  # fmt: skip
  activations = (3, 16, 12)
  assert seen == {
    'embeddings/dropout': activations,
    **{
      f'layer{i}/{name}': shape
      for i in range(2)
      for name, shape in (
        ('attention/dropout', (3, 3, 16, 16)),
        ('dropout1', activations),
        ('dropout2', activations),
      )
    },
    'feature_dropout': (3, 12),
  }


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.slow
def test_bfloat16_is_of_the_computation_only(train):
  model = bert.Bert(**TINY, dtype=jnp.bfloat16)
  inputs = make_inputs()
  variables = jax.jit(functools.partial(model.init, train=False))(
    jax.random.key(0), inputs
  )
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}

  def loss(variables):
    logits, features = model.apply(
      variables, inputs, train=train, rngs={'dropout': jax.random.key(0)}
    )
    assert logits.dtype == features.dtype == jnp.float32
    return jnp.sum(logits**2)

  gradient = jax.jit(jax.grad(loss))(variables)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  program = str(jax.make_jaxpr(loss)(variables)).splitlines()
  softmax = [line for line in program if '= exp ' in line]
  assert len(softmax) == 2
  assert all(':f32[' in line for line in softmax)
  roots = [line for line in program if '= rsqrt ' in line]
  assert roots
  assert all(':f32[' in line for line in roots)
  if not train:
    logits, _ = apply(inputs, dtype=jnp.bfloat16)
    exact, _ = apply(inputs)
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_layers_are_found_by_name():
  inputs, model = make_inputs(), bert.Bert(**TINY)
  found = linearized.layer_shapes(model, random_params(), inputs)
  activations = (3, 16, 12)
  expected = {
    'embeddings': activations,
    'embeddings/word': activations,
    'layer0': activations,
    'layer1/attention': activations,
    'layer1/hidden': (3, 16, 20),
    'layer1/norm2': activations,
    'pooler': (3, 12),
    'head': (3, 3),
    'features': (3, 12),
  }
  assert {name: found.get(name) for name in expected} == expected
  # What it reads is no array of numbers, and so no layer.
  assert 'input' not in found
  # Every module that has parameters is a layer, and every block.
  assert {*random_params()['params']} <= {*found}


@pytest.mark.slow
def test_margins_at_layers():
  inputs, model = make_inputs(), bert.Bert(**TINY)
  variables, labels = random_params(), jnp.array([0, 1, 2])
  names = ('embeddings', 'layer0', 'pooler', 'features')
  logits_fn, perturbations = linearized.at_layers(
    model, variables, inputs, names
  )
  margins = functools.partial(layer_margins, logits_fn)
  found = jax.jit(margins)(perturbations, labels)
  logits, _ = model.apply(variables, inputs, train=False)
  expected = signed_margins(
    logits, variables['params']['head']['kernel'], labels
  )
  np.testing.assert_allclose(found['features'], expected, 1e-5)
  np.testing.assert_allclose(found['pooler'], expected, 1e-5)
  for name in ('embeddings', 'layer0'):
    assert np.isfinite(found[name]).all()
    np.testing.assert_array_equal(np.sign(found[name]), np.sign(expected))
