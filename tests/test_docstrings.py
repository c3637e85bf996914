"""The examples in docstrings run and print what they say."""

import doctest
import inspect

import jax
import pytest

import margin_jax
from margin_jax import config as config_lib
from margin_jax import (
  linearized,
  losses,
  margins,
  registry,
  sampling,
  selection,
  signatures,
)

MODULES = linearized, losses, margins, registry, sampling, selection, signatures


@pytest.mark.parametrize('module', MODULES)
def test_examples_run(module):
  names = {'jax': jax, 'config_lib': config_lib}
  failed, tried = doctest.testmod(module, extraglobs=names)
  assert tried
  assert not failed


# That of `load` is a page of the documentation, docs/howto/predict.md.
@pytest.mark.parametrize('name', sorted({*margin_jax.__all__} - {'load'}))
def test_a_public_function_has_an_example(name):
  function = getattr(margin_jax, name)
  if inspect.isfunction(function):
    assert 'Examples:' in function.__doc__
