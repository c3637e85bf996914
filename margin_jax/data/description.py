"""What a network must know of its dataset, without the examples."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from margin_jax import checks
from margin_jax.data import tokens
from margin_jax.data.dataset import Dataset
from margin_jax.data.normalization import Normalizer

_CHANNELS = checks.optional(checks.items(checks.number(), least=1))
# What a description has in a file.
DESCRIPTION = checks.mapping(
  name=checks.string(),
  num_classes=checks.integer(1),
  class_names=checks.optional(checks.items(checks.text())),
  vocabulary=checks.optional(checks.integer(1)),
  weighted=checks.flag(),
  examples=checks.integer(1),
  input_shape=checks.items(checks.integer(1)),
  input_dtype=checks.dtype(),
  scale=_CHANNELS,
  shift=_CHANNELS,
)


@dataclasses.dataclass(frozen=True)
class Description:
  """Takes the place of a dataset where a network is only loaded.

  Attributes are those of `Dataset`, of which it has no others.
  """

  name: str
  num_classes: int
  class_names: tuple[str, ...] | None
  vocabulary: int | None
  counts: dict[str, int]
  input_shape: tuple[int, ...]
  input_dtype: np.dtype
  weighted: bool
  prepare: Callable[[Any], Any]


def to_json(dataset: Dataset) -> dict[str, Any]:
  """Describes a dataset for a file."""
  is_normalized = isinstance(dataset.prepare, Normalizer)
  return {
    'name': dataset.name,
    'num_classes': int(dataset.num_classes),
    'class_names': dataset.class_names and [*dataset.class_names],
    'vocabulary': dataset.vocabulary,
    'weighted': dataset.weighted,
    'examples': dataset.counts['train'],
    'input_shape': [*dataset.input_shape],
    'input_dtype': np.dtype(dataset.input_dtype).name,
    'scale': dataset.prepare.scale.tolist() if is_normalized else None,
    'shift': dataset.prepare.shift.tolist() if is_normalized else None,
  }


def from_json(described: dict[str, Any]) -> Description:
  """Returns what `to_json` described; `DESCRIPTION` must hold."""
  names = described['class_names']
  return Description(
    name=described['name'],
    num_classes=described['num_classes'],
    class_names=None if names is None else tuple(names),
    vocabulary=described['vocabulary'],
    weighted=described['weighted'],
    counts={'train': described['examples']},
    input_shape=tuple(described['input_shape']),
    input_dtype=np.dtype(described['input_dtype']),
    prepare=_prepare(described),
  )


def _prepare(described: dict[str, Any]) -> Callable[[Any], Any]:
  if described['vocabulary'] is not None:
    return tokens.unpack
  if described['scale'] is None:
    return lambda inputs: inputs
  scale, shift = (
    np.asarray(described[name], np.float32) for name in ('scale', 'shift')
  )
  return Normalizer(scale, shift)
