"""Config -> the state before the first step."""

from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np

from margin_jax import build, data
from margin_jax import step as step_lib
from margin_jax.config import ConfigError
from margin_jax.method import Method
from margin_jax.models import pretrained


def _stream(source: data.Source | data.Streamed) -> Any:
  """The place in the data before the first draw."""
  if source.widths:
    counts = [len(rows) for _, rows in source.parts['train']]
    return data.parts.Streams.create(counts)
  if source.resident:
    return data.Stream.create(source.counts['train'])
  return data.Epoch.create()


def _pretrained(
  config: ml_collections.ConfigDict, source: data.Source, model: nn.Module
) -> dict[tuple[str, ...], np.ndarray]:
  """What `config.model.pretrained` has for the model, by path."""
  path = config.model.pretrained
  if path is None:
    return {}
  shapes, _ = build.shapes(model, source)
  try:
    return pretrained.read(path, config.model.name, shapes)
  except pretrained.PretrainedError as error:
    raise ConfigError(f'model.pretrained: {error}') from error


def init_state(
  config: ml_collections.ConfigDict,
  source: data.Source,
  method: Method,
  *,
  restoring: bool = False,
) -> step_lib.TrainState:
  """The state before the first step.

  Args:
    config: validated.
    source: of the examples.
    method: as `make_method` returns it.
    restoring: a checkpoint will take the place of the values, so that no
      pretrained weights are read; their file may be gone.

  Raises:
    ConfigError: the pretrained weights cannot be read, or do not fit.
  """
  weights = {} if restoring else _pretrained(config, source, method.model)
  examples = source.counts['train']
  state = step_lib.init_state(
    method,
    _stream(source),
    config.seed,
    np.zeros((1, *source.input_shape), source.input_dtype),
    examples if config.selection.log_counts else None,
  )
  if not weights:
    return state
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  variables = pretrained.put(variables, weights)
  opt_state = method.optimizer.init(variables['params'])
  return state.replace(opt_state=opt_state, **variables)
