"""Dropout whose masks do not depend on the number of devices."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


def by_position(positions: Array) -> Callable:
  """Gives each example a dropout mask by its position in the batch.

  So the masks, like the batch, do not depend on the number of devices. A layer
  that drops the same activations of all examples is left as it is: its key is
  the same on all devices.

  Args:
    positions: (n,) int32, where the examples are in the batch of all devices.

  Returns:
    An interceptor of `nn.Dropout`, for `nn.intercept_methods`. The layer's key
    must be the same on all devices. What it drops from has these examples on
    its first axis, or a multiple of them in their order.
  """

  def intercept(next_function, args, kwargs, context):
    module = context.module
    if not isinstance(module, nn.Dropout) or context.method_name != '__call__':
      return next_function(*args, **kwargs)
    return _drop(module, positions, next_function, *args, **kwargs)

  return intercept


def off(next_function, args, kwargs, context):
  """Makes `nn.Dropout` return its input, for `nn.intercept_methods`."""
  is_call = context.method_name == '__call__'
  if is_call and isinstance(context.module, nn.Dropout):
    return args[0] if args else kwargs['inputs']
  return next_function(*args, **kwargs)


def _drop(
  module: nn.Dropout,
  positions: Array,
  next_function: Callable,
  inputs: Array,
  deterministic: bool | None = None,
  rng: Array | None = None,
) -> Array:
  """Returns what `nn.Dropout` does, but for the mask; see `by_position`."""
  idle = nn.merge_param('deterministic', module.deterministic, deterministic)
  shared = {axis % inputs.ndim for axis in module.broadcast_dims}
  if idle or 0 in shared or not 0 < module.rate < 1:
    return next_function(inputs, deterministic, rng)
  # Of the layer: make_rng folds the layer's path into the step's key.
  key = module.make_rng(module.rng_collection) if rng is None else rng
  rows = inputs.shape[0] // len(positions)  # 1, or an example's tokens
  if rows > 1:
    positions = (positions[:, None] * rows + jnp.arange(rows)[None]).ravel()
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
  shape = [1 if i in shared else n for i, n in enumerate(inputs.shape)]
  level = max(round((1 - module.rate) * 2**16), 1)  # of 65,536
  if level == 2**16:
    return inputs
  mask = jax.vmap(lambda k: _below(k, level, shape[1:]))(keys)
  mask = jnp.broadcast_to(mask, inputs.shape)
  return jnp.where(mask, inputs / (level / 2**16), jnp.zeros_like(inputs))


def _below(key: Array, level: int, shape: list[int]) -> Array:
  """Returns True with probability level / 2**16.

  Two from each word: `jax.random.bernoulli` takes a word for each, and three
  to four times as long on CPU.
  """
  count = math.prod(shape)
  words = jax.random.bits(key, (-(-count // 2),), jnp.uint32)
  halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
  return (halves[:count] < level).reshape(shape)
