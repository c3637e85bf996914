"""Downloads a dataset and prepares it in the format the trainer reads.

    python -m margin_jax.prepare cifar10 --data_dir=~/tensorflow_datasets

This needs a network and TensorFlow (`pip install tensorflow-cpu`), once.
Reading the dataset needs neither. Behind a firewall, put the archives that TFDS
asks for into DATA_DIR/downloads/manual, or copy a folder prepared elsewhere
into DATA_DIR.
"""

import importlib.util
import logging
import os
import sys
import textwrap

from margin_jax import commands, terminal

# A config that trains on a dataset, where there is one of its own.
CONFIGS = {
  'cifar10': 'configs/cifar10_resnet44.py:mms',
  'cifar100': 'configs/cifar100_wrn28_10.py:mms',
  'imagenet2012': 'configs/imagenet_mobilenet.py:mmr',
  'mnist': 'configs/mnist_large_margin.py',
  'svhn_cropped': 'configs/trimming.py:on,dataset=svhn_cropped',
}
# What is read or made as it is, by what stands before a colon.
READY = {
  'digits': 'it comes with scikit-learn',
  'entailment': 'it is generated',
  'folder': 'images are read as they are',
  'csv': 'sentences are read as they are',
}


def prepare(name: str, data_dir: str | None) -> str:
  """Prepares dataset `name` as array_record files and returns their folder."""
  import tensorflow_datasets as tfds

  from margin_jax.data import glue, tfds_images

  if name in glue.NAMES:
    glue.register()
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  if name not in names():
    tfds_images.check_features(builder)
  if not builder.is_prepared():
    logging.getLogger('urllib3').setLevel(logging.ERROR)  # of every retry
    tfds.enable_progress_bar()  # TFDS is silent where CI or a caller said so
    builder.download_and_prepare()
  return str(builder.data_path)


def names() -> tuple[str, ...]:
  """Returns the datasets that are known without asking TFDS."""
  from margin_jax.data import glue, imagenet, tfds_images

  return (*tfds_images.NAMES, *imagenet.NAMES, *glue.NAMES)


@commands.command
def main(argv: list[str]) -> None:
  """Runs the command line: NAME and --data_dir."""
  parser = commands.Parser('prepare', __doc__, more=_list_names)
  parser.require('name', metavar='NAME', help='the name of the dataset')
  parser.option(
    '--data_dir',
    metavar='FOLDER',
    help="where to prepare it; default: TFDS's own folder",
  )
  args = parser.parse(argv)
  kind = args.name.partition(':')[0]
  if kind in READY:
    parser.error(f'{args.name!r} needs no preparing: {READY[kind]}')
  with terminal.wait('loading TFDS'):
    known = names()
    is_known = args.name in known or _is_known(args.name)
  if not is_known:
    from margin_jax.data import kinds

    others = f'; there are {", ".join(known)}, and others of TFDS'
    meant = commands.did_you_mean(kinds.near(args.name)) or others
    parser.error(f'no dataset is called {args.name!r}{meant}')
  if importlib.util.find_spec('tensorflow') is None:
    sys.exit(
      'error: preparing a dataset needs TensorFlow (reading it does not): '
      'pip install tensorflow-cpu, then run this command again'
    )
  from margin_jax.data import DatasetError

  try:
    folder = prepare(args.name, args.data_dir)
  except DatasetError as error:  # it is not of images
    sys.exit(f'error: {error}')
  except Exception as error:  # TFDS's own and the network's are of many kinds
    where = _folder(args.data_dir)
    sys.exit(
      f'error: {args.name} could not be downloaded: {_explain(error)}\n'
      f'Behind a firewall, put the archives into {where}/downloads/manual and '
      f'run this command again, or copy a folder {args.name} prepared '
      f'elsewhere into {where}.'
    )
  commands.finish(folder, next_command(args.name, args.data_dir))


def _explain(error: BaseException | None) -> str:
  """Returns an error behind what the system said first, if it said anything."""
  shown, first = str(error), ''
  while error is not None:
    if isinstance(error, OSError) and error.strerror:
      first = f'{error.strerror}: '
    error = error.__cause__ or error.__context__
  return first + shown


def _is_known(name: str) -> bool:
  from margin_jax.data import tfds_images

  return tfds_images.is_known(name, None)


def _list_names() -> str:
  text = (
    f'NAME is one of {", ".join(names())}, or the name in TFDS of another '
    'dataset of images with one label each.'
  )
  return textwrap.fill(text, 79, break_on_hyphens=False)


def _folder(data_dir: str | None) -> str:
  if data_dir is None:
    import tensorflow_datasets as tfds

    data_dir = tfds.core.constants.DATA_DIR
  return os.path.abspath(os.path.expanduser(data_dir))


def next_command(name: str, data_dir: str | None) -> str:
  """Returns a command that trains on the dataset."""
  config = CONFIGS.get(name, 'configs/images.py')
  fields = []
  if name.startswith('glue/'):
    config = f'configs/glue_bert.py:{name.removeprefix("glue/")}'
    fields = ['--config.model.pretrained=google-bert/bert-base-uncased']
  elif name not in CONFIGS:
    fields = [f'--config.data.name={name}']
  if data_dir is not None:
    fields.append(f'--config.data.data_dir={data_dir}')
  workdir = f'--workdir=/tmp/{name.replace("/", "_")}'
  return commands.line('train', f'--config={config}', workdir, *fields)


if __name__ == '__main__':
  main()
