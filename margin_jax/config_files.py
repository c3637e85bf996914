"""Config files, and the fields that a command line sets over theirs."""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from margin_jax import commands, models, schedules, user_code
from margin_jax import config as config_lib
from margin_jax.checks import Check, did_you_mean, nearest, parse_integer
from margin_jax.config import FIELDS, ConfigError
from margin_jax.data import registered

# What other libraries call a field.
OTHER_NAMES = {
  'lr': 'optimizer.learning_rates',
  'learning_rate': 'optimizer.learning_rates',
  'epochs': 'steps',
  'num_epochs': 'steps',
  'num_steps': 'steps',
  'batch': 'batch_size',
  'dataset': 'data.name',
  'model': 'model.name',
  'rule': 'selection.rule',
  'wd': 'optimizer.weight_decay',
}
# Under which a config file can find itself, and what it defines be pickled.
_MODULE = 'margin_jax_config_file'


@dataclasses.dataclass(frozen=True)
class ConfigFile:
  """A config file that was run.

  Attributes:
    path: the path as it was given.
    argument: what stood behind the colon, or None.
    arguments: those that it has, by name.
    module: what else it defines.
    config: the config for that argument.
  """

  path: str
  argument: str | None
  arguments: Mapping[str, config_lib.Argument]
  module: types.ModuleType
  config: ml_collections.ConfigDict

  def with_fields(self, fields: Mapping[str, str]) -> 'ConfigFile':
    """Returns it with fields as a command line sets them, as texts by name.

    A run that they make shorter has its schedule scaled: see
    `schedules.shortened`.

    Raises:
      ConfigError: a field is unknown, or its value of another type.
    """
    config = copy.deepcopy(self.config)
    for name, text in fields.items():
      value = parse_value(config, name, text)
      config.update_from_flattened_dict({name: value})
    config = schedules.shortened(config, self.config.steps, keep=fields)
    return dataclasses.replace(self, config=config)

  def analyze_line(self, workdir: str) -> str:
    """Returns the command that analyzes a run of this config.

    It names the file if the run needs what that registers.
    """
    config, arguments = self.config, [f'--workdir={workdir}']
    used = {config.data.name, config.model.name, config.selection.proxy}
    if used & {*registered.REGISTERED, *models.REGISTERED}:
      arguments.append(f'--config={self.path}')
    return commands.line('analyze', *arguments)


# Running a config file.


def load(text: str) -> ConfigFile:
  """Runs a config file: 'configs/digits.py', or 'configs/digits.py:memory'.

  Raises:
    ConfigError: there is no such file, it is no config file, or its argument
      is wrong.
  """
  path, _, argument = text.partition(':')
  module = run(path)
  if not callable(getattr(module, 'get_config', None)):
    raise ConfigError(f'--config: {path} has no get_config')
  takes_argument = bool(inspect.signature(module.get_config).parameters)
  if argument and not takes_argument:
    raise ConfigError(
      f'--config: {path} takes no argument, but {argument!r} is given'
    )
  with (
    config_lib.asked_for_arguments() as arguments,
    _explained(module.__file__),
  ):
    given = (argument or None,) if takes_argument else ()
    config = module.get_config(*given)
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f'--config: get_config of {path} must return a ConfigDict: start from '
      'margin_jax.config.default()'
    )
  missing = [x for x in FIELDS if x not in config_lib.flatten(config)]
  if missing:
    raise ConfigError(
      f'--config: the config of {path} has no field {missing[0]!r}: start from '
      'margin_jax.config.default()'
    )
  return ConfigFile(path, argument or None, arguments, module, config.lock())


def run(path: str) -> types.ModuleType:
  """Runs a config file as a module, for what it defines and registers.

  Raises:
    ConfigError: there is no such file, or it is none of Python.
  """
  shown, path = path, os.path.expanduser(path)
  if not os.path.isfile(path):
    raise ConfigError(f'--config: {_no_file(path, shown)}')
  spec = importlib.util.spec_from_file_location(_MODULE, path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'--config: {shown} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  sys.modules[_MODULE] = module
  with _explained(path):
    spec.loader.exec_module(module)
  return module


def _no_file(path: str, shown: str) -> str:
  """Returns why there is no such file, and which may be meant."""
  if os.path.isdir(path):
    names = sorted(x.name for x in pathlib.Path(path).glob('*.py'))
    has = f'; it has {", ".join(names)}' if names else ''
    return f'{shown} is a folder{has}'
  places = [pathlib.Path(path).parent, pathlib.Path('configs')]
  files = {x.name: str(x) for place in places for x in place.glob('*.py')}
  name = pathlib.Path(path).name
  near = nearest(name, files, 0.7) or nearest(f'{name}.py', files, 0.7)
  return f'there is no file {shown}' + did_you_mean([files[x] for x in near])


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
  """Says where a config file goes wrong: in one line, if that is enough.

  Of other mistakes in its own code its frames are shown, too.
  """
  with user_code.named('--config'):
    try:
      yield
    except SyntaxError as error:
      raise ConfigError(
        f'--config: {error.filename}, line {error.lineno}: {error.msg}'
      ) from error
    except (AttributeError, KeyError, TypeError) as error:
      frames = traceback.extract_tb(error.__traceback__)
      path = os.path.realpath(path)
      own = [x for x in frames if os.path.realpath(x.filename) == path]
      why = _misuse(error, own[-1].line or '', frames[-1]) if own else None
      if why is None:
        raise
      raise ConfigError(
        f'--config: {path}, line {own[-1].lineno}: {why}'
      ) from error


def _misuse(
  error: Exception, line: str, last: traceback.FrameSummary
) -> str | None:
  """Returns what is wrong in a line that sets a field, or None."""
  changed = re.search(r'config\.([\w.]+)\.(append|extend|insert)\(', line)
  if changed and "'tuple'" in str(error):
    return f'{changed[1]} is a tuple: write config.{changed[1]} += (VALUE,)'
  if 'ml_collections' not in last.filename:
    return None
  named = re.findall(r'config\.([\w.]+)', line)
  unknown = [x for x in named if x not in FIELDS and not members(x)]
  if unknown and not isinstance(error, TypeError):
    return unknown_field(unknown[0])
  return str(error)


# Setting fields.


def unknown_field(name: str, prefix: str = '') -> str:
  """Returns what to say of a field that does not exist.

  Args:
    name: dotted.
    prefix: prefix of the proposed names, such as '--config.'.
  """
  return f'{name!r} {is_unknown(name, prefix)}'


def is_unknown(name: str, prefix: str = '') -> str:
  """Returns what follows the name in `unknown_field`."""
  if members(name):
    return f'is a group of config fields: {", ".join(members(name))}'
  group = name.rpartition('.')[0]
  message = 'is not a config field' + did_you_mean(near(name, prefix))
  if members(group):
    message += f' The fields of {group} are {", ".join(members(group))}'
  return message


def members(group: str) -> list[str]:
  """Returns the fields of a group, without its name."""
  return [
    x.removeprefix(f'{group}.') for x in FIELDS if x.startswith(f'{group}.')
  ]


def near(name: str, prefix: str = '') -> list[str]:
  """Returns the fields that somebody may have meant."""
  group, _, leaf = name.rpartition('.')
  found = [field for field in FIELDS if field.split('.')[-1] == leaf]
  found = nearest(name, found, cutoff=0.8) or found
  if not found and leaf in OTHER_NAMES:
    found = [OTHER_NAMES[leaf]]
  if not found:
    found = [f'{group}.{x}' for x in nearest(leaf, members(group))]
  found = found or nearest(name, FIELDS)
  if not found:
    leaves = {x.split('.')[-1]: x for x in FIELDS}
    found = [leaves[x] for x in nearest(leaf, leaves, cutoff=0.7)]
  return [prefix + field for field in found]


def parse_value(config: ml_collections.ConfigDict, name: str, text: str) -> Any:
  """Returns the value that --config.name=text gives a field.

  Raises:
    ConfigError: there is no such field, or the value is of another type.
  """
  known = config_lib.flatten(config)
  if name not in known:
    raise ConfigError(unknown_field(name, '--config.'))
  check = FIELDS[name].check if name in FIELDS else None
  if check is not None and text.lower() == 'none' and check.holds(None):
    return None
  values = flags.FlagValues()
  changed = copy.deepcopy(config)
  argv = ['', f'--config.{name}={_plain(text, check)}']
  try:
    config_flags.DEFINE_config_dict(
      'config', changed, flag_values=values, sys_argv=argv
    )
    values(argv)
  except (flags.Error, ValueError, TypeError, SyntaxError) as error:
    allowed = check.allowed() if check else f'like {known[name]!r}'
    raise ConfigError(
      f'{name}={text!r} is not allowed: it must be {allowed}'
    ) from error
  return config_lib.flatten(changed)[name]


def _plain(text: str, check: Check | None) -> str:
  """Writes 1e3 as 1000 where integers belong, and a,b as ('a', 'b')."""
  if check is None or check.type not in (int, tuple):
    return text
  with contextlib.suppress(ValueError, SyntaxError, TypeError):
    if check.type is int:
      return str(parse_integer(text))
    words = tuple(x.strip() for x in text.split(','))
    if check.holds(words) and not {*text} & {*'\'"(['}:
      return str(words)
    values = ast.literal_eval(text)
    values = values if isinstance(values, tuple) else (values,)
    if not check.holds(values):
      return str(tuple(parse_integer(str(x)) for x in values))
  return text


# What --config=FILE --help shows.


def describe(file: ConfigFile) -> str:
  """Returns the arguments of a config file and all fields, to be read."""
  given = file.path + (f':{file.argument}' if file.argument else '')
  doc = inspect.cleandoc(file.module.__doc__ or given)
  parts = [f'{given}\n\n{textwrap.indent(doc, "  ")}']
  if file.arguments:
    first = next(iter(file.arguments))
    lines = [_about_argument(*x) for x in file.arguments.items()]
    parts.append(
      'arguments, behind a colon and separated by commas; '
      f'"{first}=" may be left out:\n' + '\n'.join(lines)
    )
  own, default = map(config_lib.flatten, (file.config, config_lib.default()))
  parts.append(
    'config fields, with their values in this config (* where it changes the '
    'default):'
  )
  parts += [_about_field(name, own[name], default[name]) for name in FIELDS]
  return '\n\n'.join(parts)


def _about_argument(name: str, argument: config_lib.Argument) -> str:
  default = argument.default
  if isinstance(default, tuple):
    default = default[0]
  text = f'  {name}={default}  '.ljust(24) + argument.allowed
  if argument.needs is not None:
    other, values = argument.needs
    text += f'; needs {" or ".join(f"{other}={x}" for x in values)}'
  return text


def _about_field(name: str, value: Any, default: Any) -> str:
  """Returns a paragraph on a field."""
  field = FIELDS[name]
  changed = value != default
  head = f'{"*" if changed else " "} --config.{name}={value!r}'
  text = f'{field.meaning} It must be {field.check.allowed()}.'
  if changed:
    text += f' Default: {default!r}.'
  return head + '\n' + textwrap.fill(
    text, 79, initial_indent=' ' * 6, subsequent_indent=' ' * 6,
    break_long_words=False, break_on_hyphens=False,
  )  # fmt: skip
