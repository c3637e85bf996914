"""The notebooks: as they are committed, and run from top to bottom, small."""

import ast
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import jax
import nbformat
import numpy as np
import pytest

import margin_jax
from margin_jax.models import bert, bert_weights
from tests.datasets import VOCAB, write_task
from tests.helpers import ROOT, long

NAMES = (
  'does_it_pay', 'glue_mmr', 'mmr_margins', 'quickstart', 'selection_tour',
  'tpu_pod',
)  # fmt: skip
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
ADDRESS = PROJECT['urls']['Repository']
REPOSITORY = ADDRESS.removeprefix('https://github.com/')
BADGE = (
  '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
  f'(https://colab.research.google.com/github/{REPOSITORY}/blob/main/colabs/'
)
INSTALL = '# @title Installs margin_jax'
BYTES = 1_500_000
# What conftest.py sets, and a user does not.
OURS = ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')


def read(name, folder=ROOT / 'colabs'):
  return nbformat.read(folder / f'{name}.ipynb', as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def install_cell(notebook):
  (cell,) = [c for c in code_cells(notebook) if c.source.startswith(INSTALL)]
  return cell


def outputs(notebook):
  return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook):
  return ''.join(x.get('text', '') for x in outputs(notebook))


def pictures(notebook):
  return [x for x in outputs(notebook) if 'image/png' in x.get('data', {})]


def run_small(name, folder, **environment):
  """The notebook after `python -m colabs.execute --small`."""
  home = folder / 'home'
  home.mkdir()
  inherited = {
    key: value
    for key, value in os.environ.items()
    if key not in (*OURS, 'DATA_DIR', 'WEIGHTS')
  }
  process = subprocess.run(
    [
      sys.executable,
      '-m',
      'colabs.execute',
      name,
      '--small',
      f'--out={folder}',
    ],
    cwd=ROOT,
    env={**inherited, 'HOME': str(home), **environment},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return read(name, folder)


def write_weights(folder):
  """A small BERT with random weights, in Hugging Face's layout."""
  model = bert.Bert(
    num_classes=2, vocab_size=len(VOCAB), layers=1, width=8, heads=2
  )  # fmt: skip
  ids = np.zeros((1, 8), np.int32)
  inputs = {'ids': ids, 'segments': ids, 'mask': ids}
  variables = model.init(jax.random.key(0), inputs, train=False)
  words = folder / 'words.txt'
  words.write_text('\n'.join(VOCAB) + '\n', encoding='utf-8')
  sizes = bert_weights.sizes_of(model)
  bert_weights.write(folder / 'weights', variables, sizes, words)
  return folder / 'weights'


def glue_environment(folder):
  """A task and weights for what glue_mmr skips without: RTE, in small."""
  write_task(folder, 'glue/rte', sizes=(80, 20, 16))
  weights = str(write_weights(folder))
  return {'DATA_DIR': str(folder), 'WEIGHTS': weights, 'MODEL': 'bert1_8_2'}


@pytest.mark.parametrize(
  'name',
  ['does_it_pay', 'quickstart', *long(
    'glue_mmr', 'mmr_margins', 'selection_tour', 'tpu_pod'
  )],
)  # fmt: skip
@pytest.mark.slow
def test_runs_from_top_to_bottom(name, tmp_path):
  """The cells' own assertions hold; the install cell has nothing to do."""
  environment = glue_environment(tmp_path) if name == 'glue_mmr' else {}
  found, committed = run_small(name, tmp_path, **environment), read(name)
  assert all(x.output_type != 'error' for x in outputs(found))
  assert install_cell(found).outputs == []
  assert len(pictures(found)) == len(pictures(committed))
  sources = [[cell.source for cell in x.cells] for x in (found, committed)]
  assert sources[0] == sources[1]
  if environment:
    lines = re.findall(
      r"^rte, alpha (\S+): \{'accuracy': [\d.]+\}$",
      printed(found),
      re.MULTILINE,
    )
    assert lines == ['0', '1e-05']
    assert 'skipped' not in printed(found)
    assert 'skipped' in printed(committed)


@pytest.mark.slow
def test_a_cell_that_fails_or_warns_is_reported_and_not_kept(tmp_path):
  from colabs import execute

  for line in ('assert 1 == 2', "import warnings; warnings.warn('odd')"):
    cells = [nbformat.v4.new_code_cell(line)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / 'bad.ipynb')
    script = (
      'import pathlib; from colabs import execute; '
      f'execute.HERE = pathlib.Path({str(tmp_path)!r}); '
      "execute.NAMES = ('bad',); execute.main(['bad', '--out=out'])"
    )
    process = subprocess.run(
      [sys.executable, '-c', script],
      cwd=tmp_path,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
    )
    assert process.returncode == 1
    assert process.stderr.startswith('error: bad: ')
    assert re.search('AssertionError|odd', process.stderr)
    assert not (tmp_path / 'out' / 'bad.ipynb').exists()
  assert set(execute.NAMES) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_is_committed_as_a_run_left_it(name):
  notebook = read(name)
  cells = code_cells(notebook)
  counts = [cell.execution_count for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  assert pictures(notebook)
  assert f"'margin_jax': '{margin_jax.__version__}'" in printed(notebook)
  for output in outputs(notebook):
    assert output.output_type in ('stream', 'display_data', 'execute_result')
    assert output.get('name') != 'stderr'
  # Of the machine that it was run on.
  assert not re.search(r'/tmp/|/root|/home/|File "', printed(notebook))
  assert (ROOT / 'colabs' / f'{name}.ipynb').stat().st_size < BYTES


@pytest.mark.parametrize('name', NAMES)
def test_opens_in_colab_and_installs_what_is_pinned(name):
  notebook = read(name)
  assert f'{BADGE}{name}.ipynb)' in notebook.cells[0].source
  install = install_cell(notebook).source
  assert install == install_cell(read('quickstart')).source
  assert install_cell(notebook).metadata['cellView'] == 'form'
  assert f"REPOSITORY = '{ADDRESS}'" in install
  assert f'{{REPOSITORY}}@v{margin_jax.__version__}' in install
  for cell in code_cells(notebook):
    assert 'absl' not in cell.source
    assert 'configs' not in cell.source  # which pip does not install
    assert cell.source == install or ADDRESS not in cell.source
  text = '\n'.join(x.source for x in notebook.cells)
  linked = re.findall(r'https://github.com/[^/]+/[^/\s)\'"]+', text)
  assert set(linked) == {ADDRESS}


@pytest.mark.parametrize('name', NAMES)
def test_says_in_words_what_its_pictures_show(name):
  texts = [x.metadata['image/png']['alt'] for x in pictures(read(name))]
  assert all(len(text) > 30 for text in texts)
  assert len(set(texts)) == len(texts)


@pytest.mark.parametrize('name', NAMES)
def test_shows_a_picture_within_four_cells(name):
  title, *cells = read(name).cells
  assert title.source.startswith('# ')
  assert pictures(nbformat.v4.new_notebook(cells=cells[:4]))


def test_asks_for_the_device_that_it_is_for():
  kinds = {name: read(name).metadata.get('accelerator') for name in NAMES}
  assert kinds == dict.fromkeys(NAMES) | {'glue_mmr': 'GPU', 'tpu_pod': 'TPU'}
  pod = read('tpu_pod')
  kaggle = f'https://kaggle.com/kernels/welcome?src={ADDRESS}/blob/main/colabs/'
  assert f'({kaggle}tpu_pod.ipynb)' in pod.cells[0].source
  assert pod.metadata['kaggle']['accelerator'] == 'tpuV5e8'


def test_does_it_pay_finds_a_clone_or_says_what_is_missing(
  tmp_path, monkeypatch
):
  """Its own function, where the package is installed without a clone."""
  (source,) = [
    cell.source
    for cell in code_cells(read('does_it_pay'))
    if 'def find_repository' in cell.source
  ]
  (function,) = [
    x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)
  ]
  package = types.SimpleNamespace(__file__=str(tmp_path / 'lib/x/__init__.py'))
  scope = {
    'REPOSITORY': str(tmp_path / 'nowhere'),
    'margin_jax': package,
    'pathlib': pathlib,
    'subprocess': subprocess,
  }
  exec(ast.unparse(function), scope)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConnectionError, match='nowhere, which cannot be reached'):
    scope['find_repository']()
  table = tmp_path / 'margin_jax/benchmarks/time_to_accuracy.py'
  table.parent.mkdir(parents=True)
  table.touch()
  assert scope['find_repository']() == tmp_path / 'margin_jax'
  monkeypatch.chdir(table.parent)  # within the clone
  assert scope['find_repository']() == tmp_path / 'margin_jax'


def requirement(package, python):
  """The version of a package that requirements.txt pins for a Python."""
  text = (ROOT / 'requirements.txt').read_text()
  sign = '<' if python < (3, 12) else '>='
  pattern = rf'^{package}==(\S+); python_version {sign} "3.12"$'
  (version,) = re.findall(pattern, text, re.MULTILINE)
  return version


def run_install(monkeypatch, success, python=(3, 12), there=()):
  """What the install cell runs until margin_jax can be imported.

  Args:
    success: part of the pip command that makes it importable.
    python: its version.
    there: names and versions of packages.
  """
  source = install_cell(read('quickstart')).source
  # IPython fills in variables as an f-string does.
  source = re.sub(r'[%!](pip|git) (.*)', r"ran.append(f'''\1 \2''')", source)
  ran = []

  def find_spec(name):
    """The folder of a clone is found too, without a file of origin."""
    done = any(x.startswith('pip') and success in x for x in ran)
    return types.SimpleNamespace(origin='__init__.py' if done else None)

  distributions = [
    types.SimpleNamespace(name=name, version=version) for name, version in there
  ]
  with monkeypatch.context() as patch:
    patch.setattr(importlib.util, 'find_spec', find_spec)
    patch.setattr(importlib.metadata, 'distributions', lambda: distributions)
    patch.setattr(sys, 'version_info', python)
    exec(compile(ast.parse(source), 'cell', 'exec'), {'ran': ran})
  return ran


def installs(monkeypatch, python, **there):
  """What the install cell asks pip for where there are these packages."""
  (line,) = run_install(monkeypatch, 'git+', python, there.items())
  package, *others = re.findall('"(.*?)"', line)
  address = f'git+{ADDRESS}@v{margin_jax.__version__}'
  assert package == f'margin-jax @ {address}'
  return others


def test_install_cell_falls_back_to_a_clone(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  clone = tmp_path / 'margin_jax'
  # Here `git clone` makes no folder.
  with pytest.raises(ConnectionError, match=f'^{ADDRESS} cannot be reached'):
    run_install(monkeypatch, str(clone))
  clone.mkdir()
  address, local = run_install(monkeypatch, str(clone))
  assert f'git+{ADDRESS}@' in address
  assert f'"{clone}" "jax==' in local


def test_install_cell_takes_jax_with_its_plugin_and_never_downgrades(
  monkeypatch,
):
  for python in ((3, 11), (3, 12), (3, 13)):
    jax, flax = (requirement(x, python) for x in ('jax', 'flax'))
    found = installs(monkeypatch, python)
    assert found == [f'jax=={jax}', f'flax=={flax}']
    found = installs(monkeypatch, python, libtpu='0.0.20', jax='0.7.2')
    assert found == [f'jax[tpu]=={jax}', f'flax=={flax}']
    gpu = {'jax_cuda12_plugin': '0.7.2', 'jax': '0.7.2'}
    found = installs(monkeypatch, python, **gpu)
    assert found == [f'jax[cuda12]=={jax}', f'flax=={flax}']
    found = installs(monkeypatch, python, libtpu='0.1', jax='0.12.1')
    assert found == ['jax[tpu]==0.12.1', 'flax>=0.12.12']
