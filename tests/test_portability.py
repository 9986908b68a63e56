"""Systems other than Linux: every module can be imported, and what Linux alone has is done in another way."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from farms_jax.programs import files, memory
from prune.forward import Activations

ROOT = Path(__file__).parent.parent
PACKAGES = ("farms_jax", "train", "prune", "sciml")
# What Windows or macOS lack.
WITHOUT = """
import ctypes, importlib, os, signal, sys
others, ours = (argument.split() for argument in sys.argv[1:])
for name in others:
    importlib.import_module(name)  # before anything is taken away: other packages have their own ways there
sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"])
for name in "fork getuid posix_fallocate pread preadv pwrite pwritev sched_getaffinity statvfs".split():
    delattr(os, name)
for name in "SIGHUP SIGKILL SIGUSR1 pthread_kill sigwait".split():
    delattr(signal, name)
ctypes.CDLL = None
for name in ours:
    importlib.import_module(name)
"""


def modules():
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imported(path):
    """Modules of other packages that a file imports at once."""
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (name for name in names if name.partition(".")[0] not in {*PACKAGES, *sys.stdlib_module_names})


def test_every_module_can_be_imported_without_what_linux_has():
    ours = dict(modules())
    others = sorted({name for path in ours.values() for name in imported(path)})
    command = [sys.executable, "-c", WITHOUT, " ".join(others), " ".join(ours)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peak_memory_of_a_system_that_does_not_tell_is_0(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "none")
    assert memory.peak_memory() > 2**20  # as on macOS
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak_memory() == 0


def test_a_file_gets_its_size_where_space_cannot_be_reserved(monkeypatch, tmp_path):
    monkeypatch.delattr(files.os, "posix_fallocate", raising=False)
    with (tmp_path / "file").open("wb") as file:
        files.reserve(file.fileno(), 1000)
    assert (tmp_path / "file").stat().st_size == 1000


@pytest.mark.parametrize("spilled", [False, True])
def test_activations_are_read_as_written_last(tmp_path, spilled):
    activations = Activations((6, 5, 4), tmp_path if spilled else None)
    first, second = np.random.default_rng(0).normal(size=(2, 6, 5, 4)).astype(np.float32)
    activations.write(slice(0, 6), first)
    activations.write(slice(2, 4), second[2:4])
    np.testing.assert_array_equal(activations.read(slice(1, 5)), [first[1], *second[2:4], first[4]])
