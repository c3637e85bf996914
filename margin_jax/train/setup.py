"""Config -> the static description of a train step and its first state."""

import dataclasses
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from margin_jax import config as config_lib
from margin_jax import cpu, data, files, linearized, models, selection
from margin_jax.config import UNIFORM, ConfigError, require
from margin_jax.data import feeding, tokenization
from margin_jax.models import bert_weights, pretrained
from margin_jax.train import attacks, optimizers, schema
from margin_jax.train import devices as devices_lib
from margin_jax.train import step as step_lib
from margin_jax.train.checkpoints import FOLDER
from margin_jax.train.spec import LargeMargin, Selection, StepSpec, Trimming

MAX_STEPS_PER_CALL = 100
# In how many equal steps the backward pass of trimming shrinks.
TRIMMING_SIZES = 4


def steps_per_call(
  config: ml_collections.ConfigDict,
  platform: str,
  start: int = 0,
  chained: bool = True,
) -> int:
  """How many steps one call runs.

  One on CPU: XLA:CPU runs the gradients of convolutions inside a loop an order
  of magnitude slower (jax-ml/jax#12868), and a call costs well under a
  millisecond. On accelerators the largest divisor of the run's intervals up to
  100, so that no call has another length and nothing is compiled twice. It also
  divides `start`, where a continued run begins, or the run would step over its
  end. And one where steps are not `chained`.

  Raises:
    ConfigError: an explicit `steps_per_call` does not divide `start`.
  """
  if config.steps_per_call is not None:
    if not chained and config.steps_per_call != 1:
      raise ConfigError(
        f'steps_per_call={config.steps_per_call} is not allowed: it must be 1 '
        f'or None with data.name={config.data.name!r}, fed step by step'
      )
    if start % config.steps_per_call:
      raise ConfigError(
        f'steps_per_call={config.steps_per_call} is not allowed: it must be a '
        f'divisor of {start}, the step at which the workdir stopped'
      )
    return config.steps_per_call
  if platform == 'cpu' or not chained:
    return 1
  common = math.gcd(
    start,
    config.steps,
    config.log_every,
    config.eval_every,
    config.checkpoint_every,
  )
  top = min(common, MAX_STEPS_PER_CALL)
  return max(k for k in range(1, top + 1) if common % k == 0)


def chained(dataset: data.Source | data.Streamed) -> bool:
  """Whether one program can run several steps on the data of one call.

  Not on data that is fed step by step, nor on parts of several widths.
  """
  return dataset.resident and len(dataset.widths) <= 1


def _models(
  config: ml_collections.ConfigDict, dataset: data.Source | data.Streamed
) -> tuple[nn.Module, nn.Module | None]:
  """The model, and the proxy, whose own options are the defaults."""

  def build(name: str, **options: Any) -> nn.Module:
    synchronized = config.model.batch_norm == 'global'
    return models.build(
      name,
      dataset.num_classes,
      vocabulary=dataset.vocabulary,
      variant=config.model.variant,
      dtype=config.model.dtype,
      batch_norm_axis=devices_lib.AXIS if synchronized else None,
      **options,
    )

  model = build(
    config.model.name,
    dropout=config.model.dropout,
    stem=config.model.stem,
    width=config.model.width,
  )
  _check_registered('model.name', config.model.name, model, dataset)
  if config.selection.proxy is None:
    return model, None
  proxy = build(config.selection.proxy)
  _check_registered('selection.proxy', config.selection.proxy, proxy, dataset)
  return model, proxy


def _check_registered(
  field: str, name: str, model: nn.Module, dataset: data.Source | data.Streamed
) -> None:
  """Raises a ConfigError unless a registered model is what a model must be."""
  if name in models.REGISTERED:
    unmet = models.unmet_requirement(
      models.REGISTERED[name],
      model,
      input_shapes(dataset),
      dataset.num_classes,
    )
    require(not unmet, field, name, f'a model that {unmet}')


def _arrange(
  config: ml_collections.ConfigDict, num_classes: int, lanes: int
) -> selection.Arrange | None:
  """What the rule does with the scores of the whole pool, if anything."""
  if config.selection.rule == 'selective_backprop':
    return functools.partial(
      selection.percentile_draw, beta=config.selection.beta
    )
  if config.selection.ramp:
    shares = lanes if config.selection.scope == 'device' else 1
    return functools.partial(
      selection.balanced_ramp,
      k=config.batch_size * config.selection.reuse // shares,
      growth=config.selection.ramp,
      num_classes=num_classes,
      batches=config.selection.reuse,
    )
  return None


def _selection(
  config: ml_collections.ConfigDict,
  rule: selection.Rule | None,
  model: nn.Module,
  proxy: nn.Module | None,
  num_classes: int,
  lanes: int,
) -> Selection | None:
  if rule is None and config.selection.rule == UNIFORM:
    return None
  scorer = model if proxy is None else proxy
  if config.selection.score_dtype is not None:
    scorer = scorer.clone(dtype=jnp.dtype(config.selection.score_dtype))
  return Selection(
    rule=rule or selection.find(config.selection.rule),
    arrange=None if rule else _arrange(config, num_classes, lanes),
    pool_size=config.pool_size,
    scope=config.selection.scope,
    reuse=config.selection.reuse,
    every=config.selection.every,
    start=config.selection.start,
    stop=config.selection.stop,
    scorer=scorer,
    resolution=config.selection.score_resolution,
    rows=cpu.scored_rows(config.pool_size // lanes),
    pool_statistics=config.selection.batch_stats == 'pool',
  )


def _trimming(
  config: ml_collections.ConfigDict, examples: int, lanes: int
) -> Trimming | None:
  """p is linear in the epoch, r = max(round(p * M), 1) half to even."""
  size = config.batch_size
  if config.trimming.first == config.trimming.last == 1:
    return None
  steps_per_epoch = examples // size
  epochs = math.ceil(config.steps / steps_per_epoch)
  shares = np.linspace(config.trimming.first, config.trimming.last, epochs)
  sizes = {
    math.ceil(size * i / TRIMMING_SIZES / lanes) * lanes
    for i in range(1, TRIMMING_SIZES + 1)
  }
  return Trimming(
    keep=tuple(max(round(float(p) * size), 1) for p in shares),
    steps_per_epoch=steps_per_epoch,
    kept_only=config.trimming.backward == 'kept',
    sizes=tuple(sorted(sizes)),
  )


def _large_margin(
  config: ml_collections.ConfigDict, model: nn.Module, dataset: data.Source
) -> LargeMargin | None:
  """Raises a ConfigError where the model or the data do not fit."""
  if not config.large_margin.weight:
    return None
  known = layer_shapes(model, dataset)
  check_layers('large_margin.layers', config.large_margin.layers, known)
  _check_normalize_by_size(config, known, dataset)
  if config.large_margin.top_k >= dataset.num_classes:
    raise ConfigError(
      f'large_margin.top_k={config.large_margin.top_k} is not allowed: it '
      f'must be at most {dataset.num_classes - 1}, the number of wrong classes'
    )
  return LargeMargin(
    weight=config.large_margin.weight,
    cross_entropy=config.large_margin.cross_entropy,
    layers=tuple(config.large_margin.layers),
    options={
      'gamma': config.large_margin.gamma,
      'alpha': config.large_margin.alpha,
      'norm': config.large_margin.norm,
      'top_k': config.large_margin.top_k,
      'worst_case': config.large_margin.worst_case,
      'difference': config.large_margin.difference,
      'epsilon': config.large_margin.epsilon,
      'normalize_by_size': config.large_margin.normalize_by_size,
      'second_order': config.large_margin.second_order,
    },
  )


def _check_normalize_by_size(
  config: ml_collections.ConfigDict,
  known: dict[str, tuple[int, ...]],
  dataset: data.Source,
) -> None:
  """Raises where a layer's size is that of the padding."""
  if not (config.large_margin.normalize_by_size and dataset.widths):
    return
  for name in config.large_margin.layers:
    if len(known[name]) > 2:
      raise ConfigError(
        'large_margin.normalize_by_size=True is not allowed with '
        f'large_margin.layers={config.large_margin.layers}: {name!r} has a '
        'row for every token, padding too, so that its size says how far a '
        'sentence was padded'
      )


def layer_shapes(
  model: nn.Module, dataset: data.Source
) -> dict[str, tuple[int, ...]]:
  """The layers of a model that reads this data, for a batch of one."""
  variables, inputs = shapes(model, dataset)
  return linearized.layer_shapes(model, variables, inputs)


def shapes(model: nn.Module, dataset: data.Source) -> tuple[Any, Any]:
  """Those of the model's variables and of a batch of one; nothing computed."""
  inputs = input_shapes(dataset)
  key = jax.eval_shape(jax.random.key, 0)
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, key, inputs), inputs


def input_shapes(dataset: data.Source | data.Streamed) -> Any:
  """Those of a batch of one, as the model reads it."""
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
  """The attack that the test split is evaluated under, or None."""
  if config.attack.name is None:
    return None
  if config.attack.name == 'fgsm':
    return attacks.fgsm
  return functools.partial(attacks.pgd, steps=config.attack.steps)


def make_spec(
  config: ml_collections.ConfigDict,
  dataset: data.Source,
  lanes: int,
  rule: selection.Rule | None = None,
) -> StepSpec:
  """The static description of the train step that `config` asks for.

  Args:
    config: validated.
    dataset: of the examples.
    lanes: number of devices.
    rule: a rule of the caller's own, in place of `config.selection.rule`.
  """
  classes = dataset.num_classes
  model, proxy = _models(config, dataset)
  learning_rate = optimizers.learning_rate(
    config.optimizer.learning_rates,
    config.optimizer.boundaries,
    warmup=config.optimizer.warmup,
    end=config.steps if config.optimizer.decay == 'linear' else None,
  )
  alpha, alpha_end = config.mmr.alpha, config.mmr.alpha_end
  spec = StepSpec(
    model=model,
    optimizer=optimizers.make(
      config.optimizer.name,
      learning_rate,
      momentum=config.optimizer.momentum,
      nesterov=config.optimizer.nesterov,
      weight_decay=config.optimizer.weight_decay,
      weight_decay_mask=config.optimizer.weight_decay_mask,
      epsilon=config.optimizer.epsilon,
      clip_norm=config.optimizer.clip_norm,
    ),
    draw=_draw(dataset),
    prepare=dataset.prepare,
    num_classes=classes,
    batch_size=config.batch_size,
    selection=_selection(config, rule, model, proxy, classes, lanes),
    trimming=_trimming(config, dataset.counts['train'], lanes),
    proxy=proxy,
    alpha=(
      optimizers.linear(alpha, alpha_end, config.steps)
      if alpha or alpha_end
      else None
    ),
    mmr={
      'reduction': config.mmr.reduction,
      'stop_feature_gradient': config.mmr.stop_feature_gradient,
    },
    large_margin=_large_margin(config, model, dataset),
    learning_rate=learning_rate,
    lanes=lanes,
    axis=devices_lib.AXIS,
    average_batch_stats=config.model.batch_norm == 'device',
    on_nonfinite=config.on_nonfinite,
    f1=dataset.f1,
    widths=dataset.widths,
  )
  return _plan(spec, dataset, config.steps)


def _plan(
  spec: StepSpec, dataset: data.Source | data.Streamed, steps: int
) -> StepSpec:
  """The spec with the parts' turns, where the data has several."""
  if len(dataset.widths) <= 1:
    return spec
  sizes = [spec.examples_drawn(spec.branch_of(step)) for step in range(steps)]
  counts = [len(rows) for _, rows in dataset.parts['train']]
  return dataclasses.replace(
    spec, plan=tuple(data.parts.plan(sizes, counts).tolist())
  )


def _draw(dataset: data.Source | data.Streamed) -> Callable:
  if dataset.widths:
    function = data.parts.draw
  else:
    function = data.draw if dataset.resident else feeding.draw
  return functools.partial(function, augment=dataset.augment)


def _stream(dataset: data.Source | data.Streamed) -> Any:
  """The place in the data before the first draw."""
  if dataset.widths:
    counts = [len(rows) for _, rows in dataset.parts['train']]
    return data.parts.Streams.create(counts)
  if dataset.resident:
    return data.Stream.create(dataset.counts['train'])
  return data.Epoch.create()


def _pretrained(
  config: ml_collections.ConfigDict, dataset: data.Source, model: nn.Module
) -> dict[tuple[str, ...], np.ndarray]:
  """What `config.model.pretrained` has for the model, by path."""
  path = config.model.pretrained
  if path is None:
    return {}
  expected, _ = shapes(model, dataset)
  try:
    return pretrained.read(path, config.model.name, expected)
  except pretrained.PretrainedError as error:
    raise ConfigError(f'model.pretrained: {error}') from error


def init_state(
  config: ml_collections.ConfigDict,
  dataset: data.Source,
  spec: StepSpec,
  *,
  restoring: bool = False,
) -> step_lib.TrainState:
  """The state before the first step.

  Args:
    config: validated.
    dataset: of the examples.
    spec: as `make_spec` returns it.
    restoring: a checkpoint will take the place of the values, so that no
      pretrained weights are read; their file may be gone.

  Raises:
    ConfigError: the pretrained weights cannot be read, or do not fit.
  """
  weights = {} if restoring else _pretrained(config, dataset, spec.model)
  examples = dataset.counts['train']
  state = step_lib.init_state(
    spec,
    _stream(dataset),
    config.seed,
    np.zeros((1, *dataset.input_shape), dataset.input_dtype),
    examples if config.selection.log_counts else None,
  )
  if not weights:
    return state
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  variables = pretrained.put(variables, weights)
  opt_state = spec.optimizer.init(variables['params'])
  return state.replace(opt_state=opt_state, **variables)


def load(
  config: ml_collections.ConfigDict,
  rule: selection.Rule | None,
  training: bool = True,
  workdir: str | None = None,
) -> tuple[devices_lib.Devices, data.Source | data.Streamed]:
  """Checks the config against itself, the data and, to train, the devices.

  Args:
    config: of the run.
    rule: a rule of the caller's own, or None.
    training: whether steps will be run, and not only examples measured.
    workdir: of the run, where it may keep its vocabulary.

  Raises:
    ConfigError: a field is bad, or does not fit the data or the devices.
    DatasetError: the dataset is missing or broken.
  """
  schema.validate(config)
  _check_rule(config, rule)
  try:
    devices = devices_lib.Devices(config.devices)
    if training:
      schema.validate_devices(config, devices.total)
    dataset = _source(config, workdir)
  except pretrained.PretrainedError as error:
    raise config_lib.ConfigError(f'model.pretrained: {error}') from error
  except ValueError as error:  # what only the machine or the data can tell
    raise config_lib.ConfigError(str(error)) from error
  schema.validate_data(config, dataset.counts['train'], dataset.input_shape)
  return devices, dataset


def _source(
  config: ml_collections.ConfigDict, workdir: str | None
) -> data.Source | data.Streamed:
  common = {
    'data_dir': config.data.data_dir,
    'validation_examples': config.data.validation_examples,
    'fraction': config.data.fraction,
    'label_noise': config.data.label_noise,
    'seed': config.seed,
  }
  if config.data.name in data.SENTENCES:
    scored = config.selection.rule != config_lib.UNIFORM
    return data.load_sentences(
      config.data.name,
      max_length=config.data.max_length,
      widths=config.data.widths,
      vocabulary=vocabulary(config, workdir),
      draw_size=config.pool_size if scored else config.batch_size,
      **common,
    )
  return data.load(
    config.data.name,
    augmentations=config.data.augmentations,
    crop_padding=config.data.crop_padding,
    cutout_size=config.data.cutout_size,
    normalization=config.data.normalization,
    image_size=config.data.image_size,
    workers=config.data.workers,
    undecodable=config.data.undecodable,
    **common,
  )


def _check_rule(
  config: ml_collections.ConfigDict, rule: selection.Rule | None
) -> None:
  if rule is not None and config.selection.rule == config_lib.UNIFORM:
    raise config_lib.ConfigError(
      "selection.rule='uniform' is not allowed with a rule of your own, which "
      "needs a pool: set it to another, 'random' say"
    )
  arranged = config.selection.rule == 'selective_backprop'
  if rule is not None and (config.selection.ramp or arranged):
    raise config_lib.ConfigError(
      f'selection.rule={config.selection.rule!r} with ramp='
      f'{config.selection.ramp} is not allowed with a rule of your own, whose '
      "scores are ranked as they are: use 'random' and no ramp"
    )


def vocabulary(
  config: ml_collections.ConfigDict, workdir: str | None
) -> str | None:
  """The vocab.txt that sentences are read with, None where none is needed.

  The one that `data.vocabulary` names, else that of `model.pretrained`; where
  they are gone, the copy that a run with checkpoints has in its workdir, so
  that it outlives its sources.

  Raises:
    ValueError: there are two, and they differ.
    PretrainedError: the weights' folder is missing.
    DatasetError: one cannot be read, or the weights are of cased words.
  """
  if config.data.name not in data.VOCABULARY_NEEDED:
    return None
  named, weights = config.data.vocabulary, config.model.pretrained
  kept = _kept(workdir)
  found = {}
  if named is not None and not (kept and _gone(named)):
    found['data.vocabulary'] = os.path.expanduser(named)
  if weights is not None and not (kept and _gone(weights)):
    folder = bert_weights.resolve(weights)
    tokenization.check_words(folder)
    path = folder / bert_weights.VOCABULARY
    if path.is_file() or not (named or kept):
      found['model.pretrained'] = str(path)
  if kept:
    found['the workdir'] = kept
  digests = {
    tokenization.fingerprint(tokenization.read_vocab(path))
    for path in found.values()
  }
  if len(digests) > 1:
    raise ValueError(
      f'the tokens of {" and ".join(found)} must be the same: they differ '
      f'between {" and ".join(found.values())}'
    )
  return next(iter(found.values()), None)


def _gone(path: str) -> bool:
  """Whether there is no such file, or it would have to be downloaded."""
  return not os.path.exists(os.path.expanduser(path))


def _kept(workdir: str | None) -> str | None:
  """The copy in the workdir, of a run that has begun: what else is there may
  be of a start that came to nothing."""
  path = pathlib.Path(workdir or '', bert_weights.VOCABULARY)
  folder = pathlib.Path(workdir or '', FOLDER)
  if workdir is None or not (path.is_file() and folder.is_dir()):
    return None
  begun = any(entry.name.isdigit() for entry in folder.iterdir())
  return str(path) if begun else None


def keep_vocabulary(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Copies the vocabulary into the workdir."""
  path = vocabulary(config, workdir)
  kept = pathlib.Path(workdir, bert_weights.VOCABULARY)
  if path is not None and path != str(kept):
    with files.whole(kept) as aside:
      shutil.copyfile(path, aside)
