"""Two processes: killed and started again, or continued by one."""

import signal

import numpy as np
import pytest

from margin_jax.train import devices
from tests.faults import runs
from tests.helpers import free_port, read_csv

pytestmark = pytest.mark.slow


def start_both(workdir, *arguments):
  address = f'--coordinator=127.0.0.1:{free_port()}'
  return [
    runs.start(
      workdir,
      address,
      '--num_processes=2',
      f'--process_id={i}',
      *arguments,
      devices=2,
    )
    for i in range(2)
  ]


MEMORY = (
  '--config.selection.memory=True',
  '--config.selection.sampler=prune',
  '--config.selection.unbiased=True',
  '--config.data.fraction=0.06',  # an epoch is a dozen steps
)


def test_a_killed_process_stops_the_other_and_both_start_again(tmp_path):
  """With a score memory, and an order that is made of it."""
  for process in start_both(tmp_path / 'whole', *MEMORY):
    runs.finish(process)
  first, second = start_both(tmp_path / 'killed', *MEMORY)
  try:
    runs.wait_for(first, 'step 20/')
    second.send_signal(signal.SIGKILL)
    second.communicate()
    output = first.communicate(timeout=60)[0]
    assert first.returncode not in (0, None)
    # Whichever sees it first: the trainer, or JAX.
    ours, jaxs = 'another process of this run is gone', 'another task died'
    assert ours in output or jaxs in output, output
  finally:
    first.kill()
  for process in start_both(tmp_path / 'killed', *MEMORY):
    runs.finish(process)
  assert runs.digest(tmp_path / 'killed') == runs.digest(tmp_path / 'whole')
  for name in ('train.csv', 'eval.csv'):
    rows = [runs.rows(tmp_path / x, name) for x in ('killed', 'whole')]
    assert rows[0] == rows[1]


def stop_at(processes, line):
  """SIGTERM to all once the first has said so; at which step they stopped."""
  runs.wait_for(processes[0], line)
  for process in processes:
    process.send_signal(signal.SIGTERM)
  output, *_ = (runs.finish(p, 128 + signal.SIGTERM) for p in processes)
  return int(output.split('stopped at step ')[1].split()[0])


@pytest.mark.long
def test_two_processes_then_one_then_two(tmp_path):
  """The choices of one process, and nearly its numbers.

  Sums over two processes round otherwise, and steps make more of that;
  what this rule draws does not depend on it.
  """
  fields = (
    '--config.steps=60',
    '--config.selection.rule=random',
    '--config.optimizer.learning_rates=(0.001,0.0005)',
  )
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  runs.finish(runs.start(whole, *fields, devices=4))
  first = stop_at(start_both(parts, *fields), 'step 10/')
  one = [runs.start(parts, *fields, devices=4)]
  second = stop_at(one, f'step {first + 10}/')
  for number, process in enumerate(start_both(parts, *fields)):
    output = runs.finish(process)
    assert (f'starting at step {second}' in output) == (number == 0)
  assert 10 <= first < second < 60
  counts = [np.load(x / 'selection_counts.npy') for x in (whole, parts)]
  np.testing.assert_array_equal(*counts)
  assert counts[0].sum() == 8 * 60
  losses = [
    [float(row['loss']) for row in read_csv(x / 'eval.csv')]
    for x in (whole, parts)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.long
def test_a_process_that_hangs_ends_the_other(tmp_path):
  """It answers no heartbeat any more."""
  first, second = start_both(tmp_path, '--config.steps=100000')
  try:
    runs.wait_for(first, 'step 20/')
    second.send_signal(signal.SIGSTOP)
    first.communicate(timeout=5 * devices.HEARTBEAT_SECONDS)
    assert first.returncode not in (0, None)
  finally:
    for process in (first, second):
      process.kill()
      process.communicate()


@pytest.mark.parametrize('process', [0, 1])
def test_processes_that_do_not_find_each_other_end_with_a_line(
  tmp_path, process
):
  alone = runs.start(
    tmp_path / 'run', f'--coordinator=127.0.0.1:{free_port()}',
    '--num_processes=2', f'--process_id={process}', '--join_seconds=3',
  )  # fmt: skip
  *_, last = runs.finish(alone, 1).strip().splitlines()
  assert 'error: 2 processes did not all find 127.0.0.1:' in last
  assert 'within 3 s' in last
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'address', ['host', 'host:0', 'host:65536', ':1234', 'host:²', 'host:-1']
)
def test_an_address_is_a_host_and_a_port(address):
  with pytest.raises(ValueError, match='must be HOST:PORT, with a port from 1'):
    devices.join(address, 2, 1, 3)
