"""Draws the pictures of docs/tutorial.md, by the tutorial's own commands.

python -m docs.tutorial_pictures
"""

import contextlib
import io
import pathlib
import re
import shutil
import tempfile

from rich import _export_format
from rich.console import Console

from margin_jax import config_files, cpu, terminal
from margin_jax.train import loop, progress
from tests import test_docs

DOCS = pathlib.Path(__file__).parent
OUT = DOCS / 'tutorial'
# The frame of rich's pictures, without the fonts that it has from the network.
FRAME = re.sub(
  r'@font-face {{.*?}}', '', _export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL
)
SHOWN = (
  'digits/analysis/margins.png',
  'digits/analysis/most_negative_train.png',
  'compare/error.png',
)


class Snapshot(progress.View):
  """A live view that is drawn once, in the middle of the run."""

  def __call__(self, prefix: str, step: int, row: progress.Row) -> None:
    """Takes a row as any view does."""
    super().__call__(prefix, step, row)
    if (prefix, step) == ('train', 200):
      console = Console(file=io.StringIO(), record=True, width=80)
      console.print(self._draw())
      console.save_svg(
        str(OUT / 'live_view.svg'), title='margin-train', code_format=FRAME
      )


def main() -> None:
  """Trains, analyzes and compares as the tutorial does; keeps what it shows."""
  OUT.mkdir(exist_ok=True)
  blocks = test_docs.blocks(DOCS / 'tutorial.md')
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for _, title, _, text in blocks:
      if title:
        (folder / title).write_text(text)
    cpu.tune()
    with contextlib.chdir(folder):
      config = config_files.load('digits.py').config
      view = Snapshot(terminal.Terminal(file=io.StringIO()))
      loop.train(config, str(folder / 'digits'), view=view)
    for _, _, _, text in blocks:
      if text.startswith(('margin-analyze', 'margin-compare')):
        test_docs.run_block(text, folder)
    for path in SHOWN:
      shutil.copy(folder / path, OUT)


if __name__ == '__main__':
  main()
