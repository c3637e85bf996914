"""One of two processes is killed: the other stops, and both start again."""

import signal
import time

from tests.faults import runs
from tests.test_processes import free_port


def start_both(workdir):
  address = f'--coordinator=127.0.0.1:{free_port()}'
  return [
    runs.start(
      workdir,
      address,
      '--num_processes=2',
      f'--process_id={i}',
      devices=2,
    )
    for i in range(2)
  ]


def test_a_killed_process_stops_the_other_and_both_start_again(tmp_path):
  for process in start_both(tmp_path / 'whole'):
    runs.finish(process)
  first, second = start_both(tmp_path / 'killed')
  try:
    runs.wait_for(first, 'step 20/')
    second.send_signal(signal.SIGKILL)
    second.communicate()
    killed = time.monotonic()
    output = first.communicate(timeout=60)[0]
    assert first.returncode not in (0, None)
    assert time.monotonic() - killed < 60
    # Whichever sees it first: the trainer, or JAX.
    ours, jaxs = 'another process of this run is gone', 'another task died'
    assert ours in output or jaxs in output, output
  finally:
    first.kill()
  for process in start_both(tmp_path / 'killed'):
    runs.finish(process)
  assert runs.digest(tmp_path / 'killed') == runs.digest(tmp_path / 'whole')
  for name in ('train.csv', 'eval.csv'):
    rows = [runs.rows(tmp_path / x, name) for x in ('killed', 'whole')]
    assert rows[0] == rows[1]
