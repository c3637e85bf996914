"""What a train step does: the static description that it is compiled from."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import optax
from jax import Array

from margin_jax import selection
from margin_jax.train import guard

PyTree = Any

# What a step does with the pool, by `StepSpec.branch_of(step)`.
PLAIN, FRESH, AGAIN = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Selection:
  """How the batch is chosen from a pool.

  Attributes:
    rule: (logits, kernel, labels, keys) -> scores, of this device's examples.
    arrange: (scores, labels, draws, key, epoch) -> scores, of the whole pool:
      what some rules do with all scores at once; or None.
    pool_size: B, over all devices.
    scope: 'global' ranks over all devices, 'device' within each.
    reuse: how many steps one scored pool feeds, best ranks first.
    every: score at every n-th step; the others are plain.
    start: first step that scores; earlier ones are plain.
    stop: first step that does not score any more, or None.
    scorer: the module that scores: the model itself, in `score_dtype`, or the
      proxy.
    resolution: side of the images that are scored, or None for their own.
    rows: how many rows of a device's share are scored at a time; None is all.
    pool_statistics: whether BatchNorm's running statistics follow the pool:
      scoring is then one train-mode forward, without dropout.
  """

  rule: selection.Rule
  arrange: selection.Arrange | None
  pool_size: int
  scope: str
  reuse: int
  every: int
  start: int
  stop: int | None
  scorer: nn.Module
  resolution: int | None
  rows: int | None
  pool_statistics: bool


@dataclasses.dataclass(frozen=True)
class Trimming:
  """Mini-batch trimming: the loss is over the hardest part of the batch.

  Attributes:
    keep: how many examples are kept, by epoch.
    steps_per_epoch: of the batches.
    kept_only: whether the backward pass runs on the kept part only. It then
      has one of `sizes`, the smallest that holds it.
    sizes: increasing; each divisible by the number of devices.
  """

  keep: tuple[int, ...]
  steps_per_epoch: int
  kept_only: bool
  sizes: tuple[int, ...]

  def epoch(self, step: int | Array) -> int | Array:
    """The epoch of a step, the last one at the latest."""
    last = len(self.keep) - 1
    epoch = step // self.steps_per_epoch
    return epoch - (epoch > last) * (epoch - last)


@dataclasses.dataclass(frozen=True)
class LargeMargin:
  """The large-margin loss as part of the loss.

  Attributes:
    weight: of the large-margin loss.
    cross_entropy: weight of cross-entropy beside it; 0 is none.
    layers: names of the layers at which it asks for margins.
    options: the other keyword arguments of `large_margin_loss`.
  """

  weight: float
  cross_entropy: float
  layers: tuple[str, ...]
  options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """What a train step does, all of it static.

  Attributes:
    model: returns (logits, features); its head is called `head`.
    optimizer: applied to the mean gradient over devices.
    sample: `Dataset.sample`.
    fit: `Dataset.fit`.
    prepare: inputs as stored -> inputs of the model.
    num_classes: C.
    batch_size: b, over all devices.
    selection: how the batch is chosen; None is plain training.
    trimming: which part of the batch counts; None is all of it.
    proxy: a small model trained along on the batches, which scores; or None.
    alpha: step -> weight of MMR, or None for no MMR in the loss.
    mmr: keyword arguments of `mmr_penalty`.
    large_margin: the large-margin loss, or None.
    learning_rate: step -> learning rate, for the metrics.
    lanes: number of devices.
    axis: name of the mapped axis.
    average_batch_stats: whether the devices' BatchNorm statistics differ, so
      that running averages must be averaged over devices.
    on_nonfinite: what a step does where a number is not finite.
    f1: whether an evaluation counts what F1 needs.
    branch: which branch to compile alone; None compiles a switch of all.
  """

  model: nn.Module
  optimizer: optax.GradientTransformation
  sample: Callable
  fit: Callable
  prepare: Callable[[PyTree], PyTree]
  num_classes: int
  batch_size: int
  selection: Selection | None
  trimming: Trimming | None
  proxy: nn.Module | None
  alpha: optax.Schedule | None
  mmr: dict[str, Any]
  large_margin: LargeMargin | None
  learning_rate: optax.Schedule
  lanes: int
  axis: str
  average_batch_stats: bool
  on_nonfinite: str = guard.STOP
  f1: bool = False
  branch: int | None = None

  def at(self, branch: int | None) -> 'StepSpec':
    """The spec of the steps that take this branch."""
    return dataclasses.replace(self, branch=branch)

  def at_once(self) -> 'StepSpec':
    """The spec that scores all rows at a time; with the same results."""
    if self.selection is None or self.selection.rows is None:
      return self
    whole = dataclasses.replace(self.selection, rows=None)
    return dataclasses.replace(self, selection=whole)

  def sizes(self, steps: int) -> list[int]:
    """How many examples each step of a run samples."""
    return [self.examples_drawn(self.branch_of(s)) for s in range(steps)]

  def branches(self) -> tuple[int, ...]:
    """The branches that some step takes."""
    if self.trimming is not None and self.trimming.kept_only:
      sizes = self.trimming.sizes
      used = {_smallest(sizes, keep) for keep in self.trimming.keep}
      return tuple(sorted(used))
    chosen = self.selection
    if chosen is None:
      return (PLAIN,)
    used = [FRESH]
    if chosen.every > 1 or chosen.start or chosen.stop is not None:
      used.insert(0, PLAIN)
    if chosen.reuse > 1:
      used.append(AGAIN)
    return tuple(used)

  def branch_of(self, step: int | Array) -> int | Array:
    """Which branch a step takes; for host integers and traced ones alike."""
    if self.trimming is not None and self.trimming.kept_only:
      table = [_smallest(self.trimming.sizes, k) for k in self.trimming.keep]
      epoch = self.trimming.epoch(step)
      if isinstance(step, int):
        return table[epoch]
      return sum((epoch == i) * branch for i, branch in enumerate(table))
    chosen = self.selection
    if chosen is None:
      return PLAIN
    since = step - chosen.start
    active = since >= 0
    if chosen.stop is not None:
      active = active & (step < chosen.stop)
    fresh = active & (since % (chosen.every * chosen.reuse) == 0)
    again = active & (since % chosen.reuse != 0)
    return fresh * FRESH + again * AGAIN

  def examples_drawn(self, branch: int) -> int:
    """How many examples a step of this branch draws."""
    if self.selection is None or branch == PLAIN:
      return self.batch_size
    return self.selection.pool_size if branch == FRESH else 0

  def examples_scored(self, branch: int) -> int:
    """How many examples a step of this branch scores."""
    if self.trimming is not None and self.trimming.kept_only:
      # The largest size needs no scores: nothing is left out.
      return self.batch_size if branch + 1 < len(self.trimming.sizes) else 0
    return self.selection.pool_size if branch == FRESH else 0

  def examples_trained(self, branch: int) -> int:
    """How many examples the backward pass of this branch runs on."""
    if self.trimming is not None and self.trimming.kept_only:
      return self.trimming.sizes[branch]
    return self.batch_size


def _smallest(sizes: tuple[int, ...], keep: int) -> int:
  return next(i for i, size in enumerate(sizes) if size >= keep)
