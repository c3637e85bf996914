"""What makes XLA:CPU fast; nothing here affects an accelerator.

benchmarks/NOTES.md has the measurements: the predictions and the outcomes.
"""

import ctypes
import gc
import math
import os
import re
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
_YNN = 'xla_cpu_experimental_ynn_fusion_type'


class BackendError(ValueError):
  """JAX has no such backend here."""


def compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles a program, and on CPUs again if XLA would compute wrong numbers.

  XLA:CPU of jax 0.11 and 0.12 fuses a batched matrix product with the sum over
  it. If one of the matrices is a constant, as in
  `jnp.sum((x @ jnp.full_like(x, 0.37)) * x, -1)`, the result is off by 1e32, or
  NaN. Steps without such fusions are slower (benchmarks/jax_versions.py), so
  only programs with the bug are compiled again without them.
  """
  compiled = lowered.compile()
  if _knows_flags() and is_default() and constant_dots(compiled.as_text()):
    compiled = lowered.compile(compiler_options={_YNN: ''})
  return compiled


def forget_programs() -> None:
  """Makes JAX forget compiled programs before there are too many.

  XLA:CPU maps every kernel of a program into memory, and JAX keeps a program of
  `pmap` for as long as the process lives. Where Linux grants no more mappings,
  65,530 by default, the next program is a segmentation fault: a process would
  train some 70 times. Here they are forgotten at half of that; those in use go
  on, and what is called again is compiled again.
  """
  count, most = _mappings()
  if 2 * count > most:
    jax.clear_caches()
    gc.collect()


def _mappings() -> tuple[int, int]:
  """Returns how many memory mappings this process has, and may have."""
  try:
    with open('/proc/self/maps', 'rb') as file:
      count = sum(1 for _ in file)
    with open('/proc/sys/vm/max_map_count') as file:
      return count, int(file.read())
  except (OSError, ValueError):  # no Linux
    return 0, 0


def constant_dots(program: str) -> list[str]:
  """Returns the dots with a broadcast operand in what an HLO text has fused."""
  found = []
  for body in re.split(r'\n(?=%|ENTRY)', program):
    name = body.lstrip().partition(' ')[0]
    if ' dot(' not in body or not re.search(
      rf'calls={re.escape(name)}(?![\w.])', program
    ):
      continue
    constants = set(re.findall(r'(%\S+) = \S+ broadcast\(', body))
    for line in body.splitlines():
      operands = re.search(r' dot\(([^)]*)\)', line)
      if operands and constants & set(re.findall(r'%[^\s,]+', operands[1])):
        found.append(line.strip())
  return found


def avoid_wrong_results() -> None:
  """Turns off, in every program, the XLA:CPU fusions that `compile` describes.

  Call it in your own loop before JAX computes anything. XLA_FLAGS takes
  precedence.
  """
  _add_flag(f'--{_YNN}=-reduce')


def _knows_flags() -> bool:
  """Returns whether this version is known to have the flags used here."""
  return (0, 11) <= jax.__version_info__ < (0, 13)


def _add_flag(flag: str) -> None:
  """Adds it to XLA_FLAGS, unless that has it or this XLA may not know it."""
  flags = os.environ.get('XLA_FLAGS', '')
  # XLA aborts where it does not know a flag, and these are experimental.
  if _knows_flags() and flag.partition('=')[0] not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()


def tune() -> None:
  """Sets up the process, and starts JAX's backend.

  XLA:CPU allocates its temporary memory anew for every step. By default, glibc
  returns the pages of such a large block to the system at once, and gets them
  back one by one, zeroed: 25,000 page faults in a step of ResNet-20. After this
  call, glibc keeps the pages. It also makes jax 0.11 and later compute
  convolutions and matrix products with oneDNN, which must be set before JAX
  starts. JAX's compilation cache cannot hold such programs, so a start of
  ResNet-44 takes some 10 s longer, but every step is a sixth shorter. To turn
  this off, set the flag to false in XLA_FLAGS.

  The environment (`MALLOC_*`, that flag) takes precedence. Without glibc the
  first part does nothing, and on an accelerator neither part has an effect.
  """
  _add_flag(_ONEDNN)
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
  """Returns whether programs are compiled for CPUs; starts JAX's backend.

  Raises:
    BackendError: JAX_PLATFORMS names what this machine does not have.
  """
  try:
    return jax.default_backend() == 'cpu'
  except (AssertionError, RuntimeError) as error:
    platforms = jax.config.jax_platforms
    if not platforms:
      raise
    reason = str(error).partition(' (set JAX_PLATFORMS')[0].rstrip('.')
    reason = reason or 'JAX finds none'
    raise BackendError(
      f'JAX_PLATFORMS={platforms!r} is not allowed: {reason}. If you unset it, '
      'JAX uses what is available'
    ) from error


def conv_general_dilated(lhs: Array, rhs: Array, *args: Any, **kwargs: Any):
  """Computes `jax.lax.conv_general_dilated`, with a faster gradient on CPUs.

  The gradient of a kernel needs the convolution's input, transposed. XLA:CPU
  fuses into that transposition all that made the input, normalizations and
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
