"""Memory of a process: what it has held, and what it gives back."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from farms_jax.programs import memory

# The module alone, without farms_jax and JAX around it, is imported in a tenth of a second.
ALONE = f"import sys; sys.path.insert(0, {str(Path(memory.__file__).parent)!r}); import memory"
FREED = """
import numpy as np
{}
first = np.ones(2**21)
del first  # 16 MiB: GNU's allocator keeps what is no larger from now on
arrays = [np.ones(2**20) for _ in range(30)]
del arrays[:-1]
print(int(open("/proc/self/statm").read().split()[1]) * 4096)
"""


def printed(program):
    return int(subprocess.run([sys.executable, "-c", f"{ALONE}\n{program}"], capture_output=True, check=True).stdout)


def test_peak_memory_is_of_this_process_alone():
    """What a program is started from counts for nothing, what it held before does."""
    child = f"{ALONE}; b'x' * 10**8; print(memory.peak_memory())"
    parent = f"import subprocess; b'x' * (4 * 10**8); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert 10**8 < printed(parent) < 3 * 10**8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="GNU's allocator alone gives memory back on demand")
def test_freed_arrays_go_back_to_the_system():
    assert printed(FREED.format("")) - printed(FREED.format("memory.return_freed_memory()")) > 150e6
