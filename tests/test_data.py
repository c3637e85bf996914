"""Pools, augmentations, statistics, datasets real and made here."""

import functools
import importlib.util
import os
import re
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn import datasets as sklearn_datasets
from tensorflow_datasets.core.download import download_manager, util

from margin_jax import data, prepare
from margin_jax.data import augment, digits, normalization, tfds_images
from tests import helpers
from tests.datasets import image_of, write_dataset
from tests.helpers import command_of

CIFAR = (32, 32, 3)


@functools.cache
def pools(steps, size, examples, devices=1, seed=0):
  """The pools of the first steps; arrays (steps, size, ...)."""
  split = {
    'inputs': np.zeros((examples, 1), np.uint32),
    'label': 100 + np.arange(examples),
  }
  dataset = data.InMemory(
    name='made',
    num_classes=10,
    splits={'train': split},
    rows={'train': np.arange(examples)},
    # What the key of an example is, in place of its pixels.
    augment=lambda key, image: jax.random.bits(key, image.shape),
    prepare=lambda inputs: inputs,
  )
  sample = helpers.sampler(dataset, size, devices)
  state, found = dataset.state(), []
  for step in range(steps):
    state, pool = sample(state, split, jax.random.key(seed), step)
    found.append(pool)
  return jax.tree.map(lambda *x: np.stack(x), *found)


@pytest.mark.parametrize('devices', [1, 2, 4])
def test_pools_do_not_depend_on_the_number_of_devices(devices):
  expected = pools(5, 8, 23)
  found = pools.__wrapped__(5, 8, 23, devices)  # 1: computed again
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert found['index'].dtype == np.int32
  assert found['index'].shape == (5, 8)
  np.testing.assert_array_equal(found['label'], 100 + found['index'])


@pytest.mark.parametrize(
  ('size', 'examples', 'per_epoch'), [(8, 23, 2), (6, 24, 4), (7, 7, 1)]
)
def test_an_epoch_visits_no_example_twice(size, examples, per_epoch):
  epochs = 8
  index = pools(epochs * per_epoch, size, examples)['index']
  index = index.reshape(epochs, per_epoch * size)
  for epoch in index:
    assert len({*epoch}) == per_epoch * size
  assert {*index.ravel()} == {*range(examples)}
  # Every epoch, and every seed, has an order of its own.
  assert len({epoch.tobytes() for epoch in index}) == epochs
  other = pools(epochs * per_epoch, size, examples, seed=1)['index']
  assert not (other.reshape(index.shape) == index).all(axis=1).any()


def test_every_example_has_a_key_of_its_own_at_every_step():
  first = pools(16, 8, 23)['inputs']
  other = pools(16, 8, 23, seed=1)['inputs']
  assert np.unique([first, other]).size == first.size + other.size


def crops(image, padding):
  """Every crop of the padded image, by loops."""
  height, width, _ = image.shape
  found = []
  for top in range(-padding, padding + 1):
    for left in range(-padding, padding + 1):
      found.append(np.zeros_like(image))
      for i in range(height):
        for j in range(width):
          if 0 <= top + i < height and 0 <= left + j < width:
            found[-1][i, j] = image[top + i, left + j]
  return found


PIXELS = image_of(0, (3, 4, 2))
MIRRORED = np.stack([PIXELS[:, 3 - j] for j in range(4)], axis=1)


@pytest.mark.parametrize(
  ('names', 'padding', 'expected'),
  [
    ((), 1, [PIXELS]),
    (('flip', 'flip'), 1, [PIXELS, MIRRORED]),  # each by a key of its own
    (('crop',), 2, crops(PIXELS, 2)),
    (('flip',), 1, [PIXELS, MIRRORED]),
    (('crop', 'flip'), 1, crops(PIXELS, 1) + crops(MIRRORED, 1)),
  ],
)
def test_augmented_images_are_all_there_equally_often(names, padding, expected):
  function = jax.vmap(augment.compose(names, padding), (0, None))
  keys = jax.random.split(jax.random.key(0), 4000)
  outputs = jax.jit(function)(keys, PIXELS)
  assert outputs.dtype == jnp.uint8
  counts = dict.fromkeys((x.tobytes() for x in expected), 0)
  assert len(counts) == len(expected)
  for output in np.asarray(outputs):
    counts[output.tobytes()] += 1
  mean = 4000 / len(expected)
  assert max(abs(x - mean) for x in counts.values()) <= 5 * np.sqrt(mean)


@pytest.mark.parametrize('channels', [1, 3])
def test_normalized_images_have_mean_0_and_variance_1(channels):
  scale = 15 * np.arange(1, channels + 1)  # channels unlike each other
  raw = np.random.default_rng(0).normal(4, 1, (50, 6, 7, channels))
  raw = (raw * scale).astype(np.uint8)
  values = raw.reshape(-1, channels).astype(np.float64) / 255
  mean, std = normalization.statistics(raw)
  np.testing.assert_allclose(mean, values.mean(axis=0), 1e-12)
  np.testing.assert_allclose(std, values.std(axis=0), 1e-12)
  outputs = normalization.normalizer(raw, 'dataset')(jnp.asarray(raw))
  assert outputs.dtype == jnp.float32
  outputs = np.asarray(outputs, np.float64).reshape(-1, channels)
  np.testing.assert_allclose(outputs.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(outputs.var(axis=0), 1, 1e-5)


def test_imagenet_normalization_has_imagenets_statistics():
  raw = image_of(0, (6, 7, 3))
  outputs = normalization.normalizer(raw[None], 'imagenet')(jnp.asarray(raw))
  expected = (raw / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(outputs, expected, 1e-5, 1e-5)


@pytest.mark.parametrize('channels', [1, 3])
def test_unit_normalization_is_in_0_1(channels):
  raw = image_of(0, (6, 7, channels))
  outputs = normalization.normalizer(raw[None], 'unit')(jnp.asarray(raw))
  assert outputs.dtype == jnp.float32
  np.testing.assert_allclose(outputs, raw / 255, 1e-6)
  ends = np.array([[[0] * channels, [255] * channels]], np.uint8)
  ends = normalization.normalizer(raw[None], 'unit')(jnp.asarray(ends))
  np.testing.assert_array_equal(ends[0], [[0] * channels, [1] * channels])
  dataset = data.load('digits', normalization='unit')
  digits = dataset.splits['test']['inputs']
  np.testing.assert_allclose(dataset.prepare(digits), digits / 255, 1e-6)


def test_digits_are_scikit_learns_each_once():
  train, test, _ = digits.load()
  rows = []
  for split, count in ((train, 1437), (test, 360)):
    assert split['inputs'].shape == (count, 8, 8, 1)
    assert split['label'].shape == (count,)
    dtypes = [array.dtype for array in split.values()]
    assert dtypes == [np.uint8, np.int32]
    assert {*split['label']} == {*range(10)}
    assert (split['inputs'].min(), split['inputs'].max()) == (0, 255)
    for image, label in zip(split['inputs'], split['label'], strict=True):
      rows.append((bytes(image), int(label)))
  assert len({image for image, _ in rows}) == 1797  # so the splits are disjoint
  bunch = sklearn_datasets.load_digits()
  grey = np.round(bunch.images / 16 * 255).astype(np.uint8)
  expected = zip(map(bytes, grey), map(int, bunch.target), strict=True)
  assert sorted(rows) == sorted(expected)


def test_validation_is_the_last_of_the_training_examples():
  train, test, _ = digits.load()
  assert {*data.load('digits').splits} == {'train', 'test'}
  dataset = data.load('digits', validation_examples=100)
  assert {*dataset.splits} == {'train', 'validation', 'test'}
  assert (dataset.input_shape, dataset.num_classes) == ((8, 8, 1), 10)
  for split, whole, rows in (
    ('train', train, slice(-100)),
    ('validation', train, slice(-100, None)),
    ('test', test, slice(None)),
  ):
    for key, value in dataset.splits[split].items():
      np.testing.assert_array_equal(value, whole[key][rows])
  # Normalised by what is trained on: the held-out images do not count.
  first = dataset.prepare(jnp.asarray(train['inputs'][:-100]))
  np.testing.assert_allclose([np.mean(first), np.var(first)], [0, 1], 0, 1e-5)


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('name', 'cifar', ["'cifar'", "('digits', 'cifar10', 'cifar100', "]),
    ('validation_examples', 1437, ['validation_examples=1437', 'has 1437 ']),
    ('validation_examples', -1, ['validation_examples=-1']),
    ('normalization', 'imagenet', ["='imagenet' needs RGB", '1 channel']),
    ('normalization', 'none', ["'none'", "('dataset', 'imagenet', 'unit')"]),
    ('augmentations', ('mixup',), ["'mixup'", "('crop', 'flip', "]),
  ],
)
def test_bad_arguments_of_load_are_refused(field, value, words):
  message = '.*'.join(re.escape(word) for word in words)
  with pytest.raises(ValueError, match=message):
    data.load(**{'name': 'digits', field: value})


def stored_records(name, folder):
  """The training records, as they lie in the dataset's files."""
  return tfds.data_source(name, data_dir=folder, split='train')


def number_of(record):
  return int(record['id'].decode().removeprefix('train_'))


def test_stored_images_come_back_in_the_order_of_their_ids(tmp_path):
  labels = np.random.default_rng(0).integers(0, 10, 120)
  write_dataset(tmp_path, 'cifar10', ids=True, labels=labels)
  stored = stored_records('cifar10', tmp_path)
  assert [number_of(x) for x in stored] != [*range(120)]
  dataset = data.load('cifar10', data_dir=str(tmp_path), validation_examples=15)
  splits = dataset.splits
  test_label = splits['test']['label']
  assert sorted(test_label) == [0, 1, 2]
  for split, numbers, expected in (
    ('train', range(105), labels[:105]),
    ('validation', range(105, 120), labels[105:]),
    ('test', test_label, test_label),
  ):
    inputs, label = splits[split].values()
    assert (inputs.dtype, label.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(inputs, [image_of(i, CIFAR) for i in numbers])
    np.testing.assert_array_equal(label, expected)


def test_without_ids_images_come_back_as_stored(tmp_path):
  labels = np.arange(1005) % 10  # more than are decoded at once
  write_dataset(tmp_path, 'mnist', ids=False, labels=labels)
  stored = stored_records('mnist', tmp_path)
  train = data.load('mnist', data_dir=str(tmp_path)).splits['train']
  assert train['inputs'].shape == (1005, 28, 28, 1)
  for image, label, record in zip(*train.values(), stored, strict=True):
    np.testing.assert_array_equal(image, record['image'])
    assert label == record['label']


@pytest.mark.parametrize(('label', 'run'), [(-1, '-1 to 5'), (10, '3 to 10')])
def test_a_label_out_of_range_is_refused(tmp_path, label, run):
  write_dataset(tmp_path, 'cifar10', ids=True, labels=[3, label, 5])
  words = rf"'cifar10', split 'train': .* {run}, outside \[0, 10\)"
  with pytest.raises(data.DatasetError, match=words):
    data.load('cifar10', data_dir=str(tmp_path))


def test_a_missing_dataset_is_an_answer_at_once(tmp_path, monkeypatch):
  tries = []

  def refuse(*args, **kwargs):
    tries.append(args)
    raise OSError('no network in this test')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)
  folder = str(tmp_path / 'my data')
  started = time.perf_counter()
  with pytest.raises(data.DatasetError) as caught:
    data.load('cifar100', data_dir=folder)
  assert time.perf_counter() - started < 10
  assert not tries
  assert f'looked in {folder}/cifar100/' in str(caught.value)
  words = ['-m', 'margin_jax.prepare', 'cifar100', f'--data_dir={folder}']
  assert command_of(str(caught.value))[1:] == words


SPOILED = {
  'bad_info': ('dataset_*', lambda path: path.write_text('{')),
  'no_shard': ('*-train.*', lambda path: path.unlink()),
  'cut': ('*-train.*', lambda path: os.truncate(path, 70_000)),
  'tfrecord': (
    'dataset_*',
    lambda path: path.write_text(path.read_text().replace('array_', 'tf')),
  ),
}


@pytest.mark.parametrize('how', SPOILED)
def test_a_broken_dataset_is_named_with_the_remedy(tmp_path, how):
  folder = write_dataset(tmp_path, 'cifar10', ids=True, labels=[1] * 100)
  pattern, spoil = SPOILED[how]
  for path in folder.glob(pattern):
    spoil(path)
  with pytest.raises(data.DatasetError, match="dataset 'cifar10'") as caught:
    data.load('cifar10', data_dir=str(tmp_path))
  assert 'margin_jax.prepare' in command_of(str(caught.value))


def test_prepare_says_that_it_needs_tensorflow(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(SystemExit, match='pip install tensorflow-cpu'):
    prepare.main(['cifar10'])


def test_prepare_keeps_what_is_there(tmp_path, monkeypatch, capsys):
  folder = write_dataset(tmp_path, 'cifar10', ids=True, labels=[1])
  capsys.readouterr()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  prepare.main(['cifar10', f'--data_dir={tmp_path}'])
  assert f'results: {folder}\n' in capsys.readouterr().out


@pytest.mark.parametrize(
  'error',
  [OSError, util.DownloadError, download_manager.NonMatchingChecksumError],
)
def test_prepare_explains_a_failed_download(monkeypatch, error):
  def fail(name, data_dir):
    raise error('the reason')

  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  monkeypatch.setattr(prepare, 'prepare', fail)
  with pytest.raises(SystemExit, match=r'(?s)reason.*downloads/manual'):
    prepare.main(['cifar10'])


def test_classes_have_the_names_that_tfds_gives_them(data_dir, tmp_path):
  folder = str(data_dir / 'tfds')
  names = tfds_images.class_names('cifar10', folder, 10)
  assert len(names) == 10
  assert names[:3] == ('airplane', 'automobile', 'bird')
  names = tfds_images.class_names('glue/rte', folder, 2)
  assert names == ('entailment', 'not_entailment')
  assert tfds_images.class_names('mnist', folder, 10) is None
  assert tfds_images.class_names('cifar10', str(tmp_path), 10) is None
  assert data.load('digits').class_names is None
  assert data.load('entailment').class_names == names


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'cat\n', 'must have 3, one on each line'),
    (b'\xff\nb\nc', 'cannot be read'),
  ],
)
def test_damaged_names_of_classes(tmp_path, content, message):
  path = tmp_path / 'pets' / '1.0.0' / 'label.labels.txt'
  path.parent.mkdir(parents=True)
  path.write_bytes(content)
  with pytest.raises(data.DatasetError, match=message):
    tfds_images.class_names('pets', str(tmp_path), 3)


@pytest.mark.slow
def test_cifar10_validates_on_the_last_5000_images(data_dir):
  dataset = data.load(
    'cifar10', data_dir=str(data_dir / 'tfds'), validation_examples=5000
  )
  sizes = {name: len(x['label']) for name, x in dataset.splits.items()}
  assert sizes == {'train': 45_000, 'validation': 5000, 'test': 10_000}
  assert (dataset.input_shape, dataset.num_classes) == (CIFAR, 10)
  stored = stored_records('cifar10', data_dir / 'tfds')
  seen = set()
  for record in stored.__getitems__([*range(0, 50_000, 500)]):
    number = number_of(record)
    split, first = ('train', 0) if number < 45_000 else ('validation', 45_000)
    image, label = (x[number - first] for x in dataset.splits[split].values())
    np.testing.assert_array_equal(image, record['image'])
    assert label == record['label']
    seen.add(split)
  assert seen == {'train', 'validation'}


@pytest.mark.slow
def test_mnist_is_read(data_dir):
  dataset = data.load('mnist', data_dir=str(data_dir / 'tfds'))
  for name, count in (('train', 60_000), ('test', 10_000)):
    assert dataset.splits[name]['inputs'].shape == (count, 28, 28, 1)
  assert {*dataset.splits['test']['label']} == {*range(10)}
