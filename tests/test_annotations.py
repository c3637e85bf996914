"""The annotations of the public API hold for real calls, traced ones too."""

import inspect

import beartype
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import margin_jax
from margin_jax import selection
from tests import helpers

B, C, D, DEVICES = 8, 5, 3, 2


def checked(function):
  """The function, which raises where a call is not as it is annotated."""
  return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)


# Those of arrays; `register_*` and what loads a run are not.
OTHERS = ('Trained', 'load')
NAMES = [
  x
  for x in margin_jax.__all__
  if not x.startswith('register_') and x not in OTHERS
]
API = {name: checked(getattr(margin_jax, name)) for name in NAMES}


class Model(nn.Module):
  """One hidden layer."""

  @nn.compact
  def __call__(self, inputs, *, train):
    features = nn.relu(nn.Dense(D, name='hidden')(inputs))
    return nn.Dense(C, name='head')(features), features


def example(dtype=jnp.float32):
  """Logits, kernel, labels and features."""
  rng = np.random.default_rng(0)
  shapes = (B, C), (D, C), (B, D)
  logits, kernel, features = (
    jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes
  )
  return logits, kernel, jnp.asarray(rng.integers(0, C, B)), features


def everything(logits, kernel, labels, features):
  """All of the API that can be traced."""
  scores = API['mms_scores'](logits, kernel)
  model = Model()
  variables = model.init(jax.random.key(0), features, train=False)
  at = API['at_layers'](model, variables, features, ('input', 'hidden'))
  return {
    'mms_scores': scores,
    'competitors': API['competitors'](logits, labels),
    'signed_margins': API['signed_margins'](logits, kernel, labels),
    'mmr_penalty': API['mmr_penalty'](features, logits, kernel, labels),
    'at_layers': at[1],
    'layer_margins': API['layer_margins'](*at, labels),
    'large_margin_loss': API['large_margin_loss'](*at, labels),
    'select_lowest': API['select_lowest'](scores, 3),
    'query': API['query'](scores, 3, labels > 2),
    'take_lowest': API['take_lowest'](scores, {'x': features, 'y': labels}, 4),
    'trimmed_mean': API['trimmed_mean'](scores, 3),
  }


@pytest.mark.parametrize('dtype', [jnp.float32, *helpers.slow(jnp.bfloat16)])
def test_annotations_hold_for_arrays_and_under_jit(dtype):
  args = example(dtype)
  found = everything(*args)
  assert {*found, 'fit_generalization_gap'} == {*NAMES}
  traced = jax.jit(everything)(*args)
  assert jax.tree.map(jnp.shape, traced) == jax.tree.map(jnp.shape, found)


@pytest.mark.slow
def test_annotations_hold_under_vmap_and_pmap():
  args = [jnp.stack([x] * DEVICES) for x in example()]
  jax.vmap(everything)(*args)

  def shared(logits, kernel, labels, features):
    scores = API['mms_scores'](logits, kernel)
    penalty = API['mmr_penalty'](
      features, logits, kernel, labels, axis_name='device'
    )
    return penalty, API['take_lowest'](scores, (labels,), 4, 'device')

  penalty, (labels,) = jax.pmap(shared, axis_name='device')(*args)
  assert penalty.shape == (DEVICES,)
  assert labels.shape == (DEVICES, 4 // DEVICES)


def test_annotations_hold_for_rules_and_the_fit():
  logits, kernel, labels, _ = example()
  keys = jax.random.split(jax.random.key(0), B)
  scored = helpers.scored(logits, kernel, labels, keys)
  for rule in selection.RULES.values():
    assert checked(rule.score)(scored).shape == (B,)
  rng = np.random.default_rng(0)
  fit = API['fit_generalization_gap'](rng.uniform(1, 2, (6, 2)), np.arange(6.0))
  assert fit.coefficients.shape == (2,)


def test_wrong_shapes_and_dtypes_break_the_annotations():
  logits, kernel, labels, features = example()
  for name, args in (
    ('mms_scores', (logits, kernel.T)),
    ('mms_scores', (logits[0], kernel)),
    ('competitors', (logits, labels[1:])),
    ('signed_margins', (logits, kernel, labels.astype(jnp.float32))),
    ('mmr_penalty', (features.T, logits, kernel, labels)),
    ('take_lowest', (logits[:, 0], {'x': features[1:]}, 2)),
    ('trimmed_mean', (logits, 3)),
  ):
    with pytest.raises(jaxtyping.TypeCheckError):
      API[name](*args)


def test_every_public_argument_and_result_is_annotated():
  for name in margin_jax.__all__:
    signature = inspect.signature(getattr(margin_jax, name))
    given = [x.annotation for x in signature.parameters.values()]
    for annotation in (*given, signature.return_annotation):
      assert annotation is not inspect.Signature.empty, name
