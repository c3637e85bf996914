"""Any config is either refused in one clear error, or runs a step."""

import argparse
import collections
import gc
import math
import tempfile
from typing import Any

import hypothesis
import jax
import ml_collections
import pytest
from hypothesis import strategies

from margin_jax import config as config_lib
from margin_jax import data
from margin_jax.train import devices as devices_lib
from margin_jax.train import guard, loop, schema
from tests import helpers

pytestmark = pytest.mark.slow

# What a hand might type, of every type; models that compile in a second.
ANYTHING = (
  -1, 0, 1, 2, 3, 7, 8, 30, 64, 10**6, 2**31, -1.0, 0.0, 1e-12, 0.1, 0.5, 1.0,
  2.0, 1e30, math.nan, math.inf, None, True, False, '', 'x', (), (1,), (0.1,),
  (1, 2), ('crop',), ('flip', 'crop'), ('input', 'features'),
)  # fmt: skip
SMALL = {
  'model.name': ('cnn', 'resnet8', 'resnet9', 'mlp', 7),
  'selection.proxy': ('cnn', 'resnet8', None, 'x'),
  'data.name': ('digits', 'cifar', 'imagenet2012', 'mnist'),
  'attack.steps': (0, 1, 2),
  # What takes memory or time in proportion.
  'model.width': (0.0, 0.5, 1.0, 'x'),
  'steps': (0, 1, 2, None),
  'data.image_size': (0, 8, 224, None),
  'data.data_dir': ('/nowhere', 3),
}
CLEAR = (config_lib.ConfigError, data.DatasetError, guard.NonFiniteError)


def values(name: str) -> strategies.SearchStrategy:
  """What a field is set to."""
  if name in SMALL:
    return strategies.sampled_from(SMALL[name])
  choices = schema.choices(name)
  default = config_lib.flatten(helpers.small_config())[name]
  # Half of the time something that is allowed by itself.
  return strategies.one_of(
    strategies.sampled_from([default, *choices]),
    strategies.sampled_from(ANYTHING),
  )


FIELDS = sorted(config_lib.flatten(config_lib.default()))
OVERRIDES = strategies.lists(
  strategies.sampled_from(FIELDS), min_size=1, max_size=4, unique=True
).flatmap(
  lambda names: strategies.fixed_dictionaries({n: values(n) for n in names})
)


def try_config(overrides: dict[str, Any]) -> str:
  """'ran', or the kind of the clear error."""
  config = helpers.small_config(
    **{'steps': 1, 'eval_every': 1, 'checkpoint_every': 1, 'log_every': 1}
  )
  config = ml_collections.ConfigDict(config.to_dict())
  with config.ignore_type():
    config.update_from_flattened_dict(overrides)
  with tempfile.TemporaryDirectory() as workdir:
    try:
      loop.train(config, workdir, log=lambda line: None)
    except CLEAR as error:
      text = str(error)
      assert text, overrides
      assert 'XLA' not in text, (overrides, text)
      return type(error).__name__
  return 'ran'


SETTINGS = hypothesis.settings(
  max_examples=40,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)


@SETTINGS
@hypothesis.given(OVERRIDES)
def test_any_config_is_refused_or_runs(overrides):
  try_config(overrides)


def main(cases: int, seed: int) -> collections.Counter:
  """The same for many more."""
  found: collections.Counter = collections.Counter()

  @hypothesis.seed(seed)
  @hypothesis.settings(SETTINGS, max_examples=cases, derandomize=False)
  @hypothesis.given(OVERRIDES)
  def run(overrides):
    found[try_config(overrides)] += 1
    if sum(found.values()) % 20 == 0:  # a program takes memory mappings
      jax.clear_caches()
      gc.collect()
    if sum(found.values()) % 100 == 0:
      print(dict(found), flush=True)

  run()
  return found


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='Tries many random configs.')
  parser.add_argument('--cases', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  devices_lib.use_compilation_cache()
  print(dict(main(args.cases, args.seed)))
