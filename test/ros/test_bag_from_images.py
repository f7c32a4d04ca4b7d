"""Data sets in the layouts of TUM, EuRoC and KITTI to bags and back: pixels, stamps, calibration, poses."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[bags]'")

from scfeat_core import cli
from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.replay.records import GroundTruth
from scfeat_ros.bag_from_images import make_bag
from scfeat_ros.bags import Bag, header_stamp, open_bag
from scfeat_ros.ground_truth import truth_from_topic
from scfeat_ros.image_folders import Options, read_folder
from scfeat_ros.images import compressed_to_array, image_to_array

START = 1_403_636_579_763_555_584  # nanoseconds that neither a double nor microseconds can hold
STEP = 50_000_000
PATIENCE = 240.0  # seconds, on a machine with other work
ROTATION = (0.5, -0.5, 0.5, 0.5)  # x y z w
ROTATED = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0.0]])  # the same as a matrix
T_BS = np.array([[0, -1, 0, 0.1], [1, 0, 0, -0.2], [0, 0, 1, 0.3], [0, 0, 0, 1.0]])


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (48, 64), np.uint8)


def save(path: Path, image: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return image


def seconds(stamp: int) -> str:
    return f"{stamp // 10**9}.{stamp % 10**9:09d}"


def tum(folder: Path, frames: int = 4) -> list[np.ndarray]:
    """Colour images, depth maps half a frame later, and poses in between."""
    images, lines, depths, poses = [], ["# color images", "# timestamp filename"], [], ["# ground truth"]
    for i in range(frames):
        stamp = START + i * STEP
        images.append(save(folder / "rgb" / f"{i}.png", picture(i, 48, 64, 3))[..., ::-1])
        save(folder / "depth" / f"{i}.png", np.full((48, 64), 5000 * i, np.uint16))
        lines.append(f"{seconds(stamp)} rgb/{i}.png")
        depths.append(f"{seconds(stamp + STEP // 2)} depth/{i}.png")
        poses.append(f"{seconds(stamp + 7)} {i} 2 3 " + " ".join(map(str, ROTATION)))
    for name, content in (("rgb", lines), ("depth", depths), ("groundtruth", poses)):
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return images


def euroc(folder: Path, frames: int = 4) -> list[np.ndarray]:
    root, images = folder / "mav0", []
    for camera in ("cam0", "cam1"):
        rows = ["#timestamp [ns],filename"]
        for i in range(frames):
            stamp = START + i * STEP
            images.append(save(root / camera / "data" / f"{stamp}.png", picture(i + 10 * int(camera[-1]))))
            rows.append(f"{stamp},{stamp}.png")
        (root / camera / "data.csv").write_text("\r\n".join(rows) + "\r\n")
        (root / camera / "sensor.yaml").write_text(
            f"sensor_type: camera\nT_BS:\n  cols: 4\n  rows: 4\n  data: {T_BS.ravel().tolist()}\nrate_hz: 20\n"
            "resolution: [64, 48]\ncamera_model: pinhole\nintrinsics: [45.5, 46.5, 31.25, 23.75]\n"
            "distortion_model: radial-tangential\ndistortion_coefficients: [-0.28, 0.07, 0.0002, 0.00002]\n"
        )
    imu = [f"{START + i * STEP // 10},{i},0.5,-0.25,9.75,0.125,{-i}" for i in range(10 * frames)]
    pose = "1,2,3," + ",".join(map(str, (ROTATION[3], *ROTATION[:3]))) + ",0,0,0,0,0,0,0,0,0"
    truth = [f"{START + i * STEP},{pose}" for i in range(frames)]
    for name, content in (("imu0", imu), ("state_groundtruth_estimate0", truth)):
        (root / name).mkdir()
        (root / name / "data.csv").write_text("\n".join(["#timestamp", *content]) + "\n")
    return images


def kitti(folder: Path, frames: int = 3) -> list[np.ndarray]:
    root = folder / "sequences" / "07"
    images = [
        save(root / camera / f"{i:06d}.png", picture(i + 10 * int(camera[-1])))
        for camera in ("image_0", "image_1")
        for i in range(frames)
    ]
    (root / "times.txt").write_text("".join(f"{i / 10:e}\n" for i in range(frames)))
    left, right = "40 0 32 0 0 40 24 0 0 0 1 0", "40 0 32 -21.5 0 40 24 0 0 0 1 0"
    (root / "calib.txt").write_text(f"P0: {left}\nP1: {right}\nP2: {left}\nP3: {right}\n")
    (folder / "poses").mkdir()
    rows = [f"0 -1 0 {i} 0 0 -1 0 1 0 0 0.5\n" for i in range(frames)]
    (folder / "poses" / "07.txt").write_text("".join(rows))
    return images


def plain(folder: Path, frames: int = 11) -> list[np.ndarray]:
    return [save(folder / f"img{i}.png", picture(i)) for i in range(frames)]


def convert(folder: Path, out: Path, *words: object) -> int:
    return cli.main(["bag-from-images", str(folder), "--out", str(out), *map(str, words)])


def read(bag: Bag, name: str) -> list[Any]:
    topic = next(topic for topic in bag.topics if topic.name == name)
    messages = list(bag.messages([topic]))
    for message in messages:
        assert message.log_time == header_stamp(message.data), "recorded when it was stamped"
    return [bag.deserialize(message) for message in messages]


def stamps(messages: list[Any]) -> list[int]:
    return [message.header.stamp.sec * 10**9 + message.header.stamp.nanosec for message in messages]


def assert_pose(truth: GroundTruth, rotation: np.ndarray, first: list[float]) -> None:
    np.testing.assert_allclose(truth.poses[:, :3, :3], [rotation] * len(truth.poses), atol=1e-9)
    np.testing.assert_allclose(truth.poses[0, :3, 3], first, atol=1e-12)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_tum(tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = tum(tmp_path / "set")
    assert convert(tmp_path / "set", tmp_path / "bag", "--storage", storage) == 0
    assert "4 on /camera/rgb/image_raw/compressed, 4 on /ground_truth/pose" in capsys.readouterr().out
    with open_bag(tmp_path / "bag") as bag:
        assert [topic.name for topic in bag.image_topics] == ["/camera/rgb/image_raw/compressed"]
        messages = read(bag, "/camera/rgb/image_raw/compressed")
        truth = truth_from_topic(bag, "/ground_truth/pose")
    assert stamps(messages) == [START + i * STEP for i in range(4)]
    for i, (message, image) in enumerate(zip(messages, images, strict=True)):
        assert message.header.frame_id == "camera_rgb_optical_frame"
        assert message.format == "bgr8; png compressed bgr8"
        assert bytes(message.data) == (tmp_path / "set" / "rgb" / f"{i}.png").read_bytes(), "it was encoded again"
        np.testing.assert_array_equal(compressed_to_array(message), image)
    assert truth.stamps.tolist() == [START + i * STEP + 7 for i in range(4)]
    assert_pose(truth, ROTATED, [0, 2, 3])


def test_depth_of_tum_in_metres(tmp_path: Path) -> None:
    tum(tmp_path / "set")
    assert convert(tmp_path / "set", tmp_path / "bag", "--depth") == 0
    with open_bag(tmp_path / "bag") as bag:
        depth = read(bag, "/camera/depth_registered/image")
        assert bag.choose_image_topic()[0].name == "/camera/rgb/image_raw/compressed", "features are of the colours"
    assert stamps(depth) == [START + i * STEP + STEP // 2 for i in range(4)]
    assert depth[0].encoding == "32FC1" and depth[0].step == 64 * 4 and len(depth[0].data) == 64 * 48 * 4
    metres = [np.frombuffer(bytes(message.data), np.float32) for message in depth]
    assert np.isnan(metres[0]).all(), "REP 118: nothing was measured"
    assert (metres[3] == 3.0).all()


def test_calibration_of_tum_by_name_and_by_file(tmp_path: Path) -> None:
    named = tmp_path / "rgbd_dataset_freiburg2_desk"
    tum(named)
    assert read_folder(named).streams[0].camera is None, "TUM's is for 640x480"
    for path in (named / "rgb").iterdir():
        save(path, picture(0, 480, 640, 3))
    camera = read_folder(named).streams[0].camera
    assert camera is not None and camera.K[0, 0] == 520.908620 and len(camera.D) == 5
    (named / "camera_info.yaml").write_text(
        "image_width: 640\nimage_height: 480\ncamera_name: x\ndistortion_model: plumb_bob\n"
        "camera_matrix: {rows: 3, cols: 3, data: [400, 0, 320, 0, 401, 240, 0, 0, 1]}\n"
        "distortion_coefficients: {rows: 1, cols: 5, data: [0, 0, 0, 0, 0]}\n"
    )
    camera = read_folder(named).streams[0].camera
    assert camera is not None and camera.K[1, 1] == 401


@pytest.mark.parametrize("compression", ["none", "message", "file", "storage"])
def test_euroc(tmp_path: Path, compression: str) -> None:
    images = euroc(tmp_path / "set")
    assert convert(tmp_path / "set", tmp_path / "bag", "--compression", compression) == 0
    with open_bag(tmp_path / "bag") as bag:
        types = {topic.name: (topic.type, topic.count) for topic in bag.topics}
        messages = [message for name in ("cam0", "cam1") for message in read(bag, f"/{name}/image_raw/compressed")]
        infos, imu = read(bag, "/cam1/camera_info"), read(bag, "/imu0")
        truth = truth_from_topic(bag, "/ground_truth/pose")
    assert types["/imu0"] == ("sensor_msgs/msg/Imu", 40) and types["/cam0/camera_info"][1] == 4
    for message, image in zip(messages, images, strict=True):
        assert message.format == "mono8; png compressed mono8"
        np.testing.assert_array_equal(compressed_to_array(message), image)
    assert stamps(messages[4:]) == stamps(infos) == [START + i * STEP for i in range(4)]
    assert messages[4].header.frame_id == infos[0].header.frame_id == "cam1_optical_frame"
    assert infos[0].k.tolist() == [45.5, 0, 31.25, 0, 46.5, 23.75, 0, 0, 1]
    assert infos[0].d.tolist() == [-0.28, 0.07, 0.0002, 0.00002] and infos[0].distortion_model == "plumb_bob"
    assert infos[0].r.tolist() == np.eye(3).ravel().tolist() and infos[0].p[0] == 45.5 and infos[0].p[3] == 0
    assert (infos[0].width, infos[0].height) == (64, 48)
    assert stamps(imu) == [START + i * STEP // 10 for i in range(40)]
    assert (imu[3].angular_velocity.x, imu[3].angular_velocity.z) == (3.0, -0.25)
    assert (imu[3].linear_acceleration.x, imu[3].linear_acceleration.z) == (9.75, -3.0)
    assert imu[0].orientation_covariance[0] == -1, "REP 145: there is no orientation"
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = ROTATED, (1, 2, 3)
    assert_pose(truth, ROTATED @ T_BS[:3, :3], (expected @ T_BS)[:3, 3].tolist())


def test_one_camera_of_euroc_decoded(tmp_path: Path) -> None:
    images = euroc(tmp_path / "set")
    assert convert(tmp_path / "set" / "mav0", tmp_path / "bag", "--cameras", "cam1", "--raw") == 0
    with open_bag(tmp_path / "bag") as bag:
        assert [topic.name for topic in bag.image_topics] == ["/cam1/image_raw"]
        messages = read(bag, "/cam1/image_raw")
    for message, image in zip(messages, images[4:], strict=True):
        assert message.encoding == "mono8"
        np.testing.assert_array_equal(image_to_array(message), image)


def test_euroc_poses_of_an_unknown_body_are_left_out(tmp_path: Path) -> None:
    euroc(tmp_path / "set")
    sensor = tmp_path / "set" / "mav0" / "cam0" / "sensor.yaml"
    sensor.write_text(sensor.read_text().replace("T_BS", "T_other"))
    found = read_folder(tmp_path / "set")
    assert found.truth is None and any("T_BS" in note for note in found.notes)
    file = tmp_path / "set" / "mav0" / "state_groundtruth_estimate0" / "data.csv"
    with pytest.raises(DataError, match="T_BS"):
        read_folder(tmp_path / "set", Options(ground_truth=file))


@pytest.mark.parametrize("place", ["", "sequences/07"])
def test_kitti(tmp_path: Path, place: str) -> None:
    images = kitti(tmp_path / "set")
    assert convert(tmp_path / "set" / place, tmp_path / "bag") == 0
    with open_bag(tmp_path / "bag") as bag:
        messages = [message for name in ("cam0", "cam1") for message in read(bag, f"/{name}/image_raw/compressed")]
        left, right = read(bag, "/cam0/camera_info"), read(bag, "/cam1/camera_info")
        truth = truth_from_topic(bag, "/ground_truth/pose")
    for message, image in zip(messages, images, strict=True):
        np.testing.assert_array_equal(compressed_to_array(message), image)
    assert stamps(messages) == [0, 100_000_000, 200_000_000] * 2
    for info, shift in ((left[0], 0.0), (right[0], -21.5)):
        assert info.p.tolist() == [40, 0, 32, shift, 0, 40, 24, 0, 0, 0, 1, 0]
        assert info.r.tolist() == np.eye(3).ravel().tolist() and info.k[0] == 40
        assert info.header.frame_id == "cam0_optical_frame", "P is relative to the left camera"
    assert truth.stamps.tolist() == [0, 100_000_000, 200_000_000]
    assert_pose(truth, ROTATED, [0, 0, 0.5])


def test_kitti_with_several_sequences_asks_which(tmp_path: Path) -> None:
    kitti(tmp_path / "set")
    shutil.copytree(tmp_path / "set" / "sequences" / "07", tmp_path / "set" / "sequences" / "08")
    with pytest.raises(DataError, match="found 07, 08: choose with --sequence"):
        read_folder(tmp_path / "set")
    assert convert(tmp_path / "set", tmp_path / "bag", "--sequence", "08", "--cameras", "cam0") == 0
    with open_bag(tmp_path / "bag") as bag:
        assert [topic.name for topic in bag.topics] == ["/cam0/camera_info", "/cam0/image_raw/compressed"]


def test_plain_folder_by_numbers_in_names(tmp_path: Path) -> None:
    images = plain(tmp_path / "set")
    assert convert(tmp_path / "set", tmp_path / "bag", "--fps", 30) == 0
    with open_bag(tmp_path / "bag") as bag:
        messages = read(bag, "/cam0/image_raw/compressed")
    assert stamps(messages)[:4] == [0, 33_333_333, 66_666_666, 100_000_000]
    for message, image in zip(messages, images, strict=True):
        np.testing.assert_array_equal(compressed_to_array(message), image)


@pytest.mark.parametrize("row", ["{ns}", "{s}", "{s} img{i}.png", "{ns},img{i}.png"])
def test_plain_folder_with_stamps(tmp_path: Path, row: str) -> None:
    plain(tmp_path / "set", 3)
    rows = [row.format(ns=START + i * STEP, s=seconds(START + i * STEP), i=i) for i in range(3)]
    (tmp_path / "stamps.txt").write_text("\n".join(rows))
    found = read_folder(tmp_path / "set", Options(stamps=tmp_path / "stamps.txt"))
    assert [(p.stamp, p.path.name) for p in found.streams[0].pictures] == [
        (START + i * STEP, f"img{i}.png") for i in range(3)
    ]


@pytest.mark.parametrize(
    ("start", "step"),
    [(1403636579763, 50), (1403636579763555, 50_000), (0, 50_000_000), (1, 7200)],
    ids=["milliseconds", "microseconds", "nanoseconds from 0 on", "hours apart"],
)
def test_stamps_of_another_unit_are_refused(tmp_path: Path, start: int, step: int) -> None:
    plain(tmp_path / "set", 3)
    (tmp_path / "stamps.txt").write_text("\n".join(str(start + i * step) for i in range(3)))
    with pytest.raises(DataError, match=r"between two images of .*stamps\.txt, found .*unit"):
        read_folder(tmp_path / "set", Options(stamps=tmp_path / "stamps.txt"))


def test_names_for_some_of_the_stamps_are_refused(tmp_path: Path) -> None:
    plain(tmp_path / "set", 3)
    (tmp_path / "stamps.txt").write_text("1.0 img2.png\n2.0\n3.0\n")
    with pytest.raises(DataError, match="a name in each line of .*, or in none, found 2 without one"):
        read_folder(tmp_path / "set", Options(stamps=tmp_path / "stamps.txt"))


def test_names_with_digits_of_other_scripts(tmp_path: Path) -> None:
    for name in ("²1.png", "٣2.png", "7.png"):
        save(tmp_path / "set" / name, picture(1))
    found = read_folder(tmp_path / "set", Options(fps=1)).streams[0].pictures
    assert [item.path.name for item in found] == ["7.png", "²1.png", "٣2.png"]


def test_other_files_than_png_and_jpeg_are_stored_without_loss(tmp_path: Path) -> None:
    images = {
        "a.jpg": save(tmp_path / "set" / "a.jpg", picture(1)),
        "b.bmp": save(tmp_path / "set" / "b.bmp", picture(2, 48, 64, 3)),
        "c.png": save(tmp_path / "set" / "c.png", picture(3).astype(np.uint16) * 250),
        "d.tif": save(tmp_path / "set" / "d.tif", picture(4)),
    }
    assert convert(tmp_path / "set", tmp_path / "bag", "--fps", 1) == 0
    with open_bag(tmp_path / "bag") as bag:
        messages = read(bag, "/cam0/image_raw/compressed")
    assert [message.format for message in messages] == [
        *("mono8; jpeg compressed mono8", "bgr8; png compressed bgr8"),
        *("mono16; png compressed mono16", "mono8; png compressed mono8"),
    ]
    np.testing.assert_array_equal(compressed_to_array(messages[1]), images["b.bmp"][..., ::-1])
    np.testing.assert_array_equal(compressed_to_array(messages[2]), images["c.png"])
    assert bytes(messages[0].data) == (tmp_path / "set" / "a.jpg").read_bytes()


# -- what can be wrong -------------------------------------------------------------------------------------------------


def test_missing_and_damaged_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    euroc(tmp_path / "set")
    data = tmp_path / "set" / "mav0" / "cam0" / "data"
    names = [f"{START + i * STEP}.png" for i in range(4)]
    (data / names[0]).unlink()
    (data / names[1]).write_bytes((data / names[1]).read_bytes()[:-30])
    save(data / names[2], picture(0, 24, 32))
    assert convert(tmp_path / "set", tmp_path / "bag", "--cameras", "cam0") == 1
    text = capsys.readouterr().out
    assert f"skipped 1 images, missing: {names[0]}" in text
    assert f"skipped 1 images, damaged or no picture: {names[1]}" in text
    assert f"skipped 1 images, 32x24, unlike the calibration: {names[2]}" in text
    with open_bag(tmp_path / "bag") as bag:
        assert len(read(bag, "/cam0/image_raw/compressed")) == len(read(bag, "/cam0/camera_info")) == 1


def test_no_image_at_all_leaves_no_bag(tmp_path: Path) -> None:
    tum(tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "rgb")
    with pytest.raises(DataError, match="found none that can be read .skipped 4 images, missing: 0.png"):
        make_bag(read_folder(tmp_path / "set"), tmp_path / "bag")
    plain(tmp_path / "plain")
    sequence = read_folder(tmp_path / "plain", Options(fps=1))
    for path in (tmp_path / "plain").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="damaged or no picture"):
        make_bag(sequence, tmp_path / "bag")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "set"]


def test_stamps_in_seconds_where_nanoseconds_are_expected(tmp_path: Path) -> None:
    euroc(tmp_path / "set")
    file = tmp_path / "set" / "mav0" / "cam0" / "data.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
    file.write_text("\n".join(f"{int(stamp) // 10**9},{name}" for stamp, name in rows))
    with pytest.raises(DataError, match="found 1 stamps for 4 images: are they seconds"):
        read_folder(tmp_path / "set")


def test_lists_out_of_order_are_sorted_and_said(tmp_path: Path) -> None:
    tum(tmp_path / "set")
    file = tmp_path / "set" / "rgb.txt"
    lines = file.read_text().splitlines()[2:]
    file.write_text("\n".join([lines[2], lines[0], lines[1], lines[3], lines[1]]))
    found = read_folder(tmp_path / "set")
    assert [picture.path.name for picture in found.streams[0].pictures] == ["0.png", "1.png", "2.png", "3.png"]
    assert "rgb.txt: stamps go back 2 times, sorted" in found.notes
    assert "rgb.txt: 1 images with the stamp of another, left out" in found.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found an empty file"),
        ("# nothing\n\n", "found an empty file"),
        ("1.0\n", "without a name"),
        ("one rgb/0.png\n", "found 'one' in line 1"),
        ("nan rgb/0.png\n", "found 'nan' in line 1"),
        ("1.0 rgb/0.png\n-1 rgb/1.png\n", "found '-1' in line 2"),
        ("1403636579763555584 rgb/0.png\n", "check the unit"),
        (b"\x89PNG\xff\xfe", "a binary file"),
        (None, "No such file"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    tum(tmp_path / "set")
    file = tmp_path / "set" / "rgb.txt"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path / "set", Options(layout="tum"))


@pytest.mark.parametrize(
    "line",
    ["5,1,2,3", "1403636579763555584,0,0,0,0,0,x", "99999999999999999999999,0,0,0,0,0,0", "5,0,0,0,0,0,nan", "\xff"],
)
def test_bad_imu_leaves_no_bag(tmp_path: Path, line: str) -> None:
    euroc(tmp_path / "set")
    file = tmp_path / "set" / "mav0" / "imu0" / "data.csv"
    file.write_bytes(file.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"line 42 of .*imu0"):
        make_bag(read_folder(tmp_path / "set"), tmp_path / "bag")
    assert not (tmp_path / "bag").exists()


def test_unknown_layouts_and_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set" / "stuff").mkdir(parents=True)
    with pytest.raises(DataError, match="found stuff: give the folder of one sequence"):
        read_folder(tmp_path / "set")
    with pytest.raises(DataError, match="nothing there"):
        read_folder(tmp_path / "none")
    plain(tmp_path / "plain", 2)
    with pytest.raises(DataError, match="--fps HZ, or --stamps"):
        read_folder(tmp_path / "plain")
    with pytest.raises(DataError, match="found both"):
        read_folder(tmp_path / "plain", Options(fps=1, stamps=tmp_path))
    (tmp_path / "stamps").write_text("1\n2\n3\n")
    with pytest.raises(DataError, match="each of the 2 images"):
        read_folder(tmp_path / "plain", Options(stamps=tmp_path / "stamps"))
    (tmp_path / "stamps").write_text("2\n1\n")
    with pytest.raises(DataError, match="ascending stamps"):
        read_folder(tmp_path / "plain", Options(stamps=tmp_path / "stamps"))
    euroc(tmp_path / "euroc")
    with pytest.raises(DataError, match="found cam0, cam1: choose"):
        read_folder(tmp_path / "euroc", Options(cameras=("cam7",)))
    kitti(tmp_path / "kitti")
    (tmp_path / "kitti" / "sequences" / "07" / "times.txt").write_text("0\n1\n")
    with pytest.raises(DataError, match="found 1 too few"):
        read_folder(tmp_path / "kitti")
    assert convert(tmp_path / "plain", tmp_path / "plain", "--fps", 1) == 2
    assert "choose another name" in capsys.readouterr().err
    bag = tmp_path / "bag"
    assert convert(tmp_path / "plain", bag, "--fps", 1, "--storage", "sqlite3", "--compression", "storage") == 2
    with pytest.raises(SystemExit):
        convert(tmp_path / "plain", bag, "--fps", 0)
    assert not bag.exists()


def test_bag_that_cannot_be_written(tmp_path: Path) -> None:
    plain(tmp_path / "set", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ScfeatError, match="expected to write the bag"):
        make_bag(read_folder(tmp_path / "set", Options(fps=1)), tmp_path / "file" / "bag")


def test_interruption_leaves_no_bag(spawn: Callable[..., Any], tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "set" / f"img{i}.png", picture(i, 720, 960))
    rows = "\n".join(f"{i} img{i % 2}.png" for i in range(5_000))
    (tmp_path / "stamps.txt").write_text(rows)
    words = [tmp_path / "set", "--stamps", tmp_path / "stamps.txt", "--out", tmp_path / "bags" / "bag"]
    process = spawn([sys.executable, "-m", "scfeat_core.cli", "bag-from-images", *words])
    end = time.monotonic() + PATIENCE
    while not any(path.stat().st_size > 1_000_000 for path in tmp_path.glob("bags/.bag*/bag/*")):
        assert time.monotonic() < end and process.exit_code is None, process.output
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 130, process.output
    assert "interrupted" in process.output and "Traceback" not in process.output
    assert list((tmp_path / "bags").iterdir()) == []
