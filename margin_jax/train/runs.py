"""The workdir of a run: its lock, its result, and opening it again."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from margin_jax import (
  checks,
  commands,
  config_files,
  cpu,
  data,
  files,
  losses,
  models,
  optimizers,
  registry,
  selection,
)
from margin_jax import config as config_lib
from margin_jax import trained as trained_lib
from margin_jax.buckets import BucketError
from margin_jax.data import description, kinds
from margin_jax.models import bert_weights
from margin_jax.train import ema, schema, workdirs
from margin_jax.train import setup as setup_lib
from margin_jax.train import step as step_lib
from margin_jax.train.checkpoints import (
  FOLDER,
  QUARANTINE,
  Checkpoints,
  CorruptError,
  RemovedError,
)
from margin_jax.train.compiled import Counters
from margin_jax.train.devices import Devices
from margin_jax.train.spec import StepSpec
from margin_jax.train.workdirs import RUNS, Workdir
from margin_jax.trained import Trained

PyTree = Any

_DIGEST = 'sha256'
_COST = checks.number(least=0)
_EVALUATION = checks.mapping(accuracy=checks.number(least=0, most=1))
# What is read of a result.json.
RESULT = {
  'config': checks.mapping(),
  'steps': checks.integer(1),
  'test': _EVALUATION,
  'validation': checks.optional(_EVALUATION),
  'test_mismatched': checks.optional(_EVALUATION),
  'attack': checks.optional(checks.mappings()),
  'device': checks.string(),
  'devices': checks.integer(1),
  'versions': checks.mapping(),
  **dict.fromkeys(
    (field.name for field in dataclasses.fields(Counters)), _COST
  ),
}


# What a run writes to its workdir, beside `_EXAMPLES`.
FILES = (
  'result.json', 'train.csv', 'eval.csv', 'classes.csv',
  'selection_counts.npy', bert_weights.VOCABULARY,
)  # fmt: skip
FOLDERS = (FOLDER, QUARANTINE, 'tensorboard')
_EXAMPLES = re.compile(r'nonfinite_step_\d+\.npz')


@contextlib.contextmanager
def lock_workdir(
  workdir: Workdir,
  devices: Devices | None = None,
  *,
  names: Sequence[str] = FILES,
  folders: Sequence[str] = FOLDERS,
) -> Iterator[None]:
  """Creates a workdir and keeps other programs out of it.

  What processes that were killed left half written is removed.

  Args:
    workdir: the folder.
    devices: of a run that several processes may share: the main process locks,
      and all of them fail where one does.
    names: the names of the files that will be written to it.
    folders: the names of the folders.

  Raises:
    ConfigError: the folder cannot be created, another program uses it, it is
      of a comparison and not of a run or the other way round, or something else
      lies in the place of what will be written.
  """
  with contextlib.ExitStack() as stack:
    problem = None
    try:
      if devices is None or devices.is_main_process:
        _check_kind(workdir, folders)
        stack.enter_context(workdir.locked())
        files.check_outputs(workdir.folder, names, folders)
        files.remove_leftovers(
          workdir.folder,
          lambda name: name in names or _EXAMPLES.fullmatch(name),
        )
    except (OSError, BucketError, files.FileError) as error:
      problem = error
    failed = problem is not None
    if devices is not None:
      failed = devices.sum(failed)
    if isinstance(problem, BucketError):
      raise problem
    if failed:
      raise config_lib.ConfigError(
        f'workdir={str(workdir)!r}: {problem or "see the other processes"}'
      ) from problem
    workdir.refresh()  # what others wrote until now
    yield


def _check_kind(workdir: Workdir, folders: Sequence[str]) -> None:
  """Raises a FileError if a run is to write to a comparison, or vice versa."""
  if FOLDER not in folders and workdir.is_run():
    raise files.FileError('it holds a run; name another folder to compare')
  if RUNS not in folders and workdir.runs():
    raise files.FileError('it holds a comparison; name another folder to train')


def to_save(
  config: ml_collections.ConfigDict, rule: selection.RuleFunction | None = None
) -> dict[str, Any]:
  """Returns what a checkpoint and result.json keep of a valid config.

  Args:
    config: the run's config.
    rule: the caller's own rule, in place of the config's, or None.
  """
  saved = config_lib.as_json(schema.effective(config))
  if rule is not None:
    saved['selection.rule'] = f'custom: {registry.name_of(rule)}'
  return saved | _digests(config)


def _digests(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the digests of the data that the config names."""
  fields = config.data
  found = data.digests(fields.name, fields.data_dir, fields.labels)
  return {config_lib.DIGESTS[name]: digest for name, digest in found.items()}


def trained(
  workdir: str | os.PathLike, saved: dict[str, Any]
) -> dict[str, Any] | None:
  """Returns the result of a run that has done all its steps, else None.

  Its seconds and versions are those of the machine that trained.

  Args:
    workdir: the run's workdir.
    saved: what `to_save` returns for the run's config.

  Raises:
    ConfigError: the workdir holds the result of another config.
    FileError: its result cannot be read.
  """
  path = pathlib.Path(workdir, 'result.json')
  try:
    result = files.read_json(
      path, RESULT, 'move it away, and the same command finishes the run again'
    )
  except FileNotFoundError:
    return None
  digest = result.pop(_DIGEST, None)
  if digest not in (None, _digest(result)):  # older versions had none
    raise files.FileError(
      f'{path} is not what was written: move it away, and the same command '
      'finishes the run again'
    )
  changed = config_lib.differences(result['config'], saved)
  if not changed and result['steps'] > saved['steps']:
    changed = [f'steps: {result["steps"]} -> {saved["steps"]}']
  if changed:
    raise config_lib.ConfigError(
      f'{workdir} holds the result of another config; go back to it, or use '
      'another workdir:\n  ' + '\n  '.join(changed)
    )
  if result['steps'] != saved['steps'] or not _has_last(path.parent, result):
    return None
  return result


def write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes result.json, with a digest of what it holds."""
  content = {**result, _DIGEST: _digest(result)}
  files.write_json(workdir / 'result.json', content)


def _digest(result: dict[str, Any]) -> str:
  """Digests a result; also as JSON gives it back."""
  return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _has_last(workdir: pathlib.Path, result: dict[str, Any]) -> bool:
  """Returns whether the checkpoint of a result's last step is there.

  Also True if there are no checkpoints at all: somebody may have removed them.
  """
  folder = workdir / FOLDER
  steps = [x.name for x in folder.iterdir()] if folder.is_dir() else []
  return not steps or str(result['steps']) in steps


def attacked(result: dict[str, Any], saved: dict[str, Any]) -> bool:
  """Returns whether a result has what the config's attack asks for, if any."""
  results, settings = result.get('attack') or {}, attack_settings(saved)
  return all(
    results.get(name, {}).get('config') == settings
    for name in attack_names(saved)
  )


def attack_names(saved: dict[str, Any]) -> list[str]:
  """Returns the names of an attack's results, one for each epsilon."""
  kind = saved.get('attack.name')
  if kind is None:
    return []
  if saved.get('attack.source') is not None:
    kind = f'black-box {kind}'
  return [f'{kind} {epsilon}' for epsilon in saved['attack.epsilons']]


def attack_settings(saved: dict[str, Any]) -> dict[str, Any]:
  """Returns what else decides the result of an attack."""
  names = 'attack.steps', 'attack.step_size', 'attack.source'
  return {name: saved.get(name) for name in names}


def complete(
  workdir: str | os.PathLike, saved: dict[str, Any]
) -> dict[str, Any] | None:
  """Returns the result of a run that has nothing left to do, else None.

  Arguments and errors are those of `trained`.
  """
  result = trained(workdir, saved)
  if result is None or not attacked(result, saved):
    return None
  return result


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A run that has trained, open for reading.

  Attributes:
    workdir: the run's workdir.
    config: the run's config, adapted to the devices of this machine.
    checkpoints: the run's checkpoints, open as long as the run is.
    devices: all devices of this machine.
    dataset: the dataset that the run was trained on, or its `Description`.
    spec: the `StepSpec`, which holds the model.
  """

  workdir: Workdir
  config: ml_collections.ConfigDict
  checkpoints: Checkpoints
  devices: Devices
  dataset: data.Dataset
  spec: StepSpec

  def restore(self, step: int | None = None) -> PyTree:
    """Returns the state at a step; None is the last saved step.

    Raises:
      CorruptError: it cannot be read.
      RemovedError: it was there, and is no longer.
    """
    try:
      return self.checkpoints.restore(self._state, step)[0]
    except RemovedError:
      raise
    except CorruptError as error:
      raise CorruptError(
        f'{error}. If you remove {self.workdir}/result.json, the command that '
        'trained it resumes from the checkpoint before'
      ) from error

  def restore_best(self) -> PyTree:
    """Reads the state of the highest validation accuracy.

    Raises:
      ConfigError: nothing was held out for validation.
      CorruptError: it cannot be read.
    """
    try:
      return self.restore(self._best_step())
    except RemovedError:  # now another is the best
      self.checkpoints.refresh()
      return self.restore(self._best_step())

  def restore_kept(self) -> Iterator[PyTree]:
    """Reads the states of all steps that the run keeps, in their order.

    Those that the run removes meanwhile are left out.

    Raises:
      CorruptError: one cannot be read.
    """
    read_any = False
    for step in self.checkpoints.steps():
      try:
        state = self.restore(step)
      except RemovedError:
        continue
      read_any = True
      yield state
    if not read_any:
      yield self.restore()

  def _best_step(self) -> int:
    best = self.checkpoints.info()['best']
    if best is None:
      raise config_lib.ConfigError(
        f'workdir={str(self.workdir)!r} has no best checkpoint: the run had no '
        'validation split (data.validation_examples)'
      )
    return int(best['step'])

  @functools.cached_property
  def _state(self) -> PyTree:
    """The state before the first step; only its shapes count.

    `params`, `batch_stats` and `ema` have the model's shapes. The other fields
    are None, and are read as saved.
    """
    variables, _ = setup_lib.shapes(self.spec.model, self.dataset)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
    params, batch_stats = zeros['params'], zeros.get('batch_stats', {})
    rest = dict.fromkeys(
      x.name for x in dataclasses.fields(step_lib.TrainState)
    )
    return step_lib.TrainState(
      **rest
      | {
        'step': np.int32(0),
        'params': params,
        'batch_stats': batch_stats,
        'ema': ema.create(self.spec.ema_decay, params, batch_stats),
        'nonfinite': np.int32(0),
      }
    )


@contextlib.contextmanager
def open_run(
  workdir: str | os.PathLike,
  steps: list[int] | None = None,
  data_dir: str | None = None,
  *,
  reads_data: bool = True,
) -> Iterator[TrainedRun]:
  """Opens a run that has trained.

      with runs.open_run(workdir) as run:
        state = run.restore()

  Args:
    workdir: the run's folder; "~" is expanded.
    steps: checkpoints that must be there.
    data_dir: where the dataset is now, if it has moved since the run.
    reads_data: whether the examples will be read. If not, the checkpoint
      describes the dataset, which need not be here.

  Raises:
    ConfigError: there is no such checkpoint, or the config names a model or a
      dataset that is not registered.
    DatasetError: the dataset is missing or broken.
  """
  cpu.is_default()  # starts JAX's backend, or says why not
  with contextlib.ExitStack() as stack:
    place = stack.enter_context(workdirs.opened(workdir))
    checkpoints = stack.enter_context(
      contextlib.closing(_checkpoints(place, steps))
    )
    info = checkpoints.info()
    described = info.get('dataset')  # older versions did not describe it
    if reads_data or described is None:
      config = _saved_config(info, data_dir)
      devices, dataset = setup_lib.load(
        config, None, training=False, workdir=str(place.folder)
      )
    else:
      config = _saved_config(info, data_dir, names_data=False)
      devices = Devices(config.devices)
      dataset = description.from_json(described)
    spec = setup_lib.make_spec(config, dataset, devices.total)
    yield TrainedRun(place, config, checkpoints, devices, dataset, spec)


def find_best(workdir: str | os.PathLike) -> str | None:
  """Returns the run of a comparison with the highest accuracy.

  On the validation split, if there is one. It is one of the runs that are
  complete and have their checkpoints; None if there is none.
  """

  def accuracy(run: Workdir) -> float:
    path = run.folder / 'result.json'
    result = files.read_json(path, RESULT, 'move it away')
    return result.get('validation', result['test'])['accuracy']

  with workdirs.opened(workdir) as place:
    runs = place.runs()
    for run in runs:
      run.refresh()
    finished = [x for x in runs if (x.folder / 'result.json').exists()]
    return str(max(finished, key=accuracy)) if finished else None


def _checkpoints(workdir: Workdir, steps: list[int] | None) -> Checkpoints:
  """Opens the run's checkpoints; looking must not create a folder."""
  workdir.refresh()
  none = config_lib.ConfigError(f'workdir={str(workdir)!r} {_lack(workdir)}')
  if not (workdir.folder / FOLDER).is_dir():
    raise none
  checkpoints = Checkpoints(workdir)
  saved = checkpoints.steps()
  missing = sorted({*(steps or ())} - {*saved})
  if saved and not missing:
    return checkpoints
  checkpoints.close()
  if not saved:
    raise none
  raise config_lib.ConfigError(
    f'workdir={str(workdir)!r} holds no checkpoint of step(s) {missing}; it '
    f'has {saved}'
  )


def _lack(workdir: Workdir) -> str:
  """Returns what a workdir lacks that is none of a run, and what to do."""
  folder = workdir.folder
  above = [] if workdir.remote else [Workdir(x) for x in folder.parents]
  names = [
    str(run)
    for place in (workdir, *above[:2])
    for run in place.runs()
    if run.folder.is_relative_to(folder)
  ]
  if names:
    more = [f'and {len(names) - 5} more'] if len(names) > 5 else []
    names = ', '.join([*names[:5], *more])
    return (
      'holds no checkpoints: it is a comparison; name one of its runs: ' + names
    )
  run = next((str(x) for x in above if x.is_run()), None)
  if run is not None:
    return 'is inside a run' + checks.did_you_mean([run])
  if not workdir.remote and not folder.exists():
    siblings = {x.name: str(x) for x in folder.parent.glob('*') if x.is_dir()}
    near = [siblings[x] for x in checks.nearest(folder.name, siblings)]
    return 'does not exist' + checks.did_you_mean(near)
  return 'holds no checkpoints: train it first with ' + commands.line('train')


def _saved_config(
  info: dict[str, Any], data_dir: str | None, names_data: bool = True
) -> ml_collections.ConfigDict:
  """Returns the run's config, of which only what is known is kept.

  What trained the model (rules, losses, an optimizer) does not matter any more,
  and without `names_data` the dataset does not either.
  """
  saved = dict(info['config'])
  digests = {x: saved.pop(x, None) for x in config_lib.DIGESTS.values()}
  rule = str(saved.get('selection.rule'))
  known = (*selection.RULES, *selection.REGISTERED, config_lib.UNIFORM)
  if rule not in known:
    saved['selection.rule'] = next(iter(selection.RULES))
  name = saved.get('optimizer.name')
  if name not in (*optimizers.NAMES, *optimizers.REGISTERED, None):
    saved.pop('optimizer.name')  # its state is read all the same
  names = [saved.get('loss.risk'), *saved.get('loss.names', ())]
  if not all(x in (*losses.LOSSES, *losses.REGISTERED) for x in names if x):
    for name in ('loss.risk', 'loss.names', 'loss.weights'):
      saved.pop(name, None)
  if data_dir is not None:
    saved['data.data_dir'] = data_dir
  saved['devices'] = None  # those of this machine
  _check_registered(saved, names_data)
  config = config_lib.from_json(saved)
  if not names_data:
    return config
  now = _digests(config)
  for field, name in config_lib.DIGESTS.items():
    if digests[name] not in (None, now.get(name)):
      raise config_lib.ConfigError(
        f'{field}={saved[field]!r} has other data than the run had'
      )
  return config


def _check_registered(saved: dict[str, Any], names_data: bool) -> None:
  """Raises if the run's models or dataset are known to another program only."""
  data_dir = saved.get('data.data_dir')
  for field, known in (
    ('data.name', lambda name: kinds.is_known(name, data_dir)),
    ('model.name', models.find),
    ('selection.proxy', models.find),
  ):
    name = saved.get(field)
    if field == 'data.name' and not names_data:
      continue
    if name is not None and not known(name):
      raise config_lib.ConfigError(
        f'{field}={name!r} of the run is not registered: register it '
        f'first, or name the file that does: {commands.line("analyze")} '
        '--config=FILE'
      )


def attack_source(
  config: ml_collections.ConfigDict, dataset: data.Dataset, workdir: Workdir
) -> Trained | None:
  """Loads the network that the attack sees; None is the run's own.

  Args:
    config: the config of the attacked run.
    dataset: the dataset of that run.
    workdir: the workdir of that run.

  Raises:
    ConfigError: there is no such network, or it was trained on other data.
  """
  source = config.attack.source
  if source is None:
    return None
  try:
    with workdirs.opened(source) as place:
      itself = str(place) == str(workdir)
      name, digest = (None, None) if itself else _dataset_of(place)
    network = None
    if name == config.data.name:
      network = trained_lib.load(source)
  except (config_lib.ConfigError, data.DatasetError, CorruptError) as error:
    raise config_lib.ConfigError(
      f'attack.source={source!r}: {error}'
    ) from error
  config_lib.require(
    not itself, 'attack.source', source,
    "another run's workdir; None attacks the network itself",
  )  # fmt: skip
  allowed = f'the workdir of a run on data.name={config.data.name!r}'
  config_lib.require(
    network is not None, 'attack.source', source,
    f'{allowed}, but that run is on {name!r}',
  )  # fmt: skip
  own_digest = _digests(config).get(config_lib.DIGESTS['data.name'])
  config_lib.require(
    digest in (None, own_digest), 'attack.source', source,
    f'{allowed} with the same examples, but that run has others',
  )  # fmt: skip
  config_lib.require(
    network.input_shape == dataset.input_shape, 'attack.source', source,
    f'{allowed} with inputs of {dataset.input_shape}, but that run has '
    f'{network.input_shape}',
  )  # fmt: skip
  return network


def _dataset_of(workdir: Workdir) -> tuple[str | None, str | None]:
  """Returns the name and the digest of the data that a run was trained on."""
  with contextlib.closing(_checkpoints(workdir, None)) as checkpoints:
    saved = dict(checkpoints.info()['config'])
  return saved.get('data.name'), saved.get(config_lib.DIGESTS['data.name'])


def register_from(path: str) -> None:
  """Runs a config file, for the models and datasets that it registers."""
  config_files.run(path.partition(':')[0])


@contextlib.contextmanager
def output(out: str | None, default: Workdir) -> Iterator[Workdir]:
  """Creates the folder to write to; copies to its bucket at the end."""
  with contextlib.ExitStack() as stack:
    place = default
    if out is not None and workdirs.is_url(out):
      place = stack.enter_context(workdirs.opened(out))
    elif out is not None:
      place = Workdir(out)
    make_folder(str(place.folder))
    yield place
    place.publish()


def make_folder(out: str) -> pathlib.Path:
  """Creates the folder to write to, before anything is measured."""
  if workdirs.is_url(out):
    raise config_lib.ConfigError(
      f'out={out!r} is not allowed: it must be a folder of this machine'
    )
  folder = pathlib.Path(out).expanduser()
  try:
    files.make_folder(folder)
  except files.FileError as error:
    raise config_lib.ConfigError(f'out={out!r}: {error}') from error
  return folder
