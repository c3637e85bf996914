"""Devices and processes: pmap, placement, and how processes find each other.

State and data are replicated: plain arrays without a leading device axis,
passed to `pmap` with `in_axes=None` and returned with `out_axes=None`. So a
checkpoint does not know how many devices wrote it. `pmap` needs at least one
mapped argument: `_map` adds one that nobody reads. What tells the devices apart
is `lax.axis_index`.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from margin_jax import cpu, files

AXIS = 'device'

PyTree = Any

# How many calls Python may run ahead of the devices. XLA:CPU's collectives
# deadlock with a hundred calls waiting; a few keep any device busy.
MAX_CALLS_AHEAD = 8

# How long a process may be silent until the others give it up.
HEARTBEAT_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Shard:
  """A process's part of every pool: the index-th of `count` equal ones."""

  index: int
  count: int


def join(
  coordinator: str,
  processes: int | None,
  process: int | None,
  seconds: int,
) -> None:
  """Makes this process one of several that train together.

  Where they do not all find each other in time, it ends the process with one
  line: JAX would abort it with a stack of C++.

  Args:
    coordinator: HOST:PORT of process 0, or 'auto' where JAX finds out by
      itself: TPU pods, Slurm and the like.
    processes: how many there are.
    process: which one this is, from 0.
    seconds: how long to wait for the others.

  Raises:
    ValueError: an argument is missing or malformed.
  """
  options = {
    'heartbeat_timeout_seconds': HEARTBEAT_SECONDS,
    'initialization_timeout': seconds + 60,  # ours comes first
  }
  if coordinator == 'auto':
    with _in_time(seconds, 'the processes did not all find each other'):
      jax.distributed.initialize(**options)
    return
  host, _, port = coordinator.rpartition(':')
  is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 2**16
  if not host or not is_port:
    raise ValueError(
      'coordinator must be HOST:PORT, with a port from 1 to 65535, or auto; '
      f'got {coordinator!r}'
    )
  if processes is None or process is None or not 0 <= process < processes:
    raise ValueError(
      f'process_id must be in [0, num_processes), got {process} and {processes}'
    )
  problem = f'{processes} processes did not all find {coordinator}'
  with _in_time(seconds, problem):
    jax.distributed.initialize(coordinator, processes, process, **options)


@contextlib.contextmanager
def _in_time(seconds: int, problem: str) -> Iterator[None]:
  """Ends the process with one line unless the block is done in time."""

  def end() -> None:
    print(
      f'error: {problem} within {seconds} s: is process 0 running, and can '
      'the others reach it?',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)  # the main thread waits in C++

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def several_processes() -> bool:
  """Returns whether this process is one of several that train as one."""
  return jax.process_count() > 1


def is_main_process() -> bool:
  """Returns whether this is the process of a run that writes files."""
  return jax.process_index() == 0


def use_compilation_cache() -> None:
  """Keeps compiled programs for the next start, where that is quiet.

  Not those with operations of oneDNN (see `cpu.tune`), which XLA cannot write
  down; they are compiled at every start.
  """
  for reason in ('bad_alloc', 'MemoryError'):
    warnings.filterwarnings(
      'ignore', f'Error writing persistent compilation cache .*{reason}'
    )
  if jax.config.jax_compilation_cache_dir is None:
    # XLA:CPU of jax 0.10 logs false alarms about the processor, ten lines a
    # start, for every program it loads. JAX_COMPILATION_CACHE_DIR overrides.
    if jax.default_backend() == 'cpu' and jax.__version_info__ < (0, 11):
      return
    folder = files.cache_dir() / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def wait_for_old(results: list[PyTree]) -> None:
  """Waits for the result that came `MAX_CALLS_AHEAD` calls before the last."""
  if len(results) > MAX_CALLS_AHEAD:
    jax.block_until_ready(results[-1 - MAX_CALLS_AHEAD])


class Devices:
  """The devices of a run.

  Attributes:
    total: how many there are over all processes.
    kind: what JAX calls their kind.
    platform: 'cpu', 'gpu' or 'tpu'.
    is_main_process: whether this is the process that writes files.
  """

  def __init__(self, count: int | None = None):
    """Takes the first `count` devices, or all.

    Raises:
      ValueError: there are fewer, or `count` does not fit several processes.
    """
    cpu.is_default()  # starts the backend, or says why not
    available = jax.device_count()
    count = available if count is None else count
    if not 1 <= count <= available:
      raise ValueError(
        f'devices must be between 1 and {available}, the number that JAX '
        f'sees, got {count}'
      )
    if several_processes() and count != available:
      raise ValueError(
        f'devices must be all {available} devices where there are several '
        f'processes, got {count}'
      )
    self._all = jax.devices()[:count]
    self._local = [
      d for d in self._all if d.process_index == jax.process_index()
    ]
    self.total = count
    self.is_main_process = is_main_process()
    self.kind = self._all[0].device_kind
    self.platform = self._all[0].platform
    self._mesh = Mesh(np.array(self._local), (AXIS,))
    self._unread = jax.device_put(
      np.zeros(len(self._local), np.int32),
      NamedSharding(self._mesh, PartitionSpec(AXIS)),
    )

  def memory(self) -> dict[str, int]:
    """Returns the memory that the fullest device, or a process on CPUs, uses.

    Returns:
      'memory_bytes', in use now, and 'memory_peak_bytes', the most that was,
      where the backend tells; without it 'memory_bytes' alone, the resident
      memory of this process.
    """
    stats = [device.memory_stats() for device in self._local]
    if None in stats:
      return {'memory_bytes': psutil.Process().memory_info().rss}
    return {
      'memory_bytes': max(x['bytes_in_use'] for x in stats),
      'memory_peak_bytes': max(x['peak_bytes_in_use'] for x in stats),
    }

  def replicate(self, tree: PyTree) -> PyTree:
    """Copies the arrays of the tree to every local device."""
    # From the host: device_put of an array that is on a device already may
    # share its buffer, and donating the result would delete the original.
    host = jax.tree.map(np.array, jax.device_get(tree))
    return jax.device_put(host, NamedSharding(self._mesh, PartitionSpec()))

  def barrier(self, name: str) -> None:
    """Waits for the other processes to come to the same line."""
    if several_processes():
      multihost_utils.sync_global_devices(name)

  def sum(self, number: int) -> int:
    """Sums over all processes; all must ask."""
    if not several_processes():
      return number
    return int(multihost_utils.process_allgather(np.array(number)).sum())

  @property
  def process_shard(self) -> Shard:
    """Which part of the examples this process feeds to its devices."""
    return Shard(jax.process_index(), jax.process_count())

  def shard(self, tree: PyTree) -> PyTree:
    """Spreads this process's rows over its devices, in order.

    Args:
      tree: arrays whose rows the local devices divide evenly.

    Returns:
      Arrays (local devices, rows / local devices, ...), an argument that
      `compile` calls sharded.
    """
    count = len(self._local)
    spread = jax.tree.map(
      lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), tree
    )
    return jax.device_put(
      spread, NamedSharding(self._mesh, PartitionSpec(AXIS))
    )

  def compile(
    self,
    function: Callable,
    *args: PyTree,
    donate_first: bool = False,
  ) -> 'Compiled':
    """Compiles `function(*args)` for all devices, under one pmap.

    Args:
      function: the per-device function; its collectives use `AXIS`, and what
        it returns is the same on all devices.
      *args: arguments to compile for; shapes, dtypes and placement count. Of
        those that `shard` has made each device sees its own rows; it sees all
        of the others.
      donate_first: whether the first argument's memory is reused.

    Returns:
      A callable of `*args`.
    """
    cpu.forget_programs()
    mapped = self._map(function, args, donate_first)
    lowered = mapped.lower(*args, self._unread)
    return Compiled(mapped, lowered, self._unread, self.total)

  def flops(self, function: Callable, *args: PyTree) -> float:
    """Returns what `Compiled.flops` would be, without compiling."""
    mapped = self._map(function, args, False)
    return _flops(mapped.lower(*args, self._unread), self.total)

  def _map(
    self, function: Callable, args: tuple[PyTree, ...], donate_first: bool
  ) -> Callable:
    axes = [0 if _is_sharded(arg) else None for arg in args]

    def per_device(*args_and_unread: PyTree) -> PyTree:
      return function(*args_and_unread[:-1])

    return jax.pmap(
      per_device,
      axis_name=AXIS,
      in_axes=(*axes, 0),
      out_axes=None,
      donate_argnums=(0,) if donate_first else (),
      devices=self._local if not several_processes() else None,
    )


def _is_sharded(tree: PyTree) -> bool:
  """Returns whether `Devices.shard` made the arrays of the tree."""
  shardings = [
    getattr(leaf, 'sharding', None) for leaf in jax.tree.leaves(tree)
  ]
  return any(
    isinstance(x, NamedSharding) and x.spec[:1] == (AXIS,) for x in shardings
  )


def _flops(lowered: jax.stages.Lowered, devices: int) -> float:
  cost = lowered.cost_analysis() or {}
  return float(cost.get('flops', 0.0)) * devices


class Compiled:
  """A compiled program, called with the arguments of the per-device function.

  Attributes:
    lowered: the program before optimization.
    flops: FLOPs of one call over all devices, from XLA's cost analysis of the
      program before optimization, so that they do not depend on the backend
      (on CPUs, jax 0.10 counts up to half a percent more: see `cpu`). The body
      of a loop counts once.
    first_call_seconds: with several processes, of the first call, which
      compiles; else 0.
  """

  def __init__(
    self,
    mapped: Callable,
    lowered: jax.stages.Lowered,
    unread: jax.Array,
    devices: int,
  ):
    self.lowered = lowered
    self.flops = _flops(lowered, devices)
    self._unread = unread
    # With several processes a program takes global arrays, and only `pmap`
    # itself makes them of each process's own; it then compiles when called.
    self._late = several_processes()
    self._executable = mapped if self._late else cpu.compile(lowered)
    self.first_call_seconds = 0.0

  def __call__(self, *args: PyTree) -> PyTree:
    started = time.perf_counter()
    results = self._executable(*args, self._unread)
    if self._late:
      self.first_call_seconds = time.perf_counter() - started
      self._late = False
    return results

  def memory_analysis(self) -> Any:
    """What the optimized program needs, in bytes, as XLA tells."""
    return self._executable.memory_analysis()

  def as_text(self) -> str:
    """The optimized program."""
    return cpu.compile(self.lowered).as_text()
