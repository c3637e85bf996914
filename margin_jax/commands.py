"""The command line of every command: its parser, its help, and its exit.

Imports nothing slow: a command says what it loads before it loads it.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from margin_jax import checks, terminal
from margin_jax.checks import did_you_mean, nearest

MODULES = {
  'train': 'margin_jax.train',
  'compare': 'margin_jax.compare',
  'analyze': 'margin_jax.analyze',
  'export': 'margin_jax.export',
  'prepare': 'margin_jax.prepare',
}
_FIELD = '--config.'
_CONFIG_HELP = """\
config fields:
  --config.FIELD=VALUE  sets a field over the config file, as in
                        --config.steps=300 or --config.optimizer.warmup=10

To list the arguments of a config file, and every field with its value, its
meaning and its allowed values:
  {line}
"""


def line(name: str, *arguments: str) -> str:
  """Returns a command to type, a console script if this process is one."""
  if pathlib.Path(sys.argv[0]).name.startswith('margin-'):
    return shlex.join([f'margin-{name}', *arguments])
  return shlex.join(['python', '-m', MODULES[name], *arguments])


def finish(results: Any, following: str | None) -> None:
  """Says where the results of a command are, and what to type next, if so."""
  lines = [f'results: {results}']
  lines += [f'next:    {following}'] if following else []
  terminal.say('\n'.join(lines))


def command(main: Callable[[list[str]], None]) -> Callable[..., None]:
  """Makes a main function take the given arguments, or those of the process.

  Ctrl-C, and a pipe that is closed (`| head`), end it without a traceback. What
  the output's encoding lacks is written as an escape.
  """

  @functools.wraps(main)
  def run(argv: list[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
      if hasattr(stream, 'reconfigure'):
        stream.reconfigure(errors='backslashreplace')
    try:
      main(sys.argv[1:] if argv is None else argv)
      if sys.stdout is not None:
        sys.stdout.flush()
    except BrokenPipeError:
      # Python would complain once more when it flushes at exit.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(141)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      sys.exit(130)

  return run


def integer(text: str) -> int:
  """Returns the integer of '1000' or '1e3', for a flag."""
  with contextlib.suppress(ValueError):
    return checks.parse_integer(text)
  raise argparse.ArgumentTypeError(f'must be an integer, got {text!r}')


def integers(text: str) -> list[int]:
  """Returns the integers of '500,1e3', for a flag."""
  with contextlib.suppress(ValueError):
    return [checks.parse_integer(part) for part in text.split(',')]
  raise argparse.ArgumentTypeError(
    f'must be integers, as in 500,1000, got {text!r}'
  )


class Parser(argparse.ArgumentParser):
  """Flags of a command; a mistake in them is one line.

  `require` and `option` add flags, `parse` reads them.
  """

  def __init__(
    self,
    name: str,
    doc: str | None,
    *,
    fields: bool = False,
    more: Callable[[], str] | None = None,
  ):
    """Starts without flags, but --help and, with `fields`, --config.

    Args:
      name: the name of the command, one of `MODULES`.
      doc: what --help begins with.
      fields: whether it takes a config file, and fields of the config.
      more: returns what --help ends with.
    """
    super().__init__(
      prog=line(name),
      description=(doc or '').strip(),  # python -OO has none
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      add_help=False,
    )
    self._name, self._fields, self._more = name, fields, more
    self._required = self.add_argument_group('required')
    self._options = self.add_argument_group('options')
    if fields:
      self.require(
        '--config',
        metavar='FILE[:ARGUMENTS]',
        help='a config file, such as configs/digits.py',
      )

  def require(self, name: str, **options: Any) -> None:
    """Adds what must be given, with the options of `add_argument`."""
    if not name.startswith('-'):
      options['nargs'] = '?'  # so that --help needs nothing
    self._required.add_argument(name, **options)

  def option(self, name: str, **options: Any) -> None:
    """Adds what may be given, with the options of `add_argument`."""
    self._options.add_argument(name, **options)

  def parse(self, argv: Sequence[str]) -> argparse.Namespace:
    """Returns the values of the flags, or ends the process.

    Of a command that takes a config file, `config_file` is that file, and
    `config_file.config` has the fields that were set.
    """
    self._options.add_argument(
      '-h',
      '-help',
      '--help',
      action='store_true',
      help='show this text, and exit',
    )
    rest, fields = _take_fields(argv) if self._fields else (argv, {})
    self.usage = self._usage()
    args, unknown = self.parse_known_args(rest)
    if args.help:
      self._show_help(args)
    if unknown:
      self.error(self._about_unknown(*unknown))
    missing = [
      x for x in self._required._group_actions if getattr(args, x.dest) is None
    ]
    if missing:
      self.error(
        f'{" and ".join(map(_shown, missing))} must be given; '
        f'{line(self._name, "--help")} says more'
      )
    if self._fields:
      args.config_file = _load(args.config, fields)
    return args

  def error(self, message: str) -> NoReturn:
    """Ends the process with one line."""
    sys.exit(f'error: {message}')

  def _usage(self) -> str:
    parts = [_shown(x, '=') for x in self._required._group_actions]
    fields = [f'[{_FIELD}FIELD=VALUE ...]'] if self._fields else []
    return ' '.join([line(self._name), *parts, '[options]', *fields])

  def _show_help(self, args: argparse.Namespace) -> NoReturn:
    if self._fields and args.config is not None:
      file = _load(args.config, {})
      from margin_jax import config_files

      print(config_files.describe(file))
      sys.exit(0)
    print(self.format_help())
    if self._fields:
      asked = line(self._name, '--config=configs/digits.py', '--help')
      print(_CONFIG_HELP.format(line=asked))
    sys.stdout.flush()
    if self._more is not None:
      print(self._more())
    sys.exit(0)

  def _about_unknown(self, argument: str, *following: str) -> str:
    """Returns what to say of an argument that the command does not have.

    Args:
      argument: as it was typed.
      *following: what else the command does not have; may begin with its value.
    """
    flag, equals, value = argument.partition('=')
    if not equals and following and not following[0].startswith('-'):
      equals, value = '=', following[0]
    if argument.startswith('-'):
      near = [f'{x}{equals}{value}' for x in self._near(flag.lstrip('-'))]
      there_are = f'; there are {", ".join(self._flags())}'
      return f'unknown flag {flag}{did_you_mean(near) or there_are}'
    near = []
    if os.path.exists(argument):
      flags = ('--config', '--workdir', '--data_dir')
      if os.path.isdir(argument):
        flags = flags[1:]
      known = [flag for flag in flags if flag in self._flags()]
      near = [f'{flag}={argument}' for flag in known[:1]]
    elif equals:
      near = [f'{x}={value}' for x in self._near(flag)]
    form = '; write --FLAG=VALUE, and a list with commas but no spaces'
    return f'unexpected argument {argument!r}{did_you_mean(near) or form}'

  def _near(self, name: str) -> list[str]:
    """Returns the flags, or flags of fields, that somebody may have meant."""
    field = f'--{name}'.removeprefix(_FIELD)
    near = nearest(field, self._flags(), cutoff=0.7)
    if not self._fields:
      return near
    if near:
      return [x for x in near if x != '--help'] or near
    with terminal.wait('loading JAX'):
      from margin_jax import config_files
    return config_files.near(field.removeprefix('--'), _FIELD)

  def _flags(self) -> list[str]:
    return [x for x in self._option_string_actions if x.startswith('--')]


def _take_fields(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Splits arguments into those of the command and fields of the config."""
  rest, fields = [], {}
  words = iter(argv)
  for word in words:
    flag, equals, value = word.partition('=')
    if not flag.startswith(_FIELD):
      rest.append(word)
      continue
    name = flag.removeprefix(_FIELD)
    if not equals:
      value = next(words, '--')
      if value.startswith('--'):
        sys.exit(f'error: {flag} needs a value: {flag}=VALUE')
    fields[name] = value
  return rest, fields


def _load(text: str, fields: dict[str, str]) -> Any:
  """Returns the config file with the fields, or ends with one line."""
  with terminal.wait('loading JAX and the config'):
    from margin_jax import config_files
    from margin_jax.config import ConfigError
    from margin_jax.user_code import UserCodeError

    try:
      return config_files.load(text).with_fields(fields)
    except ConfigError as error:
      if isinstance(error, UserCodeError):
        print(error.frames, end='', file=sys.stderr)
      sys.exit(f'error: {error}')


def _shown(action: argparse.Action, equals: str = '') -> str:
  """Returns a flag as it is typed."""
  if not action.option_strings:
    return str(action.metavar or action.dest)
  name = action.option_strings[0]
  return f'{name}={action.metavar}' if equals else name
