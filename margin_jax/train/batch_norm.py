"""BatchNorm that normalizes groups of a batch's examples, each by itself."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def in_groups(size: int | None, axis_name: str) -> Callable:
  """Makes `nn.BatchNorm` do in training what devices of `size` examples do.

  Each group of so many neighbours is normalized with its own statistics, and
  the running ones are averaged over this device's groups. Like the batch, the
  groups do not depend on the number of devices.

  Args:
    size: of a group: a divisor of this device's examples, or a multiple of
      them: a group then lies on several devices. None changes nothing.
    axis_name: the mapped axis of the devices.

  Returns:
    An interceptor of `nn.BatchNorm`, for `nn.intercept_methods`.
  """

  def intercept(next_function, args, kwargs, context):
    module = context.module
    is_norm = isinstance(module, nn.BatchNorm)
    if size is None or not is_norm or context.method_name != '__call__':
      return next_function(*args, **kwargs)
    return _normalize(module, size, axis_name, next_function, *args, **kwargs)

  return intercept


def _normalize(
  module: nn.BatchNorm,
  size: int,
  axis_name: str,
  next_function: Callable,
  x: Array,
  use_running_average: bool | None = None,
  *,
  mask: Array | None = None,
) -> Array:
  """Returns what `nn.BatchNorm` does, but for the groups; see `in_groups`."""
  evaluates = nn.merge_param(
    'use_running_average', module.use_running_average, use_running_average
  )
  if evaluates or module.is_initializing():
    return next_function(x, use_running_average, mask=mask)
  if module.axis != -1 or mask is not None:
    raise ValueError(
      'model.batch_norm_examples needs a BatchNorm of the last axis, without a '
      f'mask, unlike {"/".join(module.path)}'
    )
  rows = min(size, x.shape[0])
  groups = x.reshape(-1, rows, *x.shape[1:]).astype(jnp.float32)
  axes = tuple(range(1, groups.ndim - 1))
  mean = jnp.mean(groups, axes, keepdims=True)
  # As Flax does it: one pass over the activations.
  square = jnp.mean(jnp.square(groups), axes, keepdims=True)
  if rows < size:
    devices = np.arange(jax.lax.axis_size(axis_name))
    sharing = devices.reshape(-1, size // rows).tolist()
    mean, square = jax.lax.pmean(
      (mean, square), axis_name, axis_index_groups=sharing
    )
  variance = jnp.maximum(square - jnp.square(mean), 0)
  for name, values in (('mean', mean), ('var', variance)):
    running = module.get_variable('batch_stats', name)
    own = jnp.mean(values, axis=tuple(range(values.ndim - 1)))
    updated = module.momentum * running + (1 - module.momentum) * own
    module.put_variable('batch_stats', name, updated)

  def parameter(name: str) -> Array:
    x = module.get_variable('params', name)
    return x.reshape(*[1] * len(axes), 1, -1)

  factor = jax.lax.rsqrt(variance + module.epsilon)
  if module.use_scale:
    factor = factor * parameter('scale')
  y = (groups - mean) * factor
  if module.use_bias:
    y = y + parameter('bias')
  return y.reshape(x.shape).astype(module.dtype or x.dtype)
