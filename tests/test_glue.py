"""GLUE's tasks, real and made here; their cache; what is refused."""

import os
import re
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from margin_jax import data, prepare
from margin_jax.data import cache, glue, tokenization
from tests import datasets
from tests.datasets import (
  SPLITS,
  TASKS,
  VOCAB,
  splits_of,
  text_of,
  write_task,
)
from tests.helpers import command_of

LENGTH = 16


def load(folder, name='glue/rte', vocab=VOCAB, max_length=LENGTH):
  return glue.load(name, str(folder), vocab, max_length)


def assert_right(loaded, name, vocab=VOCAB, max_length=LENGTH):
  splits, classes = loaded
  assert classes == (3 if name == 'glue/mnli' else 2)
  assert [*splits] == [*splits_of(name)]
  sizes = (30, 8, 7)
  for (ours, theirs), size in zip(splits_of(name).items(), sizes, strict=False):
    texts = [
      tuple(text_of(theirs, i, field) for field in TASKS[name])
      for i in range(size)
    ]
    expected = tokenization.encode(texts, vocab, max_length)
    inputs, label = splits[ours]['inputs'], splits[ours]['label']
    np.testing.assert_array_equal(inputs, expected)
    assert (inputs.dtype, label.dtype) == (expected.dtype, np.int32)
    assert label.tolist() == [i % classes for i in range(size)]


@pytest.fixture
def decoded(monkeypatch):
  """The splits that were decoded, in order."""
  splits = []
  decode = glue._decode

  def spy(name, builder, split, *rest):
    splits.append(split)
    return decode(name, builder, split, *rest)

  monkeypatch.setattr(glue, '_decode', spy)
  return splits


def test_the_tasks_are_those_of_the_paper():
  assert tuple(TASKS) == glue.NAMES
  assert {*glue.NAMES} < {*prepare.names()}
  assert glue.F1_NAMES == ('glue/mrpc', 'glue/qqp')


@pytest.mark.parametrize('name', TASKS)
def test_a_task_comes_in_its_original_order(tmp_path, name, decoded):
  folder = write_task(tmp_path, name)
  stored = tfds.builder_from_directory(folder).as_data_source(split='train')
  numbers = [int(record['idx']) for record in stored]
  assert numbers != sorted(numbers)
  for _ in range(2):
    assert_right(load(tmp_path, name), name)
  assert decoded == [*splits_of(name).values()]


def test_more_examples_than_are_read_at_once(tmp_path):
  write_task(tmp_path, 'glue/sst2', sizes=(1003, 2))
  splits, _ = load(tmp_path, 'glue/sst2')
  label = splits['train']['label']
  assert label.tolist() == [i % 2 for i in range(1003)]


@pytest.fixture
def cached(tmp_path, monkeypatch):
  """The files of a cache of the test's own."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  folder = tmp_path / 'home/margin_jax/data'
  return lambda name='*': sorted(folder.glob(f'margin_jax-{name}'))


def test_each_vocabulary_and_length_has_a_cache_of_its_own(
  tmp_path, decoded, cached
):
  write_task(tmp_path, 'glue/rte')
  both = [*SPLITS.values()]
  swapped = (*VOCAB[:5], *VOCAB[:4:-1])
  large = (*VOCAB, *(f'w{i}' for i in range(2**16)))  # its ids are int32
  settings = [(VOCAB, 16), (VOCAB, 12), (swapped, 16), (large, 16)]
  for number, (vocab, length) in enumerate(settings, 1):
    loaded = load(tmp_path, vocab=vocab, max_length=length)
    assert_right(loaded, 'glue/rte', vocab, length)
    assert decoded == number * both
    assert len(cached()) == 2 * number
  digest = tokenization.fingerprint(VOCAB)[:16]
  name = f'glue-rte-2.0.0-train-16-{digest}-30-v{cache.FORMAT}-*.npz'
  assert len(cached(name)) == 1
  for vocab, length in settings:
    loaded = load(tmp_path, vocab=vocab, max_length=length)
    assert_right(loaded, 'glue/rte', vocab, length)
  assert decoded == len(settings) * both


def flip_a_bit(content):
  place = len(content) // 2
  return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize('spoil', [flip_a_bit, lambda content: content[:-1]])
def test_a_broken_cache_is_replaced(tmp_path, decoded, cached, spoil):
  write_task(tmp_path, 'glue/rte')
  load(tmp_path)
  (train,) = cached('*-train-*')
  train.write_bytes(spoil(train.read_bytes()))
  for _ in range(2):
    assert_right(load(tmp_path), 'glue/rte')
  assert decoded == ['train', 'validation', 'train']


def test_a_dataset_prepared_again_is_read_again(tmp_path, decoded):
  folder = write_task(tmp_path, 'glue/rte')
  load(tmp_path)
  for path in folder.glob('glue-train*'):
    os.utime(path, ns=(1, 1))
  assert_right(load(tmp_path), 'glue/rte')
  assert decoded == ['train', 'validation', 'train']


@pytest.mark.parametrize('name', TASKS)
def test_a_missing_task_is_an_answer_at_once(tmp_path, monkeypatch, name):
  tries = []

  def refuse(*args, **kwargs):
    tries.append(args)
    raise OSError('no network in this test')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)
  folder = str(tmp_path / 'my data')
  with pytest.raises(data.DatasetError) as caught:
    load(folder, name)
  assert not tries
  assert not os.path.exists(folder)
  assert f'looked in {folder}/{name}/' in str(caught.value)
  words = ['-m', 'margin_jax.prepare', name, f'--data_dir={folder}']
  assert command_of(str(caught.value))[1:] == words


def refused(folder, words, name='glue/rte'):
  """Checks that loading is refused, with these words and the remedy."""
  message = f"dataset '{name}' .*" + '.*'.join(map(re.escape, words))
  with pytest.raises(data.DatasetError, match=message) as caught:
    load(folder, name)
  words = ['-m', 'margin_jax.prepare', name, f'--data_dir={folder}']
  assert command_of(str(caught.value))[1:] == words


@pytest.mark.parametrize(
  ('name', 'label', 'run'),
  [
    ('glue/rte', -1, '-1 to 1, outside [0, 2)'),
    ('glue/rte', 2, '0 to 2, outside [0, 2)'),
    ('glue/mnli', 3, '0 to 3, outside [0, 3)'),
  ],
)
def test_a_label_out_of_range_is_refused(tmp_path, name, label, run):
  labels = [0, 1, label]
  write_task(tmp_path, name, sizes=(3, 3, 3), labels=labels)
  refused(tmp_path, ["split 'train'", run], name)


@pytest.mark.parametrize(
  ('without', 'words'),
  [
    (('idx',), 'an example has no idx.'),
    (('label', 'sentence2'), 'an example has no sentence2, label.'),
  ],
)
def test_a_missing_field_is_named(tmp_path, without, words):
  write_task(tmp_path, 'glue/rte', without=without)
  refused(tmp_path, [words])


def test_text_that_is_no_utf8_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets, 'text_of', lambda *_: b'caf\xe9')
  write_task(tmp_path, 'glue/rte', sizes=(3, 3, 3))
  refused(tmp_path, ['broken', "'utf-8' codec", 'Remove it and prepare'])


def test_a_missing_split_is_named(tmp_path):
  write_task(tmp_path, 'glue/rte', sizes=(3,))
  refused(tmp_path, ['broken', 'validation'])


def cut(path):
  os.truncate(path, 70_000)


@pytest.mark.parametrize('spoil', [os.unlink, cut])
def test_a_broken_task_is_named_with_the_remedy(tmp_path, spoil):
  folder = write_task(tmp_path, 'glue/rte')
  for path in folder.glob('glue-train*'):
    spoil(path)
  refused(tmp_path, ['broken'])


def test_bad_arguments_are_refused_with_a_full_cache(tmp_path):
  write_task(tmp_path, 'glue/rte')
  load(tmp_path)
  with pytest.raises(ValueError, match='max_length=4'):
    load(tmp_path, max_length=4)
  with pytest.raises(data.DatasetError, match=r'vocabulary has no \[SEP\]'):
    load(tmp_path, vocab=tuple(x for x in VOCAB if x != '[SEP]'))


def test_prepare_keeps_a_task_that_is_there(tmp_path):
  folder = write_task(tmp_path, 'glue/rte')
  assert prepare.prepare('glue/rte', str(tmp_path)) == str(folder)


@pytest.mark.parametrize(
  ('name', 'sizes', 'ones'),
  [
    ('glue/rte', (2490, 277), (1241, 131)),
    ('glue/mrpc', (3668, 408), (2474, 279)),
  ],
)
def test_real_tasks(data_dir, name, sizes, ones):
  path = data_dir / 'vocab/bert-base-uncased-vocab.txt'
  vocab = tokenization.read_vocab(path)
  splits, classes = load(data_dir / 'tfds', name, vocab, 128)
  assert classes == 2
  again, _ = load(data_dir / 'tfds', name, vocab, 128)
  for split, size, one in zip(('train', 'test'), sizes, ones, strict=True):
    assert splits[split]['inputs'].shape == (size, 128, 2)
    assert splits[split]['inputs'].dtype == np.uint16
    assert np.bincount(splits[split]['label']).tolist() == [size - one, one]
    for key, value in splits[split].items():
      np.testing.assert_array_equal(again[split][key], value)
