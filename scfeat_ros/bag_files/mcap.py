"""An .mcap file, whole or damaged. See https://mcap.dev/spec for the layout.

With a good index at its end the file is read chunk by chunk as that says. Without one (the recorder was killed, the
disk was full, or chunks were switched off) one pass over the headers of the records finds them.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from scfeat_core.errors import DataError

from .blocks import END, LARGEST, UNKNOWN, Block, BlockFile, Channel, Loss, Record, Source, normalised_type
from .compression import CorruptError, decompress, decompress_start

MAGIC = b"\x89MCAP0\r\n"
_RECORD = struct.Struct("<BQ")  # opcode, bytes that follow
_CHUNK = struct.Struct("<QQQII")  # first and last time, uncompressed bytes, CRC, bytes of the compression's name
_HEAD = _RECORD.size + _CHUNK.size + 16  # bytes that show what a record is: the header of a chunk, with its name
_MESSAGE = struct.Struct("<HIQQ")  # channel, sequence, time of recording, time of publishing
_FOOTER, _SCHEMA, _CHANNEL, _DATA, _CHUNK_RECORD, _INDEX, _CHUNK_INDEX, _ATTACHMENT, _STATISTICS, _DATA_END = (
    0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0B, 0x0F,
)  # fmt: skip
# How long the content of a record may be: a length outside of that is damaged, and nothing is read for it.
_SMALL = 1 << 26  # bytes: what describes, and holds no messages
_LENGTHS = {
    _DATA: (_MESSAGE.size, LARGEST),
    _CHUNK_RECORD: (_CHUNK.size + 8, LARGEST),
    _INDEX: (6, _SMALL),
    _FOOTER: (20, 20),
    _DATA_END: (4, 4),
    _ATTACHMENT: (0, 1 << 40),
}
_OWN = 0x80  # opcodes from here on belong to applications
_SUMMARY = 1 << 28  # bytes that an index may have: that of a terabyte in chunks of a megabyte
_TIMES = 1 << 63  # nanoseconds, from here on no time of ROS
# Something that may begin a record: an opcode, and a length below 2^40.
_PERHAPS = re.compile(rb"(?=[\x03-\x0f].{5}\x00\x00\x00)", re.DOTALL)
_CHAIN = 3  # records in a row that make one believe in the first
_WINDOW = 1 << 20
_LOOSE = 1 << 22  # bytes of messages without a chunk that are read at once
Read = Callable[[int, int], "bytes | memoryview"]


@dataclass(frozen=True)
class _Summary:
    """What the end of a file says. blocks: its chunks. counts: messages by channel."""

    channels: dict[int, Channel]
    blocks: list[Block]
    counts: dict[int, int]


class McapFile(BlockFile):
    """See :class:`scfeat_ros.bag_files.blocks.BagFile`. Raises DataError where it is no .mcap at all."""

    def _open(self) -> None:
        self._schemas: dict[int, str] = {}
        _check_is_mcap(self._source)
        summary = self._summary()
        self.complete = summary is not None
        if summary is None:
            self._blocks = self._scan()
            self.counts = self._count()
        else:
            self.channels, self._blocks, self.counts = summary.channels, summary.blocks, summary.counts

    # ------------------------------------------------------------------------------------------------------- the index

    def _summary(self) -> _Summary | None:
        """None where there is none, where it is damaged, or where it does not lead to the messages."""
        size, name = self._source.size, self._source.path.name
        footer = self._source.read(max(0, size - 37), 37)
        if footer[-len(MAGIC) :] != MAGIC or footer[:9] != _RECORD.pack(_FOOTER, 20):
            return None
        start, _, crc = struct.unpack_from("<QQI", footer, 9)
        if start == 0:
            return None
        data = self._source.read(start, size - 37 - start) if size - 37 - start <= _SUMMARY else b""
        if crc and zlib.crc32(footer[:25], zlib.crc32(data)) != crc:
            self._damage.add(f"the index of {name} is damaged, its messages were looked for one by one")
            return None
        try:
            return _parse_summary(data)
        except (struct.error, CorruptError, UnicodeDecodeError):
            self._damage.add(f"the index of {name} is damaged, its messages were looked for one by one")
            return None

    # -------------------------------------------------------------------------------------------------------- the scan

    def _scan(self) -> list[Block]:
        """All chunks, and messages outside of chunks, from the headers of the records."""
        blocks: list[Block] = []
        name, size, at = self._source.path.name, self._source.size, len(MAGIC)
        last = at  # where the record before this one begins
        while at < size:
            head = self._source.read(at, _HEAD)
            if not _fits(head, 0, size - at):
                following = None if _reaches_beyond(head, size - at) else _next_record(self._source.read, at + 1, size)
                if following is None:
                    self._add_cut(blocks, at, head)
                    return blocks
                start = _without_last(blocks, at, last)
                lost = Loss(following - start, None, at_start=not blocks)
                self._damage.add(f"skipped {following - start} damaged bytes of {name} at {start}", lost)
                at = following
                continue
            if head[0] in (_DATA_END, _FOOTER):
                return blocks
            length = _RECORD.size + _RECORD.unpack_from(head)[1]
            self._add(blocks, at, length, head)
            at, last = at + length, at
        self._damage.add(f"{name} ends without an index: the recording was not closed", END)
        return blocks

    def _add(self, blocks: list[Block], at: int, length: int, head: bytes) -> None:
        """One complete record."""
        kind = head[0]
        if kind == _CHUNK_RECORD:
            start, end = _CHUNK.unpack_from(head, _RECORD.size)[:2]
            blocks.append(Block(at, length, start, self._index_counts(at + length), end=end))
        elif kind in (_SCHEMA, _CHANNEL):
            self._define(self._source.read(at, length))
        elif kind == _DATA:
            time = _MESSAGE.unpack_from(head, _RECORD.size)[2]
            last = blocks[-1] if blocks else None
            if last is not None and last.loose and last.at + last.size == at and last.size < _LOOSE:
                start, end = min(last.start, time), max(last.end or 0, time)
                blocks[-1] = replace(last, size=last.size + length, start=start, end=end)
            else:
                blocks.append(Block(at, length, time, loose=True, end=time))

    def _add_cut(self, blocks: list[Block], at: int, head: bytes) -> None:
        """What there is of a last chunk without its end."""
        name, rest = self._source.path.name, self._source.size - at
        self._damage.add(f"{name} ends in the middle of a record: only what comes before is there ({at} bytes)", END)
        if _reaches_beyond(head, rest):
            self._cut = at
            blocks.append(Block(at, rest, _CHUNK.unpack_from(head, _RECORD.size)[0]))

    def _define(self, content: bytes | memoryview) -> None:
        """Schemas, too."""
        for kind, body in _records(content):
            try:
                if kind == _SCHEMA:
                    self._schemas.update(_schema(body))
                elif kind == _CHANNEL:
                    self.channels.update(_channel(body, self._schemas))
            except (struct.error, CorruptError, UnicodeDecodeError):
                self._damage.add(f"a topic that {self._source.path.name} defines cannot be read", UNKNOWN)

    # ------------------------------------------------------------------------------------------------------- the chunks

    def _parse(
        self, content: bytes | memoryview, base: int, wanted: set[int] | None, cut: bool = False
    ) -> tuple[list[Record], int]:
        return _messages(content, base, wanted, cut)

    def _content(self, block: Block) -> bytes | memoryview:
        if block.loose:
            return self._source.read(block.at, block.size)
        cut = block.at == self._cut
        head = self._source.read(block.at, _HEAD)
        if len(head) < _RECORD.size + _CHUNK.size + 8 or head[0] != _CHUNK_RECORD or not _is_chunk(head, None):
            raise CorruptError("no chunk where the index says there is one")
        length = _RECORD.size + _RECORD.unpack_from(head)[1]
        _, _, size, crc, named = _CHUNK.unpack_from(head, _RECORD.size)
        if max(size, block.size) > LARGEST or (length != block.size and not cut):
            raise CorruptError(f"a chunk of {length} bytes, unpacked {size}, where the index says {block.size}")
        begin = _RECORD.size + _CHUNK.size
        method = head[begin : begin + named].decode("ascii", "replace")
        packed = memoryview(self._source.read(block.at, block.size))[begin + named + 8 :]
        if cut:
            return decompress_start(packed, method, size)
        content = decompress(packed, method, size)
        if len(content) != size:
            raise CorruptError(f"{len(content)} instead of {size} bytes")
        if crc and zlib.crc32(content) != crc:
            raise CorruptError("wrong checksum")
        return content

    def _written(self, block: Block) -> Mapping[int, int] | None:
        """As the records of the index behind a chunk say."""
        return block.counts if block.loose or block.at == self._cut else self._index_counts(block.at + block.size)

    def _index_counts(self, at: int) -> dict[int, int] | None:
        """Messages by channel, from the records of the index behind a chunk, which begin at ``at``; None where there
        are none, or not all of them: a channel without one would seem to have no messages there."""
        counts: dict[int, int] = {}
        while _fits(head := self._source.read(at, _HEAD), 0, self._source.size - at) and head[0] == _INDEX:
            channel, counted = _index_entry(head)
            if channel in counts:
                return None
            counts[channel] = counted
            at += _RECORD.size + _RECORD.unpack_from(head)[1]
        return counts if counts and _ends_index(head, self._source.size - at) else None


# ------------------------------------------------------------------------------------------------------------- records


def _check_is_mcap(source: Source) -> None:
    """By its first or last bytes: either may be damaged. Raises DataError."""
    begins, ends = source.read(0, len(MAGIC)), source.read(source.size - len(MAGIC), len(MAGIC))
    expected = f"expected an .mcap file at {source.path}"
    if source.size == 0:
        raise DataError(f"{expected}, found an empty file: nothing was recorded, or it was not copied; copy it again")
    if MAGIC not in (begins, ends):
        if MAGIC.startswith(begins):
            raise DataError(f"{expected}, found it truncated after {source.size} bytes: copy it again")
        raise DataError(f"{expected}, found something else (it begins with {begins!r}): no .mcap, check the name")
    if source.size < 2 * len(MAGIC):
        raise DataError(f"{expected}, found it truncated after {source.size} bytes: copy it again")


def _fits(data: bytes | memoryview, at: int, rest: int) -> bool:
    """Whether a record that ends within ``rest`` bytes may begin at ``at``."""
    if len(data) - at < _RECORD.size:
        return False
    kind, length = _RECORD.unpack_from(data, at)
    least, most = _LENGTHS.get(kind, (0, 1 << 40 if kind >= _OWN else _SMALL))
    if not (0 < kind <= _DATA_END or kind >= _OWN) or not least <= length <= min(most, rest - _RECORD.size):
        return False
    return kind != _CHUNK_RECORD or len(data) - at < _HEAD or _is_chunk(data, length, at)


def _is_chunk(data: bytes | memoryview, length: int | None, at: int = 0) -> bool:
    """Whether the lengths in the header of a chunk fit each other."""
    if length is None:
        length = _RECORD.unpack_from(data, at)[1]
    begin = at + _RECORD.size
    named = _CHUNK.unpack_from(data, begin)[4]
    if named > 8 or len(data) < begin + _CHUNK.size + named + 8:
        return False
    packed = struct.unpack_from("<Q", data, begin + _CHUNK.size + named)[0]
    return length == _CHUNK.size + named + 8 + packed


def _without_last(blocks: list[Block], at: int, last: int) -> int:
    """Take out the message without a chunk at ``last``, which something broken at ``at`` follows, as it is not to be
    trusted. Returns where the damage begins."""
    block = blocks[-1] if blocks else None
    if block is None or not block.loose or block.at + block.size != at:
        return at
    blocks[-1:] = [replace(block, size=last - block.at)] if last > block.at else []
    return last


def _reaches_beyond(head: bytes, rest: int) -> bool:
    """Whether this is the beginning of a chunk whose end is missing."""
    if len(head) < _HEAD or head[0] != _CHUNK_RECORD:
        return False
    return _is_chunk(head, None) and _RECORD.unpack_from(head)[1] > rest - _RECORD.size


def _ends_index(head: bytes, rest: int) -> bool:
    """Whether this is what follows a whole index of a chunk: the next chunk, cut off or not, or the end of them all."""
    return head[:1] in (bytes([_CHUNK_RECORD]), bytes([_DATA_END])) and (
        _fits(head, 0, rest) or _reaches_beyond(head, rest)
    )


def _next_record(read: Read, at: int, size: int) -> int | None:
    """Where the next record begins behind something broken; None where there is none."""
    while at < size:
        window = read(at, _WINDOW)
        for match in _PERHAPS.finditer(window):
            if _is_chain(read, at + match.start(), size):
                return at + match.start()
        at += max(1, len(window) - 8)
        if len(window) < _WINDOW:
            return None
    return None


def _is_chain(read: Read, at: int, size: int) -> bool:
    """Whether some records in a row begin here."""
    for _ in range(_CHAIN):
        head = read(at, _HEAD)
        if not _fits(head, 0, size - at):
            return False
        if head[0] in (_DATA_END, _FOOTER):
            return True
        at += _RECORD.size + _RECORD.unpack_from(head)[1]
        if at == size:
            return True
    return True


def _messages(
    content: bytes | memoryview, base: int, wanted: set[int] | None, cut: bool = False
) -> tuple[list[Record], int]:
    """The messages in a buffer of records, None: of all channels, without data; and how many of its bytes are broken.

    Nothing but the record behind a message shows that it is whole, so the one before something broken is not trusted.
    cut: the buffer has no end; what is whole before it is good.
    """
    records: list[Record] = []
    at, bad, size = 0, 0, len(content)
    view = memoryview(content)
    before = -1  # where the record before this one begins
    while at < size:
        if not _fits(content, at, size - at):
            if cut:
                break
            if records and records[-1].at == base + before:
                records.pop()
            following = _next_record(lambda begin, count: content[begin : begin + count], at + 1, size)
            following = size if following is None else following
            bad += following - (at if before < 0 else before)
            at, before = following, -1
            continue
        kind, length = _RECORD.unpack_from(content, at)
        end = at + _RECORD.size + length
        if kind == _DATA:
            channel, _, time, _ = _MESSAGE.unpack_from(content, at + _RECORD.size)
            if time >= _TIMES:
                bad += end - at
            elif wanted is None or channel in wanted:
                begin = at + _RECORD.size + _MESSAGE.size
                records.append(Record(time, base + at, channel, b"" if wanted is None else bytes(view[begin:end])))
        at, before = end, at
    return records, bad


def _records(data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
    """Kind and content of the records of a buffer, up to the first broken one."""
    at = 0
    while _fits(data, at, len(data) - at):
        kind, length = _RECORD.unpack_from(data, at)
        if kind != _DATA:
            yield kind, bytes(data[at + _RECORD.size : at + _RECORD.size + length])
        at += _RECORD.size + length


def _parse_summary(data: bytes) -> _Summary | None:
    schemas: dict[int, str] = {}
    channels: dict[int, Channel] = {}
    blocks: dict[int, Block] = {}  # by place: a chunk that is listed twice is one
    counts: dict[int, int] | None = None
    used = chunks = 0
    for kind, body in _records(data):
        used += _RECORD.size + len(body)
        if kind == _SCHEMA:
            schemas.update(_schema(body))
        elif kind == _CHANNEL:
            channels.update(_channel(body, schemas))
        elif kind == _CHUNK_INDEX:
            block = _chunk_index(body)
            blocks[block.at] = block
        elif kind == _STATISTICS:
            chunks = struct.unpack_from("<I", body, 22)[0]
            counts = dict(struct.iter_unpack("<HQ", body[46 : 46 + struct.unpack_from("<I", body, 42)[0]]))
    if used != len(data):
        raise CorruptError("broken records")
    if counts is None or not counts.keys() <= channels.keys() or (any(counts.values()) and not blocks):
        return None
    return _Summary(channels, list(blocks.values()), counts) if len(blocks) >= chunks else None


def _index_entry(head: bytes) -> tuple[int, int]:
    """Channel, and messages of it, of the head of an index record: as many as there is room for."""
    channel, used = struct.unpack_from("<HI", head, _RECORD.size)
    return channel, min(used, max(0, _RECORD.unpack_from(head)[1] - 6)) // 16


def _chunk_index(body: bytes) -> Block:
    start, end, at, size, used = struct.unpack_from("<QQQQI", body)
    channels = [channel for channel, _ in struct.iter_unpack("<HQ", body[36 : 36 + used])]
    return Block(at, size, start, dict.fromkeys(channels, 0) or None, end=end)


def _schema(body: bytes) -> dict[int, str]:
    """The name of a type by its id."""
    return {struct.unpack_from("<H", body)[0]: _string(body, 2)[0]}


def _channel(body: bytes, schemas: dict[int, str]) -> dict[int, Channel]:
    number, schema = struct.unpack_from("<HH", body)
    topic, at = _string(body, 4)
    encoding, _ = _string(body, at)
    return {number: Channel(topic, normalised_type(schemas.get(schema, "")), encoding == "ros1")}


def _string(body: bytes, at: int) -> tuple[str, int]:
    """A text, and where it ends."""
    size = struct.unpack_from("<I", body, at)[0]
    end = at + 4 + size
    if end > len(body):
        raise CorruptError("a text that is longer than its record")
    return body[at + 4 : end].decode(), end
