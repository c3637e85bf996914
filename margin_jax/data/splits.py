"""Which examples each split has, and which labels are wrong on purpose."""

import numpy as np

from margin_jax.data.dataset import Split


def subset(rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Returns round(fraction * N) random rows, in their order."""
  count = round(fraction * len(rows))
  rng = np.random.default_rng((seed, 0))
  return rows[np.sort(rng.choice(len(rows), count, replace=False))]


def training_rows(
  name: str,
  examples: int,
  *,
  validation_examples: int,
  fraction: float,
  seed: int,
  classes: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns which rows 'train' and 'validation' have of the training examples.

  Args:
    name: the name of the dataset, for messages.
    examples: how many training examples it has.
    validation_examples: so many, the last, are held out; 0 is no split.
    fraction: of the others, how many are trained on.
    seed: decides which.
    classes: (N,) labels of examples that may be in the order of their classes:
      of each class its fraction is held out, random examples by a fixed seed.

  Raises:
    ValueError: nothing would be left to train on.
  """
  if not 0 <= validation_examples < examples:
    raise ValueError(
      f'data.validation_examples={validation_examples} must be at least 0 and '
      f'leave something to train on: {name!r} has {examples} training examples'
    )
  cut = examples - validation_examples
  order = np.arange(examples)
  if classes is not None:
    order = order[np.argsort(-_places(classes), kind='stable')]
  train = subset(np.sort(order[:cut]), fraction, seed)
  if not train.size:
    raise ValueError(
      f'data.fraction={fraction} must leave something to train on: there are '
      f'{cut} training examples'
    )
  rows = {'train': train}
  if validation_examples:
    rows['validation'] = np.sort(order[cut:])
  return rows


def _places(classes: np.ndarray) -> np.ndarray:
  """Returns where each example is in a random order of its class, in (0, 1).

  The n lowest are of every class its fraction of n, up to rounding.
  """
  rng = np.random.default_rng(1)
  places = np.empty(len(classes))
  for name in np.unique(classes):
    rows = rng.permutation(np.flatnonzero(classes == name))
    places[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
  return places


def cut(
  whole: dict[str, Split], training: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Split]]:
  """Cuts the training examples into splits; the others stay whole.

  Args:
    whole: the dataset's own splits, 'train' among them.
    training: as `training_rows` returns it.

  Returns:
    For each split its rows of the dataset's own split, and its arrays.
  """
  rows, splits = dict(training), {}
  for name, where in training.items():
    splits[name] = {k: x[where] for k, x in whole['train'].items()}
  for name, split in whole.items():
    if name != 'train':
      rows[name] = np.arange(len(split['label']))
      splits[name] = dict(split)
  return rows, splits


def label_shift(
  examples: int, fraction: float, num_classes: int, seed: int
) -> np.ndarray:
  """Returns what to add to labels, modulo C, to make some of them wrong.

  It is not 0 for round(fraction * N) random ones; each wrong label is then
  uniform over the other classes.
  """
  rng = np.random.default_rng((seed, 1))
  count = round(fraction * examples)
  wrong = rng.choice(examples, count, replace=False)
  shift = np.zeros(examples, np.int32)
  shift[wrong] = rng.integers(1, num_classes, count)
  return shift


def hold_out(labels: np.ndarray) -> dict[str, np.ndarray]:
  """Splits examples that have no test split of their own.

  Of every class a fifth, rounded, and at least one of two or more, is the test
  split: random examples, by a fixed seed, whatever the seed of the run.

  Args:
    labels: (N,) of all examples.

  Returns:
    The rows of 'train' and of 'test', in their order.

  Raises:
    ValueError: no class has two examples.
  """
  rng = np.random.default_rng(0)
  test = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    rows = np.flatnonzero(labels == label)
    count = max(round(len(rows) / 5), min(len(rows) - 1, 1))
    test[rng.choice(rows, count, replace=False)] = True
  if not test.any():
    raise ValueError(
      'it has no test split, and no class has two examples, of which one could '
      'be held out'
    )
  return {'train': np.flatnonzero(~test), 'test': np.flatnonzero(test)}
