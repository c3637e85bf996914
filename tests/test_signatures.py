"""Signatures, the generalization gap, rankings, queries; MMS by a solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from sklearn import linear_model, model_selection

from margin_jax import (
  figures,
  fit_generalization_gap,
  mms_scores,
  query,
  signatures,
)
from margin_jax.analyze import plots
from tests import references


def test_mms_is_the_smallest_perturbation_that_flips_the_prediction():
  """On a linear model, by a solver that knows no formula.

  Among three classes the nearest boundary need not be with the second class,
  so the solver asks for a tie of the two best.
  """
  features, _, kernel, _ = references.random_head((8, 3, 5), seed=4)
  bias = np.random.default_rng(0).normal(size=3)
  logits = references.float64(features @ kernel + bias).astype(np.float32)
  found = mms_scores(logits, kernel)
  for phi, row, score in zip(features, logits, found, strict=True):
    second, first = np.argsort(row)[-2:]

    def gap(step, phi=phi, first=first, second=second):
      moved = (phi + step) @ kernel + bias
      return moved[first] - moved[second]

    solved = optimize.minimize(
      lambda step: step @ step,
      np.zeros(5),
      constraints={'type': 'ineq', 'fun': lambda step, gap=gap: -gap(step)},
      tol=1e-12,
    )
    np.testing.assert_allclose(np.linalg.norm(solved.x), score, 1e-3)
    before = np.argmax(phi @ kernel + bias)
    beyond = np.argmax((phi + 1.001 * solved.x) @ kernel + bias)
    within = np.argmax((phi + 0.999 * solved.x) @ kernel + bias)
    assert before != beyond
    # A third class may be nearer; where it is not, nothing flips before.
    third = ({0, 1, 2} - {first, second}).pop()
    others = references.mms_scores(
      np.array([[row[first], row[third]]]), kernel[:, [first, third]]
    )
    if others[0] > score:
      assert before == within


def test_quartile_signature_is_that_of_a_box_plot():
  from matplotlib import cbook

  margins = np.random.default_rng(0).standard_t(2, size=500) + 1
  (box,) = cbook.boxplot_stats(margins[margins > 0])
  expected = [box[k] for k in ('whislo', 'q1', 'med', 'q3', 'whishi')]
  np.testing.assert_allclose(signatures.signature(margins), expected)


def test_moments_signature_and_its_scale():
  margins = np.array([-5.0, 1.0, 2.0, 4.0, np.nan, np.inf])
  expected = [np.mean([1.0, 2.0**n, 4.0**n]) ** (1 / n) for n in range(1, 6)]
  found = signatures.signature(margins, 'moments')
  np.testing.assert_allclose(found, expected)
  huge = signatures.signature(1e200 * margins, 'moments')
  np.testing.assert_allclose(huge, 1e200 * found)


def test_signatures_of_few_examples():
  for kind in signatures.SIGNATURES:
    np.testing.assert_allclose(signatures.signature([3.0], kind), 5 * [3.0])
    assert np.isnan(signatures.signature([-1.0, 0.0], kind)).all()
    assert signatures.signature([1e-300, 5.0, 5.0], kind).min() > 0
  with pytest.raises(ValueError, match=r"kind must be one of .*, got 'mean'"):
    signatures.signature([1.0], 'mean')
  with pytest.raises(ValueError, match='must be a vector'):
    signatures.signature([[1.0]])


def test_normalized_margins_do_not_see_the_scale():
  rng = np.random.default_rng(0)
  activations = rng.normal(size=(50, 3)) * [1, 2, 3]
  margins = rng.normal(size=50)
  variation = np.trace(np.cov(activations.T, bias=True))
  expected = margins / np.sqrt(variation)
  found = signatures.normalize(margins, variation)
  np.testing.assert_allclose(found, expected)
  scaled = signatures.normalize(7 * margins, 49 * variation)
  np.testing.assert_allclose(scaled, expected)
  assert np.isnan(signatures.normalize(margins, 0.0)).all()


def planted(networks=40, numbers=3, noise=0.01):
  """Signatures, and gaps that are log-linear in them, with noise."""
  rng = np.random.default_rng(0)
  signatures = np.exp(rng.normal(size=(networks, numbers)))
  truth = np.array([0.3, -0.2, 0.1])[:numbers]
  gaps = np.log(signatures) @ truth + 0.5
  return signatures, gaps + noise * rng.normal(size=networks), truth


def test_a_planted_gap_is_found():
  signatures, gaps, truth = planted()
  fit = fit_generalization_gap(signatures, gaps)
  np.testing.assert_allclose(fit.coefficients, truth, atol=0.01)
  np.testing.assert_allclose(fit.intercept, 0.5, atol=0.01)
  assert 0.99 < fit.cross_validated_r2 < fit.adjusted_r2 < fit.r2 < 1
  np.testing.assert_allclose(
    fit.adjusted_r2, 1 - (1 - fit.r2) * (40 - 1) / (40 - 3 - 1)
  )
  np.testing.assert_allclose(fit.predict(signatures), gaps, atol=0.05)


def test_noise_fits_but_does_not_cross_validate():
  rng = np.random.default_rng(1)
  signatures = np.exp(rng.normal(size=(12, 8)))
  fit = fit_generalization_gap(signatures, rng.normal(size=12))
  assert fit.r2 > 0.5
  assert fit.cross_validated_r2 < 0


def test_cross_validation_leaves_the_predicted_network_out():
  signatures, gaps, _ = planted(networks=6, noise=0.3)
  fit = fit_generalization_gap(signatures, gaps, folds=10)  # leave one out
  predicted = []
  for i in range(6):
    rest = np.arange(6) != i
    x = np.c_[np.log(signatures[rest]), np.ones(5)]
    solution = np.linalg.lstsq(x, gaps[rest], rcond=None)[0]
    predicted.append(np.r_[np.log(signatures[i]), 1] @ solution)
  expected = 1 - np.sum((gaps - predicted) ** 2) / np.sum(
    (gaps - gaps.mean()) ** 2
  )
  np.testing.assert_allclose(fit.cross_validated_r2, expected)


def test_ten_folds_agree_with_scikit_learn():
  signatures, gaps, _ = planted(noise=0.5)
  fit = fit_generalization_gap(signatures, gaps, seed=3)
  predicted = model_selection.cross_val_predict(
    linear_model.LinearRegression(),
    np.log(signatures),
    gaps,
    cv=model_selection.KFold(10, shuffle=True, random_state=3),
  )
  total = np.sum((gaps - gaps.mean()) ** 2)
  expected = 1 - np.sum((gaps - predicted) ** 2) / total
  assert fit.cross_validated_r2 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
  ('signatures', 'gaps', 'message'),
  [
    (np.ones(4), np.ones(4), r'shape \(n, F\), got \(4,\)'),
    (np.ones((4, 0)), np.ones(4), r'shape \(n, F\)'),
    (np.ones((4, 2)), np.ones(3), r'gaps must have shape \(4,\), got \(3,\)'),
    (np.ones((2, 2)), np.ones(2), 'at least 3 networks, got 2'),
    (np.zeros((4, 2)), np.ones(4), 'positive and finite'),
    (np.full((4, 2), np.nan), np.ones(4), 'positive and finite'),
    (np.ones((4, 2)), np.full(4, np.inf), 'gaps must be finite'),
    (np.ones((4, 2)), np.full(4, 0.1), 'gaps must differ, got 0.1 only'),
  ],
)
def test_bad_signatures_are_refused(signatures, gaps, message):
  with pytest.raises(ValueError, match=message):
    fit_generalization_gap(signatures, gaps)


def test_too_few_folds_are_refused():
  signatures, gaps, _ = planted(networks=4)
  with pytest.raises(ValueError, match='folds must be at least 2, got 1'):
    fit_generalization_gap(signatures, gaps, folds=1)


def test_too_few_networks_have_no_adjusted_r2():
  signatures, gaps, _ = planted(networks=4)
  assert np.isnan(fit_generalization_gap(signatures, gaps).adjusted_r2)


def test_summary_counts_what_is_there():
  row = signatures.summary(np.array([np.nan, -1.0, 0.0, 3.0, np.inf]))
  assert row['examples'] == 4
  assert row['negative'] == 0.25
  assert row['mean'] == pytest.approx(2 / 3)
  assert (row['q0'], row['q50'], row['q100']) == (-1, 0, np.inf)
  empty = signatures.summary(np.array([np.nan]))
  assert empty['examples'] == 0
  assert np.isnan(empty['q50'])


def test_ranking_is_by_margin_with_nan_last():
  found = signatures.ranking(np.array([0.5, np.nan, -2.0, 0.5, np.inf]))
  np.testing.assert_array_equal(found, [2, 0, 3, 4, 1])


def test_query_is_the_lowest_without_a_label():
  scores = jnp.array([0.3, 0.1, jnp.nan, 0.2, 0.1])
  labelled = np.array([False, True, False, False, False])
  np.testing.assert_array_equal(query(scores, 2), [1, 4])
  for function in (query, jax.jit(query, static_argnums=1)):
    found = function(scores, 4, labelled)
    np.testing.assert_array_equal(found, [4, 3, 0, 2])
    assert found.dtype == jnp.int32
  found = jax.jit(query, static_argnums=1)(scores, 5, labelled)
  np.testing.assert_array_equal(found, [4, 3, 0, 2, 1])


def test_query_under_jit_may_close_over_labels():
  labelled = jnp.array([True, False, False])
  found = jax.jit(lambda s: query(s, 2, labelled))(jnp.array([1.0, 3.0, 2.0]))
  np.testing.assert_array_equal(found, [2, 1])


@pytest.mark.parametrize(
  'values',
  [
    [1.0, 2.0, 3.0],
    [np.inf, -np.inf, np.nan],
    [2.0, 2.0, 2.0],
    [np.inf, 1.0],
    np.float32([1, np.nextafter(np.float32(1), np.float32(2))]),
    np.float32([3e8]),
  ],
)
def test_any_distribution_can_be_drawn(values, tmp_path):
  last = {
    'train': {'margin': np.array([0.0, 1.0, 1.5])},
    'test': {'margin': np.array(values)},
  }
  rows = [
    {'step': 1, 'split': split, 'quantity': 'margin'}
    | signatures.summary(found['margin'])
    for split, found in last.items()
  ]
  plots.margins(tmp_path / 'x.png', 'digits', rows, last)
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def drawn_margins(monkeypatch, tmp_path, steps, train):
  """The figure of one quantity, at so many checkpoints."""
  found = []
  monkeypatch.setattr(figures, 'save', lambda figure, *_: found.append(figure))
  last = {'train': {'margin': np.array(train)}}
  rows = [
    {'step': step, 'split': 'train', 'quantity': 'margin'}
    | signatures.summary(last['train']['margin'])
    for step in steps
  ]
  plots.margins(tmp_path / 'x.png', 'digits', rows, last)
  return found[0]


def test_every_example_is_in_the_histogram(monkeypatch, tmp_path):
  """The few that are far out too: they are candidates for label errors."""
  train = [*np.linspace(0, 1, 997), -50.0, -40.0, np.inf]
  figure = drawn_margins(monkeypatch, tmp_path, [10, 20], train)
  axes = figure.axes[1]
  (outline,) = axes.patches
  corners = outline.get_xy()
  left, right = corners[:, 0].min(), corners[:, 0].max()
  assert -1 < left < 0
  assert right == 1
  heights = corners[1:-1:2, 1]
  assert heights.sum() == pytest.approx(100)
  (note,) = axes.texts
  assert note.get_text() == 'first bin: 2, down to -50\nlast bin: 1, up to inf'
  near = drawn_margins(monkeypatch, tmp_path, [10], np.linspace(0, 1, 99))
  assert near.axes[0].texts[0].get_text() == ''


def test_one_checkpoint_has_histograms_only(monkeypatch, tmp_path):
  train = np.linspace(-1, 1, 99)
  figure = drawn_margins(monkeypatch, tmp_path, [700], train)
  (axes,) = figure.axes
  assert (axes.get_title(), axes.get_xlabel()) == ('step 700', 'margin')
  assert figure.get_suptitle() == 'digits'


def test_percentages_are_plain_numbers(monkeypatch, tmp_path):
  train = [*np.linspace(0, 1, 99), *np.linspace(0, 0.3, 40)]  # within a decade
  figure = drawn_margins(monkeypatch, tmp_path, [10, 20], train)
  figure.draw_without_rendering()
  axes = figure.axes[1].yaxis
  texts = [x.get_text() for x in axes.get_ticklabels(which='both')]
  assert len([*filter(None, texts)]) >= 3
  for text in filter(None, texts):
    assert float(text) > 0


def test_query_refuses_what_cannot_be():
  scores = jnp.ones(3)
  with pytest.raises(ValueError, match='k must be at most 1, the number'):
    query(scores, 2, np.array([True, False, True]))
  with pytest.raises(ValueError, match=r'labelled must have shape \(3,\)'):
    query(scores, 2, np.array([True]))
  with pytest.raises(TypeError, match='labelled must be bool'):
    query(scores, 2, np.array([0, 1, 0]))
