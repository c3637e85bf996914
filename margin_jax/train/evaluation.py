"""Exact evaluation of whole splits on the devices.

`eval_step` and `measure_step` are per-device functions of a chunk of a split,
mapped over devices; `Evaluator` and `Measurer` run them over all chunks.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from margin_jax import data as data_lib
from margin_jax import linearized, margins
from margin_jax.train import devices as devices_lib
from margin_jax.train.spec import StepSpec
from margin_jax.trained import Trained

PyTree = Any

# Images are stored as 0, ..., 255; attacks are configured for [0, 1].
PIXEL = 255

# A total variation below this fraction of the squared norm of the reference
# activations is rounding.
ROUNDING = 1e-12


def eval_step(
  spec: StepSpec,
  read: Callable[[PyTree, Array], tuple[Array, Array, Array]],
  attack: Callable | None,
  source: Trained | None,
  variables: PyTree,
  data: PyTree,
  chunk: Array,
  epsilon: Array,
  source_variables: PyTree,
) -> dict[str, Array]:
  """Sums over the examples of a chunk of a split.

  Args:
    spec: holds the model; static.
    read: (data, chunk) -> this device's inputs, labels and which of them count:
      the others are padding, or could not be decoded; static.
    attack: (logits_fn, inputs, labels, epsilon, bounds=) -> inputs, applied to
      the images first, or None; static.
    source: the network that the attack sees; None is the one evaluated. Its
      variables are not read here; static.
    variables: 'params' and 'batch_stats'.
    data: a chunk, as `Splits.chunks` yields it.
    chunk: () int32, as `Splits.chunks` yields it.
    epsilon: () float32, how far the attack may go; images are in [0, 1].
    source_variables: the variables of the source.

  Returns:
    Of all devices. 'sums': 'loss' (summed cross-entropy), 'correct' and
    'count'; over all chunks every example counts exactly once. The latter two
    also by class, (C,): 'class_correct' and 'class_count'. With F1, of class 1,
    also 'true_positives', 'false_positives' and 'false_negatives'. And
    'examples', arrays of a row an example, padding included: 'real', 'margin'
    and 'mms'.
  """
  inputs, label, real = read(data, chunk)

  logits_fn = _logits_fn(spec.model, spec.dataset.prepare, variables)
  if attack is not None:
    seen = logits_fn
    if source is not None:
      seen = _logits_fn(source.model, source.prepare, source_variables)
    pixels = inputs.astype(jnp.float32)
    inputs = attack(seen, pixels, label, PIXEL * epsilon, bounds=(0, PIXEL))
  logits = logits_fn(inputs)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  prediction = jnp.argmax(logits, axis=1)
  # Without finite logits there is no prediction; argmax would say class 0.
  known = real & jnp.all(jnp.isfinite(logits), axis=1)
  correct = known & (prediction == label)
  zeros = jnp.zeros(spec.dataset.num_classes, jnp.int32)
  sums = {
    'loss': jnp.sum(jnp.where(real, losses, 0)),
    'correct': jnp.sum(correct),
    'count': jnp.sum(real),
    'class_correct': zeros.at[label].add(correct),
    'class_count': zeros.at[label].add(real),
  }
  if spec.dataset.f1:
    predicted, positive = known & (prediction == 1), label == 1
    sums['true_positives'] = jnp.sum(real & predicted & positive)
    sums['false_positives'] = jnp.sum(real & predicted & ~positive)
    sums['false_negatives'] = jnp.sum(real & ~predicted & positive)
  kernel = variables['params']['head']['kernel'].astype(jnp.float32)
  examples = {
    'real': real,
    'margin': margins.signed_margins(logits, kernel, label),
    'mms': margins.mms_scores(logits, kernel),
  }
  return {
    'sums': jax.lax.psum(sums, spec.axis_name),
    'examples': jax.lax.all_gather(examples, spec.axis_name, tiled=True),
  }


def _logits_fn(
  model: nn.Module, prepare: Callable[[PyTree], PyTree], variables: PyTree
) -> Callable[[PyTree], Array]:
  """Returns inputs as stored -> logits in evaluation mode."""

  def logits_fn(inputs: PyTree) -> Array:
    logits, _ = model.apply(variables, prepare(inputs), train=False)
    return logits.astype(jnp.float32)

  return logits_fn


def measure_step(
  spec: StepSpec,
  read: Callable[[PyTree, Array], tuple[Array, Array, Array]],
  layers: tuple[str, ...],
  variables: PyTree,
  data: PyTree,
  chunk: Array,
  reference: PyTree,
) -> PyTree:
  """Measures the margins of the examples of a chunk of a split.

  Args:
    spec, read, variables, data, chunk: as `eval_step` takes them.
    layers: at which to measure; static.
    reference: for each layer what is subtracted from its activations before
      they are squared and summed, near their mean, or digits are lost.

  Returns:
    'examples': arrays of a row an example, padding included, over all devices,
    see `Measurer`, and 'square/LAYER', the squared norms of the activations
    minus `reference`; and 'sums', their sums over the examples that count.
  """
  inputs, label, real = read(data, chunk)
  inputs = spec.dataset.prepare(inputs)
  logits, features = spec.model.apply(variables, inputs, train=False)
  logits = logits.astype(jnp.float32)
  kernel = variables['params']['head']['kernel'].astype(jnp.float32)
  examples = {
    'real': real,
    'label': label,
    'prediction': jnp.argmax(logits, axis=1),
    'margin': margins.signed_margins(logits, kernel, label),
    'mms': margins.mms_scores(logits, kernel),
    'feature_norm': margins.row_norms(features.astype(jnp.float32)),
  }
  activations = linearized.activations_at(spec.model, variables, inputs, layers)
  logits_fn, perturbations = linearized.at_layers(
    spec.model, variables, inputs, layers
  )
  signed = linearized.layer_margins(logits_fn, perturbations, label)
  label_free = linearized.layer_margins(logits_fn, perturbations)
  sums = {}
  for name in layers:
    flat = activations[name].astype(jnp.float32).reshape(label.shape[0], -1)
    flat = flat - reference[name][None, :]
    sums[name] = jnp.sum(jnp.where(real[:, None], flat, 0), axis=0)
    examples[f'margin/{name}'] = signed[name]
    examples[f'mms/{name}'] = label_free[name]
    examples[f'square/{name}'] = jnp.sum(jnp.square(flat), axis=1)
  return {
    'examples': jax.lax.all_gather(examples, spec.axis_name, tiled=True),
    'sums': jax.lax.psum(sums, spec.axis_name),
  }


class _Programs:
  """A step compiled for every shape of chunk, and run over whole splits."""

  def __init__(
    self,
    splits: data_lib.Splits,
    make_step: Callable,
    axis_name: str,
    variables: PyTree,
    *rest: PyTree,
  ):
    """Compiles `make_step(read)(variables, data, chunk, *rest)`.

    Args:
      splits: to go through.
      make_step: of `read`, see `eval_step`.
      axis_name: the name of the mapped axis.
      variables: the first argument to compile for.
      *rest: the last arguments to compile for.
    """
    self._splits = splits
    self._compiled: list[devices_lib.Compiled] = []
    for program, size in enumerate(splits.sizes):
      read = functools.partial(splits.read, size=size, axis_name=axis_name)
      self._compiled.append(
        splits.devices.compile(
          make_step(read), variables, splits.example(program), np.int32(0),
          *rest,
        )
      )  # fmt: skip

  def run(
    self,
    name: str,
    variables: PyTree,
    *rest: PyTree,
    most: int | None = None,
  ) -> list[tuple[np.ndarray, PyTree]]:
    """Runs the programs over the chunks of a split.

    Args:
      name: the name of the split.
      variables: the programs' first argument.
      *rest: their last arguments.
      most: only so many chunks, the first; None is all.

    Returns:
      For each chunk, which examples of the split it has, and the result on the
      host, whose first rows are these.
    """
    rows, results = [], []
    with contextlib.closing(self._splits.chunks(name)) as chunks:
      for program, data, chunk, where in itertools.islice(chunks, most):
        run = self._compiled[program]
        rows.append(where)
        results.append(run(variables, data, np.int32(chunk), *rest))
        devices_lib.wait_for_old(results)
    return list(zip(rows, jax.device_get(results), strict=True))


class Evaluator:
  """Loss and accuracy over whole splits, the same programs for all.

  Under attack there are others.
  """

  def __init__(
    self,
    spec: StepSpec,
    splits: data_lib.Splits,
    attack: Callable | None = None,
    source: Trained | None = None,
  ):
    """Compiles nothing yet.

    Args:
      spec: holds the model.
      splits: to evaluate.
      attack: as `eval_step` takes it, for calls with an `epsilon`.
      source: the network that the attack sees; None is the one evaluated.
    """
    self._splits = splits
    self._spec = spec
    self._attack = attack
    self._source = source
    self._copied: PyTree | None = None
    self._programs: dict[Callable | None, _Programs] = {}

  def __call__(
    self, name: str, state: PyTree, epsilon: float | None = None
  ) -> dict[str, Any]:
    """Returns 'loss', 'accuracy', 'count' and more of a split.

    'worst_class_accuracy' is the lowest accuracy over the classes that have
    examples in the split: a selection can starve a class.

    'f1' is 2 TP / (2 TP + FP + FN) over the whole split, of class 1, and 0
    where there is none; only of datasets with `f1`.

    Args:
      name: the name of the split.
      state: the `TrainState` of the model.
      epsilon: how far the attack to evaluate under may go; None is no attack.
    """
    return self.in_detail(name, state, epsilon)[0]

  def in_detail(
    self, name: str, state: PyTree, epsilon: float | None = None
  ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the same and arrays, for histograms.

    The arrays are 'class_accuracy', (C,), NaN for a class without examples, and
    'margin' (signed) and 'mms', (N,).
    """
    variables = state.evaluated
    attack = None if epsilon is None else self._attack
    source = None if attack is None else self._source
    rest = np.float32(epsilon or 0), self._source_variables(source)
    if attack not in self._programs:

      def make_step(read: Callable) -> Callable:
        return functools.partial(eval_step, self._spec, read, attack, source)

      self._programs[attack] = _Programs(
        self._splits, make_step, self._spec.axis_name, variables, *rest
      )
    chunks = self._programs[attack].run(name, variables, *rest)
    total = {
      key: sum(np.float64(x['sums'][key]) for _, x in chunks)
      for key in chunks[0][1]['sums']
    }
    there = total['class_count'] > 0
    by_class = np.divide(
      total['class_correct'], total['class_count'], where=there,
      out=np.full(there.shape, np.nan),
    )  # fmt: skip
    result = {
      'loss': float(total['loss'] / total['count']),
      'accuracy': float(total['correct'] / total['count']),
      'worst_class_accuracy': float(np.nanmin(by_class)),
      'count': int(total['count']),
    }
    if self._spec.dataset.f1:
      twice = 2 * total['true_positives']
      errors = total['false_positives'] + total['false_negatives']
      result['f1'] = float(twice / max(twice + errors, 1))
    examples = {
      key: np.concatenate([x['examples'][key][: len(w)] for w, x in chunks])
      for key in chunks[0][1]['examples']
    }
    real = examples.pop('real')  # but for images that could not be decoded
    details = {key: values[real] for key, values in examples.items()}
    return result, {'class_accuracy': by_class, **details}

  def _source_variables(self, source: Trained | None) -> PyTree:
    """Returns the variables of the source on the devices, copied once."""
    if source is None:
      return {}
    if self._copied is None:
      self._copied = self._splits.devices.replicate(source.variables)
    return self._copied


class Measurer:
  """The margins of every example of whole splits, at the head and at layers."""

  def __init__(
    self,
    spec: StepSpec,
    splits: data_lib.Splits,
    layers: dict[str, tuple[int, ...]],
  ):
    """Compiles nothing yet.

    Args:
      spec: holds the model.
      splits: to measure, gone through whole.
      layers: some of what `linearized.layer_shapes` returns.
    """
    self._spec = spec
    self._splits = splits
    self._sizes = {k: math.prod(shape[1:]) for k, shape in layers.items()}
    self._programs: _Programs | None = None

  def __call__(self, name: str, variables: PyTree) -> dict[str, Any]:
    """Measures the split called `name`.

    Returns:
      'row' (which examples of the split these are: not those that cannot be
      decoded), 'label', 'prediction', 'margin', 'mms' and 'feature_norm', each
      (N,), and at each layer 'margin/LAYER' (signed) and 'mms/LAYER'
      (label-free), (N,), and 'total_variation/LAYER', a float.
    """
    reference = {k: np.zeros(n, np.float32) for k, n in self._sizes.items()}
    if self._programs is None:

      def make_step(read: Callable) -> Callable:
        return functools.partial(
          measure_step, self._spec, read, tuple(self._sizes)
        )

      self._programs = _Programs(
        self._splits, make_step, self._spec.axis_name, variables, reference
      )
    run = functools.partial(self._programs.run, name, variables)
    ((rows, first),) = run(reference, most=1)
    reference = {k: x / np.float32(len(rows)) for k, x in first['sums'].items()}
    chunks = run(reference)
    measured = {
      key: np.concatenate([x['examples'][key][: len(w)] for w, x in chunks])
      for key in chunks[0][1]['examples']
    }
    measured['row'] = np.concatenate([where for where, _ in chunks])
    real = measured.pop('real')  # but for images that could not be decoded
    measured = {key: values[real] for key, values in measured.items()}
    count = len(measured['row'])
    for layer in self._sizes:
      total = sum(x['sums'][layer].astype(np.float64) for _, x in chunks)
      squares = np.mean(measured.pop(f'square/{layer}'), dtype=np.float64)
      variation = squares - np.sum((total / count) ** 2)
      size = np.sum(reference[layer].astype(np.float64) ** 2)
      # What rounding leaves of activations that do not vary is no variation.
      measured[f'total_variation/{layer}'] = float(
        variation if variation > ROUNDING * size else 0
      )
    return measured
