"""What the storages of bags have in common: topics, messages in blocks (chunks), and a list of what is damaged."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from scfeat_core.errors import DataError


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
    """A piece of a file with messages. at, size: bytes, its record. start: of its first message, nanoseconds.

    counts: messages by channel, as the index says; None where there is none. loose: no chunk, the records themselves.
    """

    at: int
    size: int
    start: int
    counts: Mapping[int, int] | None = None
    loose: bool = False


class BagFile(Protocol):
    """One file of a bag. counts: messages by channel, as far as they are known before they are read."""

    channels: dict[int, Channel]
    counts: dict[int, int]

    def messages(self, wanted: set[int]) -> Iterator[Record]:
        """Messages of these channels by time; what cannot be read is skipped, and added to the damage."""

    def close(self) -> None:
        """Close the file."""


class Damage:
    """What is known to be lost, each piece once, in the order in which it was found."""

    def __init__(self) -> None:
        self._texts: dict[str, None] = {}

    def add(self, text: str) -> None:
        self._texts[text] = None

    def __str__(self) -> str:
        return "; ".join(self._texts)


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
        """At most ``size`` bytes: fewer at the end."""
        try:
            return os.pread(self._file.fileno(), max(0, min(size, self.size - at)), at)
        except OSError as error:
            raise DataError(f"expected to read {self.path} at {at}, found: {error.strerror}; copy it again") from error

    def close(self) -> None:
        self._file.close()


def in_order(blocks: Iterable[Block], read: Callable[[Block], Iterable[Record]]) -> Iterator[Record]:
    """The messages of all blocks by time; each block is read when its first message is due."""
    pending: list[Record] = []
    for block in sorted(blocks, key=lambda block: (block.start, block.at)):
        while pending and pending[0].time < block.start:
            yield heapq.heappop(pending)
        for record in read(block):
            heapq.heappush(pending, record)
    while pending:
        yield heapq.heappop(pending)


def lost_text(channels: Mapping[int, Channel], expected: Mapping[int, int] | None, found: Mapping[int, int]) -> str:
    """In words, which messages are lost. expected: by channel; None where that is not known."""
    if expected is None:
        return "with an unknown number of messages"
    topics: Counter[str] = Counter()
    for channel, count in expected.items():
        name = channels[channel].topic if channel in channels else f"channel {channel}"
        topics[name] += max(0, count - found.get(channel, 0))
    lost = [f"{count} on {topic}" for topic, count in sorted(topics.items()) if count]
    return "with the messages " + ", ".join(lost) if lost else "without messages"


def normalised_type(name: str) -> str:
    """sensor_msgs/Image, sensor_msgs::msg::dds_::Image_ and the like as ROS 2 names it: sensor_msgs/msg/Image."""
    parts = name.replace("::", "/").replace("/dds_/", "/").removesuffix("_").split("/")
    return "/".join([parts[0], "msg", parts[-1]] if len(parts) == 2 else parts)
