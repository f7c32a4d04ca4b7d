"""Images of a bag as files, and their reconstruction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core import cli
from scfeat_core.errors import DataError
from scfeat_core.reconstruction.sources import image_name

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[bags]'")

from rosbags.typesys import Stores, get_typestore

from scfeat_ros.bags import CAMERA_INFO, IMAGE, BagMessage, write_bag
from scfeat_ros.replay.bag_images import bag_source

BEGIN = 1_700_000_000_000_000_123  # more digits than a float has
PERIOD = 50_000_000
K = [200.0, 0, 99.5, 0, 200.0, 74.5, 0, 0, 1]


def picture(number: int) -> np.ndarray:
    """(150, 200) uint8: a plane with a texture, before which the camera moves sideways."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(cv2.resize(rng.integers(0, 255, (75, 150), np.uint8), None, fx=4, fy=4), (5, 5), 0)
    return texture[50:200, 20 * number : 20 * number + 200]


def bag_of(path: Path, stamps: list[int], info: bool = True, damaged: int = -1) -> Path:
    """A bag of pictures with these stamps, one a PERIOD in the recording. damaged: the image whose data are too few."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    types = store.types

    def header(stamp: int) -> Any:
        return types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), "lens")

    messages = []
    for i, stamp in enumerate(stamps):
        pixels = picture(i).ravel()[: 100 if i == damaged else None]
        image = types[IMAGE](header(stamp), 150, 200, "mono8", 0, 200, pixels)
        messages.append(BagMessage("/cam/image", BEGIN + i * PERIOD, bytes(store.serialize_cdr(image, IMAGE))))
    if info:
        region = types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
        p = np.array([200.0, 0, 99.5, 0, 0, 200.0, 74.5, 0, 0, 0, 1, 0])
        message = types[CAMERA_INFO](
            header(stamps[0]), 150, 200, "plumb_bob", np.zeros(5), np.array(K), np.eye(3).ravel(), p, 0, 0, region
        )
        messages.append(BagMessage("/cam/camera_info", BEGIN, bytes(store.serialize_cdr(message, CAMERA_INFO))))
    write_bag(path, {"/cam/image": IMAGE, **({"/cam/camera_info": CAMERA_INFO} if info else {})}, messages)
    return path


def test_every_nth_image_becomes_a_file(tmp_path: Path) -> None:
    stamps = [BEGIN + i * PERIOD for i in range(7)]
    source = bag_source(bag_of(tmp_path / "bag", stamps), tmp_path / "images", every=3)
    assert source.names == tuple(image_name(stamps[i]) for i in (0, 3, 6)) and source.in_order
    for i, file in zip((0, 3, 6), source.files, strict=True):
        assert np.array_equal(cv2.imread(file.path, cv2.IMREAD_UNCHANGED), picture(i))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(source.names)
    assert all(np.array_equal(camera.K.ravel(), K) for camera in source.calibrations.values())
    assert list(source.calibrations) == list(source.names) and source.truth == {}


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    bag = bag_of(tmp_path / "bag", [BEGIN, BEGIN + PERIOD])
    first = bag_source(bag, tmp_path / "images")
    before = [Path(file.path).stat().st_mtime_ns for file in first.files]
    again = bag_source(bag, tmp_path / "images")
    assert again.names == first.names and before == [Path(file.path).stat().st_mtime_ns for file in again.files]


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    stamps = [BEGIN, BEGIN + PERIOD, BEGIN + PERIOD, BEGIN + 3 * PERIOD]
    said: list[str] = []
    source = bag_source(bag_of(tmp_path / "bag", stamps, info=False, damaged=3), tmp_path / "images", say=said.append)
    assert source.names == tuple(map(image_name, stamps[:2])) and source.calibrations == {}
    assert np.array_equal(cv2.imread(source.files[1].path, cv2.IMREAD_UNCHANGED), picture(1))
    assert "the only image topic" in said[0]
    assert said[1] == "image 2 left out: another one has its stamp" and said[2].startswith("image 3 left out: trunc")


def test_a_bag_without_readable_images_is_refused(tmp_path: Path) -> None:
    bag = bag_of(tmp_path / "bag", [BEGIN], damaged=0)
    with pytest.raises(DataError, match="none that can be decoded"):
        bag_source(bag, tmp_path / "images")


def test_a_bag_is_exported_for_hloc_and_colmap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'scfeat-python[reconstruct]'")
    pycolmap = pytest.importorskip(
        "pycolmap", reason="pycolmap is not installed: pip install scfeat-python[reconstruct]"
    )
    stamps = [BEGIN + i * PERIOD for i in range(4)]
    bag, out = bag_of(tmp_path / "bag", stamps), tmp_path / "out"
    words = ["reconstruct", str(bag), "--out", str(out), "--method", "sift", "--export-only", "--pairs", "sequential:1"]
    assert cli.main(words) == 0
    assert "4 images, 3 pairs, 1 cameras, 1 of them calibrated" in capsys.readouterr().out
    with pycolmap.Database.open(out / "database.db") as database:
        assert [image.name for image in database.read_all_images()] == [image_name(stamp) for stamp in stamps]
        assert database.read_camera(1).params.tolist() == [200, 200, 100, 75]
        assert database.num_verified_image_pairs() == 3
    with h5py.File(out / "features.h5") as features, h5py.File(out / "matches.h5") as matches:
        assert list(features) == [image_name(stamp) for stamp in stamps]
        partners = matches[image_name(stamps[0])][image_name(stamps[1])]["matches0"][()]
        found = np.flatnonzero(partners >= 0)
        points0 = features[image_name(stamps[0])]["keypoints"][()][found]
        points1 = features[image_name(stamps[1])]["keypoints"][()][partners[found]]
    moved = np.abs(points0 - points1 - (20, 0)).max(1)  # what the camera moved between two pictures
    assert len(found) > 50 and np.median(moved) < 0.1
    assert not (out / "sparse").exists()
    assert json.loads((out / "reconstruction.json").read_text())["summary"]["verified_pairs"] == 3
