"""Configs: what is refused and how, arguments, JSON."""

import ast
import copy
import json
import pathlib
import re

import ml_collections
import pytest

import margin_jax
from margin_jax import config as config_lib
from margin_jax import optimizers
from margin_jax.config import ConfigError
from margin_jax.train import schema
from tests.bad_configs import (
  BAD,
  BAD_TOGETHER,
  BOUNDARIES,
  GOOD,
  RATES,
  UNUSED,
)
from tests.helpers import make_config

FIELDS = tuple(config_lib.flatten(config_lib.default()))
# What may differ between a checkpoint and the run that continues it.
RESUMABLE = {
  'steps', 'devices', 'steps_per_call', 'log_every', 'log_rows',
  'eval_every', 'checkpoint_every', 'keep_every', 'eval_batch_size',
  'data.data_dir',
  'data.labels', 'data.workers', 'data.undecodable', 'on_nonfinite',
  'attack.name', 'attack.epsilons', 'attack.steps', 'attack.step_size',
  'attack.source', 'scale_schedule', 'accumulate',
}  # fmt: skip


def assert_refused(config, name, value, allowed):
  with pytest.raises(ConfigError) as caught:
    schema.validate(config)
  message = str(caught.value)
  assert message.startswith(f'{name}={value!r} is ')
  assert allowed in message


@pytest.mark.parametrize(('name', 'value', 'allowed'), BAD)
def test_a_bad_value_is_refused(name, value, allowed):
  assert_refused(make_config({name: value}), name, value, allowed)


def test_every_field_has_a_bad_value():
  assert {name for name, _, _ in BAD} >= {*FIELDS}


@pytest.mark.parametrize(('fields', 'allowed'), BAD_TOGETHER)
def test_a_bad_combination_is_refused(fields, allowed):
  name, value = next(iter(fields.items()))
  assert_refused(make_config(fields), name, value, allowed)


def test_a_pool_is_ten_batches_unless_it_is_set():
  config = config_lib.default()
  assert config.pool_size == 640
  config.batch_size = 32
  copied = copy.deepcopy(config)
  copied.update_from_flattened_dict({'batch_size': 16})
  assert (config.pool_size, copied.pool_size) == (320, 160)
  # It is not the user who set it: where no pool is scored, no warning.
  assert schema.warnings(config) == []
  assert schema.effective(config).pool_size == 640
  config.selection.rule = 'mms'
  assert schema.effective(config).pool_size == 320
  config.selection.rule = 'uniform'
  config.pool_size = 100
  config.batch_size = 8
  assert config.pool_size == 100
  assert 'pool_size=100 has no effect' in schema.warnings(config)[0]


@pytest.mark.parametrize('fields', GOOD, ids=str)
def test_the_edges_of_what_is_allowed(fields):
  schema.validate(make_config(fields))


@pytest.mark.parametrize('fields', GOOD, ids=str)
def test_what_is_set_has_an_effect(fields):
  unused = schema.unused(make_config(fields))
  assert {*unused} <= {'pool_size'}


@pytest.mark.parametrize(('fields', 'reason'), UNUSED)
def test_a_field_without_effect_is_a_warning(fields, reason):
  config = make_config(fields)
  schema.validate(config)
  name = next(iter(fields))
  (line,) = schema.warnings(config)
  start = f'warning: {name}={fields[name]!r} has no effect: it needs '
  assert line.startswith(start)
  assert reason in line
  assert {*schema.unused(config)} == {name}


def test_a_warning_names_the_field_to_change():
  """Here only the rule is amiss, not the memory."""
  config = make_config({'selection.memory': True, 'selection.warmup': 2})
  lines = schema.warnings(config)
  assert len(lines) == 2
  for line in lines:
    assert "other than 'uniform', but selection.rule is 'uniform'" in line


def test_mmr_that_rises_from_nothing_is_a_warning():
  config = make_config({'mmr.alpha': 0.0, 'mmr.alpha_end': 1e-3})
  (line,) = schema.warnings(config)
  assert 'MMR is on: mmr.alpha rises from 0 to mmr.alpha_end=0.001' in line
  for fields in ({'mmr.alpha': 1e-5}, {'mmr.alpha_end': None}):
    config.update_from_flattened_dict(fields)
    assert schema.warnings(config) == []


def test_every_field_that_needs_another_is_tested_without_it():
  dependent = {name for name, field in config_lib.FIELDS.items() if field.needs}
  # model.dtype: of built-in models every one has it.
  assert {next(iter(x)) for x, _ in UNUSED} == dependent - {'model.dtype'}


@pytest.mark.parametrize('freeze', [False, True])
def test_the_effective_config_has_defaults_where_nothing_counts(freeze):
  config = make_config(
    {
      'selection.reuse': 2,
      'selection.stop': 3,
      'data.buckets': [5],
      'optimizer.boundaries': [7],
      RATES: [0.1, 0.2],
    }
  )
  if freeze:
    config = ml_collections.FrozenConfigDict(config)
  effective = schema.effective(config)
  kept = {BOUNDARIES: (7,), RATES: (0.1, 0.2)}
  defaults = config_lib.flatten(config_lib.default())
  assert config_lib.flatten(effective) == defaults | kept
  assert config.selection.reuse == 2
  assert schema.warnings(effective) == []


def test_names_in_the_config_are_those_of_the_functions():
  names = schema.choices('optimizer.name')
  assert names == (*optimizers.NAMES, *optimizers.REGISTERED)
  name = 'optimizer.weight_decay_mask'
  assert schema.choices(name) == optimizers.WEIGHT_DECAY_MASKS


@pytest.mark.parametrize('name', FIELDS)
def test_a_missing_field_is_named_with_its_default(name):
  config = config_lib.default()
  default = config_lib.flatten(config)[name]
  *path, leaf = name.split('.')
  section = config[path[0]] if path else config
  with section.unlocked():
    del section[leaf]
  message = re.escape(f'{name} is missing; its default is {default!r}')
  with pytest.raises(ConfigError, match=f'^{message}$'):
    schema.validate(config)


def test_a_list_does_for_a_tuple():
  config = make_config({'data.augmentations': ['crop'], RATES: [0.1]})
  schema.validate(config)
  assert config_lib.flatten(config)[RATES] == (0.1,)


def test_sizes_must_be_divisible_by_the_devices():
  config = make_config({'batch_size': 6, 'pool_size': 9})
  schema.validate_devices(config, 2)  # no pool without a rule
  with pytest.raises(ConfigError, match=r'^batch_size=6 .*divisible by 4 '):
    schema.validate_devices(config, 4)
  config.selection.rule = 'mms'
  schema.validate_devices(config, 3)
  with pytest.raises(ConfigError, match=r'^pool_size=9 .*divisible by 2 '):
    schema.validate_devices(config, 2)
  # Every device has the scores of the whole pool.
  config.selection.memory, config.selection.sampler = True, 'pool'
  schema.validate_devices(config, 2)


def test_the_released_alpha_needs_a_second_epoch():
  fields = {'mmr.alpha_end': 1e-2, 'mmr.schedule': 'released'}
  config = make_config({**fields, 'steps': 10, 'batch_size': 8})
  schema.validate_data(config, 79, (8, 8, 1))
  with pytest.raises(ConfigError, match=r'^steps=10 .*above 10, one epoch'):
    schema.validate_data(config, 80, (8, 8, 1))


def test_the_data_must_fill_what_a_step_draws():
  config = make_config({'pool_size': 640, 'batch_size': 64})
  schema.validate_data(config, 64, (8, 8, 1))
  with pytest.raises(ConfigError, match=r'^batch_size=64 .*at most 63, '):
    schema.validate_data(config, 63, (8, 8, 1))
  config.selection.rule = 'mms'
  schema.validate_data(config, 640, (8, 8, 1))
  with pytest.raises(ConfigError, match=r'^pool_size=640 .*at most 639, '):
    schema.validate_data(config, 639, (8, 8, 1))


def test_options_that_the_data_make_void_are_refused():
  config = make_config({'trimming.last': 0.2, 'steps': 11})
  schema.validate_data(config, 640, (8, 8, 1))
  config.steps = 10
  with pytest.raises(ConfigError, match=r'^steps=10 .* above 10, one epoch'):
    schema.validate_data(config, 640, (8, 8, 1))
  config = make_config(
    {'data.augmentations': ('cutout',), 'data.cutout_size': 8}
  )
  schema.validate_data(config, 640, (8, 9, 1))
  with pytest.raises(ConfigError, match=r'^data.cutout_size=8 .* at most 7'):
    schema.validate_data(config, 640, (9, 7, 1))
  config = make_config(
    {
      'model.name': 'resnet8',
      'selection.rule': 'mms',
      'selection.score_resolution': 31,
    }
  )
  schema.validate_data(config, 640, (32, 32, 3))
  with pytest.raises(ConfigError, match=r'^selection.score_resolution=31 '):
    schema.validate_data(config, 640, (31, 31, 3))


def parse(text):
  return config_lib.parse_arguments(
    text,
    method=('baseline', 'mms'),
    seed=3,
    rate=0.5,
    fast=False,
    folder='here',
  )


@pytest.mark.parametrize(
  ('text', 'changed'),
  [
    (None, {}),
    ('', {}),
    ('mms', {'method': 'mms'}),
    ('method=mms', {'method': 'mms'}),
    ('seed=7,method=mms', {'seed': 7, 'method': 'mms'}),
    ('mms,rate=1,folder=a=b', {'method': 'mms', 'rate': 1.0, 'folder': 'a=b'}),
    ('fast=true', {'fast': True}),
    ('baseline,fast=False,rate=1e-3', {'rate': 1e-3}),
  ],
)
def test_arguments_change_the_defaults(text, changed):
  expected = {
    'method': 'baseline', 'seed': 3, 'rate': 0.5, 'fast': False,
    'folder': 'here',
  } | changed  # fmt: skip
  values = dict(parse(text))
  assert values == expected
  for name, value in expected.items():
    assert type(values[name]) is type(value)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('mmr', ["method='mmr'", "('baseline', 'mms')"]),
    ('method=', ["method=''", "('baseline', 'mms')"]),
    ('sed=3', ["'sed' is unknown", "('method', 'seed', 'rate', 'fast', "]),
    ('seed=1,seed=2', ["'seed' is given twice"]),
    ('mms,method=mms', ["'method' is given twice"]),
    ('seed=1,mms', ["'mms' must be field=value"]),
    ('seed=1.5', ["seed='1.5'", 'type int']),
    ('fast=1', ["fast='1'", 'type bool']),
  ],
)
def test_bad_arguments_are_refused(text, words):
  with pytest.raises(ConfigError) as caught:
    parse(text)
  assert all(word in str(caught.value) for word in words)


def test_flatten_names_fields_by_path():
  config = ml_collections.ConfigDict(
    {'a': 1, 'b': {'c': (1, 2), 'd': {'e': None}}, 'f': [3]}
  )
  expected = {'a': 1, 'b.c': (1, 2), 'b.d.e': None, 'f': (3,)}
  assert config_lib.flatten(config) == expected


def test_json_and_back_gives_no_differences():
  config = make_config(
    {RATES: (0.1, 0.01), BOUNDARIES: (5,), 'data.augmentations': ('crop',)}
  )
  saved = json.loads(json.dumps(config_lib.as_json(config)))
  assert {*saved} == {*FIELDS}
  assert config_lib.differences(saved, config_lib.as_json(config)) == []


@pytest.mark.parametrize('name', FIELDS)
def test_a_change_is_a_difference_unless_a_run_may_make_it(name):
  before = config_lib.as_json(config_lib.default())
  after = before | {name: 'new'}
  line = f'{name}: {before[name]!r} -> {"new"!r}'
  expected = [] if name in RESUMABLE else [line]
  assert config_lib.differences(before, after) == expected


@pytest.mark.parametrize(
  ('name', 'value', 'because'),
  [
    # alpha's slope is (alpha_end - alpha) / steps.
    ('steps', 2000, {'mmr.alpha_end': 1e-3}),
    # The tail begins at a fraction of the steps.
    ('steps', 2000, {'selection.memory': True, 'selection.rule': 'mms'}),
    # The rate is 0 at the last step.
    ('steps', 2000, {'optimizer.decay': 'linear'}),
    # Each part normalizes with its own examples.
    ('accumulate', 2, {'model.name': 'resnet8'}),
    # Each device normalizes with its own examples.
    ('devices', 2, {'model.batch_norm': 'device'}),
    # Each device ranks its own examples.
    ('devices', 2, {'selection.scope': 'device', 'selection.rule': 'mms'}),
    # The share that is kept is linear between the first and the last epoch.
    ('steps', 2000, {'trimming.last': 0.2}),
    # So many examples are kept that the devices can share them evenly.
    (
      'devices',
      2,
      {
        'trimming.last': 0.2,
        'trimming.first': 0.2,
        'trimming.backward': 'kept',
      },
    ),
  ],
)
def test_a_continued_run_may_not_change_its_updates(name, value, because):
  before = config_lib.as_json(make_config(because))
  after = config_lib.as_json(make_config({**because, name: value}))
  lines = config_lib.differences(before, after)
  assert [line.partition(':')[0] for line in lines] == [name]


def test_every_field_is_read_where_it_is_used():
  # Attribute chains of the syntax tree: comments and docstrings do not count.
  read = set()
  for path in pathlib.Path(margin_jax.__file__).parent.rglob('*.py'):
    if path.name not in ('config.py', 'schema.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
          read.add(ast.unparse(node))
  # A section that is read whole becomes the arguments of a function.
  wholes = {f'{name.partition(".")[0]}.to_dict' for name in FIELDS}
  wholes = {x.removesuffix('.to_dict') for x in wholes if f'config.{x}' in read}
  unread = [
    name
    for name in FIELDS
    if name.partition('.')[0] not in wholes
    and not any(f'.{chain}'.endswith(f'.config.{name}') for chain in read)
  ]
  assert not unread


def test_a_crop_holds_some_of_the_image():
  config = config_lib.default()
  config.data.augmentations = ('crop',)
  config.data.crop_padding = 7
  schema.validate_data(config, 640, (8, 9, 1))
  config.data.crop_padding = 8
  with pytest.raises(ConfigError, match=r'crop_padding=8 .* below 8, the side'):
    schema.validate_data(config, 640, (8, 9, 1))


@pytest.mark.parametrize(
  ('fields', 'idle'),
  [({}, False), ({'steps': 114}, True), ({'selection.warmup': 9}, True)],
)
def test_a_memory_that_never_acts_is_a_warning(fields, idle):
  """An epoch has 100 steps, and the tail is an eighth of all."""
  fields = {'selection.memory': True, 'steps': 800, **fields}
  config = make_config({**fields, 'selection.rule': 'mms'})
  lines = schema.idle_memory(config, {'train': 100 * config.batch_size + 1})
  assert len(lines) == idle
  assert all('has no effect: the first selection.warmup=' in x for x in lines)
