"""Writes api/config.md and bad_inputs.md.

python -m docs.config_pages
"""

import pathlib
from typing import Any

from margin_jax.config import FIELDS, ConfigError
from margin_jax.train import schema
from tests.bad_configs import BAD, BAD_TOGETHER, UNUSED
from tests.helpers import make_config

DOCS = pathlib.Path(__file__).parent
SECTIONS = {
  '': 'The run',
  'data': 'The data',
  'model': 'The model',
  'optimizer': 'The optimizer',
  'ema': 'The average of the weights',
  'selection': 'Selection of the batch from a pool',
  'trimming': 'Mini-batch trimming',
  'loss': 'The loss',
  'mmr': 'Multi-margin regularization',
  'large_margin': 'The large-margin loss',
  'attack': 'Evaluation under an attack',
}
REFERENCE = """# Config fields

Set a field on the command line by its dotted name:
`--config.selection.rule=mms`. `margin_jax/config.py` defines them.

* A value that is not allowed stops the run before anything is compiled
  ([the messages](../bad_inputs.md)).
* A field marked *needs* has no effect unless the need is met, and the trainer
  warns you.
* You may change a field marked *may change* when you resume a run.
"""
MESSAGES = """---
search:
  exclude: true
---

# What the trainer says about bad configs

Each row is the default config with these fields. A bad config stops the run
before anything is compiled, and leaves the workdir as it is.

## A value that is not allowed

"""
TOGETHER = """
## Fields that contradict each other

"""
WARNINGS = """
## Fields without effect

These fields change nothing in the run.

"""


def table(*rows: tuple[str, ...]) -> str:
  """Markdown, of which the first row is the head."""
  head, *body = ([x.replace('|', '\\|') for x in row] for row in rows)
  rule = ['---'] * len(head)
  return ''.join(f'| {" | ".join(row)} |\n' for row in (head, rule, *body))


def row(name: str) -> tuple[str, str, str, str]:
  """What the reference says of a field; '#selection.rule' leads there."""
  field = FIELDS[name]
  parts = [field.meaning]
  parts += [f'*Needs* {need.words}.' for need in field.needs]
  if callable(field.resumable):
    parts.append('*May change* where nothing trained depends on it.')
  elif field.resumable:
    parts.append('*May change*.')
  shown = f'<a id="{name}"></a>`{name}`'
  allowed = f'`{field.check.allowed()}`'
  return shown, f'`{field.default!r}`', allowed, ' '.join(parts)


def reference() -> str:
  """The page on every field."""
  text = REFERENCE
  for section, title in SECTIONS.items():
    rows = [row(x) for x in FIELDS if x.rpartition('.')[0] == section]
    head = 'field', 'default', 'allowed', 'meaning'
    text += f'\n## {title}\n\n{table(head, *rows)}'
  return text


def message(fields: dict[str, Any]) -> str:
  """The error or the warnings that a config gives rise to."""
  config = make_config(fields)
  try:
    schema.validate(config)
  except ConfigError as error:
    return str(error)
  return ' '.join(schema.warnings(config))


def messages() -> str:
  """The page on bad configs."""

  def rows(configs: list[dict[str, Any]]) -> str:
    return table(
      ('fields', 'message'),
      *(
        (
          ', '.join(f'`{name}={value!r}`' for name, value in fields.items()),
          f'`{message(fields)}`',
        )
        for fields in configs
      ),
    )

  return (
    MESSAGES
    + rows([{name: value} for name, value, _ in BAD])
    + TOGETHER
    + rows([fields for fields, _ in BAD_TOGETHER])
    + WARNINGS
    + rows([fields for fields, _ in UNUSED])
  )


if __name__ == '__main__':
  (DOCS / 'api/config.md').write_text(reference())
  (DOCS / 'bad_inputs.md').write_text(messages())
