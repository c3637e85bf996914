"""Data that people have: folders of images, CSV files, other sets of TFDS."""

import importlib.util
import os
import re

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from margin_jax import data, prepare
from margin_jax.config import ConfigError
from margin_jax.data import (
  csv_sentences,
  folder,
  images,
  kinds,
  splits,
)
from margin_jax.train import runs, schema
from tests import helpers, references
from tests.datasets import ONE, VOCAB, image_of


def write_image(path, number, size=(9, 7), mode='RGB'):
  """Writes the image of a number, as the suffix says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(image_of(number, (size[1], size[0], 3)))
  image.convert(mode).save(path)


def write_folder(root, counts):
  """Writes so many images for each 'train/cat', numbered from 0."""
  number = 0
  for name, count in counts.items():
    for i in range(count):
      write_image(root / name / f'{i}.png', number)
      number += 1
  return f'folder:{root}'


SPLIT = {'train/cat': 6, 'train/dog': 5, 'test/cat': 3, 'test/dog': 2}
SMALL = {'image_size': 4, 'workers': 0}


def load(name, **fields):
  return data.load(name, **{**SMALL, **fields})


# Pixels.


@pytest.mark.parametrize('size', [(8, 8), (16, 16), (12, 40), (31, 17), (3, 5)])
def test_images_are_resized_as_by_the_reference(tmp_path, size):
  write_image(tmp_path / 'x.png', 0, size)
  pixels = image_of(0, (size[1], size[0], 3))
  (found,) = images.read_files([tmp_path / 'x.png'], 8)
  expected = references.resized_square(pixels, 8)
  assert found.dtype == np.uint8
  # Pillow rounds between the two passes, and its weights to 8 bits.
  np.testing.assert_allclose(found, expected, 0, 1.1)
  if size == (8, 8):
    np.testing.assert_array_equal(found, pixels)


def test_every_kind_of_image_becomes_rgb(tmp_path):
  grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
  cases = {
    'grey.png': (Image.fromarray(grey), grey),
    'deep.png': (Image.fromarray(grey.astype(np.uint16) * 256 + 255), grey),
    'clear.png': (
      Image.merge('LA', [Image.fromarray(grey), Image.new('L', (8, 8), 0)]),
      0 * grey,
    ),
    'few.png': (Image.fromarray(grey // 128 * 255).convert('1'), None),
    'print.jpg': (Image.new('CMYK', (8, 8), (0, 0, 0, 0)), 0 * grey + 255),
  }
  for name, (image, expected) in cases.items():
    image.save(tmp_path / name)
    (found,) = images.read_files([tmp_path / name], 8)
    if expected is None:
      expected = grey // 128 * 255
    for channel in range(3):
      np.testing.assert_array_equal(found[..., channel], expected, name)


def test_photos_are_turned(tmp_path):
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[:, :4] = 255
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  Image.fromarray(pixels).save(tmp_path / 'x.png', exif=exif)
  (found,) = images.read_files([tmp_path / 'x.png'], 8)
  np.testing.assert_array_equal(found, pixels[:, ::-1])


def test_damaged_exif_data_are_ignored(tmp_path):
  pixels = np.full((8, 8, 3), 100, np.uint8)
  for exif in (b'Exif\0\0II*\0', b'Exif\0\0garbage!'):
    Image.fromarray(pixels).save(tmp_path / 'x.jpg', exif=exif, dpi=(72, 72))
    (found,) = images.read_files([tmp_path / 'x.jpg'], 8)
    np.testing.assert_allclose(found, 100, atol=2)


# Folders.


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
  name = write_folder(tmp_path, SPLIT)
  (tmp_path / 'train/cat/notes.txt').write_text('no image')
  (tmp_path / 'train/.hidden').mkdir()
  write_image(tmp_path / 'train/cat/.5.png', 99)
  dataset = load(name)
  assert dataset.class_names == ('cat', 'dog')
  assert dataset.counts == {'train': 11, 'test': 5}
  train = dataset.splits['train']
  np.testing.assert_array_equal(train['label'], [0] * 6 + [1] * 5)
  paths = [tmp_path / f'train/cat/{i}.png' for i in range(6)]
  paths += [tmp_path / f'train/dog/{i}.png' for i in range(5)]
  np.testing.assert_array_equal(train['inputs'], images.read_files(paths, 4))


def test_a_folder_without_splits_holds_out_a_fifth_of_each_class(tmp_path):
  name = write_folder(tmp_path, {'a': 10, 'b': 15, 'train': 2})
  dataset = load(name)
  assert dataset.class_names == ('a', 'b', 'train')
  assert np.bincount(dataset.splits['test']['label']).tolist() == [2, 3, 1]
  assert np.bincount(dataset.splits['train']['label']).tolist() == [8, 12, 1]
  both = np.concatenate([x['inputs'] for x in dataset.splits.values()])
  assert len({x.tobytes() for x in both}) == 27
  again = load(name, seed=5)  # the split is not the seed's
  np.testing.assert_array_equal(
    again.splits['test']['inputs'], dataset.splits['test']['inputs']
  )


def test_hold_out_takes_random_examples():
  labels = np.random.default_rng(0).integers(0, 3, 3000)
  rows = splits.hold_out(labels)
  test = rows['test']
  assert sorted([*rows['train'], *test]) == [*range(3000)]
  assert abs(np.mean(test) - 1499.5) < 5 * 3000 / np.sqrt(12 * 600)
  assert abs(np.mean(test % 5) - 2) < 5 * np.sqrt(2 / 600)


@pytest.mark.parametrize('streamed', [False, True])
def test_validation_examples_are_of_every_class(tmp_path, streamed):
  """The files are in the order of their classes."""
  counts = {'train/a': 12, 'train/b': 6, 'train/c': 6, 'test/a': 1}
  name = write_folder(tmp_path, counts)
  dataset = load(name, streamed=streamed, validation_examples=8)
  labels = np.repeat([0, 1, 2], [12, 6, 6])
  rows = dataset.rows
  assert np.bincount(labels[rows['validation']]).tolist() == [4, 2, 2]
  assert np.bincount(labels[rows['train']]).tolist() == [8, 4, 4]
  assert sorted([*rows['train'], *rows['validation']]) == [*range(24)]


@pytest.mark.parametrize('streamed', [False, True])
def test_a_class_needs_two_examples_to_hold_one_out(tmp_path, streamed):
  name = write_folder(tmp_path, {'cat': 1, 'dog': 1})
  with pytest.raises(data.DatasetError, match='no class has two examples'):
    load(name, streamed=streamed)


def test_a_folder_with_test_and_val_has_a_validation_split(tmp_path):
  name = write_folder(tmp_path, {**SPLIT, 'val/cat': 1, 'val/dog': 3})
  for streamed in (False, True):
    dataset = load(name, streamed=streamed)
    assert dataset.counts == {'train': 11, 'test': 5, 'validation': 4}
    with pytest.raises(ValueError, match='has its own validation split'):
      load(name, streamed=streamed, validation_examples=2)


def test_val_alone_is_the_test_split(tmp_path):
  name = write_folder(
    tmp_path, {x.replace('test', 'val'): n for x, n in SPLIT.items()}
  )
  assert load(name).counts == {'train': 11, 'test': 5}
  write_folder(tmp_path, {'validation/cat': 1, 'validation/dog': 1})
  with pytest.raises(data.DatasetError, match="both 'val' and 'validation'"):
    load(name)


def test_a_streamed_folder_has_the_images_of_one_in_memory(tmp_path):
  name = write_folder(tmp_path, SPLIT)
  memory = load(name, validation_examples=2, label_noise=0.5)
  streamed = load(name, validation_examples=2, label_noise=0.5, streamed=True)
  assert streamed.counts == memory.counts
  for split in memory.counts:
    (chunk,) = streamed.evaluation(split, memory.counts[split], ONE)
    for key in ('inputs', 'label'):
      np.testing.assert_array_equal(chunk[key], memory.splits[split][key])
  batches = [*streamed.training([4, 4, 4], 0, 0, ONE)]
  for batch in batches:
    rows = batch['index']
    for key in ('inputs', 'label'):
      np.testing.assert_array_equal(
        batch[key], memory.splits['train'][key][rows]
      )
  # Fewer than a thousand images: the colours are those of all.
  inputs = memory.splits['train']['inputs']
  np.testing.assert_array_equal(
    streamed.prepare(inputs), memory.prepare(inputs)
  )


def test_links_are_followed_and_the_cache_knows_them(tmp_path):
  for i in range(8):
    write_image(tmp_path / f'store/{i}.png', i)
  root = tmp_path / 'links'
  for i in range(8):
    (root / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
    (root / 'ab'[i % 2] / f'{i}.png').symlink_to(tmp_path / f'store/{i}.png')
  first = load(f'folder:{root}').splits['train']['inputs']
  one, other = root / 'a/0.png', root / 'a/2.png'
  one.unlink()
  other.unlink()
  one.symlink_to(tmp_path / 'store/2.png')
  other.symlink_to(tmp_path / 'store/0.png')
  dataset = load(f'folder:{root}')
  second = dataset.splits['train']['inputs']
  paths = folder.load(str(root)).records['train'].paths
  np.testing.assert_array_equal(second, images.read_files(paths, 4))
  assert not np.array_equal(first, second)


def test_the_second_start_decodes_nothing(tmp_path, monkeypatch):
  name = write_folder(tmp_path, SPLIT)
  first = load(name)
  monkeypatch.setattr(images, 'resize', None)
  helpers.assert_trees_equal(load(name).splits, first.splits)
  assert [*tmp_path.glob('**/*.npz')] == []  # not among the user's images
  monkeypatch.undo()
  write_image(tmp_path / 'train/cat/0.png', 77, (20, 20))
  changed = load(name).splits['train']['inputs']
  assert not np.array_equal(changed, first.splits['train']['inputs'])


def spoil_name(root):
  path = os.fsencode(root) + b'/train/c\xff'
  os.mkdir(path)
  write_image(root / 'x.png', 0)
  os.rename(root / 'x.png', path + b'/x.png')


SPOILED = {
  'gone': (lambda x: x.rename(x.with_name('y')), 'No such file'),
  'empty': (lambda x: (x / 'train/eel').mkdir(), 'eel.* has no images'),
  'link': (
    lambda x: (x / 'train/cat/z.png').symlink_to(x / 'nothing'),
    r"z\.png' is a broken link",
  ),
  'name': (spoil_name, r"class b'c\\xff' is not UTF-8"),
  'unknown': (
    lambda x: write_image(x / 'test/eel/1.png', 0),
    "class 'eel' of test is not among those",
  ),
  'text': (
    lambda x: (x / 'train/dog/1.png').write_text('no image'),
    r"dog/1\.png' cannot be decoded.*data\.undecodable='skip'",
  ),
  'half': (
    lambda x: os.truncate(x / 'train/dog/1.png', 150),
    r"dog/1\.png' cannot be decoded",
  ),
}


@pytest.mark.parametrize('how', SPOILED)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, how):
  name = write_folder(tmp_path / 'x', SPLIT)
  spoil, words = SPOILED[how]
  spoil(tmp_path / 'x')
  with pytest.raises(data.DatasetError, match=words) as caught:
    load(name)
  message = str(caught.value)
  assert '\n' not in message
  assert 'BytesIO' not in message
  message.encode()  # a terminal can show it


def test_one_class_is_refused(tmp_path):
  name = write_folder(tmp_path, {'cat': 3})
  with pytest.raises(data.DatasetError, match=r"has 1 class\(es\), \['cat'\]"):
    load(name)


def test_a_split_without_classes_is_refused(tmp_path):
  """As where the images of a test split lie in it as they are."""
  write_folder(tmp_path / 'train', {'a': 2, 'b': 2})
  (tmp_path / 'test').mkdir()
  write_image(tmp_path / 'test' / '1.png', 0)
  with pytest.raises(
    data.DatasetError, match='test must have a folder of images'
  ):
    load(f'folder:{tmp_path}')


def test_images_that_memory_does_not_hold_are_refused(tmp_path):
  name = write_folder(tmp_path, SPLIT)
  with pytest.raises(data.DatasetError, match=r'data\.streamed=True'):
    load(name, image_size=2**20)


def test_a_streamed_folder_leaves_out_what_cannot_be_decoded(tmp_path):
  name = write_folder(tmp_path, SPLIT)
  (tmp_path / 'train/cat/3.png').write_text('no image')
  dataset = load(name, streamed=True, undecodable='skip')
  (batch,) = dataset.training([11], 0, 0, ONE)
  assert batch['undecodable'].sum() == 1
  dataset = load(name, streamed=True)
  with pytest.raises(data.DatasetError, match=r"cat/3\.png' cannot be decoded"):
    [*dataset.training([11], 0, 0, ONE)]


# CSV files.


def write_csv(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding='utf-8')
  return f'csv:{path}'


ROWS = ''.join(
  f'"the cafe, {i}",{"good" if i % 2 else "bad"}\n' for i in range(10)
)


@pytest.fixture(name='vocabulary')
def _vocabulary(tmp_path):
  path = tmp_path / 'vocab.txt'
  path.write_text('\n'.join(VOCAB) + '\n')
  return str(path)


def test_a_csv_file_is_tokenized_like_glue(tmp_path, vocabulary):
  name = write_csv(tmp_path / 'x.csv', '\ufefftext,label\n' + ROWS)
  dataset = data.load(name, vocabulary=vocabulary, max_length=12, buckets=())
  assert dataset.class_names == ('bad', 'good')
  assert dataset.counts == {'train': 8, 'test': 2}
  assert dataset.vocabulary == len(VOCAB)
  ids = {token: i for i, token in enumerate(VOCAB)}
  for split, rows in splits.hold_out(np.arange(10) % 2).items():
    for example, row in zip(dataset.splits[split]['inputs'], rows, strict=True):
      digit = ids.get(str(row), ids['[UNK]'])
      words = [ids[x] for x in ('[CLS]', 'the', 'cafe', ',')]
      words += [digit, ids['[SEP]']]
      assert example[:, 0].tolist() == words + [0] * 6
    np.testing.assert_array_equal(dataset.splits[split]['label'], rows % 2)


def test_pairs_and_files_of_each_split(tmp_path, vocabulary):
  text = 'label,id,text_b,text_a\n10,0,b,the\n-1,1,the,b\n2,2,cafe,the\n'
  write_csv(tmp_path / 'x/train.csv', text)
  write_csv(tmp_path / 'x/test.csv', 'text_a,text_b,label\r\nb,b,2\r\n\r\n')
  write_csv(tmp_path / 'x/validation.csv', 'text_a,text_b,label\nb,the,10\n')
  dataset = data.load(
    'csv:x', data_dir=str(tmp_path), vocabulary=vocabulary, max_length=8,
    buckets=(),
  )  # fmt: skip
  assert dataset.class_names == ('-1', '2', '10')
  assert dataset.counts == {'train': 3, 'test': 1, 'validation': 1}
  assert dataset.splits['train']['label'].tolist() == [2, 0, 1]
  first = dataset.splits['train']['inputs'][0]
  words = ('[CLS]', 'the', '[SEP]', 'b', '[SEP]')
  assert first[:, 0].tolist() == [VOCAB.index(x) for x in words] + [0] * 3
  assert first[:, 1].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('', r'has columns \[\]'),
    ('sentence,label\na,1\n', r"columns \['sentence', 'label'\]"),
    ('text,text_a,text_b,label\na,b,c,1\n', "either 'text' or both"),
    ('text,label\n', 'has no rows'),
    ('text,label\na,1\nb,1\n', "one label only, '1'"),
    ('text,label\na, b,1\n', 'line 2: 3 fields, but 2 columns; .*quotes'),
    ('text,label\na,1\n ,2\n', 'line 3: text is empty'),
    ('text,label\na,\n', 'line 2: label is empty'),
    ('text,label\n"a,1\n', 'cannot be read: unexpected end of data'),
  ],
)
def test_a_bad_csv_file_is_one_line(tmp_path, text, words):
  name = write_csv(tmp_path / 'x.csv', text)
  with pytest.raises(data.DatasetError, match=words) as caught:
    csv_sentences.load(kinds.path(name, None), VOCAB, 8)
  assert '\n' not in str(caught.value)


def test_other_mistakes_with_csv_files(tmp_path):
  path = tmp_path / 'x.csv'
  path.write_bytes(b'text,label\n\xff,1\n')
  with pytest.raises(data.DatasetError, match=r'cannot be read: .utf-8'):
    csv_sentences.load(str(path), VOCAB, 8)
  with pytest.raises(data.DatasetError, match='No such file'):
    csv_sentences.load(str(tmp_path / 'y.csv'), VOCAB, 8)
  write_csv(tmp_path / 'z/train.csv', 'text,label\na,1\nb,2\n')
  with pytest.raises(data.DatasetError, match=r"it has \['train.csv'\]"):
    csv_sentences.load(str(tmp_path / 'z'), VOCAB, 8)
  write_csv(tmp_path / 'z/test.csv', 'text,label\na,3\n')
  with pytest.raises(data.DatasetError, match="line 2: label '3' is not among"):
    csv_sentences.load(str(tmp_path / 'z'), VOCAB, 8)


# Labels.


def save(path, labels):
  np.save(path, labels)
  return str(path)


def test_labels_of_ones_own_take_the_place_of_the_datasets(tmp_path):
  plain = data.load('digits', validation_examples=180)
  own = np.random.default_rng(0).integers(0, 10, 1437)
  file = save(tmp_path / 'labels.npy', own)
  dataset = data.load('digits', validation_examples=180, labels=file)
  np.testing.assert_array_equal(dataset.splits['train']['label'], own[:1257])
  validation = dataset.splits['validation']['label']
  np.testing.assert_array_equal(validation, own[1257:])
  for split in ('train', 'validation', 'test'):
    inputs = dataset.splits[split]['inputs']
    np.testing.assert_array_equal(inputs, plain.splits[split]['inputs'])
  assert dataset.splits['test']['label'] is not own
  noisy = data.load('digits', labels=file, label_noise=0.3, fraction=0.5)
  label = noisy.splits['train']['label']
  wrong = label != own[noisy.rows['train']]
  assert wrong.sum() == round(0.3 * len(label))


def test_labels_of_streamed_and_of_bucketed_examples(tmp_path, vocabulary):
  name = write_folder(tmp_path / 'x', SPLIT)
  own = np.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], np.int8)
  file = save(tmp_path / 'labels.npy', own)
  for streamed in (False, True):
    fields = {'labels': file, 'streamed': streamed, 'validation_examples': 3}
    dataset = load(name, **fields)
    rows = dataset.rows
    assert [len(rows[x]) for x in ('train', 'validation')] == [8, 3]
    for split, expected in (
      ('train', own[rows['train']]),
      ('validation', own[rows['validation']]),
      ('test', [0, 0, 0, 1, 1]),
    ):
      if streamed:
        (chunk,) = dataset.evaluation(split, dataset.counts[split], ONE)
        found = chunk['label']
      else:
        found = dataset.splits[split]['label']
      assert found.dtype == np.int32
      np.testing.assert_array_equal(found, expected)
  sentences = write_csv(tmp_path / 'x.csv', 'text,label\n' + ROWS)
  own = np.array([0, 0, 0, 0, 1, 1, 1, 1])
  dataset = data.load(
    sentences, vocabulary=vocabulary, max_length=12, buckets=(),
    labels=save(tmp_path / 'l.npy', own),
  )  # fmt: skip
  np.testing.assert_array_equal(dataset.arrays('train')[0]['label'], own)


@pytest.mark.parametrize(
  ('labels', 'words'),
  [
    (np.zeros(1436, int), r'shape \(1436,\): it must be \(1437,\)'),
    (np.zeros((1437, 1), int), r'shape \(1437, 1\)'),
    (np.zeros(1437), 'dtype float64: it must hold integers'),
    (np.zeros(1437, bool), 'dtype bool: it must hold integers'),
    (np.arange(1437), r'from 0 to 1436 \(row 10 has 10\): .* in \[0, 10\)'),
    (np.full(1437, -1), r'from -1 to -1 \(row 0 has -1\)'),
  ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, words):
  file = save(tmp_path / 'x.npy', labels)
  with pytest.raises(data.DatasetError, match=words):
    data.load('digits', labels=file)


def test_what_is_no_file_of_labels_is_refused(tmp_path):
  with pytest.raises(data.DatasetError, match='No such file'):
    data.load('digits', labels=str(tmp_path / 'x.npy'))
  (tmp_path / 'x.npy').write_text('1 2 3')
  with pytest.raises(data.DatasetError, match=r'as a \.npy file'):
    data.load('digits', labels=str(tmp_path / 'x.npy'))
  np.save(tmp_path / 'o.npy', np.array([{}] * 1437), allow_pickle=True)
  with pytest.raises(data.DatasetError, match='cannot be read'):
    data.load('digits', labels=str(tmp_path / 'o.npy'))
  with pytest.raises(data.DatasetError, match='it is not a file'):
    data.labels.digest('/dev/zero')  # which would never end


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_labels(tmp_path):
  own = np.random.default_rng(0).integers(0, 10, 1437)
  fields = {'data.labels': save(tmp_path / 'labels.npy', own), 'steps': 10}
  helpers.train(tmp_path / 'run', **fields)
  moved = save(tmp_path / 'moved.npy', own)
  helpers.train(tmp_path / 'run', **fields | {'data.labels': moved})
  with pytest.raises(ConfigError, match='labels_digest'):
    helpers.train(tmp_path / 'run', steps=10)
  own[7] = (own[7] + 1) % 10
  save(tmp_path / 'labels.npy', own)
  with pytest.raises(ConfigError, match='labels_digest'):
    helpers.train(tmp_path / 'run', **fields)
  with (
    pytest.raises(ConfigError, match=r'data\.labels=.* other data than'),
    runs.open_run(tmp_path / 'run'),
  ):
    pass


# Other datasets of TFDS.


def write_tfds(root, name, shape, split_counts, label=None):
  """Prepares a set of TFDS's, of images of a shape or of different ones."""
  label = label or tfds.features.ClassLabel(names=['cat', 'dog', 'eel'])
  features = {'image': tfds.features.Image(shape=shape), 'label': label}
  features = tfds.features.FeaturesDict(features)
  with tfds.core.registered.skip_registration():

    class Builder(tfds.core.GeneratorBasedBuilder):
      # That of the stock dataset which has this name.
      VERSION = tfds.core.Version('3.0.1')

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=features)

      def _split_generators(self, dl_manager):
        return {x: self._generate_examples(n) for x, n in split_counts.items()}

      def _generate_examples(self, count):
        for i in range(count):
          size = shape if None not in shape else (10 + i, 12, 3)
          pixels = image_of(i, size)
          yield (
            i, {'image': Image.fromarray(pixels.squeeze()), 'label': i % 3}
          )  # fmt: skip

  Builder.name = name
  builder = Builder(data_dir=root, file_format='array_record')
  builder.download_and_prepare()


def test_fashion_mnist_needs_its_name_only(tmp_path):
  label = tfds.features.ClassLabel(num_classes=10)
  counts = {'train': 12, 'test': 4}
  write_tfds(tmp_path, 'fashion_mnist', (28, 28, 1), counts, label)
  for _ in range(2):  # the second time it is cached
    dataset = data.load('fashion_mnist', data_dir=str(tmp_path))
    assert dataset.counts == counts
    assert (dataset.input_shape, dataset.num_classes) == ((28, 28, 1), 10)
    assert dataset.class_names is None


def test_a_set_that_nobody_here_has_heard_of(tmp_path):
  """One shape; test and validation splits."""
  counts = {'train': 9, 'test': 3, 'validation': 3}
  write_tfds(tmp_path, 'my_set', (6, 5, 1), counts)
  folder_ = str(tmp_path)
  config = helpers.make_config(
    {'data.name': 'my_set', 'data.data_dir': folder_}
  )
  schema.validate(config)
  dataset = data.load('my_set', data_dir=folder_)
  assert dataset.counts == counts
  assert dataset.class_names == ('cat', 'dog', 'eel')
  assert dataset.input_shape == (6, 5, 1)
  train = dataset.splits['train']
  stored = {(image_of(i, (6, 5, 1)).tobytes(), i % 3) for i in range(9)}
  found = zip(train['inputs'], train['label'], strict=True)
  assert {(x.tobytes(), int(y)) for x, y in found} == stored
  images_ = np.asarray(dataset.prepare(train['inputs']), np.float64)
  np.testing.assert_allclose([images_.mean(), images_.std()], [0, 1], 0, 1e-5)


def test_a_set_of_images_of_any_size_without_a_test_split(tmp_path):
  write_tfds(tmp_path, 'any_size', (None, None, 3), {'train': 20})
  folder_ = str(tmp_path)
  memory = load('any_size', data_dir=folder_)
  assert memory.counts == {'train': 16, 'test': 4}
  assert memory.input_shape == (4, 4, 3)
  streamed = load('any_size', data_dir=folder_, streamed=True)
  for split, count in memory.counts.items():
    (chunk,) = streamed.evaluation(split, count, ONE)
    for key in ('inputs', 'label'):
      np.testing.assert_array_equal(chunk[key], memory.splits[split][key])
  again = load('any_size', data_dir=folder_)
  helpers.assert_trees_equal(again.splits, memory.splits)


def test_names_that_are_none_and_sets_that_are_not_of_images(tmp_path):
  for name in ('cifar', 'no_such_set', '../mnist', 'folder:'):
    with pytest.raises(ConfigError, match=r"data\.name='.*'fashion_mnist'"):
      schema.validate(helpers.make_config({'data.name': name}))
  config = helpers.make_config({'data.name': 'cats_vs_dogs'})
  schema.validate(config)  # TFDS has it
  message = 'cats_vs_dogs.* is not prepared'
  with pytest.raises(data.DatasetError, match=message) as caught:
    data.load('cats_vs_dogs', data_dir=str(tmp_path))
  assert 'margin_jax.prepare cats_vs_dogs' in str(caught.value)
  words = re.escape("it has ['image', 'label']")
  write_tfds(
    tmp_path, 'of_text', (4, 4, 1), {'train': 3}, tfds.features.Scalar(np.int64)
  )
  with pytest.raises(data.DatasetError, match=f'must have images.*{words}'):
    data.load('of_text', data_dir=str(tmp_path))


def test_what_is_not_of_images_is_not_downloaded(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  with pytest.raises(SystemExit, match=r"imdb_reviews' .* must have images"):
    prepare.main(['imdb_reviews', f'--data_dir={tmp_path}'])
  with pytest.raises(SystemExit, match="no dataset is called 'no_such_set'"):
    prepare.main(['no_such_set'])


# Runs.


@pytest.mark.slow
def test_a_folder_is_trained_loaded_and_guarded(tmp_path, monkeypatch):
  """Classes that brightness tells; from the images to a prediction."""
  import margin_jax

  rng = np.random.default_rng(0)
  for i in range(60):
    pixels = rng.integers(0, 120, (10, 12, 3)) + 130 * (i % 2)
    path = tmp_path / 'x' / ('dark', 'light')[i % 2] / f'{i:02}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
  fields = {
    'data.name': 'folder:x',
    'data.data_dir': str(tmp_path),
    'data.image_size': 8,
    'data.validation_examples': 8,
    'data.streamed': True,
    'data.workers': 0,
    'data.normalization': 'dataset',
    'steps': 20,
  }
  result, _ = helpers.train(tmp_path / 'run', **fields)
  assert result['classes'] == ['dark', 'light']
  assert result['test']['accuracy'] > 0.9
  trained = margin_jax.load(tmp_path / 'run')
  files = [tmp_path / 'x/dark/00.png', tmp_path / 'x/light/01.png']
  assert trained.predict(files).tolist() == [0, 1]
  assert trained.class_names == ('dark', 'light')
  with pytest.raises(ValueError, match=r'must be a list: \['):
    trained.predict(str(files[0]))
  text = tmp_path / 'text.png'
  text.write_text('no image')
  with pytest.raises(ValueError, match=r'/text\.png.* cannot be decoded') as e:
    trained.predict([files[0], text])
  assert 'BytesIO' not in str(e.value)
  files[0].unlink()
  with pytest.raises(ConfigError, match=r'data\.digest'):
    helpers.train(tmp_path / 'run', **fields)
  with (
    pytest.raises(ConfigError, match='other data than the run had'),
    runs.open_run(tmp_path / 'run'),
  ):
    pass
  again = margin_jax.load(tmp_path / 'run')  # needs no data
  assert again.predict(files[1:]).tolist() == [1]
  jax.clear_caches()


def test_equal_numbers_are_classes_in_the_order_of_their_texts():
  assert csv_sentences._classes(['1', '01', '0', '+1']) == (
    '0',
    '+1',
    '01',
    '1',
  )
