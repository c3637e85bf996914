"""The cache of decoded splits: hits, and everything that makes a miss."""

import errno
import logging
import os
import pathlib

import numpy as np
import pytest

from margin_jax import data, files
from margin_jax.data import cache, tfds_images
from tests import helpers
from tests.datasets import image_of, write_dataset

LABELS = [3, 1, 4, 1, 5, 9, 2, 6]
SHAPE = (32, 32, 3)


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
  """A user's cache folder of the test's own."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  return tmp_path / 'home/margin_jax/data'


@pytest.fixture
def decoded(monkeypatch):
  """The splits that were decoded, in order."""
  splits = []
  decode = tfds_images._decode

  def spy(builder, split):
    splits.append(split)
    return decode(builder, split)

  monkeypatch.setattr(tfds_images, '_decode', spy)
  return splits


def load(folder):
  return tfds_images.load('cifar10', str(folder), side=32)


def assert_right(loaded):
  splits, classes = loaded
  train, test = splits['train'], splits['test']
  expected = [image_of(i, SHAPE) for i in range(len(LABELS))]
  np.testing.assert_array_equal(train['inputs'], expected)
  np.testing.assert_array_equal(train['label'], LABELS)
  assert (train['inputs'].dtype, train['label'].dtype) == (np.uint8, np.int32)
  assert sorted(test['label']) == [0, 1, 2]
  assert classes == 10


def make(folder):
  path = write_dataset(folder, 'cifar10', ids=True, labels=LABELS)
  return pathlib.Path(path)


def stored(folder):
  return sorted(folder.glob('margin_jax-*')) if folder.exists() else []


def test_the_second_start_decodes_nothing(tmp_path, decoded, user_folder):
  folder = make(tmp_path)
  before = {*os.listdir(folder)}
  assert_right(load(tmp_path))
  assert decoded == ['train', 'test']
  version = folder.name
  names = {
    f'margin_jax-cifar10-{version}-train-8-v{cache.FORMAT}',
    f'margin_jax-cifar10-{version}-test-3-v{cache.FORMAT}',
  }
  # The dataset's folder may be somebody else's.
  assert {*os.listdir(folder)} == before
  assert {path.name.rpartition('-')[0] for path in stored(user_folder)} == names
  assert len(os.listdir(user_folder)) == 2  # no temporary file is left
  assert_right(load(tmp_path))
  assert decoded == ['train', 'test']
  assert data.load('cifar10', data_dir=str(tmp_path)).num_classes == 10
  assert decoded == ['train', 'test']


def flip_a_pixel(content):
  place = len(content) // 2
  return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
  'spoil',
  [
    lambda content: b'',
    lambda content: content[:-1],
    lambda content: content[:5000],
    lambda content: b'no archive',
    lambda content: b'\x93NUMPY\x01\x00' + b'\xff' * 99,
    lambda content: bytes(len(content)),
    flip_a_pixel,
  ],
)
def test_a_broken_file_is_replaced(tmp_path, decoded, user_folder, spoil):
  make(tmp_path)
  load(tmp_path)
  train = stored(user_folder)[1]
  whole = train.read_bytes()
  train.write_bytes(spoil(whole))
  assert_right(load(tmp_path))
  assert decoded == ['train', 'test', 'train']
  assert len(train.read_bytes()) == len(whole)
  assert_right(load(tmp_path))
  assert decoded == ['train', 'test', 'train']


def test_a_file_of_other_data_is_replaced(tmp_path, decoded):
  folder = make(tmp_path)
  load(tmp_path)
  for path in folder.glob('cifar10-train*'):  # prepared again
    os.utime(path, ns=(1, 1))
  assert_right(load(tmp_path))
  assert decoded == ['train', 'test', 'train']


@pytest.mark.parametrize(
  'split',
  [
    {'inputs': np.zeros((2, 4), np.uint8), 'label': np.zeros(3, np.int32)},
    {'inputs': np.zeros((3, 4), np.int16), 'label': np.zeros(3, np.int32)},
    {'inputs': np.zeros((3, 4), np.uint8), 'label': np.zeros(3, np.int64)},
    {'inputs': np.zeros((3, 4), np.uint8)},
    {'inputs': np.array([{}] * 3), 'label': np.zeros(3, np.int32)},
  ],
)
def test_a_file_of_another_format_is_not_read(tmp_path, split):
  assert cache.write(tmp_path / 'x', 'source', split)
  assert cache.read(tmp_path / 'x', 'source', 3) is None


def test_what_earlier_versions_put_beside_the_dataset_is_read(
  tmp_path, decoded, user_folder
):
  folder = make(tmp_path)
  load(tmp_path)
  for path in stored(user_folder):
    path.rename(folder / f'{path.stem.rpartition("-")[0]}.npz')
  assert_right(load(tmp_path))
  assert decoded == ['train', 'test']
  assert not stored(user_folder)


def test_leftovers_of_killed_processes_are_removed(
  tmp_path, decoded, user_folder
):
  make(tmp_path)
  user_folder.mkdir(parents=True)
  old = user_folder / '.margin_jax-cifar10.npz.4000000.0123abcd'
  other = user_folder / '.notes.npz.4000000.0123abcd'
  for path in (old, other):
    path.touch()
    os.utime(path, (1, 1))
  load(tmp_path)
  assert not old.exists()
  assert other.exists()


def test_a_file_where_the_users_folder_should_be(tmp_path, decoded):
  make(tmp_path)
  (tmp_path / 'home').write_text('')
  for _ in range(2):
    assert_right(load(tmp_path))
  assert decoded == 2 * ['train', 'test']


def test_a_full_disk_is_no_error(
  tmp_path, decoded, user_folder, monkeypatch, caplog
):
  folder = make(tmp_path)
  before = {*os.listdir(folder)}

  def fill(file, **arrays):
    file.write(b'a part')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(np, 'savez', fill)
  caplog.set_level(logging.WARNING)
  assert_right(load(tmp_path))
  assert {*os.listdir(folder)} == before
  assert not os.listdir(user_folder)
  assert not [x for x in caplog.records if x.name.startswith('margin_jax')]
  monkeypatch.undo()
  assert decoded == ['train', 'test']


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
  path = tmp_path / 'cache.npz'
  split = {'inputs': np.ones((3, 4), np.uint8), 'label': np.arange(3)}
  split['label'] = split['label'].astype(np.int32)
  assert cache.write(path, 'old', split)
  savez = np.savez

  def slow(file, **arrays):
    savez(file, **arrays)
    assert cache.read(path, 'old', 3) is not None  # until it is complete

  monkeypatch.setattr(np, 'savez', slow)
  assert cache.write(path, 'new', split)
  assert cache.read(path, 'old', 3) is None
  found = cache.read(path, 'new', 3)
  for name, array in split.items():
    np.testing.assert_array_equal(found[name], array)
    found[name][:] = 7  # an array of the caller's own
  assert cache.read(path, 'new', 3)['label'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('value', ['', 'relative', None])
def test_the_users_folder_without_xdg(monkeypatch, tmp_path, value):
  monkeypatch.setenv('HOME', str(tmp_path))
  if value is None:
    monkeypatch.delenv('XDG_CACHE_HOME')
  else:
    monkeypatch.setenv('XDG_CACHE_HOME', value)
  assert files.cache_dir() == tmp_path / '.cache/margin_jax'


def test_the_second_start_does_not_import_tfds(tmp_path, decoded, monkeypatch):
  make(tmp_path)
  first = load(tmp_path)

  def refuse(*args):
    raise AssertionError('TFDS was asked')

  monkeypatch.setattr(tfds_images, 'open_builder', refuse)
  second = load(tmp_path)
  helpers.assert_trees_equal(first[0], second[0])
  assert first[1] == second[1]
  # Where the folder is not just as expected, TFDS is asked.
  info = next(tmp_path.glob('*/*/dataset_info.json'))
  for spoilt in ('', '{}', '[]', '{"splits": [{"name": "train"}]}'):
    info.write_text(spoilt)
    with pytest.raises(AssertionError, match='TFDS was asked'):
      load(tmp_path)


def test_copies_of_a_dataset_do_not_take_each_others_place(
  tmp_path, decoded, user_folder
):
  for name in ('one', 'two'):
    make(tmp_path / name)
    load(tmp_path / name)
  (tmp_path / 'link').symlink_to(tmp_path / 'one')
  before = len(decoded)
  for name in ('one', 'two', 'one', 'link'):
    assert_right(load(tmp_path / name))
  assert len(decoded) == before == 4
  assert len(stored(user_folder)) == 4
