"""What the storages of bags have in common: topics, messages in blocks (chunks), and a list of what is damaged."""

from __future__ import annotations

import heapq
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from scfeat_core.errors import DataError

from .compression import CorruptError

Item = TypeVar("Item")

# Bytes of a chunk or a message, packed or not: what claims more is damaged, and is not read, nor does Linux at once.
LARGEST = (1 << 31) - (1 << 12)
_SHOWN = 50  # pieces of damage that are told one by one
_PENDING = 1 << 30  # bytes of messages that wait for earlier ones: an index that lies must not fill the memory


@dataclass(frozen=True)
class Channel:
    """Where messages of one topic and one type came from. type: as ROS 2 names it. ros1: serialized as ROS 1 does."""

    topic: str
    type: str
    ros1: bool = False


class Record(NamedTuple):
    """One message. time: nanoseconds, of recording. at: its place in the file, which decides between equal times."""

    time: int
    at: int
    channel: int
    data: bytes


@dataclass(frozen=True)
class Block:
    """A piece of a file with messages. at, size: bytes, its record. start: of its first message, nanoseconds; end: of
    its last one, None where that is not known.

    counts: messages by channel, as the index says; None where there is none. loose: no chunk, the records themselves.
    """

    at: int
    size: int
    start: int
    counts: Mapping[int, int] | None = None
    loose: bool = False
    end: int | None = None


class BagFile(Protocol):
    """One file of a bag. counts: messages by channel, as far as they are known before they are read. complete: these
    are of the whole file as it was written. start: nanoseconds, of the first message; None without messages.
    """

    channels: dict[int, Channel]
    counts: dict[int, int]
    complete: bool

    @property
    def start(self) -> int | None: ...

    def messages(self, wanted: set[int], since: int = 0) -> Iterator[Record]:
        """Messages of these channels by time, none before ``since``; what cannot be read is skipped, and added to the
        damage."""

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True)
class Loss:
    """What a piece of damage costs. size: bytes. messages: by topic. None: nobody knows. at_start, at_end: the
    beginning of a recording may be missing, or the rest, so that no gap between messages shows how much it was."""

    size: int | None = 0
    messages: Mapping[str, int] | None = field(default_factory=dict)
    at_start: bool = False
    at_end: bool = False


UNKNOWN = Loss(None, None)
END = Loss(None, None, at_end=True)


class Damage:
    """What is known to be lost, each piece once, in the order in which it was found."""

    def __init__(self) -> None:
        self._pieces: dict[str, Loss] = {}
        self._first = self._last = True

    def of_file(self, first: bool, last: bool) -> Damage:
        """The same, for a file of a recording to add to: its ends are those of the recording only where it is the first
        or the last one."""
        part = Damage()
        part._pieces, part._first, part._last = self._pieces, first, last
        return part

    def add(self, text: str, loss: Loss = Loss()) -> None:
        self._pieces[text] = replace(loss, at_start=loss.at_start and self._first, at_end=loss.at_end and self._last)

    def __str__(self) -> str:
        texts = list(self._pieces)
        more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
        return "; ".join([*texts[:_SHOWN], *more])

    @property
    def size(self) -> int | None:
        """Bytes; None where nobody knows how many."""
        return _total(loss.size for loss in self._pieces.values())

    @property
    def at_end(self) -> bool:
        """Whether an unknown rest of a recording is missing."""
        return any(loss.at_end for loss in self._pieces.values())

    def at_start(self, topic: str | None = None) -> bool:
        """Whether the beginning of a recording may be missing, or that of a topic."""
        losses = (loss.messages for loss in self._pieces.values() if loss.at_start)
        return any(topic is None or lost is None or topic in lost for lost in losses)

    def messages(self, topic: str) -> int | None:
        """On a topic; None where nobody knows how many."""
        found = [loss.messages for loss in self._pieces.values()]
        return _total(None if lost is None else lost.get(topic, 0) for lost in found)


def _total(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


class Source:
    """Bytes of a file by their place. Raises DataError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"expected a readable file at {path}, found: {error.strerror}") from error
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, at: int, size: int) -> bytes:
        """At most ``size`` bytes: fewer at the end, none outside of the file."""
        if not 0 <= at < self.size:
            return b""
        try:
            return os.pread(self._file.fileno(), max(0, min(size, self.size - at)), at)
        except OSError as error:
            raise DataError(f"expected to read {self.path} at {at}, found: {error.strerror}; copy it again") from error

    def close(self) -> None:
        self._file.close()


class BlockFile(ABC):
    """A file whose messages are in blocks; see :class:`BagFile`. What a block holds is for the formats to say.

    cut: where a last chunk without its end begins; 0: there is none.
    """

    def __init__(self, path: Path, damage: Damage) -> None:
        self._source = Source(path)
        self._damage = damage
        self._cut = 0
        self._blocks: list[Block] = []
        self.channels: dict[int, Channel] = {}
        self.counts: dict[int, int] = {}
        self.complete = True
        try:
            self._open()
        except BaseException:
            self._source.close()
            raise

    def close(self) -> None:
        self._source.close()

    @property
    def start(self) -> int | None:
        return min((block.start for block in self._blocks if block.counts is None or block.counts), default=None)

    def messages(self, wanted: set[int], since: int = 0) -> Iterator[Record]:
        blocks = (
            block
            for block in self._blocks
            if (block.counts is None or wanted & block.counts.keys()) and (block.end is None or block.end >= since)
        )
        found = in_order(blocks, lambda block: self._read(block, wanted))
        return (record for record in found if record.time >= since)

    # ------------------------------------------------------------------------------------------- what the formats know

    @abstractmethod
    def _open(self) -> None:
        """Find blocks, channels and counts. Raises DataError where it is no such file."""

    @abstractmethod
    def _content(self, block: Block) -> bytes | memoryview:
        """The records of a block. Raises CorruptError where they are not what was written."""

    @abstractmethod
    def _define(self, content: bytes | memoryview) -> None:
        """Learn of the channels that the records of a block define."""

    @abstractmethod
    def _parse(
        self, content: bytes | memoryview, base: int, wanted: set[int] | None, cut: bool = False
    ) -> tuple[list[Record], int]:
        """The messages of a block at ``base``, None: of all channels, without data; and how many of its bytes are
        broken. cut: it has no end, and what is whole before that is good."""

    def _written(self, block: Block) -> Mapping[int, int] | None:
        """How many messages were written to a block, by channel; None where nobody knows."""
        return None if block.loose or block.at == self._cut else block.counts

    # ---------------------------------------------------------------------------------------------------------- blocks

    def _count(self) -> dict[int, int]:
        """Messages by channel. Blocks that no index counts, or one with channels that there are not, are read for that,
        and for the channels they define."""
        counts: Counter[int] = Counter()
        for number, block in enumerate(self._blocks):
            found = block.counts
            if found is None or not found.keys() <= self.channels.keys():
                try:
                    content = self._content(block)
                except CorruptError:
                    continue
                self._define(content)
                if found is None or not found.keys() <= self.channels.keys():
                    self._blocks[number], found = self._counted(block, content)
            counts.update(found)
        return dict(counts)

    def _counted(self, block: Block, content: bytes | memoryview) -> tuple[Block, Mapping[int, int]]:
        """A block that no index counts, and its messages by channel; where it is broken, nobody knows what it held."""
        records, bad = self._parse(content, 0, None, block.at == self._cut)
        times = [record.time for record in records] or [block.start]
        found = dict(Counter(record.channel for record in records))
        return replace(block, start=min(times), end=max(times), counts=None if bad else found), found

    def _read(self, block: Block, wanted: set[int]) -> list[Record]:
        """The wanted messages of a block; the damage of it is noted."""
        try:
            content = self._content(block)
        except CorruptError as error:
            self._note(block, str(error), {}, block.size)
            return []
        records, bad = self._parse(content, block.at, wanted, block.at == self._cut)
        if bad:
            everything = Counter(record.channel for record in self._parse(content, block.at, None)[0])
            self._note(block, "broken records", everything, bad)
        return records

    def _note(self, block: Block, reason: str, found: Mapping[int, int], size: int) -> None:
        lost = lost_messages(self.channels, self._written(block), found)
        self._damage.add(
            f"skipped {size} bytes in the chunk at {block.at} of {self._source.path.name} ({reason}), "
            f"{lost_text(lost)}",
            Loss(size, lost, at_start=block.at == min(other.at for other in self._blocks)),
        )


def in_order(blocks: Iterable[Block], read: Callable[[Block], Iterable[Record]]) -> Iterator[Record]:
    """The messages of all blocks by time; each block is read when its first message is due.

    Where an index says that all is due at once, no more than _PENDING bytes wait: what comes later is late.
    """
    pending: list[Record] = []
    size = 0
    for block in sorted(blocks, key=lambda block: (block.start, block.at)):
        while pending and (pending[0].time < block.start or size > _PENDING):
            record = heapq.heappop(pending)
            size -= len(record.data)
            yield record
        for record in read(block):
            size += len(record.data)
            heapq.heappush(pending, record)
    while pending:
        yield heapq.heappop(pending)


def merged(files: Iterable[tuple[int, Callable[[], Iterator[tuple[int, Item]]]]]) -> Iterator[Item]:
    """Items of several sources by their time, each of them in order of time. files: when the first item of a source is
    due, and what begins to read it then: sources that follow each other are read one after the other.
    """
    waiting: list[tuple[int, int, Item, Iterator[tuple[int, Item]]]] = []

    def take(number: int, items: Iterator[tuple[int, Item]]) -> None:
        if (found := next(items, None)) is not None:
            heapq.heappush(waiting, (found[0], number, found[1], items))

    for number, (start, begin) in enumerate(sorted(files, key=lambda file: file[0])):
        while waiting and waiting[0][0] < start:
            _, place, item, items = heapq.heappop(waiting)
            yield item
            take(place, items)
        take(number, begin())
    while waiting:
        _, place, item, items = heapq.heappop(waiting)
        yield item
        take(place, items)


def lost_messages(
    channels: Mapping[int, Channel], written: Mapping[int, int] | None, found: Mapping[int, int]
) -> dict[str, int] | None:
    """By topic, of those that were written (by channel; None where that is not known) and not found."""
    if written is None:
        return None
    topics: Counter[str] = Counter()
    for channel, count in written.items():
        name = channels[channel].topic if channel in channels else f"channel {channel}"
        topics[name] += max(0, count - found.get(channel, 0))
    return {topic: count for topic, count in sorted(topics.items()) if count}


def lost_text(lost: Mapping[str, int] | None) -> str:
    """In words."""
    if lost is None:
        return "with an unknown number of messages"
    words = [f"{count} on {topic}" for topic, count in lost.items()]
    return "with the messages " + ", ".join(words) if words else "without messages"


def normalised_type(name: str) -> str:
    """sensor_msgs/Image, sensor_msgs::msg::dds_::Image_ and the like as ROS 2 names it: sensor_msgs/msg/Image."""
    parts = name.replace("::", "/").replace("/dds_/", "/").removesuffix("_").split("/")
    return "/".join([parts[0], "msg", parts[-1]] if len(parts) == 2 else parts)
