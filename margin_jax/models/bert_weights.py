"""Reads and writes BERT's weights in Hugging Face's layout.

A folder with `config.json`, `vocab.txt` and `model.safetensors` (or its shards
and their `model.safetensors.index.json`, or `pytorch_model.bin`), such as
`BertModel`, `BertForPreTraining` and `BertForSequenceClassification` write it;
or a name on the Hugging Face hub, such as 'google-bert/bert-base-uncased',
which is downloaded once.
"""

import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from absl import logging
from flax import traverse_util

from margin_jax import checks, files
from margin_jax.data import tokenization
from margin_jax.models import bert, weights
from margin_jax.models.weights import Path, PretrainedError, State

PyTree = Any

CONFIG, VOCABULARY = 'config.json', 'vocab.txt'
WEIGHTS = 'model.safetensors'
INDEX = f'{WEIGHTS}.index.json'
PYTORCH = 'pytorch_model.bin'
NEEDED = f'{CONFIG}, {VOCABULARY}, and {WEIGHTS} or {PYTORCH}'

# Our names of the sizes, and theirs in `config.json`.
_SIZES = {
  'vocab_size': 'vocab_size',
  'layers': 'num_hidden_layers',
  'width': 'hidden_size',
  'heads': 'num_attention_heads',
  'hidden': 'intermediate_size',
  'max_length': 'max_position_embeddings',
  'segments': 'type_vocab_size',
}
# The largest that is believed of each: of no BERT that fits into a computer.
_LARGEST = {
  'vocab_size': 2**24,
  'layers': 2**10,
  'width': 2**16,
  'heads': 2**10,
  'hidden': 2**18,
  'max_length': 2**20,
  'segments': 2**10,
}
# What else `config.json` says, with what its absence means.
_NUMBERS = {
  'epsilon': ('layer_norm_eps', 1e-12),
  'dropout': ('hidden_dropout_prob', 0.1),
}
# What our BERT is; absence means the same.
_KIND = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
  'is_decoder': False,
}


def _hub_files(name: str) -> pathlib.Path:
  """Downloads the files of a name on the hub, PyTorch's if need be."""
  try:
    import huggingface_hub
  except ImportError:
    raise PretrainedError(
      f'{name!r} is not a local folder, and the package huggingface_hub, which '
      'could download it, is missing: pip install huggingface_hub, or give a '
      f'folder with {NEEDED}'
    ) from None
  small = [CONFIG, VOCABULARY, tokenization.CONFIG, INDEX]
  try:
    for patterns in ([WEIGHTS, 'model-*.safetensors'], [PYTORCH]):
      folder = pathlib.Path(
        huggingface_hub.snapshot_download(
          name, allow_patterns=[*small, *patterns]
        )
      )
      if _weights_file(folder):
        return folder
  except Exception as error:  # whatever networks and hubs come up with
    first = str(error).strip().partition('\n')[0].rstrip('.')
    first = first or type(error).__name__
    raise PretrainedError(
      f'{name!r} is not a local folder, and cannot be downloaded from the '
      f'Hugging Face hub: {first}; give a local folder with {NEEDED} instead'
    ) from error
  raise PretrainedError(
    f'{name!r} on the Hugging Face hub has no weights: it must have {NEEDED}'
  )


def _weights_file(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the file that the weights are in, or the index of the files."""
  for name in (WEIGHTS, INDEX, PYTORCH):
    if (folder / name).is_file():
      return folder / name
  return None


def resolve(name: str | os.PathLike) -> pathlib.Path:
  """Returns the folder of a model: `name` itself, or a download from the hub.

  Args:
    name: a local folder, "~" is expanded; or else a name on the Hugging Face
      hub, 'owner/model' or 'model'. What was downloaded before is not
      downloaded again, and does not need the network.

  Raises:
    PretrainedError: there is no such folder, and no such name or no network.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder
  name = os.fspath(name)
  if folder.exists():
    raise PretrainedError(
      f'{name!r} is a file: give the folder of a BERT, with {NEEDED}'
    )
  # Names of the hub start with neither a dot nor a slash.
  if not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', name):
    raise PretrainedError(f'there is no folder {name!r} with {NEEDED}')
  return _hub_files(name)


def _json(path: pathlib.Path, **values: checks.Check) -> dict[str, Any]:
  try:
    return files.read_json(path, values, f'the folder must have {NEEDED}')
  except FileNotFoundError:
    raise PretrainedError(f'there is no file {str(path)!r}') from None
  except files.FileError as error:
    raise PretrainedError(str(error)) from error


def _is_number(x: Any, kind: type | tuple[type, ...]) -> bool:
  return isinstance(x, kind) and not isinstance(x, bool)


def describe(folder: str | os.PathLike) -> dict[str, Any]:
  """Reads `config.json`, as the fields of `bert.Bert`.

  Args:
    folder: as `resolve` takes it.

  Returns:
    vocab_size, layers, width, heads, hidden, max_length, segments, epsilon,
    dropout: `Bert(num_classes, **describe(folder))` computes what the file's
    network does.

  Raises:
    PretrainedError: the file is missing or broken, or of another network: one
      message lists all that is wrong.
  """
  path = resolve(folder) / CONFIG
  content = _json(path)
  wrong = [
    f'{key} must be {value!r}, got {files.shown(content[key])}'
    for key, value in _KIND.items()
    if content.get(key, value) != value
  ]
  sizes = {ours: content.get(theirs) for ours, theirs in _SIZES.items()}
  for ours, x in sizes.items():
    problem = ''
    if not (_is_number(x, int) and x > 0):
      problem = 'a positive integer'
    elif x > _LARGEST[ours]:
      problem = f'at most {_LARGEST[ours]:,}'
    if problem:
      wrong.append(f'{_SIZES[ours]} must be {problem}, got {files.shown(x)}')
  for ours, (theirs, usual) in _NUMBERS.items():
    sizes[ours] = content.get(theirs, usual)
    if not (_is_number(sizes[ours], (int, float)) and 0 <= sizes[ours] < 1):
      wrong.append(
        f'{theirs} must be in [0, 1), got {files.shown(sizes[ours])}'
      )
  if not wrong and sizes['width'] % sizes['heads']:
    wrong.append('hidden_size must be a multiple of num_attention_heads')
  if wrong:
    raise PretrainedError(
      f'{str(path)!r} describes no BERT that can be read: {"; ".join(wrong)}'
    )
  return sizes


def sizes_of(model: bert.Bert) -> dict[str, Any]:
  """Returns the sizes of a model, as `describe` does."""
  sizes = {name: getattr(model, name) for name in (*_SIZES, *_NUMBERS)}
  return {**sizes, 'hidden': model.hidden or 4 * model.width}


def _state(folder: pathlib.Path) -> State:
  """Reads all tensors of a folder, by the names of a classifier."""
  path = _weights_file(folder)
  if path is None:
    raise PretrainedError(
      f'{str(folder)!r} has no weights: it must have {NEEDED}'
    )
  paths = [path]
  if path.name == INDEX:
    shards = _json(path, weight_map=checks.mapping())['weight_map']
    # Of a path the last component only: nothing outside the folder is read.
    names = sorted({os.path.basename(str(shard)) for shard in shards.values()})
    paths = [folder / name for name in names]
  state = {}
  for file in paths:
    state |= weights.read_state(str(file), bert.PUBLISHED)
  return state


def _check_name(folder: pathlib.Path, model_name: str) -> None:
  """Raises unless the folder's network is the named one.

  Neither the number of heads nor epsilon shows in a tensor's shape.
  """
  sizes = describe(folder)
  theirs = tuple(sizes[key] for key in ('layers', 'width', 'heads'))
  if theirs != bert.parse(model_name):
    name = bert.PATTERN.format(**sizes)
    raise PretrainedError(f'{str(folder)!r} has a {name}, not a {model_name}')
  if sizes['epsilon'] != bert.Bert.epsilon:
    raise PretrainedError(
      f'{str(folder)!r} has layer_norm_eps={sizes["epsilon"]}, and '
      f'{model_name} has {bert.Bert.epsilon}'
    )


def read(
  folder: str | os.PathLike, variables: PyTree, model_name: str | None = None
) -> dict[Path, Any]:
  """Reads a model's weights; `pretrained.put` puts them into its variables.

  A head of another number of classes, or none, is left out, and a line of the
  log says so: that is how a network is fine-tuned.

  Args:
    folder: as `resolve` takes it.
    variables: the model's, or their `jax.ShapeDtypeStruct`s.
    model_name: one that `bert.parse` knows, of a model with the usual epsilon,
      which `config.json` must fit; None looks at the tensors only.

  Returns:
    Arrays by path.

  Raises:
    PretrainedError: the folder or a file is missing, broken or of another
      network, or tensors are missing, unexpected or of another shape: one
      message lists them all.
  """
  folder = resolve(folder)
  if model_name is not None:
    _check_name(folder, model_name)
  state = _state(folder)
  shapes = traverse_util.flatten_dict(variables)
  names = {x: bert.PUBLISHED.tensor_name(x) for x in shapes}
  head = (weights.HEAD_KERNEL, weights.HEAD_BIAS)
  if not any(names[path] in state for path in head):
    logging.warning(
      '%s has no classifier: the head stays as it is initialized', folder
    )
    for path in head:
      del names[path]
  label = model_name or 'the model'
  return weights.fit(str(folder), label, state, names, shapes)


def _config(sizes: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
  """Returns the content of a classifier's `config.json`."""
  numbers = {theirs: sizes[ours] for ours, (theirs, _) in _NUMBERS.items()}
  return {
    'architectures': ['BertForSequenceClassification'],
    **_KIND,
    **{theirs: sizes[ours] for ours, theirs in _SIZES.items()},
    **numbers,
    'attention_probs_dropout_prob': numbers['hidden_dropout_prob'],
    'initializer_range': 0.02,
    'pad_token_id': 0,
    'problem_type': 'single_label_classification',
    'id2label': {str(i): label for i, label in enumerate(labels)},
    'label2id': {label: i for i, label in enumerate(labels)},
  }


def write(
  folder: str | os.PathLike,
  variables: PyTree,
  sizes: dict[str, Any],
  vocab_path: str | os.PathLike | None = None,
  labels: Sequence[str] | None = None,
) -> None:
  """Writes what transformers' `BertForSequenceClassification` loads.

      BertForSequenceClassification.from_pretrained(folder)

  `read` gives the same variables back, bit by bit. Each file is written aside
  and renamed; others that are in the folder stay.

  Args:
    folder: made if it does not exist.
    variables: the variables of a `bert.Bert`.
    sizes: as `describe` and `sizes_of` return them.
    vocab_path: the `vocab.txt` to put beside, with a `tokenizer_config.json`;
      None leaves both out.
    labels: a name of each class; None is 'LABEL_0', 'LABEL_1', ...

  Raises:
    ValueError: `labels` are not as many different names as there are classes.
  """
  flat = traverse_util.flatten_dict({'params': variables['params']})
  classes = flat[weights.HEAD_BIAS].shape[0]
  if labels is None:
    labels = [f'LABEL_{i}' for i in range(classes)]
  if len({*labels}) != classes or len(labels) != classes:
    raise ValueError(f'labels must name {classes} classes, got {labels!r}')
  state = {}
  for path, x in flat.items():
    x = np.asarray(x)
    # A copy, because safetensors writes a transposed view's memory as it lies.
    state[bert.PUBLISHED.tensor_name(path)] = np.ascontiguousarray(
      x.T if path[-1] == 'kernel' else x
    )
  folder = pathlib.Path(folder).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  with files.whole(folder / WEIGHTS) as path:
    path.touch()  # with the rights of any new file; safetensors' own has less
    rights = path.stat().st_mode
    safetensors.numpy.save_file(state, path, metadata={'format': 'pt'})
    path.chmod(rights)
  if vocab_path is not None:
    with files.whole(folder / VOCABULARY) as path:
      shutil.copyfile(vocab_path, path)
    words = {'tokenizer_class': 'BertTokenizer', **tokenization.WORDS}
    files.write_json(folder / tokenization.CONFIG, words)
  files.write_json(folder / CONFIG, _config(sizes, labels))
