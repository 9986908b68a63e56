"""The peak memory of a process, which long runs report, and how the allocator returns what was freed."""

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
    """Return the peak resident memory of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    # getrusage would also count what the program that started this one held.
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Return arrays of 4 MiB and more to the system as soon as they are freed, in the whole process.

    GNU's allocator learns from the first large arrays that are freed to keep later ones, a set for each thread: an
    analysis of large layers then holds twice the memory, and saves a tenth of its time. A system with another allocator
    is left as it is.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 2**22)
