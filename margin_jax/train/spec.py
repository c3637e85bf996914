"""The static description that a train step is compiled from."""

import dataclasses
import enum
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import numpy as np
import optax
from jax import Array

from margin_jax import losses, sampling, selection
from margin_jax.data import Dataset
from margin_jax.train import guard

# A step, or many: functions of a step hold for host integers, NumPy arrays and
# traced arrays alike.
Step = int | np.ndarray | Array


class StepKind(enum.IntEnum):
  """Where a step's batch comes from."""

  PLAIN = 0  # b examples, sampled
  SCORE = 1  # the lowest of a pool of B examples, scored
  REUSE = 2  # the buffer of examples that an earlier pool left


@dataclasses.dataclass(frozen=True)
class Selection:
  """How the batch is selected from a pool.

  Attributes:
    rule: scores the examples.
    transform: changes the scores of the whole pool before the lowest are
      selected; or None.
    pool_size: B, over all devices.
    scope: 'global' ranks over all devices, 'device' within each.
    reuse: how many steps one scored pool feeds, best ranks first.
    every: score at every n-th step; the others are plain.
    start: first step that scores; earlier ones are plain.
    stop: first step that does not score any more, or None.
    scorer: the module that scores: the model itself, in `score_dtype`, or the
      proxy.
    resolution: side of the images that are scored, or None for their own.
    chunk_size: how many examples of a device's shard are scored at a time;
      None is all.
    pool_statistics: whether BatchNorm's running statistics follow the pool:
      scoring is then one train-mode forward, without dropout.
  """

  rule: selection.Rule
  transform: selection.ScoreTransform | None
  pool_size: int
  scope: str
  reuse: int
  every: int
  start: int
  stop: int | None
  scorer: nn.Module
  resolution: int | None
  chunk_size: int | None
  pool_statistics: bool

  def kind_of(self, step: Step) -> Step:
    """Returns the `StepKind` of a step."""
    since = step - self.start
    active = since >= 0
    if self.stop is not None:
      active = active & (step < self.stop)
    score = active & (since % (self.every * self.reuse) == 0)
    reuse = active & (since % self.reuse != 0)
    return score * StepKind.SCORE.value + reuse * StepKind.REUSE.value

  def batch_in_buffer(self, step: Step) -> Step:
    """Returns which of the `reuse` batches of a pool a step trains on."""
    return (step - self.start) % self.reuse


# (remembered, key, step) -> the order of an epoch.
SampleFunction = Callable[[sampling.Remembered, Array, Array], sampling.Order]


@dataclasses.dataclass(frozen=True)
class MemorySpec:
  """What a run remembers of every training example, and how it uses that.

  Attributes:
    rule: scores the examples of a batch.
    decay: of the exponential average of an example's scores; 0 keeps the last.
    sample: makes the order of an epoch.
    has_weights: whether that order has weights.
    visits: whether to remember the step at which an example was last in a
      batch.
    errors: whether to remember if it was misclassified then.
    warmup: the first epochs, which are shuffled.
    tail_start: the first step of the run's last part, which is shuffled.
  """

  rule: selection.Rule
  decay: float
  sample: SampleFunction
  has_weights: bool
  visits: bool
  errors: bool
  warmup: int
  tail_start: int


@dataclasses.dataclass(frozen=True)
class Trimming:
  """Mini-batch trimming: the loss is over the hardest part of the batch.

  Attributes:
    keep: how many examples count, by epoch.
    steps_per_epoch: the number of batches in an epoch.
    backward_sizes: how many examples the backward pass runs on, by epoch: at
      least those that count, selected by an eval-mode forward; None runs it on
      the whole batch.
  """

  keep: tuple[int, ...]
  steps_per_epoch: int
  backward_sizes: tuple[int, ...] | None

  def epoch(self, step: Step) -> Step:
    """Returns the epoch of a step, the last one at the latest."""
    last = len(self.keep) - 1
    epoch = step // self.steps_per_epoch
    return epoch - (epoch > last) * (epoch - last)


@dataclasses.dataclass(frozen=True)
class LossTerm:
  """A loss beside the risk.

  Attributes:
    metric: the name of its metric.
    loss: of `losses.Outputs`; returns (b,), whose mean is taken, or ().
    weight: step -> its weight in the total; None only measures it.
  """

  metric: str
  loss: losses.Loss
  weight: optax.Schedule | None


class Variant(NamedTuple):
  """What distinguishes the compiled programs of a run.

  Attributes:
    kind: where the batch comes from.
    backward_size: how many examples the backward pass runs on.
    bucket: the bucket of the dataset that the examples come from.
    trains_proxy: 1 where the proxy is trained, else 0.
  """

  kind: StepKind
  backward_size: int
  bucket: int
  trains_proxy: int


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """What a train step does, all of it static.

  Attributes:
    model: returns (logits, features); its last layer is called `head`.
    optimizer: applied to the mean gradient over devices.
    dataset: samples the examples, and prepares them for the model.
    batch_size: b, over all devices.
    accumulate: in how many parts the batch is differentiated, one after the
      other.
    selection: how the batch is selected from a pool that is scored; None is
      plain training.
    memory: how scores of earlier steps are remembered and used; or None.
    trimming: which part of the batch counts; None is all of it.
    proxy: a small model trained along on the batches, which scores; or None.
    proxy_every: it is trained at every n-th step before `selection.stop`.
    proxy_optimizer: applied to the proxy's mean gradient; its learning rate is
      that of the step.
    ema_decay: decay of the average of the model's variables; 0 is none.
    risk: the loss of an example, `loss.risk`.
    risk_weight: weight of the risk in the total loss; None is 1.
    terms: the other losses, added in this order.
    learning_rate: step -> learning rate, for the metrics.
    alpha: step -> weight of MMR, for the metrics; None is 0.
    axis_name: the mapped axis of the devices.
    average_batch_stats: whether the devices' BatchNorm statistics differ, so
      that running averages must be averaged over devices.
    batch_norm_examples: BatchNorm normalizes groups of so many examples; None
      is all that it sees.
    on_nonfinite: what a step does where a number is not finite.
    unrolled: whether the parts of the batch are so many copies in the program,
      and not a loop.
    variant: the only variant to compile; None compiles a switch between all.
  """

  model: nn.Module
  optimizer: optax.GradientTransformation
  dataset: Dataset
  batch_size: int
  accumulate: int
  selection: Selection | None
  memory: MemorySpec | None
  trimming: Trimming | None
  proxy: nn.Module | None
  proxy_every: int
  proxy_optimizer: optax.GradientTransformation | None
  ema_decay: float
  risk: losses.Loss
  risk_weight: float | None
  terms: tuple[LossTerm, ...]
  learning_rate: optax.Schedule
  alpha: optax.Schedule | None
  axis_name: str
  average_batch_stats: bool
  batch_norm_examples: int | None = None
  on_nonfinite: str = guard.STOP
  unrolled: bool = False
  variant: Variant | None = None

  def specialize(self, variant: Variant | None) -> 'StepSpec':
    """Returns the spec of the steps of this variant alone."""
    return dataclasses.replace(self, variant=variant)

  def without_loops(self) -> 'StepSpec':
    """Returns the spec of a step without loops, to the same results.

    It scores the pool at once, and its FLOPs are those of pool and batch: XLA
    counts the body of a loop once.
    """
    whole = self.selection
    if whole is not None:
      whole = dataclasses.replace(whole, chunk_size=None)
    return dataclasses.replace(self, selection=whole, unrolled=True)

  def has_loops(self, kind: StepKind) -> bool:
    """Returns whether there is a loop in the program of a step of this kind."""
    chunked = kind == StepKind.SCORE and self.selection.chunk_size is not None
    return chunked or (self.accumulate > 1 and not self.unrolled)

  def checked(self) -> tuple[str, ...]:
    """Returns the metrics that must be finite.

    Losses that are only measured are not among them.
    """
    weighted = [term.metric for term in self.terms if term.weight is not None]
    return guard.checked(weighted)

  @property
  def weighted(self) -> bool:
    """Whether examples have weights, from the dataset or a sampler."""
    sampler = self.memory is not None and self.memory.has_weights
    return sampler or self.dataset.weighted

  def kind_of(self, step: Step) -> Step:
    """Returns the `StepKind` of a step."""
    if self.selection is None:
      return 0 * step
    return self.selection.kind_of(step)

  def kinds(self) -> tuple[StepKind, ...]:
    """Returns the kinds that some step of a long run has."""
    selected = self.selection
    if selected is None:
      return (StepKind.PLAIN,)
    kinds = [StepKind.SCORE]
    if selected.every > 1 or selected.start or selected.stop is not None:
      kinds.insert(0, StepKind.PLAIN)
    if selected.reuse > 1:
      kinds.append(StepKind.REUSE)
    return tuple(kinds)

  def backward_size(self, step: Step) -> Step:
    """Returns how many examples the backward pass of a step runs on."""
    if self.trimming is None or self.trimming.backward_sizes is None:
      return 0 * step + self.batch_size
    epoch = self.trimming.epoch(step)
    sizes = self.trimming.backward_sizes
    return sum((epoch == i) * size for i, size in enumerate(sizes))

  def backward_sizes(self) -> tuple[int, ...]:
    """Returns the sizes that some step has, increasing."""
    if self.trimming is None or self.trimming.backward_sizes is None:
      return (self.batch_size,)
    return tuple(sorted({*self.trimming.backward_sizes}))

  def trains_proxy(self, step: Step) -> Step:
    """Returns 1 for a step that trains the proxy, else 0."""
    if self.proxy is None:
      return 0 * step
    trains = step % self.proxy_every == 0
    stop = self.selection.stop
    return 0 * step + (trains if stop is None else trains & (step < stop))

  def proxy_branches(self) -> tuple[int, ...]:
    """Returns what `trains_proxy` is for some step."""
    if self.proxy is None:
      return (0,)
    always = self.proxy_every == 1 and self.selection.stop is None
    return (1,) if always else (0, 1)

  def examples_sampled(self, step: Step) -> Step:
    """Returns how many new examples a step reads, over all devices."""
    kind = self.kind_of(step)
    pool_size = 0 if self.selection is None else self.selection.pool_size
    plain = (kind == StepKind.PLAIN) * self.batch_size
    return plain + (kind == StepKind.SCORE) * pool_size

  def sizes(self, steps: int) -> np.ndarray:
    """Returns how many new examples each step of a run reads, (steps,)."""
    return self.examples_sampled(np.arange(steps))

  def examples_scored(self, variant: Variant) -> int:
    """Returns how many examples a step of this variant scores.

    Trimming with a short backward pass scores the batch, to find its hardest.
    """
    if variant.backward_size < self.batch_size:
      return self.batch_size
    if variant.kind == StepKind.SCORE:
      return self.selection.pool_size
    return 0
