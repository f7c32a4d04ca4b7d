"""What happens to one image between its message and the publishers, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from scfeat.msg import Features, Matches, TwoViewGeometry
from sensor_msgs.msg import CameraInfo, Image

from scfeat_core.errors import DeviceError, ImageError, StaleImageError
from scfeat_ros.images import Frame
from scfeat_ros.messages import stamp_from_nanoseconds
from scfeat_ros.parameters import NodeParameters
from scfeat_ros.pipeline import Pipeline

WIDTH, HEIGHT = 160, 120


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def warning(self, text: str) -> None:
        self.lines.append(("warning", text))

    def error(self, text: str) -> None:
        self.lines.append(("error", text))


class Bench:
    """A pipeline, its log, and a subscriber to what it publishes."""

    def __init__(self, ros: Any, **settings: Any) -> None:
        self.ros = ros
        self.log = Log()
        self.features: list[Features] = []
        self.matches: list[Matches] = []
        node = ros.create_node()
        node.create_subscription(Features, "features", self.features.append, 10)
        node.create_subscription(Matches, "matches", self.matches.append, 10)
        self.pipeline = Pipeline(NodeParameters(weights="random", **settings), node.get_clock(), self.log)
        publishers = node.create_publisher(Features, "features", 10), node.create_publisher(Matches, "matches", 10)
        self.pipeline.connect(*publishers)
        ros.spin_until(lambda: all(publisher.get_subscription_count() for publisher in publishers))

    def send(self, stamp: int, calibration: CameraInfo | None = None, width: int = WIDTH, later: int = 0) -> None:
        """An image that moves by one pixel each second. later: nanoseconds."""
        noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH + 100), dtype=np.uint8)
        pixels = np.ascontiguousarray(noise[:, stamp : stamp + width])
        message = Image(height=HEIGHT, width=width, encoding="mono8", step=width)
        message.header.stamp = stamp_from_nanoseconds(stamp * 10**9 + later)
        message.data.frombytes(pixels)
        self.pipeline.process(Frame(message, calibration, time.perf_counter()))


@pytest.fixture
def bench(ros: Any) -> Callable[..., Bench]:
    return lambda **settings: Bench(ros, **settings)


def calibration(**changes: Any) -> CameraInfo:
    info = CameraInfo(width=WIDTH, height=HEIGHT, distortion_model="plumb_bob", d=[0.0] * 5)
    info.k = [120.0, 0.0, 80.0, 0.0, 120.0, 60.0, 0.0, 0.0, 1.0]
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def test_calibration_decides_about_the_model_and_a_bad_one_is_not_used(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench()
    assert setup.log.lines == [("warning", "weights='random': an untrained network, its features mean nothing")]
    setup.log.lines.clear()
    good, bad, foreign = calibration(), calibration(k=[float("nan")] * 9), calibration(width=1280, height=720)
    models = []
    for stamp, info in enumerate([None, None, good, good, bad, foreign, good, good]):
        setup.send(stamp, info)
        if stamp:
            ros.spin_until(lambda n=stamp: len(setup.matches) == n)
            models.append(setup.matches[-1].geometry.model)
    pixels, rays = TwoViewGeometry.FUNDAMENTAL, TwoViewGeometry.ESSENTIAL
    assert models == [pixels, pixels, rays, pixels, pixels, pixels, rays]
    assert [text.split(", ")[0] for _, text in setup.log.lines] == [
        "camera_info not used: expected a finite 3x3 K with positive focal lengths",
        "camera_info not used: expected the calibration of images of 160x120",
    ]
    assert "found one for 1280x720" in setup.pipeline.last_error


def test_a_calibration_is_not_used_for_another_image_size(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench()
    info = calibration()
    widths = [WIDTH, WIDTH, 128, 128, WIDTH, WIDTH]
    for stamp, width in enumerate(widths):
        setup.send(stamp, info, width)
    ros.spin_until(lambda: len(setup.matches) == 3)
    found = {matches.sequence1: matches.geometry.model for matches in setup.matches}
    rays, pixels = TwoViewGeometry.ESSENTIAL, TwoViewGeometry.FUNDAMENTAL
    assert found == {1: rays, 3: pixels, 5: rays}
    assert "images of 128x120, found one for 160x120" in setup.pipeline.last_error


def test_late_images_are_dropped_as_stale_in_one_line(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench()
    setup.send(3)
    setup.log.lines.clear()
    for number in range(4):
        with pytest.raises(StaleImageError) as caught:
            setup.send(3, later=-number * 10**7)
        assert setup.pipeline.failed(None, caught.value) == "stale"  # type: ignore[arg-type]
        assert str(caught.value) in setup.pipeline.last_error
    assert len(setup.log.lines) == 1 and setup.log.lines[0][0] == "warning"
    setup.send(4)
    ros.spin_until(lambda: setup.matches)
    assert setup.matches[0].stamp0.sec == 3
    setup.send(1)
    assert "starts anew: stamp went back by 3.000 s" in setup.log.lines[-1][1]


def test_a_frame_leaves_its_times_and_quality_behind(bench: Callable[..., Bench]) -> None:
    setup = bench()
    assert setup.pipeline.health is None
    setup.send(0)
    setup.send(1)
    health = setup.pipeline.health
    assert health is not None and health.keypoints > 100 and health.matches > 50
    stages = [health.ms_decode, health.ms_preprocess, health.ms_network, health.ms_match, health.ms_publish]
    assert all(stage > 0 for stage in stages) and sum(stages) <= health.ms_total
    assert health.age_ms > 1e12, "the clock is decades after the stamp"
    assert (health.device, health.precision, health.descriptor_space) == ("cpu", "float32", "scfeat:random")


def test_an_unexpected_error_shows_its_traceback_once(bench: Callable[..., Bench]) -> None:
    setup = bench()
    setup.log.lines.clear()

    def fail(number: int) -> str:
        try:
            raise KeyError(number)
        except KeyError as error:
            return setup.pipeline.failed(None, error)  # type: ignore[arg-type]

    assert [fail(1), fail(1), fail(2)] == ["error"] * 3
    levels = [level for level, _ in setup.log.lines]
    assert levels == ["warning", "error", "warning"], "one line for each number, one traceback for the place"
    assert setup.log.lines[1][1].startswith("Traceback") and "in fail" in setup.log.lines[1][1]
    assert setup.pipeline.last_error == "frame dropped: KeyError(2)"


def test_reasons_of_errors(bench: Callable[..., Bench]) -> None:
    setup = bench()
    setup.log.lines.clear()
    assert setup.pipeline.failed(None, ImageError("truncated")) == "decode"  # type: ignore[arg-type]
    assert setup.pipeline.failed(None, DeviceError("out of memory")) == "error"  # type: ignore[arg-type]
    assert setup.log.lines == [("warning", "frame dropped: truncated"), ("warning", "frame dropped: out of memory")]
