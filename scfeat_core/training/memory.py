"""What the C library does with memory that a step has freed."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc.

    By default glibc gives large blocks back to the system, and each step of a training on the CPU then has them zeroed
    and mapped again: 25,000 to 66,000 page faults a step, depending on what happens to lie at the end of the heap, and
    6 to 18 % of its time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
