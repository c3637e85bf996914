"""Datasets that are read while training: exact for any processes."""

import collections
import contextlib
import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from margin_jax import data
from margin_jax.data import streaming
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop
from margin_jax.train import setup as setup_lib
from tests import helpers
from tests.datasets import ONE, jpeg, streamed, streamed_config
from tests.helpers import slow

SIZES = [8, 8, 0, 4, 8, 8, 8, 4]  # step -> examples sampled


def assert_batches_equal(first, second):
  for x, y in zip(first, second, strict=True):
    helpers.assert_trees_equal(x, y)


@pytest.fixture(scope='module')
def batches():
  return [*streamed().training(SIZES, 0, 7, ONE)]


def test_samples_have_the_sizes_asked_for(batches):
  assert [len(b['label']) for b in batches] == [s for s in SIZES if s]
  for batch in batches:
    assert batch['inputs'].shape == (len(batch['label']), 16, 16, 3)
    assert batch['inputs'].dtype == np.uint8


def test_an_epoch_visits_no_example_twice(batches):
  by_epoch = collections.defaultdict(list)
  for batch in batches:
    by_epoch[int(batch['epoch'][0])] += batch['index'].tolist()
  # 8 + 8 + 4 + 8 of 30, then 8 more do not fit.
  assert {k: len(v) for k, v in by_epoch.items()} == {0: 28, 1: 20}
  for rows in by_epoch.values():
    assert len({*rows}) == len(rows)
  assert by_epoch[0][:20] != by_epoch[1]


def test_labels_are_those_of_the_index(batches):
  records = streamed().records['train']
  for batch in batches:
    expected = [records[i]['label'] for i in batch['index']]
    np.testing.assert_array_equal(batch['label'], expected)


@pytest.mark.parametrize('start', [1, 3, 7])
def test_resuming_needs_the_step_only(batches, start):
  before = sum(size > 0 for size in SIZES[:start])
  resumed = [*streamed().training(SIZES, start, 7, ONE)]
  assert_batches_equal(resumed, batches[before:])


def test_processes_share_every_sample(batches):
  parts = [
    [*streamed().training(SIZES, 0, 7, devices_lib.Shard(i, 2))] for i in (0, 1)
  ]
  joined = [
    {k: np.concatenate([x[k], y[k]]) for k in x}
    for x, y in zip(*parts, strict=True)
  ]
  assert_batches_equal(joined, batches)


def test_another_seed_samples_otherwise(batches):
  other = [*streamed().training(SIZES, 0, 8, ONE)]
  assert not np.array_equal(other[0]['index'], batches[0]['index'])


def test_an_image_is_cut_anew_every_time():
  """One image, sampled over and over."""
  lonely = dataclasses.replace(
    streamed(), rows={'train': np.zeros(4, int), 'test': np.arange(11)}
  )
  (batch,) = lonely.training([4], 0, 0, ONE)
  assert len({x.tobytes() for x in batch['inputs']}) == 4


@pytest.mark.parametrize('size', [4, 11, 20])
@pytest.mark.parametrize('count', [1, 2])
def test_evaluation_sees_every_example_once(size, count):
  size += size % count
  seen = []
  for index in range(count):
    for chunk in streamed().evaluation(
      'test', size, devices_lib.Shard(index, count)
    ):
      assert len(chunk['label']) == size // count
      seen += chunk['index'][chunk['real']].tolist()
  assert sorted(seen) == [*range(11)]


def test_crops_have_the_published_distribution():
  rng = np.random.default_rng(0)
  boxes = np.array([streaming.crop_box(rng, 400, 300) for _ in range(4000)])
  left, top, right, bottom = boxes.T
  width, height = right - left, bottom - top
  share, ratio = width * height / 120_000, width / height
  assert (left >= 0).all()
  assert (top >= 0).all()
  assert (right <= 400).all()
  assert (bottom <= 300).all()
  assert share.min() < 0.1
  assert 0.9 < share.max() <= 1.01
  assert 0.74 < ratio.min() < 0.77
  assert 1.3 < ratio.max() < 1.36
  # Uniform in the logarithm, but for crops that do not fit and are redrawn.
  small = share < 0.3
  assert abs(np.log(ratio[small]).mean()) < 0.02


def test_images_that_no_crop_fits_are_cut_in_the_middle():
  rng = np.random.default_rng(0)
  box = streaming.crop_box(rng, 10, 1000)
  assert box == (0, 493, 10, 506)
  assert streaming.center_box(256, 512) == (16, 144, 240, 368)


def test_decoding_is_pillows():
  rng = np.random.default_rng(0)
  encoded = jpeg(rng, 3)
  with Image.open(io.BytesIO(encoded)) as image:
    box = streaming.crop_box(np.random.default_rng(5), *image.size)
    expected = image.crop(tuple(map(int, box))).resize(
      (16, 16), Image.Resampling.BILINEAR
    )
    grey = io.BytesIO()
    image.convert('L').save(grey, 'JPEG')
  found = streaming.decode(encoded, 16, np.random.default_rng(5))
  np.testing.assert_array_equal(found, expected)
  assert streaming.decode(grey.getvalue(), 16, None).shape == (16, 16, 3)


def train(workdir, monkeypatch, steps_until=None, **fields):
  def load(*args, ordered, **kwargs):
    kind = streaming.Ordered if ordered else streaming.Streaming
    return streamed(kind=kind)

  monkeypatch.setattr(data, 'load', load)

  def log(line):
    if steps_until is not None and f'step {steps_until}/' in line:
      raise KeyboardInterrupt

  return loop.train(streamed_config(**fields), str(workdir), log=log)


@pytest.mark.slow
def test_training_selects_resumes_and_reports(tmp_path, monkeypatch):
  """Stopped after the checkpoint of step 3, it ends with the same numbers."""
  whole = train(tmp_path / 'a', monkeypatch)
  assert whole['examples_scored'] == 3 * 16
  assert whole['examples_trained'] == 6 * 8
  assert whole['test']['count'] == 11
  assert 0 < whole['data_wait'] <= whole['seconds']
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path / 'b', monkeypatch, steps_until=6)
  resumed = train(tmp_path / 'b', monkeypatch)
  assert resumed['test'] == whole['test']


@pytest.mark.slow
def test_four_devices_agree_with_one(tmp_path, monkeypatch):
  one = train(tmp_path / 'one', monkeypatch)
  four = train(tmp_path / 'four', monkeypatch, devices=4)
  assert four['test']['loss'] == pytest.approx(one['test']['loss'], rel=1e-3)


REMEMBERED = {
  'steps': 20,
  'eval_every': 20,
  'checkpoint_every': 2,
  'selection.memory': True,
  'selection.rule': 'loss',
  'selection.sampler': 'prune',
  'selection.unbiased': True,
  'selection.tail': 0.2,
  'selection.every': 1,
  'pool_size': 640,
  'selection.log_counts': True,
}


@pytest.mark.slow
def test_remembered_scores_order_what_is_decoded(tmp_path, monkeypatch):
  """Stopped within an epoch and resumed, it ends with the same numbers.

  24 of 30 examples fill the first epoch; then 15 are easy, of which 7 stay, so
  that an epoch is 2 steps, and one begins at step 9; at step 16 the plain tail
  begins. The checkpoint to resume from is that of step 10.
  """
  workdir = tmp_path / 'whole'
  whole = train(workdir, monkeypatch, **REMEMBERED)
  rows = helpers.read_csv(workdir / 'train.csv')
  kept = {float(row['epoch_fraction']) for row in rows}
  assert min(kept) == pytest.approx(22 / 30, abs=1e-6)
  assert whole['examples_trained'] == 160
  assert whole['examples_scored'] == 0
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path / 'b', monkeypatch, steps_until=12, **REMEMBERED)
  saved = sorted(int(x.name) for x in (tmp_path / 'b/checkpoints').iterdir())
  assert saved[-1] == 10
  resumed = train(tmp_path / 'b', monkeypatch, **REMEMBERED)
  assert resumed['test'] == whole['test']
  counts = [
    np.load(tmp_path / name / 'selection_counts.npy') for name in ('whole', 'b')
  ]
  np.testing.assert_array_equal(*counts)


def remembering(dataset, devices=1):
  """A step that remembers, of this data."""
  return helpers.Setup(
    dataset=dataset,
    devices=devices,
    **{
      'data.validation_examples': 0,
      'data.augmentations': (),
      'optimizer.learning_rates': (0.01,),
      **REMEMBERED,
    },
  )


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 4])
def test_streamed_orders_are_those_of_data_in_memory(devices):
  """From the same memory; the loader hands the step what the order names."""
  this = remembering(streamed(kind=streaming.Ordered), devices)
  images = streamed().records['train']
  split = {
    'inputs': np.zeros((30, 16, 16, 3), np.uint8),
    'label': np.array([record['label'] for record in images], np.int32),
  }
  loaded = data.InMemory(
    name='made',
    num_classes=4,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(30), 'test': np.arange(30)},
    augment=lambda key, image: image,
    prepare=this.dataset.prepare,
  )
  other = remembering(loaded)
  state = this.devices.replicate(this.first)
  for step in range(16):
    state, _ = this.program(step, state)
    ahead = jax.device_get(state)
    # The same memory, one step on: data in memory orders at the step's start.
    same = other.first.replace(
      sampler=ahead.sampler, memory=ahead.memory, step=ahead.step
    )
    moved, _ = other.program(step + 1, other.devices.replicate(same))
    begun = this.program._begin_epoch(this.devices.replicate(ahead))
    for name in ('order', 'count', 'epoch', 'weights'):
      np.testing.assert_array_equal(
        getattr(begun.sampler, name), getattr(moved.sampler, name)
      )
  assert int(ahead.sampler.epoch) > 3
  assert ahead.counts.sum() == 16 * 8


def test_processes_read_their_shards_of_an_order():
  dataset = streamed(kind=streaming.Ordered)
  rows = np.random.default_rng(0).permutation(30)

  def read(index, count):
    steps = streaming._OrderedSteps(
      dataset.reader('train'), rows, 8, 5, devices_lib.Shard(index, count), 7
    )
    return [steps[i] for i in range(len(steps))]

  whole, first, second = read(0, 1), read(0, 2), read(1, 2)
  assert len(whole) == 3
  for parts in zip(whole, first, second, strict=True):
    one, *halves = parts
    for name in one:
      joined = np.concatenate([half[name] for half in halves])
      np.testing.assert_array_equal(one[name], joined)
  np.testing.assert_array_equal(whole[1]['index'], rows[8:16])


@pytest.mark.slow
def test_workers_follow_an_order():
  this = remembering(streamed(kind=streaming.Ordered))
  sampler = this.first.sampler.replace(cursor=np.int32(8))
  read = []
  for workers in (0, 2):
    dataset = streamed(workers, kind=streaming.Ordered)
    loader = dataset.loader(this.devices, [8] * 20, 0, 0)
    with contextlib.closing(loader):
      loader.read_epoch(1, sampler)
      read.append([jax.device_get(loader(step)) for step in (1, 2)])
      assert loader.begins_epoch(3, False)
  assert_batches_equal(*read)


@pytest.mark.slow
def test_a_failed_step_of_an_order_is_read_again():
  """For replay: the sample that the sampler is at, whatever came after."""
  this = remembering(streamed(kind=streaming.Ordered))
  state = this.devices.replicate(this.first)
  state, _ = this.program(0, state)
  sampler = jax.device_get(state.sampler)
  again = this.loader.replay(1, sampler)
  for step in range(1, 4):
    state, _ = this.program(step, state)
  np.testing.assert_array_equal(
    np.asarray(again['index']).ravel(), sampler.order[8:16]
  )


@pytest.mark.parametrize('devices', [2, 4])
def test_pixels_do_not_depend_on_the_number_of_devices(devices, batches):
  """Augmentation keys are those of the index among all that is sampled."""
  bits = dataclasses.replace(
    streamed(), augment=lambda key, image: jax.random.bits(key, image.shape)
  )
  batch = batches[0]

  def per_device(shard):
    return bits.sample(
      bits.state(), shard, 8, key=jax.random.key(0), step=3, axis_name='device'
    )

  def sample(devices):
    shards = jax.tree.map(
      lambda x: x.reshape(devices, 8 // devices, *x.shape[1:]), batch
    )
    state, examples = jax.vmap(per_device, axis_name='device')(shards)
    assert {*state.epoch.tolist()} == {0}
    return jax.tree.map(lambda x: np.concatenate([*x]), examples)

  whole = sample(1)
  helpers.assert_trees_equal(sample(devices), whole)
  assert len({x.tobytes() for x in whole['inputs']}) == 8
  for name in ('label', 'index'):
    np.testing.assert_array_equal(whole[name], batch[name])


def test_steps_of_streamed_data_are_called_one_by_one():
  dataset = streamed()
  assert setup_lib.steps_per_call(streamed_config(), 'gpu', dataset) == 1
  with pytest.raises(ValueError, match='steps_per_call=3 is not allowed'):
    setup_lib.steps_per_call(streamed_config(steps_per_call=3), 'gpu', dataset)


def sample(folder):
  """The folder with a hundred images; the test skips where there is none."""
  if not (folder / 'tfds_sample').is_dir():
    pytest.skip('real data: MARGIN_JAX_TEST_DATA has no tfds_sample')
  return str(folder / 'tfds_sample')


@pytest.mark.parametrize('workers', [0, *slow(1)])
def test_a_damaged_jpeg_is_named(workers):
  this = streamed(workers=workers)
  this.records['train'][5]['image'] = b'no image'
  with pytest.raises(data.DatasetError, match='record 5 cannot be decoded'):
    list(this.training([30], 0, 0, ONE))


@pytest.mark.slow
def test_imagenet_goes_through_workers(data_dir):
  """100 real JPEGs, two workers, stopped in mid-epoch and restored."""
  load = lambda workers: data.load(  # noqa: E731
    'imagenet2012',
    data_dir=sample(data_dir),
    image_size=64,
    workers=workers,
    validation_examples=16,
  )
  two, none = load(2), load(0)
  assert two.counts == {'train': 64, 'validation': 16, 'test': 20}
  sizes = [24, 8, 24, 24]
  expected = [*none.training(sizes, 0, 0, ONE)]
  stopped = two.training(sizes, 0, 0, ONE)
  first = [next(stopped), next(stopped)]
  stopped.close()
  resumed = [*two.training(sizes, 2, 0, ONE)]
  assert_batches_equal(first + resumed, expected)
  epoch = np.concatenate([b['index'] for b in expected[:3]])
  assert len({*epoch.tolist()}) == 56
  seen = [
    i
    for chunk in two.evaluation('test', 8, ONE)
    for i in chunk['index'][chunk['real']]
  ]
  assert sorted(seen) == [*range(20)]


def test_imagenet_that_is_not_there_is_an_answer(tmp_path):
  with pytest.raises(data.DatasetError, match='prepare imagenet2012'):
    data.load('imagenet2012', data_dir=str(tmp_path))


def test_wrong_labels_of_streamed_data(data_dir):
  load = lambda noise: data.load(  # noqa: E731
    'imagenet2012', data_dir=sample(data_dir), image_size=8,
    workers=0, label_noise=noise,
  )  # fmt: skip
  clean, noisy = (
    next(load(noise).training([80], 0, 0, ONE)) for noise in (0.0, 0.25)
  )
  np.testing.assert_array_equal(clean['index'], noisy['index'])
  assert (clean['label'] != noisy['label']).sum() == 20


def test_the_loader_gives_what_a_step_is_compiled_for():
  devices = devices_lib.Devices(2)
  sizes = [16, 8, 0, 8]
  loader = streamed().loader(devices, sizes, 0, 0)
  for step, size in enumerate(sizes):
    example = loader.example(loader.bucket(step), size)
    batch = loader(step)
    assert bool(batch) == bool(size)
    assert jax.tree.map(jax.typeof, example) == jax.tree.map(jax.typeof, batch)
  loader.close()


def test_a_loader_starts_at_any_step():
  devices = devices_lib.Devices(2)
  whole, resumed = (
    streamed().loader(devices, SIZES, start, 7) for start in (0, 3)
  )
  with contextlib.closing(whole), contextlib.closing(resumed):
    for step in range(len(SIZES)):
      batch = whole(step)
      if step >= 3:
        helpers.assert_trees_equal(resumed(step), batch)


def test_all_examples_have_one_shape():
  examples = {'inputs': np.zeros((2, 16, 16, 3)), 'label': np.zeros(2)}
  assert streamed().fit(examples, {}) is examples


@pytest.mark.parametrize('normalization', ['dataset', 'imagenet', 'unit'])
def test_imagenet_has_its_own_statistics_or_none(normalization, data_dir):
  dataset = data.load(
    'imagenet2012', data_dir=sample(data_dir), normalization=normalization
  )
  pixels = np.array([[[[0, 51, 255]]]], np.uint8)
  expected = np.array([0, 0.2, 1])
  if normalization != 'unit':
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(
    dataset.prepare(pixels)[0, 0, 0], expected, 1e-5, 1e-6
  )
