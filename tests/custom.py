"""Networks and a dataset that the tests bring along."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


class Mlp(nn.Module):
  """Reads vectors."""

  num_classes: int
  norm: bool = False
  head: str = 'head'
  more: int = 0

  @nn.compact
  def __call__(self, inputs, *, train):
    x = nn.Dense(16)(inputs)
    if self.norm:
      x = nn.BatchNorm(use_running_average=not train)(x)
    features = nn.relu(x)
    logits = nn.Dense(self.num_classes + self.more, name=self.head)(features)
    return logits, features


def rings(seed, examples=400):
  """Two rings of different radius, as float64."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 2, examples)
  angle = rng.uniform(0, 2 * np.pi, examples)
  radius = 1 + labels + rng.normal(0, 0.1, examples)
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), labels


def small_network(weights, inputs, perturbation=0.0):
  """The network of `references.network_logits`, in JAX."""
  hidden = inputs @ weights['w1'] + weights['b1'][None]
  hidden = (hidden - weights['mean'][None]) / jnp.sqrt(weights['var'])[None]
  hidden = jnp.tanh(hidden * weights['scale'][None]) + perturbation
  return hidden @ weights['w2'] + weights['b2'][None]
