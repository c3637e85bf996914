"""What the trainer says of bad configs: docs/bad_inputs.md, and what it costs.

`python -m tests.faults.test_bad_inputs` writes the table anew.
"""

import pathlib
import shutil

import jax
import pytest

from margin_jax import config as config_lib
from margin_jax.train import loop
from tests import helpers
from tests.bad_configs import BAD, BAD_TOGETHER
from tests.helpers import make_config

TABLE = pathlib.Path(__file__).parents[2] / 'docs' / 'bad_inputs.md'
CASES = [({name: value}, name) for name, value, _ in BAD]
CASES += [(fields, next(iter(fields))) for fields, _ in BAD_TOGETHER]
HEAD = """# What the trainer says of bad configs

Each row is the default config with these fields; the run stops before anything
is compiled, and the workdir stays as it is (`tests/faults/test_bad_inputs.py`,
which also writes this file).

| fields | message |
|---|---|
"""


def message(fields, workdir) -> str:
  """The error of a run with these fields."""
  with pytest.raises(config_lib.ConfigError) as caught:
    loop.train(make_config(fields), str(workdir), log=lambda line: None)
  return str(caught.value)


def row(fields, text) -> str:
  """Of the table."""
  shown = ', '.join(f'{name}={value!r}' for name, value in fields.items())
  cells = (f'`{x}`'.replace('|', '\\|') for x in (shown, text))
  return '| ' + ' | '.join(cells) + ' |\n'


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
  """All of them, in a workdir with a checkpoint; and the table is current."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  before = contents(workdir)
  compiled = []

  def listener(name, seconds, **_):
    del seconds
    if 'backend_compile' in name:
      compiled.append(name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  table = HEAD
  for fields, name in CASES:
    text = message(fields, workdir)
    assert text.startswith(f'{name}={fields[name]!r} is '), text
    assert '\n' not in text
    table += row(fields, text)
  jax.jit(lambda x: x + len(CASES))(1.0)
  assert len(compiled) == 1  # the listener hears the one above, and no other
  assert contents(workdir) == before
  assert len(CASES) >= 60
  assert TABLE.read_text() == table


if __name__ == '__main__':
  rows = [row(fields, message(fields, '/nowhere')) for fields, _ in CASES]
  TABLE.write_text(HEAD + ''.join(rows))
