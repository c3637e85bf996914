"""Figures as PNG files, by matplotlib and without a display."""

import pathlib
from typing import Any

from margin_jax import files


def new(width: float, height: float) -> Any:
  """Returns an empty matplotlib figure of so many inches."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # Not pyplot: it would look for a display, and keep the figure in memory.
  figure = Figure((width, height), layout='constrained')
  FigureCanvasAgg(figure)
  return figure


def save(figure: Any, path: pathlib.Path, dpi: int) -> None:
  """Writes a figure as a PNG file, whole or not at all."""
  with files.whole(path) as aside:
    figure.savefig(aside, format='png', dpi=dpi)
