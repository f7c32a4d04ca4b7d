from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core.charts import Chart, Histogram, Line, Mark, chart, histogram, plan
from scfeat_core.errors import DataError
from scfeat_core.odometry import evaluate
from scfeat_core.odometry.estimation import Odometry
from scfeat_core.replay.film import LARGEST, LONGEST, draw_tracks, film_frames, make_film, strip_frames
from scfeat_core.replay.metrics import Metrics, summarise
from scfeat_core.replay.paths import aligned, lines, similarity
from scfeat_core.replay.records import FrameRecord, GroundTruth, Recording
from scfeat_core.replay.report import make_report, write_report
from scfeat_core.replay.verdicts import headline, overall, reasons, verdicts, weakest
from scfeat_core.types import ImageQuality, Matches, TrackFlag

Make = Callable[..., Recording]


def pictures(indices: Sequence[int]) -> dict[int, np.ndarray]:
    noise = np.random.default_rng(0).integers(60, 190, (30, 40, 3), np.uint8)
    return {index: np.roll(cv2.resize(noise, (320, 240)), index, 1) for index in indices}


def odometry_of(recording: Recording) -> Odometry:
    """The truth in another world, at a third of its size."""
    truth = recording.truth
    assert truth is not None
    other = np.eye(4)
    other[:3, :3], other[:3, 3] = cv2.Rodrigues(np.array([0.3, -0.2, 0.5]))[0], (1, 2, 3)
    poses = other @ truth.poses
    poses[:, :3, 3] /= 3
    count = len(poses)
    tracked = np.ones(count, bool)
    return Odometry(truth.stamps, poses, tracked, 1, ("points",) * count, np.arange(0, count, 4))


def _unmatched(frame: FrameRecord) -> FrameRecord:
    """As a black image is, without points."""
    none, index = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    pair = frame.pair
    assert pair is not None
    pair = replace(pair, matches=Matches(index, index, none[:, 0]), keypoints0=none, keypoints1=none)
    return replace(frame, pair=pair)


def _with(metrics: Metrics, **figures: float | None) -> Metrics:
    return replace(metrics, summary={**metrics.summary, **figures})


@pytest.fixture(scope="module")
def made(make_recording: Make) -> Recording:
    """With everything that a page can have, and names that are no HTML."""
    recording = make_recording(
        30,
        turn=0.002,
        dropped={7: "decode"},
        facts={"bag": "<b>ag & co", "damage": ["chunk 3 is damaged: 12 images are lost"], "interrupted": True},
    )
    frames = [
        replace(f, reset_reason="stamp went back", quality=ImageQuality(0.03, 0.5, 0, 0.05)) if f.index == 12 else f
        for f in recording.frames
    ]
    return replace(recording, frames=frames)


class TestPage:
    @pytest.mark.parametrize("width", [1200, 400])
    def test_in_a_browser(
        self, made: Recording, browse: Callable[..., dict[str, Any]], tmp_path: Path, width: int
    ) -> None:
        page = write_report(tmp_path, made, summarise(made), odometry_of(made), None, pictures)
        seen = browse(page, width)
        assert seen["problems"] == [] and seen["loaded"] == []
        assert len(seen["images"]) == 11, "a film, six of a strip, four weak frames"
        assert all(seen["images"])
        assert seen["tables"] == 3 and seen["lines"] > 15
        assert seen["width"] <= seen["room"], "nothing is wider than the window"
        assert seen["tips"], "values under the pointer"
        assert seen["headings"] == [
            "What was lost",
            "Trajectory",
            "Over time",
            "How long tracks live",
            "Tracks in the images",
            "The weakest frames",
            "Time a frame",
            "All figures",
            "Settings and facts",
        ]

    def test_what_was_lost_is_said(self, made: Recording) -> None:
        page = make_report(made, summarise(made))
        for text in ("chunk 3 is damaged", "was interrupted", "Image 7: decode of image 7", "stamp went back"):
            assert text in page
        assert "&lt;b&gt;ag &amp; co" in page and "<b>ag" not in page

    def test_a_recording_without_anything(
        self, make_recording: Make, browse: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        empty = make_recording(0)
        seen = browse(write_report(tmp_path, empty, summarise(empty), None, None, pictures))
        assert seen["problems"] == []
        assert seen["headings"] == ["All figures", "Settings and facts"]

    def test_images_that_are_gone_are_a_line_of_text(self, made: Recording) -> None:
        def gone(indices: Sequence[int]) -> dict[int, np.ndarray]:
            raise DataError("expected the bag, found nothing: give its new place")

        page = make_report(made, summarise(made), pictures=gone)
        assert "could not be read again: expected the bag" in page and "<img" not in page
        assert "<img" not in make_report(made, summarise(made), pictures=lambda indices: {})

    def test_only_the_frames_that_are_shown_are_held(
        self, make_recording: Make, lazily: Callable[[Sequence[FrameRecord]], Any]
    ) -> None:
        recording = make_recording(150, points=20)
        frames = lazily(recording.frames)
        metrics = summarise(recording)
        page = make_report(replace(recording, frames=frames), metrics, None, None, pictures)
        assert page == make_report(recording, metrics, None, None, pictures)
        assert frames.most <= 12

    def test_frames_without_matches_of_a_run_that_verifies_none(self, make_recording: Make) -> None:
        recording = make_recording(4, verified=False)
        frames = [_unmatched(frame) if frame.index == 2 else frame for frame in recording.frames]
        bare = replace(recording, frames=frames)
        assert "Image 2, 0.10 s: no matches" in make_report(bare, summarise(bare), None, None, pictures)

    def test_scripts_that_are_not_its_own_do_not_run(
        self, made: Recording, browse: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        page = write_report(tmp_path, made, summarise(made))
        text = page.read_text().replace("<h1>", "<script>document.title = 'owned'</script><h1>", 1)
        page.write_text(text)
        seen = browse(page)
        assert seen["problems"] == ["blocked: inline"] and seen["tips"]

    def test_equal_recordings_give_equal_pages(self, make_recording: Make) -> None:
        made = make_recording(6)
        metrics = summarise(made)
        assert make_report(made, metrics, None, None, pictures) == make_report(made, metrics, None, None, pictures)


class TestVerdicts:
    def test_good_recordings_are_called_good(self, make_recording: Make) -> None:
        found = verdicts(summarise(make_recording(20)))
        levels = {verdict.name: verdict.level for verdict in found}
        assert overall(found) == "good" and headline(found) == "Good on this recording"
        assert levels["Inlier ratio"] == levels["Images processed"] == levels["Time a frame"] == "good"

    @pytest.mark.parametrize(
        ("change", "name", "level"),
        [
            ({"outliers": 0.8}, "Inlier ratio", "watch"),
            ({"outliers": 0.9}, "Inlier ratio", "poor"),
            ({"points": 30}, "Weak frames", "poor"),
            ({"points": 12}, "Coverage", "poor"),
            ({"dropped": {5: "decode"}}, "Images processed", "watch"),
            ({"dropped": {5: "decode", 6: "decode"}}, "Images processed", "poor"),
            ({"frames": 3}, "Half-life of tracks", ""),
            ({"frames": 0}, "Images", "poor"),
        ],
    )
    def test_each_limit(self, make_recording: Make, change: dict[str, Any], name: str, level: str) -> None:
        found = verdicts(summarise(make_recording(**{"frames": 25, **change})))
        assert {verdict.name: verdict.level for verdict in found}[name] == level

    def test_a_slow_machine_says_nothing_about_the_front_end(self, make_recording: Make) -> None:
        recording = make_recording(20)
        slow = [replace(frame, timings={"network": 100.0}) for frame in recording.frames]
        found = verdicts(summarise(replace(recording, frames=slow)))
        assert headline(found) == "Good on this recording; slower than the camera on this machine"
        assert "skip about 50 %" in next(verdict.why for verdict in found if verdict.machine)

    def test_wrong_reidentifications_are_said_and_keep_no_track_alive(self, make_recording: Make) -> None:
        """Every other frame the points have the ids of others: nothing is followed for longer than two frames."""
        recording = make_recording(20)

        def swapped(frame: FrameRecord) -> FrameRecord:
            tracks = frame.tracks
            assert tracks is not None
            rows = slice(0, 60) if frame.index // 2 % 2 else slice(60, 120)
            left = {name: getattr(tracks, name)[rows] for name in ("ids", "ages", "indices")}
            flags = np.full(
                60, int(TrackFlag.REIDENTIFIED) if frame.index % 2 == 0 and frame.index > 2 else 0, np.uint8
            )
            points = tracks.keypoints[rows] + np.float32((0, 30 * (frame.index // 4 % 2)))
            return replace(frame, tracks=replace(tracks, **left, flags=flags, keypoints=points))

        metrics = summarise(replace(recording, frames=[swapped(frame) for frame in recording.frames]))
        found = {verdict.name: verdict for verdict in verdicts(metrics)}
        assert metrics.summary["reidentified"] == 8 * 60 and metrics.summary["reidentified_off_truth"] == 1
        assert found["Re-identified tracks"].value == "480, 100 % off by > 3 px"
        assert found["Re-identified tracks"].level == "poor"
        for off in (0.06, None):  # inliers are off, too: it is the truth that is wrong; or nobody knows
            inexact = {verdict.name: verdict for verdict in verdicts(_with(metrics, off_truth=off))}
            assert inexact["Re-identified tracks"].level == ""
        for share, level in ((0.25, "good"), (0.26, "watch"), (0.51, "poor")):
            judged = {verdict.name: verdict for verdict in verdicts(_with(metrics, reidentified_off_truth=share))}
            assert judged["Re-identified tracks"].level == level
        assert (
            found["Half-life of tracks"].value.startswith("2 frames") and found["Half-life of tracks"].level != "good"
        )
        assert "Re-identified tracks" not in {verdict.name for verdict in verdicts(summarise(recording))}

    @pytest.mark.parametrize(("begun", "level"), [(0, "poor"), (1, "good"), (3, "poor")])
    def test_odometry_that_begins_again(self, make_recording: Make, begun: int, level: str) -> None:
        recording = make_recording(20)
        odometry = replace(odometry_of(recording), initialisations=begun)
        found = {verdict.name: verdict for verdict in verdicts(summarise(recording, odometry))}
        assert found["Visual odometry"].level == level

    @pytest.mark.parametrize(
        ("lost", "level", "value"),
        [
            (0, "good", "never lost"),
            (1, "watch", "began once, 1 of 120 frames without a pose"),
            (90, "poor", "began once, 90 of 120 frames without a pose"),
        ],
    )
    def test_a_path_of_a_part_is_not_good(self, make_recording: Make, lost: int, level: str, value: str) -> None:
        """However often the odometry began: an error is then that of the part."""
        recording = make_recording(120, points=40)
        status = ("lost",) * lost + ("points",) * (120 - lost)
        odometry = replace(odometry_of(recording), tracked=np.arange(120) >= lost, status=status)
        found = {verdict.name: verdict for verdict in verdicts(summarise(recording, odometry))}
        assert (found["Visual odometry"].level, found["Visual odometry"].value) == (level, value)


def window(frames: int = 0, start: float = 0.0, stop: float | None = None) -> dict[str, Any]:
    """Facts of a part of a recording of 90 images."""
    return {"messages": 90, "window": {"frames": frames, "start": start, "stop": stop}}


class TestInterrupted:
    @pytest.mark.parametrize(
        ("facts", "dropped", "value", "level", "end"),
        [
            ({"messages": 90}, {}, "20 of 90 (interrupted)", "", "interrupted after 20 of 90 images"),
            ({"messages": 90}, {5: "decode"}, "19 of 90 (interrupted)", "watch", "interrupted after 20 of 90 images"),
            (window(frames=40), {}, "20 of 40 (interrupted)", "", "interrupted after 20 of 40 images"),
            (window(start=3.0), {}, "20 (interrupted)", "", "interrupted after 20 images"),
            (window(stop=9.0), {}, "20 (interrupted)", "", "interrupted after 20 images"),
            ({}, {}, "20 (interrupted)", "", "interrupted after 20 images"),
        ],
    )
    def test_it_stands_beside_the_verdict(
        self, make_recording: Make, facts: dict[str, Any], dropped: dict[int, str], value: str, level: str, end: str
    ) -> None:
        recording = make_recording(20, dropped=dropped, facts={**facts, "interrupted": True})
        metrics = summarise(recording)
        found = verdicts(metrics, recording.facts)
        assert (found[0].name, found[0].value, found[0].level) == ("Images processed", value, level)
        page = make_report(recording, metrics)
        assert re.search(f'class="headline">[^<]* on this recording[^<]*; {end}</p>', page)
        assert f"{end.removeprefix('interrupted after ')} (interrupted)" in page
        assert f"The replay was {end}" in page

    @pytest.mark.parametrize(
        ("lost", "known"), [(25, "25 images are lost"), (None, "an unknown number of images are lost")]
    )
    def test_damaged_recordings_are_called_so(self, make_recording: Make, lost: int | None, known: str) -> None:
        """However good the front end is on the rest."""
        facts = {"damage": ["the end is missing"], "lost": {"messages": lost, "bytes": 7}}
        recording = make_recording(26, facts=facts)
        metrics = summarise(recording)
        images = verdicts(metrics, recording.facts)[0]
        assert (images.value, images.level) == ("26 of 26 that can be read", "watch") and known in images.why
        assert re.search(
            f'class="headline">[^<]*; the recording is damaged, {known}</p>', make_report(recording, metrics)
        )

    @pytest.mark.parametrize(("frames", "level"), [(4, ""), (9, ""), (10, "poor"), (40, "poor")])
    def test_few_images_do_not_condemn(self, make_recording: Make, frames: int, level: str) -> None:
        recording = make_recording(frames)
        odometry = replace(odometry_of(recording), initialisations=0, status=("lost",) * frames)
        found = {verdict.name: verdict for verdict in verdicts(summarise(recording, odometry))}
        assert found["Visual odometry"].level == level

    @pytest.mark.parametrize(("noise", "level"), [(0.0, "good"), (0.3, "watch"), (3.0, "poor")])
    def test_a_path_is_held_against_standing_still(self, make_recording: Make, noise: float, level: str) -> None:
        """noise: of the positions, in units of their own spread."""
        recording = make_recording(60, points=40)
        odometry = odometry_of(recording)
        poses = odometry.poses.copy()
        spread = np.linalg.norm(poses[:, :3, 3] - poses[:, :3, 3].mean(0), axis=1).std()
        poses[:, :3, 3] += noise * spread * np.random.default_rng(0).normal(size=(60, 3))
        scores = evaluate(replace(odometry, poses=poses), recording.truth)
        metrics = summarise(recording, odometry, scores)
        judged = {verdict.name: verdict for verdict in verdicts(metrics)}["Trajectory error (ATE)"]
        assert judged.level == level and "of standing still" in judged.value
        assert metrics.summary["ate_share"] == pytest.approx(scores.ate_m / scores.still_m, rel=1e-5)

    def test_whole_ones_are_called_as_ever(self, make_recording: Make) -> None:
        recording = make_recording(20, facts={"messages": 90, "interrupted": False})
        assert verdicts(summarise(recording), recording.facts)[0].value == "20 of 20"
        assert "nterrupted" not in make_report(recording, summarise(recording))


class TestWeakest:
    def test_the_weakest_come_first_and_each_bad_stretch_once(self, make_recording: Make) -> None:
        metrics = summarise(make_recording(40))
        metrics.per_frame["inlier_ratio"][[10, 11, 12, 30]] = 0.2, 0.1, 0.3, 0.15
        metrics.per_frame["matches"][20], metrics.per_frame["inlier_ratio"][20] = 0, np.nan
        found = weakest(metrics)
        assert len(found) == 4 and 0 not in found
        assert found[:3] == [11, 30, 20] if found[0] == 11 else found[:3] == [20, 11, 30]

    def test_reasons_are_what_was_measured(self, make_recording: Make) -> None:
        recording = make_recording(12, dropped={5: "decode"})
        bad = replace(recording.frames[6], quality=ImageQuality(0.5, 0.1, 0.4, 0.05), reset_reason="size changed")
        frames = [*recording.frames[:6], bad, *recording.frames[7:]]
        metrics = summarise(replace(recording, frames=frames))
        metrics.per_frame["flow_px"][6] = 80
        found = " ".join(reasons(metrics, 6, bad, frames[4]))
        for text in ("blurred", "40 % of the image are saturated", "moved by 80 px", "0.10 s after", "size changed"):
            assert text in found
        assert reasons(metrics, 8, frames[8], frames[7]) == []
        assert reasons(metrics, 7, frames[7], bad)[0].startswith("the frame before: blurred")


class TestFilm:
    def test_pictures_are_spread_and_few(self, make_recording: Make) -> None:
        frames = make_recording(200, points=5).processed
        places = film_frames(frames)
        assert len(places) == LONGEST and set(np.diff(places)) == {2} and 50 < places[0] < 70, "the middle"
        assert film_frames(frames[:10]) == list(range(10))
        assert strip_frames(frames) == [0, 40, 80, 119, 159, 199] and strip_frames(frames[:2]) == [0, 1]
        assert film_frames([]) == strip_frames([]) == []

    def test_only_images_of_the_usual_size(self, make_recording: Make) -> None:
        frames = make_recording(10).processed
        assert film_frames([replace(frames[0], image_size=(64, 48)), *frames[1:]]) == list(range(1, 10))

    @pytest.mark.skipif(not hasattr(cv2, "imdecodeanimation"), reason="this OpenCV cannot write films")
    def test_a_film_is_small_and_has_all_pictures(self, make_recording: Make) -> None:
        frames = make_recording(12).processed
        drawn = draw_tracks(frames, range(12), pictures(range(12)))
        assert len({picture.shape for picture in drawn.values()}) == 1
        assert drawn[11].std(2).max() > 20, "tracks are in colour"
        film = make_film(frames, drawn)
        assert film is not None and 0 < len(film.content) <= LARGEST and film.slower == pytest.approx(2)
        done, read = cv2.imdecodeanimation(np.frombuffer(film.content, np.uint8))
        assert done and len(read.frames) == 12
        assert make_film(frames, {0: drawn[0]}) is None


class TestPaths:
    def test_a_similarity_is_found_again(self) -> None:
        points = np.random.default_rng(0).normal(size=(30, 3))
        rotation = cv2.Rodrigues(np.array([0.4, -1.0, 2.0]))[0]
        scale, found, shift = similarity(points, 2.5 * points @ rotation.T + (1, -2, 3))
        assert scale == pytest.approx(2.5)
        np.testing.assert_allclose(found, rotation, atol=1e-12)
        np.testing.assert_allclose(shift, (1, -2, 3), atol=1e-12)

    def test_a_way_that_is_right_up_to_scale_has_no_errors(self, make_recording: Make) -> None:
        recording = make_recording(20, turn=0.01)
        truth = recording.truth
        assert truth is not None
        bent = replace(truth, poses=truth.poses.copy())
        bent.poses[:, 1, 3] = np.sin(np.arange(20))
        odometry = odometry_of(replace(recording, truth=bent))
        known = np.arange(20) != 4
        way = aligned(odometry.stamps, odometry.poses, known, bent)
        assert way.scale == pytest.approx(3) and np.nanmax(way.errors) < 1e-9
        assert np.isnan(way.positions[4]).all() and np.isfinite(way.positions[known]).all()

    @pytest.mark.parametrize(
        ("ahead", "right"), [([0, 0, 1], [1, 0, 0]), ([1, 0, 0], [0, -1, 0])], ids=["camera", "map"]
    )
    @pytest.mark.parametrize("far", [1, 9])
    def test_a_turn_to_the_right_is_one_on_the_page(self, ahead: list[float], right: list[float], far: float) -> None:
        """In the frame of a camera (REP 103: z ahead, x to the right), and in a map with z upwards."""
        steps = np.arange(10.0)[:, None]
        before = steps * ahead
        way = np.concatenate((before, before[-1] + far * steps * right))
        (line,) = lines([("way", way)])
        (x0, y0), (x1, y1) = np.diff(np.column_stack((line.x, line.y))[[0, 9, -1]], axis=0)
        assert x0 * y1 - y0 * x1 < 0

    def test_without_truth_it_stays_where_it_is(self, make_recording: Make) -> None:
        odometry = odometry_of(make_recording(5))
        for truth in (None, GroundTruth(np.array([0]), np.eye(4)[None])):
            way = aligned(odometry.stamps, odometry.poses, odometry.tracked, truth)
            assert np.isnan(way.scale) and np.isnan(way.errors).all()
            np.testing.assert_array_equal(way.positions, odometry.poses[:, :3, 3])


class TestCharts:
    def test_gaps_split_a_line_and_what_sticks_out_stays(self) -> None:
        y = np.zeros(10_000)
        y[1234], y[5000:5100] = 100, np.nan
        drawn = chart(Chart("t", [Line("a", np.arange(10_000.0), y)]))
        assert drawn.count("<polyline") == 2 and ",0 " in drawn, "the peak reaches the top"
        assert len(drawn) < 60_000

    def test_nothing_measured_is_said(self) -> None:
        for drawn in (
            chart(Chart("t", [Line("", np.arange(3.0), np.full(3, np.nan))])),
            histogram(Histogram("t", np.zeros(0))),
            plan("t", []),
        ):
            assert "nothing was measured" in drawn and "NaN" not in drawn.upper().replace("NANO", "")

    @pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, 1e-9], [1e7, 2e7]])
    def test_any_values_have_axes(self, values: list[float]) -> None:
        array = np.array(values)
        line = Line("a", np.arange(len(array), dtype=float), array)
        for drawn in (
            chart(Chart("t", [line], marks=[Mark(0, "drop")])),
            histogram(Histogram("t", array)),
            plan("t", [line]),
        ):
            assert "nan" not in drawn and "inf" not in drawn

    @pytest.mark.parametrize(
        ("top", "labels"),
        [
            (1.5, ["0", "0.5", "1", "1.5"]),
            (8e3, ["0", "2 000", "4 000", "6 000", "8 000"]),
            (2e6, ["0", "0.5 M", "1 M"]),
        ],
    )
    def test_numbers_beside_an_axis_are_short(self, top: float, labels: list[str]) -> None:
        drawn = chart(Chart("t", [Line("a", np.arange(2.0), np.array([0.0, top]))]))
        beside = re.findall(r"<span[^>]*>([^<]*)</span>", drawn.partition('class="ys"')[2].partition("</div>")[0])
        assert max(map(len, beside)) <= 6
        assert [label.replace("\u202f", " ") for label in beside[: len(labels)]] == labels

    def test_a_histogram_counts_all_values(self) -> None:
        drawn = histogram(Histogram("t", np.array([1.0] * 50 + [1000.0, np.nan]), "ms", bins=10))
        assert drawn.count("<rect") == 2 and "median 1, p95 1 ms" in drawn

    def test_bars_of_whole_numbers_are_alike(self) -> None:
        """So many of each number: no bar may hold two of them where its neighbours hold one."""
        drawn = histogram(Histogram("t", np.repeat(np.arange(2.0, 31), 7), whole=True))
        heights = re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)
        assert len(set(heights[1:-1])) == 1
