"""What rules, losses, models and configs of the user's own do wrong."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import margin_jax
from margin_jax import config_files, cpu
from margin_jax.config import ConfigError
from margin_jax.train import loop
from margin_jax.user_code import UserCodeError
from tests import helpers
from tests.test_package import ROOT


def raises(seen):
  return helper_of_mine(seen.labels)


def helper_of_mine(labels):
  raise RuntimeError('not today')


BAD_RESULTS = {
  'shape': (lambda seen: seen.logits, r'\(\d+,\), got \(\d+, 10\)'),
  'integers': (lambda seen: seen.labels, 'floating numbers, got int32'),
  'complex': (lambda seen: 1j * seen.logits[:, 0], 'numbers, got complex64'),
  'pair': (lambda seen: (seen.logits, 1.0), 'must return one array'),
  'none': (lambda seen: None, 'must return one array, got None'),
  'text': (lambda seen: 'hello', 'failed.*: TypeError'),
  'function': (lambda seen: seen.logits.max, 'failed.*: TypeError'),
}


@pytest.mark.parametrize('kind', ['rule', 'memory', 'loss', 'risk'])
@pytest.mark.parametrize('result', BAD_RESULTS)
def test_a_result_that_fits_nothing_is_one_line(kind, result):
  function, message = BAD_RESULTS[result]
  if kind in ('rule', 'memory'):
    margin_jax.register_rule('mine', function)
    fields = {'selection.rule': 'mine', 'selection.memory': kind == 'memory'}
  else:
    margin_jax.register_loss('mine', function)
    fields = {'selection.rule': 'uniform', 'loss.risk': 'mine'}
    if kind == 'loss':
      fields = {'loss.names': ('mine',), 'loss.weights': (1.0,)}
  with pytest.raises(ConfigError, match=message) as caught:
    helpers.Setup(**fields)
  assert 'mine' in str(caught.value)


def test_what_a_rule_raises_is_shown_with_its_own_frames_alone():
  margin_jax.register_rule('mine', raises)
  with pytest.raises(UserCodeError) as caught:
    helpers.Setup(**{'selection.rule': 'mine'})
  message = str(caught.value)
  assert message.endswith(': RuntimeError: not today')
  assert f"selection.rule='mine' failed in {__file__}, line " in message
  frames = caught.value.frames
  assert 'return helper_of_mine(seen.labels)' in frames
  assert 'setup.py' not in frames
  assert 'site-packages' not in frames


def test_a_rule_that_reads_the_devices_or_the_whole_pool_is_tried():
  def rule(seen):
    assert seen.logits.shape == (32, 10)
    jax.lax.axis_index('device')
    return seen.logits[:, 0]

  margin_jax.register_rule('mine', rule, whole_pool=True)
  helpers.Setup(**{'selection.rule': 'mine', 'devices': 2})


class Integers(nn.Module):
  """Trains nothing: its logits are integers."""

  num_classes: int

  @nn.compact
  def __call__(self, inputs, *, train):
    features = nn.Dense(4)(inputs.reshape(inputs.shape[0], -1))
    logits = nn.Dense(self.num_classes, name='head')(features)
    return logits.astype(jnp.int32), features


class Raises(Integers):
  """Cannot be called."""

  def __call__(self, inputs, *, train):
    raise KeyError('stem')


def test_a_model_with_integer_logits_is_refused():
  margin_jax.register_model('mine', Integers)
  with pytest.raises(ConfigError, match='returns floating logits, not int32'):
    helpers.Setup(**{'model.name': 'mine'})


def test_a_model_that_raises_is_named():
  margin_jax.register_model('mine', Raises)
  with pytest.raises(
    UserCodeError, match=r"model.name='mine' failed in .*stem"
  ):
    helpers.Setup(**{'model.name': 'mine'})


CONFIG = """
import margin_jax
from margin_jax import config as config_lib


def rule(scored):
  return scored.nothing


def get_config():
  margin_jax.register_rule('mine', rule)
  config = config_lib.default()
  config.selection.rule = 'mine'
  return config
"""


@pytest.mark.slow
def test_the_command_shows_frames_and_a_closing_line(tmp_path):
  """And makes no workdir."""
  (tmp_path / 'mine.py').write_text(CONFIG)
  process = subprocess.run(
    [
      sys.executable, '-m', 'margin_jax.train',
      f'--config={tmp_path / "mine.py"}', f'--workdir={tmp_path / "run"}',
    ],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True, text=True,
  )  # fmt: skip
  *frames, last = process.stderr.strip().splitlines()
  assert process.returncode == 1
  assert last.startswith("error: selection.rule='mine' failed in")
  assert last.endswith("'Scored' object has no attribute 'nothing'")
  assert [x for x in frames if 'return scored.nothing' in x]
  assert not any('margin_jax/train' in x for x in frames)
  assert not (tmp_path / 'run').exists()


CONFIG_MISTAKES = {
  'config.data.augmentations.append("crop")': (
    r'line 8: data.augmentations is a tuple: write config\.data\.augmentations'
  ),
  '{}["missing"]': r"--config failed in .*, line 8: KeyError: 'missing'",
  'margin_jax.register_rule("mms", print)': (
    r"--config failed in .*, line 8: rule 'mms' already exists"
  ),
  'import nothing_of_that_name': r'line 8: ModuleNotFoundError: No module',
}


@pytest.mark.parametrize('line', CONFIG_MISTAKES)
def test_a_mistake_in_a_config_file_is_a_line(tmp_path, line):
  path = tmp_path / 'mine.py'
  path.write_text(
    f"""import margin_jax
from margin_jax import config as config_lib


def get_config():
  config = config_lib.default()

  {line}
  return config
"""
  )
  with pytest.raises(ConfigError, match=CONFIG_MISTAKES[line]) as caught:
    config_files.load(str(path))
  assert '\n' not in str(caught.value)
  if isinstance(caught.value, UserCodeError):
    assert 'config_files.py' not in caught.value.frames


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (AssertionError(), 'JAX finds none. If'),
    (RuntimeError('none here. (set JAX_PLATFORMS=...)'), 'none here. If'),
  ],
)
def test_a_platform_that_is_not_here_is_a_line(monkeypatch, error, reason):
  def fail():
    raise error

  assert jax.config.jax_platforms == 'cpu'
  monkeypatch.setattr(jax, 'default_backend', fail)
  with pytest.raises(cpu.BackendError, match=f"JAX_PLATFORMS='cpu' .*{reason}"):
    cpu.is_default()


def test_without_jit_nothing_can_be_trained(tmp_path):
  with (
    jax.disable_jit(),
    pytest.raises(ConfigError, match='JAX_DISABLE_JIT is set'),
  ):
    loop.train(helpers.small_config(), str(tmp_path))
