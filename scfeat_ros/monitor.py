"""Watches a node from outside, as any subscriber sees it.

:class:`Monitor` keeps what the pictures of the demo are made of: features, matches and status, and the images. A
:class:`Listener` takes all that the node publishes as it comes, serialized, and keeps when it came.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import NodeNameNonExistentError
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from scfeat.msg import Features, FrontendStatus, Matches, Tracks
from sensor_msgs.msg import CompressedImage, Image

from .bags import header_stamp
from .images import compressed_to_array, image_to_array
from .inputs import stamp_of
from .messages import matches_from_message

# Bytes of images that are kept until their matches come: between lie the frames that the node works on or drops.
IMAGES_KEPT = 200_000_000
SAMPLES = (0.25, 0.5, 0.75)  # where in the sequence the pairs for the pictures are

Item = TypeVar("Item")
Own = TypeVar("Own", bound="Watcher")


class Spread(Generic[Item]):
    """A few of all items that are offered, evenly spread over them however many there will be, the first included."""

    def __init__(self, limit: int = 8) -> None:
        """limit: at most so many are kept, and at least half of it where there are enough; even."""
        self.items: list[Item] = []
        self._limit = limit
        self._offered = 0
        self._stride = 1

    def offer(self, make: Callable[[], Item]) -> None:
        """The next item, which is made only where it is kept."""
        if self._offered % self._stride == 0:
            if len(self.items) == self._limit:
                del self.items[1::2]
                self._stride *= 2
            self.items.append(make())
        self._offered += 1

    def at(self, shares: tuple[float, ...]) -> list[Item]:
        """Those that are nearest to these shares, 0 to 1, of the sequence; none twice."""
        last = len(self.items) - 1
        return [self.items[i] for i in sorted({round(share * last) for share in shares})] if self.items else []


@dataclass(frozen=True, eq=False)
class PairRecord:
    """One Matches message. keypoints0, keypoints1: (M, 2) pixels. inliers: (M,) bool, None where not verified."""

    stamp0: int
    stamp1: int
    keypoints0: np.ndarray
    keypoints1: np.ndarray
    inliers: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Sample:
    """A pair with its images, for a picture. image0, image1: as images.py decodes them."""

    pair: PairRecord
    image0: np.ndarray
    image1: np.ndarray


@dataclass
class Observations:
    """What came in. features: (stamp, CLOCK_MONOTONIC at arrival, keypoints) of each Features message."""

    features: list[tuple[int, int, int]] = field(default_factory=list)
    pairs: list[PairRecord] = field(default_factory=list)
    statuses: list[FrontendStatus] = field(default_factory=list)
    kept: Spread[Sample] = field(default_factory=Spread)
    images: int = 0

    @property
    def samples(self) -> list[Sample]:
        """Pairs for pictures; there are some where any pair came with its images."""
        return self.kept.at(SAMPLES)

    @property
    def status(self) -> FrontendStatus | None:
        """The newest one."""
        return self.statuses[-1] if self.statuses else None


def dropped(status: FrontendStatus) -> dict[str, int]:
    """Reason -> frames."""
    prefix = "dropped_"
    fields = status.get_fields_and_field_types()
    return {name.removeprefix(prefix): getattr(status, name) for name in fields if name.startswith(prefix)}


def waiting(status: FrontendStatus) -> int:
    """Frames that the node has received and not finished."""
    return status.received - status.processed - sum(dropped(status).values())


class Watcher:
    """A node with its own context in one domain; a context manager. It is spun by the thread that waits.

    domain: None for that of the environment.
    """

    def __init__(self, domain: int | None) -> None:
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context, domain_id=domain)
        self._node = rclpy.create_node("scfeat_monitor", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    def spin(self, seconds: float) -> None:
        """Take what arrives within the time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)


class Monitor(Watcher):
    """Of one camera: decodes a few of its images, and keeps them with the matches between them."""

    def __init__(self, domain: int, node: str, image: str, compressed: bool) -> None:
        super().__init__(domain)
        self.seen = Observations()
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._compressed = compressed
        kind, self._topic = (CompressedImage, f"{image}/compressed") if compressed else (Image, image)
        images = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
        results = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)
        create = self._node.create_subscription
        create(kind, self._topic, self._on_image, images, raw=True)  # decoded only where a picture is made
        create(Features, f"{node}/features", self._on_features, results)
        create(Matches, f"{node}/matches", self._on_matches, results)
        create(FrontendStatus, f"{node}/status", self._on_status, results)

    def _on_image(self, data: bytes) -> None:
        self.seen.images += 1
        self._kept[header_stamp(data)] = data
        if len(data) * len(self._kept) > IMAGES_KEPT:
            self._kept.popitem(last=False)

    def _on_features(self, message: Features) -> None:
        stamp = stamp_of(message)
        self.seen.features.append((stamp, time.monotonic_ns(), len(message.scores)))

    def _on_matches(self, message: Matches) -> None:
        result = matches_from_message(message)
        inliers = None if result.geometry is None else result.geometry.inliers
        stamp1 = stamp_of(message)
        pair = PairRecord(result.stamp0, stamp1, result.keypoints0, result.keypoints1, inliers)
        self.seen.pairs.append(pair)
        if pair.stamp0 in self._kept and pair.stamp1 in self._kept:
            self.seen.kept.offer(lambda: self._sample(pair))

    def _on_status(self, message: FrontendStatus) -> None:
        self.seen.statuses.append(message)

    def _sample(self, pair: PairRecord) -> Sample:
        return Sample(pair, *(self._decode(self._kept[stamp]) for stamp in (pair.stamp0, pair.stamp1)))

    def _decode(self, data: bytes) -> Any:
        if self._compressed:
            return compressed_to_array(deserialize_message(data, CompressedImage))
        return image_to_array(deserialize_message(data, Image))


# ------------------------------------------------------------------------------------------------ all that is published

STATUS = "scfeat/msg/FrontendStatus"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
RESULTS = {"scfeat/msg/Features": Features, "scfeat/msg/Matches": Matches, "scfeat/msg/Tracks": Tracks}
RECORDED = RESULTS | {STATUS: FrontendStatus, DIAGNOSTICS: DiagnosticArray}
MEASURED = (
    *(f"ms_{stage}" for stage in ("queue", "decode", "preprocess", "network", "match", "publish", "total")),
    *("age_ms", "keypoints", "matches", "inliers", "tracks", "inlier_ratio", "coverage"),
)


@dataclass
class Heard:
    """What one camera of the node said.

    name: of the camera. first, last: its status before anything was played, and the newest. frames: stamp -> the fields
    MEASURED of the status of that frame. news: how many came. at: when the last did, CLOCK_MONOTONIC, nanoseconds.
    restarts: how often the counters began anew.
    """

    name: str = ""
    first: FrontendStatus | None = None
    last: FrontendStatus | None = None
    frames: dict[int, tuple[float, ...]] = field(default_factory=dict)
    news: int = 0
    at: int = 0
    restarts: int = 0

    def take(self, message: FrontendStatus, now: int) -> None:
        if self.last is not None and message.received < self.last.received:
            self.restarts += 1
        self.name, self.last, self.news, self.at = message.camera, message, self.news + 1, now
        self.first = self.first or message
        if message.processed > self.first.processed:
            stamp = stamp_of(message)
            self.frames.setdefault(stamp, tuple(float(getattr(message, name)) for name in MEASURED))


Sink = Callable[[str, int, bytes], None]


class Listener(Watcher):
    """Takes what one node publishes and hands it on as it came.

    sink(topic, time, data): told of each message; time: nanoseconds since 1970, at its arrival. arrivals: topic ->
    (stamp, CLOCK_MONOTONIC at arrival), nanoseconds, of features, matches and tracks. heard: topic of the status ->
    what that camera said. inputs: camera -> topic of its images, as the diagnostics say.
    """

    def __init__(self, domain: int | None, node: str, sink: Sink) -> None:
        super().__init__(domain)
        self.arrivals: dict[str, list[tuple[int, int]]] = {}
        self.heard: dict[str, Heard] = {}
        self.inputs: dict[str, str] = {}
        self._sink = sink
        self._namespace, _, self._name = node.rpartition("/")

    def nodes(self) -> list[str]:
        """The full names of the nodes that are known; one twice where two nodes have it."""
        found = self._node.get_node_names_and_namespaces()
        return sorted(f"{space.rstrip('/')}/{name}" for name, space in found if name != self._node.get_name())

    def published(self) -> dict[str, str]:
        """Topic -> type, of what the node publishes and can be recorded. Empty while it is not known."""
        return self._ask(self._node.get_publisher_names_and_types_by_node, RECORDED)

    def subscribed(self, types: Container[str]) -> dict[str, str]:
        """Topic -> type, of what the node subscribes to."""
        return self._ask(self._node.get_subscriber_names_and_types_by_node, types)

    def _ask(self, question: Callable[[str, str], Any], types: Container[str]) -> dict[str, str]:
        try:
            answer = question(self._name, self._namespace or "/")
        except NodeNameNonExistentError:
            return {}
        return {topic: kinds[0] for topic, kinds in sorted(answer) if kinds[0] in types}

    def listen(self, topics: Mapping[str, str]) -> None:
        """Subscribe, as reliably as the publishers offer it. topics: topic -> type."""
        for topic, kind in topics.items():
            offers = [info.qos_profile.reliability for info in self._node.get_publishers_info_by_topic(topic)]
            best_effort = ReliabilityPolicy.BEST_EFFORT in offers
            profile = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
            if best_effort:
                profile.reliability = ReliabilityPolicy.BEST_EFFORT
            callback = partial(self._take, topic, self._reader(topic, kind))
            self._node.create_subscription(RECORDED[kind], topic, callback, profile, raw=True)

    def _reader(self, topic: str, kind: str) -> Callable[[bytes, int], None]:
        """What else is done with a message of a topic."""
        if kind == STATUS:
            heard = self.heard[topic] = Heard()
            return lambda data, now: heard.take(deserialize_message(data, FrontendStatus), now)
        if kind == DIAGNOSTICS:
            return lambda data, now: self._read_inputs(deserialize_message(data, DiagnosticArray))
        arrivals = self.arrivals[topic] = []
        return lambda data, now: arrivals.append((header_stamp(data), now))

    def _take(self, topic: str, read: Callable[[bytes, int], None], data: bytes) -> None:
        now, clock = time.monotonic_ns(), time.time_ns()
        self._sink(topic, clock, data)
        read(data, now)

    def _read_inputs(self, message: DiagnosticArray) -> None:
        prefix = f"{self._namespace}/{self._name}".lstrip("/") + ": "
        for status in message.status:
            values = {pair.key: pair.value for pair in status.values}
            if status.name.startswith(prefix) and "topic" in values:
                self.inputs[status.hardware_id] = values["topic"]
