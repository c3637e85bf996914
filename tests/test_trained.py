"""The network of a run, loaded: it predicts what the run was evaluated on."""

import json
import unittest.mock

import jax
import numpy as np
import pytest

import margin_jax
from margin_jax import config as config_lib
from margin_jax import data, models
from margin_jax.data import description
from margin_jax.train import loop
from margin_jax.train import setup as setup_lib
from margin_jax.train.checkpoints import Checkpoints
from tests import custom, helpers


@pytest.fixture(autouse=True)
def _registries_are_restored():
  with (
    unittest.mock.patch.dict(data.REGISTERED),
    unittest.mock.patch.dict(models.REGISTERED),
  ):
    yield


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of digits with checkpoints of steps 10 and 20, and its result."""
  workdir = tmp_path_factory.mktemp('run')
  return workdir, helpers.train(workdir)[0]


def test_it_predicts_what_the_run_evaluated(finished):
  """The test split, 360 images: a chunk and a part of one."""
  workdir, result = finished
  trained = margin_jax.load(workdir)
  split = helpers.digits().splits['test']
  classes = trained.predict(split['inputs'])
  assert classes.shape == (360,)
  accuracy = np.mean(classes == split['label'])
  np.testing.assert_allclose(accuracy, result['test']['accuracy'])
  logits, features = trained.apply(split['inputs'][:3])
  head = trained.variables['params']['head']
  kernel, bias = head['kernel'], head['bias']
  np.testing.assert_allclose(logits, features @ kernel + bias, 1e-4, 1e-5)
  assert trained.step == 20
  assert trained.config.model.name == 'cnn'
  assert trained.predict(split['inputs'][:0]).shape == (0,)


def test_it_needs_no_data(finished, monkeypatch):
  """What the network must know is in the checkpoint, bit for bit."""
  inputs = helpers.digits().splits['test']['inputs'][:5]
  info = Checkpoints.info
  monkeypatch.setattr(
    Checkpoints,
    'info',
    lambda self, *step: {**info(self, *step), 'dataset': None},
  )
  of_data, _ = margin_jax.load(finished[0]).apply(inputs)  # of older versions
  monkeypatch.undo()
  monkeypatch.setattr(setup_lib, 'load', None)
  found, _ = margin_jax.load(finished[0]).apply(inputs)
  np.testing.assert_array_equal(found, of_data)


@pytest.mark.slow
def test_data_that_are_gone(tmp_path):
  """A dataset that is registered nowhere any more, and a file of labels."""
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(64, 5)).astype(np.float32)
  split = inputs, np.arange(64) % 3
  margin_jax.register_dataset('of_yesterday', train=split, test=split)
  np.save(tmp_path / 'labels.npy', split[1])
  margin_jax.register_model('of_five', custom.Mlp)
  fields = {
    'data.name': 'of_yesterday',
    'data.labels': str(tmp_path / 'labels.npy'),
    'data.augmentations': (),
    'data.validation_examples': 0,
    'model.name': 'of_five',
  }
  result = helpers.train(tmp_path / 'run', **fields)[0]
  del data.REGISTERED['of_yesterday']
  (tmp_path / 'labels.npy').unlink()
  trained = margin_jax.load(tmp_path / 'run')
  accuracy = np.mean(trained.predict(inputs) == split[1])
  np.testing.assert_allclose(accuracy, result['test']['accuracy'])
  assert trained.class_names is None


@pytest.mark.parametrize('name', ['digits', 'entailment', 'floats'])
def test_a_description_prepares_as_its_dataset(name):
  if name == 'floats':
    split = np.eye(4, dtype=np.float32), np.arange(4)
    margin_jax.register_dataset('floats', train=split, test=split)
  dataset = data.load(name)
  described = json.loads(json.dumps(description.to_json(dataset)))
  assert description.DESCRIPTION.holds(described)
  found = description.from_json(described)
  for attribute in (
    'name', 'num_classes', 'class_names', 'vocabulary', 'input_shape',
    'input_dtype', 'weighted',
  ):  # fmt: skip
    assert getattr(found, attribute) == getattr(dataset, attribute)
  assert found.counts['train'] == dataset.counts['train']
  inputs = dataset.inputs('train', np.arange(3))
  helpers.assert_trees_equal(
    jax.device_get(found.prepare(inputs)),
    jax.device_get(dataset.prepare(inputs)),
  )


def test_checkpoints_are_the_latest_the_best_or_of_a_step(finished):
  workdir, result = finished
  assert margin_jax.load(workdir, np.int64(10)).step == 10
  best = margin_jax.load(workdir, 'best')
  assert best.step == result['best']['step']
  split = helpers.digits().splits['test']
  accuracy = np.mean(best.predict(split['inputs']) == split['label'])
  np.testing.assert_allclose(accuracy, result['best']['test'])


@pytest.mark.parametrize(
  ('checkpoint', 'message'),
  [(15, r'no checkpoint of step\(s\) \[15\]'), ('last', "must be 'latest'")],
)
def test_a_checkpoint_that_is_not_there(finished, checkpoint, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    margin_jax.load(finished[0], checkpoint)


@pytest.mark.slow
def test_there_is_no_best_without_validation(tmp_path):
  helpers.train(tmp_path, **{'data.validation_examples': 0})
  with pytest.raises(config_lib.ConfigError, match='no validation split'):
    margin_jax.load(tmp_path, 'best')


def test_inputs_of_another_shape_are_refused(finished):
  trained = margin_jax.load(finished[0])
  with pytest.raises(ValueError, match=r"\('N', 8, 8, 1\)"):
    trained.predict(np.zeros((5, 64), np.uint8))
  with pytest.raises(ValueError, match=r'from 0 to 255, .* up to 1'):
    trained.predict(np.ones((5, 8, 8, 1), np.float32))
  for dtype, value in ((np.uint16, 60_000), (int, -300), (float, np.nan)):
    with pytest.raises(ValueError, match='from 0 to 255, as'):
      trained.predict(np.full((5, 8, 8, 1), value, dtype))
  trained.predict(np.zeros((5, 8, 8, 1), np.float32))  # black
  grey = np.full((5, 8, 8, 1), 100)
  floating = trained.predict(grey.astype(np.float32))
  np.testing.assert_array_equal(
    floating, trained.predict(grey.astype(np.uint8))
  )


def test_a_short_line_says_what_it_is(finished, tmp_path):
  workdir, result = finished
  trained = margin_jax.load(workdir)
  accuracy = result['validation']['accuracy']
  assert trained.validation_accuracy == accuracy
  expected = (
    "Trained(dataset='digits', model='cnn', step=20, "
    f'validation_accuracy={accuracy:.4f})'
  )
  assert f'{trained}' == repr(trained) == expected
  helpers.train(tmp_path, **{'data.validation_examples': 0, 'steps': 10})
  without = margin_jax.load(tmp_path)
  assert f'{without}' == "Trained(dataset='digits', model='cnn', step=10)"


def test_pixels_that_are_nearly_black_give_a_warning(finished):
  """As scikit-learn's digits are, from 0 to 16."""
  trained = margin_jax.load(finished[0])
  images = np.zeros((5, 8, 8, 1), np.uint8)
  trained.predict(images)
  trained.predict(images[:0])
  images[0, 0] = 17
  trained.predict(images)
  images[0, 0] = 16
  for dtype in (np.uint8, np.int64):
    with pytest.warns(UserWarning, match='from 0 to 255.*16') as caught:
      trained.predict(images.astype(dtype))
    assert [x.filename for x in caught] == [__file__]
    assert '\n' not in str(caught[0].message)
  with pytest.warns(UserWarning, match='from 0 to 255') as caught:
    trained.apply(images)
  assert [x.filename for x in caught] == [__file__]


@pytest.mark.slow
def test_it_reads_sentences(data_dir, tmp_path):
  """As strings, or as the dataset stores them."""
  if not (data_dir / 'vocab').is_dir():
    pytest.skip('real data: MARGIN_JAX_TEST_DATA has no vocab')
  fields = {
    'data.name': 'glue/rte',
    'data.data_dir': str(data_dir / 'tfds'),
    'data.vocabulary': str(data_dir / 'vocab/bert-base-uncased-vocab.txt'),
    'data.max_length': 32,
    'data.buckets': (),
    'data.fraction': 0.05,
    'data.augmentations': (),
    'data.validation_examples': 0,
    'model.name': 'bert1_16_2',
    'selection.rule': 'uniform',
    'steps': 2,
  }
  helpers.train(tmp_path, **fields)
  trained = margin_jax.load(tmp_path)
  pairs = [('A man sleeps.', 'He is awake.'), ('It rains.', 'It is wet.')]
  logits, _ = trained.apply(pairs)
  assert logits.shape == (2, 2)
  again, _ = trained.apply(trained.encode(pairs))
  np.testing.assert_array_equal(logits, again)


def test_a_complete_run_says_so_without_compiling(finished, monkeypatch):
  workdir, result = finished

  def compile_steps(*args):
    raise AssertionError('it compiles')

  monkeypatch.setattr(loop, 'compile_steps', compile_steps)
  again, lines = helpers.train(workdir)
  assert lines[-1].startswith('already complete: test accuracy')
  assert again == result
