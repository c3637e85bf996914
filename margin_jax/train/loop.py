"""train(config, workdir): data -> steps -> metrics -> checkpoints."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from margin_jax import config as config_lib
from margin_jax import data, files, selection
from margin_jax.data import feeding
from margin_jax.train import devices as devices_lib
from margin_jax.train import evaluation, guard, pool, progress, runs, schema
from margin_jax.train import setup as setup_lib
from margin_jax.train.checkpoints import Checkpoints, CorruptError
from margin_jax.train.compiled import Counters, Program
from margin_jax.train.metrics import summarize
from margin_jax.train.process import Interrupted, Interrupts
from margin_jax.train.reporting import (
  ATTACKED,
  Hook,
  Reporter,
  Silent,
  versions,
)
from margin_jax.train.spec import StepSpec

PyTree = Any


def _name(rule: selection.Rule) -> str:
  """The same in every process; a `repr` may hold an address."""
  while isinstance(rule, functools.partial):
    rule = rule.func
  return getattr(rule, '__qualname__', type(rule).__qualname__)


def _feed(
  config: ml_collections.ConfigDict,
  dataset: data.Source | data.Streamed,
  devices: devices_lib.Devices,
  spec: StepSpec,
  start: int,
) -> feeding.Resident | feeding.Streamed:
  if dataset.resident:
    return feeding.Resident(devices, dataset, spec)
  return feeding.Streamed(
    devices, dataset, spec, start, config.steps, config.seed
  )


class Trainer:
  """A run between two points in time: the compiled step and its state."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    dataset: data.Source,
    devices: devices_lib.Devices,
    checkpoints: Checkpoints,
    spec: StepSpec,
    rule: selection.Rule | None,
    log: Callable[[str], None],
  ):
    """Initialises, or restores the latest checkpoint, and compiles.

    Raises:
      ConfigError: the checkpoint was made by another config, or the
        pretrained weights do not fit.
      CorruptError: there are checkpoints, and none can be read.
    """
    self.config = config
    self.dataset = dataset
    self.spec = spec
    self.saved_config = runs.to_save(config)
    if rule is not None:
      self.saved_config['selection.rule'] = f'custom: {_name(rule)}'
    self.devices = devices
    self.checkpoints = checkpoints
    self.counters = Counters()
    self.best: dict[str, Any] | None = None
    state = setup_lib.init_state(
      config, dataset, spec, restoring=bool(checkpoints.steps())
    )
    state = self._restore(state, log)
    self.start = int(state.step)
    self.state = devices.replicate(state)
    self.feed = _feed(config, dataset, devices, spec, self.start)
    self.splits = tuple(name for name in dataset.counts if name != 'train')
    self.evaluator = evaluation.Evaluator(
      spec,
      evaluation.make_splits(
        devices, dataset, self.splits, config.eval_batch_size
      ),
      setup_lib.make_attack(config),
    )
    self.program = Program(
      spec,
      devices,
      setup_lib.steps_per_call(
        config, devices.platform, self.start, setup_lib.chained(dataset)
      ),
      self.state,
      self.feed,
    )

  def _restore(self, state: PyTree, log: Callable[[str], None]) -> PyTree:
    """The newest checkpoint's state that can be read, or `state`.

    What is newer is moved aside, or its steps could not be saved again.
    """
    corrupt = []
    for step in reversed(self.checkpoints.steps()):
      try:
        info = self.checkpoints.info(step)
        self._check_same_run(info)
        state, info = self.checkpoints.restore(state, step)
      except CorruptError as error:
        corrupt.append((step, error))
        continue
      self.counters = Counters(**info['counters'])
      self.best = info['best']
      for bad, error in corrupt:
        log(f'warning: {error}; going back to step {step:,}')
        if self.devices.is_main_process:
          log(f'warning: it is now {self.checkpoints.quarantine(bad)}')
      if corrupt:
        self.devices.barrier('quarantine')
        self.checkpoints.reload()
      return state
    if corrupt:
      raise CorruptError(
        f'{corrupt[0][1]}, and there is no older one that can be. To start '
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
    kind = self.spec.branch_of(step), self.spec.part_of(step)
    spec = self.spec.at(*kind)

    def drawn(state: PyTree, batch: PyTree) -> PyTree:
      key = jax.random.key(state.seed)
      lane = jax.lax.axis_index(spec.axis)
      return pool.drawn(spec, state, batch, key, lane)

    if self.dataset.resident:
      batch = self.feed(step)
    else:  # whose workers are some steps further
      again = _feed(self.config, self.dataset, self.devices, self.spec, step)
      with contextlib.closing(again):
        batch = again(step)
    program = self.devices.compile(drawn, self.state, batch)
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


def _run(
  trainer: Trainer, reporter: Reporter, interrupts: Interrupts
) -> dict[str, Any]:
  """All remaining steps; returns the last evaluation of every split."""
  config, call = trainer.config, trainer.program.steps_per_call
  windows: list[PyTree] = []
  watch = guard.Watch(
    trainer.state.params,
    devices_lib.MAX_CALLS_AHEAD,
    trainer.devices.process_shard.count == 1,
  )
  # Seconds are of training: evaluations move the start.
  total, started = trainer.counters, _clock(trainer)
  reported = trainer.start

  def report(step: int) -> None:
    nonlocal reported, windows, total
    watch.finish(step)
    metrics, rates = summarize(windows)
    total = total.plus(trainer.program.cost(reported, step))
    total.skipped += int(metrics.pop('skipped', 0))
    elapsed = Counters(
      seconds=_clock(trainer) - started,
      data_wait=trainer.feed.seconds_waited,
      undecodable=trainer.devices.sum(trainer.feed.undecodable),
    )
    trainer.counters = total.plus(elapsed)
    counters = dataclasses.asdict(trainer.counters)
    reporter.train(step, counters, metrics | trainer.devices.memory(), rates)
    reported, windows = step, []

  evaluations = {}
  for step in range(trainer.start + call, config.steps + 1, call):
    metrics = trainer.call(step - call)
    if windows and (step - call) % config.log_every == 0:
      report(step - call)  # a call late: the device is busy with the next
    windows.append(metrics)
    watch.add(step - call, metrics)
    last = step == config.steps
    evaluate = last or step % config.eval_every == 0
    stop = not last and _asked_to_stop(trainer, interrupts, step)
    save = last or stop or step % config.checkpoint_every == 0
    if evaluate or save:
      report(step)
      paused = _clock(trainer)
      accuracy = None
      if evaluate:
        evaluations, accuracy, improved = _evaluate(trainer, reporter, step)
        save = save or improved
      if save:
        trainer.save(step, accuracy)
      started += _clock(trainer) - paused
    if stop:
      trainer.checkpoints.wait()
      raise Interrupted(
        f'stopped at step {step:,} of {config.steps:,}, which is saved; the '
        'same command goes on from there',
        interrupts.number or signal.SIGTERM,
      )
  return evaluations


def _clock(trainer: Trainer) -> float:
  """Seconds, but for those that a first call spent on compiling."""
  return time.perf_counter() - trainer.program.compile_seconds


def _asked_to_stop(trainer: Trainer, interrupts: Interrupts, step: int) -> bool:
  """Whether a signal came, to any process; they ask each other now and then."""
  alone = trainer.devices.process_shard.count == 1
  if alone or step % trainer.config.log_every == 0:
    return trainer.devices.sum(interrupts.number is not None) > 0
  return False


def _keep_pool(
  trainer: Trainer, workdir: str, error: guard.NonFiniteError
) -> guard.NonFiniteError:
  """Writes the pool of the step that failed; the error that says where."""
  kept = trainer.checkpoints.steps()
  text = f'{error}; the last checkpoint is of step {kept[-1] if kept else 0:,}'
  path = pathlib.Path(workdir, f'nonfinite_step_{error.step}.npz')
  try:
    pool = trainer.pool()
    if trainer.devices.is_main_process:
      with files.whole(path) as aside, aside.open('xb') as file:
        np.savez(file, **pool)
    text += f', and what the step read is in {path}'
  except Exception as lost:  # which must not hide what went wrong first
    text += f', and what the step read could not be kept: {lost}'
  return guard.NonFiniteError(text, error.step)


def _evaluate(
  trainer: Trainer, reporter: Reporter, step: int
) -> tuple[dict[str, Any], float | None, bool]:
  """Evaluates every split; whether validation is the best so far."""
  counters = dataclasses.asdict(trainer.counters)
  results = {}
  for split in trainer.splits:
    results[split] = trainer.evaluator(split, trainer.state)
    reporter.evaluation(step, split, counters, results[split])
  results |= _mean_of_tests(results)
  if 'validation' not in results:
    return results, None, False
  accuracy = results['validation']['accuracy']
  improved = trainer.best is None or accuracy >= trainer.best['validation']
  if improved:
    trainer.best = {'step': step, 'validation': accuracy, **_tests(results)}
  return results, accuracy, improved


def _mean_of_tests(results: dict[str, Any]) -> dict[str, dict[str, float]]:
  """Of MNLI, whose two test splits the papers report the mean of."""
  if 'test_mismatched' not in results:
    return {}
  tests = (results['test'], results['test_mismatched'])
  return {'test_mean': {'accuracy': sum(x['accuracy'] for x in tests) / 2}}


def _tests(results: dict[str, Any]) -> dict[str, float]:
  """Accuracy, and F1 where there is one, of all that is to be reported."""
  found = {}
  for name in ('test', 'test_mismatched', 'test_mean'):
    if name in results:
      found[name] = results[name]['accuracy']
      if 'f1' in results[name]:
        found[f'{name}_f1'] = results[name]['f1']
  return found


def _headline(result: dict[str, Any]) -> str:
  """'test accuracy 84.20%', and what else the task is reported by."""
  accuracy, *others = _tests(result).items()
  shown = [f'test accuracy {accuracy[1]:.2%}']
  shown += [f'{name} {value:.2%}' for name, value in others]
  return ', '.join(shown)


def _evaluate_attacked(
  trainer: Trainer, reporter: Reporter
) -> dict[str, dict[str, Any]]:
  """The test split under the attack, by radius."""
  config = trainer.config
  counters = dataclasses.asdict(trainer.counters)
  results = {}
  for epsilon in config.attack.epsilons:
    name = f'{config.attack.name} {epsilon}'
    results[name] = trainer.evaluator('test', trainer.state, epsilon)
    reporter.evaluation(
      config.steps, f'{ATTACKED}{name}', counters, results[name]
    )
  return results


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  rule: selection.Rule | None = None,
  log: Callable[[str], None] = print,
  hook: Hook | None = None,
  view: progress.View | None = None,
) -> dict[str, Any]:
  """Trains as `config` says, and continues where `workdir` stopped.

  The same call again restores the latest checkpoint and ends with the same
  bits as an uninterrupted run. Writes to `workdir`: checkpoints/, train.csv,
  eval.csv, tensorboard/ and, at the end, result.json; with a selection also
  classes.csv (the share of each class that was selected) and, on request,
  selection_counts.npy. Of several processes, the first writes.

  Args:
    config: every field of `config.default()`.
    workdir: a folder, created if need be; "~" is expanded.
    rule: a rule of your own, `(logits, kernel, labels, keys) -> scores`, in
      place of `config.selection.rule`, without a name that configs could use:
      see `register_rule`. It sees one device's share of the pool.
    log: takes the progress lines.
    hook: called as `hook(prefix, step, row)` for every row of train.csv
      (prefix 'train') and of eval.csv ('validation', 'test', ...), with the
      columns' names and numbers, NaN where there is none; on the first process
      only. For Weights & Biases: `hook=lambda prefix, step, row: wandb.log(
      {f'{prefix}/{k}': v for k, v in row.items()}, step=step)`. What it raises
      ends the run; the row is written, and what was saved is kept.
    view: shows training in place of progress lines, `progress.on_terminal()`.

  Returns:
    What result.json holds, that is 'test' and 'validation' at the last step,
    'best' (the step of the best validation accuracy), the cumulative cost,
    'config', 'seed', 'versions', the device, and 'attack': the test split under
    each radius of the attack, if there is one.

  Raises:
    ConfigError: a field is bad, or the workdir holds a run of another config.
    DatasetError: the dataset is missing or broken.
    NonFiniteError: a loss, a gradient, an update or BatchNorm's statistics
      became NaN or infinite, or a score NaN, and `config.on_nonfinite` is
      'stop'. Checkpoints saved before are kept, and what the step read is in
      nonfinite_step_N.npz.
    CorruptError: there are checkpoints, and none can be read.
    SaveError: one could not be written.
    Interrupted: SIGTERM or SIGINT came, and the state is saved.
  """
  workdir = os.path.abspath(os.path.expanduser(workdir))
  schema.validate(config)
  warnings, config = schema.warnings(config), schema.effective(config)
  with Interrupts() as interrupts:
    devices, dataset = setup_lib.load(config, rule, workdir=workdir)
    for line in warnings if devices.is_main_process else ():
      log(line)
    # Before the workdir is touched: the model and its layers may not fit.
    spec = setup_lib.make_spec(config, dataset, devices.total, rule)
    with (
      runs.lock_workdir(workdir, devices),
      contextlib.closing(
        Checkpoints(workdir, config.keep_every, writing=True)
      ) as checkpoints,
    ):
      trainer = Trainer(config, dataset, devices, checkpoints, spec, rule, log)
      return _train(trainer, workdir, interrupts, log, hook, view)


def _train(
  trainer: Trainer,
  workdir: str,
  interrupts: Interrupts,
  log: Callable[[str], None],
  hook: Hook | None,
  view: progress.View | None,
) -> dict[str, Any]:
  """What is left of a run, with its result on disk."""
  config, devices, dataset = trainer.config, trainer.devices, trainer.dataset
  compiled = f'compiled in {trainer.program.compile_seconds:.1f} s; '
  if devices.process_shard.count > 1:
    compiled = ''  # by the first calls
  say = log if devices.is_main_process else (lambda line: None)
  say(
    f'{dataset.name}: {dataset.counts["train"]:,} training '
    f'examples on {devices.total} x {devices.kind}; {compiled}'
    f'starting at step {trainer.start:,}'
  )
  result = None
  if trainer.start == config.steps:
    result = runs.trained(workdir, trainer.saved_config)
  if result is not None and runs.attacked(result, trainer.saved_config):
    say(f'complete: {_headline(result)}')
    return result
  reporter = Silent()
  if devices.is_main_process:
    setup_lib.keep_vocabulary(config, workdir)
    reporter = Reporter(
      workdir,
      steps=config.steps,
      after=trainer.start,
      counters=dataclasses.asdict(trainer.counters),
      best=trainer.best,
      log=log,
      hook=hook,
      view=view,
    )
  with contextlib.closing(reporter):
    if result is None:
      result = _finish(trainer, reporter, interrupts, workdir)
    result['attack'] = _evaluate_attacked(trainer, reporter)
    result['config'] = trainer.saved_config
  if devices.is_main_process:
    _write_result(pathlib.Path(workdir), result, trainer)
    log(
      f'{_headline(result)} after {config.steps:,} steps, '
      f'{trainer.counters.seconds:.1f} s of training'
    )
  return result


def _finish(
  trainer: Trainer, reporter: Reporter, interrupts: Interrupts, workdir: str
) -> dict[str, Any]:
  """Runs the remaining steps; what result.json holds."""
  with contextlib.closing(trainer.feed):
    try:
      results = _run(trainer, reporter, interrupts)
    except guard.NonFiniteError as error:
      raise _keep_pool(trainer, workdir, error) from None
  if not results:  # stopped between the last checkpoint and result.json
    results = {
      name: trainer.evaluator(name, trainer.state) for name in trainer.splits
    }
    results |= _mean_of_tests(results)
  return {
    **results,
    'best': trainer.best,
    'steps': trainer.config.steps,
    'seed': trainer.config.seed,
    **dataclasses.asdict(trainer.counters),
    'compile_seconds': trainer.program.compile_seconds,
    'host_cores': os.cpu_count(),
    'device': trainer.devices.kind,
    'devices': trainer.devices.total,
    'versions': versions(),
  }


def _write_result(
  workdir: pathlib.Path, result: dict[str, Any], trainer: Trainer
) -> None:
  if trainer.config.selection.log_counts:
    counts = np.asarray(trainer.state.counts)
    np.save(workdir / 'selection_counts.npy', counts)
  files.write_json(workdir / 'result.json', result)


PyTree = Any
