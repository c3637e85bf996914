"""Config -> optax: optimizers, learning rates by step, alpha by step."""

import jax
import jax.numpy as jnp
import optax

NAMES = ('sgd', 'adam')


def learning_rate(
  values: tuple[float, ...], boundaries: tuple[int, ...]
) -> optax.Schedule:
  """values[i] from step boundaries[i-1] on: the papers' regimes.

  Args:
    values: one learning rate more than there are boundaries.
    boundaries: increasing steps; the new value is used at the step itself.

  Returns:
    step -> learning rate.
  """
  return optax.join_schedules(
    [optax.constant_schedule(value) for value in values], list(boundaries)
  )


def linear(start: float, end: float | None, steps: int) -> optax.Schedule:
  """`start` at step 0, `end` at step steps - 1, linear between.

  With `end=None` it is constant. Weinstein et al. 2020, 5.1 scale MMR's alpha
  from 1e-5 to 1e-3 this way for CIFAR.
  """
  if end is None:
    return optax.constant_schedule(start)
  return optax.linear_schedule(start, end, max(steps - 1, 1))


def kernels_only(params):
  """True for the kernels, the arrays that have an input and an output axis.

  Biases and the scales of normalisation layers are vectors.
  """
  return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def make(
  name: str,
  schedule: optax.Schedule,
  *,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
) -> optax.GradientTransformation:
  """The optimizer of the papers' results.

  Weight decay is added to the gradient before the optimizer sees it (an L2
  penalty, as in PyTorch's SGD and Adam), on kernels only.

  Args:
    name: 'sgd' (with `momentum` and `nesterov`) or 'adam' (which ignores
      them and has optax's defaults, which are PyTorch's).
    schedule: step -> learning rate.
    momentum: decay of SGD's trace.
    nesterov: SGD's variant.
    weight_decay: coefficient.

  Returns:
    The gradient transformation.
  """
  if name not in NAMES:
    raise ValueError(f'no optimizer is called {name!r}; there are {NAMES}')
  if name == 'sgd':
    core = optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov)
  else:
    core = optax.adam(schedule)
  if not weight_decay:
    return core
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=kernels_only), core
  )
