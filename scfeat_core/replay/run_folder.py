"""The folder of a replay: what is written while it goes on, and what is read afterwards.

A finished run has ``run.json`` (facts and camera), ``frames.npz`` (the columns of all records, see columns.py, but for
the timings), ``timings.npz`` (milliseconds, a column for each stage, NaN where a frame has none) and, where there is
ground truth, ``groundtruth.txt`` (TUM). Only ``timings.npz`` differs between equal runs.

Until then the records go to parts in ``unfinished/``, with the state of the front end after the last of them, so that a
run that was interrupted goes on there. Each file is complete or not there at all. Memory is that of one part, whatever
the length of a run: the parts are joined, and afterwards read, through memory maps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import mmap
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.columns import Columns, Table, to_columns
from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.feature_files import replaced, writing
from scfeat_core.replay.records import FrameRecord, GroundTruth, Recording
from scfeat_core.replay.tum import read_tum, write_tum
from scfeat_core.types import Camera

RUN, FRAMES, TIMINGS, TRUTH, UNFINISHED = "run.json", "frames.npz", "timings.npz", "groundtruth.txt", "unfinished"
_STATE = "state.npz"  # of an unfinished run, after its last part
_FINISHED = ".finished"  # what becomes of UNFINISHED, while it is removed
_DERIVED = ("metrics.json", "trajectory.txt", "report.html")  # made of these by others
_FINAL = (RUN, FRAMES, TIMINGS, TRUTH, *_DERIVED)
VERSION = 1  # of the files; others are refused
_TIMING = "timings."  # what the columns of timings are called in parts, before the stage


# -- while it goes on --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where an unfinished run is. parts: how many are written. frames: records in them. state: of the front end."""

    parts: int = 0
    frames: int = 0
    state: Columns = dataclasses.field(default_factory=dict)


class RunWriter:
    """Writes a run, part by part. Make one with :func:`begin_run`. Methods raise ScfeatError where nothing can be
    written; what was written before stays good. A run that is replaced stays until the first part is there."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any], progress: Progress) -> None:
        self.folder = folder
        self.progress = progress
        self._inputs = dict(inputs)

    def add(self, frames: Sequence[FrameRecord], state: Columns) -> None:
        """The next records, and the state of the front end after them."""
        parts, done = self.progress.parts, self.progress.frames
        columns = to_columns(FrameRecord, frames, skip=["timings"])
        write_arrays(_part(self.folder, parts), {**columns, **_timing_columns(frames)})
        counts = {"parts": np.array([parts + 1]), "frames": np.array([done + len(frames)])}
        write_arrays(self.folder / UNFINISHED / _STATE, {**state, **counts})
        if not done:  # from here on there is something instead
            _unlink(self.folder, _FINAL)
        self.progress = Progress(parts + 1, done + len(frames), state)

    def abandon(self) -> None:
        """Remove what was begun, and the folder where nothing else is in it: to be called before :meth:`add`. Nothing
        is raised."""
        with contextlib.suppress(OSError):
            _discard(self.folder)
            self.folder.rmdir()

    def finish(
        self, facts: Mapping[str, Any], camera: Camera | None, truth: GroundTruth | None, complete: bool = True
    ) -> None:
        """Join the parts to the files of the run. facts: what came out, beside the inputs. complete: False keeps the
        parts, so that the run can go on.

        What others made of fewer parts, before an interruption, is removed: nothing must look made of all.
        """
        _unlink(self.folder, (TRUTH, *_DERIVED))
        parts = [_part(self.folder, number) for number in range(self.progress.parts)]
        _join(self.folder / FRAMES, parts)
        _join_timings(self.folder / TIMINGS, parts)
        if truth is not None:
            write_tum(self.folder / TRUTH, truth.stamps, truth.poses, truth.source)
        described = {
            "version": VERSION,
            "facts": {**self._inputs, **facts},
            "camera": None if camera is None else camera_to_json(camera),
            "truth": None if truth is None else truth.source,
        }
        _write_json(self.folder / RUN, described)
        if complete:
            _discard(self.folder)


def begin_run(folder: Path, inputs: Mapping[str, Any], overwrite: bool = False) -> RunWriter | None:
    """Start a run in a folder, or go on with an unfinished one of the same inputs; None where it is finished.

    inputs: the facts that decide what comes out, as JSON takes them. overwrite: start anew in any case. Raises
    ScfeatError where the folder holds a run of other inputs, or cannot be written.
    """
    if not overwrite and is_finished(folder, inputs):
        return None
    inputs = _plain(inputs)
    _sweep(folder)
    if not overwrite and _inputs_of(folder) is not None:
        return RunWriter(folder, inputs, _progress(folder))
    with writing(folder, "--out"):
        _discard(folder)
    _write_json(folder / UNFINISHED / "inputs.json", inputs)
    return RunWriter(folder, inputs, Progress())


def is_finished(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a folder holds a complete run of these inputs; nothing is written. Raises as :func:`begin_run`."""
    found = _inputs_of(folder)
    if found is None:
        return False
    _check_inputs(folder, _plain(inputs), found)
    return not _has_begun(folder)


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file: lists, not tuples."""
    return dict(json.loads(json.dumps(dict(inputs))))


def _has_begun(folder: Path) -> bool:
    """Whether there are frames of an unfinished run."""
    return (folder / UNFINISHED / "inputs.json").exists() and (folder / UNFINISHED / _STATE).exists()


def write_run(folder: Path, recording: Recording) -> None:
    """Write a whole run at once, over one that is there. Raises ScfeatError."""
    writer = begin_run(folder, recording.facts, overwrite=True)
    assert writer is not None
    writer.add(recording.frames, {})
    writer.finish({}, recording.camera, recording.truth)


def _inputs_of(folder: Path) -> dict[str, Any] | None:
    """Those of the run in a folder; None where there is none, or none of its frames yet."""
    if _has_begun(folder):
        return _read_json(folder / UNFINISHED / "inputs.json")
    return _read_json(folder / RUN).get("facts", {}) if (folder / RUN).exists() else None


def _check_inputs(folder: Path, inputs: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differing = _differences(inputs, found)
    if differing:
        changes = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, old, new in differing)
        raise ScfeatError(
            f"expected an empty folder, or a run of the same bag and settings, at {folder}, found another one: "
            f"{changes}; choose another folder (--out), or replace it (--overwrite)"
        )


def _differences(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += _differences(value, before, f"{prefix}{key}.")
        elif value != before:
            found.append((f"{prefix}{key}", before, value))
    return found


def _progress(folder: Path) -> Progress:
    path = folder / UNFINISHED / _STATE
    if not path.exists():
        return Progress()
    columns = {name: np.array(values) for name, values in map_arrays(path).items()}
    try:
        parts, frames = int(columns.pop("parts")[0]), int(columns.pop("frames")[0])
    except (KeyError, IndexError) as error:
        raise _damaged(path, "no count of its parts") from error
    return Progress(parts, frames, columns)


def _unlink(folder: Path, names: Sequence[str]) -> None:
    with writing(folder, "--out"):
        for name in names:
            (folder / name).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """What a process that was killed had half written: the scratch files of ``replaced``."""
    for name in (*_FINAL, f"{UNFINISHED}/*"):
        parent, _, last = name.rpartition("/")
        for file in (folder / parent).glob(f".{last}.*.tmp"):
            with contextlib.suppress(OSError):
                file.unlink()


def _discard(folder: Path) -> None:
    """All of ``unfinished/`` at once: a part of it, left by a process that is killed here, must not look like a run."""
    left = folder / _FINISHED
    shutil.rmtree(left, ignore_errors=True)
    if (folder / UNFINISHED).exists():
        (folder / UNFINISHED).replace(left)
        shutil.rmtree(left, ignore_errors=True)


def _part(folder: Path, number: int) -> Path:
    return folder / UNFINISHED / f"part-{number:06d}.npz"


def _timing_columns(frames: Sequence[FrameRecord]) -> Columns:
    stages = sorted({stage for frame in frames for stage in frame.timings})
    rows = [[frame.timings.get(stage, np.nan) for stage in stages] for frame in frames]
    values = np.array(rows, np.float64).reshape(len(frames), len(stages))
    return {f"{_TIMING}{stage}": values[:, column] for column, stage in enumerate(stages)}


def _join(path: Path, parts: Sequence[Path]) -> None:
    """One file of the columns of all parts, written through, chunk by chunk."""
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
    for part in parts:
        for name, values in map_arrays(part).items():
            rows = shapes[name][2] if name in shapes else 0
            shapes[name] = (values.dtype, values.shape[1:], rows + len(values))
    names = sorted(name for name in shapes if not name.startswith(_TIMING))  # whichever part had them first
    with _archive(path) as archive:
        for name in names:
            dtype, shape, rows = shapes[name]
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                _write_header(file, dtype, (rows, *shape))
                for part in parts:
                    piece = map_arrays(part, name).get(name)
                    if piece is not None:
                        file.write(np.ascontiguousarray(piece, dtype).tobytes())


def _join_timings(path: Path, parts: Sequence[Path]) -> None:
    # Copies: each map keeps a file open, and an hour has more parts than a process may have files.
    pieces = [{name: np.array(values) for name, values in map_arrays(part, _TIMING).items()} for part in parts]
    lengths = [len(map_arrays(part, "index")["index"]) for part in parts]
    columns: Columns = {}
    for stage in sorted({name for piece in pieces for name in piece}):
        nothing = (np.full(length, np.nan) for length in lengths)
        values = [piece.get(stage, absent) for piece, absent in zip(pieces, nothing, strict=True)]
        columns[stage.removeprefix(_TIMING)] = np.concatenate(values)
    write_arrays(path, columns)


# -- afterwards --------------------------------------------------------------------------------------------------------


class Frames(Sequence[FrameRecord]):
    """The records of a run, read from its files when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._table: Table[FrameRecord] = Table(FrameRecord, map_arrays(folder / FRAMES), skip=["timings"])
        self._timings = {name: np.array(values) for name, values in map_arrays(folder / TIMINGS).items()}

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record = self._table[index]
        timings = {stage: float(values[index]) for stage, values in self._timings.items()}
        return dataclasses.replace(record, timings={key: ms for key, ms in timings.items() if not np.isnan(ms)})


def read_run(folder: Path) -> Recording:
    """A run that was written, finished or interrupted. Raises DataError where there is none, or it is damaged."""
    folder = Path(folder)
    if not (folder / RUN).exists():
        found = "an unfinished one: run the same command again" if (folder / UNFINISHED).exists() else "none"
        raise DataError(f"expected a run of `scfeat replay` at {folder}, found {found}")
    described = _read_json(folder / RUN)
    if described.get("version") != VERSION:
        raise DataError(
            f"{folder / RUN}: expected version {VERSION} of a run, found {described.get('version')!r}: replay again, "
            "or read it with the version of scfeat that wrote it"
        )
    truth = None
    if described.get("truth") is not None:
        truth = GroundTruth(*read_tum(folder / TRUTH), described["truth"])
    return Recording(described.get("facts", {}), Frames(folder), camera_from_json(described.get("camera")), truth)


def camera_to_json(camera: Camera) -> dict[str, Any]:
    """Plain lists and numbers, exactly."""
    values = {field.name: getattr(camera, field.name) for field in dataclasses.fields(camera)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def camera_from_json(found: Mapping[str, Any] | None) -> Camera | None:
    """What :func:`camera_to_json` was given. Raises KeyError, ValueError or TypeError for something else."""
    if found is None:
        return None
    K, D = (np.array(found[name], np.float64) for name in ("K", "D"))
    R, P = (None if found[name] is None else np.array(found[name], np.float64) for name in ("R", "P"))
    width, height = found["size"]
    return Camera(K, D, (width, height), found["distortion_model"], R, P)


# -- files -------------------------------------------------------------------------------------------------------------


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An ``.npz`` of the arrays, in their order, with no dates in it. Raises ScfeatError."""
    with _archive(path) as archive:
        for name, values in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                _write_header(file, values.dtype, values.shape)
                file.write(np.ascontiguousarray(values).tobytes())


def map_arrays(path: Path, prefix: str = "") -> Columns:
    """The arrays of an uncompressed ``.npz`` whose names begin with ``prefix``, as views of a memory map.

    Raises DataError where the file is missing, damaged, or something else.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            return {name: _view(memory, entry) for name, entry in entries.items() if name.startswith(prefix)}
    except FileNotFoundError as error:
        raise DataError(f"expected {path}, found no file: the run is not complete, replay again") from error
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error


def _view(memory: memoryview, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array of an archive that lies there as it is (PKWARE's APPNOTE, 4.3.7: 30 bytes, the name, extra fields)."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    at = entry.header_offset
    start = at + 30 + int.from_bytes(memory[at + 26 : at + 28], "little")
    start += int.from_bytes(memory[at + 28 : at + 30], "little")
    header = io.BytesIO(memory[start : start + min(entry.file_size, 4096)])
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds objects")
    return np.ndarray(shape, dtype, memory[start : start + entry.file_size], header.tell())


def _write_header(file: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A new archive that takes the place of a file when it is complete."""
    with replaced(path) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
        yield archive


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replaced(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise _damaged(path, type(found).__name__)
    return found


def _damaged(path: Path, found: object) -> DataError:
    return DataError(f"expected a readable file of a run at {path}, found: {found}; replay again (--overwrite)")
