"""Plays a camera into the live graph, in real time, from its own process: ``python -m scfeat_ros.player``.

The camera is rendered, or it is the images of a rosbag2, forwarded as they were recorded with their own stamps. Frames
leave on an absolute schedule whatever the receivers do: a node that is too slow must drop, and its drops are what one
wants to see. Topics are ``image`` (or ``image/compressed``) and ``camera_info``, to be remapped as usual.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import DataError, ScfeatError

from .bags import Bag, Topic, header_stamp, open_bag
from .fastdds import use_profile

SETTLE = 0.5  # seconds: the receiving side completes a match a little later, and what is sent before that is lost
LINGER = 1.0  # seconds: what a subscriber has not taken is lost when its publisher goes
FRAME_ID = "camera_optical_frame"


@dataclass(frozen=True)
class Event:
    """Something to publish.

    due: nanoseconds from the start. index: of the image in the source; None for a camera_info. stamp: nanoseconds, of
    its header. message: serialized bytes, or a message.
    """

    due: int
    index: int | None
    stamp: int
    message: Any


@dataclass
class Log:
    """What was published.

    sent: (index, stamp, CLOCK_MONOTONIC when publishing began), nanoseconds, of each image. late_ms: after schedule.
    skipped: images left out by --max-fps. error: why the source ended before its end; empty if it did not.
    """

    sent: list[tuple[int, int, int]] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    skipped: int = 0
    error: str = ""

    def summary(self) -> dict[str, Any]:
        """As JSON takes it."""
        late = np.array(self.late_ms or [0.0])
        p50, p95 = np.percentile(late, (50, 95))
        return {
            "published": len(self.sent),
            "skipped": self.skipped,
            "late_ms": {"median": float(p50), "p95": float(p95), "max": float(late.max())},
            "error": self.error,
            "sent": self.sent,
        }


# ------------------------------------------------------------------------------------------------------------- sources


def bag_events(bag: Bag, image: Topic, camera_info: Topic | None, fps: float | None, rate: float) -> Iterator[Event]:
    """Messages as they were recorded. fps: play the images at this rate instead of the recorded one.

    Raises DataError where the bag is damaged, after everything before the damage.
    """
    topics = [image] if camera_info is None else [image, camera_info]
    start: int | None = None
    images = 0
    for message in bag.messages(topics):
        is_image = message.topic == image.name
        if start is None:
            start = message.log_time
        due = message.log_time - start if fps is None else round(1e9 * images / fps)
        yield Event(round(due / rate), images if is_image else None, header_stamp(message.data), message.data)
        images += is_image


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
        yield Event(due, None, stamp, camera_info_message(frame.K, frame.image.shape, stamp))
        yield Event(due, i, stamp, image_message(frame.image, stamp))


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


def play(
    events: Iterable[Event],
    publish: Callable[[Event], None],
    stop: threading.Event,
    frames: int | None = None,
    max_fps: float | None = None,
) -> Log:
    """Publish events when they are due, on an absolute schedule that a late one does not move.

    frames: end after so many images. max_fps: leave out images (not camera_info) that would come faster than this.
    """
    log = Log()
    gap = 0 if max_fps is None else round(1e9 / max_fps)
    last = -gap
    start: int | None = None
    try:
        for event in events:
            if frames is not None and len(log.sent) + log.skipped >= frames:
                break
            if event.index is not None and event.due - last < 0.999 * gap:
                log.skipped += 1
                continue
            if start is None:  # the first event may take its time, e.g. to decompress
                start = time.monotonic_ns() + 10_000_000 - event.due
            if stop.wait(max(0, start + event.due - time.monotonic_ns()) / 1e9):
                break
            now = time.monotonic_ns()
            publish(event)
            if event.index is not None:
                last = event.due
                log.sent.append((event.index, event.stamp, now))
                log.late_ms.append((now - start - event.due) / 1e6)
    except DataError as error:
        log.error = str(error)
    return log


class Endpoints:
    """The publishers of the player, in a node of their own."""

    def __init__(self, compressed: bool) -> None:
        import rclpy
        from rclpy.qos import QoSProfile, ReliabilityPolicy
        from sensor_msgs.msg import CameraInfo, CompressedImage, Image

        self._node = rclpy.create_node("player")
        # reliable serves both kinds of subscriptions
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
        name = self._node.resolve_topic_name("image")
        topic, kind = (f"{name}/compressed", CompressedImage) if compressed else (name, Image)
        self._image = self._node.create_publisher(kind, topic, qos)
        self._camera_info = self._node.create_publisher(CameraInfo, "camera_info", qos)

    def wait_for_subscriptions(self, count: int, timeout: float, stop: threading.Event) -> None:
        """Until ``count`` subscriptions take images. Raises ScfeatError after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while (found := self._image.get_subscription_count()) < count:
            if stop.wait(0.05):
                return
            if time.monotonic() > end:
                raise ScfeatError(
                    f"expected {count} subscription(s) on {self._image.topic_name} within {timeout:g} s, "
                    f"found {found}: is the node running in this ROS_DOMAIN_ID, and does it subscribe to this topic?"
                )
        stop.wait(SETTLE)

    def publish(self, event: Event) -> None:
        """To the topic of its kind."""
        (self._camera_info if event.index is None else self._image).publish(event.message)

    def close(self) -> None:
        self._node.destroy_node()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to play, and how fast."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bag", type=Path, help="rosbag2 to play instead of the rendered camera")
    source.add_argument("--seed", type=int, default=0, help="of the rendered room (default: 0)")
    parser.add_argument("--topic", help="image topic in the bag (default: the one with most messages)")
    parser.add_argument("--frames", type=int, help="end after so many images (default: 120 rendered, all of a bag)")
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
        if value is not None and not value > 0:
            raise ScfeatError(f"expected --{name.replace('_', '-')} above 0, found {value}")


def run(
    args: argparse.Namespace,
    stop: threading.Event,
    report: Callable[[str], None],
    prepared: Callable[[], None] = lambda: None,
) -> Log:
    """Play until the end or ``stop``, which counts from ``prepared`` on: before, there is nothing to end in order.

    rclpy must be initialised.
    """
    check_arguments(args)
    damage = ""
    with ExitStack() as stack:
        if args.bag is not None:
            bag = stack.enter_context(open_bag(args.bag))
            image, why = bag.choose_image_topic(args.topic)
            report(f"playing {why}")
            damage = bag.damage
            frames, compressed = args.frames, image.compressed
            events = bag_events(bag, image, bag.camera_info_topic(image), args.fps, args.rate)
        else:
            frames, fps, compressed = args.frames or 120, args.fps or 10.0, False
            rendered = render(args.seed, frames, fps, report)
            events = rendered_events(rendered, frames, fps, args.rate)
        prepared()
        endpoints = Endpoints(compressed)
        stack.callback(endpoints.close)
        report("waiting for the node")
        endpoints.wait_for_subscriptions(args.subscriptions, args.wait, stop)
        report("playing")
        log = play(events, endpoints.publish, stop, frames, args.max_fps)
        stop.wait(LINGER)
    log.error = log.error or damage
    report(f"published {len(log.sent)} images")
    return log


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
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())

    use_profile()
    rclpy.init(args=words, signal_handler_options=SignalHandlerOptions.NO)
    logger = get_logger("player")
    try:
        log = run(args, stop, logger.info, end_in_order)
    except ScfeatError as error:
        logger.fatal(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        rclpy.try_shutdown()
    if log.error:
        logger.error(log.error)
    if args.summary is not None:
        args.summary.write_text(json.dumps(log.summary()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
