"""What is added to the loss to widen margins: multi-margin regularization."""

import jax
import jax.numpy as jnp
from jax import Array

from margin_jax import margins

REDUCTIONS = ('mean_of_squares', 'square_of_mean')


@jax.custom_jvp
def _norm(x: Array) -> Array:
  """Norms of the rows; no square over- or underflows, gradient 0 at 0."""
  scale = jnp.max(jnp.abs(x), axis=1)
  divisor = jnp.where(scale == 0, 1, scale)[:, None]
  return scale * jnp.sqrt(jnp.sum(jnp.square(x / divisor), axis=1))


@_norm.defjvp
def _norm_jvp(primals, tangents):
  (x,), (x_dot,) = primals, tangents
  norm = _norm(x)
  unit = x / jnp.where(norm == 0, 1, norm)[:, None]
  return norm, jnp.sum(unit * x_dot, axis=1)


def mmr_penalty(
  features: Array,
  logits: Array,
  kernel: Array,
  labels: Array,
  *,
  reduction: str = 'mean_of_squares',
  stop_feature_gradient: bool = False,
  axis_name: str | None = None,
) -> Array:
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
  rivals = margins.competitors(logits, labels)
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

  valid = rivals >= 0
  labels, rivals = jnp.where(valid, labels, 0), jnp.where(valid, rivals, 1)
  largest = jnp.finfo(wide).max / 4  # its double is finite, its square is not
  difference = jnp.clip(columns[labels] - columns[rivals], -largest, largest)
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
    width = jnp.where(valid, _norm(difference), jnp.nan)
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
