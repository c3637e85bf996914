"""What a newcomer meets: the README, the public names, the version check."""

import importlib
import pathlib
import re
import subprocess
import sys

import jaxlib
import pytest

import margin_jax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_readme_loop_runs_as_printed(tmp_path):
  """It uses the three functions, is short, and learns."""
  (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  used = set(re.findall(r'margin_jax\.(\w+)', code))
  assert used == {'mms_scores', 'select_lowest', 'mmr_penalty'}
  script = tmp_path / 'loop.py'
  script.write_text(code)
  process = subprocess.run(
    [sys.executable, '-W', 'error', str(script)],
    cwd=ROOT,
    env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=True,
  )
  (accuracy,) = re.findall(r'training accuracy ([\d.]+)%', process.stdout)
  assert float(accuracy) > 98


def test_readme_table_lists_the_public_names():
  documented = set(re.findall(r'^\| `(\w+)\(', README, re.MULTILINE))
  assert documented == set(margin_jax.__all__)
  for name in margin_jax.__all__:
    assert getattr(margin_jax, name).__doc__


def test_readme_names_files_that_exist():
  paths = re.findall(r'configs/\w+\.py|docs/[\w.]+|[\w/]+\.md', README)
  for path in paths:
    assert (ROOT / path).exists(), path


def test_importing_under_the_broken_jaxlib_warns(monkeypatch):
  monkeypatch.setattr(jaxlib, '__version__', '0.10.2')
  with pytest.warns(UserWarning, match=r'jaxlib 0\.10\.2 computes wrong'):
    importlib.reload(margin_jax)
  monkeypatch.undo()
  importlib.reload(margin_jax)


def test_no_file_or_function_is_long():
  """400 lines a file, 60 a function without its docstring."""
  import ast

  for path in ROOT.glob('[!.]*/**/*.py'):
    text = path.read_text()
    assert text.count('\n') <= 400, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        lines = node.end_lineno - node.lineno + 1
        doc = ast.get_docstring(node, clean=False)
        lines -= doc.count('\n') + 1 if doc else 0
        assert lines <= 60, f'{path}:{node.lineno} {node.name}'
