"""A generated entailment task: does the premise say what the hypothesis says?

    on monday ann bought many old apples and bob found no tools
    ann purchased some fruits                                      entailment
    bob found hammers                                              not

The premise says of several people what they did, the hypothesis of one of them.
It follows if that person's clause has the same noun, or one of its kind, and is
denied where the hypothesis is. Everything is drawn by a fixed seed; no network,
no file.

Neither sentence tells the label: the hypothesis is drawn before it, and if it
does not follow, then mostly because its noun is in somebody else's clause. So
the two must be compared, person by person.
"""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from margin_jax.data import tokenization

Split = dict[str, np.ndarray]

NAMES = ('entailment',)
# As GLUE's RTE counts them.
ENTAILMENT, NOT_ENTAILMENT = 0, 1
EXAMPLES = {'train': 8000, 'test': 1000}
# Tokens of the longest pair that can be drawn.
LONGEST = 42
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
ADJECTIVES = ('', '', 'old', 'new', 'large', 'small')
CIRCUMSTANCES = (
  '', '', '', 'at the market', 'near the river', 'in the village',
  'on monday', 'last week', 'before noon',
)  # fmt: skip
# How often a premise has 1, 2, 3 and 4 clauses.
CLAUSES = (1, 1, 1, 2, 2, 2, 3, 3, 4)

_KIND = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns}
_ALL_NOUNS = (*NOUNS, *_KIND)


def _vocab() -> tuple[str, ...]:
  verbs = [verb for pair in VERBS for verb in pair]
  lists = (PEOPLE, verbs, _ALL_NOUNS, AMOUNTS, ADJECTIVES, CIRCUMSTANCES)
  words = [w for each in lists for phrase in each for w in phrase.split()]
  special = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
  return tuple(dict.fromkeys([*special, ',', 'and', 'no', *words]))


VOCAB = _vocab()


@dataclasses.dataclass(frozen=True)
class _Fact:
  """That somebody did something, or did it to none."""

  person: str
  verb: tuple[str, ...]
  noun: str
  denied: bool


def follows(noun: str, hypothesis: str, denied: bool) -> bool:
  """Whether 'some apples' gives 'some fruits', and 'no fruits' 'no apples'."""
  if denied:
    noun, hypothesis = hypothesis, noun
  return hypothesis in (noun, _KIND.get(noun))


class _Writer:
  """Draws facts and writes them down."""

  def __init__(self, seed: int):
    # Of `random`, only random() draws the same in every version of Python.
    self._random = random.Random(seed).random

  def _one_of(self, choices: Sequence):
    return choices[int(self._random() * len(choices))]

  def _shuffled(self, choices: Sequence) -> list:
    return sorted(choices, key=lambda _: self._random())

  def _noun(self, hypothesis: _Fact, wanted: bool) -> str:
    """A noun from which that of the hypothesis follows, or does not."""
    return self._one_of(
      [
        noun
        for noun in _ALL_NOUNS
        if follows(noun, hypothesis.noun, hypothesis.denied) == wanted
      ]
    )

  def _denied(self) -> bool:
    return self._random() < 0.25

  def _facts(self, hypothesis: _Fact, label: int) -> list[_Fact]:
    """What the premise says; the person of the hypothesis comes first."""
    clauses = self._one_of(CLAUSES)
    others = [x for x in PEOPLE if x != hypothesis.person]
    facts = [
      _Fact(person, self._one_of(VERBS), noun, self._denied())
      for person in self._shuffled(others)[: clauses - 1]
      for noun in [self._noun(hypothesis, False)]
    ]
    noun, denied = self._noun(hypothesis, True), hypothesis.denied
    if label == NOT_ENTAILMENT:
      if self._random() < 0.25:
        denied = not denied
      else:
        if facts:  # somebody else has the right noun
          facts[0] = dataclasses.replace(facts[0], noun=noun, denied=denied)
        noun = self._noun(hypothesis, False)
    return [_Fact(hypothesis.person, hypothesis.verb, noun, denied), *facts]

  def _premise(self, fact: _Fact) -> str:
    amount, adjective = self._one_of(AMOUNTS), self._one_of(ADJECTIVES)
    if fact.denied:  # 'no old apples' would not be 'no apples'
      amount, adjective = 'no', ''
    words = [fact.person, self._one_of(fact.verb), amount, adjective, fact.noun]
    words.insert(self._one_of((0, 5)), self._one_of(CIRCUMSTANCES))
    return ' '.join(word for word in words if word)

  def _hypothesis(self, fact: _Fact) -> str:
    amount = 'no' if fact.denied else self._one_of(('', 'some'))
    words = [fact.person, self._one_of(fact.verb), amount, fact.noun]
    return ' '.join(word for word in words if word)

  def pair(self, label: int) -> tuple[str, str]:
    """A premise and a hypothesis."""
    hypothesis = _Fact(
      self._one_of(PEOPLE),
      self._one_of(VERBS),
      self._one_of(_ALL_NOUNS),
      self._denied(),
    )
    facts = self._shuffled(self._facts(hypothesis, label))
    *first, last = [self._premise(fact) for fact in facts]
    premise = f'{" , ".join(first)} and {last}' if first else last
    return premise, self._hypothesis(hypothesis)


def pairs() -> dict[str, list[tuple[str, str, int]]]:
  """Premise, hypothesis and label of every example; no pair comes twice."""
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
  """The task as tokens.

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
      f'max_length={max_length} must be at least {LONGEST}: so long are pairs '
      f'of the entailment task'
    )
  splits = {
    split: {
      'inputs': tokenization.encode([x[:2] for x in rows], VOCAB, max_length),
      'label': np.array([x[2] for x in rows], np.int32),
    }
    for split, rows in pairs().items()
  }
  return splits, 2, VOCAB
