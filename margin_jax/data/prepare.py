"""Downloads a dataset and prepares it in the format the trainer reads.

    python -m margin_jax.data.prepare cifar10 --data_dir=~/tensorflow_datasets

Needs the network and TensorFlow (`pip install tensorflow-cpu`), once; reading
needs neither. Behind a firewall, put the archives that TFDS asks for into
DATA_DIR/downloads/manual, or copy a folder prepared elsewhere into DATA_DIR.
"""

import argparse
import importlib.util
import os
import sys

from margin_jax.data import glue, imagenet, tfds_images

NAMES = (*tfds_images.NAMES, *imagenet.NAMES, *glue.NAMES)


def prepare(name: str, data_dir: str | None) -> str:
  """Prepares dataset `name` as array_record files and returns their folder."""
  import tensorflow_datasets as tfds

  if name in glue.NAMES:
    glue.register()
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  if not builder.is_prepared():
    tfds.enable_progress_bar()  # TFDS is silent where CI or a caller said so
    builder.download_and_prepare()
  return str(builder.data_path)


def _folder(data_dir: str | None) -> str:
  if data_dir is None:
    import tensorflow_datasets as tfds

    data_dir = tfds.core.constants.DATA_DIR
  return os.path.abspath(os.path.expanduser(data_dir))


def main(argv: list[str] | None = None) -> None:
  """Runs the command line: NAME and --data_dir."""
  parser = argparse.ArgumentParser(
    prog='python -m margin_jax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('name', choices=NAMES)
  parser.add_argument('--data_dir', help="default: TFDS's own folder")
  args = parser.parse_args(argv)
  if importlib.util.find_spec('tensorflow') is None:
    sys.exit(
      'error: preparing a dataset needs TensorFlow (reading it does not): '
      'pip install tensorflow-cpu, then run this command again'
    )
  try:
    print(prepare(args.name, args.data_dir))
  except Exception as error:  # TFDS's own and the network's are of many kinds
    folder = _folder(args.data_dir)
    sys.exit(
      f'error: {args.name} could not be downloaded: {error}\nBehind a '
      f'firewall, put the archives into {folder}/downloads/manual and run this '
      f'command again, or copy a folder {args.name} prepared elsewhere into '
      f'{folder}.'
    )


if __name__ == '__main__':
  main()
