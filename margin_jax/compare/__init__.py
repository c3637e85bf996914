"""Methods compared on one budget: `compare(config, workdir)`."""

from margin_jax.compare.experiment import compare

__all__ = ['compare']
