"""How much memory a program holds: what long runs report, and how they hold less."""

import ctypes
import re
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

_MMAP_THRESHOLD = -3  # of <malloc.h>


def peak_memory() -> int:
    """Return the most bytes that this process has held in memory so far; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    # getrusage would also count what the program that started this one held.
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Have arrays of 4 MiB and more go back to the system when they are freed, for all of this process.

    GNU's allocator learns from the first large arrays that are freed to keep later ones, a set for each thread: an
    analysis of large layers then holds twice the memory, and saves a tenth of its time. A system with another allocator
    is left as it is.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 2**22)
