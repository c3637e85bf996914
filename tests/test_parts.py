"""Parts by length: who is in which, and whose turn it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax.data import bucketed

LENGTHS = np.array([5, 33, 32, 64, 65, 128, 8, 40, 1])


def assigned(least, lengths=LENGTHS, widths=(32, 64, 128)):
  return [(w, list(r)) for w, r in bucketed.assign(lengths, widths, least)]


def test_examples_are_in_the_narrowest_part_that_holds_them():
  assert assigned(1) == [
    (32, [0, 2, 6, 8]),
    (64, [1, 3, 7]),
    (128, [4, 5]),
  ]


def test_a_part_too_small_joins_the_next_longer_one():
  assert assigned(1, np.array([5, 70, 70])) == [(32, [0]), (128, [1, 2])]
  assert assigned(4) == [(32, [0, 2, 6, 8]), (128, [1, 3, 4, 5, 7])]
  # Nothing longer comes after the last: the one before joins it.
  assert assigned(3) == [(32, [0, 2, 6, 8]), (128, [1, 3, 4, 5, 7])]
  assert assigned(6) == [(128, list(range(9)))]
  assert assigned(20) == [(128, list(range(9)))]


def test_no_part_is_wider_than_its_longest_example_needs():
  short = np.array([3, 9, 31])
  assert assigned(1, short) == [(32, [0, 1, 2])]
  assert assigned(2, np.array([3, 40, 4])) == [(64, [0, 1, 2])]


def test_turns_follow_the_sizes_of_the_parts():
  counts = (500, 300, 200)
  turns = bucketed.plan([10] * 1000, counts)
  for steps in (10, 55, 1000):
    drawn = np.bincount(turns[:steps], minlength=3)
    np.testing.assert_allclose(drawn, np.array([0.5, 0.3, 0.2]) * steps, atol=1)
  # Big and small draws count for what they draw.
  sizes = np.array([100, 10] * 500)
  turns = bucketed.plan(sizes, counts)
  drawn = np.bincount(turns, weights=sizes, minlength=3) / sizes.sum()
  np.testing.assert_allclose(drawn, [0.5, 0.3, 0.2], atol=0.005)


def test_a_step_without_a_draw_stays_with_the_part():
  turns = bucketed.plan([10, 0, 0, 10, 0, 0, 10, 0, 0], (10, 10))
  assert list(turns) == [0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_a_longer_run_begins_with_the_turns_of_a_shorter_one():
  long, short = (bucketed.plan([8] * n, (70, 31, 9)) for n in (60, 25))
  np.testing.assert_array_equal(long[:25], short)


@pytest.mark.parametrize('lanes', [1, 2])
def test_an_epoch_of_a_part_draws_each_of_its_examples_once(lanes):
  rows = np.array([3, 1, 4, 15, 9, 2, 6, 5], np.int32)
  split = {
    'inputs': jnp.asarray(10 * rows[:, None, None].repeat(2, 2)),
    'label': jnp.asarray(rows),
    'row': jnp.asarray(rows),
  }
  draw = functools.partial(
    bucketed.draw, part=1, key=jax.random.key(0), lanes=lanes,
    augment=lambda key, x: x,
  )  # fmt: skip
  streams = bucketed.Streams.create((5, 8))
  seen = []
  for step in range(4):
    shares = []
    for lane in range(lanes):
      after, pool = draw(
        streams, split, 4, step=jnp.int32(step), lane=jnp.int32(lane)
      )
      np.testing.assert_array_equal(pool['inputs'][:, 0, 0], 10 * pool['index'])
      np.testing.assert_array_equal(pool['label'], pool['index'])
      shares.extend(np.asarray(pool['index']))
    streams = after
    seen.append(shares)
  assert int(streams.parts[1].epoch) == 1
  assert (int(streams.epoch), int(streams.drawn)) == (1, 16 - 13)
  assert int(streams.parts[0].epoch) == -1
  for epoch in (seen[:2], seen[2:]):
    assert sorted(np.concatenate(epoch)) == sorted(rows)
  assert seen[:2] != seen[2:]
