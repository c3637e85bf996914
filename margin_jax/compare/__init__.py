"""Compares methods on one budget: `compare(config, workdir)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from margin_jax.compare.experiment import compare

__all__ = ['compare']


def __getattr__(name: str) -> Any:
  """Imports what is asked for: the command says what it loads before."""
  if name != 'compare':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from margin_jax.compare.experiment import compare

  return compare
