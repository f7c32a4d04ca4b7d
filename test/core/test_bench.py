"""``scfeat bench`` on small images: what is measured and in which order, never how long it takes."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from scfeat_core import cli as scfeat
from scfeat_core.bench import (
    cli,
    comparing,
    counting,
    floors,
    growth,
    images,
    machine,
    measuring,
    own,
    peers,
    tables,
    timing,
)
from scfeat_core.bench.settings import Case, Settings, Variant
from scfeat_core.errors import ConfigError, DataError, DeviceError, ScfeatError

SIZE = (160, 96)
SMALL = Case(SIZE, 64)


@pytest.fixture(scope="session")
def folder(rendered_views: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to measure on, so that nobody waits for the rendered room."""
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(rendered_views.images[:3]):
        cv2.imwrite(str(folder / f"{index}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return folder


@pytest.fixture
def settings(folder: Path) -> Settings:
    return Settings(cases=(SMALL,), rounds=3, warm_up=1, threads=1, images=folder)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    settings = Settings(cases=(SMALL,), rounds=3, warm_up=1, threads=1, images=folder)
    return measuring.run(settings, ros=own.find_ros()[0])


@pytest.fixture
def peer_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """``peer_module(body)``: the name of an importable module of that source."""
    monkeypatch.syspath_prepend(tmp_path)
    numbers = iter(range(1000))

    def write(body: str) -> str:
        name = f"peer_of_{abs(hash(str(tmp_path)))}_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(body)
        return name

    return write


# -- timing ------------------------------------------------------------------------------------------------------------


def recording(order: list[str], *names: str) -> list[timing.Contender]:
    def contender(name: str) -> timing.Contender:
        tasks = [timing.Task(stage, lambda stage=stage: order.append(f"{name}{stage}")) for stage in ("1", "2")]  # type: ignore[misc]
        return timing.Contender(name, "peer", tasks)

    return [contender(name) for name in names]


def test_contenders_take_turns_and_each_round_begins_with_another():
    order: list[str] = []
    samples = timing.measure(recording(order, "a", "b", "c"), rounds=4, warm_up=1)
    one, two, three = (f"{name}1 {name}2" for name in "abc")
    warm_up, *rounds = (" ".join(order[start : start + 6]) for start in range(0, len(order), 6))
    assert warm_up == f"{one} {two} {three}"
    assert rounds == [f"{one} {two} {three}", f"{two} {three} {one}", f"{three} {one} {two}", f"{one} {two} {three}"]
    assert samples.rounds == 4 and all(len(samples.of(name, stage)) == 4 for name in "abc" for stage in "12")


def test_one_that_raises_is_left_out_and_the_others_go_on():
    calls: list[str] = []

    def fail() -> None:
        calls.append("failed")
        if len(calls) == 3:
            raise ValueError("no more")

    contenders = [*recording([], "a"), timing.Contender("b", "peer", [timing.Task("extract", fail)])]
    samples = timing.measure(contenders, rounds=5, warm_up=1)
    assert samples.errors == {"b": "ValueError: no more"} and len(calls) == 3
    assert len(samples.of("a", "1")) == 5 and len(samples.of("b", "extract")) == 1


def test_an_interruption_keeps_what_was_measured():
    calls: list[int] = []

    def interrupt() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    samples = timing.measure([timing.Contender("a", "peer", [timing.Task("extract", interrupt)])], rounds=9, warm_up=1)
    assert samples.interrupted and len(samples.of("a", "extract")) == 2


def test_no_round_begins_when_the_time_is_over_but_five_are_done():
    assert timing.measure(recording([], "a"), rounds=50, warm_up=0, seconds=1e-9).rounds == 5


def test_parts_that_come_later_belong_to_their_round():
    parts = iter([{}, {"inner": 2.0}, {"inner": 3.0}])
    samples = timing.measure([timing.Contender("a", "scfeat", [timing.Task("total", lambda: next(parts))])], 3, 0)
    assert samples.of("a", "inner") == pytest.approx([np.nan, 2, 3], nan_ok=True)
    assert len(samples.of("a", "total")) == 3


def test_a_summary_has_percentiles_and_says_what_is_noisy():
    values = np.append(np.arange(101.0), np.nan)
    found = timing.summarise(values)
    assert (found["p5_ms"], found["median_ms"], found["p95_ms"], found["runs"]) == (5, 50, 95, 101)
    assert found["spread"] == pytest.approx(0.9) and found["noisy"]
    assert not timing.summarise(100 + np.arange(10.0))["noisy"]
    assert timing.summarise(np.array([np.nan])) == {}


def test_ratios_are_those_of_the_same_rounds():
    reference = np.array([1.0, 10, 100, 1000, np.nan])  # a machine that slows down
    assert timing.paired_ratio(2 * reference, reference) == {"median": 2, "low": 2, "high": 2}
    found = timing.paired_ratio(np.array([1.0, 2, 3, 4, 5]), np.ones(5))
    assert found["low"] <= found["median"] == 3 <= found["high"] and found["low"] < found["high"]
    assert timing.paired_ratio(np.array([np.nan]), np.ones(1)) == {}


# -- floors ------------------------------------------------------------------------------------------------------------


def test_operations_and_bytes_of_a_convolution():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    cost = floors.network_cost(network, (2, 3, 10, 12))
    weights, read, written = 8 * 3 * 9 + 8, 2 * 3 * 120, 2 * 8 * 120
    assert cost.work.flops == 2 * (2 * 120) * 8 * 3 * 9
    assert cost.work.bytes == 4 * (read + weights + written)
    assert cost.peak_bytes == 4 * (2 * written + weights), "the input of ReLU and its output are there at once"
    half = floors.network_cost(network, (2, 3, 10, 12), "bfloat16")
    assert half.work.bytes == cost.work.bytes / 2 and half.work.flops == cost.work.flops


def test_operations_grow_with_pixels_and_need_no_memory():
    network = counting.imagined_networks("lite")[0]
    small, large = (floors.network_cost(network, (1, 3, 480 * k, 640 * k)).work for k in (1, 16))
    assert large.flops / small.flops == pytest.approx(256, rel=0.02)
    assert large.bytes / small.bytes == pytest.approx(256, rel=0.1)


def test_networks_are_counted_by_weights_and_size():
    cases = (Case((640, 480)), Case((640, 480), batch=2))
    variants = (Variant(), Variant(device="cuda"), Variant("r50", precision="float16"))
    lite, two, r50, _ = counting.count(Settings(cases=cases, variants=variants))
    assert lite.parameters == pytest.approx(0.82e6, rel=0.01)
    assert lite.cost.work.flops == pytest.approx(2 * 2.607e9, rel=0.01)
    assert two.cost.work.flops == 2 * lite.cost.work.flops and two.cost.peak_bytes < 2 * lite.cost.peak_bytes
    assert 50e9 < r50.cost.work.flops <= 488.5e9
    table = counting.rows([lite, two])
    assert len({len(row) for row in table}) == 1 and table[2][2] == "2 x 640x480"


def test_a_floor_is_the_larger_of_two_times():
    rates = floors.Rates(flops=1e9, copy=1e6, to_device=1e3, from_device=1e4)
    assert floors.floor(floors.Work(2e6, 1e3), rates) | {
        "floor_ms": 2,
        "compute_ms": 2,
        "memory_ms": 1,
    } == floors.floor(floors.Work(2e6, 1e3), rates)
    assert floors.floor(floors.Work(2e6, 1e3), rates)["bound"] == "compute"
    assert floors.floor(floors.Work(0, 1e3, "to_device"), rates)["memory_ms"] == pytest.approx(1000)
    assert floors.Work(1, 2) + floors.Work(3, 4) == floors.Work(4, 6)


def test_rates_are_measured():
    rates = floors.measure_rates(torch.device("cpu"), "float32")
    assert min(rates.flops, rates.copy, rates.to_device, rates.from_device) > 1e6
    faster = replace(rates, copy=2 * rates.copy)
    assert rates.best_of(faster) == faster == faster.best_of(rates)


# -- images and peers --------------------------------------------------------------------------------------------------


def test_images_have_the_size_that_was_asked_for(folder):
    for size in ((64, 48), (40, 90), (320, 240)):
        found = images.load_images(size, folder)
        assert len(found) == 3 and all(image.shape == (size[1], size[0], 3) for image in found)
    assert np.ptp(found[0]) > 50
    with pytest.raises(DataError, match="nothing there"):
        images.load_images(SIZE, folder / "absent")


def test_neighbours_follow_each_other():
    way = images.walk(4)
    indices = [next(way) for _ in range(20)]
    assert indices[:8] == [0, 1, 2, 3, 2, 1, 0, 1] and set(np.abs(np.diff(indices))) == {1}
    assert [next(images.walk(1)) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("name", ["sift", "orb"])
def test_detectors_of_opencv_are_given_the_budget(name, folder):
    contender = peers.create_opencv(name, Case((320, 240), 40, 2), images.load_images((320, 240), folder))
    (task,) = contender.tasks
    task.call()
    assert task.stage == "extract" and 20 < contender.found()["points"] <= 41  # SIFT splits points into orientations


def test_points_are_counted_in_whatever_comes_back():
    points = np.zeros((7, 2))
    assert [peers.count_points(each) for each in (points, {"keypoints": points}, (points, None))] == [7] * 3
    assert peers.count_points(argparse.Namespace(keypoints=points)) == 7
    assert peers.count_points(3.0) is None and peers.count_points({"scores": points}) is None


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_all_stages_are_measured(results):
    (case,) = results["cases"]
    assert (case["size"], case["budget"], case["batch"], case["rounds"]) == ([160, 96], 64, 1, 3)
    names = [each["name"] for each in case["contenders"]]
    assert names[0] == "scfeat lite cpu float32 eager" and set(names[1:]) == {
        "opencv sift",
        "opencv orb",
        "opencv akaze",
    }
    ours = case["contenders"][0]
    expected = set(own.STAGES) - {"publish"} - (set() if own.find_ros()[0] else {"message", "serialise"})
    assert set(ours["stages"]) == expected and not ours["error"]
    assert [name for name in own.STAGES if name in ours["stages"]] == list(ours["stages"]), "in their order"
    assert all(figures["runs"] == 3 and figures["median_ms"] > 0 for figures in ours["stages"].values())
    assert ours["points"] == 64 and ours["engine"] == "eager" and ours["precision"] == "float32"
    assert ours["ratio"] == {"median": 1, "low": 1, "high": 1}
    others = [each for each in case["contenders"][1:] if not each["error"]]
    assert len(others) >= 2 and all(
        each["ratio"]["median"] > 0 and list(each["stages"]) == ["extract"] for each in others
    )


def test_floors_are_below_what_was_measured(results):
    stages = results["cases"][0]["contenders"][0]["stages"]
    floored = {name: figures["floor"] for name, figures in stages.items() if "floor" in figures}
    assert {"upload", "network", "select", "describe"} <= set(floored)
    for name in ("upload", "network", "select", "describe"):
        assert 0 < floored[name]["floor_ms"] < stages[name]["median_ms"]
        assert floored[name]["ratio"] == stages[name]["median_ms"] / floored[name]["floor_ms"]
    network = counting.cost_of(Variant(), SMALL).work
    assert (floored["network"]["flops"], floored["network"]["bytes"]) == (network.flops, network.bytes)


def test_results_are_plain_and_name_the_machine(results):
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["schema"] == measuring.SCHEMA and not results["interrupted"]
    named = results["machine"]
    assert named["cpu"] and named["cores"] >= 1 and named["threads"] == 1 and named["torch"] == torch.__version__
    assert {"load_before", "load_after", "opencv", "numpy", "python"} <= set(named)
    assert any("3 rounds" in warning for warning in results["warnings"])
    assert results["rates"][0]["device"] == "cpu" and results["rates"][0]["flops"] > 0


def test_shares_are_of_all_stages_and_the_rest_is_their_sum(results):
    (ours,) = (each for each in results["cases"][0]["contenders"] if each["kind"] == "scfeat")
    rows = {row[0]: row for row in tables.stage_rows(ours)}
    shares = [int(row[3]) for row in list(rows.values())[1:] if row[3] != tables.NOTHING]
    assert abs(sum(shares) - 100) <= len(shares) / 2
    besides = sum(
        figures["median_ms"]
        for name, figures in ours["stages"].items()
        if name not in ("decode", "network", "extract", "total")
    )
    assert rows["all but decode and network"][1] == tables.milliseconds(besides)
    published = tables.adding_up({**ours["stages"], "serialise": {}, "publish": {}})
    assert "publish" in published and not {"serialise", "extract", "total"} & set(published), "nothing counts twice"


def test_batches_and_variants_take_turns(settings):
    cases = (replace(SMALL, batch=2), replace(SMALL, budget=32))
    variants = (Variant(), Variant(weights="random", precision="bfloat16"))
    found = measuring.run(replace(settings, cases=cases, variants=variants, rounds=1))
    assert [case["batch"] for case in found["cases"]] == [2, 1]
    ours = [each for each in found["cases"][0]["contenders"] if each["kind"] == "scfeat"]
    assert [each["precision"] for each in ours] == ["float32", "bfloat16"]
    assert [each["random_weights"] for each in ours] == [False, True]
    assert ours[1]["stages"]["network"]["floor"]["bytes"] == ours[0]["stages"]["network"]["floor"]["bytes"] / 2
    assert len(found["rates"]) == 2
    assert any("random weights" in warning for warning in found["warnings"])
    rows = tables.batch_rows(found)
    assert len(rows) == 5 and [row[2] for row in rows[1:]] == ["2", "2", "1", "1"]
    assert [row[5] for row in rows[1:]] == ["–", "–", "1.00", "1.00"], "with another budget, nothing to compare with"
    assert "Several cameras" in tables.as_text(found)
    assert sum("1 rounds" in warning for warning in found["warnings"]) == 1, "what is said of all is said once"
    assert any(warning.startswith("everywhere: 1 rounds") for warning in found["warnings"])


def test_several_cameras_are_compared_with_one(results):
    alone = results["cases"][0]
    twice = json.loads(json.dumps(alone)) | {"batch": 2}
    stages = twice["contenders"][0]["stages"]
    stages["extract"]["median_ms"], stages["network"]["median_ms"] = 3 * alone_ms(alone, "extract"), 8.0
    rows = tables.batch_rows({"cases": [alone, twice]})
    assert [row[2] for row in rows[1:]] == ["1", "2"] and rows[2][5:] == ["1.50", "4.00"]
    assert tables.batch_rows(results) == rows[:1], "nothing to say of one image at once"


def alone_ms(case: dict[str, Any], stage: str) -> float:
    return case["contenders"][0]["stages"][stage]["median_ms"]


def test_a_network_without_trained_weights_is_measured_for_its_shape():
    assert counting.is_random("r18") and counting.is_random("random") and not counting.is_random("lite")
    first, second = (counting.network_weights("r18") for _ in range(2))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)  # type: ignore[union-attr]
    assert all(torch.equal(*pair) for pair in pairs)
    assert (
        counting.network_weights("lite") == "lite"
        and counting.network_weights("some/file.safetensors") == "some/file.safetensors"
    )


PEER = """
calls = []
def one(image, max_keypoints):
    calls.append(("one", image.shape, str(image.dtype), max_keypoints))
    return {"keypoints": [0] * 5}
def two(image, max_keypoints):
    calls.append(("two", image.shape, str(image.dtype), max_keypoints))
    return [0] * 6, [0]
def told(image, max_keypoints, device):
    calls.append(("told", device))
    return []
def nothing(image, max_keypoints): pass
def broken(image, max_keypoints):
    raise RuntimeError("out of order")
"""


def test_peers_take_turns_with_us_and_get_the_same_images(settings, peer_module):
    name = peer_module(PEER)
    found = measuring.run(replace(settings, peers=(f"{name}:one", f"{name}:two"), rounds=4))
    calls = __import__(name).calls
    who = [call[0] for call in calls]
    contenders = [each["name"] for each in found["cases"][0]["contenders"] if not each["error"]]
    expected = ["one", "two"]  # the warm-up
    for first in range(4):
        turn = [*contenders[first:], *contenders[:first]]
        expected += [each.split(":")[1] for each in turn if ":" in each]
    assert who == expected
    assert {call[1:] for call in calls} == {((96, 160, 3), "uint8", 64)}
    last = found["cases"][0]["contenders"][-3:]
    points = {each["name"]: each["points"] for each in last if each["kind"] == "peer"}
    assert points == {f"{name}:one": 5, f"{name}:two": 6}


def test_a_peer_that_takes_a_device_is_told_ours(settings, peer_module):
    name = peer_module(PEER)
    found = measuring.run(replace(settings, peers=(f"{name}:told", f"{name}:one"), rounds=1))
    assert ("told", "cpu") in __import__(name).calls
    told, untold = (each for each in found["cases"][0]["contenders"] if each["kind"] == "peer")
    assert told["device"] == "cpu" and "device" not in untold
    assert peers.takes_device(peers.load_peer(f"{name}:told")) and not peers.takes_device(print)


def test_a_peer_that_fails_is_said_and_the_rest_is_measured(settings, peer_module):
    name = peer_module(PEER)
    found = measuring.run(replace(settings, peers=(f"{name}:nothing", f"{name}:broken")))
    errors = {each["name"]: each["error"] for each in found["cases"][0]["contenders"] if each["kind"] == "peer"}
    assert "found None" in errors[f"{name}:nothing"] and errors[f"{name}:broken"] == "RuntimeError: out of order"
    assert found["cases"][0]["contenders"][0]["stages"]["total"]["runs"] == 3
    assert sum("left out" in warning for warning in found["warnings"]) >= 2
    assert "out of order" in tables.as_text(found)


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "json:__name__", "nothing"])
def test_an_unknown_peer_is_refused_before_anything_is_measured(name, settings):
    with pytest.raises(ConfigError, match=name.split(":")[0]):
        measuring.run(replace(settings, peers=(name,)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_missing_gpu_is_an_error_alone_and_a_line_beside_others(settings):
    with pytest.raises(DeviceError, match="cuda"):
        measuring.run(replace(settings, variants=(Variant(device="cuda"),)))
    found = measuring.run(replace(settings, variants=(Variant(), Variant(device="cuda")), rounds=1))
    errors = {each["name"]: each["error"] for each in found["cases"][0]["contenders"] if each["kind"] == "scfeat"}
    assert errors[str(Variant())] == "" and "cuda" in errors[str(Variant(device="cuda"))]


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_tried():
    with pytest.raises(DeviceError, match="40000x40000 need about .* GB"):
        own.check_memory(Variant(), Case((40000, 40000)), torch.device("cpu"))
    own.check_memory(Variant(), SMALL, torch.device("cpu"))


def test_no_weights_no_measurement(settings):
    with pytest.raises(ScfeatError, match=r"absent\.safetensors"):
        measuring.run(replace(settings, variants=(Variant(weights="absent.safetensors"),)))


def test_a_busy_machine_is_said():
    assert list(machine.load_warnings(0.1, 2.0, 2)) == []
    assert ["busy" in line or "more ran" in line for line in machine.load_warnings(3.0, 4.0, 2)] == [True, True]
    assert list(machine.load_warnings(None, None, 2)) == []


# -- growth ------------------------------------------------------------------------------------------------------------


def test_exponents_are_fitted_with_their_error():
    x = np.array([1.0, 2, 4, 8, 16])
    exact = growth.fit_exponent(x, 3 * x**1.5)
    assert (exact["exponent"], exact["factor"]) == pytest.approx((1.5, 3)) and exact["error"] < 1e-9
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1000, 40)
    errors = []
    for _ in range(200):
        fit = growth.fit_exponent(x, x * np.exp(0.1 * rng.normal(size=40)))
        errors.append((fit["exponent"] - 1) / fit["error"])
    assert np.std(errors) == pytest.approx(1, abs=0.15), "the error is what it says"
    assert growth.fit_exponent(x[:2], x[:2]) == {} and growth.fit_exponent(np.ones(5), np.ones(5)) == {}


def test_growth_has_curves_against_pixels_and_points(settings):
    sizes = [(96, 64), (160, 96), (192, 160)]
    found = growth.run(settings, sizes=sizes, points=[16, 32, 64], points_size=(192, 160))
    curves = {(each["contender"], each["stage"], each["against"]): each for each in found["growth"]}
    ours = str(Variant())
    wanted = {(ours, stage, "pixels") for stage in ("network", "select", "extract")}
    wanted |= {(ours, stage, "points") for stage in ("select", "describe")} | {("matching", "match", "points")}
    wanted |= {(f"opencv {name}", "extract", "pixels") for name in ("sift", "orb")}
    assert set(curves) == wanted
    assert curves[ours, "network", "pixels"]["x"] == [float(w * h) for w, h in sizes]
    assert curves["matching", "match", "points"]["x"] == [16, 32, 64] == curves[ours, "select", "points"]["x"]
    assert all(curve["runs"] == [3, 3, 3] and set(curve["fit"]) >= {"exponent", "error"} for curve in curves.values())
    assert "exponent" in tables.as_text(found) and not any("exponent" in warning for warning in found["warnings"])


def test_why_there_is_no_exponent_is_said_once(settings):
    found = growth.run(settings, sizes=[(96, 64), (160, 96)], points=[16], points_size=(160, 96))
    pixels, points = (warning for warning in found["warnings"] if "exponent" in warning)
    assert pixels == "no exponents against pixels: 2 places; a fit with its error takes 3, give more of them to --size"
    assert points == "no exponents against points: 1 place; a fit with its error takes 3, give more of them to --budget"


def test_the_descriptors_that_are_matched_have_matches():
    task = growth.matching_task(128, 32, torch.device("cpu"))
    task.call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task.stage == "match" and task.device is None


# -- comparison --------------------------------------------------------------------------------------------------------


def scaled(results: dict[str, Any], **factors: float) -> dict[str, Any]:
    """The same with the medians of some stages, or of all (``every``), multiplied."""
    copied = json.loads(json.dumps(results))
    for case in copied["cases"]:
        for contender in case["contenders"]:
            for stage, figures in contender["stages"].items():
                own_factor = factors.get(stage, 1) if contender["kind"] == "scfeat" else 1
                figures["median_ms"] *= factors.get("every", 1) * own_factor
    return copied


def test_changes_are_ratios_of_the_same_stages(results):
    found = {each.stage: each.ratio for each in comparing.changes(results, scaled(results, network=2.0))[:-2]}
    assert found["network"] == pytest.approx(2) and found["select"] == 1
    slower = scaled(results, every=3.0, match=1.5)
    absolute, relative = (comparing.changes(results, slower, flag) for flag in (False, True))
    assert {each.stage: round(each.ratio, 6) for each in absolute}["match"] == 4.5
    assert {each.stage: round(each.ratio, 6) for each in relative}["match"] == 1.5
    assert {round(each.ratio, 6) for each in relative if each.stage != "match"} == {1.0}


def test_conditions_hold_for_any_case_of_ours(results):
    found = comparing.changes(results, scaled(results, network=2.0))
    (line,) = comparing.failures(comparing.parse_checks(["network>1.5"]), found)
    assert "160x96" in line and "2 times" in line
    assert comparing.failures(comparing.parse_checks(["network>2.5", "total>1.5"]), found) == []
    with pytest.raises(ConfigError, match="did you mean 'network'"):
        comparing.failures(comparing.parse_checks(["netwrk>1"]), found)


def test_what_no_longer_runs_leaves_the_condition_on_it_undecided(results):
    broken = scaled(results)
    broken["cases"][0]["contenders"][0] |= {"stages": {}, "error": "out of memory"}
    (lost,) = comparing.gone(results, broken)
    assert "network" in lost.stages and str(lost).endswith("measured before, and not now: out of memory")
    checks, found = comparing.parse_checks(["network>9", "verify>2"]), comparing.changes(results, broken)
    assert comparing.failures(checks, found, [lost]) == [] and comparing.undecided(checks, [lost]) == [lost]
    assert comparing.undecided(comparing.parse_checks(["publish>9"]), [replace(lost, stages=("network",))]) == []
    assert comparing.gone(broken, results) == [] == comparing.gone(results, results)


def test_of_what_is_measured_still_only_the_stages_are_named_that_are_gone(results):
    fewer = scaled(results)
    del fewer["cases"][0]["contenders"][0]["stages"]["match"], fewer["cases"][0]["contenders"][0]["stages"]["track"]
    (lost,) = comparing.gone(results, fewer)
    assert lost.stages == ("match", "track") and "eager: match, track: measured before, and not now" in str(lost)
    (stopped,) = comparing.gone(results, {**fewer, "interrupted": True})
    assert "interrupted" in str(stopped) and "interrupted" not in str(lost)


def test_another_engine_under_the_same_name_is_said(results):
    other = scaled(results)
    other["cases"][0]["contenders"][0]["engine"] = "onnx"
    (line,) = comparing.other_engines(other, results)
    assert "onnx float32 before, as eager float32 now" in line and comparing.other_engines(results, results) == []


def test_threads_are_as_before_afterwards(settings):
    before = torch.get_num_threads(), cv2.getNumThreads()
    with measuring.threads_of(3):
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (3, 3)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before


def test_what_cannot_be_compared_is_refused(results, tmp_path):
    other = json.loads(json.dumps(results))
    other["cases"][0]["name"] = "another"
    with pytest.raises(DataError, match="in common"):
        comparing.changes(other, results)
    for text in ("{", "[]", '{"schema": 99}'):
        (tmp_path / "old.json").write_text(text)
        with pytest.raises(DataError, match=r"old\.json"):
            comparing.read_results(tmp_path / "old.json")
    with pytest.raises(DataError, match="no file"):
        comparing.read_results(tmp_path / "absent.json")
    for contender in (without := json.loads(json.dumps(results)))["cases"][0]["contenders"][1:]:
        contender["stages"] = {}
    with pytest.raises(DataError, match="--relative"):
        comparing.changes(without, results, relative=True)


def test_another_machine_is_said(results):
    other = json.loads(json.dumps(results))
    other["machine"]["threads"] = 16
    assert comparing.other_machine(results, other) == ["threads: 1 before, 16 now"]
    assert comparing.other_machine(results, results) == []


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """``bench(*words)``: exit status, what was printed, and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        common = ["--size", "160x96", "--budget", "64", "--images", str(folder), "--threads", "1", "--quick"]
        status = scfeat.main(["bench", *common, "-o", str(tmp_path / "out"), *words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    yield run


def test_a_run_writes_json_and_a_page(bench, tmp_path, browse):
    domain = os.environ.get("ROS_DOMAIN_ID")
    status, out, _ = bench()
    assert (
        status == 0 and "scfeat lite cpu float32 eager" in out and "opencv sift" in out and "% of matrix product" in out
    )
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert found["cases"][0]["rounds"] == 5
    stages, missing = found["cases"][0]["contenders"][0]["stages"], own.find_ros()[1]
    assert ("publish" in stages) == (not missing) and (f"messages are not measured: {missing}" in out) == bool(missing)
    assert os.environ.get("ROS_DOMAIN_ID") == domain, "what the graph of the subscriber needs is of no other use"
    seen = browse(tmp_path / "out/report.html")
    assert seen["problems"] == [] and seen["loaded"] == [] and seen["tables"] == 4 and seen["lines"] >= 3
    narrow = browse(tmp_path / "out/report.html", 400)
    assert narrow["width"] <= narrow["room"]


def test_results_are_compared_and_fail(bench, results, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(results))
    new.write_text(json.dumps(scaled(results, network=2.0)))
    compared = ("--results", str(new), "--compare", str(old))
    status, out, err = bench(*compared, "--fail-if", "network>1.2")
    assert status == cli.EXIT_FAILED and "2.00" in out and "failed: 160x96" in err
    status, out, err = bench(*compared, "--fail-if", "network>2.2", "--relative", "--markdown")
    assert status == 0 and "| ratio |" in out and err == ""
    assert bench(*compared, "--fail-if", "speed>1")[0] == scfeat.EXIT_ERROR
    assert bench("--fail-if", "network>1.2")[0] == scfeat.EXIT_ERROR
    assert bench("--results", str(new), "--compare", str(tmp_path / "absent.json"))[0] == scfeat.EXIT_ERROR


def test_contenders_that_were_not_asked_for_now_are_a_line_each_and_decide_nothing(bench, results, tmp_path):
    more, now = scaled(results), tmp_path / "now.json"
    ours = more["cases"][0]["contenders"][0]
    more["cases"][0]["contenders"] += [{**ours, "name": f"scfeat lite cpu float32 {name}"} for name in ("onnx", "new")]
    (old := tmp_path / "old.json").write_text(json.dumps(more))
    now.write_text(json.dumps(scaled(results, network=2.0)))
    compared = ("--results", str(now), "--compare", str(old))
    status, _, err = bench(*compared)
    assert status == 0 and [line.partition(":")[0] for line in err.splitlines()] == ["warning", "warning"]
    status, _, err = bench(*compared, "--fail-if", "network>9", "--fail-if", "match>9")
    assert status == scfeat.EXIT_ERROR and [line.partition(":")[0] for line in err.splitlines()] == ["undecided"] * 2
    assert "onnx: measured before, and not now: it was not asked for" in err
    status, _, err = bench(*compared, "--fail-if", "network>1.5")
    assert status == scfeat.EXIT_ERROR and "failed: " in err, "what is undecided goes first, as in a replay"


def test_an_interruption_writes_what_there_is(bench, peer_module, tmp_path):
    name = peer_module(
        "calls = []\n"
        "def peer(image, max_keypoints):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        raise KeyboardInterrupt\n"
        "    return []\n"
    )
    status, out, _ = bench("--peer", f"{name}:peer", "--batch", "1,2")
    assert status == cli.EXIT_INTERRUPTED and "interrupted" in out
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert found["interrupted"] and len(found["cases"]) == 1
    assert found["cases"][0]["contenders"][0]["stages"]["network"]["runs"] >= 2
    assert (tmp_path / "out/report.html").is_file()


def test_values_are_combined_and_checked(bench, capsys):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    words = "--weights lite,r18 --size 640x480,64X48 --budget 512,1024 --batch 1,4 --precision float32,bfloat16"
    found = cli.settings_from(parser.parse_args(words.split()))
    assert len(found.cases) == 8 and len(found.variants) == 4 and found.rounds == 30 and found.warm_up == 3
    assert found.cases[0] == Case((640, 480), 512, 1) and found.variants[-1] == Variant(
        "r18", "cpu", "bfloat16", "eager"
    )
    grown = cli.settings_from(parser.parse_args([*words.split(), "--growth"]))
    assert grown.cases == (Case(), Case(batch=4)) and cli.settings_from(parser.parse_args([])).cases == (Case(),)
    for words in ("--size 640", "--size 16x16", "--size 640xabc", "--budget 0", "--batch 1,x", "--weights ,"):
        with pytest.raises(SystemExit):
            parser.parse_args(words.split())
    capsys.readouterr()


def test_growth_has_a_page(bench, tmp_path, browse, monkeypatch):
    monkeypatch.setattr(growth, "POINTS_SIZE", (160, 96))
    status, out, _ = bench("--growth", "--size", "96x64,128x64,160x96", "--budget", "16,32,64")
    assert status == 0 and "exponent" in out
    seen = browse(tmp_path / "out/report.html")
    assert seen["problems"] == [] and seen["lines"] >= 6 and "Growth" in seen["headings"]
