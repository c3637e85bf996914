"""Several processes train as one; the exchange moves selected examples only."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import selection
from margin_jax.train import devices as devices_lib
from margin_jax.train import loop
from tests import helpers
from tests.helpers import ROOT, free_port, saved_state

COMMAND = (
  sys.executable, '-m', 'margin_jax.train', '--config=configs/digits.py',
  '--config.steps=10', '--config.eval_every=10', '--config.log_every=5',
  '--config.checkpoint_every=5', '--config.batch_size=8',
  '--config.pool_size=32', '--config.selection.log_counts=True',
)  # fmt: skip


def start(workdir, devices, *arguments):
  flags = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    [*COMMAND, f'--workdir={workdir}', *arguments],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': flags},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def train_together(workdir, *arguments):
  """Two processes of two devices; what each printed."""
  address = f'127.0.0.1:{free_port()}'
  processes = [
    start(
      workdir,
      2,
      f'--coordinator={address}',
      '--num_processes=2',
      f'--process_id={i}',
      *arguments,
    )
    for i in range(2)
  ]
  try:
    outputs = [p.communicate(timeout=240)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], outputs
  return outputs


@pytest.mark.slow
def test_two_processes_train_as_one_with_four_devices(tmp_path):
  """10 steps, scope global: the same choices, the same parameters."""
  one = start(tmp_path / 'one', 4)
  output = one.communicate()[0]
  assert one.returncode == 0, output
  outputs = train_together(tmp_path / 'whole')
  assert 'on 4 x cpu' in outputs[0]
  assert 'test accuracy' in outputs[0]
  assert 'test accuracy' not in outputs[1]

  fields = {
    'steps': 10,
    'mmr.alpha_end': 1e-3,
    'selection.log_counts': True,
  }
  states = [
    saved_state(tmp_path / name, **fields)[0] for name in ('one', 'whole')
  ]
  np.testing.assert_array_equal(states[0].counts, states[1].counts)
  helpers.assert_trees_close(states[0].params, states[1].params, 1e-6)
  counts = np.load(tmp_path / 'whole' / 'selection_counts.npy')
  assert counts.sum() == 10 * 8


def test_what_the_first_call_compiles_is_not_training(monkeypatch):
  """Of several processes; one compiles before."""

  def compiled(several):
    devices = devices_lib.Devices(8)
    monkeypatch.setattr(devices_lib, 'several_processes', lambda: several)
    zero = lambda: 0 * jax.lax.axis_index(devices_lib.AXIS)  # noqa: E731
    return devices.compile(lambda x: x + 1 + zero(), np.float32(1))

  alone, late = compiled(False), compiled(True)
  assert late(np.float32(1)) == alone(np.float32(1)) == 2
  assert alone.first_call_seconds == 0
  spent = late.first_call_seconds
  assert spent > 0
  late(np.float32(1))
  assert late.first_call_seconds == spent


@pytest.mark.slow
def test_the_clock_of_training_stands_while_a_first_call_compiles():
  this = helpers.Setup(**{'selection.rule': 'uniform'})
  compiled = this.program.compile_seconds
  before = loop._clock(this)
  this.program.programs[0].first_call_seconds = 1000.0
  assert this.program.compile_seconds == compiled + 1000
  assert -1000 < loop._clock(this) - before < -900


def collective_bytes(text):
  """Bytes of the results of each collective in an optimized program."""
  sizes = {'f32': 4, 's32': 4, 'u32': 4, 'u8': 1, 'pred': 1, 'f16': 2}
  found = {}
  pattern = r'= (\S.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('  # noqa: E501
  for shapes, kind in re.findall(pattern, text):
    for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
      elements = np.prod([int(n) for n in shape.split(',') if n])
      found[kind] = found.get(kind, 0) + int(elements) * sizes[dtype]
  return found


def test_the_exchange_moves_only_selected_examples():
  """B=640, b=64, 8 devices: scores of the pool, examples of the batch."""
  devices = devices_lib.Devices(8)
  image = 32 * 32 * 3

  def exchange(scores, images, labels):
    lane = jax.lax.axis_index(devices_lib.AXIS)
    mine = jax.lax.dynamic_slice_in_dim
    pool = {
      'inputs': mine(images, lane * 80, 80),
      'label': mine(labels, lane * 80, 80),
    }
    taken = selection.take_lowest(
      mine(scores, lane * 80, 80), pool, 64, devices_lib.AXIS
    )
    total = jax.tree.map(lambda x: jnp.sum(x.astype(jnp.int32)), taken)
    return jax.lax.psum(total, devices_lib.AXIS)

  rng = np.random.default_rng(0)
  args = (
    rng.normal(size=640).astype(np.float32),
    rng.integers(0, 256, (640, 32, 32, 3)).astype(np.uint8),
    rng.integers(0, 10, 640).astype(np.int32),
  )
  args = devices.replicate(args)
  program = devices.compile(exchange, *args)
  moved = collective_bytes(program.as_text())
  # All scores travel, and each device receives its 8 of the 64 examples; the
  # sum at the end, which is the test's own, is two integers.
  assert moved.pop('all-gather') == 640 * 4
  assert moved.pop('all-reduce') == 2 * 4
  received = moved.pop('reduce-scatter')
  assert received == 64 // 8 * (image + 4)
  assert not moved
  chosen = np.argsort(np.asarray(args[0]), kind='stable')[:64]
  total = program(*args)
  assert int(total['inputs']) == np.asarray(args[1])[chosen].sum(dtype=int)
  assert int(total['label']) == np.asarray(args[2])[chosen].sum()


def test_the_count_of_bytes_sees_a_pool_that_travels():
  devices = devices_lib.Devices(8)

  def gather(images):
    lane = jax.lax.axis_index(devices_lib.AXIS)
    mine = jax.lax.dynamic_slice_in_dim(images, lane * 80, 80)
    everything = jax.lax.all_gather(mine, devices_lib.AXIS, tiled=True)
    return everything[::-1]

  args = devices.replicate(np.zeros((640, 4, 4, 3), np.uint8))
  moved = collective_bytes(devices.compile(gather, args).as_text())
  assert moved == {'all-gather': 640 * 4 * 4 * 3}


@pytest.mark.slow
def test_a_bad_coordinator_is_one_line(tmp_path):
  process = start(tmp_path, 1, '--coordinator=nowhere')
  output = process.communicate()[0]
  assert process.returncode != 0
  assert 'Traceback' not in output
  assert 'error: coordinator' in output
