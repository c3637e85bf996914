"""Measures a trained run's margins; writes tables and a picture."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from margin_jax import config as config_lib
from margin_jax import data, files, linearized, signatures
from margin_jax.analyze import plots
from margin_jax.train import evaluation, runs
from margin_jax.train import setup as setup_lib

PyTree = Any

# Where a run is analyzed unless it is said where, and the model has them.
LAYERS = (linearized.INPUT, linearized.FEATURES)


def _quantities(
  found: dict[str, Any], names: tuple[str, ...]
) -> dict[str, np.ndarray]:
  """What distributions are drawn of, by name."""
  radius = found['feature_norm'].max()
  quantities = {
    'margin': found['margin'],
    'mms': found['mms'],
    # What MMR widens: the margin relative to the radius of the features.
    'margin/radius': found['margin'] / (radius if radius > 0 else np.nan),
  }
  for name in names:
    quantities[f'normalized margin at {name}'] = signatures.normalize(
      found[f'margin/{name}'], found[f'total_variation/{name}']
    )
  return quantities


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  files.write_csv(path, list(rows[0]), rows)


def _ranked(
  found: dict[str, Any], rows: np.ndarray, names: tuple[str, ...]
) -> list[dict[str, Any]]:
  """Every example of a split, the most negative signed margin first."""
  table = []
  for i in signatures.ranking(found['margin']):
    row = {
      'index': int(rows[i]),
      'label': int(found['label'][i]),
      'prediction': int(found['prediction'][i]),
      'margin': float(found['margin'][i]),
      'mms': float(found['mms'][i]),
    }
    for name in names:
      row[f'margin at {name}'] = float(found[f'margin/{name}'][i])
      row[f'mms at {name}'] = float(found[f'mms/{name}'][i])
    table.append(row)
  return table


class _Report:
  """Collects what every checkpoint measured."""

  def __init__(self, dataset: data.Dataset, names: tuple[str, ...]):
    self.names = names
    self.dataset = dataset
    self.distributions: list[dict[str, Any]] = []
    self.signatures: list[dict[str, Any]] = []
    self.last: dict[str, dict[str, np.ndarray]] = {}
    self.ranked: dict[str, list[dict[str, Any]]] = {}

  def add(self, step: int, split: str, found: dict[str, Any]) -> float:
    """Adds a split at a checkpoint; returns its accuracy."""
    accuracy = float(np.mean(found['prediction'] == found['label']))
    quantities = _quantities(found, self.names)
    for name, values in quantities.items():
      place = {'step': step, 'split': split, 'quantity': name}
      self.distributions.append(
        {**place, 'accuracy': accuracy, **signatures.summary(values)}
      )
    for layer in self.names:
      for kind in signatures.SIGNATURES:
        values = signatures.signature(
          quantities[f'normalized margin at {layer}'], kind
        )
        place = {'step': step, 'split': split, 'layer': layer, 'kind': kind}
        numbers = {f's{i + 1}': float(v) for i, v in enumerate(values)}
        self.signatures.append({**place, **numbers})
    self.last[split] = quantities
    rows = self.dataset.rows[split][found['row']]
    self.ranked[split] = _ranked(found, rows, self.names)
    return accuracy

  def write(self, folder: pathlib.Path) -> None:
    """Writes the tables and the picture."""
    _write(folder / 'distributions.csv', self.distributions)
    _write(folder / 'signatures.csv', self.signatures)
    for split, table in self.ranked.items():
      _write(folder / f'{split}.csv', table)
    plots.margins(folder / 'margins.png', self.distributions, self.last)


def analyze(
  workdir: str,
  *,
  layer_names: tuple[str, ...] | None = None,
  steps: list[int] | None = None,
  examples: int | None = None,
  data_dir: str | None = None,
  out: str | None = None,
  log: Callable[[str], None] = print,
) -> pathlib.Path:
  """Measures the margins of a run and writes tables and a picture.

  Args:
    workdir: of the run.
    layer_names: where margins are linearised and normalised; None is 'input'
      (if it is not of integers) and 'features'.
    steps: which checkpoints; None is all that are kept.
    examples: measure so many of each split, its first; None is all.
    data_dir: where the dataset lies now, if not where the run found it.
    out: the folder to write to; None is WORKDIR/analysis.
    log: takes the progress lines.

  Returns:
    The folder.

  Raises:
    ConfigError: there is no such checkpoint, or no such layer.
    DatasetError: the dataset is missing or broken.
    CorruptError: a checkpoint cannot be read.
  """
  if examples is not None and examples < 1:
    raise config_lib.ConfigError(
      f'examples={examples} is not allowed: it must be at least 1'
    )
  workdir = os.path.abspath(os.path.expanduser(workdir))
  checkpoints = runs.checkpoints(workdir, steps)
  try:
    config = runs.saved_config(checkpoints.info(), data_dir)
    devices, dataset = setup_lib.load(
      config, None, training=False, workdir=workdir
    )
    spec = setup_lib.make_spec(config, dataset, devices.total)
    splits = tuple(name for name in dataset.counts if name != 'validation')
    known = setup_lib.layer_shapes(spec.model, dataset)
    if layer_names is None:
      layer_names = tuple(name for name in LAYERS if name in known)
    setup_lib.check_layers('layers', layer_names, known)
    measurer = evaluation.Measurer(
      spec,
      dataset.chunks(
        devices, splits, config.eval_batch_size, examples, whole=True
      ),
      {name: known[name] for name in layer_names},
    )
    folder = runs.make_folder(out or os.path.join(workdir, 'analysis'))
    state = setup_lib.init_state(config, dataset, spec, restoring=True)
    report = _Report(dataset, layer_names)
    for step in sorted({*(steps or checkpoints.steps())}):
      restored, _ = checkpoints.restore(state, step)
      variables = devices.replicate(
        {'params': restored.params, 'batch_stats': restored.batch_stats}
      )
      accuracy = {
        split: report.add(step, split, measurer(split, variables))
        for split in splits
      }
      shown = ', '.join(f'{accuracy[k]:.2%} of {k}' for k in splits)
      log(f'step {step:,}: accuracy {shown}')
  finally:
    checkpoints.close()
  report.write(folder)
  log(f'written to {folder}')
  return folder
