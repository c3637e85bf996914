"""Runs on GLUE's tasks: what they keep, what they report, what they refuse."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from margin_jax import analyze, export
from margin_jax.config import ConfigError
from margin_jax.data import DatasetError
from margin_jax.models import bert, bert_weights
from margin_jax.train import loop
from tests import helpers
from tests.datasets import VOCAB, write_task

FIELDS = {
  'data.max_length': 16,
  'data.buckets': (),
  'data.augmentations': (),
  'data.crop_padding': 4,
  'model.name': 'bert1_8_2',
  'model.dropout': 0.1,
  'optimizer.name': 'adam',
  'optimizer.learning_rates': (1e-3,),
}


@pytest.fixture
def weights(tmp_path):
  """A folder of weights, as Hugging Face has them, with a vocabulary."""
  model = bert.Bert(
    num_classes=3, vocab_size=len(VOCAB), layers=1, width=8, heads=2
  )  # fmt: skip
  ids = jax.ShapeDtypeStruct((1, 16), np.int32)
  inputs = {'ids': ids, 'segments': ids, 'mask': ids}
  init = functools.partial(model.init, train=False)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.standard_normal(x.shape, np.float32),
    jax.eval_shape(init, jax.random.key(0), inputs),
  )
  vocabulary = write_vocabulary(tmp_path / 'words.txt', VOCAB)
  folder = tmp_path / 'weights'
  bert_weights.write(
    folder, variables, bert_weights.sizes_of(model), vocabulary
  )
  return folder


def write_vocabulary(path, words):
  path.write_text('\n'.join(words) + '\n', encoding='utf-8')
  return path


def run(workdir, name, steps, **fields):
  """The result and the log of a run on a task beside the workdir."""
  config = helpers.small_config(
    **{
      **FIELDS,
      'data.name': name,
      'data.data_dir': str(workdir.parent),
      'data.validation_examples': 20,
      'steps': steps,
      **fields,
    }
  )
  lines = []
  return loop.train(config, str(workdir), log=lines.append), lines


@pytest.mark.slow
def test_a_run_outlives_the_weights_that_it_began_with(tmp_path, weights):
  """It is resumed, analyzed and exported, and reports both tests of MNLI."""
  write_task(tmp_path, 'glue/mnli', sizes=(120, 20, 16))
  begin = functools.partial(
    run, name='glue/mnli', **{'model.pretrained': str(weights)}
  )
  whole, lines = begin(tmp_path / 'whole', steps=20)
  begin(tmp_path / 'parts', steps=10)
  shutil.rmtree(weights)
  weights.mkdir()  # and one that is emptied
  resumed, _ = begin(tmp_path / 'parts', steps=20)
  for name in ('test', 'test_mismatched', 'test_mean', 'validation'):
    assert resumed[name] == whole[name]
  tests = [whole[x]['accuracy'] for x in ('test', 'test_mismatched')]
  assert whole['test_mean']['accuracy'] == pytest.approx(np.mean(tests))
  assert {*whole['best']} == {
    'step', 'validation', 'test', 'test_mismatched', 'test_mean'
  }  # fmt: skip
  mean = f'test_mean {whole["test_mean"]["accuracy"]:.2%}'
  assert mean in lines[-1]
  _, lines = begin(tmp_path / 'parts', steps=20)
  assert lines[-1].startswith('already complete: test accuracy')
  assert mean in lines[-1]

  folder = analyze.analyze(str(tmp_path / 'parts'), log=lambda line: None)
  rows = (folder / 'test_mismatched.csv').read_text().splitlines()
  assert len(rows) == 1 + 16
  out = export.export(str(tmp_path / 'parts'), str(tmp_path / 'model'))
  assert (out / 'vocab.txt').read_text().splitlines() == [*VOCAB]
  said = json.loads((out / 'tokenizer_config.json').read_text())
  assert said['do_lower_case'] is True


@pytest.mark.slow
def test_f1_is_in_the_last_line_and_in_the_best(tmp_path):
  write_task(tmp_path, 'glue/mrpc', sizes=(120, 20))
  vocabulary = write_vocabulary(tmp_path / 'words.txt', VOCAB)
  result, lines = run(
    tmp_path / 'run', 'glue/mrpc', 10, **{'data.vocabulary': str(vocabulary)}
  )
  assert f'test_f1 {result["test"]["f1"]:.2%}' in lines[-1]
  assert {*result['best']} == {'step', 'validation', 'test', 'test_f1'}


def test_two_vocabularies_must_be_one(tmp_path, weights):
  write_task(tmp_path, 'glue/rte', sizes=(120, 20))
  swapped = (*VOCAB[:5], *VOCAB[:4:-1])
  other = write_vocabulary(tmp_path / 'other.txt', swapped)
  fields = {'model.pretrained': str(weights), 'data.vocabulary': str(other)}
  with pytest.raises(ConfigError, match=r'must be the same.*other\.txt'):
    run(tmp_path / 'run', 'glue/rte', 10, **fields)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_workdir_of_another_vocabulary_is_refused(tmp_path):
  write_task(tmp_path, 'glue/sst2', sizes=(120, 20))
  path = write_vocabulary(tmp_path / 'words.txt', VOCAB)
  fields = {'data.vocabulary': str(path)}
  run(tmp_path / 'run', 'glue/sst2', 10, **fields)
  write_vocabulary(path, (*VOCAB[:5], *VOCAB[:4:-1]))
  with pytest.raises(ConfigError, match=r'words\.txt.*run/vocab\.txt'):
    run(tmp_path / 'run', 'glue/sst2', 20, **fields)


@pytest.mark.slow
def test_a_start_that_came_to_nothing_leaves_no_vocabulary(tmp_path):
  write_task(tmp_path, 'glue/sst2', sizes=(120, 20))
  swapped = (*VOCAB[:5], *VOCAB[:4:-1])
  (tmp_path / 'run').mkdir()
  left = write_vocabulary(tmp_path / 'run' / 'vocab.txt', swapped)
  with pytest.raises(ConfigError, match='vocabulary=None'):
    run(tmp_path / 'run', 'glue/sst2', 10)
  path = write_vocabulary(tmp_path / 'words.txt', VOCAB)
  run(tmp_path / 'run', 'glue/sst2', 10, **{'data.vocabulary': str(path)})
  assert left.read_text() == path.read_text()


@pytest.mark.parametrize(
  'field', ['do_lower_case', 'strip_accents', 'tokenize_chinese_chars']
)
def test_cased_weights_are_refused(tmp_path, weights, field):
  write_task(tmp_path, 'glue/rte', sizes=(120, 20))
  path = weights / 'tokenizer_config.json'
  path.write_text(json.dumps({field: False}))
  fields = {'model.pretrained': str(weights)}
  with pytest.raises(DatasetError, match=f'{field}=False'):
    run(tmp_path / 'run', 'glue/rte', 10, **fields)
  path.write_text('[1]')
  with pytest.raises(DatasetError, match=r'tokenizer_config.*cannot be read'):
    run(tmp_path / 'run', 'glue/rte', 10, **fields)


@pytest.mark.parametrize(
  ('layer', 'allowed'), [('embeddings', False), ('pooler', True)]
)
@pytest.mark.slow
def test_a_layer_of_tokens_has_no_size(tmp_path, layer, allowed):
  config = helpers.small_config(
    **{
      **FIELDS,
      'data.name': 'entailment',
      'data.max_length': 40,
      'data.fraction': 0.02,
      'large_margin.weight': 1.0,
      'large_margin.layers': (layer,),
      'large_margin.normalize_by_size': True,
      'mmr.alpha': 0.0,
      'steps': 1,
    }
  )
  train = functools.partial(
    loop.train, config, str(tmp_path / 'run'), log=lambda line: None
  )
  if allowed:
    assert train()['steps'] == 1
  else:
    with pytest.raises(
      ConfigError, match=r'normalize_by_size=True.*embeddings'
    ):
      train()
