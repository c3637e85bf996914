"""GLUE's sentences and pairs as tokens, read from TFDS without TensorFlow."""

import functools

import numpy as np

from margin_jax.data import cache, tfds_images, tokenization
from margin_jax.data.dataset import DatasetError, Split

_FIELDS = {
  'glue/qnli': ('question', 'sentence'),
  'glue/sst2': ('sentence',),
  'glue/mrpc': ('sentence1', 'sentence2'),
  'glue/rte': ('sentence1', 'sentence2'),
  'glue/qqp': ('question1', 'question2'),
  'glue/mnli': ('premise', 'hypothesis'),
}
NAMES = tuple(_FIELDS)
# Reported as F1 of class 1; the others as accuracy.
F1_NAMES = ('glue/mrpc', 'glue/qqp')


def register() -> None:
  """Makes TFDS know GLUE; by itself it does only where GLUE is prepared."""
  import tensorflow_datasets.text.glue  # noqa: F401


def num_classes(name: str) -> int:
  """Returns how many classes the task has."""
  return 3 if name == 'glue/mnli' else 2


def split_names(name: str) -> dict[str, str]:
  """Returns what TFDS calls each of our splits.

  The labels of GLUE's own test split are secret, so everybody evaluates on
  'validation', of which MNLI has two: matched and mismatched.
  """
  if name == 'glue/mnli':
    return {
      'train': 'train',
      'test': 'validation_matched',
      'test_mismatched': 'validation_mismatched',
    }
  return {'train': 'train', 'test': 'validation'}


def load(
  name: str, data_dir: str | None, vocab: tuple[str, ...], max_length: int
) -> tuple[dict[str, Split], int]:
  """Tokenizes all of a task, once: see `cache`.

  Args:
    name: one of `NAMES`.
    data_dir: the folder that TFDS prepares datasets in, or None for its own.
    vocab: `tokenization.read_vocab`.
    max_length: tokens in a row; longer pairs are cut.

  Returns:
    The splits of `split_names`, each `{'inputs': (N, max_length, 2), 'label':
    (N,) int32}` in GLUE's order (see `tokens`), and the number of classes.

  Raises:
    ValueError: max_length is too small.
    DatasetError: the dataset is not there (the message holds the command that
      prepares it), in another format, broken, without a field, or has labels
      out of range.
  """
  register()
  builder, command = tfds_images.open_builder(name, data_dir)
  encode = functools.partial(
    tokenization.encode, vocab=vocab, max_length=max_length
  )
  encode([])  # complains of its arguments, even where the cache has it all
  prefix = f'{name.replace("/", "-")}-{builder.version}'
  suffix = f'{max_length}-{tokenization.fingerprint(vocab)[:16]}'
  splits = {}
  with tfds_images.explained(name, builder, command):
    for ours, theirs in split_names(name).items():
      info = builder.info.splits[theirs]
      splits[ours] = cache.cached(
        f'{prefix}-{theirs}-{suffix}',
        info.filepaths,
        info.num_examples,
        functools.partial(_decode, name, builder, theirs, command, encode),
        dtype=tokenization.id_dtype(vocab),
      )
  return splits, num_classes(name)


def _decode(name: str, builder, split: str, command: str, encode) -> Split:
  """Decodes all examples of a split, in the order of their numbers."""
  remedy = f'Remove it and prepare it again with: {command}'
  where = f'dataset {name!r} in {builder.data_path}, split {split!r}'
  dataset = builder.as_data_source(split=split)
  fields = (*_FIELDS[name], 'label', 'idx')
  rows = []
  for start in range(0, len(dataset), 1000):
    chunk = range(start, min(start + 1000, len(dataset)))
    for record in dataset.__getitems__(list(chunk)):
      rows.append([record.get(field) for field in fields])
      if None in rows[-1]:  # which is what TFDS makes of one that is missing
        missing = [x for x in fields if record.get(x) is None]
        raise DatasetError(
          f'{where}: an example has no {", ".join(missing)}. {remedy}'
        )
  rows.sort(key=lambda row: row[-1])
  sentences = [tuple(x.decode() for x in row[:-2]) for row in rows]
  label = np.array([row[-2] for row in rows], np.int32)
  classes = num_classes(name)
  if label.size and not (label.min() >= 0 and label.max() < classes):
    raise DatasetError(
      f'{where}: labels run from {label.min()} to {label.max()}, outside '
      f'[0, {classes}). {remedy}'
    )
  return {'inputs': encode(sentences), 'label': label}
