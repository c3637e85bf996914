"""Margins at any layer of a network, linearized, and the layers by name.

At the last layer the distance to a boundary is exact; `margins.py` computes it.
At any other layer h the network is not linear, so we take the distance of its
first-order expansion: a difference of logits over the norm of its gradient with
respect to the activations of h. The distance is measured in the norm `norm`,
the gradient in its dual norm: l_inf -> l1, l2 -> l2, l1 -> l_inf, and a number
p -> p / (p - 1).

A distance has the units of its layer. At the input these are the units of what
the model reads. In normalized images, 1 is the standard deviation of a channel,
and a distance times that deviation is in units of pixels from 0 to 1, like the
epsilon of an attack. Images read in [0, 1] need no such factor.

Everything here takes `logits_fn(activations) -> (B, C) logits`. The activations
are any pytree of arrays (B, ...), one for each layer. Row i of the logits must
depend only on row i of the activations, or one example leaks into the gradient
of another. So BatchNorm must be in evaluation mode. `at_layers` makes such a
function from a Flax model.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array
from jaxtyping import Float, Float32, Integer, PyTree

from margin_jax import margins

LogitsFunction = Callable[[PyTree], Float[Array, 'B C']]

# The norms that have names; any number from 1 on is another.
ORDERS = {'l1': 1.0, 'l2': 2.0, 'l_inf': math.inf}
NORMS = tuple(ORDERS)
Norm = str | float

# The two layers that are not modules: what the model reads, and what its head
# reads.
INPUT, FEATURES = 'input', 'features'
HEAD = 'head'


def check_norm(norm: Norm) -> None:
  """Raises unless `norm` is one of `NORMS`, or a number p, at least 1."""
  is_number = isinstance(norm, int | float) and not isinstance(norm, bool)
  if norm not in NORMS and not (is_number and norm >= 1):
    raise ValueError(
      f'norm must be one of {NORMS}, or a number of at least 1, got {norm!r}'
    )


def _dual_norms(gradient: Array, norm: Norm) -> Array:
  """Computes norms dual to `norm`, differentiably: (k, B, ...) -> (B, k)."""
  k, rows, *layer = gradient.shape
  flat = gradient.reshape(k * rows, math.prod(layer))
  p = ORDERS.get(norm, norm)
  q = math.inf if p == 1 else 1 / (1 - 1 / p)
  if q == 1:
    norms = jnp.sum(jnp.abs(flat), axis=1)
  elif q == math.inf:
    norms = jnp.max(jnp.abs(flat), axis=1)
  elif q == 2:
    norms = margins.row_norms(flat)
  else:
    norms = q_norms(flat, q)
  return norms.reshape(k, rows).T


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def q_norms(x: Array, q: float) -> Array:
  """Computes the q-norms of the rows; the gradient is 0 at a zero row.

  Divided by the largest entry, no power over- or underflows.

  Args:
    x: (N, D) floating.
    q: above 1 and finite; static.
  """
  scale = jnp.max(jnp.abs(x), axis=1)
  zero = scale == 0
  safe = jnp.where(zero, 1, scale)
  powers = jnp.sum((jnp.abs(x) / safe[:, None]) ** q, axis=1)
  return jnp.where(zero, 0, scale * powers ** (1 / q))


@q_norms.defjvp
def _q_norms_jvp(
  q: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  (x,), (x_dot,) = primals, tangents
  norm = q_norms(x, q)
  unit = jnp.abs(x) / jnp.where(norm == 0, 1, norm)[:, None]
  return norm, jnp.sum(jnp.sign(x) * unit ** (q - 1) * x_dot, axis=1)


def gradient_norms(
  values_fn: LogitsFunction,
  activations: PyTree,
  choose: Callable[[Array], tuple[Array, Array]],
  norm: Norm,
) -> tuple[Array, PyTree]:
  """Computes differences of class values, and the norms of their gradients.

  Args:
    values_fn: activations -> (B, C), one value a class; float32 or wider.
    activations: pytree of arrays (B, ...): where to linearize.
    choose: values -> (B,) own classes and (B, k) others.
    norm: the norm of the distance; the gradient has the dual norm.

  Returns:
    (B, k) own value minus other value, and for each leaf of `activations`
    (B, k) dual norms of the gradients of that.
  """
  for layer in jax.tree.leaves(activations):
    if 0 in layer.shape[1:]:
      raise ValueError(
        f'activations must not be empty, got shape {layer.shape}'
      )
  values, pull = jax.vjp(values_fn, activations)
  own, others = choose(values)
  gaps = jnp.take_along_axis(values, own[:, None], axis=1)
  gaps = gaps - jnp.take_along_axis(values, others, axis=1)
  classes = values.shape[1]
  towards = jax.nn.one_hot(own, classes, dtype=values.dtype)
  away = jax.nn.one_hot(others.T, classes, dtype=values.dtype)
  (gradients,) = jax.vmap(pull)(towards[None] - away)
  return gaps, jax.tree.map(lambda x: _dual_norms(x, norm), gradients)


def layer_margins(
  logits_fn: LogitsFunction,
  activations: PyTree[Float[Array, 'B ...'], ' T'],
  labels: Integer[Array, ' B'] | None = None,
  *,
  norm: Norm = 'l2',
) -> PyTree[Float32[Array, ' B'], ' T']:
  r"""Computes margins, linearized at one layer or several.

  $$d_i = (s_{iy} - s_{im}) \,/\, \|\nabla_h (s_{iy} - s_{im})\|_q$$

  q is dual to `norm`. With labels y, these are signed margins, negative if the
  example is misclassified, and m is the competitor. Without labels, y and m are
  the two highest-scoring classes, and d is the minimal margin score of the
  layer. Both are exact at a layer after which the network is linear: at the
  features they equal `signed_margins` and `mms_scores`.

  If the gradient is zero, there is no boundary: the margin is +inf or -inf by
  the sign of the difference, and 0 for a tie. A NaN logit, or a label outside
  [0, C), gives NaN.

  Args:
    logits_fn: activations -> (B, C) logits; see the module's docstring, and
      `at_layers`.
    activations: pytree of arrays (B, ...), one for each layer at which to
      linearize.
    labels: (B,) integers in [0, C), or None.
    norm: 'l1', 'l2', 'l_inf', or a number p of at least 1: how to measure the
      distance, in the units of the layer.

  Returns:
    The pytree with (B,) margins for each leaf: float32, or float64 for float64
    logits.

  Raises:
    TypeError: the logits are not floating, or `labels` not integer.
    ValueError: a shape does not fit, or `norm` is unknown.

  References:
    Elsayed et al. 2018 (the linearized distance); Jiang et al. 2019
    (signed, at hidden layers); Weinstein et al. 2020, Eq. 9 (label-free).

  Examples:
    >>> logits_fn = lambda x: x @ jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> inputs, labels = jnp.array([[2.0, 0.25]]), jnp.array([0])
    >>> layer_margins(logits_fn, inputs, labels).tolist()  # (6 - 1) / 5
    [1.0]
  """
  check_norm(norm)
  valid = None

  def values_fn(activations: PyTree) -> Array:
    logits = logits_fn(activations)
    margins.check_logits(logits)
    return logits.astype(margins.compute_dtype(logits)[1])

  def choose(logits: Array) -> tuple[Array, Array]:
    nonlocal valid
    own = (
      jnp.argmax(logits, axis=1)
      if labels is None
      else margins.to_array('labels', labels)
    )
    competitor = margins.competitors(logits, own)
    valid = competitor >= 0
    own = jnp.where(valid, own, 0).astype(jnp.int32)
    return own, jnp.where(valid, competitor, 1)[:, None]

  gaps, norms = gradient_norms(values_fn, activations, choose, norm)
  gap = gaps[:, 0]

  def distance(gradient_norm: Array) -> Array:
    gradient_norm = gradient_norm[:, 0]
    flat = gradient_norm == 0
    far = jnp.where(gap > 0, jnp.inf, jnp.where(gap < 0, -jnp.inf, gap))
    result = jnp.where(flat, far, gap / jnp.where(flat, 1, gradient_norm))
    return jnp.where(valid, result, jnp.nan)

  return jax.tree.map(distance, norms)


def _outputs(
  model: nn.Module, variables: PyTree, inputs: PyTree
) -> dict[str, PyTree]:
  """Returns the outputs of the submodules that are called once, by path."""
  (_, features), state = model.apply(
    variables,
    inputs,
    train=False,
    capture_intermediates=True,
    mutable=['intermediates'],
  )
  outputs = {INPUT: inputs}
  calls = jax.tree_util.tree_leaves_with_path(
    state['intermediates'], is_leaf=lambda x: isinstance(x, tuple)
  )
  for path, returned in calls:
    *names, method = (key.key for key in path)
    if names and method == '__call__' and len(returned) == 1:
      outputs['/'.join(names)] = returned[0]
  outputs[FEATURES] = features
  rows = features.shape[0]
  return {
    name: x
    for name, x in outputs.items()
    if hasattr(x, 'dtype')
    and jnp.issubdtype(x.dtype, jnp.floating)
    and x.shape[:1] == (rows,)
  }


def layer_shapes(
  model: nn.Module, variables: PyTree, inputs: PyTree
) -> dict[str, tuple[int, ...]]:
  """Returns the layers of a model, by name, and the shapes of their outputs.

  A layer is 'input', 'features', or the path of a submodule that is called
  once and returns one floating array, such as 'conv1' or
  'stage1_block2/norm1'; its activations are what it returns. Nothing is
  computed: arrays may be `jax.ShapeDtypeStruct`s.

  Args:
    model: `(inputs, train=) -> (logits, features)`, its last layer `head`.
    variables: the model's.
    inputs: a batch, as the model reads it.
  """
  outputs = jax.eval_shape(
    lambda *args: _outputs(model, *args), variables, inputs
  )
  return {name: x.shape for name, x in outputs.items()}


def check_layers(layers: tuple[str, ...], known: dict[str, Any]) -> None:
  """Raises unless all of `layers` are among the names `known`.

  Raises:
    ValueError: listing the names that there are.
  """
  for name in layers:
    if name not in known:
      raise ValueError(
        f'no layer is called {name!r}; the model has {tuple(known)}'
      )


def activations_at(
  model: nn.Module, variables: PyTree, inputs: PyTree, layers: tuple[str, ...]
) -> dict[str, Array]:
  """Computes the activations of the named layers, in evaluation mode.

  Raises:
    ValueError: there is no such layer; lists those there are.
  """
  outputs = _outputs(model, variables, inputs)
  check_layers(layers, outputs)
  return {name: outputs[name] for name in layers}


def batch_statistics(
  model: nn.Module, variables: PyTree, inputs: PyTree, updated: PyTree
) -> PyTree:
  """Recovers the statistics of one batch from its update of the running ones.

      running' = m * running + (1 - m) * batch

  With these in place of the running ones, evaluation mode computes what
  training mode does on that batch, but examples do not meet: the statistics
  no longer depend on activations, while they still depend on parameters.

  Args:
    model: with any number of `flax.linen.BatchNorm`.
    variables: those before the batch, 'batch_stats' among them.
    inputs: a batch; only shapes count.
    updated: 'batch_stats' after a training-mode forward on the batch.

  Returns:
    A tree like `updated`.
  """
  momenta = {}

  def record(next_function, args, kwargs, context):
    if isinstance(context.module, nn.BatchNorm):
      momenta[context.module.path] = context.module.momentum
    return next_function(*args, **kwargs)

  with nn.intercept_methods(record):
    forward = functools.partial(model.apply, train=False)
    jax.eval_shape(forward, variables, inputs)
  running = traverse_util.flatten_dict(variables['batch_stats'])

  def solve(path: tuple[str, ...], new: Array) -> Array:
    momentum = momenta.get(path[:-1])
    if momentum is None:
      return new
    solved = (new - momentum * running[path]) / (1 - momentum)
    # Rounding may leave a variance of 0 a little below it.
    return jnp.maximum(solved, 0) if path[-1] == 'var' else solved

  flat = traverse_util.flatten_dict(updated)
  solved = {path: solve(path, new) for path, new in flat.items()}
  return traverse_util.unflatten_dict(solved)


# add(name, activations) -> activations, with what is added to that layer.
Add = Callable[[str, Array], Array]


def at_layers(
  model: nn.Module | Callable[[PyTree, PyTree, Add], Array],
  variables: PyTree,
  inputs: PyTree,
  layers: tuple[str, ...],
) -> tuple[LogitsFunction, dict[str, Float32[Array, '...']]]:
  """Makes a network a function of perturbations of its activations.

  `layer_margins` and `large_margin_loss` take the two results as their first
  arguments. The gradient with respect to a perturbation, at zero, is the
  gradient with respect to the activations.

  For a network in another library, pass a function that hands the activations
  of each layer to `add`, with a name, and continues with what `add` returns.

  Args:
    model: a Flax module `(inputs, train=) -> (logits, features)`, its last
      layer `head`; or a function `(variables, inputs, add) -> logits`, in
      which `add(name, activations) -> activations`.
    variables: the model's variables; BatchNorm uses its running statistics, or
      what replaces them: see `batch_statistics`.
    inputs: a batch, as the model reads it.
    layers: names as `layer_shapes` returns them, or as your function passes
      them to `add`.

  Returns:
    `logits_fn(perturbations) -> (B, C)`, and zero perturbations, float32, by
    layer.

  Raises:
    ValueError: there is no such layer (the message lists the layers), or it is
      called twice, or Flax cannot see its call.

  Examples:
    >>> kernels = {'hidden': jnp.eye(2), 'head': jnp.diag(jnp.array([3., 4.]))}
    >>> def network(kernels, inputs, add):
    ...   inputs = add('input', inputs)
    ...   hidden = add('hidden', jax.nn.relu(inputs @ kernels['hidden']))
    ...   return hidden @ kernels['head']
    >>> found = at_layers(network, kernels, jnp.ones((1, 2)), ('hidden',))
    >>> layer_margins(*found)['hidden'].tolist()  # (4 - 3) / || (3, -4) ||
    [0.20000000298023224]
  """
  if isinstance(model, nn.Module):
    network, shapes = _linen(model), layer_shapes(model, variables, inputs)
  else:
    network, shapes = model, _named_shapes(model, variables, inputs)
  check_layers(layers, shapes)
  zeros = {name: jnp.zeros(shapes[name], jnp.float32) for name in layers}

  fired: collections.Counter = collections.Counter()

  def logits_fn(perturbations: dict[str, Array]) -> Array:
    def add(name: str, x: Array) -> Array:
      if name not in perturbations:
        return x
      fired[name] += 1
      return (x.astype(jnp.float32) + perturbations[name]).astype(x.dtype)

    return network(variables, inputs, add)

  # Flax reuses the trace of a jitted block for its twins, and knows no head of
  # another name: a perturbation that is not added would give gradients of zero.
  jax.eval_shape(logits_fn, zeros)
  for name in layers:
    if fired[name] != 1:
      where = ' where Flax can see it' if isinstance(model, nn.Module) else ''
      why = (
        ': it may be inside nn.jit or nn.scan, or the '
        f"model's last layer is not called {HEAD!r}"
      )
      raise ValueError(
        f'layer {name!r} is called {fired[name]} times{where}, but must be '
        f'called once{why if where else ""}'
      )
  return logits_fn, zeros


def _linen(model: nn.Module) -> Callable[[PyTree, PyTree, Add], Array]:
  """Returns a Flax module as a function that hands its activations to `add`."""

  def network(variables: PyTree, inputs: PyTree, add: Add) -> Array:
    def intercept(next_function, args, kwargs, context):
      name = '/'.join(context.module.path)
      if context.method_name != '__call__' or not name:
        return next_function(*args, **kwargs)
      if name == HEAD:
        first, *args = (*args, *kwargs.values())
        return add(name, next_function(add(FEATURES, first), *args))
      return add(name, next_function(*args, **kwargs))

    with nn.intercept_methods(intercept):
      return model.apply(variables, add(INPUT, inputs), train=False)[0]

  return network


def _named_shapes(
  network: Callable[[PyTree, PyTree, Add], Array],
  variables: PyTree,
  inputs: PyTree,
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of what a function hands to `add`, by name."""
  shapes = {}

  def see(name: str, x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f'layer {name!r} must be floating, got {x.dtype}')
    shapes[name] = x.shape
    return x

  logits = jax.eval_shape(lambda: network(variables, inputs, see))
  for name, shape in shapes.items():
    if shape[:1] != logits.shape[:1]:
      raise ValueError(
        f'layer {name!r} must have a row for each of {logits.shape[0]} '
        f'examples, got shape {shape}'
      )
  return shapes
