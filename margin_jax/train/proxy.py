"""The proxy: a small model that trains on the same batches and scores pools."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from margin_jax.train import batch_norm, dropout
from margin_jax.train.spec import StepSpec

PyTree = Any


def train(
  spec: StepSpec, proxy: PyTree, batch: PyTree
) -> tuple[PyTree, dict[str, jax.Array]]:
  """Makes one cross-entropy step of the proxy on this device's batch.

  Args:
    spec: the step's.
    proxy: its 'params', 'batch_stats' and 'opt_state'.
    batch: 'inputs', 'label' and maybe 'weights'.

  Returns:
    The new variables, and metrics.
  """

  def loss_function(params: PyTree):
    variables = {'params': params, 'batch_stats': proxy['batch_stats']}
    groups = batch_norm.in_groups(spec.batch_norm_examples, spec.axis_name)
    # A proxy is small, and has no key to drop anything by.
    with nn.intercept_methods(dropout.off), nn.intercept_methods(groups):
      (logits, _), updates = spec.proxy.apply(
        variables,
        spec.dataset.prepare(batch['inputs']),
        train=True,
        mutable=['batch_stats'],
      )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32), batch['label']
    )
    if 'weights' in batch:
      losses = batch['weights'] * losses
    return jnp.mean(losses), updates.get('batch_stats', {})

  (loss, batch_stats), gradient = jax.value_and_grad(
    loss_function, has_aux=True
  )(proxy['params'])
  gradient = jax.lax.pmean(gradient, spec.axis_name)
  if spec.average_batch_stats:
    batch_stats = jax.lax.pmean(batch_stats, spec.axis_name)
  updates, opt_state = spec.proxy_optimizer.update(
    gradient, proxy['opt_state'], proxy['params']
  )
  proxy = {
    'params': optax.apply_updates(proxy['params'], updates),
    'batch_stats': batch_stats,
    'opt_state': opt_state,
  }
  return proxy, {
    'proxy_trained': jnp.float32(1),
    'proxy_loss': jax.lax.pmean(loss, spec.axis_name),
    'proxy_gradient_norm': optax.tree.norm(gradient),
  }


def keep(
  spec: StepSpec, proxy: PyTree, batch: PyTree
) -> tuple[PyTree, dict[str, jax.Array]]:
  """Returns the proxy as it is, and metrics of 0; without a proxy, none."""
  del batch
  names = ('proxy_trained', 'proxy_loss', 'proxy_gradient_norm')
  return proxy, {x: jnp.float32(0) for x in names if spec.proxy is not None}
