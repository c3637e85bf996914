"""The runs of a comparison: each is trained once, whatever interrupts it."""

import contextlib
import copy
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections

from margin_jax import files, terminal
from margin_jax.buckets import BucketError
from margin_jax.compare.methods import Trial, named_errors
from margin_jax.train import loop, schema
from margin_jax.train import runs as runs_lib
from margin_jax.train.guard import NonFiniteError
from margin_jax.train.process import Interrupted, Interrupts
from margin_jax.train.workdirs import Workdir

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """A trial with a seed.

  Attributes:
    trial: what is trained.
    seed: the seed.
    workdir: its place.
  """

  trial: Trial
  seed: int
  workdir: Workdir

  @property
  def folder(self) -> pathlib.Path:
    """The folder to read its files from."""
    return self.workdir.folder

  @property
  def name(self) -> str:
    """The trial and the seed: 'mms, mmr.alpha=0.001, seed 0'."""
    return f'{self.trial.name}, seed {self.seed}'

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The trial's, with the seed."""
    config = copy.deepcopy(self.trial.config)
    config.seed = self.seed
    return config

  def result(self) -> Result | None:
    """Returns what result.json holds if the run is complete, else None.

    Raises:
      ConfigError: the folder holds the result of another config, or one that
        cannot be read.
    """
    self.workdir.refresh()
    return runs_lib.complete(self.folder, runs_lib.to_save(self.config))


def plan(trials: Sequence[Trial], seeds: int, workdir: Workdir) -> list[Run]:
  """Returns all runs, every trial with a seed before the next seed.

  So a comparison has its first table early.

  Raises:
    ConfigError: a seed is too large.
  """
  runs = []
  for i in range(seeds):
    for trial in trials:
      seed = trial.config.seed + i
      folder = workdir.child(f'runs/{trial.folder}/seed_{seed}')
      run = Run(trial, seed, folder)
      with named_errors(run.name):
        schema.validate(run.config)
      runs.append(run)
  return runs


@dataclasses.dataclass
class Outcome:
  """What has come of the runs so far, in their order.

  Attributes:
    runs: those that are complete.
    results: what their result.json hold.
    failures: the names and the errors of those that were not finite.
  """

  runs: list[Run] = dataclasses.field(default_factory=list)
  results: list[Result] = dataclasses.field(default_factory=list)
  failures: list[tuple[str, NonFiniteError]] = dataclasses.field(
    default_factory=list
  )


def train(
  runs: Sequence[Run],
  interrupts: Interrupts,
  log: Callable[[str], None],
  wait: terminal.Wait = terminal.do_not_show,
) -> Iterator[Outcome]:
  """Trains the runs that are not complete; yields the outcome after every run.

  Raises:
    ConfigError: a folder holds the result of another config; raised before
      anything is trained.
    Interrupted: a signal came, and the state is saved.
  """
  results = [run.result() for run in runs]
  outcome = Outcome()
  for number, (run, result) in enumerate(zip(runs, results, strict=True), 1):
    name = f'run {number} of {len(runs)}: {run.name}'
    before = 'already complete: '
    if result is None:
      interrupts.check()
      log(f'{name}: {"resumes" if run.folder.exists() else "starts"}')
      before = ''
      try:
        with wait(f'training {run.name}', line=False):
          result = _train(run)
      except Interrupted as stopped:
        raise Interrupted(
          f'{name}: {stopped}', stopped.status - 128
        ) from stopped
      except NonFiniteError as error:
        log(f'{name}: {error}')
        outcome.failures.append((run.name, error))
        yield outcome
        continue
    log(
      f'{name}: {before}test error {1 - result["test"]["accuracy"]:.2%} after '
      f'{result["steps"]:,} steps, {result["seconds"]:.1f} s of training'
    )
    outcome.runs.append(run)
    outcome.results.append(result)
    yield outcome


def _train(run: Run) -> Result:
  """Trains, or continues; the progress lines go to train.log."""
  run.folder.mkdir(parents=True, exist_ok=True)
  files.check_outputs(run.folder, ('train.log',), ())
  with (run.folder / 'train.log').open('a', encoding='utf-8') as file:

    def log(line: str) -> None:
      file.write(f'{line}\n')
      file.flush()

    try:
      result = loop.train(run.config, str(run.workdir), log=log)
    finally:
      with contextlib.suppress(BucketError):  # of the log only
        run.workdir.publish()
  run.workdir.refresh()
  return result
