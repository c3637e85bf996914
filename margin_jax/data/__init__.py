"""Datasets by name."""

import functools
from collections.abc import Callable

import numpy as np

from margin_jax.data import (
  augment,
  autoaugment,
  bucketed,
  digits,
  entailment,
  glue,
  imagenet,
  in_memory,
  own,
  tfds_images,
  tokenization,
  tokens,
)
from margin_jax.data.in_memory import Epoch, Source, Stream, draw
from margin_jax.data.streaming import Streamed
from margin_jax.data.tfds_images import DatasetError

__all__ = [
  'GENERATED',
  'IMAGES',
  'NAMES',
  'SENTENCES',
  'VOCABULARY_NEEDED',
  'DatasetError',
  'Epoch',
  'Source',
  'Stream',
  'Streamed',
  'draw',
  'load',
  'load_sentences',
  'own',
  'parts',
  'tokens',
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
NORMALIZATIONS = ('dataset', 'imagenet')


def _check_normalization(name: str) -> None:
  if name not in NORMALIZATIONS:
    raise ValueError(
      f'data.normalization={name!r} must be one of {NORMALIZATIONS}'
    )


def load(
  name: str,
  *,
  data_dir: str | None = None,
  validation_examples: int = 0,
  augmentations: tuple[str, ...] = (),
  crop_padding: int = 4,
  cutout_size: int = 16,
  normalization: str = 'dataset',
  fraction: float = 1.0,
  label_noise: float = 0.0,
  seed: int = 0,
  image_size: int = 224,
  workers: int = 8,
  undecodable: str = 'stop',
) -> Source | Streamed:
  """Loads images into host memory, or opens a dataset too large for it.

  Args:
    name: one of `IMAGES`, or a registered one.
    data_dir: where TFDS has it prepared, or None for TFDS's own folder.
    validation_examples: how many of the last training examples are held out
      for validation: in the original order where records tell it (CIFAR,
      GLUE), else as they are stored.
    augmentations: names from `augment.AUGMENTATIONS`, applied in order.
    crop_padding: pixels of zeros around the image before a random crop.
    cutout_size: the side of the square that cutout covers.
    normalization: 'dataset' (statistics of the training split) or 'imagenet'.
    fraction: share of the training examples that are used, without those held
      out.
    label_noise: share of those whose labels are replaced by wrong ones.
    seed: decides which.
    image_size: side of the images that those of `STREAMED` are cut to.
    workers: processes that decode those.
    undecodable: 'stop' at a JPEG that cannot be decoded, or 'skip' it.

  Returns:
    The dataset, with splits 'train', 'test' and, if asked for, 'validation'.

  Raises:
    ValueError: the name is unknown, or an argument does not fit the data.
    DatasetError: the dataset is missing or broken.
  """
  _check_name(name, (*IMAGES, *own.DATASETS))
  _check_normalization(normalization)
  chosen = functools.partial(
    _training_rows, name, validation_examples=validation_examples,
    fraction=fraction, seed=seed,
  )  # fmt: skip
  if name in STREAMED:
    opened, num_classes = imagenet.load(name, data_dir)
    rows = chosen(len(opened['train']))
    rows['test'] = np.arange(len(opened['test']))
    # The normalisation of any: these are the statistics of this dataset.
    prepare = in_memory.normalizer(np.zeros((1, 1, 1, 3), np.uint8), 'imagenet')
  else:
    whole, num_classes = _arrays(name, data_dir)
    rows, splits = _split(whole, chosen(len(whole['train']['label'])))
    prepare = _prepare(splits['train']['inputs'], normalization)
  augmentation = _augmentation(
    augmentations, crop_padding, cutout_size, prepare,
    3 if name in STREAMED else splits['train']['inputs'].shape[-1],
  )  # fmt: skip
  wrong = in_memory.label_shift(
    len(rows['train']), label_noise, num_classes, seed
  )
  if name in STREAMED:
    return Streamed(
      name=name,
      num_classes=num_classes,
      records={k: opened['test' if k == 'test' else 'train'] for k in rows},
      rows=rows,
      shift={k: np.zeros_like(x) for k, x in rows.items()} | {'train': wrong},
      image_size=image_size,
      workers=workers,
      augment=augmentation,
      prepare=prepare,
      skip=undecodable == 'skip',
    )
  splits['train']['label'] = (splits['train']['label'] + wrong) % num_classes
  return Source(
    name=name,
    num_classes=num_classes,
    splits=splits,
    rows=rows,
    augment=augmentation,
    prepare=prepare,
  )


def _prepare(inputs: np.ndarray, normalization: str) -> Callable:
  if inputs.dtype != np.uint8:
    return lambda inputs: inputs
  return in_memory.normalizer(inputs, normalization)


def _check_name(name: str, allowed: tuple[str, ...]) -> None:
  if name not in allowed:
    raise ValueError(f'data.name: no dataset is called {name!r}; try {allowed}')


def _arrays(
  name: str, data_dir: str | None
) -> tuple[dict[str, in_memory.Split], int]:
  """The dataset's own training and test split, and the number of classes."""
  if name in own.DATASETS:
    found = own.DATASETS[name]
    return {'train': found.train, 'test': found.test}, found.num_classes
  if name == 'digits':
    train, test, num_classes = digits.load()
  else:
    train, test, num_classes = tfds_images.load(name, data_dir)
  return {'train': train, 'test': test}, num_classes


def _augmentation(
  names: tuple[str, ...],
  crop_padding: int,
  cutout_size: int,
  prepare: Callable,
  channels: int,
) -> augment.Augmentation:
  if 'autoaugment' in names:
    autoaugment.check_channels(channels)
  fill = in_memory.zero_pixel(prepare, channels) if 'cutout' in names else 0
  return augment.compose(tuple(names), crop_padding, cutout_size, fill)


def _split(
  whole: dict[str, in_memory.Split], training: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, in_memory.Split]]:
  """Rows and arrays of every split: parts of 'train', the others whole."""
  rows = dict(training)
  splits = {}
  for split, where in training.items():
    splits[split] = {k: x[where] for k, x in whole['train'].items()}
  for split, arrays in whole.items():
    if split != 'train':
      rows[split] = np.arange(len(arrays['label']))
      splits[split] = dict(arrays)
  return rows, splits


def _sentences(
  name: str, data_dir: str | None, vocabulary: str | None, max_length: int
) -> tuple[dict[str, in_memory.Split], int, int]:
  """The dataset's own splits, the numbers of classes and of tokens."""
  if name in entailment.NAMES:
    whole, num_classes, words = entailment.load(max_length)
    return whole, num_classes, len(words)
  if vocabulary is None:
    raise ValueError(
      f'data.vocabulary=None is not allowed: it must be the path of a '
      f'vocab.txt with data.name={name!r}, or model.pretrained a folder that '
      f'holds one'
    )
  words = tokenization.read_vocab(vocabulary)
  whole, num_classes = glue.load(name, data_dir, words, max_length)
  return whole, num_classes, len(words)


def load_sentences(
  name: str,
  *,
  data_dir: str | None = None,
  validation_examples: int = 0,
  fraction: float = 1.0,
  label_noise: float = 0.0,
  seed: int = 0,
  max_length: int = 128,
  widths: tuple[int, ...] = (32, 64),
  vocabulary: str | None = None,
  draw_size: int = 1,
) -> Source:
  """Loads sentences, or pairs of them, as tokens into host memory.

  Args:
    name: one of `SENTENCES`.
    data_dir, validation_examples, fraction, label_noise, seed: as of `load`.
    max_length: the most tokens an example has; GLUE's longer ones are cut.
    widths: increasing, below `max_length`: those of the shorter parts; see
      `parts`.
    vocabulary: of GLUE: the path of a vocab.txt.
    draw_size: how many training examples a step draws, at most.

  Returns:
    The dataset, with splits 'train', 'test' (GLUE's validation split; its own
    test split has no labels), of MNLI also 'test_mismatched', and, if asked
    for, 'validation'.

  Raises:
    ValueError: the name is unknown, or an argument does not fit the data.
    DatasetError: the dataset or the vocabulary is missing or broken.
  """
  _check_name(name, SENTENCES)
  whole, num_classes, words = _sentences(name, data_dir, vocabulary, max_length)
  rows, splits = _split(
    whole,
    _training_rows(
      name, len(whole['train']['label']),
      validation_examples=validation_examples, fraction=fraction, seed=seed,
    ),
  )  # fmt: skip
  label = splits['train']['label']
  wrong = in_memory.label_shift(len(label), label_noise, num_classes, seed)
  splits['train']['label'] = (label + wrong) % num_classes
  return Source(
    name=name,
    num_classes=num_classes,
    splits=splits,
    rows=rows,
    augment=lambda key, sentence: sentence,
    prepare=tokens.unpack,
    parts={
      k: bucketed.assign(
        tokens.lengths(x['inputs']),
        (*widths, max_length),
        draw_size if k == 'train' else 1,
      )
      for k, x in splits.items()
    },
    vocabulary=words,
    f1=name in glue.F1_NAMES,
  )


def _training_rows(
  name: str,
  examples: int,
  *,
  validation_examples: int,
  fraction: float,
  seed: int,
) -> dict[str, np.ndarray]:
  """Which rows of the dataset's training split each split has."""
  if not 0 <= validation_examples < examples:
    raise ValueError(
      f'data.validation_examples={validation_examples} must be at least 0 and '
      f'leave something to train on: {name!r} has {examples} training examples'
    )
  cut = examples - validation_examples
  kept = in_memory.subset(np.arange(cut), fraction, seed)
  if not kept.size:
    raise ValueError(
      f'data.fraction={fraction} must leave something to train on: it is of '
      f'{cut} training examples'
    )
  rows = {'train': kept}
  if validation_examples:
    rows['validation'] = np.arange(cut, examples)
  return rows
