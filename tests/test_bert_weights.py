"""BERT's weights: from a folder and back, what is refused, the hub."""

import functools
import json
import re
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from margin_jax import models
from margin_jax.models import bert, bert_weights, pretrained, weights
from margin_jax.models.pretrained import PretrainedError

MODEL = bert.Bert(
  num_classes=3, vocab_size=11, layers=2, width=4, heads=2, hidden=6,
  max_length=5, dropout=0.2,
)  # fmt: skip
SIZES = bert_weights.sizes_of(MODEL)
NAME = 'bert2_4_2'


@functools.cache
def shapes(classes=3):
  model = MODEL.clone(num_classes=classes)
  ids = jax.ShapeDtypeStruct((1, 5), np.int32)
  inputs = {'ids': ids, 'segments': ids, 'mask': ids}
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), inputs)


@functools.cache
def variables():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape, np.float32), shapes()
  )


@pytest.fixture
def folder(tmp_path):
  """A folder with the variables; its path has a vocabulary beside it."""
  vocabulary = tmp_path / 'words.txt'
  vocabulary.write_text('[PAD]\nübung\n', encoding='utf-8')
  path = tmp_path / 'deep' / 'hf'
  bert_weights.write(path, variables(), SIZES, vocabulary, ('no', 'so', 'yes'))
  return path


def rewrite(folder, change):
  """Changes the state dict of a folder in place."""
  path = folder / 'model.safetensors'
  state = load_file(path)
  change(state)
  save_file(state, path)


def reconfigure(folder, **fields):
  """Sets fields of config.json; those that are None go."""
  path = folder / 'config.json'
  found = {**json.loads(path.read_text()), **fields}
  found = {key: x for key, x in found.items() if x is not None}
  path.write_text(json.dumps(found))


def assert_read(folder, without=()):
  """What is read are the variables, to the bit, but for some paths."""
  expected = traverse_util.flatten_dict(variables())
  found = bert_weights.read(folder, shapes(), NAME)
  assert {*found} == {*expected} - {*without}
  for path, x in found.items():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, expected[path])


HEAD = (weights.HEAD_KERNEL, weights.HEAD_BIAS)


def test_what_is_written_is_read_back(folder):
  assert_read(folder)
  assert bert_weights.describe(folder) == SIZES
  assert bert.Bert(3, **bert_weights.describe(folder)) == MODEL
  loaded = pretrained.load(str(folder), NAME, shapes())
  jax.tree.map(np.testing.assert_array_equal, loaded, variables())
  assert sorted(path.name for path in folder.iterdir()) == [
    'config.json', 'model.safetensors', 'tokenizer_config.json', 'vocab.txt',
  ]  # fmt: skip
  assert (folder / 'vocab.txt').read_text('utf-8') == '[PAD]\nübung\n'
  config = json.loads((folder / 'config.json').read_text())
  assert config['id2label'] == {'0': 'no', '1': 'so', '2': 'yes'}
  assert config['label2id'] == {'no': 0, 'so': 1, 'yes': 2}


def test_tensors_are_where_transformers_looks(folder):
  state = load_file(folder / 'model.safetensors')
  params = variables()['params']
  for name, expected in (
    ('classifier.weight', params['head']['kernel'].T),
    ('bert.pooler.dense.bias', params['pooler']['dense']['bias']),
    (
      'bert.embeddings.word_embeddings.weight',
      params['embeddings']['word']['embedding'],
    ),
    (
      'bert.encoder.layer.1.intermediate.dense.weight',
      params['layer1']['hidden']['kernel'].T,
    ),
  ):
    np.testing.assert_array_equal(state[name], expected)
  assert len(state) == 5 + 2 * 16 + 2 + 2
  header = (folder / 'model.safetensors').read_bytes()[:200]
  assert b'"format":"pt"' in header


def test_a_second_time_the_files_are_replaced(folder):
  (folder / 'README.md').write_text('mine')
  other = jax.tree.map(lambda x: x + 1, variables())
  bert_weights.write(str(folder), other, SIZES)
  found = bert_weights.read(folder, shapes())
  expected = traverse_util.flatten_dict(other)
  for path, x in found.items():
    np.testing.assert_array_equal(x, expected[path])
  assert sorted(path.name for path in folder.iterdir()) == [
    'README.md', 'config.json', 'model.safetensors', 'tokenizer_config.json',
    'vocab.txt',
  ]  # fmt: skip
  config = json.loads((folder / 'config.json').read_text())
  assert config['id2label'] == {'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'}


@pytest.mark.parametrize('labels', [('a', 'b'), ('a', 'b', 'b')])
def test_labels_name_every_class(labels, tmp_path):
  with pytest.raises(ValueError, match='must name 3 classes'):
    bert_weights.write(tmp_path / 'hf', variables(), SIZES, labels=labels)
  assert not (tmp_path / 'hf').exists()


def test_a_file_of_pretraining(folder, caplog):
  """With its heads and old names, without a classifier."""

  def change(state):
    for name in [*state]:
      if name.startswith('classifier'):
        del state[name]
      elif name.endswith('LayerNorm.weight'):
        state[name.replace('weight', 'gamma')] = state.pop(name)
      elif name.endswith('LayerNorm.bias'):
        state[name.removesuffix('bias') + 'beta'] = state.pop(name)
    state['cls.predictions.bias'] = np.zeros(11, np.float32)
    state['cls.seq_relationship.weight'] = np.zeros((2, 4), np.float32)
    state['bert.embeddings.position_ids'] = np.arange(5)[None]

  rewrite(folder, change)
  with caplog.at_level('WARNING'):
    assert_read(folder, without=HEAD)
  assert f'{folder} has no classifier: the head stays' in caplog.text


def test_a_bare_model(folder, caplog):
  """As `BertModel` writes it: nothing is called bert."""

  def change(state):
    for name in [*state]:
      x = state.pop(name)
      if name.startswith('bert.'):
        state[name.removeprefix('bert.')] = x
    state['embeddings.position_ids'] = np.arange(5)[None]

  rewrite(folder, change)
  assert_read(folder, without=HEAD)
  assert 'has no classifier' in caplog.text


def test_a_head_of_other_classes_is_left_alone(folder, caplog):
  found = bert_weights.read(folder, shapes(classes=2), NAME)
  assert not {*found} & {*HEAD}
  assert f'{folder} has 3 classes: the head stays' in caplog.text
  assert len(found) == len(jax.tree.leaves(shapes())) - 2


def test_half_precision_becomes_float32(folder):
  def change(state):
    for name in state:
      state[name] = state[name].astype(ml_dtypes.bfloat16)

  rewrite(folder, change)
  found = bert_weights.read(folder, shapes())
  assert {x.dtype for x in found.values()} == {np.dtype('float32')}


def test_one_message_lists_all_that_does_not_fit(folder):
  def change(state):
    del state['bert.pooler.dense.bias']
    del state['classifier.bias']
    state['bert.embeddings.token_type_embeddings.weight'] = np.ones((1, 4))
    state['bert.encoder.layer.2.output.dense.bias'] = np.ones(4)

  rewrite(folder, change)
  message = (
    f'{str(folder)!r} does not fit {NAME!r}: missing: '
    'bert.pooler.dense.bias, classifier.bias; unexpected: '
    'bert.encoder.layer.2.output.dense.bias; of the wrong shape: '
    'bert.embeddings.token_type_embeddings.weight (1, 4), not (2, 4)'
  )
  with pytest.raises(PretrainedError) as caught:
    bert_weights.read(folder, shapes(), NAME)

  def parts(text):
    return sorted(re.split(r'[:;,] ', text))

  assert parts(str(caught.value)) == parts(message)


def test_shards_are_read_together(folder):
  state = load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  index = {name: f'model-{i % 2}.safetensors' for i, name in enumerate(state)}
  for shard in {*index.values()}:
    part = {name: state[name] for name in state if index[name] == shard}
    save_file(part, folder / shard)
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps({'weight_map': index}))
  assert_read(folder)
  (folder / 'model-1.safetensors').unlink()
  with pytest.raises(PretrainedError, match=r'no file .*model-1\.safetensors'):
    bert_weights.read(folder, shapes())
  path.write_text('{}')
  with pytest.raises(PretrainedError, match="'weight_map' is None"):
    bert_weights.read(folder, shapes())
  path.unlink()
  with pytest.raises(PretrainedError, match='has no weights: it must have'):
    bert_weights.read(folder, shapes())


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'hidden_act': 'relu'}, "hidden_act must be 'gelu', got 'relu'"),
    (
      {'position_embedding_type': 'relative_key'},
      "position_embedding_type must be 'absolute', got 'relative_key'",
    ),
    ({'model_type': 'roberta'}, "model_type must be 'bert', got 'roberta'"),
    ({'is_decoder': True}, 'is_decoder must be False, got True'),
    (
      {'hidden_size': None, 'num_hidden_layers': '2'},
      "num_hidden_layers must be a positive integer, got '2'; hidden_size "
      'must be a positive integer, got None',
    ),
    ({'vocab_size': 0}, 'vocab_size must be a positive integer, got 0'),
    (
      {'num_hidden_layers': 10**9, 'hidden_size': 10**30},
      'num_hidden_layers must be at most 1,024, got 1000000000; hidden_size '
      'must be at most 65,536, got 1' + 30 * '0',
    ),
    ({'layer_norm_eps': 'x'}, "layer_norm_eps must be in [0, 1), got 'x'"),
    (
      {'num_attention_heads': 3},
      'hidden_size must be a multiple of num_attention_heads',
    ),
  ],
)
def test_other_networks_are_refused(fields, words, folder):
  reconfigure(folder, **fields)
  expected = f'describes no BERT that can be read: {words}'
  with pytest.raises(PretrainedError) as caught:
    bert_weights.describe(folder)
  assert str(caught.value) == f'{str(folder / "config.json")!r} {expected}'


def test_old_configurations_lack_fields(folder):
  reconfigure(
    folder, model_type=None, layer_norm_eps=None, position_embedding_type=None,
    is_decoder=None, hidden_dropout_prob=None,
  )  # fmt: skip
  sizes = bert_weights.describe(folder)
  assert sizes == {**SIZES, 'epsilon': 1e-12, 'dropout': 0.1}


def test_the_number_of_heads_is_compared(folder):
  """It shows in no tensor."""
  reconfigure(folder, num_attention_heads=4)
  with pytest.raises(PretrainedError) as caught:
    bert_weights.read(folder, shapes(), NAME)
  assert str(caught.value) == f'{str(folder)!r} has a bert2_4_4, not a {NAME}'
  with pytest.raises(PretrainedError, match='not a bert_base'):
    pretrained.load(str(folder), 'bert_base', shapes())


def test_epsilon_is_compared(folder):
  reconfigure(folder, layer_norm_eps=1e-5)
  assert bert_weights.describe(folder)['epsilon'] == 1e-5
  words = f'layer_norm_eps=1e-05, and {NAME} has 1e-12'
  with pytest.raises(PretrainedError, match=words):
    bert_weights.read(folder, shapes(), NAME)
  assert bert_weights.read(folder, shapes())


def test_broken_folders(folder):
  config = folder / 'config.json'
  for text, words in (
    (100_000 * '[', 'nested too deep'),
    ('{', r'cannot be read \('),
    ('[]', 'hold a JSON object'),
    (None, 'there is no file'),
  ):
    config.unlink()
    if text is not None:
      config.write_text(text)
    with pytest.raises(PretrainedError, match=words) as caught:
      bert_weights.describe(folder)
    assert str(config) in str(caught.value)
  (folder / 'model.safetensors').write_bytes(b'no tensors here')
  with pytest.raises(PretrainedError, match='cannot be read: '):
    bert_weights.read(folder, shapes())


def test_files_have_the_rights_of_any_new_file(folder):
  (folder / 'new').touch()
  names = ('new', 'config.json', 'model.safetensors', 'vocab.txt')
  assert len({(folder / name).stat().st_mode for name in names}) == 1


def test_paths(folder, monkeypatch):
  monkeypatch.setenv('HOME', str(folder.parent))
  assert bert_weights.resolve('~/hf') == folder
  assert bert_weights.resolve(str(folder)) == folder
  for name, words in (
    (str(folder / 'vocab.txt'), 'is a file: give the folder'),
    (str(folder / 'gone'), 'there is no folder'),
    ('./bert', 'there is no folder'),
    ('a/b/c', 'there is no folder'),
  ):
    with pytest.raises(PretrainedError, match=words) as caught:
      bert_weights.resolve(name)
    assert 'config.json, vocab.txt, and model.safetensors' in str(caught.value)


def hub(monkeypatch, download):
  """Puts another `huggingface_hub` in place; returns what it was asked for."""
  asked = []

  def snapshot_download(name, *, allow_patterns):
    asked.append((name, {*allow_patterns}))
    return download(allow_patterns)

  module = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  return asked


def test_a_name_on_the_hub_is_downloaded(folder, monkeypatch):
  asked = hub(monkeypatch, lambda patterns: str(folder))
  assert bert_weights.resolve('owner/some-bert') == folder
  ((name, patterns),) = asked
  assert name == 'owner/some-bert'
  assert {'config.json', 'vocab.txt', 'model.safetensors'} <= patterns
  assert 'pytorch_model.bin' not in patterns
  jax.tree.map(
    np.testing.assert_array_equal,
    pretrained.load('some-bert', NAME, shapes()),
    variables(),
  )


def test_pytorch_is_asked_for_where_there_is_nothing_else(folder, monkeypatch):
  (folder / 'model.safetensors').unlink()

  def download(patterns):
    if 'pytorch_model.bin' in patterns:
      (folder / 'pytorch_model.bin').touch()
    return str(folder)

  asked = hub(monkeypatch, download)
  assert bert_weights.resolve('some-bert') == folder
  assert len(asked) == 2
  (folder / 'pytorch_model.bin').unlink()
  hub(monkeypatch, lambda patterns: str(folder))
  with pytest.raises(PretrainedError, match='has no weights: it must have'):
    bert_weights.resolve('some-bert')


def test_without_a_network_the_message_says_what_to_give(monkeypatch):
  def download(patterns):
    raise ConnectionError('no route to host\nand more')

  hub(monkeypatch, download)
  with pytest.raises(PretrainedError) as caught:
    pretrained.load('bert-base-uncased', 'bert_base', shapes())
  assert str(caught.value) == (
    "'bert-base-uncased' is not a local folder, and cannot be downloaded from "
    'the Hugging Face hub: no route to host; give a local folder with '
    'config.json, vocab.txt, and model.safetensors or pytorch_model.bin instead'
  )
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(PretrainedError, match='pip install huggingface_hub, or'):
    bert_weights.resolve('bert-base-uncased')


def test_which_models_have_weights():
  for name in ('bert_base', 'bert6_384_12'):
    assert models.find(name).published is bert.PUBLISHED
  assert models.find('bert6_384_11') is None
