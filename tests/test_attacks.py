"""FGSM and PGD where the worst perturbation is known, and in an evaluation."""

import csv
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax.train import attacks, evaluation, loop
from margin_jax.train import setup as setup_lib
from tests import helpers
from tests.helpers import slow

PGD = functools.partial(attacks.pgd, steps=10)
each_attack = pytest.mark.parametrize('attack', [attacks.fgsm, PGD])


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
  assert [*result['attack']] == ['pgd 0.05']
  assert result['seconds'] == before['seconds']
  assert result['test'] == before['test']
  # Ten small steps are at least as strong as one.
  weak = before['attack']['fgsm 0.05']
  assert result['attack']['pgd 0.05']['loss'] > weak['loss']
  assert any('test under pgd 0.05' in line for line in lines)
  again = loop.train(config, workdir, log=lines.append)
  assert again == result
  assert 'complete' in lines[-1]
  # Those of before have made room.
  with pathlib.Path(workdir, 'eval.csv').open(newline='') as file:
    splits = [row['split'] for row in csv.DictReader(file)]
  assert splits[-1] == 'test under pgd 0.05'
  assert sum(split.startswith('test under') for split in splits) == 1


@pytest.mark.parametrize('devices', [1, *slow(4)])
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


def test_attacks_are_built_from_the_config():
  make = functools.partial(helpers.small_config, **{'attack.epsilons': (0.1,)})
  assert setup_lib.make_attack(helpers.small_config()) is None
  assert setup_lib.make_attack(make(**{'attack.name': 'fgsm'})) is attacks.fgsm
  found = setup_lib.make_attack(
    make(**{'attack.name': 'pgd', 'attack.steps': 3})
  )
  assert found.keywords == {'steps': 3}
