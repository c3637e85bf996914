"""The documentation: it builds, its links lead somewhere, its code runs."""

import contextlib
import html.parser
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from margin_jax import config as config_lib
from margin_jax import config_files
from margin_jax.train import schema

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = sorted(
  path
  for path in DOCS.glob('**/*.md')
  if 'benchmarks' not in path.parts and path.name != 'bad_inputs.md'
)
# Pages whose commands train for more than ten seconds.
LONG = (
  'accumulate', 'attack', 'dataset', 'label_noise', 'loss', 'memory', 'model',
  'optimizer', 'own_data', 'resume', 'rho_loss',
)  # fmt: skip
FENCE = re.compile(r'^```([^\n]*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
# A console script, and what it starts.
MODULES = {
  'margin-train': 'margin_jax.train',
  'margin-analyze': 'margin_jax.analyze',
  'margin-compare': 'margin_jax.compare',
  'margin-export': 'margin_jax.export',
  'margin-prepare': 'margin_jax.prepare',
}
# What other programs than ours are for.
OTHERS = (
  'aws',
  'gcloud',
  'pip', 'python', '.', 'tensorboard', 'uv', 'cyclonedx-py', 'pip-audit',
)  # fmt: skip


def blocks(path):
  """(language, title, whether it is only parsed, text) of each block."""
  found = []
  for head, text in FENCE.findall(path.read_text()):
    title = re.search(r'title="([^"]+)"', head)
    language = re.search(r'\w+', head)
    assert language, f'{path}: a block without a language'
    parsed = '.parsed' in head
    found.append((language[0], title and title[1], parsed, text))
  return found


def commands(text):
  """The commands of a block, in words."""
  return [
    shlex.split(line) for line in text.replace('\\\n', ' ').splitlines() if line
  ]


def module_of(words):
  """The module of this package that a command starts, and its arguments."""
  if words[:2] == ['python', '-m'] and words[2].startswith('margin_jax'):
    return words[2], words[3:]
  if words[0] in MODULES:
    return MODULES[words[0]], words[1:]
  assert words[0] in OTHERS, words
  return None, words


def run_block(text, folder):
  """Runs the commands of a block as a reader would, with /tmp in `folder`."""
  for words in commands(text):
    module, arguments = module_of(words)
    if module is None:
      continue
    arguments = [x.replace('=/tmp/', f'={folder}/') for x in arguments]
    process = subprocess.run(
      [sys.executable, '-m', module, *arguments],
      cwd=folder,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},
      capture_output=True,
      text=True,
    )
    assert not process.returncode, process.stderr + process.stdout


def source_of(module):
  """The text of a command's main module, and of the flags that all share."""
  path = ROOT / module.replace('.', '/')
  path = path / '__main__.py' if path.is_dir() else path.with_suffix('.py')
  return path.read_text() + (ROOT / 'margin_jax/commands.py').read_text()


def check_parsed(text, folder):
  """Whether a command could be started: its file, arguments and fields."""
  for words in commands(text):
    module, arguments = module_of(words)
    if module is None:
      continue
    known = re.findall(r"'(?:--)?(\w+)',", source_of(module))
    given = dict(x.removeprefix('--').split('=', 1) for x in arguments[1:])
    if arguments[0].startswith('--'):
      name, _, value = arguments[0].removeprefix('--').partition('=')
      given[name] = value
    flags = {name for name in given if not name.startswith('config.')}
    assert flags <= {*known}, f'{flags - {*known}} of {module}'
    if 'config' in given:
      check_config(given, folder)


def check_config(given, folder):
  """Loads the config of a command, sets its fields, and validates it."""
  text = given['config']
  if not text.startswith('configs/'):
    text = str(folder / text)
  fields = {
    name.removeprefix('config.'): value
    for name, value in given.items()
    if name.startswith('config.')
  }
  with contextlib.chdir(ROOT):
    schema.validate(config_files.load(text).with_fields(fields).config)


def pages():
  """All of them; those that train at length are for other days."""
  for path in PAGES:
    name = str(path.relative_to(DOCS))
    marks = [pytest.mark.long] if path.stem in LONG else []
    yield pytest.param(path, id=name, marks=[pytest.mark.slow, *marks])


@pytest.mark.parametrize('path', [*pages()])
def test_blocks_run_as_printed(path, tmp_path, monkeypatch):
  """In their order, in one folder; those marked `parsed` are only checked."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  space = {'__name__': 'page'}
  for language, title, parsed, text in blocks(path):
    if language == 'bash':
      if parsed:
        check_parsed(text, tmp_path)
      elif path.name != 'index.md':  # which starts the README's command
        run_block(text, tmp_path)
      continue
    assert language == 'python', f'{path}: {language}'
    if '--8<--' in text:
      continue
    code = compile(text, f'{path.name}: {title}', 'exec')
    if title:
      (tmp_path / title).write_text(text)
    elif not parsed:
      exec(code, space)


class Links(html.parser.HTMLParser):
  """Collects where a page links to, and its anchors."""

  def __init__(self):
    super().__init__()
    self.links, self.anchors = [], set()

  def handle_starttag(self, tag, attributes):
    """Of any element."""
    found = dict(attributes)
    self.anchors.add(found.get('id'))
    for name in ('href', 'src'):
      if found.get(name) and tag != 'base':
        self.links.append(found[name])


@pytest.fixture(scope='module', name='site')
def _site(tmp_path_factory):
  """The built pages by their path."""
  folder = tmp_path_factory.mktemp('site')
  process = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', folder],
    cwd=ROOT,
    env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
    capture_output=True,
    text=True,
  )
  assert not process.returncode, process.stderr
  assert 'WARNING' not in process.stderr
  pages = {}
  for path in folder.glob('**/*.html'):
    if path.name != '404.html':
      pages[path] = Links()
      pages[path].feed(path.read_text())
  return pages


@pytest.mark.slow
def test_every_link_resolves(site):
  """To a file of the site and an anchor in it; others have the right form."""
  external = set()
  for path, page in site.items():
    for link in page.links:
      if re.match(r'[a-z]+:', link):
        external.add(link)
        continue
      target, _, anchor = link.partition('#')
      file = (path.parent / target).resolve() if target else path
      assert file.is_file(), f'{path.name}: {link}'
      if anchor and file in site and anchor != '__codelineno':
        assert anchor in site[file].anchors, f'{path.name}: {link}'
  for link in external:
    assert re.fullmatch(
      r'https://(arxiv\.org/abs/\d{4}\.\d{5}'
      r'|github\.com/[\w-]+/[\w-]+(/(issues|pull)/\d+)?'
      r'|github\.com/pypa/pip-audit'
      r'|colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/main/'
      r'colabs/\w+\.ipynb'
      r'|kaggle\.com/kernels/welcome\?src=\S+'
      r'|squidfunk\.github\.io/mkdocs-material/)',
      link,
    ), link
  assert len(external) > 10


@pytest.mark.slow
def test_pages_need_no_network(site):
  """Whatever a page loads lies beside it."""
  for path in site:
    for loaded in re.findall(
      r'<(?:script|link|img)[^>]*(?:src|href)="([^"]+)"', path.read_text()
    ):
      assert not re.match(r'\w+:|//', loaded), f'{path.name}: {loaded}'
  css = (ROOT / 'docs/katex/katex.min.css').read_text()
  for font in re.findall(r'url\(([^)]+)\)', css):
    assert (ROOT / 'docs/katex' / font).is_file(), font


def test_the_whole_api_is_in_the_reference():
  import margin_jax

  text = (DOCS / 'api/functions.md').read_text()
  named = {*re.findall(r'^::: margin_jax\.(\w+)$', text, re.MULTILINE)}
  assert named == {*margin_jax.__all__}


def test_the_pages_of_fields_and_messages_are_up_to_date():
  """In a process of its own, without what other tests have registered."""
  script = (
    'from docs import config_pages as pages\n'
    "assert (pages.DOCS / 'api/config.md').read_text() == pages.reference()\n"
    "assert (pages.DOCS / 'bad_inputs.md').read_text() == pages.messages()\n"
  )
  process = subprocess.run(
    [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True
  )
  advice = 'python -m docs.config_pages writes them anew'
  assert not process.returncode, f'{advice}\n{process.stderr}'


def test_every_config_field_is_in_the_reference():
  text = (DOCS / 'api/config.md').read_text()
  row = r'^\| <a id="([\w.]+)"></a>`\1` \| `(.+?)` \| `.+` \| \w'
  rows = re.findall(row, text, re.MULTILINE)
  fields = config_lib.FIELDS.items()
  assert rows == [(name, repr(field.default)) for name, field in fields]


def test_every_column_is_in_the_reference():
  """Those of the golden runs; a class has its own."""
  text = (DOCS / 'api/files.md').read_text()
  runs = json.loads((ROOT / 'tests/golden.json').read_text()).values()
  tables = [text for run in runs for text in run['columns'].values()]
  for column in {*','.join(tables).split(',')}:
    name = re.sub(r'class_\d+', 'class_0', column)
    assert f'`{name}`' in text, name


def test_rules_in_the_docs_are_the_rules():
  from margin_jax import selection

  text = (DOCS / 'mathematics.md').read_text()
  for rule in selection.RULES:
    assert f'`{rule}`' in text, rule


def test_code_in_the_docs_is_in_the_style_of_the_code(tmp_path):
  for path in PAGES:
    for index, (language, _, _, text) in enumerate(blocks(path)):
      if language == 'python' and '--8<--' not in text:
        (tmp_path / f'{path.stem}_{index}.py').write_text(text)
  settings = ['--config', str(ROOT / 'pyproject.toml'), str(tmp_path)]
  ruff = [sys.executable, '-m', 'ruff']
  for command in (['format', '--check'], ['check', '--ignore=E402,F811']):
    process = subprocess.run(
      [*ruff, *command, *settings], capture_output=True, text=True
    )
    assert not process.returncode, process.stdout


def test_the_page_on_fidelity_names_code_that_exists():
  """`path::name` is a definition in that file."""
  text = (DOCS / 'fidelity.md').read_text()
  references = re.findall(r'`([\w/]+\.py)::(\w+)`', text)
  assert len(references) > 30
  for path, name in references:
    source = (ROOT / path).read_text()
    assert re.search(rf'^(def|class) {name}\b|^{name} = ', source, re.M), name
