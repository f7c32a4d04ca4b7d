"""Bags through the front end without ROS: the same files each time, however a replay was cut into pieces, and a named
reason for whatever is wrong with a bag."""

from __future__ import annotations

import html
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[replay]'")

from rosbags.typesys import Stores, get_typestore

from scfeat_core.cli import main
from scfeat_core.errors import CalibrationError, ConfigError, DataError, ScfeatError
from scfeat_core.frontend import Frontend
from scfeat_core.replay.metrics import read_metrics
from scfeat_core.replay.run_folder import read_run
from scfeat_core.types import GeometryModel
from scfeat_ros.bags import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, BagMessage, open_bag, write_bag
from scfeat_ros.parameters import load_parameters
from scfeat_ros.replay.job import ReplayJob
from scfeat_ros.replay.run import PART, Player, finished, frontend_config, run_job
from scfeat_ros.replay.source import Source, missing_by_stamps, read_ahead, to_rgb8

TYPES = get_typestore(Stores.ROS2_HUMBLE)
START, STEP = 1_700_000_000_123_456_999, 50_000_000  # nanoseconds; the former is rounded up as a float
IMU = "sensor_msgs/msg/Imu"
WIDTH, HEIGHT = 160, 120


def picture(shift: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """(H, W) uint8: a window that moves over a pattern."""
    noise = np.random.default_rng(0).integers(0, 255, (50, 80), np.uint8)
    pattern = cv2.GaussianBlur(cv2.resize(noise, (640, 400)), (5, 5), 0)
    return pattern[60 : 60 + size[1], 20 + shift : 20 + shift + size[0]]


def header(stamp: int, frame_id: str = "lens") -> Any:
    return TYPES.types["std_msgs/msg/Header"](
        TYPES.types["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), frame_id
    )


def serialized(message: Any, kind: str) -> bytes:
    return bytes(TYPES.serialize_cdr(message, kind))


def jpeg(stamp: int, pixels: np.ndarray, cut: int | None = None, frame_id: str = "lens") -> bytes:
    data = cv2.imencode(".jpg", pixels)[1].ravel()[:cut]
    return serialized(TYPES.types[COMPRESSED_IMAGE](header(stamp, frame_id), "jpeg", data), COMPRESSED_IMAGE)


def raw(stamp: int, pixels: np.ndarray) -> bytes:
    height, width = pixels.shape
    encoding = {"uint8": "mono8", "uint16": "mono16"}[str(pixels.dtype)]
    data = np.frombuffer(pixels.tobytes(), np.uint8)
    step = width * pixels.itemsize
    return serialized(TYPES.types[IMAGE](header(stamp), height, width, encoding, 0, step, data), IMAGE)


def info(stamp: int, focal: float = 150.0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    k = np.array([focal, 0, size[0] / 2, 0, focal, size[1] / 2, 0, 0, 1])
    p = np.array([focal, 0, size[0] / 2, 0, 0, focal, size[1] / 2, 0, 0, 0, 1, 0])
    roi = TYPES.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    message = TYPES.types[CAMERA_INFO](
        header(stamp), size[1], size[0], "plumb_bob", np.zeros(5), k, np.eye(3).ravel(), p, 0, 0, roi
    )
    return serialized(message, CAMERA_INFO)


def bag(
    path: Path, images: Sequence[bytes], infos: Sequence[tuple[int, bytes]] = (), kind: str = COMPRESSED_IMAGE
) -> Path:
    """infos: (the image that it comes after, message)."""
    topics = {"/eye/image": kind, "/eye/camera_info": CAMERA_INFO}
    messages = [BagMessage("/eye/image", START + i * STEP, data) for i, data in enumerate(images)]
    messages += [BagMessage("/eye/camera_info", START + i * STEP + 1, data) for i, data in infos]
    messages.sort(key=lambda message: message.log_time)
    write_bag(path, topics if infos else {"/eye/image": kind}, messages)
    return path


def images(count: int, make: Callable[..., bytes] = jpeg) -> list[bytes]:
    return [make(START + i * STEP, picture(3 * i)) for i in range(count)]


@pytest.fixture(scope="module")
def short_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images, calibrated from the second message on, the eighth damaged."""
    found = images(12)
    found[7] = jpeg(START + 7 * STEP, picture(21), cut=300)
    return bag(tmp_path_factory.mktemp("bags") / "short", found, [(0, info(START)), (5, info(START + 5 * STEP))])


def job(path: Path, out: Path, **changes: Any) -> ReplayJob:
    """By ORB: no network to load."""
    parameters = load_parameters({"max_keypoints": 150, **changes.pop("parameters", {})})
    return ReplayJob(path, out, **{"method": "orb", "report": False, "parameters": parameters, **changes})


def replay(path: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return run_job(job(path, out, **changes), progress=False)


def files(folder: Path) -> dict[str, bytes]:
    """Of a run, but for what holds times."""
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "timings.npz"}
    metrics = json.loads(found.pop("metrics.json"))
    metrics.pop("timings")
    return found | {"metrics": json.dumps(metrics).encode()}


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:weights='random'")
def test_records_are_what_the_front_end_says(short_bag: Path, tmp_path: Path) -> None:
    summary = replay(short_bag, tmp_path, method="scfeat", parameters={"weights": "random"}, frames=10)
    recording = read_run(tmp_path)
    assert (summary["frames"], summary["processed"], summary["dropped_decode"]) == (10, 9, 1)
    frontend = Frontend(job(short_bag, tmp_path, parameters={"weights": "random"}).parameters.frontend_config())
    source = Source(job(short_bag, tmp_path))
    for shot, record in zip(source.shots(), recording.frames, strict=False):
        assert (record.index, record.stamp) == (shot.index, START + shot.index * STEP)
        if shot.index == 7:
            assert record.dropped == "decode" and "without its end" in record.error
            continue
        result = frontend.process(shot.pixels, shot.stamp, calibration=recording.camera)
        np.testing.assert_array_equal(record.keypoints, result.features.keypoints)
        np.testing.assert_array_equal(record.tracks.ids, result.tracks.ids)
        np.testing.assert_array_equal(record.tracks.rays, result.tracks.rays)
        assert record.sequence == result.sequence
        if shot.index:
            np.testing.assert_array_equal(record.pair.geometry.matrix, result.pair.geometry.matrix)
        assert {"read", "decode", "network", "track", "other"} <= set(record.timings)
    assert recording.camera.K[0, 0] == 150 and recording.facts["camera"] == "/eye/camera_info"
    assert recording.facts["descriptor_space"] == "scfeat:random"


@pytest.mark.parametrize("method", ["sift", "orb"])
def test_two_runs_write_the_same_files(short_bag: Path, tmp_path: Path, method: str) -> None:
    for name in "ab":
        replay(short_bag, tmp_path / name, method=method)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    content = b"".join(files(tmp_path / "a").values())
    assert str(tmp_path).encode() not in content and str(short_bag.parent).encode() not in content


class Stopped(Exception):
    """In the place of a process that is killed."""


def stop_at(count: int, act: Callable[[], None]) -> Callable[[int, int], None]:
    def watch(done: int, total: int) -> None:
        if done == count:
            act()

    return watch


@pytest.mark.parametrize("count", [1, 8])
def test_an_interrupted_replay_goes_on_to_the_same_files(short_bag: Path, tmp_path: Path, count: int) -> None:
    interrupt = stop_at(count, lambda: signal.raise_signal(signal.SIGINT))
    summary = run_job(job(short_bag, tmp_path / "cut"), progress=interrupt)
    assert summary["interrupted"] == 1 and summary["frames"] == count
    assert len(read_run(tmp_path / "cut").frames) == count and (tmp_path / "cut" / "metrics.json").exists()
    said: list[str] = []
    assert "interrupted" not in run_job(job(short_bag, tmp_path / "cut"), said.append, progress=False)
    assert any(f"going on after {count} frames" in line for line in said)
    replay(short_bag, tmp_path / "whole")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_an_interruption_while_figures_are_made_changes_nothing(
    short_bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of a replay, nor where the replay was complete before."""
    from scfeat_ros.replay.run import conclude

    def interrupted(*words: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return conclude(*words)

    monkeypatch.setattr("scfeat_ros.replay.run.conclude", interrupted)
    one = job(short_bag, tmp_path)
    for _ in range(2):
        said: list[str] = []
        summary = run_job(one, said.append, progress=False)
        assert "interrupted" not in summary and summary["frames"] == 12 and finished(one) == summary
        assert said.index("making figures") < len(said) - 1 and "once more ends that" in said[-1]
        (tmp_path / "metrics.json").unlink()


def test_what_cannot_be_replayed_leaves_an_earlier_run_as_it_was(short_bag: Path, tmp_path: Path) -> None:
    replay(short_bag, tmp_path)
    before = files(tmp_path)
    for wrong in ({"method": "siftt"}, {"method": "scfeat", "parameters": {"device": "cuda:9"}}, {"start": 1e6}):
        with pytest.raises(ScfeatError):
            replay(short_bag, tmp_path, overwrite=True, **wrong)
        assert files(tmp_path) == before
    assert finished(job(short_bag, tmp_path)) is not None


def test_a_bag_that_was_recorded_again_is_another_one(tmp_path: Path) -> None:
    """Of the same name, size, topic and number of images."""
    shades = [np.full((HEIGHT, WIDTH), 60 + i, np.uint8) for i in range(8)]
    pictures = [picture(3 * i) for i in range(8)]
    paths = [
        bag(
            tmp_path / name / "yard",
            [raw(START + i * STEP, each[..., 0] if each.ndim == 3 else each) for i, each in enumerate(content)],
            kind=IMAGE,
        )
        for name, content in (("before", pictures), ("after", shades))
    ]
    replay(paths[0], tmp_path / "out")
    run_job(job(paths[0], tmp_path / "cut"), progress=stop_at(4, lambda: signal.raise_signal(signal.SIGINT)))
    assert finished(job(paths[1], tmp_path / "out")) is None
    for folder in ("out", "cut"):
        with pytest.raises(ScfeatError, match=r"found another one: contents.bag was .*--overwrite"):
            replay(paths[1], tmp_path / folder)
    copy = Path(shutil.copytree(paths[0], tmp_path / "elsewhere" / "yard"))
    assert finished(job(copy, tmp_path / "out")) is not None


@pytest.mark.parametrize("method", ["siftt", "orb"])
def test_a_replay_that_never_began_leaves_no_folder(tmp_path: Path, method: str) -> None:
    """Of an unknown method, and of a bag whose every image is cut off."""
    path = bag(tmp_path / "bag", images(3))
    (file,) = path.glob("*.mcap")
    if method == "orb":
        (path / "metadata.yaml").unlink()
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ScfeatError):
        replay(path, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dies", ["scfeat_core.replay.metrics.summarise", "scfeat_core.replay.report.write_report"])
def test_no_figures_or_report_of_the_part_before_an_interruption_stay(
    short_bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """Where the process that went on dies when all images are done: the run is not taken for complete."""

    def die(*unused: object) -> None:
        raise Stopped

    one = job(short_bag, tmp_path / "cut", report=True)
    assert run_job(one, progress=stop_at(4, lambda: signal.raise_signal(signal.SIGINT)))["frames"] == 4
    assert {"metrics.json", "trajectory.txt", "report.html"} <= {file.name for file in one.out.iterdir()}
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(dies, die)
        run_job(one, progress=False)
    assert len(read_run(one.out).frames) == 12 and not (one.out / "report.html").exists()
    assert finished(one) is None
    summary = run_job(one, progress=False)
    assert summary["frames"] == 12 and finished(one) == summary
    replay(short_bag, tmp_path / "whole", report=True)
    assert (one.out / "trajectory.txt").read_bytes() == (tmp_path / "whole" / "trajectory.txt").read_bytes()
    assert "12 images" in (one.out / "report.html").read_text()


def test_figures_of_fewer_frames_than_the_run_has_are_made_again(short_bag: Path, tmp_path: Path) -> None:
    one = job(short_bag, tmp_path)
    summary = run_job(one, progress=stop_at(4, lambda: signal.raise_signal(signal.SIGINT)))
    before = (tmp_path / "metrics.json").read_bytes()
    run_job(one, progress=False)
    (tmp_path / "metrics.json").write_bytes(before)
    assert summary["frames"] == 4 and finished(one) is None
    assert run_job(one, progress=False)["frames"] == 12 and finished(one) is not None


def test_a_replay_goes_on_with_as_many_threads(short_bag: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_job(job(short_bag, tmp_path), progress=stop_at(4, lambda: signal.raise_signal(signal.SIGINT)))
        torch.set_num_threads(1)
        replay(short_bag, tmp_path)
        assert read_run(tmp_path).facts["threads"] == 3 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_killed_replay_goes_on_after_its_last_part(
    short_bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scfeat_ros.replay.run.PART", 3)

    def fail() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run_job(job(short_bag, tmp_path / "cut"), progress=stop_at(8, fail))
    monkeypatch.setattr("scfeat_ros.replay.run.PART", PART)
    seen: list[int] = []
    run_job(job(short_bag, tmp_path / "cut"), progress=lambda done, total: seen.append(done))
    assert seen[0] == 7
    replay(short_bag, tmp_path / "whole")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_finished_replay_is_not_done_again(short_bag: Path, tmp_path: Path) -> None:
    one = job(short_bag, tmp_path / "run", frames=6)
    assert finished(one) is None
    summary = run_job(one, progress=False)
    assert finished(one) == summary
    assert finished(replace(one, overwrite=True)) is None
    said: list[str] = []
    before = (tmp_path / "run" / "timings.npz").read_bytes()
    assert run_job(one, said.append, progress=False) == summary
    assert any("holds this replay already" in line for line in said)
    assert (tmp_path / "run" / "timings.npz").read_bytes() == before
    with pytest.raises(ScfeatError, match=r"window.frames was 6 and is now 7"):
        replay(short_bag, tmp_path / "run", frames=7)
    assert replay(short_bag, tmp_path / "run", frames=7, overwrite=True)["frames"] == 7


def test_start_stop_and_frames_choose_images(short_bag: Path, tmp_path: Path) -> None:
    def indices(**window: Any) -> list[int]:
        return [shot.index for shot in Source(job(short_bag, tmp_path, **window)).shots()]

    assert indices() == list(range(12))
    assert indices(start=0.2) == list(range(4, 12))
    assert indices(start=0.2, stop=0.3) == [4, 5]
    assert indices(start=0.2, frames=3) == [4, 5, 6]
    assert [shot.index for shot in Source(job(short_bag, tmp_path, start=0.2)).shots(skip=6)] == [10, 11]
    with pytest.raises(DataError, match="expected images on /eye/image in .*found none: check start and stop"):
        replay(short_bag, tmp_path, start=60.0)


def test_pictures_of_single_frames(short_bag: Path, tmp_path: Path) -> None:
    found = Source(job(short_bag, tmp_path)).pictures([3, 7, 10])
    assert sorted(found) == [3, 10]  # 7 is damaged
    assert found[3].shape == (HEIGHT, WIDTH, 3) and found[3].dtype == np.uint8
    assert np.abs(found[10][..., 0].astype(int) - picture(30)).mean() < 5


@pytest.mark.parametrize(
    ("name", "topic", "focal"),
    [
        ("euroc_v101", "/cam0/image_raw", 458.654),
        ("tum_fr1_rpy", "/camera/rgb/image_raw/compressed", 517.306408),
        ("kitti_seq1", "/kitti/left/image_raw/compressed", 707.0912),
    ],
)
def test_recorded_bags(shared_data: Path, tmp_path: Path, name: str, topic: str, focal: float) -> None:
    summary = replay(shared_data / "bag" / name, tmp_path, frames=4)
    recording = read_run(tmp_path)
    assert (summary["processed"], summary["dropped"], recording.facts["topic"]) == (4, 0, topic)
    assert recording.camera.K[0, 0] == focal
    stamps = [frame.stamp for frame in recording.frames]
    assert np.abs(recording.truth.stamps[:, None] - stamps).min(0).max() < 10_000_000  # nanoseconds
    assert all(frame.pair.geometry.num_inliers > 20 for frame in recording.frames[1:])


# -- what is wrong with bags -------------------------------------------------------------------------------------------


def dropped(folder: Path) -> list[str]:
    return [frame.dropped for frame in read_run(folder).frames]


def test_an_empty_bag_and_one_without_images(tmp_path: Path) -> None:
    write_bag(tmp_path / "empty", {}, [])
    with pytest.raises(DataError, match="the bag is empty"):
        replay(tmp_path / "empty", tmp_path / "out")
    write_bag(tmp_path / "imu", {"/imu": IMU}, [])
    with pytest.raises(DataError, match="found none"):
        replay(tmp_path / "imu", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_topic_that_is_none_of_images(short_bag: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/eye/camera_info.*the bag holds|/eye/camera_info .*CameraInfo"):
        replay(short_bag, tmp_path, topic="/eye/camera_info")


def test_images_of_another_size_begin_anew(tmp_path: Path) -> None:
    sizes = [(160, 120)] * 4 + [(120, 90)] * 4
    found = [jpeg(START + i * STEP, picture(3 * i, size)) for i, size in enumerate(sizes)]
    replay(bag(tmp_path / "bag", found, [(0, info(START))]), tmp_path / "out")
    recording = read_run(tmp_path / "out")
    assert not any(dropped(tmp_path / "out"))
    assert recording.frames[4].reset_reason == "image size changed from 160x120 to 120x90"
    assert recording.frames[3].tracks.rays is not None and recording.frames[4].tracks.rays is None
    (warning,) = recording.facts["warnings"]
    assert "camera_info not used: expected the calibration of images of 120x90" in warning


def test_stamps_that_go_back_a_little_and_a_lot(tmp_path: Path) -> None:
    stamps = [0, 1, 2, 1, 3, -100, -99, -99]
    found = [jpeg(START + stamp * STEP, picture(3 * i)) for i, stamp in enumerate(stamps)]
    replay(bag(tmp_path / "bag", found), tmp_path / "out")
    assert dropped(tmp_path / "out") == ["", "", "", "stale", "", "", "", "stale"]
    assert "stamp went back" in read_run(tmp_path / "out").frames[5].reset_reason
    assert "found one 0.050 s older" in read_run(tmp_path / "out").frames[3].error


def test_a_bag_of_which_no_image_gives_a_result_is_an_error(tmp_path: Path) -> None:
    """However often it is asked for; the report says why."""
    path = bag(tmp_path / "bag", [jpeg(START + i * STEP, picture(i), cut=200) for i in range(3)])
    for _ in range(2):
        with pytest.raises(DataError, match=r"found none among 3 .*image 0: .*report.*out"):
            replay(path, tmp_path / "out", report=True)
        assert (tmp_path / "out" / "report.html").exists() and finished(job(path, tmp_path / "out")) is None


def test_16_bit_images(tmp_path: Path) -> None:
    found = [raw(START + i * STEP, picture(3 * i).astype(np.uint16) << 4) for i in range(4)]
    summary = replay(bag(tmp_path / "bag", found, kind=IMAGE), tmp_path / "out")
    assert summary["processed"] == 4 and summary["inliers"] > 30
    assert to_rgb8(picture(0).astype(np.uint16) << 8).tolist() == np.dstack([picture(0)] * 3).tolist()


def test_images_of_two_cameras_on_one_topic(tmp_path: Path) -> None:
    found = [jpeg(START + i * STEP, picture(3 * i), frame_id="left" if i < 9 else "right") for i in range(11)]
    replay(bag(tmp_path / "late", found), tmp_path / "out")
    (warning,) = read_run(tmp_path / "out").facts["warnings"]
    assert "images of 2 cameras come on /eye/image (frame_id left, right)" in warning


@pytest.mark.parametrize("first_info", [0, 3])
def test_a_calibration_counts_from_the_first_image_on(tmp_path: Path, first_info: int) -> None:
    replay(bag(tmp_path / "bag", images(6), [(first_info, info(START))]), tmp_path / "out")
    assert all(frame.tracks.rays is not None for frame in read_run(tmp_path / "out").frames)


def test_without_a_calibration_there_are_no_rays_and_no_path(tmp_path: Path) -> None:
    said: list[str] = []
    summary = run_job(job(bag(tmp_path / "bag", images(5)), tmp_path / "out"), said.append, progress=False)
    recording = read_run(tmp_path / "out")
    assert recording.camera is None and recording.frames[-1].tracks.rays is None
    assert summary["processed"] == 5 and summary["ate_m"] is None and not (tmp_path / "out" / "trajectory.txt").exists()
    assert any("calibration: none" in line for line in said)


def test_a_cut_bag_gives_what_is_left_and_says_so(tmp_path: Path) -> None:
    path = bag(tmp_path / "bag", images(20, raw), kind=IMAGE)
    (file,) = path.glob("*.mcap")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    summary = replay(path, tmp_path / "out")
    assert 3 < summary["processed"] < 20
    (damage,) = read_run(tmp_path / "out").facts["damage"]
    assert file.name in damage and str(tmp_path) not in damage
    assert (summary["damaged"], summary["lost_messages"]) == (1, 20 - summary["processed"])
    assert summary["damage"] == damage and summary["lost_bytes"] is None


def torn_bag(tmp_path: Path) -> Path:
    """The second of its chunks is damaged, and only the stamps of the others tell what was in it."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48), np.uint8)
    messages = [BagMessage("/eye/image", START + i * STEP, raw(START + i * STEP, pixels)) for i in range(1200)]
    write_bag(tmp_path / "bag", {"/eye/image": IMAGE}, messages, compression="storage")
    (file,) = (tmp_path / "bag").glob("*.mcap")
    data = bytearray(file.read_bytes())
    with open_bag(file) as whole:
        second = whole._files[0]._blocks[1]  # type: ignore[attr-defined]
    data[second.at + 53 : second.at + 153] = bytes(100)  # where the compressed data begin
    data[second.at + second.size] = 0x0C  # the index behind it is none any more
    data[-30] ^= 1  # nor is that at the end
    file.write_bytes(data)
    (tmp_path / "bag" / "metadata.yaml").unlink()
    return tmp_path / "bag"


def test_gaps_of_the_stamps_count_what_nothing_else_does(tmp_path: Path) -> None:
    source = Source(job(torn_bag(tmp_path), tmp_path / "out"))
    shots = list(source.shots(decode=lambda index: False))
    assert 300 < len(shots) < 1200
    assert source.lost.counts["messages"] == 1200 - len(shots) and source.lost.counts["bytes"] > 1000
    assert f"by the gaps between the stamps {1200 - len(shots)} images are missing" in source.lost.damage
    assert missing_by_stamps([]) == missing_by_stamps([5]) == missing_by_stamps([5, 5]) == 0
    assert missing_by_stamps([0, 11, 20, 29, 57, 66]) == 2


def test_nobody_knows_what_is_behind_a_cut(tmp_path: Path) -> None:
    path = bag(tmp_path / "bag", images(20, raw), kind=IMAGE)
    (file,) = path.glob("*.mcap")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    (path / "metadata.yaml").unlink()
    summary = replay(path, tmp_path / "out", report=True)
    assert (summary["damaged"], summary["lost_messages"], summary["lost_bytes"]) == (1, None, None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "In all an unknown number of images and an unknown number of bytes are lost" in page
    assert finished(job(path, tmp_path / "out"))["damaged"] == 1


def test_a_report_of_before_does_not_stay_beside_other_figures(short_bag: Path, tmp_path: Path) -> None:
    words = (short_bag, "--method", "orb", "--frames", 3, "--out", tmp_path / "run")
    assert command(*words) == 0 and (tmp_path / "run" / "report.html").exists()
    assert command(*words, "--no-report") == 0
    assert (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "run" / "report.html").exists()


def test_damage_is_in_all_that_a_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = bag(tmp_path / "good", images(4, raw), kind=IMAGE)
    path = bag(tmp_path / "bad", images(20, raw), kind=IMAGE)
    (file,) = path.glob("*.mcap")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    words = ("--method", "orb", "--no-report", "--set", "max_keypoints=80")
    results = {name: tmp_path / f"all.{name}" for name in ("json", "junit", "csv")}
    status = command(path, *words, "--out", tmp_path / "out", "--fail-if", "lost_messages>0", "--fail-if", "damaged>0",
                     "--json", results["json"], "--junit", results["junit"], "--table", results["csv"])  # fmt: skip
    said = capsys.readouterr()
    assert status == 1 and "lost_messages" in said.out and "done, damaged" in said.out
    assert "unknown" in said.out, "lost_bytes"
    assert "the bag is damaged: bad.mcap ends in the middle" in said.err
    (run,) = json.loads(results["json"].read_text())["runs"]
    assert run["state"] == "done, damaged" and run["summary"]["lost_messages"] > 0 and not run["error"]
    case = ElementTree.parse(results["junit"]).find("testsuite/testcase[@name='replay']")
    assert case is not None and case.find("error") is None
    assert "lost_bytes unknown): bad.mcap ends in the middle" in (case.findtext("system-out") or "")
    assert "done, damaged" in results["csv"].read_text()
    assert (
        command(good, *words, "--out", tmp_path / "other", "--fail-if", "damaged>0", "--fail-if", "lost_bytes>0") == 0
    )
    assert "lost" not in capsys.readouterr().out.splitlines()[0].replace("lost  ", "")


# -- calibration and truth from elsewhere ------------------------------------------------------------------------------

CAMERA_YAML = """\
image_width: {width}
image_height: 120
camera_name: eye
camera_matrix: {{rows: 3, cols: 3, data: [111, 0, 80, 0, 111, 60, 0, 0, 1]}}
distortion_model: plumb_bob
distortion_coefficients: {{rows: 1, cols: 5, data: [0, 0, 0, 0, 0]}}
rectification_matrix: {{rows: 3, cols: 3, data: [1, 0, 0, 0, 1, 0, 0, 0, 1]}}
projection_matrix: {{rows: 3, cols: 4, data: [99, 0, 80, 0, 0, 99, 60, 0, 0, 0, 1, 0]}}
"""
TRUTH = "".join(f"{(START + i * STEP) / 1e9:.9f} {0.1 * i} 0 0 0 0 0 1\n" for i in range(12))


def test_files_beside_the_bag_are_used(tmp_path: Path) -> None:
    path = bag(tmp_path / "bag", images(4))
    (path / "camera_info.yaml").write_text(CAMERA_YAML.format(width=160))
    (path / "groundtruth.txt").write_text(TRUTH)
    replay(path, tmp_path / "out")
    recording = read_run(tmp_path / "out")
    assert recording.camera.K[0, 0] == 111 and recording.facts["camera"] == "camera_info.yaml"
    assert len(recording.truth.stamps) == 12 and recording.truth.source == "groundtruth.txt (TUM)"
    replay(path, tmp_path / "other", ground_truth="none", parameters={"rectified": True})
    other = read_run(tmp_path / "other")
    assert other.truth is None and other.camera.K[0, 0] == 99


def depth_map(stamp: int, metres: float, frame_id: str = "lens") -> bytes:
    data = np.full(HEIGHT * WIDTH, round(1000 * metres), "<u2").view(np.uint8)
    message = TYPES.types[IMAGE](header(stamp, frame_id), HEIGHT, WIDTH, "16UC1", 0, 2 * WIDTH, data)
    return serialized(message, IMAGE)


def depth_bag(path: Path, metres: float = 1.5, late: int = 12_000_000, frame_id: str = "lens") -> Path:
    """A camera that moves along a wall 1.5 m away, by 3 pixels an image, with depth maps and true poses."""
    images_of, depths, infos = "/eye/image/compressed", "/eye/depth_registered", "/eye/camera_info"
    messages = [BagMessage(images_of, START + i * STEP, data) for i, data in enumerate(images(8))]
    messages += [
        BagMessage(depths, START + i * STEP + late, depth_map(START + i * STEP + late, metres, frame_id))
        for i in range(8)
    ]
    messages.append(BagMessage(infos, START, info(START)))
    topics = {images_of: COMPRESSED_IMAGE, depths: IMAGE, infos: CAMERA_INFO}
    write_bag(path, topics, sorted(messages, key=lambda message: message.log_time))
    lines = [f"{(START + i * STEP) / 1e9:.9f} {1.5 * 3 * i / 150} 0 0 0 0 0 1\n" for i in range(8)]
    (path / "groundtruth.txt").write_text("".join(lines))
    return path


def test_repeatability_with_depth_maps(tmp_path: Path) -> None:
    """Of a moving camera it is that of the wall; with depth maps of another wall it is not."""
    found = replay(depth_bag(tmp_path / "bag"), tmp_path / "out")["repeatability"]
    assert found > 0.85 and np.isfinite(read_metrics(tmp_path / "out").per_frame["repeatability"]).sum() == 7
    wrong = replay(depth_bag(tmp_path / "wrong", metres=0.45), tmp_path / "other")["repeatability"]
    assert wrong < found - 0.2
    without = replay(tmp_path / "bag", tmp_path / "without", depth="none")
    assert without["repeatability"] is None and "depth is not known" in without["missing"]["repeatability"]


def test_depth_maps_of_another_view_or_time_are_not_used(tmp_path: Path) -> None:
    path = depth_bag(tmp_path / "bag", frame_id="infrared")
    assert replay(path, tmp_path / "out")["repeatability"] is None
    assert "are of another frame_id than the images ('lens')" in read_run(tmp_path / "out").facts["warnings"][0]
    assert replay(path, tmp_path / "named", depth="/eye/depth_registered")["repeatability"] > 0.85
    with pytest.raises(DataError, match=r"expected depth maps .* on /eye/image in .* found them on: /eye/depth_regi"):
        replay(path, tmp_path / "wrong", depth="/eye/image")
    late = replay(depth_bag(tmp_path / "late", late=21_000_000), tmp_path / "late_out")
    assert late["repeatability"] is None and "where two of them show the same" in late["missing"]["repeatability"]


def test_damaged_depth_maps_are_told(tmp_path: Path) -> None:
    path, lines = depth_bag(tmp_path / "bag"), []
    with open_bag(path) as source:
        types = {topic.name: topic.type for topic in source.topics}
        kept = list(source.messages(source.topics))
    of_depth = [i for i, message in enumerate(kept) if message.topic == "/eye/depth_registered"]
    kept[of_depth[3]] = replace(kept[of_depth[3]], data=kept[of_depth[3]].data[:300])
    write_bag(tmp_path / "damaged", types, kept)
    (tmp_path / "damaged" / "groundtruth.txt").write_bytes((path / "groundtruth.txt").read_bytes())
    run_job(job(tmp_path / "damaged", tmp_path / "out"), lines.append, progress=False)
    assert np.isfinite(read_metrics(tmp_path / "out").per_frame["repeatability"]).sum() == 5
    assert "warning: 1 depth maps on /eye/depth_registered are damaged, their frames have no repeatability" in lines


def test_depth_maps_without_a_frame_are_of_an_unknown_view(tmp_path: Path) -> None:
    path = depth_bag(tmp_path / "bag", frame_id="")
    with open_bag(path) as source:
        kept = [message for message in source.messages(source.topics) if message.topic != "/eye/image/compressed"]
    kept += [
        BagMessage("/eye/image/compressed", START + i * STEP, jpeg(START + i * STEP, picture(3 * i), frame_id=""))
        for i in range(8)
    ]
    types = {"/eye/image/compressed": COMPRESSED_IMAGE, "/eye/depth_registered": IMAGE, "/eye/camera_info": CAMERA_INFO}
    write_bag(tmp_path / "nameless", types, sorted(kept, key=lambda message: message.log_time))
    (tmp_path / "nameless" / "groundtruth.txt").write_bytes((path / "groundtruth.txt").read_bytes())
    assert replay(tmp_path / "nameless", tmp_path / "out")["repeatability"] is None
    assert "name one with --depth" in read_run(tmp_path / "out").facts["warnings"][0]


def test_ground_truth_of_another_clock_is_moved_with_a_warning(tmp_path: Path) -> None:
    path = bag(tmp_path / "bag", images(4))
    (tmp_path / "poses.txt").write_text("5.0 0 0 0 0 0 0 1\n5.05 1 0 0 0 0 0 1\n")
    replay(path, tmp_path / "out", ground_truth=str(tmp_path / "poses.txt"))
    recording = read_run(tmp_path / "out")
    assert recording.truth.stamps.tolist() == [START, START + STEP]
    assert "ground truth of poses.txt (TUM) has another clock than the images" in recording.facts["warnings"][0]


def poses_file(path: Path, stamps: Sequence[float]) -> str:
    path.write_text("".join(f"{stamp:.9f} {0.1 * i} {0.01 * i * i} 0 0 0 0 1\n" for i, stamp in enumerate(stamps)))
    return str(path)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("stamps", "found"),
    [
        ([START / 1e9 + 100 + 0.05 * i for i in range(40)], "in that time 0 of 40 images"),
        ([START / 1e9 - 50 + 0.05 * i for i in range(40)], "in that time 0 of 40 images"),
        ([START / 1e9 - 1.85 + 0.05 * i for i in range(40)], "in that time 3 of 40 images"),
        ([START / 1e9 - 10**7 + 0.05 * i for i in range(40)], "in that time 0 of 40 images"),
        ([0.05 * i for i in range(400)], "lasts as long as the images, 2.0 s, .*found 20.0 s"),
    ],
    ids=["later", "earlier", "hardly", "months before", "from zero, longer"],
)
def test_ground_truth_of_another_recording(
    tmp_path: Path, named: bool, stamps: list[float], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is an error where it was asked for; where it was only found, errors are left out, and all say why."""
    path = bag(tmp_path / "bag", images(40), [(0, info(START))])
    words = (path, "--out", tmp_path / "out", "--method", "orb", "--set", "max_keypoints=150", "--json")
    if named:
        given = poses_file(tmp_path / "poses.txt", stamps)
        with pytest.raises(DataError, match=f"expected ground truth .*{found}.*another recording"):
            replay(path, tmp_path / "out", ground_truth=given)
        assert command(*words, tmp_path / "all.json", "--ground-truth", given) == 2
        return
    poses_file(path / "groundtruth.txt", stamps)
    assert command(*words, tmp_path / "all.json", "--fail-if", "ate_m>1") == 2
    reason = read_metrics(tmp_path / "out").missing["ate_m"]
    assert re.search(found, reason) and "another recording" in reason
    assert re.search(rf"out: no ate_m, rpe_m, rpe_deg: .*{found}", capsys.readouterr().err)
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert reason in page and "<svg" in page
    (run,) = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert run["state"] == "done" and run["summary"]["missing"]["ate_m"] == reason
    assert reason in run["checks"][0]["error"]
    assert finished(job(path, tmp_path / "out", report=True))["missing"]["ate_m"] == reason


def test_ground_truth_from_zero_of_a_recording_whose_end_is_missing(tmp_path: Path) -> None:
    """It lasts longer than what is left of the images, as it should."""
    path = bag(tmp_path / "bag", images(40), [(0, info(START))])
    (file,) = path.glob("*.mcap")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    given = poses_file(tmp_path / "poses.txt", [0.05 * i for i in range(400)])
    source = Source(job(path, tmp_path / "out", ground_truth=given))
    assert source.truth is not None and len(source.truth.stamps) == 400
    assert "another clock" in source.warnings[0]


def test_ground_truth_of_a_part_is_used(tmp_path: Path) -> None:
    path = bag(tmp_path / "bag", images(40), [(0, info(START))])
    given = poses_file(tmp_path / "poses.txt", [(START + i * STEP) / 1e9 for i in range(30, 50)])
    replay(path, tmp_path / "out", ground_truth=given)
    assert read_run(tmp_path / "out").truth is not None
    with pytest.raises(DataError, match="in that time 0 of 20 images"):
        replay(path, tmp_path / "other", ground_truth=given, stop=1.0)


@pytest.mark.parametrize("name", ["kitti_seq1", "hololens_office"])
def test_ground_truth_of_the_same_clock_comes_first(shared_data: Path, tmp_path: Path, name: str) -> None:
    """The file beside these bags counts from 0, the topic in them does not."""
    source = Source(job(shared_data / "bag" / name, tmp_path))
    assert source.truth is not None and source.truth.source.startswith("/ground_truth/pose") and not source.warnings
    given = str(shared_data / "bag" / name / "groundtruth.txt")
    named = Source(job(shared_data / "bag" / name, tmp_path, ground_truth=given))
    assert named.truth is not None and "another clock" in named.warnings[0]
    np.testing.assert_allclose(named.truth.stamps, source.truth.stamps, atol=1_000_000)
    other = {"kitti_seq1": "hololens_office", "hololens_office": "kitti_seq1"}[name]
    with pytest.raises(DataError, match="lasts as long as the images"):
        Source(job(shared_data / "bag" / other, tmp_path, ground_truth=given))


def test_why_there_is_no_relative_error(tmp_path: Path) -> None:
    path = bag(tmp_path / "bag", images(12), [(0, info(START))])
    given = poses_file(tmp_path / "poses.txt", [(START + i * STEP) / 1e9 for i in range(12)])
    summary = replay(path, tmp_path / "out", ground_truth=given, report=True)
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    reason = summary["missing"]["rpe_m"]
    assert reason == read_metrics(tmp_path / "out").missing["rpe_m"] and reason in page


def test_an_image_without_a_header_is_one_drop(tmp_path: Path) -> None:
    found = images(11)
    found[9] = b"\x00\x01\x00\x00"
    path = bag(tmp_path / "bag", found)
    (path / "groundtruth.txt").write_text(TRUTH)
    replay(path, tmp_path / "out")
    assert dropped(tmp_path / "out") == [*[""] * 9, "decode", ""]
    assert read_run(tmp_path / "out").frames[9].stamp == START + 9 * STEP  # that of the recording


def test_a_calibration_that_is_not_wanted(tmp_path: Path) -> None:
    """Neither that of the bag nor the file beside it; intrinsics that are given count all the same."""
    path = bag(tmp_path / "bag", images(5), [(0, info(START))])
    (path / "camera_info.yaml").write_text(CAMERA_YAML.format(width=160))
    summary = replay(path, tmp_path / "out", camera_info="none")
    recording = read_run(tmp_path / "out")
    assert (
        recording.camera is None and recording.frames[-1].tracks.rays is None and recording.facts["calibration"] == ""
    )
    assert recording.frames[-1].pair.geometry.model != GeometryModel.ESSENTIAL
    assert summary["missing"]["ate_m"] == "there is no calibration"
    (tmp_path / "eye.yaml").write_text(CAMERA_YAML.format(width=160))
    replay(path, tmp_path / "given", camera_info="none", intrinsics=tmp_path / "eye.yaml")
    assert read_run(tmp_path / "given").camera.K[0, 0] == 111
    with pytest.raises(ScfeatError, match="found another one: calibration was"):
        replay(path, tmp_path / "out")


def test_intrinsics_come_before_camera_info_and_must_fit(short_bag: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(CAMERA_YAML.format(width=160))
    replay(short_bag, tmp_path / "out", intrinsics=file, frames=3)
    assert read_run(tmp_path / "out").camera.K[0, 0] == 111
    file.write_text(CAMERA_YAML.format(width=320))
    with pytest.raises(CalibrationError, match="expected the calibration of images of 160x120, found one for 320x120"):
        replay(short_bag, tmp_path / "wrong", intrinsics=file, frames=3)
    with pytest.raises(DataError, match="expected a file of intrinsics that says where the camera is on the body"):
        replay(short_bag, tmp_path / "body", ground_truth=str(tmp_path / "none.txt"), truth_of_body=True)


def test_a_replay_of_other_contents_under_the_same_names_is_another_one(short_bag: Path, tmp_path: Path) -> None:
    """A calibration, a truth and a mask that were mended must not be answered by the figures of the old ones."""
    intrinsics, truth, mask = tmp_path / "k.yaml", tmp_path / "truth.txt", tmp_path / "mask.png"
    poses = "{second}.0 {x} 0 0 0 0 0 1\n"

    def write(focal: int = 111, x: float = 0.0, shade: int = 255) -> None:
        intrinsics.write_text(CAMERA_YAML.format(width=160).replace("111", str(focal)))
        truth.write_text("".join(poses.format(second=START // 10**9 + i, x=x) for i in range(3)))
        cv2.imwrite(str(mask), np.full((HEIGHT, WIDTH), shade, np.uint8))

    def again(**changes: Any) -> dict[str, Any]:
        parameters = {"mask_files": [str(mask)], **changes.pop("parameters", {})}
        given = {"intrinsics": intrinsics, "ground_truth": str(truth), "frames": 3, "parameters": parameters}
        return replay(short_bag, tmp_path / "run", **given, **changes)

    write()
    again()
    again()
    for changed, what in (({"focal": 99}, "calibration"), ({"x": 1.0}, "truth"), ({"shade": 254}, "mask")):
        write(**changed)
        with pytest.raises(ScfeatError, match=f"found another one: contents.{what} was "):
            again()
    write()
    with pytest.raises(ScfeatError, match="found another one: camera_name was"):
        again(parameters={"cameras": ["other"]})
    again()


def test_damaged_messages_of_the_gyroscope_are_left_out(tmp_path: Path) -> None:
    path = imu_bag(tmp_path / "bag", 0.5)
    with open_bag(path) as opened:
        types_of = {topic.name: topic.type for topic in opened.topics}
        messages = list(opened.messages(opened.topics))
    place = next(i for i, message in enumerate(messages) if message.topic == "/imu")
    messages[place] = replace(messages[place], data=messages[place].data[:20])
    write_bag(tmp_path / "damaged", types_of, messages)
    replay(tmp_path / "damaged", tmp_path / "out", parameters={"use_imu": True})
    assert any("1 messages on /imu" in text for text in read_run(tmp_path / "out").facts["warnings"])


def imu_bag(path: Path, rate: float) -> Path:
    """Images that move by 8 pixels, and a gyroscope that says how fast the camera turns about y, rad/s."""
    types = TYPES.types
    vector, quaternion = types["geometry_msgs/msg/Vector3"], types["geometry_msgs/msg/Quaternion"]
    messages = []
    for i in range(-2, 60):
        stamp = START + i * STEP // 5
        imu = types[IMU](
            header(stamp),
            quaternion(0, 0, 0, 1),
            np.zeros(9),
            vector(0, rate, 0),
            np.zeros(9),
            vector(0, 0, 0),
            np.zeros(9),
        )
        messages.append(BagMessage("/imu", stamp + 3 * STEP, serialized(imu, IMU)))  # recorded late
    shifted = [jpeg(START + i * STEP, picture(8 * i)) for i in range(8)]
    messages += [BagMessage("/eye/image", START + i * STEP, data) for i, data in enumerate(shifted)]
    messages += [BagMessage("/eye/camera_info", START, info(START))]
    types_of = {"/imu": IMU, "/eye/image": COMPRESSED_IMAGE, "/eye/camera_info": CAMERA_INFO}
    write_bag(path, types_of, sorted(messages, key=lambda message: message.log_time))
    return path


@pytest.mark.parametrize("use", [True, False])
def test_the_gyroscope_is_used_where_the_parameters_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: bool
) -> None:
    rate = 0.5
    given = []

    def process(self: Frontend, *args: Any, rotation: np.ndarray | None, **options: Any) -> Any:
        given.append(rotation)
        return original(self, *args, rotation=rotation, **options)

    original = Frontend.process
    monkeypatch.setattr(Frontend, "process", process)
    replay(imu_bag(tmp_path / "bag", rate), tmp_path / "out", parameters={"use_imu": use})
    assert len(given) == 8 and given[0] is None
    if not use:
        assert given == [None] * 8
        return
    angle = rate * STEP * 1e-9
    turn = [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
    for rotation in given[1:]:
        np.testing.assert_allclose(rotation, turn, atol=1e-9)


def test_a_mask_file_hides_points(short_bag: Path, tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, WIDTH // 2 :] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    replay(short_bag, tmp_path / "out", parameters={"mask_files": [str(tmp_path / "mask.png")]}, frames=3)
    assert all(frame.keypoints[:, 0].min() >= WIDTH // 2 - 0.5 for frame in read_run(tmp_path / "out").frames)


# -- the command -------------------------------------------------------------------------------------------------------


def command(*words: Any) -> int:
    return main(["replay", *map(str, words)])


def test_the_command(short_bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "frontend.yaml"
    config.write_text("/**:\n  ros__parameters:\n    max_keypoints: 80\n    grid: 2\n")
    words = (
        short_bag,
        "--out",
        tmp_path / "run",
        "--method",
        "orb",
        "--config",
        config,
        "-p",
        "grid:=3",
        "--no-report",
    )
    assert command(*words, "--frames", 6) == 0
    captured = capsys.readouterr()
    assert "images: /eye/image, the only image topic" in captured.err and "processed" in captured.out
    settings = read_run(tmp_path / "run").facts["settings"]
    assert (settings["max_keypoints"], settings["grid"]) == (80, 3)
    assert command(*words, "--frames", 6, "--fail-if", "inlier_ratio<2", "--json", tmp_path / "all.json") == 1
    assert (tmp_path / "all.json").exists()
    assert command(*words, "--frames", 7) == 2
    assert "window.frames was 6 and is now 7" in capsys.readouterr().err
    assert command(*words, "--frames", 7, "--json", tmp_path / "all.json") == 2
    assert "window.frames was 6 and is now 7" in (tmp_path / "all.json").read_text()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--set", "max_keypoint=3"], "did you mean 'max_keypoints'"),
        (["--set", "grid=none"], "grid"),
        (["--camera", "left"], r"expected a camera of the parameters \(camera\), found 'left'"),
        (["--method", "shift"], "expected a method of sift"),
        (["--start", "3", "--stop", "2"], "0 <= start < stop"),
        (["--ground-truth", "nowhere.txt"], "nowhere.txt"),
        (["--camera-info", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_options_are_named(
    short_bag: Path, tmp_path: Path, words: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(short_bag, "--out", tmp_path / "out", *words) == 2
    assert re.search(found, capsys.readouterr().err)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        command("--help")
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert "scfeat replay my_bag --method sift" in text and "--ground-truth" in text and "--workers" in text


def test_no_room_for_the_outputs_is_said_and_the_run_goes_on_when_there_is(
    short_bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (short_bag, "--out", tmp_path / "out", "--method", "orb", "--no-report")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert command(*words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "scfeat replay: error: expected to write" in said and "File too large; free space" in said
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert command(*words) == 0
    assert len(read_run(tmp_path / "out").frames) == 12


def test_a_disk_that_runs_full_at_the_report_keeps_all_else(
    short_bag: Path, tmp_path: Path, small_disk: Callable[..., list[str]]
) -> None:
    """The report is not begun, and the next command makes it; nor does a batch take the run for complete."""
    given, out, saved = tmp_path / "given", tmp_path / "out", tmp_path / "saved"
    replay(short_bag, given)
    out.mkdir()
    pages = sum(-(-file.stat().st_size // 4096) for file in given.iterdir())
    words = ["--method", "orb", "--set", "max_keypoints=150", "--out", out]
    command_line = [sys.executable, "-m", "scfeat_core.cli", "replay", short_bag, *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    full = small_disk(out, 4 * pages + 64, saved, given)
    done = subprocess.run([*full, *command_line], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"scfeat replay: error: expected to write {out / 'report.html'}, found: No space left" in done.stderr
    assert "free space, or choose another folder" in done.stderr and "Traceback" not in done.stderr
    assert {file.name for file in saved.iterdir()} == {file.name for file in given.iterdir()}
    assert read_metrics(saved).summary["processed"] == 11 and len(read_run(saved).frames) == 12
    assert finished(job(short_bag, saved)) is not None and finished(job(short_bag, saved, report=True)) is None
    replay(short_bag, saved, report=True)
    assert (saved / "report.html").exists() and finished(job(short_bag, saved, report=True)) is not None


def test_a_trajectory_that_cannot_be_written_is_an_error(short_bag: Path, tmp_path: Path) -> None:
    """It is not that there is none; a folder in its place stands for whatever keeps it from being written."""
    replay(short_bag, tmp_path / "out")
    (tmp_path / "out" / "trajectory.txt").unlink()
    (tmp_path / "out" / "trajectory.txt").mkdir()
    with pytest.raises(ScfeatError, match="expected to write .*trajectory.txt, found: Is a directory"):
        replay(short_bag, tmp_path / "out")
    assert len(read_run(tmp_path / "out").frames) == 12
    (tmp_path / "out" / "trajectory.txt").rmdir()
    assert replay(short_bag, tmp_path / "out")["processed"] == 11


def test_nothing_of_ros_is_imported(short_bag: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["rclpy"] = None
from scfeat_core.cli import main
words = ["--out", {str(tmp_path / "out")!r}, "--method", "orb", "--frames", "3", "--no-report"]
status = main(["replay", {str(short_bag)!r}, *words])
ros = [name for name in sys.modules if name.split(".")[0] in ("sensor_msgs", "scfeat", "rcl_interfaces")]
sys.exit(str(ros) if ros else status)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- reading ahead -----------------------------------------------------------------------------------------------------


def test_reading_ahead_is_bounded_and_ends_with_its_user() -> None:
    made: list[int] = []

    def endless() -> Any:
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    with read_ahead(endless(), room=3) as items:
        assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
        made_now = len(made)
        assert made_now <= 4 + 3 + 1
    assert threading.active_count() == before


def test_images_that_are_read_ahead_give_the_same(
    short_bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    for name, idle in (("one", False), ("ahead", True)):
        monkeypatch.setattr(Player, "leaves_cores_idle", idle)
        seen = stop_at(3, lambda: threads.append({thread.name for thread in threading.enumerate()}))
        assert run_job(job(short_bag, tmp_path / name), progress=seen)["frames"] == 12
    assert "reader" not in threads[0] and "reader" in threads[1]
    assert files(tmp_path / "one") == files(tmp_path / "ahead")


def test_an_error_of_the_reader_is_raised_where_images_are_taken() -> None:
    def broken() -> Any:
        yield 1
        raise ConfigError("broken")

    with read_ahead(broken()) as items:
        assert next(items) == 1
        with pytest.raises(ConfigError, match="broken"):
            next(items)


def test_a_method_that_cannot_work_is_said_at_the_first_image(
    short_bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As AKAZE, which this OpenCV may not have: an hour of images would end in the same words."""
    (tmp_path / "lost_method.py").write_text(
        "from scfeat_core.errors import ConfigError\ncalls = []\n\n\n"
        "def find(image, count):\n    calls.append(count)\n    raise ConfigError('install it')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="install it"):
        replay(short_bag, tmp_path / "out", method="lost_method:find")
    assert len(sys.modules.pop("lost_method").calls) == 1
    assert replay(short_bag, tmp_path / "out")["processed"] == 11, "the folder is free for another method"


def test_a_file_that_cannot_be_written_takes_no_other_with_it(
    short_bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table goes where there is a folder; continuous integration still gets its JUnit."""
    (tmp_path / "file").write_text("in the way")
    words = (short_bag, "--method", "orb", "--frames", 3, "--no-report", "--out", tmp_path / "run")
    written = ("--table", tmp_path / "file" / "all.csv", "--json", tmp_path / "all.json", "--junit", tmp_path / "j.xml")
    assert command(*words, *written) == 2
    assert "expected to write" in capsys.readouterr().err
    assert json.loads((tmp_path / "all.json").read_text())["runs"] and ElementTree.parse(tmp_path / "j.xml").getroot()


def test_each_method_has_its_own_threshold_unless_one_is_set(short_bag: Path, tmp_path: Path) -> None:
    def cosine(method: str, **parameters: Any) -> float:
        return frontend_config(job(short_bag, tmp_path, method=method, parameters=parameters)).reidentify_cosine

    assert [cosine(method) for method in ("scfeat", "sift", "orb")] == [0.8, 0.65, 0.7]
    assert cosine("orb", reidentify_cosine=0.9) == 0.9
