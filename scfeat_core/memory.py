"""What the C library does with memory that has been freed."""

from __future__ import annotations

import contextlib
import ctypes
import os

KEEP = "SCFEAT_KEEP_FREED_MEMORY"  # environment variable: "0" leaves the C library as it is
SMALL = 0.5  # of the largest: images below need so much less that what the largest left is worth giving back
PATIENCE = 30  # images; cameras of several sizes take turns

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc.

    By default glibc gives large blocks back to the system, which zeroes and maps them again for the next image or
    step: on a CPU 20 to 40 % of an extraction and 6 to 18 % of a training step, depending on what happens to lie at
    the end of the heap. So all blocks come from a heap, and that is not trimmed.

    It holds for the whole process, which keeps as much as it once needed, or as :class:`Surplus` leaves it. What the
    user has set of it in the environment (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_, GLIBC_TUNABLES) stays, and an
    application that wants its own way sets SCFEAT_KEEP_FREED_MEMORY to 0.
    """
    _set(_TRIM_THRESHOLD, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_")
    _set(_MMAP_MAX, 0, "MALLOC_MMAP_MAX_")


def share_heap() -> None:
    """Let the threads that begin from now on share the heap of the main one, where the C library is glibc.

    Those of others are trimmed whatever they are told, and hold no block above 64 MB, such as the maps of one
    1920x1080 image. The price is one lock for all threads, which is held for milliseconds while memory is given back:
    for processes of ours, and not for others with many threads that allocate, or with real-time ones. The environment
    may say otherwise, as for :func:`keep_freed_memory` (MALLOC_ARENA_MAX).
    """
    _set(_ARENA_MAX, 1, "MALLOC_ARENA_MAX")


def _set(parameter: int, value: int, variable: str) -> None:
    """variable: of the environment, by which the user has set it."""
    if os.environ.get(KEEP) == "0" or variable in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


class Surplus:
    """Gives back what images left that were much larger than the PATIENCE after them."""

    def __init__(self) -> None:
        self._largest = 0  # pixels, since memory was given back
        self._recent = 0  # the same of the small ones since the last large one
        self._small = 0  # how many these are

    def processed(self, pixels: int) -> None:
        """To be told of each image, or of several at once, before it needs its memory. pixels: of all of them."""
        if pixels > SMALL * self._largest:
            self._largest, self._recent, self._small = max(pixels, self._largest), 0, 0
            return
        self._recent, self._small = max(pixels, self._recent), self._small + 1
        if self._small == PATIENCE:
            give_back_freed_memory()
            self._largest, self._recent, self._small = self._recent, 0, 0


def give_back_freed_memory() -> None:
    """Give back now what this process has freed, where its C library is glibc; what follows is as it was."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
