"""Adversarial perturbations within an l_inf ball, to evaluate robustness."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

# Of PGD: the step is so many times epsilon over the number of steps, so that
# the edge of the ball can be reached from anywhere in it.
PGD_REACH = 2.5

# What the trainer offers.
NAMES = ('fgsm', 'pgd')


def pgd(
  logits_fn: Callable[[Array], Array],
  inputs: Array,
  labels: Array,
  epsilon: Array | float,
  *,
  steps: int,
  step_size: Array | float | None = None,
  bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
  """Projected gradient descent on minus the cross-entropy.

      x_{t+1} = clip(x_t + step_size * sign(grad_x CE(x_t)), x_0 -+ epsilon)

  starting from the inputs themselves, and clipped to `bounds` too.

  Args:
    logits_fn: (B, ...) -> (B, C); row by row, so in evaluation mode.
    inputs: (B, ...) floating.
    labels: (B,) integers in [0, C).
    epsilon: the radius, in the units of the inputs; may be traced.
    steps: how many; static.
    step_size: of each; None is 2.5 * epsilon / steps.
    bounds: the least and the largest value an input can have.

  Returns:
    (B, ...) inputs, none further than epsilon from where they were.

  Source: Madry et al. 2018, Eq. 3, without the random start, so that a result
    needs no seed.
  """
  if step_size is None:
    step_size = PGD_REACH * epsilon / steps

  def loss(x: Array) -> Array:
    logits = logits_fn(x).astype(jnp.float32)
    return jnp.sum(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    )

  def step(_: int, x: Array) -> Array:
    x = x + step_size * jnp.sign(jax.grad(loss)(x))
    x = jnp.clip(x, inputs - epsilon, inputs + epsilon)
    return jnp.clip(x, *bounds)

  return jax.lax.fori_loop(0, steps, step, inputs)


def fgsm(
  logits_fn: Callable[[Array], Array],
  inputs: Array,
  labels: Array,
  epsilon: Array | float,
  *,
  bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
  """The fast gradient sign method: one step of `pgd` of size epsilon.

      x' = clip(x + epsilon * sign(grad_x CE(x)), bounds)

  Args and returns: those of `pgd`.

  Source: Goodfellow et al. 2015, section 4.
  """
  return pgd(
    logits_fn,
    inputs,
    labels,
    epsilon,
    steps=1,
    step_size=epsilon,
    bounds=bounds,
  )
