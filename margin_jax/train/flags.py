"""What the command lines share: the flags, and how they are read."""

import difflib
import re
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from margin_jax.config import FIELDS

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of everything that is written.'
)
# What other libraries call a field.
OTHER_NAMES = {
  'lr': 'optimizer.learning_rates',
  'learning_rate': 'optimizer.learning_rates',
  'epochs': 'steps',
  'num_epochs': 'steps',
  'batch': 'batch_size',
  'dataset': 'data.name',
  'wd': 'optimizer.weight_decay',
}


def begin(argv: list[str]) -> None:
  """Refuses what is not a flag, and silences the libraries."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Orbax logs tracebacks of what it raises as well.
  logging.set_verbosity(logging.FATAL)


def run(main: Callable[[list[str]], None], doc: str | None) -> None:
  """Reads the flags, --config and --workdir among them, and calls `main`.

  Args:
    main: of the module that defines the other flags; takes what is no flag.
    doc: what --help says, of that module.
  """
  if main.__module__ != '__main__':
    # A console script: --help asks the main module, which it is.
    for flag in flags.FLAGS.get_key_flags_for_module(main.__module__):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.modules['__main__'].__doc__ = doc
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; a mistake in them, or in the config file, is one line."""
  try:
    rest = flags.FLAGS(argv)
    dict(CONFIG.value)  # a file that could not be read raises only now
  except flags.Error as error:
    sys.exit(f'error: {explain(error)}')
  except (AttributeError, KeyError) as error:  # of a field, of a group
    *_, last = traceback.extract_tb(error.__traceback__)
    if 'get_config' in str(error) and 'config_flags' in last.filename:
      sys.exit(f'error: --config: {error.obj.__file__} has no get_config')
    if not error.args or not re.match(r"""['"\\]+\w+""", str(error.args[0])):
      raise  # a mistake in the config file's own code: show where
    name = _unknown_field(argv) or re.search(r'\w+', str(error.args[0]))[0]
    sys.exit(f'error: unknown config field {name!r}{_nearest(name)}')
  except OSError as error:
    lines = str(error).strip().splitlines()
    sys.exit(f'error: --config: {lines[-1].strip()}')
  return rest


def _unknown_field(argv: list[str]) -> str | None:
  """Returns the first field that the command line sets and that is none."""
  for argument in argv:
    flag = argument.partition('=')[0].lstrip('-')
    name = flag.removeprefix('config.')
    if name != flag and name not in FIELDS:
      return name
  return None


def _nearest(name: str, prefix: str = '') -> str:
  """Returns what to append to a message: the fields that may be meant."""
  *_, leaf = name.split('.')
  near = [field for field in FIELDS if field.split('.')[-1] == leaf]
  if not near and leaf in OTHER_NAMES:
    near = [OTHER_NAMES[leaf]]
  near = near or difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.5)
  names = ' or '.join(prefix + field for field in near)
  return f'; did you mean {names}?' if near else ''


def explain(error: flags.Error) -> str:
  """Returns one line; of an error in a config file, its traceback's last."""
  last = str(error).strip().splitlines()[-1]
  unknown = re.match(r"Unknown command line flag '([\w.]+)'", last)
  if unknown and _nearest(unknown[1]):
    return f'unknown flag --{unknown[1]}{_nearest(unknown[1], "--config.")}'
  return last.removeprefix('margin_jax.config.ConfigError: ')
