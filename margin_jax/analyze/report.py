"""Measures the margins of a trained run; writes tables and figures."""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from margin_jax import data, files, linearized, signatures, terminal
from margin_jax.analyze import plots
from margin_jax.config import require
from margin_jax.data import entailment, tokenization
from margin_jax.train import evaluation, runs, vocabulary, workdirs
from margin_jax.train import setup as setup_lib

Row = dict[str, Any]
# The layers of an analysis that names none, as far as the model has them.
LAYERS = (linearized.INPUT, linearized.FEATURES)
# How many examples are shown, of those with the most negative margins.
SHOWN = 32


def analyze(
  workdir: str,
  *,
  layer_names: tuple[str, ...] | None = None,
  steps: list[int] | None = None,
  examples: int | None = None,
  data_dir: str | None = None,
  out: str | None = None,
  log: Callable[[str], None] = print,
  wait: terminal.Wait = terminal.do_not_show,
) -> pathlib.Path | epath.Path:
  """Measures the margins of a trained run; writes tables and figures.

  Args:
    workdir: the run's folder.
    layer_names: the layers at which to linearize and normalize margins; None is
      'input' (unless it holds integers) and 'features'.
    steps: which checkpoints; None is all checkpoints that the run has kept.
    examples: how many examples of each split, from its first; None is all.
    data_dir: where the dataset is now, if it has moved since the run.
    out: the folder to write to; None is WORKDIR/analysis.
    log: takes the progress lines.
    wait: shows what is being loaded or measured: `terminal.wait`.

  Returns:
    The folder.

  Raises:
    ConfigError: there is no such checkpoint, or no such layer.
    DatasetError: the dataset is missing or broken.
    CorruptError: a checkpoint cannot be read.
  """
  holds = examples is None or examples >= 1
  require(holds, 'examples', examples, 'at least 1')
  with contextlib.ExitStack() as stack:
    with wait(f'loading the run of {workdir}'):
      run = stack.enter_context(runs.open_run(workdir, steps, data_dir))
    splits = tuple(name for name in run.dataset.counts if name != 'validation')
    shapes = setup_lib.layer_shapes(run.spec.model, run.dataset)
    if layer_names is None:
      layer_names = tuple(name for name in LAYERS if name in shapes)
    setup_lib.check_layers('layers', layer_names, shapes)
    measure = evaluation.Measurer(
      run.spec,
      run.dataset.chunks(
        run.devices, splits, run.config.eval_batch_size, examples, whole=True
      ),
      {name: shapes[name] for name in layer_names},
    )  # fmt: skip
    folder = stack.enter_context(
      runs.output(out, run.workdir.child('analysis'))
    )
    report = Report(run.dataset, layer_names, _title(run), _words(run))
    states = map(run.restore, sorted({*steps})) if steps else run.restore_kept()
    for state in states:
      step = int(state.step)
      variables = run.devices.replicate(state.evaluated)
      with wait(f'measuring step {step:,}', line=False):
        accuracy = {
          split: report.add(step, split, measure(split, variables))
          for split in splits
        }
      text = ', '.join(f'{accuracy[split]:.2%} of {split}' for split in splits)
      log(f'step {step:,}: accuracy {text}')
    for split, name in report.write(folder.folder).items():
      negative = sum(row['margin'] < 0 for row in report.ranked[split])
      log(
        f'{split}: {negative:,} of {len(report.ranked[split]):,} margins are '
        f'negative; the lowest are in {folder.path}/{name}'
      )
  return folder.path


def _title(run: runs.TrainedRun) -> str:
  """Returns what names a run in a figure: data, model, and its own name."""
  path, _, name = str(run.workdir).rpartition(f'/{workdirs.RUNS}/')
  if not path:  # it is not a run of a comparison
    name = pathlib.PurePath(name).name
  return f'{run.dataset.name}, {run.config.model.name}: {name}'


def _words(run: runs.TrainedRun) -> tuple[str, ...]:
  """Returns the tokens of a dataset of sentences, by id."""
  if run.dataset.vocabulary is None:
    return ()
  path = vocabulary.find(run.config, str(run.workdir.folder))
  return entailment.VOCAB if path is None else tokenization.read_vocab(path)


class Report:
  """Tables of the margins at every checkpoint."""

  def __init__(
    self,
    dataset: data.Dataset,
    layers: tuple[str, ...],
    title: str,
    words: tuple[str, ...] = (),
  ):
    """Starts with empty tables.

    Args:
      dataset: knows the original row of every example.
      layers: where margins are linearized and normalized.
      title: of the figure.
      words: the tokens of sentences, by id.
    """
    self._words = words
    self._dataset = dataset
    self._layers = layers
    self._title = title
    self._distributions: list[Row] = []
    self._signatures: list[Row] = []
    # For each split, at the last checkpoint: what was measured, and values by
    # quantity; in the end the examples, the most negative margin first.
    self._measured: dict[str, dict[str, Any]] = {}
    self._last: dict[str, dict[str, np.ndarray]] = {}
    self.ranked: dict[str, list[Row]] = {}

  def add(self, step: int, split: str, measured: dict[str, Any]) -> float:
    """Adds what `evaluation.Measurer` returns for a split at a checkpoint.

    Steps must ascend: the last one's examples are ranked.

    Returns:
      The accuracy.
    """
    accuracy = float(np.mean(measured['prediction'] == measured['label']))
    quantities = _quantities(measured, self._layers)
    for quantity, values in quantities.items():
      row = {'step': step, 'split': split, 'quantity': quantity}
      row |= {'accuracy': accuracy, **signatures.summary(values)}
      self._distributions.append(row)
    for layer in self._layers:
      normalized = quantities[f'normalized margin at {layer}']
      for kind in signatures.SIGNATURES:
        row = {'step': step, 'split': split, 'layer': layer, 'kind': kind}
        numbers = signatures.signature(normalized, kind)
        row |= {f's{i}': float(x) for i, x in enumerate(numbers, 1)}
        self._signatures.append(row)
    self._measured[split] = measured
    self._last[split] = quantities
    return accuracy

  def _rank(self, split: str, order: np.ndarray) -> list[Row]:
    """Returns the examples of a split in an order."""
    dataset, measured = self._dataset, self._measured[split]
    rows = dataset.rows[split][measured['row']]
    table = []
    for i in order:
      row = {
        'index': int(rows[i]),
        'label': int(measured['label'][i]),
        'prediction': int(measured['prediction'][i]),
        'margin': float(measured['margin'][i]),
        'mms': float(measured['mms'][i]),
      }
      for layer in self._layers:
        if layer == linearized.FEATURES:
          continue  # margin and mms are those at the features
        row[f'margin at {layer}'] = float(measured[f'margin/{layer}'][i])
        row[f'mms at {layer}'] = float(measured[f'mms/{layer}'][i])
      if dataset.origins is not None:
        column, values = dataset.origins
        row[column] = _printable(values[split][rows[i]])
      if dataset.class_names is not None:
        row['label_name'] = dataset.class_names[row['label']]
        row['prediction_name'] = dataset.class_names[row['prediction']]
      table.append(row)
    return table

  def write(self, folder: pathlib.Path) -> dict[str, str]:
    """Writes the tables and the figures.

    Returns:
      For each split, the file that shows its most negative margins.
    """
    orders = {
      split: signatures.ranking(measured['margin'])
      for split, measured in self._measured.items()
    }
    self.ranked = {split: self._rank(split, x) for split, x in orders.items()}
    tables = {
      'distributions': self._distributions,
      'signatures': self._signatures,
      **self.ranked,
    }
    for name, rows in tables.items():
      files.write_csv(folder / f'{name}.csv', list(rows[0]), rows)
    plots.margins(
      folder / 'margins.png', self._title, self._distributions, self._last
    )
    return {
      split: self._write_most_negative(folder, split, order[:SHOWN])
      for split, order in orders.items()
    }

  def _write_most_negative(
    self, folder: pathlib.Path, split: str, first: np.ndarray
  ) -> str:
    """Writes a sheet of images, or a table of sentences; of others nothing.

    Args:
      folder: the folder to write to.
      split: the split of the examples.
      first: where among the measured examples the shown ones are.

    Returns:
      The name of the file that shows them.
    """
    dataset = self._dataset
    rows = self.ranked[split][:SHOWN]
    name = f'most_negative_{split}'
    inputs = dataset.inputs(split, self._measured[split]['row'][first])
    names = dataset.class_names or [*map(str, range(dataset.num_classes))]
    if self._words:
      texts = tokenization.decode(inputs, self._words)
      lines = _sentence_table(split, texts, rows, names)
      with files.whole(folder / f'{name}.md') as aside:
        aside.write_text('\n'.join(lines) + '\n', encoding='utf-8')
      return f'{name}.md'
    if inputs.dtype == np.uint8 and inputs.shape[-1] in (1, 3):
      path = folder / f'{name}.png'
      plots.most_negative(path, split, inputs, rows, names)
      return path.name
    return f'{split}.csv'


def _sentence_table(
  split: str,
  texts: Sequence[tuple[str, ...]],
  rows: Sequence[Row],
  names: Sequence[str],
) -> list[str]:
  """Returns the lines of a table of sentences, in Markdown."""
  where = ['index', *(['line'] if 'line' in rows[0] else [])]
  header = ['margin', 'label', 'prediction', *where, 'sentences']
  table = [header, ['---'] * len(header)]
  for text, row in zip(texts, rows, strict=True):
    cells = [f'{row["margin"]:.4g}', names[row['label']]]
    cells += [names[row['prediction']], *(str(row[x]) for x in where)]
    table.append([*cells, ' // '.join(text)])
  return [
    f'# The {len(rows)} lowest margins of the {split} split',
    '',
    *(
      '| ' + ' | '.join(x.replace('|', '\\|') for x in cells) + ' |'
      for cells in table
    ),
  ]


def _quantities(
  measured: dict[str, Any], layers: tuple[str, ...]
) -> dict[str, np.ndarray]:
  """Returns the values whose distributions are reported, by quantity."""
  largest = measured['feature_norm'].max()
  quantities = {
    'margin': measured['margin'],
    'mms': measured['mms'],
    # What MMR widens: the margin relative to the largest feature norm.
    'margin/feature_norm': (
      measured['margin'] / (largest if largest > 0 else np.nan)
    ),
  }
  for layer in layers:
    quantities[f'normalized margin at {layer}'] = signatures.normalize(
      measured[f'margin/{layer}'], measured[f'total_variation/{layer}']
    )
  return quantities


def _printable(origin: Any) -> str:
  """Returns a line or a path; bytes that are not UTF-8 as escapes."""
  return str(origin).encode(errors='backslashreplace').decode()
