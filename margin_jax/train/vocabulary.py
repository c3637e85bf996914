"""The vocabulary of a run: which vocab.txt, and a copy that outlives it."""

import os
import pathlib
import shutil

import ml_collections

from margin_jax import files
from margin_jax.data import kinds, tokenization
from margin_jax.models import bert_weights
from margin_jax.train.checkpoints import FOLDER


def find(config: ml_collections.ConfigDict, workdir: str | None) -> str | None:
  """Returns the vocab.txt that sentences are read with, None where none is.

  It is the one that `data.vocabulary` names, else that of `model.pretrained`.
  Where they no longer exist, it is the copy that a run with checkpoints has in
  its workdir.

  Raises:
    ValueError: there are two, and they differ.
    PretrainedError: the weights' folder is missing.
    DatasetError: one cannot be read, or the weights are of cased words.
  """
  if not kinds.needs_vocabulary(config.data.name):
    return None
  named, weights = config.data.vocabulary, config.model.pretrained
  copy = kept(workdir)
  paths = {}
  if named is not None and (_exists(named) or not copy):
    paths['data.vocabulary'] = os.path.expanduser(named)
  if weights is not None and (_exists(weights) or not copy):
    folder = bert_weights.resolve(weights)
    tokenization.check_words(folder)
    path = folder / bert_weights.VOCABULARY
    if path.is_file() or not (named or copy):
      paths['model.pretrained'] = str(path)
  if copy:
    paths['the workdir'] = copy
  digests = {
    tokenization.fingerprint(tokenization.read_vocab(path))
    for path in paths.values()
  }
  if len(digests) > 1:
    raise ValueError(
      f'the tokens of {" and ".join(paths)} must be the same: they differ '
      f'between {" and ".join(paths.values())}'
    )
  return next(iter(paths.values()), None)


def keep(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Copies the vocabulary into the workdir."""
  path = find(config, workdir)
  copy = pathlib.Path(workdir, bert_weights.VOCABULARY)
  if path is not None and path != str(copy):
    with files.whole(copy) as aside:
      shutil.copyfile(path, aside)


def _exists(path: str) -> bool:
  """Returns whether the file is here, and needs no download."""
  return os.path.exists(os.path.expanduser(path))


def kept(workdir: str | None) -> str | None:
  """Returns the copy in the workdir of a run that has begun.

  Without a checkpoint there, the copy may come from a start that failed.
  """
  if workdir is None:
    return None
  path = pathlib.Path(workdir, bert_weights.VOCABULARY)
  folder = pathlib.Path(workdir, FOLDER)
  if not (path.is_file() and folder.is_dir()):
    return None
  begun = any(entry.name.isdigit() for entry in folder.iterdir())
  return str(path) if begun else None
