"""train(config, workdir): set up, restore, run, evaluate, save."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from margin_jax import config as config_lib
from margin_jax import (
  data,
  files,
  optimizers,
  registry,
  selection,
  terminal,
)
from margin_jax.data import description
from margin_jax.train import devices as devices_lib
from margin_jax.train import (
  evaluation,
  guard,
  progress,
  runs,
  schema,
  vocabulary,
  workdirs,
)
from margin_jax.train import metrics as metrics_lib
from margin_jax.train import setup as setup_lib
from margin_jax.train import step as step_lib
from margin_jax.train.checkpoints import Checkpoints, CorruptError
from margin_jax.train.compiled import Counters, Program
from margin_jax.train.process import Interrupted, Interrupts
from margin_jax.train.reporting import (
  ATTACKED,
  Hook,
  Reporter,
  Silent,
  versions,
)
from margin_jax.train.spec import StepSpec
from margin_jax.train.workdirs import Workdir
from margin_jax.trained import Trained

# What a dataset's description must keep while a run goes on.
UNCHANGED = (
  'examples', 'num_classes', 'input_shape', 'input_dtype', 'vocabulary'
)  # fmt: skip

PyTree = Any
Log = Callable[[str], None]


@dataclasses.dataclass
class Run:
  """A run between two steps: what it is made of, and where it stands.

  Attributes:
    config: validated.
    workdir: its place.
    devices, dataset, spec: as `setup` makes them of the config.
    checkpoints: the checkpoints of the workdir.
    saved_config: what checkpoints and result.json keep of the config.
    state: on the devices; it is donated to each call.
    start: the step at which this process began.
    counters: what the run has cost so far.
    best: the evaluations at the step of the best validation accuracy, or None.
    pending: the last row of train.csv, its 'step' and 'counters', and the
      'metrics' of the steps since, if the run was stopped between two rows.
    loader, program, evaluator: that feed, run and evaluate the steps.
  """

  config: ml_collections.ConfigDict
  workdir: Workdir
  devices: devices_lib.Devices
  dataset: data.Dataset
  spec: StepSpec
  checkpoints: Checkpoints
  saved_config: dict[str, Any]
  state: step_lib.TrainState
  start: int
  counters: Counters
  best: dict[str, Any] | None
  pending: dict[str, Any] | None
  loader: data.Loader
  program: Program
  evaluator: evaluation.Evaluator

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits to evaluate."""
    return tuple(name for name in self.dataset.counts if name != 'train')

  @property
  def last_row(self) -> tuple[int, dict[str, Any]]:
    """The step of the last row of train.csv, and what was spent up to it."""
    if self.pending:
      return self.pending['step'], self.pending['counters']
    return self.start, dataclasses.asdict(self.counters)


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  rule: selection.RuleFunction | None = None,
  optimizer: optimizers.Factory | optax.GradientTransformation | None = None,
  log: Log = print,
  hook: Hook | None = None,
  view: progress.View | None = None,
  wait: terminal.Wait = terminal.do_not_show,
) -> dict[str, Any]:
  """Trains as `config` says, and continues where `workdir` stopped.

  If you call it again, it restores the latest checkpoint and ends with the same
  bits as an uninterrupted run. It writes to `workdir`: checkpoints/, train.csv,
  eval.csv, tensorboard/ and, at the end, result.json. A run that scores pools
  also writes classes.csv (the fraction of each class that was selected); with
  `selection.log_counts` it writes selection_counts.npy, and with sentences
  vocab.txt. With several processes, the first one writes.

  Args:
    config: every field of `config.default()`.
    workdir: a folder, created if need be; "~" is expanded.
    rule: your own rule, `scored -> scores`, in place of
      `config.selection.rule`. It sees one device's shard of the pool or, with
      `config.selection.memory`, of the batch. To give a rule a name that
      configs can use, see `register_rule`.
    optimizer: your own optax transformation, or a function of the learning rate
      that returns one, in place of `config.optimizer.name`: see
      `register_optimizer`.
    log: takes the progress lines.
    hook: called as `hook(prefix, step, row)` for every row of train.csv (prefix
      'train') and of eval.csv ('validation', 'test', ...), where row maps
      column names to numbers, NaN where there is none. Only the first process
      calls it. For Weights & Biases: `hook=lambda prefix, step, row: wandb.log(
      {f'{prefix}/{k}': v for k, v in row.items()}, step=step)`. If it raises,
      the run ends; the row is written, and saved files are kept.
    view: shows training in place of progress lines: `progress.on_terminal()`.
    wait: shows what is being loaded or compiled: `terminal.wait`.

  Returns:
    What result.json holds: 'test' and 'validation' at the last step, 'best'
    (the step of the best validation accuracy), the cumulative cost, 'config',
    'seed', 'versions', the device, and, if there is an attack, 'attack': the
    test split under each epsilon.

  Raises:
    ConfigError: a field is bad, or the workdir holds a run of another config.
    DatasetError: the dataset is missing or broken.
    NonFiniteError: a loss, a gradient, an update or BatchNorm's statistics
      became NaN or infinite, or a score NaN, and `config.on_nonfinite` is
      'stop'. Earlier checkpoints are kept, and nonfinite_step_N.npz holds the
      examples of the step.
    FileError: a table of the workdir, or its result, is not what was written,
      or the workdir is gone.
    CorruptError: there are checkpoints, but none can be read.
    SaveError: a checkpoint could not be written.
    Interrupted: SIGTERM, SIGINT or SIGHUP came, and the state is saved.
  """
  if optimizer is not None:
    config = registry.with_optimizer(config, optimizer)
  complete = say_if_complete(config, workdir, log, rule)
  if complete is not None:
    return complete
  warnings, config = schema.warnings(config), schema.effective(config)
  with contextlib.ExitStack() as stack:
    interrupts = stack.enter_context(Interrupts())
    place = stack.enter_context(workdirs.opened(workdir))
    place.refresh()

    # Set up. The workdir is untouched until the model is known to fit the data.
    with wait(f'loading {config.data.name}'):
      devices, dataset = setup_lib.load(config, rule, workdir=str(place.folder))
    main = devices.is_main_process

    def say(line: str) -> None:
      if main:
        log(place.named(line))

    for line in (*warnings, *schema.idle_memory(config, dataset.counts)):
      say(line)
    spec = setup_lib.make_spec(config, dataset, devices.total, rule)
    source = runs.attack_source(config, dataset, place)
    stack.enter_context(runs.lock_workdir(place, devices))
    checkpoints = stack.enter_context(
      contextlib.closing(Checkpoints(place, config.keep_every, writing=True))
    )

    # Restore.
    saved_config = runs.to_save(config, rule)
    state = setup_lib.init_state(
      config, dataset, spec, restoring=bool(checkpoints.steps())
    )
    state, info = _restore(
      state, config, saved_config, checkpoints, dataset, devices, say
    )
    start = int(state.step)
    result = None
    if start == config.steps or not checkpoints.steps():
      # Also of a run whose checkpoints somebody has removed.
      result = runs.trained(place.folder, saved_config)
    if result is not None and runs.attacked(result, saved_config):
      say(f'already complete: {_headline(result)}')
      return result
    if start == config.steps and result is None:
      _check_evaluated(info, dataset, checkpoints.accuracy(start))
    if start < config.steps:
      result = None

    # Compile.
    state = devices.replicate(state)
    with wait(f'compiling the steps of {config.model.name}'):
      loader, program = compile_steps(config, devices, dataset, spec, state)
    stack.callback(loader.close)
    run = Run(
      config=config,
      workdir=place,
      devices=devices,
      dataset=dataset,
      spec=spec,
      checkpoints=checkpoints,
      saved_config=saved_config,
      state=state,
      start=start,
      counters=Counters(**info['counters']),
      best=info['best'],
      pending=info.get('pending'),
      loader=loader,
      program=program,
      evaluator=_evaluator(config, devices, dataset, spec, source),
    )
    say(_opening(run))

    # Run the steps that are left, and evaluate.
    with contextlib.closing(
      _reporter(run, result, log, hook, view)
    ) as reporter:
      if result is None:
        result = _result(run, _run_steps(run, reporter, interrupts))
      # Keeps the results of earlier attacks.
      result['attack'] = {
        **result.get('attack', {}),
        **_evaluate_attacked(run, reporter),
      }
      result['config'] = run.saved_config

    # Save. A result beside an older checkpoint would be of another network.
    checkpoints.wait()
    if main:
      _write_result(run, result)
      place.publish()
    say(
      f'{_headline(result)} after {config.steps:,} steps, '
      f'{run.counters.seconds:.1f} s of training'
    )
    return result


def say_if_complete(
  config: ml_collections.ConfigDict,
  workdir: str,
  log: Log,
  rule: selection.RuleFunction | None = None,
) -> dict[str, Any] | None:
  """Returns the result of a run that has nothing left to do, and says so.

  It needs no devices, and reads neither data nor checkpoints. Where the data
  are files of the user, they must be there: their digests tell them.

  Args:
    config, workdir, log, rule: those of `train`.

  Returns:
    The result; None if the run is not complete, or several processes would
    have to agree on it.

  Raises:
    ConfigError: a field is bad.
  """
  schema.validate(config)
  if jax.distributed.is_initialized():
    return None
  result = None
  with workdirs.opened(workdir) as place:
    place.refresh()
    # What is wrong with a workdir, its checkpoints tell better.
    with contextlib.suppress(config_lib.ConfigError, files.FileError):
      result = runs.complete(place.folder, runs.to_save(config, rule))
  if result is not None:
    log(f'already complete: {_headline(result)}')
  return result


def compile_steps(
  config: ml_collections.ConfigDict,
  devices: devices_lib.Devices,
  dataset: data.Dataset,
  spec: StepSpec,
  state: step_lib.TrainState,
) -> tuple[data.Loader, Program]:
  """Returns what feeds the steps from `state` on, and the compiled steps."""
  start = int(state.step)
  sizes = spec.sizes(config.steps)
  loader = dataset.loader(devices, sizes, start, config.seed)
  steps_per_call = setup_lib.steps_per_call(
    config, devices.platform, dataset, start
  )
  program = Program(spec, devices, loader, state, config.steps, steps_per_call)
  return loader, program


def _restore(
  state: step_lib.TrainState,
  config: ml_collections.ConfigDict,
  saved_config: dict[str, Any],
  checkpoints: Checkpoints,
  dataset: data.Dataset,
  devices: devices_lib.Devices,
  log: Log,
) -> tuple[step_lib.TrainState, dict[str, Any]]:
  """Returns the newest checkpoint that can be read, or `state` without one.

  Newer ones that cannot are quarantined, or their steps could not be saved
  again.

  Returns:
    The state, and what the checkpoint holds about the run: 'counters', 'best'
    and, if an evaluation is still to be reported, 'pending'.

  Raises:
    ConfigError: the checkpoint was made by another config, or from other data.
    CorruptError: there are checkpoints, but none can be read.
  """
  corrupt = []
  for step in reversed(checkpoints.steps()):
    try:
      info = checkpoints.info(step)
      _check_same_run(info, config, saved_config, devices)
      _check_same_data(info, dataset)
      state, info = checkpoints.restore(state, step)
    except CorruptError as error:
      corrupt.append((step, error))
      continue
    for bad, error in corrupt:
      log(f'warning: {error}; going back to step {step:,}')
      if devices.is_main_process or not checkpoints.shared:
        log(f'warning: it is now {checkpoints.quarantine(bad)}')
    if corrupt:
      devices.barrier('quarantine')
      checkpoints.reload()
    return state, info
  if corrupt:
    raise CorruptError(
      f'{corrupt[0][1]}, and there is no older one that can be used. To start '
      'anew, move the folder away or name another workdir'
    )
  return state, {'counters': {}, 'best': None}


def _check_same_run(
  info: dict[str, Any],
  config: ml_collections.ConfigDict,
  saved_config: dict[str, Any],
  devices: devices_lib.Devices,
) -> None:
  """Raises a ConfigError unless a checkpoint is of the run to continue."""
  changed = config_lib.differences(info['config'], saved_config)
  before, now = info.get('devices'), devices.total
  bound = config_lib.binds_devices(saved_config)
  if bound and before not in (None, now) and not changed:
    changed = [f'devices: {before} -> {now}']  # both are all that JAX sees
  if changed:
    raise config_lib.ConfigError(
      'the checkpoint in the workdir was made by another config; go back to '
      'it, or use another workdir:\n  ' + '\n  '.join(changed)
    )
  if info['step'] > config.steps:
    raise config_lib.ConfigError(
      f'steps={config.steps} is not allowed: the checkpoint in the workdir is '
      f'already at step {info["step"]}'
    )


def _check_same_data(info: dict[str, Any], dataset: data.Dataset) -> None:
  """Raises a ConfigError if a checkpoint is of a dataset that was another."""
  now = description.to_json(dataset)
  changed = [
    f'{name}: {before} -> {now[name]}'
    for name, before in (info.get('dataset') or {}).items()
    if name in UNCHANGED and before != now[name]
  ]
  if changed:
    raise config_lib.ConfigError(
      f'the checkpoint in the workdir was made from other data of '
      f'{dataset.name!r}; go back to them, or use another workdir:\n  '
      + '\n  '.join(changed)
    )


def _check_evaluated(
  info: dict[str, Any], dataset: data.Dataset, accuracy: float | None
) -> None:
  """Raises a ConfigError if the last checkpoint lacks its evaluation.

  The number of steps was lowered to where the run was stopped.
  """
  unknown = 'validation' in dataset.counts and accuracy is None
  if info.get('pending') or unknown:
    step = info['step']
    raise config_lib.ConfigError(
      f'steps={step} is not allowed: the run was stopped there, without an '
      f'evaluation; it must be above {step}'
    )


def _evaluator(
  config: ml_collections.ConfigDict,
  devices: devices_lib.Devices,
  dataset: data.Dataset,
  spec: StepSpec,
  source: Trained | None,
) -> evaluation.Evaluator:
  names = tuple(name for name in dataset.counts if name != 'train')
  chunks = dataset.chunks(devices, names, config.eval_batch_size)
  attack = setup_lib.make_attack(config)
  return evaluation.Evaluator(spec, chunks, attack, source)


def _opening(run: Run) -> str:
  """Returns the first line of a run."""
  compiled = f'compiled in {run.program.compile_seconds:.1f} s; '
  if run.devices.process_shard.count > 1:
    compiled = ''  # by the first calls
  return (
    f'{run.dataset.name}: {run.dataset.counts["train"]:,} training examples on '
    f'{run.devices.total} x {run.devices.kind}; {compiled}starting at step '
    f'{run.start:,}'
  )


def _reporter(
  run: Run,
  result: dict[str, Any] | None,
  log: Log,
  hook: Hook | None,
  view: progress.View | None,
) -> Reporter:
  """Opens the files of the run, which may have a result to be attacked."""
  earlier = {*(result or {}).get('attack', {})}
  attacks = earlier - {*runs.attack_names(run.saved_config)}
  if not run.devices.is_main_process:
    return Silent()
  vocabulary.keep(run.config, str(run.workdir.folder))
  return Reporter(
    str(run.workdir.folder),
    steps=run.config.steps,
    after=run.start,
    last_row=run.last_row,
    best=run.best,
    config=run.saved_config,
    splits=run.splits,
    attacks=[ATTACKED + name for name in attacks],
    class_names=run.dataset.class_names,
    log=log,
    hook=hook,
    view=view,
  )


def _run_steps(
  run: Run, reporter: Reporter, interrupts: Interrupts
) -> dict[str, Any]:
  """Runs the steps that are left; returns the last evaluation of each split.

  Metrics are read a call late: the device is then busy with the next one.
  """
  config, call = run.config, run.program.steps_per_call
  windows: list[PyTree] = []
  last_row = run.last_row
  if run.pending:
    windows = [metrics_lib.from_json(run.pending['metrics'])]
  watch = guard.Watch(
    run.spec.checked(),
    run.state.params,
    devices_lib.MAX_CALLS_AHEAD,
    run.devices.process_shard.count == 1,
  )
  # Seconds are of training: evaluations move the start.
  total, started = run.counters, _clock(run)
  counted = run.start

  def count(step: int) -> None:
    nonlocal counted, total
    total = total.plus(run.program.cost(counted, step))
    elapsed = Counters(
      seconds=_clock(run) - started,
      data_wait=run.loader.seconds_waited,
      undecodable=run.devices.sum(run.loader.undecodable),
    )
    run.counters = total.plus(elapsed)
    counted = step

  def report(step: int) -> None:
    nonlocal last_row, windows
    watch.finish(step)
    metrics, rates, scores = metrics_lib.summarize(windows)
    total.skipped += int(metrics.pop('skipped', 0))
    count(step)
    last_row = (step, dataclasses.asdict(run.counters))
    metrics |= run.devices.memory()
    run.workdir.check()
    reporter.train(*last_row, metrics, rates, scores)
    windows, run.pending = [], None

  def suspend(step: int) -> None:
    """Keeps for the next row what the steps since the last one have told."""
    watch.finish(step)
    count(step)
    run.pending = {
      'step': last_row[0],
      'counters': last_row[1],
      'metrics': metrics_lib.to_json(windows),
    }

  evaluations = {}
  try:
    for step in range(run.start + call, config.steps + 1, call):
      run.state, metrics = run.program(step - call, run.state)
      if windows and row_ends(step - call, config.log_every, config.log_rows):
        report(step - call)
      windows.append(metrics)
      watch.add(step - call, metrics)
      last = step == config.steps
      evaluate = last or step % config.eval_every == 0
      stop = not last and _asked_to_stop(run, interrupts, step)
      save = last or step % config.checkpoint_every == 0
      if evaluate or save or stop:
        if evaluate or save:
          report(step)
        else:
          suspend(step)
        paused = _clock(run)
        accuracy = None
        if evaluate:
          evaluations, accuracy, improved = _evaluate(run, reporter, step)
          save = save or improved
        if save or stop:
          _save(run, reporter, step, accuracy)
        started += _clock(run) - paused
      if stop:
        run.checkpoints.wait()
        raise Interrupted(
          f'stopped at step {step:,} of {config.steps:,}, which is saved; the '
          'same command resumes from there',
          interrupts.number or signal.SIGTERM,
        )
  except guard.NonFiniteError as error:
    raise _with_examples(run, error) from None
  return evaluations


def row_ends(step: int, log_every: int, log_rows: int | None) -> bool:
  """Returns whether a row of train.csv ends with a step.

  Rows are log_every * 2^k steps apart; k is the least for which the steps so
  far would be at most `log_rows` such rows.
  """
  interval = log_every
  while log_rows is not None and step > log_rows * interval:
    interval *= 2
  return step % interval == 0


def _clock(run: Run) -> float:
  """Returns seconds, but for those that a first call spent on compiling."""
  return time.perf_counter() - run.program.compile_seconds


def _asked_to_stop(run: Run, interrupts: Interrupts, step: int) -> bool:
  """Returns whether a signal came, to any process; they ask now and then."""
  alone = run.devices.process_shard.count == 1
  if alone or step % run.config.log_every == 0:
    return run.devices.sum(interrupts.number is not None) > 0
  return False


def _evaluate(
  run: Run, reporter: Reporter, step: int
) -> tuple[dict[str, Any], float | None, bool]:
  """Evaluates every split.

  Returns:
    The evaluations by split, the validation accuracy or None, and whether it is
    the best so far.
  """
  counters = dataclasses.asdict(run.counters)
  results = {}
  for split in run.splits:
    results[split], details = run.evaluator.in_detail(split, run.state)
    reporter.evaluation(step, split, counters, results[split], details)
  if run.spec.memory is not None:
    remembered = jax.device_get(run.state.memory.examples.scores)
    reporter.histogram('train/remembered_scores', remembered, step)
  results |= _mean_of_tests(results)
  if 'validation' not in results:
    return results, None, False
  accuracy = results['validation']['accuracy']
  improved = run.best is None or accuracy >= run.best['validation']
  if improved:
    run.best = {'step': step, 'validation': accuracy, **_tests(results)}
  return results, accuracy, improved


def _mean_of_tests(results: dict[str, Any]) -> dict[str, dict[str, float]]:
  """Averages MNLI's two test splits, as the papers report them."""
  if 'test_mismatched' not in results:
    return {}
  tests = (results['test'], results['test_mismatched'])
  return {'test_mean': {'accuracy': sum(x['accuracy'] for x in tests) / 2}}


def _tests(results: dict[str, Any]) -> dict[str, float]:
  """Returns accuracy, and F1 where there is one, of all that is reported."""
  reported = {}
  for name in ('test', 'test_mismatched', 'test_mean'):
    if name in results:
      reported[name] = results[name]['accuracy']
      if 'f1' in results[name]:
        reported[f'{name}_f1'] = results[name]['f1']
  return reported


def _save(
  run: Run, reporter: Reporter, step: int, accuracy: float | None
) -> None:
  """Saves a checkpoint of the state, which is at `step`."""
  if run.workdir.remote:
    reporter.next_file(step)
  info = {
    'step': step,
    'config': run.saved_config,
    'devices': run.devices.total,
    'dataset': description.to_json(run.dataset),
    'counters': dataclasses.asdict(run.counters),
    'best': run.best,
    'pending': run.pending,
  }
  run.checkpoints.save(run.state, info, accuracy)


def _with_examples(
  run: Run, error: guard.NonFiniteError
) -> guard.NonFiniteError:
  """Writes what the failed step read; returns the error that says where."""
  saved = run.checkpoints.steps()
  last = saved[-1] if saved else 0
  text = f'{error}; the last checkpoint is at step {last:,}'
  path = run.workdir.folder / f'nonfinite_step_{error.step}.npz'
  try:
    examples = _examples_of_failed_step(run)
    if run.devices.is_main_process:
      with files.whole(path) as aside, aside.open('xb') as file:
        np.savez(file, **examples)
    text += f', and the examples of the step are in {path}'
  except Exception as lost:  # which must not hide what went wrong first
    text += f', and the examples of the step could not be saved: {lost}'
  return guard.NonFiniteError(text, error.step)


def _examples_of_failed_step(run: Run) -> PyTree:
  """Returns what the step that `state` is at reads, for replay."""
  step = int(run.state.step)
  spec = run.spec.specialize(run.program.variant(step))

  def examples(state: PyTree, batch: PyTree) -> PyTree:
    return step_lib.examples_of_step(spec, state, batch)

  batch = run.loader.replay(step, jax.device_get(run.state.sampler))
  program = run.devices.compile(examples, run.state, batch)
  return jax.device_get(program(run.state, batch))


def _result(run: Run, evaluations: dict[str, Any]) -> dict[str, Any]:
  """Returns what result.json holds."""
  if not evaluations:  # stopped between the last checkpoint and result.json
    evaluations = {name: run.evaluator(name, run.state) for name in run.splits}
    evaluations |= _mean_of_tests(evaluations)
  names = run.dataset.class_names
  return {
    **evaluations,
    'best': run.best,
    'steps': run.config.steps,
    'seed': run.config.seed,
    'classes': names and [*names],
    **dataclasses.asdict(run.counters),
    'compile_seconds': run.program.compile_seconds,
    'host_cores': os.cpu_count(),
    'device': run.devices.kind,
    'devices': run.devices.total,
    'versions': versions(),
  }


def _evaluate_attacked(
  run: Run, reporter: Reporter
) -> dict[str, dict[str, Any]]:
  """Evaluates the test split under the attack, by its name and epsilon."""
  counters = dataclasses.asdict(run.counters)
  results = {}
  settings = runs.attack_settings(run.saved_config)
  names = runs.attack_names(run.saved_config)
  for name, epsilon in zip(names, run.config.attack.epsilons, strict=True):
    results[name] = run.evaluator('test', run.state, epsilon)
    reporter.evaluation(
      run.config.steps, f'{ATTACKED}{name}', counters, results[name]
    )
    results[name]['config'] = settings
  return results


def _headline(result: dict[str, Any]) -> str:
  """Returns 'test accuracy 84.20%', and what else the task is reported by."""
  accuracy, *others = _tests(result).items()
  shown = [f'test accuracy {accuracy[1]:.2%}']
  shown += [f'{name} {value:.2%}' for name, value in others]
  return ', '.join(shown)


def _write_result(run: Run, result: dict[str, Any]) -> None:
  if run.config.selection.log_counts:
    counts = np.asarray(run.state.counts)
    path = run.workdir.folder / 'selection_counts.npy'
    with files.whole(path) as aside, aside.open('xb') as file:
      np.save(file, counts)
  runs.write_result(run.workdir.folder, result)
