"""BERT agrees with transformers' PyTorch BERT, weight by weight.

pip install margin-jax[torch]
"""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from margin_jax.models import bert, bert_weights, pretrained  # noqa: E402

pytestmark = pytest.mark.slow

CLASSES = 3


def make_network(**fields):
  """Every tensor is random and counts; activations stay near one."""
  config = transformers.BertConfig(
    **{
      'vocab_size': 97,
      'hidden_size': 48,
      'num_hidden_layers': 3,
      'num_attention_heads': 4,
      'intermediate_size': 80,
      'max_position_embeddings': 40,
      'num_labels': CLASSES,
      **fields,
    }
  )
  network = transformers.BertForSequenceClassification(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in network.named_parameters():
      normal = torch.randn(x.shape, generator=generator)
      if 'LayerNorm.weight' in name:
        x.copy_(1 + 0.2 * normal)
      elif x.ndim == 1 or 'embeddings' in name:
        x.copy_(0.3 * normal)
      else:
        x.copy_(normal * x.shape[1] ** -0.5)
  return network.eval()


def make_inputs():
  """Pairs, padded to the longest."""
  rng = np.random.default_rng(0)
  lengths = np.array([40, 23, 9, 2])
  places = np.arange(40)[None]
  mask = places < lengths[:, None]
  return {
    'ids': np.where(mask, rng.integers(1, 97, (4, 40)), 0),
    'segments': np.where(mask, places >= lengths[:, None] // 2, 0),
    'mask': mask,
  }


def outputs_of(network):
  """Logits, and the states after each layer."""
  tensors = {name: torch.from_numpy(x) for name, x in make_inputs().items()}
  with torch.no_grad():
    found = network(
      input_ids=tensors['ids'],
      token_type_ids=tensors['segments'].long(),
      attention_mask=tensors['mask'].long(),
      output_hidden_states=True,
    )
  return found.logits.numpy(), [x.numpy() for x in found.hidden_states]


def our_shapes(folder):
  """The model that a folder describes, and the shapes of its variables."""
  model = bert.Bert(CLASSES, **bert_weights.describe(folder))
  init = functools.partial(model.init, train=False)
  return model, jax.eval_shape(init, jax.random.key(0), make_inputs())


def our_outputs(folder):
  model, shapes = our_shapes(folder)
  variables = pretrained.put(shapes, bert_weights.read(folder, shapes))

  def forward(variables, inputs):
    (logits, _), state = model.apply(
      variables,
      inputs,
      train=False,
      capture_intermediates=True,
      mutable=['intermediates'],
    )
    found = state['intermediates']
    names = ['embeddings', *(f'layer{i}' for i in range(model.layers))]
    return logits, [found[name]['__call__'][0] for name in names]

  return jax.jit(forward)(variables, make_inputs())


def save(network, folder):
  """As transformers does it, or in the file of before."""
  network.save_pretrained(folder)


def save_for_pytorch(network, folder):
  folder.mkdir(parents=True)
  network.config.save_pretrained(folder)
  torch.save(network.state_dict(), folder / 'pytorch_model.bin')


def save_in_shards(network, folder):
  network.save_pretrained(folder, max_shard_size='50KB')
  assert (folder / 'model.safetensors.index.json').exists()


@pytest.mark.parametrize('write', [save, save_for_pytorch, save_in_shards])
def test_every_layer_agrees(write, tmp_path):
  network = make_network()
  write(network, tmp_path / 'hf')
  expected, expected_states = outputs_of(network)
  logits, states = our_outputs(tmp_path / 'hf')
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, 1e-5, 1e-5)
  assert len(states) == len(expected_states) == 4
  mask = make_inputs()['mask']
  for ours, theirs in zip(states, expected_states, strict=True):
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], 1e-5, 1e-5)


def test_another_epsilon_comes_from_the_configuration(tmp_path):
  network = make_network(layer_norm_eps=0.1)
  save(network, tmp_path / 'hf')
  logits, _ = our_outputs(tmp_path / 'hf')
  np.testing.assert_allclose(logits, outputs_of(network)[0], 1e-5, 1e-5)


@pytest.mark.parametrize('kind', ['BertModel', 'BertForPreTraining'])
def test_pretrained_networks_are_read(kind, tmp_path, caplog):
  config = make_network().config
  network = getattr(transformers, kind)(config)
  save(network, tmp_path / 'hf')
  _, shapes = our_shapes(tmp_path / 'hf')
  found = bert_weights.read(tmp_path / 'hf', shapes)
  assert 'has no classifier' in caplog.text
  assert len(found) == len(jax.tree.leaves(shapes)) - 2
  body = getattr(network, 'bert', network)
  np.testing.assert_array_equal(
    found['params', 'pooler', 'dense', 'kernel'],
    body.pooler.dense.weight.detach().numpy().T,
  )


def test_transformers_loads_what_is_written(tmp_path):
  model = bert.Bert(
    CLASSES, vocab_size=97, layers=3, width=48, heads=4, hidden=80,
    max_length=40, dropout=0.2, epsilon=1e-6,
  )  # fmt: skip
  variables = model.init(jax.random.key(0), make_inputs(), train=False)
  noise = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: x + noise.normal(0, 0.2, x.shape).astype(np.float32), variables
  )
  folder = tmp_path / 'hf'
  sizes = bert_weights.sizes_of(model)
  bert_weights.write(folder, variables, sizes, labels=('no', 'so', 'yes'))
  kind = transformers.BertForSequenceClassification
  network, info = kind.from_pretrained(folder, output_loading_info=True)
  assert not any(info.values())
  assert network.config.id2label == {0: 'no', 1: 'so', 2: 'yes'}
  assert network.config.hidden_dropout_prob == 0.2
  assert network.config.attention_probs_dropout_prob == 0.2
  logits, _ = model.apply(variables, make_inputs(), train=False)
  theirs, _ = outputs_of(network.eval())
  np.testing.assert_allclose(theirs, logits, 1e-5, 1e-5)
  # And back.
  save(network, tmp_path / 'again')
  assert bert_weights.describe(tmp_path / 'again') == sizes
  found = bert_weights.read(tmp_path / 'again', variables)
  back = pretrained.put(variables, found)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_code_in_a_file_is_not_run(tmp_path):
  network = make_network()
  save_for_pytorch(network, tmp_path / 'hf')
  _, shapes = our_shapes(tmp_path / 'hf')
  torch.save(network, tmp_path / 'hf' / 'pytorch_model.bin')
  with pytest.raises(pretrained.PretrainedError, match='cannot be read'):
    bert_weights.read(tmp_path / 'hf', shapes)
