"""The trainer: `train(config, workdir)`, and the command."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from margin_jax.train.loop import train

__all__ = ['train']


def __getattr__(name: str) -> Any:
  """Imports what is asked for: the command says what it loads before."""
  if name != 'train':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from margin_jax.train.loop import train

  return train
