"""Plays a camera into the live graph, in real time, from its own process: ``python -m scfeat_ros.player``.

The camera is rendered, or it is the images of a rosbag2, forwarded as they were recorded with their own stamps. Frames
leave on an absolute schedule whatever the receivers do: a node that is too slow must drop, and its drops are what one
wants to see. Topics are ``image`` (or ``image/compressed``) and ``camera_info``, to be remapped as usual. With
``--camera`` and ``--beside`` any topics of a bag are played under their own names, with the QoS that they were recorded
with, and ``/clock`` beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import DataError, ScfeatError

from .bags import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, Bag, BagMessage, Topic, header_stamp, open_bag
from .fastdds import use_profile
from .offered_qos import Offer, merged, read_offers
from .processes import handle_signals

SETTLE = 0.5  # seconds: the receiving side completes a match a little later, and what is sent before that is lost
LINGER = 1.0  # seconds: what a subscriber has not taken is lost when its publisher goes
FRAME_ID = "camera_optical_frame"
CLOCK = "/clock"
IMU = "sensor_msgs/msg/Imu"
_LOOK_BACK = (2 * 10**9, 60 * 10**9, 2**63)  # nanoseconds
PLAYABLE = (IMAGE, COMPRESSED_IMAGE, CAMERA_INFO, IMU)  # what the node takes
QOS = ("recorded", "reliable")
RELIABLE = Offer()


@dataclass(frozen=True)
class Event:
    """Something to publish.

    due: nanoseconds from the start. index: of the image in its topic; None of what is no image of a camera. stamp:
    nanoseconds, of its header; without one ``time``; of CLOCK the time itself. message: serialized bytes, or a message.
    topic: which of the outlets it is for. time: nanoseconds, when it was recorded.
    """

    due: int
    index: int | None
    stamp: int
    message: Any
    topic: str = ""
    time: int = 0


@dataclass(frozen=True)
class Loss:
    """What a bag does not give. damage: in words; empty where nothing is known to be missing. messages: images; size:
    bytes; None where nobody knows how many."""

    damage: str = ""
    messages: int | None = 0
    size: int | None = 0


def _loss(bag: Bag, images: Iterable[Topic]) -> Loss:
    lost = [bag.lost_messages(topic) for topic in images]
    known = [count for count in lost if count is not None]
    return Loss(bag.damage, sum(known) if len(known) == len(lost) else None, bag.lost_bytes)


@dataclass
class Log:
    """What was published.

    sent: (index, stamp, CLOCK_MONOTONIC when publishing began), nanoseconds, of each image. topics: of each of these.
    late_ms: after schedule. skipped: images left out by --max-fps. error: why the source ended before its end; empty if
    it did not. cpu: share of one core that playing took. stopped: it was told to end before the end. time: what CLOCK
    said last, nanoseconds. loss: what the bag did not give.
    """

    sent: list[tuple[int, int, int]] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    skipped: int = 0
    error: str = ""
    cpu: float = 0.0
    stopped: bool = False
    time: int = 0
    loss: Loss = Loss()

    def summary(self) -> dict[str, Any]:
        """As JSON takes it."""
        late = np.array(self.late_ms or [0.0])
        p50, p95 = np.percentile(late, (50, 95))
        return {
            "published": len(self.sent),
            "skipped": self.skipped,
            "late_ms": {"median": float(p50), "p95": float(p95), "max": float(late.max())},
            "error": self.error,
            "cpu": self.cpu,
            "stopped": self.stopped,
            "damage": self.loss.damage,
            "lost_messages": self.loss.messages,
            "lost_bytes": self.loss.size,
            "sent": self.sent,
            "topics": self.topics,
        }


# ------------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Window:
    """Which seconds of a recording are played, counted from its first image; stop None: to the end."""

    start: float = 0.0
    stop: float | None = None


WHOLE = Window()


def bag_events(
    bag: Bag, image: Topic, camera_info: Topic | None, fps: float | None, rate: float, window: Window = WHOLE
) -> Iterator[Event]:
    """The images of one topic and its camera_info, for the outlets of these names; see :func:`recorded_events`."""
    beside = {camera_info: "camera_info"} if camera_info else {}
    return recorded_events(bag, {image: "image"}, beside, rate, fps, window)


def recorded_events(
    bag: Bag,
    cameras: Mapping[Topic, str],
    beside: Mapping[Topic, str],
    rate: float,
    fps: float | None = None,
    window: Window = WHOLE,
) -> Iterator[Event]:
    """Messages as they were recorded. cameras, beside: topics to outlets, of images that count as frames, and of what
    goes with them. fps: play the images at this rate instead of the recorded one.

    Raises DataError where the bag is damaged, after everything before the damage, and where no image is in the window.
    """
    outlets = {topic.name: outlet for topic, outlet in (*beside.items(), *cameras.items())}
    images = dict.fromkeys((topic.name for topic in cameras), 0)
    start: int | None = None
    for message in _within(bag, cameras, beside, window):
        if start is None:
            start = message.log_time
        index = images.get(message.topic)
        count = max(images.values()) if index is None else index
        due = message.log_time - start if fps is None else round(1e9 * count / fps)
        yield Event(round(due / rate), index, _stamp(message), message.data, outlets[message.topic], message.log_time)
        if index is not None:
            images[message.topic] += 1
    if window != WHOLE and not any(images.values()):
        raise DataError(f"expected images from {window.start:g} s on in {bag.path}, found none: choose another --start")


def _stamp(message: BagMessage) -> int:
    """Of its header, nanoseconds; without one it is that of the recording, and who receives it has the damage."""
    try:
        return header_stamp(message.data)
    except DataError:
        return message.log_time


def _within(bag: Bag, cameras: Collection[Topic], beside: Collection[Topic], window: Window) -> Iterator[BagMessage]:
    """The messages of a window. Before those that begin later comes, at the time at which it begins, the newest
    calibration until then of each camera, without which a node would not know it before it comes again."""
    begin, end = 0, float("inf")
    if window != WHOLE:
        first = next(bag.messages(cameras), None)
        if first is None:
            return
        begin = first.log_time + round(1e9 * window.start) if window.start else 0
        end = end if window.stop is None else first.log_time + round(1e9 * window.stop)
    if begin:
        for topic in beside:
            if topic.type == CAMERA_INFO and (newest := _newest(bag, topic, begin)) is not None:
                yield replace(newest, log_time=begin)
    for message in bag.messages([*cameras, *beside], since=begin):
        if message.log_time >= end:
            return
        yield message


def _newest(bag: Bag, topic: Topic, before: int) -> BagMessage | None:
    """The last message until some time, nanoseconds; looked for nearby first, as chunks are read for it."""
    for back in _LOOK_BACK:
        newest = None
        for message in bag.messages([topic], since=max(1, before - back)):
            if message.log_time > before:
                break
            newest = message
        if newest is not None:
            return newest
    return None


def with_clock(events: Iterable[Event], rate: float, frequency: float) -> Iterator[Event]:
    """The events, and between them the time of the bag as CLOCK: ``frequency`` times a second of real time, and before
    each image, so that it arrives at the time at which it was recorded. The time never goes back.
    """
    period = round(1e9 / frequency)
    tick: int | None = None
    for event in events:
        if tick is None:
            tick, start, now = event.due, event.time - round(event.due * rate), 0
        while tick < event.due:
            now = max(now, start + round(tick * rate))
            yield Event(tick, None, now, None, CLOCK, now)
            tick += period
        if event.index is not None:
            now = max(now, event.time)
            yield Event(event.due, None, now, None, CLOCK, now)
        yield event


def ticks(time: int, rate: float, frequency: float, seconds: float) -> Iterator[Event]:
    """CLOCK alone, from ``time`` (nanoseconds) on for so many seconds of real time."""
    for i in range(1, round(seconds * frequency) + 1):
        due = round(1e9 * i / frequency)
        yield Event(due, None, time + round(due * rate), None, CLOCK)


def distinct_frames(frames: int, fps: float) -> int:
    """How many frames of the rendered camera differ: its path is closed, and goes round again after a period."""
    from scfeat_core.demo_scene import PERIOD

    return min(frames, max(1, round(PERIOD * fps)))


def render(seed: int, frames: int, fps: float, progress: Callable[[str], None]) -> list[Any]:
    """All distinct frames, ahead of time: rendering while playing would take the node's cores. 0.9 MB each."""
    from scfeat_core.demo_scene import Scene

    progress("rendering: building the scene")
    count = distinct_frames(frames, fps)
    rendered = []
    for frame in Scene(seed).frames(count, fps):
        rendered.append(frame)
        progress(f"rendering: {len(rendered)} of {count} frames")
    return rendered


def rendered_events(rendered: Sequence[Any], frames: int, fps: float, rate: float) -> Iterator[Event]:
    """The rendered camera; the stamps are the times at which the frames are due, counted from now."""
    start = time.time_ns() + 10_000_000
    for i in range(frames):
        due = round(1e9 * i / (fps * rate))
        frame = rendered[i % len(rendered)]
        stamp = start + due
        yield Event(due, None, stamp, camera_info_message(frame.K, frame.image.shape, stamp), "camera_info")
        yield Event(due, i, stamp, image_message(frame.image, stamp), "image")


def image_message(image: np.ndarray, stamp: int, frame_id: str = FRAME_ID) -> Any:
    """sensor_msgs/Image of an (H, W, 3) RGB or (H, W) gray uint8 array. stamp: nanoseconds."""
    from sensor_msgs.msg import Image

    image = np.ascontiguousarray(image)
    message = Image(height=image.shape[0], width=image.shape[1], step=image.strides[0])
    message.encoding = "rgb8" if image.ndim == 3 else "mono8"
    _set_header(message.header, stamp, frame_id)
    message.data.frombytes(image)
    return message


def camera_info_message(K: np.ndarray, shape: Sequence[int], stamp: int, frame_id: str = FRAME_ID) -> Any:
    """sensor_msgs/CameraInfo of an ideal pinhole. K: (3, 3). shape: that of the image, (H, W, ...)."""
    from sensor_msgs.msg import CameraInfo

    message = CameraInfo(height=shape[0], width=shape[1], distortion_model="plumb_bob", d=[0.0] * 5)
    _set_header(message.header, stamp, frame_id)
    message.k = np.asarray(K, np.float64).ravel()
    message.r = np.eye(3).ravel()
    message.p = np.column_stack([K, np.zeros(3)]).ravel()
    return message


def _set_header(header: Any, stamp: int, frame_id: str) -> None:
    header.stamp.sec, header.stamp.nanosec = divmod(stamp, 1_000_000_000)
    header.frame_id = frame_id


# ---------------------------------------------------------------------------------------------------------------- play


def _limited(events: Iterable[Event], frames: int | None) -> Iterator[Event]:
    """The events up to so many images of one topic; all of them where it is None."""
    seen: Counter[str] = Counter()
    for event in events:
        if event.index is not None:
            if seen[event.topic] == frames:
                return
            seen[event.topic] += 1
        yield event


def play(
    events: Iterable[Event],
    publish: Callable[[Event], None],
    stop: threading.Event,
    frames: int | None = None,
    max_fps: float | None = None,
) -> Log:
    """Publish events when they are due, on an absolute schedule that a late one does not move.

    frames: end after so many images of a topic. max_fps: leave out images (not camera_info) that would come faster
    than this.
    """
    log = Log()
    gap = 0 if max_fps is None else round(1e9 / max_fps)
    last: dict[str, int] = {}
    start: int | None = None
    try:
        for event in _limited(events, frames):
            if event.index is not None and event.due - last.get(event.topic, -gap) < 0.999 * gap:
                log.skipped += 1
                continue
            if start is None:  # the first event may take its time, e.g. to decompress
                start = time.monotonic_ns() + 10_000_000 - event.due
            if stop.wait(max(0, start + event.due - time.monotonic_ns()) / 1e9):
                log.stopped = True
                break
            now = time.monotonic_ns()
            publish(event)
            if event.index is not None:
                last[event.topic] = event.due
                log.sent.append((event.index, event.stamp, now))
                log.topics.append(event.topic)
                log.late_ms.append((now - start - event.due) / 1e6)
            elif event.topic == CLOCK:
                log.time = event.stamp
    except DataError as error:
        log.error = str(error)
    return log


@dataclass(frozen=True)
class Outlet:
    """A topic that is published. key: what Event.topic calls it. name: before it is remapped. suffix: what is appended
    to the name after that. type: e.g. sensor_msgs/msg/Image. image: of a camera, and somebody must take it. offer: the
    QoS that it is published with.
    """

    key: str
    name: str
    type: str
    image: bool = False
    suffix: str = ""
    offer: Offer = RELIABLE


class Endpoints:
    """The publishers of the player, in a node of their own."""

    def __init__(self, outlets: Iterable[Outlet], clock: bool = False) -> None:
        import rclpy
        from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu

        kinds = {IMAGE: Image, COMPRESSED_IMAGE: CompressedImage, CAMERA_INFO: CameraInfo, IMU: Imu}
        self._node = rclpy.create_node("player")
        self._publishers: dict[str, Any] = {}
        self._images: list[tuple[Any, Outlet]] = []
        for outlet in outlets:
            topic = self._node.resolve_topic_name(outlet.name) + outlet.suffix if outlet.suffix else outlet.name
            publisher = self._node.create_publisher(kinds[outlet.type], topic, _profile(outlet.offer))
            self._publishers[outlet.key] = publisher
            if outlet.image:
                self._images.append((publisher, outlet))
        if clock:
            self._add_clock()

    def _add_clock(self) -> None:
        from rosgraph_msgs.msg import Clock

        self._publishers[CLOCK] = self._node.create_publisher(Clock, CLOCK, _profile(RELIABLE))

    def wait_for_subscriptions(self, count: int, timeout: float, stop: threading.Event) -> None:
        """Until ``count`` subscriptions take the images of each camera.

        Raises ScfeatError after ``timeout`` seconds, and where there is another publisher of CLOCK.
        """
        end = time.monotonic() + timeout
        for publisher, outlet in self._images:
            while (found := publisher.get_subscription_count()) < count:
                if stop.wait(0.05):
                    return
                if time.monotonic() > end:
                    expected = f"expected {count} subscription(s) on {publisher.topic_name} within {timeout:g} s"
                    raise ScfeatError(f"{expected}, found {found}: {self._why(publisher, outlet)}")
        stop.wait(SETTLE)
        if CLOCK in self._publishers and self._node.count_publishers(CLOCK) > 1:
            raise ScfeatError(
                f"expected nobody else to publish {CLOCK}, found {self._node.count_publishers(CLOCK) - 1} other "
                "publisher(s): end them, or play without the clock (--clock 0)"
            )

    def _why(self, publisher: Any, outlet: Outlet) -> str:
        """Nobody takes what is published: what those ask for who have the name, or which names there are."""
        infos = self._node.get_subscriptions_info_by_topic(publisher.topic_name)
        others = [f"{_full_name(info)} takes {info.topic_type}" for info in infos if info.topic_type != outlet.type]
        if others:
            return f"{', '.join(others)}, and {outlet.type} is played: image_transport must fit to the bag"
        refused = [f"{_full_name(info)} asks for {what}" for info in infos if (what := _missing(publisher, info))]
        if refused:
            return f"{', '.join(refused)}, which is not offered: play with --qos reliable, or change the subscription"
        listing = self._node.get_topic_names_and_types()
        taken = [name for name, types in listing if outlet.type in types and self._node.count_subscribers(name)]
        where = f"; topics of {outlet.type} that are subscribed to: {', '.join(taken) or 'none'}"
        return f"is the node running in this ROS_DOMAIN_ID, and does it subscribe to this topic?{where}"

    def publish(self, event: Event) -> None:
        """To the topic of its kind."""
        message = clock_message(event.stamp) if event.topic == CLOCK else event.message
        self._publishers[event.topic].publish(message)

    def close(self) -> None:
        self._node.destroy_node()


def clock_message(time: int) -> Any:
    """rosgraph_msgs/Clock. time: nanoseconds."""
    from rosgraph_msgs.msg import Clock

    message = Clock()
    message.clock.sec, message.clock.nanosec = divmod(time, 1_000_000_000)
    return message


def _profile(offer: Offer) -> Any:
    """The rclpy profile. A depth of 2^32 - 1 stands for all; more than a second of images helps nobody."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    return QoSProfile(
        depth=min(100, max(5, offer.depth)),
        reliability=ReliabilityPolicy.RELIABLE if offer.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if offer.kept else DurabilityPolicy.VOLATILE,
    )


def _missing(publisher: Any, info: Any) -> str:
    """What a subscription asks for and the publisher does not offer; empty where it fits."""
    asked, offered = info.qos_profile, publisher.qos_profile
    wrong = []
    if asked.reliability.name == "RELIABLE" and offered.reliability.name == "BEST_EFFORT":
        wrong.append("reliability reliable")
    if asked.durability.name == "TRANSIENT_LOCAL" and offered.durability.name == "VOLATILE":
        wrong.append("durability transient_local")
    return " and ".join(wrong)


def _full_name(info: Any) -> str:
    return f"{info.node_namespace.rstrip('/')}/{info.node_name}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to play, and how fast."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bag", type=Path, help="rosbag2 to play instead of the rendered camera")
    source.add_argument("--seed", type=int, default=0, help="of the rendered room (default: 0)")
    parser.add_argument("--topic", help="image topic in the bag (default: the one with most messages)")
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="NAME[=OTHER]",
        help="play this image topic of the bag under its own name, or another; again for each camera",
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME[=OTHER]",
        help="with --camera: play this topic (camera info, mask, imu), too; again for each",
    )
    parser.add_argument("--clock", type=float, default=0.0, help="publish /clock so many times a second (default: 0)")
    parser.add_argument(
        "--hold", type=float, default=LINGER, help="seconds for which it goes on at the end (default: 1)"
    )
    parser.add_argument(
        "--qos", choices=QOS, default=QOS[0], help="with --camera: as recorded, or all reliable (default: recorded)"
    )
    parser.add_argument("--frames", type=int, help="end after so many images (default: 120 rendered, all of a bag)")
    parser.add_argument(
        "--start", type=float, default=0.0, help="seconds of the bag to leave out, from its first image on"
    )
    parser.add_argument("--stop", type=float, help="seconds of the bag, from its first image on, after which to end")
    parser.add_argument("--fps", type=float, help="images per second (default: 10 rendered, as recorded from a bag)")
    parser.add_argument("--rate", type=float, default=1.0, help="speed, 2 plays twice as fast (default: 1)")
    parser.add_argument("--max-fps", type=float, help="leave out images that would come faster than this")
    parser.add_argument("--subscriptions", type=int, default=1, help="start when so many take images (default: 1)")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for them (default: 60)")
    parser.add_argument("--summary", type=Path, help="write what was published to this JSON file")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ScfeatError for numbers that make no sense."""
    for name in ("frames", "fps", "rate", "max_fps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ScfeatError(f"expected --{name.replace('_', '-')} above 0, found {value}")
    end = float("inf") if args.stop is None else args.stop
    if not 0 <= args.start < end:
        raise ScfeatError(f"expected 0 <= --start < --stop (seconds), found start {args.start}, stop {args.stop}")


def run(
    args: argparse.Namespace,
    stop: threading.Event,
    report: Callable[[str], None],
    prepared: Callable[[], None] = lambda: None,
    finished: Callable[[Log], None] = lambda log: None,
) -> Log:
    """Play until the end or ``stop``, which counts from ``prepared`` on: before, there is nothing to end in order.

    finished: gets the log when all is played; the clock goes on after that, or what is in work then would not age.
    rclpy must be initialised.
    """
    check_arguments(args)
    with ExitStack() as stack:
        source = _open(args, stack, report)
        prepared()
        endpoints = Endpoints(source.outlets, args.clock > 0)
        stack.callback(endpoints.close)
        report("waiting for the node")
        endpoints.wait_for_subscriptions(args.subscriptions, args.wait, stop)
        report("playing")
        events = with_clock(source.events, args.rate, args.clock) if args.clock > 0 else source.events
        cpu, began = time.process_time(), time.monotonic()
        log = play(events, endpoints.publish, stop, source.frames, args.max_fps)
        log.cpu = (time.process_time() - cpu) / max(1e-9, time.monotonic() - began)
        log.loss = source.loss()
        log.error = log.error or log.loss.damage
        report(f"published {len(log.sent)} images")
        finished(log)
        if args.clock > 0:
            play(ticks(log.time, args.rate, args.clock, args.hold), endpoints.publish, stop)
        else:
            stop.wait(LINGER)
    return log


@dataclass(frozen=True)
class _Source:
    """What is played. frames: at most, of each topic. loss: what is missing of the bag, as far as it was read."""

    outlets: Sequence[Outlet]
    events: Iterable[Event]
    frames: int | None
    loss: Callable[[], Loss] = lambda: Loss()


def _open(args: argparse.Namespace, stack: ExitStack, report: Callable[[str], None]) -> _Source:
    if args.bag is None:
        frames, fps = args.frames or 120, args.fps or 10.0
        rendered = render(args.seed, frames, fps, report)
        events = rendered_events(rendered, frames, fps, args.rate)
        return _Source((Outlet("image", "image", IMAGE, True), _CAMERA_INFO), events, frames)
    bag = stack.enter_context(open_bag(args.bag))
    if args.camera:
        return _forwarded(args, bag, report)
    image, why = bag.choose_image_topic(args.topic)
    report(f"playing {why}")
    window = Window(args.start, args.stop)
    events = bag_events(bag, image, bag.camera_info_topic(image), args.fps, args.rate, window)
    outlet = Outlet("image", "image", image.type, True, "/compressed" if image.compressed else "")
    return _Source((outlet, _CAMERA_INFO), events, args.frames, lambda: _loss(bag, [image]))


_CAMERA_INFO = Outlet("camera_info", "camera_info", CAMERA_INFO)


def _forwarded(args: argparse.Namespace, bag: Bag, report: Callable[[str], None]) -> _Source:
    """The topics that are named, each with an outlet of its own name in the bag."""
    cameras = {_topic(bag, word): word for word in args.camera}
    beside = {_topic(bag, word): word for word in args.beside}
    offers = read_offers(args.bag) if args.qos == "recorded" else {}
    outlets = [
        Outlet(
            *(topic.name, word.partition("=")[2] or topic.name, topic.type, topic in cameras),
            offer=merged(offers.get(topic.name, ())),
        )
        for topic, word in (*cameras.items(), *beside.items())
    ]
    report(f"playing {', '.join(outlet.name for outlet in outlets)}")
    images, others = ({topic: topic.name for topic in topics} for topics in (cameras, beside))
    events = recorded_events(bag, images, others, args.rate, args.fps, Window(args.start, args.stop))
    return _Source(outlets, events, args.frames, lambda: _loss(bag, images))


def _topic(bag: Bag, word: str) -> Topic:
    name = word.partition("=")[0]
    found = [topic for topic in bag.topics if topic.name == name and topic.type in PLAYABLE]
    if not found:
        raise ScfeatError(f"expected a topic {name} of {', '.join(PLAYABLE)} in {bag.path}, found none: check the name")
    return found[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error."""
    import rclpy
    from rclpy.logging import get_logger
    from rclpy.signals import SignalHandlerOptions
    from rclpy.utilities import remove_ros_args

    words = list(sys.argv if argv is None else ["player", *argv])
    parser = argparse.ArgumentParser(prog="python -m scfeat_ros.player", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(remove_ros_args(words)[1:])
    stop = threading.Event()

    def end_in_order() -> None:
        handle_signals(lambda *_: stop.set())

    use_profile()
    rclpy.init(args=words, signal_handler_options=SignalHandlerOptions.NO)
    logger = get_logger("player")
    try:
        log = run(args, stop, logger.info, end_in_order, lambda log: _write_summary(args.summary, log))
    except ScfeatError as error:
        logger.fatal(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        rclpy.try_shutdown()
    if log.error:
        logger.error(log.error)
    return 0


def _write_summary(path: Path | None, log: Log) -> None:
    """At once, or not at all: somebody may wait for it."""
    if path is not None:
        path.with_suffix(".part").write_text(json.dumps(log.summary()))
        path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    sys.exit(main())
