"""The margins of a trained run: `analyze(workdir)`, and the command."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from margin_jax.analyze.report import analyze

__all__ = ['analyze']


def __getattr__(name: str) -> Any:
  """Imports what is asked for: the command says what it loads before."""
  if name != 'analyze':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from margin_jax.analyze.report import analyze

  return analyze
