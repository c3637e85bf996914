"""The runs of a comparison: each once, whatever interrupts it."""

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections

from margin_jax import config as config_lib
from margin_jax.compare.methods import Entry
from margin_jax.config import ConfigError
from margin_jax.train import loop, schema
from margin_jax.train import runs as runs_lib
from margin_jax.train.guard import NonFiniteError
from margin_jax.train.process import Interrupted, Interrupts


@dataclasses.dataclass(frozen=True)
class Run:
  """An entry with a seed.

  Attributes:
    entry: what is trained.
    seed: with which.
    folder: its workdir.
  """

  entry: Entry
  seed: int
  folder: pathlib.Path

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The entry's, with the seed."""
    config = copy.deepcopy(self.entry.config)
    config.seed = self.seed
    return config

  @property
  def name(self) -> str:
    """Of the entry and the seed."""
    return f'{self.entry.name}, seed {self.seed}'


def make(
  entries: Sequence[Entry], seeds: int, workdir: pathlib.Path
) -> list[Run]:
  """All runs; a seed of every entry before the next, to compare early."""
  return [
    Run(entry, seed, workdir / 'runs' / entry.folder / f'seed_{seed}')
    for i in range(seeds)
    for entry in entries
    for seed in [entry.config.seed + i]
  ]


def check(runs: Sequence[Run]) -> None:
  """Checks the configs of all seeds.

  Raises:
    ConfigError: one is bad.
  """
  for run in runs:
    try:
      schema.validate(run.config)
    except ConfigError as error:
      raise ConfigError(f'{run.name}: {error}') from error


def finished(
  config: ml_collections.ConfigDict, folder: pathlib.Path
) -> dict[str, Any] | None:
  """The result of a run that is complete; None if it is not.

  Raises:
    ConfigError: the folder has the result of another config, or none that
      can be read.
  """
  path = folder / 'result.json'
  if not path.exists():
    return None
  result = runs_lib.read_result(path)
  saved, now = result['config'], runs_lib.to_save(config)
  changed = config_lib.differences(saved, now)
  if changed or result['steps'] > config.steps:
    changed = changed or [f'steps: {result["steps"]} -> {config.steps}']
    raise ConfigError(
      f'{folder} holds the result of another config; go back to it, or use '
      'another workdir:\n  ' + '\n  '.join(changed)
    )
  # Both may be added to a run that is complete.
  free = [name for name in now if name == 'steps' or name.startswith('attack.')]
  return result if all(saved.get(x) == now[x] for x in free) else None


def _train(run: Run) -> dict[str, Any]:
  """Trains, or goes on; the progress lines are in train.log."""
  run.folder.mkdir(parents=True, exist_ok=True)
  with (run.folder / 'train.log').open('a', encoding='utf-8') as file:

    def log(line: str) -> None:
      file.write(f'{line}\n')
      file.flush()

    return loop.train(run.config, str(run.folder), log=log)


@dataclasses.dataclass
class Outcome:
  """What came of the runs so far, in their order.

  Attributes:
    runs: those that are complete.
    results: what their result.json hold.
    failures: the name and the error of those that were not finite.
  """

  runs: list[Run] = dataclasses.field(default_factory=list)
  results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  failures: list[tuple[str, NonFiniteError]] = dataclasses.field(
    default_factory=list
  )


def train(
  runs: Sequence[Run], interrupts: Interrupts, log: Callable[[str], None]
) -> Iterator[Outcome]:
  """Trains what is missing; the outcome after every run.

  Raises:
    ConfigError: before anything is trained, if one has another's result.
    Interrupted: a signal came; what was trained is saved.
  """
  done = [finished(run.config, run.folder) for run in runs]
  outcome = Outcome()
  for number, (run, result) in enumerate(zip(runs, done, strict=True), 1):
    name = f'run {number} of {len(runs)}: {run.name}'
    before = 'complete already: '
    if result is None:
      interrupts.check()
      log(f'{name}: starts' if not run.folder.exists() else f'{name}: goes on')
      before = ''
      try:
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
