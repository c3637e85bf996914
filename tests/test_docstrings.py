"""The examples in docstrings run and print what they say."""

import doctest

import pytest

from margin_jax import losses, margins, sampling, selection


@pytest.mark.parametrize('module', [losses, margins, sampling, selection])
def test_examples_run(module):
  failed, tried = doctest.testmod(module)
  assert tried
  assert not failed
