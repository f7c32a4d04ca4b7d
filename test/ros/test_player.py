"""The player keeps its schedule, drops nothing of its own accord, and forwards what was recorded byte by byte."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from scfeat_core.errors import DataError, ScfeatError
from scfeat_ros.bags import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, BagMessage, header_stamp, open_bag, write_bag
from scfeat_ros.images import image_to_array
from scfeat_ros.player import Event, bag_events, check_arguments, distinct_frames, image_message, play

START = 1_600_000_000_000_000_001
MS = 1_000_000


def events(count: int, period_ms: float) -> Iterator[Event]:
    for i in range(count):
        due = round(i * period_ms * MS)
        yield Event(due, None, i, "info")
        yield Event(due, i, i, "image")


def test_frames_leave_on_an_absolute_schedule() -> None:
    """One publish call that takes as long as three periods must not shift the later ones."""
    sent: list[tuple[int, str]] = []

    def publish(event: Event) -> None:
        sent.append((time.monotonic_ns(), event.message))
        if event.index == 3:
            time.sleep(0.15)

    log = play(events(20, 50), publish, threading.Event())
    times = np.array([at for at, kind in sent if kind == "image"])
    assert [index for index, _, _ in log.sent] == list(range(20))
    assert [kind for _, kind in sent] == ["info", "image"] * 20
    late = (times - times[0]) / MS - 50 * np.arange(20)
    assert np.median(np.abs(late[8:])) < 10, "the schedule has moved"
    assert max(log.late_ms) > 80, "the frames behind the slow one were late, and are said to be"
    assert log.summary()["published"] == 20


def test_max_fps_leaves_out_images_evenly() -> None:
    log = play(events(30, 10), lambda event: None, threading.Event(), max_fps=50)
    assert [index for index, _, _ in log.sent] == list(range(0, 30, 2))
    assert log.skipped == 15


def test_the_number_of_images_is_limited() -> None:
    published: list[Event] = []
    log = play(events(30, 1), published.append, threading.Event(), frames=4)
    assert len(log.sent) == 4
    assert sum(event.index is not None for event in published) == 4


def test_stops_at_once_when_told() -> None:
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    log = play(events(100, 1000), lambda event: None, stop)
    assert time.monotonic() - began < 5
    assert len(log.sent) == 1


def test_a_damaged_source_is_played_up_to_the_damage() -> None:
    def broken() -> Iterator[Event]:
        yield from events(3, 1)
        raise DataError("torn")

    log = play(broken(), lambda event: None, threading.Event())
    assert len(log.sent) == 3
    assert log.summary()["error"] == "torn"


def test_numbers_that_make_no_sense_are_refused() -> None:
    good = {"frames": None, "fps": None, "rate": 1.0, "max_fps": None, "start": 0.0, "stop": None}
    check_arguments(SimpleNamespace(**good))
    for name, value in (("frames", 0), ("rate", -1.0), ("max_fps", float("nan"))):
        with pytest.raises(ScfeatError, match=f"--{name.replace('_', '-')} above 0"):
            check_arguments(SimpleNamespace(**{**good, name: value}))
    for window in ({"start": -1.0}, {"start": 2.0, "stop": 2.0}, {"stop": 0.0}, {"start": float("nan")}):
        with pytest.raises(ScfeatError, match="0 <= --start < --stop"):
            check_arguments(SimpleNamespace(**{**good, **window}))


def test_the_rendered_camera_goes_round() -> None:
    assert distinct_frames(50, 10.0) == 50
    assert distinct_frames(5000, 10.0) == 140


def stores():
    typesys = pytest.importorskip(
        "rosbags.typesys", reason="rosbags is not installed: pip install 'scfeat-python[bags]'"
    )
    return typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)


def camera_bag(path: Path, compressed: bool, frames: int = 12, period: int = 50 * MS) -> list[BagMessage]:
    """Images 160x120 with their CameraInfo, recorded 3 ms after their stamps. Returns what was written."""
    store = stores()
    types = store.types
    rng = np.random.default_rng(0)
    messages = []
    for i in range(frames):
        stamp = START + i * period
        header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), "lens")
        pixels = rng.integers(0, 255, (120, 160), np.uint8)
        roi = types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
        numbers = np.eye(3).ravel()
        info = types[CAMERA_INFO](header, 120, 160, "", np.zeros(0), numbers, numbers, np.zeros(12), 0, 0, roi)
        if compressed:
            data = cv2.imencode(".jpg", pixels)[1].ravel()
            image, kind, name = types[COMPRESSED_IMAGE](header, "jpeg", data), COMPRESSED_IMAGE, "/eye/image/compressed"
        else:
            image, kind, name = types[IMAGE](header, 120, 160, "mono8", 0, 160, pixels.ravel()), IMAGE, "/eye/image"
        recorded = stamp + 3 * MS
        messages.append(BagMessage("/eye/camera_info", recorded, bytes(store.serialize_cdr(info, CAMERA_INFO))))
        messages.append(BagMessage(name, recorded, bytes(store.serialize_cdr(image, kind))))
    write_bag(path, {name: kind, "/eye/camera_info": CAMERA_INFO}, messages)
    return messages


def test_a_bag_keeps_its_timing_at_any_rate(tmp_path: Path) -> None:
    camera_bag(tmp_path / "bag", compressed=False)
    with open_bag(tmp_path / "bag") as bag:
        image, _ = bag.choose_image_topic()
        info = bag.camera_info_topic(image)
        recorded = list(bag_events(bag, image, info, None, 1.0))
        twice = list(bag_events(bag, image, info, None, 2.0))
        steady = [e for e in bag_events(bag, image, None, 10.0, 1.0) if e.index is not None]
    assert [e.due for e in recorded if e.index is not None] == [i * 50 * MS for i in range(12)]
    assert [e.due for e in twice if e.index is not None] == [i * 25 * MS for i in range(12)]
    assert [e.due for e in steady] == [i * 100 * MS for i in range(12)]
    assert [e.stamp for e in steady] == [START + i * 50 * MS for i in range(12)]
    assert sum(e.index is None for e in recorded) == 12


def test_messages_without_a_header_are_played_when_they_were_recorded(tmp_path: Path) -> None:
    messages = camera_bag(tmp_path / "bag", compressed=False)
    damaged = [replace(message, data=b"\0\1\0\0") if i in (0, 1, 9) else message for i, message in enumerate(messages)]
    write_bag(tmp_path / "damaged", {"/eye/image": IMAGE, "/eye/camera_info": CAMERA_INFO}, damaged)
    with open_bag(tmp_path / "damaged") as bag:
        image, _ = bag.choose_image_topic()
        played = list(bag_events(bag, image, bag.camera_info_topic(image), None, 1.0))
    assert [event.message for event in played] == [message.data for message in damaged]
    assert [event.index for event in played if event.index is not None] == list(range(12))
    late = [0 if len(event.message) > 4 else 3 * MS for event in played]
    assert [event.stamp for event in played] == [START + i // 2 * 50 * MS + late[i] for i in range(24)]


def assert_forwarded(received: list[bytes], recorded: list[bytes]) -> None:
    """Byte by byte; the middleware may pad the end to a multiple of four."""
    assert [header_stamp(data) - START for data in received] == [header_stamp(data) - START for data in recorded]
    for got, sent in zip(received, recorded, strict=True):
        assert got[: len(sent)] == sent
        assert got[len(sent) :] in (b"", b"\0", b"\0\0", b"\0\0\0")


@pytest.mark.parametrize("compressed", [False, True])
def test_recorded_messages_arrive_unchanged(ros, spawn, tmp_path: Path, compressed: bool) -> None:
    """The player as its own process, on remapped topics, to a subscriber of raw bytes."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    # Deep, as it is about bytes: of five messages those are lost that come while a busy machine runs something else.
    takes = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
    written = camera_bag(tmp_path / "bag", compressed)
    node = ros.create_node()
    images: list[bytes] = []
    infos: list[bytes] = []
    kind, topic = (CompressedImage, "/robot/cam/compressed") if compressed else (Image, "/robot/cam")
    node.create_subscription(kind, topic, images.append, takes, raw=True)
    node.create_subscription(CameraInfo, "/robot/info", infos.append, takes, raw=True)
    command = [sys.executable, "-m", "scfeat_ros.player", "--bag", tmp_path / "bag", "--summary", tmp_path / "log.json"]
    remap = ["--ros-args", "-r", "image:=/robot/cam", "-r", "camera_info:=/robot/info"]
    player = spawn([*command, *remap])
    ros.spin_until(lambda: not player.running, timeout=60, what="the player to end")
    ros.spin_for(0.3)
    assert player.wait(1) == 0, player.output
    expected = [m.data for m in written if m.topic != "/eye/camera_info"]
    assert_forwarded(images, expected)
    assert_forwarded(infos, [m.data for m in written if m.topic == "/eye/camera_info"])
    log = json.loads((tmp_path / "log.json").read_text())
    assert [stamp for _, stamp, _ in log["sent"]] == [header_stamp(data) for data in expected]


def test_a_part_of_an_image_is_packed_as_its_step_says() -> None:
    pytest.importorskip("sensor_msgs", reason="ROS is not installed: run `make setup`")
    whole = np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)
    for part in (whole[2:12, 5:25], whole[::2, ::-1], whole[:, :, 1]):
        message = image_message(part, START)
        assert len(message.data) == message.step * message.height
        np.testing.assert_array_equal(image_to_array(message), part)


def test_nobody_listens(ros, spawn, tmp_path: Path) -> None:
    camera_bag(tmp_path / "bag", compressed=False)
    player = spawn([sys.executable, "-m", "scfeat_ros.player", "--bag", tmp_path / "bag", "--wait", "1"])
    assert player.wait(60) == 1
    assert "expected 1 subscription(s) on /image" in player.output
    assert "Traceback" not in player.output


def test_a_bag_that_is_not_there(ros, spawn, tmp_path: Path) -> None:
    player = spawn([sys.executable, "-m", "scfeat_ros.player", "--bag", tmp_path / "nothing"])
    assert player.wait(60) == 1
    assert "found nothing there" in player.output
    assert "Traceback" not in player.output
