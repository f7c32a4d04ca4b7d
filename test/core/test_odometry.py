"""The path of a camera from nothing but published tracks: exact scenes, and what may go wrong in real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scfeat_core.errors import CalibrationError
from scfeat_core.odometry import Odometry, estimate, evaluate
from scfeat_core.replay.records import FrameRecord, Recording

Make = Callable[..., Recording]


def error(found: Odometry, recording: Recording) -> float:
    """Metres, after the best similarity."""
    pytest.importorskip("evo", reason="evo is not installed: pip install 'scfeat-python[replay]'")
    assert recording.truth is not None
    return evaluate(found, recording.truth).ate_m


def noisy(frame: FrameRecord, rng: np.random.Generator, wrong: float) -> FrameRecord:
    """Its tracks off by half a pixel, and a share of them anywhere in the image."""
    tracks = frame.tracks
    assert tracks is not None
    points = tracks.keypoints + rng.normal(0, 0.5, tracks.keypoints.shape).astype(np.float32)
    bad = rng.random(len(points)) < wrong
    points[bad] = rng.uniform((0, 0), (319, 239), (bad.sum(), 2))
    return replace(frame, tracks=replace(tracks, keypoints=points))


@pytest.mark.parametrize("turn", [0.0, 0.01])
def test_an_exact_scene_gives_the_path(make_recording: Make, turn: float) -> None:
    recording = make_recording(40, turn=turn, outliers=0.0)
    found = estimate(recording.frames, recording.camera)
    assert found.tracked.all() and found.initialisations == 1 and found.lost == 0
    assert found.stamps.tolist() == [frame.stamp for frame in recording.frames]
    assert error(found, recording) < 1e-3, "of 2 m"


def test_noise_and_wrong_tracks_are_borne(make_recording: Make) -> None:
    recording = make_recording(40, points=200, outliers=0.0)
    rng = np.random.default_rng(0)
    frames = [noisy(frame, rng, 0.15) for frame in recording.frames]
    found = estimate(frames, recording.camera)
    assert found.tracked.all() and found.initialisations == 1
    assert error(found, recording) < 0.05, "of 2 m"


def test_equal_tracks_give_equal_paths(make_recording: Make) -> None:
    recording = make_recording(20, outliers=0.0)
    rng = np.random.default_rng(0)
    frames = [noisy(frame, rng, 0.1) for frame in recording.frames]
    first, second = (estimate(frames, recording.camera) for _ in range(2))
    np.testing.assert_array_equal(first.poses, second.poses)


def test_a_camera_that_does_not_move_has_no_path(make_recording: Make) -> None:
    recording = make_recording(15, step=0.0, outliers=0.0)
    found = estimate(recording.frames, recording.camera)
    assert found.initialisations == 0 and found.lost == 15 and not found.tracked.any()


def test_all_tracks_lost_in_the_middle_begin_another_map(make_recording: Make) -> None:
    recording = make_recording(60, outliers=0.0)
    frames = list(recording.frames)
    for i in range(30, 60):
        tracks = frames[i].tracks
        assert tracks is not None
        frames[i] = replace(frames[i], tracks=replace(tracks, ids=tracks.ids + np.uint32(10_000)))
    found = estimate(frames, recording.camera)
    assert found.initialisations == 2


def test_unknown_rays_and_dropped_frames_are_left_out(make_recording: Make) -> None:
    recording = make_recording(40, outliers=0.0, dropped={7: "decode", 20: "stale"})
    frames = []
    for frame in recording.frames:
        if frame.tracks is not None:
            rays = ((frame.tracks.keypoints - (160, 120)) / 300).astype(np.float32)
            rays[frame.tracks.ids % 5 == 0] = np.nan
            frame = replace(frame, tracks=replace(frame.tracks, rays=rays))
        frames.append(frame)
    found = estimate(frames, recording.camera)
    assert len(found.stamps) == 38 and found.tracked.all() and np.isfinite(found.poses).all()
    assert error(found, recording) < 0.02, "of 2 m"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_frames(make_recording: Make, count: int) -> None:
    recording = make_recording(4, outliers=0.0)
    found = estimate(recording.frames[:count], recording.camera)
    assert len(found.stamps) == len(found.poses) == len(found.status) == count


def test_without_a_calibration_it_says_so(make_recording: Make) -> None:
    recording = make_recording(4, calibrated=False)
    with pytest.raises(CalibrationError, match="needs the intrinsics"):
        estimate(recording.frames, recording.camera)


def test_a_real_recording_is_followed_from_end_to_end(shared_data: Path, tmp_path: Path) -> None:
    """The first two seconds of a take-off of EuRoC."""
    pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[replay]'")
    pytest.importorskip("evo", reason="evo is not installed: pip install 'scfeat-python[replay]'")
    from scfeat_core.cli import main
    from scfeat_core.replay.metrics import read_metrics

    bag = shared_data / "bag" / "euroc_v101"
    words = ["replay", str(bag), "--out", str(tmp_path / "run"), "--frames", "40", "--method", "orb", "--no-report"]
    assert main([*words, "--no-progress"]) == 0
    summary = read_metrics(tmp_path / "run").summary
    assert summary["lost"] == 0 and summary["initialisations"] == 1
    assert summary["ate_m"] < 0.03, "of 1.4 m"
