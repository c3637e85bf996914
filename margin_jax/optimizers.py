"""Config -> optax: optimizers, learning rates by step, alpha by step.

The trainer's optimizers are in `NAMES`; `register_optimizer` adds one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any

NAMES = ('sgd', 'adam', 'adamw', 'rmsprop')
# Makes an optimizer of the learning rate, a schedule: `optax.lion` is one.
Factory = Callable[[optax.Schedule], optax.GradientTransformation]
# Those that `register_optimizer` has added, by name.
REGISTERED: dict[str, Factory] = {}
# How the learning rate changes: at boundaries, or to 0 at the last step.
DECAYS = ('steps', 'linear', 'cosine')
# What weight decay is applied to.
WEIGHT_DECAY_MASKS = ('kernels', 'convolutions', 'all')


def learning_rate(
  values: tuple[float, ...],
  boundaries: tuple[int, ...],
  *,
  warmup: int = 0,
  decay: str = 'steps',
  end: int = 0,
) -> optax.Schedule:
  """Makes a schedule: values[i] from step boundaries[i-1] on.

  From the end w of the warm-up on, it falls to 0 at step e = `end`:

      linear: rate * (e - t) / (e - w)
      cosine: rate * (1 + cos(pi * (t - w) / (e - w))) / 2

  Args:
    values: one learning rate more than there are boundaries.
    boundaries: increasing steps; the new value is used at the step itself.
    warmup: over so many steps the rate rises linearly, from 0 at step 0.
    decay: 'steps' does not fall between boundaries; 'linear', with a warm-up,
      is as in fine-tuning BERT (Devlin et al. 2019).
    end: the number of steps; 'steps' does not read it.

  Returns:
    step -> learning rate.

  References:
    'cosine': Loshchilov & Hutter 2017, Eq. 5, without restarts.

  Examples:
    >>> rate = learning_rate((0.1,), (), warmup=10, decay='cosine', end=110)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
  """
  schedule = optax.join_schedules(
    [optax.constant_schedule(value) for value in values], list(boundaries)
  )
  factors = []
  if warmup:
    factors.append(optax.linear_schedule(0, 1, warmup))
  falling = max(end - warmup, 1)
  if decay == 'linear':
    factors.append(
      optax.linear_schedule(1, 0, falling, transition_begin=warmup)
    )
  if decay == 'cosine':
    cosine = optax.cosine_decay_schedule(1, falling)
    factors.append(lambda step: cosine(jnp.maximum(step - warmup, 0)))
  if not factors:
    return schedule
  return lambda step: math.prod(
    [f(step) for f in factors], start=schedule(step)
  )


def linear(start: float, end: float | None, steps: int) -> optax.Schedule:
  """Makes a schedule: `start` at step 0, `end` at the last, linear between.

  With `end=None` it is constant. Weinstein et al. 2020, 5.1 scale MMR's alpha
  from 1e-5 to 1e-3 this way for CIFAR.
  """
  if end is None:
    return optax.constant_schedule(start)
  return optax.linear_schedule(start, end, max(steps - 1, 1))


def released(
  start: float, end: float, steps: int, steps_per_epoch: int
) -> optax.Schedule:
  """Makes the schedule of MMR's alpha in the code that its authors released.

  It is constant in an epoch: 0 in the first, and in epoch e = 1, 2, ... of E

      start + e * (end - start) / E

  which does not reach the end. They have 1e-4 and 1e-2.

  Args:
    start, end: of alpha.
    steps: the steps of the whole run, E epochs; the last may be cut short.
    steps_per_epoch: the steps to visit all training examples.

  Returns:
    step -> alpha.
  """
  epochs = math.ceil(steps / steps_per_epoch)

  def schedule(step: jax.Array) -> jax.Array:
    epoch = step // steps_per_epoch
    return (epoch > 0) * (start + epoch * ((end - start) / epochs))

  return schedule


def unmet_requirement(
  optimizer: optax.GradientTransformation, params: PyTree
) -> str | None:
  """Returns what a registered optimizer must do and does not, or None.

  Args:
    optimizer: the optimizer that its factory made.
    params: shapes of a model's parameters.

  Returns:
    The rest of a sentence that begins with "an optimizer that".
  """
  if not isinstance(optimizer, optax.GradientTransformation):
    return f'is an optax.GradientTransformation, not a {type(optimizer)}'
  state = jax.eval_shape(optimizer.init, params)
  try:
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
  except TypeError as error:
    return f'updates by the gradient, its state and the parameters: {error}'
  if _arrays(updates) != _arrays(params):
    return 'returns updates that are like the parameters'
  if _arrays(after) != _arrays(state):
    return 'returns a state that is like the one it was given'
  dtypes = {x.dtype for x in jax.tree.leaves(state)}
  keys = [x for x in dtypes if jnp.issubdtype(x, jax.dtypes.prng_key)]
  if keys:
    return 'keeps numbers in its state: jax.random.PRNGKey, not .key'
  return None


def _arrays(tree: PyTree) -> PyTree:
  """Returns structure, shapes and dtypes."""
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def kernels_only(params):
  """Marks the kernels, the arrays that have an input and an output axis.

  Biases and the scales of normalization layers are vectors, or have these
  names: the biases of Flax's attention are (heads, D). The rows of an embedding
  are marked: they are what BERT's pre-training decays too.
  """

  def is_kernel(path, x) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True).rpartition('/')[2]
    return jnp.ndim(x) > 1 and name not in ('bias', 'scale')

  return jax.tree_util.tree_map_with_path(is_kernel, params)


def convolutions_only(params):
  """Marks the kernels of convolutions: (height, width, in, out).

  What MobileNet's results of the MMR paper decay, the last layer left out.
  """
  return jax.tree.map(lambda x: jnp.ndim(x) == 4, params)


_MASKS = {
  'kernels': kernels_only,
  'convolutions': convolutions_only,
  'all': None,
}


def make(
  name: str,
  schedule: optax.Schedule,
  *,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
  weight_decay_mask: str = 'kernels',
  epsilon: float | None = None,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Makes an optimizer of the papers' results, or a registered one.

  Weight decay is added to the gradient before the optimizer sees it (an L2
  penalty, as in PyTorch's SGD and Adam); then the gradient is clipped. That of
  'adamw' is decoupled (Loshchilov & Hutter 2019): a step takes the learning
  rate times `weight_decay` of a parameter off it, beside Adam's update by the
  clipped gradient. So does BERT's pre-training, whose Adam does not correct
  the bias of its averages to zero, though; this one does.

  Args:
    name: 'sgd' (with `momentum` and `nesterov`), 'adam' or 'adamw' (which
      ignore them), or 'rmsprop' (with `momentum`; decay 0.9 and TensorFlow's
      form: the average of squares starts at 1, `epsilon` is under the root),
      or one of `REGISTERED`, which reads `schedule` alone.
    schedule: step -> learning rate.
    momentum: decay of the trace.
    nesterov: SGD's variant.
    weight_decay: coefficient.
    weight_decay_mask: 'kernels' (with embeddings), of those the
      'convolutions', or 'all' parameters.
    epsilon: the epsilon of Adam and RMSProp; None is optax's default.
    clip_norm: the gradient, an L2 penalty's included, is scaled down to this
      L2 norm; None does not clip.

  Returns:
    The gradient transformation.

  Raises:
    ValueError: `name` or `weight_decay_mask` is unknown.
  """
  if name not in (*NAMES, *REGISTERED):
    raise ValueError(
      f'no optimizer is called {name!r}; there are {(*NAMES, *REGISTERED)}'
    )
  if weight_decay_mask not in WEIGHT_DECAY_MASKS:
    raise ValueError(
      f'weight_decay_mask must be one of {WEIGHT_DECAY_MASKS}, got '
      f'{weight_decay_mask!r}'
    )
  eps = {} if epsilon is None else {'eps': epsilon}
  if name == 'sgd':
    core = optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov)
  elif name == 'adam':
    core = optax.adam(schedule, **eps)
  elif name == 'adamw':
    mask = _MASKS[weight_decay_mask]
    core = optax.adamw(schedule, weight_decay=weight_decay, mask=mask, **eps)
  elif name == 'rmsprop':
    core = optax.rmsprop(
      schedule, initial_scale=1.0, momentum=momentum or None, **eps
    )
  else:
    core = REGISTERED[name](schedule)
  chain = []
  if weight_decay and name != 'adamw':
    chain.append(
      optax.add_decayed_weights(weight_decay, mask=_MASKS[weight_decay_mask])
    )
  if clip_norm is not None:
    chain.append(optax.clip_by_global_norm(clip_norm))
  return optax.chain(*chain, core) if chain else core
