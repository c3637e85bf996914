"""Grain's worker processes: what they read, in order, and how they end."""

import contextlib
import ctypes
import gc
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
from absl import flags

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
HANGUP = getattr(signal, 'SIGHUP', None)  # which Windows has not
# What a terminal, or a scheduler, sends to all processes of a run.
SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP)))


def _prepare_worker(index: int, count: int) -> None:
  """Lets a worker live as long as the process that reads from it, no longer.

  After a signal the trainer goes on to the end of its call, and needs examples.
  """
  del index, count
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)  # of Linux


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
  """Keeps signals from what this thread starts: threads, and processes."""
  if not hasattr(signal, 'pthread_sigmask'):  # of Windows
    yield
    return
  before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
  """Starts Python's process that frees the shared memory of ended workers.

  SIGHUP does not end it. It frees in silence what a worker had ready when it
  was told to end: Python would warn of each as of a leak.
  """
  name, silence = (
    'PYTHONWARNINGS', 'ignore::UserWarning:multiprocessing.resource_tracker'
  )  # fmt: skip
  before = os.environ.get(name)
  os.environ[name] = ','.join(filter(None, (before, silence)))
  try:
    with _signals_held_back():
      resource_tracker.ensure_running()
  finally:
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before


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
    _start_tracker()
  with _signals_held_back():
    iterator = iter(dataset)
  try:
    while True:
      # Workers start at the first; `_prepare_worker` then ignores signals.
      with _signals_held_back():
        batch = next(iterator, None)
      if batch is None:
        return
      # Copied out of the memory that is shared with the workers, which lives
      # until the last view of it is gone.
      copied = {name: np.array(value) for name, value in batch.items()}
      del batch
      yield copied
  finally:
    iterator.close()
    # Its cycles hold shared memory that Python would complain about at exit.
    gc.collect()
