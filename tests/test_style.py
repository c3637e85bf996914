"""The style of figures: looks of methods, sizes, files."""

import colorsys

import numpy as np
import pytest

from margin_jax import figures


@pytest.mark.parametrize('name', figures.METHODS)
def test_a_method_looks_the_same_in_every_figure(name):
  alone = figures.looks([name])[name]
  among = figures.looks(['a', 'b', name, 'c'])[name]
  for key in ('color', 'marker', 'linestyle'):
    assert alone[key] == among[key]


def test_settings_keep_the_colour_of_the_rule_and_presets_their_marker():
  mms, reuse = figures.look('mms'), figures.look('mms+reuse=5')
  assert mms[0] == reuse[0]
  assert mms[1:] != reuse[1:]
  memory = figures.look('memory')
  assert figures.look('loss+memory')[:2] == (figures.look('loss')[0], memory[1])
  assert figures.look('mms, mmr.alpha=0.001') == mms
  assert figures.look('uniform (standard)')[0] == figures.look('uniform')[0]


def test_no_two_methods_of_a_figure_look_alike():
  names = [f'mms, alpha={i}' for i in range(9)] + [
    f'mine{i}' for i in range(20)
  ]
  looks = figures.looks(names)
  assert len({(x['color'], x['marker']) for x in looks.values()}) == len(names)


def test_colours_are_told_apart_by_colour_blind_readers():
  """Viénot's deuteranopia (1999), in linear RGB: none fall together."""

  def rgb(color):
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])

  def seen(color):
    linear = rgb(color) ** 2.2
    matrix = [
      [0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0],
      [-0.02234, 0.02234, 1.0],
    ]  # fmt: skip
    return np.clip(np.array(matrix) @ linear, 0, 1) ** (1 / 2.2)

  colors = [seen(x) for x in figures.COLORS]
  for i, one in enumerate(colors):
    for other in colors[:i]:
      assert np.abs(one - other).max() > 0.1
  # Yellow lines on white could not be seen: none is as light.
  lightness = [colorsys.rgb_to_hls(*rgb(x))[1] for x in figures.COLORS]
  assert max(lightness) < 0.72


def test_a_figure_is_a_png_and_a_pdf_the_same_each_time(tmp_path):
  found = []
  for name in ('a.png', 'b.png'):
    with figures.drawing(tmp_path / name, 2, figures.COLUMN) as figure:
      axes = figure.subplots()
      axes.plot([1, 2], [1, 2])
      assert axes.xaxis.label.get_size() == 8
    found.append([(tmp_path / name).with_suffix(x) for x in ('.png', '.pdf')])
  first, second = ([x.read_bytes() for x in paths] for paths in found)
  assert first == second
  assert first[0].startswith(b'\x89PNG')
  assert first[1].startswith(b'%PDF')
  assert not [*tmp_path.glob('.*')]


def test_the_style_is_there_for_figures_of_ones_own():
  from matplotlib import rcParams, style

  before = rcParams['font.size']
  with style.context(figures.STYLE):
    assert rcParams['font.size'] == 8
    cycle = rcParams['axes.prop_cycle'].by_key()['color']
    assert ['#' + x.lstrip('#') for x in cycle] == [*figures.COLORS]
  assert rcParams['font.size'] == before
