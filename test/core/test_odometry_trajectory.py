"""Paths against the truth: exact where they differ by a similarity, and errors of a known size where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("evo", reason="evo is not installed: pip install 'scfeat-python[replay]'")

from scfeat_core.errors import DataError
from scfeat_core.inertial import exponential
from scfeat_core.odometry import Odometry, evaluate
from scfeat_core.odometry.trajectory import write_tum
from scfeat_core.replay.records import GroundTruth
from scfeat_core.replay.tum import read_tum

START = 1_700_000_000_000_000_000
STEP = 50_000_000  # nanoseconds


def path(frames: int = 60, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, 3] = np.cumsum(rng.normal(0, 0.1, (frames, 3)), 0)
    poses[:, :3, :3] = exponential(np.cumsum(rng.normal(0, 0.02, (frames, 3)), 0))
    return poses


def stamps(frames: int = 60) -> np.ndarray:
    return START + np.arange(frames, dtype=np.int64) * STEP


def odometry(poses: np.ndarray, tracked: np.ndarray | None = None) -> Odometry:
    count = len(poses)
    tracked = np.ones(count, bool) if tracked is None else tracked
    return Odometry(stamps(count), poses, tracked, 1, ("points",) * count, np.arange(2))


def moved(poses: np.ndarray, scale: float) -> np.ndarray:
    """The same path in another world, and in another scale."""
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = exponential(np.array([[0.3, -1.2, 0.5]]))[0], (4.0, -2.0, 7.0)
    found = world @ poses
    found[:, :3, 3] *= scale
    return found


def test_a_path_that_differs_by_a_similarity_is_right() -> None:
    scores = evaluate(odometry(moved(path(), 0.25)), GroundTruth(stamps(), path()))
    assert max(scores.ate_m, scores.ate_max_m, scores.rpe_m) < 1e-9 and scores.rpe_deg < 1e-4
    assert scores.scale == pytest.approx(4) and scores.frames == 60 and scores.rpe_step == 20
    assert scores.truth_m == pytest.approx(np.linalg.norm(np.diff(path()[:, :3, 3], axis=0), axis=1).sum())


def test_a_straight_path_is_compared_as_any_other() -> None:
    """A car on a road: the similarity may turn about it as it likes."""
    line = np.tile(np.eye(4), (60, 1, 1))
    line[:, 2, 3] = np.linspace(0, 30, 60) ** 1.1
    scores = evaluate(odometry(moved(line, 0.5)), GroundTruth(stamps(), line))
    assert scores.ate_m < 1e-9 and scores.scale == pytest.approx(2)
    assert scores.rpe_m is not None and scores.rpe_m < 1e-9


def test_errors_have_their_size() -> None:
    """A centimetre to and fro in each position, and a turn of one degree in the second half of the path."""
    poses = path()
    poses[:, :3, 3] += 0.01 * np.where(np.arange(60) % 2, 1, -1)[:, None] / np.sqrt(3)
    poses[30:, :3, :3] = exponential(np.array([[0, 0, np.pi / 180]]))[0] @ poses[30:, :3, :3]
    scores = evaluate(odometry(poses), GroundTruth(stamps(), path()))
    assert scores.ate_m == pytest.approx(0.01, rel=0.05) and scores.ate_median_m == pytest.approx(0.01, rel=0.05)
    assert scores.rpe_m is not None and 0 < scores.rpe_m < 0.03
    assert scores.rpe_deg == pytest.approx(np.sqrt(20 / 40), rel=1e-3), "20 of the 40 motions over 20 frames are off"


def test_frames_without_a_pose_or_a_truth_do_not_count() -> None:
    poses, tracked = path(), np.ones(60, bool)
    poses[10:20] = np.eye(4)
    tracked[10:20] = False
    truth = GroundTruth(stamps()[:50], path()[:50])
    scores = evaluate(odometry(poses, tracked), truth)
    assert scores.frames == 40 and scores.ate_m < 1e-9


def test_the_truth_may_have_other_stamps() -> None:
    between = stamps(61)[:-1] - STEP // 2
    line = np.tile(np.eye(4), (61, 1, 1))
    line[:, 0, 3], line[:, 1, 3] = np.arange(61), np.arange(61) ** 2 / 60
    half = (line[1:] + line[:-1]) / 2
    truth = GroundTruth(stamps(61), line)
    found = replace(odometry(half), stamps=stamps(60) + STEP // 2)
    assert between[0] < truth.stamps[0] and evaluate(found, truth).ate_m < 1e-6


def test_a_path_shorter_than_a_second_has_no_relative_error() -> None:
    scores = evaluate(odometry(path(15)), GroundTruth(stamps(), path()))
    assert scores.rpe_m is None and scores.rpe_deg is None and scores.ate_m < 1e-9
    assert (
        "expected two frames 1 s apart" in scores.rpe_missing
        and "found 15 such frames over 0.70 s" in scores.rpe_missing
    )
    assert evaluate(odometry(path()), GroundTruth(stamps(), path())).rpe_missing == ""


def test_a_motion_over_a_gap_is_none_over_a_second() -> None:
    """Frames 20 apart among those with a pose are 25 apart in time, and more, where frames between them have none."""
    poses, tracked = path(), np.ones(60, bool)
    tracked[15:45] = False
    poses[45:, :3, 3] += 1.0  # the path after the gap is shifted: no motion within a part is wrong by that
    scores = evaluate(odometry(poses, tracked), GroundTruth(stamps(), path()))
    assert scores.rpe_m is None and "30 such frames" in scores.rpe_missing


@pytest.mark.parametrize(
    ("poses", "tracked", "truth", "words"),
    [
        (path(), np.zeros(60, bool), GroundTruth(stamps(), path()), "no frame with a pose"),
        (path(), None, GroundTruth(stamps() + 10**12, path()), "are the clocks the same"),
        (path(), None, GroundTruth(np.zeros(0, np.int64), np.zeros((0, 4, 4))), "it covers nothing"),
        (np.tile(np.eye(4), (60, 1, 1)), None, GroundTruth(stamps(), path()), "a path without any"),
        (path(), None, GroundTruth(stamps(), moved(path(), 1e-4)), "a truth that moves by .* mm only"),
        (path(), None, GroundTruth(stamps(), np.tile(np.eye(4), (60, 1, 1))), "a truth that moves by 0 mm only"),
    ],
)
def test_what_cannot_be_compared_is_said(poses, tracked, truth, words) -> None:
    with pytest.raises(DataError, match=words):
        evaluate(odometry(poses, tracked), truth)


def test_files_hold_what_was_tracked(tmp_path: Path) -> None:
    tracked = np.arange(60) % 3 > 0
    write_tum(tmp_path / "trajectory.txt", odometry(path(), tracked))
    found, poses = read_tum(tmp_path / "trajectory.txt")
    np.testing.assert_array_equal(found, stamps()[tracked])
    np.testing.assert_allclose(poses, path()[tracked], atol=1e-8)
