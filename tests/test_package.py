"""What a newcomer meets: the README, the public names, the version check."""

import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

import margin_jax
from margin_jax import commands

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
REQUIREMENTS = (ROOT / 'requirements.txt').read_text()


def test_readme_loop_runs_as_printed():
  """It uses the three functions, and is short."""
  (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  used = set(re.findall(r'margin_jax\.(\w+)', code))
  assert used == {'mms_scores', 'select_lowest', 'mmr_penalty'}
  assert len(code.splitlines()) <= 15
  space = {}
  exec(compile(code, 'README.md', 'exec'), space)
  assert space['batch'].shape == (64,)
  assert space['penalty'] > 0


def test_readme_is_short():
  """What it is in a minute; two commands set it up."""
  lines = README.splitlines()
  assert 100 <= len(lines) <= 135
  commands = [x for x in lines if x.startswith('    ')]
  assert all(len(command) <= 84 for command in commands)
  assert sum('pip install -r' in command for command in commands) == 2


def test_readme_names_files_that_exist():
  paths = re.findall(
    r'configs/\w+\.py|(?:docs|benchmarks)/[\w./]*\w|[A-Z]+\.md', README
  )
  for path in paths:
    assert (ROOT / path).exists(), path


def test_importing_under_the_broken_jaxlib_warns(monkeypatch):
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.10.2')
  with pytest.warns(UserWarning, match=r'jaxlib 0\.10\.2 computes wrong'):
    importlib.reload(margin_jax)
  monkeypatch.undo()
  importlib.reload(margin_jax)


@pytest.mark.parametrize(
  ('version', 'warns'),
  [
    ((0, 9, 2), True),
    ((0, 10, 1), False),
    ((0, 11, 0), False),
    ((0, 11, 2), False),
    ((0, 12, 0, 1), False),
    ((0, 12, 1), True),
  ],
)
def test_importing_under_a_jax_that_is_not_tested_warns(
  version, warns, monkeypatch, recwarn
):
  text = '.'.join(map(str, version))
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: text)
  importlib.reload(margin_jax)
  monkeypatch.undo()
  (pinned, *_), (newest, *_) = (
    re.findall(rf'^jax==(\S+);.*{python}', REQUIREMENTS, re.MULTILINE)
    for python in ('< "3.12"', '>= "3.12"')
  )
  expected = f'is tested with jax {pinned} to {newest}, and this is jax'
  found = [x for x in recwarn if expected in str(x.message)]
  assert len(found) == warns
  importlib.reload(margin_jax)


def metadata():
  """pyproject.toml."""
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def build(copy, folder):
  """The path of a wheel, built of a copy of this repository."""
  ignored = shutil.ignore_patterns('__pycache__', '.*', 'tests')
  shutil.copytree(ROOT, copy, ignore=ignored)
  for file in copy.glob('**/*'):
    os.utime(file, (0, hash(str(copy)) % 10**9))  # as of another checkout
  subprocess.run(
    [sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', folder],
    cwd=copy,
    check=True,
    capture_output=True,
  )
  (path,) = folder.glob('*.whl')
  return path


@pytest.mark.slow
def test_two_builds_of_the_wheel_are_the_same_bytes(tmp_path):
  paths = [
    build(tmp_path / f'source{i}', tmp_path / f'wheel{i}') for i in range(2)
  ]
  one, other = (path.read_bytes() for path in paths)
  assert one == other


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_scripts(tmp_path):
  """Built without a network, of a copy: no build folder is left here."""
  path = build(tmp_path / 'source', tmp_path)
  assert path.name.startswith(f'margin_jax-{margin_jax.__version__}-py3')
  with zipfile.ZipFile(path) as wheel:
    names = {*wheel.namelist()}
    info = f'margin_jax-{margin_jax.__version__}.dist-info'
    scripts = wheel.read(f'{info}/entry_points.txt').decode()
    about = wheel.read(f'{info}/METADATA').decode()
  modules = {
    str(path.relative_to(ROOT)) for path in ROOT.glob('margin_jax/**/*.py')
  }
  assert names == {
    *modules,
    'margin_jax/paper.mplstyle',
    'margin_jax/py.typed',
    *(f'{info}/{x}' for x in ('METADATA', 'RECORD', 'WHEEL')),
    f'{info}/entry_points.txt',
    f'{info}/licenses/LICENSE',
  }
  for name, target in metadata()['project']['scripts'].items():
    assert f'{name} = {target}' in scripts
  assert 'Requires-Dist: jaxtyping' in about


@pytest.mark.slow
def test_what_is_called_from_python_defines_no_flags():
  """A user's own program may have a flag --workdir."""
  code = (
    'from absl import flags\n'
    'from margin_jax import analyze, compare, export, train\n'
    "assert not {'config', 'workdir'} & {*flags.FLAGS}\n"
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_scripts_name_functions():
  scripts = metadata()['project']['scripts']
  assert {*scripts} == {f'margin-{name}' for name in commands.MODULES}
  for target in scripts.values():
    module, function = target.split(':')
    assert callable(getattr(importlib.import_module(module), function))


def test_the_workflow_tests_every_python_of_the_metadata():
  text = (ROOT / '.github/workflows/tests.yml').read_text()
  matrix = yaml.safe_load(text)['jobs']['fast']['strategy']['matrix']
  prefix = 'Programming Language :: Python :: '
  classifiers = metadata()['project']['classifiers']
  named = [x.removeprefix(prefix) for x in classifiers if prefix in x]
  assert matrix['python'] == named


def test_pre_commit_runs_the_ruff_of_the_requirements():
  text = (ROOT / '.pre-commit-config.yaml').read_text()
  (hooks,) = yaml.safe_load(text)['repos']
  assert f'\nruff=={hooks["rev"].removeprefix("v")}\n' in REQUIREMENTS


def test_the_version_stands_in_one_place():
  """And the changelog begins with it."""
  places = [
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob('*.*'), *ROOT.glob('[!.]*/**/*.py'))
    if path.is_file()
    and re.search(
      rf'[\'" []{re.escape(margin_jax.__version__)}[\'"\s\]]', path.read_text()
    )
  ]
  assert sorted(places) == ['CHANGELOG.md', 'margin_jax/__init__.py']


def test_requirements_hold_what_the_package_depends_on():
  """Every dependency is pinned or listed, those of the tests too."""
  pinned = {
    re.split(r'[\[=><; ]', line)[0].lower()
    for line in (ROOT / 'requirements.txt').read_text().splitlines()
    if line and not line.startswith('#')
  }
  project = metadata()['project']
  extras = project['optional-dependencies']
  wanted = [*project['dependencies'], *extras['test'], *extras['docs'], 'ruff']
  assert {re.split(r'[\[=><!; ]', x)[0].lower() for x in wanted} <= pinned
