"""Methods trained on one budget, over several seeds, and what came of it."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from margin_jax import files
from margin_jax.compare import budgets, runs
from margin_jax.compare import methods as methods_lib
from margin_jax.compare.report import Report
from margin_jax.config import UNIFORM, ConfigError, require
from margin_jax.train.guard import NonFiniteError
from margin_jax.train.process import Interrupts

METHODS = (UNIFORM, 'random', 'mms', 'loss', 'entropy')


@contextlib.contextmanager
def _open(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the workdir, and keeps others out of it."""
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(files.locked(str(workdir)))
    except OSError as error:
      raise ConfigError(f'workdir={str(workdir)!r}: {error}') from error
    yield


def _entries(
  config: ml_collections.ConfigDict,
  methods: Mapping[str, methods_lib.Fields],
  sweep: Sequence[str],
  baseline: str,
  log: Callable[[str], None],
) -> list[methods_lib.Entry]:
  """All that is to be compared; each config is good by itself."""
  complete = methods_lib.with_control(methods, config)
  for name in [name for name in complete if name not in methods]:
    log(f'{name!r} is added: the control that scores and does not look')
  require(baseline in complete, 'baseline', baseline, f'one of {[*complete]}')
  grid = methods_lib.parse_sweep(sweep, config)
  return methods_lib.make(config, complete, grid)


def compare(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  methods: Sequence[str] | Mapping[str, methods_lib.Fields] = METHODS,
  seeds: int = 3,
  budget: str = 'steps',
  baseline: str = UNIFORM,
  sweep: Sequence[str] = (),
  command: str = '',
  log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
  """Trains every method with every seed, and writes tables and pictures.

  Every run is one of `loop.train`, in WORKDIR/runs. The same call again redoes
  nothing that is complete, and continues what is not. Writes to `workdir`
  compare.md, runs.csv (a row a run), compare.csv (a row an evaluation),
  error.png, mean_mms.png, cost.png, and with a sweep sweep.md; compare.md and
  the pictures then show each method at its point of the lowest validation
  error, and are not made without a validation split.

  Args:
    config: what all have in common; its `seed` is the first, and what its
      `selection` sets holds for the rules that have it.
    workdir: a folder, created if need be; "~" is expanded.
    methods: rules, with fields after them or not ('mms+reuse=5'); or the
      fields to change, by name. `random` is added where a rule scores, with the
      fields of that method.
    seeds: how many.
    budget: what all have the same of: 'steps', or the 'flops' or 'seconds' of
      the baseline's steps, scoring included; schedules are scaled to the steps
      that makes.
    baseline: the method that differences are to.
    sweep: fields and their values, 'mmr.alpha=1e-5,1e-4': a grid.
    command: how this was started, for compare.md.
    log: takes the progress lines and the table.

  Returns:
    A row for each run, as in runs.csv: 'method', the fields of the sweep,
    'seed', 'steps', 'validation_error' (if there is a validation split) and
    'test_error' at the last step, as shares, of some tasks 'test_f1' and
    'test_mismatched_error', and the cumulative costs.

  Raises:
    ConfigError: a field or an argument is bad, or the workdir holds runs of
      other configs; before anything is trained.
    DatasetError: the dataset is missing or broken.
    NonFiniteError: some runs were not finite; raised at the end, when all
      others are done and written down.
    CorruptError, SaveError: as in `loop.train`.
    Interrupted: SIGTERM or SIGINT came, and the state is saved.
  """
  allowed = f'one of {budgets.BUDGETS}'
  require(budget in budgets.BUDGETS, 'budget', budget, allowed)
  holds = isinstance(seeds, int) and seeds >= 1
  require(holds, 'seeds', seeds, 'an integer, at least 1')
  known = methods_lib.parse_methods(methods, config)
  found = _entries(config, known, sweep, baseline, log)
  folder = pathlib.Path(os.path.abspath(os.path.expanduser(workdir)))
  with Interrupts() as interrupts, _open(folder):
    costs = budgets.Costs(folder, budget, interrupts, log)
    found = budgets.share(found, baseline, costs, log)
    all_runs = runs.make(found, seeds, folder)
    runs.check(all_runs)
    about = _about(all_runs, budget, baseline, command)
    text, report = '', None
    for outcome in runs.train(all_runs, interrupts, log):
      ended = len(outcome.runs) + len(outcome.failures)
      compared = any(run.entry.method == baseline for run in outcome.runs)
      if compared and ended % len(found) == 0:  # a seed of everything
        report = Report(outcome.runs, outcome.results, baseline)
        text = report.write(folder, [*about, *_failed(outcome)])
  if report is not None:
    log(text)
    log(f'written to {folder}')
  if outcome.failures:
    first = outcome.failures[0][1]
    lines = '\n  '.join(name for name, _ in outcome.failures)
    raise NonFiniteError(
      f'{len(outcome.failures)} of {len(all_runs)} runs were not finite, and '
      f'are left out:\n  {lines}',
      first.step,
    )
  return report.rows


def _about(
  all_runs: Sequence[runs.Run], budget: str, baseline: str, command: str
) -> list[str]:
  """What stands below the tables: the command, the budget, the seeds."""
  first = all_runs[0].entry
  seeds = ', '.join(f'{run.seed}' for run in all_runs if run.entry is first)
  steps = {run.entry.config.steps for run in all_runs}
  text = f'Budget: the {budget} of `{baseline}`.'
  if budget == 'steps' and len(steps) > 1:
    text = 'Budget: none; each has the steps of its own config.'
  if budget == 'seconds':
    text += ' They are estimated from short runs: see what was spent.'
  lines = [f'Command: `{command}`', ''] if command else []
  return [*lines, f'{text} Seeds: {seeds}.']


def _failed(outcome: runs.Outcome) -> list[str]:
  if not outcome.failures:
    return []
  lines = [f'- {name}: {error}' for name, error in outcome.failures]
  return ['', 'Not finite, and left out:', '', *lines]
