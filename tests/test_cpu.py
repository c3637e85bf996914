"""What is there for speed on CPUs changes no result."""

import functools
import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from margin_jax import cpu, models
from margin_jax.train import compiled as compiled_lib
from margin_jax.train import devices as devices_lib
from margin_jax.train import step as step_lib
from tests import helpers, references


def images(rows=4):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((rows, 6, 6, 3), np.float32)
  kernel = rng.standard_normal((3, 3, 3, 5), np.float32)
  return x, kernel


def convolve(function, x, kernel):
  return function(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def both(transform, *args):
  """The same of our convolution and of JAX's."""
  return [
    jax.jit(transform(lambda *a, f=f: convolve(f, *a)))(*args)
    for f in (cpu.conv_general_dilated, jax.lax.conv_general_dilated)
  ]


@pytest.mark.parametrize('version', [(0, 10, 1), (0, 11, 2)])
def test_a_convolution_is_that_of_jax(version, monkeypatch):
  monkeypatch.setattr(jax, '__version_info__', version)
  x, kernel = images()
  np.testing.assert_array_equal(*both(lambda f: f, x, kernel))

  def gradients(f):
    return jax.grad(lambda *a: (f(*a) ** 3).sum(), argnums=(0, 1))

  def second(f):
    return jax.grad(lambda *a: (gradients(f)(*a)[0] ** 2).sum(), argnums=(0, 1))

  def forward(f):
    return lambda *a: jax.jvp(f, a, (x[::-1], kernel[::-1]))[1]

  def mapped(f):
    return jax.vmap(lambda image, k: f(image[None], k), (0, None))

  for transform in (gradients, second, forward, mapped):
    ours, theirs = both(transform, x, kernel)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-5 * abs(b).max()
      ),
      ours,
      theirs,
    )


def test_what_is_not_finite_stays_so():
  x, kernel = images()
  x[1, 2, 3] = np.nan
  ours, theirs = both(lambda f: f, x, kernel)
  np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))


@pytest.mark.parametrize(
  ('version', 'primitive'),
  [((0, 10, 1), ' div '), ((0, 11, 2), 'optimization_barrier')],
)
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_models_use_it_on_cpus(version, primitive, backend, monkeypatch):
  """Once for each of the first layer's and the six blocks' convolutions."""
  monkeypatch.setattr(jax, '__version_info__', version)
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  found = str(_gradient()).count(primitive)
  monkeypatch.setattr(cpu, 'is_default', lambda: False)
  without = str(_gradient()).count(primitive)
  assert (found >= without + 7) == (backend == 'cpu')


def _gradient():
  model = models.build('resnet8', 10)
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
  key = jax.eval_shape(jax.random.key, 0)
  variables = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, x)
  return jax.make_jaxpr(
    jax.grad(lambda v, x: model.apply(v, x, train=False)[0].sum())
  )(variables, x)


@pytest.mark.parametrize(
  ('shard', 'size'),
  [(640, 32), (320, 32), (160, 32), (80, 16), (40, None), (32, None)],
)
def test_how_many_examples_are_scored_at_a_time(shard, size):
  assert cpu.chunk_size(shard) == size


def test_accelerators_score_all_at_once(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert cpu.chunk_size(640) is None


@pytest.fixture(scope='module')
def large():
  """A step that scores 96 digits, 32 at a time."""
  return helpers.Setup(pool_size=96)


def logits_of(spec, state, inputs):
  """What the scoring forward of a step computes."""

  def score():
    rows = jnp.zeros(len(inputs), jnp.int32)
    pool = {'inputs': inputs, 'label': rows, 'index': rows}
    scored, _ = step_lib.score(spec, state, pool, jax.random.key(0))
    return scored.logits

  mapped = jax.vmap(score, axis_name=spec.axis_name, axis_size=1)
  return jax.jit(mapped)()[0]


def test_scores_do_not_depend_on_the_chunk_size(large):
  assert large.spec.selection.chunk_size == 32
  inputs = helpers.digits().splits['train']['inputs'][:96]
  logits = [
    logits_of(spec, large.first, inputs)
    for spec in (large.spec, large.spec.without_loops())
  ]
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_a_shard_has_the_scores_that_it_has_in_the_whole():
  """To the bit: each device runs programs of the same shapes."""
  one = helpers.Setup(pool_size=128)
  inputs = helpers.digits().splits['train']['inputs'][:128]
  score = functools.partial(logits_of, one.spec, one.first)
  shards = [score(inputs[:64]), score(inputs[64:])]
  np.testing.assert_array_equal(score(inputs), np.concatenate(shards))


@pytest.mark.slow
def test_all_that_is_scored_is_counted(large):
  """XLA counts the body of a loop once."""
  whole = compiled_lib.Program(
    large.spec.without_loops(),
    large.devices,
    large.loader,
    large.devices.replicate(large.first),
    large.config.steps,
    1,
  )
  assert large.program.cost(0, 3) == whole.cost(0, 3)
  compiled = large.program.programs[0].flops
  assert compiled < 0.6 * large.program.cost(0, 1).flops


def summed_dot(e):
  """XLA:CPU of jax 0.11 and 0.12 is off by 1e32, if one does not take care."""
  return jnp.sum((e @ jnp.full_like(e, 0.37)) * e, -1)


def test_a_dot_with_a_constant_is_summed_right():
  """By what compiles the steps and evaluations of the trainer."""
  rng = np.random.default_rng(0)
  e = rng.normal(size=(5, 60, 60)).astype(np.float32)
  program = devices_lib.Devices(1).compile(summed_dot, e)
  expected = references.float64(e) @ np.full((60, 60), 0.37) * e
  np.testing.assert_allclose(program(e), expected.sum(-1), 1e-4, 1e-3)
  assert not cpu.constant_dots(program.as_text())


OWN_LOOP = """
from margin_jax import cpu
cpu.avoid_wrong_results()
import jax
import numpy as np
from tests import test_cpu
e = np.random.default_rng(0).normal(size=(5, 60, 60)).astype(np.float32)
expected = e.astype(np.float64) @ np.full((60, 60), 0.37) * e
found = jax.jit(test_cpu.summed_dot)(e)
np.testing.assert_allclose(found, expected.sum(-1), 1e-4, 1e-3)
"""


@pytest.mark.slow
def test_a_loop_of_your_own_can_avoid_wrong_results():
  run(OWN_LOOP)


# What XLA:CPU of jax 0.11.2 makes of the above, without the flag; abridged.
WRONG = """
%fused_computation (param_0.3: f32[5,60,60]) -> f32[5,60] {
  %param_0.3 = f32[5,60,60]{2,1,0} parameter(0)
  %constant.2 = f32[] constant(0.37)
  %broadcast_in_dim.0 = f32[5,60,60]{2,1,0} broadcast(%constant.2), dimensions={}
  %dot.0 = f32[5,60,60]{2,1,0} dot(%param_0.3, %broadcast_in_dim.0), lhs_batch_dims={0}
  %mul.0 = f32[5,60,60]{2,1,0} multiply(%dot.0, %param_0.3)
  ROOT %reduce.1 = f32[5,60]{1,0} reduce(%mul.0, %constant.1), dimensions={2}
}

ENTRY %main.1 (E.1: f32[5,60,60]) -> f32[5,60] {
  %E.1 = f32[5,60,60]{2,1,0} parameter(0)
  ROOT %ynn_fusion = f32[5,60]{1,0} fusion(%E.1), kind=kCustom, calls=%fused_computation
}
"""  # noqa: E501


def test_the_search_for_constant_dots_finds_one():
  assert len(cpu.constant_dots(WRONG)) == 1
  assert not cpu.constant_dots(WRONG.replace('%broadcast_in_dim.0)', '%x)'))
  assert not cpu.constant_dots(WRONG.replace('calls=', 'to_apply='))


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields',
  [
    {'selection.memory': True},
    {'trimming.last': 0.2, 'selection.rule': 'uniform'},
    {'selection.every': 2, 'selection.proxy': 'cnn', 'loss.risk': 'hinge'},
    {'selection.reuse': 2, 'large_margin.weight': 0.1},
  ],
  ids=str,
)
def test_no_step_sums_a_dot_with_a_constant(fields):
  """So none has to be compiled again."""
  for program in helpers.Setup(**fields).program.programs:
    text = program.lowered.compile().as_text()
    assert 'ENTRY' in text
    assert not cpu.constant_dots(text)


def run(code, **environment):
  environment = {
    **{k: x for k, x in os.environ.items() if not k.startswith('MALLOC_')},
    'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=true',
    **environment,
  }
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=helpers.ROOT, env=environment, capture_output=True, text=True,
    check=True,
  ).stdout.strip()  # fmt: skip


FLAGS = """
import functools
import os
from margin_jax import cpu
cpu.tune()
print(os.environ['XLA_FLAGS'])
import jax
import jax.numpy as jnp
assert jax.numpy.ones(3).sum() == 3
"""


@pytest.mark.slow
def test_tuning_keeps_the_flags_that_are_set():
  flags = run(FLAGS)
  assert flags.startswith('--xla_cpu_multi_thread_eigen=true')
  known = (0, 11) <= jax.__version_info__ < (0, 13)
  assert (cpu._ONEDNN in flags) == known
  off = '--xla_cpu_experimental_onednn_custom_call=false'
  assert run(FLAGS, XLA_FLAGS=off) == off


FAULTS = """
import resource
import numpy as np
from margin_jax import cpu
cpu.tune()
np.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
@pytest.mark.slow
def test_tuning_keeps_pages():
  kept = int(run(FAULTS))
  given_back = int(run(FAULTS, MALLOC_ARENA_MAX='8'))
  assert kept < 0.1 * given_back


def test_programs_are_forgotten_before_there_are_too_many(monkeypatch):
  """Else a long comparison in one process is a segmentation fault."""
  devices = devices_lib.Devices(2)
  x = np.arange(3, dtype=np.float32)

  def compile_one():
    def double(x):
      return 2 * x

    compiled = devices.compile(double, x)
    np.testing.assert_array_equal(compiled(x), 2 * x)
    return weakref.ref(double), compiled

  first, in_use = compile_one()
  count, most = cpu._mappings()
  assert 100 < count < most
  monkeypatch.setattr(cpu, '_mappings', lambda: (51, 100))
  second = compile_one()[0]
  np.testing.assert_array_equal(in_use(x), 2 * x)
  del in_use
  compile_one()
  assert first() is None
  assert second() is None
