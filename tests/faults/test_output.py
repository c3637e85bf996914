"""Output that goes away: training goes on in silence, to its end."""

import os
import shlex
import subprocess
import sys

import pytest

from margin_jax.train import process
from tests.faults import runs


def pipe_without_a_reader():
  reader, writer = os.pipe()
  os.close(reader)
  return writer


@pytest.mark.parametrize(
  'make',
  [pipe_without_a_reader, lambda: os.open('/dev/full', os.O_WRONLY)],
)
def test_an_output_that_takes_nothing_is_no_error(make, monkeypatch):
  with os.fdopen(make(), 'w') as file:
    # Or this would show nothing.
    with pytest.raises(OSError, match=r'Broken pipe|No space left'):
      os.write(file.fileno(), b'a line')
    monkeypatch.setattr(sys, 'stdout', file)
    with process.one_line_errors():
      for _ in range(3):
        print('a line', flush=True)
      print('one more')
    assert sys.stdout is file
    file.flush()  # as Python does at exit


def test_output_that_stays_is_as_it_was(capfd):
  with process.one_line_errors():
    print('a line')
    print('an error', file=sys.stderr)
    assert sys.stdout.encoding
  assert capfd.readouterr() == ('a line\n', 'an error\n')


def test_no_file_takes_the_place_of_a_closed_output(tmp_path):
  script = (
    'import os, sys\n'
    'from margin_jax.train import process\n'
    'with process.one_line_errors():\n'
    '  print("a line", flush=True)\n'
    f'  with open({str(tmp_path / "table")!r}, "w") as file:\n'
    '    assert file.fileno() > 2\n'
    '    os.write(1, b"of a library")\n'
  )
  shell = f'{sys.executable} -c {shlex.quote(script)} >&- 2>&-'
  done = subprocess.run(shell, shell=True, cwd=runs.ROOT, check=False)
  assert done.returncode == 0
  assert (tmp_path / 'table').read_text() == ''


@pytest.mark.slow
@pytest.mark.parametrize('end', ['| head -1', '> /dev/full', '>&- 2>&-'])
def test_a_run_whose_output_goes_away_ends_well(tmp_path, end):
  command = ' '.join([*runs.COMMAND, f'--workdir={tmp_path}'])
  done = subprocess.run(
    ['bash', '-c', f'set -o pipefail; {command} {end}'],
    cwd=runs.ROOT,
    env={**os.environ, 'PYTHONUNBUFFERED': '1'},
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'Traceback' not in done.stderr
  assert 'Exception ignored' not in done.stderr
  assert (tmp_path / 'result.json').exists()
