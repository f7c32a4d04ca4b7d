"""Replays of damaged recordings: damage costs itself, and no ground truth is moved to where it does not belong."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[replay]'")

from test_replay import (
    START,
    STEP,
    TYPES,
    bag,
    depth_bag,
    dropped,
    header,
    images,
    info,
    job,
    jpeg,
    picture,
    poses_file,
    replay,
    serialized,
)

from scfeat_core.errors import DataError
from scfeat_core.replay.metrics import read_metrics
from scfeat_core.replay.run_folder import read_run
from scfeat_ros.bags import CAMERA_INFO, COMPRESSED_IMAGE, BagMessage, open_bag, write_bag
from scfeat_ros.replay.run import run_job
from scfeat_ros.replay.source import Source

NO_HEADER = b"\x00\x01\x00\x00"


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3])
def test_an_early_image_without_a_header_is_one_drop(tmp_path: Path, at: int) -> None:
    found = images(11)
    found[at] = NO_HEADER
    replay(bag(tmp_path / "bag", found), tmp_path / "out")
    assert dropped(tmp_path / "out") == ["decode" if i == at else "" for i in range(11)]
    assert read_run(tmp_path / "out").frames[at].stamp == START + at * STEP  # that of the recording


@pytest.mark.parametrize("at", [0, 3])
def test_a_damaged_frame_id_costs_nothing(tmp_path: Path, at: int) -> None:
    found = images(8)
    found[at] = jpeg(START + at * STEP, picture(3 * at), frame_id="lenS")
    assert replay(bag(tmp_path / "bag", found), tmp_path / "out")["processed"] == 8


def damaged_depth_bag(path: Path, topic: str, at: int, damage: Callable[[bytes], bytes]) -> Path:
    """With this damage to one message on a topic."""
    whole = depth_bag(path.with_name("whole"))
    with open_bag(whole) as source:
        types = {found.name: found.type for found in source.topics}
        kept = list(source.messages(source.topics))
    place = [i for i, message in enumerate(kept) if message.topic == topic][at]
    kept[place] = replace(kept[place], data=damage(kept[place].data))
    write_bag(path, types, kept)
    (path / "groundtruth.txt").write_bytes((whole / "groundtruth.txt").read_bytes())
    return path


def pairs_with_depth(folder: Path) -> int:
    return int(np.isfinite(read_metrics(folder).per_frame["repeatability"]).sum())


@pytest.mark.parametrize(("at", "pairs"), [(0, 6), (3, 5)])
def test_a_depth_map_without_a_header_costs_its_pairs(tmp_path: Path, at: int, pairs: int) -> None:
    path = damaged_depth_bag(tmp_path / "bag", "/eye/depth_registered", at, lambda data: data[:8])
    lines: list[str] = []
    run_job(job(path, tmp_path / "out"), lines.append, progress=False)
    assert pairs_with_depth(tmp_path / "out") == pairs
    assert "warning: 1 depth maps on /eye/depth_registered are damaged, their frames have no repeatability" in lines


@pytest.mark.parametrize("seconds", [-1, 1], ids=["earlier", "later"])
def test_a_depth_map_with_a_damaged_stamp_costs_its_pairs(tmp_path: Path, seconds: int) -> None:
    def damage(data: bytes) -> bytes:
        return data[:4] + struct.pack("<i", struct.unpack_from("<i", data, 4)[0] + seconds * (1 << 24)) + data[8:]

    replay(damaged_depth_bag(tmp_path / "bag", "/eye/depth_registered", 3, damage), tmp_path / "out")
    assert pairs_with_depth(tmp_path / "out") == 5


def test_depth_maps_of_images_whose_first_frame_id_is_damaged(tmp_path: Path) -> None:
    other = jpeg(START, picture(0), frame_id="lenS")
    path = damaged_depth_bag(tmp_path / "bag", "/eye/image/compressed", 0, lambda data: other)
    assert replay(path, tmp_path / "out")["repeatability"] > 0.85


# -- ground truth whose clock counts from zero -------------------------------------------------------------------------


def half_bag(path: Path, first: bool) -> Path:
    """The first or the second half of 120 images, 6 s, whose other half was in a file of its own, which is missing."""
    half = range(60) if first else range(60, 120)
    found = images(120)
    write_bag(
        path, {"/eye/image": COMPRESSED_IMAGE}, [BagMessage("/eye/image", START + i * STEP, found[i]) for i in half]
    )
    described = yaml.safe_load((path / "metadata.yaml").read_text())
    names = described["rosbag2_bagfile_information"]["relative_file_paths"]
    names.insert(1 if first else 0, "missing.mcap")
    (path / "metadata.yaml").write_text(yaml.safe_dump(described))
    return path


@pytest.mark.parametrize("seconds", [6, 3])
def test_poses_from_zero_of_images_whose_beginning_is_missing(tmp_path: Path, seconds: int) -> None:
    """Their first pose is that of no image that is there, however long they last."""
    path = half_bag(tmp_path / "bag", first=False)
    given = poses_file(tmp_path / "poses.txt", [0.05 * i for i in range(20 * seconds)])
    with pytest.raises(DataError, match=r"poses.txt \(TUM\) has another clock .* found their beginning missing"):
        Source(job(path, tmp_path / "out", ground_truth=given))
    poses_file(path / "groundtruth.txt", [0.05 * i for i in range(20 * seconds)])
    source = Source(job(path, tmp_path / "out"))
    assert source.truth is None and "found their beginning missing" in source.truth_problem
    assert source.warnings == [f"ground truth left out: {source.truth_problem}"]
    poses_file(path / "groundtruth.txt", [(START + i * STEP) / 1e9 for i in range(120)])
    assert Source(job(path, tmp_path / "out")).truth is not None, "of the same clock"


def test_poses_from_zero_of_images_whose_end_is_missing(tmp_path: Path) -> None:
    """They may last longer than what is left of these, but not shorter."""
    path = half_bag(tmp_path / "bag", first=True)
    longer = poses_file(tmp_path / "longer.txt", [0.05 * i for i in range(120)])
    source = Source(job(path, tmp_path / "out", ground_truth=longer))
    assert source.truth is not None and source.truth.stamps[0] == START
    shorter = poses_file(tmp_path / "shorter.txt", [0.05 * i for i in range(31)])
    with pytest.raises(DataError, match=r"lasts as long as the images, 3.0 s, .*found 1.5 s in shorter.txt"):
        Source(job(path, tmp_path / "out", ground_truth=shorter))
    whole = bag(tmp_path / "cut", images(120))
    (file,) = whole.glob("*.mcap")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    assert Source(job(whole, tmp_path / "out", ground_truth=longer)).truth is not None
    with pytest.raises(DataError, match=r"found 1.5 s in shorter.txt"):
        Source(job(whole, tmp_path / "out", ground_truth=shorter))


# -- ground truth that cannot be read ----------------------------------------------------------------------------------

POSE = "geometry_msgs/msg/PoseStamped"


def pose(i: int) -> bytes:
    position = TYPES.types["geometry_msgs/msg/Point"](0.1 * i, 0.01 * i * i, 0.0)
    turn = TYPES.types["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    found = TYPES.types["geometry_msgs/msg/Pose"](position, turn)
    return serialized(TYPES.types[POSE](header(START + i * STEP), found), POSE)


def posed_bag(path: Path, damaged: Sequence[int]) -> Path:
    """12 images with the pose of each on a topic; those of ``damaged`` are cut off."""
    found = images(12)
    messages = [BagMessage("/eye/camera_info", START, info(START))]
    for i in range(12):
        messages.append(BagMessage("/eye/image", START + i * STEP, found[i]))
        data = pose(i)[: 30 if i in damaged else None]
        messages.append(BagMessage("/ground_truth/pose", START + i * STEP + 1, data))
    types = {"/eye/image": COMPRESSED_IMAGE, "/eye/camera_info": CAMERA_INFO, "/ground_truth/pose": POSE}
    write_bag(path, types, messages)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"this is no trajectory\n", "found 4 columns in line 1"),
        (b"1 0 0 0 0 1 0 0 0 0 1 0\n", "expected the times of the poses of bag/groundtruth.txt"),
        (b"\xff\xfe\x00", "at bag/groundtruth.txt, found a binary file"),
    ],
    ids=["text", "KITTI without times", "binary"],
)
def test_an_unreadable_truth_that_was_only_found_is_left_out(tmp_path: Path, content: bytes, reason: str) -> None:
    path = bag(tmp_path / "bag", images(12), [(0, info(START))])
    (path / "groundtruth.txt").write_bytes(content)
    summary = replay(path, tmp_path / "out")
    (warning,) = read_run(tmp_path / "out").facts["warnings"]
    assert summary["processed"] == 12 and warning.startswith("ground truth left out: ") and reason in warning
    assert reason in summary["missing"]["ate_m"] and str(tmp_path) not in warning
    with pytest.raises(DataError):
        replay(path, tmp_path / "named", ground_truth=str(path / "groundtruth.txt"))


def test_the_truth_of_a_topic_is_used_where_the_file_beside_the_bag_is_unreadable(tmp_path: Path) -> None:
    path = posed_bag(tmp_path / "bag", damaged=())
    (path / "groundtruth.txt").write_text("this is no trajectory\n")
    source = Source(job(path, tmp_path / "out"))
    assert source.truth is not None and source.truth.source.startswith("/ground_truth/pose")
    (warning,) = source.warnings
    assert "ground truth left out" in warning and not source.truth_problem


@pytest.mark.parametrize("named", ["/ground_truth/pose", None])
def test_a_damaged_pose_costs_itself(tmp_path: Path, named: str | None) -> None:
    source = Source(job(posed_bag(tmp_path / "bag", damaged=(0, 5)), tmp_path / "out", ground_truth=named))
    assert source.truth is not None
    assert source.truth.stamps.tolist() == [START + i * STEP for i in range(12) if i not in (0, 5)]
    assert source.warnings == ["2 of 12 messages on /ground_truth/pose are damaged: left out"]


def test_a_topic_without_a_readable_pose_is_no_truth(tmp_path: Path) -> None:
    path = posed_bag(tmp_path / "bag", damaged=range(12))
    source = Source(job(path, tmp_path / "out"))
    assert source.truth is None
    assert "expected poses on /ground_truth/pose in bag, found 12 messages that are damaged" in source.truth_problem
    with pytest.raises(DataError, match="found 12 messages that are damaged"):
        Source(job(path, tmp_path / "out", ground_truth="/ground_truth/pose"))


def test_a_topic_that_is_lost_altogether_is_no_absent_truth(tmp_path: Path) -> None:
    """It lay where the recording is cut off; metadata.yaml still counts it."""
    path = bag(tmp_path / "bag", images(12), [(0, info(START))])
    metadata = yaml.safe_load((path / "metadata.yaml").read_text())
    counted = metadata["rosbag2_bagfile_information"]["topics_with_message_count"]
    lost = {**counted[0]["topic_metadata"], "name": "/ground_truth/pose", "type": POSE}
    counted.append({"topic_metadata": lost, "message_count": 51})
    (path / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    reason = replay(path, tmp_path / "out")["missing"]["ate_m"]
    assert reason.startswith("expected 51 messages on /ground_truth/pose, as metadata.yaml says, found none")
    assert read_run(tmp_path / "out").facts["warnings"] == [f"ground truth left out: {reason}"]
