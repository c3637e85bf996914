"""Adversarial perturbations within an l_inf ball, to evaluate robustness."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

# Of PGD: the step is so many times epsilon over the number of steps, so that
# the edge of the ball can be reached from anywhere in it.
PGD_REACH = 2.5


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
  """Attacks by projected gradient descent against the label.

      a_i = log sum_{k != y} exp(s_ik) - s_iy
      x_{t+1} = clip(x_t + step_size * sign(grad_x a), x_0 -+ epsilon)

  starting from the inputs themselves, and clipped to `bounds` too. The gradient
  of a is that of the cross-entropy over 1 - p_y, so its sign is the same; but
  if the margin is large, the gradient of the cross-entropy rounds to 0, and a
  network that is not robust would look robust.

  Args:
    logits_fn: (B, ...) -> (B, C); row by row, so in evaluation mode.
    inputs: (B, ...) floating.
    labels: (B,) integers in [0, C).
    epsilon: the largest change of an input, in its own units; may be traced.
    steps: how many steps, at least 1; static, and unrolled, because XLA:CPU
      runs convolutions in a loop several times slower.
    step_size: the size of each step; None is 2.5 * epsilon / steps.
    bounds: the least and the largest value an input can have.

  Returns:
    (B, ...) inputs, none further than epsilon from the original.

  Raises:
    ValueError: `steps` is below 1.

  References:
    Madry et al. 2018, Eq. 3, without the random start, so that a result
    needs no seed.
  """
  if steps < 1:
    raise ValueError(f'steps must be at least 1, got {steps}')
  if step_size is None:
    step_size = PGD_REACH * epsilon / steps

  def against(x: Array) -> Array:
    logits = logits_fn(x).astype(jnp.float32)
    is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=1)
    return jnp.sum(others - jnp.sum(jnp.where(is_label, logits, 0), axis=1))

  x = inputs
  for _ in range(steps):
    x = x + step_size * jnp.sign(jax.grad(against)(x))
    x = jnp.clip(x, inputs - epsilon, inputs + epsilon)
    x = jnp.clip(x, *bounds)
  return x


def ifgsm(
  logits_fn: Callable[[Array], Array],
  inputs: Array,
  labels: Array,
  epsilon: Array | float,
  *,
  steps: int,
  step_size: Array | float | None = None,
  bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
  """Attacks by the iterative fast gradient sign method: `pgd` in small steps.

  Also called the basic iterative method.

  Args and returns: those of `pgd`, but where `step_size` is None it is
    epsilon / steps: the last step may just reach the edge of the ball.

  References:
    Kurakin et al. 2017, Eq. 2.
  """
  if step_size is None:
    step_size = epsilon / max(steps, 1)  # `pgd` refuses less
  return pgd(
    logits_fn,
    inputs,
    labels,
    epsilon,
    steps=steps,
    step_size=step_size,
    bounds=bounds,
  )


def fgsm(
  logits_fn: Callable[[Array], Array],
  inputs: Array,
  labels: Array,
  epsilon: Array | float,
  *,
  bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
  """Attacks by the fast gradient sign method: one step of `pgd`.

      x' = clip(x + epsilon * sign(grad_x a), bounds)

  Args and returns: those of `pgd`.

  References:
    Goodfellow et al. 2015, section 4.
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
