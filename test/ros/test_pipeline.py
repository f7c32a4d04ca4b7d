"""What happens to one image between its message and the publishers, in this process."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from live_graph import HEIGHT, WIDTH, calibration
from rclpy.clock import Clock
from scfeat.msg import Features, Matches, Tracks, TwoViewGeometry
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from scfeat_core.errors import ConfigError, DeviceError, ImageError, StaleImageError
from scfeat_core.frontend import Frontend
from scfeat_core.types import FrameResult, PairResult
from scfeat_ros.inputs import Frame
from scfeat_ros.messages import stamp_from_nanoseconds
from scfeat_ros.parameters import NodeParameters
from scfeat_ros.pipeline import Pipeline, Unwanted
from scfeat_ros.worker import Counts, Worker

KINDS = {
    "features": Features,
    "matches": Matches,
    "tracks": Tracks,
    "stereo_matches": Matches,
    "debug_image": Image,
    "annotations": Image,  # stands for a type that need not be there: nothing is sent on it
}


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def warning(self, text: str) -> None:
        self.lines.append(("warning", text))

    def error(self, text: str) -> None:
        self.lines.append(("error", text))


class Bench:
    """A pipeline, its log, and a subscriber to what it publishes for its first camera."""

    def __init__(self, ros: Any, listen: tuple[str, ...] = ("features", "matches"), **settings: Any) -> None:
        self.ros = ros
        self.log = Log()
        self.node = ros.create_node()
        self.settings = NodeParameters(**{"weights": "random"} | settings)
        self.pipeline = Pipeline(self.settings, self.node.get_clock(), self.log)
        self._heard: dict[str, Any] = {}
        self.received: dict[str, list[Any]] = {name: [] for name in KINDS}
        self.camera = self.settings.cameras[-1]
        for camera, channel in self.pipeline.channels.items():
            channel.publishers = {
                name: self.node.create_publisher(kind, f"{camera}/{name}", 10) for name, kind in KINDS.items()
            }
        self.channel = self.pipeline.channels[self.camera]
        for name in listen:
            self.listen(name)

    @property
    def features(self) -> list[Features]:
        return self.received["features"]

    @property
    def matches(self) -> list[Matches]:
        return self.received["matches"]

    def listen(self, name: str) -> None:
        """Subscribe; returns when the publisher knows."""
        heard = self.received[name].append
        self._heard[name] = self.node.create_subscription(KINDS[name], f"{self.camera}/{name}", heard, 10)
        self.ros.spin_until(lambda: self.channel.publishers[name].get_subscription_count())

    def forget(self, name: str) -> None:
        """Subscribe no more; returns when the publisher knows."""
        self.node.destroy_subscription(self._heard.pop(name))
        self.ros.spin_until(lambda: not self.channel.publishers[name].get_subscription_count())

    def send(self, stamp: int, calibration: CameraInfo | None = None, width: int = WIDTH, later: int = 0) -> None:
        """An image of the last camera that moves by one pixel each second. later: nanoseconds."""
        self.send_to({self.camera: stamp}, calibration, width, later)

    def send_to(
        self,
        stamps: dict[str, int],
        calibration: CameraInfo | None = None,
        width: int = WIDTH,
        later: int = 0,
        mask: Image | None = None,
    ) -> None:
        """Images of several cameras at once; raises what the first that failed did."""
        frames = {
            camera: Frame(camera, image(stamp, width, later), time.perf_counter(), calibration, mask)
            for camera, stamp in stamps.items()
        }
        errors = self.pipeline.process(frames)()
        for error in errors.values():
            raise error


def image(stamp: int, width: int = WIDTH, later: int = 0) -> Image:
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH + 100), dtype=np.uint8)
    message = Image(height=HEIGHT, width=width, encoding="mono8", step=width)
    message.header.stamp = stamp_from_nanoseconds(stamp * 10**9 + later)
    message.header.frame_id = "optical"
    message.data.frombytes(np.ascontiguousarray(noise[:, stamp : stamp + width]))
    return message


@pytest.fixture
def bench(ros: Any) -> Callable[..., Bench]:
    return lambda *listen, **settings: Bench(ros, *((listen,) if listen else ()), **settings)


def frame() -> Frame:
    return Frame("camera", None, 0.0)


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
    assert "found one for 1280x720" in setup.channel.last_error


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
    assert "images of 128x120, found one for 160x120" in setup.channel.last_error


def test_late_images_are_dropped_as_stale_in_one_line(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench()
    setup.send(3)
    setup.log.lines.clear()
    for number in range(4):
        with pytest.raises(StaleImageError) as caught:
            setup.send(3, later=-number * 10**7)
        assert setup.pipeline.failed(frame(), caught.value) == "stale"
        assert str(caught.value) in setup.channel.last_error
    assert len(setup.log.lines) == 1 and setup.log.lines[0][0] == "warning"
    setup.send(4)
    ros.spin_until(lambda: setup.matches)
    assert setup.matches[0].stamp0.sec == 3
    setup.send(1)
    assert "starts anew: stamp went back by 3.000 s" in setup.log.lines[-1][1]


def test_a_frame_leaves_its_times_and_quality_behind(bench: Callable[..., Bench]) -> None:
    setup = bench()
    assert setup.channel.health is None
    setup.send(0)
    setup.send(1)
    health = setup.channel.health
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
            return setup.pipeline.failed(frame(), error)

    assert [fail(1), fail(1), fail(2)] == ["error"] * 3
    levels = [level for level, _ in setup.log.lines]
    assert levels == ["warning", "error", "warning"], "one line for each number, one traceback for the place"
    assert setup.log.lines[1][1].startswith("Traceback") and "in fail" in setup.log.lines[1][1]
    assert setup.channel.last_error == "frame dropped: KeyError(2)"


def dummy_extractor(points: int = 100) -> Any:
    """Always the same features, which move by a pixel from image to image."""
    import torch

    from scfeat_core.types import Features as CoreFeatures

    class Dummy:
        device, precision, descriptor_space = torch.device("cpu"), "float32", "scfeat:dummy"
        engine, engine_note, engine_making = "none", "", ""

        def __init__(self) -> None:
            random = np.random.default_rng(0)
            self.timings = {"network": 1.0}
            self.images = 0
            self._points = torch.from_numpy(random.uniform(0, 100, (points, 2)).astype(np.float32))
            descriptors = torch.from_numpy(random.normal(size=(points, 16)).astype(np.float32))
            self._fixed = (torch.linspace(1, 0, points), descriptors / descriptors.norm(dim=1, keepdim=True))

        def update(self, **options: Any) -> None:
            pass

        def extract_batch(self, images: Any, *arguments: Any, **options: Any) -> list[CoreFeatures]:
            self.images += 1
            moved = self._points + torch.tensor([self.images % 50, 0.0])
            return [CoreFeatures(moved, *self._fixed, (WIDTH, HEIGHT), self.descriptor_space) for _ in images]

    return Dummy()


class Sink:
    """A publisher that keeps the bytes of what is published."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def get_subscription_count(self) -> int:
        return 1

    def publish(self, message: Any) -> None:
        self.sent.append(message)


def silent(cameras: tuple[str, ...] = ("camera",), **settings: Any) -> tuple[Pipeline, dict[str, dict[str, Sink]]]:
    """A pipeline without a graph, with the dummy in place of the network, and what it publishes for each camera."""
    parameters = NodeParameters(cameras=cameras, **settings)
    pipeline = Pipeline(parameters, Clock(), Log(), lambda config: Frontend(config, dummy_extractor()))
    sinks = {camera: {name: Sink() for name in ("features", "matches", "tracks")} for camera in cameras}
    for camera, channel in pipeline.channels.items():
        channel.publishers = sinks[camera]
    return pipeline, sinks


textured = cache(image)


def frames_of(cameras: tuple[str, ...], number: int) -> dict[str, Frame]:
    message = copy(textured(0))
    message.header = Header(stamp=stamp_from_nanoseconds((number + 1) * 10**7), frame_id="optical")
    return {camera: Frame(camera, message, time.perf_counter()) for camera in cameras}


@pytest.mark.parametrize("ahead", [False, True])
def test_two_threads_publish_what_one_does_and_in_order(ahead: bool) -> None:
    """ahead: as on a device, where the front end's results of a frame are taken while the next one is submitted."""
    cameras = ("left", "right")
    pipeline, expected = silent(cameras)
    for number in range(30):
        assert not pipeline.process(frames_of(cameras, number))()
    pipeline, found = silent(cameras)
    pipeline._ahead, pipeline._session = ahead, "session"
    worker: Worker[Frame] = Worker(pipeline.process, pipeline.failed)
    worker.start()
    for number in range(30):
        frames = frames_of(cameras, number)
        for camera in cameras:
            worker.receive(camera)
        while worker._slots:  # none shall be dropped
            time.sleep(0.0005)
        worker.submit(cameras, frames)
    end = time.monotonic() + 20.0
    while any(worker.counts(camera).waiting for camera in cameras) and time.monotonic() < end:
        time.sleep(0.001)
    assert worker.stop(10.0)
    assert [worker.counts(camera) for camera in cameras] == [Counts(30, 30)] * 2
    for camera in cameras:
        for name, sink in expected[camera].items():
            for message in (*sink.sent, *found[camera][name].sent):
                if name == "tracks":
                    message.session = ""
            assert found[camera][name].sent == sink.sent, name
        assert len(expected[camera]["matches"].sent) == 29 and len(expected[camera]["tracks"].sent) == 30


def test_other_settings_wait_for_the_frames_before() -> None:
    """They are published with the settings that they were processed with, whichever thread is faster."""
    pipeline, sinks = silent()
    sent = sinks["camera"]["features"].sent
    finish = pipeline.process(frames_of(("camera",), 0))
    pipeline.change(NodeParameters(descriptor_type="int8"))
    later: list[Any] = []
    other = threading.Thread(target=lambda: later.append(pipeline.process(frames_of(("camera",), 1))), daemon=True)
    other.start()
    time.sleep(0.05)
    assert not later, "the settings changed under a frame that is not published"
    assert finish() == {}
    other.join(10.0)
    assert later.pop()() == {}
    assert [message.descriptor_type for message in sent] == [Features.FLOAT16, Features.INT8]


def test_frames_leave_nothing_behind() -> None:
    pipeline, sinks = silent()

    def run(first: int, count: int) -> None:
        for number in range(first, first + count):
            assert not pipeline.process(frames_of(("camera",), number))()
            for sink in sinks["camera"].values():
                sink.sent.clear()

    run(0, 50)
    tracemalloc.start()
    run(50, 50)
    before = tracemalloc.get_traced_memory()[0]
    run(100, 200)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 50_000, f"{grown} bytes after 200 frames; the features of one are {100 * (2 + 1 + 16) * 4}"


def test_why_another_engine_runs_is_said_once() -> None:
    pipeline, _ = silent(("left", "right"))
    extractor = pipeline._frontend.extractor
    assert not pipeline.process(frames_of(("left", "right"), 0))()
    assert pipeline._logger.lines == []
    extractor.engine_note = "onnx is not installed; eager is used instead"
    for number in (1, 2):
        assert not pipeline.process(frames_of(("left", "right"), number))()
    assert pipeline._logger.lines == [("warning", extractor.engine_note)]
    assert {channel.last_error for channel in pipeline.channels.values()} == {extractor.engine_note}
    assert (pipeline.engine, pipeline.engine_note) == ("none", extractor.engine_note)


def test_an_engine_that_is_being_made_is_no_error() -> None:
    """What makes it has said so in the log; diagnostics ask the pipeline."""
    pipeline, _ = silent(("left", "right"))
    extractor = pipeline._frontend.extractor
    assert pipeline.engine_making == ""
    extractor.engine_making = "onnx for 1 image(s) of 160x120 is being made; eager meanwhile"
    assert not pipeline.process(frames_of(("left", "right"), 1))()
    assert pipeline._logger.lines == [] and pipeline.engine_making == extractor.engine_making
    assert {channel.last_error for channel in pipeline.channels.values()} == {""} == {pipeline.engine_note}


def test_reasons_of_errors(bench: Callable[..., Bench]) -> None:
    setup = bench()
    setup.log.lines.clear()
    assert setup.pipeline.failed(frame(), ImageError("truncated")) == "decode"
    assert setup.pipeline.failed(frame(), DeviceError("out of memory")) == "error"
    assert setup.log.lines == [("warning", "frame dropped: truncated"), ("warning", "frame dropped: out of memory")]


def test_what_nobody_listens_to_is_not_done(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench("features")
    setup.send(0)
    setup.send(1)
    health = setup.channel.health
    assert health is not None and health.keypoints > 100
    assert health.matches == health.tracks == 0 and np.isnan(health.ms_match) and health.quality is None
    setup.listen("tracks")
    setup.pipeline.assess = lambda: True
    setup.send(2)
    setup.send(3)
    ros.spin_until(lambda: len(setup.received["tracks"]) == 2 and len(setup.features) == 4)
    tracks = setup.received["tracks"][-1]
    assert setup.channel.health.tracks == len(tracks.ids) > 50 and max(tracks.ages) == 2
    assert set(tracks.ids) == set(setup.features[-1].track_ids) - {0}
    health = setup.channel.health
    assert health.quality is not None
    assert health.matches > 50 and health.inliers > 20 and health.inlier_ratio == health.inliers / health.matches
    assert not setup.matches, "counted, since tracks need them, but not sent"

    setup.log.lines.clear()
    setup.forget("tracks")
    setup.forget("features")
    with pytest.raises(Unwanted) as caught:
        setup.send(4)
    assert setup.pipeline.failed(frame(), caught.value) == "unwanted"
    assert setup.channel.last_error == "" and not setup.log.lines, "nothing is wrong"
    assert setup.channel.health.header.stamp.sec == 3


def test_who_subscribes_later_sees_tracks_begin(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench("features", "tracks")
    tracks = setup.received["tracks"]
    setup.send(0)
    setup.send(1)
    ros.spin_until(lambda: len(tracks) == 2)
    setup.forget("tracks")
    setup.send(2)
    setup.listen("tracks")
    setup.send(3)
    setup.send(4)
    ros.spin_until(lambda: len(tracks) == 4)
    setup.forget("features")
    setup.forget("tracks")
    for stamp in range(5, 10):
        with pytest.raises(Unwanted):
            setup.send(stamp)
    setup.listen("tracks")
    setup.send(10)
    ros.spin_until(lambda: len(tracks) == 5)
    assert [max(message.ages) for message in tracks] == [1, 2, 1, 2, 1]
    assert min(tracks[2].ids) > max(tracks[1].ids) and min(tracks[4].ids) > max(tracks[3].ids)


def test_stereo_matches_of_two_cameras_in_one_call(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench("stereo_matches", cameras=("left", "right"), stereo=("left:right",))
    setup.send_to({"left": 0, "right": 0})
    setup.send_to({"left": 1, "right": 1})
    ros.spin_until(lambda: len(setup.received["stereo_matches"]) == 2)
    matches = setup.received["stereo_matches"][-1]
    assert (matches.kind, matches.camera0, matches.camera1) == (Matches.STEREO, "left", "right")
    assert matches.sequence0 == matches.sequence1 == 1 and matches.frame_id0 == "optical"
    points = [np.array(matches.keypoints0), np.array(matches.keypoints1)]
    assert len(points[0]) > 100 and np.median(abs(points[0] - points[1])) < 1e-3, "the two images are the same"
    with pytest.raises(ImageError):
        setup.send_to({"left": 2, "right": 2}, width=16)
    with pytest.raises(Unwanted):
        setup.send_to({"left": 3})


def test_a_camera_in_the_middle_of_two_pairs_is_matched_for_its_own_listeners_alone(
    ros: Any, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = bench("stereo_matches", cameras=("a", "b", "c"), stereo=("b:c", "a:b"))
    matched: list[tuple[str, str]] = []
    match = setup.pipeline._frontend.match_stereo

    def noted(left: FrameResult, right: FrameResult) -> PairResult:
        matched.append((left.camera, right.camera))
        return match(left, right)

    monkeypatch.setattr(setup.pipeline._frontend, "match_stereo", noted)
    with pytest.raises(Unwanted):  # a
        setup.send_to({"a": 0, "b": 0, "c": 0})
    ros.spin_until(lambda: setup.received["stereo_matches"])
    assert matched == [("b", "c")] and setup.pipeline.channels["a"].health is None


def test_the_network_is_warm_for_all_cameras_at_once(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    warm_up = Frontend.warm_up

    def noted(self: Frontend, size: tuple[int, int] = (640, 480), batch: int = 1) -> None:
        batches.append(batch)
        warm_up(self, size, batch)

    monkeypatch.setattr(Frontend, "warm_up", noted)
    bench("features", cameras=("left", "right"))
    assert batches == [2]


def test_one_of_several_cameras_may_fail(bench: Callable[..., Bench]) -> None:
    setup = bench("features", cameras=("left", "right"))
    frames = {camera: Frame(camera, image(0), time.perf_counter()) for camera in ("left", "right")}
    setup.pipeline.channels["left"].publishers = setup.channel.publishers
    frames["left"].message.encoding = "mosaic"
    errors = setup.pipeline.process(frames)()
    assert list(errors) == ["left"] and isinstance(errors["left"], ImageError)
    assert setup.pipeline.failed(frames["left"], errors["left"]) == "decode"
    assert "mosaic" in setup.pipeline.channels["left"].last_error and setup.channel.last_error == ""
    assert setup.channel.health is not None and setup.pipeline.channels["left"].health is None


def test_settings_change_between_two_images(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench()
    setup.send(0)
    settings = NodeParameters(weights="random", max_keypoints=50, descriptor_type="int8")
    setup.pipeline.change(settings)
    setup.send(1)
    ros.spin_until(lambda: len(setup.features) == 2)
    assert len(setup.features[0].scores) > 500 and len(setup.features[1].scores) == 50
    assert [features.descriptor_type for features in setup.features] == [Features.FLOAT16, Features.INT8]


def test_a_clock_that_went_back_resets_what_is_ahead_of_it_once(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench()
    setup.send(5)
    setup.pipeline.jump(4_500_000_000)
    setup.send(4, later=600_000_000)
    assert "starts anew: the clock went back to 0.500 s before its newest image" in setup.log.lines[-1][1]
    setup.pipeline.jump(4_600_000_000)  # the image was faster than the clock
    setup.send(4, later=700_000_000)
    ros.spin_until(lambda: setup.matches)
    assert len(setup.matches) == 1
    assert sum("starts anew" in text for _, text in setup.log.lines) == 1


def test_masks_of_a_file_hide_points_and_a_missing_one_is_refused(
    ros: Any, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    path = tmp_path / "mask.png"
    with pytest.raises(ConfigError, match="mask"):
        bench(mask_files=(str(path),))
    pixels = np.full((HEIGHT, WIDTH), 255, np.uint8)
    pixels[:, :100] = 0
    cv2.imwrite(str(path), pixels)
    setup = bench(mask_files=(str(path),))
    setup.send(0)
    ros.spin_until(lambda: setup.features)
    assert min(setup.features[0].keypoints[::2]) > 99
    assert setup.channel.health.masked == pytest.approx(100 / WIDTH)
    upper = image(0)
    upper.data = np.repeat([1, 0], WIDTH * HEIGHT // 2).astype(np.uint8).tobytes()
    setup.send_to({"camera": 1}, mask=upper)
    ros.spin_until(lambda: len(setup.features) == 2)
    assert max(setup.features[1].keypoints[1::2]) < HEIGHT // 2 and min(setup.features[1].keypoints[::2]) > 99


def test_pictures_come_at_most_at_their_rate(ros: Any, bench: Callable[..., Bench]) -> None:
    setup = bench("debug_image", debug_rate=0.001, debug_layers=("matches", "tracks", "mask", "scores"))
    for stamp in range(4):
        setup.send(stamp)
    ros.spin_until(lambda: setup.received["debug_image"])
    ros.spin_for(0.2)
    (picture,) = setup.received["debug_image"]
    assert (picture.header.stamp.sec, picture.encoding) == (0, "bgr8")
    assert setup.channel.health.tracks > 0, "tails need the tracks of every frame"
    setup.listen("annotations")
    setup.pipeline.change(NodeParameters(weights="random", debug_rate=0.0))
    with pytest.raises(Unwanted):
        setup.send(4)


def test_a_gyroscope_that_is_silent_is_complained_about(bench: Callable[..., Bench]) -> None:
    setup = bench("features", use_imu=True)
    setup.log.lines.clear()
    for stamp in range(3):
        setup.send(stamp)
    ((level, line),) = setup.log.lines
    assert level == "warning" and "no sensor_msgs/Imu" in line and "'imu'" in line
    assert setup.channel.last_error.startswith("use_imu is on")


def test_the_gyroscope_says_where_points_are_after_a_turn(bench: Callable[..., Bench]) -> None:
    """Of a turn by 12 degrees about the optical axis: points move by up to 20 pixels, and are sought within 4."""
    setup = bench("tracks", weights="lite", search_radius=4.0, max_keypoints=300, use_imu=True)
    noise = np.random.default_rng(0).uniform(0, 255, (HEIGHT, WIDTH)).astype(np.float32)
    upright = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    turned = cv2.warpAffine(upright, cv2.getRotationMatrix2D((80, 60), 12, 1), (WIDTH, HEIGHT))

    def followed(start: int) -> int:
        """Points of the upright image that are found again in the turned one, a tenth of a second later."""
        setup.pipeline.reset()
        for stamp, pixels in ((start, upright), (start + 10**8, turned)):
            message = image(0)
            message.header.stamp = stamp_from_nanoseconds(stamp)
            message.data = pixels.tobytes()
            assert not setup.pipeline.process({"camera": Frame("camera", message, 0.0, calibration())})()
        setup.ros.spin_until(lambda: len(setup.received["tracks"]) == 2)
        tracks = setup.received["tracks"].pop()
        setup.received["tracks"].clear()
        return sum(age == 2 for age in tracks.ages)

    found = {}
    for start, sign in ((10**10, 1), (2 * 10**10, -1)):
        for tick in range(11):
            setup.pipeline.gyro.add(start + tick * 10**7, np.array((0.0, 0.0, sign * np.radians(120))))
        found[sign] = followed(start)
    assert found[1] > 100 and found[1] > 2 * found[-1], found
