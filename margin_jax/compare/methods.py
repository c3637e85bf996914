"""What is compared: rules with config fields after them, and grids of fields.

A method is a rule and what else is changed of the config: `mms`, or
`mms+reuse=5+pool_size=320`. An entry is a method at a point of the grid that a
sweep spans; it is trained once for every seed.
"""

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from margin_jax import config as config_lib
from margin_jax.config import UNIFORM, ConfigError
from margin_jax.train import schema

Fields = dict[str, Any]

RULE, POOL = 'selection.rule', 'pool_size'
# The rule that pays for scoring and does not use it.
CONTROL = 'random'


@dataclasses.dataclass(frozen=True)
class Entry:
  """What is trained once for every seed.

  Attributes:
    method: its name, as the user typed it.
    point: what the sweep sets; {} without one.
    config: of the first seed.
  """

  method: str
  point: Fields
  config: ml_collections.ConfigDict

  @property
  def name(self) -> str:
    """Of the method and its point, as in 'mms, mmr.alpha=0.001'."""
    return ', '.join([self.method, *_shown(self.point)])

  @property
  def folder(self) -> str:
    """Relative path for its files, below which each seed has a folder."""
    parts = [' '.join(_shown(self.point)), self.method]
    return '/'.join(re.sub(r'[^\w.+=-]+', '_', x) for x in parts if x)


def _shown(point: Fields) -> list[str]:
  return [f'{name}={value}' for name, value in point.items()]


def split(text: str) -> list[str]:
  """Parts between the commas that are in no bracket and no quotation."""
  parts, depth, quote = [''], 0, ''
  for letter in text:
    if quote:
      quote = '' if letter == quote else quote
    elif letter in '\'"':
      quote = letter
    else:
      depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and not depth and not quote:
      parts.append('')
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def _field(name: str, where: str, known: Iterable[str]) -> str:
  """The full name of a field; of a bare one, first among selection's."""
  found = next((x for x in (f'selection.{name}', name) if x in known), None)
  if found is None:
    raise ConfigError(
      f'{where}: {name!r} is no config field; there are {tuple(known)}'
    )
  if found in ('seed', RULE):
    other = '--seeds' if found == 'seed' else '--methods'
    raise ConfigError(f'{where}: {found} is not set here, but by {other}')
  return found


def _parse(
  config: ml_collections.ConfigDict, name: str, text: str, where: str
) -> Any:
  """A field's value, read as --config.name=text would be."""
  values = flags.FlagValues()
  changed = copy.deepcopy(config)
  argv = ['', f'--config.{name}={text}']
  try:
    config_flags.DEFINE_config_dict(
      'config', changed, flag_values=values, sys_argv=argv
    )
    values(argv)
  except (flags.Error, ValueError, TypeError) as error:
    raise ConfigError(
      f'{where}: {name}={text!r} is not allowed: it must be of the type of '
      f'{config_lib.flatten(config)[name]!r}'
    ) from error
  return config_lib.flatten(changed)[name]


def parse_method(text: str, config: ml_collections.ConfigDict) -> Fields:
  """The fields that 'mms+reuse=5' sets.

  Args:
    text: a rule, then '+field=value' any number of times. The field may be
      one of selection without that word before it.
    config: has every field.

  Raises:
    ConfigError: unknown rule or field, or a value of another type.
  """
  where = f'methods: {text!r}'
  # A plus before a digit is of a number, as in 1e+5.
  rule, *settings = re.split(r'\+(?=[A-Za-z_])', text)
  allowed = schema.choices(RULE)
  if rule not in allowed:
    raise ConfigError(f'{where}: the rule {rule!r} must be one of {allowed}')
  known = config_lib.flatten(config)
  fields = {RULE: rule}
  for setting in settings:
    name, equals, value = setting.partition('=')
    if not equals:
      raise ConfigError(f'{where}: {setting!r} must be field=value')
    name = _field(name, where, known)
    if name in fields:
      raise ConfigError(f'{where}: {name} is given twice')
    fields[name] = _parse(config, name, value, where)
  return fields


def parse_methods(
  methods: Sequence[str] | Mapping[str, Fields],
  config: ml_collections.ConfigDict,
  known: Mapping[str, Fields] | None = None,
) -> dict[str, Fields]:
  """Fields by the name of the method.

  Args:
    methods: names to parse, or fields by name.
    config: has every field.
    known: fields of names that need no parsing.

  Raises:
    ConfigError: one is given twice or cannot be parsed.
  """
  if isinstance(methods, Mapping):
    return {name: dict(fields) for name, fields in methods.items()}
  found: dict[str, Fields] = {}
  for name in methods:
    if name in found:
      raise ConfigError(f'methods: {name!r} is given twice')
    given = known is not None and name in known
    found[name] = dict(known[name]) if given else parse_method(name, config)
  return found


def parse_sweep(
  axes: Iterable[str], config: ml_collections.ConfigDict
) -> dict[str, list[Any]]:
  """The values of every swept field, of texts 'mmr.alpha=1e-5,1e-4'.

  Raises:
    ConfigError: unknown field, no value, a value or a field given twice.
  """
  known = config_lib.flatten(config)
  grid: dict[str, list[Any]] = {}
  for text in axes:
    where = f'sweep: {text!r}'
    name, _, values = text.partition('=')
    name = _field(name, where, known)
    if name in grid:
      raise ConfigError(f'{where}: {name} is given twice')
    if not all(split(values)):
      raise ConfigError(f'{where} must be field=value,value,...')
    grid[name] = [_parse(config, name, x, where) for x in split(values)]
    if len({*map(repr, grid[name])}) < len(grid[name]):
      raise ConfigError(f'{where}: a value is given twice')
  return grid


def _apply(
  config: ml_collections.ConfigDict, name: str, fields: Fields
) -> ml_collections.ConfigDict:
  """The config with these fields; those that the rule has not are reset.

  So `selection.reuse` of the config is of the rules that score, and a baseline
  without a pool can stand beside them.
  """
  changed = copy.deepcopy(config)
  known = config_lib.flatten(config_lib.default())
  rule = fields.get(RULE, config.selection.rule)
  reset = {field: known[field] for field in schema.void(rule)}
  for field, value in {**reset, **fields}.items():
    if field not in known:
      raise ConfigError(f'methods: {name!r}: {field!r} is no config field')
    try:
      changed.update_from_flattened_dict({field: value})
    except TypeError as error:
      raise ConfigError(f'methods: {name!r}: {field}: {error}') from error
  for field in schema.idle(config_lib.flatten(changed)):
    if field not in fields:
      changed.update_from_flattened_dict({field: known[field]})
  return changed


def with_control(
  methods: Mapping[str, Fields], config: ml_collections.ConfigDict
) -> dict[str, Fields]:
  """The methods, and what only chooses at random where it is missing.

  A method whose rule scores is answered by one with the same fields but for
  the rule: `mms+reuse=5` by `random+reuse=5`.

  Raises:
    ConfigError: another method has such a name.
  """
  usual = config_lib.flatten(config)

  def rule(fields: Fields) -> str:
    return fields.get(RULE, usual[RULE])

  def others(fields: Fields) -> Fields:
    left = {*fields} - {RULE, *schema.void(CONTROL)}
    return {x: fields[x] for x in sorted(left) if fields[x] != usual.get(x)}

  complete = dict(methods)
  found = [others(f) for f in methods.values() if rule(f) == CONTROL]
  for fields in methods.values():
    own = others(fields)
    if rule(fields) == UNIFORM or own in found:
      continue
    found.append(own)
    shown = (f'{k.removeprefix("selection.")}={v}' for k, v in own.items())
    name = '+'.join([CONTROL, *shown])
    if name in complete:
      raise ConfigError(f'methods: {name!r} is what the control is called')
    complete[name] = {RULE: CONTROL, **own}
  return complete


def make(
  config: ml_collections.ConfigDict,
  methods: Mapping[str, Fields],
  grid: Mapping[str, Sequence[Any]],
) -> list[Entry]:
  """Every method at every point of the grid, once where it makes no difference.

  Raises:
    ConfigError: a config is bad; a method sets what is swept; two methods
      would have the same folder.
  """
  entries: dict[str, Entry] = {}
  for values in itertools.product(*grid.values()):
    for name, fields in methods.items():
      for field in grid:
        if field in fields:
          raise ConfigError(f'methods: {name!r} sets {field}, which is swept')
      rule = fields.get(RULE, config.selection.rule)
      void = schema.void(rule) + (POOL,) * (rule == UNIFORM)
      point = dict(zip(grid, values, strict=True))
      point = {k: v for k, v in point.items() if k not in void}
      changed = _apply(config, name, {**point, **fields})
      entry = Entry(name, point, changed)
      other = entries.setdefault(entry.folder, entry)
      if other.name != entry.name:
        raise ConfigError(
          f'methods: {entry.name!r} and {other.name!r} would have the same '
          f'folder, {entry.folder}'
        )
  for field, values in grid.items():
    if not any(field in entry.point for entry in entries.values()):
      raise ConfigError(
        f'sweep: {field}={values} is not allowed: none of the methods has it'
      )
  for entry in entries.values():
    try:
      schema.validate(entry.config)
    except ConfigError as error:
      raise ConfigError(f'{entry.name}: {error}') from error
  return list(entries.values())
