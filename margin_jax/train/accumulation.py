"""How a batch is divided into parts that are differentiated one by one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from margin_jax.train.spec import StepSpec

PyTree = Any


def split(spec: StepSpec, examples: PyTree) -> PyTree:
  """Divides the rows of a device among the parts, by turns.

  Part j has the rows j, j + n, j + 2n, ...: where they are in the batch of all
  devices does not depend on the number of these. With groups of BatchNorm whole
  groups go by turns, so that each is normalized as it would be without parts.

  Args:
    spec: the spec, with n parts.
    examples: arrays (rows, ...).

  Returns:
    Arrays (n, rows / n, ...).
  """
  n, group = spec.accumulate, spec.batch_norm_examples or 1
  return jax.tree.map(
    lambda x: (
      x.reshape(-1, n, group, *x.shape[1:])
      .swapaxes(0, 1)
      .reshape(n, -1, *x.shape[1:])
    ),
    examples,
  )


def merge(spec: StepSpec, parts: PyTree) -> PyTree:
  """Undoes `split`: (n, rows / n, ...) -> (rows, ...)."""
  n, group = spec.accumulate, spec.batch_norm_examples or 1
  return jax.tree.map(
    lambda x: (
      x.reshape(n, -1, group, *x.shape[2:])
      .swapaxes(0, 1)
      .reshape(-1, *x.shape[2:])
    ),
    parts,
  )


def unrolled(function: Callable, initial: PyTree, xs: PyTree) -> PyTree:
  """Returns what `jax.lax.scan` does, without a loop in the program.

  XLA:CPU runs the gradient of a convolution in a loop an order of magnitude
  slower (jax-ml/jax#12868). Without one it would run all parts side by side,
  and keep the activations of all. So each part waits for the one before: a 0 is
  added to its examples that is computed from the results of that one, and that
  XLA cannot fold away.
  """
  carry, outputs = initial, []
  for j in range(jax.tree.leaves(xs)[0].shape[0]):
    x = jax.tree.map(lambda x, j=j: x[j], xs)
    if outputs:
      done = jax.tree.leaves((carry, outputs[-1]))
      values = jnp.stack([leaf.ravel()[0].astype(jnp.float32) for leaf in done])
      zero = jnp.sum(jnp.where(jnp.isfinite(values), 0 * values, 0))
      x = jax.tree.map(lambda x, zero=zero: x + zero.astype(x.dtype), x)
    carry, output = function(carry, x)
    outputs.append(output)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def no_linearize(layers: tuple[str, ...]) -> None:
  """Refuses to linearize the whole batch.

  Raises:
    ValueError: in any case.
  """
  raise ValueError(
    'accumulate must be 1 with a loss of the whole batch that linearizes at '
    f'{layers}: return (b,), a loss for each example'
  )
