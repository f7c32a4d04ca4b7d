"""Many jobs in processes of their own: those that fail, die or are interrupted take no other with them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[bags]'")

from scfeat_core import cli
from scfeat_core.errors import DataError, ScfeatError
from scfeat_ros.bag_from_images import make_bag
from scfeat_ros.bags import write_bag
from scfeat_ros.image_folders import Options, read_folder
from scfeat_ros.processes import Child
from scfeat_ros.replay import cli as replay_cli
from scfeat_ros.replay.batch import cores, output_folders, run_jobs
from scfeat_ros.replay.child import hand_over, result_of
from scfeat_ros.replay.outcomes import Run

PATIENCE = 240.0  # seconds, on a machine with other work
JOBS = '''
    """What the processes run instead of a replay: quick, and in each of the ways in which one can end."""
    import faulthandler, os, signal, sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from scfeat_core.errors import DataError

    @dataclass(frozen=True)
    class Small:
        bag: Path
        out: Path
        what: str = "fine"

    def work(job, report, progress):
        report(f"this is {job.out.name}")
        job.out.mkdir(parents=True, exist_ok=True)
        progress(1, 4)
        if job.what == "error":
            raise DataError("expected a bag, found a cat")
        if job.what == "bug":
            raise RuntimeError("never thought of that")
        if job.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.what == "segfault":
            faulthandler._sigsegv()
        if job.what == "exit":
            os._exit(3)
        if job.what == "wait":
            (job.out / "waits").write_text(str(os.getpid()))
            try:
                time.sleep(300)
            except KeyboardInterrupt:
                (job.out / "ended").write_text("")
                if job.bag.name == "bag1":
                    return {"frames": 2, "interrupted": True}
                raise
        threads = int(os.environ["OMP_NUM_THREADS"])
        return {"frames": 4, "pid": os.getpid(), "threads": threads, "folder": os.getcwd()}
'''


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module that child processes can import."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "small_jobs.py").write_text(textwrap.dedent(JOBS))
    sys.path.insert(0, str(folder))
    yield import_module("small_jobs")
    sys.path.remove(str(folder))


def small(jobs: Any, tmp_path: Path, *whats: str) -> list[Any]:
    return [jobs.Small(tmp_path / f"bag{i}", tmp_path / "out" / f"{i}_{what}", what) for i, what in enumerate(whats)]


def test_one_that_dies_takes_no_other_with_it(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said: list[str] = []
    whats = ("fine", "error", "kill", "segfault", "exit", "bug", "fine")
    runs = run_jobs(small(jobs, tmp_path, *whats), 2, run=jobs.work, report=said.append)
    assert [run.name.partition("_")[2] for run in runs] == list(whats)
    fine, error, kill, segfault, left, bug, last = runs
    for run in (fine, last):
        assert run.summary is not None and run.summary["frames"] == 4 and run.error == "" and run.state == "done"
        assert run.summary["threads"] == max(1, cores() // 2)
        assert run.summary["pid"] != os.getpid() and run.seconds > 0
    assert fine.summary is not None and last.summary is not None and fine.summary["pid"] != last.summary["pid"]
    assert error.error == "expected a bag, found a cat" and error.summary is None
    assert "SIGKILL" in kill.error and "memory" in kill.error and "this is 2_kill" in kill.error
    assert "SIGSEGV" in segfault.error and "small_jobs.py" in segfault.error
    assert "exit status 3" in left.error
    assert "RuntimeError: never thought of that" in bug.error
    assert "Traceback" in (tmp_path / "out" / "5_bug.log").read_text()
    assert not any(run.interrupted or run.reused for run in runs)
    assert len([line for line in said if line.startswith("[")]) == 7


def test_finished_jobs_are_not_done_again(jobs: Any, tmp_path: Path) -> None:
    said: list[str] = []
    finished = lambda job: {"frames": 9} if job.what == "kill" else None  # noqa: E731
    runs = run_jobs(small(jobs, tmp_path, "kill", "fine"), 1, run=jobs.work, finished=finished, report=said.append)
    assert [run.state for run in runs] == ["reused", "done"] and runs[0].summary == {"frames": 9}
    assert said[0] == "1 of 2 bags are complete already" and said[1].startswith("[2/2] 1_fine")


def test_jobs_that_share_a_folder_are_refused(jobs: Any, tmp_path: Path) -> None:
    job = small(jobs, tmp_path, "fine")[0]
    with pytest.raises(DataError, match="a folder of its own"):
        run_jobs([job, job], 1, run=jobs.work)


def test_log_that_cannot_be_written_is_an_error_of_its_run(jobs: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = jobs.Small(tmp_path / "bag", tmp_path / "file" / "bad")
    runs = run_jobs([bad, *small(jobs, tmp_path, "fine")], 2, run=jobs.work, report=lambda line: None)
    assert "--out" in runs[0].error and runs[1].state == "done"


DRIVER = """
    import json, sys
    from pathlib import Path
    import small_jobs
    from scfeat_ros.replay.batch import run_jobs
    root = Path(sys.argv[1])
    jobs = [small_jobs.Small(root / f"bag{i}", root / f"{i}_{what}", what) for i, what in enumerate(sys.argv[2:])]
    runs = run_jobs(jobs, 2, run=small_jobs.work)
    content = [(run.name, run.state, run.summary, run.error) for run in runs]
    (root / "runs.json").write_text(json.dumps(content))
"""


def started(spawn: Callable[..., Any], jobs: Any, tmp_path: Path, *whats: str) -> Any:
    """A process with these jobs, two at a time; all that wait have begun to."""
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    search = {"PYTHONPATH": os.pathsep.join([str(Path(jobs.__file__).parent), *sys.path])}
    process = spawn([sys.executable, str(tmp_path / "driver.py"), str(tmp_path), *whats], **search)
    waiting = [tmp_path / f"{i}_{what}" / "waits" for i, what in enumerate(whats[:3]) if what == "wait"]
    end = time.monotonic() + PATIENCE
    while not all(path.exists() and path.read_text() for path in waiting):
        assert time.monotonic() < end and process.exit_code is None, process.output
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_all_and_keeps_what_was_done(
    spawn: Callable[..., Any], jobs: Any, tmp_path: Path, number: signal.Signals
) -> None:
    process = started(spawn, jobs, tmp_path, "fine", "wait", "wait", "fine")
    os.kill(process.pid, number)
    assert process.wait(PATIENCE) == 0, process.output
    fine, told, raised, never = json.loads((tmp_path / "runs.json").read_text())
    assert fine[1] == "done" and fine[2]["frames"] == 4
    assert told == ["1_wait", "interrupted", {"frames": 2}, ""], "what had been done is reported"
    assert raised == ["2_wait", "interrupted", None, "stopped before there were figures"]
    assert never == ["3_fine", "interrupted", None, "not started"]
    for name in ("1_wait", "2_wait"):
        assert not running(int((tmp_path / name / "waits").read_text()))


@pytest.mark.parametrize("moment", ["__init__", "stop"])
def test_interruption_at_any_moment_loses_no_run(
    jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While a process is started, or what came of it is taken."""
    pressed: list[int] = []

    def press(child: Child, *args: Any, **named: Any) -> Any:
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)
        return usual(child, *args, **named)

    usual = getattr(Child, moment)
    monkeypatch.setattr(Child, moment, press)
    runs = run_jobs(small(jobs, tmp_path, "fine", "fine"), 1, run=jobs.work, report=lambda text: None)
    first, second = runs
    assert pressed and first.name == "0_fine" and second.name == "1_fine"
    assert (first.state, first.summary is None) == (("interrupted", True) if moment == "__init__" else ("done", False))
    assert second.interrupted and second.error == "not started" and not second.started


def test_process_that_has_no_room_is_an_error_of_its_run(
    jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scratch folder cannot be made: the name is too long for the file system."""
    (job,) = small(jobs, tmp_path, "fine")
    (run,) = run_jobs([replace(job, out=tmp_path / ("x" * 300))], run=jobs.work, report=lambda text: None)
    assert run.state == "error" and "expected to start a process" in run.error


@pytest.mark.parametrize(("what", "error"), [("fine", ""), ("bug", "unexpected RuntimeError: never thought of that")])
def test_log_that_runs_full_takes_nothing_of_the_result(jobs: Any, tmp_path: Path, what: str, error: str) -> None:
    (job,) = small(jobs, tmp_path, what)
    hand_over(tmp_path, jobs.work, job)
    paths = os.pathsep.join([str(Path(jobs.__file__).parent), *sys.path])
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "scfeat_ros.replay.child", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=full, stderr=full, env=environment, timeout=PATIENCE, check=False)
    result = result_of(tmp_path)
    assert result is not None and result["error"] == error


def test_children_of_a_killed_parent_end_in_order(spawn: Callable[..., Any], jobs: Any, tmp_path: Path) -> None:
    process = started(spawn, jobs, tmp_path, "wait")
    child = int((tmp_path / "0_wait" / "waits").read_text())
    os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while running(child):
        assert time.monotonic() < end, "the child goes on without its parent"
        time.sleep(0.1)
    assert (tmp_path / "0_wait" / "ended").exists(), "it was killed, too"


def running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_folders_are_named_after_the_bags(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c/hall", "c/hall.mcap", "c/x_run"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    bags = [tmp_path / name for name in ("a/run", "b/run", "c/x_run")]
    assert output_folders(bags, Path("out")) == [Path("out/a_run"), Path("out/b_run"), Path("out/x_run")]
    same = output_folders([tmp_path / "c/hall", tmp_path / "c/hall.mcap"], Path("out"))
    assert len(set(same)) == 2
    assert output_folders([tmp_path / "c" / ".." / "a" / "run"], Path("out")) == [Path("out/run")]


@pytest.mark.parametrize(
    ("bag", "name"),
    [
        ("bags/rec.22", "rec.22"),
        ("rec_2024-05-01.5", "rec_2024-05-01.5"),
        ("a/hall.mcap", "hall"),
        ("hall.v2.db3", "hall.v2"),
        ("hall.bag", "hall"),
        ("hall.bag.active", "hall"),
        ("hall_0.mcap.zstd", "hall_0"),
        ("bags/rec.22/..", "bags"),
        ("/", "bag"),
    ],
)
def test_a_bag_has_one_name_everywhere(bag: str, name: str) -> None:
    """Without the suffixes of bags, and no others: the folder of a run, alone or among others, and its table."""
    args = argparse.ArgumentParser()
    replay_cli.add_arguments(args)
    alone, several = (replay_cli._jobs(args.parse_args(bags)) for bags in ([bag], [bag, "other"]))
    assert alone[0].out == several[0].out == Path("build/replay", name)
    assert Run("run", None, bag=Path(bag)).bag_name == name


def test_bag_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="expected each bag once"):
        output_folders([tmp_path / "run", tmp_path / "." / "run"], Path("out"))


def test_ray_that_is_not_there(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ScfeatError, match=r"scfeat-python\[ray\]"):
        run_jobs(small(jobs, tmp_path, "fine"), 1, "auto", run=jobs.work)


def test_two_workers_of_a_local_ray(spawn: Callable[..., Any], jobs: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'scfeat-python[ray]'")
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER).replace("jobs, 2,", "jobs, 2, 'auto',"))
    search = {"PYTHONPATH": os.pathsep.join([str(Path(jobs.__file__).parent), *sys.path])}
    words = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path), "fine", "error", "kill", "fine"]
    process = spawn(words, **search)
    assert process.wait(PATIENCE) == 0, process.output
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [run[1] for run in runs] == ["done", "error", "error", "done"]
    assert runs[0][2]["frames"] == 4 and runs[0][2]["pid"] != runs[3][2]["pid"]
    assert runs[1][3] == "expected a bag, found a cat" and "2_kill" in runs[2][3]


# -- replays -----------------------------------------------------------------------------------------------------------


def moving_bag(path: Path, frames: int = 5) -> None:
    """A view that pans over a pattern, as PNG at 20 Hz."""
    pattern = cv2.resize(np.random.default_rng(0).integers(0, 255, (60, 90), np.uint8), None, fx=6, fy=6)
    folder = path.with_name(f"{path.name}_images")
    folder.mkdir(parents=True)
    for i in range(frames):
        cv2.imwrite(str(folder / f"{i}.png"), pattern[40 : 40 + 96, 4 * i : 4 * i + 128])
    make_bag(read_folder(folder, Options(fps=20)), path)


def test_replays_of_many_bags_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two with the same name, and one without images; then again, when only that one is left to do."""
    for place in ("morning", "evening"):
        moving_bag(tmp_path / place / "hall")
    write_bag(tmp_path / "silent", {"/chatter": "std_msgs/msg/String"}, [])
    bags = [str(tmp_path / name) for name in ("morning/hall", "evening/hall", "silent")]
    words = ["--workers", "2", "--out", str(tmp_path / "runs"), "--weights", "random", "--no-report"]
    checks = ["--fail-if", "processed<5", "--junit", str(tmp_path / "junit.xml"), "--json", str(tmp_path / "all.json")]
    assert cli.main(["replay", *bags, *words, *checks]) == 2
    assert "silent: error: expected a topic of sensor_msgs/Image" in capsys.readouterr().err
    runs = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["morning_hall", "evening_hall", "silent"]
    assert [run["state"] for run in runs] == ["done", "done", "error"]
    assert runs[0]["summary"]["processed"] == 5 and runs[0]["summary"]["keypoints"] > 0
    assert runs[0]["checks"] == [{"check": "processed<5", "failed": False, "value": 5.0, "reason": "", "error": ""}]
    first, second = (tmp_path / "runs" / name for name in ("morning_hall", "evening_hall"))
    assert (first / "frames.npz").read_bytes() == (second / "frames.npz").read_bytes()
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "0", "2")

    assert cli.main(["replay", *bags[:2], *words, "--fail-if", "processed<=5"]) == 1
    said = capsys.readouterr()
    assert said.out.count("reused") == 2 and "FAILED: expected processed > 5, found 5" in said.err

    one = ["--out", str(tmp_path / "one"), "--junit", str(tmp_path / "one.xml")]
    assert cli.main(["replay", bags[2], *one]) == 2
    assert "one: error: expected a topic of sensor_msgs/Image" in capsys.readouterr().err
    assert ElementTree.parse(tmp_path / "one.xml").getroot()[0].get("errors") == "1"
