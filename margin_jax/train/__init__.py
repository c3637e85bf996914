"""The trainer: `train(config, workdir)`, and the command."""

from margin_jax.train.loop import train

__all__ = ['train']
