"""Eight virtual CPU devices, strict shapes, a shared compilation cache."""

import gc
import os
import pathlib
import signal
from collections.abc import Iterator

# All must be set before JAX starts its backend. XLA:CPU of jax 0.10 logs false
# alarms about machine features when it loads a program from the cache.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

# So that no test writes to the home folder. Matplotlib would build its list
# of fonts anew in every session.
os.environ['MPLCONFIGDIR'] = str(pathlib.Path(__file__).parent / '.jax_cache')

# Of the programs that tests start; a worker of pytest-xdist has its own, since
# writes to a cache are not atomic.
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
  os.path.dirname(__file__),
  '.jax_cache',
  os.environ.get('PYTEST_XDIST_WORKER', 'main'),
  'started',
)

import jax
import pytest

from margin_jax import cpu

# Shells start what they put in the background deaf to Ctrl-C, and what the
# tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update(
  'jax_compilation_cache_dir',
  os.path.dirname(os.environ['JAX_COMPILATION_CACHE_DIR']),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@pytest.fixture(scope='session', autouse=True)
def user_cache(tmp_path_factory) -> Iterator[pathlib.Path]:
  """The user's cache folder, a new one in every session."""
  folder = tmp_path_factory.mktemp('cache')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(folder))
    yield folder


@pytest.fixture(scope='session')
def data_dir() -> pathlib.Path:
  """The folder with real data; the test skips where there is none."""
  folder = os.environ.get('MARGIN_JAX_TEST_DATA')
  if not folder:
    pytest.skip('real data: MARGIN_JAX_TEST_DATA is not set')
  return pathlib.Path(folder).resolve()


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
  """Frees what a module compiled.

  What a process keeps slows it down; see also `cpu.forget_programs`.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True)
def _keep_few_programs():
  """Frees what a module compiled before its end, if it is a lot."""
  yield
  cpu.forget_programs()
