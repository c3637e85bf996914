"""What somebody sees who prepares a dataset."""

import importlib.util

import pytest
import tensorflow_datasets as tfds

from margin_jax import prepare
from tests.datasets import write_dataset


def test_preparing_shows_progress(tmp_path, monkeypatch, capsys):
  class Builder:
    data_path = tmp_path / 'cifar10'

    def is_prepared(self):
      return False

    def download_and_prepare(self):
      # TFDS's own bars, of a dataset that is made here.
      write_dataset(tmp_path, 'cifar10', ids=True, labels=[1, 2])

  make = tfds.builder

  def builder(name, **kwargs):
    # write_dataset asks for the stock builder, without a format.
    return Builder() if 'file_format' in kwargs else make(name, **kwargs)

  monkeypatch.setattr(tfds, 'builder', builder)
  tfds.disable_progress_bar()
  try:
    assert prepare.prepare('cifar10', str(tmp_path)) == str(Builder.data_path)
  finally:
    tfds.enable_progress_bar()
  assert 'Generating train examples' in capsys.readouterr().err


def test_the_reason_of_a_failed_download_comes_first():
  error = RuntimeError('pool, 10 retries')
  error.__cause__ = OSError(-3, 'no such name')
  assert prepare._explain(error) == 'no such name: pool, 10 retries'
  assert prepare._explain(OSError('no route')) == 'no route'


@pytest.mark.parametrize('given', [True, False])
def test_a_failed_download_names_the_folders(tmp_path, monkeypatch, given):
  def fail(name, data_dir):
    raise OSError('no route to host')

  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  monkeypatch.setattr(prepare, 'prepare', fail)
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  arguments = [f'--data_dir={tmp_path}'] if given else []
  with pytest.raises(SystemExit) as caught:
    prepare.main(['cifar10', *arguments])
  message = str(caught.value)
  assert 'no route to host' in message
  assert f' {tmp_path}/downloads/manual ' in message
  assert f'elsewhere into {tmp_path}.' in message
