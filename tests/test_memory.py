"""Memory of a process: what it has held, and what it gives back."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FREED = """
import numpy as np
from farms_jax.programs import memory
{}
first = np.ones(2**21)
del first  # 16 MiB: GNU's allocator keeps what is no larger from now on
arrays = [np.ones(2**20) for _ in range(30)]
del arrays[:-1]
print(int(open("/proc/self/statm").read().split()[1]) * 4096)
"""


def test_peak_memory_is_of_this_process_alone():
    """What a program is started from counts for nothing, what it held before does."""
    child = "from farms_jax.programs.memory import peak_memory; import numpy; numpy.ones(10**7); print(peak_memory())"
    parent = f"""
import subprocess, sys, numpy
numpy.ones(10**8)
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    found = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, check=True)
    assert 80e6 < int(found.stdout) < 750e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="GNU's allocator alone gives memory back on demand")
def test_freed_arrays_go_back_to_the_system():
    held = []
    for call in ("", "memory.return_freed_memory()"):
        done = subprocess.run([sys.executable, "-c", FREED.format(call)], cwd=ROOT, capture_output=True, check=True)
        held.append(int(done.stdout))
    assert held[0] - held[1] > 150e6
