"""What a bad config costs: a clear line, and nothing else."""

import shutil

import jax
import pytest

from margin_jax import config as config_lib
from margin_jax.train import loop
from tests import helpers
from tests.bad_configs import BAD, BAD_TOGETHER
from tests.helpers import make_config

CASES = [({name: value}, name) for name, value, _ in BAD]
CASES += [(fields, next(iter(fields))) for fields, _ in BAD_TOGETHER]


def message(fields, workdir) -> str:
  """The error of a run with these fields."""
  with pytest.raises(config_lib.ConfigError) as caught:
    loop.train(make_config(fields), str(workdir), log=lambda line: None)
  return str(caught.value)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished')
  loop.train(helpers.small_config(steps=5), str(workdir), log=lambda line: None)
  return workdir


def contents(folder):
  """Every file and what is in it."""
  paths = (path for path in folder.rglob('*') if path.is_file())
  return {path: path.read_bytes() for path in paths}


def test_a_bad_config_compiles_nothing_and_touches_nothing(finished, tmp_path):
  """All of them, in a workdir with a checkpoint."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  before = contents(workdir)
  compiled = []

  def listener(name, seconds, **_):
    del seconds
    if 'backend_compile' in name:
      compiled.append(name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  for fields, name in CASES:
    text = message(fields, workdir)
    assert text.startswith(f'{name}={fields[name]!r} is '), text
    assert '\n' not in text
  jax.jit(lambda x: x + len(CASES))(1.0)
  assert len(compiled) == 1  # the listener hears the one above, and no other
  assert contents(workdir) == before
  assert len(CASES) >= 60
