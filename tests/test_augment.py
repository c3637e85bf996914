"""Augmentations against Pillow, pixel by pixel, and what chance decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from margin_jax import data
from margin_jax.data import augment, autoaugment, image_ops, normalization
from margin_jax.data.autoaugment import IDENTITY, MAGNITUDES, OPERATIONS, POLICY
from tests import helpers

GREY = (128, 128, 128)
# What the paper's table of operations gives for ten magnitudes; (24, 20) is
# the size (height, width) of the images below.
HEIGHT, WIDTH = 24, 20
TENTH = np.arange(10) / 9
FACTORS = [0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9]


def moved(image, matrix):
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, fillcolor=GREY
  )


# Pillow's own operations: (image, level, sign) -> image.
PILLOW = {
  'shear_x': lambda im, i, s: moved(im, (1, s * 0.3 * TENTH[i], 0, 0, 1, 0)),
  'shear_y': lambda im, i, s: moved(im, (1, 0, 0, s * 0.3 * TENTH[i], 1, 0)),
  'translate_x': lambda im, i, s: moved(
    im, (1, 0, s * int(150 / 331 * TENTH[i] * im.width), 0, 1, 0)
  ),
  'translate_y': lambda im, i, s: moved(
    im, (1, 0, 0, 0, 1, s * int(150 / 331 * TENTH[i] * im.height))
  ),
  'rotate': lambda im, i, s: im.rotate(s * 30 * TENTH[i], fillcolor=GREY),
  'auto_contrast': lambda im, i, s: ImageOps.autocontrast(im),
  'invert': lambda im, i, s: ImageOps.invert(im),
  'equalize': lambda im, i, s: ImageOps.equalize(im),
  'solarize': lambda im, i, s: ImageOps.solarize(im, 256 - 256 * TENTH[i]),
  'posterize': lambda im, i, s: ImageOps.posterize(
    im, (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)[i]
  ),
  'contrast': lambda im, i, s: ImageEnhance.Contrast(im).enhance(FACTORS[i]),
  'color': lambda im, i, s: ImageEnhance.Color(im).enhance(FACTORS[i]),
  'brightness': lambda im, i, s: ImageEnhance.Brightness(im).enhance(
    FACTORS[i]
  ),
  'sharpness': lambda im, i, s: ImageEnhance.Sharpness(im).enhance(FACTORS[i]),
}


def pictures(height=HEIGHT, width=WIDTH):
  """Noise, smooth, narrow, two-valued, constant, and almost constant."""
  rng = np.random.default_rng(0)
  shape = (height, width, 3)
  noise = rng.integers(0, 256, shape, np.uint8)
  y, x = np.mgrid[:height, :width]
  waves = 128 + 100 * np.sin(y[..., None] / 5 + x[..., None] / 3 + np.arange(3))
  spot = np.full(shape, 90, np.uint8)
  spot[3, 4] = (0, 91, 255)
  found = [noise, waves, rng.normal((90, 128, 200), (5, 20, 30), shape)]
  found += [255 * (noise > 99), np.full(shape, (0, 77, 255)), spot]
  found += [rng.integers(40, 51, shape), rng.exponential(30, shape)]
  return np.stack([np.clip(image, 0, 255).astype(np.uint8) for image in found])


IMAGES = pictures()


@functools.cache
def operate():
  """Every image by every (operation, level, negated)."""
  function = jax.vmap(autoaugment.operate, (0, None, None, None))
  return jax.jit(jax.vmap(function, (None, 0, 0, 0)))


def by_pillow(array, name, level, negated):
  sign = -1 if negated else 1
  return np.asarray(PILLOW[name](Image.fromarray(array), level, sign))


def may_differ(array):
  """Where 255 (v - low) / (high - low) is whole: Pillow's double may fall."""
  low = array.min((0, 1)).astype(int)
  extent = array.max((0, 1)).astype(int) - low
  return 255 * (array - low) % np.maximum(extent, 1) == 0


@pytest.mark.parametrize('name', OPERATIONS)
def test_an_operation_is_pillows_at_every_magnitude(name):
  # Exact, floating point of Pillow's included, but for auto-contrast.
  cases = [(i, n) for i in range(MAGNITUDES) for n in (False, True)]
  level, negated = (np.array(x) for x in zip(*cases, strict=True))
  operation = np.full(len(cases), OPERATIONS.index(name))
  outputs = np.asarray(operate()(IMAGES, operation, level, negated))
  assert outputs.dtype == np.uint8
  for case, found in zip(cases, outputs, strict=True):
    for array, image in zip(IMAGES, found, strict=True):
      expected = by_pillow(array, name, *case)
      if name == 'auto_contrast':
        difference = image.astype(int) - expected
        assert {*np.unique(difference)} <= {0, 1}
        assert not difference[~may_differ(array)].any()
      else:
        np.testing.assert_array_equal(image, expected, str(case))


def test_identity_changes_nothing_and_magnitude_0_moves_nothing():
  identity = np.full(10, IDENTITY)
  outputs = operate()(IMAGES, identity, np.arange(10), identity > 0)
  assert (np.asarray(outputs) == IMAGES).all()
  geometric = np.arange(5)
  outputs = operate()(IMAGES, geometric, 0 * geometric, geometric > 2)
  assert (np.asarray(outputs) == IMAGES).all()


@pytest.mark.parametrize('shape', [(32, 32), (7, 5), (2, 3)])
def test_geometry_and_smoothing_are_pillows_at_other_sizes(shape):
  array = pictures(*shape)[0] if min(shape) > 4 else IMAGES[0, :2, :3]
  for name in ('shear_x', 'translate_y', 'rotate', 'sharpness'):
    operation = jnp.int32(OPERATIONS.index(name))
    for level in (4, 9):
      found = jax.jit(autoaugment.operate)(
        array, operation, jnp.int32(level), jnp.bool_(True)
      )
      expected = by_pillow(array, name, level, True)
      np.testing.assert_array_equal(found, expected, name)


@functools.cache
def drawn(count=20_000, seed=3):
  keys = jax.random.split(jax.random.key(seed), count)
  return jax.tree.map(np.asarray, jax.jit(jax.vmap(autoaugment.sample))(keys))


POLICY_TABLE = """
invert 1 7 contrast 2 6
rotate 7 2 translate_x 3 9
sharpness 8 1 sharpness 9 3
shear_y 5 8 translate_y 7 9
auto_contrast 5 8 equalize 9 2
shear_y 2 7 posterize 3 7
color 4 3 brightness 6 7
sharpness 3 9 brightness 7 9
equalize 6 5 equalize 5 1
contrast 6 7 sharpness 6 5
color 7 7 translate_x 5 8
equalize 3 7 auto_contrast 4 8
translate_y 4 3 sharpness 2 6
brightness 9 6 color 2 8
solarize 5 2 invert 0 3
equalize 2 0 auto_contrast 6 0
equalize 2 8 equalize 6 4
color 9 9 equalize 6 6
auto_contrast 8 4 solarize 2 8
brightness 1 3 color 7 0
solarize 4 5 auto_contrast 9 3
translate_y 9 9 translate_y 7 9
auto_contrast 9 2 solarize 8 3
equalize 8 8 invert 1 3
translate_y 7 9 auto_contrast 9 1
"""


def test_the_policy_has_the_papers_25_sub_policies():
  assert len(POLICY) == 25
  assert {len(pair) for pair in POLICY} == {2}
  for name, probability, level in sum(POLICY, ()):
    assert name in OPERATIONS
    assert 0 <= probability <= 1
    assert level in range(10)
  # The paper's table, typed again: operation, tenths, magnitude.
  table = [
    tuple(
      (name, f'0.{tenths}', int(level))
      for name, tenths, level in zip(*[iter(line.split())] * 3, strict=True)
    )
    for line in POLICY_TABLE.strip().splitlines()
  ]
  found = [tuple((n, f'{p:.1f}', m) for n, p, m in pair) for pair in POLICY]
  assert found == table


def test_sub_policies_are_uniform_and_signs_fair():
  found = drawn()
  count = len(found.sub_policy)
  observed = np.bincount(found.sub_policy, minlength=25)
  assert observed.shape == (25,)
  chi_square = np.sum((observed - count / 25) ** 2) / (count / 25)
  assert chi_square < 51.2  # 0.999 of 24 degrees of freedom
  for i in range(2):
    assert abs(found.negated[:, i].mean() - 0.5) < 4 * 0.5 / np.sqrt(count)
  both = found.negated[:, 0] == found.negated[:, 1]  # independent
  assert abs(both.mean() - 0.5) < 4 * 0.5 / np.sqrt(count)


def test_operations_are_applied_by_their_probabilities():
  found = drawn()
  for row, pair in enumerate(POLICY):
    applied = found.applied[found.sub_policy == row]
    shares = [x[1] for x in pair]
    for i, share in enumerate(shares):
      slack = 4.5 * np.sqrt(share * (1 - share) / len(applied))
      assert abs(applied[:, i].mean() - share) <= slack, (row, i)
    share = shares[0] * shares[1]
    slack = 4.5 * np.sqrt(share * (1 - share) / len(applied))
    assert abs(applied.all(axis=1).mean() - share) <= slack, row


@pytest.mark.slow
def test_autoaugment_is_the_composition_that_was_drawn():
  count = 400
  keys = jax.random.split(jax.random.key(0), count)
  arrays = IMAGES[np.arange(count) % len(IMAGES)]
  outputs = np.asarray(jax.jit(jax.vmap(autoaugment.autoaugment))(keys, arrays))
  plan = jax.jit(jax.vmap(autoaugment.sample))(keys)
  plan = jax.tree.map(np.asarray, plan)
  assert {*plan.sub_policy} == {*range(25)}
  changed = 0
  for i, (array, found) in enumerate(zip(arrays, outputs, strict=True)):
    expected, slack = array, 0
    for j, (name, _, level) in enumerate(POLICY[plan.sub_policy[i]]):
      if plan.applied[i, j]:
        expected = by_pillow(expected, name, level, plan.negated[i, j])
        slack = max(slack, int(name == 'auto_contrast'))
    difference = found.astype(int) - expected
    assert abs(difference).max() <= slack, POLICY[plan.sub_policy[i]]
    changed += (expected != array).any()
  assert changed > count / 2


def test_autoaugment_refuses_images_that_are_not_rgb():
  words = r"data\.augmentations: 'autoaugment' needs RGB .* 1 channel"
  with pytest.raises(ValueError, match=words):
    data.load('digits', augmentations=('autoaugment',))
  with pytest.raises(ValueError, match=words):
    autoaugment.autoaugment(jax.random.key(0), jnp.zeros((8, 8, 1), jnp.uint8))


@pytest.mark.parametrize('size', [1, 3, 4, 9])
def test_cutout_covers_every_square_equally_often(size):
  height, width = 5, 4
  image = np.random.default_rng(0).integers(1, 200, (height, width, 2))
  image = image.astype(np.uint8)
  fill = np.array([255, 0], np.uint8)
  squares = []
  for row in range(height):
    for column in range(width):
      squares.append(image.copy())
      for i in range(height):
        for j in range(width):
          if (
            0 <= i - (row - size // 2) < size
            and 0 <= j - (column - size // 2) < size
          ):
            squares[-1][i, j] = fill
  counts = dict.fromkeys((x.tobytes() for x in squares), 0)
  weights = dict.fromkeys(counts, 0)
  for square in squares:
    weights[square.tobytes()] += 1  # some are alike after clipping
  keys = jax.random.split(jax.random.key(0), 4000)
  function = functools.partial(augment.cutout, size=size, fill=fill)
  outputs = jax.jit(jax.vmap(function, (0, None)))(keys, image)
  assert outputs.dtype == jnp.uint8
  for output in np.asarray(outputs):
    counts[output.tobytes()] += 1
  for key, weight in weights.items():
    mean = 4000 * weight / len(squares)
    assert abs(counts[key] - mean) <= 5 * np.sqrt(mean)


@pytest.mark.parametrize('kind', ['dataset', 'imagenet', 'unit'])
def test_cutout_fills_with_what_normalization_maps_to_zero(kind):
  raw = pictures()
  prepare = normalization.normalizer(raw, kind)
  pixel = normalization.zero_pixel(prepare, 3)
  mean = 255 * normalization.statistics(raw)[0]
  if kind == 'imagenet':
    mean = 255 * np.array(normalization.IMAGENET_MEAN)
  if kind == 'unit':
    mean = np.zeros(3)
  np.testing.assert_array_equal(pixel, np.round(mean))
  step = np.asarray(prepare(jnp.asarray([[1, 1, 1]], jnp.uint8)))
  step = step - prepare(jnp.zeros((1, 3), jnp.uint8))
  assert (abs(prepare(jnp.asarray(pixel[None]))) <= 0.501 * step).all()


def test_load_gives_cutout_its_size_and_fill():
  dataset = data.load('digits', augmentations=('cutout',), cutout_size=3)
  image = np.full((8, 8, 1), 255, np.uint8)
  output = np.asarray(dataset.augment(jax.random.key(1), image))
  mean = round(float(dataset.splits['train']['inputs'].mean()))
  assert {*np.unique(output)} == {255, mean}
  assert 4 <= (output == mean).sum() <= 9


@functools.cache
def boxes(height, width, count=4000):
  keys = jax.random.split(jax.random.key(0), count)
  function = jax.vmap(lambda key: augment.sample_box(key, height, width))
  return np.asarray(jax.jit(function)(keys))


def test_boxes_have_the_areas_and_ratios_asked_for():
  side = 200  # so large that rounding to pixels does not matter
  top, left, height, width = boxes(side, side).T
  assert ((top >= 0) & (top + height <= side)).all()
  assert ((left >= 0) & (left + width <= side)).all()
  area, ratio = height * width / side**2, width / height
  assert 0.078 < area.min() < 0.09
  assert 0.97 < area.max() <= 1
  assert 0.74 < ratio.min() < 0.76
  assert 1.32 < ratio.max() < 1.35
  # Below 3/4 every box fits, so that areas are uniform and ratios symmetric.
  small = area < 0.75
  assert abs(area[small].mean() - (0.08 + 0.75) / 2) < 0.015
  assert abs(np.log(ratio[small]).mean()) < 0.012
  spare = (side - height)[small] > 0
  share = top[small][spare] / (side - height)[small][spare]
  assert abs(share.mean() - 0.5) < 0.025


@pytest.mark.slow
def test_boxes_that_never_fit_become_the_largest_in_the_middle():
  # Hardly any box of at least 0.08 of a strip fits: 40 times as wide as high.
  found = {tuple(box) for box in boxes(2, 80, 50).tolist()}
  assert found == {(0, 38, 2, 3)}
  found = {tuple(box) for box in boxes(80, 2, 50).tolist()}
  assert found == {(38, 0, 3, 2)}


def test_a_resized_crop_is_pillows_resize_of_a_box():
  array = IMAGES[[0, 1]]
  found_boxes = boxes(HEIGHT, WIDTH, 60)
  resize = jax.vmap(image_ops.resize_box, (None, 0))
  outputs = jax.jit(jax.vmap(resize, (0, None)))(array, found_boxes)
  same = []
  for image, resized in zip(array, np.asarray(outputs), strict=True):
    for (top, left, height, width), found in zip(
      found_boxes.tolist(), resized, strict=True
    ):
      expected = Image.fromarray(image).resize(
        (WIDTH, HEIGHT),
        Image.Resampling.BILINEAR,
        box=(left, top, left + width, top + height),
      )
      difference = abs(found.astype(int) - np.asarray(expected))
      # Boxes of few pixels give many exact halves, which the rounding of the
      # weights decides: Pillow's have 22 bits, JAX's are floats.
      assert difference.max() <= 1
      same.append((difference == 0).mean())
  assert np.mean(same) >= 0.95
  whole = image_ops.resize_box(array[0], jnp.array([0, 0, HEIGHT, WIDTH]))
  np.testing.assert_array_equal(whole, array[0])


@pytest.mark.slow
def test_pixels_do_not_depend_on_the_number_of_devices():
  names = ('random_resized_crop', 'autoaugment', 'cutout')
  split = {
    'inputs': np.tile(IMAGES, (2, 1, 1, 1)),
    'label': np.arange(2 * len(IMAGES)),
  }
  dataset = data.InMemory(
    name='made',
    num_classes=2 * len(IMAGES),
    splits={'train': split},
    rows={'train': split['label']},
    augment=augment.compose(names, 2, 5, 99),
    prepare=lambda inputs: inputs,
  )
  found = []
  for devices in (1, 2, 4):
    sample = helpers.sampler(dataset, 8, devices)
    pixels, other = (
      sample(dataset.state(), split, jax.random.key(0), step)[1]['inputs']
      for step in (7, 8)
    )
    assert (other != pixels).any()
    found.append(pixels)
  assert found[0].dtype == np.uint8
  for pixels in found[1:]:
    np.testing.assert_array_equal(pixels, found[0])
