"""A run between two points in time: the compiled step, its state, its files."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from margin_jax import (
  build,
  data,
  evaluation,
  feeding,
  initial,
  parallel,
  pool,
  runs,
  selection,
)
from margin_jax import config as config_lib
from margin_jax.checkpoints import Checkpoints, DamagedError
from margin_jax.method import Method
from margin_jax.program import Counters, Program

PyTree = Any


def _name(rule: selection.Rule) -> str:
  """The same in every process; a `repr` may hold an address."""
  while isinstance(rule, functools.partial):
    rule = rule.func
  return getattr(rule, '__qualname__', type(rule).__qualname__)


def _feed(
  config: ml_collections.ConfigDict,
  source: data.Source | data.Streamed,
  devices: parallel.Devices,
  method: Method,
  start: int,
) -> feeding.Resident | feeding.Streamed:
  if source.resident:
    return feeding.Resident(devices, source, method)
  return feeding.Streamed(
    devices, source, method, start, config.steps, config.seed
  )


class Trainer:
  """A run between two points in time: the compiled step and its state."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    source: data.Source,
    devices: parallel.Devices,
    checkpoints: Checkpoints,
    method: Method,
    rule: selection.Rule | None,
    log: Callable[[str], None],
  ):
    """Initialises, or restores the latest checkpoint, and compiles.

    Raises:
      ConfigError: the checkpoint was made by another config, or the
        pretrained weights do not fit.
      DamagedError: there are checkpoints, and none can be read.
    """
    self.config = config
    self.source = source
    self.method = method
    self.saved_config = runs.to_save(config)
    if rule is not None:
      self.saved_config['selection.rule'] = f'custom: {_name(rule)}'
    self.devices = devices
    self.checkpoints = checkpoints
    self.counters = Counters()
    self.best: dict[str, Any] | None = None
    state = initial.init_state(
      config, source, method, restoring=bool(checkpoints.steps())
    )
    state = self._restore(state, log)
    self.start = int(state.step)
    self.state = devices.replicate(state)
    self.feed = _feed(config, source, devices, method, self.start)
    self.splits = tuple(name for name in source.counts if name != 'train')
    self.evaluator = evaluation.Evaluator(
      method,
      evaluation.make_splits(
        devices, source, self.splits, config.eval_batch_size
      ),
      build.make_attack(config),
    )
    self.program = Program(
      method,
      devices,
      build.steps_per_call(
        config, devices.platform, self.start, build.chained(source)
      ),
      self.state,
      self.feed,
    )

  def _restore(self, state: PyTree, log: Callable[[str], None]) -> PyTree:
    """The newest checkpoint's state that can be read, or `state`.

    What is newer is moved aside, or its steps could not be saved again.
    """
    damaged = []
    for step in reversed(self.checkpoints.steps()):
      try:
        info = self.checkpoints.info(step)
        self._check_same_run(info)
        state, info = self.checkpoints.restore(state, step)
      except DamagedError as error:
        damaged.append((step, error))
        continue
      self.counters = Counters(**info['counters'])
      self.best = info['best']
      for bad, error in damaged:
        log(f'warning: {error}; going back to step {step:,}')
        if self.devices.primary:
          log(f'warning: it is now {self.checkpoints.set_aside(bad)}')
      if damaged:
        self.devices.meet('set aside')
        self.checkpoints.reload()
      return state
    if damaged:
      raise DamagedError(
        f'{damaged[0][1]}, and there is no older one that can be. To start '
        'anew, move the folder away or name another workdir'
      )
    return state

  def _check_same_run(self, info: dict[str, Any]) -> None:
    changed = config_lib.differences(info['config'], self.saved_config)
    before, now = info.get('devices'), self.devices.total
    bound = config_lib.binds_devices(self.saved_config)
    if bound and before not in (None, now) and not changed:
      changed = [f'devices: {before} -> {now}']  # both are all that JAX sees
    if changed:
      raise config_lib.ConfigError(
        'the checkpoint in the workdir was made by another config; go back to '
        'it, or use another workdir:\n  ' + '\n  '.join(changed)
      )
    if info['step'] > self.config.steps:
      raise config_lib.ConfigError(
        f'steps={self.config.steps} is not allowed: the checkpoint in the '
        f'workdir is at step {info["step"]} already'
      )

  def pool(self) -> PyTree:
    """The examples that the step which `state` is at reads, on the host."""
    state = jax.device_get(self.state)
    step = int(state.step)
    kind = self.method.branch_of(step), self.method.part_of(step)
    method = self.method.at(*kind)

    def drawn(state: PyTree, batch: PyTree, lane: jax.Array) -> PyTree:
      key = jax.random.key(state.seed)
      return pool.drawn(method, state, batch, key, lane)

    if self.source.resident:
      batch, sharded = self.feed(step), ()
    else:  # whose workers are some steps further
      again = _feed(self.config, self.source, self.devices, self.method, step)
      with contextlib.closing(again):
        batch, sharded = again(step), (1,)
    program = self.devices.compile(drawn, self.state, batch, sharded=sharded)
    return jax.device_get(program(self.state, batch))

  def call(self, step: int) -> PyTree:
    """Dispatches the call at `step`; its metrics are still on the device."""
    batch = self.feed(step)
    self.state, metrics = self.program(step, self.state, batch)
    return metrics

  def save(self, step: int, accuracy: float | None) -> None:
    """Saves a checkpoint of the state, which is at `step`."""
    info = {
      'step': step,
      'config': self.saved_config,
      'devices': self.devices.total,
      'counters': dataclasses.asdict(self.counters),
      'best': self.best,
    }
    self.checkpoints.save(self.state, info, accuracy)
