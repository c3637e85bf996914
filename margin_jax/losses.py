"""Losses that widen margins, and the other training losses.

The public functions take arrays. The trainer's losses are functions of
`Outputs`, the model's outputs for a batch. `LOSSES` lists them. To add one,
write a function and add a line there, or call `register_loss`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Float32, Int32, Integer, PyTree

from margin_jax import linearized, margins, selection

REDUCTIONS = ('mean_of_squares', 'square_of_mean')
DIFFERENCES = ('softmax', 'logits')
# Of gamma, alpha and epsilon, whose squares must be numbers in float32.
SMALLEST, LARGEST = 1e-12, 1e12


def mmr_penalty(
  features: Float[Array, 'B D'],
  logits: Float[Array, 'B C'],
  kernel: Float[Array, 'D C'],
  labels: Integer[Array, ' B'],
  *,
  reduction: str = 'mean_of_squares',
  stop_feature_gradient: bool = False,
  weights: Float[Array, ' B'] | None = None,
  axis_name: str | None = None,
) -> Float[Array, '']:
  r"""Computes the multi-margin regularization (MMR) of a batch.

  $$R_i = \|w_y - w_m\|^2 \, \max_k \|\phi_k\|^2, \qquad
  \mathrm{MMR} = \mathrm{mean}_i \, R_i$$

  m is the competitor of example i. Add `alpha * mmr` to the loss. Minimizing it
  widens the margin between label and competitor, relative to the largest
  feature norm. The bias is in neither factor. `reduction='square_of_mean'`
  gives the form of the authors' later code:

  $$\mathrm{MMR} = (\max_k \|\phi_k\| \; \mathrm{mean}_i \|w_y - w_m\|)^2$$

  With `weights` v, the means are over $v_i R_i$ and $v_i \|w_y - w_m\|$.

  The gradient flows through both factors. It is 0 (never NaN) at equal columns,
  at zero features, and where the penalty is infinite. A factor may be outside
  the range of float32 if the penalty is inside it.

  Under `pmap`, or `shard_map` with `check_vma=False`, pass `axis_name`. Then
  the maximum and the mean are over the examples of all devices, every device
  returns the same value, and `lax.pmean` of the devices' gradients is the
  gradient of that value. (With `check_vma=True`, `grad` itself sums over the
  devices, and the `pmean` would be too large by a factor of the number of
  devices.)

  Args:
    features: (B, D) floating, the last layer's input.
    logits: (B, C) floating, C >= 2; they only decide the competitors.
    kernel: (D, C) floating: the last layer's weights, one column per class.
    labels: (B,) integers in [0, C). Another label makes the result NaN.
    reduction: 'mean_of_squares' (the paper) or 'square_of_mean'.
    stop_feature_gradient: treat the second factor as a constant.
    weights: (B,) floating, the weight of each example in the mean; None is 1.
      Those of weight 0 are not in the maximum, either.
    axis_name: the mapped axis to reduce over, if any.

  Returns:
    () float32, or float64 for float64 inputs.

  Raises:
    TypeError: an array has the wrong kind of dtype.
    ValueError: a shape does not fit, B or D is 0, or `reduction` is unknown.

  References:
    Weinstein et al. 2020, Eq. 8.

  Examples:
    >>> kernel = jnp.array([[3.0, 0.0], [0.0, 4.0]])  # ||w_0 - w_1||^2 = 25
    >>> features = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> labels = jnp.array([0, 1])
    >>> float(mmr_penalty(features, features @ kernel, kernel, labels))
    100.0
  """
  features = margins.to_array('features', features)
  logits, labels = (
    margins.to_array('logits', logits),
    margins.to_array('labels', labels),
  )
  kernel = margins.to_array('kernel', kernel)
  if reduction not in REDUCTIONS:
    raise ValueError(
      f'reduction must be one of {REDUCTIONS}, got {reduction!r}'
    )
  margins.check_floating('features', features, 2)
  m = margins.competitors(logits, labels)
  margins.check_kernel(kernel, logits.shape[1])
  margins.check_shape(
    'features',
    features,
    (logits.shape[0], kernel.shape[0]),
    'to match logits and kernel',
  )
  if not features.shape[0]:
    raise ValueError('features must hold at least one example, got none')
  if weights is not None:
    weights = margins.to_array('weights', weights)
    margins.check_floating('weights', weights, 1)
    margins.check_shape('weights', weights, labels.shape, 'one an example')
  wide = margins.compute_dtype(features, logits, kernel)[1]
  features, columns = features.astype(wide), kernel.astype(wide).T
  if weights is not None:
    features = jnp.where((weights == 0)[:, None], 0, features)

  valid = m >= 0
  labels, m = jnp.where(valid, labels, 0), jnp.where(valid, m, 1)
  # Moves between the factors, so that neither square over- or underflows.
  scale = _power_of_two(features, axis_name)
  features = features / scale
  difference = scale * (columns[labels] - columns[m])
  largest = jnp.finfo(wide).max / 4  # its double is finite, its square is not
  difference = jnp.clip(difference, -largest, largest)
  if weights is not None:  # 0 times infinity would be NaN
    difference = jnp.where((weights == 0)[:, None], 0, difference)
  width = jnp.sum(jnp.square(difference), axis=1)
  width = jnp.where(valid, width, jnp.nan)
  feature_norm = jnp.sum(jnp.square(features), axis=1)  # squared
  if stop_feature_gradient:
    feature_norm = jax.lax.stop_gradient(feature_norm)
  if axis_name is not None:
    # lax.pmax has no derivative; gathering the norms has.
    feature_norm = jax.lax.all_gather(feature_norm, axis_name)
  feature_norm = feature_norm.ravel()
  feature_norm = feature_norm[jnp.argmax(feature_norm)]

  square_of_mean = reduction == 'square_of_mean'
  if square_of_mean:
    width = jnp.where(valid, margins.row_norms(difference), jnp.nan)
  if weights is not None:
    width = weights.astype(wide) * width
  mean = jnp.mean(width)
  if axis_name is not None:
    mean = jax.lax.pmean(mean, axis_name)

  def product(feature_norm: Array, mean: Array) -> Array:
    return feature_norm * (mean**2 if square_of_mean else mean)

  # Products of 0 and infinity in the derivative would be NaN.
  penalty = jax.lax.stop_gradient(product(feature_norm, mean))
  finite = jnp.isfinite(penalty)
  safe = product(jnp.where(finite, feature_norm, 0), jnp.where(finite, mean, 0))
  return jnp.where(finite, safe, penalty)


def _power_of_two(x: Array, axis_name: str | None) -> Array:
  """Returns a constant power of two at most the largest |x| of all devices."""
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
  if axis_name is not None:
    largest = jax.lax.pmax(largest, axis_name)
  limits = jnp.finfo(x.dtype)
  exponent = jnp.frexp(largest)[1] - 1
  exponent = jnp.clip(exponent, limits.minexp, limits.maxexp - 1)
  return jnp.ldexp(jnp.ones_like(largest), exponent)


def _check_options(
  norm: linearized.Norm, difference: str, **positive: float
) -> None:
  """Raises unless the options of `large_margin_loss` are good."""
  linearized.check_norm(norm)
  if difference not in DIFFERENCES:
    raise ValueError(
      f'difference must be one of {DIFFERENCES}, got {difference!r}'
    )
  for name, value in positive.items():
    _check_range(name, value)


def _check_range(name: str, value: float) -> None:
  if not SMALLEST <= value <= LARGEST:
    raise ValueError(f'{name} must be in [{SMALLEST}, {LARGEST}], got {value}')


def large_margin_loss(
  logits_fn: linearized.LogitsFunction,
  activations: PyTree[Float[Array, 'B ...']],
  labels: Integer[Array, ' B'],
  *,
  gamma: float = 1e4,
  alpha: float = 4.0,
  norm: linearized.Norm = 'l2',
  top_k: int = 1,
  worst_case: bool = False,
  difference: str = 'softmax',
  epsilon: float = 1e-6,
  normalize_by_size: bool = False,
  layer_weights: PyTree[float] | None = None,
  second_order: bool = False,
) -> Float32[Array, ' B']:
  r"""Computes every example's large-margin loss, at one layer or several.

  $$g_{ik} = \|\nabla_h (p_{iy} - p_{ik})\|_q, \qquad
  d_{ik} = (p_{iy} - p_{ik}) \,/\, (g_{ik} + \epsilon)$$

  $$\mathrm{loss}_i = \mathrm{mean}_h
  \big( -\sum_k \mathrm{clip}(d_{ik}, \gamma (1 - \alpha), \gamma) \big)$$

  p is the softmax of the logits, or the logits themselves; q is dual to `norm`;
  k runs over the `top_k` highest-scoring classes other than the label. An
  example has a gradient only while its distance to a boundary lies between the
  two bounds: gamma is the margin asked for, and alpha says how far behind the
  boundary the loss gives an example up.

  By default the gradient treats g as a constant, as the paper's training does,
  so it needs only first-order derivatives. With `second_order` it is the exact
  gradient of the loss, through the norm of the gradient.

  Args:
    logits_fn: activations -> (B, C) logits, row by row: see `at_layers`, which
      makes it from a Flax model. BatchNorm must be in evaluation mode.
    activations: pytree of arrays (B, ...), one for each layer at which to
      linearize. For the input alone, `logits_fn` is the network and this is its
      input.
    labels: (B,) integers in [0, C). Any other label makes the loss of its
      example NaN.
    gamma: the upper bound of d, positive.
    alpha: positive; the lower bound of d is gamma * (1 - alpha).
    norm: 'l1', 'l2', 'l_inf', or a number p of at least 1: how to measure the
      distance, and so gamma, in the units of the layer.
    top_k: how many wrong classes count, at most C - 1; static.
    worst_case: count only the least of these distances, not their sum.
    difference: take differences of the 'softmax' (the released code) or of the
      'logits' (the paper).
    epsilon: positive, added to g.
    normalize_by_size: divide g by the number of activations of the layer, as
      the released code does for l_inf, where g is a sum over them.
    layer_weights: a pytree like `activations` of positive numbers w. g is
      divided by w, as in the released code. So the distances of the layer are
      multiplied by w, and its own gamma is gamma / w. None is 1.
    second_order: let the gradient flow through g.

  Returns:
    (B,) float32 (float64 for float64 logits), each in [-n * gamma,
    n * gamma * (alpha - 1)] where n is `top_k`, or 1 with `worst_case`.

  Raises:
    TypeError: the logits are not floating, or `labels` not integer.
    ValueError: a shape does not fit, or an option is unknown or out of range.

  References:
    Elsayed et al. 2018 and its released code.

  Examples:
    >>> logits_fn = lambda x: x @ jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> loss = large_margin_loss(
    ...   logits_fn, jnp.array([[1.0, 0.0]]), jnp.array([0]), gamma=1.0,
    ...   difference='logits',
    ... )
    >>> round(float(loss[0]), 3)
    -0.6
  """
  _check_options(norm, difference, gamma=gamma, alpha=alpha, epsilon=epsilon)
  layer_weights = _layer_weights(layer_weights, activations)
  labels = margins.to_array('labels', labels)
  valid = None

  def values_fn(activations: PyTree) -> Array:
    logits = logits_fn(activations)
    margins.check_logits(logits)
    logits = logits.astype(margins.compute_dtype(logits)[1])
    return jax.nn.softmax(logits) if difference == 'softmax' else logits

  def choose(values: Array) -> tuple[Array, Array]:
    nonlocal valid, labels
    margins.check_labels(labels, values.shape[0])
    classes = values.shape[1]
    if not 1 <= top_k < classes:
      raise ValueError(f'top_k must be in [1, {classes - 1}], got {top_k}')
    labels = labels.astype(jnp.int32)  # uint8 cannot be compared with C = 256
    valid = (labels >= 0) & (labels < classes)
    own = jnp.where(valid, labels, 0)
    is_label = jnp.arange(classes)[None, :] == own[:, None]
    # Probabilities that underflow to 0 are still above the label's -inf.
    others = jnp.where(is_label, -jnp.inf, values)
    return own, jax.lax.top_k(others, top_k)[1]

  gaps, norms = linearized.gradient_norms(values_fn, activations, choose, norm)

  def loss(gradient_norm: Array, layer: Array, weight: float) -> Array:
    if normalize_by_size:
      gradient_norm = gradient_norm / math.prod(layer.shape[1:])
    gradient_norm = gradient_norm / weight
    if not second_order:
      gradient_norm = jax.lax.stop_gradient(gradient_norm)
    distance = gaps / (gradient_norm + epsilon)
    if worst_case:
      distance = jnp.min(distance, axis=1, keepdims=True)
    # With clip, and not by adding and subtracting gamma, which loses digits.
    return -jnp.sum(jnp.clip(distance, gamma * (1 - alpha), gamma), axis=1)

  losses = jax.tree.leaves(
    jax.tree.map(loss, norms, activations, layer_weights)
  )
  if not losses:
    raise ValueError('activations must hold at least one layer, got none')
  mean = sum(losses) / len(losses)
  return jnp.where(valid, mean, jnp.nan)


def _layer_weights(
  weights: PyTree[float] | None, activations: PyTree
) -> PyTree[float]:
  """Returns a weight for every layer.

  Raises:
    ValueError: there is not one for each, or one is out of range.
  """
  if weights is None:
    return jax.tree.map(lambda layer: 1.0, activations)
  layers = jax.tree.structure(activations)
  if jax.tree.structure(weights) != layers:
    raise ValueError(
      f'layer_weights must have one number for each layer of {layers}, got '
      f'{weights!r}'
    )
  for weight in jax.tree.leaves(weights):
    _check_range('layer_weights', weight)
  return weights


def trimmed_mean(
  losses: Float[Array, ' M'], keep: int | Integer[Array, '']
) -> Float[Array, '']:
  """Computes the mean of the `keep` largest losses: mini-batch trimming.

  `keep` may be traced: a mask by rank decides which losses count, so a new
  value of `keep` compiles nothing. Equal losses rank by index. A NaN loss makes
  the result NaN.

  Args:
    losses: (M,) floating, M >= 1.
    keep: how many losses; values outside [1, M] are clipped to that range.

  Returns:
    () in the dtype of `losses`; computed in float32.

  Raises:
    TypeError: `losses` is not floating, or `keep` no integer.
    ValueError: `losses` is not a vector or empty, or `keep` not one number.

  References:
    Fassold, section 2.

  Examples:
    >>> float(trimmed_mean(jnp.array([4.0, 3.0, 2.0, 1.0]), 2))
    3.5
  """
  losses = margins.to_array('losses', losses)
  margins.check_floating('losses', losses, 1)
  size = losses.shape[0]
  if not size:
    raise ValueError('losses must hold at least one loss, got none')
  dtype, wide = margins.compute_dtype(losses)
  losses = losses.astype(wide)
  keep = jnp.clip(_one_integer('keep', keep), 1, size)
  order = selection.select_lowest(-losses, size)
  counts = jnp.zeros(size, bool).at[order].set(jnp.arange(size) < keep)
  # NaN ranks last, so it has to be let in for it to be seen.
  total = jnp.sum(jnp.where(counts | jnp.isnan(losses), losses, 0))
  return (total / keep).astype(dtype)


def _one_integer(name: str, value: object) -> Array:
  """Returns an integer, which may be traced, as int32.

  Raises:
    TypeError: it is no integer.
    ValueError: it is an array of several.
  """
  if isinstance(value, int | np.integer) and not isinstance(value, bool):
    limits = jnp.iinfo(jnp.int32)
    return jnp.int32(min(max(int(value), limits.min), limits.max))
  message = f'{name} must be one integer, got {value!r}'
  dtype = getattr(value, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(message)
  if value.shape:
    raise ValueError(message)
  return jnp.asarray(value).astype(jnp.int32)


class Outputs(NamedTuple):
  """The model's outputs for this device's shard of the batch, in training mode.

  Attributes:
    logits: (b, C) float32.
    features: (b, D), what the last layer reads.
    kernel: (D, C) float32, the last layer's weights.
    labels: (b,) int32 in [0, C).
    index: (b,) int32, which training example each is.
    weights: (b,) float32, how much each example counts in the mean; None is 1.
      The trainer multiplies the loss of each example by its weight.
    linearize: `layers -> (logits_fn, perturbations)` as `at_layers` returns
      them, in evaluation mode with the statistics of the batch itself. In
      training mode the examples would leak into each other's gradients through
      BatchNorm, and the running statistics lag behind weights that move fast.
    axis_name: the mapped axis of the devices.
  """

  logits: Float[Array, 'b C']
  features: Float[Array, 'b D']
  kernel: Float[Array, 'D C']
  labels: Integer[Array, ' b']
  index: Int32[Array, ' b']
  weights: Float32[Array, ' b'] | None
  linearize: Callable
  axis_name: str


# Returns a loss an example, (b,), or one of the batch of all devices, ().
Loss = Callable[..., Array]


def cross_entropy(outputs: Outputs) -> Float32[Array, ' b']:
  """Computes minus the log-probability of the label."""
  return optax.softmax_cross_entropy_with_integer_labels(
    outputs.logits, outputs.labels
  )


def hinge(outputs: Outputs) -> Float32[Array, ' b']:
  """Computes the multi-class hinge loss: max(0, 1 - (s_y - s_m)).

  References:
    Weinstein et al. 2020, Eq. 6.
  """
  m = margins.competitors(outputs.logits, outputs.labels)[:, None]
  own = jnp.take_along_axis(outputs.logits, outputs.labels[:, None], axis=1)
  other = jnp.take_along_axis(outputs.logits, m, axis=1)
  return jnp.maximum(0, 1 - (own - other))[:, 0]


def mmr(outputs: Outputs, **options: object) -> Float32[Array, '']:
  """Computes `mmr_penalty` over the batch of all devices."""
  return mmr_penalty(
    outputs.features,
    outputs.logits,
    outputs.kernel,
    outputs.labels,
    weights=outputs.weights,
    axis_name=outputs.axis_name,
    **options,
  )


def large_margin(
  outputs: Outputs,
  *,
  layers: tuple[str, ...],
  layer_weights: tuple[float, ...] = (),
  **options: object,
) -> Float32[Array, ' b']:
  """Computes `large_margin_loss` at the named layers, each with its weight."""
  logits_fn, perturbations = outputs.linearize(layers)
  weights = None
  if layer_weights:
    weights = dict(zip(layers, layer_weights, strict=True))
  return large_margin_loss(
    logits_fn,
    perturbations,
    outputs.labels,
    layer_weights=weights,
    **options,
  )


LOSSES: dict[str, Loss] = {
  'cross_entropy': cross_entropy,
  'hinge': hinge,
  'mmr': mmr,
  'large_margin': large_margin,
}
# Those that `register_loss` has added, by name.
REGISTERED: dict[str, Loss] = {}


def find(name: str) -> Loss:
  """Returns the loss called `name`, built-in or registered."""
  return LOSSES[name] if name in LOSSES else REGISTERED[name]
