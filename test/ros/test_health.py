"""What the status says, and log lines that do not flood."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from scfeat_core.types import (
    Features,
    FrameResult,
    GeometryModel,
    ImageQuality,
    Matches,
    PairResult,
    Tracks,
    TwoViewGeometry,
)

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from rclpy.serialization import deserialize_message, serialize_message
from scfeat.msg import FrontendStatus
from std_msgs.msg import Header

from scfeat_ros.health import CoreLog, Repeats, frame_health, status_to_message
from scfeat_ros.messages import nanoseconds, stamp_from_nanoseconds
from scfeat_ros.worker import Counts

STAMP = 1_720_000_000_123_456_789
HEADER = Header(stamp=stamp_from_nanoseconds(STAMP), frame_id="camera_optical")


def frame(matches: int = 40, geometry: bool = True) -> FrameResult:
    """100 keypoints in the upper left quarter; half of the matches are inliers."""
    y, x = np.mgrid[:10, :10]
    keypoints = np.stack([x.ravel() * 32, y.ravel() * 24], 1).astype(np.float32)
    features = Features(keypoints, np.ones(100, np.float32), np.ones((100, 4), np.float32), (640, 480), "scfeat:0a1b2c")
    indices, inliers = np.arange(matches), np.arange(matches) % 2 == 0
    model = TwoViewGeometry(GeometryModel.FUNDAMENTAL, np.eye(3), inliers, 1.0) if geometry else None
    matched = Matches(indices, indices, np.ones(matches, np.float32))
    pair = PairResult(6, STAMP - 1, matched, keypoints[:matches], keypoints[:matches], model) if matches else None
    timings = {"preprocess": 1.0, "network": 50.0, "select": 2.0, "match": 3.0, "verify": 4.0}
    return FrameResult("left", 7, STAMP, features, pair, timings)


def test_a_status_says_what_the_frame_was_like() -> None:
    counts = Counts(received=10, processed=6, dropped={"busy": 2, "decode": 1, "error": 1})
    health = frame_health(HEADER, frame(), ms_queue=5.0, age_ms=80.0, device="cpu", precision="float32")
    sent = status_to_message("left", counts, health, "frame dropped: truncated")
    status = deserialize_message(serialize_message(sent), FrontendStatus)
    assert (status.received, status.processed, status.dropped_busy) == (10, 6, 2)
    assert (status.dropped_decode, status.dropped_error, status.dropped_stale) == (1, 1, 0)
    assert status.header == HEADER and status.camera == "left" and status.last_error == "frame dropped: truncated"
    assert (status.ms_preprocess, status.ms_network, status.ms_match, status.ms_queue) == (1.0, 52.0, 7.0, 5.0)
    assert np.isnan([status.ms_decode, status.median_track_age]).all()
    assert (status.keypoints, status.matches, status.inliers) == (100, 40, 20)
    assert status.inlier_ratio == pytest.approx(0.5) and status.coverage == 16 / 64
    assert (status.device, status.precision, status.descriptor_space) == ("cpu", "float32", "scfeat:0a1b2c")


def test_a_status_counts_tracks_and_their_ages_and_the_time_they_take() -> None:
    ages = np.array([1, 9, 4, 2], np.uint32)
    points = np.zeros((4, 2), np.float32)
    tracks = Tracks(ages, ages, ages, points, None, None, np.zeros(4, np.uint8), np.zeros(0, np.uint32))
    timings = {
        "preprocess": 1.0,
        "assess": 0.25,
        "network": 50.0,
        "select": 2.0,
        "match": 3.0,
        "verify": 4.0,
        "track": 5.0,
    }
    quality = ImageQuality(mean=0.5, dark=0.0, saturated=0.0, sharpness=0.6)
    health = frame_health(HEADER, replace(frame(), tracks=tracks, timings=timings, quality=quality), masked=0.25)
    status = status_to_message("left", Counts(), health, "")
    assert (status.tracks, status.median_track_age) == (4, 3.0)
    assert (status.ms_preprocess, status.ms_match) == (1.25, 12.0)
    assert health.quality is quality and health.masked == 0.25
    none = frame_health(HEADER, replace(frame(), tracks=replace(tracks, ids=ages[:0], ages=ages[:0])))
    assert none.tracks == 0 and np.isnan(none.median_track_age)


def test_a_status_before_the_first_frame_and_without_matches_or_geometry() -> None:
    empty = status_to_message("left", Counts(), None, "")
    assert nanoseconds(empty.header.stamp) == 0 and np.isnan([empty.ms_network, empty.inlier_ratio]).all()
    for result in (frame(matches=0), frame(geometry=False)):
        status = status_to_message("left", Counts(), frame_health(HEADER, result), "")
        assert status.inliers == 0 and np.isnan(status.inlier_ratio)


def test_every_reason_of_the_status_can_be_counted() -> None:
    reasons = [name for name in FrontendStatus.get_fields_and_field_types() if name.startswith("dropped_")]
    counts = Counts(dropped={name.removeprefix("dropped_"): index for index, name in enumerate(reasons, 1)})
    status = status_to_message("left", counts, None, "")
    assert [getattr(status, name) for name in reasons] == list(range(1, len(reasons) + 1))
    assert {"busy", "stale", "decode", "sync", "unwanted", "error"} <= {
        name.removeprefix("dropped_") for name in reasons
    }


def test_a_line_that_repeats_is_held_back_and_counted() -> None:
    clock = iter([0.0, 0.0, 1.0, 2.0, 4.9, 5.0, 5.0])
    repeats = Repeats(period=5.0, clock=lambda: next(clock))
    assert repeats.line("truncated") == "truncated"
    assert repeats.line("unknown") == "unknown"
    assert [repeats.line("truncated") for _ in range(3)] == [None] * 3
    assert repeats.line("truncated") == "truncated [3 more times in the last 5 s]"
    assert repeats.line("unknown") == "unknown"


def test_lines_of_a_kind_count_as_the_same() -> None:
    repeats = Repeats()
    assert repeats.line("late by 1 ms", "late") == "late by 1 ms"
    assert repeats.line("late by 2 ms", "late") is None
    assert repeats.line("late by 2 ms") == "late by 2 ms"


def test_lines_with_changing_numbers_do_not_pile_up() -> None:
    repeats = Repeats()
    assert all(repeats.line(f"found {number} bytes") for number in range(1000))
    assert len(repeats._lines) <= 100


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __getattr__(self, level: str) -> object:
        return lambda text: self.lines.append((level, text))


def test_what_the_core_logs_is_in_the_log_of_the_node_while_it_is_configured() -> None:
    core, log = logging.getLogger("scfeat_core"), Log()
    before = (core.level, list(core.handlers))
    forward = CoreLog(log)
    logging.getLogger("scfeat_core.engines.cache").info("before")
    for _ in range(2):
        forward.start()
        forward.start()
        logging.getLogger("scfeat_core.engines.cache").info("%s is made", "onnx")
        logging.getLogger("scfeat_core.engines").warning("slow")
        core.error("bad")
        core.debug("detail")
        forward.stop()
        forward.stop()
    core.info("after")
    assert log.lines == [("info", "onnx is made"), ("warning", "slow"), ("error", "bad")] * 2
    assert (core.level, core.handlers) == before
