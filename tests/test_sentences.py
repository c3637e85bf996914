"""Sentences in the trainer: buckets, exact selection, F1, resuming."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import traverse_util
from sklearn import metrics as sklearn_metrics

from margin_jax import analyze, data, export, mms_scores
from margin_jax import config as config_lib
from margin_jax.models import bert_weights
from margin_jax.train import evaluation, loop
from margin_jax.train.checkpoints import Checkpoints
from margin_jax.train.workdirs import Workdir
from tests import helpers
from tests.helpers import slow

FIELDS = {
  'data.name': 'entailment',
  'data.max_length': 48,
  'data.buckets': (24,),
  'data.fraction': 0.05,
  'data.augmentations': (),
  'data.crop_padding': 4,
  'data.validation_examples': 100,
  'model.name': 'bert1_16_2',
  'model.dropout': 0.1,
  'optimizer.name': 'adam',
  'optimizer.learning_rates': (1e-3,),
}


@functools.cache
def dataset():
  """395 of the training pairs in two buckets, 100 for validation."""
  return data.load(
    'entailment',
    validation_examples=100,
    fraction=0.05,
    max_length=48,
    buckets=(24,),
    sample_size=32,
  )


@functools.cache
def setup(**fields):
  """A compiled step on the pairs, from weights that tell them apart.

  A new BERT's weights are so small that the scores of a pool agree to three
  digits, and its ranks are decided by rounding, which is that of the machine.
  """
  this = helpers.Setup(dataset=dataset(), **{**FIELDS, **fields})
  params = jax.tree.map(
    lambda x: 10 * x if x.ndim > 1 else x, this.first.params
  )
  this.first = this.first.replace(params=params)
  return this


def whole_pool(this, step, state=None):
  """The pool of a step, sampled by one device, from its state or the first."""
  sampler_state = dataset().state() if state is None else state.sampler
  key = jax.random.fold_in(jax.random.key(0), 2)
  sample = helpers.sampler(dataset(), 32)
  return sample(sampler_state, this.loader(step), key, step)[1]


def score_pool(this, pool, state=None):
  """MMS scores of a pool, outside any compiled step."""
  params = (state or this.first).params
  apply = jax.jit(functools.partial(this.spec.model.apply, train=False))
  logits, _ = apply({'params': params}, dataset().prepare(pool['inputs']))
  return np.asarray(mms_scores(logits, params['head']['kernel']))


def assert_no_rank_is_rounding(this, steps):
  """What 8 of 32 were selected by is 100 roundings or more, in each step."""
  for step in range(steps):
    state = this.run(step)[0] if step else this.first
    scores = np.sort(score_pool(this, whole_pool(this, step, state), state))
    assert scores[8] - scores[7] > 1e-5 * scores[8]


def test_every_pair_is_in_one_bucket_that_holds_it():
  assert dataset().widths == (24, 48)
  split = dataset().splits['train']
  seen = []
  for bucket in dataset().arrays('train'):
    rows = bucket['row']
    seen.extend(rows)
    width = bucket['inputs'].shape[1]
    np.testing.assert_array_equal(
      bucket['inputs'], split['inputs'][rows, :width]
    )
    assert not split['inputs'][rows, width:].any()
    np.testing.assert_array_equal(bucket['label'], split['label'][rows])
  assert sorted(seen) == list(range(dataset().counts['train']))


@pytest.mark.slow
def test_a_step_selects_the_lowest_of_a_pool_of_one_width():
  this = setup()
  pool = whole_pool(this, 0)
  width = dataset().widths[this.loader.bucket(0)]
  assert pool['inputs'].shape == (32, width, 2)
  scores = score_pool(this, pool)
  counted = setup(**{'selection.log_counts': True})
  state, _ = counted.run(1)
  chosen = np.flatnonzero(state.counts)
  np.testing.assert_array_equal(
    chosen, np.sort(pool['index'][np.argsort(scores)[:8]])
  )


@pytest.mark.slow
def test_devices_change_neither_selection_nor_update():
  """Token batches and dropout masks are those of one device.

  Under SGD: Adam makes whole steps of the keys' biases, whose gradient is
  rounding (a bias of all keys changes no attention).
  """
  fields = {
    'selection.rule': 'mms',
    'selection.log_counts': True,
    'optimizer.name': 'sgd',
    'optimizer.learning_rates': (0.1,),
  }
  one = setup(**fields)
  two = setup(devices=2, **fields)
  (state1, metrics1), (state2, metrics2) = one.run(6), two.run(6)
  np.testing.assert_array_equal(state1.counts, state2.counts)
  assert state1.counts.sum() == 6 * 8
  assert len(one.program.programs) == 2
  assert_no_rank_is_rounding(one, steps=6)
  helpers.assert_trees_close(state1.params, state2.params, 2e-5)
  np.testing.assert_allclose(metrics1['loss'], metrics2['loss'], rtol=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_every_bucket_prunes_its_own():
  """Epochs of a bucket end on their own; the memory is of all examples."""
  fields = {
    'steps': 200,
    'selection.rule': 'signed_margin',
    'selection.memory': True,
    'selection.sampler': 'prune',
    'selection.drop': 0.8,
    'selection.tail': 0.0,
    'selection.log_counts': True,
    'pool_size': 640,
    'optimizer.name': 'sgd',
    'optimizer.learning_rates': (0.01,),
  }
  states = [setup(devices=n, **fields).run(90)[0] for n in (1, 2)]
  one, two = states
  np.testing.assert_array_equal(one.counts, two.counts)
  assert one.counts.sum() == 90 * 8
  seen = np.isfinite(one.memory.examples.scores)
  np.testing.assert_array_equal(seen, one.counts > 0)
  for (_, rows), bucket in zip(
    dataset().buckets['train'], one.sampler.buckets, strict=True
  ):
    easy = int(len(rows) * 0.5)
    assert int(bucket.epoch) >= 1
    assert int(bucket.count) == len(rows) - easy + int(0.2 * easy + 1e-6)
    order = np.asarray(bucket.order)[: int(bucket.count)]
    assert len({*order.tolist()}) == int(bucket.count)


@pytest.mark.slow
def test_the_weights_of_every_bucket_have_the_mean_1():
  """Epochs of the buckets differ in length, and their turns do not.

  So the weights of a bucket's epoch have the mean 1. Without that, a bucket
  that drops more would get a larger gradient.
  """
  this = setup(**{
    'steps': 200,
    'selection.rule': 'loss',
    'selection.memory': True,
    'selection.sampler': 'prune',
    'selection.threshold': 'mean',
    'selection.drop': 0.8,
    'selection.tail': 0.0,
    'selection.unbiased': True,
    'pool_size': 640,
    'optimizer.name': 'sgd',
    'optimizer.learning_rates': (0.01,),
  })  # fmt: skip
  state, _ = this.run(90)
  kept = []
  for (_, rows), bucket in zip(
    dataset().buckets['train'], state.sampler.buckets, strict=True
  ):
    count = int(bucket.count)
    weights = np.asarray(bucket.weights)[:count]
    np.testing.assert_allclose(weights.mean(), 1, 1e-6)
    hard, easy = np.unique(weights.round(4))
    np.testing.assert_allclose(hard, count / len(rows), 1e-3)
    assert 4 < easy / hard < 10
    kept.append(count / len(rows))
  assert len({*kept}) > 1


@pytest.mark.long
@pytest.mark.slow
def test_a_buffer_keeps_sentences_whole():
  this = setup(
    **{'selection.reuse': 2, 'selection.log_counts': True, 'pool_size': 32}
  )
  pool = whole_pool(this, 0)
  scores = score_pool(this, pool)
  state, _ = this.run(2)
  order = np.argsort(scores)[:16]
  chosen = np.sort(pool['index'][order])
  np.testing.assert_array_equal(np.flatnonzero(state.counts), chosen)
  kept, width = state.buffer['inputs'], pool['inputs'].shape[1]
  assert kept.shape == (16, 48, 2)
  np.testing.assert_array_equal(kept[:, :width], pool['inputs'][order])
  assert not kept[:, width:].any()


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 4])
def test_an_evaluation_in_buckets_is_that_of_the_whole(devices):
  this = setup(devices=devices, **{'selection.rule': 'uniform'})
  spec = dataclasses.replace(
    this.spec, dataset=dataclasses.replace(dataset(), f1=True)
  )
  splits = dataset().chunks(this.devices, ('test', 'validation'), 64)
  evaluator = evaluation.Evaluator(spec, splits)
  for name in ('test', 'validation'):
    split = dataset().splits[name]
    apply = jax.jit(functools.partial(spec.model.apply, train=False))
    inputs = dataset().prepare(split['inputs'])
    logits, _ = apply({'params': this.first.params}, inputs)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    found = evaluator(name, this.first)
    predicted = log_p.argmax(axis=1)
    assert found['count'] == len(predicted)
    assert found['accuracy'] == pytest.approx(
      sklearn_metrics.accuracy_score(split['label'], predicted)
    )
    assert found['f1'] == pytest.approx(
      sklearn_metrics.f1_score(split['label'], predicted)
    )
    losses = -log_p[np.arange(len(predicted)), split['label']]
    assert found['loss'] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize('positive', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('devices', [1, *slow(4)])
def test_f1_is_of_the_whole_split(devices, positive):
  """Against scikit-learn, on random labels and predictions."""
  rng = np.random.default_rng(3)
  label = (rng.random(101) < positive).astype(np.int32)
  predicted = (rng.random(101) < 0.5).astype(np.int32)
  this = setup(devices=devices, **{'selection.rule': 'uniform'})

  class Told:
    """A model that predicts what its inputs say."""

    @staticmethod
    def apply(variables, inputs, train):
      del variables, train
      return jax.nn.one_hot(inputs['ids'][:, 0], 2), None

  inputs = np.zeros((101, 4, 2), np.uint16)
  inputs[:, 0, 0] = predicted
  told = dataclasses.replace(
    dataset(), splits={'test': {'inputs': inputs, 'label': label}}, f1=True
  )
  splits = told.chunks(this.devices, ('test',), 16, whole=True)
  spec = dataclasses.replace(this.spec, dataset=told, model=Told)
  found = evaluation.Evaluator(spec, splits)('test', this.first)
  expected = sklearn_metrics.f1_score(label, predicted, zero_division=0)
  assert found['f1'] == pytest.approx(expected)
  assert found['accuracy'] == pytest.approx(np.mean(label == predicted))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_is_analyzed_and_exported(tmp_path):
  def run(workdir, steps):
    config = helpers.small_config(**{**FIELDS, 'steps': steps})
    return loop.train(config, str(workdir), log=lambda line: None)

  whole = run(tmp_path / 'whole', 20)
  run(tmp_path / 'parts', 10)
  resumed = run(tmp_path / 'parts', 20)
  assert resumed['test'] == whole['test']
  assert resumed['validation'] == whole['validation']
  folder = analyze.analyze(
    str(tmp_path / 'parts'),
    layer_names=('embeddings', 'features'),
    log=lambda line: None,
  )
  assert len((folder / 'test.csv').read_text().splitlines()) == 1001
  out = tmp_path / 'model'
  export.main([f'--workdir={tmp_path / "parts"}', f'--out={out}'])
  assert bert_weights.describe(out)['layers'] == 1
  state, _ = restored(tmp_path / 'parts')
  weights = bert_weights.read(out, {'params': state.params}, 'bert1_16_2')
  flat = traverse_util.flatten_dict({'params': state.params})
  assert {*weights} == {*flat}
  for place, x in weights.items():
    np.testing.assert_array_equal(x, flat[place])


def restored(workdir):
  """The last checkpoint of a run of the tests' model."""
  with contextlib.closing(Checkpoints(Workdir(workdir))) as checkpoints:
    return checkpoints.restore(setup(**{'selection.rule': 'mms'}).first)


@pytest.mark.slow
def test_only_a_bert_is_exported(tmp_path):
  config = helpers.small_config(steps=10)
  loop.train(config, str(tmp_path), log=lambda line: None)
  with pytest.raises(SystemExit, match=r"model.name='cnn'.*a BERT"):
    export.main([f'--workdir={tmp_path}', f'--out={tmp_path / "out"}'])
  assert not (tmp_path / 'out').exists()


def test_a_falling_rate_cannot_be_prolonged():
  def saved(steps, **fields):
    config = helpers.small_config(**{**FIELDS, 'steps': steps, **fields})
    return config_lib.as_json(config)

  assert not config_lib.differences(saved(10), saved(20))
  falls = {'optimizer.decay': 'linear'}
  (line,) = config_lib.differences(saved(10, **falls), saved(20, **falls))
  assert line == 'steps: 10 -> 20'


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model.name': 'cnn'}, r"model.name='cnn'.*reads sentences"),
    ({'selection.proxy': 'cnn'}, r"selection.proxy='cnn'.*reads sentences"),
    ({'data.augmentations': ('flip',)}, r'data.augmentations.*images'),
    ({'data.buckets': (24, 16)}, r'data.buckets=\(24, 16\).*increasing'),
    (
      {'data.buckets': (48,)},
      r'data.buckets=\(48,\).*below data.max_length=48',
    ),
    ({'data.max_length': 4}, r'data.max_length=4.*at least 5'),
    ({'data.max_length': 513}, r'data.max_length=513.*at most 512'),
    ({'model.pretrained': ''}, r"model.pretrained=''.*not empty"),
    ({'model.name': 'bert1_16_3'}, r"model.name='bert1_16_3'"),
    ({'attack.name': 'fgsm', 'attack.epsilons': (0.1,)}, r'attack.name'),
    ({'data.name': 'digits'}, r"model.name='bert1_16_2'.*reads images"),
    ({'optimizer.warmup': -1}, r'optimizer.warmup=-1'),
    ({'optimizer.decay': 'power'}, r"optimizer.decay='power'"),
    (
      {'optimizer.decay': 'linear', 'optimizer.warmup': 20},
      r'optimizer.warmup=20.*below steps=20',
    ),
  ],
)
def test_what_does_not_fit_is_refused(fields, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    helpers.small_config(**{**FIELDS, **fields})


def test_glue_needs_a_vocabulary():
  config = helpers.small_config(**{**FIELDS, 'data.name': 'glue/rte'})
  with pytest.raises(config_lib.ConfigError, match='vocabulary=None'):
    loop.train(config, '/nonexistent', log=lambda line: None)


def test_a_large_margin_at_the_input_lists_the_layers(tmp_path):
  config = helpers.small_config(
    **{**FIELDS, 'large_margin.weight': 1.0, 'mmr.alpha': 0.0}
  )
  with pytest.raises(config_lib.ConfigError, match=r'embeddings.*features'):
    loop.train(config, str(tmp_path / 'run'), log=lambda line: None)
