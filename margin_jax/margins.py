"""Geometry of a linear last layer: competitors, signed margins, MMS scores.

The last layer computes `logits = features @ kernel + bias`. In feature space
the boundary between classes p and q is the hyperplane where their logits are
equal. Its normal is the difference of their columns of the kernel. So every
distance here is a difference of logits over the norm of a difference of
columns. The bias moves a boundary but never tilts it, so it is in the logits
and not in the norm.

Everything is pure, works under `jit`, `vmap`, `grad` and `pmap`, computes in
float32 (float64 for float64 inputs) and returns the dtype of its inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int32, Integer


def to_array(name: str, value: ArrayLike) -> Array:
  """Converts an argument to an array of JAX, which holds the same numbers.

  Without jax_enable_x64 JAX takes the lower 32 bits of an integer in silence:
  the label 2**32 would be 0.

  Raises:
    TypeError: `value` is None.
    ValueError: its integers do not fit the type that JAX gives them.
  """
  if value is None:
    raise TypeError(f'{name} must be an array, got None')
  if not isinstance(value, jax.Array):
    value = np.asarray(value)
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    if value.dtype.kind in 'iu' and dtype != value.dtype and value.size:
      lowest, highest = int(value.min()), int(value.max())
      limits = jnp.iinfo(dtype)
      if lowest < limits.min or highest > limits.max:
        raise ValueError(
          f'{name} must be integers from {limits.min} to {limits.max}, got '
          f'{lowest if lowest < limits.min else highest}'
        )
  return jnp.asarray(value)


def check_floating(name: str, array: Array, ndim: int) -> None:
  """Raises unless `array` is a floating array of `ndim` dimensions."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise TypeError(f'{name} must be a floating-point array, got {array.dtype}')
  if array.ndim != ndim:
    raise ValueError(
      f'{name} must have {ndim} dimension(s), got shape {array.shape}'
    )


def check_shape(
  name: str, array: Array, shape: tuple[int | None, ...], why: str
) -> None:
  """Raises unless `array` has the shape; None fits any size."""
  fits = array.ndim == len(shape) and all(
    size in (own, None) for own, size in zip(array.shape, shape, strict=True)
  )
  if not fits:
    shown = ', '.join('D' if size is None else str(size) for size in shape)
    shown += ',' if len(shape) == 1 else ''
    raise ValueError(
      f'{name} must have shape ({shown}), {why}; got {array.shape}'
    )


def check_logits(logits: Array) -> None:
  """Raises unless `logits` is floating, (B, C), with at least two classes."""
  check_floating('logits', logits, 2)
  if logits.shape[1] < 2:
    raise ValueError(
      'logits must have at least two classes in its last dimension, got shape '
      f'{logits.shape}'
    )


def check_labels(labels: Array, size: int) -> None:
  """Raises unless `labels` is an integer array of shape (size,)."""
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f'labels must be integers, got {labels.dtype}')
  check_shape('labels', labels, (size,), 'one an example')


def check_kernel(kernel: Array, classes: int) -> None:
  """Raises unless `kernel` is floating, (D, classes), with D >= 1."""
  check_floating('kernel', kernel, 2)
  check_shape(
    'kernel', kernel, (None, classes), 'one column for each class of the logits'
  )
  if not kernel.shape[0]:
    raise ValueError('kernel must have at least one row, of a feature')


def compute_dtype(*arrays: Array) -> tuple[jnp.dtype, jnp.dtype]:
  """Returns the dtype of the inputs together, and the one to compute in."""
  dtype = jnp.result_type(*arrays)
  return dtype, jnp.promote_types(dtype, jnp.float32)


def _scaled_norms(x: Array) -> tuple[Array, Array, Array]:
  """Returns the L2 norms of the rows as scale * norm, and which are zero.

  Divided by the largest entry, no square over- or underflows. The norm is
  homogeneous, so the scale needs no gradient. Both are 1 where the row is zero.
  """
  scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=1))
  zero = scale == 0
  scale = jnp.where(zero, 1, scale)
  squares = jnp.sum(jnp.square(x / scale[:, None]), axis=1)
  return scale, jnp.sqrt(jnp.where(zero, 1, squares)), zero


@jax.custom_jvp
def row_norms(x: Array) -> Array:
  """Computes the L2 norms of the rows; the gradient is 0 at a zero row."""
  scale, norm, zero = _scaled_norms(x)
  return jnp.where(zero, 0, scale * norm)


@row_norms.defjvp
def _row_norms_jvp(primals, tangents):
  (x,), (x_dot,) = primals, tangents
  norm = row_norms(x)
  unit = x / jnp.where(norm == 0, 1, norm)[:, None]
  return norm, jnp.sum(unit * x_dot, axis=1)


def competitors(
  logits: Float[Array, 'B C'], labels: Integer[Array, ' B']
) -> Int32[Array, ' B']:
  r"""Finds each example's competitor: the best class other than the label.

  $$m_i = \arg\max_{j \ne y_i} s_{ij}$$

  Ties go to the lowest class, and a NaN logit counts as the largest, as in
  `jnp.argmax`. The result never equals the label, not even where all other
  logits are minus infinity.

  Args:
    logits: (B, C) floating, C >= 2.
    labels: (B,) integers in [0, C).

  Returns:
    (B,) int32; -1 for a label outside [0, C), which has no competitor.

  Raises:
    TypeError: `logits` is not floating or `labels` not integer.
    ValueError: a shape does not fit.

  References:
    Weinstein et al. 2020, section 2 (the competitive class of Eq. 5).

  Examples:
    >>> logits = jnp.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    >>> competitors(logits, jnp.array([0, 2])).tolist()
    [2, 1]
  """
  logits, labels = to_array('logits', logits), to_array('labels', labels)
  check_logits(logits)
  check_labels(labels, logits.shape[0])
  classes = logits.shape[1]
  labels = labels.astype(jnp.int32)
  is_label = jnp.arange(classes)[None, :] == labels[:, None]
  masked = jnp.where(is_label, -jnp.inf, logits)
  best = jnp.argmax(masked, axis=1).astype(jnp.int32)
  # Where every other logit is -inf too, argmax stops at class 0 even if that
  # is the label; the lowest other class is then class 1.
  best = jnp.where(best == labels, jnp.int32(1), best)
  valid = (labels >= 0) & (labels < classes)
  return jnp.where(valid, best, jnp.int32(-1))


def _column_distance(
  kernel: Array, first: Array, second: Array
) -> tuple[Array, Array, Array]:
  """Returns ||w_first - w_second|| / 2 as scale * norm, and where it is 0."""
  columns = kernel.T
  # Of halves, because the difference of two large entries may overflow; the
  # caller halves the difference of the logits too.
  return _scaled_norms(columns[first] / 2 - columns[second] / 2)


def signed_margins(
  logits: Float[Array, 'B C'],
  kernel: Float[Array, 'D C'],
  labels: Integer[Array, ' B'],
) -> Float[Array, ' B']:
  r"""Computes signed distances in feature space to the competitor's boundary.

  $$d_i = (s_{iy} - s_{im}) \,/\, \|w_y - w_m\|$$

  y is the label and m its competitor (see `competitors`).

  The distance is positive if the label wins and negative if the example is
  misclassified. It has the units of the features.

  If the two columns are equal, there is no boundary: the distance is +inf or
  -inf by the sign of `s_iy - s_im`, and 0 for a tie. Two equal infinite logits
  are a tie, and one infinite logit gives an infinite distance. A NaN logit, or
  a label outside [0, C), gives NaN. The gradient of an example is never NaN for
  finite inputs; it is 0 if the distance overflows.

  Args:
    logits: (B, C) floating, C >= 2.
    kernel: (D, C) floating: the last layer's weights, one column per class.
    labels: (B,) integers in [0, C).

  Returns:
    (B,) in the dtype of `logits` and `kernel` together.

  Raises:
    TypeError: `logits` or `kernel` is not floating, or `labels` not integer.
    ValueError: a shape does not fit.

  References:
    Weinstein et al. 2020, Eq. 7.

  Examples:
    >>> kernel = jnp.array([[3.0, 0.0], [0.0, 4.0]])  # ||w_0 - w_1|| = 5
    >>> logits = jnp.array([[10.0, 5.0], [0.0, 5.0]])
    >>> signed_margins(logits, kernel, jnp.array([0, 0])).tolist()
    [1.0, -1.0]
  """
  logits, labels = to_array('logits', logits), to_array('labels', labels)
  kernel = to_array('kernel', kernel)
  competitor = competitors(logits, labels)
  check_kernel(kernel, logits.shape[1])
  dtype, wide = compute_dtype(logits, kernel)
  logits, kernel = logits.astype(wide), kernel.astype(wide)
  valid = competitor >= 0
  labels = jnp.where(valid, labels, 0).astype(jnp.int32)
  competitor = jnp.where(valid, competitor, 1)

  own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
  other = jnp.take_along_axis(logits, competitor[:, None], axis=1)[:, 0]
  infinite_tie = jnp.isinf(own) & (own == other)
  own, other = (jnp.where(infinite_tie, 0, x) / 2 for x in (own, other))
  gap = own - other
  scale, norm, no_boundary = _column_distance(kernel, labels, competitor)
  distance = gap / scale / norm
  # An overflow would be NaN in the derivative; its gradient is 0 instead.
  finite = jnp.isfinite(distance)
  overflow = jax.lax.stop_gradient(distance)
  distance = jnp.where(
    finite, jnp.where(finite, gap, 0) / scale / norm, overflow
  )
  # sign(gap) * inf would be NaN for a tie, and its gradient NaN elsewhere.
  infinity = jnp.where(gap > 0, jnp.inf, jnp.where(gap < 0, -jnp.inf, gap))
  distance = jnp.where(no_boundary, jax.lax.stop_gradient(infinity), distance)
  return jnp.where(valid, distance, jnp.nan).astype(dtype)


def mms_scores(
  logits: Float[Array, 'B C'], kernel: Float[Array, 'D C']
) -> Float[Array, ' B']:
  r"""Computes minimal margin scores: distances to the nearest boundary.

  $$d_i = (s_{i j_1} - s_{i j_2}) \,/\, \|w_{j_1} - w_{j_2}\|$$

  $j_1$ and $j_2$ are the two highest-scoring classes of example i; no label is
  used. The score is the smallest L2 displacement of the features that puts the
  example on the boundary between these two classes. (The boundary with a third
  class that has a long column can be nearer still; the papers' score ignores
  it.) The score equals `signed_margins` with the prediction as label, and has
  the same edge cases: 0 for a tie, +inf if the two columns are equal but the
  logits are not, NaN for a NaN logit.

  bfloat16 inputs give bfloat16 scores, in which close scores tie. If the order
  matters, pass float32 logits.

  Args:
    logits: (B, C) floating, C >= 2.
    kernel: (D, C) floating: the last layer's weights, one column per class.

  Returns:
    (B,) non-negative, in the dtype of `logits` and `kernel` together.

  Raises:
    TypeError: `logits` or `kernel` is not floating.
    ValueError: a shape does not fit.

  References:
    Weinstein et al. 2020, Eq. 9; ICLR 2020 submission, Appendix A.

  Examples:
    >>> kernel = jnp.array([[3.0, 0.0], [0.0, 4.0]])  # ||w_0 - w_1|| = 5
    >>> mms_scores(jnp.array([[10.0, 5.0], [0.0, 5.0]]), kernel).tolist()
    [1.0, 1.0]
  """
  logits = to_array('logits', logits)
  check_logits(logits)
  return signed_margins(logits, kernel, jnp.argmax(logits, axis=1))
