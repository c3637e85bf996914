"""What one value may be: a test of it, and the words for a message."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
  """A test of a value, and the words for it.

  Attributes:
    holds: value -> whether it is allowed.
    allowed: () -> what would be, to follow 'it must be'.
    type: the type of values other than None.
    choices: () -> the names to choose from, where a value is a name.
  """

  holds: Callable[[Any], bool]
  allowed: Callable[[], str]
  type: type
  choices: Callable[[], tuple[str, ...]] = tuple


def flag() -> Check:
  """Allows True and False."""
  return Check(
    lambda value: isinstance(value, bool), lambda: 'True or False', bool
  )


def integer(least: int, *, bits: int = 31) -> Check:
  """Allows an integer in [least, 2**bits)."""

  def holds(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and least <= value < 2**bits

  allowed = f'an integer, at least {least} and below 2**{bits}'
  return Check(holds, lambda: allowed, int)


def parse_integer(text: str) -> int:
  """Returns the integer of '1000' or '1e3'.

  Raises:
    ValueError: it is none.
  """
  try:
    return int(text)
  except ValueError:
    value = float(text)
    if not value.is_integer():
      raise
    return int(value)


def number(
  *,
  least: float | None = None,
  above: float | None = None,
  most: float | None = None,
  below: float | None = None,
) -> Check:
  """Allows a finite number; each bound may be left out."""
  bounds = {
    'at least': (least, lambda value: value >= least),
    'above': (above, lambda value: value > above),
    'at most': (most, lambda value: value <= most),
    'below': (below, lambda value: value < below),
  }
  given = {
    f'{words} {bound:g}': test
    for words, (bound, test) in bounds.items()
    if bound is not None
  }

  def holds(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (
      is_number
      and all(test(value) for test in given.values())
      and abs(value) <= sys.float_info.max  # not NaN; isfinite wants a float
    )

  allowed = f'a finite number, {" and ".join(given)}'
  return Check(holds, lambda: allowed, float)


def number_or(check: Check, *words: str) -> Check:
  """Allows what a check of a number allows, and some words."""
  return Check(
    lambda value: value in words or check.holds(value),
    lambda: f'{check.allowed()}, or {" or ".join(map(repr, words))}',
    object,
  )


def string() -> Check:
  """Allows a string that is not empty."""
  return Check(
    lambda value: isinstance(value, str) and value != '',
    lambda: 'a string that is not empty',
    str,
  )


def text() -> Check:
  """Allows any string."""
  return Check(lambda value: isinstance(value, str), lambda: 'a string', str)


def one_of(*names: str) -> Check:
  """Allows one of these strings."""
  return known(lambda: names)


def known(choices: Callable[[], Iterable[str]]) -> Check:
  """Allows one of the strings that there are by then; some are registered."""

  def names() -> tuple[str, ...]:
    return tuple(choices())

  return Check(
    lambda value: isinstance(value, str) and value in names(),
    lambda: f'one of {names()}',
    str,
    names,
  )


def optional(check: Check) -> Check:
  """Allows None, and what `check` allows."""
  return dataclasses.replace(
    check,
    holds=lambda value: value is None or check.holds(value),
    allowed=lambda: f'None or {check.allowed()}',
  )


def several(each: Check, *, order: str = '', least: int = 0) -> Check:
  """Allows a tuple of at least so many values, each of which `each` allows.

  Args:
    each: the check of each value.
    order: '' for any, or 'different' or 'increasing'.
    least: how many there must be.
  """
  count = 'one or more' if least == 1 else f'{least} or more' if least else ''
  words = ' '.join(filter(None, [count, order, 'values']))

  def holds(values: Any) -> bool:
    return (
      isinstance(values, tuple)
      and len(values) >= least
      and all(map(each.holds, values))
      and (not order or len({*values}) == len(values))
      and (order != 'increasing' or [*values] == sorted(values))
    )

  return Check(
    holds, lambda: f'a tuple of {words}, each {each.allowed()}', tuple
  )


def items(each: Check, *, least: int = 0) -> Check:
  """Allows a list, as JSON has it, of values that `each` allows."""

  def holds(values: Any) -> bool:
    is_list = isinstance(values, list) and len(values) >= least
    return is_list and all(map(each.holds, values))

  return Check(holds, lambda: f'a list, each {each.allowed()}', list)


def dtype() -> Check:
  """Allows the name of a dtype of numbers."""

  def holds(value: Any) -> bool:
    try:
      return isinstance(value, str) and np.dtype(value).kind in 'biuf'
    except TypeError:
      return False

  return Check(holds, lambda: 'the name of a dtype of numbers', str)


def mapping(**values: Check) -> Check:
  """Allows a dict that has such values, and maybe others.

  Args:
    **values: a check of each key's value, which is None where it is missing.
  """

  def holds(value: Any) -> bool:
    return isinstance(value, dict) and all(
      check.holds(value.get(name)) for name, check in values.items()
    )

  def allowed() -> str:
    parts = [f'{name!r}, {check.allowed()}' for name, check in values.items()]
    return ' with '.join(['an object', *(['; '.join(parts)] if parts else [])])

  return Check(holds, allowed, dict)


def mappings() -> Check:
  """Allows a dict of dicts."""

  def holds(values: Any) -> bool:
    return isinstance(values, dict) and all(
      isinstance(value, dict) for value in values.values()
    )

  return Check(holds, lambda: 'an object of objects', dict)


def numbers(names: tuple[str, ...]) -> Check:
  """Allows a dict of numbers that are not negative, by some of the names."""
  each = number(least=0)

  def holds(values: Any) -> bool:
    return (
      isinstance(values, dict)
      and {*values} <= {*names}
      and all(map(each.holds, values.values()))
    )

  return Check(holds, lambda: f'numbers by the names {names}', dict)


def arrays() -> Check:
  """Allows a dict of lists of numbers, or of lists of equally many numbers."""

  def holds(values: Any) -> bool:
    try:
      return isinstance(values, dict) and all(
        np.asarray(x, np.float64).ndim > 0 for x in values.values()
      )
    except (TypeError, ValueError, OverflowError):
      return False

  return Check(holds, lambda: 'lists of numbers', dict)


def nearest(
  name: str, choices: Iterable[str], cutoff: float = 0.6
) -> list[str]:
  """Returns up to three of the choices that somebody may have meant.

  Case does not count. Where some are very near, others are not returned.
  """
  spelled = {choice.lower(): choice for choice in choices}
  for least in (1, 0.9, cutoff):
    near = difflib.get_close_matches(name.lower(), spelled, 3, least)
    if near:
      break
  return [spelled[x] for x in near]


def did_you_mean(names: Sequence[str]) -> str:
  """Returns what to append to a message; nothing without names."""
  return f'; did you mean {" or ".join(names)}?' if names else ''
