"""What widens margins: multi-margin regularization, the large-margin loss."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Integer, PyTree

from margin_jax import linearized, margins

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
  axis_name: str | None = None,
) -> Float[Array, '']:
  """Multi-margin regularization (MMR).

      R_i = || w_y - w_m ||^2 * max_k || phi_k ||^2       mmr = mean_i R_i

  m is the competitor of example i. Add `alpha * mmr` to the loss: minimising
  it widens the margin between label and competitor, relative to the radius of
  the features. The bias is in neither factor. With
  `reduction='square_of_mean'` it is the form of the authors' later code,

      mmr = (max_k || phi_k || * mean_i || w_y - w_m ||)^2

  The gradient flows through both factors, and is 0 (never NaN) at equal
  columns, at zero features, and where the penalty overflows to infinity.

  Under `pmap`, or `shard_map` with `check_vma=False`, pass `axis_name`: the
  maximum and the mean are then over the examples of all devices, every device
  returns the same value, and `lax.pmean` of the devices' gradients is its
  gradient. (With `check_vma=True`, `grad` sums over devices by itself, and the
  `pmean` would be as many times too large as there are devices.)

  Args:
    features: (B, D) floating, the last layer's input.
    logits: (B, C) floating, C >= 2; only decides the competitors.
    kernel: (D, C) floating: the last layer's weights, one column a class.
    labels: (B,) integers in [0, C). Another label makes the result NaN.
    reduction: 'mean_of_squares' (the paper) or 'square_of_mean'.
    stop_feature_gradient: treat the second factor as a constant.
    axis_name: the mapped axis to reduce over, if any.

  Returns:
    () in the dtype of the inputs together; computed in float32.

  Raises:
    TypeError: an array has the wrong kind of dtype.
    ValueError: a shape does not fit, B is 0, or `reduction` is unknown.

  Source: Weinstein et al. 2020, Eq. 8.
  """
  features, logits = jnp.asarray(features), jnp.asarray(logits)
  kernel, labels = jnp.asarray(kernel), jnp.asarray(labels)
  if reduction not in REDUCTIONS:
    raise ValueError(
      f'reduction must be one of {REDUCTIONS}, got {reduction!r}'
    )
  margins.check_floating('features', features, 2)
  m = margins.competitors(logits, labels)
  margins.check_kernel(kernel, logits.shape[1])
  if features.shape != (logits.shape[0], kernel.shape[0]):
    raise ValueError(
      f'features must have shape ({logits.shape[0]}, {kernel.shape[0]}) to '
      f'match logits and kernel, got {features.shape}'
    )
  if not features.shape[0]:
    raise ValueError('features must hold at least one example, got none')
  dtype, wide = margins.compute_dtype(features, logits, kernel)
  features, columns = features.astype(wide), kernel.astype(wide).T

  valid = m >= 0
  labels, m = jnp.where(valid, labels, 0), jnp.where(valid, m, 1)
  largest = jnp.finfo(wide).max / 4  # its double is finite, its square is not
  difference = jnp.clip(columns[labels] - columns[m], -largest, largest)
  width = jnp.sum(jnp.square(difference), axis=1)
  width = jnp.where(valid, width, jnp.nan)
  radius = jnp.sum(jnp.square(features), axis=1)
  if stop_feature_gradient:
    radius = jax.lax.stop_gradient(radius)
  if axis_name is not None:
    # lax.pmax has no derivative; gathering the norms has.
    radius = jax.lax.all_gather(radius, axis_name)
  radius = radius.ravel()
  radius = radius[jnp.argmax(radius)]

  square_of_mean = reduction == 'square_of_mean'
  if square_of_mean:
    width = jnp.where(valid, margins.row_norms(difference), jnp.nan)
  mean = jnp.mean(width)
  if axis_name is not None:
    mean = jax.lax.pmean(mean, axis_name)

  def product(radius: Array, mean: Array) -> Array:
    return radius * (mean**2 if square_of_mean else mean)

  # Products of 0 and infinity in the derivative would be NaN.
  penalty = jax.lax.stop_gradient(product(radius, mean))
  finite = jnp.isfinite(penalty)
  safe = product(jnp.where(finite, radius, 0), jnp.where(finite, mean, 0))
  return jnp.where(finite, safe, penalty).astype(dtype)


def _check_options(norm: str, difference: str, **positive: float) -> None:
  """Raises unless the options of `large_margin_loss` are good."""
  linearized.check_norm(norm)
  if difference not in DIFFERENCES:
    raise ValueError(
      f'difference must be one of {DIFFERENCES}, got {difference!r}'
    )
  for name, value in positive.items():
    if not SMALLEST <= value <= LARGEST:
      raise ValueError(
        f'{name} must be in [{SMALLEST}, {LARGEST}], got {value}'
      )


def large_margin_loss(
  logits_fn: linearized.LogitsFunction,
  activations: PyTree[Float[Array, 'B ...']],
  labels: Integer[Array, ' B'],
  *,
  gamma: float = 1e4,
  alpha: float = 4.0,
  norm: str = 'l2',
  top_k: int = 1,
  worst_case: bool = False,
  difference: str = 'softmax',
  epsilon: float = 1e-6,
  normalize_by_size: bool = False,
  second_order: bool = False,
) -> Float32[Array, ' B']:
  """The large-margin loss of every example, at one layer or several.

      g_ik = || grad_h (p_iy - p_ik) ||_q
      d_ik = (p_iy - p_ik) / (g_ik + epsilon)
      loss_i = mean_h - sum_k clip(d_ik, gamma * (1 - alpha), gamma)

  p is softmax of the logits, or the logits themselves; q is dual to `norm`; k
  runs over the `top_k` highest-scoring classes other than the label. An example
  pulls where its distance to a boundary lies between the two bounds: gamma is
  the margin asked for, and alpha says how far behind the boundary an example
  is given up.

  By default the gradient treats g as a constant, as the paper's training
  does: it is a first-order quantity. With `second_order` it is the exact
  gradient of the loss, through the norm of the gradient.

  Args:
    logits_fn: activations -> (B, C) logits, row by row: see `at_layers`, which
      makes it of a Flax model. BatchNorm must be in evaluation mode.
    activations: pytree of arrays (B, ...), one a layer: where to linearise.
      For the input alone, `logits_fn` is the network and this its input.
    labels: (B,) integers in [0, C). Another label makes its example's loss NaN.
    gamma: the upper bound of d, positive.
    alpha: positive; the lower bound of d is gamma * (1 - alpha).
    norm: 'l1', 'l2' or 'l_inf': how the distance is measured.
    top_k: how many wrong classes count, at most C - 1; static.
    worst_case: only the least distance of those counts, not their sum.
    difference: of 'softmax' (the released code) or of 'logits' (the paper).
    epsilon: positive, added to g.
    normalize_by_size: divide g by the number of activations of the layer, as
      the released code does for l_inf, where g is a sum over them.
    second_order: let the gradient flow through g.

  Returns:
    (B,) float32 (float64 for float64 logits), each in [-n * gamma,
    n * gamma * (alpha - 1)] where n is `top_k`, or 1 with `worst_case`.

  Raises:
    TypeError: the logits are not floating, or `labels` not integer.
    ValueError: a shape does not fit, an option is unknown or out of range.

  Source: Elsayed et al. 2018 and its released code.
  """
  _check_options(norm, difference, gamma=gamma, alpha=alpha, epsilon=epsilon)
  labels = jnp.asarray(labels)
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

  def loss(gradient_norm: Array, layer: Array) -> Array:
    if normalize_by_size:
      gradient_norm = gradient_norm / math.prod(layer.shape[1:])
    if not second_order:
      gradient_norm = jax.lax.stop_gradient(gradient_norm)
    distance = gaps / (gradient_norm + epsilon)
    if worst_case:
      distance = jnp.min(distance, axis=1, keepdims=True)
    # With clip, and not by adding and subtracting gamma, which loses digits.
    return -jnp.sum(jnp.clip(distance, gamma * (1 - alpha), gamma), axis=1)

  losses = jax.tree.leaves(jax.tree.map(loss, norms, activations))
  if not losses:
    raise ValueError('activations must hold at least one layer, got none')
  mean = sum(losses) / len(losses)
  return jnp.where(valid, mean, jnp.nan)
