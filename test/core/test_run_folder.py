"""The folder of a replay: parts, what they are joined to, and what is refused."""

from __future__ import annotations

import json
import resource
import zipfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.replay.records import FrameRecord, GroundTruth, Recording
from scfeat_core.replay.run_folder import begin_run, map_arrays, read_run, write_arrays, write_run
from scfeat_core.replay.tum import quaternions, read_tum, write_tum
from scfeat_core.types import (
    Camera,
    GeometryModel,
    ImageQuality,
    Matches,
    PairResult,
    Tracks,
    TwoViewGeometry,
)

INPUTS = {"bag": "b", "settings": {"max_keypoints": 5, "budgets": {}}, "window": (0, 1.5)}
CAMERA = Camera(np.array([[100.1, 0, 1 / 3], [0, 99.9, 60], [0, 0, 1]]), np.array([0.1, -1e-17]), (160, 120))


def record(index: int) -> FrameRecord:
    """Each fifth is dropped, and every second has no rays."""
    rng = np.random.default_rng(index)
    stamp = 1_700_000_000_000_000_001 + index * 50_000_000
    if index % 5 == 3:
        return FrameRecord(index, stamp, "decode", f"broken {index}", timings={"read": 0.5, "decode": 1.0})
    n, m = rng.integers(0, 9, 2)
    points = rng.uniform(0, 100, (max(n, m), 2)).astype(np.float32)
    pair = None
    if index % 4:
        matches = Matches(np.arange(m), np.arange(m)[::-1].copy(), rng.uniform(size=m).astype(np.float32))
        geometry = TwoViewGeometry(GeometryModel(index % 3), rng.normal(size=(3, 3)), rng.random(m) > 0.5, 1.0)
        pair = PairResult(index - 1, stamp - 1, matches, points[:m], points[:m], geometry if index % 7 else None)
    rays = points[:n] if index % 2 else None
    ids = np.arange(n, dtype=np.uint32)
    tracks = Tracks(ids, ids, ids.astype(np.int64), points[:n], rays, rays, ids.astype(np.uint8), ids[:1])
    timings = {"read": 1.0, "network": 40.0} | ({"match": 2.0} if index % 4 else {})
    quality = ImageQuality(0.5, 0.0, 0.1, 0.7)
    scores = rng.uniform(size=len(points)).astype(np.float32)
    return FrameRecord(
        index, stamp, "", "", index, (160, 120), points, scores, pair, tracks, quality, "size" * (index == 6), timings
    )


RECORDS = [record(index) for index in range(12)]


def assert_same(one: Any, other: Any) -> None:
    if is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    else:
        assert one == other and type(one) is type(other)


def truth() -> GroundTruth:
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[1, :3, :3] = np.diag([-1, -1, 1])  # half a turn
    poses[:, :3, 3] = np.arange(9).reshape(3, 3) / 3
    return GroundTruth(np.array([0, 1, 1_700_000_000_000_000_001]), poses, "poses.txt (TUM)")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def replay(folder: Path, *cuts: int, stop: int = len(RECORDS)) -> None:
    """In parts that end at the cuts."""
    for start, end in zip((0, *cuts), (*cuts, stop), strict=True):
        writer = begin_run(folder, INPUTS)
        assert writer is not None and writer.progress.frames == start
        writer.add(RECORDS[start:end], {"state": np.array([end])})
    writer.finish({"damage": []}, CAMERA, truth())


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Recording(INPUTS, RECORDS, CAMERA, truth()))
    found = read_run(tmp_path / "run")
    assert_same(CAMERA, found.camera)
    assert found.facts["settings"] == INPUTS["settings"] and found.facts["window"] == [0, 1.5]
    assert len(found.frames) == len(RECORDS)
    for one, other in zip(RECORDS, found.frames, strict=True):
        assert_same(one, other)
    assert [frame.index for frame in found.processed] == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert [frame.index for frame in found.frames[-2:]] == [10, 11]
    np.testing.assert_array_equal(found.truth.stamps, truth().stamps)
    np.testing.assert_allclose(found.truth.poses, truth().poses, atol=1e-9)
    assert found.truth.source == "poses.txt (TUM)"
    assert sorted(files(tmp_path / "run")) == ["frames.npz", "groundtruth.txt", "run.json", "timings.npz"]
    assert not (tmp_path / "run" / "unfinished").exists()


@pytest.mark.parametrize("cuts", [(), (5,), (1, 2, 3), (4, 11)])
def test_a_run_in_parts_is_the_same_files(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    replay(tmp_path / "whole")
    replay(tmp_path / "parts", *cuts)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_an_interrupted_run_can_be_read_and_goes_on(tmp_path: Path) -> None:
    writer = begin_run(tmp_path / "run", INPUTS)
    writer.add(RECORDS[:7], {"state": np.array([7])})
    writer.finish({"damage": []}, None, None, complete=False)
    assert len(read_run(tmp_path / "run").frames) == 7
    again = begin_run(tmp_path / "run", INPUTS)
    assert again.progress.frames == 7 and again.progress.state["state"].tolist() == [7]
    again.add(RECORDS[7:], {})
    again.finish({"damage": []}, CAMERA, truth())
    replay(tmp_path / "whole")
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert begin_run(tmp_path / "run", INPUTS) is None


def test_what_a_killed_replay_left_half_written_goes(tmp_path: Path) -> None:
    """Of an hour that is gigabytes. Files of others stay."""
    begin_run(tmp_path, INPUTS).add(RECORDS[:3], {})
    left = [
        tmp_path / name for name in (".frames.npz.0123.tmp", ".report.html.0123.tmp", "unfinished/.state.npz.01.tmp")
    ]
    for file in [*left, tmp_path / ".notes.tmp"]:
        file.write_bytes(b"half")
    assert begin_run(tmp_path, INPUTS).progress.frames == 3
    assert not any(file.exists() for file in left) and (tmp_path / ".notes.tmp").exists()


def test_a_run_without_frames(tmp_path: Path) -> None:
    write_run(tmp_path, Recording({}, []))
    found = read_run(tmp_path)
    assert list(found.frames) == [] and found.camera is None and found.truth is None


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_of_other_inputs_is_refused_by_what_differs(tmp_path: Path, complete: bool) -> None:
    writer = begin_run(tmp_path, INPUTS)
    writer.add(RECORDS[:2], {})
    writer.finish({}, None, None, complete=complete)
    other = INPUTS | {"settings": {"max_keypoints": 6, "budgets": {}}}
    with pytest.raises(ScfeatError, match=r"settings.max_keypoints was 5 and is now 6; .*--out.*--overwrite"):
        begin_run(tmp_path, other)
    assert len(read_run(tmp_path).frames) == 2
    (tmp_path / "notes.txt").write_text("mine")
    writer = begin_run(tmp_path, other, overwrite=True)
    assert writer.progress.frames == 0 and len(read_run(tmp_path).frames) == 2, "until there is something instead"
    writer.add(RECORDS[:1], {})
    assert (tmp_path / "notes.txt").exists() and not (tmp_path / "frames.npz").exists()


def test_a_run_that_is_to_be_replaced_and_is_not_stays(tmp_path: Path) -> None:
    write_run(tmp_path, Recording(INPUTS, RECORDS))
    before = files(tmp_path)
    begin_run(tmp_path, {"bag": "other"}, overwrite=True).abandon()
    assert files(tmp_path) == before and begin_run(tmp_path, INPUTS) is None
    begin_run(tmp_path, {"bag": "other"}, overwrite=True)  # and killed
    assert files(tmp_path) == before and begin_run(tmp_path, INPUTS) is None


@pytest.mark.parametrize("fails", ["part-000000.npz", "state.npz"])
def test_a_run_stays_where_the_first_part_of_another_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(path: Path, arrays: Any) -> None:
        if path.name == fails:
            raise ScfeatError("no space left")
        write_arrays(path, arrays)

    write_run(tmp_path, Recording(INPUTS, RECORDS, CAMERA, truth()))
    before = files(tmp_path)
    writer = begin_run(tmp_path, {"bag": "other"}, overwrite=True)
    monkeypatch.setattr("scfeat_core.replay.run_folder.write_arrays", full)
    with pytest.raises(ScfeatError, match="no space left"):
        writer.add(RECORDS[:3], {})
    assert files(tmp_path) == before and begin_run(tmp_path, INPUTS) is None


def test_a_part_that_was_not_counted_is_written_again(tmp_path: Path) -> None:
    writer = begin_run(tmp_path, INPUTS)
    writer.add(RECORDS[:3], {})
    (tmp_path / "unfinished" / "part-000001.npz").write_bytes(b"what a process that was killed left")
    writer = begin_run(tmp_path, INPUTS)
    writer.add(RECORDS[3:5], {})
    writer.finish({}, None, None)
    assert [frame.index for frame in read_run(tmp_path).frames] == [0, 1, 2, 3, 4]


def test_a_run_without_a_part_may_begin_anew_with_other_inputs(tmp_path: Path) -> None:
    begin_run(tmp_path, INPUTS)
    assert begin_run(tmp_path, {"bag": "other"}).progress.frames == 0


def test_a_run_that_is_killed_while_it_tidies_up_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path, **unused: object) -> None:
        if folder.exists():
            (folder / "inputs.json").unlink()
            raise KeyboardInterrupt

    writer = begin_run(tmp_path, INPUTS)
    writer.add(RECORDS, {})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("scfeat_core.replay.run_folder.shutil.rmtree", killed)
        writer.finish({}, None, None)
    assert begin_run(tmp_path, INPUTS) is None
    begin_run(tmp_path, INPUTS, overwrite=True).finish({}, None, None, complete=False)
    assert not list(tmp_path.glob("*finished/part*"))


def test_more_parts_than_files_may_be_open(tmp_path: Path) -> None:
    """An hour has a thousand parts, and so many files may be open by default."""
    writer = begin_run(tmp_path, INPUTS)
    for _ in range(60):
        writer.add([replace(RECORDS[0], timings={"network": 2.0})], {})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(300)) - {int(file.name) for file in Path("/proc/self/fd").iterdir()})
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], limits[1]))
        writer.finish({}, None, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(read_run(tmp_path).frames) == 60


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a run of `scfeat replay` at .*found none"):
        read_run(tmp_path)
    begin_run(tmp_path, INPUTS)
    with pytest.raises(DataError, match="an unfinished one: run the same command again"):
        read_run(tmp_path)
    write_run(tmp_path, Recording({}, RECORDS))
    described = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(described | {"version": 99}))
    with pytest.raises(DataError, match="expected version 1 of a run, found 99"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="expected a readable file of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_file_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    write_run(tmp_path, Recording({}, RECORDS))
    content = (tmp_path / "frames.npz").read_bytes()
    assert len(content) > 5000
    (tmp_path / "frames.npz").write_bytes(content[:size])
    with pytest.raises(DataError, match="expected a readable file of a run at .*frames.npz"):
        read_run(tmp_path)


def test_arrays_are_read_by_numpy_too_and_hold_no_time(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b.c": np.zeros((0, 2), np.uint8), "d?": np.array([True])}
    write_arrays(tmp_path / "x.npz", arrays)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
        assert {name: stored[name].tolist() for name in stored.files} == {k: v.tolist() for k, v in arrays.items()}
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert {name: values.tolist() for name, values in map_arrays(tmp_path / "x.npz").items()} == {
        name: values.tolist() for name, values in arrays.items()
    }


def test_objects_and_compressed_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    np.savez_compressed(tmp_path / "small.npz", a=np.zeros(9))
    for name, found in (("objects", "holds objects"), ("small", "is compressed")):
        with pytest.raises(DataError, match=found):
            map_arrays(tmp_path / f"{name}.npz")


# -- TUM ---------------------------------------------------------------------------------------------------------------


def test_quaternions_of_any_rotation() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=3) * angle for angle in (0, 1e-9, 0.1, 1, 3.1)]
    vectors += [np.pi * axis for axis in np.eye(3)]
    for vector in vectors:
        x, y, z, w = quaternions(cv2.Rodrigues(vector)[0][None])[0]
        angle = np.linalg.norm(vector)
        expected = np.append(vector / max(angle, 1e-300) * np.sin(angle / 2), np.cos(angle / 2))
        assert abs(abs(expected @ (x, y, z, w)) - 1) < 1e-12 and w >= 0


def test_tum_stamps_are_exact(tmp_path: Path) -> None:
    stamps = np.array([-1_500_000_000, 0, 1, 1_700_000_000_000_000_001])
    write_tum(tmp_path / "t.txt", stamps, np.tile(np.eye(4), (4, 1, 1)), "poses")
    assert (tmp_path / "t.txt").read_text().splitlines()[:3] == [
        "# poses",
        "# timestamp tx ty tz qx qy qz qw",
        "-1.500000000 0.000000000 0.000000000 0.000000000 0.000000000 0.000000000 0.000000000 1.000000000",
    ]
    found, poses = read_tum(tmp_path / "t.txt")
    np.testing.assert_array_equal(found, stamps)
    np.testing.assert_array_equal(poses, np.tile(np.eye(4), (4, 1, 1)))
    (tmp_path / "t.txt").write_text("1.0 2 3\n")
    with pytest.raises(DataError, match="expected poses as TUM writes them"):
        read_tum(tmp_path / "t.txt")
