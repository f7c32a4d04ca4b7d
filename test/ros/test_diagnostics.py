"""What /diagnostics says in each situation, and that it says what to do."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scfeat_core.types import ImageQuality

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message, serialize_message
from scfeat.msg import FrontendStatus
from std_msgs.msg import Header

from scfeat_ros.diagnostics import (
    CameraReport,
    Limits,
    Memory,
    NetworkReport,
    diagnostics_to_message,
    measure_memory,
)
from scfeat_ros.health import FrameHealth
from scfeat_ros.worker import Counts

OK, WARN, ERROR, STALE = (getattr(DiagnosticStatus, name) for name in ("OK", "WARN", "ERROR", "STALE"))
NOW = Time(sec=1_720_000_000, nanosec=5)
GOOD = ImageQuality(mean=0.45, dark=0.02, saturated=0.01, sharpness=0.6)
HEALTH = FrameHealth(
    Header(stamp=Time(sec=1_719_999_999)),
    ms_total=60.0,
    age_ms=90.0,
    keypoints=900,
    matches=400,
    inliers=300,
    tracks=350,
    median_track_age=12.0,
    inlier_ratio=0.75,
    coverage=0.8,
    quality=GOOD,
)
BEFORE = Counts(received=100, processed=80, dropped={"busy": 20})
AFTER = Counts(received=160, processed=110, dropped={"busy": 50})
CAMERA = CameraReport("left", "/left/image", AFTER, BEFORE, period=2.0, silence=0.03, active=True, health=HEALTH)
NETWORK = NetworkReport(
    "cuda:0", "bfloat16", "lite", "scfeat:0a1b2c", Memory(rss=10**9, available=8 * 10**9, total=16 * 10**9)
)


def statuses(camera: CameraReport = CAMERA, network: NetworkReport = NETWORK) -> dict[str, DiagnosticStatus]:
    """By task, over the wire."""
    sent = diagnostics_to_message("/scfeat", NOW, [camera], network)
    received = deserialize_message(serialize_message(sent), DiagnosticArray)
    assert received.header.stamp == NOW
    return {status.name.removeprefix("scfeat: ").removeprefix("left "): status for status in received.status}


def values(status: DiagnosticStatus) -> dict[str, str]:
    assert len({value.key for value in status.values}) == len(status.values)
    return {value.key: value.value for value in status.values}


def report(**health: Any) -> CameraReport:
    return replace(CAMERA, health=replace(HEALTH, **health))


def test_a_healthy_camera() -> None:
    found = statuses()
    assert list(found) == ["input", "image", "features", "network"]
    assert [status.level for status in found.values()] == [OK] * 4
    assert found["input"].name == "scfeat: left input" and found["input"].hardware_id == "left"
    assert found["input"].message == "30.0 Hz received, 15.0 Hz processed"
    assert found["network"].hardware_id == "cuda:0" and found["network"].message == "lite on cuda:0 in bfloat16"


def test_the_values() -> None:
    found = {name: values(status) for name, status in statuses().items()}
    assert found["input"]["received (Hz)"] == "30" and found["input"]["received"] == "160"
    assert found["input"]["dropped busy (Hz)"] == "15" and found["input"]["dropped busy"] == "50"
    assert found["input"]["stamp age at arrival (ms)"] == "30"
    assert found["image"] == {
        "mean": "0.45",
        "dark": "0.02",
        "saturated": "0.01",
        "sharpness": "0.6",
        "masked": "not known",
    }
    assert found["features"]["inlier ratio"] == "0.75" and found["features"]["tracks"] == "350"
    assert found["network"]["descriptor space"] == "scfeat:0a1b2c" and found["network"]["memory rss (MB)"] == "1000"


QUALITY = (
    (replace(GOOD, mean=0.01), ERROR, "image is dark: mean 0.01; more light"),
    (replace(GOOD, mean=0.05), WARN, "image is dark: mean 0.05"),
    (replace(GOOD, dark=0.5), WARN, "50 % of the image are black: more exposure"),
    (replace(GOOD, saturated=0.95), ERROR, "95 % of the image are saturated: less exposure"),
    (replace(GOOD, sharpness=0.1), WARN, "image is blurred: sharpness 0.1; shorter exposure"),
)


@pytest.mark.parametrize(("quality", "level", "text"), QUALITY)
def test_what_is_wrong_with_the_image(quality: ImageQuality, level: bytes, text: str) -> None:
    status = statuses(report(quality=quality))["image"]
    assert status.level == level and status.message.startswith(text) and ";" not in status.message.partition(text)[0]


def test_what_is_there_and_not_used() -> None:
    status = statuses(report(ignored=("mask not used: too small",)))["image"]
    assert status.level == WARN and status.message == "mask not used: too small"


@pytest.mark.parametrize(("masked", "level"), [(0.5, OK), (0.94, WARN), (0.999, ERROR), (math.nan, OK)])
def test_a_mask_that_leaves_little(masked: float, level: bytes) -> None:
    status = statuses(report(masked=masked))["image"]
    assert status.level == level
    assert ("mask covers 94 %: is it inverted" in status.message) == (masked == 0.94)


@pytest.mark.parametrize(
    ("health", "level", "text"),
    [
        ({"keypoints": 0, "coverage": 0.0}, ERROR, "only 0 keypoints: too little texture or light"),
        ({"keypoints": 20}, WARN, "only 20 keypoints"),
        ({"coverage": 0.1}, WARN, "keypoints cover 10 % of the image: set grid"),
        ({"inlier_ratio": 0.1}, WARN, "10 % of 400 matches are inliers: blur"),
        ({"inlier_ratio": math.nan, "matches": 0}, OK, "900 keypoints"),
    ],
)
def test_what_is_wrong_with_the_features(health: dict[str, Any], level: bytes, text: str) -> None:
    status = statuses(report(**health))["features"]
    assert status.level == level and status.message.startswith(text)


@pytest.mark.parametrize(
    ("age", "level", "text"),
    [
        (0.4, OK, "30.0 Hz received"),
        (4.0, WARN, "stamps are 4 s old: clocks?"),
        (12.0, ERROR, "stamps are 12 s old: clocks differ (synchronise them), or a recording plays (use_sim_time)"),
        (400 * 86400.0, ERROR, "stamps are 400 days old"),
        (-0.04, OK, "30.0 Hz received"),
        (-0.2, WARN, "stamps are 0.2 s in the future: synchronise the clocks"),
        (math.nan, OK, "30.0 Hz received"),
    ],
)
def test_stamps_tell_whether_clocks_agree(age: float, level: bytes, text: str) -> None:
    status = statuses(report(age_ms=1e3 * age + 60.0))["input"]  # processing took 60 ms of it
    assert status.level == level and status.message.startswith(text)


def test_a_driver_without_stamps() -> None:
    status = statuses(report(header=Header(), age_ms=1.7e12))["input"]
    assert status.level == WARN and "stamps are 0, the driver sets none" in status.message


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"silence": math.inf}, STALE, "no image on /left/image yet: does its driver run?"),
        ({"silence": 3.4}, ERROR, "no images for 3 s on /left/image: has its driver stopped"),
        ({"silence": 2.9}, OK, "no frame"),
        ({"active": False, "silence": math.inf}, STALE, "the node is not active"),
    ],
)
def test_a_camera_that_is_silent(changes: dict[str, Any], level: bytes, text: str) -> None:
    found = statuses(replace(CAMERA, now=BEFORE, **changes))
    assert found["input"].level == level
    assert text in found["input"].message or (level == OK and text in found["image"].message)
    assert found["image"].level == found["features"].level == STALE  # the frame of long ago is not judged again


def test_drops_count_since_the_last_report() -> None:
    some = Counts(received=160, processed=106, dropped={"busy": 50, "decode": 4})
    status = statuses(replace(CAMERA, now=some, last_error="frame dropped: truncated image"))["input"]
    assert (
        status.level == WARN and status.message == "frames are dropped (decode 2.0 Hz): frame dropped: truncated image"
    )
    assert statuses(replace(CAMERA, now=some, before=some))["input"].level == OK  # it has passed
    everything = Counts(received=160, processed=80, dropped={"busy": 20, "error": 60})
    assert statuses(replace(CAMERA, now=everything))["input"].level == ERROR


def test_drops_by_design_are_no_fault() -> None:
    unwanted = Counts(received=160, processed=80, dropped={"busy": 20, "unwanted": 60})
    found = statuses(replace(CAMERA, now=unwanted))
    assert found["input"].level == OK and "nobody subscribes" in found["image"].message
    slow = Counts(received=160, processed=83, dropped={"busy": 77})
    status = statuses(replace(CAMERA, now=slow))["input"]
    assert status.level == WARN and "only 1.5 of 30.0 Hz are processed" in status.message
    calm = Counts(received=103, processed=83, dropped={"busy": 20})  # a slow camera is followed
    assert statuses(replace(CAMERA, now=calm))["input"].level == OK


def test_the_worst_comes_first() -> None:
    status = statuses(report(quality=replace(GOOD, mean=0.0), masked=0.94))["image"]
    assert status.level == ERROR and status.message.index("dark") < status.message.index("mask covers")


def test_a_report_without_time_between_is_no_error() -> None:
    found = statuses(replace(CAMERA, period=0.0))
    assert values(found["input"])["received (Hz)"] == "not known"


def test_memory_that_runs_out() -> None:
    network = replace(NETWORK, memory=Memory(device_used=10**9, device_free=10**8, device_total=8 * 10**9))
    status = statuses(network=network)["network"]
    assert status.level == WARN and status.message == "100 of 8000 MB are left on the device: end what else runs there"
    host = replace(NETWORK, memory=Memory(available=10**8, total=8 * 10**9))
    assert "on the host" in statuses(network=host)["network"].message


def test_several_cameras_keep_their_names() -> None:
    message = diagnostics_to_message("robot/scfeat", NOW, [CAMERA, replace(CAMERA, camera="right")], NETWORK, Limits())
    assert [status.name for status in message.status] == [
        f"robot/scfeat: {task}"
        for task in (*(f"{c} {t}" for c in ("left", "right") for t in ("input", "image", "features")), "network")
    ]


def test_no_number_is_too_odd_to_report() -> None:
    odd = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30)
    counts = Counts(received=2**63, processed=2**63, dropped={"busy": 2**62, "of another version": 1})
    for value in odd:
        quality = ImageQuality(value, value, value, value)
        health = replace(HEALTH, ms_total=value, age_ms=value, inlier_ratio=value, coverage=value, quality=quality)
        camera = replace(CAMERA, now=counts, period=value, silence=value, health=replace(health, masked=value))
        assert len(statuses(camera)) == 4


def test_limits_apply() -> None:
    message = diagnostics_to_message("scfeat", NOW, [CAMERA], NETWORK, Limits(coverage=0.9, sharpness=0.7))
    assert [status.level for status in message.status] == [OK, WARN, WARN, OK]


def test_blurred_means_the_same_everywhere() -> None:
    from scfeat_core.quality import BLURRED

    assert Limits().sharpness == BLURRED


def test_memory_is_measured() -> None:
    memory = measure_memory("cpu")
    assert memory.rss is not None and memory.available is not None and memory.total is not None
    assert 10**6 < memory.rss < memory.total and memory.available < memory.total
    assert memory.device_used is None and memory.device_total is None
    with mmap.mmap(-1, 100_000_000) as block:  # what an allocator gives may have been resident before
        for page in range(0, len(block), 4096):  # only pages that were written are there
            block[page] = 1
        assert (measure_memory("cpu").rss or 0) - memory.rss > 80_000_000


def test_the_node_can_start_without_torch(repository: Path) -> None:
    code = "import sys, scfeat_ros.diagnostics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0


def test_on_the_live_graph(ros: Any) -> None:
    """As rqt and the aggregator receive it, with a status beside it."""
    node, seen = ros.create_node(), []
    qos = QoSProfile(depth=10)
    node.create_subscription(DiagnosticArray, "/diagnostics", seen.append, qos)
    node.create_subscription(FrontendStatus, "/scfeat/status", seen.append, qos)
    arrays = node.create_publisher(DiagnosticArray, "/diagnostics", qos)
    counts = node.create_publisher(FrontendStatus, "/scfeat/status", qos)
    sent = diagnostics_to_message("scfeat", NOW, [CAMERA], NETWORK)
    status = FrontendStatus(camera="left", received=2**40, dropped_unwanted=3)

    def send() -> None:
        arrays.publish(sent)
        counts.publish(status)

    ros.pump(send, lambda: sent in seen and status in seen)


def test_the_engine_is_named_and_why_it_is_another_one() -> None:
    network = replace(NETWORK, engine="onnx")
    status = statuses(network=network)["network"]
    assert status.level == DiagnosticStatus.OK and status.message == "lite on cuda:0 in bfloat16 by onnx"
    assert values(status)["engine"] == "onnx"
    wait = "compile for 1 image(s) of 640x480 is being made; eager meanwhile"
    status = statuses(network=replace(NETWORK, engine="eager", engine_making=wait))["network"]
    assert status.level == DiagnosticStatus.OK, "it takes a minute, and then it is there"
    assert status.message == f"lite on cuda:0 in bfloat16 by eager; {wait}" and values(status)["engine"] == "eager"
    note = "onnxruntime is not installed: pip install onnxruntime; eager is used instead"
    status = statuses(network=replace(NETWORK, engine="eager", engine_note=note))["network"]
    assert status.level == DiagnosticStatus.WARN and status.message == note
