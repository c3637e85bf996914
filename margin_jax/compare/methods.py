"""What is compared: methods, the grid of a sweep, trials.

A method is a rule and the config fields that it changes, such as `mms` or
`mms+reuse=5+pool_size=320`. It may also be a preset, `memory`, or a rule with a
preset, `random+memory`. A sweep spans a grid of config fields. A trial is a
method at a grid point. It is trained once for every seed.
"""

import contextlib
import copy
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from margin_jax import config as config_lib
from margin_jax import config_files, schedules
from margin_jax.checks import did_you_mean, nearest
from margin_jax.config import UNIFORM, ConfigError
from margin_jax.train import schema

Fields = dict[str, Any]

RULE = 'selection.rule'
# The rule that pays for scoring and does not use the scores.
CONTROL = 'random'
# Of a comparison that names none.
METHODS = (UNIFORM, CONTROL, 'mms', 'loss', 'entropy')


@dataclasses.dataclass(frozen=True)
class Trial:
  """A method at a grid point.

  Attributes:
    method: its name, as the user typed it.
    grid_point: the values of the swept fields that the method uses; {} without
      a sweep.
    config: the config of the first seed.
  """

  method: str
  grid_point: Fields
  config: ml_collections.ConfigDict

  @property
  def name(self) -> str:
    """The method and the grid point: 'mms, mmr.alpha=0.001'."""
    return ', '.join([self.method, *self._settings()])

  @property
  def folder(self) -> str:
    """Relative path for its files; each seed has a folder in it."""
    parts = [' '.join(self._settings()), self.method]
    return '/'.join(re.sub(r'[^\w.+=-]+', '_', x) for x in parts if x)

  def _settings(self) -> list[str]:
    return [f'{name}={value}' for name, value in self.grid_point.items()]


# From the text on the command line to fields.


def parse_methods(
  methods: Sequence[str] | Mapping[str, Fields],
  config: ml_collections.ConfigDict,
  named: Mapping[str, Fields] | None = None,
) -> dict[str, Fields]:
  """Returns the fields that each method changes, by the method's name.

  Args:
    methods: texts for `parse_method`, or fields by name.
    config: has every field.
    named: the fields of names that are not to be parsed.

  Raises:
    ConfigError: a method is given twice or cannot be parsed.
  """
  if isinstance(methods, Mapping):
    return {name: dict(fields) for name, fields in methods.items()}
  parsed: dict[str, Fields] = {}
  for name in methods:
    if name in parsed:
      raise ConfigError(f'methods: {name!r} is given twice')
    if named is not None and name in named:
      parsed[name] = dict(named[name])
    else:
      parsed[name] = parse_method(name, config)
  return parsed


def of_command_line(
  text: str | None, file: config_files.ConfigFile, baseline: str
) -> Sequence[str] | dict[str, Fields]:
  """Returns the methods that a flag names, else those of the config file.

  A config file may have methods of its own, `get_methods`. If the baseline is
  one of them, it is there, too.
  """
  get_methods = getattr(file.module, 'get_methods', None)
  named = get_methods(file.argument) if get_methods else {}
  if text is None:
    return named or METHODS
  names = split(text)
  if not all(names):
    raise ConfigError(f'methods={text!r} is not allowed: a name is empty')
  if baseline in named and baseline not in names:
    names = [baseline, *names]
  return parse_methods(names, file.config, named)


def baseline_of(file: config_files.ConfigFile) -> str:
  """Returns the baseline of a config file, which may have `get_baseline`."""
  get_baseline = getattr(file.module, 'get_baseline', None)
  return get_baseline(file.argument) if get_baseline else UNIFORM


def parse_method(text: str, config: ml_collections.ConfigDict) -> Fields:
  """Returns the fields that a text such as 'mms+reuse=5' sets.

  Args:
    text: a rule or a preset, then '+field=value' or '+preset' any number of
      times. A field of `selection` may stand without that word before it.
    config: has every field.

  Raises:
    ConfigError: unknown rule or field, or a value of another type.
  """
  where = f'methods: {text!r}'
  # A plus before a digit is part of a number, as in 1e+5.
  first, *settings = re.split(r'\+(?=[A-Za-z_])', text)
  known = config_lib.flatten(config)
  rules, presets = schema.choices(RULE), tuple(config_lib.PRESETS)
  fields: Fields = {}
  named = [name for name in (first, *settings) if name in presets]
  if len(named) > 1:
    raise ConfigError(f'{where}: only one of the presets {named} can be used')
  for name in named:
    fields |= config_lib.preset(name, config.data.name)
  if first not in presets:
    group = first.lower()
    if first not in rules and config_files.members(group):
      field = f'{group}.{config_files.members(group)[0]}'
      raise ConfigError(
        f'{where}: {first!r} is a group of config fields, which follow a rule: '
        f'{UNIFORM}+{field}=VALUE'
      )
    if first not in rules and first.partition('=')[0] in known:
      raise ConfigError(f'{where}: fields follow a rule: {UNIFORM}+{text}')
    if first not in rules:
      words = re.split(r'[\s;]+', text)
      near = nearest(first, (*rules, *presets))
      near = [','.join(words)] if len(words) > 1 else near
      raise ConfigError(
        f'{where}: {first!r} must be one of the rules {rules} or of the '
        f'presets {presets}{did_you_mean(near)}'
      )
    fields[RULE] = first
  given = set()
  for setting in settings:
    if setting in presets:
      continue
    name, equals, value = setting.partition('=')
    name = _full_name(name, where, known)
    if not equals:
      raise ConfigError(f'{where}: {setting!r} must be field=value')
    if name in given:
      raise ConfigError(f'{where}: {name} is given twice')
    given.add(name)
    fields[name] = _parse_value(config, name, value, where)
  return fields


def parse_sweep(
  texts: Iterable[str], config: ml_collections.ConfigDict
) -> dict[str, list[Any]]:
  """Returns the values of every swept field.

  Args:
    texts: such as 'mmr.alpha=1e-5,1e-4'.
    config: has every field.

  Raises:
    ConfigError: unknown field, no value, a value or a field given twice.
  """
  known = config_lib.flatten(config)
  grid: dict[str, list[Any]] = {}
  for text in texts:
    where = f'sweep: {text!r}'
    name, _, values = text.partition('=')
    name = _full_name(name, where, known)
    if name in grid:
      raise ConfigError(f'{where}: {name} is given twice')
    if not all(split(values)):
      raise ConfigError(f'{where} must be field=value,value,...')
    grid[name] = [_parse_value(config, name, x, where) for x in split(values)]
    if len({*map(repr, grid[name])}) < len(grid[name]):
      raise ConfigError(f'{where}: a value is given twice')
  return grid


def split(text: str) -> list[str]:
  """Splits at the commas that stand in no bracket and no quotation."""
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


def _full_name(name: str, where: str, known: Iterable[str]) -> str:
  """Returns the dotted name of a field; selection's come first."""
  full = next((x for x in (f'selection.{name}', name) if x in known), None)
  if full is None:
    raise ConfigError(f'{where}: {config_files.unknown_field(name)}')
  if full in ('seed', RULE):
    flag = '--seeds' if full == 'seed' else '--methods'
    raise ConfigError(f'{where}: set {full} by {flag}')
  return full


def _parse_value(
  config: ml_collections.ConfigDict, name: str, text: str, where: str
) -> Any:
  """Returns the value that --config.name=text would give the field."""
  try:
    return config_files.parse_value(config, name, text)
  except ConfigError as error:
    raise ConfigError(f'{where}: {error}') from error


# From fields to trials.


def make_trials(
  config: ml_collections.ConfigDict,
  methods: Mapping[str, Fields],
  grid: Mapping[str, Sequence[Any]],
) -> list[Trial]:
  """Returns every method at every grid point.

  A swept field has no effect on some methods, such as `pool_size` on one that
  scores nothing. It is not part of their trials, so that there is one of them
  and not one for each value.

  Raises:
    ConfigError: a config is bad; a method sets what is swept, or none uses it;
      two methods would have the same folder.
  """
  trials: dict[str, Trial] = {}
  for values in itertools.product(*grid.values()):
    for method, fields in methods.items():
      for field in grid:
        if field in fields:
          raise ConfigError(f'methods: {method!r} sets {field}, which is swept')
      grid_point = dict(zip(grid, values, strict=True))
      trial = _make_trial(config, method, fields, grid_point)
      unused = config_lib.without_effect(config_lib.flatten(trial.config))
      if any(field in unused for field in grid_point):
        used = {k: v for k, v in grid_point.items() if k not in unused}
        trial = _make_trial(config, method, fields, used)
      other = trials.setdefault(trial.folder, trial)
      if other.name != trial.name:
        raise ConfigError(
          f'methods: {trial.name!r} and {other.name!r} would have the same '
          f'folder, {trial.folder}'
        )
  names = [trial.name for trial in trials.values()]
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(f'methods: two trials would be called {name!r}')
  for field, values in grid.items():
    if not any(field in trial.grid_point for trial in trials.values()):
      raise ConfigError(
        f'sweep: {field}={values} is not allowed: it has no effect on any of '
        'the methods'
      )
  return list(trials.values())


def _make_trial(
  config: ml_collections.ConfigDict,
  method: str,
  fields: Fields,
  grid_point: Fields,
) -> Trial:
  changed = _with_fields(config, method, {**grid_point, **fields})
  trial = Trial(method, grid_point, changed)
  with named_errors(trial.name):
    schema.validate(trial.config)
  return trial


def _with_fields(
  config: ml_collections.ConfigDict, method: str, fields: Fields
) -> ml_collections.ConfigDict:
  """Returns a copy of the config with a method's fields."""
  changed = copy.deepcopy(config)
  known = config_lib.flatten(config)
  for field, value in fields.items():
    if field not in known:
      raise ConfigError(f'methods: {method!r}: {field!r} is not a config field')
    try:
      changed.update_from_flattened_dict({field: value})
    except TypeError as error:
      raise ConfigError(f'methods: {method!r}: {field}: {error}') from error
  return schedules.shortened(changed, config.steps, keep=fields)


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
  """Puts a name in front of the message of a `ConfigError`."""
  try:
    yield
  except ConfigError as error:
    raise ConfigError(f'{name}: {error}') from error


def with_baseline(
  methods: Mapping[str, Fields],
  baseline: str,
  config: ml_collections.ConfigDict,
) -> dict[str, Fields]:
  """Returns the methods after the baseline, a rule that is missing there.

  Raises:
    ConfigError: the baseline is neither a method nor can be parsed as one.
  """
  try:
    return {baseline: parse_method(baseline, config), **methods}
  except ConfigError as error:
    raise ConfigError(
      f'baseline={baseline!r} is not allowed: it must be one of {[*methods]}, '
      'or a rule'
    ) from error


def with_controls(
  methods: Mapping[str, Fields], config: ml_collections.ConfigDict
) -> dict[str, Fields]:
  """Returns the methods, and with them the controls that are missing.

  The control of a method that scores selects at random and changes the same
  fields, so that it costs the same: `random+reuse=5` for `mms+reuse=5`.

  Args:
    methods: each makes a valid config.
    config: what they change.

  Raises:
    ConfigError: another method has the name of a control.
  """
  unchanged = config_lib.flatten(config)

  def rule(fields: Fields) -> str:
    return fields.get(RULE, unchanged[RULE])

  def settings(method: str, fields: Fields) -> Fields:
    """The fields but for the rule, as far as the control uses them."""
    control = _with_fields(config, method, {**fields, RULE: CONTROL})
    unused = config_lib.without_effect(config_lib.flatten(control))
    return {
      name: fields[name]
      for name in sorted({*fields} - {RULE, *unused})
      if fields[name] != unchanged[name]
      or ('steps' in fields and name in schedules.FIELDS)  # which is not scaled
    }

  complete = dict(methods)
  controls = [
    settings(method, fields)
    for method, fields in methods.items()
    if rule(fields) == CONTROL
  ]
  for method, fields in methods.items():
    if rule(fields) == UNIFORM:
      continue
    own = settings(method, fields)
    if own in controls:
      continue
    controls.append(own)
    name = '+'.join([CONTROL, *_as_text(own, config)])
    if name in complete:
      raise ConfigError(f'methods: {name!r} is the name of the control')
    complete[name] = {RULE: CONTROL, **own}
  return complete


def _as_text(fields: Fields, config: ml_collections.ConfigDict) -> list[str]:
  """Returns what follows a rule to set the fields: a preset's by its name."""
  for preset in config_lib.PRESETS:
    known = config_lib.flatten(config)
    whole = {
      name: value
      for name, value in config_lib.preset(preset, config.data.name).items()
      if name != RULE and known[name] != value
    }
    if whole and whole.items() <= fields.items():
      rest = {k: v for k, v in fields.items() if k not in whole}
      return [preset, *_as_text(rest, config)]
  return [f'{k.removeprefix("selection.")}={v}' for k, v in fields.items()]


def warnings(
  trials: Sequence[Trial], methods: Mapping[str, Fields]
) -> list[str]:
  """Returns a line for each field that the user set and that has no effect.

  A field of the config is for the methods that use it: there is a line if none
  does. A field of a method must have an effect there.
  """
  unused = [schema.set_in_vain(trial.config) for trial in trials]
  nowhere = set.intersection(*map(set, unused))
  lines = [
    f'warning: {field} has no effect on any method: {reason}'
    for field, reason in unused[0].items()
    if field in nowhere
  ]
  for trial, reasons in zip(trials, unused, strict=True):
    lines += [
      f'warning: {trial.name}: {field} has no effect: {reason}'
      for field, reason in reasons.items()
      if field in methods[trial.method] and field not in nowhere
    ]
    if 'steps' in methods[trial.method]:
      lines += [
        f'{trial.name}: {line}' for line in schema.never_reached(trial.config)
      ]
  rising = {trial.name: schema.rising_mmr(trial.config) for trial in trials}
  if all(rising.values()):
    return [*lines, *rising[trials[0].name]]
  return [*lines, *(f'{k}: {line}' for k, x in rising.items() for line in x)]
