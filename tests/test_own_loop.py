"""The loops of docs/own_loop.md, as printed: each library's learns."""

import pathlib
import re

import jax
import numpy as np
import pytest

PAGE = pathlib.Path(__file__).parent.parent / 'docs/own_loop.md'
LOOPS = dict(
  re.findall(
    r'```python title="(\w+)\.py"\n(.*?)```', PAGE.read_text(), re.DOTALL
  )
)


def run(name):
  """What a block leaves behind; skipped where its library is not installed."""
  space = {'__name__': name}
  exec(compile(LOOPS[name], f'{name}.py', 'exec'), space)
  return space


@pytest.mark.parametrize('name', ['plain_jax', 'linen_loop', 'nnx_loop'])
def test_a_loop_learns(name):
  assert run(name)['accuracy'] > 0.97


@pytest.mark.parametrize('name', ['equinox', 'haiku'])
def test_a_loop_of_another_library_learns(name):
  pytest.importorskip(name)
  assert run(f'{name}_loop')['accuracy'] > 0.97


@pytest.mark.slow
def test_shard_map_and_pmap_on_any_number_of_devices_agree(monkeypatch):
  """One device trains on the examples that four do."""
  found = []
  for count in (1, 4):
    devices = jax.devices()[:count]
    assert len(devices) == count
    monkeypatch.setattr(jax, 'devices', lambda devices=devices: devices)
    space = run('several_devices')
    monkeypatch.undo()
    assert space['accuracy'] > 0.97
    found += [space['by_shard_map'], space['by_pmap']]
  for other in found[1:]:
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-2),
      found[0],
      other,
    )


def test_margins_at_layers_of_a_network_of_another_library(
  tmp_path, monkeypatch
):
  """At the features they are the closed form."""
  pytest.importorskip('equinox')
  (tmp_path / 'equinox_loop.py').write_text(LOOPS['equinox_loop'])
  monkeypatch.syspath_prepend(str(tmp_path))
  space = run('equinox_margins')
  logits, _ = jax.vmap(space['model'])(space['images'])
  kernel = space['model'].head.weight.T
  expected = space['margin_jax'].signed_margins(logits, kernel, space['labels'])
  np.testing.assert_allclose(space['margins']['features'], expected, 1e-4)
  assert space['margins']['input'].shape == expected.shape
