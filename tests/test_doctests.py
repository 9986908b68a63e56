"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import farms_jax
import sciml

MODULES = [
    module.name
    for package in (farms_jax, sciml)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {name: [t for t in finder.find(importlib.import_module(name)) if t.examples] for name in MODULES}
    examples = ("farms_jax._analyze", "farms_jax._tempbalance", "farms_jax._names", "sciml.model", "sciml.flow")
    assert all(found[name] for name in examples)
