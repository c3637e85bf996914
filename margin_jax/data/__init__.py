"""Datasets by name; what they answer is in `dataset`."""

from collections.abc import Callable, Sequence

import numpy as np

from margin_jax.data import (
  augment,
  autoaugment,
  bucketed,
  digits,
  entailment,
  glue,
  imagenet,
  splits,
  tfds_images,
  tokenization,
  tokens,
)
from margin_jax.data.bucketed import Bucketed
from margin_jax.data.dataset import Dataset, DatasetError, Loader, Split, Splits
from margin_jax.data.in_memory import InMemory
from margin_jax.data.normalization import (
  NORMALIZATIONS,
  normalizer,
  zero_pixel,
)
from margin_jax.data.registered import REGISTERED
from margin_jax.data.streaming import Ordered, Streaming

__all__ = [
  'GENERATED',
  'IMAGES',
  'NAMES',
  'NORMALIZATIONS',
  'REGISTERED',
  'SENTENCES',
  'STREAMED',
  'VOCABULARY_NEEDED',
  'Bucketed',
  'Dataset',
  'DatasetError',
  'InMemory',
  'Loader',
  'Splits',
  'Streaming',
  'load',
]

# Of sentences or pairs of them; the others are of images.
SENTENCES = (*entailment.NAMES, *glue.NAMES)
# Of sentences as people wrote them.
VOCABULARY_NEEDED = glue.NAMES
IMAGES = ('digits', *tfds_images.NAMES, *imagenet.NAMES)
NAMES = (*IMAGES, *SENTENCES)
# In no folder.
GENERATED = ('digits', *entailment.NAMES)
# Their images are read while training, and cut to one size.
STREAMED = imagenet.NAMES


def load(
  name: str,
  *,
  data_dir: str | None = None,
  validation_examples: int = 0,
  fraction: float = 1.0,
  label_noise: float = 0.0,
  seed: int = 0,
  augmentations: Sequence[str] = (),
  crop_padding: int = 4,
  cutout_size: int = 16,
  normalization: str = 'dataset',
  image_size: int = 224,
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
    name: one of `NAMES`, or a registered one.
    data_dir: where TFDS has it prepared, or None for TFDS's own folder.
    validation_examples: how many of the last training examples are held out
      for validation: in the original order where records tell it (CIFAR,
      GLUE), else as they are stored.
    fraction: of the training examples that are not held out, how many are used.
    label_noise: fraction of those whose labels are replaced by wrong ones.
    seed: decides which.
    augmentations: of images: names from `augment.AUGMENTATIONS`, applied in
      order.
    crop_padding: pixels of zeros around the image before a random crop.
    cutout_size: the side of the square that cutout covers.
    normalization: of images: 'dataset' (statistics of the training split),
      'imagenet', or 'unit', [0, 1].
    image_size: side of the images that those of `STREAMED` are cut to.
    workers: processes that decode those.
    undecodable: 'stop' at a JPEG that cannot be decoded, or 'skip' it.
    max_length: the most tokens that an example of `SENTENCES` has; GLUE's
      longer ones are cut.
    buckets: increasing widths below `max_length`: sentences are put into
      buckets by length, the longest into one of `max_length`.
    vocabulary: the path of a vocab.txt, for those of `VOCABULARY_NEEDED`.
    sample_size: how many training examples a step samples, at most; no bucket
      has fewer.
    ordered: whether a sampler on the devices orders the training examples.

  Returns:
    The dataset, with splits 'train', 'test' (GLUE's validation split; its own
    test split has no labels), of MNLI also 'test_mismatched', and, if asked
    for, 'validation'.

  Raises:
    ValueError: the name is unknown, or an argument does not fit the data.
    DatasetError: the dataset or the vocabulary is missing or broken.
  """
  known = (*NAMES, *REGISTERED)
  if name not in known:
    raise ValueError(f'data.name: no dataset is called {name!r}; try {known}')
  if normalization not in NORMALIZATIONS:
    raise ValueError(
      f'data.normalization={normalization!r} must be one of {NORMALIZATIONS}'
    )

  def training_rows(examples: int) -> dict[str, np.ndarray]:
    return splits.training_rows(
      name, examples, validation_examples=validation_examples,
      fraction=fraction, seed=seed,
    )  # fmt: skip

  def augmentation(prepare: Callable, channels: int) -> augment.Augmentation:
    if 'autoaugment' in augmentations:
      autoaugment.check_channels(channels)
    fill = zero_pixel(prepare, channels) if 'cutout' in augmentations else 0
    return augment.compose(
      tuple(augmentations), crop_padding, cutout_size, fill
    )

  class_names = _class_names(name, data_dir)
  if name in STREAMED:
    records, num_classes = imagenet.load(name, data_dir)
    rows = training_rows(len(records['train']))
    rows['test'] = np.arange(len(records['test']))
    shift = {split: np.zeros_like(x) for split, x in rows.items()}
    shift['train'] = splits.label_shift(
      len(rows['train']), label_noise, num_classes, seed
    )
    # ImageNet's statistics are those of the dataset.
    own = 'imagenet' if normalization == 'dataset' else normalization
    prepare = normalizer(np.zeros((1, 1, 1, 3), np.uint8), own)
    return (Ordered if ordered else Streaming)(
      name=name,
      num_classes=num_classes,
      records={k: records['test' if k == 'test' else 'train'] for k in rows},
      rows=rows,
      shift=shift,
      image_size=image_size,
      workers=workers,
      augment=augmentation(prepare, 3),
      prepare=prepare,
      skip=undecodable == 'skip',
      class_names=class_names,
    )

  whole, num_classes, vocabulary_size = _arrays(
    name, data_dir, vocabulary, max_length
  )
  rows, arrays = splits.cut(whole, training_rows(len(whole['train']['label'])))
  train = arrays['train']
  shift = splits.label_shift(
    len(train['label']), label_noise, num_classes, seed
  )
  train['label'] = (train['label'] + shift) % num_classes
  if name in SENTENCES:
    return Bucketed(
      name=name,
      num_classes=num_classes,
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
      vocabulary=vocabulary_size,
      f1=name in glue.F1_NAMES,
      class_names=class_names,
    )
  prepare = _prepare(train['inputs'], normalization)
  return InMemory(
    name=name,
    num_classes=num_classes,
    splits=arrays,
    rows=rows,
    augment=augmentation(prepare, train['inputs'].shape[-1]),
    prepare=prepare,
    class_names=class_names,
  )


def _class_names(name: str, data_dir: str | None) -> tuple[str, ...] | None:
  if name in entailment.NAMES:
    return entailment.CLASSES
  if name in (*REGISTERED, *GENERATED):
    return None
  return tfds_images.class_names(name, data_dir)


def _prepare(inputs: np.ndarray, normalization: str) -> Callable:
  """Returns what normalises images; other inputs stay as they are."""
  if inputs.dtype != np.uint8:
    return lambda inputs: inputs
  return normalizer(inputs, normalization)


def _arrays(
  name: str, data_dir: str | None, vocabulary: str | None, max_length: int
) -> tuple[dict[str, Split], int, int | None]:
  """Returns the dataset's own splits, the numbers of classes and of tokens."""
  if name in REGISTERED:
    arrays = REGISTERED[name]
    whole = {'train': arrays.train, 'test': arrays.test}
    return whole, arrays.num_classes, None
  if name in entailment.NAMES:
    whole, num_classes, words = entailment.load(max_length)
    return whole, num_classes, len(words)
  if name in glue.NAMES:
    if vocabulary is None:
      raise ValueError(
        f'data.vocabulary=None is not allowed: it must be the path of a '
        f'vocab.txt with data.name={name!r}, or model.pretrained a folder that '
        f'holds one'
      )
    words = tokenization.read_vocab(vocabulary)
    whole, num_classes = glue.load(name, data_dir, words, max_length)
    return whole, num_classes, len(words)
  if name == 'digits':
    train, test, num_classes = digits.load()
  else:
    train, test, num_classes = tfds_images.load(name, data_dir)
  return {'train': train, 'test': test}, num_classes, None
