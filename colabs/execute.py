"""Runs notebooks from top to bottom, and keeps what they show.

    python -m colabs.execute                      all of them, in place
    python -m colabs.execute quickstart           one of them
    python -m colabs.execute --small --out=DIR    as the tests do

Each runs in a kernel of this Python, in an empty folder, with margin_jax from
this checkout. Nothing is written if a cell fails or warns.
"""

import argparse
import os
import pathlib
import re
import sys
import tempfile
import time

import nbclient
import nbformat
from traitlets.config import Config

HERE = pathlib.Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in HERE.glob('*.ipynb')))
# A cell, at most; more than any takes on a busy machine.
SECONDS = 3600


class FailedError(Exception):
  """A cell raised, or wrote to stderr."""


def execute(name: str) -> nbformat.NotebookNode:
  """Runs a notebook.

  Args:
    name: of the notebook, without its ending.

  Returns:
    The notebook with its outputs.

  Raises:
    FailedError: a cell raised, or wrote to stderr: a warning, say.
  """
  notebook = nbformat.read(HERE / f'{name}.ipynb', as_version=4)
  with tempfile.TemporaryDirectory() as home:
    # The kernel keeps no history among the user's files, and listens to a
    # socket in here and not to the network.
    os.environ['IPYTHONDIR'] = os.environ['JUPYTER_RUNTIME_DIR'] = home
    socket = {'transport': 'ipc', 'ip': f'{home}/kernel'}
    folder = pathlib.Path(home, 'empty')
    folder.mkdir()
    client = nbclient.NotebookClient(
      notebook,
      timeout=SECONDS,
      kernel_name='python3',
      coalesce_streams=True,
      record_timing=False,
      resources={'metadata': {'path': str(folder)}},
      config=Config({'ConnectionFileMixin': socket}),
    )
    try:
      client.execute()
    except nbclient.exceptions.CellExecutionError as error:
      plain = re.sub(r'\x1b\[[\d;]*m', '', str(error))  # without colours
      raise FailedError(f'{name}: {plain}') from None
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      if output.get('name') == 'stderr':
        raise FailedError(f'{name}: written to stderr: {output.text}')
  # Which Python it was is for the notebook to say.
  notebook.metadata.language_info = {'name': 'python'}
  return notebook


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m colabs.execute',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(NAMES))
  parser.add_argument('--small', action='store_true', help='a few steps only')
  parser.add_argument(
    '--out', type=pathlib.Path, default=HERE, help='default: in place'
  )
  args = parser.parse_args(argv)
  if args.small and args.out == HERE:
    parser.error('--small needs --out: the notebooks here show whole runs')
  unknown = [name for name in args.names if name not in NAMES]
  if unknown:
    parser.error(f'no notebook is called {unknown[0]!r}; there are {NAMES}')
  os.environ['PYTHONPATH'] = os.pathsep.join(
    filter(None, (str(HERE.parent), os.environ.get('PYTHONPATH')))
  )
  if args.small:
    os.environ['MARGIN_JAX_SMALL'] = '1'
  args.out.mkdir(parents=True, exist_ok=True)
  begun = time.perf_counter()
  for name in args.names or NAMES:
    started = time.perf_counter()
    try:
      notebook = execute(name)
    except FailedError as error:
      sys.exit(f'error: {error}')
    nbformat.write(notebook, args.out / f'{name}.ipynb')
    print(f'{name}: {time.perf_counter() - started:.0f} s', flush=True)
  print(f'together: {time.perf_counter() - begun:.0f} s')


if __name__ == '__main__':
  main()
