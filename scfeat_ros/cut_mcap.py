"""An .mcap file whose end is missing (a recorder that was killed, a full disk), made readable up to the cut.

Nothing is written: the file is presented as if it ended, in order, after its last complete record. That costs one pass
over the record headers. See https://mcap.dev/spec for the layout.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

MAGIC = b"\x89MCAP0\r\n"
# a footer that says "no summary", which makes a reader go through the records, and the closing magic
_END = b"\x02" + struct.pack("<QQQI", 20, 0, 0, 0) + MAGIC
_RECORD = struct.Struct("<BQ")  # opcode, length of the content
_DATA_END, _FOOTER = 0x0F, 0x02


def complete_size(path: Path) -> int | None:
    """Bytes up to the end of the last complete record; None where the file is no mcap, or not cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 2 * len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
            return None
        file.seek(-len(MAGIC), os.SEEK_END)
        if file.read() == MAGIC:
            return None
        at = file.seek(len(MAGIC))
        while at + _RECORD.size <= size:
            opcode, length = _RECORD.unpack(file.read(_RECORD.size))
            if opcode in (_DATA_END, _FOOTER) or at + _RECORD.size + length > size:
                break
            at = file.seek(at + _RECORD.size + length)
    return at if at > len(MAGIC) else None


class CutMcap:
    """A path that opens as the complete part of an .mcap file; what ``rosbags`` needs of a path, and no more."""

    suffix = ".mcap"

    def __init__(self, path: Path, size: int) -> None:
        """size: as complete_size gives it."""
        self._path = path
        self._size = size

    def __str__(self) -> str:
        return str(self._path)

    def exists(self) -> bool:
        return self._path.exists()

    def is_dir(self) -> bool:
        return False

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open for reading; ``mode`` must be "rb"."""
        assert mode == "rb", "the file is only read"
        return io.BufferedReader(_Patched(self._path, self._size), 1 << 20)


class _Patched(io.RawIOBase):
    """The first ``size`` bytes of a file, then _END."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size + len(_END)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._at < self._size:
            self._file.seek(self._at)
            data = self._file.read(min(len(view), self._size - self._at)) or b""
        else:
            data = _END[self._at - self._size :][: len(view)]
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
