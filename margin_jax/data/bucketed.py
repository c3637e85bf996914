"""Groups sentences of similar length, so that short ones need little padding.

A compiled program has one sentence length. So the examples of a split are put
into buckets by length. Each bucket has its own length, its own epochs and its
own program. Every step samples from one bucket, which depends on the step
alone: the buckets take turns, so that at any time each has been sampled in
proportion to its size.
"""

import dataclasses
import sys
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from margin_jax.data import in_memory
from margin_jax.data.dataset import Devices, Orders, PyTree, Split

# For each bucket its width, and which examples of the split it has.
Buckets = list[tuple[int, np.ndarray]]


def assign(lengths: np.ndarray, widths: Sequence[int], least: int) -> Buckets:
  """Assigns examples to buckets by length.

  A bucket that is too small for a sample joins the next wider. The widest
  cannot: the one before joins it.

  Args:
    lengths: (N,) of the examples, each at most widths[-1].
    widths: increasing.
    least: how many examples a bucket must have.

  Returns:
    For each bucket its width and its examples, in their order.
  """
  buckets = []
  waiting = np.zeros(0, np.int64)
  low = -1
  for width in widths:
    here = np.flatnonzero((lengths > low) & (lengths <= width))
    waiting = np.union1d(waiting, here)
    low = width
    if len(waiting) >= least and len(waiting):
      buckets.append((width, waiting))
      waiting = waiting[:0]
  if len(waiting) and buckets:
    _, before = buckets.pop()
    waiting = np.union1d(before, waiting)
  if len(waiting):
    longest = lengths[waiting].max()
    buckets.append((min(w for w in widths if w >= longest), waiting))
  return buckets


def schedule(sizes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
  """Returns which bucket each step samples from.

  Always the one that is furthest behind its fraction, the first of equals.

  Args:
    sizes: how many examples each step samples; a step of 0 stays with the
      bucket of the step before.
    counts: the examples of each bucket.

  Returns:
    (steps,) int32.
  """
  fractions = np.asarray(counts, np.float64) / sum(counts)
  sampled = np.zeros(len(counts))
  total, bucket = 0, 0
  buckets = np.zeros(len(sizes), np.int32)
  for step, size in enumerate(sizes):
    if size:
      total += size
      bucket = int(np.argmax(fractions * total - sampled))
      sampled[bucket] += size
    buckets[step] = bucket
  return buckets


class SamplerState(flax.struct.PyTreeNode):
  """A position in the epochs of every bucket.

  Attributes:
    epoch: () int32: how often as many examples as the split has were sampled,
      from any bucket; a small bucket's own epochs, which end with the last
      whole sample, run ahead of that.
    sampled: () int32, since this epoch began.
    buckets: a position each.
  """

  epoch: Array
  sampled: Array
  buckets: tuple[in_memory.SamplerState, ...]

  @classmethod
  def create(
    cls, counts: Sequence[int], weighted: bool = False
  ) -> 'SamplerState':
    """Returns the state before the first step, of buckets of such sizes."""
    buckets = tuple(
      in_memory.SamplerState.create(count, weighted) for count in counts
    )
    return cls(epoch=jnp.int32(0), sampled=jnp.int32(0), buckets=buckets)

  @property
  def epoch_fraction(self) -> Array:
    """The examples of the buckets' epochs, as a fraction of all."""
    total = sum(one.order.shape[0] for one in self.buckets)
    return sum(one.count for one in self.buckets) / total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucketed(in_memory.InMemory):
  """A `Dataset` of sentences, on every device in buckets of like length.

  Inputs are (N, L, ...), padded at their end.

  Attributes:
    buckets: for each split its buckets; no two of the same width.
    vocabulary: how many different tokens there are.
    f1: whether F1 of class 1 is reported beside accuracy.
  """

  buckets: dict[str, Buckets]
  vocabulary: int | None = None
  f1: bool = False

  @property
  def widths(self) -> tuple[int, ...]:
    """The widths of the training split's buckets."""
    return tuple(width for width, _ in self.buckets['train'])

  @property
  def most_steps_per_call(self) -> int:
    """One where the next step may sample from another bucket."""
    return 1 if self.bucket_count > 1 else sys.maxsize

  @property
  def bucket_count(self) -> int:
    """The number of the training split's buckets."""
    return len(self.buckets['train'])

  def arrays(self, name: str) -> list[Split]:
    """Returns the buckets of a split, each with 'row', where they are in it."""
    split = self.splits[name]
    return [
      {
        'inputs': split['inputs'][rows, :width],
        'label': split['label'][rows],
        'row': rows.astype(np.int32),
      }
      for width, rows in self.buckets[name]
    ]

  def state(self, sampler_weights: bool = False) -> PyTree:
    """See `Dataset.state`."""
    counts = [len(x) for _, x in self.buckets['train']]
    return SamplerState.create(counts, sampler_weights)

  def sample(
    self,
    state: PyTree,
    data: dict[str, Array],
    size: int,
    *,
    key: Array,
    step: Array,
    axis_name: str,
    orders: Orders | None = None,
  ) -> tuple[PyTree, dict[str, Array]]:
    """See `Dataset.sample`; the width of `data` tells the bucket."""
    bucket = self.widths.index(data['inputs'].shape[1])
    moved, examples = super().sample(
      state.buckets[bucket], data, size, key=jax.random.fold_in(key, bucket),
      step=step, axis_name=axis_name, orders=orders,
    )  # fmt: skip
    examples['index'] = data['row'][examples['index']]
    buckets = list(state.buckets)
    buckets[bucket] = moved
    total = sum(one.order.shape[0] for one in buckets)
    sampled = state.sampled + size
    passed = sampled > total
    after = SamplerState(
      epoch=state.epoch + passed,
      sampled=sampled - passed * total,
      buckets=tuple(buckets),
    )
    return after, examples

  def fit(
    self, examples: dict[str, Array], data: dict[str, Array]
  ) -> dict[str, Array]:
    """Returns the examples with sentences padded or cut to those of `data`."""
    width, inputs = data['inputs'].shape[1], examples['inputs']
    missing = max(width - inputs.shape[1], 0)
    pads = [(0, 0), (0, missing)] + [(0, 0)] * (inputs.ndim - 2)
    return {**examples, 'inputs': jnp.pad(inputs, pads)[:, :width]}

  def loader(
    self, devices: Devices, sizes: Sequence[int], start: int, seed: int
  ) -> 'Loader':
    """Returns a loader that has a bucket for every step."""
    del start, seed
    return Loader(devices, self.arrays('train'), sizes)

  def chunks(
    self,
    devices: Devices,
    names: Sequence[str],
    batch_size: int,
    examples: int | None = None,
    whole: bool = False,
  ) -> in_memory.Splits:
    """See `Dataset.chunks`; goes through the buckets unless it must not."""
    if whole or examples is not None:
      return super().chunks(devices, names, batch_size, examples)
    arrays = {name: self.arrays(name) for name in names}
    return in_memory.Splits(devices, arrays, batch_size)


class Loader:
  """The buckets on every device; each call is handed one."""

  seconds_waited = 0.0
  undecodable = 0
  ordered = False

  def __init__(
    self, devices: Devices, buckets: list[Split], sizes: Sequence[int]
  ):
    """Copies the buckets to the devices, and schedules the steps.

    Args:
      devices: the devices that train.
      buckets: 'inputs', 'label' and 'row' of each.
      sizes: how many examples each step of the run samples.
    """
    self._data = [devices.replicate(bucket) for bucket in buckets]
    self._schedule = schedule(sizes, [len(x['label']) for x in buckets])

  def bucket(self, step: int) -> int:
    """Returns which bucket the step samples from."""
    return int(self._schedule[step])

  def example(self, bucket: int, size: int) -> PyTree:
    """Returns the bucket."""
    del size
    return self._data[bucket]

  def __call__(self, step: int) -> PyTree:
    """Returns the bucket that the step samples from."""
    return self._data[self.bucket(step)]

  def replay(self, step: int, sampler: PyTree) -> PyTree:
    """Returns the bucket that the step samples from."""
    del sampler
    return self(step)

  def close(self) -> None:
    """Does nothing: no process reads."""
