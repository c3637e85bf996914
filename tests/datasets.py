"""Datasets that tests make, as TFDS stores them or in memory."""

import io
import pathlib
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from margin_jax.data import normalization, streaming
from margin_jax.train import devices as devices_lib
from tests.helpers import small_config


def image_of(number, shape):
  """Noise of its own for each number."""
  return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def write_dataset(folder, name, *, ids, labels):
  """Prepares dataset `name` as TFDS would, and returns the files' folder.

  Training example i is image_of(i, shape) with label labels[i], unchecked, and
  CIFAR's id, 'train_7', if `ids`; the three test examples have labels 0, 1, 2.
  """
  # Before registration is skipped: this registers the stock datasets.
  stock = tfds.builder(name, data_dir=folder)
  shape = stock.info.features['image'].shape
  label = tfds.features.ClassLabel(num_classes=10)
  features = {'image': tfds.features.Image(shape=shape), 'label': label}
  features |= {'id': tfds.features.Text()} if ids else {}
  features = tfds.features.FeaturesDict(features)

  with tfds.core.registered.skip_registration():

    class Builder(tfds.core.GeneratorBasedBuilder):
      VERSION = stock.version

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=features)

      def _split_generators(self, dl_manager):
        splits = {'train': labels, 'test': range(3)}
        return {s: self._generate_examples(s, x) for s, x in splits.items()}

      def _generate_examples(self, split, values):
        for i, value in enumerate(values):
          image = Image.fromarray(image_of(i, shape).squeeze())
          record = {'image': image, 'label': value}
          key = f'{split}_{i}'
          yield key, record | ({'id': key} if ids else {})

  Builder.name = name
  builder = Builder(data_dir=folder, file_format='array_record')
  # Which refuses labels out of range, as files from elsewhere may have them.
  encode = lambda label, value: value  # noqa: E731
  with mock.patch.object(tfds.features.ClassLabel, 'encode_example', encode):
    builder.download_and_prepare()
  return builder.data_path


# The fields of text of GLUE's tasks.
TASKS = {
  'glue/qnli': ('question', 'sentence'),
  'glue/sst2': ('sentence',),
  'glue/mrpc': ('sentence1', 'sentence2'),
  'glue/rte': ('sentence1', 'sentence2'),
  'glue/qqp': ('question1', 'question2'),
  'glue/mnli': ('premise', 'hypothesis'),
}
SPLITS = {'train': 'train', 'test': 'validation'}
MNLI = {
  'train': 'train',
  'test': 'validation_matched',
  'test_mismatched': 'validation_mismatched',
}
VOCAB = (
  '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the', 'un', '##aff', '##able',
  'cafe', 'run', '##ning', '##n', 'ru', ',', '.', '!', '[', ']', "'", 's',
  'sep', '中', '文', 'a', '##a', 'b', 'ß', '##ss', '$', '-', '##2', '1',
)  # fmt: skip


def splits_of(name):
  """Our name of each split, and the name that TFDS stores it by."""
  return MNLI if name == 'glue/mnli' else SPLITS


def text_of(split, number, field):
  """A sentence that no other example has, of 1 to 5 words."""
  words = np.random.default_rng([len(split), number, len(field)])
  words = words.choice(['the', 'cafe', 'Running', 'b', 'unaffable'], 4)
  return ' '.join([str(number % 3), *words[: number % 5]])


def write_task(folder, name, *, sizes=(30, 8, 7), labels=None, without=()):
  """Prepares a GLUE task as TFDS would, and returns the files' folder.

  Example i of a split has label i % classes, or labels[i].
  """
  classes = 3 if name == 'glue/mnli' else 2
  texts = [x for x in TASKS[name] if x not in without]
  features = dict.fromkeys(texts, tfds.features.Text())
  features |= {x: np.int32 for x in ('label', 'idx') if x not in without}

  with tfds.core.registered.skip_registration():

    class Builder(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('2.0.0')
      BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=name.split('/')[1]),)

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self, features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        names = splits_of(name).values()
        return {
          split: self._generate_examples(split, size)
          for split, size in zip(names, sizes, strict=False)
        }

      def _generate_examples(self, split, size):
        for i in range(size):
          example = {x: text_of(split, i, x) for x in texts}
          example['label'] = i % classes if labels is None else labels[i]
          example['idx'] = 3 * i  # as in MRPC, there are gaps
          yield i, {k: x for k, x in example.items() if k in features}

  Builder.name = 'glue'
  builder = Builder(
    config=name.split('/')[1], data_dir=folder, file_format='array_record'
  )
  builder.download_and_prepare()
  return pathlib.Path(builder.data_path)


def jpeg(rng, label):
  """A photo-like JPEG of a random shape, its brightness near the label's."""
  height, width = rng.integers(20, 60, 2)
  pixels = rng.integers(0, 100, (height // 4 + 1, width // 4 + 1, 3))
  image = Image.fromarray((pixels + 30 * label).astype(np.uint8))
  file = io.BytesIO()
  image.resize((int(width), int(height))).save(file, 'JPEG')
  return file.getvalue()


class Records(list):
  """As TFDS has it."""

  def __getitems__(self, rows):
    return [self[row] for row in rows]


ONE = devices_lib.Shard(0, 1)


def streamed(workers=0, examples=30, kind=streaming.Streaming):
  """30 training and 11 test images of four classes, made here."""
  rng = np.random.default_rng(0)

  def records(count):
    labels = rng.integers(0, 4, count)
    return Records({'image': jpeg(rng, y), 'label': int(y)} for y in labels)

  rows = {'train': np.arange(examples), 'test': np.arange(11)}
  return kind(
    name='made',
    num_classes=4,
    records={'train': records(examples), 'test': records(11)},
    rows=rows,
    shift={name: np.zeros(len(x), np.int32) for name, x in rows.items()},
    image_size=16,
    workers=workers,
    augment=lambda key, image: image,
    prepare=normalization.normalizer(
      np.zeros((1, 1, 1, 3), np.uint8), 'imagenet'
    ),
  )


def streamed_config(**fields):
  """Six steps on what `streamed` makes."""
  return small_config(
    **{
      'data.validation_examples': 0,
      'data.augmentations': ('flip',),
      'model.name': 'cnn',
      'eval_batch_size': 7,
      'steps': 6,
      'log_every': 3,
      'eval_every': 6,
      'checkpoint_every': 3,
      'pool_size': 16,
      'selection.every': 2,
      **fields,
    }
  )
