"""The five commands: help, mistakes, what is said first and last."""

import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from margin_jax import (
  commands,
  config_files,
  cpu,
  models,
  prepare,
  schedules,
  terminal,
)
from margin_jax import config as config_lib
from margin_jax.config import FIELDS, ConfigError
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop, process, schema
from margin_jax.train import setup as setup_lib
from tests.helpers import ROOT, small_config, train

DIGITS = '--config=configs/digits.py'
WORKDIR = '--workdir={folder}/new'
STARTED = (DIGITS, WORKDIR)


@pytest.fixture(autouse=True)
def _here(monkeypatch):
  """In the repository, in a process that stays as it is."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, 'argv', ['train'])
  monkeypatch.setattr(cpu, 'tune', lambda: None)
  monkeypatch.setattr(devices_lib, 'use_compilation_cache', lambda: None)
  monkeypatch.setattr(process, 'silence_libraries', lambda: None)


def main(command):
  """The main function of a command."""
  module = importlib.import_module(commands.MODULES[command])
  if not hasattr(module, 'main'):
    module = importlib.import_module(f'{module.__name__}.__main__')
  return module.main


def error_of(command, *arguments):
  """The one line that a mistaken command ends with."""
  with pytest.raises(SystemExit) as caught:
    main(command)(list(arguments))
  message = str(caught.value)
  assert message.startswith('error: ')
  assert len(message.splitlines()) == 1
  return message


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A file, a trained run, and one of a comparison."""
  path = tmp_path_factory.mktemp('commands')
  (path / 'file').touch()
  (path / 'no_config.py').write_text('x = 1\n')
  (path / 'no_argument.py').write_text(
    'from margin_jax.config import default\n\n\ndef get_config():\n'
    '  config = default()\n  return config\n'
  )
  text = (path / 'no_argument.py').read_text()
  (path / 'typo.py').write_text(text.replace('return', 'return ='))
  (path / 'field.py').write_text(
    text.replace('return', 'config.optimiser.name = "adam"\n  return')
  )
  (path / 'foreign.py').write_text(
    'import ml_collections\n\n\ndef get_config():\n'
    "  return ml_collections.ConfigDict({'lr': 1})\n"
  )
  model = 'config.model.name = "model_of_a_file"\n  return'
  (path / 'own.py').write_text(
    'import margin_jax\nfrom margin_jax.models.cnn import CNN\n'
    + text.replace('return', model)
    + "\n\nmargin_jax.register_model('model_of_a_file', CNN)\n"
  )
  for name in ('cat/1', 'cat/2', 'dog/1', 'dog/2', 'dog/3', 'dog/4'):
    image = path / 'images' / f'{name}.png'
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(image)
  train(path / 'run', steps=2)
  train(path / 'comparison' / 'runs' / 'mms' / 'seed_0', steps=2)
  return path


MISTAKES = [
  ('train', (), '--config and --workdir must be given; '),
  ('train', (DIGITS,), '--workdir must be given'),
  (
    'train', ('--config=configs/digts.py', WORKDIR),
    'no file configs/digts.py; did you mean configs/digits.py',
  ),
  ('train', ('--config=configs', WORKDIR), 'is a folder; it has cifar100_'),
  ('train', ('--config=README.md', WORKDIR), 'README.md is not a Python file'),
  ('train', ('--config={folder}/no_config.py', WORKDIR), 'has no get_config'),
  (
    'train', ('--config={folder}/no_argument.py:mms', WORKDIR),
    "takes no argument, but 'mms' is given",
  ),
  ('train', ('--config={folder}/typo.py', WORKDIR), 'line 6: invalid syntax'),
  (
    'train', ('--config={folder}/field.py', WORKDIR),
    "line 6: 'optimiser.name' is not a config field; did you mean "
    'optimizer.name',
  ),
  (
    'train', ('--config={folder}/foreign.py', WORKDIR),
    "has no field 'seed': start from margin_jax.config.default()",
  ),
  (
    'train', ('--config={folder}/foreign.py', '--help'),
    "has no field 'seed': start from margin_jax.config.default()",
  ),
  (
    'train', (*STARTED, '--config.scale_schedule=maybe', '--config.steps=9'),
    "scale_schedule='maybe' is not allowed",
  ),
  (
    'train', (f'{DIGITS}:memroy', WORKDIR),
    "selection='memroy' must be one of ('fresh', 'memory', 'proxy'); fresh: "
    'MMS of a pool that each step scores; memory: soft pruning by remembered '
    'margins, without a pool; proxy: MMS of a pool that a small model scores; '
    'did you mean selection=memory?',
  ),
  (
    'train', ('--config=configs/cifar10_resnet44.py:early_drop', WORKDIR),
    'did you mean regime=early_drop?',
  ),
  (
    'train', ('--config=configs/cifar10_resnet44.py:mms,early_drop', WORKDIR),
    "'early_drop' must be field=value; did you mean regime=early_drop?",
  ),
  (
    'train', ('--config=configs/cifar10_resnet44.py:mms,regimes=x', WORKDIR),
    "argument 'regimes' is unknown; there are ('method', 'regime', 'selection',"
    " 'penalty'); did you mean regime?",
  ),
  (
    'train', ('--config=configs/mnist_large_margin.py:epsilon=0.1', WORKDIR),
    'epsilon=0.1 needs attack=fgsm or attack=',
  ),
  (
    'train', ('--config=configs/mnist_large_margin.py:steps=many', WORKDIR),
    "steps='many' must be of type int",
  ),
  (
    'train', (*STARTED, '-config.steps', '50'),
    'unknown flag -config.steps; did you mean --config.steps=50?',
  ),
  (
    'train', (*STARTED, 'steps=50'),
    "unexpected argument 'steps=50'; did you mean --config.steps=50?",
  ),
  (
    'train', (f'{DIGITS}:mms', WORKDIR),
    'fresh: MMS of a pool that each step scores; memory: soft pruning',
  ),
  (
    'train', (*STARTED, '--config.data.name={folder}'),
    "TFDS of a dataset of images with one label each; did you mean 'folder:"
    "{folder}'?",
  ),
  (
    'train', (*STARTED, '--config.data.name=reviews.csv'),
    "did you mean 'csv:reviews.csv'?",
  ),
  (
    'train', (*STARTED, '--config.data.name=folder:{folder}/images/cat'),
    'holds images itself: name the folder above',
  ),
  (
    'train', (*STARTED, '--config.data.name=folder:{folder}/images',
              '--config.data.validation_examples=1'),
    'at most 3, the number of training examples without those of '
    'data.validation_examples=1',
  ),
  (
    'train', (*STARTED, '--config.optimizer.learning_rates=0.1'),
    'must be 2 value(s), one more than optimizer.boundaries=(700,) has',
  ),
  ('train', (*STARTED, '--steps=100'), 'did you mean --config.steps=100?'),
  (
    'train', (*STARTED, '--lr=0.1'),
    'did you mean --config.optimizer.learning_rates=0.1?',
  ),
  (
    'train', (DIGITS, '--wokdir=/tmp/x'),
    'unknown flag --wokdir; did you mean --workdir=/tmp/x?',
  ),
  (
    'train', ('configs/digits.py', WORKDIR),
    "unexpected argument 'configs/digits.py'; did you mean "
    '--config=configs/digits.py?',
  ),
  (
    'train', (*STARTED, '--config.optimizer.lr=0.1'),
    "'optimizer.lr' is not a config field; did you mean "
    '--config.optimizer.learning_rates? The fields of optimizer are name, ',
  ),
  (
    'train', (*STARTED, '--config.optimizer=adam'),
    "'optimizer' is a group of config fields: name, learning_rates, ",
  ),
  (
    'train', (*STARTED, '--config.stepz=3'),
    "'stepz' is not a config field; did you mean --config.steps?",
  ),
  (
    'train', (*STARTED, '--config.selektion.rule=mms'),
    'did you mean --config.selection.rule?',
  ),
  (
    'train', (*STARTED, '--config.steps=many'),
    "steps='many' is not allowed: it must be an integer, at least 1",
  ),
  ('train', (*STARTED, '--config.steps=1.5'), 'it must be an integer'),
  ('train', (*STARTED, '--config.steps'), '--config.steps needs a value'),
  (
    'train', (*STARTED, '--config.selection.rule=signed_margn'),
    "did you mean 'signed_margin'?",
  ),
  (
    'train', (*STARTED, '--config.model.name=resnet9'),
    "model.name='resnet9' is not allowed",
  ),
  ('train', (*STARTED, '--process_id=1'), 'need --coordinator'),
  (
    'train', (*STARTED, '--process_id=one'),
    "--process_id: must be an integer, got 'one'",
  ),
  ('train', (DIGITS, '--workdir={folder}/file'), "file' is not allowed: it is"),
  (
    'train', (DIGITS, '--workdir={folder}/file/run'),
    "/file/run': the folder cannot be made (Not a directory)",
  ),
  (
    'train', (DIGITS, '--workdir={folder}/comparison'),
    "comparison': it holds a comparison; name another folder to train",
  ),
  (
    'compare', (DIGITS, '--workdir={folder}/run'),
    "run': it holds a run; name another folder to compare",
  ),
  (
    'train',
    ('--config=configs/cifar10_resnet44.py:mms', WORKDIR,
     '--config.data.data_dir={folder}'),
    'margin_jax.prepare cifar10',
  ),
  ('compare', (DIGITS,), '--workdir must be given'),
  ('compare', (*STARTED, '--budget=hours'), "invalid choice: 'hours'"),
  ('compare', (*STARTED, '--seeds=three'), "an integer, got 'three'"),
  ('compare', (*STARTED, '--seeds=0'), 'seeds=0 is not allowed'),
  ('compare', (*STARTED, '--methods=uniform,,mms'), 'a name is empty'),
  ('compare', (*STARTED, '--methods=entrop'), 'did you mean entropy?'),
  (
    'compare', (*STARTED, '--methods=mms+reus=5'),
    'did you mean selection.reuse?',
  ),
  (
    'compare', (*STARTED, '--sweep=mmr.alfa=1,2'),
    "sweep: 'mmr.alfa=1,2': 'mmr.alfa' is not a config field; did you mean "
    'mmr.alpha',
  ),
  ('compare', (*STARTED, '--baseline=plain'), "baseline='plain' is not"),
  (
    'compare', (*STARTED, '--methods', 'mms', 'uniform'),
    "'uniform'; write --FLAG=VALUE, and a list with commas but no spaces",
  ),
  (
    'compare', (*STARTED, '--methods=mms uniform'),
    'did you mean mms,uniform?',
  ),
  (
    'compare', (*STARTED, '--methods=mms+mmr'),
    "'mmr' is a group of config fields: alpha, ",
  ),
  ('compare', (*STARTED, '--seed=3'), 'did you mean --seeds=3?'),
  ('compare', (*STARTED, '--methods=MMS'), 'did you mean mms?'),
  (
    'compare', (*STARTED, '--methods=mmr'),
    "'mmr' is a group of config fields, which follow a rule: "
    'uniform+mmr.alpha=VALUE',
  ),
  (
    'compare', (*STARTED, '--methods=mmr.alpha=1e-4'),
    'fields follow a rule: uniform+mmr.alpha=1e-4',
  ),
  ('compare', (*STARTED, '--method=mms'), 'did you mean --methods=mms?'),
  ('analyze', (), '--workdir must be given'),
  (
    'analyze', ('--workdir={folder}/images',),
    'holds no checkpoints: train it first with python -m margin_jax.train',
  ),
  (
    'analyze', ('--workdir={folder}/runn',),
    "runn' does not exist; did you mean {folder}/run?",
  ),
  (
    'analyze', ('--workdir={folder}/run/analysis',),
    'is inside a run; did you mean {folder}/run?',
  ),
  (
    'analyze', ('--workdir={folder}/run/checkpoints/2',),
    'is inside a run; did you mean {folder}/run?',
  ),
  (
    'analyze', ('--workdir={folder}/comparison/runs/mms',),
    'name one of its runs: {folder}/comparison/runs/mms/seed_0',
  ),
  ('analyze', ('--workdir={folder}/file',), 'it is a file'),
  (
    'analyze', ('--workdir={folder}/comparison',),
    'it is a comparison; name one of its runs: '
    '{folder}/comparison/runs/mms/seed_0',
  ),
  (
    'analyze', ('--workdir={folder}/run', '--step=2'),
    'did you mean --steps=2?',
  ),
  (
    'analyze', ('--workdir={folder}/run', '--steps=last'),
    "must be integers, as in 500,1000, got 'last'",
  ),
  ('analyze', ('--workdir={folder}/run', '--steps=7'), 'it has [2]'),
  ('analyze', ('--workdir={folder}/run', '--layers=conv9'), "'conv9'"),
  (
    'analyze', ('--workdir={folder}/run', '--config=configs/digts.py'),
    'did you mean configs/digits.py',
  ),
  ('analyze', ('--workdir={folder}/run', '-x'), 'unknown flag -x; there are'),
  ('export', ('--workdir={folder}/run',), '--out must be given'),
  (
    'export', ('--workdir={folder}/run', '--out={folder}/out'),
    'a BERT to be exported',
  ),
  (
    'export', ('--workdir={folder}/comparison', '--out={folder}/out'),
    'it is a comparison',
  ),
  ('prepare', (), 'NAME must be given'),
  ('prepare', ('cifar10', '/tmp'), "'/tmp'; did you mean --data_dir=/tmp?"),
  ('prepare', ('cifar',), 'did you mean cifar10 or cifar100?'),
  ('prepare', ('digits',), 'needs no preparing: it comes with scikit-learn'),
  ('prepare', ('folder:{folder}',), 'needs no preparing'),
  ('prepare', ('CIFAR10',), 'did you mean cifar10?'),
  ('prepare', ('rte',), 'did you mean glue/rte?'),
  ('prepare', ('kokos',), "no dataset is called 'kokos'; there are "),
  (
    'prepare', ('cifar10', '--dir=/tmp'),
    'unknown flag --dir; there are --data_dir, --help',
  ),
]  # fmt: skip


@pytest.mark.parametrize(
  ('command', 'arguments', 'line'),
  MISTAKES,
  ids=[f'{command} {" ".join(words)}' for command, words, _ in MISTAKES],
)
def test_a_mistake_is_one_helpful_line(folder, command, arguments, line):
  arguments = [word.format(folder=folder) for word in arguments]
  assert line.format(folder=folder) in error_of(command, *arguments)
  assert not (folder / 'new').exists()
  assert not (folder / 'out').exists()


@pytest.mark.parametrize('name', commands.MODULES)
def test_help_says_what_is_required(name, capsys):
  with pytest.raises(SystemExit) as caught:
    main(name)(['--help'])
  assert not caught.value.code
  text = capsys.readouterr().out
  assert text.startswith(f'usage: python -m {commands.MODULES[name]} ')
  required = text.partition('required:\n')[2].partition('\n\n')[0]
  assert ('NAME' if name == 'prepare' else '--workdir') in required
  assert ('--config' in required) == (name in ('train', 'compare'))
  if '--config' in required:
    assert f'{commands.MODULES[name]} --config=configs/digits.py --help' in text
  if name == 'prepare':
    assert 'cifar10, ' in text


def test_help_of_a_config_has_its_arguments_and_all_fields(capsys):
  config = 'configs/mnist_large_margin.py:small=0.1'
  with pytest.raises(SystemExit) as caught:
    main('train')([f'--config={config}', '--help'])
  assert not caught.value.code
  text = capsys.readouterr().out
  assert re.search(r'^  loss=large_margin  +one of .*cross_entropy', text, re.M)
  assert re.search(r'epsilon=0.1 .*; needs attack=fgsm or ', text)
  heads = re.findall(r'^([* ]) --config\.([\w.]+)=(.*)$', text, re.MULTILINE)
  assert [name for _, name, _ in heads] == [*FIELDS]
  assert ('*', 'data.fraction', '0.1') in heads
  assert (' ', 'seed', '0') in heads
  words = ' '.join(text.split())
  for field in FIELDS.values():
    assert ' '.join(field.meaning.split()) in words


def test_console_scripts_are_named_where_one_is_used(monkeypatch):
  words = 'analyze', '--workdir=/tmp/my run'
  expected = "python -m margin_jax.analyze '--workdir=/tmp/my run'"
  assert commands.line(*words) == expected
  monkeypatch.setattr(sys, 'argv', ['/usr/bin/margin-train'])
  assert commands.line(*words) == "margin-analyze '--workdir=/tmp/my run'"


def test_nothing_slow_is_imported_before_the_first_line():
  modules = [
    module if module.endswith(('export', 'prepare')) else f'{module}.__main__'
    for module in commands.MODULES.values()
  ]
  code = (
    f'import sys, {", ".join(modules)}\n'
    "print([x for x in ('jax', 'flax', 'matplotlib') if x in sys.modules])"
  )
  process = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
    check=True,
  )  # fmt: skip
  assert process.stdout == '[]\n'


def test_waiting_is_a_line_where_there_is_no_terminal(capsys):
  with terminal.wait('loading JAX'):
    print('inside')
  with terminal.wait('measuring', line=False):
    pass
  assert capsys.readouterr().out == 'loading JAX ...\ninside\n'


@pytest.mark.parametrize(
  ('options', 'workdir', 'encoding'),
  [(['-OO'], 'run', 'utf-8'), ([], 'tortoise_\U0001f422', 'ascii')],
)
@pytest.mark.slow
def test_it_ends_well_without_docstrings_and_without_letters(
  tmp_path, options, workdir, encoding
):
  command = [
    sys.executable, *options, '-m', 'margin_jax.train', DIGITS,
    '--config.steps=2', f'--workdir={tmp_path / workdir}',
    *(f'--config.{x}_every=2' for x in ('log', 'eval', 'checkpoint')),
  ]  # fmt: skip
  process = subprocess.run(
    command,
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONIOENCODING': encoding},
  )
  assert process.returncode == 0, process.stderr
  assert 'next:    python -m margin_jax.analyze' in process.stdout


def test_interrupted_and_cut_commands_have_no_traceback(capfd):
  @commands.command
  def interrupted(argv):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as caught:
    interrupted([])
  assert caught.value.code == 130
  process = subprocess.run(
    f'{sys.executable} -m margin_jax.train --help | head -n 1',
    shell=True, capture_output=True, text=True, cwd=ROOT, check=True,
  )  # fmt: skip
  assert process.stdout.startswith('usage: ')
  assert not process.stderr


# A complete run.


def test_a_complete_run_needs_neither_data_nor_devices(
  folder, monkeypatch, capsys
):
  monkeypatch.setattr(setup_lib, 'load', None)
  workdir = folder / 'run'
  lines = []
  result = loop.train(small_config(steps=2), str(workdir), log=lines.append)
  written = json.loads((workdir / 'result.json').read_text())
  assert result.items() <= written.items()
  assert len(lines) == 1
  assert lines[0].startswith('already complete: test accuracy ')


def test_train_ends_with_the_next_command(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(loop, 'train', lambda *args, **kwargs: {})
  main('train')([DIGITS, f'--workdir={tmp_path}'])
  assert capsys.readouterr().out.splitlines() == [
    'loading JAX and the config ...',
    f'results: {tmp_path}',
    f'next:    python -m margin_jax.analyze --workdir={tmp_path}',
  ]


def test_the_next_command_names_the_file_that_registers_the_model(
  folder, monkeypatch, capsys
):
  monkeypatch.setattr(loop, 'train', lambda *args, **kwargs: {})
  path = folder / 'own.py'
  try:
    main('train')([f'--config={path}', f'--workdir={folder}/own'])
  finally:
    models.REGISTERED.pop('model_of_a_file', None)
  following = capsys.readouterr().out.splitlines()[-1]
  assert following.endswith(f' --workdir={folder}/own --config={path}')


@pytest.mark.slow
def test_analyze_ends_with_the_next_command(folder, tmp_path, capsys):
  words = f'--workdir={folder / "run"} --out={tmp_path} --examples=20'
  main('analyze')([*words.split(), '--layers=features'])
  *_, train, test, results, following = capsys.readouterr().out.splitlines()
  for split, text in (('train', train), ('test', test)):
    assert text.startswith(f'{split}: ')
    assert ' of 20 margins are negative' in text
    path = pathlib.Path(text.split()[-1])
    assert path == tmp_path / f'most_negative_{split}.png'
    assert path.is_file()
  assert results.startswith(f'results: {tmp_path}/margins.png')
  python, *options, code = shlex.split(following.removeprefix('next:    '))
  assert (python, *options) == ('python', '-i', '-c')
  names = {}
  exec(code, names)
  assert names['trained'].step == 2
  assert capsys.readouterr().out.startswith('Trained(')


@pytest.mark.parametrize('name', prepare.names())
def test_the_command_after_prepare_trains_on_the_dataset(name):
  words = prepare.next_command(name, '/tmp/data').split()
  fields = dict(
    x.removeprefix('--config.').split('=', 1)
    for x in words
    if x.startswith('--config.')
  )
  file = config_files.load(words[3].removeprefix('--config='))
  config = file.with_fields(fields).config
  assert config.data.name == name
  assert config.data.data_dir == '/tmp/data'
  schema.validate(config)


# Fields of the command line.


def set_fields(config='configs/digits.py', **fields):
  texts = {name.replace('__', '.'): text for name, text in fields.items()}
  return config_files.load(config).with_fields(texts).config


@pytest.mark.parametrize(
  ('name', 'text', 'value'),
  [
    ('steps', '1e3', 1000),
    ('keep_every', '5e2', 500),
    ('keep_every', 'None', None),
    ('optimizer.boundaries', '(1e2,2e2)', (100, 200)),
    ('optimizer.boundaries', '100', (100,)),
    ('optimizer.boundaries', '()', ()),
    ('optimizer.learning_rates', '0.1,1e-2', (0.1, 0.01)),
    ('data.augmentations', 'crop,flip', ('crop', 'flip')),
    ('data.augmentations', "('crop',)", ('crop',)),
    ('selection.memory', 'true', True),
    ('selection.share', '0.3', 0.3),
    ('selection.share', 'auto', 'auto'),
    ('optimizer.epsilon', '1e-8', 1e-8),
  ],
)
def test_texts_become_values(name, text, value):
  config = config_files.load('configs/digits.py').with_fields({name: text})
  found = config_lib.flatten(config.config)[name]
  assert found == value
  assert type(found) is type(value)


def test_a_space_or_an_equals_sign_sets_a_field():
  words = ['--config.steps', '3', '--workdir=x', '--config.seed=5']
  rest, fields = commands._take_fields(words)
  assert rest == ['--workdir=x']
  assert fields == {'steps': '3', 'seed': '5'}


def test_a_config_file_is_not_changed_by_fields():
  file = config_files.load('configs/digits.py:memory')
  file.with_fields({'steps': '10', 'seed': '5'})
  assert (file.config.steps, file.config.seed) == (1000, 0)
  with pytest.raises(ConfigError, match="'sed' is not a config field"):
    file.with_fields({'sed': '5'})


# Shortened runs.


def test_a_shortened_run_scales_its_schedule():
  config = set_fields(steps='300')
  assert config.optimizer.boundaries == (210,)
  assert config.optimizer.learning_rates == (0.05, 0.005)
  assert config.eval_every == 250
  config = set_fields('configs/glue_tiny.py', steps='200')
  assert config.optimizer.warmup == 50
  config = set_fields(
    steps='100', selection__start='500', selection__stop='800'
  )
  assert (config.selection.start, config.selection.stop) == (500, 800)
  config.update_from_flattened_dict({'steps': 1000})
  config = schedules.scaled(config, 100)
  assert (config.selection.start, config.selection.stop) == (50, 80)


def test_what_the_command_line_sets_is_not_scaled():
  config = set_fields(steps='300', optimizer__boundaries='(200,)')
  assert config.optimizer.boundaries == (200,)
  config = set_fields(steps='300', scale_schedule='False')
  assert config.optimizer.boundaries == (700,)
  (line,) = schema.warnings(config)
  assert line.endswith('never reached in steps=300')


def test_a_run_that_is_made_longer_keeps_its_schedule():
  """So that a complete run can go on."""
  config = set_fields(steps='2e3')
  assert (config.steps, config.optimizer.boundaries) == (2000, (700,))


@pytest.mark.parametrize('steps', [1, 2, 20, 77, 1000, 46_799])
def test_any_shortened_run_has_the_rates_of_the_whole_one(steps):
  """At the same fraction of it; some are never used if it is very short."""
  config = set_fields('configs/mnist_large_margin.py', steps=str(steps))
  schema.validate(config)
  assert schema.warnings(config) == []
  whole = config_files.load('configs/mnist_large_margin.py').config.optimizer
  rates = config.optimizer.learning_rates
  boundaries = [0, *config.optimizer.boundaries]
  for step, rate in zip(boundaries, rates, strict=True):
    reached = sum(round(x * steps / 46_800) <= step for x in whole.boundaries)
    assert rate == whole.learning_rates[reached]


def test_a_boundary_that_was_never_reached_still_is_not():
  config = config_files.load('configs/digits.py').config
  config.update_from_flattened_dict(
    {'optimizer.boundaries': (500, 1500), 'optimizer.learning_rates': (3, 2, 1)}
  )
  scaled = schedules.scaled(config, 100)
  assert scaled.optimizer.boundaries == (50, 150)
  assert scaled.optimizer.learning_rates == (3, 2, 1)
