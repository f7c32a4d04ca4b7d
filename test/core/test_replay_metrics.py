from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core.errors import DataError
from scfeat_core.geometry import undistort_points
from scfeat_core.quality import BLURRED
from scfeat_core.replay import verdicts
from scfeat_core.replay.figures import FIGURES, SUMMARY_NAMES, is_timed, shown
from scfeat_core.replay.metrics import FILE, NO_TRUTH, WEAK_INLIERS, read_metrics, summarise, write_metrics
from scfeat_core.replay.records import FrameRecord, GroundTruth, Recording
from scfeat_core.replay.survival import kaplan_meier, lives, survival
from scfeat_core.replay.truth import poses_at, repeatability, reprojected
from scfeat_core.types import Camera, GeometryModel, Matches, TrackFlag, Tracks, TwoViewGeometry

Lazily = Callable[[Sequence[FrameRecord]], Any]


def strictly(path: Path) -> Any:
    """JSON as the standard has it: without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def unmatched(frame: FrameRecord) -> FrameRecord:
    """Nothing of it was like anything in the frame before."""
    pair = frame.pair
    assert pair is not None and pair.geometry is not None
    none, index = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    nothing = replace(pair.geometry, model=GeometryModel.NONE, inliers=np.zeros(0, bool))
    matches = Matches(index, index, none[:, 0])
    return replace(frame, pair=replace(pair, matches=matches, keypoints0=none, keypoints1=none, geometry=nothing))


class TestFrames:
    def test_figures_of_exact_matches(self, make_recording: Callable[..., Recording]) -> None:
        found = summarise(make_recording(12, points=120, outliers=0.25))
        assert {name: found.summary[name] for name in ("frames", "processed", "keypoints", "matches", "inliers")} == {
            "frames": 12,
            "processed": 12,
            "keypoints": 120,
            "matches": 120,
            "inliers": 90,
        }
        assert found.summary["inlier_ratio"] == 0.75 and found.summary["weak_frames"] == 0
        assert found.summary["rate_hz"] == 20 and found.summary["duration_s"] == 0.55
        assert found.summary["epipolar_px"] < 1e-3 and found.summary["epipolar_truth_px"] < 1e-3
        assert found.summary["off_truth"] == 0
        assert np.isnan(found.per_frame["inliers"][0]), "the first frame has no predecessor"
        assert np.allclose(found.per_frame["flow_px"][1:], found.per_frame["flow_px"][1], atol=0.2)

    @pytest.mark.parametrize("calibrated", [True, False])
    def test_residuals_are_in_pixels(self, make_recording: Callable[..., Recording], calibrated: bool) -> None:
        """The camera moves along x: epipolar lines are rows, and a point that is 4 pixels lower is 4 pixels off."""
        found = summarise(make_recording(6, off=4.0, calibrated=calibrated))
        assert found.summary["epipolar_px"] == pytest.approx(4, abs=1e-3)
        assert found.summary["epipolar_truth_px"] == (pytest.approx(4, abs=1e-3) if calibrated else None)
        assert found.summary["off_truth"] == (1.0 if calibrated else None)

    def test_homographies_have_a_transfer_error(self, make_recording: Callable[..., Recording]) -> None:
        recording = make_recording(4, calibrated=False)
        shift = np.array([[1, 0, 3.0], [0, 1, 4.0], [0, 0, 1]])
        frames = [
            frame
            if (pair := frame.pair) is None
            else replace(
                frame,
                pair=replace(
                    pair,
                    keypoints1=pair.keypoints0,
                    geometry=TwoViewGeometry(GeometryModel.HOMOGRAPHY, shift, np.ones(120, bool), 1.0),
                ),
            )
            for frame in recording.frames
        ]
        found = summarise(replace(recording, frames=frames))
        assert found.summary["transfer_px"] == pytest.approx(5)
        assert found.summary["epipolar_px"] is None
        assert found.summary["homography_share"] == 1

    def test_a_camera_that_stands_has_no_epipolar_lines(self, make_recording: Callable[..., Recording]) -> None:
        assert summarise(make_recording(4, step=0.001)).summary["epipolar_truth_px"] is None

    def test_images_of_another_size_are_not_undistorted_by_this_camera(
        self, make_recording: Callable[..., Recording]
    ) -> None:
        recording = make_recording(6)
        frames = [replace(f, image_size=(640, 480)) if f.index >= 3 else f for f in recording.frames]
        found = summarise(replace(recording, frames=frames)).per_frame
        for name in ("epipolar_px", "epipolar_truth_px"):
            assert np.isfinite(found[name]).tolist() == [False, True, True, False, False, False]

    def test_no_more_than_two_frames_are_held(self, make_recording: Callable[..., Recording], lazily: Lazily) -> None:
        """An hour of records is ten gigabytes."""
        recording = make_recording(40)
        frames = lazily(recording.frames)
        found = summarise(replace(recording, frames=frames))
        assert found.summary == summarise(recording).summary
        assert frames.most <= 3

    def test_what_is_not_there_is_not_made_up(self, make_recording: Callable[..., Recording]) -> None:
        bare = summarise(make_recording(4, truth=False, verified=False)).summary
        unknown = (
            "inliers",
            "inlier_ratio",
            "weak_frames",
            "epipolar_px",
            "epipolar_truth_px",
            "repeatability",
            "ate_m",
        )
        assert [bare[name] for name in unknown] == [None] * len(unknown)
        assert bare["matches"] == 120

    def test_dropped_frames_and_resets_are_counted(self, make_recording: Callable[..., Recording]) -> None:
        recording = make_recording(10, dropped={2: "decode", 3: "decode", 7: "stale"})
        frames = [replace(f, reset_reason="a clock was set") if f.index == 5 else f for f in recording.frames]
        found = summarise(replace(recording, frames=frames))
        assert [found.summary[name] for name in ("frames", "processed", "dropped", "resets")] == [10, 7, 3, 1]
        assert [found.summary[f"dropped_{why}"] for why in ("decode", "stale", "error")] == [2, 1, 0]
        assert np.flatnonzero(np.isnan(found.per_frame["keypoints"])).tolist() == [2, 3, 7]
        assert found.resets == {5: "a clock was set"}

    def test_frames_without_matches_have_no_inliers(self, make_recording: Callable[..., Recording]) -> None:
        """They are not unknown: half of them take the weakest 5 % to nothing, and the median with it."""
        recording = make_recording(13)
        frames = [unmatched(frame) if frame.index > 6 else frame for frame in recording.frames]
        found = summarise(replace(recording, frames=frames)).summary
        assert found["inlier_ratio_p5"] == 0 and found["inlier_ratio"] == 0.375 and found["weak_frames"] == 6

    def test_dropped_frames_are_not_fast_ones(self, make_recording: Callable[..., Recording]) -> None:
        recording = make_recording(9, dropped={1: "stale", 3: "stale", 4: "decode", 6: "stale", 8: "stale"})
        frames = [
            replace(frame, timings={"read": 1.0} if frame.dropped else {"read": 1.0, "network": 8.0, "track": 3.0})
            for frame in recording.frames
        ]
        found = summarise(replace(recording, frames=frames))
        assert [found.summary[name] for name in ("ms_total", "ms_total_p95", "ms_overhead", "fps")] == [
            *(12, 12, 4),
            pytest.approx(1000 / 12, abs=0.01),
        ]
        assert np.isfinite(found.per_frame["ms_read"]).all()

    @pytest.mark.parametrize("frames", [0, 1])
    def test_next_to_nothing(self, make_recording: Callable[..., Recording], tmp_path: Path, frames: int) -> None:
        found = summarise(make_recording(frames))
        assert found.summary["frames"] == frames and found.summary["inliers"] is None
        write_metrics(tmp_path, found)
        assert read_metrics(tmp_path).summary == found.summary

    def test_nothing_but_drops(self) -> None:
        frames = [FrameRecord(i, i, "decode", "no image") for i in range(3)]
        assert summarise(Recording({}, frames)).summary["dropped"] == 3


class TestTruth:
    def test_poses_are_interpolated_between_near_ones(self) -> None:
        poses = np.tile(np.eye(4), (2, 1, 1))
        poses[1, :3, :3] = cv2.Rodrigues(np.array([0.0, 0.04, 0.0]))[0]
        poses[1, :3, 3] = 1, 2, 4
        truth = GroundTruth(np.array([0, 40_000_000]), poses)
        found = poses_at(truth, np.array([0, 10_000_000, 20_000_000, 40_000_000]))
        np.testing.assert_array_equal(found[[0, 3]], poses)
        np.testing.assert_allclose(found[:, 0, 3], [0, 0.25, 0.5, 1])
        angles = np.arctan2(found[:, 0, 2], found[:, 0, 0])
        np.testing.assert_allclose(angles, [0, 0.01, 0.02, 0.04], atol=1e-5)

    def test_beyond_that_only_the_nearest_counts(self) -> None:
        truth = GroundTruth(np.array([0, 10**9]), np.stack([np.eye(4), 2 * np.eye(4)]))
        found = poses_at(truth, np.array([-20_000_000, -9_000_000, 9_000_000, 500_000_000, 995_000_000, 2 * 10**9]))
        known = np.isfinite(found).all((1, 2))
        assert known.tolist() == [False, True, True, False, True, False]
        assert found[known][:, 0, 0].tolist() == [1, 1, 2]
        assert np.isnan(poses_at(GroundTruth(np.zeros(0, np.int64), np.zeros((0, 4, 4))), np.zeros(2, np.int64))).all()

    def test_repeatability_where_the_camera_only_turned(self, make_recording: Callable[..., Recording]) -> None:
        recording = make_recording(5, step=0.0, turn=0.004)
        assert summarise(recording).summary["repeatability"] == 1.0
        half = [replace(f, keypoints=f.keypoints[: 120 >> f.index % 2]) for f in recording.frames]
        found = summarise(replace(recording, frames=half)).summary["repeatability"]
        assert 120 / 180 <= found < 130 / 180, "60 of 120 and 60 of 60, and some that have others nearby"
        unknown = summarise(make_recording(5, step=0.05))
        assert unknown.summary["repeatability"] is None, "depth is not known"
        assert unknown.missing["repeatability"].endswith("depth is not known")


def motion_between(views: Any, i: int, j: int) -> np.ndarray:
    """T_j_i."""
    first, second = np.tile(np.eye(4), (2, 1, 1))
    first[:3, :3], first[:3, 3] = views.R[i], views.t[i]
    second[:3, :3], second[:3, 3] = views.R[j], views.t[j]
    return second @ np.linalg.inv(first)


class TestDepth:
    """The rendered views know where each of their points is in all of them, and where it is hidden."""

    @pytest.fixture
    def camera(self, rendered_views: Any) -> Camera:
        return Camera(rendered_views.K, np.zeros(5), (320, 240))

    @pytest.mark.parametrize(("i", "j"), [(3, 4), (3, 2), (2, 3), (5, 3)])
    @pytest.mark.parametrize("scale", [1, 2])
    def test_points_are_where_their_depth_takes_them(
        self, rendered_views: Any, camera: Camera, i: int, j: int, scale: int
    ) -> None:
        """A map of half the size has the depth of a pixel half a pixel away, also where that is over an edge."""
        views = rendered_views
        xy, depths = views.xy[i][views.seen[i]], [views.depths[n][::scale, ::scale] for n in (i, j)]
        motion = motion_between(views, i, j)
        found = reprojected(xy, undistort_points(xy, camera), *depths, camera, motion)
        known = np.isfinite(found).all(1)
        true, seen = views.xy[j][views.seen[i]], views.seen[j][views.seen[i]]
        inside = ((true >= 0) & (true <= (319, 239))).all(1)
        assert known[seen].mean() > 0.85 and known[inside & ~seen].sum() <= scale - 1, "none that is hidden"
        assert inside[known].mean() > 0.97, "out of view by half a pixel at most"
        assert np.linalg.norm(found - true, axis=1)[known].max() < 0.5 * scale
        assert np.median(np.linalg.norm(xy - true, axis=1)[known]) > 5, "they do move"

    def test_repeatability_counts_what_both_can_see(self, rendered_views: Any, camera: Camera) -> None:
        views, motion = rendered_views, motion_between(rendered_views, 3, 4)
        frames = [
            FrameRecord(i, i, image_size=(320, 240), keypoints=views.xy[i][views.seen[i]].astype(np.float32))
            for i in (3, 4)
        ]
        depth_at = {3: views.depths[3], 4: views.depths[4]}.get
        assert repeatability(*frames, camera, motion, depth_at) > 0.97
        moved = replace(frames[1], keypoints=frames[1].keypoints[::2])
        half = repeatability(frames[0], moved, camera, motion, depth_at)
        assert 0.6 < half < 0.8, "half of those of the first, all of the second, and neighbours"
        assert np.isnan(repeatability(*frames, camera, motion, {3: views.depths[3]}.get)), "one map does not do"
        empty = np.full((240, 320), np.nan, np.float32)
        assert np.isnan(repeatability(*frames, camera, motion, lambda stamp: empty))
        assert np.isnan(repeatability(*frames, camera, np.full((4, 4), np.nan), depth_at))

    def test_depth_is_asked_for_in_the_order_of_frames(self, make_recording: Callable[..., Recording]) -> None:
        """A reader of a bag reads forwards."""
        asked: list[int] = []

        def depth_at(stamp: int) -> None:
            asked.append(stamp)

        found = summarise(make_recording(6, step=0.05), depth_at=depth_at)
        assert asked == sorted(asked) and len(set(asked)) == 6
        assert found.missing["repeatability"].endswith("depth is not known where two of them show the same")


def tracks_of(
    lifetimes: list[tuple[int, int]], count: int, gap: int, epoch: int = 0, low: int = 1
) -> list[FrameRecord]:
    """Frames in which track i is seen from lifetimes[i][0] to [1], and said to have ended ``gap`` frames after that."""
    frames = []
    for i in range(count):
        ids = np.array([low + t for t, (a, b) in enumerate(lifetimes) if a <= i <= b], np.uint32)
        lost = np.array([low + t for t, (_, b) in enumerate(lifetimes) if b + gap + 1 == i], np.uint32)
        points = np.zeros((len(ids), 2), np.float32)
        flags = np.zeros(len(ids), np.uint8)
        tracks = Tracks(ids, ids, np.arange(len(ids)), points, None, None, flags, lost, epoch)
        frames.append(FrameRecord(i, i, sequence=i, tracks=tracks))
    return frames


def _found_again(frame: FrameRecord, count: int) -> FrameRecord:
    """With the tracks 1, 3, … below ``count``, too, which were lost before frame 5."""
    assert frame.tracks is not None
    ids = np.arange(1, count + 1, dtype=np.uint32)
    flags = np.where((ids % 2 == 1) & (frame.index == 5), int(TrackFlag.REIDENTIFIED), 0).astype(np.uint8)
    points = np.zeros((count, 2), np.float32)
    return replace(frame, tracks=Tracks(ids, ids, ids.astype(np.int64) - 1, points, None, None, flags, ids[:0]))


class TestReturns:
    """Half of the points are not seen in frames 4 to 6, and found again in the 7th."""

    @staticmethod
    def gone(recording: Recording, wrong: int = 0, sequence: int = 7) -> Recording:
        """wrong: of those that are found again are points of others."""

        def hidden(frame: FrameRecord) -> FrameRecord:
            tracks = frame.tracks
            assert tracks is not None
            if 4 <= frame.index < sequence:
                rows = slice(1, None, 2)
                left = {name: getattr(tracks, name)[rows] for name in ("ids", "ages", "indices", "keypoints", "flags")}
                return replace(frame, tracks=replace(tracks, **left))
            if frame.index != sequence:
                return frame
            flags, points = tracks.flags.copy(), tracks.keypoints.copy()
            flags[::2] = int(TrackFlag.REIDENTIFIED)
            points[: 2 * wrong : 2, 1] += 40
            return replace(frame, tracks=replace(tracks, flags=flags, keypoints=points))

        return replace(recording, frames=[frame if frame.dropped else hidden(frame) for frame in recording.frames])

    @pytest.mark.parametrize("dropped", [{}, {5: "decode"}, {9: "decode"}])
    def test_they_are_held_against_the_truth(
        self, make_recording: Callable[..., Recording], dropped: dict[int, str]
    ) -> None:
        recording = make_recording(12, turn=0.002, dropped=dropped)
        found = summarise(self.gone(recording))
        assert (found.summary["reidentified"], found.summary["reidentified_off_truth"]) == (60, 0.0)
        found = summarise(self.gone(recording, wrong=15))
        assert found.summary["reidentified_off_truth"] == 0.25
        known = found.per_frame["reidentified_known"]
        assert np.flatnonzero(np.isfinite(known)).tolist() == [7] and known[7] == 60
        assert found.summary["off_truth"] == 0, "what is followed from frame to frame is right"

    def test_it_is_the_motion_since_they_were_seen_that_counts(self, make_recording: Callable[..., Recording]) -> None:
        """A camera that stands between the last two frames has moved since."""
        recording = make_recording(12)
        truth = recording.truth
        assert truth is not None
        poses = truth.poses.copy()
        poses[6] = poses[7]
        still = replace(recording, truth=replace(truth, poses=poses))
        assert summarise(self.gone(still, wrong=30)).summary["reidentified_off_truth"] == 0.5

    def test_tracks_that_ended_or_were_of_another_epoch_are_others(
        self, make_recording: Callable[..., Recording]
    ) -> None:
        recording = self.gone(make_recording(12), wrong=60)
        frames = list(recording.frames)
        tracks = frames[5].tracks
        assert tracks is not None
        frames[5] = replace(frames[5], tracks=replace(tracks, lost_ids=np.arange(1, 121, 2, dtype=np.uint32)))
        assert np.isnan(summarise(replace(recording, frames=frames)).per_frame["reidentified_known"]).all()
        frames = [
            replace(frame, tracks=replace(frame.tracks, epoch=1)) if frame.index >= 6 and frame.tracks else frame
            for frame in recording.frames
        ]
        assert np.isnan(summarise(replace(recording, frames=frames)).per_frame["reidentified_known"]).all()

    def test_why_it_is_not_known(self, make_recording: Callable[..., Recording]) -> None:
        for recording, reason in (
            (make_recording(12), "no track was found again"),
            (self.gone(make_recording(12, calibrated=False)), "there is no calibration"),
            (self.gone(make_recording(12, truth=False)), NO_TRUTH),
            (self.gone(make_recording(12, step=0.001)), "the camera never moved by 1 cm while a track was gone"),
        ):
            found = summarise(recording)
            assert found.summary["reidentified_off_truth"] is None
            assert found.missing["reidentified_off_truth"].startswith(reason)


class TestSurvival:
    def test_estimator_on_the_data_of_its_textbooks(self) -> None:
        """Weeks in remission under 6-MP (Freireich et al., Blood 1963); the negative ones still lasted."""
        weeks = np.array([6, 6, 6, -6, 7, -9, 10, -10, -11, 13, 16, -17, -19, -20, 22, 23, -25, -32, -32, -34, -35])
        share, at_risk = kaplan_meier(abs(weeks), weeks > 0)
        np.testing.assert_allclose(
            share[[5, 6, 7, 10, 13, 16, 22, 23]],
            [1, 0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448],
            atol=5e-4,
        )
        assert at_risk[[6, 7, 10, 35]].tolist() == [21, 17, 15, 1]

    def test_tracks_that_the_end_cuts_off_are_not_taken_for_dead(self) -> None:
        frames = tracks_of([(0, 9)] * 3 + [(0, 1)] + [(8, 9)] * 50, count=10, gap=0)
        found = survival(lives(frames), 0.1)
        np.testing.assert_allclose(found.share[[1, 2, 9]], [1, 0.75, 0.75])

    @pytest.mark.parametrize("gap", [0, 3])
    def test_what_is_not_seen_has_ended_though_it_may_come_back(self, gap: int) -> None:
        """With a gap of 3, nobody knows yet whether a track that is missing in the last 3 frames comes back."""
        frames = tracks_of([(0, 2), (0, 8), (0, 9)], count=10, gap=gap)
        found = survival(lives(frames), 0.1)
        assert found.frames[-1] == 9
        np.testing.assert_allclose(found.share, [1, 1, 1, *[2 / 3] * 6, 1 / 3])
        assert found.half_life == 9

    def test_what_is_found_again_begins_anew(self) -> None:
        """Or whoever guesses wrongly more often has tracks that live longer."""
        once = tracks_of([(0, 2), (0, 9)] * 5, count=10, gap=9)
        again = [_found_again(frame, 10) if frame.index >= 5 else frame for frame in once]
        found = lives(again)
        assert sorted(zip(found.first.tolist(), found.last.tolist(), strict=True)) == sorted(
            [(0, 2)] * 5 + [(0, 9)] * 5 + [(5, 9)] * 5
        )
        others = survival(lives(tracks_of([(0, 2), (0, 9), (5, 9)] * 5, count=10, gap=0)), 0.1)
        np.testing.assert_array_equal(survival(found, 0.1).share, others.share, "as if they were new")
        metrics = summarise(Recording({}, again))
        assert metrics.summary["tracks"] == 10 and metrics.summary["reidentified"] == 5
        assert metrics.lengths.tolist() == [0, 0, 0, 5, 0, 5, 0, 0, 0, 0, 5]
        assert metrics.summary["track_length"] == 6

    def test_half_life_is_of_the_tracks_seen_twice(self) -> None:
        frames = tracks_of([(0, 0)] * 70 + [(0, 3)] * 20 + [(0, 20)] * 10, count=21, gap=0)
        found = survival(lives(frames), 0.5)
        assert found.half_life == 4
        assert found.after(1.0) == pytest.approx(1) and found.after(2.0) == pytest.approx(1 / 3)
        assert found.after(100.0) is None, "nobody has seen that"

    @pytest.mark.parametrize("low", [1, 4_000_000_000])
    def test_ids_may_begin_anywhere_and_begin_again(self, low: int) -> None:
        frames = tracks_of([(0, 4), (2, 4)], count=5, gap=0, low=low) + [
            replace(frame, index=frame.index + 5) for frame in tracks_of([(0, 1), (1, 4)], count=5, gap=0, epoch=1)
        ]
        found = lives(frames)
        assert list(zip(found.first.tolist(), found.last.tolist(), strict=True)) == [(0, 4), (2, 4), (5, 6), (6, 9)]
        assert found.ended.tolist() == [True, True, True, False], "those of an epoch that is over are gone"

    def test_lower_ids_may_come_later(self) -> None:
        frames = tracks_of([(3, 5), (0, 5)], count=6, gap=0)
        assert lives(frames).first.tolist() == [3, 0]

    def test_lengths_count_sights(self, make_recording: Callable[..., Recording]) -> None:
        recording = make_recording(4)
        found = summarise(replace(recording, frames=tracks_of([(0, 0), (0, 1), (0, 3)], count=4, gap=0)))
        assert found.lengths.tolist() == [0, 1, 1, 0, 1]
        assert found.summary["track_length"] == 3 and found.summary["tracks"] == 3


class TestMissing:
    @pytest.mark.parametrize("window", [{"frames": 5}, {"stop": 1.0}, {"start": 1.0}])
    def test_losses_that_a_window_hides(self, make_recording: Callable[..., Recording], window: dict[str, Any]) -> None:
        facts = {"damage": ["it is torn"], "lost": {"messages": None, "bytes": 7}, "window": window}
        found = summarise(make_recording(6, facts=facts)).missing["lost_messages"]
        assert ("--frames" in found) == ("start" not in window)

    @pytest.mark.parametrize(
        "kind",
        [
            {},
            {"frames": 0},
            {"frames": 1},
            {"frames": 40},
            {"calibrated": False},
            {"truth": False},
            {"verified": False},
            {"points": 0},
            {"step": 0.0},
            {"dropped": dict.fromkeys(range(12), "decode")},
        ],
    )
    @pytest.mark.parametrize("bare", [False, True])
    def test_every_figure_without_a_value_says_why(
        self, make_recording: Callable[..., Recording], kind: dict[str, Any], bare: bool
    ) -> None:
        """But for those of a trajectory, which whoever made one knows."""
        recording = make_recording(**kind, facts={"damage": ["it is torn"]} if bare else {})
        if bare:
            frames = [replace(frame, tracks=None, quality=None, timings={}) for frame in recording.frames]
            recording = replace(recording, frames=frames)
        found = summarise(recording)
        without = {name for name, value in found.summary.items() if value is None}
        trajectory = {"ate_m", "ate_share", "ate_frames", "rpe_m", "rpe_deg", "lost", "initialisations"}
        assert set(found.missing) == without - trajectory and all(found.missing.values())

    def test_tracks_that_outlive_the_recording(self, make_recording: Callable[..., Recording], tmp_path: Path) -> None:
        found = summarise(make_recording(11))
        reason = "more than 10 frames: most tracks outlive the recording"
        assert found.missing["track_half_life"] == found.missing["track_half_life_s"] == reason
        assert found.missing["alive_1s"] == "no track can be seen for 1 s: the images last 0.5 s"
        assert found.above == {"track_half_life": 10, "track_half_life_s": pytest.approx(0.5)}
        write_metrics(tmp_path, found)
        assert read_metrics(tmp_path).above == found.above
        assert summarise(make_recording(40)).summary["alive_1s"] == 1.0
        ended = Recording({}, tracks_of([(0, 3), (2, 5)], count=11, gap=0))
        assert summarise(ended).above == summarise(Recording({}, tracks_of([(0, 0)], count=2, gap=0))).above == {}

    def test_where_none_lived_for_a_second_that_is_none_and_not_unknown(self) -> None:
        found = survival(lives(tracks_of([(0, 3), (2, 5)], count=30, gap=0)), 0.1)
        assert found.after(1.0) == 0 and found.after(0.1) == 1

    def test_errors_of_models_that_no_frame_had(self, make_recording: Callable[..., Recording]) -> None:
        recording = make_recording(6)
        assert summarise(recording).missing["transfer_px"] == "no frame was verified by a homography"
        flat = [
            replace(frame, pair=replace(pair, geometry=replace(pair.geometry, model=GeometryModel.HOMOGRAPHY)))
            if (pair := frame.pair) and pair.geometry
            else frame
            for frame in recording.frames
        ]
        found = summarise(replace(recording, frames=flat))
        assert found.missing["epipolar_px"] == "all frames were verified by homographies"
        small = [replace(frame, image_size=(640, 480)) for frame in recording.frames]
        found = summarise(replace(recording, frames=small))
        assert found.missing["epipolar_px"] == "the calibration is that of another image size"


class TestFiles:
    def test_equal_recordings_give_equal_files_but_for_the_timings(
        self, make_recording: Callable[..., Recording], tmp_path: Path
    ) -> None:
        recording = make_recording(8, dropped={3: "decode"})
        slower = [replace(f, timings={k: 3 * v for k, v in f.timings.items()}) for f in recording.frames]
        contents = []
        for name, frames in (("a", recording.frames), ("b", recording.frames), ("c", slower)):
            path = write_metrics(tmp_path / name, summarise(replace(recording, frames=frames)))
            contents.append(path.read_bytes())
        assert contents[0] == contents[1] != contents[2]
        one, other = (strictly(tmp_path / name / FILE) for name in "ac")
        assert one.pop("timings") != other.pop("timings")
        assert one == other
        assert not [key for table in ("summary", "per_frame", "distributions") for key in one[table] if is_timed(key)]

    def test_what_was_written_is_read(self, make_recording: Callable[..., Recording], tmp_path: Path) -> None:
        written = summarise(make_recording(8, dropped={3: "decode"}))
        write_metrics(tmp_path, written)
        read = read_metrics(tmp_path)
        assert read.summary == written.summary and read.distributions == written.distributions
        assert read.stages == written.stages == ["decode", "network", "match"]
        assert read.survival.half_life == written.survival.half_life
        for name, values in written.per_frame.items():
            np.testing.assert_allclose(read.per_frame[name], values, rtol=1e-5, err_msg=name)

    @pytest.mark.parametrize("content", [None, "", "{}", '{"format": 99}', "[1]", '{"format": 2, "timings": 3}'])
    def test_files_that_are_none(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / FILE).write_text(content)
        with pytest.raises(DataError, match="scfeat replay|replay the bag again"):
            read_metrics(tmp_path)


class TestNames:
    def test_every_summary_has_all_names_and_values_that_can_be_shown(
        self, make_recording: Callable[..., Recording]
    ) -> None:
        for recording in (make_recording(5), make_recording(0), make_recording(3, calibrated=False)):
            summary = summarise(recording).summary
            assert list(summary)[: len(SUMMARY_NAMES)] == list(SUMMARY_NAMES)
            assert all(shown(name, value) for name, value in summary.items())
        assert shown("inlier_ratio", 0.5) == "50.0" and shown("ate_m", None) == shown("ate_m", float("nan")) == "–"
        assert all(figure.meaning and figure.label for figure in FIGURES.values())

    def test_overhead_is_what_is_left_of_all_stages(self, make_recording: Callable[..., Recording]) -> None:
        summary = summarise(make_recording(5)).summary
        assert [summary[name] for name in ("ms_total", "ms_network", "ms_overhead")] == [24.0, 21.0, 2.0]

    def test_limits_are_those_of_the_diagnostics(self) -> None:
        pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")
        from scfeat_ros.diagnostics import Limits

        limits = Limits()
        assert (verdicts.RATIO[0], verdicts.COVERAGE[1], verdicts.KEYPOINTS, WEAK_INLIERS) == (
            limits.inlier_ratio,
            limits.coverage,
            limits.keypoints,
            limits.matches,
        )
        assert limits.mean_warn == verdicts.DARK
        assert limits.end_warn == verdicts.ENDS
        assert limits.sharpness == BLURRED
