"""Compares methods: the same config, several rules and seeds, one budget.

    python -m margin_jax.compare --config=configs/digits.py \\
        --methods=uniform,random,mms,loss --workdir=/tmp/compare

The same command again redoes nothing that is complete. Tables and plots are
written to the workdir. A sweep of config fields:
--sweep=mmr.alpha=1e-5,1e-4,1e-3. A config file may have methods of its own
(`get_methods`), a baseline (`get_baseline`), and lines for below the table
(`get_summary`).
"""

import functools
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from margin_jax import cpu
from margin_jax.compare import budgets, experiment
from margin_jax.compare import methods as methods_lib
from margin_jax.config import UNIFORM, ConfigError
from margin_jax.train import devices as devices_lib
from margin_jax.train import flags as flags_lib
from margin_jax.train import process

flags.adopt_module_key_flags(flags_lib)
_METHODS = flags.DEFINE_string(
  'methods',
  None,
  'Comma-separated rules, or presets (memory, proxy, fresh); config fields may '
  'follow, as in mms+reuse=5+pool_size=320. Default: those of the config file, '
  'or ' + ','.join(experiment.METHODS),
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'How many; the first is config.seed.')
_BUDGET = flags.DEFINE_enum(
  'budget',
  budgets.BUDGETS[0],
  budgets.BUDGETS,
  'What all methods have the same of: steps, or the FLOPs or seconds of the '
  'baseline.',
)
_BASELINE = flags.DEFINE_string(
  'baseline',
  None,
  'The method that the others are compared with. Default: that of the config '
  f'file, or {UNIFORM}',
)
_SWEEP = flags.DEFINE_multi_string(
  'sweep', [], 'A config field and its values: mmr.alpha=1e-5,1e-4. Several '
  'flags make a grid.',
)  # fmt: skip

_SPLIT = flags.DEFINE_enum(
  'split', 'test', ('test', 'validation'), 'Whose errors the curves are.'
)


def run() -> None:
  """Parses the command line and runs it."""
  flags_lib.run(main, __doc__)


def main(argv: list[str]) -> None:
  """Runs the comparison; a mistake of the user is one line."""
  flags_lib.begin(argv)
  cpu.tune()
  devices_lib.use_compilation_cache()
  with process.one_line_errors():
    module, argument = _config_file()
    get_summary = module.get('get_summary')
    get_baseline = module.get('get_baseline', lambda argument: UNIFORM)
    experiment.compare(
      flags_lib.CONFIG.value,
      flags_lib.WORKDIR.value,
      methods=_methods(module.get('get_methods'), argument),
      seeds=_SEEDS.value,
      budget=_BUDGET.value,
      baseline=_BASELINE.value or get_baseline(argument),
      sweep=_SWEEP.value,
      split=_SPLIT.value,
      command=shlex.join(['python', '-m', 'margin_jax.compare', *sys.argv[1:]]),
      summary=get_summary and functools.partial(get_summary, argument=argument),
      log=functools.partial(print, flush=True),
    )


def _config_file() -> tuple[dict[str, Any], str | None]:
  """Returns what the config file defines, and the argument that it got."""
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, argument = path.partition(':')
  return runpy.run_path(path), argument or None


def _methods(
  get_methods: Callable | None, argument: str | None
) -> Sequence[str] | dict[str, methods_lib.Fields]:
  """Returns the methods of the flag, of the config file, or the defaults."""
  named = get_methods(argument) if get_methods else {}
  if _METHODS.value is None:
    return named or experiment.METHODS
  names = methods_lib.split(_METHODS.value)
  if not all(names):
    raise ConfigError(
      f'methods={_METHODS.value!r} is not allowed: there is an empty name'
    )
  return methods_lib.parse_methods(names, flags_lib.CONFIG.value, named)


if __name__ == '__main__':
  run()
