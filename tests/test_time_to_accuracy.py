"""benchmarks/time_to_accuracy: recipes, results that survive, the report."""

import argparse

import pytest

from benchmarks import pruning_designs
from benchmarks import time_to_accuracy as benchmark
from benchmarks import time_to_accuracy_report as report


def methods_of(size, scale=1):
  args = argparse.Namespace(scale=scale, data_dir=None)
  return benchmark.make_methods(benchmark.SIZES[size], args)


@pytest.mark.parametrize('scale', [1, 0.02])
@pytest.mark.parametrize('size', benchmark.SIZES)
def test_methods_are_valid_and_differ(size, scale):
  methods = methods_of(size, scale)  # which validates them
  digests = {method.digest for method in methods.values()}
  assert len(digests) == len(methods)
  cut, full = methods['uniform, 65%'], methods['uniform']
  assert cut.config.steps < full.config.steps
  assert cut.step_digest == full.step_digest
  interval = full.config.eval_every
  assert all(x.config.steps % interval == 0 for x in methods.values())


def test_digest_tells_recipes_and_no_machines():
  config = methods_of('mnist')['uniform'].config
  before = benchmark.digest(config)
  config.data.data_dir, config.seed, config.eval_every = '/elsewhere', 7, 1
  assert benchmark.digest(config) == before
  config.optimizer.momentum = 0.8
  assert benchmark.digest(config) != before


@pytest.mark.slow
def test_what_is_trained_is_added_to_the_results(data_dir, tmp_path):
  args = argparse.Namespace(
    size='mnist', scale=0.002, data_dir=str(data_dir / 'tfds'), seeds=1,
    minutes=10, rounds=1,
  )  # fmt: skip
  size = benchmark.SIZES['mnist']
  methods = benchmark.make_methods(size, args)
  methods = {x: methods[x] for x in ('uniform', 'margin pruning, auto')}
  base = tmp_path / 'results'
  benchmark.train(args, methods, base, tmp_path / 'runs')
  results = benchmark.read_results(base.with_suffix('.csv'), methods)
  assert {*results} == {(method, 0) for method in methods}
  assert '| uniform |' in base.with_suffix('.md').read_text()


def row(method, seed, digest, step):
  values = dict.fromkeys(benchmark.COLUMNS, 0.5)
  return values | {
    'method': method,
    'seed': seed,
    'config': digest,
    'step': step,
  }


def test_only_complete_runs_of_the_same_recipe_are_read(tmp_path):
  methods = methods_of('mnist')
  digest, steps = methods['MMR'].digest, methods['MMR'].config.steps
  path = tmp_path / 'results.csv'
  assert benchmark.read_results(path, methods) == {}
  complete = [row('MMR', 0, digest, step) for step in (940, steps)]
  rows = {
    ('MMR', 0): complete,
    ('MMR', 1): [row('MMR', 1, digest, 940)],
    ('MMR', 2): [row('MMR', 2, 'another', steps)],
  }
  benchmark.write_results(path, methods, rows)
  assert benchmark.read_results(path, methods) == {('MMR', 0): complete}


def outcome(name, family, seconds, errors):
  rows = [
    [
      {'step': 50, 'flops': 1e9, 'error': 1.0, 'worst_class_error': 1.0},
      {'step': 100, 'flops': 2e9, 'error': x, 'worst_class_error': x},
    ]
    for x in errors
  ]
  return report.Outcome(name, family, 100, rows, seconds / 100)


def test_the_noise_of_the_line_is_that_of_its_neighbours():
  """Between two points a share of each, as of their errors."""
  line = report.Line(
    [
      outcome('a', report.PLAIN, 10, [0.05, 0.07]),
      outcome('b', report.PLAIN, 20, [0.02, 0.03]),
      outcome('c', report.PLAIN, 40, [0.01, 0.09]),
    ]
  )
  first, second, third = (x.variance / 2 for x in line.outcomes)
  exact = [0.01, 0.01]
  for seconds, variance in (
    (10, first),
    (15, first / 4 + second / 4),
    (25, 9 * second / 16 + third / 16),
    (50, third),
  ):
    noise = line.above(outcome('x', report.MEMORY, seconds, exact))[1]
    assert noise == pytest.approx(2 * variance**0.5)


def test_designs_compare_runs_of_the_same_seed():
  errors = {
    'uniform': {0: 0.01, 1: 0.02, 2: 0.03},
    'as it is': {1: 0.02, 2: 0.03},  # seed 0 was not finite
  }
  rows = [x for x in pruning_designs.table(errors) if 'as it is' in x]
  assert rows == ['| as it is | 2 | 2.50 | 2.50 | +0.00 ± 0.00 |']


def test_report_compares_with_the_line_at_the_same_seconds(tmp_path):
  outcomes = [
    outcome('uniform', report.PLAIN, 20, [0.02, 0.04]),
    outcome('uniform, 50%', report.PLAIN, 10, [0.04, 0.06]),
    outcome('good', report.MEMORY, 15, [0.01, 0.01]),
    outcome('equal', report.FRESH, 30, [0.02, 0.05]),
  ]
  line = report.Line(outcomes)
  difference, _ = line.above(outcomes[2])
  assert difference == pytest.approx(-0.03)
  assert line.above(outcomes[3])[0] == pytest.approx(0.005)
  assert line.above(outcome('early', report.FRESH, 5, [0.1])) is None
  single = outcome('single', report.MEMORY, 15, [0.05])
  assert '| +1.00 |' in '\n'.join(report.table([single], line))
  assert report.arrival(outcomes[2], 0.03) == '2 of 2: 15'
  assert report.arrival(outcomes[3], 0.03) == '1 of 2: 30'
  report.write(tmp_path / 'report', ['# Title'], outcomes, {})
  text = (tmp_path / 'report.md').read_text()
  assert 'Below it, so better: good. On it: equal.' in text
  assert '| uniform | 2 | 100 | 3.00 ± 1.41 | 3.00 ± 1.41 | 2 | 20 |' in text
  assert (tmp_path / 'report.png').exists()
