"""python -m margin_jax.analyze on runs of the digits."""

import csv
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

from margin_jax import analyze, data, linearized, mms_scores, signed_margins
from margin_jax import config as config_lib
from margin_jax.analyze import plots, report
from margin_jax.analyze.__main__ import main
from margin_jax.data import entailment, images, splits, tokenization, tokens
from margin_jax.train import evaluation, loop, runs
from tests import helpers
from tests.datasets import VOCAB

NOISY = {
  'selection.rule': 'uniform', 'mmr.alpha': 0.0, 'data.label_noise': 0.1,
  'batch_size': 64, 'steps': 200, 'log_every': 200, 'eval_every': 200,
  'checkpoint_every': 40, 'keep_every': 40,
}  # fmt: skip


def read(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run on digits of which a tenth has wrong labels, analyzed."""
  workdir = tmp_path_factory.mktemp('noisy')
  config = helpers.small_config(**NOISY)
  loop.train(config, str(workdir), log=lambda line: None)
  lines = []
  folder = analyze.analyze(
    str(workdir), layer_names=('input', 'conv2', 'features'), log=lines.append
  )
  return workdir, folder, lines


def column(rows, name):
  return np.array([float(row[name]) for row in rows])


def restored(workdir, step):
  """Returns dataset, step spec and state of a run."""
  with runs.open_run(workdir, [step]) as run:
    return run.dataset, run.spec, run.restore(step)


@pytest.mark.slow
def test_flipped_labels_have_the_most_negative_margins(run):
  """Precision at least 0.9 at recall 0.8."""
  rows = read(run[1] / 'train.csv')
  truth = data.load('digits', validation_examples=180).splits['train']['label']
  flipped = column(rows, 'label') != truth[column(rows, 'index').astype(int)]
  assert flipped.sum() == round(0.1 * 1257)
  found = np.flatnonzero(flipped)
  wanted = int(np.ceil(0.8 * len(found)))
  assert wanted / (found[wanted - 1] + 1) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize('split', ['train', 'test'])
def test_every_example_is_ranked_with_its_own_margin(run, split):
  workdir, folder, _ = run
  rows = read(folder / f'{split}.csv')
  dataset, spec, state = restored(workdir, 200)
  examples = dataset.splits[split]
  logits, _ = spec.model.apply(
    {'params': state.params}, dataset.prepare(examples['inputs']), train=False
  )
  kernel = state.params['head']['kernel']
  index = column(rows, 'index').astype(int)
  assert sorted(index) == [*range(len(examples['label']))]
  margin = column(rows, 'margin')
  assert (np.diff(margin) >= 0).all()
  np.testing.assert_array_equal(column(rows, 'label'), examples['label'][index])
  np.testing.assert_array_equal(
    column(rows, 'prediction'), np.argmax(logits, 1)[index]
  )
  signed = signed_margins(logits, kernel, examples['label'])
  np.testing.assert_allclose(margin, signed[index], 1e-4, 1e-5)
  mms = mms_scores(logits, kernel)[index]
  np.testing.assert_allclose(column(rows, 'mms'), mms, 1e-4, 1e-5)
  # At the features they are margin and mms: the linearization is exact there.
  at_features = linearized.at_layers(
    spec.model,
    {'params': state.params},
    dataset.prepare(examples['inputs']),
    ('features',),
  )
  linear = linearized.layer_margins(*at_features, examples['label'])
  np.testing.assert_allclose(linear['features'][index], margin, 1e-3, 1e-5)
  assert not {'margin at features', 'mms at features'} & {*rows[0]}
  assert (column(rows, 'mms at input') >= 0).all()


@pytest.mark.slow
def test_distributions_are_of_every_checkpoint_that_is_kept(run):
  workdir, folder, lines = run
  rows = read(folder / 'distributions.csv')
  assert {row['step'] for row in rows} == {'40', '80', '120', '160', '200'}
  assert {row['quantity'] for row in rows} == {
    'margin', 'mms', 'margin/feature_norm', 'normalized margin at input',
    'normalized margin at conv2', 'normalized margin at features',
  }  # fmt: skip
  last = [row for row in rows if row['step'] == '200']
  dataset, spec, state = restored(workdir, 200)
  train = dataset.splits['train']
  _, features = spec.model.apply(
    {'params': state.params}, dataset.prepare(train['inputs']), train=False
  )
  ranked = column(read(folder / 'train.csv'), 'margin')
  variation = np.trace(np.cov(np.asarray(features, np.float64).T, bias=True))
  radius = np.linalg.norm(features, axis=1).max()
  middle = np.quantile(ranked, 0.5, method='inverted_cdf')
  for quantity, expected in (
    ('margin', middle),
    ('margin/feature_norm', middle / radius),
    ('normalized margin at features', middle / np.sqrt(variation)),
  ):
    (row,) = (
      row
      for row in last
      if row['quantity'] == quantity and row['split'] == 'train'
    )
    assert float(row['q50']) == pytest.approx(expected, rel=1e-3)
    assert float(row['examples']) == 1257
    assert float(row['negative']) == pytest.approx(np.mean(ranked < 0))
  assert any('step 200' in line for line in lines)


@pytest.mark.slow
def test_signatures_and_the_plot_are_written(run):
  rows = read(run[1] / 'signatures.csv')
  assert len(rows) == 5 * 2 * 3 * 2  # steps, splits, layers, kinds
  for row in rows:
    numbers = column([row], 's1'), column([row], 's5')
    assert 0 < numbers[0] < numbers[1]
  plot = (run[1] / 'margins.png').read_bytes()
  assert plot.startswith(b'\x89PNG')
  assert len(plot) > 20_000


@pytest.mark.slow
def test_the_most_negative_are_shown(run, monkeypatch, tmp_path):
  for split in ('train', 'test'):
    path = run[1] / f'most_negative_{split}.png'
    assert path.read_bytes().startswith(b'\x89PNG')
    assert path.with_suffix('.pdf').exists()
  shown = []
  monkeypatch.setattr(plots, 'most_negative', lambda *args: shown.append(args))
  analyze.analyze(
    str(run[0]), steps=[200], examples=50, out=str(tmp_path),
    log=lambda line: None,
  )  # fmt: skip
  dataset = data.load('digits', validation_examples=180)
  for (_, split, shown_images, rows, names), name in zip(
    shown, ('train', 'test'), strict=True
  ):
    assert split == name
    assert [*names] == [str(i) for i in range(10)]
    assert len(shown_images) == len(rows) == 32
    assert rows[0]['margin'] <= rows[1]['margin'] <= rows[31]['margin']
    whole = dataset.splits[split]['inputs']
    for image, row in zip(shown_images, rows, strict=True):
      np.testing.assert_array_equal(image, whole[row['index']])


def test_sentences_are_a_table(tmp_path):
  pairs = entailment.pairs()['test'][:2]
  inputs = tokenization.encode([x[:2] for x in pairs], entailment.VOCAB, 40)
  assert tokenization.decode(inputs, entailment.VOCAB) == [
    tuple(x[:2]) for x in pairs
  ]
  vocab = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', 'un', '##known', 'a|b')
  ids = np.array([[2, 4, 5, 6, 3]])
  encoded = tokens.pack(ids, 0 * ids, 0 * ids + 1)
  texts = tokenization.decode(encoded, vocab)
  assert texts == [('unknown a|b',)]
  row = {'margin': -1.5, 'label': 0, 'prediction': 1, 'index': 7}
  table = report._sentence_table('test', texts, [row], ('yes', 'no'))
  assert table[-1] == '| -1.5 | yes | no | 7 | unknown a\\|b |'


def measured_by_hand(rows, label):
  """What a `Measurer` returns, with margins that ascend."""
  one = np.ones(len(rows), np.float32)
  margin = np.arange(len(rows), dtype=np.float32) - 3
  return {
    'row': rows, 'label': label, 'prediction': 0 * label, 'margin': margin,
    'mms': margin, 'feature_norm': one, 'margin/features': margin,
    'mms/features': margin, 'total_variation/features': 1.0,
  }  # fmt: skip


def write_report(dataset, folder, words=()):
  """Reports every example of the splits that are shown, and reads the rows."""
  table = report.Report(dataset, ('features',), 'title', words)
  for split in ('train', 'test'):
    count = dataset.counts[split]
    label = np.arange(count) % dataset.num_classes
    table.add(1, split, measured_by_hand(np.arange(count), label))
  folder.mkdir()
  table.write(folder)
  return {x: read(folder / f'{x}.csv') for x in ('train', 'test')}


def write_images(root):
  """Writes a folder of images without a test split, each its own grey."""
  for i in range(40):
    path = root / ('cat', 'dog')[i % 2] / f'{i:02}|.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (5, 5), 5 * i).save(path)


def grey_of(root, row):
  (image,) = images.read_files([root / row['file']], 4)
  return image[0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize('streamed', [False, True])
def test_images_of_a_folder_are_named_in_the_tables(tmp_path, streamed):
  root = tmp_path / 'x'
  write_images(root)
  odd = os.fsencode(root / 'cat') + b'/\xff.png'  # which no table can hold
  Image.new('L', (5, 5), 250).save(tmp_path / 'y.png')
  os.rename(tmp_path / 'y.png', odd)
  dataset = data.load(
    f'folder:{root}', image_size=4, workers=0, streamed=streamed,
    validation_examples=5, fraction=0.5, label_noise=0.3,
  )  # fmt: skip
  for split, rows in write_report(dataset, tmp_path / 'out').items():
    inputs = dataset.inputs(split, np.arange(dataset.counts[split]))
    positions = {x: i for i, x in enumerate(dataset.rows[split].tolist())}
    assert len(rows) == len(positions)
    for row in rows:
      names = {'0': 'cat', '1': 'dog'}
      assert row['label_name'] == names[row['label']]
      assert row['prediction_name'] == 'cat'
      grey = inputs[positions[int(row['index'])]][0, 0, 0]
      if row['file'].startswith('cat/\\'):
        assert row['file'] == r'cat/\udcff.png'
        assert grey == 250
      else:
        assert grey == grey_of(root, row)


@pytest.mark.slow
def test_the_files_of_data_that_moved_are_named(tmp_path):
  write_images(tmp_path / 'before/x')
  fields = {
    'data.name': 'folder:x', 'data.data_dir': str(tmp_path / 'before'),
    'data.image_size': 8, 'data.validation_examples': 3, 'steps': 10,
    'pool_size': 16,
  }  # fmt: skip
  helpers.train(tmp_path / 'run', **fields)
  (tmp_path / 'before').rename(tmp_path / 'after')
  folder = analyze.analyze(
    str(tmp_path / 'run'), data_dir=str(tmp_path / 'after'), log=lambda _: None
  )
  for split in ('train', 'test'):
    for row in read(folder / f'{split}.csv'):
      assert row['file'].startswith(f'{row["label_name"]}/')
      assert (tmp_path / 'after/x' / row['file']).is_file()


@pytest.mark.parametrize('split_files', [False, True])
def test_sentences_of_a_csv_file_have_the_line_that_they_begin_at(
  tmp_path, split_files
):
  text = 'text,label\n"the\r\n\ncafe",yes\n\n'
  text += ''.join(f'the {x},{x}\n' for x in 5 * ['yes', 'no'])
  names = ['train.csv', 'test.csv'] if split_files else ['all.csv']
  for name in names:
    (tmp_path / name).write_bytes(text.encode())
  vocabulary = tmp_path / 'vocab.txt'
  vocabulary.write_text('\n'.join(VOCAB) + '\n', encoding='utf-8')
  path = tmp_path if split_files else tmp_path / 'all.csv'
  dataset = data.load(
    f'csv:{path}', vocabulary=str(vocabulary), max_length=8, buckets=(),
    validation_examples=2, label_noise=0.5,
  )  # fmt: skip
  tables = write_report(dataset, tmp_path / 'out', VOCAB)
  lines = {x: [int(row['line']) for row in tables[x]] for x in tables}
  whole = [2, *range(6, 16)]
  if split_files:
    assert lines == {'train': whole[:-2], 'test': whole}
  else:
    together = {*lines['train'], *lines['test']}
    assert together < {*whole}
    assert len(together) == len(whole) - 2
    own = splits.hold_out(np.array([1, *5 * [1, 0]]))
    assert lines['test'] == np.array(whole)[own['test']].tolist()
  for row in tables['train']:
    assert row['label_name'] == ('no', 'yes')[int(row['label'])]
  table = (tmp_path / 'out/most_negative_train.md').read_text()
  assert f'| {lines["train"][0]} | the ' in table
  assert '| index | line | sentences |' in table


@pytest.mark.slow
def test_the_number_of_devices_does_not_matter(run, tmp_path):
  """The run was analyzed on all eight; devices=1 is the saved config's."""
  assert jax.device_count() == 8
  dataset, spec, state = restored(run[0], 200)
  label = dataset.splits['train']['label']
  logits, _ = spec.model.apply(
    {'params': state.params},
    dataset.prepare(dataset.splits['train']['inputs']),
    train=False,
  )
  expected = float(np.mean(np.argmax(logits, 1) == label))
  rows = read(run[1] / 'distributions.csv')
  found = {row['accuracy'] for row in rows[-6 * 2 : -6]}
  assert [float(x) for x in found] == [pytest.approx(expected, abs=1e-3)]


@pytest.mark.slow
def test_part_of_a_run_elsewhere(run, tmp_path):
  folder = analyze.analyze(
    str(run[0]), steps=[80], examples=50, out=str(tmp_path / 'out'),
    log=lambda line: None,
  )  # fmt: skip
  assert len(read(folder / 'test.csv')) == 50
  rows = read(folder / 'distributions.csv')
  assert {row['step'] for row in rows} == {'80'}
  assert {row['quantity'] for row in rows} >= {'normalized margin at input'}


@pytest.mark.slow
def test_index_is_the_row_of_the_original_training_split(tmp_path):
  """With a fraction of it, the CSV still says which images they were."""
  fields = {**NOISY, 'data.fraction': 0.1, 'steps': 40, 'eval_every': 40}
  fields |= {'log_every': 40}
  config = helpers.small_config(**fields)
  loop.train(config, str(tmp_path), log=lambda line: None)
  folder = analyze.analyze(str(tmp_path), log=lambda line: None)
  rows = read(folder / 'train.csv')
  whole = data.load('digits', validation_examples=180).splits['train']['label']
  label = column(rows, 'label')
  wrong = label != whole[column(rows, 'index').astype(int)]
  assert len(rows) == round(0.1 * 1257)
  assert wrong.sum() == round(0.1 * len(rows))


@pytest.mark.slow
def test_a_rule_of_ones_own_is_no_obstacle(tmp_path):
  config = helpers.small_config(steps=10)
  loop.train(
    config,
    str(tmp_path),
    rule=lambda scored: scored.logits[:, 0],
    log=lambda line: None,
  )
  folder = analyze.analyze(str(tmp_path), examples=20, log=lambda line: None)
  assert (folder / 'margins.png').exists()


def test_the_layers_variation_is_exact_far_from_zero():
  """E x^2 - (E x)^2 in float32 would be off by more than itself."""
  this = helpers.Setup()
  bias = this.first.params['hidden']['bias'] + 1e3
  hidden = {**this.first.params['hidden'], 'bias': bias}
  variables = {
    'params': {**this.first.params, 'hidden': hidden}, 'batch_stats': {}
  }  # fmt: skip
  measurer = evaluation.Measurer(
    this.spec,
    this.dataset.chunks(this.devices, ('test',), 100, whole=True),
    {'hidden': (1, 128), 'features': (1, 128)},
  )
  inputs = this.dataset.prepare(this.dataset.splits['test']['inputs'])
  found = linearized.activations_at(
    this.spec.model, variables, inputs, ('hidden',)
  )
  wide = np.asarray(found['hidden'], np.float64)
  expected = np.trace(np.cov(wide.T, bias=True))
  measured = measurer('test', this.devices.replicate(variables))
  assert measured['total_variation/hidden'] == pytest.approx(expected, 1e-3)


@pytest.mark.slow
def test_a_run_is_analyzed_on_devices_that_do_not_divide_its_batch(tmp_path):
  assert jax.device_count() == 8
  config = helpers.small_config(batch_size=6, steps=10)
  loop.train(config, str(tmp_path), log=lambda line: None)
  folder = analyze.analyze(str(tmp_path), examples=20, log=lambda line: None)
  assert (folder / 'train.csv').exists()


@pytest.mark.slow
def test_mistakes_are_one_line(run, tmp_path, capsys):
  file = tmp_path / 'file'
  file.touch()
  for argv, words in (
    (['--workdir', str(tmp_path)], 'holds no checkpoints: train it first'),
    (['--workdir', str(run[0]), '--steps=33'], r'of step\(s\) \[33\]; it has'),
    (
      ['--workdir', str(run[0]), '--layers=conv9'],
      "layers: no layer is called 'conv9'; .*'conv2'",
    ),
    (['--workdir', str(run[0]), '--examples=0'], 'examples=0 is not allowed'),
    (
      ['--workdir', str(run[0]), '--steps=last'],
      "must be integers, as .*'last'",
    ),
    (['--workdir', str(run[0]), '--out', str(file)], 'out=.*File exists'),
  ):
    with pytest.raises(SystemExit, match=words):
      main(argv)
  assert [*tmp_path.iterdir()] == [file]


def test_a_config_comes_back_from_json():
  config = helpers.small_config(**NOISY)
  saved = json.loads(json.dumps(config_lib.as_json(config)))
  again = config_lib.from_json(saved)
  assert config_lib.flatten(again) == config_lib.flatten(config)
  with pytest.raises(config_lib.ConfigError, match='bogus=1 is unknown'):
    config_lib.from_json({'bogus': 1})
