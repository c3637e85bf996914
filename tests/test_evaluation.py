"""Accuracy by class of whole splits, on models that say what they are told."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import data
from margin_jax.data import in_memory
from margin_jax.train import devices as devices_lib
from margin_jax.train import evaluation
from tests import helpers, references
from tests.helpers import slow

CLASSES = 5


class Told:
  """A model whose logits are its inputs."""

  @staticmethod
  def apply(variables, inputs, train):
    del variables, train
    return inputs, None


class PartlyUndecodable(in_memory.Splits):
  """Splits in which inputs of NaN stand for images that cannot be decoded."""

  def read(self, data, chunk, size, axis_name):
    inputs, label, real = super().read(data, chunk, size, axis_name)
    return inputs, label, real & ~jnp.isnan(inputs[:, 0])


@functools.cache
def spec():
  return helpers.Setup(**{'selection.rule': 'uniform'}).spec


def evaluate(splits, devices, batch_size):
  """The results of {name: (logits, labels)}, by name."""
  arrays = {
    name: {'inputs': logits.astype(np.float32), 'label': labels}
    for name, (logits, labels) in splits.items()
  }
  dataset = data.InMemory(
    name='told',
    num_classes=CLASSES,
    splits=arrays,
    rows={name: np.arange(len(x['label'])) for name, x in arrays.items()},
    augment=lambda key, image: image,
    prepare=lambda inputs: inputs,
  )
  pieces = {
    name: [in_memory.first_examples(split, None)]
    for name, split in arrays.items()
  }
  evaluator = evaluation.Evaluator(
    dataclasses.replace(spec(), dataset=dataset, model=Told),
    PartlyUndecodable(devices_lib.Devices(devices), pieces, batch_size),
  )
  params = {'head': {'kernel': np.eye(CLASSES, dtype=np.float32)}}
  variables = {'params': params, 'batch_stats': {}}
  state = type('State', (), {**variables, 'evaluated': variables})
  return {name: evaluator(name, state) for name in arrays}


@pytest.mark.parametrize('devices', [1, 4, *slow(8)])
@pytest.mark.parametrize('batch_size', [16, 1000])
def test_the_worst_class_is_that_of_the_whole_split(devices, batch_size):
  """In chunks with padding; a split may lack classes, and shares a program."""
  rng = np.random.default_rng(0)
  splits = {}
  for name, count, classes in (
    ('test', 203, (0, 1, 2, 3, 4)),
    ('validation', 61, (1, 2, 4)),
    ('test_mismatched', 1, (3,)),
  ):
    labels = rng.choice(classes, count).astype(np.int32)
    logits = rng.normal(size=(count, CLASSES))
    # The higher the class, the more often it is recognized.
    logits[np.arange(count), labels] += 0.5 * labels
    splits[name] = logits, labels
  undecodable = np.flatnonzero(splits['test'][1] == 0)[::2]
  splits['test'][0][undecodable] = np.nan
  for name, found in evaluate(splits, devices, batch_size).items():
    logits, labels = splits[name]
    decoded = ~np.isnan(logits[:, 0])
    predicted = logits[decoded].argmax(axis=1)
    expected = references.class_accuracies(labels[decoded], predicted)
    assert type(found['worst_class_accuracy']) is float
    assert found['worst_class_accuracy'] == pytest.approx(
      min(expected.values()), abs=1e-12
    )
    assert found['count'] == decoded.sum()
    assert found['accuracy'] == pytest.approx(
      np.mean(labels[decoded] == predicted), abs=1e-12
    )
    assert min(expected.values()) < found['accuracy'] or len(expected) == 1


def test_a_class_of_which_nothing_can_be_decoded_does_not_count():
  labels = np.array([0, 0, 1, 1, 2], np.int32)
  logits = np.eye(CLASSES)[[0, 4, 1, 1, 0]]
  logits[4] = np.nan
  found = evaluate({'test': (logits, labels)}, 2, 4)['test']
  assert found['count'] == 4
  assert found['worst_class_accuracy'] == 0.5


def test_a_class_that_is_never_right_is_the_worst():
  labels = np.array([0, 0, 0, 3], np.int32)
  logits = np.eye(CLASSES)[[0, 0, 0, 0]]
  found = evaluate({'test': (logits, labels)}, 2, 4)['test']
  assert found['accuracy'] == 0.75
  assert found['worst_class_accuracy'] == 0.0
