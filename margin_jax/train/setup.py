"""Config -> devices, dataset, step spec and first state, in that order."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array

from margin_jax import config as config_lib
from margin_jax import (
  cpu,
  data,
  linearized,
  losses,
  models,
  optimizers,
  registry,
  sampling,
  selection,
  user_code,
)
from margin_jax.config import UNIFORM, ConfigError, require
from margin_jax.models import pretrained
from margin_jax.train import (
  accumulation,
  attacks,
  ema,
  evaluation,
  schema,
  vocabulary,
)
from margin_jax.train import devices as devices_lib
from margin_jax.train import step as step_lib
from margin_jax.train.spec import (
  LossTerm,
  MemorySpec,
  SampleFunction,
  Selection,
  StepSpec,
  Trimming,
)

MAX_STEPS_PER_CALL = 100
# In how many equal steps the backward pass of trimming shrinks.
BACKWARD_SIZES = 4


def load(
  config: ml_collections.ConfigDict,
  rule: selection.RuleFunction | None,
  training: bool = True,
  workdir: str | None = None,
) -> tuple[devices_lib.Devices, data.Dataset]:
  """Returns the devices and the dataset that a config names, checked.

  The config is checked against itself, the data and, to train, the devices.

  Args:
    config: the run's config.
    rule: a rule of the caller's own, or None.
    training: whether steps will be run, and not only examples measured.
    workdir: the run's workdir, which may hold its vocabulary.

  Raises:
    ConfigError: a field is bad, or does not fit the data or the devices.
    DatasetError: the dataset is missing or broken.
  """
  schema.validate(config)
  _check_custom_rule(config, rule)
  if training and jax.config.jax_disable_jit:
    raise ConfigError(
      'JAX_DISABLE_JIT is set, but steps are compiled before they run: unset '
      'it. To look into a step, use jax.debug.print in a rule or a loss, or '
      'call the functions in your own loop'
    )
  try:
    devices = devices_lib.Devices(config.devices)
    if training:
      schema.validate_devices(config, devices.total)
    dataset = _dataset(config, workdir)
  except pretrained.PretrainedError as error:
    raise ConfigError(f'model.pretrained: {error}') from error
  except ValueError as error:  # what only the machine or the data can tell
    raise ConfigError(str(error)) from error
  schema.validate_data(config, dataset.counts['train'], dataset.input_shape)
  return devices, dataset


def _check_custom_rule(
  config: ml_collections.ConfigDict, rule: selection.RuleFunction | None
) -> None:
  if rule is None:
    return
  registry.check_rule('train(rule=...)', rule)
  if config.selection.rule == UNIFORM:
    raise ConfigError(
      "selection.rule='uniform' is not allowed with a rule of your own, which "
      "needs a pool: set it to another rule, such as 'random'"
    )
  if config.selection.ramp or config.selection.rule == 'selective_backprop':
    raise ConfigError(
      f'selection.rule={config.selection.rule!r} with ramp='
      f'{config.selection.ramp} is not allowed with a rule of your own, whose '
      "scores are ranked as they are: use 'random' and no ramp"
    )


def _dataset(
  config: ml_collections.ConfigDict, workdir: str | None
) -> data.Dataset:
  pools = config_lib.samples_pools(config_lib.flatten(config))
  fields = config.data.to_dict()
  fields['vocabulary'] = vocabulary.find(config, workdir)
  sample_size = config.pool_size if pools else config.batch_size
  return data.load(
    fields.pop('name'),
    seed=config.seed,
    sample_size=sample_size,
    ordered=config.selection.memory,
    **fields,
  )


def make_spec(
  config: ml_collections.ConfigDict,
  dataset: data.Dataset,
  device_count: int,
  rule: selection.RuleFunction | None = None,
) -> StepSpec:
  """Returns the static description of the train step that `config` asks for.

  Args:
    config: validated, and effective.
    dataset: the dataset.
    device_count: over all processes.
    rule: a rule of the caller's own, in place of `config.selection.rule`.

  Raises:
    ConfigError: the model or its layers do not fit the data.
  """
  model, proxy = _models(config, dataset)
  learning_rate = optimizers.learning_rate(
    config.optimizer.learning_rates,
    config.optimizer.boundaries,
    warmup=config.optimizer.warmup,
    decay=config.optimizer.decay,
    end=config.steps,
  )
  _check_optimizer(config, learning_rate, (model, proxy), dataset)
  make_optimizer = functools.partial(
    optimizers.make,
    config.optimizer.name,
    momentum=config.optimizer.momentum,
    nesterov=config.optimizer.nesterov,
    weight_decay=config.optimizer.weight_decay,
    weight_decay_mask=config.optimizer.weight_decay_mask,
    epsilon=config.optimizer.epsilon,
    clip_norm=config.optimizer.clip_norm,
  )
  proxy_optimizer = None
  if proxy is not None:
    every = config.selection.proxy_every
    # It counts its own updates.
    proxy_optimizer = make_optimizer(lambda n: learning_rate(every * n))
  alpha = _alpha(config, dataset.counts['train'])
  has_large_margin = bool(config.large_margin.weight)
  spec = StepSpec(
    model=model,
    optimizer=make_optimizer(learning_rate),
    dataset=dataset,
    batch_size=config.batch_size,
    accumulate=config.accumulate,
    selection=_selection(
      config, rule, proxy or model, dataset.num_classes, device_count
    ),
    memory=_memory(config, dataset, rule),
    trimming=_trimming(
      config, dataset.counts['train'], device_count * config.accumulate
    ),
    proxy=proxy,
    proxy_every=config.selection.proxy_every,
    proxy_optimizer=proxy_optimizer,
    ema_decay=config.ema.decay,
    risk=losses.find(config.loss.risk),
    risk_weight=config.large_margin.cross_entropy if has_large_margin else None,
    terms=_loss_terms(config, alpha, model, dataset),
    learning_rate=learning_rate,
    alpha=alpha,
    axis_name=devices_lib.AXIS,
    average_batch_stats=not _synchronized(config),
    batch_norm_examples=config.model.batch_norm_examples,
    on_nonfinite=config.on_nonfinite,
    unrolled=cpu.is_default(),
  )
  _try_registered(config, spec, rule, device_count)
  return spec


def _synchronized(config: ml_collections.ConfigDict) -> bool:
  """Returns whether BatchNorm's statistics are of all devices' examples."""
  own = config.model.batch_norm_examples is not None
  return config.model.batch_norm == 'global' and not own


def _models(
  config: ml_collections.ConfigDict, dataset: data.Dataset
) -> tuple[nn.Module, nn.Module | None]:
  """Returns the model, and the proxy, with the model's variant and dtype.

  Other options of the proxy are the defaults.
  """

  def build(field: str, name: str, **options: Any) -> nn.Module:
    module = models.build(
      name,
      dataset.num_classes,
      vocabulary=dataset.vocabulary,
      variant=config.model.variant,
      dtype=config.model.dtype,
      batch_norm_axis=devices_lib.AXIS if _synchronized(config) else None,
      **options,
    )
    if name in models.REGISTERED:
      with user_code.named(f'{field}={name!r}'):
        unmet = models.unmet_requirement(
          models.REGISTERED[name],
          module,
          input_shapes(dataset),
          dataset.num_classes,
        )
      require(not unmet, field, name, f'a model that {unmet}')
    return module

  model = build(
    'model.name',
    config.model.name,
    head=config.model.head,
    dropout=config.model.dropout,
    stem=config.model.stem,
    width=config.model.width,
  )
  if config.selection.proxy is None:
    return model, None
  return model, build('selection.proxy', config.selection.proxy)


def _check_optimizer(
  config: ml_collections.ConfigDict,
  learning_rate: optax.Schedule,
  modules: tuple[nn.Module | None, ...],
  dataset: data.Dataset,
) -> None:
  """Raises unless a registered optimizer updates the model and the proxy."""
  name = config.optimizer.name
  if name not in optimizers.REGISTERED:
    return
  for module in filter(None, modules):
    variables, _ = shapes(module, dataset)
    with user_code.named(f'optimizer.name={name!r}'):
      optimizer = optimizers.REGISTERED[name](learning_rate)
      unmet = optimizers.unmet_requirement(optimizer, variables['params'])
    require(not unmet, 'optimizer.name', name, f'an optimizer that {unmet}')


def _try_registered(
  config: ml_collections.ConfigDict,
  spec: StepSpec,
  rule: selection.RuleFunction | None,
  device_count: int,
) -> None:
  """Calls rules and losses of the user's own once, without numbers.

  Raises:
    UserCodeError: one raised.
    ConfigError: what one returns has a wrong shape or type.
  """
  scoring = spec.memory or spec.selection
  name = config.selection.rule
  if scoring and (rule is not None or name in selection.REGISTERED):
    what = 'train(rule=...)' if rule is not None else f'selection.rule={name!r}'
    scorer, size = spec.model, config.batch_size
    if spec.memory is None:
      scorer, size = spec.selection.scorer, config.pool_size
    whole = scoring.rule.whole_pool and config.selection.scope != 'device'
    rows = size if whole else size // device_count
    found = _outline(
      spec, scorer, rows, what, lambda seen: scoring.rule.score(_scored(seen))
    )
    _check_returned(what, found, ((rows,),))
  rows = config.batch_size // device_count
  if config.loss.risk in losses.REGISTERED:
    what = f'loss.risk={config.loss.risk!r}'
    found = _outline(spec, spec.model, rows, what, spec.risk)
    _check_returned(what, found, ((rows,),))
  for term in spec.terms:
    name = term.metric.removeprefix('loss_')
    if name in config.loss.names and name in losses.REGISTERED:
      what = f'the loss {name!r}'
      found = _outline(spec, spec.model, rows, what, term.loss)
      _check_returned(what, found, ((), (rows,)))
      if spec.accumulate > 1 and not found.shape:
        _outline(spec, spec.model, rows, what, _of_all_parts(term.loss))


def _outline(
  spec: StepSpec,
  model: nn.Module,
  rows: int,
  what: str,
  function: Callable[[losses.Outputs], Any],
) -> Any:
  """Returns shapes and types of what a function makes of so many examples."""
  variables, one = shapes(model, spec.dataset)

  def of_device(variables: Any, inputs: Any, seed: Array) -> Any:
    logits, features = model.apply(variables, inputs, train=False)
    labels = jnp.zeros(rows, jnp.int32) + seed  # of the device, not constants
    outputs = losses.Outputs(
      logits=logits.astype(jnp.float32),
      features=features,
      kernel=step_lib.head_kernel(variables['params']),
      labels=labels,
      index=labels,
      weights=labels.astype(jnp.float32) if spec.weighted else None,
      linearize=functools.partial(
        linearized.at_layers, model, variables, inputs
      ),
      axis_name=spec.axis_name,
    )
    with user_code.named(what):
      return jax.tree.map(jnp.asarray, function(outputs))

  inputs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, rows, *x.shape[1:]), x.dtype), one
  )
  seeds = jax.ShapeDtypeStruct((1,), jnp.int32)
  found = jax.eval_shape(
    jax.vmap(of_device, (None, 0, 0), axis_name=spec.axis_name),
    variables, inputs, seeds,
  )  # fmt: skip
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), found
  )


def _of_all_parts(loss: losses.Loss) -> losses.Loss:
  """Returns a loss of the batch that sees the outputs of all its parts."""
  return lambda outputs: loss(
    outputs._replace(linearize=accumulation.no_linearize)
  )


def _scored(outputs: losses.Outputs) -> selection.Scored:
  """Returns what a rule reads of the same."""
  keys = jax.vmap(jax.random.key)(outputs.index)
  seen = outputs._asdict()
  names = 'logits', 'features', 'kernel', 'labels', 'index'
  return selection.Scored(**{name: seen[name] for name in names}, keys=keys)


def _check_returned(
  what: str, found: Any, allowed: tuple[tuple[int, ...], ...]
) -> None:
  """Raises a ConfigError unless `found` is a floating array of such a shape."""
  if not isinstance(found, jax.ShapeDtypeStruct):
    got = jax.tree.map(lambda x: x.shape, found)
    raise ConfigError(f'{what} must return one array, got {got}')
  if found.shape not in allowed:
    raise ConfigError(
      f'{what} must return an array of shape {" or ".join(map(str, allowed))}, '
      f'got {found.shape}'
    )
  if not jnp.issubdtype(found.dtype, jnp.floating):
    raise ConfigError(
      f'{what} must return floating numbers, got {found.dtype}: convert them '
      'with .astype(jnp.float32), if that is what you mean'
    )


def _alpha(
  config: ml_collections.ConfigDict, examples: int
) -> optax.Schedule | None:
  """Returns step -> the weight of MMR, or None without it."""
  alpha, alpha_end = config.mmr.alpha, config.mmr.alpha_end
  if not alpha and not alpha_end:
    return None
  if config.mmr.schedule == 'released':
    steps_per_epoch = examples // config.batch_size
    return optimizers.released(alpha, alpha_end, config.steps, steps_per_epoch)
  return optimizers.linear(alpha, alpha_end, config.steps)


def _selection(
  config: ml_collections.ConfigDict,
  rule: selection.RuleFunction | None,
  scorer: nn.Module,
  num_classes: int,
  device_count: int,
) -> Selection | None:
  if config.selection.memory or (
    rule is None and config.selection.rule == UNIFORM
  ):
    return None
  if config.selection.score_dtype is not None:
    scorer = scorer.clone(dtype=jnp.dtype(config.selection.score_dtype))
  return Selection(
    rule=_rule(config, rule),
    transform=_score_transform(config, num_classes, device_count),
    pool_size=config.pool_size,
    scope=config.selection.scope,
    reuse=config.selection.reuse,
    every=config.selection.every,
    start=config.selection.start,
    stop=config.selection.stop,
    scorer=scorer,
    resolution=config.selection.score_resolution,
    chunk_size=cpu.chunk_size(config.pool_size // device_count),
    pool_statistics=config.selection.batch_stats == 'pool',
  )


def _rule(
  config: ml_collections.ConfigDict, rule: selection.RuleFunction | None
) -> selection.Rule:
  if rule is None:
    return selection.find(config.selection.rule)
  return selection.Rule(rule)


def _score_transform(
  config: ml_collections.ConfigDict, num_classes: int, device_count: int
) -> selection.ScoreTransform | None:
  """Returns what the rule does with the scores of a whole pool, or None."""
  if config.selection.rule == 'selective_backprop':
    return functools.partial(
      selection.loss_percentile_sampler, beta=config.selection.beta
    )
  if config.selection.rule == 'loss' and config.selection.ramp:
    shards = device_count if config.selection.scope == 'device' else 1
    return functools.partial(
      selection.balanced_ramp,
      k=config.batch_size * config.selection.reuse // shards,
      growth=config.selection.ramp,
      num_classes=num_classes,
      batches=config.selection.reuse,
    )
  return None


def _memory(
  config: ml_collections.ConfigDict,
  dataset: data.Dataset,
  rule: selection.RuleFunction | None,
) -> MemorySpec | None:
  if not config.selection.memory:
    return None
  tail_start = config.steps - round(config.selection.tail * config.steps)
  return MemorySpec(
    rule=_rule(config, rule),
    decay=config.selection.decay,
    sample=_sampler(config, dataset, tail_start),
    has_weights=config.selection.unbiased,
    visits=config.selection.explore > 0,
    errors=config.selection.share == 'auto',
    warmup=config.selection.warmup,
    tail_start=tail_start,
  )


def _sampler(
  config: ml_collections.ConfigDict, dataset: data.Dataset, tail_start: int
) -> SampleFunction:
  """Returns what makes the order of an epoch from the remembered scores."""

  def pool(remembered: sampling.Remembered, key: Array, step: Array):
    del step
    return sampling.pools(
      remembered.scores,
      remembered.visited,
      key,
      pool_size=config.pool_size,
      batch_size=config.batch_size,
      explore=config.selection.explore,
    )

  def prune(remembered: sampling.Remembered, key: Array, step: Array):
    del step
    share = config.selection.share
    if config.selection.threshold == 'mean':
      share = None
    elif share == 'auto':
      share = sampling.learned_share(remembered.wrong, config.selection.drop)
    order = sampling.prune(
      remembered.scores,
      key,
      share=share,
      drop=config.selection.drop,
      least=config.batch_size,
      unbiased=config.selection.unbiased,
    )
    if config.selection.unbiased and dataset.bucket_count > 1:
      # Each has its own epochs, and the buckets take turns by their sizes: what
      # has to be unbiased is the loss of a step.
      fraction = order.count / len(remembered.scores)
      order = order._replace(weights=fraction * order.weights)
    return order

  def weighted(remembered: sampling.Remembered, key: Array, step: Array):
    return sampling.weighted(
      remembered.scores,
      key,
      batch_size=config.batch_size,
      # Falls geometrically to 1 at the tail.
      pressure=config.selection.pressure ** (1 - step / max(tail_start, 1)),
      unbiased=config.selection.unbiased,
    )

  samplers = {'pool': pool, 'prune': prune, 'weighted': weighted}
  return samplers[config.selection.sampler]


def _trimming(
  config: ml_collections.ConfigDict, examples: int, shards: int
) -> Trimming | None:
  """Returns the schedule r = max(round(p * M), 1), p linear in the epoch."""
  size = config.batch_size
  if config.trimming.first == config.trimming.last == 1:
    return None
  steps_per_epoch = examples // size
  epochs = math.ceil(config.steps / steps_per_epoch)
  fractions = np.linspace(config.trimming.first, config.trimming.last, epochs)
  keep = tuple(max(round(float(p) * size), 1) for p in fractions)
  backward_sizes = None
  if config.trimming.backward == 'kept':
    # A few sizes, each with its own program; devices and parts divide them.
    multiples = [
      math.ceil(size * i / BACKWARD_SIZES / shards) * shards
      for i in range(1, BACKWARD_SIZES + 1)
    ]
    backward_sizes = tuple(min(x for x in multiples if x >= k) for k in keep)
  return Trimming(keep, steps_per_epoch, backward_sizes)


def _loss_terms(
  config: ml_collections.ConfigDict,
  alpha: optax.Schedule | None,
  model: nn.Module,
  dataset: data.Dataset,
) -> tuple[LossTerm, ...]:
  """Returns the losses beside the risk; MMR is measured in any case."""
  terms = []
  if config.large_margin.weight:
    options = _large_margin_options(config, model, dataset)
    loss = functools.partial(losses.find('large_margin'), **options)
    weight = optax.constant_schedule(config.large_margin.weight)
    terms.append(LossTerm('large_margin', loss, weight))
  mmr = functools.partial(
    losses.find('mmr'),
    reduction=config.mmr.reduction,
    stop_feature_gradient=config.mmr.stop_feature_gradient,
  )
  terms.append(LossTerm('penalty', mmr, alpha))
  for name, weight in zip(config.loss.names, config.loss.weights, strict=True):
    schedule = optax.constant_schedule(weight)
    # So that no column of the tables has its name.
    terms.append(LossTerm(f'loss_{name}', losses.find(name), schedule))
  return tuple(terms)


def _large_margin_options(
  config: ml_collections.ConfigDict, model: nn.Module, dataset: data.Dataset
) -> dict[str, Any]:
  """Returns the options of the large-margin loss.

  Raises:
    ConfigError: they do not fit the model or the data.
  """
  options = config.large_margin.to_dict()
  del options['weight'], options['cross_entropy']
  options['layers'] = tuple(options['layers'])
  options['layer_weights'] = tuple(options['layer_weights'])
  shapes = layer_shapes(model, dataset)
  check_layers('large_margin.layers', options['layers'], shapes)
  if options['top_k'] >= dataset.num_classes:
    raise ConfigError(
      f'large_margin.top_k={options["top_k"]} is not allowed: it must be at '
      f'most {dataset.num_classes - 1}, the number of wrong classes'
    )
  sentences = dataset.vocabulary is not None
  for name in options['layers']:
    if options['normalize_by_size'] and sentences and len(shapes[name]) > 2:
      raise ConfigError(
        'large_margin.normalize_by_size=True is not allowed with '
        f'large_margin.layers={options["layers"]}: {name!r} has a row for '
        'every token, padding included, so its size depends on how far a '
        'sentence is padded'
      )
  return options


def layer_shapes(
  model: nn.Module, dataset: data.Dataset
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a model's layers by name, for a batch of one."""
  variables, inputs = shapes(model, dataset)
  return linearized.layer_shapes(model, variables, inputs)


def shapes(model: nn.Module, dataset: data.Dataset) -> tuple[Any, Any]:
  """Returns the shapes of the model's variables, and of a batch of one."""
  inputs = input_shapes(dataset)
  key = jax.eval_shape(jax.random.key, 0)
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, key, inputs), inputs


def input_shapes(dataset: data.Dataset) -> Any:
  """Returns the shapes of a batch of one, as the model reads it."""
  stored = jax.ShapeDtypeStruct((1, *dataset.input_shape), dataset.input_dtype)
  return jax.eval_shape(dataset.prepare, stored)


def check_layers(
  field: str, names: tuple[str, ...], known: dict[str, tuple[int, ...]]
) -> None:
  """Raises unless all names are among the layers `known`.

  Raises:
    ConfigError: naming the field, the name, and the names that there are.
  """
  try:
    linearized.check_layers(names, known)
  except ValueError as error:
    raise ConfigError(f'{field}: {error}') from error


def make_attack(config: ml_collections.ConfigDict) -> Callable | None:
  """Returns the attack that the test split is evaluated under, or None."""
  if config.attack.name is None:
    return None
  if config.attack.name == 'fgsm':
    return attacks.fgsm
  options = {'steps': config.attack.steps}
  if config.attack.step_size is not None:
    options['step_size'] = evaluation.PIXEL * config.attack.step_size
  attack = {'ifgsm': attacks.ifgsm, 'pgd': attacks.pgd}[config.attack.name]
  return functools.partial(attack, **options)


def steps_per_call(
  config: ml_collections.ConfigDict,
  platform: str,
  dataset: data.Dataset,
  start: int = 0,
) -> int:
  """Returns how many steps one call runs.

  One on CPU: XLA:CPU runs the gradients of convolutions inside a loop an order
  of magnitude slower (jax-ml/jax#12868), and a call costs well under a
  millisecond. On accelerators the largest divisor of the run's intervals up to
  100, so that no call has another length and nothing is compiled twice. It also
  divides `start`, where a continued run begins, or the run would step over its
  end. At most so many as the dataset has data for in one call.

  Raises:
    ConfigError: an explicit `steps_per_call` does not divide `start`.
  """
  if config.steps_per_call is not None:
    if config.steps_per_call > dataset.most_steps_per_call:
      raise ConfigError(
        f'steps_per_call={config.steps_per_call} is not allowed: it must be '
        f'{dataset.most_steps_per_call} or None with data.name='
        f'{config.data.name!r}, which is fed step by step'
      )
    if start % config.steps_per_call:
      raise ConfigError(
        f'steps_per_call={config.steps_per_call} is not allowed: it must be a '
        f'divisor of {start}, the step at which the run stopped'
      )
    return config.steps_per_call
  if platform == 'cpu':
    return 1
  common = math.gcd(
    start,
    config.steps,
    config.log_every,
    config.eval_every,
    config.checkpoint_every,
  )
  top = min(common, MAX_STEPS_PER_CALL, dataset.most_steps_per_call)
  return max(k for k in range(1, top + 1) if common % k == 0)


def init_state(
  config: ml_collections.ConfigDict,
  dataset: data.Dataset,
  spec: StepSpec,
  *,
  restoring: bool = False,
) -> step_lib.TrainState:
  """Returns the state before the first step.

  Args:
    config: validated, and effective.
    dataset: the dataset.
    spec: the spec that `make_spec` returns.
    restoring: a checkpoint will take the place of the values, so that no
      pretrained weights are read; their file may be gone.

  Raises:
    ConfigError: the pretrained weights cannot be read, or do not fit.
  """
  weights = None
  if config.model.pretrained is not None and not restoring:
    expected, _ = shapes(spec.model, dataset)
    try:
      weights = pretrained.read(
        config.model.pretrained, config.model.name, expected
      )
    except pretrained.PretrainedError as error:
      raise ConfigError(f'model.pretrained: {error}') from error
  state = step_lib.init_state(
    spec,
    config.seed,
    np.zeros((1, *dataset.input_shape), dataset.input_dtype),
    dataset.counts['train'] if config.selection.log_counts else None,
  )
  glorot = config.model.kernel_init == 'glorot' and not restoring
  if weights is None and not glorot:
    return state
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  if glorot:
    key = jax.random.fold_in(jax.random.key(config.seed), step_lib.INIT)
    variables['params'] = models.glorot(state.params, key)
  if weights is not None:
    variables |= pretrained.put(variables, weights)
  return state.replace(
    opt_state=spec.optimizer.init(variables['params']),
    ema=ema.create(
      spec.ema_decay, variables['params'], variables['batch_stats']
    ),
    **variables,
  )
