"""Files from elsewhere hold numbers: whatever else is in them is not run."""

import ast
import pickle
import sys
import types

import numpy as np
import pytest

from margin_jax.data import cache
from margin_jax.models import vgg, weights
from tests import helpers

# What runs the code that a file holds, or writes where an archive says.
FORBIDDEN_MODULES = {
  *('pickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'),
  *('tarfile', 'zipfile'),
}
PUBLISHED = vgg.MODELS['vgg16'].published
FORBIDDEN_CALLS = {'eval', 'exec', 'unpack_archive', 'extractall'}


class Payload:
  """Writes a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, 'w')


def test_the_payload_would_run(tmp_path):
  pickle.loads(pickle.dumps(Payload(tmp_path / 'written'))).close()
  assert (tmp_path / 'written').exists()


@pytest.mark.parametrize('suffix', ['.pth', '.bin'])
def test_pytorchs_reader_is_asked_for_weights_only(
  tmp_path, monkeypatch, suffix
):
  asked = {}

  def load(path, **arguments):
    asked.update(arguments)
    return {}

  monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(load=load))
  path = tmp_path / f'weights{suffix}'
  path.touch()
  weights.read_state(str(path), PUBLISHED)
  assert asked == {'map_location': 'cpu', 'weights_only': True}


def test_code_in_pytorchs_weights_is_not_run(tmp_path):
  torch = pytest.importorskip('torch')
  path, written = tmp_path / 'weights.pth', tmp_path / 'written'
  torch.save({'features.0.weight': Payload(written)}, path)
  with pytest.raises(weights.PretrainedError, match='cannot be read'):
    weights.read_state(str(path), PUBLISHED)
  assert not written.exists()


def test_code_in_a_cache_file_is_not_run(tmp_path):
  path, written = tmp_path / 'cache.npz', tmp_path / 'written'
  inputs = np.empty(1, object)
  inputs[0] = Payload(written)
  with path.open('wb') as file:
    np.savez(
      file,
      dataset=np.array('dataset'),
      inputs=inputs,
      label=np.zeros(1, np.int32),
    )
  assert cache.read(path, 'dataset', 1, np.dtype(np.uint8)) is None
  assert not written.exists()


def test_nothing_in_the_package_can_run_what_it_reads():
  for path in (helpers.ROOT / 'margin_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        names = {(node.module or '').split('.')[0]}
      elif isinstance(node, ast.Call):
        function = node.func
        called = getattr(function, 'attr', getattr(function, 'id', None))
        assert called not in FORBIDDEN_CALLS, (path, node.lineno)
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        allowed = getattr(words.get('allow_pickle'), 'value', False)
        assert allowed is False, (path, node.lineno)
        continue
      else:
        continue
      assert not names & FORBIDDEN_MODULES, (path, node.lineno)
