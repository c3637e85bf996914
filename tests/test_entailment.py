"""The generated task: right, balanced, and not to be had for a look."""

import functools
import hashlib

import numpy as np
import pytest
from sklearn import feature_extraction, linear_model

from margin_jax.data import entailment, tokens

KINDS = {
  noun: kind for kind, nouns in entailment.NOUNS.items() for noun in nouns
}
SYNONYMS = {verb: pair for pair in entailment.VERBS for verb in pair}
NOUNS = {*KINDS, *entailment.NOUNS}
KINDS |= {kind: kind for kind in entailment.NOUNS}


@functools.cache
def pairs():
  return entailment.pairs()


@functools.cache
def loaded():
  return entailment.load(64)


def facts(sentence):
  """Person, verb and noun of every clause."""
  found = []
  for clause in sentence.replace(' and ', ' , ').split(' , '):
    words = {*clause.split()}
    (person,) = words & {*entailment.PEOPLE}
    (verb,) = words & {*SYNONYMS}
    (noun,) = words & NOUNS
    found.append((person, verb, noun))
  return found


def label_of(premise, hypothesis):
  """0 if the premise says it, by looking for the clause that does."""
  ((person, verb, noun),) = facts(hypothesis)
  assert 'many' not in hypothesis
  for who, did, what in facts(premise):
    if who == person and verb in SYNONYMS[did] and noun in (what, KINDS[what]):
      return 0
  return 1


@pytest.mark.parametrize('split', ['train', 'test'])
def test_every_label_is_right(split):
  for premise, hypothesis, label in pairs()[split]:
    assert label_of(premise, hypothesis) == label, (premise, hypothesis)


def test_splits_are_balanced_and_have_no_pair_in_common():
  rows = [row for split in pairs().values() for row in split]
  assert [*map(len, pairs().values())] == [8000, 1000]
  assert len({row[:2] for row in rows}) == len(rows)
  for split in pairs().values():
    assert 2 * sum(label for _, _, label in split) == len(split)


def test_the_arrays_are_the_tokens_of_the_pairs():
  splits, classes, vocab = loaded()
  assert classes == 2
  assert len({*vocab}) == len(vocab)
  for split, rows in pairs().items():
    inputs, label = splits[split]['inputs'], splits[split]['label']
    assert inputs.shape == (len(rows), 64, 2)
    assert (inputs.dtype, label.dtype) == (np.uint16, np.int32)
    assert label.tolist() == [row[2] for row in rows]
    for row, (premise, hypothesis, _) in zip(inputs, rows, strict=True):
      words = ['[CLS]', *premise.split(), '[SEP]', *hypothesis.split(), '[SEP]']
      words += (64 - len(words)) * ['[PAD]']
      assert [vocab[i] for i in row[:, 0]] == words


def test_lengths_are_spread():
  splits, _, _ = loaded()
  found = [tokens.lengths(split['inputs']) for split in splits.values()]
  counts = np.bincount(np.concatenate(found))
  assert counts.nonzero()[0][0] == 9
  assert len(counts) == entailment.LONGEST + 1
  for low, high in ((0, 12), (12, 16), (16, 24), (24, 32), (32, 41)):
    assert counts[low:high].sum() >= 200, (low, high)


def test_it_is_the_same_everywhere():
  splits, _, vocab = loaded()
  digest = hashlib.sha256(' '.join(vocab).encode())
  for split in splits.values():
    digest.update(split['inputs'].astype('<u2').tobytes())
    digest.update(split['label'].astype('<i4').tobytes())
  digest = digest.hexdigest()
  assert digest == (
    '7d6582aa6ef6267b0e3a5c438361d0b9b52c459322c8b9c817740e63edb09975'
  )


def linear_accuracy(texts):
  """Test accuracy of a linear classifier on bags of words and word pairs."""
  count = feature_extraction.text.CountVectorizer(
    lowercase=False, ngram_range=(1, 2)
  )
  train, test = (pairs()[split] for split in ('train', 'test'))
  inputs = count.fit_transform([texts(row) for row in train])
  model = linear_model.LogisticRegression(C=0.1, max_iter=1000)
  model.fit(inputs, [row[2] for row in train])
  inputs = count.transform([texts(row) for row in test])
  return model.score(inputs, [row[2] for row in test])


@pytest.mark.parametrize(
  'texts',
  [
    lambda row: row[0],
    lambda row: row[1],
    lambda row: f'{row[0]} {row[1].upper()}',
  ],
)
def test_counting_words_does_not_tell_the_label(texts):
  assert linear_accuracy(texts) < 0.55


def test_a_length_that_cuts_a_pair_is_refused():
  longest = entailment.LONGEST
  assert entailment.load(longest)[0]['test']['inputs'].shape[1] == longest
  with pytest.raises(ValueError, match=f'at least {longest}'):
    entailment.load(longest - 1)
