"""Sentences of like length together, so that short ones do not pay for long.

A compiled program has one length of sentence. So the examples of a split are
parted by length; each part is padded to its own width only, has a stream of
epochs of its own, and a program of its own. Every draw is from one part. Which
one is a function of the step alone: the parts take turns so that at any time
each has been drawn from in proportion to its size.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from margin_jax.data import in_memory

Split = dict[str, np.ndarray]


def assign(
  lengths: np.ndarray, widths: Sequence[int], least: int
) -> list[tuple[int, np.ndarray]]:
  """Parts by length; one that is too small for a draw joins the next longer.

  The longest part cannot: the part before joins it.

  Args:
    lengths: (N,) of the examples, each at most widths[-1].
    widths: increasing.
    least: how many examples a part must have.

  Returns:
    For each part its width and its examples, in their order.
  """
  parts = []
  waiting = np.zeros(0, np.int64)
  low = -1
  for width in widths:
    here = np.flatnonzero((lengths > low) & (lengths <= width))
    waiting = np.union1d(waiting, here)
    low = width
    if len(waiting) >= least and len(waiting):
      parts.append((width, waiting))
      waiting = waiting[:0]
  if len(waiting) and parts:
    _, before = parts.pop()
    waiting = np.union1d(before, waiting)
  if len(waiting):
    longest = lengths[waiting].max()
    parts.append((min(w for w in widths if w >= longest), waiting))
  return parts


def plan(sizes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
  """Which part each step draws from.

  Always the one that is furthest behind its share, the first of equals.

  Args:
    sizes: how many examples each step draws; a step of 0 stays with the part
      of the step before.
    counts: the examples of each part.

  Returns:
    (steps,) int32.
  """
  shares = np.asarray(counts, np.float64) / sum(counts)
  drawn = np.zeros(len(counts))
  total, part = 0, 0
  found = np.zeros(len(sizes), np.int32)
  for step, size in enumerate(sizes):
    if size:
      total += size
      part = int(np.argmax(shares * total - drawn))
      drawn[part] += size
    found[step] = part
  return found


class Streams(flax.struct.PyTreeNode):
  """A place in the stream of epochs of every part.

  Attributes:
    epoch: () int32: how often as many examples as the split has were drawn,
      of any part; a small part's own epochs, which end with the last whole
      draw, run ahead of that.
    drawn: () int32, since this epoch began.
    parts: a stream each.
  """

  epoch: Array
  drawn: Array
  parts: tuple[in_memory.Stream, ...]

  @classmethod
  def create(cls, counts: Sequence[int]) -> 'Streams':
    """The streams before the first draw, of parts of so many examples."""
    streams = tuple(in_memory.Stream.create(count) for count in counts)
    return cls(epoch=jnp.int32(0), drawn=jnp.int32(0), parts=streams)


def draw(
  streams: Streams,
  split: dict[str, Array],
  size: int,
  *,
  part: int,
  key: Array,
  **kwargs,
) -> tuple[Streams, dict[str, Array]]:
  """What `in_memory.draw` is for whole splits, for one part of one.

  Args:
    streams: where the last draws ended.
    split: the part: as `in_memory.draw` takes it, and 'row', (n,) int32, its
      examples' places in the whole split.
    size: as `in_memory.draw` takes it.
    part: which one it is; static.
    key: the run's PRNG key.
    **kwargs: the others of `in_memory.draw`.

  Returns:
    The streams after the draw, and the pool; 'index' is of the whole split.
  """
  stream, pool = in_memory.draw(
    streams.parts[part], split, size, key=jax.random.fold_in(key, part),
    **kwargs,
  )  # fmt: skip
  pool['index'] = split['row'][pool['index']]
  after = list(streams.parts)
  after[part] = stream
  examples = sum(one.order.shape[0] for one in after)
  drawn = streams.drawn + size
  passed = drawn > examples
  moved = Streams(
    epoch=streams.epoch + passed,
    drawn=drawn - passed * examples,
    parts=tuple(after),
  )
  return moved, pool
