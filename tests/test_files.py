"""Files that are not what they should be: one line, and nothing changes."""

import os
import subprocess
import sys

import pytest

from margin_jax import checks, files

SCHEMA = {
  'steps': checks.integer(1),
  'test': checks.mapping(accuracy=checks.number(least=0, most=1)),
  'best': checks.optional(checks.mapping()),
}
GOOD = '{"steps": 5, "test": {"accuracy": 0.5, "loss": NaN}, "more": [1]}'
JSON = {
  'empty': ('', 'Expecting value'),
  'cut': (GOOD[:20], 'line 1'),
  'no object': ('[1]', 'hold a JSON object'),
  'null': ('null', 'hold a JSON object'),
  'a null value': ('{"steps": null}', "'steps' is None, and must be an"),
  'a word': ('{"steps": "5"}', "'steps' is '5', and must be an integer"),
  'too large': ('{"steps": 1' + 30 * '0' + '}', r'below 2\*\*31'),
  'too many digits': ('{"steps": 1' + 5000 * '0' + '}', 'digits'),
  'no accuracy': ('{"steps": 5, "test": {}}', "'accuracy', a finite number"),
  'an accuracy of a percentage': (
    '{"steps": 5, "test": {"accuracy": 50}}', 'at most 1',
  ),
  'nested': (100_000 * '[' + 100_000 * ']', 'nested too deep'),
  'nested objects': (100_000 * '{"a":' + '1' + 100_000 * '}', 'nested'),
  'not UTF-8': (b'{"steps": "\xff"}', 'it is not text'),
  'binary': (bytes(range(256)), 'it is not text'),
}  # fmt: skip


def test_json_that_fits_is_returned_with_what_else_it_holds(tmp_path):
  path = tmp_path / 'result.json'
  path.write_text(GOOD)
  read = files.read_json(path, SCHEMA, 'remove it')
  assert (read['steps'], read['test']['accuracy'], read['more']) == (
    5,
    0.5,
    [1],
  )
  with pytest.raises(FileNotFoundError):
    files.read_json(tmp_path / 'other', SCHEMA, 'remove it')


def message(function, path, *arguments):
  """The one line of a file that is refused, and stays as it is."""
  before = path.read_bytes() if path.is_file() else None
  with pytest.raises(files.FileError) as caught:
    function(path, *arguments, 'move it away')
  text = str(caught.value)
  assert text.startswith(f'{path} cannot be read (')
  assert text.endswith(': move it away')
  assert '\n' not in text
  assert len(text) < 400 + len(str(path))
  assert before == (path.read_bytes() if path.is_file() else None)
  return text


@pytest.mark.parametrize('name', JSON)
def test_json_that_does_not_fit_is_one_line(tmp_path, name):
  content, words = JSON[name]
  path = tmp_path / 'result.json'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(files.FileError, match=words):
    files.read_json(path, SCHEMA, 'move it away')
  message(files.read_json, path, SCHEMA)


TABLE = 'step,split,loss\r\n5,test,0.5\r\n10,test,nan\r\n'


def read_table(path, remedy='move it away'):
  return files.read_table(path, ('loss',), remedy, ('split',))


def test_a_table_is_read_without_the_line_that_was_cut(tmp_path):
  path = tmp_path / 'eval.csv'
  for cut in ('', '15,te', '15,test,0.2', '15,test', '\0\0\0', '\r'):
    path.write_text(TABLE + cut, newline='')
    columns, rows = read_table(path)
    assert columns == ['step', 'split', 'loss']
    assert [row['step'] for row in rows] == ['5', '10']
  path.write_bytes(TABLE.encode() + b'15,\xc3')  # half a letter
  assert len(read_table(path)[1]) == 2
  for content in ('', 'step,split,lo'):
    path.write_text(content)
    assert read_table(path) == ([], [])


TABLES = {
  'another table': ('a,b\n1,2\n', "no column 'step'"),
  'without a column': ('step,loss\n1,2\n', "no column 'split'"),
  'a column twice': ('step,split,loss,loss\n', 'the same column twice'),
  'a short row': ('step,split,loss\n1,test\n2,test,3\n', 'line 2'),
  'a long row': ('step,split,loss\n1,test,2,3\n', 'line 2'),
  'a superscript two': (
    'step,split,loss\n\N{SUPERSCRIPT TWO},test,1\n',
    'line',
  ),
  'a negative step': ('step,split,loss\n-1,test,1\n', 'line 2'),
  'a step of 30 digits': (f'step,split,loss\n{10**30},test,1\n', 'line 2'),
  'a word for a number': ('step,split,loss\n1,test,x\n', 'line 2'),
  'nothing for a number': ('step,split,loss\n1,test,\n', 'line 2'),
  'an open quote': ('step,split,loss\n1,"test,1\n', 'end of data'),
  'a field of 200 KB': (f'step,split,loss\n1,{"x" * 200_000},1\n', 'limit'),
  'zeros': ('step,split,loss\n' + 9 * '\0' + '\n1,test,1\n', 'line 2'),
  'not UTF-8': (b'step,split,loss\n1,\xff,1\n', 'it is not text'),
}


@pytest.mark.parametrize('name', TABLES)
def test_a_table_that_does_not_fit_is_one_line(tmp_path, name):
  content, words = TABLES[name]
  path = tmp_path / 'eval.csv'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(files.FileError, match=words):
    read_table(path)
  message(read_table, path)


def test_what_is_no_file_or_too_large_is_one_line(tmp_path, monkeypatch):
  folder, pipe, large = (tmp_path / name for name in ('a', 'b', 'c'))
  folder.mkdir()
  os.mkfifo(pipe)  # to read it would be to wait for ever
  large.write_bytes(bytes(101))
  monkeypatch.setattr(files, 'LARGEST_JSON', 100)
  for path, words in (
    (folder, 'it is a folder'), (pipe, 'it is not a file'), (large, 'than 100')
  ):  # fmt: skip
    assert words in message(files.read_json, path, SCHEMA)
  loop = tmp_path / 'loop'
  loop.symlink_to(loop)
  with pytest.raises((files.FileError, FileNotFoundError)):
    files.read_json(loop, SCHEMA, 'move it away')


@pytest.mark.parametrize('content', [b'', b'proc', b'process 1 on a\n'])
def test_a_lock_of_ours_is_taken(tmp_path, content):
  (tmp_path / '.lock').write_bytes(content)
  with files.locked(str(tmp_path)):
    assert f'process {os.getpid()}' in (tmp_path / '.lock').read_text()


@pytest.mark.parametrize('content', [b'\xff\x00', b'step,loss\n', b'x' * 9999])
def test_a_lock_that_holds_something_else_is_left_alone(tmp_path, content):
  (tmp_path / '.lock').write_bytes(content)
  with (
    pytest.raises(files.FileError, match=r'\.lock cannot be read'),
    files.locked(str(tmp_path)),
  ):
    pass
  assert (tmp_path / '.lock').read_bytes() == content


def test_a_lock_that_is_a_link_or_a_folder_is_left_alone(tmp_path):
  other = tmp_path / 'of somebody else'
  other.write_text('process')
  lock = tmp_path / 'run' / '.lock'
  lock.parent.mkdir()
  for make in (lambda: lock.symlink_to(other), lock.mkdir):
    make()
    with (
      pytest.raises(files.FileError, match=r'\.lock cannot be read'),
      files.locked(str(lock.parent)),
    ):
      pass
    if lock.is_symlink():
      lock.unlink()
  assert other.read_text() == 'process'


def test_leftovers_of_killed_processes_are_removed(tmp_path):
  process = subprocess.Popen([sys.executable, '-c', ''])
  process.wait()
  dead, alive = process.pid, os.getpid()
  ours = tmp_path / f'.train.csv.{dead}.0123abcd'
  kept = [
    tmp_path / name
    for name in (
      'train.csv', '.train.csv', f'.train.csv.{alive}.0123abcd',
      f'.train.csv.{dead}.0123abcg', f'.notes.txt.{dead}.0123abcd',
    )
  ]  # fmt: skip
  for path in (ours, *kept):
    path.write_text('')
  folder = tmp_path / f'.train.csv.{dead}.00000000'
  folder.mkdir()
  files.remove_leftovers(tmp_path, lambda name: name == 'train.csv', 3600)
  assert ours.exists()  # too young
  files.remove_leftovers(tmp_path, lambda name: name == 'train.csv')
  assert sorted(tmp_path.iterdir()) == sorted([folder, *kept])


def test_a_file_that_is_written_aside_counts_as_a_leftover(tmp_path):
  with files.whole(tmp_path / 'train.csv') as aside:
    aside.touch()
    assert files._ASIDE.fullmatch(aside.name)['name'] == 'train.csv'
    assert int(files._ASIDE.fullmatch(aside.name)['process']) == os.getpid()


def test_what_lies_in_the_place_of_an_output_is_named(tmp_path):
  other = tmp_path / 'other'
  other.mkdir()
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'train.csv').symlink_to(tmp_path / 'gone')
  (run / 'eval.csv').mkdir()
  (run / 'checkpoints').symlink_to(other)  # on another disk, say
  (run / 'tensorboard').write_text('')
  names = ('train.csv', 'eval.csv', 'result.json')
  with pytest.raises(
    files.FileError,
    match=r'train\.csv is a link, eval\.csv is a folder, tensorboard is',
  ):
    files.check_outputs(run, names, ('checkpoints', 'tensorboard'))
  files.check_outputs(run, ('result.json',), ('checkpoints',))
