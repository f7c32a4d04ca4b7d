"""The node as a process of its own on a live graph: what comes back, what it survives, how it starts and ends."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from live_graph import HEIGHT, PATIENCE, START, STEP, WIDTH, Client, calibration, image_message, texture, waiting
from rclpy.clock import ClockChange, TimeJump
from rclpy.duration import Duration
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from scfeat.msg import Features, Matches, TwoViewGeometry
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu

from scfeat_core.types import GeometryModel
from scfeat_ros.messages import features_from_message, matches_from_message, nanoseconds, stamp_from_nanoseconds
from scfeat_ros.node import FrontendNode, shut_down

pytestmark = [
    pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Deprecated in favor of:DeprecationWarning"),  # of rclpy, when it warns of QoS
]

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture
def node(start: Callable[..., Any]) -> Iterator[Any]:
    """The node with its defaults, weights included; it must end cleanly at the end of the test."""
    process = start(weights="lite")
    yield process
    assert process.running, process.output
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


@pytest.mark.live
def test_answers_carry_the_stamps_of_their_images_and_add_up(ros: Any, node: Any, spawn: Callable[..., Any]) -> None:
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
        # most points of a picture are found again that moved by one pixel
        motion = pair.keypoints1 - pair.keypoints0
        assert len(motion) > 20 and (abs(motion - [-1, 0]).max(axis=1) < 1.5).mean() > 0.5

    assert status.header == sent[-1].header and status.processed >= 6
    assert status.received == status.processed + status.dropped_busy + status.dropped_unwanted
    assert status.last_error == ""
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
    tracks_of_a_late_subscriber(client)
    a_stalled_subscriber_holds_nobody_up(client, spawn)
    a_killed_publisher_leaves_the_node_to_others(client, node, spawn)


def tracks_of_a_late_subscriber(client: Client) -> None:
    """Ids begin when somebody listens, stay with their points, and go out with the stamps of the images."""
    client.subscribe_tracks()
    sent = [image_message(texture(shift), START + (100 + shift) * STEP) for shift in range(3)]
    answers = [client.ask(message) for message in sent]
    headers = [message.header for message in sent]
    new = lambda: [tracks for tracks in client.tracks if tracks.header in headers]  # noqa: E731
    client.ros.spin_until(lambda: len(new()) == 3, timeout=PATIENCE, what="the tracks of three images")
    assert [tracks.header for tracks in new()] == headers
    for answer, tracks in zip(answers, new(), strict=True):
        assert tracks.session and tracks.session == new()[0].session and tracks.sequence == answer.sequence
        assert len(tracks.ids) and len(set(tracks.ids)) == len(tracks.ids) == len(tracks.ages) and 0 not in tracks.ids
        assert set(tracks.ids) <= set(answer.track_ids)
    first, last = (dict(zip(tracks.ids, tracks.ages, strict=True)) for tracks in new()[::2])
    common = set(first) & set(last)
    grown = [last[number] - first[number] for number in common]
    assert len(common) > 20 and set(grown) <= {1, 2}, "an age counts the frames with the track, lost ones or not"
    assert grown.count(2) > len(grown) / 2


def a_stalled_subscriber_holds_nobody_up(client: Client, spawn: Callable[..., Any]) -> None:
    """A process that stops in the middle, with a reliable subscription to what the node sends."""
    stalled = spawn([sys.executable, "-c", LISTENER])
    numbers = itertools.count(200)
    client.ros.pump(
        lambda: client.images.publish(image_message(texture(), START + next(numbers) * STEP)),
        lambda: "heard" in stalled.output,
        timeout=PATIENCE,
        what="the other subscriber",
    )
    stalled.popen.send_signal(signal.SIGSTOP)
    first = next(numbers)
    for number in range(first, first + 30):
        client.ask(image_message(texture(), START + number * STEP))
    stalled.popen.send_signal(signal.SIGCONT)


def a_killed_publisher_leaves_the_node_to_others(client: Client, node: Any, spawn: Callable[..., Any]) -> None:
    publisher = spawn([sys.executable, "-c", PUBLISHER, str(Path(__file__).parent)])
    foreign = lambda: [f for f in client.features if nanoseconds(f.header.stamp) > START + 10**12]  # noqa: E731
    client.ros.spin_until(foreign, timeout=PATIENCE, what="features of the other camera's images")
    publisher.popen.kill()
    assert publisher.wait(PATIENCE) == -signal.SIGKILL
    received = client.statuses[-1].received
    answer = client.ask(image_message(texture(), START + 2 * 10**12))
    status = client.settle(answer.header)
    assert status.received > received and status.dropped_error == 0 and node.running


LISTENER = """
import rclpy
from scfeat.msg import Features
rclpy.init()
node = rclpy.create_node("listener")
node.create_subscription(Features, "scfeat/features", lambda message: print("heard", flush=True), 1)
rclpy.spin(node)
"""
PUBLISHER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import rclpy
from live_graph import START, STEP, image_message, texture
from sensor_msgs.msg import Image
rclpy.init()
node = rclpy.create_node("doomed")
publisher = node.create_publisher(Image, "image", 5)
pixels = texture()
for number in range(1, 100000):
    publisher.publish(image_message(pixels, START + 10**12 + number * STEP // 10))
    time.sleep(0.02)
"""


def broken(**changes: Any) -> Image:
    message = image_message(texture(), START)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.live
def test_broken_images_calibrations_and_masks_are_counted_and_survived(ros: Any, start: Callable[..., Any]) -> None:
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

    def told_of_the_mask() -> bool:
        client.masks.publish(image_message(texture(width=64, height=48), START))
        answers.append(client.ask(image_message(texture(), START + len(answers) * STEP)))
        return "the mask on its topic" in client.statuses[-1].last_error

    ros.spin_until(told_of_the_mask, timeout=PATIENCE, what="a warning about the mask")
    assert f"{WIDTH}x{HEIGHT}, found 64x48" in client.statuses[-1].last_error
    assert (np.frombuffer(answers[-1].keypoints, np.float32)[::2] < 40).any(), "a mask of another size was used"
    half = np.zeros((HEIGHT, WIDTH), np.uint8)
    half[:, WIDTH // 2 :] = 255

    def masked() -> bool:
        client.masks.publish(image_message(half, START))
        answers.append(client.ask(image_message(texture(), START + len(answers) * STEP)))
        return bool((np.frombuffer(answers[-1].keypoints, np.float32)[::2] > WIDTH // 2 - 1).all())

    ros.spin_until(masked, timeout=PATIENCE, what="keypoints under the mask alone")
    status = client.settle(answers[-1].header)
    assert status.processed >= before.processed + len(answers) and status.dropped_error == 0
    interrupted(client, node, signal.SIGTERM)


@pytest.mark.live
def test_of_a_burst_the_newest_image_wins_and_every_other_one_is_counted(ros: Any, start: Callable[..., Any]) -> None:
    process = start()
    client = Client(ros)
    client.connect()
    before = client.statuses[-1]
    pixels = texture(width=1280, height=960)  # the network takes some 300 ms, the camera 5
    burst = [image_message(pixels, START + number * STEP // 10) for number in range(150)]
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
    assert status.dropped_busy > before.dropped_busy
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


@pytest.mark.live
def test_images_do_not_wait_for_an_engine(
    ros: Any, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do transitions and the end: compiling takes a minute. It is news for the log, and no error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process = start("-p", "engine:=compile")
    client = Client(ros)
    client.connect()
    seen: list[DiagnosticArray] = []
    client.node.create_subscription(DiagnosticArray, "/diagnostics", seen.append, 10)
    status = client.settle(client.ask(image_message(texture(), START)).header)
    note = f"compile for 1 image(s) of {WIDTH}x{HEIGHT} is being made; eager meanwhile"
    assert status.last_error == "" and status.precision == "float32"
    ros.spin_until(lambda: note in process.output, PATIENCE, "the news in the log")
    levels = [line for line in process.output.splitlines() if note in line]
    assert all(line.startswith("[INFO]") for line in levels)
    seen.clear()
    ros.spin_until(lambda: seen, PATIENCE, "diagnostics")
    network = seen[-1].status[-1]
    assert network.level == DiagnosticStatus.OK and network.message.endswith(f" by eager; {note}")
    change = client.node.create_client(ChangeState, "scfeat/change_state")
    state = client.node.create_client(GetState, "scfeat/get_state")
    assert ros.call(state, GetState.Request(), again=True).current_state.id == State.PRIMARY_STATE_ACTIVE
    for transition in (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP):
        assert ros.call(change, ChangeState.Request(transition=Transition(id=transition))).success, process.output
    assert not list(tmp_path.rglob("*.pt2")) and children_of(process.popen.pid) == []
    assert process.stop() == 0 and "Traceback" not in process.output


def children_of(process: int) -> list[str]:
    found: list[str] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has ended since; what it left is its process's
            found += (task / "children").read_text().split()
    return found


@pytest.mark.live
def test_three_cameras_two_of_them_a_stereo_pair(ros: Any, start: Callable[..., Any]) -> None:
    several = ("cameras:=[left, right, rear]", "stereo:=['left:right']", "budgets:=[100, 0, 50]", "max_keypoints:=200")
    process = start(*itertools.chain(*(("-p", word) for word in several)))
    left, right, rear = clients = [Client(ros, name) for name in ("left", "right", "rear")]
    stereo: list[Matches] = []
    diagnostics: list[DiagnosticArray] = []
    right.node.create_subscription(DiagnosticArray, "/diagnostics", diagnostics.append, 10)
    right.node.create_subscription(Matches, "scfeat/right/stereo_matches", stereo.append, 100)
    stamps = itertools.count(START, STEP)

    def send() -> None:
        stamp = next(stamps)
        for client, shift, late in ((left, 0, 0), (right, 4, 1_000_000), (rear, 8, 7_000_000)):
            client.images.publish(image_message(texture(shift), stamp + late))
        left.calibrations.publish(calibration())  # after the first images, as drivers do
        moved = [120.0, 0.0, 80.0, -12.0, 0.0, 120.0, 60.0, 0.0, 0.0, 0.0, 1.0, 0.0]  # 10 cm to the right
        right.calibrations.publish(calibration(p=moved))

    def by_stamp(client: Client) -> dict[int, Features]:
        return {nanoseconds(features.header.stamp): features for features in client.features}

    def complete() -> list[Matches]:
        """Stereo matches between two images whose features came, too, with a calibration."""
        both = [m for m in stereo if nanoseconds(m.stamp0) in by_stamp(left)]
        return [m for m in both if nanoseconds(m.header.stamp) in by_stamp(right) and len(m.inliers)]

    ros.pump(send, lambda: len(complete()) >= 3 and rear.features, timeout=PATIENCE, what="stereo matches")
    models = {matches_from_message(message).geometry.model for message in stereo}
    assert models == {GeometryModel.ESSENTIAL}, "an image did not wait for its calibration"
    matches = complete()[-1]
    assert (matches.kind, matches.camera0, matches.camera1) == (Matches.STEREO, "left", "right")
    assert nanoseconds(matches.header.stamp) - nanoseconds(matches.stamp0) == 1_000_000
    view0, view1 = by_stamp(left)[nanoseconds(matches.stamp0)], by_stamp(right)[nanoseconds(matches.header.stamp)]
    assert (matches.sequence0, matches.sequence1) == (view0.sequence, view1.sequence)
    pair = matches_from_message(matches)
    np.testing.assert_array_equal(pair.keypoints0, features_from_message(view0).keypoints[pair.matches.indices0])
    motion = pair.keypoints0 - pair.keypoints1
    assert len(motion) > 20 and np.median(motion[:, 0]) == pytest.approx(4, abs=0.5) and abs(motion[:, 1]).max() < 3
    assert [client.features[-1].camera for client in clients] == ["left", "right", "rear"]
    assert len(view0.scores) == 100 and len(view1.scores) == 200 and len(rear.features[-1].scores) == 50

    before = left.await_status(lambda status: waiting(status) == 0, "the end of the images of the left camera")
    left.images.publish(image_message(texture(), next(stamps)))
    left.await_status(lambda status: status.dropped_sync > before.dropped_sync, "an image without a partner")
    assert "expected an image of right within 0.005 s" in left.statuses[-1].last_error
    parameters_change_between_two_images(rear, send)
    masks_with_the_stamps_of_their_images(rear)
    ros.spin_until(lambda: diagnostics, PATIENCE, "diagnostics")
    names = " ".join(status.name for status in diagnostics[-1].status)
    assert all(camera in names for camera in ("left", "right", "rear", "network")), names
    assert rear.statuses[-1].dropped_error == left.statuses[-1].dropped_error == 0
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


def parameters_change_between_two_images(client: Client, send: Callable[[], None]) -> None:
    assert "max_keypoints" in client.set_parameters(max_keypoints=0)
    assert "each of the 3 cameras" in client.set_parameters(max_keypoints=20, budgets=[10, 10])
    assert "did you mean 'max_keypoints'" in client.set_parameters(max_keypoint=100)
    assert client.set_parameters(budgets=[0], max_keypoints=30) == ""
    client.features.clear()
    few = lambda: [features for features in client.features if len(features.scores) == 30]  # noqa: E731
    client.ros.pump(send, few, timeout=PATIENCE, what="the new number of keypoints")
    assert {len(features.scores) for features in client.features} <= {50, 30}, "neither the old nor the new number"


def masks_with_the_stamps_of_their_images(client: Client) -> None:
    assert client.set_parameters(mask_policy="exact", mask_patience=1.0) == ""
    half = np.zeros((HEIGHT, WIDTH), np.uint8)
    half[:, : WIDTH // 2] = 255
    first = START + 10**12
    stamps = itertools.count(first, STEP)

    def send() -> None:
        stamp = next(stamps)
        client.images.publish(image_message(texture(), stamp))
        client.masks.publish(image_message(half, stamp))

    new = lambda: [features for features in client.features if nanoseconds(features.header.stamp) >= first]  # noqa: E731
    client.ros.pump(send, new, timeout=PATIENCE, what="an image with a mask")
    for features in new():
        assert (np.frombuffer(features.keypoints, np.float32)[::2] < WIDTH // 2 + 1).all()
    before = client.await_status(lambda status: waiting(status) == 0, "the end of the images with masks")
    client.images.publish(image_message(texture(), next(stamps)))
    client.await_status(lambda status: status.dropped_sync > before.dropped_sync, "an image without its mask")
    assert "expected a mask with its stamp" in client.statuses[-1].last_error


@pytest.mark.live
def test_qos_follows_and_explains_and_a_simulation_may_jump(ros: Any, start: Callable[..., Any]) -> None:
    driver = ros.create_node("driver")
    latched = driver.create_publisher(CameraInfo, "camera_info", LATCHED)
    latched.publish(calibration())  # once, before the node is there
    clock = driver.create_publisher(Clock, "/clock", 10)
    override = "qos_overrides./image.subscription.reliability"
    process = start("-p", "use_sim_time:=true", "-p", f"{override}:=reliable")
    client = Client(ros)
    client.await_status(lambda status: "/image" in status.last_error, "a report of the QoS that does not fit")
    report = client.statuses[-1].last_error
    assert "from /client" in report and "reliability best_effort" in report and override in report
    assert client.statuses[-1].received == 0

    client.node.destroy_publisher(client.images)
    client.images = client.node.create_publisher(Image, "image", 5)
    client.subscribe_matches()
    asked = driver.create_subscription(Matches, "scfeat/matches", lambda message: None, LATCHED)
    ros.spin_until(lambda: "nothing of /scfeat/matches reaches" in process.output, PATIENCE, "a report of the other")
    (said,) = [line for line in process.output.splitlines() if "nothing of /scfeat/matches reaches" in line]
    assert "/driver: it asks for durability transient_local, and volatile" in said and "/client" not in said
    assert "qos_overrides./scfeat/matches.publisher.durability" in said
    driver.destroy_subscription(asked)

    stamps = itertools.count(START, STEP // 10)

    def play() -> None:
        stamp = next(stamps)
        clock.publish(Clock(clock=stamp_from_nanoseconds(stamp)))
        client.images.publish(image_message(texture(), stamp))

    ros.pump(play, lambda: abs(client.statuses[-1].age_ms) < 60_000, timeout=PATIENCE, what="the simulated time")
    ros.pump(play, lambda: client.matches, timeout=PATIENCE, what="matches")
    assert client.matches[-1].geometry.model in (TwoViewGeometry.ESSENTIAL, TwoViewGeometry.HOMOGRAPHY)
    # Less than a second back: by its stamp alone an image would only come late.
    newest = next(stamps)
    stamps = itertools.count(newest - 500_000_000, STEP // 10)
    ros.pump(play, lambda: "the clock went back to" in process.output, timeout=PATIENCE, what="the jump in the log")
    client.matches.clear()
    ros.pump(play, lambda: client.matches, timeout=PATIENCE, what="matches after the jump")
    times = [(nanoseconds(matches.stamp0), nanoseconds(matches.header.stamp)) for matches in client.matches]
    assert all(old < new < newest for old, new in times), "matched over the jump, or only after the time was made up"
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


def test_compressed_images_of_a_remapped_camera(ros: Any, start: Callable[..., Any]) -> None:
    process = start("-r", "image:=/front/image_raw", "-p", "image_transport:=compressed", "-p", "descriptor_type:=int8")
    client = Client(ros, image_topic="/front/image_raw/compressed", image_type=CompressedImage)

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
    assert "without its end" in client.statuses[-1].last_error
    assert process.stop() == 0, process.output


@pytest.mark.live
def test_a_lifecycle_manager_takes_it_round_fifty_times_without_growth(ros: Any, start: Callable[..., Any]) -> None:
    process = start("-p", "autostart:=false")
    client = Client(ros)
    change = client.node.create_client(ChangeState, "scfeat/change_state")
    state = client.node.create_client(GetState, "scfeat/get_state")

    def go(transition: int, expected: int) -> None:
        assert ros.call(change, ChangeState.Request(transition=Transition(id=transition))).success, process.output
        assert ros.call(state, GetState.Request()).current_state.id == expected

    ros.spin_until(change.service_is_ready, PATIENCE, "the lifecycle services")
    change.call_async(ChangeState.Request(transition=Transition(id=Transition.TRANSITION_ACTIVATE)))
    assert ros.call(state, GetState.Request(), again=True).current_state.id == State.PRIMARY_STATE_UNCONFIGURED
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

    resident = []
    for _ in range(50):
        go(Transition.TRANSITION_CONFIGURE, State.PRIMARY_STATE_INACTIVE)
        go(Transition.TRANSITION_ACTIVATE, State.PRIMARY_STATE_ACTIVE)
        go(Transition.TRANSITION_DEACTIVATE, State.PRIMARY_STATE_INACTIVE)
        go(Transition.TRANSITION_CLEANUP, State.PRIMARY_STATE_UNCONFIGURED)
        resident.append(resident_megabytes(process.popen.pid))
    # The weights alone are 3.3 MB: a network that stays behind each time would be 130 MB over 40 rounds.
    # What stays behind is there in every round; the allocator's peaks come and go.
    assert np.median(resident[40:]) - np.median(resident[:10]) < 20, resident
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


def resident_megabytes(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_a_bad_qos_override_fails_the_transition_and_nothing_else(ros: Any, start: Callable[..., Any]) -> None:
    process = start("-p", "autostart:=false", "-p", "qos_overrides./scfeat/matches.publisher.reliability:=bogus")
    client = Client(ros)
    change = client.node.create_client(ChangeState, "scfeat/change_state")
    state = client.node.create_client(GetState, "scfeat/get_state")
    assert ros.call(state, GetState.Request(), again=True).current_state.id == State.PRIMARY_STATE_UNCONFIGURED
    for _ in range(2):
        configure = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
        assert not ros.call(change, configure).success
        assert ros.call(state, GetState.Request()).current_state.id == State.PRIMARY_STATE_UNCONFIGURED
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


def test_what_was_due_when_the_node_was_cleaned_up_does_nothing(ros: Any) -> None:
    """The executor of events still calls it."""
    options = [Parameter("weights", value="random"), Parameter("use_imu", value=True)]
    node = ros.add_node(FrontendNode(context=ros.context, parameter_overrides=options))
    (camera,) = node.settings.cameras

    def late() -> None:
        node._on_image(camera, image_message(texture(), START))
        node._on_imu(Imu())
        node._on_jump(TimeJump(ClockChange.ROS_TIME_NO_CHANGE, Duration(seconds=-1)))
        node._publish_diagnostics()
        node._publish_statuses()
        node._tick()

    late()
    success = TransitionCallbackReturn.SUCCESS
    for _ in range(2):
        assert node.trigger_configure() == node.trigger_activate() == success
        assert node.trigger_deactivate() == success
        late()
        assert node.trigger_cleanup() == success
        late()
        assert node._worker.counts(camera).received == 0


def test_a_destroyed_node_leaves_the_graph_at_once(ros: Any) -> None:
    """As a living one of its name would be taken for it."""
    observer = ros.create_node("observer")
    gc.disable()
    try:
        node = FrontendNode(context=ros.context, parameter_overrides=[Parameter("weights", value="random")])
        assert "scfeat" in observer.get_node_names()
        node.destroy_node()
        assert "scfeat" not in observer.get_node_names()
        node.destroy_node()  # as often as one likes
    finally:
        gc.enable()


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
