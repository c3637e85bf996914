"""FGSM and PGD where the worst perturbation is known, and in an evaluation."""

import csv
import functools
import pathlib
import shutil
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from margin_jax import data, register_dataset
from margin_jax.config import ConfigError
from margin_jax.train import attacks, evaluation, loop, runs
from margin_jax.train import setup as setup_lib
from margin_jax.train.checkpoints import Checkpoints
from margin_jax.trained import Trained
from tests import helpers, references
from tests.custom import small_network

PGD = functools.partial(attacks.pgd, steps=10)
IFGSM = functools.partial(attacks.ifgsm, steps=10)
each_attack = pytest.mark.parametrize('attack', [attacks.fgsm, IFGSM, PGD])


def linear(x):
  return x @ jnp.array([[1.0, -1.0], [-2.0, 2.0], [0.0, 0.0]])


@each_attack
def test_on_a_linear_model_the_attack_is_the_corner_of_the_ball(attack):
  inputs = jnp.array([[0.5, 0.5, 0.5], [0.05, 0.99, 0.5]])
  found = attack(linear, inputs, jnp.array([0, 1]), 0.1)
  expected = [[0.4, 0.6, 0.5], [0.15, 0.89, 0.5]]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  wide = attack(linear, inputs, jnp.array([0, 1]), 0.6, bounds=(0.0, 1.0))
  np.testing.assert_allclose(wide, [[0, 1, 0.5], [0.65, 0.39, 0.5]], atol=1e-6)


@each_attack
def test_large_margins_do_not_hide_the_gradient(attack):
  """The cross-entropy's is 0 in float32 for gaps of a hundred."""
  inputs = jax.random.uniform(jax.random.key(0), (20, 3))
  labels = jnp.argmax(linear(inputs), axis=1)
  found = attack(linear, inputs, labels, 0.1)
  scaled = attack(lambda x: 1000 * linear(x), inputs, labels, 0.1)
  np.testing.assert_allclose(scaled, found, atol=1e-6)
  assert np.abs(np.asarray(found - inputs)).max() > 0.09


@pytest.mark.parametrize(
  ('attack', 'steps', 'step_size'),
  [
    (attacks.fgsm, 1, 0.3),
    (functools.partial(attacks.ifgsm, steps=6), 6, 0.3 / 6),
    (functools.partial(attacks.ifgsm, steps=5, step_size=0.07), 5, 0.07),
    (functools.partial(attacks.pgd, steps=6), 6, 2.5 * 0.3 / 6),
  ],
)
def test_attacks_agree_with_oracle(attack, steps, step_size):
  weights, inputs, labels = references.random_network(seed=2, batch=12)
  bounds = (-1.5, 1.0)
  inputs = np.clip(inputs, *bounds)
  arrays = jax.tree.map(jnp.asarray, weights)
  found = attack(
    lambda x: small_network(arrays, x), inputs, labels, 0.3, bounds=bounds
  )
  expected = [
    references.attacked(weights, x, y, 0.3, steps, step_size, bounds)
    for x, y in zip(inputs, labels, strict=True)
  ]
  np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
  assert len({*np.round(np.abs(found - inputs).ravel(), 4)}) > 2


def test_attacks_of_no_step_are_refused():
  with pytest.raises(ValueError, match='steps must be at least 1, got 0'):
    attacks.pgd(linear, jnp.ones((1, 3)), jnp.array([0]), 0.1, steps=0)


def test_pgd_finds_what_one_step_overshoots():
  """The loss peaks inside the ball: at x = 0.3 from 0."""

  def logits_fn(x):
    return jnp.concatenate([8 * (x - 0.3) ** 2, jnp.zeros_like(x)], axis=1)

  inputs, labels = jnp.zeros((1, 1)), jnp.array([0])
  bounds = (-1.0, 1.0)
  once = attacks.fgsm(logits_fn, inputs, labels, 1.0, bounds=bounds)
  often = attacks.pgd(
    logits_fn, inputs, labels, 1.0, steps=40, step_size=0.02, bounds=bounds
  )
  np.testing.assert_allclose(once, [[1.0]])
  np.testing.assert_allclose(often, [[0.3]], atol=0.03)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run whose test split was attacked."""
  workdir = str(tmp_path_factory.mktemp('attacked'))
  config = helpers.small_config(
    **{'attack.name': 'fgsm', 'attack.epsilons': (0.05, 0.2), 'steps': 60}
  )
  return workdir, loop.train(config, workdir, log=lambda line: None)


@pytest.mark.slow
def test_a_run_reports_the_attack(trained):
  _, result = trained
  clean = result['test']
  weak, strong = (result['attack'][f'fgsm {e}'] for e in ('0.05', '0.2'))
  assert clean['accuracy'] > weak['accuracy'] > strong['accuracy']
  assert clean['loss'] < weak['loss'] < strong['loss']
  assert clean['count'] == strong['count'] == 360


@pytest.mark.slow
def test_a_complete_run_can_be_attacked_otherwise(trained):
  workdir, before = trained
  config = helpers.small_config(
    **{'attack.name': 'pgd', 'attack.epsilons': (0.05,), 'steps': 60}
  )
  lines = []
  result = loop.train(config, workdir, log=lines.append)
  assert [*result['attack']] == ['fgsm 0.05', 'fgsm 0.2', 'pgd 0.05']
  assert result['seconds'] == before['seconds']
  assert result['test'] == before['test']
  # Ten small steps are at least as strong as one.
  weak = before['attack']['fgsm 0.05']
  assert result['attack']['pgd 0.05']['loss'] > weak['loss']
  assert any('test under pgd 0.05' in line for line in lines)
  again = loop.train(config, workdir, log=lines.append)
  assert again == result
  assert 'complete' in lines[-1]
  stronger = helpers.small_config(
    **{
      'attack.name': 'pgd', 'attack.epsilons': (0.05,), 'attack.steps': 40,
      'steps': 60,
    }
  )  # fmt: skip
  last = loop.train(stronger, workdir, log=lines.append)
  # Each knows how it was made, so that none is made twice.
  assert last['attack']['pgd 0.05']['config'] == {
    'attack.steps': 40, 'attack.step_size': None, 'attack.source': None,
  }  # fmt: skip
  first = {'attack.name': 'fgsm', 'attack.epsilons': (0.2,), 'steps': 60}
  config = helpers.small_config(**first)
  assert loop.train(config, workdir, log=lines.append) == last
  assert 'complete' in lines[-1]
  for name in ('fgsm 0.05', 'fgsm 0.2'):
    assert last['attack'][name] == before['attack'][name]
  assert last['attack']['pgd 0.05'] != result['attack']['pgd 0.05']
  with pathlib.Path(workdir, 'eval.csv').open(newline='') as file:
    splits = [row['split'] for row in csv.DictReader(file)]
  assert [x for x in splits if x.startswith('test under')] == [
    'test under fgsm 0.05', 'test under fgsm 0.2', 'test under pgd 0.05',
  ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 4])
def test_an_evaluation_under_attack_equals_its_parts(devices):
  this = helpers.Setup(devices=devices, **{'selection.rule': 'uniform'})
  split = this.dataset.splits['test']
  evaluator = evaluation.Evaluator(
    this.spec,
    this.dataset.chunks(this.devices, ('test',), 101),
    attacks.fgsm,
  )
  params = this.first.params

  def logits_fn(pixels):
    prepared = this.dataset.prepare(pixels)
    return this.spec.model.apply({'params': params}, prepared, train=False)[0]

  pixels = jnp.asarray(split['inputs'], jnp.float32)
  moved = attacks.fgsm(
    logits_fn, pixels, split['label'], 0.1 * 255, bounds=(0, 255)
  )
  assert np.abs(np.asarray(moved - pixels)).max() == pytest.approx(25.5)
  accuracy = float(np.mean(np.argmax(logits_fn(moved), 1) == split['label']))
  found = evaluator('test', this.first, 0.1)
  assert found['accuracy'] == pytest.approx(accuracy, abs=1 / 360)
  assert evaluator('test', this.first)['loss'] < found['loss']


@pytest.mark.slow
def test_a_black_box_attack_equals_its_parts():
  """Made on another network, with a normalization of its own."""
  fields = {'selection.rule': 'uniform'}
  this, other = helpers.Setup(**fields), helpers.Setup(seed=1, **fields)
  prepare = data.normalizer(np.zeros((1, 8, 8, 1), np.uint8), 'unit')
  source = Trained(
    model=other.spec.model,
    variables={'params': other.first.params, 'batch_stats': {}},
    config=other.config,
    step=0,
    prepare=prepare,
    encode=None,
    input_shape=(8, 8, 1),
    input_dtype=np.dtype(np.uint8),
    class_names=None,
  )
  evaluator = evaluation.Evaluator(
    this.spec,
    this.dataset.chunks(this.devices, ('test',), 101),
    functools.partial(attacks.ifgsm, steps=2),
    source,
  )
  split = this.dataset.splits['test']
  pixels = jnp.asarray(split['inputs'], jnp.float32)

  def logits_fn(params, prepare, x):
    model = this.spec.model
    return model.apply({'params': params}, prepare(x), train=False)[0]

  def loss_on(*source):
    seen = functools.partial(logits_fn, *source)
    moved = pixels
    if source:
      moved = attacks.ifgsm(
        seen, pixels, split['label'], 51.0, steps=2, bounds=(0, 255)
      )
    logits = logits_fn(this.first.params, this.dataset.prepare, moved)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, split['label']
    )
    return float(losses.mean())

  found = evaluator('test', this.first, 0.2)['loss']
  assert found == pytest.approx(loss_on(other.first.params, prepare), rel=1e-4)
  assert found < loss_on(this.first.params, this.dataset.prepare)
  clean = evaluator('test', this.first)['loss']
  assert clean == pytest.approx(loss_on(), rel=1e-4)


def run_small(workdir, **fields):
  return loop.train(
    helpers.small_config(**{'selection.rule': 'uniform', **fields}),
    str(workdir),
    log=lambda line: None,
  )


@pytest.mark.slow
def test_accuracy_falls_and_farther_where_the_attack_sees_the_network(tmp_path):
  """IFGSM is stronger than FGSM; examples of another network are weaker."""
  long = {'steps': 150, 'batch_size': 16, 'optimizer.learning_rates': (0.02,)}
  run_small(tmp_path / 'other', seed=1, **long, **{'model.name': 'mnist_cnn'})

  def attacked(**fields):
    fields = {f'attack.{name}': value for name, value in fields.items()}
    epsilons = {'attack.epsilons': (0.05, 0.15)}
    result = run_small(tmp_path / 'run', **long, **epsilons, **fields)
    accuracies = {k: x['accuracy'] for k, x in result['attack'].items()}
    return result['test']['accuracy'], accuracies

  clean, fgsm = attacked(name='fgsm')
  _, ifgsm = attacked(name='ifgsm', steps=5)
  source = str(tmp_path / 'other')
  _, black_box = attacked(name='ifgsm', steps=5, source=source)
  assert clean > 0.8
  assert [*black_box] == [
    'fgsm 0.05', 'fgsm 0.15', 'ifgsm 0.05', 'ifgsm 0.15',
    'black-box ifgsm 0.05', 'black-box ifgsm 0.15',
  ]  # fmt: skip
  assert clean > fgsm['fgsm 0.05'] > fgsm['fgsm 0.15']
  assert ifgsm['ifgsm 0.15'] < fgsm['fgsm 0.15']
  for epsilon in (0.05, 0.15):
    assert ifgsm[f'ifgsm {epsilon}'] < black_box[f'black-box ifgsm {epsilon}']
  assert clean > black_box['black-box ifgsm 0.05']
  rows = helpers.read_csv(tmp_path / 'run' / 'eval.csv')
  assert rows[-1]['split'] == 'test under black-box ifgsm 0.15'


@pytest.mark.slow
def test_a_source_that_does_not_fit_is_one_line(tmp_path, monkeypatch):
  """And nothing is compiled, and no workdir is made."""
  fields = {'attack.name': 'fgsm', 'attack.epsilons': (0.1,)}
  run_small(tmp_path / 'digits', steps=1)
  arrays = np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 2
  with unittest.mock.patch.dict(data.REGISTERED):
    register_dataset('tiny_images', train=arrays, test=arrays)
    tiny = {'data.name': 'tiny_images', 'data.validation_examples': 0}
    run_small(tmp_path / 'tiny', steps=1, eval_batch_size=40, **tiny)
  broken = tmp_path / 'broken'
  shutil.copytree(tmp_path / 'digits', broken)
  for path in (broken / 'checkpoints' / '1' / 'info').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-30])
  foreign = tmp_path / 'foreign'
  (foreign / 'checkpoints' / '7').mkdir(parents=True)
  for source, words in (
    ('nowhere', 'does not exist'),
    ('foreign', 'attack.source='),
    ('broken', 'cannot be used'),
    ('tiny', "a run on data.name='digits', but that run is on 'tiny_images'"),
    ('run', "another run's workdir"),
  ):
    path = str(tmp_path / source)
    with pytest.raises(ConfigError) as caught:
      run_small(tmp_path / 'run', steps=1, **fields, **{'attack.source': path})
    message = str(caught.value)
    assert message.startswith(f'attack.source={path!r}')
    assert words in message
    assert '\n' not in message
    assert not (tmp_path / 'run').exists()

  def load(workdir):
    del workdir
    return types.SimpleNamespace(input_shape=(4, 4, 1))

  monkeypatch.setattr(runs.trained_lib, 'load', load)
  fields['attack.source'] = str(tmp_path / 'digits')
  with monkeypatch.context() as patch:
    saved = {'data.name': 'digits', 'data.digest': 'of others'}
    patch.setattr(Checkpoints, 'info', lambda *_: {'config': saved})
    with pytest.raises(ConfigError, match='with the same examples, but'):
      run_small(tmp_path / 'run', steps=1, **fields)
  words = r'with inputs of \(8, 8, 1\), but that run has \(4, 4, 1\)'
  with pytest.raises(ConfigError, match=words):
    run_small(tmp_path / 'run', steps=1, **fields)


def test_attacks_are_built_from_the_config():
  make = functools.partial(helpers.small_config, **{'attack.epsilons': (0.1,)})
  assert setup_lib.make_attack(helpers.small_config()) is None
  assert setup_lib.make_attack(make(**{'attack.name': 'fgsm'})) is attacks.fgsm
  found = setup_lib.make_attack(
    make(**{'attack.name': 'pgd', 'attack.steps': 3})
  )
  assert (found.func, found.keywords) == (attacks.pgd, {'steps': 3})
  fields = {'attack.name': 'ifgsm', 'attack.steps': 4, 'attack.step_size': 0.02}
  found = setup_lib.make_attack(make(**fields))
  assert found.func is attacks.ifgsm
  assert found.keywords == {'steps': 4, 'step_size': pytest.approx(5.1)}
