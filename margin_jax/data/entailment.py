"""A generated entailment task: does the premise say what the hypothesis says?

    on monday ann bought many old apples and bob saw pears     premise
    ann purchased some fruits                                  follows
    bob noticed coats                                          does not

The premise says what one to four people did, and the hypothesis says what one
of them did. The hypothesis follows if that person's clause has the same noun,
or one of its kind. A premise is about one kind of thing, so a small transformer
can learn the task from random weights on a CPU.

Neither sentence by itself tells the label: each is equally likely with both
labels. A weighted sum of the words of both sentences does not tell it either,
so a network must compare them. Everything is generated from a fixed seed,
without a download or a file.
"""

import random
from collections.abc import Sequence

import numpy as np

from margin_jax.data import tokenization
from margin_jax.data.dataset import Split

NAMES = ('entailment',)
# As GLUE's RTE counts them.
ENTAILMENT, NOT_ENTAILMENT = 0, 1
CLASSES = ('entailment', 'not_entailment')
EXAMPLES = {'train': 8000, 'test': 1000}
# Tokens of the longest pair.
LONGEST = 40
SEED = 0

PEOPLE = (
  'ann', 'bob', 'carl', 'dora', 'emma', 'frank', 'grace', 'henry',
)  # fmt: skip
VERBS = (
  ('bought', 'purchased'),
  ('saw', 'noticed'),
  ('found', 'discovered'),
  ('wanted', 'desired'),
)
NOUNS = {
  'fruits': ('apples', 'pears', 'plums'),
  'tools': ('hammers', 'drills', 'wrenches'),
  'animals': ('horses', 'goats', 'dogs'),
  'clothes': ('shirts', 'coats', 'gloves'),
}
AMOUNTS = ('', 'some', 'many')
ADJECTIVES = ('', '', '', '', '', '', 'old', 'new', 'small')
CIRCUMSTANCES = (
  *6 * ('',), 'at the market', 'near the river', 'on monday',
)  # fmt: skip
# How often a premise has 1, 2, 3 and 4 clauses.
CLAUSES = (1, 1, 1, 2, 2, 3, 4)

_KINDS = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns}
ALL_NOUNS = (*NOUNS, *_KINDS)


def _vocab() -> tuple[str, ...]:
  verbs = [verb for pair in VERBS for verb in pair]
  lists = (PEOPLE, verbs, ALL_NOUNS, AMOUNTS, ADJECTIVES, CIRCUMSTANCES)
  words = [w for each in lists for phrase in each for w in phrase.split()]
  special = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
  return tuple(dict.fromkeys([*special, ',', 'and', *words]))


VOCAB = _vocab()


def kind_of(noun: str) -> str:
  """Returns 'fruits' for 'apples' and for 'fruits'."""
  return _KINDS.get(noun, noun)


def follows(noun: str, hypothesis: str) -> bool:
  """Returns whether 'some fruits' follows from 'many apples'."""
  return hypothesis in (noun, kind_of(noun))


class _Writer:
  """Draws pairs."""

  def __init__(self, seed: int):
    # Of `random`, only random() draws the same in every version of Python.
    self._random = random.Random(seed).random

  def _one_of(self, choices: Sequence):
    return choices[int(self._random() * len(choices))]

  def _shuffled(self, choices: Sequence) -> list:
    return sorted(choices, key=lambda _: self._random())

  def _clause(self, person: str, verbs: Sequence[str], noun: str) -> str:
    words = [
      person,
      self._one_of(verbs),
      self._one_of(AMOUNTS),
      self._one_of(ADJECTIVES),
      noun,
    ]
    words.insert(self._one_of((0, 5)), self._one_of(CIRCUMSTANCES))
    return ' '.join(word for word in words if word)

  def pair(self, label: int) -> tuple[str, str]:
    """Writes a premise and a hypothesis."""
    person, verbs = self._one_of(PEOPLE), self._one_of(VERBS)
    asked = source = self._one_of(ALL_NOUNS)
    if label == NOT_ENTAILMENT:
      source = self._one_of(
        [x for x in ALL_NOUNS if kind_of(x) != kind_of(asked)]
      )
    noun = self._one_of([x for x in ALL_NOUNS if follows(x, source)])
    same_kind = [x for x in ALL_NOUNS if kind_of(x) == kind_of(noun)]
    others = self._shuffled([x for x in PEOPLE if x != person])
    clauses = [self._clause(person, verbs, noun)]
    clauses += [
      self._clause(other, self._one_of(VERBS), self._one_of(same_kind))
      for other in others[: self._one_of(CLAUSES) - 1]
    ]
    *first, last = self._shuffled(clauses)
    premise = f'{" , ".join(first)} and {last}' if first else last
    # Nothing follows with 'many'.
    words = [person, self._one_of(verbs), self._one_of(AMOUNTS[:2]), asked]
    return premise, ' '.join(word for word in words if word)


def pairs() -> dict[str, list[tuple[str, str, int]]]:
  """Returns premise, hypothesis and label of every example, none twice."""
  writer = _Writer(SEED)
  seen = set()
  found = {}
  for split, examples in EXAMPLES.items():
    rows = found[split] = []
    while len(rows) < examples:
      label = len(rows) % 2  # each as often as the other
      pair = writer.pair(label)
      if pair not in seen:
        seen.add(pair)
        rows.append((*pair, label))
  return found


def load(max_length: int) -> tuple[dict[str, Split], int, tuple[str, ...]]:
  """Returns the task as tokens.

  Args:
    max_length: tokens in a row, at least `LONGEST`: half a premise would not
      tell the label.

  Returns:
    The splits 'train' and 'test', each `{'inputs': (N, max_length, 2) uint16,
    'label': (N,) int32}` (see `tokens`), the number of classes, and the
    vocabulary.

  Raises:
    ValueError: max_length is too small.
  """
  if max_length < LONGEST:
    raise ValueError(
      f'max_length={max_length} must be at least {LONGEST}, the length of the '
      f'longest pairs of the entailment task'
    )
  splits = {
    split: {
      'inputs': tokenization.encode([x[:2] for x in rows], VOCAB, max_length),
      'label': np.array([x[2] for x in rows], np.int32),
    }
    for split, rows in pairs().items()
  }
  return splits, 2, VOCAB
