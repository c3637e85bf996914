"""Trains methods on one budget, with several seeds, and reports the results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from margin_jax import terminal
from margin_jax.compare import budgets, report, runs
from margin_jax.compare import methods as methods_lib
from margin_jax.config import UNIFORM, require
from margin_jax.train import runs as runs_lib
from margin_jax.train import workdirs
from margin_jax.train.guard import NonFiniteError
from margin_jax.train.process import Interrupts

SPLITS = ('test', 'validation')
MOST_SEEDS = 1000  # more is a slip of the hand


def compare(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  methods: Sequence[str]
  | Mapping[str, methods_lib.Fields] = methods_lib.METHODS,
  seeds: int = 3,
  budget: str = 'steps',
  baseline: str = UNIFORM,
  sweep: Sequence[str] = (),
  split: str = 'test',
  command: str = '',
  summary: Callable[[list[dict[str, Any]]], Sequence[str]] | None = None,
  log: Callable[[str], None] = print,
  wait: terminal.Wait = terminal.do_not_show,
) -> list[dict[str, Any]]:
  """Trains every method with every seed; writes tables and plots.

  Every run is a call of `loop.train`, in WORKDIR/runs. The same call again
  keeps complete runs and continues the others. It writes to `workdir`
  compare.md, runs.csv (a row for each run), compare.csv (a row for each
  evaluation), error.png, mean_mms.png, cost.png and, with a sweep, sweep.md.
  With a sweep, compare.md and the plots show each method at its grid point with
  the lowest validation error, and are not made without a validation split.

  Args:
    config: what all methods have in common; its `seed` is the first seed. A
      field applies to the methods that use it.
    workdir: a folder, created if need be; "~" is expanded.
    methods: rules, with or without fields ('mms+reuse=5'); or the fields to
      change, by the method's name. The baseline is added if it is missing. For
      each method that scores, the control `random` is added, with the fields of
      that method.
    seeds: how many seeds.
    budget: what all methods may spend: the same 'steps', or the 'flops' or
      'seconds' of the baseline, scoring included. Schedules are scaled to the
      resulting number of steps.
    baseline: the method that the others are compared with.
    sweep: fields and their values, 'mmr.alpha=1e-5,1e-4'; several fields make a
      grid.
    split: the split whose errors the curves show: 'test' or 'validation'.
    command: the command that started this, for compare.md.
    summary: takes the returned rows and returns lines to print below the
      tables.
    log: takes the progress lines and the tables.
    wait: shows what is being done: `terminal.wait`.

  Returns:
    A row for each run, as in runs.csv: 'method', the swept fields, 'seed',
    'steps', 'validation_error' (if there is a validation split) and
    'test_error' at the last step, as fractions, for some tasks 'test_f1' and
    'test_mismatched_error', and the cumulative costs.

  Raises:
    ConfigError: a field or an argument is bad, or the workdir holds runs of
      other configs; raised before anything is trained.
    DatasetError: the dataset is missing or broken.
    NonFiniteError: some runs were not finite; raised at the end, when all
      others are done and saved.
    CorruptError, SaveError: as in `loop.train`.
    Interrupted: SIGTERM, SIGINT or SIGHUP came, and the state is saved.
  """
  allowed = f'one of {budgets.BUDGETS}'
  require(budget in budgets.BUDGETS, 'budget', budget, allowed)
  require(split in SPLITS, 'split', split, f'one of {SPLITS}')
  holds = isinstance(seeds, int) and 1 <= seeds <= MOST_SEEDS
  require(holds, 'seeds', seeds, f'an integer from 1 to {MOST_SEEDS:,}')
  methods = methods_lib.parse_methods(methods, config)
  grid = methods_lib.parse_sweep(sweep, config)
  if baseline not in methods:
    log(f'{baseline!r} is added: the baseline')
    methods = methods_lib.with_baseline(methods, baseline, config)
  trials = _trials(config, methods, grid, log)
  for trial in trials:
    holds = split == 'test' or trial.config.data.validation_examples > 0
    allowed = "'test' unless data.validation_examples is above 0"
    with methods_lib.named_errors(trial.name):
      require(holds, 'split', split, allowed)
  with (
    Interrupts() as interrupts,
    workdirs.opened(workdir) as place,
    runs_lib.lock_workdir(place, names=report.FILES, folders=report.FOLDERS),
  ):
    costs = budgets.Costs(place, budget, interrupts, log)
    with wait(f'loading {config.data.name}, and checking {len(trials)} trials'):
      trials = budgets.allocate(trials, budget, baseline, costs, log)
    all_runs = runs.plan(trials, seeds, place)
    notes = _notes(trials, budget, baseline, command)
    text = None
    for outcome in runs.train(all_runs, interrupts, log, wait):
      ended = len(outcome.runs) + len(outcome.failures)
      compared = any(run.trial.method == baseline for run in outcome.runs)
      if compared and ended % len(trials) == 0:  # a seed of every trial
        rows = report.run_rows(outcome.runs, outcome.results)
        lines = [*summary(rows)] if summary else []
        below = [x for line in lines for x in (line, '')]
        text = report.write(
          place.folder, outcome.runs, outcome.results, baseline,
          [*below, *notes, _seeds(outcome), *_failures(outcome)], split,
        )  # fmt: skip
        place.publish()
        text = '\n\n'.join([text, *lines])
  if text is not None:
    log(text)
  if outcome.failures:
    names = '\n  '.join(name for name, _ in outcome.failures)
    raise NonFiniteError(
      f'{len(outcome.failures)} of {len(all_runs)} runs were not finite, and '
      f'are left out:\n  {names}',
      outcome.failures[0][1].step,
    )
  return report.run_rows(outcome.runs, outcome.results)


def _trials(
  config: ml_collections.ConfigDict,
  methods: Mapping[str, methods_lib.Fields],
  grid: Mapping[str, Sequence[Any]],
  log: Callable[[str], None],
) -> list[methods_lib.Trial]:
  """Returns the trials of all methods and controls; every config is valid."""
  methods_lib.make_trials(config, methods, grid)  # raises where one is bad
  complete = methods_lib.with_controls(methods, config)
  for name in complete:
    if name not in methods:
      log(f'{name!r} is added: the control that scores and selects at random')
  trials = methods_lib.make_trials(config, complete, grid)
  for line in methods_lib.warnings(trials, complete):
    log(line)
  return trials


def _notes(
  trials: Sequence[methods_lib.Trial], budget: str, baseline: str, command: str
) -> list[str]:
  """Returns lines for below the tables: the command and the budget."""
  steps = {trial.config.steps for trial in trials}
  text = f'Budget: the {budget} of `{baseline}`.'
  if budget == 'steps' and len(steps) > 1:
    text = 'Budget: none; each method has the steps of its own config.'
  if budget == 'seconds':
    text += ' Short runs estimate the seconds; the table shows what was spent.'
  lines = [f'Command: `{command}`', ''] if command else []
  return [*lines, text, '']


def _seeds(outcome: runs.Outcome) -> str:
  """Returns a line for below the tables: the seeds of the complete runs."""
  seeds = sorted({run.seed for run in outcome.runs})
  return f'Seeds: {", ".join(map(str, seeds))}.'


def _failures(outcome: runs.Outcome) -> list[str]:
  """Returns lines for below the tables: the runs that were not finite."""
  if not outcome.failures:
    return []
  lines = [f'- {name}: {error}' for name, error in outcome.failures]
  return ['', 'These runs were not finite, and are left out:', '', *lines]
