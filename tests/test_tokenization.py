"""WordPiece against one in plain Python, and against transformers."""

import hashlib
import re
import unicodedata

import jax
import numpy as np
import pytest

from margin_jax import data
from margin_jax.data import glue, tokenization, tokens
from tests.datasets import VOCAB

TEXTS = [
  'The running cafe, unaffable!',
  "Café's\tUNAFFABLE\r\nruns",
  'the中文the',
  'a\u0301 \u0000b \ufffd a\u200bb a\u00a0b',
  '[SEP] the [sep] [MASK][CLS]a[PAD] [UNK] [ SEP ]',
  'ß SS \u1e9e 12 a-b $1.2 «a»',
  'a' * 100,
  'a' * 101,
  'b' + 'a' * 99 + ' xyz the',
  '',
  '   ',
]


def _words(text):
  """BERT's basic tokenization: cleaned, lower case, no accents, split."""
  kept = ''
  for char in text:
    kind = unicodedata.category(char)
    if char in '\t\n\r' or kind == 'Zs':
      kept += ' '
    elif char not in '\0\ufffd' and kind not in ('Cc', 'Cf', 'Cn', 'Co'):
      kept += f' {char} ' if 0x4E00 <= ord(char) <= 0x9FFF else char
  kept = unicodedata.normalize('NFD', kept)
  kept = ''.join(x for x in kept if unicodedata.category(x) != 'Mn').lower()
  for char in {*kept}:
    mark = ord(char) < 128 and char.isprintable() and not char.isalnum()
    if (mark and char != ' ') or unicodedata.category(char)[0] == 'P':
      kept = kept.replace(char, f' {char} ')
  return kept.split()


def _pieces(word, vocab):
  """The longest piece that fits, again and again; else one [UNK]."""
  pieces, start = [], 0
  while start < len(word):
    ends = (
      end
      for end in range(len(word), start, -1)
      if '##' * (start > 0) + word[start:end] in vocab
    )
    end = next(ends, None)
    if end is None or len(word) > 100:
      return ['[UNK]']
    pieces.append('##' * (start > 0) + word[start:end])
    start = end
  return pieces


def _tokens(text, vocab):
  """All of it; special tokens in the text stay what they are."""
  special = r'(\[PAD\]|\[UNK\]|\[CLS\]|\[SEP\]|\[MASK\])'
  found = []
  for part in re.split(special, text):
    if re.fullmatch(special, part):
      found.append(part)
    else:
      found += [x for word in _words(part) for x in _pieces(word, vocab)]
  return found


def _row(sentences, vocab, max_length):
  """Ids and sentence numbers, one token taken away at a time."""
  parts = [_tokens(sentence, vocab) for sentence in sentences]
  first_is_longer = len(parts[0]) > len(parts[-1])
  while sum(map(len, parts)) + len(parts) + 1 > max_length:
    size = max(map(len, parts))
    longest = [i for i, part in enumerate(parts) if len(part) == size]
    # Of equals it is the one that was shorter at the start.
    parts[longest[0] if not first_is_longer else longest[-1]].pop()
  row = [('[CLS]', 1)]
  for number, part in enumerate(parts, 1):
    row += [(token, number) for token in (*part, '[SEP]')]
  row += (max_length - len(row)) * [('[PAD]', 0)]
  return [(vocab.index(token), number) for token, number in row]


PAIRS = [(a, b) for a in TEXTS for b in TEXTS]


@pytest.mark.parametrize('max_length', [5, 6, 12, 13, 24, 250])
def test_tokens_are_those_of_plain_python(max_length):
  rows = [*PAIRS, *((text,) for text in TEXTS)]
  found = tokenization.encode(rows, VOCAB, max_length)
  assert found.shape == (len(rows), max_length, 2)
  assert found.dtype == np.uint16
  for row, array in zip(rows, found, strict=True):
    assert [*map(tuple, array)] == _row(row, VOCAB, max_length), row


def test_a_single_sentence_is_as_a_tuple_of_one():
  np.testing.assert_array_equal(
    tokenization.encode(TEXTS, VOCAB, 16),
    tokenization.encode([(text,) for text in TEXTS], VOCAB, 16),
  )


def test_more_sentences_than_are_encoded_at_once(monkeypatch):
  whole = tokenization.encode(PAIRS, VOCAB, 20)
  monkeypatch.setattr(tokenization, '_CHUNK', 7)
  np.testing.assert_array_equal(tokenization.encode(PAIRS, VOCAB, 20), whole)
  assert tokenization.encode([], VOCAB, 20).shape == (0, 20, 2)


def test_a_vocabulary_too_large_for_16_bits():
  large = (*VOCAB, *(f'w{i}' for i in range(2**16 - len(VOCAB))))
  assert tokenization.id_dtype(large) == np.uint16
  large = (*large, 'last')
  found = tokenization.encode(['last the'], large, 6)
  assert found.dtype == np.int32
  assert found[0, :, 0].tolist() == [2, 2**16, 5, 3, 0, 0]


def test_a_special_token_the_vocabulary_lacks_is_text():
  small = tuple(x for x in VOCAB if x != '[MASK]')
  found = tokenization.encode(['[MASK]'], small, 6)
  words = ['[CLS]', '[', '[UNK]', ']', '[SEP]', '[PAD]']
  assert found[0, :, 0].tolist() == [small.index(x) for x in words]


def test_packed_arrays_come_apart_again():
  found = tokenization.encode([('the cafe', 'run'), ('a',)], VOCAB, 8)
  parts = jax.jit(tokens.unpack)(found)
  assert {k: (x.shape, x.dtype.name) for k, x in parts.items()} == {
    'ids': ((2, 8), 'int32'),
    'segments': ((2, 8), 'int32'),
    'mask': ((2, 8), 'bool'),
  }
  assert parts['ids'].tolist() == found[..., 0].tolist()
  segments = [[0, 0, 0, 0, 1, 1, 0, 0], [0] * 8]
  assert parts['segments'].tolist() == segments
  assert parts['mask'].sum(axis=1).tolist() == [6, 3]
  assert tokens.lengths(found).tolist() == [6, 3]
  ids = found[..., 0]
  packed = tokens.pack(ids, parts['segments'], parts['mask'])
  assert packed.dtype == ids.dtype
  np.testing.assert_array_equal(packed, found)


def write(path, text):
  path.write_text(text, encoding='utf-8')
  return path


def test_a_vocabulary_is_read_line_by_line(tmp_path):
  lines = [*VOCAB, '\u2028', '##\u0301']  # no line ends to anybody but Python
  path = write(tmp_path / 'vocab.txt', '\n'.join(lines) + '\n')
  assert tokenization.read_vocab(path) == tuple(lines)
  assert tokenization.read_vocab(str(path)) == tuple(lines)
  digest = tokenization.fingerprint(lines)
  assert digest == tokenization.fingerprint(tuple(lines))
  assert digest != tokenization.fingerprint(lines[::-1])


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (None, ['No such file', 'vocab.txt']),
    (b'\xff\xfe', ['cannot be read', 'utf-8']),
    (b'', [r'has no \[PAD\], \[UNK\], \[CLS\], \[SEP\]']),
    (b'[PAD]\n[UNK]\na\n[CLS]\n', [r'has no \[SEP\]']),
    (b'[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n', ["has 'a' 2 times"]),
  ],
)
def test_a_bad_vocabulary_is_named_with_what_it_lacks(tmp_path, content, words):
  path = tmp_path / 'my-vocab'
  if content is not None:
    path.write_bytes(content)
  message = '.*'.join([re.escape(f"vocabulary '{path}' "), *words])
  with pytest.raises(data.DatasetError, match=message):
    tokenization.read_vocab(path)


def test_a_folder_is_no_vocabulary(tmp_path):
  with pytest.raises(data.DatasetError, match='cannot be read'):
    tokenization.read_vocab(tmp_path)


def test_bad_arguments_of_encode_are_refused():
  with pytest.raises(ValueError, match='max_length=4 must be at least 5'):
    tokenization.encode(['a'], VOCAB, 4)
  with pytest.raises(data.DatasetError, match=r'has no \[PAD\]'):
    tokenization.encode(['a'], VOCAB[1:], 8)


def _theirs(transformers, path, rows, max_length):
  """Ids and sentence numbers of transformers' BertTokenizer."""
  found = transformers.BertTokenizer(str(path))(
    # All at once: of a single pair, it drops a second sentence that is ''.
    *map(list, zip(*rows, strict=True)),
    truncation='longest_first',
    max_length=max_length,
    padding='max_length',
  )
  ids, segments, mask = (
    np.array(found[x])
    for x in ('input_ids', 'token_type_ids', 'attention_mask')
  )
  return np.stack([ids, (segments + 1) * mask], axis=-1)


@pytest.mark.parametrize('max_length', [6, 13, 250])
def test_tokens_are_those_of_transformers(tmp_path, max_length):
  transformers = pytest.importorskip('transformers')
  path = write(tmp_path / 'vocab.txt', '\n'.join(VOCAB) + '\n')
  for rows in (PAIRS, [(text,) for text in TEXTS]):
    np.testing.assert_array_equal(
      tokenization.encode(rows, VOCAB, max_length),
      _theirs(transformers, path, rows, max_length),
    )


# Of the training pairs as transformers 5 encodes them: see `_digest`.
DIGESTS = {
  'glue/rte': (
    '2aab1a18b227b08d5038c0fc8aa4a8eede9a4fbefc8ccf9fad3f7d6823fc6355'
  ),
  'glue/mrpc': (
    'a07a11e4266ddf5c36a6188b2fc240a2a56d59aef21f403e5504d08d5a094d10'
  ),
}


def _digest(encoded):
  return hashlib.sha256(encoded.astype('<u2').tobytes()).hexdigest()


@pytest.mark.parametrize('name', DIGESTS)
def test_real_pairs_have_the_tokens_of_transformers(data_dir, name):
  path = data_dir / 'vocab/bert-base-uncased-vocab.txt'
  vocab = tokenization.read_vocab(path)
  assert len(vocab) == 30_522
  splits, _ = glue.load(name, str(data_dir / 'tfds'), vocab, 128)
  assert _digest(splits['train']['inputs']) == DIGESTS[name]


@pytest.mark.parametrize('name', DIGESTS)
def test_transformers_has_these_tokens_of_real_pairs(data_dir, name):
  transformers = pytest.importorskip('transformers')
  path = data_dir / 'vocab/bert-base-uncased-vocab.txt'
  builder = _builder(name, data_dir)
  records = sorted(
    builder.as_data_source(split='train'), key=lambda x: int(x['idx'])
  )
  rows = [(x['sentence1'].decode(), x['sentence2'].decode()) for x in records]
  assert _digest(_theirs(transformers, path, rows, 128)) == DIGESTS[name]


def _builder(name, data_dir):
  import tensorflow_datasets as tfds

  folder = data_dir / 'tfds' / name
  return tfds.builder_from_directory(max(folder.iterdir()))
