"""The benchmarks that the documentation names are understood; most of them need Torch to start."""

import shlex

import pytest
from docs_helpers import PAGES, check, inline_commands

COMMANDS = sorted({text for page in PAGES for text in inline_commands(page) if "benchmarks." in text})


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, monkeypatch):
    check(shlex.split(command), monkeypatch)
