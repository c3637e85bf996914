"""The public functions agree with their oracles, compiled and eagerly."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import margin_jax
from tests import references
from tests.custom import small_network

INF, NAN = np.inf, np.nan


def random_heads():
  """Features, logits, kernels and labels, and a name for each."""
  for shape in ((1, 2, 1), (16, 10, 8)):
    yield 'x'.join(map(str, shape)), references.random_head(shape)
  # Ties, equal columns, infinities, NaN, and labels of no class.
  rng = np.random.default_rng(0)
  features = rng.normal(size=(64, 2)).astype(np.float32)
  logits = rng.choice([-INF, INF, NAN, 0, 0, 1], (64, 3)).astype(np.float32)
  kernel = np.array([[1, 1, 0], [2, 2, 1]], np.float32)
  labels = rng.integers(-1, 4, 64).astype(np.int32)
  yield 'edges', (features, logits, kernel, labels)


each_head = parameterized.named_parameters(*random_heads())
each_variant = chex.variants(with_jit=True, without_jit=True)


def assert_close(found, expected, dtype=np.float32, tolerance=1e-5):
  """Of that shape and dtype, NaN and infinities where they are expected."""
  chex.assert_shape(found, np.shape(expected))
  assert found.dtype == dtype
  np.testing.assert_allclose(found, expected, tolerance, tolerance)


class Margins(chex.TestCase):
  """Of a linear head."""

  @each_variant
  @each_head
  def test_competitors(self, head):
    _, logits, _, labels = head
    found = self.variant(margin_jax.competitors)(logits, labels)
    assert_close(found, references.competitors(logits, labels), np.int32)

  @each_variant
  @each_head
  def test_signed_margins(self, head):
    _, *arrays = head
    found = self.variant(margin_jax.signed_margins)(*arrays)
    assert_close(found, references.signed_margins(*arrays))

  @each_variant
  @each_head
  def test_mms_scores(self, head):
    _, logits, kernel, _ = head
    found = self.variant(margin_jax.mms_scores)(logits, kernel)
    assert_close(found, references.mms_scores(logits, kernel))

  @each_variant
  def test_the_dtype_is_kept(self):
    _, logits, kernel, labels = references.random_head((6, 5, 4))
    logits, kernel = (x.astype(jnp.bfloat16) for x in (logits, kernel))
    found = self.variant(margin_jax.signed_margins)(logits, kernel, labels)
    expected = references.signed_margins(logits, kernel, labels)
    assert_close(found, expected, jnp.bfloat16, 2**-8)


class Losses(chex.TestCase):
  """What a training step adds up."""

  @each_variant
  @parameterized.product(
    shape=((1, 2, 1), (16, 10, 8)),
    reduction=('mean_of_squares', 'square_of_mean'),
  )
  def test_mmr_penalty(self, shape, reduction):
    head = references.random_head(shape)
    penalty = functools.partial(margin_jax.mmr_penalty, reduction=reduction)
    found = self.variant(penalty)(*head)
    assert_close(found, references.mmr_penalty(*head, reduction))

  @each_variant
  def test_the_gradient_of_mmr_penalty(self):
    """Along a direction, by central differences of the oracle."""
    features, logits, kernel, labels = references.random_head((6, 5, 4))
    gradient = self.variant(jax.grad(margin_jax.mmr_penalty, (0, 2)))(
      features, logits, kernel, labels
    )
    rng = np.random.default_rng(1)
    along = [rng.normal(size=x.shape) for x in (features, kernel)]

    def moved(step):
      return references.mmr_penalty(
        features + step * along[0], logits, kernel + step * along[1], labels,
        'mean_of_squares',
      )  # fmt: skip

    expected = (moved(1e-4) - moved(-1e-4)) / 2e-4
    found = sum(np.sum(g * d) for g, d in zip(gradient, along, strict=True))
    np.testing.assert_allclose(found, expected, 1e-4)

  @each_variant
  @parameterized.parameters(-3, 1, 5, 8, 20)
  def test_trimmed_mean(self, keep):
    losses = np.random.default_rng(0).gamma(1, size=8).astype(np.float32)
    losses[3] = losses[5]
    found = self.variant(margin_jax.trimmed_mean)(losses, keep)
    assert_close(found, references.trimmed_mean(losses, keep))
    gradient = self.variant(jax.grad(margin_jax.trimmed_mean))(losses, keep)
    kept = min(max(keep, 1), 8)
    expected = np.zeros(8)
    expected[references.select_lowest(-losses, kept)] = 1 / kept
    assert_close(gradient, expected)

  @each_variant
  @parameterized.product(norm=('l1', 'l_inf'), difference=('softmax', 'logits'))
  def test_large_margin_loss(self, norm, difference):
    weights, inputs, labels = references.random_network(seed=1)
    options = {
      'gamma': 2.0, 'alpha': 3.0, 'norm': norm, 'top_k': 2, 'epsilon': 1e-3,
      'worst_case': False, 'difference': difference, 'normalize_by_size': False,
      'layer_weights': {'hidden': 0.5},
    }  # fmt: skip

    def losses(weights, inputs, labels):
      perturbations = {'hidden': jnp.zeros((len(inputs), 5))}
      return margin_jax.large_margin_loss(
        lambda x: small_network(weights, inputs, x['hidden']),
        perturbations, labels, **options,
      )  # fmt: skip

    found = self.variant(losses)(weights, inputs, labels)
    expected = references.large_margin_losses(
      weights, inputs, labels, ('hidden',), **options
    )
    assert_close(found, expected, tolerance=2e-3)


class Selection(chex.TestCase):
  """Of the lowest scores."""

  @each_variant
  @parameterized.parameters(0, 1, 5, 64)
  def test_select_lowest(self, k):
    """Ascending; ties by index, NaN last."""
    scores = np.random.default_rng(0).choice([NAN, -INF, INF, 0, 1, 2], 64)
    scores = scores.astype(np.float32)
    select = functools.partial(margin_jax.select_lowest, k=k)
    found = self.variant(select)(scores)
    assert_close(found, references.select_lowest(scores, k), np.int32)
