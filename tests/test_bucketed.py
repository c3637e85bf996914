"""Buckets by length: who is in which, and whose turn it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax.data import bucketed
from margin_jax.train import devices as devices_lib
from tests import helpers

LENGTHS = np.array([5, 33, 32, 64, 65, 128, 8, 40, 1])


def assigned(least, lengths=LENGTHS, widths=(32, 64, 128)):
  return [(w, list(r)) for w, r in bucketed.assign(lengths, widths, least)]


def test_examples_are_in_the_narrowest_bucket_that_holds_them():
  assert assigned(1) == [
    (32, [0, 2, 6, 8]),
    (64, [1, 3, 7]),
    (128, [4, 5]),
  ]


def test_a_bucket_too_small_joins_the_next_wider_one():
  assert assigned(1, np.array([5, 70, 70])) == [(32, [0]), (128, [1, 2])]
  assert assigned(4) == [(32, [0, 2, 6, 8]), (128, [1, 3, 4, 5, 7])]
  # Nothing longer comes after the last: the one before joins it.
  assert assigned(3) == [(32, [0, 2, 6, 8]), (128, [1, 3, 4, 5, 7])]
  assert assigned(6) == [(128, list(range(9)))]
  assert assigned(20) == [(128, list(range(9)))]


def test_no_bucket_is_wider_than_its_longest_example_needs():
  short = np.array([3, 9, 31])
  assert assigned(1, short) == [(32, [0, 1, 2])]
  assert assigned(2, np.array([3, 40, 4])) == [(64, [0, 1, 2])]


def test_turns_follow_the_sizes_of_the_buckets():
  counts = (500, 300, 200)
  turns = bucketed.schedule([10] * 1000, counts)
  for steps in (10, 55, 1000):
    sampled = np.bincount(turns[:steps], minlength=3)
    np.testing.assert_allclose(
      sampled, np.array([0.5, 0.3, 0.2]) * steps, atol=1
    )
  # Big and small samples count for what they sample.
  sizes = np.array([100, 10] * 500)
  turns = bucketed.schedule(sizes, counts)
  sampled = np.bincount(turns, weights=sizes, minlength=3) / sizes.sum()
  np.testing.assert_allclose(sampled, [0.5, 0.3, 0.2], atol=0.005)


def test_a_step_without_a_sample_stays_with_the_bucket():
  turns = bucketed.schedule([10, 0, 0, 10, 0, 0, 10, 0, 0], (10, 10))
  assert list(turns) == [0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_a_longer_run_begins_with_the_turns_of_a_shorter_one():
  long, short = (bucketed.schedule([8] * n, (70, 31, 9)) for n in (60, 25))
  np.testing.assert_array_equal(long[:25], short)


def made():
  """13 sentences in buckets of width 2 and 4, 5 and 8 of them."""
  length = np.array([3, 1, 4, 2, 3, 1, 4, 3, 2, 4, 3, 2, 4])
  label = np.arange(13, dtype=np.int32)
  mask = np.arange(6) < length[:, None]
  inputs = np.stack([10 * label[:, None] * mask, mask], axis=-1)
  split = {'inputs': inputs.astype(np.uint16), 'label': label}
  return bucketed.Bucketed(
    name='made',
    num_classes=13,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(13), 'test': np.arange(13)},
    augment=lambda key, x: x,
    prepare=lambda x: x,
    buckets={
      'train': bucketed.assign(length, (2, 4), 4),
      'test': bucketed.assign(length, (2, 4), 1),
    },
  )


@pytest.mark.parametrize('devices', [1, 2])
def test_an_epoch_of_a_bucket_samples_each_of_its_examples_once(devices):
  dataset = made()
  assert dataset.widths == (2, 4)
  data = dataset.arrays('train')[1]
  rows = data['row'].tolist()
  assert len(rows) == 8
  sample = helpers.sampler(dataset, 4, devices)
  state, seen = dataset.state(), []
  for step in range(4):
    state, pool = sample(state, data, jax.random.key(0), step)
    assert pool['inputs'].shape == (4, 4, 2)
    np.testing.assert_array_equal(pool['inputs'][:, 0, 0], 10 * pool['index'])
    np.testing.assert_array_equal(pool['label'], pool['index'])
    seen.append(pool['index'].tolist())
  assert int(state.buckets[1].epoch) == 1
  assert (int(state.epoch), int(state.sampled)) == (1, 16 - 13)
  assert int(state.buckets[0].epoch) == -1
  for epoch in (seen[:2], seen[2:]):
    assert sorted(np.concatenate(epoch)) == sorted(rows)
  assert seen[:2] != seen[2:]


def test_the_loader_hands_over_the_bucket_that_is_sampled_from():
  dataset = made()
  sizes = [4, 0, 4, 0, 4, 0]
  loader = dataset.loader(devices_lib.Devices(2), sizes, 0, 0)
  turns = [loader.bucket(step) for step in range(6)]
  assert turns == bucketed.schedule(sizes, (5, 8)).tolist()
  assert {*turns} == {0, 1}
  assert dataset.most_steps_per_call == 1
  for step, bucket in enumerate(turns):
    batch = loader(step)
    helpers.assert_trees_equal(batch, dataset.arrays('train')[bucket])
    helpers.assert_trees_equal(batch, loader.example(bucket, sizes[step]))
  loader.close()


@pytest.mark.parametrize('width', [2, 4, 6])
def test_examples_are_padded_or_cut_to_the_width_of_others(width):
  examples = {'inputs': jnp.ones((3, 4, 2), jnp.uint16), 'index': jnp.arange(3)}
  data = {'inputs': np.zeros((5, width, 2), np.uint16)}
  fitted = made().fit(examples, data)
  assert fitted['inputs'].shape == (3, width, 2)
  assert fitted['inputs'].dtype == jnp.uint16
  assert fitted['inputs'].sum() == 3 * 2 * min(width, 4)
  np.testing.assert_array_equal(fitted['index'], examples['index'])


@pytest.mark.parametrize('whole', [False, True])
def test_chunks_have_every_example_once(whole):
  dataset = made()
  splits = dataset.chunks(devices_lib.Devices(2), ['test'], 4, whole=whole)
  assert splits.counts == {'test': 13}
  rows = [where for *_, where in splits.chunks('test')]
  widths = {data['inputs'].shape[1] for _, data, *_ in splits.chunks('test')}
  seen = np.concatenate(rows).tolist()
  assert sorted(seen) == [*range(13)]
  assert widths == ({6} if whole else {2, 4})
  assert (seen == [*range(13)]) == whole
