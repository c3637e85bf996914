"""The exponential moving average (EMA) of a model's variables.

From step to step, the trained model changes with the examples that happen to be
in a batch. Its average over the last 1 / (1 - decay) steps changes much less.
The average is evaluated but never trained on, and no batch depends on it.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any


class Average(flax.struct.PyTreeNode):
  """The average so far.

  Attributes:
    params: averaged; before the first step the first ones.
    batch_stats: BatchNorm's running statistics, averaged like the parameters
      that they belong to.
    steps: () int32, how many steps the average is of.
  """

  params: PyTree
  batch_stats: PyTree
  steps: Array


def create(decay: float, params: PyTree, batch_stats: PyTree) -> PyTree:
  """Returns the average before the first step; {} where none is kept."""
  if not decay:
    return {}
  return Average(params, batch_stats, jnp.int32(0))


def update(
  decay: float, average: PyTree, params: PyTree, batch_stats: PyTree
) -> PyTree:
  """Returns the average with the variables after one more step.

      a_t = a_{t-1} + (1 - d) / (1 - d^t) * (x_t - a_{t-1})

  This is sum_i d^(t-i) x_i / sum_i d^(t-i), i = 1, ..., t: the average without
  a bias to the first variables or to 0, as Adam corrects it (Kingma & Ba 2015,
  section 3), and nothing is left to divide by where it is read.

  Args:
    decay: d in [0, 1); 0 keeps no average.
    average: the average of the step before.
    params: after the step.
    batch_stats: after the step.
  """
  if not decay:
    return average
  steps = average.steps + 1
  # 1 - d^t by expm1: it loses no digits where d is nearly 1.
  fraction = (1 - decay) / -jnp.expm1(steps * math.log(decay))
  params, batch_stats = jax.tree.map(
    lambda old, new: jnp.where(
      steps == 1, new, old + fraction.astype(old.dtype) * (new - old)
    ),
    (average.params, average.batch_stats),
    (params, batch_stats),
  )
  return Average(params, batch_stats, steps)
