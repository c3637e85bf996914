"""Turns sentences into the tokens of an uncased BERT, with a vocab.txt."""

import collections
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from margin_jax import files
from margin_jax.data import tokens
from margin_jax.data.dataset import DatasetError

# One sentence, or two that belong together.
Sentences = Sequence[str | tuple[str, ...]]

# What is published beside a vocab.txt, and what it says of words as ours are.
CONFIG = 'tokenizer_config.json'
WORDS = {
  'do_lower_case': True,
  'strip_accents': True,
  'tokenize_chinese_chars': True,
}
NEEDED = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
# [CLS] a [SEP] b [SEP].
SHORTEST = 5
# Bytes of a vocab.txt; those of BERT have 200 KB to 1 MB.
LARGEST = 2**26
# So many at once: what `tokenizers` makes of a sentence is large.
_CHUNK = 4096


def read_vocab(path: os.PathLike | str) -> tuple[str, ...]:
  """Reads a vocab.txt, a token in a line; a token's line is its id.

  Raises:
    DatasetError: the file is not there, is no text, lacks one of `NEEDED` or
      has a token twice.
  """
  path = os.path.expanduser(path)
  remedy = 'use the vocab.txt that is published with every BERT'
  try:
    text = files.read(pathlib.Path(path), LARGEST, remedy).decode('utf-8')
  except (FileNotFoundError, UnicodeDecodeError) as error:
    raise DatasetError(
      f'vocabulary {str(path)!r} cannot be read ({error}); {remedy}'
    ) from error
  except files.FileError as error:
    raise DatasetError(f'vocabulary: {error}') from error
  # As files opened as text: every line end is one.
  lines = text.replace('\r\n', '\n').replace('\r', '\n').rstrip('\n')
  vocab = tuple(lines.split('\n'))
  _check(vocab, f'vocabulary {str(path)!r}')
  return vocab


def check_words(folder: pathlib.Path) -> None:
  """Raises where a folder's tokenizer_config.json asks for words unlike ours.

  Raises:
    DatasetError: it does, or cannot be read; there may be none.
  """
  path = folder / CONFIG
  remedy = 'use the one that is published with the vocab.txt, or none'
  try:
    found = files.read_json(path, {}, remedy)
  except FileNotFoundError:
    return
  except files.FileError as error:
    raise DatasetError(str(error)) from error
  for key, ours in WORDS.items():
    # For accents, null is "as for the case".
    if found.get(key) not in (ours, None):
      raise DatasetError(
        f'{str(path)!r} has {key}={files.shown(found[key])}: it must be '
        f'{ours!r}, as for an uncased BERT'
      )


def _check(vocab: Sequence[str], name: str) -> None:
  missing = [token for token in NEEDED if token not in vocab]
  if missing:
    raise DatasetError(f'{name} has no {", ".join(missing)}')
  token, count = collections.Counter(vocab).most_common(1)[0]
  if count > 1:
    raise DatasetError(f'{name} has {token!r} {count} times')


def fingerprint(vocab: Sequence[str]) -> str:
  """Returns a digest of the tokens and of their order."""
  return hashlib.sha256('\n'.join(vocab).encode()).hexdigest()


def id_dtype(vocab: Sequence[str]) -> np.dtype:
  """Returns what holds every id: uint16, else int32."""
  return np.dtype(np.uint16 if len(vocab) <= 2**16 else np.int32)


def encode(
  sentences: Sentences, vocab: Sequence[str], max_length: int
) -> np.ndarray:
  """Encodes sentences as [CLS] a [SEP], pairs as [CLS] a [SEP] b [SEP].

  As transformers' BertTokenizer does it: lower case, without accents; of a pair
  that is too long, the longer sentence is cut first. A special token that is
  written in a text, '[SEP]', becomes that token, as it does there.

  Args:
    sentences: N sentences, or tuples of one or of two.
    vocab: tokens by id: `read_vocab`, or a list with `NEEDED` in it.
    max_length: length of a row, special tokens included; at least `SHORTEST`.

  Returns:
    (N, max_length, 2) of dtype `id_dtype`: see `tokens`.

  Raises:
    ValueError: max_length is too small.
    DatasetError: the vocabulary lacks a token, or has one twice.
  """
  if max_length < SHORTEST:
    raise ValueError(f'max_length={max_length} must be at least {SHORTEST}')
  _check(vocab, 'the vocabulary')
  tokenizer = _tokenizer(vocab, max_length)
  dtype = id_dtype(vocab)
  encoded = np.zeros((len(sentences), max_length, 2), dtype)
  for start in range(0, len(sentences), _CHUNK):
    chunk = [
      row[0] if len(row) == 1 and not isinstance(row, str) else row
      for row in sentences[start : start + _CHUNK]
    ]
    found = tokenizer.encode_batch_fast(chunk)
    encoded[start : start + len(chunk)] = tokens.pack(
      np.array([row.ids for row in found], dtype),
      np.array([row.type_ids for row in found], dtype),
      np.array([row.attention_mask for row in found], dtype),
    )
  return encoded


def _tokenizer(vocab: Sequence[str], max_length: int):
  """Builds the tokenizer of the same parts as transformers' BertTokenizer."""
  # Imported here: images need none of it.
  import tokenizers
  from tokenizers import models, normalizers, pre_tokenizers, processors

  ids = {token: i for i, token in enumerate(vocab)}
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=100)
  )
  tokenizer.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=True,
    strip_accents=True,
    lowercase=True,
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  # One that the vocabulary lacks would get an id beyond its end.
  special = [token for token in (*NEEDED, '[MASK]') if token in ids]
  tokenizer.add_special_tokens(special)
  tokenizer.post_processor = processors.TemplateProcessing(
    single='[CLS]:0 $A:0 [SEP]:0',
    pair='[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1',
    special_tokens=[(token, ids[token]) for token in ('[CLS]', '[SEP]')],
  )
  tokenizer.enable_truncation(max_length, strategy='longest_first')
  tokenizer.enable_padding(
    length=max_length, pad_id=ids['[PAD]'], pad_token='[PAD]'
  )
  return tokenizer


def decode(encoded: np.ndarray, vocab: Sequence[str]) -> list[tuple[str, ...]]:
  """Returns the sentences of each row, as far as its tokens tell them.

  Args:
    encoded: (N, L, 2), as `encode` returns them.
    vocab: the vocabulary that they were encoded with.
  """
  special = ('[CLS]', '[SEP]')
  texts = []
  for row in encoded:
    sentences = [row[row[:, 1] == i, 0] for i in (1, 2)]
    words = [[vocab[i] for i in ids] for ids in sentences if ids.size]
    texts.append(
      tuple(
        ' '.join(x for x in each if x not in special).replace(' ##', '')
        for each in words
      )
    )
  return texts
