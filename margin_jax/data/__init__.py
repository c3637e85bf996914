"""Datasets by name; what they answer is in `dataset`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from margin_jax.data import (
  augment,
  autoaugment,
  bucketed,
  cache,
  csv_sentences,
  digits,
  entailment,
  folder,
  glue,
  imagenet,
  images,
  kinds,
  splits,
  streaming,
  tfds_images,
  tokenization,
  tokens,
)
from margin_jax.data import labels as labels_lib
from margin_jax.data.bucketed import Bucketed
from margin_jax.data.dataset import (
  Dataset,
  DatasetError,
  Loader,
  Origins,
  Split,
  Splits,
)
from margin_jax.data.in_memory import InMemory
from margin_jax.data.kinds import NAMES
from margin_jax.data.normalization import (
  NORMALIZATIONS,
  normalizer,
  zero_pixel,
)
from margin_jax.data.registered import REGISTERED
from margin_jax.data.streaming import Ordered, Streaming

__all__ = [
  'NAMES',
  'NORMALIZATIONS',
  'REGISTERED',
  'Bucketed',
  'Dataset',
  'DatasetError',
  'InMemory',
  'Loader',
  'Origins',
  'Splits',
  'Streaming',
  'digests',
  'kinds',
  'load',
]


def load(
  name: str,
  *,
  data_dir: str | None = None,
  validation_examples: int = 0,
  fraction: float = 1.0,
  labels: str | None = None,
  label_noise: float = 0.0,
  seed: int = 0,
  augmentations: Sequence[str] = (),
  crop_padding: int = 4,
  cutout_size: int = 16,
  normalization: str = 'dataset',
  image_size: int = 224,
  streamed: bool = False,
  workers: int = 8,
  undecodable: str = 'stop',
  max_length: int = 128,
  buckets: Sequence[int] = (32, 64),
  vocabulary: str | None = None,
  sample_size: int = 1,
  ordered: bool = False,
) -> Dataset:
  """Loads a dataset into host memory, or opens one that is too large for it.

  Args:
    name: one of `NAMES`, a registered one, 'folder:PATH', 'csv:PATH', or what
      TFDS calls a dataset of images: see `kinds`.
    data_dir: where TFDS has it prepared, or None for TFDS's own folder; or
      where PATH begins.
    validation_examples: how many of the last training examples are held out
      for validation: in the original order where records tell it (CIFAR,
      GLUE), else as they are stored.
    fraction: of the training examples that are not held out, how many are used.
    labels: the path of a .npy file with labels for all training examples, in
      place of the dataset's: see `labels.read`.
    label_noise: fraction of those whose labels are replaced by wrong ones.
    seed: decides which.
    augmentations: of images: names from `augment.AUGMENTATIONS`, applied in
      order.
    crop_padding: pixels of zeros around the image before a random crop.
    cutout_size: the side of the square that cutout covers.
    normalization: of images: 'dataset' (statistics of the training split),
      'imagenet', or 'unit', [0, 1].
    image_size: side that images without a common size are resized to.
    streamed: whether these are read while training, and not all before.
      ImageNet's are in any case.
    workers: processes that decode those that are streamed.
    undecodable: 'stop' at one that cannot be decoded, or 'skip' it.
    max_length: the most tokens of a sentence or a pair; longer ones are cut.
    buckets: increasing widths below `max_length`: sentences are put into
      buckets by length, the longest into one of `max_length`.
    vocabulary: the path of a vocab.txt, for sentences that people wrote.
    sample_size: how many training examples a step samples, at most; no bucket
      has fewer.
    ordered: whether a sampler on the devices orders the training examples.

  Returns:
    The dataset, with splits 'train', 'test' (GLUE's validation split; its own
    test split has no labels), of MNLI also 'test_mismatched', and, if asked
    for or if it has one of its own, 'validation'.

  Raises:
    ValueError: the name is unknown, or an argument does not fit the data.
    DatasetError: the dataset or the vocabulary is missing or broken.
  """
  if not kinds.is_known(name, data_dir):
    raise ValueError(
      f'data.name: no dataset is called {name!r}; it must be {kinds.allowed()}'
    )
  if normalization not in NORMALIZATIONS:
    raise ValueError(
      f'data.normalization={normalization!r} must be one of {NORMALIZATIONS}'
    )

  def training_rows(
    examples: int, has_validation: bool, own_labels: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    if has_validation and validation_examples:
      raise ValueError(
        f'data.validation_examples={validation_examples} must be 0: {name!r} '
        'has its own validation split'
      )
    return splits.training_rows(
      name, examples, validation_examples=validation_examples,
      fraction=fraction, seed=seed,
      # Files of the user may be in the order of their classes.
      classes=own_labels if kinds.is_path(name) else None,
    )  # fmt: skip

  def augmentation(prepare: Callable, channels: int) -> augment.Augmentation:
    if 'autoaugment' in augmentations:
      autoaugment.check_channels(channels)
    fill = zero_pixel(prepare, channels) if 'cutout' in augmentations else 0
    return augment.compose(
      tuple(augmentations), crop_padding, cutout_size, fill
    )

  if kinds.is_streamed(name, streamed):
    source = _source(name, data_dir)
    counts = {split: len(x) for split, x in source.records.items()}
    rows = training_rows(
      counts['train'],
      'validation' in counts,
      getattr(source.records['train'], 'labels', None),
    )
    of = dict.fromkeys(rows, 'train')  # of which own split each is made
    for split in {*counts} - {'train'}:
      rows[split], of[split] = np.arange(counts[split]), split
    shift = {split: np.zeros_like(x) for split, x in rows.items()}
    shift['train'] = splits.label_shift(
      len(rows['train']), label_noise, source.num_classes, seed
    )
    own_labels = {}
    if labels is not None:
      own = labels_lib.read(labels, counts['train'], source.num_classes)
      own_labels = {x: own[rows[x]] for x in rows if of[x] == 'train'}
    is_imagenet = name in imagenet.NAMES
    sample = np.zeros((1, 1, 1, 3), np.uint8)
    if normalization == 'dataset' and not is_imagenet:
      sample = images.sample(source.records['train'], rows['train'], image_size)
    # ImageNet's statistics are those of the dataset.
    known = is_imagenet and normalization == 'dataset'
    prepare = normalizer(sample, 'imagenet' if known else normalization)
    return (Ordered if ordered else Streaming)(
      name=name,
      num_classes=source.num_classes,
      class_names=source.class_names,
      origins=source.origins,
      records={split: source.records[of[split]] for split in rows},
      rows=rows,
      shift=shift,
      labels=own_labels,
      image_size=image_size,
      workers=workers,
      augment=augmentation(prepare, 3),
      prepare=prepare,
      decode=streaming.decode if is_imagenet else streaming.decode_whole,
      skip=undecodable == 'skip',
    )

  found = _arrays(name, data_dir, vocabulary, max_length, image_size)
  whole = dict(found.splits)
  num_classes = found.num_classes
  examples = len(whole['train']['label'])
  if labels is not None:
    own = labels_lib.read(labels, examples, num_classes)
    whole['train'] = {**whole['train'], 'label': own}
  training = training_rows(
    examples, 'validation' in whole, found.splits['train']['label']
  )
  rows, arrays = splits.cut(whole, training)
  train = arrays['train']
  shift = splits.label_shift(
    len(train['label']), label_noise, num_classes, seed
  )
  train['label'] = (train['label'] + shift) % num_classes
  if kinds.is_sentences(name):
    return Bucketed(
      name=name,
      num_classes=num_classes,
      class_names=found.class_names,
      origins=found.origins,
      splits=arrays,
      rows=rows,
      augment=lambda key, sentence: sentence,
      prepare=tokens.unpack,
      buckets={
        split: bucketed.assign(
          tokens.lengths(x['inputs']),
          (*buckets, max_length),
          sample_size if split == 'train' else 1,
        )
        for split, x in arrays.items()
      },
      vocabulary=found.vocabulary,
      f1=name in glue.F1_NAMES,
    )
  prepare = _prepare(train['inputs'], normalization)
  return InMemory(
    name=name,
    num_classes=num_classes,
    class_names=found.class_names,
    origins=found.origins,
    splits=arrays,
    rows=rows,
    augment=augmentation(prepare, train['inputs'].shape[-1]),
    prepare=prepare,
  )


def digests(
  name: str, data_dir: str | None, labels: str | None
) -> dict[str, str]:
  """Returns what tells data from others that have the same name or path.

  Args:
    name: the name of the dataset.
    data_dir: as `load` takes it.
    labels: as `load` takes it.

  Returns:
    Digests by the config field that names the data; those of TFDS and the
    generated ones have none.

  Raises:
    DatasetError: they cannot be read.
  """
  found = {}
  if name in REGISTERED:
    found['data.name'] = REGISTERED[name].digest
  elif name.startswith(kinds.FOLDER):
    found['data.name'] = folder.digest(kinds.path(name, data_dir))
  elif name.startswith(kinds.CSV):
    found['data.name'] = csv_sentences.digest(kinds.path(name, data_dir))
  if labels is not None:
    found['data.labels'] = labels_lib.digest(labels)
  return found


def _prepare(inputs: np.ndarray, normalization: str) -> Callable:
  """Returns what normalizes images; other inputs stay as they are."""
  if inputs.dtype != np.uint8:
    return lambda inputs: inputs
  return normalizer(inputs, normalization)


def _source(name: str, data_dir: str | None) -> images.Source:
  """Opens images that are read while training."""
  if name in imagenet.NAMES:
    return imagenet.load(name, data_dir)
  if name.startswith(kinds.FOLDER):
    return folder.load(kinds.path(name, data_dir))
  return tfds_images.source(name, data_dir)


class _Arrays(NamedTuple):
  """A dataset's own splits, in memory.

  Attributes:
    splits: 'train', 'test', and maybe others.
    num_classes: C.
    class_names: if they are known.
    vocabulary: of sentences, how many different tokens there are.
    origins: where in the user's own files the examples are.
  """

  splits: dict[str, Split]
  num_classes: int
  class_names: tuple[str, ...] | None = None
  vocabulary: int | None = None
  origins: Origins | None = None


def _arrays(
  name: str,
  data_dir: str | None,
  vocabulary: str | None,
  max_length: int,
  image_size: int,
) -> _Arrays:
  """Reads or generates a dataset's own splits."""
  if name in REGISTERED:
    arrays = REGISTERED[name]
    whole = {'train': arrays.train, 'test': arrays.test}
    return _Arrays(whole, arrays.num_classes)
  if name in entailment.NAMES:
    whole, num_classes, words = entailment.load(max_length)
    return _Arrays(whole, num_classes, entailment.CLASSES, len(words))
  if kinds.needs_vocabulary(name):
    if vocabulary is None:
      raise ValueError(
        f'data.vocabulary=None is not allowed: with data.name={name!r} it must '
        f'be the path of a vocab.txt, unless model.pretrained is a folder that '
        f'has one'
      )
    words = tokenization.read_vocab(vocabulary)
    if name in glue.NAMES:
      whole, num_classes = glue.load(name, data_dir, words, max_length)
      class_names = tfds_images.class_names(name, data_dir, num_classes)
      return _Arrays(whole, num_classes, class_names, len(words))
    path = kinds.path(name, data_dir)
    whole, class_names, lines = csv_sentences.load(path, words, max_length)
    return _Arrays(whole, len(class_names), class_names, len(words), lines)
  if name == 'digits':
    train, test, num_classes = digits.load()
    return _Arrays({'train': train, 'test': test}, num_classes)
  if name.startswith(kinds.FOLDER):
    source = folder.load(kinds.path(name, data_dir))
    whole = {
      split: _resized(records, image_size)
      for split, records in source.records.items()
    }
    return _Arrays(
      whole, source.num_classes, source.class_names, origins=source.origins
    )
  whole, num_classes = tfds_images.load(name, data_dir, image_size)
  class_names = tfds_images.class_names(name, data_dir, num_classes)
  return _Arrays(whole, num_classes, class_names)


def _resized(records: folder.Records, side: int) -> Split:
  """Returns the images of a folder's split, decoded once: see `cache`."""
  decoded = cache.cached(
    f'folder-{side}-{folder.order(records)}',
    records.paths,
    len(records),
    lambda: images.resize_all(records, side),
  )
  return {**decoded, 'label': records.labels}
