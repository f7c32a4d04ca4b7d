"""The node as a process of its own on a live graph: what comes back, what it survives, how it starts and ends."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from scfeat.msg import Features, FrontendStatus, Matches
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from scfeat_ros.messages import features_from_message, matches_from_message, nanoseconds, stamp_from_nanoseconds
from scfeat_ros.node import FrontendNode, shut_down

pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")

START = 1_720_000_000_123_456_789
STEP = 33_333_333  # nanoseconds between two images
WIDTH, HEIGHT = 160, 120
PATIENCE = 90.0  # seconds: on a busy machine torch alone takes ten to start; nothing waits longer than it must
DROPPED = ("busy", "stale", "decode", "sync", "no_calibration", "error")


def texture(shift: int = 0, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W) uint8: blobs of several sizes that move to the left with ``shift``."""
    noise = np.random.default_rng(0).uniform(0, 255, (height, width + 64)).astype(np.float32)
    picture = cv2.GaussianBlur(noise, (0, 0), 2) * 4 + cv2.GaussianBlur(noise, (0, 0), 0.7)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    return np.ascontiguousarray(picture[:, shift : shift + width])


def image_message(pixels: np.ndarray, stamp: int) -> Image:
    height, width = pixels.shape[:2]
    message = Image(height=height, width=width, encoding="mono8", step=width)
    message.header.stamp = stamp_from_nanoseconds(stamp)
    message.header.frame_id = "front_optical"
    message.data.frombytes(pixels)
    return message


class Client:
    """A camera driver and a SLAM system in one: sends images, keeps everything that the node answers."""

    def __init__(self, ros: Any, image_topic: str = "image", image_type: Any = Image) -> None:
        self.ros = ros
        self.node = ros.create_node("client")
        self.features: list[Features] = []
        self.matches: list[Matches] = []
        self.statuses: list[FrontendStatus] = []
        self.images = self.node.create_publisher(image_type, image_topic, qos_profile_sensor_data)
        self.calibrations = self.node.create_publisher(CameraInfo, "camera_info", qos_profile_sensor_data)
        self.node.create_subscription(Features, "scfeat/features", self.features.append, 100)
        self.node.create_subscription(FrontendStatus, "scfeat/status", self.statuses.append, 100)

    def subscribe_matches(self) -> None:
        """Returns when the node has seen it, too: it matches only for those who listen."""
        self.node.create_subscription(Matches, "scfeat/matches", self.matches.append, 100)
        self._send_until(self.matches, START - 500_000_000_000, image_message)

    def connect(self, make: Callable[[np.ndarray, int], Any] = image_message) -> None:
        """Send images, stamped before START, until the first features arrive."""
        self._send_until(self.features, START - 1_000_000_000_000, make)

    def _send_until(self, answers: list[Any], stamp: int, make: Callable[[np.ndarray, int], Any]) -> None:
        """Returns when every answer to these images is in, too, and forgotten."""
        images = (make(texture(), at) for at in range(stamp, START, STEP))
        self.ros.pump(
            lambda: self.images.publish(next(images)), lambda: answers, timeout=PATIENCE, what="a first answer"
        )
        self.ask(next(images))
        self.settle(self.features[-1].header)
        self.features.clear()
        self.matches.clear()

    def ask(self, message: Any) -> Features:
        """Send one image and wait for its features. Sent again where it was lost, which best effort may do."""

        def found() -> list[Features]:
            return [answer for answer in self.features if answer.header == message.header]

        send = lambda: self.images.publish(message)  # noqa: E731
        return self.ros.pump(send, found, period=30.0, timeout=PATIENCE, what="features")[0]

    def settle(self, header: Any) -> FrontendStatus:
        """The final status after the image with this header, which was the last one that was sent."""

        def final() -> bool:
            status = self.statuses[-1] if self.statuses else FrontendStatus()
            return status.header == header and waiting(status) == 0

        self.ros.spin_until(final, timeout=PATIENCE, what=f"a status with the final counts after {header.stamp}")
        return self.statuses[-1]


def waiting(status: FrontendStatus) -> int:
    """Images of which the status does not say yet what became of them."""
    return status.received - status.processed - sum(getattr(status, f"dropped_{reason}") for reason in DROPPED)


@pytest.fixture
def start(ros: Any, spawn: Callable[..., Any]) -> Callable[..., Any]:
    """``start("-p", "device:=cpu", …)``: the node in a process, with the untrained network unless told otherwise."""

    def run(*arguments: str, weights: str = "random") -> Any:
        own = ("-p", f"weights:={weights}", "-p", "status_rate:=20.0")
        return spawn([sys.executable, "-m", "scfeat_ros.node", "--ros-args", *own, *arguments], OMP_NUM_THREADS="1")

    return run


@pytest.fixture
def node(start: Callable[..., Any]) -> Iterator[Any]:
    """The node with its defaults; it must end cleanly at the end of the test."""
    process = start()
    yield process
    assert process.running, process.output
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


@pytest.mark.live
def test_answers_carry_the_stamps_of_their_images_and_add_up(ros: Any, node: Any) -> None:
    client = Client(ros)
    client.connect()
    status = client.statuses[-1]
    assert status.processed > 0 and status.matches == 0 and np.isnan(status.ms_match), "matched for nobody"
    client.subscribe_matches()

    sent = [image_message(texture(shift), START + shift * STEP) for shift in range(5)]
    answers = [client.ask(message) for message in sent]
    status = client.settle(sent[-1].header)
    assert [answer.header for answer in answers] == [message.header for message in sent]
    assert [answer.sequence for answer in answers] == list(range(answers[0].sequence, answers[0].sequence + 5))
    for answer in answers:
        features = features_from_message(answer)
        assert answer.camera == "camera" and features.image_size == (WIDTH, HEIGHT)
        assert 0 < len(features) <= 1024 and (np.diff(features.scores) <= 0).all()
        assert (features.keypoints >= 0).all() and (features.keypoints <= [WIDTH - 1, HEIGHT - 1]).all()
        np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=2e-3)

    def newest_matches() -> int:
        return nanoseconds(client.matches[-1].header.stamp) if client.matches else 0

    ros.spin_until(lambda: newest_matches() == START + 4 * STEP, timeout=PATIENCE, what="the matches of the last image")
    by_stamp = {nanoseconds(matches.header.stamp): matches for matches in client.matches}
    for shift in range(1, 5):
        matches = by_stamp[START + shift * STEP]
        assert matches.header == sent[shift].header and matches.stamp0 == sent[shift - 1].header.stamp
        assert matches.frame_id0 == "front_optical" and matches.sequence1 == matches.sequence0 + 1
        pair = matches_from_message(matches)
        for points, indices, answer in (
            (pair.keypoints0, pair.matches.indices0, answers[shift - 1]),
            (pair.keypoints1, pair.matches.indices1, answers[shift]),
        ):
            np.testing.assert_array_equal(points, features_from_message(answer).keypoints[indices])
        # even an untrained network finds most points of a picture again that moved by one pixel
        motion = pair.keypoints1 - pair.keypoints0
        assert len(motion) > 20 and (abs(motion - [-1, 0]).max(axis=1) < 1.5).mean() > 0.5

    assert status.header == sent[-1].header and status.processed >= 6
    assert status.received == status.processed + status.dropped_busy and status.last_error == ""
    assert status.keypoints == len(answers[-1].scores) and 0 < status.coverage <= 1
    assert status.device == "cpu" and status.ms_network > 0 and status.ms_match > 0 and status.ms_total > 0

    # late, then a second time: neither is published, and the next one is matched to the newest before
    for count, offset in enumerate((3 * STEP, 4 * STEP), start=1):
        client.images.publish(image_message(texture(), START + offset))
        ros.spin_until(lambda n=count: client.statuses[-1].dropped_stale == n, timeout=PATIENCE, what="a stale image")
        assert "newer than the previous one" in client.statuses[-1].last_error
    after = client.ask(image_message(texture(5), START + 5 * STEP))
    assert after.sequence == answers[-1].sequence + 1
    ros.spin_until(
        lambda: client.matches[-1].header == after.header, timeout=PATIENCE, what="the matches of the next image"
    )
    assert nanoseconds(client.matches[-1].stamp0) == START + 4 * STEP

    client.matches.clear()
    for offset in (-1_000_000_000, STEP - 1_000_000_000):
        last = client.ask(image_message(texture(), START + offset))
    ros.spin_until(
        lambda: client.matches and client.matches[-1].header == last.header, timeout=PATIENCE, what="matches"
    )
    stamps = [(nanoseconds(matches.stamp0), nanoseconds(matches.header.stamp)) for matches in client.matches]
    assert stamps == [(START - 1_000_000_000, START + STEP - 1_000_000_000)], "matched over a jump back in time"
    assert "went back by 1.167 s" in node.output
    assert last.sequence == after.sequence + 2, "a number was given twice"


def broken(**changes: Any) -> Image:
    message = image_message(texture(), START)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def test_broken_images_and_calibrations_are_counted_and_survived(ros: Any, start: Callable[..., Any]) -> None:
    node = start()
    client = Client(ros)
    client.connect()
    before = client.statuses[-1]
    frames = [
        broken(encoding="mosaic"),
        broken(data=bytes(100)),
        broken(height=0, data=b""),
        broken(step=WIDTH - 1),
        image_message(texture(width=16, height=16), START),  # smaller than the network can take
    ]
    words = ["'mosaic'", "truncated", "with pixels", "step", "16"]
    for number, (frame, word) in enumerate(zip(frames, words, strict=True), start=before.dropped_decode + 1):
        client.images.publish(frame)
        ros.spin_until(
            lambda n=number: client.statuses[-1].dropped_decode == n,
            timeout=PATIENCE,
            what=f"a count of {number}: {word}",
        )
        assert word in client.statuses[-1].last_error
        ros.spin_until(lambda w=word: w in node.output, timeout=PATIENCE, what=f"a line in the log with {word}")

    answers = []

    def complained() -> bool:
        client.calibrations.publish(CameraInfo(width=WIDTH, height=HEIGHT, k=[float("nan")] * 9))
        answers.append(client.ask(image_message(texture(), START + len(answers) * STEP)))
        return "camera_info not used" in node.output

    ros.spin_until(complained, timeout=PATIENCE, what="a warning about the calibration")
    assert all(len(answer.scores) for answer in answers)
    status = client.settle(answers[-1].header)
    assert status.dropped_decode == before.dropped_decode + len(frames)
    assert "camera_info not used" in status.last_error and "finite" in status.last_error
    assert status.processed >= before.processed + len(answers) and status.dropped_error == 0
    interrupted(client, node, signal.SIGTERM)


def test_of_a_burst_the_newest_image_wins_and_every_other_one_is_counted(ros: Any, start: Callable[..., Any]) -> None:
    process = start()
    client = Client(ros)
    client.connect()
    before = client.statuses[-1]
    burst = [image_message(texture(width=640, height=480), START + number * STEP // 10) for number in range(150)]
    begin = time.monotonic()
    for number, message in enumerate(burst):
        client.images.publish(message)
        ros.executor.spin_once(timeout_sec=0)
        time.sleep(max(0.0, begin + (number + 1) * 0.005 - time.monotonic()))  # 200 Hz
    ros.spin_until(
        lambda: any(f.header == burst[-1].header for f in client.features), timeout=PATIENCE, what="the newest image"
    )
    status = client.settle(burst[-1].header)
    received = status.received - before.received
    processed = status.processed - before.processed
    assert status.header == burst[-1].header
    assert processed + status.dropped_busy - before.dropped_busy == received <= len(burst)
    assert 0 < len(client.features) <= processed < received, "nothing was dropped: the burst was no burst"
    stamps = [nanoseconds(features.header.stamp) for features in client.features]
    assert stamps == sorted(set(stamps))
    interrupted(client, process, signal.SIGINT)


def interrupted(client: Client, process: Any, number: signal.Signals) -> None:
    """A signal while an image is in work: it is finished and counted, and the process ends in order."""
    received = client.statuses[-1].received
    message = image_message(texture(width=640, height=480), START + 1_000_000 * STEP)
    client.images.publish(message)
    client.ros.spin_until(lambda: client.statuses[-1].received > received, timeout=PATIENCE, what="the image's arrival")
    process.popen.send_signal(number)
    process.popen.send_signal(number)  # both the terminal and ros2 launch send one
    client.settle(message.header)
    assert process.wait(PATIENCE) == 0, process.output
    assert "Traceback" not in process.output and "KeyboardInterrupt" not in process.output


def test_compressed_images_of_a_remapped_camera(ros: Any, start: Callable[..., Any]) -> None:
    process = start("-r", "image:=/front/image_raw", "-p", "image_transport:=compressed", "-p", "descriptor_type:=int8")
    client = Client(ros, "/front/image_raw/compressed", CompressedImage)

    def compressed(pixels: np.ndarray, stamp: int) -> CompressedImage:
        message = CompressedImage(header=image_message(pixels, stamp).header, format="mono8; jpeg compressed mono8")
        message.data.frombytes(cv2.imencode(".jpg", pixels)[1].tobytes())
        return message

    client.connect(compressed)
    message = compressed(texture(), START)
    answer = client.ask(message)
    assert answer.header == message.header and answer.descriptor_type == Features.INT8
    damaged = compressed(texture(), START + STEP)
    damaged.data = damaged.data[:20]
    client.images.publish(damaged)
    ros.spin_until(
        lambda: client.statuses[-1].dropped_decode == 1, timeout=PATIENCE, what="the damaged picture in the counts"
    )
    assert "cannot decode" in client.statuses[-1].last_error
    assert process.stop() == 0, process.output


def test_a_lifecycle_manager_takes_it_round_twice(ros: Any, start: Callable[..., Any]) -> None:
    process = start("-p", "autostart:=false")
    client = Client(ros)
    change = client.node.create_client(ChangeState, "scfeat/change_state")
    state = client.node.create_client(GetState, "scfeat/get_state")
    ros.spin_until(lambda: change.service_is_ready() and state.service_is_ready(), PATIENCE, "the lifecycle services")

    def call(service: Any, request: Any) -> Any:
        future = service.call_async(request)
        ros.spin_until(future.done, PATIENCE, "an answer of the service")
        return future.result()

    def go(transition: int, expected: int) -> None:
        assert call(change, ChangeState.Request(transition=Transition(id=transition))).success, process.output
        assert call(state, GetState.Request()).current_state.id == expected

    change.call_async(ChangeState.Request(transition=Transition(id=Transition.TRANSITION_ACTIVATE)))
    assert call(state, GetState.Request()).current_state.id == State.PRIMARY_STATE_UNCONFIGURED
    for turn in range(2):
        go(Transition.TRANSITION_CONFIGURE, State.PRIMARY_STATE_INACTIVE)
        assert not client.node.get_subscriptions_info_by_topic("/image"), "subscribed before it was activated"
        go(Transition.TRANSITION_ACTIVATE, State.PRIMARY_STATE_ACTIVE)
        client.connect()
        answer = client.ask(image_message(texture(), START + turn * STEP))
        assert len(answer.scores)
        received = client.settle(answer.header).received
        go(Transition.TRANSITION_DEACTIVATE, State.PRIMARY_STATE_INACTIVE)
        client.images.publish(image_message(texture(), START + 10 * STEP))
        client.statuses.clear()
        ros.spin_until(lambda: len(client.statuses) >= 5, timeout=PATIENCE, what="statuses of the inactive node")
        assert client.statuses[-1].received == received, "took an image while inactive"
        go(Transition.TRANSITION_CLEANUP, State.PRIMARY_STATE_UNCONFIGURED)
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


def test_a_bad_qos_override_fails_the_transition_and_nothing_else(ros: Any, start: Callable[..., Any]) -> None:
    process = start("-p", "autostart:=false", "-p", "qos_overrides./scfeat/matches.publisher.reliability:=bogus")
    client = Client(ros)
    change = client.node.create_client(ChangeState, "scfeat/change_state")
    state = client.node.create_client(GetState, "scfeat/get_state")
    ros.spin_until(lambda: change.service_is_ready() and state.service_is_ready(), PATIENCE, "the lifecycle services")
    for _ in range(2):
        configure = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
        changed = change.call_async(configure)
        ros.spin_until(changed.done, PATIENCE, "an answer of the service")
        assert not changed.result().success
        current = state.call_async(GetState.Request())
        ros.spin_until(current.done, PATIENCE, "the state")
        assert current.result().current_state.id == State.PRIMARY_STATE_UNCONFIGURED
    assert process.output.count("qos_overrides./scfeat/matches.*") == 2 == process.output.count("`bogus`")
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


class Breaking(FrontendNode):
    """Fails while it configures, and while it cleans up after that."""

    def _create_outputs(self) -> None:
        super()._create_outputs()
        raise KeyError("configure")

    def _stop(self) -> bool:
        raise KeyError("stop")


def test_a_node_that_cannot_recover_says_so_and_is_finished(ros: Any, capfd: pytest.CaptureFixture[str]) -> None:
    weights = Parameter("weights", value="random")
    node = ros.add_node(Breaking(context=ros.context, parameter_overrides=[weights]))
    assert node.trigger_configure() == TransitionCallbackReturn.ERROR
    assert node.finished and node.failed and not node.hangs
    shut_down(node)  # from the final state: an error in the log, not an exception
    output = capfd.readouterr().err
    assert "KeyError: 'configure'" in output and "KeyError: 'stop'" in output and "shut down in order" in output


@pytest.fixture
def damaged_weights(tmp_path: Path) -> str:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"\x40\0\0\0\0\0\0\0" + b"not a header of safetensors, only something that is long enough")
    return str(path)


def refused(process: Any, *words: str) -> None:
    """The process must have ended by itself, with a status, a fatal line, and without a traceback."""
    assert process.wait(PATIENCE) not in (0, None), process.output
    assert "FATAL" in process.output and "Traceback" not in process.output, process.output
    for word in words:
        assert word in process.output, process.output
    assert "subscribed to" not in process.output


def test_missing_weights_end_it_with_the_fix(start: Callable[..., Any]) -> None:
    refused(start(weights="/nowhere/best.safetensors"), "/nowhere/best.safetensors")


def test_damaged_weights_end_it_with_the_fix(start: Callable[..., Any], damaged_weights: str) -> None:
    refused(start(weights=damaged_weights), damaged_weights)


def test_absent_cuda_ends_it_with_the_fix(start: Callable[..., Any]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA is present on this machine")
    refused(start("-p", "device:=cuda"), "cuda", "cpu")


def test_a_wrong_parameter_ends_it_with_the_nearest_right_one(start: Callable[..., Any], tmp_path: Path) -> None:
    refused(start("-p", "max_keypoint:=100"), "'max_keypoint'", "did you mean 'max_keypoints'")
    refused(start("-p", "descriptor_type:=double"), "descriptor_type", "'float16'", "'double'")
    path = tmp_path / "mine.yaml"
    path.write_text("/**:\n  ros__parameters:\n    verfy: false\n")
    refused(start("--params-file", str(path)), "'verfy'", "did you mean 'verify'")
    refused(start("--params-file", "/nowhere/mine.yaml"), "/nowhere/mine.yaml")


@pytest.mark.parametrize("override", ["/scfeat/status.publisher.reliability:=bogus", "/image.subscription.depth:=many"])
def test_a_bad_qos_override_ends_it_with_the_topic(start: Callable[..., Any], override: str) -> None:
    topic, _, value = override.partition(".")
    refused(start("-p", f"qos_overrides.{override}"), f"qos_overrides.{topic}.*", value.partition(":=")[2])
