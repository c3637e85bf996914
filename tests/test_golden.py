"""Training computes what it computed when tests/golden.json was recorded.

Floats depend on the machine in their last digits: losses are compared with a
tolerance, counts and columns exactly. `tests/golden.py` compares two checkouts
on one machine, bit for bit.
"""

import json

import jax
import numpy as np
import pytest

from margin_jax import config as config_lib
from margin_jax.train import loop
from tests import golden
from tests.helpers import long

STABLE = json.loads(golden.STABLE_FILE.read_text())


def run(name, devices, folder):
  """What a case leaves behind, and how often it trained on each example."""
  fields = {**golden.SMALL, **golden.CASES[name]}
  config = config_lib.default()
  with config.unlocked():
    config.update_from_flattened_dict({**fields, 'devices': devices})
  loop.train(config, str(folder), log=lambda line: None)
  counts = np.load(folder / 'selection_counts.npy')
  return golden.left_behind(folder, fields['steps']), counts


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    *(x for x in STABLE if x != 'sentences'),
    *long('sentences'),
  ],
)
def test_a_run_is_what_it_was_on_one_device_and_on_four(tmp_path, name):
  expected = dict(STABLE[name])
  flops = expected.pop('flops').get(jax.__version__)
  all_counts = []
  for devices in (1, 4):
    found, counts = run(name, devices, tmp_path / str(devices))
    all_counts.append(counts)
    if flops:
      # XLA counts the arithmetic of the devices' indices too.
      expected_flops = pytest.approx(flops[str(devices)], rel=1e-5)
      assert found['result']['flops'] == expected_flops
    found = golden.stable(name, found)
    assert {*found} == {*expected}
    for key, value in expected.items():
      if key in ('test', 'validation'):
        assert found[key] == pytest.approx(value, abs=1e-2), key
      else:
        assert found[key] == value, key
  np.testing.assert_array_equal(*all_counts)
  assert all_counts[0].sum() == expected['examples_trained']
