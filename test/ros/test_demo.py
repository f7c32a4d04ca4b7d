"""The demo as a user runs it: processes of its own, a live graph, files, and the ways in which it must fail cleanly."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`, or colcon build")
pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[demo]'")
pytest.importorskip("tqdm", reason="tqdm is not installed: pip install 'scfeat-python[demo]'")

from rosbags.typesys import Stores, get_typestore

from scfeat_core.geometry import epipolar_distance
from scfeat_core.report import table_rows
from scfeat_ros.bags import COMPRESSED_IMAGE, BagMessage, write_bag
from scfeat_ros.demo_report import PlayedCamera
from scfeat_ros.domain import free_domain
from scfeat_ros.monitor import Spread
from scfeat_ros.processes import SHARED_MEMORY, Child, remove_abandoned_shared_memory, shared_memory_of

PATIENCE = 240.0  # seconds, on a machine with other work
REASONS = {"busy", "stale", "decode", "sync", "no_calibration", "unwanted", "error"}


def demo(spawn: Callable[..., Any], *words: object) -> Any:
    return spawn([sys.executable, "-m", "scfeat_core.cli", "demo", *(str(word) for word in words)])


def jpeg_bag(path: Path, frames: int = 15, damaged: int = 0) -> None:
    """A view that pans over a pattern, as JPEG at 20 Hz; the last ``damaged`` messages are no pictures."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    types = store.types
    rng = np.random.default_rng(0)
    pattern = cv2.GaussianBlur(cv2.resize(rng.integers(0, 255, (60, 90), np.uint8), None, fx=6, fy=6), (5, 5), 0)
    messages = []
    for i in range(frames):
        stamp = 1_600_000_000_000_000_000 + i * 50_000_000
        header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), "lens")
        data = cv2.imencode(".jpg", pattern[40 : 40 + 192, 4 * i : 4 * i + 256])[1].ravel()
        if i >= frames - damaged:
            data = data[:40]
        image = types[COMPRESSED_IMAGE](header, "jpeg", data)
        messages.append(BagMessage("/eye/compressed", stamp, bytes(store.serialize_cdr(image, COMPRESSED_IMAGE))))
    write_bag(path, {"/eye/compressed": COMPRESSED_IMAGE}, messages, "sqlite3")


def numbers(output: str) -> dict[tuple[str, str], list[str]]:
    """(section, name) -> numbers, of each line of the printed table."""
    found, section = {}, ""
    for line in output.splitlines():
        entry = re.fullmatch(r"  (\S.*?)\s{2,}(\S.*)", line)
        if entry is None:
            section = line.strip() or section
        else:
            found[section, entry[1]] = re.findall(r"-?\d[\d.]*|–", entry[2].replace("p95", ""))
    return found


@pytest.mark.live
def test_rendered_camera_through_the_live_node(spawn, tmp_path: Path) -> None:
    process = demo(spawn, "--weights", "random", "--frames", 12, "--fps", 3, "--output", tmp_path / "out")
    assert process.wait(PATIENCE) == 0, process.output
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())
    setup = stored.pop("setup")
    frames = stored["frames"]
    assert frames["published"] == 12
    assert frames["received"] + frames["dropped_before_node"] == 12
    drops = {name.removeprefix("dropped_"): n for name, n in frames.items() if name.startswith("dropped_")}
    assert drops.keys() == REASONS | {"before_node"}
    assert frames["processed"] + sum(drops[reason] for reason in REASONS) == frames["received"]
    assert frames["processed"] >= 2
    assert setup["descriptor_space"] == "scfeat:random"
    assert stored["ms"]["network"]["median"] > 0
    # from the player's clock to this subscriber is longer than inside the node
    assert stored["end_to_end_ms"]["image_to_features"]["median"] > stored["ms"]["network"]["median"]
    assert stored["truth"]["epipolar_error_px"]["median"] < 3, "the poses do not belong to the frames"
    # what is printed is what is stored
    printed = numbers(process.output)
    for section, name, cells in table_rows(stored):
        assert printed[section, name] == [cell.split()[-1] for cell in cells], (section, name)
    page = (tmp_path / "out" / "index.html").read_text()
    for _, name, cells in table_rows(stored):
        assert f"<th>{name}</th>" in page
        assert all(f">{cell}</td>" in page for cell in cells)
    picture = cv2.imread(str(tmp_path / "out" / "matches.png"))
    assert picture.shape == (480, 1280, 3)


def test_bag_with_pictures_that_cannot_be_decoded(spawn, tmp_path: Path) -> None:
    jpeg_bag(tmp_path / "bag", frames=12, damaged=2)
    output = tmp_path / "out"
    process = demo(spawn, "--weights", "random", "--bag", tmp_path / "bag", "--fps", 2, "--output", output)
    assert process.wait(PATIENCE) == 0, process.output
    stored = json.loads((output / "summary.json").read_text())
    assert stored["frames"]["published"] == 12
    assert stored["frames"]["dropped_decode"] >= 1
    assert stored["setup"]["image_topic"] == "/eye/compressed"
    assert "truth" not in stored
    assert "the node's last error" in process.output
    assert (output / "index.html").exists()


def test_thinned_images_make_a_picture_too(spawn, tmp_path: Path) -> None:
    jpeg_bag(tmp_path / "bag")
    # seconds between two images: also a machine that does other things as well takes none for an image too many
    words = ("--weights", "random", "--bag", tmp_path / "bag", "--fps", 1, "--max-fps", 0.2)
    process = demo(spawn, *words, "--output", tmp_path / "out")
    assert process.wait(PATIENCE) == 0, process.output
    frames = json.loads((tmp_path / "out" / "summary.json").read_text())["frames"]
    assert frames["published"] == 3 and frames["processed"] >= 2, process.output
    assert cv2.imread(str(tmp_path / "out" / "matches.png")).shape == (192, 512, 3)


def test_samples_are_spread_over_whatever_comes() -> None:
    for count in range(1, 300):
        spread: Spread[int] = Spread(8)
        for number in range(count):
            spread.offer(lambda n=number: n)
        gaps = np.diff([*spread.items, count])
        assert spread.items[0] == 0 and min(count, 4) <= len(spread.items) <= 8
        assert len(set(gaps[:-1])) <= 1 and gaps[-1] <= max(gaps), "not even"
        chosen = spread.at((0.25, 0.5, 0.75))
        assert min(count, 2) <= len(set(chosen)) == len(chosen) <= 3
        assert count < 20 or 0.1 < chosen[0] / count < 0.4 < chosen[-1] / count < 0.9
    assert Spread[int]().at((0.5,)) == []


def test_missing_weights_are_reported_by_the_node_and_end_the_demo(spawn, tmp_path: Path) -> None:
    jpeg_bag(tmp_path / "bag")
    words = ("--bag", tmp_path / "bag", "--weights", tmp_path / "none.safetensors", "--output", tmp_path / "out")
    process = demo(spawn, *words)
    assert process.wait(PATIENCE) == 2
    assert "expected the node to run to the end" in process.output
    assert "none.safetensors" in process.output
    assert "Traceback" not in process.output


def test_bag_without_images(spawn, tmp_path: Path) -> None:
    store = get_typestore(Stores.ROS2_HUMBLE)
    text = bytes(store.serialize_cdr(store.types["std_msgs/msg/String"]("hello"), "std_msgs/msg/String"))
    write_bag(tmp_path / "bag", {"/chatter": "std_msgs/msg/String"}, [BagMessage("/chatter", 5, text)])
    process = demo(spawn, "--bag", tmp_path / "bag", "--output", tmp_path / "out")
    assert process.wait(60) == 2
    assert "/chatter [std_msgs/msg/String] 1" in process.output


def test_output_that_cannot_be_written(spawn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = demo(spawn, "--output", tmp_path / "file" / "demo")
    assert process.wait(60) == 2
    assert "--output" in process.output


def test_interrupt_leaves_nothing_behind(spawn, tmp_path: Path) -> None:
    """Ctrl-C while the player plays: children and their shared memory are gone."""
    jpeg_bag(tmp_path / "bag")
    words = ("--bag", tmp_path / "bag", "--weights", "random", "--fps", 0.5, "--output", tmp_path / "out")
    process = demo(spawn, *words)
    children = wait_for_children(process, 2)
    wait_for(lambda: "playing" in process.output, process)
    time.sleep(2)
    segments = {pid: shared_memory_of(pid) for pid in (process.popen.pid, *children)}
    mine = set().union(*segments.values())
    assert mine and all(path.exists() for path in mine)
    assert process.stop(patience=60) == 130
    assert "interrupted" in process.output
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    end = time.monotonic() + 10  # a participant of another test that starts just now may be the one that clears them
    while (left := [path for path in mine if path.exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, (segments, process.popen.pid, process.output)


def wait_for(condition: Callable[[], Any], process: Any, timeout: float = PATIENCE) -> Any:
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert process.running, process.output
        assert time.monotonic() < end, process.output
        time.sleep(0.1)
    return value


def wait_for_children(process: Any, count: int) -> list[int]:
    listing = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")

    def found() -> list[int]:
        pids = [int(word) for word in listing.read_text().split()]
        return pids if len(pids) >= count else []

    return wait_for(found, process)


def test_true_geometry_of_the_rendered_camera() -> None:
    """Points of one view, moved by hand into the other, lie on their epipolar lines; the order of the views counts."""
    K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    pose0, pose1 = np.eye(4), np.eye(4)
    pose1[:3, :3] = cv2.Rodrigues(np.array([0.02, 0.1, -0.03]))[0]
    pose1[:3, 3] = (0.3, -0.05, 0.1)
    camera = PlayedCamera("", "", "", False, 2, K, np.stack([pose0, pose1]))
    points = np.random.default_rng(0).uniform((-1, -1, 2), (1, 1, 5), (50, 3))
    seen0, seen1 = points @ K.T, (points - pose1[:3, 3]) @ pose1[:3, :3] @ K.T
    x0, x1 = seen0[:, :2] / seen0[:, 2:], seen1[:, :2] / seen1[:, 2:]
    assert epipolar_distance(x0, x1, camera.fundamental(0, 1)).max() < 1e-6
    assert epipolar_distance(x1, x0, camera.fundamental(1, 2)).max() < 1e-6
    assert np.median(epipolar_distance(x0, x1, camera.fundamental(1, 0))) > 1


def test_two_users_get_two_domains() -> None:
    with free_domain() as first:
        with free_domain() as second:
            assert first != second
        with free_domain() as third:
            assert third == second


def test_a_killed_child_leaves_no_segment_however_young(tmp_path: Path) -> None:
    """What it made goes; that of a living peer, which it had mapped, stays, even where its lock is not taken yet."""
    own, peer, young = (SHARED_MEMORY / f"fastdds_{os.urandom(8).hex()}" for _ in range(3))
    locks = [path.with_name(path.name + "_el") for path in (own, peer, young)]
    program = """
import fcntl, mmap, os, signal, sys
maps = []
for name in sys.argv[1:]:
    with open(name, "w+b") as file:
        file.write(bytes(4096))
        file.flush()
        maps.append(mmap.mmap(file.fileno(), 4096))
lock = open(sys.argv[1] + "_el", "wb")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("ready", flush=True)
signal.pause()
"""
    try:
        with locks[1].open("wb") as living:
            fcntl.flock(living, fcntl.LOCK_EX)
            locks[2].touch()
            command = [sys.executable, "-c", program, *map(str, (own, peer, young))]
            child = Child("peer", command, tmp_path / "log", os.environ)
            end = time.monotonic() + PATIENCE
            while not child.output_size and time.monotonic() < end:
                time.sleep(0.05)
            assert shared_memory_of(child.pid) == {own}
            assert child.stop() < 0
            assert not own.exists() and not locks[0].exists()
            assert all(path.exists() for path in (peer, young, *locks[1:]))
    finally:
        for path in (own, peer, young, *locks):
            path.unlink(missing_ok=True)


def test_shared_memory_of_the_dead_is_removed_and_of_the_living_is_not(tmp_path: Path) -> None:
    dead, alive, young = (tmp_path / ("fastdds_" + letter * 16) for letter in "abc")
    for segment in (dead, alive, young):
        segment.write_bytes(b"x")
        segment.with_name(segment.name + "_el").write_bytes(b"")
    for segment in (dead, alive):
        os.utime(segment.with_name(segment.name + "_el"), (0, 0))
    (tmp_path / "other").write_bytes(b"x")
    with alive.with_name(alive.name + "_el").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_abandoned_shared_memory(tmp_path)
        left = {alive.name, alive.name + "_el", young.name, young.name + "_el", "other"}
        assert {path.name for path in tmp_path.iterdir()} == left


def test_a_child_that_ignores_signals_is_killed_with_its_children(tmp_path: Path) -> None:
    stubborn = (
        "import signal,time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\nprint('up',flush=True)\ntime.sleep(99)"
    )
    with Child("stubborn", [sys.executable, "-S", "-c", stubborn], tmp_path / "log", {}) as child:
        while "up" not in child.last_lines():
            time.sleep(0.05)
        assert child.exit_code is None
        assert child.stop(patience=0.3) == -9
    assert child.exit_code == -9
