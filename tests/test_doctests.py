"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import farms_jax

MODULES = [f"farms_jax.{module.name}" for module in pkgutil.iter_modules(farms_jax.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    counts = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    assert all(counts[f"farms_jax.{name}"] > 0 for name in ("_analyze", "_tempbalance", "_names"))
