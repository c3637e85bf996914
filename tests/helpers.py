"""Small runs that several tests share."""

import csv
import functools
import pathlib
import shlex
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import config as config_lib
from margin_jax import data, selection
from margin_jax.compare import methods as methods_lib
from margin_jax.train import compiled as compiled_lib
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop, schema
from margin_jax.train import setup as setup_lib
from margin_jax.train.checkpoints import Checkpoints
from margin_jax.train.workdirs import Workdir

ROOT = pathlib.Path(__file__).parent.parent


def slow(*values):
  """Parameters of a test with which it is slow; a tuple holds several."""
  rows = (x if isinstance(x, tuple) else (x,) for x in values)
  return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def long(*values):
  """Those with which it is so slow that .ci/run leaves it out."""
  marks = pytest.mark.slow, pytest.mark.long
  rows = (x if isinstance(x, tuple) else (x,) for x in values)
  return [pytest.param(*row, marks=marks) for row in rows]


def small_config(**fields):
  """Digits, CNN, b=8 of B=32, 20 steps; `fields` by dotted name."""
  config = config_lib.default()
  config.steps = 20
  config.batch_size = 8
  config.pool_size = 32
  config.devices = 1
  config.log_every = 5
  config.eval_every = 10
  config.checkpoint_every = 10
  config.eval_batch_size = 100
  config.data.validation_examples = 180
  config.data.augmentations = ('crop',)
  config.data.crop_padding = 1
  config.optimizer.learning_rates = (0.05,)
  config.optimizer.weight_decay = 1e-4
  config.selection.rule = 'mms'
  config.mmr.alpha = 1e-4
  if 'crop' not in fields.get('data.augmentations', ('crop',)):
    config.data.crop_padding = 4  # its default
  with config.unlocked():
    for name, value in fields.items():
      config.update_from_flattened_dict({name: value})
  schema.validate(config)
  return config


@functools.cache
def digits():
  """The digits as `small_config` reads them."""
  return data.load(
    'digits',
    validation_examples=180,
    augmentations=('crop',),
    crop_padding=1,
  )


@functools.cache
def noise():
  """RGB noise whose brightness tells two classes, for BatchNorm networks."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, 2, 96).astype(np.int32)
  inputs = rng.integers(0, 200, (96, 12, 12, 3))
  inputs += 50 * label.reshape(-1, 1, 1, 1)
  split = {'inputs': inputs.astype(np.uint8), 'label': label}
  return data.InMemory(
    name='noise',
    num_classes=2,
    splits={'train': split, 'test': split},
    rows={'train': np.arange(96), 'test': np.arange(96)},
    augment=lambda key, image: image,
    prepare=data.normalizer(split['inputs'], 'dataset'),
  )


class Setup:
  """A step outside the trainer, compiled when it is first asked for."""

  def __init__(self, steps_per_call=1, dataset=None, rule=None, **fields):
    self.config = small_config(**fields)
    self.dataset = dataset or digits()
    self.devices = devices_lib.Devices(self.config.devices)
    self.spec = setup_lib.make_spec(
      self.config, self.dataset, self.devices.total, rule
    )
    self._steps_per_call = steps_per_call
    self._state = setup_lib.init_state(self.config, self.dataset, self.spec)
    self.first = jax.tree.map(np.array, jax.device_get(self._state))
    sizes = self.spec.sizes(self.config.steps)
    self.loader = self.dataset.loader(self.devices, sizes, 0, self.config.seed)
    self.data = self.loader(0)

  @functools.cached_property
  def program(self):
    return compiled_lib.Program(
      self.spec,
      self.devices,
      self.loader,
      self.devices.replicate(self._state),
      self.config.steps,
      self._steps_per_call,
    )

  def run(self, calls):
    """The state and the metrics of each step after so many calls."""
    state = self.devices.replicate(self.first)
    metrics = []
    for call in range(calls):
      state, values = self.program(call * self.program.steps_per_call, state)
      metrics.append(jax.device_get(values))
    stacked = {
      name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]
    }
    return jax.device_get(state), stacked


def sampler(dataset, size, devices=1):
  """Samples as so many devices do: (state, data, key, step) -> state, all."""

  @jax.jit
  def sample(state, data, key, step):
    def per_device():
      return dataset.sample(
        state, data, size, key=key, step=step, axis_name='device'
      )

    return jax.vmap(per_device, axis_name='device', axis_size=devices)()

  def run(state, data, key, step):
    states, shards = sample(state, data, key, jnp.int32(step))
    for state in jax.tree.leaves(states):
      np.testing.assert_array_equal(state, state[:1].repeat(devices, 0))
    first = jax.tree.map(lambda x: x[0], states)
    return first, jax.tree.map(lambda x: np.concatenate([*x]), shards)

  return run


def first_pool(setup, size=32):
  """The examples that the first step of seed 0 scores, or trains on."""
  key = jax.random.fold_in(jax.random.key(0), 2)
  state = setup.dataset.state()
  return sampler(setup.dataset, size)(state, setup.data, key, 0)[1]


def scored(logits, kernel, labels, keys, features=None):
  """What a rule reads; features of zeros where the rule is not about them."""
  if features is None:
    features = jnp.zeros((len(logits), 1 if kernel is None else len(kernel)))
  index = None if labels is None else jnp.arange(len(labels))
  return selection.Scored(logits, features, kernel, labels, index, keys)


def assert_trees_equal(first, second):
  """Bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, first, second)


def assert_trees_close(first, second, tolerance):
  """Within an absolute and relative tolerance."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=tolerance, atol=tolerance
    ),
    first,
    second,
  )


class Interrupted(Exception):
  """Raised from a progress line, where a kill might have come."""


def train(workdir, *, interrupt_at=None, **fields):
  """The result and the log of a run of `small_config`."""
  lines = []

  def log(line):
    lines.append(line)
    if interrupt_at is not None and f'step {interrupt_at}/' in line:
      raise Interrupted

  config = small_config(**fields)
  return loop.train(config, str(workdir), log=log), lines


def saved_state(workdir, **fields):
  """The latest checkpoint's state and info."""
  config = small_config(**fields)
  dataset = digits()
  target = setup_lib.init_state(
    config, dataset, setup_lib.make_spec(config, dataset, 1)
  )
  checkpoints = Checkpoints(Workdir(workdir))
  restored = checkpoints.restore(target)
  checkpoints.close()
  return restored


def read_csv(path):
  """The rows, as dictionaries of text."""
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def make_config(fields):
  """The default with `fields` by dotted name, of whatever type."""
  config = config_lib.default()
  with config.unlocked(), config.ignore_type():
    for name, value in fields.items():
      *path, leaf = name.split('.')
      section = config
      for part in path:
        section = section[part]
      with section.unlocked(), section.ignore_type():
        section[leaf] = value
  return config


def trials_of(config, methods, sweep=()):
  """Returns the trials of a comparison."""
  parsed = methods_lib.parse_methods(methods, config)
  return methods_lib.make_trials(
    config, parsed, methods_lib.parse_sweep(sweep, config)
  )


def command_of(message):
  """The words of the command that a message tells the user to run."""
  return shlex.split(message[message.index('python') :].partition(' -- ')[0])


def free_port():
  """A port that nobody listens on."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]
