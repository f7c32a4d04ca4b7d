"""What VINS and rtabmap read is pinned byte by byte, and no id is ever wrong."""

from __future__ import annotations

import importlib.util
import struct
import sys
import zlib
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from rclpy.serialization import serialize_message
from scfeat.msg import Matches as MatchesMessage
from scfeat.msg import Tracks as TracksMessage
from sensor_msgs.msg import PointCloud
from std_msgs.msg import Bool, Header

from scfeat_core.errors import ConfigError, DataError, FeatureError
from scfeat_core.types import Features, GeometryModel, Matches, PairResult, Tracks, TwoViewGeometry
from scfeat_ros.adapters import rtabmap, vins
from scfeat_ros.adapters.joining import Join
from scfeat_ros.messages import stamp_from_nanoseconds

STAMP = 1_720_000_000_000_000_000
FRAME = 50_000_000  # nanoseconds between two images
HAS_RTABMAP = importlib.util.find_spec("rtabmap_msgs") is not None


def header(stamp: int = STAMP) -> Header:
    return Header(stamp=stamp_from_nanoseconds(stamp), frame_id="cam0")


def some_tracks(ids: list[int], ages: list[int] | None = None, calibrated: bool = True) -> Tracks:
    """Distinct positions, all exact in float32."""
    count = len(ids)
    keypoints = np.arange(2 * count, dtype=np.float32).reshape(-1, 2) + 0.5
    return Tracks(
        ids=np.array(ids, np.uint32),
        ages=np.array([9] * count if ages is None else ages, np.uint32),
        indices=np.arange(count),
        keypoints=keypoints,
        rays=keypoints / 8 if calibrated else None,
        velocities=keypoints / 4 if calibrated else None,
        flags=np.zeros(count, np.uint8),
        lost_ids=np.empty(0, np.uint32),
    )


def tracks_message(tracks: Tracks, stamp: int = STAMP, session: str = "a") -> TracksMessage:
    message = TracksMessage(header=header(stamp), camera="front", session=session)
    message.ids, message.ages = array("I", tracks.ids), array("I", tracks.ages)
    message.keypoints, message.flags = array("f", tracks.keypoints.ravel()), array("B", tracks.flags)
    if tracks.rays is not None and tracks.velocities is not None:
        message.rays, message.velocities = array("f", tracks.rays.ravel()), array("f", tracks.velocities.ravel())
    return message


def channels(cloud: PointCloud) -> dict[str, list[float]]:
    return {channel.name: list(channel.values) for channel in cloud.channels}


# ---------------------------------------------------------------------------------------------------------------- VINS


def two_views() -> list[vins.View]:
    left = vins.view(some_tracks([5, 8]), np.array([0, 1]), np.array([3, vins.ID_LIMIT - 1]))
    right = vins.view(some_tracks([6]), np.array([0]), np.array([3]), vins.RIGHT)
    return [left, right]


def check_cdr(written: bytes, *parts: Any) -> None:
    """Little-endian CDR of ints (uint32), floats (float32) and texts, aligned to 4 bytes, behind its header.

    What fills the gaps of the alignment is left to the middleware.
    """
    expected, matter = b"\x00\x01\x00\x00", b"\1" * 4
    for part in parts:
        if isinstance(part, str):
            added = struct.pack("<I", len(part) + 1) + part.encode() + b"\0"
        else:
            added = struct.pack("<I" if isinstance(part, int) else "<f", part)
        gap = -len(added) % 4
        expected, matter = expected + added + bytes(gap), matter + b"\1" * len(added) + bytes(gap)
    assert 0 <= len(written) - len(expected) < 4
    assert bytes(a for a, use in zip(written, matter, strict=False) if use) == bytes(
        a for a, use in zip(expected, matter, strict=True) if use
    )


def test_cloud_of_vins_fusion_is_pinned() -> None:
    check_cdr(
        serialize_message(vins.fusion_cloud(header(), two_views())),
        *(1_720_000_000, 0, "cam0"),
        *(3, 0.0625, 0.1875, 1.0, 0.3125, 0.4375, 1.0, 0.0625, 0.1875, 1.0),  # rays, z = 1
        *(9, "id", 3, 3.0, 16777215.0, 3.0),
        *("camera_id", 3, 0.0, 0.0, 1.0),
        *("u", 3, 0.5, 2.5, 0.5),
        *("v", 3, 1.5, 3.5, 1.5),
        *("vx", 3, 0.125, 0.625, 0.125),
        *("vy", 3, 0.375, 0.875, 0.375),
        *("gx", 3, 0.0, 0.0, 0.0),
        *("gy", 3, 0.0, 0.0, 0.0),
        *("gz", 3, 0.0, 0.0, 0.0),
    )


def test_cloud_of_vins_mono_is_pinned() -> None:
    check_cdr(
        serialize_message(vins.mono_cloud(header(), two_views()[:1])),
        *(1_720_000_000, 0, "world"),
        *(2, 0.0625, 0.1875, 1.0, 0.3125, 0.4375, 1.0),
        *(5, "id", 2, 3.0, 16777215.0),
        *("u", 2, 0.5, 2.5),
        *("v", 2, 1.5, 3.5),
        *("vx", 2, 0.125, 0.625),
        *("vy", 2, 0.375, 0.875),
    )


def test_ids_of_several_cameras_of_vins_mono_come_apart_again() -> None:
    ids = channels(vins.mono_cloud(header(), two_views(), num_of_cam=2))["id"]
    assert [(int(value) // 2, int(value) % 2) for value in ids[::2]] == [(3, 0), (3, 1)]


def test_a_track_keeps_its_id_only_while_it_is_in_every_message() -> None:
    ids = vins.WireIds()
    first = ids.assign(np.array([10, 20, 30], np.uint32))
    second = ids.assign(np.array([30, 40, 10], np.uint32))
    assert second[0] == first[2] and second[2] == first[0]
    third = ids.assign(np.array([20, 30], np.uint32))  # 20 was found again: VINS would take it for uninterrupted
    assert third[1] == first[2]
    assert len({*first, second[1], third[0]}) == 5


def test_ids_wrap_without_ever_giving_two_living_tracks_one() -> None:
    random = np.random.default_rng(0)
    ids = vins.WireIds(limit=64)
    before: dict[int, int] = {}
    wraps, newest = 0, -1
    living = np.arange(20, dtype=np.uint32)
    for message in range(300):
        given = ids.assign(living)
        assert len(set(given)) == len(living) and given.min() >= 0 and given.max() < 64
        now = dict(zip(living, given, strict=True))
        assert all(now[track] == before[track] for track in before.keys() & now.keys())
        wraps += given[-1] < newest
        before, newest = now, given[-1]
        # Half of them end, and as many begin; the first lives on over every wrap.
        survivors = np.concatenate([living[:1], random.permutation(living[1:])[:9]])
        living = np.concatenate([survivors, np.arange(10, dtype=np.uint32) + 20 + 10 * message])
    assert wraps > 30 and before[0] == 0


def test_oldest_tracks_with_rays_are_chosen() -> None:
    tracks = some_tracks([1, 2, 3, 4, 5], ages=[1, 7, 3, 9, 5])
    assert tracks.rays is not None
    tracks.rays[3] = np.nan
    assert vins.choose(tracks, max_tracks=2, min_age=2).tolist() == [1, 4]
    assert vins.choose(tracks, max_tracks=9, min_age=2).tolist() == [1, 2, 4]
    assert len(vins.choose(some_tracks([1], calibrated=False), 9, 1)) == 0


def test_velocities_that_are_not_known_are_zero() -> None:
    tracks = some_tracks([1, 2])
    assert tracks.velocities is not None
    tracks.velocities[0] = np.nan
    feed = vins.Feed(vins.Options())
    assert channels(feed.cloud(tracks_message(tracks)))["vx"] == [0.0, 0.625]
    message = tracks_message(tracks)
    message.velocities = array("f")  # as on the first frame of a camera
    assert channels(feed.cloud(message))["vy"] == [0.0, 0.0]


def test_right_view_has_the_ids_of_the_matched_left_one() -> None:
    left_tracks, right_tracks = some_tracks([1, 2, 3]), some_tracks([7, 8, 9, 10])
    left = vins.view(left_tracks, np.array([0, 2]), np.array([100, 102]))
    # 2 (index 1) is not among the chosen; 3 (index 2) is matched by an outlier only in the second case
    keypoints0, keypoints1 = left_tracks.keypoints[[2, 1, 0]], right_tracks.keypoints[[3, 0, 1]]
    matches = Matches(np.array([2, 1, 0]), np.array([3, 0, 1]), np.ones(3, np.float32))
    pair = PairResult(0, STAMP, matches, keypoints0, keypoints1, None)
    right = vins.right_view(left, right_tracks, pair)
    assert dict(zip(right.ids, right.pixels[:, 0], strict=True)) == {100: 2.5, 102: 6.5}
    geometry = TwoViewGeometry(GeometryModel.ESSENTIAL, np.eye(3), np.array([False, True, True]), 1.0)
    right = vins.right_view(left, right_tracks, PairResult(0, STAMP, matches, keypoints0, keypoints1, geometry))
    assert right.camera == 1 and right.ids.tolist() == [100]
    assert len(vins.right_view(left, some_tracks([7, 8, 9, 10], calibrated=False), pair).ids) == 0


def test_nothing_is_sent_of_an_uncalibrated_camera_but_an_empty_frame_is() -> None:
    feed = vins.Feed(vins.Options())
    assert feed.cloud(tracks_message(some_tracks([1, 2], calibrated=False))) is None
    cloud = feed.cloud(tracks_message(some_tracks([])))
    assert cloud is not None and len(cloud.points) == 0 and len(cloud.channels) == 9


@pytest.mark.parametrize(
    ("stamp", "session", "word"),
    [
        (STAMP + FRAME, "a", ""),
        (STAMP - 1, "a", "back"),
        (STAMP + 1_100_000_000, "a", "1.1"),
        (STAMP + 9, "b", "again"),
    ],
)
def test_vins_starts_anew_where_the_tracks_do(stamp: int, session: str, word: str) -> None:
    feed = vins.Feed(vins.Options(min_age=1))
    first = tracks_message(some_tracks([1]))
    assert feed.interruption(first) == ""
    before = channels(feed.cloud(first))["id"]
    second = tracks_message(some_tracks([1]), stamp, session)
    why = feed.interruption(second)
    assert (word in why) if word else why == ""
    assert (channels(feed.cloud(second))["id"] == before) == (word == "")


@pytest.mark.parametrize("wrong", [{"flavour": "open"}, {"max_tracks": 0}, {"max_tracks": 5000}, {"max_gap": 0.0}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        vins.Options(**wrong)


def test_join_waits_for_all_and_forgets_what_is_too_old() -> None:
    join = Join(2, capacity=3)
    assert [join.add(0, key, f"a{key}") for key in (1, 2, 3)] == [None] * 3
    assert join.add(1, 2, "b2") == ("a2", "b2") and join.unmatched == 1
    assert join.add(1, 1, "b1") is None  # its partner is gone
    assert join.add(1, 3, "b3") == ("a3", "b3") and join.unmatched == 2
    for key in range(10, 20):
        join.add(0, key, key)
    assert join.unmatched == 9 and join.add(1, 19, 0) == (19, 0)


@pytest.mark.live
def test_vins_adapter_on_a_live_graph(ros: Any, spawn: Callable[..., Any]) -> None:
    process = spawn([sys.executable, "-m", "scfeat_ros.adapters.vins", "--ros-args", "-p", "min_age:=1"])
    node = ros.create_node("estimator")
    clouds: list[PointCloud] = []
    restarts: list[Bool] = []
    node.create_subscription(PointCloud, "/feature_tracker/feature", clouds.append, 100)
    node.create_subscription(Bool, "/vins_restart", restarts.append, 100)
    tracks = node.create_publisher(TracksMessage, "scfeat/tracks", 10)
    stamps = iter(range(STAMP, STAMP + 1_000_000 * FRAME, FRAME))

    def send() -> None:
        tracks.publish(tracks_message(some_tracks([1, 2]), next(stamps)))

    ros.pump(send, lambda: clouds, timeout=90, what="a cloud")
    assert clouds[-1].header.frame_id == "cam0" and [point.z for point in clouds[-1].points] == [1.0, 1.0]
    assert channels(clouds[-1])["u"] == [0.5, 2.5] and not restarts

    count = len(clouds)
    uncalibrated = tracks_message(some_tracks([1, 2], calibrated=False), next(stamps))
    tracks.publish(uncalibrated)
    ros.spin_until(lambda: "CameraInfo" in process.output, timeout=90, what="a complaint with a remedy")
    assert all(cloud.header != uncalibrated.header for cloud in clouds[count:])

    damaged = tracks_message(some_tracks([1, 2]), next(stamps))
    damaged.ages = array("I", [1])
    tracks.publish(damaged)
    ros.spin_until(lambda: "frame dropped" in process.output, timeout=90, what="a reason")

    tracks.publish(tracks_message(some_tracks([1, 2]), STAMP - FRAME))
    ros.spin_until(lambda: restarts, timeout=90, what="a restart")
    assert restarts[0].data and process.running
    assert process.stop() == 0 and "Traceback" not in process.output, process.output


def test_vins_adapter_joins_both_cameras(ros: Any) -> None:
    from rclpy.parameter import Parameter

    cameras = Parameter("cameras", value=["left", "right"])
    ros.add_node(vins.VinsAdapter(context=ros.context, parameter_overrides=[cameras]))
    node = ros.create_node("estimator")
    clouds: list[PointCloud] = []
    node.create_subscription(PointCloud, "/feature_tracker/feature", clouds.append, 100)
    left = node.create_publisher(TracksMessage, "scfeat/left/tracks", 10)
    right = node.create_publisher(TracksMessage, "scfeat/right/tracks", 10)
    stereo = node.create_publisher(MatchesMessage, "scfeat/right/stereo_matches", 10)
    stamps = iter(range(STAMP, STAMP + 1_000_000 * FRAME, FRAME))

    def send() -> None:
        stamp = next(stamps)
        tracks = some_tracks([4, 5])
        matches = MatchesMessage(header=header(stamp + 1000), stamp0=stamp_from_nanoseconds(stamp))
        matches.indices0 = matches.indices1 = array("I", [1])
        matches.scores = array("f", [1.0])
        matches.keypoints0 = array("f", tracks.keypoints[1])
        matches.keypoints1 = array("f", tracks.keypoints[0])
        stereo.publish(matches)
        left.publish(tracks_message(tracks, stamp))
        right.publish(tracks_message(tracks, stamp + 1000))

    ros.pump(send, lambda: clouds, timeout=60, what="a cloud of both cameras")
    found = channels(clouds[-1])
    assert found["camera_id"] == [0.0, 0.0, 1.0] and found["u"] == [0.5, 2.5, 0.5] and found["id"][2] == found["id"][1]


def test_wrong_parameters_of_the_vins_adapter_end_it_with_the_reason(spawn: Callable[..., Any], domain: int) -> None:
    process = spawn([sys.executable, "-m", "scfeat_ros.adapters.vins", "--ros-args", "-p", "flavour:=open"])
    assert process.wait(90) == 1
    assert "fusion, mono" in process.output and "Traceback" not in process.output


# ------------------------------------------------------------------------------------------------------------- rtabmap


def features(dim: int = 2) -> Features:
    keypoints = np.array([[1.5, 2.5], [30.0, 20.0]], np.float32)
    descriptors = np.array([[1.0, 0.0], [0.6, -0.8]], np.float32)[:, :dim]
    return Features(keypoints, np.array([0.9, 0.25], np.float32), descriptors, (64, 48), "scfeat:0a1b2c")


def test_descriptors_for_rtabmap_are_pinned() -> None:
    packed = rtabmap.local_features(features()).descriptors
    values = struct.pack("<4f", 1.0, 0.0, 0.6, -0.8)
    # zlib header, one stored block of 16 bytes, checksum; then rows, columns and CV_32F
    stored = b"\x78\x01\x01\x10\x00\xef\xff" + values + struct.pack(">I", zlib.adler32(values))
    assert packed == stored + struct.pack("<3i", 2, 2, 5)


@pytest.mark.parametrize("dtype", list(rtabmap.CV_TYPES))
@pytest.mark.parametrize("level", [0, 1, 9])
def test_matrices_of_rtabmap_there_and_back(dtype: str, level: int) -> None:
    matrix = np.arange(35).reshape(5, 7).astype(dtype)
    for each in (matrix, matrix.T, matrix[:0]):
        again = rtabmap.uncompress(rtabmap.compress(each, level))
        assert again.dtype == each.dtype and again.shape == each.shape
        np.testing.assert_array_equal(again, each)


def test_what_is_no_matrix_of_rtabmap_is_refused() -> None:
    for wrong in (np.zeros((2, 2), np.float16), np.zeros((2, 2), bool), np.zeros(3, np.float32)):
        with pytest.raises(FeatureError, match="cast it"):
            rtabmap.compress(wrong)
    whole = rtabmap.compress(np.ones((3, 4), np.float32))
    for damaged in (b"", whole[:5], whole[:-1], whole[:-4] + b"\x63\0\0\0", whole[4:]):
        with pytest.raises(DataError, match="whole"):
            rtabmap.uncompress(damaged)


def test_rtabmap_needs_descriptors_but_takes_an_empty_frame() -> None:
    with pytest.raises(FeatureError, match="descriptor_type"):
        rtabmap.local_features(features(dim=0))
    none = Features(np.empty((0, 2), np.float32), np.empty(0, np.float32), np.empty((0, 0), np.float32), (64, 48))
    assert rtabmap.local_features(none).descriptors == b""


@pytest.mark.skipif(HAS_RTABMAP, reason="rtabmap_msgs is installed")
def test_without_the_messages_of_rtabmap_its_adapter_says_what_to_install(
    spawn: Callable[..., Any], domain: int
) -> None:
    process = spawn([sys.executable, "-m", "scfeat_ros.adapters.rtabmap"])
    assert process.wait(90) == 1
    assert "apt install ros-$ROS_DISTRO-rtabmap-msgs" in process.output and "Traceback" not in process.output


@pytest.mark.skipif(
    not HAS_RTABMAP, reason="rtabmap_msgs is not installed: sudo apt install ros-$ROS_DISTRO-rtabmap-msgs"
)
def test_rtabmap_adapter_fills_images_of_the_same_stamp(ros: Any) -> None:
    from rtabmap_msgs.msg import RGBDImage
    from sensor_msgs.msg import Image

    from scfeat_core.types import FrameResult
    from scfeat_ros.messages import features_to_message

    ros.add_node(rtabmap.RtabmapAdapter(context=ros.context))
    node = ros.create_node("rtabmap")
    filled: list[Any] = []
    node.create_subscription(RGBDImage, "/rtabmap_adapter/rgbd_image", filled.append, 10)
    images = node.create_publisher(RGBDImage, "rgbd_image", 10)
    sent = node.create_publisher(type(features_to_message(_result(features()), header())), "scfeat/features", 10)
    stamps = iter(range(STAMP, STAMP + 1_000_000 * FRAME, FRAME))

    def send() -> None:
        stamp = next(stamps)
        colour = Image(
            header=header(stamp), width=64, height=48, encoding="mono8", step=64, data=array("B", bytes(3072))
        )
        images.publish(RGBDImage(header=header(stamp + 5), rgb=colour))
        sent.publish(features_to_message(_result(features(), stamp), header(stamp), "float32"))

    ros.pump(send, lambda: filled, timeout=60, what="an image with features")
    image = filled[-1]
    assert [(point.pt.x, point.pt.y) for point in image.key_points] == [(1.5, 2.5), (30.0, 20.0)]
    assert [point.response for point in image.key_points] == pytest.approx([0.9, 0.25]) and len(image.rgb.data) == 3072
    np.testing.assert_array_equal(rtabmap.uncompress(bytes(image.descriptors)), features().descriptors)
    with pytest.raises(FeatureError, match="decimation"):
        image.rgb.width = 32
        rtabmap.check_size(image, features())
    assert isinstance(_result(features()), FrameResult)


def _result(found: Features, stamp: int = STAMP) -> Any:
    from scfeat_core.types import FrameResult

    return FrameResult("front", 0, stamp, found, None)
