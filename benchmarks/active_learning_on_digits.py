"""Active learning: which digits should be labelled next?

    python -m benchmarks.active_learning_on_digits

Starts from 50 labelled digits, trains, asks for the labels of 25 more, and so
on to 300. What to ask for is decided by MMS, by entropy, or at random; each
round trains a new network on what is labelled. Writes
benchmarks/active_learning_on_digits.csv, a row for each rule and seed, and of
all rows there .md, .png and .pdf; --report only those. A row that is there is
not measured again.
"""

import argparse
import csv
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import margin_jax
from margin_jax import figures, files, selection
from margin_jax.compare import report
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
    logits, features = forward(params, images)
    scored = selection.Scored(
      logits=logits,
      features=features,
      kernel=params['head'],
      labels=labels,
      index=jnp.arange(len(labels)),
      keys=jax.random.split(rule_key, len(labels)),
    )
    scores = selection.RULES[rule].score(scored)
    labelled[margin_jax.query(scores, STEP, labelled)] = True
  return accuracy


SIZES = range(START, END + 1, STEP)
BASE = pathlib.Path(__file__).with_suffix('')


def read(path: pathlib.Path) -> dict[tuple[str, int], list[float]]:
  """Test accuracy after each round, by rule and seed."""
  if not path.exists():
    return {}
  with path.open(newline='') as file:
    return {
      (row['rule'], int(row['seed'])): [float(row[f'{n}']) for n in SIZES]
      for row in csv.DictReader(file)
    }


def measure(path: pathlib.Path, seeds: int) -> None:
  """Measures what is missing."""
  found = read(path)
  device = f'{jax.devices()[0].device_kind}, jax {jax.__version__}'
  for seed in range(seeds):
    for rule in RULES:
      if (rule, seed) in found:
        continue
      found[rule, seed] = grow(rule, seed)
      print(rule, seed, found[rule, seed][-1], device, flush=True)
      files.write_csv(
        path,
        ['rule', 'seed', *map(str, SIZES)],
        [
          {'rule': r, 'seed': s, **dict(zip(map(str, SIZES), x, strict=True))}
          for (r, s), x in found.items()
        ],
      )


def write_report(found: dict[tuple[str, int], list[float]]) -> None:
  """The table, and the figure."""
  errors = {
    rule: 1 - np.array([x for (r, _), x in found.items() if r == rule])
    for rule in RULES
  }
  seeds = [len(x) for x in errors.values()]
  table = report.markdown(
    ['labelled', *RULES],
    [
      [f'{n}', *(_cell(1 - errors[rule][:, i]) for rule in RULES)]
      for i, n in enumerate(SIZES)
    ],
  )
  lines = [
    '# Active learning on digits',
    '',
    f'`python -m benchmarks.active_learning_on_digits --seeds={max(seeds)}`: '
    f'a network of two hidden layers is trained from scratch for {STEPS} steps '
    f'of {BATCH} on the labelled examples, and then asks for {STEP} more '
    'labels; there are 1,437 training images. Accuracy in percent on 360 test '
    f'images, mean ± standard deviation over {max(seeds)} seeds.',
    '',
    f'![Test error against labels]({BASE.name}.png)',
    '',
    *table,
    '',
    'One CPU, jax 0.10.1.',
  ]
  BASE.with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  draw(BASE.with_suffix('.png'), errors)


def _cell(values: np.ndarray) -> str:
  return report.percent(*report.mean_and_deviation(values))


def draw(path: pathlib.Path, errors: dict[str, np.ndarray]) -> None:
  """Test error against the number of labels, with a band over the seeds."""
  looks = figures.looks([*errors])
  with figures.drawing(path, 3.0, figures.COLUMN) as figure:
    axes = figure.subplots()
    axes.set_yscale('log')
    for index, (rule, x) in enumerate(errors.items()):
      values = tuple(100 * of(x, axis=0) for of in (np.mean, np.min, np.max))
      place = index, len(errors)
      figures.curve(axes, SIZES, values, place, looks[rule], rule)
    figures.log_ticks(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel('labelled digits')
    axes.set_ylabel('test error, %')
    note = figures.seeds_note([len(x) for x in errors.values()])
    figures.legend(figure, axes, note.replace('; ', ';\n'))


def main() -> None:
  """All rules, all seeds."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seeds', type=int, default=10)
  parser.add_argument('--report', action='store_true')
  args = parser.parse_args()
  path = BASE.with_suffix('.csv')
  if not args.report:
    measure(path, args.seeds)
  write_report(read(path))


if __name__ == '__main__':
  main()
