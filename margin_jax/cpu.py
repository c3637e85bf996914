"""What XLA:CPU needs to be fast; nothing here reaches an accelerator.

Each is measured in benchmarks/NOTES.md: what was predicted, and what came out.
"""

import ctypes
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# How many examples of a pool are scored at a time: what a layer makes of them
# stays in the cache.
CHUNK_SIZE = 32

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ONEDNN = '--xla_cpu_experimental_onednn_custom_call=true'


def tune() -> None:
  """Sets up the process, and starts JAX's backend.

  XLA:CPU takes its temporary memory anew for every step. Of so large a block,
  glibc gives the pages back to the system at once and gets them one by one,
  zeroed: 25,000 page faults a step of ResNet-20. Here it keeps them. And
  jax 0.11 computes convolutions and products of matrices with oneDNN, if it is
  told to before it starts. Programs with these cannot be kept in JAX's
  compilation cache: a start of ResNet-44 is some 10 s longer, and every step a
  sixth shorter; XLA_FLAGS with that flag as false decides otherwise.

  What the environment says of either (`MALLOC_*`, that flag) has precedence.
  Without glibc there is no first part, and on an accelerator neither has an
  effect.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  # XLA aborts where it does not know a flag, and this is an experimental one.
  knows = (0, 11) <= jax.__version_info__ < (0, 12)
  if knows and _ONEDNN.partition('=')[0] not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {_ONEDNN}'.strip()
  mine = not any(name.startswith('MALLOC_') for name in os.environ)
  if mine and is_default():
    _keep_pages()


def _keep_pages() -> None:
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
    return
  mallopt(_TRIM_THRESHOLD, 2**31 - 1)
  mallopt(_MMAP_MAX, 0)
  mallopt(_ARENA_MAX, 1)


def is_default() -> bool:
  """Returns whether programs are compiled for CPUs."""
  return jax.default_backend() == 'cpu'


def conv_general_dilated(lhs: Array, rhs: Array, *args: Any, **kwargs: Any):
  """Computes `jax.lax.conv_general_dilated`, with a faster gradient on CPUs.

  The gradient of a kernel needs the convolution's input, transposed. XLA:CPU
  fuses into that transposition all that made the input, normalisations and
  whole chains of residual sums, and so computes them again with a stride for
  every element; the input itself lay in memory all the time. What it must not
  look through is a barrier, from jax 0.11 on; before, barriers are gone when it
  fuses, but not a division, which it thinks too dear to repeat: by a 1 that
  it cannot know. Finite values are the same to the bit.

  Convolutions by groups are left alone: there the division would count.
  """
  if is_default() and kwargs.get('feature_group_count', 1) == 1:
    if jax.__version_info__ < (0, 11):
      # NaN where the kernel begins with what is not finite: so the run is lost.
      lhs = lhs / jnp.exp(jax.lax.stop_gradient(rhs.ravel()[0]) * 0)
    else:
      lhs = jax.lax.optimization_barrier(lhs)
  return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)


def chunk_size(shard: int) -> int | None:
  """Returns how many examples of a device's shard of a pool to score at a time.

  Args:
    shard: its number of examples.

  Returns:
    A divisor of `shard`, the same for all numbers of devices that it can be
    the same for; or None for all at once, as on accelerators.
  """
  size = math.gcd(shard, CHUNK_SIZE)
  if not is_default() or size == shard or 2 * size < CHUNK_SIZE:
    return None
  return size
