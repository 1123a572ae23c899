"""Large blocks of memory that stay with the process."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, in glibc's malloc.h
_LARGEST, _MOST, _PAD = 2**30, 2**31 - 1, 64 * 2**20  # bytes


@cache
def keep_memory() -> bool:
    """Let the C library keep freed blocks of up to 1 GiB for the next allocation, in this process, from now on.

    By default glibc asks the kernel for each block above 32 MiB and gives it back when it is freed; the kernel clears such a
    block page by page each time it is asked for. In a layer whose hidden units take 50 MB that is a tenth of a training
    step. The price is that up to 2 GiB of the most that was ever in use stay with the process. Results do not change.

    Returns:
        Whether it was done: on Linux with glibc it is, elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - other C libraries may have a mallopt that means something else
        mallopt = library.mallopt
    except (AttributeError, OSError):
        return False
    wanted = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, _PAD))
    done = [mallopt(option, value) for option, value in wanted]  # each, also where one is refused
    return all(done)
