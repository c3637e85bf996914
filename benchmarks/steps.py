"""The steps that benchmarks/step_time.py compares, each as a function of time.

A `Run` takes so many steps, waits for them and returns the seconds of one.
"""

import dataclasses
import functools
import os
import subprocess
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from margin_jax import config as config_lib
from margin_jax import cpu, data, margins, selection
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop, schema
from margin_jax.train import setup as setup_lib
from margin_jax.train import step as step_lib

LENGTH, WORDS = 128, 30_522

PyTree = Any
Run = Callable[[int], float]

# What `cpu.tune` asks of the allocator, for another process.
KEPT_PAGES = {
  'MALLOC_MMAP_MAX_': '0',
  'MALLOC_TRIM_THRESHOLD_': str(2**31 - 1),
  'MALLOC_ARENA_MAX': '1',
}

# Of PyTorch: are pages kept, how is the model compiled?
VARIANTS = {
  'as it comes': (False, None),
  'pages kept': (True, None),
  'compiled': (False, 'default'),
  'compiled, pages kept': (True, 'default'),
  'compiled, CUDA graphs': (False, 'graphs'),
}


def make_sentences(examples: int) -> data.Bucketed:
  """Random tokens without padding."""
  rng = np.random.default_rng(0)
  inputs = np.zeros((examples, LENGTH, 2), np.uint16)
  inputs[..., 0] = rng.integers(0, WORDS, (examples, LENGTH))
  ones = np.ones((examples, LENGTH), np.uint16)
  split = {
    'inputs': data.tokens.pack(inputs[..., 0], 0 * ones, ones),
    'label': rng.integers(0, 2, examples).astype(np.int32),
  }
  rows = np.arange(examples)
  return data.Bucketed(
    name='random',
    num_classes=2,
    splits={'train': split, 'test': split},
    rows={'train': rows, 'test': rows},
    augment=lambda key, sentence: sentence,
    prepare=data.tokens.unpack,
    buckets={'train': [(LENGTH, rows)], 'test': [(LENGTH, rows)]},
    vocabulary=WORDS,
  )


def make_config(
  model: str,
  batch: int,
  pool_size: int,
  rule: str,
  dtype: str,
  steps_per_call: int | None = None,
) -> ml_collections.ConfigDict:
  """The recipe of ResNet-44, or of GLUE."""
  config = config_lib.default()
  config.model.name = model
  config.model.dtype = dtype
  config.batch_size, config.pool_size = batch, pool_size
  config.selection.rule = rule
  config.devices = 1
  config.steps_per_call = steps_per_call
  if model.startswith('bert'):
    config.data.name = 'entailment'  # only for the checks of the config
    config.data.augmentations = ()
    config.data.buckets = ()
    config.data.max_length = LENGTH
    config.model.dropout = 0.1
    config.optimizer.name = 'adam'
    config.optimizer.learning_rates = (2e-5,)
  else:
    config.optimizer.weight_decay = 1e-4
  schema.validate(config)
  return config


class Fused:
  """Steps of the trainer's own program."""

  def __init__(self, config: ml_collections.ConfigDict, dataset: data.Dataset):
    """Compiles them."""
    self.devices = devices_lib.Devices(1)
    self.spec = setup_lib.make_spec(config, dataset, 1)
    self.first = setup_lib.init_state(config, dataset, self.spec)
    self.state = self.devices.replicate(self.first)
    self.count = setup_lib.steps_per_call(
      config, self.devices.platform, dataset
    )
    self.loader, self.program = loop.compile_steps(
      config, self.devices, dataset, self.spec, self.state
    )

  @property
  def flops(self) -> float:
    """Of a step, by XLA's count."""
    return self.program.cost(0, 1).flops

  def run(self, steps: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    calls = -(-steps // self.count)
    for call in range(calls):
      self.state, metrics = self.program(call * self.count, self.state)
    jax.block_until_ready((self.state, metrics))
    return (time.perf_counter() - started) / (calls * self.count)

  def fill_memory(self) -> None:
    """Scores all examples at random, as some steps after the warmup."""
    examples = len(self.state.sampler.order)
    rng = np.random.default_rng(0)

    def fill(x: jax.Array) -> jax.Array:
      if x.shape != (examples,):
        return x
      values = rng.standard_normal(examples)
      values = values > 2 if x.dtype == bool else values
      return jax.device_put(values.astype(x.dtype), x.sharding)

    sampler = self.state.sampler
    self.state = self.state.replace(
      sampler=sampler.replace(epoch=sampler.epoch + 1000),
      memory=jax.tree.map(fill, self.state.memory),
    )

  def run_epoch_start(self) -> tuple[float, int]:
    """Seconds of a call that begins an epoch, and the steps of that epoch."""
    sampler = self.state.sampler
    spent = sampler.cursor + len(sampler.order)
    self.state = self.state.replace(sampler=sampler.replace(cursor=spent))
    seconds = self.run(self.count) * self.count
    sampled = int(self.spec.examples_sampled(0))
    return seconds, int(self.state.sampler.count) // sampled

  @property
  def bytes(self) -> dict[str, int]:
    """What a call of the first program needs: 'state', 'temporary'."""
    compiled = self.program.programs[0].memory_analysis()
    return {
      'state': compiled.output_size_in_bytes,
      'temporary': compiled.temp_size_in_bytes,
    }


def in_two_programs(fused: Fused) -> tuple[Run, Run]:
  """MMS as it is usually written, and its forward alone.

  One jitted program scores a pool; the host ranks the scores; another program
  trains on the rows that the host names.
  """
  spec, arrays = fused.spec, fused.loader(0)
  key = jax.random.key(0)

  def on_one_device(function: Callable) -> PyTree:
    found = jax.vmap(function, axis_name=spec.axis_name, axis_size=1)()
    return jax.tree.map(lambda x: x[0], found)

  @jax.jit
  def forward(state, arrays):
    def per_device():
      sampler, pool = step_lib.sample(
        spec, state, arrays, spec.selection.pool_size, key
      )
      scored, _ = step_lib.score(spec, state, pool, key)
      return sampler, pool, margins.mms_scores(scored.logits, scored.kernel)

    return on_one_device(per_device)

  @functools.partial(jax.jit, donate_argnums=0)
  def train(state, pool, rows):
    batch = jax.tree.map(lambda x: x[rows], pool)
    given = types.SimpleNamespace(
      prepare=spec.dataset.prepare,
      sample=lambda *args, **kwargs: (state.sampler, batch),
    )
    plain = dataclasses.replace(spec, selection=None, dataset=given)
    return on_one_device(lambda: step_lib.train_step(plain, state, {}))

  holder = [jax.tree.map(jnp.array, fused.first)]  # a copy: it is donated

  def run(steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
      sampler, pool, scores = forward(holder[0], arrays)
      rows = np.argsort(np.asarray(scores))[: spec.batch_size]
      state = holder[0].replace(sampler=sampler)
      holder[0], metrics = train(state, pool, rows)
    jax.block_until_ready((holder[0], metrics))
    return (time.perf_counter() - started) / steps

  def run_forward(steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
      found = forward(holder[0], arrays)
    jax.block_until_ready(found)
    return (time.perf_counter() - started) / steps

  return run, run_forward


class Selection:
  """Scores, top-k and gather, of logits and a pool that are there."""

  def __init__(
    self, sizes: tuple[int, int, int], batch: int, pool: dict[str, jax.Array]
  ):
    """Compiles it for B examples, C classes, D features, and this pool."""
    examples, classes, features = sizes
    rng = np.random.default_rng(0)
    self.args = (
      jnp.asarray(rng.standard_normal((examples, classes), np.float32)),
      jnp.asarray(rng.standard_normal((features, classes), np.float32)),
      pool,
    )

    @jax.jit
    def select(logits, kernel, pool):
      scores = margins.mms_scores(logits, kernel)
      return selection.take_lowest(scores, pool, batch, None)

    self.compiled = select.lower(*self.args).compile()

  @classmethod
  def of(cls, fused: Fused) -> 'Selection':
    """As in this step."""
    size = fused.spec.selection.pool_size
    features, classes = step_lib.head_kernel(fused.first.params).shape
    pool = {k: fused.loader(0)[k][:size] for k in ('inputs', 'label')}
    return cls((size, classes, features), fused.spec.batch_size, pool)

  @property
  def temporary_bytes(self) -> int:
    """What it needs beside its arguments and its result."""
    return self.compiled.memory_analysis().temp_size_in_bytes

  def run(self, steps: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for _ in range(steps):
      found = self.compiled(*self.args)
    jax.block_until_ready(found)
    return (time.perf_counter() - started) / steps


class Torch:
  """A process that runs PyTorch.

  Attributes:
    version: what it says it is.
  """

  def __init__(
    self,
    python: str,
    model: str,
    sizes: tuple[int, int],
    variant: str,
    dtype: str,
  ):
    """Starts it, on the kind of device that JAX has here.

    `variant` is one of VARIANTS.
    """
    batch, pool_size = sizes
    command = [
      python, '-m', 'benchmarks.torch_steps', model, f'--batch={batch}',
      f'--pool={pool_size}', f'--dtype={dtype}',
      f'--device={"cpu" if cpu.is_default() else "cuda"}',
    ]  # fmt: skip
    kept, compiled = VARIANTS[variant]
    if compiled is not None:
      command.append(f'--compile={compiled}')
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      env={**os.environ, **(KEPT_PAGES if kept else {})},
    )  # fmt: skip
    self.version = self._answer()

  def _answer(self) -> str:
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(
        'error: the process with PyTorch stopped, see above. --torch_python '
        'names a Python that has it (none leaves it out), --torch variants'
      )
    return line.strip()

  def run(self, kind: str) -> Run:
    """Steps of a kind."""

    def run(steps: int) -> float:
      self.process.stdin.write(f'{kind} {steps}\n')
      self.process.stdin.flush()
      return float(self._answer())

    return run

  def close(self) -> None:
    """Ends it."""
    self.process.stdin.close()
    self.process.wait()
