"""train(config, workdir): data -> steps -> metrics -> checkpoints."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from margin_jax import (
  build,
  data,
  evaluation,
  feeding,
  files,
  initial,
  parallel,
  selection,
  sources,
)
from margin_jax import config as config_lib
from margin_jax.checkpoints import Checkpoints
from margin_jax.method import Method
from margin_jax.metrics import summarize
from margin_jax.program import Counters, Program
from margin_jax.reporting import Reporter, Silent, versions

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
  ):
    """Initialises, or restores the latest checkpoint, and compiles.

    Raises:
      ConfigError: the checkpoint was made by another config, or the
        pretrained weights do not fit.
    """
    self.config = config
    self.saved_config = config_lib.as_json(config)
    if rule is not None:
      self.saved_config['selection.rule'] = f'custom: {_name(rule)}'
    self.devices = devices
    self.checkpoints = checkpoints
    self.counters = Counters()
    self.best: dict[str, Any] | None = None
    info = checkpoints.info()
    state = initial.init_state(
      config, source, method, restoring=info is not None
    )
    if info is not None:
      self._check_same_run(info)
      state, info = checkpoints.restore(state)
      self.counters = Counters(**info['counters'])
      self.best = info['best']
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

  def _check_same_run(self, info: dict[str, Any]) -> None:
    changed = config_lib.differences(info['config'], self.saved_config)
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
      'counters': dataclasses.asdict(self.counters),
      'best': self.best,
    }
    self.checkpoints.save(self.state, info, accuracy)


def _run(trainer: Trainer, reporter: Reporter) -> dict[str, Any]:
  """All remaining steps; returns the last evaluation of every split."""
  config, call = trainer.config, trainer.program.steps_per_call
  windows: list[PyTree] = []
  # The clock runs while the device trains, and not while it evaluates.
  total, started = trainer.counters, time.perf_counter()
  reported = trainer.start

  def report(step: int) -> None:
    nonlocal reported, windows, total
    metrics, class_rates = summarize(reported, windows)
    total = total.plus(trainer.program.cost(reported, step))
    elapsed = Counters(
      seconds=time.perf_counter() - started,
      data_wait=trainer.feed.seconds_waited,
    )
    trainer.counters = total.plus(elapsed)
    counters = dataclasses.asdict(trainer.counters)
    reporter.train(step, counters, metrics, class_rates)
    reported, windows = step, []

  evaluations = {}
  for step in range(trainer.start + call, config.steps + 1, call):
    metrics = trainer.call(step - call)
    if windows and (step - call) % config.log_every == 0:
      report(step - call)  # a call late: the device is busy with the next
    windows.append(metrics)
    parallel.wait_for_old(windows)
    last = step == config.steps
    evaluate = last or step % config.eval_every == 0
    save = last or step % config.checkpoint_every == 0
    if evaluate or save:
      report(step)
      paused = time.perf_counter()
      accuracy = None
      if evaluate:
        evaluations, accuracy, improved = _evaluate(trainer, reporter, step)
        save = save or improved
      if save:
        trainer.save(step, accuracy)
      started += time.perf_counter() - paused
      reporter.restart_clock(step)
  return evaluations


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
      config.steps, f'test under {name}', counters, results[name]
    )
  return results


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  rule: selection.Rule | None = None,
  log: Callable[[str], None] = print,
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
      place of `config.selection.rule`. It sees one device's share of the pool.
    log: takes the progress lines.

  Returns:
    What result.json holds: 'test' and 'validation' at the last step, 'best'
    (the step of the best validation accuracy), the cumulative cost, 'config',
    'seed', 'versions', the device, and 'attack': the test split under each
    radius of the attack, if there is one.

  Raises:
    ConfigError: a field is bad, or the workdir holds a run of another config.
    DatasetError: the dataset is missing or broken.
    NonFiniteError: loss or gradient became NaN or infinite; checkpoints
      saved before are kept.
  """
  workdir = os.path.abspath(os.path.expanduser(workdir))
  devices, source = sources.load(config, rule, workdir=workdir)
  # Before the workdir is touched: the model and its layers may not fit.
  method = build.make_method(config, source, devices.total, rule)
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise config_lib.ConfigError(f'workdir={workdir!r}: {error}') from error
  with contextlib.closing(
    Checkpoints(workdir, config.keep_every)
  ) as checkpoints:
    trainer = Trainer(config, source, devices, checkpoints, method, rule)
    compiled = trainer.program.compile_seconds
    say = log if devices.primary else (lambda line: None)
    say(
      f'{source.name}: {source.counts["train"]:,} training '
      f'examples on {devices.total} x {devices.kind}; compiled in '
      f'{compiled:.1f} s; starting at step {trainer.start:,}'
    )
    result = _stored(pathlib.Path(workdir), trainer)
    if result is not None and not _other_attack(result, trainer):
      say(f'complete: {_headline(result)}')
      return result
    reporter = Silent()
    if devices.primary:
      sources.keep_vocabulary(config, workdir)
      reporter = Reporter(
        workdir, steps=config.steps, after=trainer.start, log=log
      )
    with contextlib.closing(reporter):
      if result is None:
        result = _finish(trainer, reporter)
      result['attack'] = _evaluate_attacked(trainer, reporter)
      result['config'] = trainer.saved_config
  if devices.primary:
    _write_result(pathlib.Path(workdir), result, trainer)
    log(
      f'{_headline(result)} after {config.steps:,} steps, '
      f'{trainer.counters.seconds:.1f} s of training'
    )
  return result


def _stored(workdir: pathlib.Path, trainer: Trainer) -> dict[str, Any] | None:
  """The result of a run that is complete; None if it is not.

  Its seconds and versions are those of the machine that trained.
  """
  path = workdir / 'result.json'
  if trainer.start != trainer.config.steps or not path.exists():
    return None
  result = json.loads(path.read_text())
  # A run that was made longer may have been killed before it wrote its own.
  return result if result['steps'] == trainer.config.steps else None


def _other_attack(result: dict[str, Any], trainer: Trainer) -> bool:
  """Whether the test split was not evaluated under this config's attack."""
  return any(
    result['config'].get(name) != value
    for name, value in trainer.saved_config.items()
    if name.startswith('attack.')
  )


def _finish(trainer: Trainer, reporter: Reporter) -> dict[str, Any]:
  """Runs the remaining steps; what result.json holds."""
  with contextlib.closing(trainer.feed):
    results = _run(trainer, reporter)
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
