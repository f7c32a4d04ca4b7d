"""A bag into the live graph: what is played, what is measured and recorded, and how it ends when something fails."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`, or colcon build")
pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[bags]'")
pytest.importorskip("tqdm", reason="tqdm is not installed: pip install 'scfeat-python[replay]'")

import itertools

from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from scfeat.msg import FrontendStatus
from sensor_msgs.msg import CompressedImage

from scfeat_core.errors import ConfigError, DataError, ScfeatError
from scfeat_ros.bags import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, BagMessage, open_bag, write_bag
from scfeat_ros.messages import stamp_from_nanoseconds
from scfeat_ros.monitor import Heard
from scfeat_ros.offered_qos import Offer, merged, read_offers
from scfeat_ros.player import CLOCK, Event, Window, recorded_events, ticks, with_clock
from scfeat_ros.processes import shared_memory_of
from scfeat_ros.replay import outcomes
from scfeat_ros.replay.job import ReplayJob
from scfeat_ros.replay.live import run_live
from scfeat_ros.replay.live_plan import LiveOptions, graph_plan, own_plan
from scfeat_ros.replay.live_report import (
    FILES,
    SUMMARY_NAMES,
    CameraRun,
    LiveRun,
    figures_of,
    quantiles,
    summary_of,
    warnings_of,
    write_files,
)
from scfeat_ros.replay.recorder import LEAST, Recorder, installed_types

START = 1_600_000_000_000_000_000
MS = 1_000_000
PERIOD = 50 * MS
PATIENCE = 400.0  # seconds, on a machine with other work
BEST_EFFORT, RELIABLE = QosReliability.BEST_EFFORT, QosReliability.RELIABLE

store = get_typestore(Stores.ROS2_HUMBLE)


def header(i: int) -> Any:
    stamp = store.types["builtin_interfaces/msg/Time"](*divmod(START + i * PERIOD, 10**9))
    return store.types["std_msgs/msg/Header"](stamp, "lens")


def image(i: int) -> bytes:
    """A view that pans over a pattern, JPEG, 256x192."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 160), np.uint8)
    pattern = cv2.GaussianBlur(cv2.resize(noise, None, fx=6, fy=6), (5, 5), 0)
    data = cv2.imencode(".jpg", pattern[40:232, 4 * (i % 150) : 4 * (i % 150) + 256])[1].ravel()
    return bytes(store.serialize_cdr(store.types[COMPRESSED_IMAGE](header(i), "jpeg", data), COMPRESSED_IMAGE))


def camera_info(i: int) -> bytes:
    roi = store.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    K = np.array([200.0, 0, 128, 0, 200, 96, 0, 0, 1])
    P = np.array([200.0, 0, 128, 0, 0, 200, 96, 0, 0, 0, 1, 0])
    info = store.types[CAMERA_INFO](header(i), 192, 256, "plumb_bob", np.zeros(5), K, np.eye(3).ravel(), P, 0, 0, roi)
    return bytes(store.serialize_cdr(info, CAMERA_INFO))


def profile(reliability: QosReliability, depth: int = 7, durability: QosDurability = QosDurability.VOLATILE) -> Qos:
    never, live = QosTime(2147483647, 4294967295), QosLiveliness.AUTOMATIC
    return Qos(QosHistory.KEEP_LAST, depth, reliability, durability, never, never, live, never, False)


def record(
    path: Path, frames: int = 12, eyes: tuple[str, ...] = ("/eye",), qos: tuple[Qos, ...] = (), version: int = 9
) -> Path:
    """Images of each eye with CameraInfo, at 20 Hz, recorded 3 ms after their stamps."""
    writer = Writer(path, version=version, storage_plugin=StoragePlugin.MCAP)  # type: ignore[arg-type]
    with writer:
        topics = {}
        for eye in eyes:
            for name, kind in (("camera_info", CAMERA_INFO), ("image/compressed", COMPRESSED_IMAGE)):
                key = f"{eye}/{name}"
                topics[key] = writer.add_connection(key, kind, typestore=store, offered_qos_profiles=qos)
        for i in range(frames):
            for eye in eyes:
                writer.write(topics[f"{eye}/camera_info"], START + i * PERIOD + 3 * MS, camera_info(i))
                writer.write(topics[f"{eye}/image/compressed"], START + i * PERIOD + 3 * MS, image(i))
    return path


def live(spawn: Callable[..., Any], *words: object, before: Sequence[str] = ()) -> Any:
    command = [*before, sys.executable, "-m", "scfeat_core.cli", "replay", "--live", *(str(word) for word in words)]
    return spawn(command, OMP_NUM_THREADS="1")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "live.json").read_text())


def assert_adds_up(frames: dict[str, int]) -> None:
    """Every image that was published is in one of the counts."""
    dropped = {name: count for name, count in frames.items() if name.startswith("dropped_")}
    before = dropped.pop("dropped_before_node")
    assert frames["received"] + before == frames["published"]
    assert frames["processed"] + sum(dropped.values()) + frames["still_in_work"] == frames["received"]


# -- with the node -----------------------------------------------------------------------------------------------------


@pytest.mark.live
def test_a_bag_through_a_node_of_its_own(spawn, tmp_path: Path) -> None:
    bag = record(tmp_path / "bag", eyes=("/eye/left", "/eye/right"))
    out = tmp_path / "out"
    words = (
        "--rate",
        0.5,
        "--frames",
        10,
        "--start",
        0.1,
        "--stop",
        30,
        "-p",
        "weights=random",
        "-p",
        "max_keypoints=100",
        "-p",
        "stereo=[]",
    )
    process = live(spawn, bag, "--out", out, *words, "--fail-if", "processed<1")
    assert process.wait(PATIENCE) == 0, process.output
    found = results(out)
    assert found["setup"]["problems"] == [] and not found["setup"]["interrupted"]
    assert found["setup"]["cameras"] == {side: f"/eye/{side}/image/compressed" for side in ("left", "right")}
    assert found["setup"]["beside"] == ["/eye/left/camera_info", "/eye/right/camera_info"]
    rows = list(csv.DictReader((out / "latency.csv").open()))
    stamps = [START + (2 + i) * PERIOD for i in range(10)]
    recorded = recorded_messages(out / "recording")
    for side in ("left", "right"):
        frames = found[f"{side}_frames"]
        assert frames["published"] == 10 and frames["processed"] >= 1 and frames["still_in_work"] == 0
        assert_adds_up(frames)
        mine = [row for row in rows if row["camera"] == side]
        assert [int(row["stamp_ns"]) for row in mine] == stamps
        features = recorded[f"/scfeat/{side}/features"]
        assert len(features) == frames["processed"] == sum(row["features_ms"] != "" for row in mine)
        assert {stamp for stamp, _, _ in features} <= set(stamps), "not the stamps of the images"
        latency = found[f"{side}_latency_ms"]["image_to_features"]
        inside = found[f"{side}_inside_node_ms"]["network"]
        assert inside["p50"] < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
        # the clock of the node is that of the bag, at half the speed: the age is about half of the latency
        age = found[f"{side}_image_age_ms"]["at_publishing"]["max"]
        assert 0.2 * latency["max"] < age < 0.8 * latency["max"] + 50
    assert found["player"]["late_ms"]["max"] > 0
    published = [float(row["published_ms"]) for row in rows if row["camera"] == "left"]
    assert np.median(np.diff(published)) == pytest.approx(100, abs=20), "not at half the speed"
    arrived = [time for _, time, _ in recorded["/scfeat/left/features"]]
    assert abs(arrived[-1] / 1e9 - time.time()) < PATIENCE and arrived == sorted(arrived), "not logged as they arrived"
    assert recorded["/scfeat/left/status"] and recorded["/diagnostics"]
    page = (out / "live.html").read_text()
    assert "<svg" in page and "Image to features" in page and "http://" not in page.replace("http://www.w3.org", "")
    before = files_below(out)
    again = live(spawn, bag, "--out", out, "-p", "weight=x")
    assert again.wait(PATIENCE) == 2 and "weights" in again.output and "Traceback" not in again.output
    assert files_below(out) == before


def recorded_messages(path: Path) -> dict[str, list[tuple[int, int, Any]]]:
    """Topic -> (stamp, log time, message), read with the definitions in the bag, and with ``open_bag``."""
    found: dict[str, list[tuple[int, int, Any]]] = {}
    types = installed_types({"scfeat/msg/Features", "scfeat/msg/FrontendStatus", "scfeat/msg/Matches"})
    types.register(installed_types({"scfeat/msg/Tracks", "diagnostic_msgs/msg/DiagnosticArray"}).fielddefs)
    with Reader(path) as reader:
        assert all(connection.msgdef.data for connection in reader.connections)
        for connection, log_time, data in reader.messages():
            message = types.deserialize_cdr(data, connection.msgtype)
            stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
            found.setdefault(connection.topic, []).append((stamp, log_time, message))
    with open_bag(path) as bag:
        assert {topic.name: topic.count for topic in bag.topics if topic.count} == {
            name: len(messages) for name, messages in found.items()
        }
    return found


@pytest.mark.live
def test_interrupt_ends_in_order(spawn, tmp_path: Path) -> None:
    """Ctrl-C, more than once: children gone, their shared memory too, the recording complete, the report written.
    The other bag is not begun, and said to be so."""
    bag, other, junit = record(tmp_path / "bag", frames=100), tmp_path / "other", tmp_path / "junit.xml"
    process = live(
        spawn, bag, other, "--out", tmp_path / "out", "--junit", junit, "--rate", 0.5, "-p", "weights=random"
    )
    listing = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
    wait_for(lambda: "playing" in process.output and len(listing.read_text().split()) == 2, process)
    children = [int(word) for word in listing.read_text().split()]
    time.sleep(5)
    mine = set().union(*(shared_memory_of(pid) for pid in (process.popen.pid, *children)))
    for _ in range(3):
        process.popen.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(PATIENCE) == 130, process.output
    assert "Traceback" not in process.output
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert mine
    wait_until(lambda: not any(path.exists() for path in mine), "shared memory is left")
    found = results(tmp_path / "out" / "bag")
    assert found["setup"]["interrupted"]
    assert found["frames"]["published"] < 100
    assert_adds_up(found["frames"])
    assert (tmp_path / "out" / "bag" / "live.html").exists()
    messages = recorded_messages(tmp_path / "out" / "bag" / "recording")
    assert sum(map(len, messages.values())) == found["recording"]["messages"] > 0
    ends = {case.get("classname"): case[0].tag for case in ElementTree.parse(junit).getroot()[0]}
    assert ends == {"bag": "error", "other": "skipped"}


def earlier_run(out: Path) -> dict[Path, bytes]:
    """A finished run in a folder: path -> content."""
    with Recorder(out) as recorder:
        recorder.open({"/s/status": "scfeat/msg/FrontendStatus"})
        recorder.write("/s/status", 1, status())
    for name in FILES:
        (out / name).write_text(f"{name} of before")
    return files_below(out)


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("job", "options", "said"),
    [
        ({"topic": "/nope"}, {}, "expected an image topic '/nope'"),
        ({"start": 1000.0}, {}, "expected images from 1000 s on"),
        ({}, {"settings": {"max_keypoint": 7}}, "max_keypoint"),
        ({}, {"node": "/nobody", "patience": 1.0}, "found the nodes"),
    ],
)
def test_what_fails_before_anything_is_played_leaves_an_earlier_run(
    domain: int, tmp_path: Path, job: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    bag, out = record(tmp_path / "bag", 3), tmp_path / "out"
    out.mkdir()
    before = earlier_run(out)
    with pytest.raises(ScfeatError, match=said):
        run_live(ReplayJob(bag, out, **job), LiveOptions(**options))
    assert files_below(out) == before


@pytest.mark.live
def test_a_start_that_ends_early_leaves_an_earlier_run(spawn: Callable[..., Any], domain: int, tmp_path: Path) -> None:
    """The node refuses its weights, or Ctrl-C comes while it is looked for."""
    bag, out = record(tmp_path / "bag", 3), tmp_path / "out"
    out.mkdir()
    before = earlier_run(out)
    process = live(spawn, bag, "--out", out, "--weights", "nowhere.safetensors")
    assert process.wait(PATIENCE) == 2 and "nowhere.safetensors" in process.output, process.output
    assert files_below(out) == before

    process = live(spawn, bag, "--out", out, "--node", "/nobody", "--patience", 300)
    wait_for(lambda: "looking for /nobody" in process.output, process)
    process.popen.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130, process.output
    assert "out: interrupted: stopped before anything was played" in process.output
    assert "Traceback" not in process.output and files_below(out) == before


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = ReplayJob(record(tmp_path / "bag", 3), tmp_path / "file" / "out")
    with pytest.raises(ScfeatError, match=r"expected to write .*file/out.*choose another folder \(--out\)"):
        run_live(job, LiveOptions())


def wait_for(condition: Callable[[], Any], process: Any) -> None:
    wait_until(lambda: not process.running or condition(), process.output)
    assert process.running, process.output


def wait_until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.mark.live
def test_a_node_that_dies(spawn, tmp_path: Path) -> None:
    bag = record(tmp_path / "bag", frames=100)
    process = live(spawn, bag, "--out", tmp_path / "out", "--rate", 0.5, "-p", "weights=random")
    listing = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
    wait_for(lambda: "playing" in process.output and len(listing.read_text().split()) == 2, process)
    node, player = sorted(int(word) for word in listing.read_text().split())
    time.sleep(5)
    os.kill(node, signal.SIGKILL)
    assert process.wait(PATIENCE) == 2, process.output
    assert "expected the node to run to the end, found it ended by signal 9" in process.output
    assert "Traceback" not in process.output
    assert not Path(f"/proc/{player}").exists()
    assert_adds_up(results(tmp_path / "out")["frames"])
    recorded_messages(tmp_path / "out" / "recording")


@pytest.mark.live
def test_a_running_node(ros, start, spawn, small_disk, tmp_path: Path) -> None:
    """One node, and all that can go wrong with it, the end of it last."""
    remaps = ("-r", "image:=/eye/image", "-r", "camera_info:=/eye/camera_info", "-p", "image_transport:=compressed")
    parameters = ("-p", "max_keypoints:=1000", "-p", "descriptor_type:=float32")
    demanding = ("-p", "qos_overrides./eye/image/compressed.subscription.reliability:=reliable")
    node = start(*remaps, *parameters, *demanding)
    out = tmp_path / "out"

    def play(bag: Path, *words: object, **options: Any) -> Any:
        return live(spawn, bag, "--out", out, "--node", "/scfeat", "--clock", 0, *words, **options)

    # damaged in the middle: the rest is played
    good = record(tmp_path / "good", frames=40)
    damaged = damage(record(tmp_path / "damaged", frames=200))
    process = play(damaged, "--rate", 10, "--patience", 300)
    assert process.wait(PATIENCE) == 0, process.output
    found = results(out)
    assert 50 < found["frames"]["published"] < 200
    assert_adds_up(found["frames"])
    assert any("only the readable part was played" in problem for problem in found["setup"]["problems"])

    # what was recorded as best effort is played so, and this node does not take it
    shaky = record(tmp_path / "shaky", qos=(profile(BEST_EFFORT),))
    process = play(shaky, "--patience", 8)
    assert process.wait(PATIENCE) == 2, process.output
    assert "/scfeat asks for reliability reliable, which is not offered: play with --qos reliable" in process.output
    assert results(out)["frames"]["published"] == 0, "the report is written"
    process = play(shaky, "--qos", "reliable", "--outputs", "tracks")
    assert process.wait(PATIENCE) == 0, process.output
    found = results(out)
    assert found["frames"]["published"] == 12 and "image_to_features" not in found["latency_ms"]
    assert_adds_up(found["frames"])
    assert "/scfeat/features" not in recorded_messages(out / "recording")

    # names that do not fit
    elsewhere = record(tmp_path / "elsewhere", eyes=("/nose",))
    process = play(elsewhere)
    assert process.wait(PATIENCE) == 2
    assert "the node subscribes to /eye/camera_info" in process.output and "--play-as" in process.output
    process = play(elsewhere, "--topic", "/nose/image", "--patience", 5)
    assert process.wait(PATIENCE) == 2
    assert "subscribed to: /eye/image/compressed" in process.output
    before = files_below(out)
    process = live(spawn, good, "--out", out, "--node", "/nobody", "--patience", 6)
    assert process.wait(PATIENCE) == 2
    assert "found the nodes /scfeat" in process.output
    assert files_below(out) == before
    namesake = ros.create_node("scfeat")
    process = play(good, "--rate", 0.1, "--patience", 6)  # seconds in which it becomes known, whenever that is
    assert process.wait(PATIENCE) == 2, process.output
    assert "found 2 nodes of that name" in process.output
    namesake.destroy_node()
    names = (
        "--play-as",
        "/nose/image/compressed=/eye/image/compressed",
        "--play-as",
        "/nose/camera_info:=/eye/camera_info",
    )
    process = play(elsewhere, *names)
    assert process.wait(PATIENCE) == 0, process.output
    assert results(out)["frames"]["published"] == 12

    # a node that stalls
    seen: list[Any] = []
    ros.create_node().create_subscription(CompressedImage, "/eye/image/compressed", seen.append, 10)
    process = play(good, "--rate", 0.1, "--patience", 4)
    ros.spin_until(lambda: len(seen) > 3 or not process.running, PATIENCE, "images of the player")
    node.popen.send_signal(signal.SIGSTOP)
    assert process.wait(PATIENCE) == 2
    assert "its process hangs, or is stopped" in process.output
    assert 0 < results(out)["frames"]["published"] < 40
    node.popen.send_signal(signal.SIGCONT)

    # a disk that runs full
    process = play(good, "--rate", 0.25, before=small_disk(out, 4200, tmp_path / "saved"))
    assert process.wait(PATIENCE) == 2, process.output
    assert "no space left" in process.output
    out = tmp_path / "saved"
    found = results(out)
    assert found["frames"]["published"] == 40 and found["recording"]["messages"] > 10
    assert_adds_up(found["frames"])
    assert sum(map(len, recorded_messages(out / "recording").values())) == found["recording"]["messages"]


def damage(bag: Path) -> Path:
    (file,) = bag.glob("*.mcap")
    data = bytearray(file.read_bytes())
    assert len(data) > 3_000_000, "one chunk only"
    data[1_400_000:1_600_000] = bytes(200_000)
    file.write_bytes(data)
    return bag


# -- what is played ----------------------------------------------------------------------------------------------------


def test_the_clock_is_that_of_the_bag() -> None:
    """At twice the speed, 100 Hz: a tick every 20 ms of the bag, and one with each image; never back, even if the bag
    does.
    """
    times = [0, 3, 50, 50, 47, 200]  # ms, of messages 1 and 3, which are no images, and others
    events = [
        Event(time * MS // 2, None if i in (1, 3) else i, 0, b"", "eye", START + time * MS)
        for i, time in enumerate(times)
    ]
    played = list(with_clock(events, 2.0, 100.0))
    assert [event for event in played if event.topic != CLOCK] == events
    clock = [event for event in played if event.topic == CLOCK]
    now = [event.stamp - START for event in clock]
    assert now == sorted(now) and now[-1] == 200 * MS
    assert np.diff([event.due for event in clock]).max() <= 10 * MS
    for event, after in itertools.pairwise(played):
        if after.index is not None:
            assert event.topic == CLOCK and event.stamp == max(after.time, START + 50 * MS * (after.due >= 23 * MS))
    for event in clock:
        assert abs(event.stamp - START - 2 * event.due) <= 3 * MS
    rest = list(ticks(clock[-1].stamp, 2.0, 100.0, 0.5))
    assert len(rest) == 50 and rest[-1].stamp == START + 1200 * MS and rest[-1].due == 500 * MS


def test_several_cameras_are_counted_each(tmp_path: Path) -> None:
    with open_bag(record(tmp_path / "bag", frames=3, eyes=("/a", "/b"))) as bag:
        topics = {topic.name: topic for topic in bag.topics}
        cameras = {topics[f"/{eye}/image/compressed"]: eye for eye in "ab"}
        events = list(recorded_events(bag, cameras, {topics["/a/camera_info"]: "info"}, 4.0))
    assert [(event.topic, event.index) for event in events[:3]] == [("info", None), ("a", 0), ("b", 0)]
    assert [event.index for event in events if event.topic == "b"] == [0, 1, 2]
    assert [event.due for event in events if event.topic == "a"] == [i * PERIOD // 4 for i in range(3)]
    assert [event.message for event in events if event.topic == "b"] == [image(i) for i in range(3)]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_window_of_a_bag_is_played(tmp_path: Path, storage: str) -> None:
    """From the first image on; the calibration that holds there comes first; the clock begins there, too."""
    messages, types = [], {"/eye/image/compressed": COMPRESSED_IMAGE, "/eye/camera_info": CAMERA_INFO}
    for i in range(2000):
        at = START + i * PERIOD + 3 * MS
        if i in (0, 10, 1900):
            messages.append(BagMessage("/eye/camera_info", at - MS, camera_info(i)))
        messages.append(BagMessage("/eye/image/compressed", at, image(i)))
    write_bag(tmp_path / "bag", types, messages, storage)
    with open_bag(tmp_path / "bag") as bag:
        topics = {topic.name: topic for topic in bag.topics}
        cameras, beside = {topics["/eye/image/compressed"]: "eye"}, {topics["/eye/camera_info"]: "info"}

        def events(**window: Any) -> list[Event]:
            return list(recorded_events(bag, cameras, beside, 2.0, window=Window(**window)))

        found = events(start=90.0, stop=95.5)
        assert [event.message for event in found] == [
            camera_info(10),
            *(image(i) for i in range(1800, 1900)),
            camera_info(1900),
            *(image(i) for i in range(1900, 1910)),
        ]
        assert found[0].due == found[1].due == 0 and found[1].index == 0
        assert [event.due for event in found if event.topic == "eye"] == [i * PERIOD // 2 for i in range(110)]
        clock = [event.stamp for event in with_clock(found, 2.0, 100.0) if event.topic == CLOCK]
        begin = START + 1800 * PERIOD + 3 * MS
        assert clock[0] == begin and clock[-1] == begin + 109 * PERIOD and clock == sorted(clock)
        whole = events()
        assert len(whole) == 2003 and events(stop=1e4) == whole and events(stop=0.1)[1:] == whole[1:3]
        with pytest.raises(DataError, match=r"expected images from 101 s on in .*found none"):
            events(start=101.0)


@pytest.mark.parametrize("version", [8, 9])
def test_recorded_qos(tmp_path: Path, version: int) -> None:
    """Of all versions of metadata.yaml: numbers in a text, or words."""
    kept = profile(RELIABLE, 3, QosDurability.TRANSIENT_LOCAL)
    bag = record(tmp_path / "bag", 1, qos=(profile(BEST_EFFORT), kept), version=version)
    expected = [Offer(7, False, False), Offer(3, True, True)]
    assert read_offers(bag)["/eye/camera_info"] == expected
    assert read_offers(bag / "bag.mcap")["/eye/camera_info"] == expected
    assert read_offers(bag / "metadata.yaml") == read_offers(tmp_path) == {}
    assert merged(expected) == Offer(7, False, False) and merged(expected[1:]) == Offer(3, True, True)
    assert merged([]) == Offer(0, True, False)
    plain = record(tmp_path / "plain", 1, version=version)
    assert read_offers(plain) == {"/eye/camera_info": [], "/eye/image/compressed": []}
    (plain / "metadata.yaml").write_text("rosbag2_bagfile_information: [")
    assert read_offers(plain) == {}


def plan(bag: Path, **values: Any) -> Any:
    options = {name: values.pop(name) for name in list(values) if name in LiveOptions.__dataclass_fields__}
    with open_bag(bag) as opened:
        return own_plan(opened, ReplayJob(bag, Path("out"), **values), LiveOptions(**options))


def test_what_a_node_of_our_own_is_told(tmp_path: Path) -> None:
    one = record(tmp_path / "one", 2)
    made = plan(one, settings={"max_keypoints": 7})
    assert [(camera.name, camera.played, camera.count) for camera in made.cameras] == [
        ("camera", "/eye/image/compressed", 2)
    ]
    assert made.beside == {"/eye/camera_info": "/eye/camera_info"}
    words = " ".join(made.words)
    assert "-r image:=/eye/image -r camera_info:=/eye/camera_info" in words
    assert 'image_transport:="compressed"' in words and "max_keypoints:=7" in words and "use_sim_time:=true" in words
    assert "use_sim_time:=false" in plan(one, clock=0.0).words

    pair = record(tmp_path / "pair", 2, ("/rig/cam1", "/rig/cam0", "/rig/cam0_depth"))
    made = plan(pair)
    assert [(camera.name, camera.topic) for camera in made.cameras] == [
        ("left", "/rig/cam0/image/compressed"),
        ("right", "/rig/cam1/image/compressed"),
    ]
    assert 'stereo:=["left:right"]' in made.words and "right/image:=/rig/cam1/image" in made.words
    assert len(plan(pair, topic="/rig/cam1/image").cameras) == 1
    assert str(made) == (
        "/rig/cam0/image/compressed, /rig/cam1/image/compressed (both cameras of the pair; --topic "
        "/rig/cam0/image/compressed plays one of them)"
    )
    assert str(plan(one)) == "/eye/image/compressed (the only image topic)"
    assert plan(pair, topic="/rig/cam1/image").why == "as asked for"
    bare = plan(pair, camera_info="none")
    assert bare.beside == {} and not any(word.startswith("stereo") for word in bare.words)
    made = plan(pair, topic="/rig/cam0/image,/rig/cam0_depth/image", play_as={"/rig/cam0/image/compressed": "/a"})
    assert [camera.played for camera in made.cameras] == ["/a/compressed", "/rig/cam0_depth/image/compressed"]
    assert not any(word.startswith("stereo") for word in made.words)


def test_what_a_running_node_takes(tmp_path: Path) -> None:
    """As the graph and its diagnostics say: which topics, which of them are masks, and of which camera each is."""
    bag = record(tmp_path / "bag", 1, ("/a", "/b", "/mask", "/other"))
    compressed = {f"/{name}/image/compressed": COMPRESSED_IMAGE for name in ("a", "b", "mask")}
    infos = {f"/{name}/camera_info": CAMERA_INFO for name in ("a", "b")}

    def chosen(taken: dict[str, str], inputs: dict[str, str], info: str | None = None, **options: Any) -> Any:
        heard = {f"/n/{name}/status": Heard(name) for name in inputs or ("only",)}
        graph = SimpleNamespace(subscribed=lambda types: taken, inputs=inputs, heard=heard)
        with open_bag(bag) as opened:
            made = ReplayJob(bag, Path("out"), camera_info=info)
            return graph_plan(opened, made, LiveOptions(node="/n", **options), graph)  # type: ignore[arg-type]

    made = chosen(compressed | infos, {"left": "/a/image", "right": "/b/image"})
    assert {camera.name: camera.topic for camera in made.cameras} == {
        "left": "/a/image/compressed",
        "right": "/b/image/compressed",
    }
    assert set(made.beside) == {*infos, "/mask/image/compressed"}
    bare = chosen(compressed | infos, {"left": "/a/image", "right": "/b/image"}, info="none")
    assert set(bare.beside) == {"/mask/image/compressed"} and bare.cameras == made.cameras
    renamed = {"/other/image/compressed": "/x/compressed"}
    made = chosen({"/x/compressed": COMPRESSED_IMAGE}, {}, play_as=renamed)
    assert [(camera.name, camera.topic, camera.played) for camera in made.cameras] == [
        ("only", "/other/image/compressed", "/x/compressed")
    ]
    with pytest.raises(ScfeatError, match=r"the node subscribes to /a/image \[sensor_msgs/msg/Image\]"):
        chosen({"/a/image": IMAGE}, {})
    with pytest.raises(ScfeatError, match="the node subscribes to nothing: is it active?"):
        chosen({}, {})


def test_what_cannot_be_played_is_named(tmp_path: Path) -> None:
    one = record(tmp_path / "one", 1)
    with pytest.raises(ScfeatError, match="expected an image topic '/nose'"):
        plan(one, topic="/nose")
    with pytest.raises(
        ConfigError, match=r"expected a topic /imu of sensor_msgs/msg/Imu in .*, found /eye/camera_info"
    ):
        plan(one, imu="/imu")
    with pytest.raises(ConfigError, match="expected different image topics"):
        plan(one, topic="/eye/image,/eye/image")
    with pytest.raises(ConfigError, match="max_keypoint"):
        plan(one, settings={"max_keypoint": 7})
    for name, value in (("rate", 0.0), ("rate", float("nan")), ("clock", -1.0), ("patience", float("inf"))):
        with pytest.raises(ConfigError, match=f"expected --{name} between"):
            LiveOptions(**{name: value})


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_definitions_are_those_of_the_installed_messages() -> None:
    """By the hashes that the message generators computed."""
    from ament_index_python.packages import get_package_share_directory

    names = ("Features", "Matches", "Tracks", "FrontendStatus")
    types = installed_types({f"scfeat/msg/{name}" for name in names})
    for name in names:
        file = Path(get_package_share_directory("scfeat")) / "msg" / f"{name}.json"
        if not file.exists():
            pytest.skip("this ROS does not hash its messages")
        hashes = {entry["type_name"]: entry["hash_string"] for entry in json.loads(file.read_text())["type_hashes"]}
        assert types.hash_rihs01(f"scfeat/msg/{name}") == hashes[f"scfeat/msg/{name}"]
    with pytest.raises(ScfeatError, match="expected the definition of nowhere/msg/Thing in the installed package"):
        installed_types({"nowhere/msg/Thing"})


def status(count: int = 0, **values: Any) -> bytes:
    from rclpy.serialization import serialize_message

    return serialize_message(status_message(count, **values))


def status_message(count: int, **values: Any) -> FrontendStatus:
    message = FrontendStatus(camera="camera", received=count, **values)
    message.header.stamp = stamp_from_nanoseconds(START + count * PERIOD)
    return message


def test_a_recording_is_a_bag(tmp_path: Path) -> None:
    for count in (0, 5):  # the second one replaces the first
        with Recorder(tmp_path) as recorder:
            recorder.open({"/s/status": "scfeat/msg/FrontendStatus", "/s/tracks": "scfeat/msg/Tracks"})
            for i in range(count):
                recorder.write("/s/status", 10 + i, status(i))
        assert recorder.problem == "" and recorder.count == count
        found = recorded_messages(tmp_path / "recording")
        assert [message.received for _, _, message in found.get("/s/status", [])] == list(range(count))
        assert [time for _, time, _ in found.get("/s/status", [])] == list(range(10, 10 + count))
    (tmp_path / "recording" / "mine.txt").write_text("keep")
    with pytest.raises(ScfeatError, match="found mine.txt: choose another folder"):
        Recorder(tmp_path)
    assert (tmp_path / "recording" / "mine.txt").exists()


def test_a_recording_is_replaced_when_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes counts as room for the next one."""
    before = earlier_run(tmp_path)
    monkeypatch.setattr("scfeat_ros.replay.recorder._free", lambda folder: LEAST - 1)
    recorder = Recorder(tmp_path)
    with pytest.raises(ScfeatError, match="the definition of nowhere/msg/Thing"):
        recorder.open({"/a": "nowhere/msg/Thing"})
    assert files_below(tmp_path) == before
    recorder.open({"/a": "scfeat/msg/FrontendStatus"})
    recorder.close()
    assert recorded_messages(tmp_path / "recording") == {}
    shutil.rmtree(tmp_path / "recording")
    with pytest.raises(ScfeatError, match="for the recording, found 4.0 MB: make room"):
        Recorder(tmp_path)


def test_a_write_that_fails_leaves_what_was_written(tmp_path: Path) -> None:
    """The limit of the process on the size of a file stands for a disk whose free space nobody knew."""
    script = f"""
import resource, signal
from pathlib import Path
from scfeat_ros.replay.recorder import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, 2_500_000))
with Recorder(Path({str(tmp_path)!r})) as recorder:
    recorder.open({{"/a": "scfeat/msg/Features"}})
    for i in range(100):
        recorder.write("/a", i, bytes([0, 1, 0, 0]) + bytes(99_996))
print(recorder.problem)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout and "can be read up to its end" in done.stdout
    with open_bag(tmp_path / "recording") as bag:
        messages = list(bag.messages(bag.topics))
        assert 15 <= len(messages) <= 25 and bag.damage
        assert all(len(message.data) == 100_000 for message in messages)


# -- what is measured --------------------------------------------------------------------------------------------------


def camera_run(lost: int = 0) -> CameraRun:
    """Ten images, 50 ms apart; every other one comes back, after 10, 12, 14 ... ms."""
    heard = Heard()
    heard.take(status_message(100, processed=50, dropped_busy=50), 0)
    for i in range(0, 10, 2):
        last = status_message(0, processed=51 + i // 2, dropped_busy=50 + i // 2, ms_network=5.0 + i, age_ms=20.0)
        last.received = 101 + i
        last.header.stamp = stamp_from_nanoseconds(START + i * PERIOD)
        heard.take(last, i)
        heard.take(last, i)  # a status comes more often than a frame
    sent = [(i, START + i * PERIOD, 7_000 * MS + i * PERIOD) for i in range(10 + lost)]
    features = [(stamp, at + (10 + i) * MS) for i, stamp, at in sent[:10:2]]
    return CameraRun("camera", "/eye", sent, heard, {"features": features, "matches": []})


def test_figures_of_a_known_run(tmp_path: Path) -> None:
    run = LiveRun([camera_run(lost=2)], {"late_ms": {"median": 0.1, "p95": 0.2, "max": 0.3}, "cpu": 0.05}, 17)
    figures = figures_of(run)
    frames = figures["frames"]
    assert (frames["published"], frames["received"], frames["processed"]) == (12, 9, 5)
    assert (frames["dropped_busy"], frames["still_in_work"], frames["dropped_before_node"]) == (4, 0, 3)
    assert_adds_up(frames)  # type: ignore[arg-type]
    expected = {"mean": 14.0, "p50": 14.0, "p95": 17.6, "p99": 17.9, "max": 18.0}
    assert figures["latency_ms"]["image_to_features"] == expected
    assert figures["latency_ms"]["image_to_matches"] == dict.fromkeys(("mean", "p50", "p95", "p99", "max"))
    assert figures["rate_hz"]["published"] == 20 and figures["rate_hz"]["features"] == pytest.approx(9.8, abs=0.1)
    assert figures["inside_node_ms"]["network"]["p50"] == 9 and figures["per_frame"]["frames_in_status"] == 5
    summary = summary_of(run)
    assert tuple(summary) == SUMMARY_NAMES
    assert summary["latency_p99_ms"] == 17.9 and summary["dropped"] == 4 and summary["dropped_before_node"] == 3
    write_files(tmp_path, run, figures, {"bag": "b<>", "problems": ["it <broke>"]})
    page = (tmp_path / "live.html").read_text()
    assert "it &lt;broke&gt;" in page and "b&lt;&gt;" in page
    rows = list(csv.reader((tmp_path / "latency.csv").open()))
    assert rows[0] == ["camera", "index", "stamp_ns", "published_ms", "features_ms", "matches_ms"]
    assert rows[3] == ["camera", "2", str(START + 2 * PERIOD), "100.000", "12.000", ""]
    assert rows[4][4] == "" and len(rows) == 13
    assert json.loads((tmp_path / "live.json").read_text())["recording"]["messages"] == 17


def test_means_of_the_stages_add_up() -> None:
    """Also where a stage did not run in a frame, or never; what is between them is a stage, and so is the way to and
    fro. Medians do not add."""
    heard, rng = Heard(), np.random.default_rng(0)
    heard.take(status_message(100, processed=50), 0)
    sent, came = [], []
    for i in range(40):
        parts = rng.exponential(10, 5)
        times = dict(zip(("queue", "decode", "network", "publish"), parts, strict=False))
        times["match"] = float("nan") if i % 4 == 0 else parts[4]
        named = {f"ms_{name}": value for name, value in times.items()} | {"ms_preprocess": float("nan")}
        last = status_message(
            0, processed=51 + i, ms_total=float(np.nansum(list(times.values()))) + 3 * (i % 3), **named
        )
        last.received = 101 + i
        last.header.stamp = stamp_from_nanoseconds(START + i * PERIOD)
        heard.take(last, i)
        sent.append((i, START + i * PERIOD, i * PERIOD))
        came.append((START + i * PERIOD, i * PERIOD + round(last.ms_total * MS) + (2 + i % 2) * MS))
    early = [(stamp, at - MS) for stamp, at in came]
    camera = CameraRun("camera", "/eye", sent, heard, {"features": early, "tracks": came[:30]})
    figures = figures_of(LiveRun([camera], {}))
    inside, whole = figures["inside_node_ms"], figures["image_to_last_output_ms"]
    stages = {name: values for name, values in inside.items() if name != "total"}
    assert inside["preprocess"]["mean"] is None and inside["other"]["mean"] == 2.9
    assert sum(stage["mean"] or 0 for stage in stages.values()) == pytest.approx(inside["total"]["mean"], abs=0.3)
    assert abs(sum(stage["p50"] or 0 for stage in stages.values()) - inside["total"]["p50"]) > 2, "a test that shows it"
    assert whole["transport"]["mean"] == pytest.approx((30 * 2.5 + 10 * 1.5) / 40, abs=0.05)
    assert whole["inside_node"]["mean"] == inside["total"]["mean"]
    both = whole["inside_node"]["mean"] + whole["transport"]["mean"]
    assert both == pytest.approx(whole["image_to_last_output"]["mean"], abs=0.11)


def test_damage_of_a_bag_that_was_played_is_a_figure() -> None:
    player = {"damage": "torn", "lost_messages": 3, "lost_bytes": None}
    summary = summary_of(LiveRun([camera_run()], player))
    assert (summary["damaged"], summary["lost_messages"], summary["lost_bytes"]) == (1, 3, None)
    summary = summary_of(LiveRun([camera_run()], {}))
    assert (summary["damaged"], summary["lost_messages"], summary["lost_bytes"]) == (0, 0, 0)


def test_nothing_came_back(tmp_path: Path) -> None:
    run = LiveRun([CameraRun("camera", "/eye", [], Heard())], {})
    figures = figures_of(run)
    assert figures["frames"]["published"] == 0
    assert summary_of(run)["latency_ms"] is None
    write_files(tmp_path, run, figures, {"bag": "b", "problems": []})
    assert "nothing was measured" in (tmp_path / "live.html").read_text()
    assert quantiles(np.array([np.nan])) == dict.fromkeys(("mean", "p50", "p95", "p99", "max"))


FOREIGN = [(START - i, i) for i in range(1, 4)]  # features of images that were not played


@pytest.mark.parametrize("features", [[], FOREIGN], ids=["nothing", "foreign"])
def test_a_camera_that_gives_nothing_is_not_left_out(features: list[tuple[int, int]]) -> None:
    """The other one does not answer for it: the rate is 0, and there is no latency, as is said."""
    good = camera_run()
    dead = CameraRun("right", "/right", good.sent, Heard(), {"features": features})
    alone, both = (summary_of(LiveRun(cameras, {})) for cameras in ([good], [good, dead]))
    assert alone["processed_hz"] == 9.8 and "missing" not in alone
    timed = {name for name in SUMMARY_NAMES if name.startswith(("latency", "age"))}
    assert both["processed_hz"] == 0 and {both[name] for name in timed} == {None}
    assert both["missing"].keys() == timed and both["keypoints"] == alone["keypoints"]
    words = ("--fail-if", "processed_hz<5", "--fail-if", "latency_p95_ms>50", "--fail-if", "age_p95_ms>50")
    parser = argparse.ArgumentParser()
    outcomes.add_arguments(parser)
    said: list[str] = []
    status = outcomes.conclude([outcomes.Run("hall", both)], parser.parse_args(words), said.append, said.append)
    assert status == 2 and "hall: FAILED: expected processed_hz >= 5, found 0" in said
    assert sum("found none: no features came of the images of right" in line for line in said) == 1
    assert sum("found none: no status was of an image of right" in line for line in said) == 1


def test_the_rate_of_a_camera_of_which_hardly_anything_came() -> None:
    """One of many images has no rate of its own, and is no reason to leave it out; one of one, or of none, is."""
    good = camera_run()

    def rate(sent: int, came: int, kind: str = "features") -> float | None:
        camera = replace(good, name="right", sent=good.sent[:sent], arrivals={kind: good.arrivals["features"][:came]})
        return summary_of(LiveRun([good, camera] if kind == "features" else [camera], {}))["processed_hz"]

    assert (rate(10, 1), rate(1, 0)) == (0, 0)
    assert (rate(1, 1), rate(0, 0), rate(10, 5)) == (9.8, 9.8, 9.8)
    assert rate(10, 0, "tracks") is None, "features were not listened to"


def test_what_the_figures_do_not_say_is_said() -> None:
    run = camera_run()
    run.arrivals["features"].append((START - 1, 0))  # type: ignore[attr-defined]
    run.heard.last.received += 3
    run.heard.last.last_error = "a broken image"
    found = warnings_of(LiveRun([run], {"error": "torn"}))
    assert found == [
        "only the readable part was played: torn",
        "camera: 3 frames were still in work at the end",
        "camera: the node's last error: a broken image",
        "camera: features of 1 images that were not played: who else publishes images?",
    ]


def test_a_node_that_begins_anew_is_noticed() -> None:
    heard = Heard()
    for count in (5, 9, 2, 3):
        heard.take(status_message(count), 0)
    assert heard.restarts == 1 and heard.first.received == 5 and heard.news == 4
