"""Files that are there whole or not at all."""

import contextlib
import csv
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The path of a file to write aside, renamed to `path` at the end.

  After an error, and after a kill, `path` is what it was before.
  """
  # Not tempfile: its files are for their owner only.
  aside = path.with_name(f'.{path.name}.{os.getpid()}.{secrets.token_hex(4)}')
  try:
    yield aside
    os.replace(aside, path)
  finally:
    with contextlib.suppress(OSError):
      aside.unlink()


def write_csv(
  path: pathlib.Path, fields: list[str], rows: list[dict[str, Any]]
) -> None:
  """Writes a CSV file with a header."""
  with whole(path) as aside, aside.open('w', newline='') as file:
    writer = csv.DictWriter(file, fields)
    writer.writeheader()
    writer.writerows(rows)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes a JSON file at once, or not at all."""
  with whole(path) as aside:
    aside.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
