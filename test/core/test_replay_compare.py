from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scfeat_core import cli
from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.replay.compare import check, differences, page, read_runs, rows, text_table
from scfeat_core.replay.metrics import summarise, write_metrics
from scfeat_core.replay.records import Recording
from scfeat_core.replay.run_folder import write_run
from scfeat_core.replay.tum import write_tum

Make = Callable[..., Recording]
Write = Callable[..., Path]


@pytest.fixture
def write(make_recording: Make, tmp_path: Path) -> Write:
    """``write("a", outliers=0.5, …)``: a run folder of a recording, made with what make_recording takes."""

    def make(name: str, facts: dict[str, Any] | None = None, trajectory: bool = True, **kind: Any) -> Path:
        recording = make_recording(facts={"method": name, **(facts or {})}, **kind)
        folder = tmp_path / name
        write_run(folder, recording)
        write_metrics(folder, summarise(recording))
        if trajectory and recording.truth is not None:
            write_tum(folder / "trajectory.txt", recording.truth.stamps, recording.truth.poses)
        return folder

    return make


class TestTable:
    def test_better_ones_are_marked_and_ratios_given(self, write: Write) -> None:
        runs = read_runs([write("good", outliers=0.25), write("bad", outliers=0.5)])
        found = {row.name: row for row in rows(runs)}
        assert found["inlier_ratio"].best == 0 and found["inlier_ratio"].cells() == ["75.0", "50.0"]
        assert found["inlier_ratio"].ratios[1] == pytest.approx(2 / 3)
        assert found["keypoints"].best is None, "more of them is not better"
        assert found["processed"].best is None, "they are equal"
        assert "dropped" not in found and "ate_m" not in found
        table = text_table(runs)
        line = next(line for line in table.splitlines() if line.startswith("inlier ratio [%]"))
        assert line.split()[3:] == ["75.0", "*", "50.0", "x0.67"]
        assert len({len(line) for line in table.splitlines()[:1]}) == 1 and "good" in table.splitlines()[0]

    def test_less_is_better_of_errors(self, write: Write) -> None:
        runs = read_runs([write("off", off=2.0), write("exact")])
        found = {row.name: row for row in rows(runs)}
        assert found["epipolar_truth_px"].best == 1 and found["off_truth"].best is None

    def test_an_odometry_that_never_began_is_not_the_best(self, write: Write) -> None:
        folders = [write(name) for name in ("never", "once", "twice")]
        for folder, count in zip(folders, (0, 1, 2), strict=True):
            file = folder / "metrics.json"
            content = json.loads(file.read_text())
            content["summary"]["initialisations"] = count
            file.write_text(json.dumps(content))
        row = next(row for row in rows(read_runs(folders)) if row.name == "initialisations")
        assert row.best == 1 and row.cells() == ["0", "1", "2"]

    @pytest.mark.parametrize(("frames", "best"), [((100, 100), 1), ((100, 99), 1), ((100, 60), None), ((100, None), 1)])
    def test_the_error_of_a_part_of_a_path_is_not_the_best(
        self, write: Write, frames: tuple[int, int | None], best: int | None
    ) -> None:
        folders = [write("whole"), write("part")]
        for folder, count, error in zip(folders, frames, (0.2, 0.1), strict=True):
            file = folder / "metrics.json"
            content = json.loads(file.read_text())
            content["summary"] |= {"ate_m": error, "ate_frames": count}
            file.write_text(json.dumps(content))
        runs = read_runs(folders)
        assert {row.name: row for row in rows(runs)}["ate_m"].best == best
        assert any("frames of the ATE" in text for text in check(runs)) == (frames != (100, 100))

    def test_what_one_does_not_know_is_a_dash(self, write: Write) -> None:
        runs = read_runs([write("a", calibrated=False, off=1.0), write("b", off=1.0)])
        row = next(row for row in rows(runs) if row.name == "epipolar_truth_px")
        assert row.cells()[0] == "–" and row.best is None and row.ratios == [None, None]

    def test_tracks_that_outlive_a_recording_are_not_behind(self, write: Write) -> None:
        """With half of the tracks gone after 4 and 7 frames in two runs, and alive after all 11 in another."""
        folders = [write("short"), write("longer"), write("longest")]
        for folder, after in zip(folders[:2], (4, 7), strict=True):
            file = folder / "metrics.json"
            content = json.loads(file.read_text())
            content["summary"]["track_half_life"] = after
            content["tracks"]["survival"]["share"][after:] = [0.5] * (12 - after)
            file.write_text(json.dumps(content))
        found = {row.name: row for row in rows(read_runs(folders))}["track_half_life"]
        assert found.cells() == ["4", "7", "> 11"] and found.best == 2
        assert {row.name: row for row in rows(read_runs(folders[1:]))}["track_half_life"].best == 1
        both = [write("a"), write("b")]
        found = {row.name: row for row in rows(read_runs(both))}["track_half_life"]
        assert found.cells() == ["> 11", "> 11"] and found.best is None
        half = {row.name: row for row in rows(read_runs([folders[0], write("brief", frames=4)]))}["track_half_life"]
        assert half.cells() == ["4", "> 3"] and half.best is None, "it may be 4, too"

    def test_settings_that_differ(self, write: Write) -> None:
        settings = {"settings": {"grid": 4, "clahe": 0.0}}
        found = differences(read_runs([write("a"), write("b", settings)]))
        assert found == {"method": ["a", "b"], "settings.grid": ["0", "4"], "settings.clahe": ["–", "0.0"]}

    def test_names_tell_runs_apart(self, write: Write) -> None:
        same = {"method": "scfeat"}
        folders = [write("one", same), write("two", same)]
        assert [run.name for run in read_runs(folders)] == ["one", "two"]
        other = write("three", {**same, "settings": {"grid": 4, "clahe": 2.0}})
        assert [run.name for run in read_runs([folders[0], other])] == ["scfeat, grid 0", "scfeat, grid 4, clahe 2.0"]
        many = write("four", {**same, "settings": {str(i): i for i in range(9)}})
        assert [run.name for run in read_runs([folders[0], many])] == ["one", "four"]
        yard = write("five", {**same, "bag": "yard"})
        assert [run.name for run in read_runs([folders[0], yard])] == ["made scfeat", "yard scfeat"]
        copy = write("six", {**same, "bag": "copy", "settings": {"grid": 4}})
        assert [run.name for run in read_runs([folders[0], copy])] == ["made scfeat, grid 0", "copy scfeat, grid 4"]
        assert len({run.name for run in read_runs([folders[0], folders[0]])}) == 2


class TestRefusals:
    def test_other_images_are_refused_unless_told(self, write: Write) -> None:
        runs = read_runs([write("a"), write("b", {"bag": "another"})])
        with pytest.raises(DataError, match='\'?bag\'? of "made" .*"another".*--anyway'):
            check(runs)
        assert "different images" in check(runs, anyway=True)[0]
        better = read_runs([write("few", outliers=0.5), write("many", {"bag": "another"}, outliers=0.1)])
        assert all(row.best is None for row in rows(better)), "what is better on another recording?"

    def test_a_bag_is_known_by_its_contents(self, write: Write) -> None:
        """Whatever it is called; other contents under its name are another one."""
        one, copy, other = (
            write(name, {"bag": bag, "contents": {"bag": contents}})
            for name, bag, contents in (("a", "made", "ab12"), ("b", "another", "ab12"), ("c", "made", "cd34"))
        )
        assert check(read_runs([one, copy]))[0] == "copies of one bag: made, another"
        with pytest.raises(DataError, match='bags of one name and other contents, "made" .*"made"'):
            check(read_runs([one, other]))
        assert "different images" in check(read_runs([one, other]), anyway=True)[0]

    def test_other_numbers_of_frames_are_a_warning(self, write: Write) -> None:
        runs = read_runs([write("a", frames=9), write("b", frames=8, facts={"interrupted": True})])
        problems = check(runs)
        assert "frames 9 (a), 8 (b)" in problems[0] and problems[-1] == "b was interrupted after 8 images"
        assert check(runs[:1] * 2) == []
        known = read_runs([write("c", frames=9), write("d", frames=8, facts={"interrupted": True, "messages": 9})])
        assert check(known)[-1] == "d was interrupted after 8 of 9 images"

    def test_folders_that_are_no_runs(self, write: Write, tmp_path: Path) -> None:
        good = write("a")
        with pytest.raises(ScfeatError, match="two runs or more"):
            read_runs([good])
        with pytest.raises(DataError, match="no run.json"):
            read_runs([good, tmp_path / "nowhere"])
        (tmp_path / "live").mkdir()
        (tmp_path / "live" / "live.json").write_text("{}")
        with pytest.raises(DataError, match="found a live one"):
            read_runs([good, tmp_path / "live"])
        (good / "metrics.json").unlink()
        with pytest.raises(DataError, match="metrics of a replay"):
            read_runs([good, good])
        (good / "run.json").write_text("[]")
        with pytest.raises(DataError, match="replay the bag again"):
            read_runs([good, good])


class TestPage:
    @pytest.mark.parametrize("width", [1200, 400])
    def test_in_a_browser(
        self, write: Write, browse: Callable[..., dict[str, Any]], tmp_path: Path, width: int
    ) -> None:
        folders = [
            write("a", frames=20, turn=0.01, outliers=0.2),
            write("b<c>", frames=20, turn=0.01, outliers=0.4, facts={"settings": {"grid": 4}}),
        ]
        assert cli.main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
        seen = browse(tmp_path / "out" / "compare.html", width)
        assert seen["problems"] == [] and seen["loaded"] == []
        assert seen["headings"] == ["What differs", "Trajectory", "How long tracks live", "Over time"]
        assert seen["tables"] == 2 and seen["lines"] >= 2 * 8 and seen["width"] <= seen["room"]
        assert seen["tips"] and "a: " in seen["tips"][0] and "b<c>: " in seen["tips"][0]

    def test_without_truth_and_trajectories(self, write: Write) -> None:
        bare = [write("a", truth=False, trajectory=False), write("b", truth=False, trajectory=False)]
        assert "Trajectory" not in page(read_runs(bare))
        truth = write("c").joinpath("trajectory.txt")
        for folder in bare:
            (folder / "trajectory.txt").write_bytes(truth.read_bytes())
        assert "Distance from the truth" not in page(read_runs(bare)) and "Trajectory" in page(read_runs(bare))

    def test_the_command(self, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folders = [str(write("a", frames=6)), str(write("b", frames=5, facts={"topic": "/other"}))]
        out = tmp_path / "out"
        assert cli.main(["compare", *folders, "-o", str(out)]) == 2
        assert "topic" in capsys.readouterr().err and not out.exists()
        assert cli.main(["compare", *folders, "-o", str(out), "--anyway"]) == 0
        printed = capsys.readouterr()
        assert "warning: the runs are of different images" in printed.err and "inlier ratio" in printed.out
        assert str(out / "compare.html") in printed.out
        assert json.loads((out / "compare.json").read_text())["frames"] == {"a": 6, "b": 5}
        assert 'class="warned"' in (out / "compare.html").read_text()

    def test_a_place_that_cannot_be_written(self, write: Write, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        folder = str(write("a"))
        assert cli.main(["compare", folder, folder, "--out", str(tmp_path / "file")]) == 2


def test_runs_of_equal_recordings_have_equal_metrics(write: Write, make_recording: Make, tmp_path: Path) -> None:
    one, other = write("a"), tmp_path / "again"
    write_metrics(other, summarise(replace(make_recording(), facts={})))
    assert (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()
