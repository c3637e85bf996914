"""Draws docs/picture.svg: what MMS selects, from the library's own scores.

python docs/picture.py
"""

import pathlib

import numpy as np

import margin_jax
from margin_jax import figures

CLASSES = (
  (figures.RED, 'o'), (figures.BLUE, 's'), (figures.GREEN, '^')
)  # fmt: skip
TEXT = """1  forward on the pool (150 examples)
2  score: the distance to the nearest
    boundary between two classes (dashed)
3  select the 30 lowest (dark edge)
4  gradient step on those

All four are one compiled program."""


def main() -> None:
  """Three classes in a plane of features, a pool of 150, a batch of 30."""
  rng = np.random.default_rng(3)
  angles = np.pi / 2 + 2 * np.pi * np.arange(3) / 3
  kernel = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
  label = rng.integers(0, 3, 150)
  features = 1.1 * kernel.T[label] + 0.75 * rng.normal(size=(150, 2))
  logits = (features @ kernel).astype(np.float32)
  scores = margin_jax.mms_scores(logits, kernel)
  selected = np.isin(
    np.arange(150), np.asarray(margin_jax.select_lowest(scores, 30))
  )
  path = pathlib.Path(__file__).with_suffix('.svg')
  with figures.drawing(path, 3.6, suffixes=('.svg',)) as figure:
    axes, beside = figure.subplots(1, 2, width_ratios=(1.1, 1))
    for x, y in -4.2 * kernel.T:  # a boundary lies opposite to the third class
      axes.plot([0, x], [0, y], color='0.3', linestyle='--', zorder=1)
    for i, (color, marker) in enumerate(CLASSES):
      for chosen, look in (
        (False, {'markersize': 4, 'alpha': 0.4, 'markeredgewidth': 0}),
        (True, {'markersize': 6, 'markeredgecolor': 'black'}),
      ):
        own = features[(label == i) & (selected == chosen)]
        axes.plot(*own.T, marker, color=color, **look)
    axes.set_aspect('equal')
    axes.set_xlim(-3.2, 3.2)
    axes.set_ylim(-3.2, 3.2)
    axes.set_axis_off()
    beside.set_axis_off()
    beside.text(0, 0.5, TEXT, va='center', linespacing=1.6, fontsize=10)


if __name__ == '__main__':
  main()
