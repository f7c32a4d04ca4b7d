"""Conditions on the figures of a replay, and what is written of many: table, JSON, JUnit."""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scfeat_core.checks import check_names, failed, judge, parse
from scfeat_core.errors import ConfigError, DataError, ScfeatError
from scfeat_core.replay.metrics import NEVER_BEGAN
from scfeat_ros.replay.outcomes import Run, add_arguments, conclude

SUMMARY = {"frames": 100, "inlier_ratio": 0.625, "ate_m": None, "epipolar_px": math.nan, "method": "scfeat"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inlier_ratio<0.5", False),
        ("inlier_ratio<0.625", False),
        ("inlier_ratio<=0.625", True),
        ("inlier_ratio >= 0.625", True),
        (" inlier_ratio>0.6 ", True),
        ("frames==100", True),
        ("frames==1e2", True),
        ("frames>100", False),
    ],
)
def test_checks_hold_or_not(text: str, expected: bool) -> None:
    assert failed(parse(text), SUMMARY) is expected
    verdict = judge(parse(text), SUMMARY)
    assert verdict.failed is expected and verdict.error == ""


def test_what_is_expected_is_the_opposite_of_the_condition() -> None:
    assert judge(parse("inlier_ratio<0.7"), SUMMARY).found == "expected inlier_ratio >= 0.7, found 0.625"
    assert str(parse("inlier_ratio  <0.50")) == "inlier_ratio<0.5"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "inlier_ratio",
        "inlier_ratio=0.5",
        "inlier_ratio!=0.5",
        "<0.5",
        "inlier_ratio<",
        "a<b",
        "a<nan",
        "a<inf",
        "a<1 2",
    ],
)
def test_what_is_no_check_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse(text)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'inlier_ratio'"):
        failed(parse("inlier_rate<0.5"), SUMMARY)
    with pytest.raises(ConfigError, match="no metric 'zzz': There are"):
        check_names([parse("zzz<1")], SUMMARY)
    with pytest.raises(ConfigError, match="a number"):
        failed(parse("method==1"), SUMMARY)


@pytest.mark.parametrize("name", ["ate_m", "epipolar_px"])
def test_missing_value_is_an_error_and_no_pass(name: str) -> None:
    with pytest.raises(DataError, match=f"expected a value of {name}"):
        failed(parse(f"{name}>1"), SUMMARY)
    verdict = judge(parse(f"{name}>1"), SUMMARY)
    assert not verdict.failed and name in verdict.error
    assert ("--ground-truth" in verdict.error) is (name == "ate_m")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("track_half_life<3", False),
        ("track_half_life<=10", False),
        ("track_half_life==10", False),
        ("track_half_life>3", True),
        ("track_half_life>=10", True),
        ("track_half_life<11", None),
        ("track_half_life>10.5", None),
        ("ate_m>1", None),
    ],
)
def test_what_is_known_to_be_greater_decides(text: str, outcome: bool | None) -> None:
    """Of tracks that outlive a recording only a lower bound of the half-life is known."""
    reason = "more than half of the tracks outlive the recording"
    summary = {**SUMMARY, "track_half_life": None, "above": {"track_half_life": 10}}
    verdict = judge(parse(text), summary)
    assert (None if verdict.error else verdict.failed) is outcome
    if outcome is not None:
        assert failed(parse(text), summary) is outcome and verdict.value is None
        assert verdict.found.endswith("found more than 10")
    run = Run("hall", {**summary, "missing": {"track_half_life": reason}})
    status, said = conclusion([run], "--fail-if", text)
    assert status == {None: 2, True: 1, False: 0}[outcome]
    assert (reason in said) is (text.startswith("track") and outcome is None)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(words)


def conclusion(runs: list[Run], *words: str) -> tuple[int, str]:
    lines: list[str] = []
    status = conclude(runs, arguments(*words), lines.append, lines.append)
    return status, "\n".join(lines)


GOOD = Run("hall", SUMMARY, seconds=12.25, bag=Path("hall"), folder=Path("out/hall"))
POOR = Run("yard|2", {**SUMMARY, "inlier_ratio": 0.25, "ate_m": 1.5}, seconds=3.0)
DEAD = Run(
    "cave", None, "expected the replay to run, found it\x1b[31m dead\x1b[0m \x00\n  of <memory> & \x07", seconds=1.0
)


def test_exit_status() -> None:
    check = ("--fail-if", "inlier_ratio<0.5")
    assert conclusion([GOOD])[0] == 0
    assert conclusion([GOOD], *check)[0] == 0
    assert conclusion([GOOD, POOR])[0] == 0
    assert conclusion([GOOD, POOR], *check)[0] == 1
    assert conclusion([GOOD], "--fail-if", "ate_m>1")[0] == 2
    assert conclusion([POOR], "--fail-if", "ate_m>1", *check)[0] == 1
    assert conclusion([GOOD, DEAD])[0] == 2
    assert conclusion([GOOD, POOR, DEAD], *check)[0] == 2
    assert conclusion([POOR, Run("late", None, "not started", interrupted=True)], *check)[0] == 130


def test_an_odometry_that_never_began_fails_what_is_asked_of_its_path() -> None:
    lost = Run("hall", {**SUMMARY, "missing": {"ate_m": NEVER_BEGAN}})
    status, text = conclusion([lost], "--fail-if", "ate_m>1")
    found = f"FAILED: expected ate_m <= 1, found none: {NEVER_BEGAN}"
    assert status == 1 and found in text and "--ground-truth" not in text
    reason = "the ground truth is of another recording"
    other = Run("hall", {**SUMMARY, "missing": {"ate_m": reason}})
    status, text = conclusion([other], "--fail-if", "ate_m>1")
    assert status == 2 and f"found none: {reason}" in text and "--ground-truth" not in text


def test_figures_of_live_replays_can_be_checked() -> None:
    live = Run("hall", {"frames": 100, "latency_p95_ms": 80.0, "dropped_before_node": 0})
    words = ("--fail-if", "latency_p95_ms>50", "--fail-if", "dropped_before_node>0")
    status, text = conclusion([live], *words)
    assert status == 1 and "expected latency_p95_ms <= 50, found 80" in text and "dropped_before_node" not in text
    assert conclusion([GOOD], *words)[0] == 2, "a replay without the graph has no latency"


def test_where_nothing_was_replayed_there_is_no_table() -> None:
    status, text = conclusion([DEAD], "--fail-if", "frames<1")
    assert status == 2 and text == f"cave: error: {DEAD.error}"


def test_bad_condition_and_bad_table_are_wrong_usage() -> None:
    with pytest.raises(argparse.ArgumentError, match="inlier_ratio=0.5"):
        arguments("--fail-if", "inlier_ratio=0.5")
    with pytest.raises(argparse.ArgumentError, match="did you mean 'inlier_ratio'"):
        arguments("--fail-if", "inliers_ratio<0.5")
    with pytest.raises(argparse.ArgumentError, match=r"\.csv"):
        arguments("--table", "table.xls")


def test_table_says_what_was_found_and_expected() -> None:
    _, text = conclusion([GOOD, POOR, DEAD], "--fail-if", "inlier_ratio<0.5")
    assert "yard|2: FAILED: expected inlier_ratio >= 0.5, found 0.25" in text
    head, *rows = [line.split() for line in text.splitlines()[:4]]
    assert head == ["bag", "inlier_ratio", "ate_m", "checks", "state"]
    assert rows[0] == ["hall", "0.625", "–", "passed", "done"]
    assert rows[1][:3] == ["yard|2", "0.25", "1.5"]
    assert text.count("cave") == 2, "the error once, and no checks beside it"


def test_bags_are_called_as_the_user_calls_them() -> None:
    """The folder of a run is named where it is another."""
    runs = [Run("a", SUMMARY, bag=Path("bags/hall")), Run("yard", SUMMARY, bag=Path("yard.mcap"))]
    head, *rows = [line.split() for line in conclusion(runs)[1].splitlines()]
    assert head[:2] == ["bag", "run"] and [row[:2] for row in rows] == [["hall", "a"], ["yard", "yard"]]
    assert conclusion(runs[1:])[1].splitlines()[0].split()[:2] == ["bag", "inlier_ratio"]


def test_csv_has_all_figures(tmp_path: Path) -> None:
    conclusion([GOOD, POOR, DEAD], "--table", str(tmp_path / "all.csv"))
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["bag"] for row in rows] == ["hall", "yard|2", "cave"]
    assert float(rows[0]["inlier_ratio"]) == 0.625 and rows[0]["ate_m"] == "" and rows[1]["ate_m"] == "1.5"
    assert rows[2]["error"] == DEAD.error and rows[2]["inlier_ratio"] == ""


def test_notes_are_no_columns(tmp_path: Path) -> None:
    run = Run("hall", {**SUMMARY, "missing": {"ate_m": "why"}, "above": {"track_half_life": 3}})
    conclusion([run], "--table", str(tmp_path / "all.csv"))
    with (tmp_path / "all.csv").open(newline="") as file:
        assert not {"missing", "above"} & set(next(csv.reader(file)))


def test_markdown_has_as_many_cells_in_every_line(tmp_path: Path) -> None:
    conclusion([GOOD, POOR, DEAD], "--table", str(tmp_path / "all.md"))
    lines = (tmp_path / "all.md").read_text().splitlines()
    assert len(lines) == 5 and len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_json(tmp_path: Path) -> None:
    conclusion([GOOD, POOR, DEAD], "--fail-if", "ate_m>1", "--json", str(tmp_path / "new" / "all.json"))
    content = json.loads((tmp_path / "new" / "all.json").read_text(), parse_constant=pytest.fail)
    assert content["status"] == 2
    good, poor, dead = content["runs"]
    assert good["bag"] == "hall" and good["folder"] == "out/hall" and good["seconds"] == 12.25
    assert good["summary"] == {**SUMMARY, "epipolar_px": None}
    assert good["checks"][0]["error"] and poor["checks"] == [
        {"check": "ate_m>1", "failed": True, "value": 1.5, "reason": "", "error": ""}
    ]
    assert dead["summary"] is None and dead["error"] == DEAD.error


def test_junit(tmp_path: Path) -> None:
    """Names and attributes of xunit-plugin's junit-10.xsd; counts are those of the cases."""
    checks = ("--fail-if", "inlier_ratio<0.5", "--fail-if", "ate_m>1")
    conclusion([GOOD, POOR, DEAD], *checks, "--junit", str(tmp_path / "junit.xml"))
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert root.tag == "testsuites" and [suite.tag for suite in root] == ["testsuite"]
    suite = root[0]
    assert suite.attrib == {
        **{"name": "scfeat replay", "tests": "9", "failures": "2", "errors": "4", "skipped": "0", "time": "16.250"}
    }
    found = {
        (case.get("classname"), case.get("name")): [(part.tag, part.get("message")) for part in case] for case in suite
    }
    assert len(found) == 9 and {case.tag for case in suite} == {"testcase"}
    assert found["hall", "replay"] == found["hall", "inlier_ratio<0.5"] == []
    assert found["hall", "ate_m>1"][0][0] == "error"
    assert found["yard|2", "inlier_ratio<0.5"] == [("failure", "expected inlier_ratio >= 0.5, found 0.25")]
    assert found["yard|2", "ate_m>1"] == [("failure", "expected ate_m <= 1, found 1.5")]
    assert found["cave", "replay"] == [("error", "expected the replay to run, found it dead ?")]
    assert "of <memory> & ?" in (next(case for case in suite if case.get("classname") == "cave")[0].text or "")
    assert found["cave", "ate_m>1"][0][0] == "error"
    assert [case.get("time") for case in suite if case.get("name") == "replay"] == ["12.250", "3.000", "1.000"]


def test_a_replay_that_was_not_started_has_not_failed(tmp_path: Path) -> None:
    """It was skipped; one that failed, or was stopped, says why in its checks, too."""
    never = Run("attic", None, "not started", interrupted=True, started=False)
    stopped = Run("cellar", None, "stopped before there were figures", interrupted=True)
    status, _ = conclusion([DEAD, stopped, never], "--fail-if", "ate_m>1", "--junit", str(tmp_path / "junit.xml"))
    assert status == 130
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("errors"), suite.get("skipped")) == ("6", "4", "2")
    found = {(case.get("classname"), case.get("name")): (case[0].tag, case[0].get("message") or "") for case in suite}
    assert found["attic", "replay"] == ("skipped", "not started")
    reason = "expected figures to check 'ate_m>1', found none: the replay was not started"
    assert found["attic", "ate_m>1"] == ("skipped", reason)
    tag, message = found["cellar", "ate_m>1"]
    assert tag == "error" and message.endswith("the replay was interrupted: stopped before there were figures")
    tag, message = found["cave", "ate_m>1"]
    assert tag == "error" and message.endswith("the replay failed: expected the replay to run, found it dead ?")


def test_interrupted_run_with_figures_is_no_success(tmp_path: Path) -> None:
    run = Run("hall", SUMMARY, interrupted=True)
    status, text = conclusion([run], "--fail-if", "frames<10", "--junit", str(tmp_path / "junit.xml"))
    assert status == 130 and "interrupted" in text and "100" not in text.split("passed")[1]
    case = ElementTree.parse(tmp_path / "junit.xml").getroot()[0][0]
    assert case[0].tag == "error" and "had been done" in (case[0].get("message") or "")


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScfeatError, match="expected to write"):
        conclusion([GOOD], "--json", str(tmp_path / "file" / "all.json"))


@pytest.mark.parametrize(("option", "name"), [("--json", "all.json"), ("--junit", "all.xml"), ("--table", "all.md")])
def test_the_option_of_an_output_that_cannot_be_written_is_named(tmp_path: Path, option: str, name: str) -> None:
    """They take a file, not a folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ScfeatError, match=rf"{name}, found: .*; free space, or choose another file \({option}\)$"):
        conclusion([GOOD], option, str(tmp_path / "file" / name))
