"""NumPy arrays registered as a dataset."""

import dataclasses
import functools
import hashlib

import numpy as np

from margin_jax.data.dataset import Split
from margin_jax.files import shown


@dataclasses.dataclass(frozen=True)
class Registered:
  """The arrays of a registered dataset.

  Attributes:
    train: the training split: 'inputs', 'label' and maybe 'weights'.
    test: the test split.
    num_classes: C.
  """

  train: Split
  test: Split
  num_classes: int

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of one example's inputs."""
    return self.train['inputs'].shape[1:]

  @property
  def pixels(self) -> bool:
    """Whether inputs are images as uint8 pixels (N, H, W, channels)."""
    return self.train['inputs'].dtype == np.uint8

  @functools.cached_property
  def digest(self) -> str:
    """A digest of all arrays: one name may stand for others tomorrow."""
    digest = hashlib.sha256(str(self.num_classes).encode())
    for split in (self.train, self.test):
      for array in split.values():
        digest.update(f'{array.shape} {array.dtype}'.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


# A last layer of 512 features has 2 GB then.
MOST_CLASSES = 2**20

REGISTERED: dict[str, Registered] = {}


def _inputs(what: str, inputs: np.ndarray) -> np.ndarray:
  """Returns checked inputs, uint8 or float32."""
  # A copy: arrays that change later must not keep the digest of now.
  inputs = np.array(inputs)
  if inputs.dtype == np.uint8:
    if inputs.ndim != 4 or not all(inputs.shape[1:]):
      raise ValueError(
        f'{what}: uint8 inputs must be images of shape (N, H, W, channels) '
        f'that are not empty, got shape {inputs.shape}; other inputs must be '
        'floating'
      )
    return inputs
  if not np.issubdtype(inputs.dtype, np.floating):
    raise ValueError(
      f'{what}: inputs must be uint8 or floating, got dtype {inputs.dtype}'
    )
  if inputs.ndim < 2 or not all(inputs.shape[1:]):
    raise ValueError(
      f'{what}: inputs must have shape (N, ...), with something in a row, got '
      f'{inputs.shape}'
    )
  inputs = inputs.astype(np.float32)
  rest = tuple(range(1, inputs.ndim))
  bad = np.flatnonzero(~np.isfinite(inputs).all(axis=rest))
  if bad.size:
    raise ValueError(
      f'{what}: inputs must be finite in float32, row {bad[0]} is not'
    )
  return inputs


def _labels(what: str, labels: np.ndarray, examples: int) -> np.ndarray:
  """Returns checked labels."""
  labels = np.asarray(labels)
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f'{what}: labels must be integers, got dtype {labels.dtype}'
    )
  if labels.shape != (examples,) or not examples:
    raise ValueError(
      f'{what}: labels must have shape ({examples},), one for each example, '
      f'and at least one, got {labels.shape}'
    )
  return labels


def _weights(what: str, weights: np.ndarray, examples: int) -> np.ndarray:
  """Returns checked weights, float32."""
  weights = np.asarray(weights)
  if weights.shape != (examples,):
    raise ValueError(
      f'{what}: weights must have shape ({examples},), one for each example, '
      f'got {weights.shape}'
    )
  if not np.issubdtype(weights.dtype, np.floating):
    raise ValueError(
      f'{what}: weights must be floating, got dtype {weights.dtype}'
    )
  weights = weights.astype(np.float32)
  bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
  if bad.size:
    raise ValueError(
      f'{what}: weights must be finite and at least 0, row {bad[0]} is '
      f'{weights[bad[0]]}'
    )
  return weights


def from_arrays(
  name: str,
  *,
  train: tuple[np.ndarray, ...],
  test: tuple[np.ndarray, np.ndarray],
  num_classes: int | None,
) -> Registered:
  """Makes a dataset of inputs and labels: see `registry.register_dataset`.

  Args:
    name: for messages.
    train: inputs, labels and maybe weights.
    test: inputs and labels.
    num_classes: C, or None.

  Raises:
    ValueError: the arrays are not as they must be.
  """
  splits = {}
  for split, (inputs, labels, *_) in (('train', train), ('test', test)):
    what = f'dataset {name!r}, {split}'
    inputs = _inputs(what, inputs)
    splits[split] = {
      'inputs': inputs,
      'label': _labels(what, labels, len(inputs)),
    }
  if len(train) > 2:
    what = f'dataset {name!r}, train'
    splits['train']['weights'] = _weights(what, train[2], len(train[0]))
  one, other = (splits[split]['inputs'] for split in ('train', 'test'))
  if (one.shape[1:], one.dtype) != (other.shape[1:], other.dtype):
    raise ValueError(
      f'dataset {name!r}: train and test must be alike, got inputs of '
      f'{one.shape[1:]} {one.dtype} and {other.shape[1:]} {other.dtype}'
    )
  smallest = int(min(x['label'].min() for x in splits.values()))
  largest = int(max(x['label'].max() for x in splits.values()))
  classes = largest + 1 if num_classes is None else num_classes
  if not isinstance(classes, int | np.integer) or isinstance(classes, bool):
    raise ValueError(
      f'dataset {name!r}: num_classes must be an integer, got {classes!r}'
    )
  if classes > MOST_CLASSES:
    raise ValueError(
      f'dataset {name!r}: there may be at most {MOST_CLASSES:,} classes, got '
      f'{shown(classes)}'
      + (', one more than the largest label' if num_classes is None else '')
    )
  if classes < 2 or largest >= classes or smallest < 0:
    raise ValueError(
      f'dataset {name!r}: labels must be in [0, C) with C at least 2, got '
      f'{smallest} to {largest} with C = {classes}'
    )
  for split in splits.values():
    split['label'] = split['label'].astype(np.int32)
  return Registered(splits['train'], splits['test'], int(classes))
