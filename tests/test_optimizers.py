"""Optimizers and schedules against float64 NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from margin_jax.train import optimizers
from tests import references

STEPS = 10


@pytest.mark.parametrize(
  ('values', 'boundaries'),
  [
    ((0.1,), ()),
    ((0.1, 0.01), (1,)),
    ((0.1, 0.01, 0.001, 0.0001), (24_992, 27_335, 29_678)),
    ((0.1, 0.2, 0.0), (5, 6)),
  ],
)
def test_a_learning_rate_changes_at_its_boundary(values, boundaries):
  schedule = jax.jit(optimizers.learning_rate(values, boundaries))
  near = {b + perturbation for b in boundaries for perturbation in (-1, 0, 1)}
  for step in sorted({0, 1, 2**31 - 1} | near):
    passed = sum(step >= boundary for boundary in boundaries)
    found = schedule(jnp.int32(step))
    np.testing.assert_allclose(found, values[passed], 1e-6)


@pytest.mark.parametrize(('warmup', 'end'), [(0, 100), (10, 100), (10, None)])
def test_a_learning_rate_warms_up_and_falls(warmup, end):
  schedule = jax.jit(
    optimizers.learning_rate((2e-5,), (), warmup=warmup, end=end)
  )
  for step in (0, 1, 5, 9, 10, 11, 55, 99, 100, 101):
    expected = 2e-5
    if step < warmup:
      expected *= step / warmup
    elif end is not None:
      expected *= max(end - step, 0) / (end - warmup)
    np.testing.assert_allclose(schedule(jnp.int32(step)), expected, 1e-5, 1e-12)


@pytest.mark.parametrize('steps', [2, 11, 44_000, 156_200])
@pytest.mark.parametrize(('start', 'end'), [(1e-5, 1e-3), (1e-3, 0.0)])
def test_linear_goes_from_the_first_step_to_the_last(start, end, steps):
  schedule = jax.jit(optimizers.linear(start, end, steps))
  last = steps - 1
  for step in {0, 1, steps // 2, last - 1, last}:
    expected = start + (end - start) * step / last
    np.testing.assert_allclose(schedule(jnp.int32(step)), expected, 1e-4, 1e-9)
  np.testing.assert_allclose(schedule(jnp.int32(last + 9)), end, 1e-4, 1e-9)


@pytest.mark.parametrize(
  ('steps', 'steps_per_epoch'), [(20, 5), (23, 5), (3, 1)]
)
@pytest.mark.parametrize(('start', 'end'), [(1e-4, 1e-2), (1e-3, 0.0)])
def test_the_released_alpha_agrees_with_the_oracle(
  start, end, steps, steps_per_epoch
):
  schedule = jax.jit(optimizers.released(start, end, steps, steps_per_epoch))
  found = [schedule(jnp.int32(step)) for step in range(steps)]
  expected = references.released_alphas(start, end, steps, steps_per_epoch)
  np.testing.assert_allclose(found, expected, 1e-5, 1e-12)
  assert found[0] == 0


@pytest.mark.parametrize('step', [0, 5, 1000])
def test_linear_without_an_end_is_constant(step):
  assert optimizers.linear(1e-5, None, 10)(step) == 1e-5


def test_linear_of_one_step_starts_at_the_start():
  np.testing.assert_allclose(optimizers.linear(1e-5, 1e-3, 1)(0), 1e-5, 1e-4)


def test_kernels_are_what_has_inputs_and_outputs():
  params = {
    'conv': {'kernel': jnp.ones((3, 3, 2, 4))},
    'norm': {'scale': jnp.ones(4), 'bias': jnp.ones(4)},
    'head': {'kernel': jnp.ones((4, 5)), 'bias': jnp.ones(5)},
  }
  assert optimizers.kernels_only(params) == {
    'conv': {'kernel': True},
    'norm': {'scale': False, 'bias': False},
    'head': {'kernel': True, 'bias': False},
  }


def rate(step):
  """A learning rate that drops, so that its use at a step shows."""
  return 0.1 if step < 4 else 0.01


def random_trees():
  """Parameters and a gradient for each step: a kernel, a bias, a scale."""
  rng = np.random.default_rng(0)
  sizes = {'kernel': (3, 2), 'bias': (2,), 'scale': (3,)}

  def draw():
    return {name: rng.normal(size=size) for name, size in sizes.items()}

  return draw(), [draw() for _ in range(STEPS)]


def run(optimizer):
  """The parameters after every step, as optax makes them."""
  params, gradients = jax.tree.map(jnp.float32, random_trees())
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, gradient):
    change, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, change), state

  for gradient in gradients:
    params, state = step(params, state, gradient)
    yield params


def weight_decay_mask(gradient, params, weight_decay):
  """With the gradient of weight_decay / 2 * the kernels' squared norm."""
  kernel = gradient['kernel'] + weight_decay * params['kernel']
  return gradient | {'kernel': kernel}


def sgd(momentum, nesterov, weight_decay):
  """Sutskever et al. 2013, as in PyTorch: no dampening."""
  params, gradients = random_trees()
  trace = {name: np.zeros_like(x) for name, x in params.items()}
  for step, gradient in enumerate(gradients):
    gradient = weight_decay_mask(gradient, params, weight_decay)
    for name, g in gradient.items():
      trace[name] = momentum * trace[name] + g
      change = g + momentum * trace[name] if nesterov else trace[name]
      params[name] = params[name] - rate(step) * change
    yield dict(params)


def adam(weight_decay):
  """Kingma and Ba 2015, Algorithm 1, with the decay in the gradient."""
  params, gradients = random_trees()
  first = {name: np.zeros_like(x) for name, x in params.items()}
  second = {name: np.zeros_like(x) for name, x in params.items()}
  for step, gradient in enumerate(gradients):
    gradient = weight_decay_mask(gradient, params, weight_decay)
    for name, g in gradient.items():
      first[name] = 0.9 * first[name] + 0.1 * g
      second[name] = 0.999 * second[name] + 0.001 * g**2
      mean = first[name] / (1 - 0.9 ** (step + 1))
      square = second[name] / (1 - 0.999 ** (step + 1))
      params[name] = params[name] - rate(step) * mean / (np.sqrt(square) + 1e-8)
    yield dict(params)


def adamw(weight_decay, epsilon, clip_norm):
  """Loshchilov & Hutter 2019, Algorithm 2; BERT decays only the kernels."""
  params, gradients = random_trees()
  first = {name: np.zeros_like(x) for name, x in params.items()}
  second = {name: np.zeros_like(x) for name, x in params.items()}
  for step, gradient in enumerate(gradients):
    # The norm is of the gradient alone: the decay is no part of it.
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    for name, g in gradient.items():
      g = g * min(1, clip_norm / norm)
      first[name] = 0.9 * first[name] + 0.1 * g
      second[name] = 0.999 * second[name] + 0.001 * g**2
      mean = first[name] / (1 - 0.9 ** (step + 1))
      square = second[name] / (1 - 0.999 ** (step + 1))
      change = mean / (np.sqrt(square) + epsilon)
      if name == 'kernel':
        change = change + weight_decay * params[name]
      params[name] = params[name] - rate(step) * change
    yield dict(params)


def assert_runs_agree(found, expected, atol=1e-6):
  for step, (x, y) in enumerate(zip(found, expected, strict=True)):
    for name in y:
      np.testing.assert_allclose(
        x[name], y[name], 1e-5, atol, err_msg=f'{name} after step {step}'
      )


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
@pytest.mark.parametrize(
  ('momentum', 'nesterov'), [(0.0, False), (0.9, False), (0.9, True)]
)
def test_sgd_agrees_with_the_oracle(momentum, nesterov, weight_decay):
  optimizer = optimizers.make(
    'sgd',
    optimizers.learning_rate((0.1, 0.01), (4,)),
    momentum=momentum,
    nesterov=nesterov,
    weight_decay=weight_decay,
  )
  assert_runs_agree(run(optimizer), sgd(momentum, nesterov, weight_decay))


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
def test_adam_agrees_with_the_oracle(weight_decay):
  optimizer = optimizers.make(
    'adam',
    optimizers.learning_rate((0.1, 0.01), (4,)),
    momentum=0.9,
    nesterov=True,
    weight_decay=weight_decay,
  )
  assert_runs_agree(run(optimizer), adam(weight_decay))


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
@pytest.mark.parametrize('clip_norm', [1.0, 100.0])
@pytest.mark.parametrize('epsilon', [1e-6, 0.1])
def test_adamw_agrees_with_the_oracle(weight_decay, clip_norm, epsilon):
  optimizer = optimizers.make(
    'adamw',
    optimizers.learning_rate((0.1, 0.01), (4,)),
    momentum=0.9,
    nesterov=True,
    weight_decay=weight_decay,
    epsilon=epsilon,
    clip_norm=clip_norm,
  )
  expected = adamw(weight_decay, epsilon, clip_norm)
  assert_runs_agree(run(optimizer), expected, atol=1e-5)


def test_adamw_decays_all_parameters_on_request():
  optimizer = optimizers.make(
    'adamw', lambda step: 0.1, momentum=0.0, nesterov=False,
    weight_decay=0.5, weight_decay_mask='all',
  )  # fmt: skip
  params = {'bias': jnp.ones(2), 'kernel': jnp.ones((2, 2))}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  for change in updates.values():
    np.testing.assert_allclose(change, -0.05)


def rmsprop(momentum, epsilon, weight_decay, clip_norm):
  """TensorFlow 1: the average of squares starts at 1, epsilon in the root."""
  params, gradients = random_trees()
  squares = {name: np.ones_like(x) for name, x in params.items()}
  trace = {name: np.zeros_like(x) for name, x in params.items()}
  for step, gradient in enumerate(gradients):
    # Weight decay is of all parameters here, and clipped with the rest.
    gradient = {k: g + weight_decay * params[k] for k, g in gradient.items()}
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    for name, g in gradient.items():
      g = g * min(1, clip_norm / norm)
      squares[name] = 0.9 * squares[name] + 0.1 * g**2
      change = rate(step) * g / np.sqrt(squares[name] + epsilon)
      trace[name] = momentum * trace[name] + change
      params[name] = params[name] - trace[name]
    yield dict(params)


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('clip_norm', [1.0, 100.0])
def test_rmsprop_agrees_with_the_oracle(momentum, weight_decay, clip_norm):
  optimizer = optimizers.make(
    'rmsprop',
    optimizers.learning_rate((0.1, 0.01), (4,)),
    momentum=momentum,
    nesterov=False,
    weight_decay=weight_decay,
    weight_decay_mask='all',
    epsilon=1e-2,
    clip_norm=clip_norm,
  )
  expected = rmsprop(momentum, 1e-2, weight_decay, clip_norm)
  assert_runs_agree(run(optimizer), expected)


def test_epsilon_reaches_adam():
  runs = []
  for epsilon in (None, 1.0):
    optimizer = optimizers.make(
      'adam',
      optimizers.learning_rate((0.1,), ()),
      momentum=0.0,
      nesterov=False,
      weight_decay=0.0,
      epsilon=epsilon,
    )
    runs.append([*run(optimizer)][-1])
  assert np.abs(runs[0]['kernel'] - runs[1]['kernel']).max() > 1e-2


@pytest.mark.parametrize('name', optimizers.NAMES)
def test_biases_and_scales_are_not_decayed(name):
  schedule = optimizers.learning_rate((0.1,), ())
  runs = []
  for weight_decay in (0.0, 0.3):
    optimizer = optimizers.make(
      name, schedule, momentum=0.9, nesterov=False, weight_decay=weight_decay
    )
    runs.append([*run(optimizer)][-1])
  without, with_decay = runs
  for vector in ('bias', 'scale'):
    np.testing.assert_array_equal(without[vector], with_decay[vector])
  assert np.abs(without['kernel'] - with_decay['kernel']).max() > 1e-2


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(
    ValueError, match=r"'lamb'.*\('sgd', 'adam', 'adamw', 'rmsprop'\)"
  ):
    optimizers.make(
      'lamb',
      optimizers.learning_rate((0.1,), ()),
      momentum=0.9,
      nesterov=False,
      weight_decay=0.0,
    )
