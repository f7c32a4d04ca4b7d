"""The rows of a damaged rosbag2 database, from its pages: what indices and inner pages say is not needed.

See https://www.sqlite.org/fileformat.html for the layout. Rows live in leaf pages; what is too long for one goes on in
a chain of overflow pages. Nothing was ever deleted from a recording, so every row that is found counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .blocks import Source

_LEAF = 0x0D
_USUAL = 4096  # bytes of a page
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # serial type -> bytes
_STEP = 256  # pages that are read at once
_NULL = 0
_LARGEST = 1_000_000_000  # bytes of a row, SQLite's own limit


@dataclass(frozen=True)
class Row:
    """A row of the table of messages. data: bytes before its blob, and of the blob. place, size: of all in the page."""

    time: int
    id: int
    topic: int
    place: int
    size: int
    local: int
    skip: int


class Pages:
    """Leaf pages of the tables "topics" and "messages"."""

    def __init__(self, source: Source) -> None:
        head = source.read(0, 100).ljust(100, b"\0")
        size = struct.unpack_from(">H", head, 16)[0]
        size = 65536 if size == 1 else size
        good = head.startswith(b"SQLite format 3\0") and size >= 512 and size & (size - 1) == 0
        self._source = source
        self._size = size if good else _USUAL
        self._usable = self._size - (head[20] if good else 0)
        # As long as the database was when it was written (in-header database size); 0 where it is not said.
        self.written_size = self._size * struct.unpack_from(">I", head, 28)[0] if good else 0
        self.topics: dict[int, tuple[str, str]] = {}
        self.rows: list[Row] = []
        for place, page in self._leaves():
            for cell in _cells(page, 100 if place == 0 else 0):
                self._add(place, page, cell)
        once = {row.id: row for row in reversed(self.rows)}
        self.rows = sorted(once.values(), key=lambda row: (row.time, row.id))

    def data(self, row: Row) -> bytes | None:
        """The blob of a row; None where its chain of pages is broken."""
        payload = bytearray(self._source.read(row.place, row.local))
        if row.size > row.local:
            following = self._number(row.place + row.local)
            while len(payload) < row.size:
                place = (following - 1) * self._size
                page = self._source.read(place, self._usable) if following > 0 else b""
                if len(page) < self._usable:
                    return None
                payload += page[4 : 4 + row.size - len(payload)]
                following = struct.unpack_from(">I", page)[0]
            if following != 0:
                return None
        return bytes(payload[row.skip :]) if len(payload) == row.size else None

    def _number(self, place: int) -> int:
        data = self._source.read(place, 4)
        return struct.unpack(">I", data)[0] if len(data) == 4 else 0

    def _leaves(self) -> Iterator[tuple[int, bytes]]:
        """Place and bytes of the leaf pages of tables."""
        for start in range(0, self._source.size, _STEP * self._size):
            data = self._source.read(start, _STEP * self._size)
            for at in range(0, len(data), self._size):
                kind = data[at + 100] if start + at == 0 and len(data) > 100 else data[at]
                if kind == _LEAF:
                    yield start + at, data[at : at + self._size]

    def _add(self, start: int, page: bytes, cell: int) -> None:
        """The row of a cell, where it is one of ours."""
        try:
            size, at = _varint(page, cell)
            number, at = _varint(page, at)
            local = _local(size, self._usable)
            header, types_at = _varint(page, at)
            types = []
            while types_at < at + header:
                kind, types_at = _varint(page, types_at)
                types.append(kind)
            if types_at != at + header or header + sum(map(_length, types)) != size:
                return
            if size > min(self._source.size, _LARGEST):
                return
            body = at + header
            if len(types) == 4 and types[0] == _NULL and types[3] >= 12 and types[3] % 2 == 0:
                topic, skip = _integer(page, body, types[1])
                time, skip = _integer(page, skip, types[2])
                self.rows.append(Row(time, number, topic, start + at, size, local, skip - at))
            elif len(types) > 4 and types[0] == _NULL and size == local:
                texts = _texts(page, body, types[1:4])
                if texts[0].startswith("/") and texts[2] == "cdr":
                    self.topics[number] = texts[0], texts[1]
        except (IndexError, KeyError, ValueError, struct.error):
            return


def _cells(page: bytes, begin: int) -> list[int]:
    """Where the cells of a leaf page are."""
    count = struct.unpack_from(">H", page, begin + 3)[0] if len(page) > begin + 8 else 0
    count = min(count, (len(page) - begin - 8) // 2)
    return [cell for (cell,) in struct.iter_unpack(">H", page[begin + 8 : begin + 8 + 2 * max(count, 0)])]


def _local(size: int, usable: int) -> int:
    """How many bytes of a payload are in the leaf page itself."""
    if size <= usable - 35:
        return size
    least = (usable - 12) * 32 // 255 - 23
    most = least + (size - least) % (usable - 4)
    return most if most <= usable - 35 else least


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and where it ends."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    return value << 8 | data[at + 8], at + 9


def _length(kind: int) -> int:
    if kind >= 12:
        return (kind - 12) // 2
    return 8 if kind == 7 else _INTEGERS.get(kind, 0)


def _integer(data: bytes, at: int, kind: int) -> tuple[int, int]:
    """A column, and where it ends. Raises KeyError where it is no integer."""
    if kind in (8, 9):
        return kind - 8, at
    end = at + _INTEGERS[kind]
    if end > len(data):
        raise IndexError
    return int.from_bytes(data[at:end], "big", signed=True), end


def _texts(data: bytes, at: int, kinds: list[int]) -> list[str]:
    texts = []
    for kind in kinds:
        if kind < 13 or kind % 2 == 0:
            raise ValueError("no text")
        texts.append(data[at : at + _length(kind)].decode())
        at += _length(kind)
    return texts
