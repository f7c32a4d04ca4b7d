"""The depth maps of a recording beside its images, from which ground truth tells where points are in the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.replay.truth import DepthAt
from scfeat_ros.bags import Bag, BagMessage, Topic, header_stamp, open_bag
from scfeat_ros.images import depth_to_array

from .job import NO_DEPTH

NEAR = 20_000_000  # nanoseconds between an image and its map at most, as the tools of the TUM data set have it
_HELD = 8  # maps: those of two frames, and what comes before them


def find_depth(bag: Bag, images: Topic, name: str | None, warn: Callable[[str], None]) -> Topic | None:
    """The topic of depth maps that show what an image topic does: the one of this name, or the one with most messages
    whose frame_id is that of the images; None where there is none, or the name is "none".

    ``warn`` is told where there are maps of other views alone. Raises DataError where what is named is no depth.
    """
    if name == NO_DEPTH:
        return None
    found = [topic for topic in bag.depth_topics if topic.name != images.name]
    if name is not None:
        named = [topic for topic in found if name in (topic.name, topic.image_name)]
        if not named:
            listed = ", ".join(topic.name for topic in found) or "none"
            raise DataError(f"expected depth maps (16UC1, 32FC1) on {name} in {bag.path}, found them on: {listed}")
        return named[0]
    frame = bag.frame_id(images)
    same = [topic for topic in found if frame and bag.frame_id(topic) == frame]
    if found and not same:
        warn(
            f"depth maps on {', '.join(topic.name for topic in found)} are of another frame_id than the images "
            f"('{frame}'), or of none, so they are not used: register them, or name one with --depth if it shows the "
            "same view"
        )
    return same[0] if same else None


@contextmanager
def depth_maps(path: Path, topic: Topic, warn: Callable[[str], None]) -> Iterator[DepthAt]:
    """What gives the depth map next to a stamp, within 20 ms; asked in the order of time, as it reads the bag once.

    ``warn`` is told in the end what of them is damaged.
    """
    with open_bag(path) as bag:
        maps = _Maps(bag, topic)
        yield maps
        if maps.damaged:
            warn(f"{maps.damaged} depth maps on {topic.name} are damaged, their frames have no repeatability")
        if maps.end:
            warn(f"depth maps on {topic.name} cannot be read to the end: {maps.end}")


class _Maps:
    """State: the messages that were read last, the maps that were made of them last, and what was damaged.

    damaged: maps. end: why no further ones can be read; empty where they can.
    """

    def __init__(self, bag: Bag, topic: Topic) -> None:
        self._bag = bag
        self._messages = self._stamped(topic)
        self._read: deque[tuple[int, BagMessage]] = deque(maxlen=_HELD)
        self._made: dict[int, np.ndarray | None] = {}
        self.damaged, self.end = 0, ""

    def __call__(self, stamp: int) -> np.ndarray | None:
        # Of two maps, as the stamp of one may be damaged: one far ahead would be the last that is read.
        while len(self._read) < 2 or min(self._read[-1][0], self._read[-2][0]) < stamp + NEAR:
            if (read := next(self._messages, None)) is None:
                break
            self._read.append(read)
        nearest = min(self._read, key=lambda read: abs(read[0] - stamp), default=None)
        if nearest is None or abs(nearest[0] - stamp) > NEAR:
            return None
        if nearest[0] not in self._made:
            self._made = dict([*self._made.items()][-1:]) | {nearest[0]: self._make(nearest[1])}
        return self._made[nearest[0]]

    def _make(self, message: BagMessage) -> np.ndarray | None:
        try:
            return depth_to_array(self._bag.deserialize(message))
        except ScfeatError:
            self.damaged += 1
            return None

    def _stamped(self, topic: Topic) -> Iterator[tuple[int, BagMessage]]:
        """Messages with their stamps, as far as the bag can be read; those without a header are damaged."""
        try:
            for message in self._bag.messages([topic]):
                try:
                    stamp = header_stamp(message.data)
                except DataError:
                    self.damaged += 1
                    continue
                yield stamp, message
        except DataError as error:
            self.end = str(error)
