"""Float64 NumPy oracles: the formulas of the papers, one example at a time.

Plain loops on purpose. Nothing here shares code with the package, or is
arranged as the package arranges it, so an error has to be made twice to hide.
"""

import math

import numpy as np


def float64(x) -> np.ndarray:
  """Widens any floating array, bfloat16 included, without rounding."""
  with np.errstate(invalid='ignore'):  # signalling NaNs complain when widened
    return np.asarray(x).astype(np.float64)


def random_head(shape, seed=0):
  """float32 (features, logits, kernel) and int32 labels; shape is (B, C, D).

  The logits are those of a last layer with a bias.
  """
  b, c, d = shape
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(b, d))
  kernel = rng.normal(size=(d, c))
  logits = features @ kernel + rng.normal(size=(1, c))
  labels = rng.integers(0, c, size=b).astype(np.int32)
  features, logits, kernel = (
    x.astype(np.float32) for x in (features, logits, kernel)
  )
  return features, logits, kernel, labels


def competitors(logits, labels) -> np.ndarray:
  """The best class other than the label; NaN beats all; -1: no such label."""
  competing = []
  for row, label in zip(float64(logits), np.asarray(labels), strict=True):
    others = [j for j in range(len(row)) if j != label]
    nans = [j for j in others if math.isnan(row[j])]
    if not 0 <= label < len(row):
      competing.append(-1)
    elif nans:
      competing.append(nans[0])
    else:
      # max returns the first of equals: the lowest class.
      competing.append(max(others, key=lambda j: row[j]))
  return np.array(competing, np.int32)


def _distance(row, kernel, p, q) -> float:
  """Signed distance to the boundary of classes p and q: 2020, Eq. 7."""
  if math.isnan(row[p]) or math.isnan(row[q]):
    return math.nan
  gap = 0.0 if row[p] == row[q] else row[p] - row[q]
  norm = math.sqrt(sum((w[p] - w[q]) ** 2 for w in kernel))
  if norm > 0:
    return gap / norm
  return math.copysign(math.inf, gap) if gap else 0.0


def signed_margins(logits, kernel, labels) -> np.ndarray:
  """2020, Eq. 7: label against competitor; NaN for a label that is none."""
  logits, kernel = float64(logits), float64(kernel)
  competing = competitors(logits, labels)
  return np.array(
    [
      math.nan if m < 0 else _distance(row, kernel, y, m)
      for row, y, m in zip(logits, np.asarray(labels), competing, strict=True)
    ]
  )


def mms_scores(logits, kernel) -> np.ndarray:
  """2020, Eq. 9: the two highest-scoring classes, and no label."""
  logits, kernel = float64(logits), float64(kernel)
  scores = []
  for row in logits:
    if any(math.isnan(s) for s in row):
      scores.append(math.nan)
      continue
    first, second, *_ = sorted(range(len(row)), key=lambda j: (-row[j], j))
    scores.append(_distance(row, kernel, first, second))
  return np.array(scores)


def mmr_penalty(
  features, logits, kernel, labels, reduction='mean_of_squares', weights=None
) -> float:
  """2020, Eq. 8; 'square_of_mean' is the form of the authors' later code."""
  features, kernel = float64(features), float64(kernel)
  count = len(features)
  weights = [1.0] * count if weights is None else float64(weights)
  norms = [math.sqrt(sum(x * x for x in phi)) for phi in features]
  largest = max(
    (norm for v, norm in zip(weights, norms, strict=True) if v), default=0.0
  )
  widths = []
  for y, m in zip(labels, competitors(logits, labels), strict=True):
    if m < 0:
      return math.nan
    widths.append(math.sqrt(sum((w[y] - w[m]) ** 2 for w in kernel)))
  pairs = [*zip(weights, widths, strict=True)]
  if reduction == 'square_of_mean':
    return (largest * sum(v * width for v, width in pairs) / count) ** 2
  return sum(v * (width * largest) ** 2 for v, width in pairs) / count


def select_lowest(scores, k) -> np.ndarray:
  """NumPy's stable argsort: ties by index, -0 equal to +0, NaN last."""
  return np.argsort(float64(scores), kind='stable')[:k]


def _log_softmax(row) -> list[float]:
  top = max(row)
  log_sum = top + math.log(sum(math.exp(s - top) for s in row))
  return [s - log_sum for s in row]


def loss_scores(logits, labels) -> np.ndarray:
  """Minus the cross-entropy."""
  rows = float64(logits)
  return np.array(
    [_log_softmax(row)[y] for row, y in zip(rows, labels, strict=True)]
  )


def entropy_scores(logits) -> np.ndarray:
  """Minus the entropy of softmax, where 0 log 0 is 0."""
  scores = []
  for row in float64(logits):
    log_p = [x for x in _log_softmax(row) if x > -math.inf]
    scores.append(sum(math.exp(x) * x for x in log_p))
  return np.array(scores)


def margin_scores(logits) -> np.ndarray:
  """The difference of the two highest softmax probabilities."""
  scores = []
  for row in float64(logits):
    first, second, *_ = sorted(math.exp(x) for x in _log_softmax(row))[::-1]
    scores.append(first - second)
  return np.array(scores)


def hinge(logits, labels):
  """max(0, 1 - (s_y - s_m)) of every example; 2020, Eq. 6."""
  logits = np.asarray(logits, np.float64)
  losses = []
  for row, label in zip(logits, np.asarray(labels), strict=True):
    others = np.delete(row, label)
    losses.append(max(0.0, 1 - (row[label] - others.max())))
  return np.array(losses)


def trimmed_mean(losses, keep) -> float:
  """The mean of the `keep` largest; at least one, at most all."""
  losses = float64(losses).tolist()  # no warnings for inf - inf
  if any(math.isnan(x) for x in losses):
    return math.nan
  keep = min(max(keep, 1), len(losses))
  return sum(sorted(losses)[::-1][:keep]) / keep


def _take_turns(values, labels, order, taken, count):
  """Classes give their lowest value left in turn, until `count` are taken."""

  def left_of(label):
    return [
      i
      for i, value in enumerate(values)
      if labels[i] == label and i not in taken and not math.isnan(value)
    ]

  while len(taken) < count and any(left_of(label) for label in order):
    for label in order:
      left = left_of(label)
      if left and len(taken) < count:
        # min returns the first of equals: the lowest index.
        taken.append(min(left, key=lambda i: values[i]))


def balanced_ramp(scores, labels, draws, order, k, hard) -> list[int]:
  """`hard` hardest by turns of the classes, then random ones up to k.

  `order` lists the classes. NaN scores are taken when nothing else is left.
  """
  scores = float64(scores)
  taken = []
  _take_turns(scores, labels, order, taken, hard)
  nans = [i for i, score in enumerate(scores) if math.isnan(score)]
  draws = [math.nan if i in nans else draw for i, draw in enumerate(draws)]
  _take_turns(draws, labels, order, taken, k)
  return (taken + nans)[:k]


def percentiles(losses) -> list[float]:
  """The share of the pool with a loss at most this one; NaN is not at most."""
  losses = float64(losses)
  return [sum(x <= loss for x in losses) / len(losses) for loss in losses]


def random_network(seed=0, batch=4, inputs=3, hidden=5, classes=4):
  """float32 weights of one hidden layer with BatchNorm; inputs and labels."""
  rng = np.random.default_rng(seed)
  weights = {
    'w1': rng.normal(size=(inputs, hidden)),
    'b1': rng.normal(size=hidden),
    'mean': rng.normal(size=hidden),
    'var': rng.uniform(0.5, 2, size=hidden),
    'scale': rng.uniform(0.5, 2, size=hidden),
    'w2': rng.normal(size=(hidden, classes)),
    'b2': rng.normal(size=classes),
  }
  weights = {k: v.astype(np.float32) for k, v in weights.items()}
  x = rng.normal(size=(batch, inputs)).astype(np.float32)
  return weights, x, rng.integers(0, classes, size=batch).astype(np.int32)


def network_logits(weights, x, perturbation=0.0) -> np.ndarray:
  """One example through it: BatchNorm with given statistics, then tanh."""
  w = {k: float64(v) for k, v in weights.items()}
  hidden = (x @ w['w1'] + w['b1'] - w['mean']) / np.sqrt(w['var'])
  return (np.tanh(hidden * w['scale']) + perturbation) @ w['w2'] + w['b2']


def _slope(function, size, norm, step=1e-6) -> float:
  """The dual norm of a gradient at zero, by central differences."""
  steps = step * np.eye(size)
  gradient = [(function(e) - function(-e)) / (2 * step) for e in steps]
  named = {'l1': np.inf, 'l2': 2, 'l_inf': 1}  # and 1/p + 1/q = 1
  order = named[norm] if norm in named else 1 / (1 - 1 / norm)
  return float(np.linalg.norm(gradient, order))


def _difference(logits, p, q, values=lambda x: x):
  """What is added at a layer -> value of class p minus that of class q."""

  def difference(perturbation):
    found = values(logits(perturbation))
    return found[p] - found[q]

  return difference


def _at(weights, x, layer):
  """The logits as a function of what is added at a layer, and its size."""
  if layer == 'input':
    return lambda e: network_logits(weights, x + e), len(x)
  return lambda e: network_logits(weights, x, e), len(weights['b1'])


def layer_margins(weights, inputs, labels, layer, norm) -> np.ndarray:
  """Difference of logits over the dual norm of its gradient at the layer."""
  found = []
  competing = competitors([network_logits(weights, x) for x in inputs], labels)
  for x, y, m in zip(float64(inputs), labels, competing, strict=True):
    logits, size = _at(weights, x, layer)
    gap = logits(np.zeros(size))
    slope = _slope(_difference(logits, y, m), size, norm)
    found.append((gap[y] - gap[m]) / slope)
  return np.array(found)


def large_margin_losses(
  weights, inputs, labels, layers, *, gamma, alpha, norm, top_k, worst_case,
  difference, epsilon, normalize_by_size, layer_weights, frozen=None,
):  # fmt: skip
  """Elsayed 2018: mean over layers of -sum_k clip(d_k), for each example.

  `frozen` are weights whose gradient norms are used, and are those that a
  first-order gradient holds constant.
  """

  def values(logits):
    return np.exp(_log_softmax(logits)) if difference == 'softmax' else logits

  losses = []
  for x, y in zip(float64(inputs), labels, strict=True):
    own = values(network_logits(weights, x))
    competing = sorted({*range(len(own))} - {y}, key=lambda k, own=own: -own[k])
    per_layer = []
    for layer in layers:
      logits, size = _at(weights if frozen is None else frozen, x, layer)
      distances = []
      for k in competing[:top_k]:
        slope = _slope(_difference(logits, y, k, values), size, norm)
        if normalize_by_size:
          slope /= size
        if layer_weights is not None:
          slope /= layer_weights[layer]
        distances.append((own[y] - own[k]) / (slope + epsilon))
      if worst_case:
        distances = [min(distances)]
      low = gamma * (1 - alpha)
      per_layer.append(-sum(min(max(d, low), gamma) for d in distances))
    losses.append(sum(per_layer) / len(per_layer))
  return np.array(losses)


def attacked(weights, x, label, epsilon, steps, step_size, bounds):
  """One example after steps along the signs of a gradient by differences.

  Of log sum_{k != y} exp(s_k) - s_y; every step is cut to the ball, and to the
  bounds.
  """

  def against(x):
    logits = network_logits(weights, x)
    others = np.delete(logits, label)
    return np.log(np.sum(np.exp(others))) - logits[label]

  start, x = float64(x), float64(x)
  for _ in range(steps):
    moves = 1e-6 * np.eye(len(x))
    slopes = np.array([against(x + e) - against(x - e) for e in moves])
    x = np.clip(
      x + step_size * np.sign(slopes), start - epsilon, start + epsilon
    )
    x = np.clip(x, *bounds)
  return x


def infobatch(losses, keep_ratio, order):
  """InfoBatch's `prune`: (kept, weights), of the easy the first of `order`.

  Of the easy examples (below the mean loss) the released code keeps
  int(keep_ratio * count), chosen by `np.random.choice`: here those that come
  first in `order`. Weights are of all examples, 1 where none is given.
  """
  losses = float64(losses)
  easy = losses < losses.mean()
  count = int(keep_ratio * easy.sum())
  chosen = [i for i in order if easy[i]][:count]
  weights = np.ones(len(losses))
  weights[chosen] = 1 / keep_ratio
  return {*np.flatnonzero(~easy), *chosen}, weights


def pruned_count(scores, share, drop) -> int:
  """How many examples an epoch keeps, of a share of easy ones at least one."""
  known = sum(s > -math.inf for s in scores)
  easy = min(int(share * len(scores) + 1e-9), known)
  staying = max(int((1 - drop) * easy + 1e-9), min(easy, 1))
  return len(scores) - easy + staying


def pool_batches(scores, visited, order, pool_size, batch_size, explore=0.0):
  """Pools of `order`; of each the oldest, then the lowest of the others."""
  batches = []
  for start in range(0, len(order) - pool_size + 1, pool_size):
    pool = list(order[start : start + pool_size])
    count = round(explore * batch_size)
    oldest = sorted(pool, key=lambda i: visited[i])[:count] if count else []
    rest = sorted((i for i in pool if i not in oldest), key=lambda i: scores[i])
    batches.append(oldest + rest[: batch_size - count])
  return batches


def class_accuracies(labels, predictions) -> dict[int, float]:
  """How many of each class are recognized, for the classes that there are."""
  right, counts = {}, {}
  for label, prediction in zip(labels, predictions, strict=True):
    counts[label] = counts.get(label, 0) + 1
    right[label] = right.get(label, 0) + (label == prediction)
  return {label: right[label] / counts[label] for label in counts}


def batch_norm(x, scale, bias, running, size, momentum=0.9, epsilon=1e-5):
  """BatchNorm of each group of `size` examples in turn, as on a device each.

  Returns the normalized activations, and the running (mean, variance) that
  the devices' own are averaged to.
  """
  x = float64(x)
  groups, own = [], []
  for start in range(0, len(x), size):
    rows = x[start : start + size].reshape(-1, x.shape[-1])
    mean = sum(rows) / len(rows)
    variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    normal = (rows - mean) / np.sqrt(variance + epsilon) * scale + bias
    groups.append(normal.reshape(x[start : start + size].shape))
    own.append(
      [
        momentum * old + (1 - momentum) * new
        for old, new in zip(running, (mean, variance), strict=True)
      ]
    )
  mean, variance = (sum(values) / len(own) for values in zip(*own, strict=True))
  return np.concatenate(groups), mean, variance


def released_alphas(start, end, steps, steps_per_epoch) -> list[float]:
  """MMR's weight at every step, as the authors' code loops over epochs."""
  epochs = math.ceil(steps / steps_per_epoch)
  alphas = []
  for epoch in range(epochs):
    alpha = 0.0
    if epoch > 0:
      alpha = start + epoch * ((end - start) / epochs)
    alphas += [alpha] * steps_per_epoch
  return alphas[:steps]


def resized_square(pixels, side):
  """The central square of an image (H, W, C), by an antialiased triangle.

  Each pixel of the result is the mean of those under a triangle as wide as two
  of its own, or of the image's where these are wider; float64.
  """
  height, width, _ = pixels.shape
  length = min(height, width)
  weights = []
  for extent in (height, width):
    start, scale = (extent - length) / 2, length / side
    reach = max(scale, 1)
    centers = start + (np.arange(side) + 0.5) * scale
    distance = np.abs(np.arange(extent) + 0.5 - centers[:, None])
    triangle = np.maximum(1 - distance / reach, 0)
    weights.append(triangle / triangle.sum(axis=1, keepdims=True))
  rows, columns = weights
  return np.einsum('ih,jw,hwc->ijc', rows, columns, pixels.astype(np.float64))
