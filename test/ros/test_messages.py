"""Results to messages and back: nothing is lost, stamps and headers stay what they were."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from scfeat_core.errors import CalibrationError, ConfigError, DataError
from scfeat_core.types import Features, FrameResult, GeometryModel, Matches, PairResult, TwoViewGeometry

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from builtin_interfaces.msg import Time
from rclpy.serialization import deserialize_message, serialize_message
from scfeat.msg import Features as FeaturesMessage
from scfeat.msg import Matches as MatchesMessage
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from scfeat_ros import messages

STAMP = 1_720_000_000_123_456_789


def header() -> Header:
    return Header(stamp=messages.stamp_from_nanoseconds(STAMP), frame_id="camera_optical")


def frame(count: int = 100, dim: int = 64, matches: int = 40, verified: bool = True) -> FrameResult:
    random = np.random.default_rng(1)
    descriptors = random.normal(size=(count, dim)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    keypoints = random.uniform(0, 480, (count, 2)).astype(np.float32)
    scores = np.sort(random.uniform(0, 1, count).astype(np.float32))[::-1]
    features = Features(keypoints, scores, descriptors, (640, 480), "scfeat:0a1b2c")
    indices = random.permutation(count)[:matches]
    geometry = TwoViewGeometry(GeometryModel.FUNDAMENTAL, random.normal(size=(3, 3)), np.arange(matches) % 2 == 0, 1.5)
    pair = PairResult(
        sequence0=6,
        stamp0=STAMP - 33_333_333,
        matches=Matches(indices[::-1].copy(), indices, random.uniform(0, 1, matches).astype(np.float32)),
        keypoints0=keypoints[indices[::-1]],
        keypoints1=keypoints[indices],
        geometry=geometry if verified else None,
    )
    timings = {"preprocess": 1.0, "network": 50.0, "select": 2.0, "match": 3.0, "verify": 4.0}
    return FrameResult("left", 7, STAMP, features, pair, timings)


def over_the_wire(message: object) -> object:
    """Through CDR, as a subscriber gets it."""
    return deserialize_message(serialize_message(message), type(message))


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 0.0), ("float16", 5e-4), ("int8", 4e-3)])
def test_features_there_and_back(kind: str, tolerance: float) -> None:
    result = frame()
    message = over_the_wire(messages.features_to_message(result, header(), kind, rectified=True))
    assert isinstance(message, FeaturesMessage)
    assert message.header == header() and message.rectified
    assert (message.camera, message.sequence) == ("left", 7)
    assert message.descriptor_type == messages.DESCRIPTOR_TYPES[kind]
    assert len(message.descriptors) == 100 * 64 * {"float32": 4, "float16": 2, "int8": 1}[kind]
    back = messages.features_from_message(message)
    np.testing.assert_array_equal(back.keypoints, result.features.keypoints)
    np.testing.assert_array_equal(back.scores, result.features.scores)
    assert back.descriptors.dtype == np.float32
    assert abs(back.descriptors - result.features.descriptors).max() <= tolerance
    assert (back.image_size, back.descriptor_space) == ((640, 480), "scfeat:0a1b2c")


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_short_descriptors_find_the_same_neighbours(kind: str) -> None:
    result = frame(count=500)
    exact = result.features.descriptors
    sent = messages.features_from_message(messages.features_to_message(result, header(), kind)).descriptors
    noise = np.random.default_rng(2).normal(size=exact.shape).astype(np.float32)
    query = exact + 0.1 * noise
    assert (np.argmax(query @ exact.T, 1) == np.argmax(query @ sent.T, 1)).mean() > 0.995


def test_features_without_descriptors_and_without_points() -> None:
    bare = messages.features_from_message(messages.features_to_message(frame(), header(), "none"))
    assert len(bare) == 100 and bare.descriptors.shape == (100, 0)
    nothing = frame(count=0, matches=0)
    for kind in ("float32", "float16", "int8"):
        empty = messages.features_from_message(over_the_wire(messages.features_to_message(nothing, header(), kind)))
        assert empty.keypoints.shape == (0, 2) and empty.descriptors.shape == (0, 64)


def test_a_thousand_points_stay_under_the_limit_of_dds() -> None:
    message = messages.features_to_message(frame(count=1024, dim=128), header())
    assert len(serialize_message(message)) < 512 * 1024


def test_wrong_descriptor_types_and_sizes_are_explained() -> None:
    with pytest.raises(ConfigError, match="float32, float16, int8 or none; found 'double'"):
        messages.features_to_message(frame(), header(), "double")
    message = messages.features_to_message(frame(), header())
    message.descriptors = array("B", bytes(10))
    with pytest.raises(DataError, match="expected 100 descriptors of 64 values, found 10 bytes"):
        messages.features_from_message(message)


@pytest.mark.parametrize("verified", [True, False])
def test_matches_there_and_back(verified: bool) -> None:
    result = frame(verified=verified)
    message = over_the_wire(messages.matches_to_message(result, header(), "older_optical"))
    assert isinstance(message, MatchesMessage)
    assert message.header == header() and message.frame_id0 == "older_optical"
    assert messages.nanoseconds(message.stamp0) == STAMP - 33_333_333
    assert (message.camera0, message.camera1, message.sequence0, message.sequence1) == ("left", "left", 6, 7)
    back, pair = messages.matches_from_message(message), result.pair
    assert pair is not None
    for name in ("keypoints0", "keypoints1"):
        np.testing.assert_array_equal(getattr(back, name), getattr(pair, name))
    for name in ("indices0", "indices1", "scores"):
        np.testing.assert_array_equal(getattr(back.matches, name), getattr(pair.matches, name))
    if not verified:
        assert back.geometry is None and len(message.inliers) == 0
        return
    assert back.geometry is not None and pair.geometry is not None
    assert back.geometry.model is GeometryModel.FUNDAMENTAL and back.geometry.threshold == 1.5
    np.testing.assert_array_equal(back.geometry.matrix, pair.geometry.matrix)
    np.testing.assert_array_equal(back.geometry.inliers, pair.geometry.inliers)
    assert message.geometry.num_inliers == pair.geometry.num_inliers


@pytest.mark.parametrize("value", [0, 1, 999_999_999, 1_000_000_000, STAMP, (2**31 - 1) * 10**9 + 999_999_999])
def test_stamps_are_exact(value: int) -> None:
    assert messages.nanoseconds(messages.stamp_from_nanoseconds(value)) == value
    assert messages.nanoseconds(Time(sec=value // 10**9, nanosec=value % 10**9)) == value


def calibration(**changes: object) -> CameraInfo:
    info = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=[0.1, -0.2, 0.0, 0.0, 0.0])
    info.k = [400.0, 0.0, 320.0, 0.0, 410.0, 240.0, 0.0, 0.0, 1.0]
    info.p = [390.0, 0.0, 315.0, -40.0, 0.0, 395.0, 235.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def test_camera_info_raw_and_rectified() -> None:
    camera = messages.camera_from_message(calibration(), (640, 480))
    np.testing.assert_array_equal(camera.K, [[400, 0, 320], [0, 410, 240], [0, 0, 1]])
    np.testing.assert_array_equal(camera.D, [0.1, -0.2, 0, 0, 0])
    assert camera.size == (640, 480) and camera.distortion_model == "plumb_bob"
    rectified = messages.camera_from_message(calibration(), (640, 480), rectified=True)
    np.testing.assert_array_equal(rectified.K, [[390, 0, 315], [0, 395, 235], [0, 0, 1]])
    assert not rectified.D.any()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"k": [0.0] * 9}, "positive focal lengths"),
        ({"k": [float("nan")] + [0.0] * 8}, "finite"),
        ({"k": [float("inf"), 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]}, "finite"),
        ({"k": [-400.0, 0.0, 320.0, 0.0, 410.0, 240.0, 0.0, 0.0, 1.0]}, "positive focal lengths"),
        ({"d": [float("nan")] * 5}, "finite"),
        ({"distortion_model": "fisheye_of_mine"}, "fisheye_of_mine"),
        ({"width": 320, "height": 240}, "images of 640x480, found one for 320x240"),
    ],
)
def test_an_unusable_camera_info_is_explained(changes: dict[str, object], word: str) -> None:
    with pytest.raises(CalibrationError, match=word):
        messages.camera_from_message(calibration(**changes), (640, 480))


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_arrays_cross_as_arrays(kind: str) -> None:
    """Lists, or numpy assigned as it is, would take 100 times as long (benchmarks/messages.py)."""
    for message in (
        messages.features_to_message(frame(), header(), kind),
        messages.matches_to_message(frame(), header(), ""),
    ):
        for name, field_type in message.get_fields_and_field_types().items():
            if field_type.startswith("sequence"):
                assert isinstance(getattr(message, name), array), name
