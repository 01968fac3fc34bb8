"""How the C library hands out the memory of CPU tensors. No torch here: call it before torch allocates anything.

By default glibc gives every large tensor back to the system when it is freed, so each training step faults in the
same pages again; and torch asks for no huge pages. Keeping freed memory and asking for transparent huge pages removes
most page faults (bench/train.py measures what it brings). Price: memory that was used once stays with the process.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_ENV = "CAFFEJACINTO_ALLOCATOR"


def tune() -> bool:
    """Set the allocator of this process up for training; False where it does not apply.

    Linux with glibc only. The environment variable CAFFEJACINTO_ALLOCATOR=default leaves everything as it is.
    """
    if not sys.platform.startswith("linux") or os.environ.get(_ENV) == "default":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False  # another C library
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20))
    )
