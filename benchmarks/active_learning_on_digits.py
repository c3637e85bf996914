"""Active learning: which digits should be labelled next?

    python -m benchmarks.active_learning_on_digits

Starts from 50 labelled digits, trains, asks for the labels of 25 more, and so
on to 300. What to ask for is decided by MMS, by entropy, or at random; each
round trains a new network on what is labelled. Writes
benchmarks/active_learning_on_digits.md.
"""

import argparse
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import margin_jax
from margin_jax import selection
from margin_jax.data import digits

RULES = ('mms', 'entropy', 'random')
START, STEP, END = 50, 25, 300
STEPS, BATCH = 300, 32
OPTIMIZER = optax.adam(1e-3)


def forward(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits and features of a network of two hidden layers."""
  x = images.reshape(len(images), -1) / 255
  x = jax.nn.relu(x @ params['hidden1'])
  features = jax.nn.relu(x @ params['hidden2'])
  return features @ params['head'], features


def init(key: jax.Array) -> dict:
  """He-normal weights."""
  keys = jax.random.split(key, 3)
  normal = jax.nn.initializers.he_normal()
  shapes = {'hidden1': (64, 128), 'hidden2': (128, 128), 'head': (128, 10)}
  return {
    name: normal(k, shape)
    for (name, shape), k in zip(shapes.items(), keys, strict=True)
  }


@jax.jit
def train(key: jax.Array, images: jax.Array, labels: jax.Array, known) -> dict:
  """A new network, trained on the examples whose labels are known."""
  init_key, batch_key = jax.random.split(key)

  def loss(params: dict, rows: jax.Array) -> jax.Array:
    logits, _ = forward(params, images[rows])
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
    )

  def step(carry: tuple, key: jax.Array) -> tuple:
    params, state = carry
    rows = jax.random.choice(key, len(labels), (BATCH,), p=known / known.sum())
    updates, state = OPTIMIZER.update(jax.grad(loss)(params, rows), state)
    return (optax.apply_updates(params, updates), state), None

  params = init(init_key)
  carry = (params, OPTIMIZER.init(params))
  (params, _), _ = jax.lax.scan(step, carry, jax.random.split(batch_key, STEPS))
  return params


def grow(rule: str, seed: int) -> list[float]:
  """Test accuracy after each round."""
  pool, test, _ = digits.load()
  images, labels = jnp.asarray(pool['inputs']), jnp.asarray(pool['label'])
  key = jax.random.key(seed)
  # The first examples are the same for every rule.
  first = np.random.default_rng(seed).permutation(len(labels))[:START]
  labelled = np.zeros(len(labels), bool)
  labelled[first] = True
  accuracy = []
  for round_ in range((END - START) // STEP + 1):
    train_key, rule_key = jax.random.split(jax.random.fold_in(key, round_))
    params = train(train_key, images, labels, jnp.asarray(labelled, float))
    logits, _ = forward(params, jnp.asarray(test['inputs']))
    accuracy.append(float(np.mean(np.argmax(logits, 1) == test['label'])))
    logits, _ = forward(params, images)
    keys = jax.random.split(rule_key, len(labels))
    scores = selection.RULES[rule](logits, params['head'], labels, keys)
    labelled[margin_jax.query(scores, STEP, labelled)] = True
  return accuracy


def main() -> None:
  """All rules, all seeds, one table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seeds', type=int, default=10)
  args = parser.parse_args()
  sizes = range(START, END + 1, STEP)
  lines = [
    '# Active learning on digits',
    '',
    f'`python -m benchmarks.active_learning_on_digits --seeds={args.seeds}`: '
    f'a network of two hidden layers, trained anew for {STEPS} steps of '
    f'{BATCH} on what is labelled, then asks for {STEP} more labels of 1,437. '
    'Accuracy in percent on 360 test images, mean ± standard deviation over '
    f'{args.seeds} seeds.',
    '',
    '| labelled | ' + ' | '.join(RULES) + ' |',
    '|---|' + '---|' * len(RULES),
  ]
  curves = {
    rule: [grow(rule, seed) for seed in range(args.seeds)] for rule in RULES
  }
  for index, size in enumerate(sizes):
    cells = []
    for rule in RULES:
      values = [100 * curve[index] for curve in curves[rule]]
      spread = statistics.stdev(values) if len(values) > 1 else 0.0
      cells.append(f'{statistics.mean(values):.2f} ± {spread:.2f}')
    lines.append(f'| {size} | ' + ' | '.join(cells) + ' |')
  device = jax.devices()[0].device_kind
  lines += ['', f'1 x {device}, jax {jax.__version__}.']
  text = '\n'.join(lines) + '\n'
  pathlib.Path(__file__).with_suffix('.md').write_text(text)
  print(text)


if __name__ == '__main__':
  main()
