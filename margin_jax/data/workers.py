"""Grain's worker processes: what they read, in order, and how they end."""

import contextlib
import ctypes
import gc
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def _prepare_worker(index: int, count: int) -> None:
  """Lets a worker live as long as the process that reads from it, no longer.

  A terminal, or a scheduler, signals all processes of a run; the trainer then
  goes on to the end of its call, and needs examples.
  """
  del index, count
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    with contextlib.suppress(AttributeError):  # Windows has no SIGHUP
      signal.signal(getattr(signal, name), signal.SIG_IGN)
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)  # of Linux


def iterate(units: Any, workers: int) -> Iterator[dict[str, np.ndarray]]:
  """Reads all units in order, by so many processes; 0 is this one."""
  import grain

  if workers and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain hands the flags to its workers
  dataset = grain.MapDataset.source(units).to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  )
  if workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=2
      ),
      worker_init_fn=_prepare_worker,
    )
  iterator = iter(dataset)
  try:
    for batch in iterator:
      # Copied out of the memory that is shared with the workers, which lives
      # until the last view of it is gone.
      copied = {name: np.array(value) for name, value in batch.items()}
      del batch
      yield copied
  finally:
    iterator.close()
    # Its cycles hold shared memory that Python would complain about at exit.
    gc.collect()
