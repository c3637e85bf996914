"""Draws docs/margin.svg: the margin of an example, from the library's numbers.

python docs/margin_picture.py
"""

import pathlib

import matplotlib
import numpy as np

import margin_jax
from margin_jax import figures

KERNEL = np.array([[0.0, 1.6, -1.4], [1.5, -0.9, -0.8]], np.float32)  # (D, C)
# Two examples of class 0: one that is classified, one that is not.
FEATURES = np.array([[-0.75, 1.25], [0.95, -0.35]], np.float32)
LABELS = np.array([0, 0])
COLORS = figures.BLUE, figures.ORANGE, figures.GREEN
SIDE = 2.2


def main() -> None:
  """Regions of three classes, and what a margin is in them."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  matplotlib.style.use(figures.STYLE)
  matplotlib.rcParams['svg.hashsalt'] = 'margin'
  logits = FEATURES @ KERNEL
  signed = np.asarray(margin_jax.signed_margins(logits, KERNEL, LABELS))
  rivals = np.asarray(margin_jax.competitors(logits, LABELS))

  fig, axes = plt.subplots(figsize=(4.4, 4.0))
  x, y = np.meshgrid(*2 * [np.linspace(-SIDE, SIDE, 301)])
  classes = np.argmax(np.stack([x, y], -1) @ KERNEL, -1)
  axes.contourf(
    x, y, classes, levels=[-0.5, 0.5, 1.5, 2.5], colors=COLORS, alpha=0.18
  )
  for name, (at_x, at_y) in enumerate(
    [(0.1, 1.95), (1.2, -1.8), (-1.75, -1.5)]
  ):
    axes.text(at_x, at_y, f'class {name}', color=COLORS[name], weight='bold')
  for point, label, rival, margin, side in zip(
    FEATURES, LABELS, rivals, signed, ('right', 'left'), strict=True
  ):
    normal = KERNEL[:, label] - KERNEL[:, rival]
    foot = point - margin * normal / np.linalg.norm(normal)
    axes.annotate(
      '', foot, point, arrowprops={'arrowstyle': '<|-|>', 'color': 'black'}
    )
    axes.plot(*point, 'o', color=COLORS[label], markeredgecolor='black')
    middle = (point + foot) / 2 + [0.14, -0.04 if margin > 0 else 0.08]
    axes.text(*middle, f'$d = {margin:.2f}$')
    beside = point[0] + (-0.1 if side == 'right' else 0.1)
    axes.text(beside, point[1], 'labelled 0', ha=side, va='center')
  axes.grid(visible=False)
  axes.set(
    xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), aspect='equal',
    xlabel=r'feature $\phi_1$', ylabel=r'feature $\phi_2$',
  )  # fmt: skip
  path = pathlib.Path(__file__).with_name('margin.svg')
  fig.savefig(path, metadata={'Date': None})


if __name__ == '__main__':
  main()
