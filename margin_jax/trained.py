"""A trained network, to predict with and to look into."""

import dataclasses
import functools
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

PyTree = Any

# How many examples one call predicts; the last ones are padded to it.
CHUNK_SIZE = 256
# Images of pixels from 0 to 255 are seldom as dark as this.
DARK = 16


@dataclasses.dataclass(frozen=True, repr=False)
class Trained:
  """What `load` returns.

  Attributes:
    model: the Flax module; `model.apply(variables, prepare(inputs),
      train=False)` returns logits (B, C) and features (B, D).
    variables: 'params' and 'batch_stats', as NumPy arrays; the averaged ones
      of a run with `ema.decay`.
    config: the run's config.
    step: the step of the checkpoint.
    prepare: turns what the dataset stores into what the model reads, such as
      uint8 pixels into normalized images.
    encode: turns sentences, pairs of sentences or paths of images into what the
      dataset stores; None for other data.
    input_shape: shape of one example's inputs as stored; None if it may vary.
    input_dtype: dtype of the inputs as stored.
    class_names: the names of the classes, None if they are not known.
    validation_accuracy: of the checkpoint; None if the run did not measure it.
  """

  model: nn.Module
  variables: PyTree
  config: ml_collections.ConfigDict
  step: int
  prepare: Callable[[Any], Any]
  encode: Callable[[Sequence[Any]], np.ndarray] | None
  input_shape: tuple[int, ...] | None
  input_dtype: np.dtype
  class_names: tuple[str, ...] | None
  validation_accuracy: float | None = None

  def __repr__(self) -> str:
    """Returns a line: the variables and the config would fill the screen."""
    shown = [
      f'dataset={self.config.data.name!r}',
      f'model={self.config.model.name!r}',
      f'step={self.step}',
    ]
    if self.validation_accuracy is not None:
      shown.append(f'validation_accuracy={self.validation_accuracy:.4f}')
    return f'Trained({", ".join(shown)})'

  def apply(self, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits and the features of examples.

    Args:
      inputs: any number of inputs, as the dataset stores them: images (N, H, W,
        channels), pixels from 0 to 255, or what a registered dataset has. For
        sentences, also a list of strings or of pairs; for a folder of images,
        also a list of paths.

    Returns:
      Logits (N, C) and features (N, D), float32.

    Raises:
      ValueError: the inputs have another shape or range, or are a single string
        or path; or a file is no image.
    """
    return self._outputs(self._stored(inputs))

  def predict(self, inputs: Any) -> np.ndarray:
    """Returns the class of each example, (N,) int32.

    Args:
      inputs: as `apply` takes them: images are pixels from 0 to 255.
    """
    logits, _ = self._outputs(self._stored(inputs))
    return logits.argmax(axis=1).astype(np.int32)

  def _outputs(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits and the features of inputs as stored."""
    found = []
    for start in range(0, max(len(inputs), 1), CHUNK_SIZE):
      chunk = inputs[start : start + CHUNK_SIZE]
      missing = CHUNK_SIZE - len(chunk)
      padded = np.pad(chunk, [(0, missing)] + [(0, 0)] * (chunk.ndim - 1))
      outputs = self._forward(self.variables, padded)
      found.append([np.asarray(x)[: len(chunk)] for x in outputs])
    logits, features = (np.concatenate(x) for x in zip(*found, strict=True))
    return logits, features

  def _stored(self, inputs: Any) -> np.ndarray:
    """Returns the inputs as the dataset stores them."""
    if self.encode is not None and not hasattr(inputs, 'shape'):
      if isinstance(inputs, str | os.PathLike):
        raise ValueError(f'inputs must be a list: [{inputs!r}]')
      return self.encode(inputs)
    inputs = np.asarray(inputs)
    shape = self.input_shape
    if shape is not None and inputs.shape[1:] != shape:
      raise ValueError(
        f'inputs must have shape {("N", *shape)}, as data.name='
        f'{self.config.data.name!r} has them, got {inputs.shape}'
      )
    if self.input_dtype != np.uint8 or not inputs.size:
      return inputs
    least, largest = inputs.min(), inputs.max()
    problem = (
      'pixels from 0 to 255, as data.name='
      f'{self.config.data.name!r} has them, got {inputs.dtype} from {least:g} '
      f'up to {largest:g}'
    )
    # Pixels may be floating, under an attack say, but not from 0 to 1.
    from_0_to_1 = inputs.dtype.kind == 'f' and 0 < largest <= 1
    if from_0_to_1 or not (least >= 0 and largest <= 255):
      raise ValueError(f'inputs must be {problem}')
    if 0 < largest <= DARK:
      # At the line that calls `apply` or `predict`.
      warnings.warn(f'inputs should be {problem}', stacklevel=3)
    return inputs

  @functools.cached_property
  def _forward(self) -> Callable:
    @jax.jit
    def forward(variables: PyTree, inputs: jax.Array):
      logits, features = self.model.apply(
        variables, self.prepare(inputs), train=False
      )
      return logits.astype(jnp.float32), features.astype(jnp.float32)

    return forward


def load(
  workdir: str | os.PathLike, checkpoint: str | int = 'latest'
) -> Trained:
  """Loads the trained network of a run; needs no data.

  What it returns predicts from inputs as the dataset stores them: images are
  uint8 pixels from 0 to 255, (N, H, W, channels); sentences are strings, or
  pairs of strings. See `Trained.apply`.

  Args:
    workdir: the run's folder; "~" is expanded.
    checkpoint: 'latest', 'best' (the highest validation accuracy), or the step
      of a checkpoint that the run has kept.

  Raises:
    ConfigError: there is no such checkpoint, or the config names a model that
      is not registered.
    CorruptError: the checkpoint cannot be read.

  Examples:
    >>> trained = load('/tmp/digits', 'best')  # doctest: +SKIP
    >>> classes = trained.predict(images)  # doctest: +SKIP
  """
  # The trainer imports much that nobody needs who only wants `mms_scores`.
  from margin_jax import config as config_lib
  from margin_jax.data import images, kinds, tokenization
  from margin_jax.train import runs, vocabulary

  step = None if isinstance(checkpoint, str) else operator.index(checkpoint)
  steps = None if step is None else [step]
  with runs.open_run(workdir, steps, reads_data=False) as run:
    if checkpoint not in ('latest', 'best', step):
      raise config_lib.ConfigError(
        f"checkpoint={checkpoint!r} must be 'latest', 'best' or a step"
      )
    state = run.restore_best() if checkpoint == 'best' else run.restore(step)
    encode = None
    folder = str(run.workdir.folder)
    path = vocabulary.kept(folder) or vocabulary.find(run.config, folder)
    if run.config.data.name.startswith(kinds.FOLDER):
      encode = functools.partial(
        images.read_files, side=run.config.data.image_size
      )
    if path is not None:
      encode = functools.partial(
        tokenization.encode,
        vocab=tokenization.read_vocab(path),
        max_length=run.config.data.max_length,
      )
    sentences = run.dataset.vocabulary is not None
    shape = None if sentences else run.dataset.input_shape
    return Trained(
      model=run.spec.model,
      variables=jax.device_get(state.evaluated),
      config=run.config,
      step=int(state.step),
      prepare=run.dataset.prepare,
      encode=encode,
      input_shape=shape,
      input_dtype=run.dataset.input_dtype,
      class_names=run.dataset.class_names,
      validation_accuracy=run.checkpoints.accuracy(int(state.step)),
    )
