"""The large-margin loss in the train step, and the data its studies need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import mnist_large_margin
from margin_jax import at_layers, data, large_margin_loss, linearized
from margin_jax.config import ConfigError
from margin_jax.train import loop
from margin_jax.train import setup as setup_lib
from tests import helpers

FIELDS = {
  'selection.rule': 'uniform', 'mmr.alpha': 0.0, 'optimizer.weight_decay': 0.0,
  'large_margin.weight': 0.5, 'large_margin.layers': ('input', 'conv2'),
  'large_margin.gamma': 2.0, 'large_margin.top_k': 2,
}  # fmt: skip
RESNET = {**FIELDS, 'model.name': 'resnet8'}
RESNET |= {'large_margin.layers': ('input', 'stage2_block1', 'features')}


@functools.cache
def setup(**fields):
  return helpers.Setup(**FIELDS, **fields)


@pytest.mark.slow
@pytest.mark.parametrize('cross_entropy', [0.0, 1.0])
def test_one_step_equals_its_parts(cross_entropy):
  this = setup(**{'large_margin.cross_entropy': cross_entropy})
  state, metrics = this.run(1)
  batch = helpers.first_pool(this, 8)
  inputs = this.dataset.prepare(batch['inputs'])

  def parts(params):
    variables = {'params': params}
    logits, _ = this.spec.model.apply(variables, inputs, train=True)
    found = at_layers(this.spec.model, variables, inputs, ('input', 'conv2'))
    large_margin = jnp.mean(
      large_margin_loss(*found, batch['label'], gamma=2.0, top_k=2)
    )
    loss = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    )
    return cross_entropy * loss + 0.5 * large_margin, (loss, large_margin)

  gradient, (loss, large_margin) = jax.jit(jax.grad(parts, has_aux=True))(
    this.first.params
  )
  # The first step of momentum SGD at rate 0.05.
  expected = jax.tree.map(
    lambda p, g: p - 0.05 * g, this.first.params, gradient
  )
  helpers.assert_trees_close(state.params, expected, 1e-5)
  np.testing.assert_allclose(metrics['loss'], [loss], 1e-5)
  np.testing.assert_allclose(metrics['large_margin'], [large_margin], 1e-5)
  np.testing.assert_allclose(metrics['penalty'].shape, (1,))


@pytest.mark.long
@pytest.mark.slow
def test_batch_norm_uses_the_batch_but_examples_do_not_meet():
  """The loss is that of evaluation mode with the batch's statistics."""
  this = helpers.Setup(dataset=helpers.noise(), **{
    **RESNET, 'large_margin.top_k': 1,
  })  # fmt: skip
  _, metrics = this.run(1)
  batch = helpers.first_pool(this, 8)
  inputs = this.dataset.prepare(batch['inputs'])
  model = this.spec.model.clone(batch_norm_axis=None)
  variables = {
    'params': this.first.params, 'batch_stats': this.first.batch_stats
  }  # fmt: skip
  _, updates = model.apply(
    variables, inputs, train=True, mutable=['batch_stats']
  )
  statistics = linearized.batch_statistics(
    model, variables, inputs, updates['batch_stats']
  )

  @jax.jit
  def loss(one, label):
    there = {**variables, 'batch_stats': statistics}
    found = at_layers(model, there, one, RESNET['large_margin.layers'])
    return large_margin_loss(*found, label, gamma=2.0)

  losses = [  # one at a time: none sees another
    loss(inputs[i : i + 1], batch['label'][i : i + 1]) for i in range(8)
  ]
  expected = np.mean(losses)
  np.testing.assert_allclose(metrics['large_margin'], [expected], 1e-3)


@pytest.mark.slow
def test_four_devices_agree_with_one():
  fields = {**RESNET, 'large_margin.top_k': 1}
  dataset = helpers.noise()
  one, four = (
    helpers.Setup(dataset=dataset, devices=devices, **fields)
    for devices in (1, 4)
  )
  (first, before), (second, after) = one.run(2), four.run(2)
  np.testing.assert_allclose(
    before['large_margin'], after['large_margin'], 2e-3
  )
  helpers.assert_trees_close(first.params, second.params, 2e-3)


@pytest.mark.slow
def test_it_trains_alone_with_selection_and_counts_its_cost():
  with_mms = {**FIELDS, 'selection.rule': 'mms'}
  with_mms |= {
    'large_margin.cross_entropy': 0.0,
    'large_margin.difference': 'logits',
    'large_margin.weight': 0.1,
  }
  this = helpers.Setup(**with_mms)
  _, metrics = this.run(40)
  assert (
    metrics['large_margin'][-5:].mean() < metrics['large_margin'][:5].mean()
  )
  assert metrics['loss'][-5:].mean() < metrics['loss'][:5].mean()
  plain = helpers.Setup(
    **{k: v for k, v in with_mms.items() if 'large_margin' not in k}
  )
  assert 'large_margin' not in plain.run(1)[1]
  assert this.program.cost(0, 1).flops > 1.3 * plain.program.cost(0, 1).flops


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('layers', ('conv1', 'conv7'), r"layers: no .* 'conv7'; .*'hidden'"),
    ('top_k', 10, r'top_k=10 is not allowed: it must be at most 9'),
  ],
)
def test_what_only_model_and_data_can_tell(tmp_path, field, value, words):
  config = helpers.small_config(**{**FIELDS, f'large_margin.{field}': value})
  with pytest.raises(ConfigError, match=words):
    loop.train(config, str(tmp_path / 'x'), log=lambda line: None)
  assert not (tmp_path / 'x').exists()


def test_the_released_configuration_is_what_is_built():
  config = mnist_large_margin.get_config('small=0.01,noisy=0.4')
  assert config.data.fraction == 0.01
  assert config.data.label_noise == 0.4
  spec = setup_lib.make_spec(config, helpers.digits(), 1)
  assert spec.risk_weight == 0
  (options,) = (
    term.loss.keywords for term in spec.terms if term.metric == 'large_margin'
  )
  assert options['layers'] == ('input', 'norm1', 'norm2')
  assert (options['gamma'], options['alpha']) == (1e4, 4)
  assert (options['norm'], options['top_k']) == ('l_inf', 1)
  rates = [float(spec.learning_rate(s)) for s in (0, 1999, 2000, 46_000)]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.096, 0.1 * 0.96**23], 1e-6)
  attacked = mnist_large_margin.get_config('attack=pgd,epsilon=0.2')
  assert setup_lib.make_attack(attacked) is not None
  assert attacked.attack.epsilons == (0.2,)
  with pytest.raises(ConfigError, match=r'epsilon=0\.3 needs attack=fgsm'):
    mnist_large_margin.get_config('epsilon=0.3')
  with pytest.raises(ConfigError, match=r'source=/tmp/x needs attack=fgsm'):
    mnist_large_margin.get_config('source=/tmp/x')
  attacked = mnist_large_margin.get_config('attack=ifgsm,source=/tmp/x')
  assert attacked.attack.source == '/tmp/x'
  assert config.data.normalization == 'unit'
  assert config.model.kernel_init == 'glorot'
  control = mnist_large_margin.get_config('loss=cross_entropy')
  assert control.large_margin.weight == 0


def test_a_fraction_is_drawn_by_the_seed():
  whole = data.load('digits', validation_examples=180)
  load = functools.partial(
    data.load, 'digits', validation_examples=180, fraction=0.1
  )
  part, again, other = load(seed=3), load(seed=3), load(seed=4)
  rows = part.rows['train']
  assert len(rows) == len(part.splits['train']['label']) == 126
  assert len({*rows}) == 126
  assert rows.max() < 1257
  for name, value in part.splits['train'].items():
    np.testing.assert_array_equal(value, whole.splits['train'][name][rows])
  np.testing.assert_array_equal(rows, again.rows['train'])
  assert not np.array_equal(rows, other.rows['train'])
  for split in ('validation', 'test'):
    np.testing.assert_array_equal(
      part.splits[split]['label'], whole.splits[split]['label']
    )
  np.testing.assert_array_equal(part.rows['validation'], np.arange(1257, 1437))


def test_wrong_labels_are_of_the_training_split_only():
  clean = data.load('digits', validation_examples=180)
  load = functools.partial(
    data.load, 'digits', validation_examples=180, label_noise=0.4
  )
  noisy, again, other = load(seed=3), load(seed=3), load(seed=4)
  label = noisy.splits['train']['label']
  wrong = label != clean.splits['train']['label']
  assert wrong.sum() == round(0.4 * 1257)
  assert label.dtype == np.int32
  # Every wrong class is as likely as another.
  shift = (label - clean.splits['train']['label'])[wrong] % 10
  assert (np.bincount(shift, minlength=10)[1:] > 30).all()
  np.testing.assert_array_equal(label, again.splits['train']['label'])
  assert not np.array_equal(label, other.splits['train']['label'])
  for split in ('validation', 'test'):
    np.testing.assert_array_equal(
      noisy.splits[split]['label'], clean.splits[split]['label']
    )


def test_a_fraction_of_nothing_is_refused():
  with pytest.raises(
    ValueError, match=r'fraction=0\.0001 must leave something'
  ):
    data.load('digits', fraction=1e-4)


@pytest.mark.slow
def test_mnist_trains_with_the_large_margin_loss(data_dir, tmp_path):
  config = mnist_large_margin.get_config('small=0.01,steps=60')
  config.data.data_dir = str(data_dir / 'tfds')
  config.batch_size = 32
  config.optimizer.learning_rates = (0.003,)
  config.log_every = 10
  result = loop.train(config, str(tmp_path), log=lambda line: None)
  assert result['test']['accuracy'] > 0.5
