"""Margin distributions, their signatures, and the generalization gap.

The functions use NumPy on the host. They take margins that the devices have
measured.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

# Of the examples' margins, in distributions.csv and the plot.
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
MOMENTS = 5
SIGNATURES = ('quartiles', 'moments')


def normalize(
  margins: Float[np.ndarray, ' N'], total_variation: float
) -> Float[np.ndarray, ' N']:
  r"""Normalizes margins at a layer by the scale of its activations.

  $$d \,/\, \sqrt{\nu}$$

  $\nu$ is the trace of the covariance of the layer's activations.

  Args:
    margins: (N,), in the units of the activations.
    total_variation: nu, over the same examples.

  Returns:
    (N,); NaN where the activations do not vary.

  References:
    Jiang et al. 2019, section 3.2.
  """
  if not total_variation > 0:
    return np.full(np.shape(margins), np.nan)
  return np.asarray(margins, np.float64) / np.sqrt(total_variation)


def signature(
  margins: Float[np.ndarray, ' N'], kind: str = 'quartiles'
) -> Float[np.ndarray, '5']:
  """Summarizes a distribution of margins in five numbers.

  Only positive and finite margins count: those of correctly classified
  examples. 'quartiles' are the lower fence (the least margin not below Q1 - 1.5
  (Q3 - Q1)), Q1, the median, Q3 and the upper fence (the largest margin not
  above Q3 + 1.5 (Q3 - Q1)). 'moments' are (mean d^n)^(1/n) for n = 1, ..., 5.
  All five numbers are positive, so you can take their logarithm.

  Args:
    margins: (N,) signed, normalized.
    kind: 'quartiles' or 'moments'.

  Returns:
    (5,) float64; NaN if no margin is positive.

  Raises:
    ValueError: `kind` is unknown, or `margins` not a vector.

  References:
    Jiang et al. 2019, section 3.3.
  """
  if kind not in SIGNATURES:
    raise ValueError(f'kind must be one of {SIGNATURES}, got {kind!r}')
  margins = np.asarray(margins, np.float64)
  if margins.ndim != 1:
    raise ValueError(f'margins must be a vector, got shape {margins.shape}')
  positive = margins[(margins > 0) & np.isfinite(margins)]
  if not positive.size:
    return np.full(5, np.nan)
  if kind == 'moments':
    # Of fractions of the largest: powers of the margins themselves overflow.
    top = positive.max()
    powers = [
      np.mean((positive / top) ** n) ** (1 / n) for n in range(1, MOMENTS + 1)
    ]
    return top * np.array(powers)
  low, middle, high = np.quantile(positive, (0.25, 0.5, 0.75))
  reach = 1.5 * (high - low)
  # Rounding must not leave a fence without an example to stand on.
  lower = positive[positive >= min(low - reach, low)].min()
  upper = positive[positive <= max(high + reach, high)].max()
  return np.array([lower, low, middle, high, upper])


@dataclasses.dataclass(frozen=True)
class GapFit:
  """A linear model of the generalization gap.

  Attributes:
    coefficients: (F,) of the logarithms of the signatures' numbers.
    intercept: the intercept of the model.
    r2: the fraction of the gaps' variance that the model explains.
    adjusted_r2: 1 - (1 - r2) (n - 1) / (n - F - 1), for n networks; NaN for
      n <= F + 1, where any numbers fit.
    cross_validated_r2: r2 with each gap predicted by a model fitted without it.
  """

  coefficients: Float[np.ndarray, ' F']
  intercept: float
  r2: float
  adjusted_r2: float
  cross_validated_r2: float

  def predict(
    self, signatures: Float[np.ndarray, 'n F']
  ) -> Float[np.ndarray, ' n']:
    """Predicts gaps (n,) of positive signatures (n, F)."""
    return np.log(signatures) @ self.coefficients + self.intercept


def fit_generalization_gap(
  signatures: Float[np.ndarray, 'n F'],
  gaps: Float[np.ndarray, ' n'],
  *,
  folds: int = 10,
  seed: int = 0,
) -> GapFit:
  r"""Predicts generalization gaps from signatures of margin distributions.

  $$\mathrm{gap} \approx a \cdot \log(\mathrm{signature}) + b$$

  by least squares.

  Args:
    signatures: (n, F) positive: for each trained network a row with the
      signatures of its layers, concatenated.
    gaps: (n,) training accuracy minus test accuracy.
    folds: number of folds of the cross-validation, at least 2. If n is smaller,
      there are n folds, each of which leaves out one network.
    seed: seed of the shuffle before the networks are split into folds.

  Returns:
    The model, and how well it fits.

  Raises:
    ValueError: a shape does not fit, there are fewer than three networks or two
      folds, a number is not finite, a signature is not positive, or all gaps
      are equal, so that there is nothing to explain.

  References:
    Jiang et al. 2019, section 3.4, Eq. 7.

  Examples:
    >>> signatures = np.exp(np.arange(6.0))[:, None]  # of six networks
    >>> fit = fit_generalization_gap(signatures, 0.3 - 0.02 * np.arange(6))
    >>> round(float(fit.coefficients[0]), 3), round(fit.r2, 3)
    (-0.02, 1.0)
  """
  from sklearn import linear_model, metrics, model_selection

  signatures = np.asarray(signatures, np.float64)
  gaps = np.asarray(gaps, np.float64)
  if signatures.ndim != 2 or not signatures.shape[1]:
    raise ValueError(
      f'signatures must have shape (n, F), got {signatures.shape}'
    )
  networks, numbers = signatures.shape
  if gaps.shape != (networks,):
    raise ValueError(f'gaps must have shape ({networks},), got {gaps.shape}')
  if networks < 3:
    raise ValueError(
      f'signatures must come from at least 3 networks, got {networks}'
    )
  if not (np.isfinite(signatures).all() and (signatures > 0).all()):
    raise ValueError('signatures must be positive and finite')
  if not np.isfinite(gaps).all():
    raise ValueError('gaps must be finite')
  if np.ptp(gaps) == 0:
    raise ValueError(f'gaps must differ, got {gaps[0]:g} only')
  if folds < 2:
    raise ValueError(f'folds must be at least 2, got {folds}')
  logs = np.log(signatures)
  model = linear_model.LinearRegression().fit(logs, gaps)
  r2 = metrics.r2_score(gaps, model.predict(logs))
  spare = networks - numbers - 1
  split = model_selection.KFold(
    min(folds, networks), shuffle=True, random_state=seed
  )
  predicted = model_selection.cross_val_predict(
    linear_model.LinearRegression(), logs, gaps, cv=split
  )
  return GapFit(
    coefficients=model.coef_,
    intercept=float(model.intercept_),
    r2=float(r2),
    adjusted_r2=(
      float(1 - (1 - r2) * (networks - 1) / spare) if spare > 0 else np.nan
    ),
    cross_validated_r2=float(metrics.r2_score(gaps, predicted)),
  )


def summary(margins: Float[np.ndarray, ' N']) -> dict[str, float]:
  """Computes mean, quantiles and the fraction of negative ones, without NaN.

  Args:
    margins: (N,); infinite ones count in the quantiles and not in the mean.
  """
  margins = np.asarray(margins, np.float64)
  margins = margins[~np.isnan(margins)]
  finite = margins[np.isfinite(margins)]
  row = {
    'examples': margins.size,
    'negative': float(np.mean(margins < 0)) if margins.size else np.nan,
    'mean': float(finite.mean()) if finite.size else np.nan,
  }
  for q in QUANTILES:
    # Of the values themselves: between two infinities there is no mean.
    value = np.nan
    if margins.size:
      value = float(np.quantile(margins, q, method='inverted_cdf'))
    row[f'q{100 * q:g}'] = value
  return row


def ranking(margins: Float[np.ndarray, ' N']) -> Int[np.ndarray, ' N']:
  """Rows by signed margin, the most negative first, NaN last."""
  return np.argsort(np.asarray(margins), kind='stable')
