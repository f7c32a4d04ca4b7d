"""The example that makes poses of tracks: known motion in, the same motion out; what the soak benchmark concludes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from scfeat.msg import Tracks

from scfeat_core.demo_scene import camera_path
from scfeat_core.errors import ScfeatError

PIXEL = 1 / 500
FRAMES = 40


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def track_pose() -> ModuleType:
    return load(Path(__file__).resolve().parents[2] / "examples" / "track_pose.py")


def poses() -> np.ndarray:
    """(FRAMES, 4, 4) T_world_camera, a hand-held walk at 10 Hz."""
    return camera_path(FRAMES, 10.0)


def frames(noise: float = 0.2 * PIXEL, wrong: float = 0.05) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """ids (T,) and rays (T, 2) float32 of points all over the room; a share of them is wrong in each frame."""
    random = np.random.default_rng(3)
    points = random.uniform((0.5, 3.5, 0.2), (7.5, 6.0, 2.8), (600, 3))
    for pose in poses():
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        rays = local[:, :2] / local[:, 2:] + random.normal(size=(len(points), 2)) * noise
        visible = np.flatnonzero((local[:, 2] > 0.3) & (np.abs(rays) < (0.64, 0.48)).all(axis=1))
        astray = random.random(len(visible)) < wrong
        rays[visible[astray]] += random.uniform(-0.1, 0.1, (astray.sum(), 2))
        yield visible + 1, rays[visible].astype(np.float32)


def in_first_camera() -> np.ndarray:
    """(FRAMES, 4, 4) true T_first_camera."""
    return np.linalg.inv(poses()[0]) @ poses()


def errors(found: dict[int, np.ndarray]) -> tuple[float, float]:
    """Largest error of rotation in degrees, and of position relative to the way so far, after the scale is aligned."""
    truth = in_first_camera()
    numbers = sorted(found)
    positions = np.array([-found[i][:, :3].T @ found[i][:, 3] for i in numbers])
    true = truth[numbers, :3, 3]
    scale = (positions * true).sum() / (positions**2).sum()
    angles = [
        np.degrees(np.arccos(np.clip((np.trace(found[i][:, :3] @ truth[i, :3, :3]) - 1) / 2, -1, 1))) for i in numbers
    ]
    distance = np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum()
    return max(angles), float(np.linalg.norm(scale * positions - true, axis=1).max() / distance)


def test_poses_follow_the_camera(track_pose: ModuleType) -> None:
    odometry = track_pose.Odometry()
    found = {}
    for number, (ids, rays) in enumerate(frames()):
        pose = odometry.update(ids, rays)
        if pose is not None:
            found[number] = pose
    assert len(found) > 0.7 * FRAMES
    rotation, position = errors(found)
    assert rotation < 1.0 and position < 0.03


def test_lost_odometry_begins_anew(track_pose: ModuleType) -> None:
    odometry = track_pose.Odometry()
    sequence = list(frames())
    for ids, rays in sequence:
        odometry.update(ids, rays)
    assert odometry.pose is not None
    assert odometry.update(np.empty(0, np.int64), np.empty((0, 2), np.float32)) is None
    again = [odometry.update(ids + 10_000, rays) for ids, rays in sequence]
    assert again[0] is None and again[-1] is not None


def test_rays_that_are_not_known_are_left_out(track_pose: ModuleType) -> None:
    random = np.random.default_rng(7)
    clean, patchy = track_pose.Odometry(), track_pose.Odometry()
    for ids, rays in frames():
        known = random.random(len(ids)) > 0.1
        holes = np.where(known[:, None], rays, np.float32(np.nan))
        expected, found = clean.update(ids[known], rays[known]), patchy.update(ids, holes)
        assert (expected is None) == (found is None)
        if expected is not None:
            np.testing.assert_array_equal(found, expected)
    assert clean.pose is not None


def test_a_keyframe_without_new_points_is_none_the_worse(track_pose: ModuleType) -> None:
    """The camera sees the same points all the time, as one that looks at a single thing does."""
    sequence = list(frames(wrong=0.0))[:20]
    common = sequence[0][0]
    for ids, _ in sequence:
        common = np.intersect1d(common, ids)
    odometry = track_pose.Odometry()
    for ids, rays in sequence:
        pose = odometry.update(common, rays[np.isin(ids, common)])
    assert len(common) > 50 and pose is not None
    landmarks = len(odometry.map_ids)
    odometry._triangulate(pose, odometry.map_ids[:3], np.zeros((3, 2)), np.zeros((3, 2)))
    assert len(odometry.map_ids) == landmarks


def test_ids_of_another_run_begin_anew(track_pose: ModuleType) -> None:
    odometry = track_pose.Odometry()
    for ids, rays in frames():
        last = odometry.update(ids, rays, "first")
    assert last is not None and odometry.update(ids, rays, "first") is not None
    assert odometry.update(ids, rays, "second") is None
    for ids, rays in frames():
        last = odometry.update(ids, rays, "second")
    assert last is not None


def test_a_camera_that_only_turns_gets_no_map(track_pose: ModuleType) -> None:
    random = np.random.default_rng(5)
    directions = np.column_stack([random.uniform(-0.5, 0.5, (400, 2)), np.ones(400)])
    odometry = track_pose.Odometry()
    for angle in np.radians(np.arange(0, 12, 1.0)):
        turned = directions @ np.array(
            [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
        )
        rays = turned[:, :2] / turned[:, 2:] + random.normal(size=(400, 2)) * 0.2 * PIXEL
        odometry.update(np.arange(400), rays.astype(np.float32))
    assert len(odometry.map_ids) < 100


@pytest.mark.live
def test_example_on_a_live_graph(ros: Any, spawn: Callable[..., Any], repository: Path) -> None:
    process = spawn([sys.executable, repository / "examples" / "track_pose.py", "--ros-args", "-r", "tracks:=t"])
    publisher = ros.create_node("front_end").create_publisher(Tracks, "t", 10)
    sequence = list(frames())
    turns = iter(range(10_000_000))

    def send() -> None:
        turn = next(turns)
        there_and_back = np.abs((turn + FRAMES - 1) % (2 * FRAMES - 2) - FRAMES + 1)
        ids, rays = sequence[int(there_and_back)]
        message = Tracks(ids=array("I", ids.astype(np.uint32)), rays=array("f", rays.ravel()))
        message.session = "run"
        message.header.stamp.sec, message.header.stamp.nanosec = turn // 10, turn % 10 * 100_000_000
        publisher.publish(message)

    ros.pump(send, lambda: process.output.count("position") > 10, period=0.02, timeout=90, what="ten poses")
    assert "Traceback" not in process.output


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return load(Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py")


@pytest.mark.parametrize(
    ("per_hour", "verdict"), [(0.0, "flat"), (5.0, "flat"), (10.0, "undecided"), (60.0, "grows"), (-60.0, "flat")]
)
def test_soak_tells_growing_memory_from_noise(soak: ModuleType, per_hour: float, verdict: str) -> None:
    seconds = np.arange(0, 1800, 10.0)
    warm_up = 80 * (1 - np.exp(-seconds / 20))
    noise = np.random.default_rng(0).normal(size=len(seconds)) * 2
    rss = 400 + warm_up + per_hour * seconds / 3600 + noise / 2
    counts = [{"received": i, "processed": i, "dropped_busy": 0} for i in range(len(seconds))]
    samples = [soak.Sample(*values) for values in zip(seconds, rss, counts, strict=True)]
    args = argparse.Namespace(warm_up=120.0, limit=10.0)
    summary = soak.summarise(args, samples, soak.Heard(latencies=[1.0, 2.0, 3.0]))
    assert summary["verdict"] == verdict
    slope = summary["slope_mb_per_hour"]
    assert slope["low"] < per_hour < slope["high"] and slope["high"] - slope["low"] < 10
    assert summary["frames"]["processed"] == 179 and summary["latency_ms"]["p50"] == 2.0
    assert ("--duration" in soak.table(summary)) == (verdict == "undecided")
    with pytest.raises(ScfeatError, match="--duration"):
        soak.summarise(argparse.Namespace(warm_up=1e9, limit=10.0), samples, soak.Heard())


def test_soak_does_not_take_one_step_for_growth(soak: ModuleType) -> None:
    seconds = np.arange(60.0, 1200, 10)
    growth = soak.slope(seconds, np.where(seconds < 860, 655.0, 659.6))
    assert soak.verdict(growth, 10.0) == "undecided", growth
