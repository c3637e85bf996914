"""An object store in a folder, and commands that take it for gs:// and s3://.

    python -m tests.faults.object_store margin_jax.train --workdir=gs://b/r ...

An object is a file whose name is its quoted key: no folders, no appending, no
renaming. `STORE` names the folder; at call number `KILL_AT` that writes or
removes, the process is killed, before (even numbers) or after it (odd ones).
"""

import datetime
import os
import pathlib
import runpy
import signal
import sys
import threading
import urllib.parse

import fsspec

STORE, KILL_AT = 'MARGIN_JAX_TEST_STORE', 'MARGIN_JAX_TEST_KILL_AT'


class ObjectStore(fsspec.AbstractFileSystem):
  """What `margin_jax.buckets` asks of gcsfs and s3fs."""

  protocol = ('gs', 's3')
  cachable = False
  changes = 0
  counting = threading.Lock()

  def _file(self, path):
    key = self._strip_protocol(path)
    return pathlib.Path(os.environ[STORE], urllib.parse.quote(key, safe=''))

  def _change(self, function):
    with self.counting:
      ObjectStore.changes += 1
      number = ObjectStore.changes
    kill_at = int(os.environ.get(KILL_AT, 0)) == number
    if kill_at and number % 2 == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    function()
    if kill_at:
      os.kill(os.getpid(), signal.SIGKILL)

  def exists(self, path, **_):
    return bool(self.find(path))

  def find(self, path, detail=False, **_):
    path = self._strip_protocol(path)
    found = {}
    for file in sorted(pathlib.Path(os.environ[STORE]).iterdir()):
      key = urllib.parse.unquote(file.name)
      if not file.name.startswith('.') and f'{key}/'.startswith(f'{path}/'):
        stat = file.stat()
        found[key] = {'size': stat.st_size, 'ETag': f'{stat.st_mtime_ns}'}
    return found if detail else [*found]

  def cat_file(self, path, **_):
    return self._file(path).read_bytes()

  def pipe_file(self, path, value, mode='overwrite', **_):
    file = self._file(path)
    aside = file.with_name(f'.{os.getpid()}.{threading.get_ident()}')
    aside.write_bytes(value)

    def put():
      if mode == 'create':
        os.link(aside, file)
      else:
        os.replace(aside, file)

    try:
      self._change(put)
    finally:
      aside.unlink(missing_ok=True)

  def put_file(self, lpath, rpath, **_):
    self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

  def get_file(self, rpath, lpath, **_):
    pathlib.Path(lpath).write_bytes(self.cat_file(rpath))

  def rm_file(self, path):
    self._change(self._file(path).unlink)

  def modified(self, path):
    seconds = self._file(path).stat().st_mtime
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def register() -> None:
  """Takes gs:// and s3:// over."""
  for scheme in ObjectStore.protocol:
    fsspec.register_implementation(scheme, ObjectStore, clobber=True)


if __name__ == '__main__':
  register()
  sys.argv = sys.argv[1:]
  runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
