"""Optimizers and schedules against float64 NumPy loops, and optax alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import margin_jax
from margin_jax import config as config_lib
from margin_jax import optimizers
from margin_jax.train import loop
from tests import helpers, references

STEPS = 10


@pytest.fixture(autouse=True)
def _registered_nowhere_else(monkeypatch):
  monkeypatch.setattr(optimizers, 'REGISTERED', {})


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


@pytest.mark.parametrize('warmup', [0, 10])
@pytest.mark.parametrize('decay', optimizers.DECAYS)
def test_a_learning_rate_warms_up_and_falls(warmup, decay):
  end = 100
  schedule = jax.jit(
    optimizers.learning_rate((2e-5,), (), warmup=warmup, decay=decay, end=end)
  )
  for step in (0, 1, 5, 9, 10, 11, 55, 99, 100, 101):
    expected = 2e-5
    if step < warmup:
      expected *= step / warmup
    elif decay == 'linear':
      expected *= max(end - step, 0) / (end - warmup)
    elif decay == 'cosine':
      part = min(step - warmup, end - warmup) / (end - warmup)
      expected *= (1 + np.cos(np.pi * part)) / 2
    np.testing.assert_allclose(schedule(jnp.int32(step)), expected, 1e-5, 1e-12)


def test_cosine_with_a_warmup_is_that_of_optax():
  ours = optimizers.learning_rate((0.3,), (), warmup=7, decay='cosine', end=50)
  theirs = optax.warmup_cosine_decay_schedule(0, 0.3, 7, 50)
  for step in range(60):
    np.testing.assert_allclose(ours(step), theirs(step), 1e-5, 1e-7)


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
    ValueError, match=r"'lamb'.*\('sgd', 'adam', 'adamw', 'rmsprop'"
  ):
    optimizers.make(
      'lamb',
      optimizers.learning_rate((0.1,), ()),
      momentum=0.9,
      nesterov=False,
      weight_decay=0.0,
    )


def kernels(params):
  """What is decayed."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def of_optax(rate):
  """The trainer's optimizers as optax alone makes them, and their fields."""
  return {
    'nesterov': (
      optax.chain(
        optax.add_decayed_weights(1e-2, kernels),
        optax.sgd(rate, momentum=0.8, nesterov=True),
      ),
      {
        'optimizer.name': 'sgd',
        'optimizer.momentum': 0.8,
        'optimizer.nesterov': True,
      },
    ),
    'adamw': (
      optax.adamw(rate, weight_decay=1e-2, mask=kernels, eps=1e-4),
      {'optimizer.name': 'adamw', 'optimizer.epsilon': 1e-4},
    ),
    'lion': (
      optax.chain(
        optax.add_decayed_weights(1e-2, kernels), optax.lion(rate, b1=0.8)
      ),
      {'optimizer.name': 'own_lion'},
    ),
  }


@pytest.mark.slow
@pytest.mark.parametrize('name', ['nesterov', 'adamw', 'lion'])
def test_training_is_optax_alone_in_a_plain_loop(name):
  """Of the batches that the trainer samples, with a cosine and a warm-up."""
  margin_jax.register_optimizer('own_lion', lambda rate: optax.lion(rate, 0.8))
  rate = optax.warmup_cosine_decay_schedule(0, 0.01, 2, 20)
  optimizer, fields = of_optax(rate)[name]
  this = helpers.Setup(
    **{
      'selection.rule': 'uniform',
      'mmr.alpha': 0.0,
      'optimizer.learning_rates': (0.01,),
      'optimizer.decay': 'cosine',
      'optimizer.warmup': 2,
      'optimizer.weight_decay': 1e-2,
      **fields,
    }
  )
  found, metrics = this.run(5)

  @jax.jit
  def update(params, state, batch):
    def loss(params):
      inputs = this.dataset.prepare(batch['inputs'])
      logits, _ = this.spec.model.apply({'params': params}, inputs, train=True)
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch['label']
      )
      return losses.mean()

    change, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, change), state

  key = jax.random.fold_in(jax.random.key(0), 2)
  sample, sampler = helpers.sampler(this.dataset, 8), this.dataset.state()
  params, state = this.first.params, optimizer.init(this.first.params)
  for step in range(5):
    sampler, batch = sample(sampler, this.data, key, step)
    params, state = update(params, state, batch)
  helpers.assert_trees_close(found.params, params, 1e-5)
  np.testing.assert_allclose(metrics['learning_rate'], rate(np.arange(5)), 1e-5)


@pytest.mark.slow
def test_a_registered_optimizer_trains_the_proxy_too():
  """It is the same as that of the same name, to the bit, on 1 and 2 devices."""
  margin_jax.register_optimizer(
    'own_sgd', lambda rate: optax.sgd(rate, momentum=0.9)
  )
  fields = {'selection.proxy': 'mnist_cnn', 'mmr.alpha': 0.0}
  for devices in (1, 2):
    states = [
      helpers.Setup(**fields, **{'optimizer.name': name}, devices=devices).run(
        3
      )[0]
      for name in ('sgd', 'own_sgd')
    ]
    helpers.assert_trees_equal(*states)


def own_adam(rate):
  """An optimizer whose state has empty parts, tuples with names, and masks."""
  return optax.chain(
    optax.masked(optax.add_decayed_weights(1e-3), kernels),
    optax.scale_by_adam(),
    optax.masked(optax.trace(0.9), kernels),
    optax.scale_by_learning_rate(rate),
  )


@pytest.mark.slow
def test_an_optimizer_from_python_goes_on_and_is_not_needed_to_load(tmp_path):
  """A workdir is its own; whoever only predicts needs not know it."""
  config = helpers.small_config(**{'optimizer.learning_rates': (1e-3,)})
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'

  def train(folder, **options):
    return loop.train(config, str(folder), log=lambda line: None, **options)

  result = train(whole, optimizer=own_adam)
  assert result['config']['optimizer.name'] == 'custom: own_adam'

  def stop(prefix, step, row):
    if prefix == 'test' and step == 10:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train(parts, optimizer=own_adam, hook=stop)
  train(parts, optimizer=own_adam)
  with pytest.raises(config_lib.ConfigError, match=r'optimizer\.name: .custom'):
    train(parts)
  optimizers.REGISTERED.clear()
  first, second = (
    margin_jax.load(folder).variables['params'] for folder in (whole, parts)
  )
  helpers.assert_trees_equal(first, second)


@pytest.mark.parametrize(
  ('optimizer', 'message'),
  [
    (lambda rate: 3, 'is an optax.GradientTransformation, not a <class'),
    (optax.polyak_sgd, 'updates by the gradient, its state and the parameters'),
    (
      lambda rate: optax.add_noise(0.1, 0.5, jax.random.key(0)),
      'keeps numbers in its state',
    ),
    (
      optax.GradientTransformation(lambda p: (), lambda g, s, p: ((), s)),
      'returns updates that are like the parameters',
    ),
    (
      optax.GradientTransformation(lambda p: (), lambda g, s, p: (g, p)),
      'returns a state that is like the one',
    ),
  ],
)
def test_what_does_not_optimize_is_refused_in_a_line(
  optimizer, message, tmp_path
):
  config = helpers.small_config()
  with pytest.raises(config_lib.ConfigError, match=message) as raised:
    loop.train(config, str(tmp_path), optimizer=optimizer)
  assert str(raised.value).startswith("optimizer.name='custom: ")
  assert not [*tmp_path.iterdir()]


def test_what_is_no_optimizer_cannot_be_registered():
  with pytest.raises(ValueError, match=r"'adam' already exists"):
    margin_jax.register_optimizer('adam', optax.adam)
  with pytest.raises(TypeError, match='must be an optax transformation or a'):
    margin_jax.register_optimizer('number', 3)
  with pytest.raises(
    TypeError, match=r'write `def optimizer\(learning_rate\)`'
  ):
    margin_jax.register_optimizer('two', lambda rate, momentum: rate)
