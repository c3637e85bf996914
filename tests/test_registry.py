"""Registered rules, models and datasets."""

import unittest.mock

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import analyze, config, data, models, registry, selection
from margin_jax.analyze import __main__ as analyze_command
from margin_jax.models import cnn
from margin_jax.train import loop, schema
from tests import helpers
from tests.custom import Mlp, rings

MODELS, DATASETS = models.REGISTERED, data.REGISTERED


@pytest.fixture(autouse=True)
def _forget():
  """What a test registers is gone after it."""
  with (
    unittest.mock.patch.dict(MODELS),
    unittest.mock.patch.dict(DATASETS),
    unittest.mock.patch.dict(selection.REGISTERED),
  ):
    yield


class Normed(nn.Module):
  """Reads vectors, and has every field."""

  num_classes: int
  dtype: jnp.dtype = jnp.float32
  dropout: float = 0.0
  width: float = 1.0
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs, *, train):
    x = nn.Dense(int(16 * self.width), dtype=self.dtype)(inputs)
    x = nn.BatchNorm(
      use_running_average=not train, axis_name=self.batch_norm_axis
    )(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
    features = x.astype(jnp.float32)
    return nn.Dense(self.num_classes, name='head')(features), features


class Tokens(nn.Module):
  """Drops rows of which each example has four, always at the same rate."""

  num_classes: int
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, inputs, *, train):
    x = nn.BatchNorm(
      use_running_average=not train, axis_name=self.batch_norm_axis
    )(nn.Dense(16)(inputs))
    drop = nn.Dropout(0.5, deterministic=not train)
    x = drop(inputs=x.reshape(-1, 4)).reshape(x.shape)
    return nn.Dense(self.num_classes, name='head')(x), x


def small(**fields):
  """A small run on the rings."""
  return helpers.small_config(
    **{
      'data.name': 'rings',
      'model.name': 'mlp',
      'data.augmentations': (),
      **fields,
    }
  )


@pytest.fixture(name='registered')
def _registered():
  registry.register_dataset('rings', train=rings(0), test=rings(1, 100))
  registry.register_model('mlp', Mlp)
  registry.register_model('normed', Normed)


def run(made, workdir):
  return loop.train(made, str(workdir), log=lambda _: None)


@pytest.mark.slow
def test_digits_registered_are_the_digits(tmp_path):
  """Bit for bit, with a crop, a validation split and wrong labels."""
  splits = [(x['inputs'], x['label']) for x in data.digits.load()[:2]]
  registry.register_dataset('mine', train=splits[0], test=splits[1])
  registry.register_model('my_cnn', cnn.CNN)
  fields = {'data.label_noise': 0.1, 'steps': 10}
  other = {'data.name': 'mine', 'model.name': 'my_cnn'}
  ours = run(helpers.small_config(**fields, **other), tmp_path / 'a')
  theirs = run(helpers.small_config(**fields), tmp_path / 'b')
  for split in ('test', 'validation'):
    assert ours[split] == theirs[split]


@pytest.mark.usefixtures('registered')
@pytest.mark.slow
def test_a_model_a_rule_and_arrays_of_ones_own_learn(tmp_path):
  def nearest(scored):
    return selection.mms(scored)

  registry.register_rule('nearest', nearest)
  made = small(steps=300, log_every=100, eval_every=300)
  made.selection.rule = 'nearest'
  result = run(made, tmp_path)
  assert result['test']['accuracy'] > 0.95
  assert result['config']['selection.rule'] == 'nearest'
  with pytest.raises(config.ConfigError, match=r"'nearest' -> 'mms'"):
    run(small(steps=300), tmp_path)
  # It is analyzed with what it was trained with.
  analyze.analyze(str(tmp_path), log=lambda _: None)
  registry.register_dataset('rings', train=rings(5), test=rings(1, 100))
  with pytest.raises(config.ConfigError, match=r'data\.digest: '):
    run(made, tmp_path)
  with pytest.raises(config.ConfigError, match='has other data'):
    analyze.analyze(str(tmp_path))
  MODELS.clear()
  with pytest.raises(config.ConfigError, match=r"model\.name='mlp'.*--config"):
    analyze.analyze(str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures('registered')
def test_the_command_line_registers_from_a_config_file(tmp_path, capsys):
  run(small(), tmp_path / 'run')
  file = tmp_path / 'mine.py'
  file.write_text(
    'from margin_jax import registry\n'
    'from tests.custom import Mlp, rings\n'
    "registry.register_dataset('rings', train=rings(0), test=rings(1, 100))\n"
    "registry.register_model('mlp', Mlp)\n"
  )
  DATASETS.clear()
  MODELS.clear()
  arguments = ['--workdir', str(tmp_path / 'run'), '--config']
  analyze_command.main([*arguments, f'{file}:mms,seed=1'])
  assert 'accuracy' in capsys.readouterr().out
  with pytest.raises(SystemExit, match=r'error: --config: .*nowhere'):
    analyze_command.main([*arguments, '/nowhere/mine.py'])


@pytest.mark.usefixtures('registered')
@pytest.mark.slow
def test_statistics_of_a_registered_model_do_not_depend_on_devices():
  """Its BatchNorm is told the axis, and its fields are those of the config."""
  fields = {
    'model.name': 'normed',
    'model.dropout': 0.1,
    'model.width': 2.0,
    'selection.score_dtype': 'bfloat16',
    'mmr.alpha': 0.0,
  }
  made = assert_one_device_is_two(**fields)
  model = made.spec.model
  assert (model.width, model.dropout) == (2.0, 0.1)
  assert made.spec.selection.scorer.dtype == jnp.bfloat16


def test_registered_models_have_the_fields_of_built_in_ones():
  registry.register_model('normed', Normed, any_size=True)
  registry.register_model('mlp', Mlp)
  for name, options, batch_norm, any_size in (
    ('normed', {'dtype', 'dropout', 'width'}, True, True),
    ('mlp', set(), False, False),
    ('mobilenet', {'dtype', 'width'}, True, True),
    ('cnn', {'dtype'}, False, False),
  ):
    model = models.find(name)
    assert isinstance(model, models.Model)
    assert name in models.names()
    assert model.options == options
    assert (model.batch_norm, model.any_size) == (batch_norm, any_size)
    assert model.reads == 'images'
    assert model.any_shape == (name in models.REGISTERED)
    # They are built alike; what a model does not take is ignored.
    module = models.build(
      name, 3, dropout=0.1, width=2.0, dtype='bfloat16', variant='authors',
      batch_norm_axis='device',
    )  # fmt: skip
    assert module.num_classes == 3
    expected = {
      'dtype': jnp.bfloat16, 'dropout': 0.1, 'width': 2.0,
    }  # fmt: skip
    for option in options:
      assert getattr(module, option) == expected[option]
    if batch_norm:
      assert module.batch_norm_axis == 'device'


def test_fields_that_are_no_options_are_left_alone():
  class Stemmed(Mlp):
    stem: str = 'mine'
    variant: int = 7

  registry.register_model('stemmed', Stemmed)
  module = models.build('stemmed', 3, stem='small', variant='authors')
  assert (module.stem, module.variant) == ('mine', 7)


def assert_one_device_is_two(**fields):
  """Compares what they train; the setup with two."""
  dataset = data.load('rings', validation_examples=180)
  states = []
  for devices in (1, 2):
    made = helpers.Setup(
      dataset=dataset,
      devices=devices,
      **{'data.name': 'rings', 'data.augmentations': (), **fields},
    )
    states.append(made.run(2)[0])
  for name in ('params', 'batch_stats', 'proxy'):
    one, two = (getattr(state, name) for state in states)
    helpers.assert_trees_close(one, two, 1e-5)
  return made


@pytest.mark.parametrize(
  'fields', [{'selection.batch_stats': 'pool'}, {'selection.proxy': 'tokens'}]
)
@pytest.mark.slow
def test_masks_of_a_registered_model_do_not_depend_on_devices(fields):
  registry.register_dataset('rings', train=rings(0), test=rings(1, 100))
  registry.register_model('tokens', Tokens)
  assert_one_device_is_two(**{'model.name': 'tokens', **fields})


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model.name': 'cnn'}, r"model\.name='cnn'.*inputs have shape \(2,\)"),
    ({'selection.proxy': 'cnn'}, r"selection\.proxy='cnn'.*shape \(2,\)"),
    ({'data.augmentations': ('flip',)}, 'not uint8 images'),
    ({'attack.name': 'fgsm', 'attack.epsilons': (0.1,)}, 'not uint8 images'),
    ({'selection.score_dtype': 'bfloat16'}, "'mlp' scores, which has no field"),
    ({'selection.batch_stats': 'pool'}, 'has no BatchNorm'),
    ({'selection.rule': 'mine'}, r'must be one of'),
  ],
)
@pytest.mark.usefixtures('registered')
def test_what_does_not_fit_is_refused(fields, message):
  with pytest.raises(config.ConfigError, match=message):
    small(**fields)


@pytest.mark.parametrize(
  ('name', 'value', 'reason'),
  [
    ('data.normalization', 'imagenet', 'uint8 images, but data.name is '),
    ('data.data_dir', '/data', 'a folder, but data.name is '),
    ('model.dtype', 'bfloat16', "with a field dtype, but model.name is 'mlp'"),
    ('model.dropout', 0.5, "a model with dropout, but model.name is 'mlp'"),
    ('model.width', 2.0, "a width multiplier, but model.name is 'mlp'"),
  ],
)
@pytest.mark.usefixtures('registered')
def test_what_the_registered_lacks_is_a_warning(name, value, reason):
  (line,) = schema.warnings(small(**{name: value}))
  start = f'warning: {name}={value!r} has no effect: it needs '
  assert line.startswith(start)
  assert reason in line


class Statistics(Mlp):
  """Has BatchNorm, and nothing to tell it the axis by."""

  norm: bool = True


class Headless(Mlp):
  """Calls its last layer something else."""

  head: str = 'last'


class Bare(nn.Module):
  """Has its head in one piece."""

  num_classes: int

  @nn.compact
  def __call__(self, inputs, *, train):
    head = self.param('head', nn.initializers.ones, (2, self.num_classes))
    return inputs @ head, inputs


class Fixed(nn.Module):
  """Has no parameters."""

  num_classes: int

  @nn.compact
  def __call__(self, inputs, *, train):
    return inputs, inputs


class Longer(Mlp):
  """Has a class too many."""

  more: int = 1


@pytest.mark.parametrize(
  ('module', 'message'),
  [
    (Statistics, 'a field batch_norm_axis, the axis_name'),
    (Headless, r"ends with nn\.Dense\(2, name='head'\)"),
    (Bare, r"ends with nn\.Dense\(2, name='head'\)"),
    (Fixed, r"ends with nn\.Dense\(2, name='head'\)"),
    (Longer, 'returns 2 logits, not 3'),
  ],
)
@pytest.mark.usefixtures('registered')
def test_a_model_that_is_none_is_refused(module, message, tmp_path):
  registry.register_model('mlp', module)
  with pytest.raises(config.ConfigError, match=message):
    run(small(), tmp_path)


def test_a_model_must_return_a_pair(tmp_path):
  class One(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, inputs, *, train):
      return nn.Dense(self.num_classes, name='head')(inputs)

  registry.register_dataset('rings', train=rings(0), test=rings(1))
  registry.register_model('mlp', One)
  with pytest.raises(config.ConfigError, match='returns a pair'):
    run(small(), tmp_path)


X, Y = rings(0, 20)
GOOD = {'train': (X, Y), 'test': (X, Y)}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'name': 'digits'}, "'digits' already exists"),
    ({'train': (X[0], Y)}, r'must have shape \(N, \.\.\.\)'),
    ({'train': (X.astype(np.uint8), Y)}, r'\(N, H, W, channels\) that'),
    ({'train': (X.astype(np.int32), Y)}, 'uint8 or floating, got dtype int32'),
    (
      {'test': (X * np.inf, Y)},
      'test: inputs must be finite in float32, row 0',
    ),
    ({'test': (X, Y[1:])}, r'labels must have shape \(20,\)'),
    ({'test': (X[:0], Y[:0])}, r'at least one'),
    ({'test': (X, 1.0 * Y)}, 'labels must be integers, got dtype float64'),
    ({'test': (X[:, :1], Y)}, 'train and test must be alike'),
    ({'train': (X, Y - 1)}, r'got -1 to 1 with C = 2'),
    ({'num_classes': 1}, r'C at least 2, got 0 to 1 with C = 1'),
    ({'train': (X, 0 * Y), 'test': (X, 0 * Y)}, 'with C = 1'),
    ({'train': (X, Y.astype(np.int64) + 2**40)}, 'at most 1,048,576 classes'),
    ({'num_classes': 10**10}, '1,048,576 classes, got 10000000000$'),
    ({'num_classes': '3'}, "num_classes must be an integer, got '3'"),
    ({'num_classes': True}, 'num_classes must be an integer, got True'),
    (
      dict.fromkeys(('train', 'test'), (np.zeros((20, 0, 8, 3), np.uint8), Y)),
      r'that are not empty, got shape \(20, 0, 8, 3\)',
    ),
  ],
)
def test_bad_arrays_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    registry.register_dataset(**{'name': 'mine', **GOOD, **arguments})
  assert 'mine' not in DATASETS


def test_arrays_that_change_later_change_nothing():
  images = np.zeros((20, 2, 2, 1), np.uint8)
  registry.register_dataset('mine', train=(images, Y), test=(images, Y))
  images[:] = 1
  assert not DATASETS['mine'].train['inputs'].any()


def test_bad_models_and_rules_are_refused():
  with pytest.raises(ValueError, match="'resnet8' already exists"):
    registry.register_model('resnet8', Mlp)
  with pytest.raises(TypeError, match='must be a class'):
    registry.register_model('mlp', Mlp(2))
  with pytest.raises(TypeError, match='must have a field num_classes'):
    registry.register_model('mlp', nn.Dense)

  class Wide(Mlp):
    width: int = 128

  with pytest.raises(ValueError, match=r'Wide has width=128, but model\.width'):
    registry.register_model('mlp', Wide)
  for name in ('mms', 'uniform'):
    with pytest.raises(ValueError, match='already exists'):
      registry.register_rule(name, selection.mms)
  with pytest.raises(TypeError, match='must be a function'):
    registry.register_rule('mine', 'mms')


@pytest.mark.slow
def test_images_of_any_size_can_be_scored_small():
  class Pooled(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, inputs, *, train):
      x = nn.relu(nn.Conv(4, (3, 3))(inputs))
      features = x.mean((1, 2))
      return nn.Dense(self.num_classes, name='head')(features), features

  fields = {'model.name': 'pooled', 'selection.score_resolution': 4}
  registry.register_model('pooled', Pooled)
  with pytest.raises(config.ConfigError, match='one size only'):
    helpers.small_config(**fields)
  registry.register_model('pooled', Pooled, any_size=True)
  assert helpers.Setup(**fields).run(1)[1]['score_min'].shape == (1,)
