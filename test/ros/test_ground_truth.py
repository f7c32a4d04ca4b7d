"""Ground truth of every format from small files and small bags, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[bags]'")

from rosbags.typesys import Stores, get_typestore

from scfeat_core.errors import DataError
from scfeat_core.replay.records import GroundTruth
from scfeat_ros.bags import BagMessage, open_bag, write_bag
from scfeat_ros.ground_truth import POSE_TYPES, pose_topics, read_ground_truth, truth_from_topic

STORE = get_typestore(Stores.ROS2_HUMBLE)
HALF = 0.7071067811865476
QUARTER_TURN = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])  # about z
START = 1_403_715_285_262_143_135  # does not fit into a float64

TUM = f"""# timestamp tx ty tz qx qy qz qw
1403715285.262143135 1 2 3 0 0 {HALF} {HALF}
1403715285.312143135 1.5 2 3 0 0 0 1
"""
EUROC = f"""#timestamp, p_RS_R_x [m], p_RS_R_y [m], p_RS_R_z [m], q_RS_w [], q_RS_x [], q_RS_y [], q_RS_z [], v_RS_R_x
{START},1,2,3,{HALF},0,0,{HALF},9,9,9
{START + 50_000_000},1.5,2,3,1,0,0,0,9,9,9
"""
KITTI = """0 -1 0 1 1 0 0 2 0 0 1 3
1 0 0 1.5 0 1 0 2 0 0 1 3
"""


def file(folder: Path, text: str, name: str = "truth.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def check(truth: GroundTruth, stamps: list[int]) -> None:
    """The two poses that all of the files have."""
    assert truth.stamps.dtype == np.int64
    assert truth.stamps.tolist() == stamps
    np.testing.assert_allclose(truth.poses[0, :3, :3], QUARTER_TURN, atol=1e-12)
    np.testing.assert_allclose(truth.poses[1, :3, :3], np.eye(3))
    np.testing.assert_array_equal(truth.poses[:, :3, 3], [[1, 2, 3], [1.5, 2, 3]])
    np.testing.assert_array_equal(truth.poses[:, 3], [[0, 0, 0, 1]] * 2)


def test_tum(tmp_path: Path) -> None:
    truth = read_ground_truth(file(tmp_path, TUM))
    check(truth, [START, START + 50_000_000])
    assert truth.source == "truth.txt (TUM)"
    scientific = TUM.replace("1403715285.262143135", "1.403715285262143135e+09")
    check(read_ground_truth(file(tmp_path, scientific), "tum"), [START, START + 50_000_000])


def test_euroc(tmp_path: Path) -> None:
    truth = read_ground_truth(file(tmp_path, EUROC, "data.csv"))
    check(truth, [START, START + 50_000_000])
    assert truth.source == "data.csv (EuRoC)"


def test_poses_of_the_body_are_moved_to_the_camera(tmp_path: Path) -> None:
    body_camera = np.eye(4)
    body_camera[:3, 3] = 0.5, 0, 0
    truth = read_ground_truth(file(tmp_path, EUROC), "euroc", T_body_camera=body_camera)
    # half a metre along x of the body, which is y of the world after a quarter turn
    np.testing.assert_allclose(truth.poses[:, :3, 3], [[1, 2.5, 3], [2, 2, 3]])
    assert "camera" in truth.source


def test_kitti_with_times_beside_in_the_data_set_and_given(tmp_path: Path) -> None:
    times = "0.000000e+00\n1.036224e-01\n"
    stamps = [0, 103_622_400]
    file(tmp_path, times, "beside/times.txt")
    check(read_ground_truth(file(tmp_path, KITTI, "beside/poses.txt")), stamps)
    file(tmp_path, times, "sequences/07/times.txt")
    check(read_ground_truth(file(tmp_path, KITTI, "poses/07.txt")), stamps)
    lone = file(tmp_path, KITTI, "lone/00.txt")
    check(read_ground_truth(lone, times=file(tmp_path, times, "other.txt")), stamps)
    with pytest.raises(DataError, match="give the file of times"):
        read_ground_truth(lone)
    with pytest.raises(DataError, match="each of the 2 poses.*found 1"):
        read_ground_truth(lone, times=file(tmp_path, "0\n", "short.txt"))
    with pytest.raises(DataError, match=r"ascending.*line 2 of .*turned\.txt"):
        read_ground_truth(lone, times=file(tmp_path, "1\n0\n", "turned.txt"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1 0 0 0 0 0 0 1\n0 0 0 0 0 0 0 1", "an earlier one than before it in line 2"),
        ("1 0 0 0 0 0 0 1\n1 0 0 0 0 0 0 1", "the one before it again in line 2"),
        ("1 0 0 0 0 0 0 1\n2 0 nan 0 0 0 0 1", r"NaN or infinity in line 2.*\(1 of 2 poses\)"),
        ("1 0 0 0 0 0 0 inf", "NaN or infinity in line 1"),
        ("nan 0 0 0 0 0 0 1", "expected a stamp, found 'nan' in line 1"),
        ("-1 0 0 0 0 0 0 1", "found '-1' in line 1"),
        ("1e30 0 0 0 0 0 0 1", "found '1e30' in line 1"),
        ("# a\n1 0 0 0 0 0 0 0", "zero length in line 2"),
        ("1 0 0 0 1 2 3 4", "columns in order"),
        ("1 0 0 0 0 0 0 one", "expected numbers"),
        ("1 0 0 0 0 0 0 1\n2 0 0", "found 3 columns in line 2"),
        ("1 2 3", "found 3 columns in line 1"),
        ("", "expected poses"),
        ("# only comments\n\n", "expected poses"),
        ("1 0 0 0 0 2 0 0 0 0 1 0", "a rotation in columns"),
        ("1 0 0 0 0 1 0 0 0 0 -1 0", "a rotation in columns"),
        ("1 0 0 nan 0 1 0 0 0 0 1 0", "NaN or infinity"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, found: str) -> None:
    file(tmp_path, "0\n", "times.txt")
    with pytest.raises(DataError, match=found):
        read_ground_truth(file(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        read_ground_truth(tmp_path / "missing.txt")
    (tmp_path / "truth.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="a binary file"):
        read_ground_truth(tmp_path / "truth.bin")
    with pytest.raises(DataError, match="tum, euroc, kitti, found 'rpg'"):
        read_ground_truth(file(tmp_path, TUM), "rpg")
    with pytest.raises(DataError, match="12 columns in line 1"):
        read_ground_truth(file(tmp_path, KITTI), "tum")


# --------------------------------------------------------------------------------------------------------------- topic


def pose_message(
    kind: str, stamp: int, x: float, frames: tuple[str, str] = ("world", "camera"), w: float = 1.0
) -> bytes:
    """A message of a pose type: no rotation, at (x, 2, 3)."""
    types = STORE.types
    header = types["std_msgs/msg/Header"](
        types["builtin_interfaces/msg/Time"](*divmod(stamp, 1_000_000_000)), frames[0]
    )
    quaternion = types["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, w)
    pose = types["geometry_msgs/msg/Pose"](types["geometry_msgs/msg/Point"](x, 2.0, 3.0), quaternion)
    zero = types["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0)
    covariance = np.zeros(36)
    with_covariance = types["geometry_msgs/msg/PoseWithCovariance"](pose, covariance)
    twist = types["geometry_msgs/msg/TwistWithCovariance"](types["geometry_msgs/msg/Twist"](zero, zero), covariance)
    transform = types["geometry_msgs/msg/Transform"](types["geometry_msgs/msg/Vector3"](x, 2.0, 3.0), quaternion)
    fields: dict[str, tuple[Any, ...]] = {
        "geometry_msgs/msg/PoseStamped": (pose,),
        "geometry_msgs/msg/PoseWithCovarianceStamped": (with_covariance,),
        "geometry_msgs/msg/TransformStamped": (frames[1], transform),
        "nav_msgs/msg/Odometry": (frames[1], with_covariance, twist),
    }
    return bytes(STORE.serialize_cdr(types[kind](header, *fields[kind]), kind))


def pose_bag(path: Path, kind: str, poses: list[bytes]) -> Path:
    messages = [BagMessage("/pose", START + i, data) for i, data in enumerate(poses)]
    write_bag(path, {"/pose": kind}, messages)
    return path


@pytest.mark.parametrize("kind", POSE_TYPES)
def test_topics(tmp_path: Path, kind: str) -> None:
    poses = [pose_message(kind, START, 1.0), pose_message(kind, START + 50, 2.0)]
    with open_bag(pose_bag(tmp_path / "bag", kind, poses)) as bag:
        assert [topic.name for topic in pose_topics(bag)] == ["/pose"]
        truth = truth_from_topic(bag, "/pose")
    assert truth.stamps.tolist() == [START, START + 50]
    np.testing.assert_array_equal(truth.poses[:, :3, 3], [[1, 2, 3], [2, 2, 3]])
    np.testing.assert_array_equal(truth.poses[:, :3, :3], [np.eye(3)] * 2)
    assert truth.source == f"/pose ({kind.rpartition('/')[2]})"


def test_a_topic_is_sorted_by_stamp_and_repetitions_count_once(tmp_path: Path) -> None:
    kind = POSE_TYPES[0]
    poses = [pose_message(kind, stamp, float(stamp)) for stamp in (3, 1, 2, 2)]
    with open_bag(pose_bag(tmp_path / "bag", kind, poses)) as bag:
        truth = truth_from_topic(bag, "/pose")
    assert truth.stamps.tolist() == [1, 2, 3]
    assert truth.poses[:, 0, 3].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("poses", "found"),
    [
        ([(1, 0.0, {}), (1, 5.0, {})], "the one before it again in the message at 1 ns"),
        ([(1, 0.0, {"w": 0.0})], "zero length in the message at 1 ns on /pose"),
        ([(1, float("nan"), {})], "NaN or infinity"),
        ([(1, 0.0, {}), (2, 0.0, {"frames": ("map", "camera")})], "camera in map, camera in world.*as a file"),
        ([], "found none"),
    ],
)
def test_topics_that_are_refused(tmp_path: Path, poses: list[tuple[int, float, dict[str, Any]]], found: str) -> None:
    kind = "nav_msgs/msg/Odometry"
    data = [pose_message(kind, stamp, x, **more) for stamp, x, more in poses]
    with open_bag(pose_bag(tmp_path / "bag", kind, data)) as bag, pytest.raises(DataError, match=found):
        truth_from_topic(bag, "/pose")


def test_a_topic_that_is_not_there_or_no_pose(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", {"/chatter": "std_msgs/msg/String"}, [])
    with open_bag(tmp_path / "bag") as bag:
        with pytest.raises(DataError, match="none of that name; the bag holds no topic of poses"):
            truth_from_topic(bag, "/pose")
        with pytest.raises(DataError, match="found std_msgs/msg/String"):
            truth_from_topic(bag, "/chatter")


@pytest.mark.parametrize("name", ["tum_fr1_rpy", "euroc_v101", "hololens_office", "kitti_seq1"])
def test_file_and_topic_of_the_real_bags_agree(shared_data: Path, name: str) -> None:
    folder = shared_data / "bag" / name
    written = read_ground_truth(folder / "groundtruth.txt")
    with open_bag(folder) as bag:
        recorded = truth_from_topic(bag, pose_topics(bag)[0].name)
    np.testing.assert_allclose(recorded.poses, written.poses, atol=1e-5)
    np.testing.assert_allclose(np.diff(recorded.stamps), np.diff(written.stamps), atol=1000)
