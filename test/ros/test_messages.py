"""Results to messages and back: nothing is lost, stamps and headers stay what they were."""

from __future__ import annotations

import struct
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from scfeat_core.errors import CalibrationError, ConfigError, DataError
from scfeat_core.types import (
    Features,
    FrameResult,
    GeometryModel,
    Matches,
    MatchKind,
    PairResult,
    TrackFlag,
    Tracks,
    TwoViewGeometry,
)

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from builtin_interfaces.msg import Time
from rclpy.serialization import deserialize_message, serialize_message
from scfeat.msg import Features as FeaturesMessage
from scfeat.msg import Matches as MatchesMessage
from scfeat.msg import Tracks as TracksMessage
from scfeat.msg import TwoViewGeometry as GeometryMessage
from sensor_msgs.msg import CameraInfo, RegionOfInterest
from std_msgs.msg import Header

from scfeat_ros import messages
from scfeat_ros.calibration import camera_from_message

STAMP = 1_720_000_000_123_456_789
# CDR that another implementation (rosbags) wrote from the .msg files; the content is in the test that reads them.
FEATURES_BYTES = bytes.fromhex(
    "00010000001e856615cd5b070f00000063616d6572615f6f70746963616c0000050000006c6566740000000007000000"
    "80020000e001000000000000040000000000c03f0000004000c01f440000803e020000000000003f0000803e00000000"
    "020000000900000007000000010002000000803f0a0000007363666561743a306100000008000000003c00000000003c"
)
TRACKS_BYTES = bytes.fromhex(
    "00010000001e856615cd5b070f00000063616d6572615f6f70746963616c0000050000006c6566740000000007000000"
    "0200000007000000090000000200000001000000020000000400000000c01f440000803e0000c03f0000004004000000"
    "0000003f000000bf0000803e0000803f000000000000000002000000010000000100000004000000020000007300"
)


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


def tracked(count: int = 100, tracks: int = 30, calibrated: bool = True) -> FrameResult:
    """A frame in which some of the keypoints are tracked."""
    random = np.random.default_rng(3)
    result = frame(count)
    indices = random.permutation(count)[:tracks]
    rays = random.normal(size=(tracks, 2)).astype(np.float32) if calibrated else None
    return replace(
        result,
        tracks=Tracks(
            ids=np.sort(random.permutation(1000)[:tracks] + 2**32 - 1000).astype(np.uint32),
            ages=random.integers(1, 50, tracks).astype(np.uint32),
            indices=indices,
            keypoints=result.features.keypoints[indices],
            rays=rays,
            velocities=None if rays is None else -rays,
            flags=np.where(np.arange(tracks) % 2, TrackFlag.NEW, TrackFlag.REIDENTIFIED).astype(np.uint8),
            lost_ids=np.array([3, 2**32 - 1], np.uint32),
        ),
    )


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
    message.scores.pop()
    with pytest.raises(DataError, match="arrays of 100 scores or none, found lengths of \\[99\\]"):
        messages.features_from_message(message)
    message.scores = array("f")
    assert not messages.features_from_message(message).scores.any()  # not provided
    message.descriptors = array("B", bytes(10))
    with pytest.raises(DataError, match="expected 100 descriptors of 64 values, found 10 bytes"):
        messages.features_from_message(message)


def test_track_ids_say_which_keypoint_belongs_to_which_track() -> None:
    result = tracked()
    message = over_the_wire(messages.features_to_message(result, header()))
    ids = np.frombuffer(message.track_ids, np.uint32)
    assert len(ids) == 100 and np.count_nonzero(ids) == 30 and result.tracks is not None
    np.testing.assert_array_equal(ids[result.tracks.indices], result.tracks.ids)
    keypoints = np.frombuffer(message.keypoints, np.float32).reshape(-1, 2)
    sent = over_the_wire(messages.tracks_to_message(result, header(), ""))
    by_id = dict(zip(sent.ids, np.frombuffer(sent.keypoints, np.float32).reshape(-1, 2).tolist(), strict=True))
    assert [by_id[i] for i in ids[ids > 0]] == keypoints[ids > 0].tolist()
    assert len(messages.features_to_message(frame(), header()).track_ids) == 0  # nothing is tracked
    none = messages.features_to_message(tracked(tracks=0), header())
    assert list(none.track_ids) == [0] * 100


@pytest.mark.parametrize("calibrated", [True, False])
def test_tracks_there_and_back(calibrated: bool) -> None:
    result = tracked(calibrated=calibrated)
    message = over_the_wire(messages.tracks_to_message(result, header(), "1f3a"))
    assert isinstance(message, TracksMessage)
    assert message.header == header()
    assert (message.camera, message.sequence, message.session) == ("left", 7, "1f3a")
    back, tracks = messages.tracks_from_message(message), result.tracks
    assert tracks is not None
    for name in ("ids", "ages", "keypoints", "flags", "lost_ids"):
        found, expected = getattr(back, name), getattr(tracks, name)
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert (back.indices == -1).all() and back.indices.shape == (30,)
    if not calibrated:
        assert back.rays is None and back.velocities is None
        return
    np.testing.assert_array_equal(back.rays, tracks.rays)
    np.testing.assert_array_equal(back.velocities, tracks.velocities)


def test_ids_that_begin_again_have_another_session() -> None:
    result = tracked()
    assert result.tracks is not None
    again = replace(result, tracks=replace(result.tracks, epoch=2))
    sessions = [messages.tracks_to_message(each, header(), "1f3a").session for each in (result, again)]
    assert sessions == ["1f3a", "1f3a.2"]


def test_a_frame_without_tracks_still_says_which_were_lost() -> None:
    back = messages.tracks_from_message(over_the_wire(messages.tracks_to_message(tracked(tracks=0), header(), "a")))
    assert len(back) == 0 and back.keypoints.shape == (0, 2) and back.rays is None
    assert back.lost_ids.tolist() == [3, 2**32 - 1]


@pytest.mark.parametrize("field", ["ages", "keypoints", "rays", "velocities", "flags"])
def test_tracks_of_different_lengths_are_refused(field: str) -> None:
    message = messages.tracks_to_message(tracked(), header(), "")
    getattr(message, field).pop()
    with pytest.raises(DataError, match="expected parallel arrays of"):
        messages.tracks_from_message(message)


@pytest.mark.parametrize("verified", [True, False])
def test_matches_there_and_back(verified: bool) -> None:
    result = frame(verified=verified)
    assert result.pair is not None
    message = over_the_wire(messages.matches_to_message(result.pair, result, header(), "older_optical"))
    assert isinstance(message, MatchesMessage)
    assert message.kind == message.TEMPORAL
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


def test_stereo_matches_name_both_cameras() -> None:
    result = frame()
    assert result.pair is not None
    pair = replace(result.pair, kind=MatchKind.STEREO, camera0="right", stamp0=STAMP)
    message = over_the_wire(messages.matches_to_message(pair, result, header(), "right_optical"))
    assert (message.kind, message.camera0, message.camera1) == (message.STEREO, "right", "left")
    assert messages.nanoseconds(message.stamp0) == messages.nanoseconds(message.header.stamp) == STAMP
    back = messages.matches_from_message(message)
    assert back.kind is MatchKind.STEREO and back.camera0 == "right"


@pytest.mark.parametrize("field", ["indices1", "keypoints0", "keypoints1", "scores", "inliers"])
def test_matches_of_different_lengths_are_refused(field: str) -> None:
    result = frame()
    assert result.pair is not None
    message = messages.matches_to_message(result.pair, result, header(), "")
    getattr(message, field).pop()
    with pytest.raises(DataError, match="expected parallel arrays of"):
        messages.matches_from_message(message)


def test_a_kind_or_model_of_another_version_is_refused() -> None:
    result = frame()
    assert result.pair is not None
    message = messages.matches_to_message(result.pair, result, header(), "")
    message.kind = 9
    with pytest.raises(DataError, match=r"expected a MatchKind of 0 \(TEMPORAL\), .* found 9"):
        messages.matches_from_message(message)
    message.kind, message.geometry.model = 0, 7
    with pytest.raises(DataError, match="expected a GeometryModel of .* found 7"):
        messages.matches_from_message(message)


def test_constants_are_those_of_the_core() -> None:
    for core, kind in ((MatchKind, MatchesMessage), (GeometryModel, GeometryMessage), (TrackFlag, TracksMessage)):
        assert {member.name: member.value for member in core} == {m.name: getattr(kind, m.name) for m in core}


def test_the_wire_stays_as_it_is() -> None:
    """A change of layout breaks the bags that people have. Padding is compared by nobody."""
    points = np.array([[1.5, 2.0], [639.0, 0.25]], np.float32)
    features = Features(points, np.array([0.5, 0.25], np.float32), np.eye(2, dtype=np.float32), (640, 480), "scfeat:0a")
    tracks = Tracks(
        ids=np.array([7, 9], np.uint32),
        ages=np.array([1, 2], np.uint32),
        indices=np.array([1, 0]),
        keypoints=points[::-1],
        rays=np.array([[0.5, -0.5], [0.25, 1.0]], np.float32),
        velocities=None,
        flags=np.array([1, 0], np.uint8),
        lost_ids=np.array([4], np.uint32),
    )
    result = FrameResult("left", 7, STAMP, features, None, {}, tracks=tracks)
    for message, golden in (
        (messages.features_to_message(result, header()), FEATURES_BYTES),
        (messages.tracks_to_message(result, header(), "s"), TRACKS_BYTES),
    ):
        assert deserialize_message(golden, type(message)) == message
        assert len(serialize_message(message)) == len(golden)


@pytest.mark.parametrize("value", [0, 1, 999_999_999, 1_000_000_000, STAMP, (2**31 - 1) * 10**9 + 999_999_999])
def test_stamps_are_exact(value: int) -> None:
    assert messages.nanoseconds(messages.stamp_from_nanoseconds(value)) == value
    assert messages.nanoseconds(Time(sec=value // 10**9, nanosec=value % 10**9)) == value


def calibration(**changes: object) -> CameraInfo:
    info = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=[0.1, -0.2, 0.0, 0.0, 0.0])
    info.k = [400.0, 0.0, 320.0, 0.0, 410.0, 240.0, 0.0, 0.0, 1.0]
    info.r = [0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [390.0, 0.0, 315.0, -40.0, 0.0, 395.0, 235.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def test_camera_info_raw_and_rectified() -> None:
    camera = camera_from_message(calibration(), (640, 480))
    np.testing.assert_array_equal(camera.K, [[400, 0, 320], [0, 410, 240], [0, 0, 1]])
    np.testing.assert_array_equal(camera.D, [0.1, -0.2, 0, 0, 0])
    assert camera.size == (640, 480) and camera.distortion_model == "plumb_bob"
    np.testing.assert_array_equal(camera.R, [[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(camera.P, [[390, 0, 315, -40], [0, 395, 235, 0], [0, 0, 1, 0]])
    rectified = camera_from_message(calibration(), (640, 480), rectified=True)
    np.testing.assert_array_equal(rectified.K, [[390, 0, 315], [0, 395, 235], [0, 0, 1]])
    assert not rectified.D.any()
    np.testing.assert_array_equal(rectified.R, np.eye(3))  # its rays are those of the rectified frame already
    np.testing.assert_array_equal(rectified.P, camera.P)


def test_a_window_of_the_sensor_shifts_the_calibration_and_binning_scales_it() -> None:
    """A point of the scene projects to the pixel where the window, and the mean of 2 x 4 pixels, has it."""
    point = np.array([0.3, -0.2, 2.0])
    full = calibration()
    x, y, _ = np.reshape(full.k, (3, 3)) @ point / point[2]
    roi = RegionOfInterest(x_offset=100, y_offset=80, width=400, height=320)
    window = camera_from_message(calibration(roi=roi), (400, 320))
    np.testing.assert_allclose((window.K @ point / point[2])[:2], (x - 100, y - 80))
    np.testing.assert_allclose(window.P, [[390, 0, 215, -40], [0, 395, 155, 0], [0, 0, 1, 0]])
    assert window.size == (400, 320)
    binned = camera_from_message(calibration(roi=roi, binning_x=2, binning_y=4), (200, 80))
    # Pixel 0 is the mean of pixels 0 and 1, its centre between theirs.
    expected = ((x - 100 + 0.5) / 2 - 0.5, (y - 80 + 0.5) / 4 - 0.5)
    np.testing.assert_allclose((binned.K @ point / point[2])[:2], expected)
    np.testing.assert_array_equal(binned.D, full.d)
    np.testing.assert_allclose(binned.P[:2, 3], (-20, 0))
    rectified = camera_from_message(calibration(roi=roi, binning_x=2, binning_y=4), (200, 80), rectified=True)
    np.testing.assert_allclose(rectified.K, binned.P[:, :3])
    odd = camera_from_message(calibration(binning_x=3), (213, 480))  # 640 / 3, the rest left out
    assert odd.K[0, 0] == pytest.approx(400 / 3) and odd.K[1, 1] == 410
    whole = camera_from_message(calibration(binning_x=1, binning_y=0), (640, 480))
    np.testing.assert_array_equal(whole.K, np.reshape(full.k, (3, 3)))


def test_a_window_that_does_not_give_the_image_is_explained() -> None:
    info = calibration(roi=RegionOfInterest(x_offset=100, width=400, height=320), binning_x=2, binning_y=2)
    with pytest.raises(CalibrationError) as error:
        camera_from_message(info, (320, 240))
    for word in ("images of 320x240", "found one for 640x480", "roi 400x320", "binning 2x2", "200x160"):
        assert word in str(error.value)
    outside = calibration(roi=RegionOfInterest(x_offset=600, width=400, height=320))
    with pytest.raises(CalibrationError, match="reaches beyond"):
        camera_from_message(outside, (400, 320))


@pytest.mark.parametrize("missing", ["r", "p"])
def test_a_single_camera_without_rectification_has_neither_r_nor_p(missing: str) -> None:
    zeros = {"r": [0.0] * 9, "p": [0.0] * 12}
    camera = camera_from_message(calibration(**{missing: zeros[missing]}), (640, 480))
    assert camera.R is None and camera.P is None and camera.K[0, 0] == 400


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
        camera_from_message(calibration(**changes), (640, 480))


def content(message: Any) -> dict[str, Any]:
    """Of a message that went over the wire: the bytes of each array, and its length there. Bytes between fields, which
    CDR leaves to align them, hold anything.
    """
    sent = serialize_message(message)
    received = deserialize_message(sent, type(message))
    values = {name: getattr(received, name) for name in message.get_fields_and_field_types()}
    arrays = {name: (value.typecode, value.tobytes()) for name, value in values.items() if isinstance(value, array)}
    return {**values, **arrays, "length": len(sent)}


def plain_features(result: FrameResult, kind: str) -> FeaturesMessage:
    """Number by number, as slow as it is plain."""
    features, tracks = result.features, result.tracks
    message = FeaturesMessage(
        header=header(),
        camera=result.camera,
        sequence=result.sequence,
        image_width=features.image_size[0],
        image_height=features.image_size[1],
        rectified=True,
        keypoints=[float(value) for point in features.keypoints for value in point],
        scores=[float(value) for value in features.scores],
        descriptor_scale=1.0,
    )
    if tracks is not None:
        ids = dict(zip(tracks.indices.tolist(), tracks.ids.tolist(), strict=True))
        message.track_ids = [ids.get(i, 0) for i in range(len(features))]
    if kind == "none":
        return message
    message.descriptor_type = messages.DESCRIPTOR_TYPES[kind]
    message.descriptor_dim = features.descriptors.shape[1]
    message.descriptor_space = features.descriptor_space
    values = [float(value) for row in features.descriptors for value in row]
    if kind == "int8":
        message.descriptor_scale = max(map(abs, values), default=0.0) / 127 or 1.0
        values = [np.rint(np.float32(value) * np.float32(1 / message.descriptor_scale)) for value in values]
    code, number = {"float32": ("f", float), "float16": ("e", float), "int8": ("b", int)}[kind]
    message.descriptors = list(struct.pack(f"<{len(values)}{code}", *map(number, values)))
    return message


def plain_matches(result: FrameResult) -> MatchesMessage:
    pair = result.pair
    assert pair is not None
    message = MatchesMessage(
        header=header(),
        stamp0=Time(sec=pair.stamp0 // 10**9, nanosec=pair.stamp0 % 10**9),
        frame_id0="older",
        kind=int(pair.kind),
        camera0=pair.camera0 or result.camera,
        camera1=result.camera,
        sequence0=pair.sequence0,
        sequence1=result.sequence,
        indices0=pair.matches.indices0.tolist(),
        indices1=pair.matches.indices1.tolist(),
        keypoints0=pair.keypoints0.ravel().tolist(),
        keypoints1=pair.keypoints1.ravel().tolist(),
        scores=pair.matches.scores.tolist(),
    )
    if pair.geometry is not None:
        message.inliers = [int(value) for value in pair.geometry.inliers]
        message.geometry = GeometryMessage(
            model=int(pair.geometry.model),
            matrix=[float(value) for row in pair.geometry.matrix for value in row],
            threshold=pair.geometry.threshold,
            num_inliers=sum(message.inliers),
        )
    return message


def plain_tracks(result: FrameResult) -> TracksMessage:
    tracks = result.tracks
    assert tracks is not None
    return TracksMessage(
        header=header(),
        camera=result.camera,
        sequence=result.sequence,
        session="1f3a",
        ids=tracks.ids.tolist(),
        ages=tracks.ages.tolist(),
        keypoints=tracks.keypoints.ravel().tolist(),
        rays=[] if tracks.rays is None else tracks.rays.ravel().tolist(),
        velocities=[] if tracks.velocities is None else tracks.velocities.ravel().tolist(),
        flags=tracks.flags.tolist(),
        lost_ids=tracks.lost_ids.tolist(),
    )


@pytest.mark.parametrize("count", [0, 1, 7, 100, 1001])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_bytes_are_those_of_messages_that_were_filled_number_by_number(count: int, calibrated: bool) -> None:
    result = tracked(count, min(count, 30), calibrated)
    result = replace(result, pair=frame(count, matches=min(count, 40), verified=calibrated).pair)
    assert result.pair is not None
    for kind in ("float32", "float16", "int8", "none"):
        found = messages.features_to_message(result, header(), kind, rectified=True)
        assert content(found) == content(plain_features(result, kind)), kind
    untracked = replace(result, tracks=None)
    found = messages.features_to_message(untracked, header(), rectified=True)
    assert content(found) == content(plain_features(untracked, "float16"))
    found = messages.matches_to_message(result.pair, result, header(), "older")
    assert content(found) == content(plain_matches(result))
    found = messages.tracks_to_message(result, header(), "1f3a")
    assert content(found) == content(plain_tracks(result))


def test_arrays_of_any_layout_give_the_same_bytes() -> None:
    """Strided views, other byte orders, other integers: what numpy hands out after indexing."""
    result = tracked()
    tracks, features = result.tracks, result.features
    assert tracks is not None
    odd = replace(
        result,
        features=replace(
            features,
            keypoints=np.asfortranarray(features.keypoints),
            scores=np.repeat(features.scores, 2)[::2],
            descriptors=np.asfortranarray(features.descriptors),
        ),
        tracks=replace(tracks, ids=tracks.ids.astype(">u4"), ages=tracks.ages.astype(np.int64)),
    )
    for kind in ("float32", "float16", "int8"):
        expected, found = (messages.features_to_message(each, header(), kind) for each in (result, odd))
        assert content(found) == content(expected)
    expected, found = (messages.tracks_to_message(each, header(), "") for each in (result, odd))
    assert content(found) == content(expected)


@pytest.mark.parametrize("count", [0, 1, 31_999, 32_000, 32_001, 100_000])
def test_half_precision_is_rounded_as_numpy_does(count: int) -> None:
    random = np.random.default_rng(count)
    values = (random.normal(size=count) * 10.0 ** random.uniform(-9, 6, count)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(messages._half(values), expected)


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_arrays_cross_as_arrays(kind: str) -> None:
    """Lists, or numpy assigned as it is, would take 100 times as long (benchmarks/messages.py)."""
    result = tracked()
    assert result.pair is not None
    for message in (
        messages.features_to_message(result, header(), kind),
        messages.matches_to_message(result.pair, result, header(), ""),
        messages.tracks_to_message(result, header(), ""),
    ):
        for name, field_type in message.get_fields_and_field_types().items():
            if field_type.startswith("sequence"):
                assert isinstance(getattr(message, name), array), name
