"""margin_jax: margin-based training of classifiers in JAX.

The functional API: pure functions for your own training loop. The trainer is
`python -m margin_jax.train`.
"""

import importlib as _importlib
import importlib.metadata as _metadata
import re as _re
import warnings as _warnings
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
  from margin_jax.linearized import at_layers, layer_margins
  from margin_jax.losses import large_margin_loss, mmr_penalty, trimmed_mean
  from margin_jax.margins import competitors, mms_scores, signed_margins
  from margin_jax.registry import (
    register_dataset,
    register_loss,
    register_model,
    register_optimizer,
    register_rule,
  )
  from margin_jax.selection import query, select_lowest, take_lowest
  from margin_jax.signatures import fit_generalization_gap
  from margin_jax.trained import Trained, load

__version__ = '0.1.0'

__all__ = [
  'Trained',
  'at_layers',
  'competitors',
  'fit_generalization_gap',
  'large_margin_loss',
  'layer_margins',
  'load',
  'mmr_penalty',
  'mms_scores',
  'query',
  'register_dataset',
  'register_loss',
  'register_model',
  'register_optimizer',
  'register_rule',
  'select_lowest',
  'signed_margins',
  'take_lowest',
  'trimmed_mean',
]

# Imported when it is asked for, so that a command can say what it loads.
_HOMES = {
  'Trained': 'trained',
  'at_layers': 'linearized',
  'competitors': 'margins',
  'fit_generalization_gap': 'signatures',
  'large_margin_loss': 'losses',
  'layer_margins': 'linearized',
  'load': 'trained',
  'mmr_penalty': 'losses',
  'mms_scores': 'margins',
  'query': 'selection',
  'register_dataset': 'registry',
  'register_loss': 'registry',
  'register_model': 'registry',
  'register_optimizer': 'registry',
  'register_rule': 'registry',
  'select_lowest': 'selection',
  'signed_margins': 'margins',
  'take_lowest': 'selection',
  'trimmed_mean': 'losses',
}


def __getattr__(name: str) -> _Any:
  """Imports a function of the API, or a module of the package."""
  if name.startswith('_'):
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  try:
    module = _importlib.import_module(f'{__name__}.{_HOMES.get(name, name)}')
  except ModuleNotFoundError as error:
    if error.name != f'{__name__}.{name}':
      raise
    raise AttributeError(
      f'module {__name__!r} has no attribute {name!r}'
    ) from None
  return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
  """Names what is not imported yet, too."""
  return sorted({*globals(), *__all__})


if _metadata.version('jaxlib') == '0.10.2':
  _warnings.warn(
    'jaxlib 0.10.2 computes wrong results on CPU (jax-ml/jax#39103, #39257, '
    '#40412); install the versions pinned in requirements.txt',
    stacklevel=2,
  )

# All tests pass with the first and the last: those of requirements.txt.
_TESTED = ((0, 10, 1), (0, 12, 0, 1))
_jax = _metadata.version('jax')
_release = tuple(map(int, _re.findall(r'\d+', _re.match(r'[\d.]+', _jax)[0])))
if not _TESTED[0] <= _release <= _TESTED[1]:
  _first, _last = ('.'.join(map(str, version)) for version in _TESTED)
  _warnings.warn(
    f'margin_jax is tested with jax {_first} to {_last}, and this is jax '
    f'{_jax}',
    stacklevel=2,
  )
