"""The path of a camera from nothing but published tracks: exact scenes, and what may go wrong in real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scfeat_core.errors import CalibrationError
from scfeat_core.inertial import exponential
from scfeat_core.odometry import Odometry, estimate, estimation, evaluate, initialising
from scfeat_core.odometry.initialising import Beginning
from scfeat_core.odometry.observations import Observations, observations
from scfeat_core.odometry.solving import Bundle, adjust
from scfeat_core.replay.records import FrameRecord, Recording
from scfeat_core.types import Camera, Tracks

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


def test_frames_before_the_first_map_are_placed_by_its_points(make_recording: Make) -> None:
    """The first five see too little for a map to begin with them."""
    recording = make_recording(30, outliers=0.0)
    names = ("ids", "ages", "indices", "keypoints", "flags")
    frames = list(recording.frames)
    for i in range(5):
        tracks = frames[i].tracks
        assert tracks is not None
        frames[i] = replace(frames[i], tracks=replace(tracks, **{name: getattr(tracks, name)[:30] for name in names}))
    found = estimate(frames, recording.camera)
    assert found.status == ("points",) * 30
    assert error(found, recording) < 0.005, "of 1.5 m"


@pytest.mark.parametrize("wrong", [(0, 1), (0, 1, 2), (1, 3), ()])
def test_the_first_map_is_one_that_later_frames_agree_with(
    make_recording: Make, monkeypatch: pytest.MonkeyPatch, wrong: tuple[int, ...]
) -> None:
    """Two frames with little parallax may agree with a motion that is not the true one, too."""
    recording = make_recording(40, points=200, outliers=0.0)
    rng = np.random.default_rng(0)
    frames = [noisy(frame, rng, 0.0) for frame in recording.frames]
    made: list[Beginning] = []

    def begin(observed: Observations, earliest: int, frame: int) -> Beginning | None:
        start = initialising.begin(observed, earliest, frame)
        if start is not None:
            if len(made) in wrong:  # forwards instead of sideways, and a turn that explains most of what was seen
                along = np.linspace(0, 0.1, len(start.frames))[:, None] * (0, 0, 1)
                turns = exponential(np.linspace(0, 0.02, len(start.frames))[:, None] * (0, 1, 0))
                start = replace(start, translations=along, rotations=turns)
            made.append(start)
        return start

    monkeypatch.setattr(estimation, "begin", begin)
    path = estimation._Path(observations(frames, recording.camera), True)
    first = path._first()
    assert len(made) == 4
    assert [start is first for start in made].index(True) not in wrong


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


def seen(index: int, rays: np.ndarray, ids: np.ndarray | None = None, stamp: int | None = None) -> FrameRecord:
    """A frame with these rays (N, 2) of points 0..N-1, or of ``ids``."""
    count, nothing = len(rays), np.zeros(0, np.uint32)
    ids = np.arange(count) if ids is None else ids
    pixels, flags = np.zeros((count, 2), np.float32), np.zeros(count, np.uint8)
    ones = np.ones(count, np.uint32)
    tracks = Tracks(
        ids.astype(np.uint32), ones, np.arange(count), pixels, rays.astype(np.float32), None, flags, nothing
    )
    stamp = 10**9 + 50_000_000 * index if stamp is None else stamp
    return FrameRecord(index, stamp, sequence=index, image_size=(640, 480), tracks=tracks)


def degenerate() -> dict[str, tuple[int, list[FrameRecord]]]:
    """Tracks that no camera should give, and how many maps there are in them."""
    rng = np.random.default_rng(0)
    scene = np.column_stack((rng.uniform(-3, 3, (150, 2)), rng.uniform(3, 6, 150)))

    def rays(i: int, points: np.ndarray = scene) -> np.ndarray:
        moved = points - np.array([0.05 * i, 0.002 * i * i, 0]) * abs(points).max() / 6
        return np.asarray(moved[:, :2] / moved[:, 2:])

    noise = [rng.normal(0, 1, (200, 2)) for _ in range(20)]
    line = np.column_stack((np.linspace(-2, 2, 100), np.zeros(100), np.full(100, 4.0)))
    wrong = np.arange(150)[:, None] < 60
    good = [rays(i) for i in range(22)]
    gap = range(13, 16)
    return {
        "one ray": (0, [seen(i, np.tile([0.1, 0.1 * i], (100, 1))) for i in range(20)]),
        "a line": (0, [seen(i, rays(i, line)) for i in range(20)]),
        "noise": (0, [seen(i, noise[i]) for i in range(20)]),
        "rays of any size": (0, [seen(i, noise[i] * 10.0 ** rng.integers(0, 30, (200, 1))) for i in range(20)]),
        "tracks of one frame": (0, [seen(i, noise[i], 1000 * i + np.arange(200)) for i in range(20)]),
        "a scene at infinity": (0, [seen(i, rays(0) + 1e-9 * i) for i in range(20)]),
        "hardly any points": (0, [seen(i, good[i][:20]) for i in range(22)]),
        "a scene of a micrometre": (1, [seen(i, rays(i, 1e-6 * scene)) for i in range(22)]),
        "empty frames": (1, [seen(i, good[i][: 0 if i in gap else None]) for i in range(22)]),
        "unknown rays": (1, [seen(i, good[i] * (np.nan if i in gap else 1)) for i in range(22)]),
        "it stops": (1, [seen(i, good[min(i, 12)]) for i in range(22)]),
        "much of it wrong": (1, [seen(i, np.where(wrong, rng.normal(0, 0.5, (150, 2)), good[i])) for i in range(22)]),
        "one stamp": (1, [seen(i, good[i], stamp=10**9) for i in range(22)]),
        "stamps backwards": (1, [seen(i, good[i], stamp=10**12 - i) for i in range(22)]),
        "ids twice": (1, [seen(i, good[i], np.arange(150) // 2) for i in range(22)]),
    }


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.filterwarnings("error")
def test_tracks_that_no_camera_should_give(name: str) -> None:
    """Neither an exception nor a warning of numpy, nor a pose that is none."""
    maps, frames = degenerate()[name]
    found = estimate(frames, Camera(np.diag([400.0, 400.0, 1.0]) + np.eye(3, k=2) * 320, np.zeros(5), (640, 480)))
    assert found.initialisations == maps and np.isfinite(found.poses).all()
    turns = found.poses[:, :3, :3]
    np.testing.assert_allclose(turns @ turns.swapaxes(1, 2), np.tile(np.eye(3), (len(turns), 1, 1)), atol=1e-9)
    assert maps or not found.tracked.any()


def test_a_long_map_is_adjusted_in_parts(make_recording: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose equations do not grow with its length; each part goes on from the one before."""
    recording = make_recording(60, outliers=0.0)
    rng = np.random.default_rng(0)
    frames = [noisy(frame, rng, 0.0) for frame in recording.frames]
    whole = estimate(frames, recording.camera)
    sizes: list[int] = []

    def watched(bundle: Bundle, fixed: np.ndarray, sigma: float, iterations: int) -> Bundle:
        sizes.append(len(bundle.rotations))
        return adjust(bundle, fixed, sigma, iterations)

    monkeypatch.setattr(estimation, "adjust", watched)
    monkeypatch.setattr(estimation, "_WHOLE", 8)
    parts = estimate(frames, recording.camera)
    assert len(whole.keyframes) > 16 and max(sizes) <= 20
    assert error(parts, recording) < max(2 * error(whole, recording), 0.01), "of 3 m"
    spans = [(*held[:1], free[0], free[-1] + 1) for held, free in estimation._parts(range(30))]
    assert spans == [(0, 8), (0, 4, 12), (0, 8, 16), (0, 12, 20), (4, 16, 24), (8, 20, 28), (10, 22, 30)]


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
