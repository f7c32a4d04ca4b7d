"""A ROS 1 .bag file (format 2.0), whole, not indexed (.bag.active), or damaged.

See https://wiki.ros.org/Bags/Format/2.0 for the layout. The messages stay as ROS 1 serialized them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

from scfeat_core.errors import DataError

from .blocks import END, LARGEST, Block, BlockFile, Channel, Loss, Record, Source, normalised_type
from .compression import CorruptError, decompress, decompress_start

MAGIC = b"#ROSBAG V2.0\n"
_DATA, _BAG, _INDEX, _CHUNK, _CHUNK_INFO, _CONNECTION = 0x02, 0x03, 0x04, 0x05, 0x06, 0x07
_OPCODE = re.compile(rb"\x04\x00\x00\x00op=([\x02-\x07])")
_WITHIN = {_DATA, _CONNECTION}  # a chunk
_LONGEST = 1 << 12  # bytes of a header, far more than any has
_SMALL = 1 << 26  # bytes of a record that describes, and holds no messages
_WINDOW = 1 << 20
Fields = dict[bytes, bytes]
Read = Callable[[int, int], "bytes | memoryview"]


class Ros1File(BlockFile):
    """See :class:`scfeat_ros.bag_files.blocks.BagFile`. Raises DataError where it is no ROS 1 bag at all."""

    def _open(self) -> None:
        _check_is_bag(self._source)
        self._blocks = self._indexed()
        self.complete = bool(self._blocks)
        self._blocks = self._blocks or self._scan()
        self.counts = self._count()

    # ------------------------------------------------------------------------------------------------------- the index

    def _indexed(self) -> list[Block]:
        """The chunks that the end of the file lists; none where it does not, or is damaged."""
        try:
            fields, _, _ = self._record(len(MAGIC))
            at = struct.unpack("<Q", fields[b"index_pos"])[0]
            if fields.get(b"encryptor"):
                raise DataError(f"expected a bag that is not encrypted at {self._source.path}, found an encrypted one")
            blocks: dict[int, Block] = {}  # by place: a chunk that is listed twice is one
            expected = struct.unpack("<I", fields[b"chunk_count"])[0]
            while 0 < at < self._source.size:
                fields, begin, end = self._record(at)
                if end - begin > _SMALL:
                    raise CorruptError("a record that is too long for an index")
                data = self._source.read(begin, end - begin)
                if fields[b"op"][0] == _CONNECTION:
                    self.channels.update(_channel(fields, data))
                elif fields[b"op"][0] == _CHUNK_INFO:
                    place, start = struct.unpack("<Q", fields[b"chunk_pos"])[0], _time(fields[b"start_time"])
                    counts = dict(struct.iter_unpack("<II", data))
                    blocks[place] = Block(place, 0, start, counts, end=_time(fields[b"end_time"]))
                at = end
            if len(blocks) < expected:
                raise CorruptError("an index without its end")
            return _sized(list(blocks.values()), struct.unpack("<Q", self._record(len(MAGIC))[0][b"index_pos"])[0])
        except (KeyError, struct.error, CorruptError):
            self.channels.clear()
            return []

    # -------------------------------------------------------------------------------------------------------- the scan

    def _scan(self) -> list[Block]:
        """All chunks, from the headers of the records."""
        blocks: list[Block] = []
        name, size, at = self._source.path.name, self._source.size, len(MAGIC)
        while at < size:
            try:
                fields, begin, end = self._record(at)
            except CorruptError:
                following = _next_record(self._source.read, at + 1, size, {_CHUNK})
                if following is None:
                    self._damage.add(
                        f"{name} ends in the middle of a record: only what comes before is there ({at} bytes)", END
                    )
                    self._cut = at
                    blocks.append(Block(at, size - at, blocks[-1].start if blocks else 0))
                    return blocks
                lost = Loss(following - at, None, at_start=not blocks)
                self._damage.add(f"skipped {following - at} damaged bytes of {name} at {at}", lost)
                at = following
                continue
            kind = fields[b"op"][0]
            if kind == _CHUNK:
                blocks.append(Block(at, end - at, blocks[-1].start if blocks else 0))
            elif kind == _CONNECTION and end - begin <= _SMALL:
                with suppress(CorruptError, KeyError, struct.error):  # they are in the chunks, too
                    self.channels.update(_channel(fields, self._source.read(begin, end - begin)))
            at = end
        if blocks:
            self._damage.add(f"{name} has no index: the recording was not closed", END)
        return blocks

    # ------------------------------------------------------------------------------------------------------- the chunks

    def _define(self, content: bytes | memoryview) -> None:
        self.channels.update(_channels(content))

    def _parse(
        self, content: bytes | memoryview, base: int, wanted: set[int] | None, cut: bool = False
    ) -> tuple[list[Record], int]:
        return _messages(content, base, wanted, cut)

    def _content(self, block: Block) -> bytes | memoryview:
        cut = block.at == self._cut
        fields, begin, end = self._record(block.at, cut)
        if fields.get(b"op") != bytes([_CHUNK]) or len(fields.get(b"size", b"")) != 4:
            raise CorruptError("no chunk where the index says there is one")
        method = fields.get(b"compression", b"none").decode("ascii", "replace")
        size = struct.unpack("<I", fields[b"size"])[0]
        if max(size, end - begin) > LARGEST:
            raise CorruptError(f"a chunk of {end - begin} bytes, unpacked {size}")
        data = self._source.read(begin, end - begin)
        if cut:
            return decompress_start(data, method, size)
        content = decompress(data, method, size)
        if len(content) != size:
            raise CorruptError("wrong size")
        return content

    def _record(self, at: int, cut: bool = False) -> tuple[Fields, int, int]:
        """The header of a record, and where its data begin and end. cut: the end may be missing."""
        return _record(self._source.read(at, _LONGEST + 8), at, self._source.size, cut)


# ------------------------------------------------------------------------------------------------------------- records


def _check_is_bag(source: Source) -> None:
    """Raises DataError."""
    begins = source.read(0, len(MAGIC))
    if begins == MAGIC:
        return
    expected = f"expected a ROS 1 bag of version 2.0 at {source.path}"
    if not begins:
        raise DataError(f"{expected}, found an empty file: nothing was recorded, or it was not copied; copy it again")
    if MAGIC.startswith(begins):
        raise DataError(f"{expected}, found it truncated after {source.size} bytes: copy it again")
    raise DataError(f"{expected}, found another beginning ({begins!r}): an older bag ('rosbag fix'), or no bag at all")


def _sized(blocks: list[Block], end: int) -> list[Block]:
    """With the bytes up to the next one, or to the index at ``end``; an index does not say them."""
    places = [*sorted(block.at for block in blocks), end]
    following = dict(pairwise(places))
    return [replace(block, size=max(0, following[block.at] - block.at)) for block in blocks]


def _record(data: bytes | memoryview, at: int, size: int, cut: bool = False) -> tuple[Fields, int, int]:
    """As ``Ros1File._record``, of the bytes that are at ``at`` of ``size``."""
    if len(data) < 4:
        raise CorruptError("no record")
    length = struct.unpack_from("<I", data)[0]
    if not 8 <= length <= _LONGEST or 8 + length > len(data):
        raise CorruptError("no header")
    fields = _fields(bytes(data[4 : 4 + length]))
    if len(fields.get(b"op", b"")) != 1:
        raise CorruptError("no kind of record")
    begin = at + 8 + length
    end = begin + struct.unpack_from("<I", data, 4 + length)[0]
    if end > size and not cut:
        raise CorruptError("a record that is longer than what there is")
    return fields, begin, min(end, size)


def _fields(header: bytes) -> Fields:
    fields, at = {}, 0
    while at + 4 <= len(header):
        end = at + 4 + struct.unpack_from("<I", header, at)[0]
        name, equals, value = header[at + 4 : end].partition(b"=")
        if end > len(header) or not equals:
            raise CorruptError("no field of a header")
        fields[name], at = value, end
    if at != len(header):
        raise CorruptError("no field of a header")
    return fields


def _next_record(read: Read, at: int, size: int, kinds: set[int]) -> int | None:
    """Where the next record begins behind something broken; None where there is none.

    The kind may be any of the fields of a header, so that it is looked for, and then where the header begins.
    """
    while at < size:
        window = read(at, _WINDOW)
        for match in _OPCODE.finditer(window):
            if match[1][0] not in kinds:
                continue
            for place in range(at + match.start() - 4, at + max(0, match.start() - 128) - 1, -1):
                try:
                    _record(read(place, _LONGEST + 8), place, size)
                except CorruptError:
                    continue
                return place
        if len(window) < _WINDOW:
            return None
        at += len(window) - 256
    return None


def _messages(
    content: bytes | memoryview, base: int, wanted: set[int] | None, cut: bool = False
) -> tuple[list[Record], int]:
    """The messages in a chunk, None: of all channels, without data; and how many of its bytes are broken.

    As in an .mcap, the message before something broken is not trusted, unless the chunk is cut off there.
    """
    records: list[Record] = []
    content = memoryview(content)
    at, bad, size, before = 0, 0, len(content), -1
    while at < size:
        try:
            fields, begin, end = _record(content[at : at + 8 + _LONGEST], at, size)
            if fields[b"op"][0] == _DATA:
                channel, time = struct.unpack("<I", fields[b"conn"])[0], _time(fields[b"time"])
                if wanted is None or channel in wanted:
                    records.append(
                        Record(time, base + at, channel, b"" if wanted is None else bytes(content[begin:end]))
                    )
            at, before = end, at
        except (CorruptError, KeyError, struct.error):
            if cut:
                break
            if records and records[-1].at == base + before:
                records.pop()
            following = _next_record(lambda place, count: content[place : place + count], at + 1, size, _WITHIN)
            following = size if following is None else following
            bad += following - (at if before < 0 else before)
            at, before = following, -1
    return records, bad


def _channels(content: bytes | memoryview) -> dict[int, Channel]:
    """The connections in a chunk, up to the first broken record."""
    channels: dict[int, Channel] = {}
    content, at = memoryview(content), 0
    while at < len(content):
        try:
            fields, begin, end = _record(content[at : at + 8 + _LONGEST], at, len(content))
            if fields[b"op"][0] == _CONNECTION:
                channels.update(_channel(fields, bytes(content[begin:end])))
        except (CorruptError, KeyError, struct.error):
            break
        at = end
    return channels


def _channel(fields: Fields, data: bytes) -> dict[int, Channel]:
    """Raises CorruptError, KeyError or struct.error where it is none."""
    try:
        topic, kind = fields[b"topic"].decode(), _fields(data)[b"type"].decode()
    except UnicodeDecodeError as error:
        raise CorruptError("a name that is no text") from error
    return {struct.unpack("<I", fields[b"conn"])[0]: Channel(topic, normalised_type(kind), ros1=True)}


def _time(value: bytes) -> int:
    """Nanoseconds."""
    seconds, nanoseconds = struct.unpack("<II", value)
    return seconds * 1_000_000_000 + nanoseconds
