"""Sentences in CSV files, with a header: `text`, or `text_a` and `text_b`, and
`label`.

A path is either a file, a fifth of each class of which is the test split (see
`splits.hold_out`), or a folder with train.csv, test.csv and optionally
validation.csv.
"""

import csv
import os
from collections.abc import Iterator

import numpy as np

from margin_jax import files
from margin_jax.data import splits, tokenization
from margin_jax.data.dataset import DatasetError, Origins, Split

COLUMNS = (('text',), ('text_a', 'text_b'))
LABEL = 'label'
SPLITS = ('train', 'test', 'validation')
# Of characters in a field; Python's own is 128 KiB.
_LONGEST = 2**24


def paths(path: str) -> dict[str, str]:
  """Returns the file of each split; 'train' alone is to be split."""
  if not os.path.isdir(path):
    return {'train': path}
  found = {split: os.path.join(path, f'{split}.csv') for split in SPLITS}
  found = {split: x for split, x in found.items() if os.path.exists(x)}
  if not {'train', 'test'} <= {*found}:
    raise DatasetError(
      f'folder {path!r} must have train.csv and test.csv; it has '
      f'{sorted(os.listdir(path))[:10]}'
    )
  return found


def digest(path: str) -> str:
  """Returns a digest of the files."""
  try:
    return '-'.join(files.digest(x) for x in paths(path).values())
  except OSError as error:
    raise DatasetError(f'{path!r} cannot be read: {error}') from error


def load(
  path: str, vocab: tuple[str, ...], max_length: int
) -> tuple[dict[str, Split], tuple[str, ...], Origins]:
  """Reads and tokenizes all sentences.

  The classes are the different labels of the training file, sorted: whole
  numbers by value, names by the alphabet.

  Args:
    path: see above.
    vocab: `tokenization.read_vocab`.
    max_length: tokens in a row; longer ones are cut.

  Returns:
    The splits, each `{'inputs': (N, max_length, 2), 'label': (N,) int32}` in
    the order of the file, the names of the classes, and the line in the file
    at which each example begins.

  Raises:
    ValueError: max_length is too small.
    DatasetError: a file is not there, is no such file, or has labels that the
      training file lacks; or that has one class only.
  """
  rows = {split: _read(file) for split, file in paths(path).items()}
  classes = _classes([label for *_, label, _ in rows['train']])
  number = {name: index for index, name in enumerate(classes)}
  if len(classes) < 2:
    raise DatasetError(
      f'{paths(path)["train"]!r} has one label only, {classes[0]!r}: there '
      'must be two or more'
    )
  lines = {
    split: np.array([line for *_, line in examples])
    for split, examples in rows.items()
  }
  found = {}
  for split, examples in rows.items():
    file = paths(path)[split]
    for *_, label, line in examples:
      if label not in number:
        raise DatasetError(
          f'{file!r}, line {line}: label {label!r} is not among those of the '
          f'training file, {classes}'
        )
    found[split] = {
      'inputs': tokenization.encode(
        [tuple(texts) for *texts, _, _ in examples], vocab, max_length
      ),
      'label': np.array([number[x[-2]] for x in examples], np.int32),
    }
  if 'test' not in found:
    whole = found['train']
    try:
      cut = splits.hold_out(whole['label'])
    except ValueError as error:
      raise DatasetError(f'{path!r}: {error}') from error
    found = {
      split: {name: x[where] for name, x in whole.items()}
      for split, where in cut.items()
    }
    lines = {split: lines['train'][where] for split, where in cut.items()}
  return found, classes, Origins('line', lines)


def _classes(labels: list[str]) -> tuple[str, ...]:
  """Returns the different labels, sorted."""
  different = {*labels}
  try:
    return tuple(sorted(different, key=lambda x: (int(x), x)))
  except ValueError:
    return tuple(sorted(different))


def _read(path: str) -> list[tuple]:
  """Returns a tuple of each row: its texts, its label, its first line."""
  limit = csv.field_size_limit(_LONGEST)  # of the process
  try:
    with open(path, newline='', encoding='utf-8-sig') as file:
      return [*_rows(path, csv.reader(file, strict=True))]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise DatasetError(f'{path!r} cannot be read: {error}') from error
  finally:
    csv.field_size_limit(limit)


def _rows(path: str, reader) -> Iterator[tuple]:
  header = [name.strip() for name in next(reader, [])]
  texts = [x for x in COLUMNS if {*x} <= {*header}]
  if len(texts) != 1 or header.count(LABEL) != 1:
    raise DatasetError(
      f'{path!r} has columns {header} in its first line: it must have '
      "'label', and either 'text' or both 'text_a' and 'text_b'"
    )
  columns = [header.index(name) for name in (*texts[0], LABEL)]
  count = 0
  following = reader.line_num + 1
  for row in reader:
    line, following = following, reader.line_num + 1
    if not row:  # an empty line
      continue
    where = f'{path!r}, line {line}'
    if len(row) != len(header):
      raise DatasetError(
        f'{where}: {len(row)} fields, but {len(header)} columns; put a text '
        'with commas in double quotes'
      )
    values = [row[i].strip() for i in columns]
    if not all(values):
      missing = (*texts[0], LABEL)[values.index('')]
      raise DatasetError(f'{where}: {missing} is empty')
    count += 1
    yield (*values, line)
  if not count:
    raise DatasetError(f'{path!r} has no rows')
