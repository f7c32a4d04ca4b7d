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
    the end of the heap. So all blocks come from one heap that is not trimmed: those of other threads than the main one
    are, whatever they are told, and hold no block above 64 MB, such as the maps of one 1920x1080 image. Threads that
    are there already may keep theirs.

    It holds for the whole process, which keeps as much as it once needed, or as :class:`Surplus` leaves it; an
    application that wants its own way sets the environment variable SCFEAT_KEEP_FREED_MEMORY to 0.
    """
    if os.environ.get(KEEP) == "0":
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_ARENA_MAX, 1)


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
