"""Whatever a run was doing when it was stopped, it ends with the same bits."""

import numpy as np
import pytest

from tests.faults import runs
from tests.helpers import Interrupted, read_csv, saved_state, train

pytestmark = pytest.mark.slow

COUNTED = {'selection.log_counts': True}
RUNS = {
  'reuse': {'selection.reuse': 3, **COUNTED},
  'a proxy, now and then': {
    'selection.proxy': 'cnn',
    'selection.every': 2,
    'selection.start': 3,
    'selection.stop': 18,
    **COUNTED,
  },
  'a ramp': {'selection.rule': 'loss', 'selection.ramp': 0.1, **COUNTED},
  'random draws': {'selection.rule': 'selective_backprop', **COUNTED},
  "the pool's statistics": {
    'model.name': 'resnet8',
    'selection.batch_stats': 'pool',
  },
  'trimming': {
    'selection.rule': 'uniform',
    'trimming.last': 0.2,
    'trimming.backward': 'kept',
    'data.fraction': 0.05,
    'mmr.alpha': 0.0,
  },
  'Adam, warmed up': {
    'selection.rule': 'uniform',
    'optimizer.name': 'adam',
    'optimizer.warmup': 15,
    'optimizer.decay': 'linear',
    'optimizer.learning_rates': (1e-3,),
    'mmr.alpha_end': 1e-3,
  },
  'a large margin': {
    'selection.rule': 'uniform',
    'large_margin.weight': 0.1,
    'large_margin.layers': ('input', 'features'),
  },
}


@pytest.mark.parametrize('name', RUNS)
def test_a_resumed_run_has_the_same_bits(tmp_path, name):
  """Stopped at 15, of 20: it goes on from the checkpoint of step 10."""
  fields = RUNS[name]
  whole, _ = train(tmp_path / 'whole', **fields)
  with pytest.raises(Interrupted):
    train(tmp_path / 'parts', interrupt_at=15, **fields)
  again, lines = train(tmp_path / 'parts', **fields)
  assert any('starting at step 10' in line for line in lines)
  assert runs.digest(tmp_path / 'parts', 20) == runs.digest(
    tmp_path / 'whole', 20
  )
  assert again['best'] == whole['best']
  for file in ('train.csv', 'eval.csv'):
    assert runs.rows(tmp_path / 'parts', file) == runs.rows(
      tmp_path / 'whole', file
    )


def test_on_four_devices_then_one_then_four(tmp_path):
  """The same choices as on one throughout, and the same numbers nearly."""
  fields = {'selection.reuse': 3, 'checkpoint_every': 5, **COUNTED}
  train(tmp_path / 'one', **fields)
  with pytest.raises(Interrupted):
    train(tmp_path / 'parts', interrupt_at=10, devices=4, **fields)
  with pytest.raises(Interrupted):
    train(tmp_path / 'parts', interrupt_at=15, devices=1, **fields)
  _, lines = train(tmp_path / 'parts', devices=4, **fields)
  assert 'on 4 x cpu' in lines[0]
  one, parts = (
    saved_state(tmp_path / x, **fields)[0] for x in ('one', 'parts')
  )
  np.testing.assert_array_equal(one.counts, parts.counts)
  for name in ('loss', 'mean_mms'):
    found = [
      [float(row[name]) for row in read_csv(tmp_path / x / 'train.csv')]
      for x in ('one', 'parts')
    ]
    np.testing.assert_allclose(*found, rtol=1e-4)
