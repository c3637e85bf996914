"""Images that are none, and labels of no class, in data that is streamed."""

import dataclasses

import numpy as np
import pytest

from margin_jax import data
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop
from tests.datasets import ONE, streamed, streamed_config
from tests.faults import runs
from tests.helpers import read_csv, slow

BAD = (5, 6, 17)


def corrupt(skip, workers=0):
  """Three of 30 training images, and one of 11 test images, are none."""
  dataset = streamed(workers=workers)
  whole = dataset.records['train'][6]['image']
  for row, content in zip(
    BAD, (b'', whole[: len(whole) // 2], b'GIF89a'), strict=True
  ):
    dataset.records['train'][row]['image'] = content
  dataset.records['test'][3]['image'] = b'no image'
  return dataclasses.replace(dataset, skip=skip)


@pytest.mark.parametrize('workers', [0, *slow(1)])
def test_the_next_example_takes_the_place_of_one_that_is_none(workers):
  (batch,) = corrupt(True, workers).training([30], 0, 0, ONE)
  (whole,) = streamed().training([30], 0, 0, ONE)
  bad = np.isin(whole['index'], BAD)
  assert batch['undecodable'].tolist() == bad.astype(int).tolist()
  for name in ('inputs', 'label', 'index'):
    np.testing.assert_array_equal(batch[name][~bad], whole[name][~bad])
  following = {5: 7, 6: 7, 17: 18}
  expected = [following[int(x)] for x in whole['index'][bad]]
  assert batch['index'][bad].tolist() == expected
  labels = [corrupt(True).records['train'][x]['label'] for x in expected]
  assert batch['label'][bad].tolist() == labels


def test_processes_agree_on_what_takes_the_place():
  dataset = corrupt(True)
  (whole,) = dataset.training([30], 0, 0, ONE)
  halves = [
    next(dataset.training([30], 0, 0, devices_lib.Shard(i, 2)))
    for i in range(2)
  ]
  for name in whole:
    np.testing.assert_array_equal(
      whole[name], np.concatenate([half[name] for half in halves])
    )


def test_evaluation_does_not_count_them():
  chunks = [*corrupt(True).evaluation('test', 4, ONE)]
  real = np.concatenate([chunk['real'] for chunk in chunks])
  assert real[:11].tolist() == [i != 3 for i in range(11)]


def test_too_many_in_a_row_end_the_run():
  dataset = corrupt(True)
  for record in dataset.records['train']:
    record['image'] = b''
  with pytest.raises(data.DatasetError, match='11 images in a row'):
    next(dataset.training([30], 0, 0, ONE))


@pytest.mark.parametrize('label', [4, -1])
def test_labels_of_no_class_are_named(label):
  dataset = streamed()
  dataset.records['train'][5]['label'] = label
  with pytest.raises(
    data.DatasetError, match=rf'label of record 5 is {label}, outside \[0, 4\)'
  ):
    next(dataset.training([30], 0, 0, ONE))


@pytest.mark.slow
def test_a_run_counts_them_also_when_it_is_resumed(tmp_path, monkeypatch):
  monkeypatch.setattr(data, 'load', lambda *args, **kwargs: corrupt(True))
  fields = {'data.undecodable': 'skip', 'data.name': 'imagenet2012'}
  config = streamed_config(**fields)
  whole = loop.train(config, str(tmp_path / 'whole'))
  assert whole['undecodable'] > 0
  assert whole['test']['count'] == 10

  def log(line):
    if 'step 6/' in line:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    loop.train(config, str(tmp_path / 'parts'), log=log)
  again = loop.train(config, str(tmp_path / 'parts'))
  assert again['undecodable'] == whole['undecodable']
  assert again['test'] == whole['test']
  assert runs.digest(tmp_path / 'parts', 6) == runs.digest(
    tmp_path / 'whole', 6
  )
  assert (
    int(read_csv(tmp_path / 'whole' / 'train.csv')[-1]['undecodable'])
    == (whole['undecodable'])
  )


def test_stopping_says_which_and_what_to_do():
  with pytest.raises(
    data.DatasetError, match=r"cannot be decoded .*data\.undecodable='skip'"
  ):
    next(corrupt(False).training([30], 0, 0, ONE))
