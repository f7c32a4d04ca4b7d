"""Visual odometry where the motion or the scene is hard: planes, forward motion, turns on the spot."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from scfeat_core.odometry import Odometry, estimate, evaluate
from scfeat_core.replay.records import FrameRecord, GroundTruth
from scfeat_core.types import Camera, Tracks

CAMERA = Camera(np.array([[400.0, 0, 320], [0, 400, 240], [0, 0, 1]]), np.zeros(5), (640, 480))
STEP = 50_000_000  # nanoseconds


def record(index: int, pose: np.ndarray, scene: np.ndarray, rng: np.random.Generator) -> FrameRecord:
    """What a camera at ``pose`` (4, 4) sees of the scene (P, 3), off by 0.3 pixels. Points keep their ids."""
    seen = (scene - pose[:3, 3]) @ pose[:3, :3]
    pixels = seen[:, :2] / np.maximum(seen[:, 2:], 1e-3) * 400 + (320, 240) + rng.normal(0, 0.3, (len(scene), 2))
    visible = (seen[:, 2] > 0.3) & ((pixels >= 0) & (pixels <= (639, 479))).all(1)
    ids = np.flatnonzero(visible).astype(np.uint32) + 1
    points, nothing = pixels[visible].astype(np.float32), np.zeros(0, np.uint32)
    rays = ((points - (320, 240)) / 400).astype(np.float32)
    ones, flags = np.ones(len(ids), np.uint32), np.zeros(len(ids), np.uint8)
    tracks = Tracks(ids, ones, np.arange(len(ids)), points, rays, None, flags, nothing)
    return FrameRecord(index, 10**9 + STEP * index, sequence=index, image_size=(640, 480), tracks=tracks)


def followed(places: np.ndarray, turns: np.ndarray, scene: np.ndarray) -> tuple[Odometry, GroundTruth]:
    """The path that is found for positions (F, 3) and rotation vectors (F, 3), and the true one."""
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (len(places), 1, 1))
    poses[:, :3, 3] = places
    poses[:, :3, :3] = [cv2.Rodrigues(turn)[0] for turn in turns]
    frames = [record(index, pose, scene, rng) for index, pose in enumerate(poses)]
    return estimate(frames, CAMERA), GroundTruth(10**9 + STEP * np.arange(len(places)), poses)


def error(found: Odometry, truth: GroundTruth) -> float:
    pytest.importorskip("evo", reason="evo is not installed: pip install 'scfeat-python[replay]'")
    return evaluate(found, truth).ate_m


def test_a_plane_alone_gives_the_path() -> None:
    x, y = np.meshgrid(np.linspace(-4, 6, 40), np.linspace(-3, 3, 20))
    wall = np.column_stack((x.ravel(), y.ravel(), 4 + 0.2 * x.ravel()))
    along = np.linspace(0, 2, 40)
    found, truth = followed(np.column_stack((along, 0.2 * along**2, 0.3 * along)), np.zeros((40, 3)), wall)
    assert found.initialisations == 1 and found.lost == 0
    assert error(found, truth) < 0.05, "of 2 m"


def test_forward_motion_through_a_corridor() -> None:
    rng = np.random.default_rng(1)
    angle = rng.uniform(0, 2 * np.pi, 3000)
    corridor = np.column_stack((3 * np.cos(angle), 2 * np.sin(angle), rng.uniform(2, 60, 3000)))
    places = np.column_stack((np.zeros((50, 2)), 0.8 * np.arange(50)))
    found, truth = followed(places, np.zeros((50, 3)), corridor)
    assert found.initialisations == 1 and found.tracked.all()
    assert error(found, truth) < 0.4, "of 39 m"


def test_a_turn_on_the_spot_begins_no_other_map() -> None:
    """Sideways, then 70 degrees on the spot, more than the camera sees at once, then sideways again."""
    rng = np.random.default_rng(2)
    around = rng.uniform(-2.5, 2.5, 4000)
    far = rng.uniform(3, 7, 4000)
    scene = np.column_stack((far * np.sin(around), rng.uniform(-3, 3, 4000), far * np.cos(around)))
    still = np.concatenate((np.arange(20), np.full(35, 20), np.arange(20, 45)))
    angle = np.radians(2) * np.clip(np.arange(80) - 20, 0, 35)
    places = np.column_stack((0.05 * still, np.zeros((80, 2))))
    found, _ = followed(places, np.column_stack((0 * angle, angle, 0 * angle)), scene)
    assert found.initialisations == 1 and found.lost == 0
    assert (np.array(found.status)[:20] == "points").all()
    turn = found.poses[10, :3, :3].T @ found.poses[-1, :3, :3]
    assert np.degrees(np.linalg.norm(cv2.Rodrigues(turn)[0])) == pytest.approx(70, abs=1.5)
    held = found.poses[22:54, :3, 3]
    moved = np.linalg.norm(found.poses[20, :3, 3] - found.poses[0, :3, 3])
    assert np.linalg.norm(held - held[0], axis=1).max() < 0.15 * moved, "on the spot"


def test_a_turn_alone_has_no_parallax_and_no_map() -> None:
    rng = np.random.default_rng(3)
    scene = np.column_stack((rng.uniform(-6, 6, (1500, 2)), rng.uniform(3, 6, 1500)))
    turns = np.column_stack((np.zeros(30), np.radians(1) * np.arange(30), np.zeros(30)))
    found, _ = followed(np.zeros((30, 3)), turns, scene)
    assert found.initialisations == 0 and not found.tracked.any()
