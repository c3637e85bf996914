"""The margins of a trained run: `analyze(workdir)`, and the command."""

from margin_jax.analyze.report import analyze

__all__ = ['analyze']
