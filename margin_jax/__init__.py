"""margin_jax: margin-based training of classifiers in JAX.

The functional API: pure functions for a training loop of your own. The
trainer is `python -m margin_jax.train`.
"""

import warnings as _warnings

import jax as _jax
import jaxlib as _jaxlib

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

if _jaxlib.__version__ == '0.10.2':
  _warnings.warn(
    'jaxlib 0.10.2 computes wrong results on CPU (jax-ml/jax#39103, #39257, '
    '#40412); install the versions pinned in requirements.txt',
    stacklevel=2,
  )

# All tests pass with the first and the last: those of requirements.txt.
_TESTED = ((0, 10, 1), (0, 12, 0, 1))
if not _TESTED[0] <= _jax.__version_info__[:4] <= _TESTED[1]:
  _first, _last = ('.'.join(map(str, version)) for version in _TESTED)
  _warnings.warn(
    f'margin_jax is tested with jax {_first} to {_last}, and this is jax '
    f'{_jax.__version__}',
    stacklevel=2,
  )
