"""Draws docs/picture.svg: what MMS selects, from the library's own scores.

python docs/picture.py
"""

import pathlib

import numpy as np

import margin_jax

SIZE = 420
CLASSES = ('#d1495b', '#2e86ab', '#3c9d5d')


def main() -> None:
  """Three classes in a plane of features, a pool of 150, a batch of 30."""
  rng = np.random.default_rng(3)
  angles = np.pi / 2 + 2 * np.pi * np.arange(3) / 3
  kernel = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
  label = rng.integers(0, 3, 150)
  features = 1.1 * kernel.T[label] + 0.75 * rng.normal(size=(150, 2))
  logits = (features @ kernel).astype(np.float32)
  scores = margin_jax.mms_scores(logits, kernel)
  selected = set(np.asarray(margin_jax.select_lowest(scores, 30)).tolist())

  def to_pixels(point):
    x, y = SIZE / 2 + np.array([1, -1]) * point * SIZE / 6.4
    return f'{x:.1f}', f'{y:.1f}'

  lines = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE + 300}" '
    f'height="{SIZE}" font-family="sans-serif" font-size="15">',
    f'<rect width="{SIZE + 300}" height="{SIZE}" fill="white"/>',
  ]
  for angle in angles:
    # The boundary between two classes lies opposite to the third.
    x, y = to_pixels(-4.2 * np.array([np.cos(angle), np.sin(angle)]))
    lines.append(
      f'<line x1="{SIZE / 2}" y1="{SIZE / 2}" x2="{x}" y2="{y}" '
      'stroke="#444" stroke-width="1.5" stroke-dasharray="6 4"/>'
    )
  for i, point in enumerate(features):
    x, y = to_pixels(point)
    style = (
      f'r="6" fill="{CLASSES[label[i]]}" stroke="black" stroke-width="1.6"'
      if i in selected
      else f'r="4" fill="{CLASSES[label[i]]}" fill-opacity="0.35"'
    )
    lines.append(f'<circle cx="{x}" cy="{y}" {style}/>')
  left = SIZE + 10
  texts = [
    '1  forward on the pool (150)',
    '2  score = distance to the',
    '    nearest decision boundary',
    '3  select the 30 lowest (outlined)',
    '4  gradient step on those',
    '',
    'All four are one compiled program.',
  ]
  for row, text in enumerate(texts):
    lines.append(
      f'<text x="{left}" y="{120 + 27 * row}" xml:space="preserve">'
      f'{text}</text>'
    )
  path = pathlib.Path(__file__).with_suffix('.svg')
  path.write_text('\n'.join([*lines, '</svg>']) + '\n')


if __name__ == '__main__':
  main()
