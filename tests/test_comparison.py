"""The parts of a comparison that train nothing, against oracles."""

import dataclasses
import json
import math
import re
import statistics

import numpy as np
import pytest
import scipy.stats

from margin_jax import config as config_lib
from margin_jax import figures, files
from margin_jax.compare import methods as methods_lib
from margin_jax.compare import plots, report
from margin_jax.compare.runs import Run
from margin_jax.config import ConfigError
from margin_jax.train import compiled, runs, schema
from tests.helpers import small_config, trials_of


@pytest.mark.parametrize(
  ('text', 'parts'),
  [
    ('uniform,mms', ['uniform', 'mms']),
    (
      "a+x=('u', 'v'),b+y=[1,(2,3)] , c",
      ["a+x=('u', 'v')", 'b+y=[1,(2,3)]', 'c'],
    ),
    ("'a,b',c,", ["'a,b'", 'c', '']),
  ],
)
def test_commas_in_brackets_and_quotations_do_not_split(text, parts):
  assert methods_lib.split(text) == parts


@pytest.mark.parametrize(
  ('text', 'fields'),
  [
    ('mms', {}),
    ('mms+selection.reuse=5', {'selection.reuse': 5}),
    ('mms+reuse=5+pool_size=64', {'selection.reuse': 5, 'pool_size': 64}),
    ('loss+ramp=1e+0', {'selection.ramp': 1.0}),
    ('mms+stop=9', {'selection.stop': 9}),
    ('mms+score_dtype=bfloat16', {'selection.score_dtype': 'bfloat16'}),
    ('mms+data.augmentations=()', {'data.augmentations': ()}),
    ('mms+optimizer.nesterov=true', {'optimizer.nesterov': True}),
    ("mms+large_margin.layers='a','b'", {'large_margin.layers': ('a', 'b')}),
  ],
)
def test_a_method_is_a_rule_and_fields(text, fields):
  expected = {'selection.rule': re.split(r'\+', text)[0], **fields}
  found = methods_lib.parse_method(text, small_config())
  assert found == expected
  for name, value in expected.items():
    assert type(found[name]) is type(value)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('ms', ["'ms' must be one of the rules", "'mms', 'signed_margin', 'loss'"]),
    ('mms+reuse', ["'reuse' must be field=value"]),
    ('mms+fast=1', ["'fast' is not a config field"]),
    ('mms+reuse=2+selection.reuse=3', ['selection.reuse is given twice']),
    ('mms+reuse=x', ["selection.reuse='x'", 'an integer, at least 1']),
    ('mms+seed=1', ['set seed by --seeds']),
    ('mms+rule=loss', ['set selection.rule by --methods']),
  ],
)
def test_bad_methods_are_refused(text, words):
  with pytest.raises(ConfigError) as caught:
    methods_lib.parse_method(text, small_config())
  assert str(caught.value).startswith(f'methods: {text!r}')
  assert all(word in str(caught.value) for word in words)


def test_a_sweep_is_parsed_like_a_flag():
  texts = [
    'mmr.alpha=1e-5,1e-4',
    'reuse=1,2',
    'data.augmentations=(),("flip",)',
  ]
  assert methods_lib.parse_sweep(texts, small_config()) == {
    'mmr.alpha': [1e-5, 1e-4],
    'selection.reuse': [1, 2],
    'data.augmentations': [(), ('flip',)],
  }


@pytest.mark.parametrize(
  ('texts', 'words'),
  [
    (['mmr.alpha'], "'mmr.alpha' must be field=value,value"),
    (['mmr.alpha=1,'], 'must be field=value,value'),
    (['alpha=1'], "'alpha' is not a config field"),
    (['mmr.alpha=1', 'mmr.alpha=2'], 'mmr.alpha is given twice'),
    (['mmr.alpha=1,1.0'], 'a value is given twice'),
    (['seed=1,2'], 'set seed by --seeds'),
  ],
)
def test_bad_sweeps_are_refused(texts, words):
  with pytest.raises(ConfigError, match=re.escape(words)):
    methods_lib.parse_sweep(texts, small_config())


def test_fields_hold_for_the_rules_that_have_them():
  config = small_config(
    **{'selection.rule': 'loss', 'selection.reuse': 2, 'selection.ramp': 0.1}
  )
  found = trials_of(config, ['uniform', 'mms', 'loss', 'mms+reuse=4'])
  selection = [schema.effective(trial.config).selection for trial in found]
  assert [x.rule for x in selection] == ['uniform', 'mms', 'loss', 'mms']
  assert [x.reuse for x in selection] == [1, 2, 2, 4]
  assert [x.ramp for x in selection] == [0, 0, 0.1, 0]
  assert config.selection.rule == 'loss'  # the caller's is as it was


def test_every_point_of_the_grid_once_where_it_makes_a_difference():
  sweep = ['reuse=1,2', 'mmr.alpha=1e-5,1e-4']
  found = trials_of(small_config(), ['uniform', 'mms'], sweep)
  names = [trial.name for trial in found]
  assert names == [
    'uniform, mmr.alpha=1e-05',
    'mms, selection.reuse=1, mmr.alpha=1e-05',
    'uniform, mmr.alpha=0.0001',
    'mms, selection.reuse=1, mmr.alpha=0.0001',
    'mms, selection.reuse=2, mmr.alpha=1e-05',
    'mms, selection.reuse=2, mmr.alpha=0.0001',
  ]
  assert len({trial.folder for trial in found}) == 6
  assert found[4].config.selection.reuse == 2


def test_a_baseline_without_a_pool_is_trained_once_for_all_sizes():
  found = trials_of(small_config(), ['uniform', 'mms'], ['pool_size=16,32'])
  assert [trial.name for trial in found] == [
    'uniform', 'mms, pool_size=16', 'mms, pool_size=32',
  ]  # fmt: skip
  with pytest.raises(ConfigError, match='no effect on any of the methods'):
    trials_of(small_config(), ['uniform'], ['pool_size=16,32'])


def test_a_method_may_change_nothing():
  config = small_config()
  found = methods_lib.parse_methods(['as it is'], config, {'as it is': {}})
  assert found == {'as it is': {}}


@pytest.mark.parametrize(
  ('methods', 'sweep', 'words'),
  [
    (['mms+reuse=5'], [], 'mms+reuse=5: pool_size=32 is not allowed'),
    (['mms+mmr.alpha=1'], ['mmr.alpha=1,2'], 'sets mmr.alpha, which is swept'),
    (['mms', 'mms'], [], "'mms' is given twice"),
    ({'a/b': {}, 'a b': {}}, [], 'would have the same folder, a_b'),
    ({'a': {'pool': 3}}, [], "'a': 'pool' is not a config field"),
    ({'a': {'steps': 'x'}}, [], "'a': steps: "),
    (['uniform'], ['mmr.alpha=-1,2'], 'uniform, mmr.alpha=-1.0: mmr.alpha=-1'),
  ],
)
def test_bad_trials_are_refused(methods, sweep, words):
  with pytest.raises(ConfigError, match=re.escape(words)):
    trials_of(small_config(), methods, sweep)


@pytest.mark.parametrize(
  ('rules', 'added'),
  [
    (['uniform'], []),
    (['uniform', 'mms'], ['random']),
    (['random+pool_size=16', 'mms+pool_size=16'], []),
    (['random', 'mms', 'mms+reuse=1'], []),
    (['random', 'mms', 'mms+reuse=2'], ['random+reuse=2']),
    (
      ['mms+reuse=2+pool_size=64', 'loss+pool_size=64+reuse=2'],
      ['random+pool_size=64+reuse=2'],
    ),
    (['mms+steps=9+mmr.alpha=1e-3'], ['random+mmr.alpha=0.001+steps=9']),
    ({'of the config': {}}, ['random']),
    (
      ['uniform', 'mms', 'loss+ramp=0.1', 'mms+pool_size=16+every=2'],
      ['random', 'random+pool_size=16+every=2'],
    ),
  ],
)
def test_the_control_is_added_where_a_rule_scores(rules, added):
  config = small_config()  # whose rule is mms
  methods = methods_lib.parse_methods(rules, config)
  assert [*methods_lib.with_controls(methods, config)] == [*rules, *added]


def test_the_name_of_the_control_is_its_own():
  with pytest.raises(ConfigError, match="'random' is the name of the control"):
    methods_lib.with_controls(
      {'random': {'selection.rule': 'mms'}}, small_config()
    )


def test_a_field_without_effect_at_a_grid_point_is_not_of_the_trial():
  config = small_config(**{'mmr.stop_feature_gradient': True})
  found = trials_of(config, ['mms'], ['mmr.alpha=0.0,1e-4'])
  stopped = [
    schema.effective(x.config).mmr.stop_feature_gradient for x in found
  ]
  assert stopped == [False, True]
  sweep = ['mmr.alpha=0.0,1e-4', 'mmr.stop_feature_gradient=False,True']
  found = trials_of(small_config(), ['mms'], sweep)
  assert [x.name for x in found] == [
    'mms, mmr.alpha=0.0',
    'mms, mmr.alpha=0.0001, mmr.stop_feature_gradient=False',
    'mms, mmr.alpha=0.0001, mmr.stop_feature_gradient=True',
  ]


def test_a_trial_of_fewer_steps_has_its_schedule_scaled():
  config = small_config(steps=100)
  config.optimizer.learning_rates = (0.1, 0.01)
  config.optimizer.boundaries = (60,)
  methods = methods_lib.parse_methods(
    ['uniform', 'uniform+steps=50', 'uniform+steps=50+scale_schedule=False'],
    config,
  )
  trials = methods_lib.make_trials(config, methods, {})
  whole, short, same = (x.config for x in trials)
  assert [*whole.optimizer.boundaries] == [60]
  assert [*short.optimizer.boundaries] == [30]
  assert [*same.optimizer.boundaries] == [60]
  swept = methods_lib.make_trials(config, {'uniform': {}}, {'steps': (20, 100)})
  drops = [x.config.optimizer.boundaries[0] for x in swept]
  assert drops == [12, 60]


def test_a_control_keeps_what_its_method_sets():
  """Also a boundary that is the config's own: it is not scaled."""
  config = small_config(steps=100)
  config.optimizer.learning_rates = (0.1, 0.01)
  config.optimizer.boundaries = (60,)
  text = 'mms+steps=80+optimizer.boundaries=(60,)'
  methods = methods_lib.parse_methods(['uniform', text], config)
  methods = methods_lib.with_controls(methods, config)
  trials = methods_lib.make_trials(config, methods, {})
  for trial in trials[1:]:
    assert [*trial.config.optimizer.boundaries] == [60], trial.name
    assert trial.config.steps == 80
  assert len(trials) == 3


def test_a_config_that_lacks_a_field_is_refused_by_its_name():
  config = small_config()
  with config.unlocked():
    del config.ema
  with pytest.raises(ConfigError, match=r'ema\.decay'):
    methods_lib.make_trials(config, {'uniform': {}}, {})


def test_a_trial_does_not_depend_on_the_sweep_of_fields_that_it_does_not_use():
  sweeps = ['pool_size=16,32'], ['pool_size=64,128']
  first, second = (
    trials_of(small_config(), ['uniform', 'mms'], sweep)[0].config
    for sweep in sweeps
  )
  assert first == second


@pytest.mark.parametrize(
  ('methods', 'fields', 'named'),
  [
    (['uniform', 'mms'], {'selection.reuse': 2}, []),
    (['uniform', 'mms+reuse=2'], {}, []),
    (['uniform+reuse=2', 'mms'], {}, ['uniform: selection.reuse']),
    (['uniform', 'loss'], {'selection.ramp': 0.1}, []),
    (['uniform', 'mms'], {'selection.ramp': 0.1}, ['selection.ramp']),
  ],
)
def test_a_field_that_was_set_for_nothing_is_a_warning(methods, fields, named):
  config = small_config(**{'mmr.alpha': 1e-4, **fields})
  parsed = methods_lib.parse_methods(methods, config)
  trials = methods_lib.make_trials(config, parsed, {})
  lines = methods_lib.warnings(trials, parsed)
  assert len(lines) == len(named)
  for line, name in zip(lines, named, strict=True):
    method, _, field = name.rpartition(': ')
    assert line.startswith('warning: ' + method)
    assert f'{field} has no effect' in line


@pytest.mark.parametrize(
  ('methods', 'names'),
  [
    (['uniform', 'mms'], ['']),
    (['uniform', 'mms+mmr.alpha=1e-5'], ['uniform: ']),
    (['mms+mmr.alpha_end=None'], []),
  ],
)
def test_mmr_that_rises_from_nothing_is_a_warning(methods, names):
  config = small_config(**{'mmr.alpha': 0.0, 'mmr.alpha_end': 1e-3})
  parsed = methods_lib.parse_methods(methods, config)
  trials = methods_lib.make_trials(config, parsed, {})
  lines = methods_lib.warnings(trials, parsed)
  assert [line.partition('warning: MMR is on')[0] for line in lines] == names


def test_welch_is_the_test_of_the_formula():
  rng = np.random.default_rng(0)
  for sizes in ((2, 2), (3, 3), (5, 9)):
    first, second = (rng.normal(size=n) * n for n in sizes)
    found = report.welch(first, second)
    parts = [x.var(ddof=1) / len(x) for x in (first, second)]
    t = (first.mean() - second.mean()) / math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(
      part**2 / (n - 1) for part, n in zip(parts, sizes, strict=True)
    )
    assert found == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom))
    other = scipy.stats.ttest_ind(first, second, equal_var=False).pvalue
    assert found == pytest.approx(other)


def test_welch_where_there_is_no_variance():
  assert report.welch([1.0], [1.0, 2.0]) is None
  assert report.welch([1.0, 1.0], [2.0, 2.0]) is None
  assert 0 < report.welch([1.0, 1.0], [2.0, 3.0]) < 1


def test_mean_and_deviation_are_those_of_a_sample():
  values = [0.1, 0.5, 0.4]
  mean, deviation = report.mean_and_deviation(values)
  assert mean == pytest.approx(statistics.mean(values))
  assert deviation == pytest.approx(statistics.stdev(values))
  assert report.mean_and_deviation([2.0]) == (2.0, None)


def test_an_average_is_over_the_steps_that_all_runs_have():
  first = [{'step': s, 'flops': 2.0 * s, 'error': 1 / s} for s in (1, 2, 4)]
  second = [{'step': s, 'flops': 4.0 * s, 'error': 3 / s} for s in (2, 3, 4)]
  x, mean, low, high = plots.average([first, second], 'flops', 'error')
  np.testing.assert_allclose(x, [6, 12])
  np.testing.assert_allclose(mean, [1, 0.5])
  np.testing.assert_allclose(low, [0.5, 0.25])
  np.testing.assert_allclose(high, [1.5, 0.75])


def rows(errors, **fields):
  costs = {
    'steps': 9, 'examples_scored': 4, 'flops': 2e12, 'seconds': 8.0,
    'data_wait': 2.0, 'skipped': 0,
  } | fields  # fmt: skip
  return [{'test_error': error, **costs} for error in errors]


def test_a_summary_of_the_seeds_of_a_trial():
  own, baseline = rows([0.01, 0.03]), rows([0.04, 0.05])
  summary = report.summarize(own)
  assert summary['seeds'] == 2
  assert summary['test'] == pytest.approx((0.02, math.sqrt(2e-4)))
  assert summary['wait'] == 0.25
  assert 'validation' not in summary
  difference, p = report.difference(own, baseline)
  assert difference == pytest.approx(-0.025)
  assert p == pytest.approx(report.welch([0.01, 0.03], [0.04, 0.05]))


def seeds_of(name, own):
  """A trial whose rows of runs.csv are `own`."""
  trial = methods_lib.Trial(name, {}, small_config())
  return report.Seeds(trial, own, [], report.summarize(own))


def test_the_table_of_a_comparison():
  trials = [
    seeds_of('uniform', rows([0.04, 0.05])),
    seeds_of('mms', rows([0.01, 0.03], flops=8e12)),
    seeds_of('one', rows([0.5])),
  ]
  found = report.comparison_table(trials, trials[0])
  cells = [[x.strip() for x in line.split('|')[1:-1]] for line in found]
  p = scipy.stats.ttest_ind([0.01, 0.03], [0.04, 0.05], equal_var=False).pvalue
  assert cells[0][:7] == [
    'method', 'steps', 'seeds', 'test error, %', 'difference to `uniform`',
    'reduction, %', 'p',
  ]  # fmt: skip
  assert cells[0][8] == 'TFLOP'
  assert cells[2][3:7] == ['4.50 ± 0.71', '-', '-', '-']
  # An error of 2.0 in place of 4.5 is 55.6% lower.
  assert cells[3] == [
    '`mms`', '9', '2', '2.00 ± 1.41', '-2.50', '+55.6', f'{p:.3f}', '4', '8',
    '8.0', '25.0%',
  ]  # fmt: skip
  assert cells[4][2:7] == ['1', '50.00', '+45.50', '-1011.1', '-']


@pytest.mark.parametrize(
  ('methods', 'sentence'),
  [
    (
      ['uniform', 'mms'],
      ['All methods train with mmr.alpha=1e-05, mmr.alpha_end=0.001.'],
    ),
    (
      ['uniform+mmr.alpha=0.0', 'mms'],
      ['All methods train with mmr.alpha_end=0.001.'],
    ),
    (['uniform+mmr.alpha=0.0+mmr.alpha_end=None', 'mms'], []),
  ],
)
def test_what_all_methods_train_with_is_said(methods, sentence):
  config = small_config(**{'mmr.alpha': 1e-5, 'mmr.alpha_end': 1e-3})
  configs = [x.config for x in trials_of(config, methods)]
  assert report._shared_fields(configs) == sentence


def test_what_a_test_example_is_worth_is_said():
  result = {'test': {'count': 360}}
  (sentence,) = report._resolution([result, result])
  assert sentence == 'One of 360 test examples is 0.28 points.'
  assert not report._resolution([result, {'test': {}}])


def test_errors_on_another_dataset_are_not_compared():
  trials = [seeds_of(name, rows([0.04, 0.05])) for name in ('a', 'b')]
  trials[1].trial.config.data.name = 'cifar10'
  found = report.comparison_table(trials, trials[0])[3]
  assert '| 4.50 ± 0.71 | - | - | - |' in found


def test_a_task_is_shown_by_what_it_is_reported_by(tmp_path):
  costs = dict.fromkeys(
    ('examples_scored', 'examples_trained', 'flops', 'seconds', 'data_wait',
     'skipped', 'undecodable'), 1,
  )  # fmt: skip
  tests = {
    'test': {'accuracy': 0.75, 'worst_class_accuracy': 0.125, 'f1': 0.875},
    'test_mismatched': {'accuracy': 0.5},
  }
  run = Run(methods_lib.Trial('uniform', {}, small_config()), 0, tmp_path)
  (row,) = report.run_rows([run], [{'steps': 9, **tests, **costs}])
  assert (row['test_f1'], row['test_mismatched_error']) == (0.875, 0.5)
  assert row['test_worst_class_error'] == 0.875
  uniform = seeds_of('uniform', [row, row])
  header, _, line = report.comparison_table([uniform], uniform)
  names = 'test error, %', 'worst class test error, %', 'F1, %'
  assert f'| {" | ".join(names)} | mismatched test error, % |' in header
  values = '25.00 ± 0.00', '87.50 ± 0.00', '87.50 ± 0.00', '50.00 ± 0.00'
  assert f'| {" | ".join(values)} | - |' in line


def test_runs_of_versions_that_did_not_know_the_worst_class(tmp_path):
  """One of two seeds, or the first evaluations of a run that was continued."""
  old, new = rows([0.04, 0.05])
  new['test_worst_class_error'] = 0.5
  for own in ([old, new], [new, old]):
    assert 'test_worst_class_error' not in report.summarize(own)
  costs = 'step,flops,seconds,accuracy'
  (tmp_path / 'train.csv').write_text(f'{costs},mean_mms\n1,1,1,1,1\n')
  table = f'{costs},split,worst_class_accuracy\n'
  table += '1,1,1,0.75,test,\n2,1,1,0.75,test,0.5\n'
  (tmp_path / 'eval.csv').write_text(table)
  first, second = report.read_curves(tmp_path).test
  with pytest.raises(files.FileError, match='lost their rows'):
    report.read_curves(tmp_path, 'validation')
  assert 'worst_class_error' not in first
  assert (second['error'], second['worst_class_error']) == (0.25, 0.5)


def test_mean_mms_of_the_scoring_forward_is_where_pools_were_scored(tmp_path):
  costs = 'step,flops,seconds,accuracy'
  (tmp_path / 'eval.csv').write_text(f'{costs},split\n2,1,1,1,test\n')
  table = f'{costs},mean_mms,mean_mms_scoring\n1,1,1,1,2,3\n2,1,1,1,2,nan\n'
  (tmp_path / 'train.csv').write_text(table)
  first, second = report.read_curves(tmp_path).train
  assert (first['mean_mms'], first['mean_mms_scoring']) == (2, 3)
  assert 'mean_mms_scoring' not in second


def test_the_plot_of_mean_mms_says_by_which_forward(tmp_path, monkeypatch):
  def rows(**columns):
    return [{'step': i, **columns} for i in (1, 2)]

  saved = []
  monkeypatch.setattr(figures, 'save', lambda figure, *_: saved.append(figure))
  train = {
    'plain': [rows(mean_mms=1.0)],
    'mms': [[*rows(mean_mms=2.0, mean_mms_scoring=3.0), {'step': 3}]],
  }
  train['mms'][0][2]['mean_mms'] = 2.0  # nothing was scored since step 2
  plots.mean_mms(tmp_path / 'mean_mms.png', train)
  training, scoring = saved[0].axes
  assert 'training forward' in training.get_title()
  assert 'scoring forward' in scoring.get_title()
  lines = {
    (axes, line.get_label()): [*line.get_ydata()]
    for axes in (training, scoring)
    for line in axes.get_lines()
  }
  assert lines == {
    (training, 'plain'): [1, 1], (training, 'mms'): [2, 2, 2],
    (scoring, 'mms'): [3, 3],
  }  # fmt: skip
  # Nothing scores: one panel.
  plots.mean_mms(tmp_path / 'mean_mms.png', {'plain': train['plain']})
  assert len(saved[1].axes) == 1


def curve(*errors):
  """The rows of a seed whose errors are these, at steps 1, 2, ..."""
  costs = {'flops': 1.0, 'seconds': 1.0}
  steps = enumerate(errors, 1)
  return [{'step': i, 'error': x, 'mean_mms': x, **costs} for i, x in steps]


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were drawn, and not saved."""
  found = []
  monkeypatch.setattr(figures, 'save', lambda figure, *_: found.append(figure))
  return found


def test_axes_have_room_for_the_end_and_say_what_they_leave_out(
  drawn, tmp_path
):
  """The first fifth of a run does not widen the axis."""
  test = {'mms': [curve(0.9, *[0.2] * 9, 0.05), curve(0.9, *[0.2] * 9, 0.06)]}
  train = {'mms': [curve(0.6, *[0.1] * 9, 0.0)]}
  plots.error(tmp_path / 'error.png', test, train, 'mms')
  whole, _, _, batches, ends = drawn[0].axes
  assert whole.get_ylim() == pytest.approx((5 / 1.15, 20 * 1.15))
  assert [x.get_text() for x in whole.texts] == ['at first up to 90%']
  assert batches.get_ylim() == pytest.approx((10 / 1.15, 60 * 1.15))
  assert [x.get_text() for x in batches.texts] == ['0% is at the lower edge']
  (bottom,) = {min(line.get_ydata()) for line in batches.get_lines()}
  assert bottom == batches.get_ylim()[0]
  seeds, mean, _ = ends.get_lines()
  assert [*seeds.get_xdata()] == pytest.approx([5, 6])
  assert [*mean.get_xdata()] == pytest.approx([5.5])
  # The figure has labels of 8 pt and is as wide as a page.
  assert drawn[0].get_figwidth() == figures.PAGE
  assert {x.get_size() for x in whole.get_xticklabels()} == {8}


def test_bands_and_what_was_not_comparable_are_explained(drawn, tmp_path):
  three = {'mms': [curve(0.2, 0.1)] * 3, 'loss': [curve(0.2, 0.1)] * 3}
  plots.error(tmp_path / 'error.png', three, three, 'mms')
  plots.mean_mms(tmp_path / 'mean_mms.png', {**three, 'x': [curve(1, 1)]})
  titles = [x.legends[0].get_title().get_text() for x in drawn]
  assert titles == [
    'line: mean of 3 seeds; band: from the lowest to the highest',
    'line: mean of 1 to 3 seeds; band: from the lowest to the highest',
  ]
  assert "do not compare the networks' margins" in drawn[1].get_suptitle()


def test_no_line_hides_another_with_the_same_values(drawn, tmp_path):
  same = {'uniform': [curve(0.3, 0.2)], 'random': [curve(0.3, 0.2)]}
  plots.error(tmp_path / 'error.png', same, same, 'uniform')
  below, above = drawn[0].axes[0].get_lines()[:2]
  assert below.get_zorder() < above.get_zorder()
  assert below.get_linewidth() > above.get_linewidth() + 0.5


def test_the_end_of_the_baseline_is_a_dotted_line(drawn, tmp_path):
  """2020, Figure 3; the mean over its seeds, whatever their last steps."""
  curves = {
    'mms': [curve(0.5, 0.1)], 'plain': [curve(0.6, 0.2), curve(0.6, 0.3)]
  }  # fmt: skip
  plots.error(tmp_path / 'error.png', curves, curves, 'plain')
  for axes in drawn[0].axes[:3]:
    lines = {line.get_label(): line for line in axes.get_lines()}
    dotted = lines['end of plain']
    assert dotted.get_linestyle() == ':'
    assert dotted.get_color() == lines['plain'].get_color()
    assert [*dotted.get_ydata()] == pytest.approx([25, 25])


def test_what_lies_below_the_axis_is_said(drawn, tmp_path):
  """A run that diverges; the baseline ends at 0, and its line is there."""
  test = {
    'mms': [curve(0.02, *[0.3] * 9, 0.5)],
    'plain': [curve(*[0.4] * 10, 0.0)],
  }
  plots.error(tmp_path / 'error.png', test, test, 'plain')
  whole = drawn[0].axes[0]
  low = whole.get_ylim()[0]
  assert low == pytest.approx(30 / 1.15)
  (note,) = [x.get_text() for x in whole.texts]
  assert note.splitlines() == [
    'at first down to 2%', '0% is at the lower edge'
  ]  # fmt: skip
  (dotted,) = [x for x in whole.get_lines() if x.get_label() == 'end of plain']
  assert [*dotted.get_ydata()] == [low, low]


def test_a_mean_has_a_place_where_its_lowest_seed_has_none(drawn, tmp_path):
  seeds = [curve(0.5, x) for x in (0.0, 0.0, 0.003)]
  plots.error(tmp_path / 'error.png', {'mms': seeds}, {'mms': seeds}, 'mms')
  (line,) = [x for x in drawn[0].axes[0].get_lines() if x.get_label() == 'mms']
  assert line.get_ydata()[-1] == pytest.approx(0.1)


def test_steps_that_were_all_skipped_are_gaps(drawn, tmp_path):
  """Their error is NaN."""
  test = {'mms': [curve(0.5, 0.2)]}
  for errors in ([0.5, np.nan, 0.2], [np.nan]):
    plots.error(tmp_path / 'error.png', test, {'mms': [curve(*errors)]}, 'mms')
    assert np.isfinite(drawn[-1].axes[3].get_ylim()).all()


@pytest.mark.parametrize('seeds', [1, 3, 5, 10])
def test_seeds_may_be_equal(seeds, drawn, tmp_path):
  """The mean of equal numbers may differ from them in the last bit."""
  for wrong in range(40):
    row = {'test_error': wrong / 360, 'flops': 5e16 / 3, 'seconds': 0.1}
    plots.cost(tmp_path / 'cost.png', {'mms': [row] * seeds})
  assert len(drawn) == 40


@pytest.mark.parametrize(
  ('number', 'found'),
  [
    (999, (1, '')),
    (1000, (1e3, 'k')),
    (2e15, (1e15, 'P')),
    (1e30, (1e21, 'Z')),
  ],
)
def test_units(number, found):
  assert report.unit(number) == found


def test_the_best_of_each_method_is_by_validation():
  found = trials_of(small_config(), ['uniform', 'mms'], ['mmr.alpha=1e-5,1e-4'])

  def seeds(errors, counts=(3, 3, 3, 3)):
    return [
      report.Seeds(trial, [], [], {'validation': (error, None), 'seeds': n})
      for trial, error, n in zip(found, errors, counts, strict=True)
    ]

  best = report.best_of_methods(seeds((0.3, 0.1, 0.2, 0.4)))
  assert [x.trial.name for x in best] == [
    'uniform, mmr.alpha=0.0001', 'mms, mmr.alpha=1e-05',
  ]  # fmt: skip
  # One lucky seed of three is no mean.
  best = report.best_of_methods(seeds((0.3, 0.1, 0.2, 0.4), (3, 1, 3, 3)))
  assert best[1].trial.name == 'mms, mmr.alpha=0.0001'


def result(config, **fields):
  saved = config_lib.as_json(config)
  found = {
    'steps': config.steps, 'config': saved, 'test': {'accuracy': 0.5},
    'device': 'abacus', 'devices': 1, 'versions': {}, **fields,
    **dataclasses.asdict(compiled.Counters()),
  }  # fmt: skip
  return json.dumps(found)


def complete(config, folder):
  return runs.complete(folder, runs.to_save(config))


def test_a_result_is_taken_if_it_is_of_the_same_config(tmp_path):
  config = small_config()
  assert complete(config, tmp_path) is None
  (tmp_path / 'result.json').write_text(result(config))
  assert complete(config, tmp_path)['steps'] == 20
  config.eval_every = 5
  assert complete(config, tmp_path)['steps'] == 20
  config.steps = 40  # goes on
  assert complete(config, tmp_path) is None


@pytest.mark.parametrize(
  ('name', 'value', 'line'),
  [
    ('pool_size', 16, 'pool_size: 32 -> 16'),
    ('steps', 10, 'steps: 20 -> 10'),
    ('mmr.alpha', 0.0, 'mmr.alpha: 0.0001 -> 0.0'),
  ],
)
def test_the_result_of_another_config_is_refused(tmp_path, name, value, line):
  (tmp_path / 'result.json').write_text(result(small_config()))
  with pytest.raises(ConfigError, match=f'another config.*\n  {line}$'):
    complete(small_config(**{name: value}), tmp_path)


def test_an_attack_may_be_added_to_a_run_that_is_complete(tmp_path):
  (tmp_path / 'result.json').write_text(result(small_config()))
  fields = {'attack.name': 'fgsm', 'attack.epsilons': (0.1,)}
  assert complete(small_config(**fields), tmp_path) is None
