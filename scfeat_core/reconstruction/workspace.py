"""A folder in which images are reconstructed, stage by stage: features, matches, database, model.

``features.h5`` (hloc), ``pairs.txt``, ``matches.h5`` (hloc), ``database.db`` (COLMAP), ``sparse/0`` (COLMAP's model as
text), ``reconstruction.json`` (the figures; until there is a model, those of the pairs). Features and matches that are
there are kept where they were made in the same way, as ``features.json`` and ``matches.json`` say; the database and the
model are made anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scfeat_core.bulk.pipeline import Outcome
from scfeat_core.errors import DataError
from scfeat_core.evaluation.views import with_progress
from scfeat_core.feature_files import open_h5, require_h5py
from scfeat_core.reconstruction.cameras import (
    Cameras,
    ColmapCamera,
    Size,
    calibrated,
    guessed,
    guessed_of_file,
    one_camera,
    own_cameras,
    require_pycolmap,
)
from scfeat_core.reconstruction.database import write_database
from scfeat_core.reconstruction.features import Extraction, read_sizes, write_features
from scfeat_core.reconstruction.hloc import MatchedPair, Pair, check_group_names, read_matches, write_pairs
from scfeat_core.reconstruction.mapping import Model, reconstruct
from scfeat_core.reconstruction.matching import StoredFeatures, match_pairs, verifier
from scfeat_core.reconstruction.pairs import choose_pairs
from scfeat_core.reconstruction.sources import Source
from scfeat_core.reconstruction.summary import Summary, summarise_models, summarise_pairs, write_summary
from scfeat_core.report import check_folder, write
from scfeat_core.types import Camera

Calibrate = Callable[[Size], Camera]
_NOTHING = (
    "nothing could be reconstructed: COLMAP found no two images to begin with, which have about 100 common points seen "
    "under different angles; a camera that only turns has none"
)
CAMERA_CHOICES = ("known", "shared", "each")


@dataclass(frozen=True, eq=False)
class Plan:
    """How. pairs: see :func:`choose_pairs`; empty: sequential where the images are in order, else exhaustive.

    camera: a function of the size of the images that gives the calibration of all of them; or ``known``: what the
    source knows, and a guess where it knows nothing; ``shared``: one guess for all; ``each``: a guess for each.
    threshold: pixels, of the verification. mapping: False stops after the database. overwrite: keep nothing. progress:
    bars on stderr.
    """

    extraction: Extraction = field(default_factory=Extraction)
    pairs: str = ""
    camera: Calibrate | str = "known"
    threshold: float = 2.0
    mapping: bool = True
    overwrite: bool = False
    progress: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """summary: the figures. models: best first. failed: images without features, and why."""

    summary: Summary
    models: Sequence[Model]
    failed: Sequence[Outcome]


def run(source: Source, out: Path, plan: Plan, say: Callable[[str], None] = lambda line: None) -> Result:
    """All stages into the folder ``out``. Raises ScfeatError; what was complete by then is kept."""
    require_h5py()
    require_pycolmap()
    _check(source, out, plan)
    clock = _Clock()
    features, failed = _features(source, out, plan)
    clock.lap("features")
    sizes = read_sizes(features, source.names)
    if len(sizes) < 2:
        reasons = "; ".join(f"{each.name}: {each.error}" for each in failed[:3])
        raise DataError(f"expected features of at least two images, found {len(sizes)} ({reasons or 'no more images'})")
    cameras = choose_cameras(source, sizes, plan.camera)
    pairs = [pair for pair in _pairs(source, plan) if pair[0] in sizes and pair[1] in sizes]
    say(f"{len(sizes)} images, {len(pairs)} pairs, {_describe(cameras)}")
    _match(source, features, out, pairs, cameras, plan, say)
    clock.lap("matches")
    counts, keypoints = _write_database(features, out, list(sizes), pairs, cameras)
    clock.lap("database")
    summary = {**summarise_pairs(counts, keypoints), "images": len(source.names)}
    models: list[Model] = []
    write_summary(out / "reconstruction.json", _content(source, plan, summary, models, failed, clock.seconds))
    if plan.mapping:
        models = _map(source, out, cameras, len(sizes), plan.progress)
        clock.lap("mapping")
        if not models:
            say(_NOTHING)
        summary.update(summarise_models(models, source.truth))
        write_summary(out / "reconstruction.json", _content(source, plan, summary, models, failed, clock.seconds))
    return Result(summary, models, failed)


# -- before ------------------------------------------------------------------------------------------------------------


def _check(source: Source, out: Path, plan: Plan) -> None:
    if len(source.names) < 2:
        raise DataError(f"expected at least two images, found {len(source.names)}: {', '.join(source.names)}")
    check_group_names(source.names)
    _pairs(source, plan)
    check_folder(out)
    if (out / "matches.json").exists():
        return
    for name in ("database.db", "sparse"):
        if (out / name).exists():
            raise DataError(
                f"expected a new folder, or one of an earlier run, at {out}, found a {name} of something else; "
                "choose another folder with --out"
            )


def _pairs(source: Source, plan: Plan) -> list[Pair]:
    return choose_pairs(source.names, plan.pairs or ("sequential" if source.in_order else "exhaustive"))


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


# -- cameras -----------------------------------------------------------------------------------------------------------


def choose_cameras(source: Source, sizes: Mapping[str, Size], choice: Calibrate | str) -> Cameras:
    """The cameras of the images with features. Raises DataError for sizes that do not fit, CalibrationError."""
    if callable(choice):
        return one_camera(sizes, calibrated(choice(next(iter(sizes.values())))))
    if choice == "shared" or (choice == "known" and source.in_order and not source.calibrations):
        return one_camera(sizes, guessed(next(iter(sizes.values()))))
    files = {file.name: Path(file.path) for file in source.files}
    known = source.calibrations if choice == "known" else {}
    return own_cameras({name: _camera(name, size, known, files) for name, size in sizes.items()})


def _camera(name: str, size: Size, known: Mapping[str, Camera], files: Mapping[str, Path]) -> ColmapCamera:
    if name not in known:
        return guessed_of_file(files[name], size) if name in files else guessed(size)
    if known[name].size != size:
        raise DataError(
            f"expected '{name}' of {known[name].size[0]}x{known[name].size[1]} pixels, as its calibration says, found "
            f"{size[0]}x{size[1]}; give --camera each to ignore the calibration"
        )
    return calibrated(known[name])


def _describe(cameras: Cameras) -> str:
    known = sum(camera.calibration is not None for camera in cameras.cameras)
    return f"{len(cameras.cameras)} cameras, {known} of them calibrated"


# -- stages ------------------------------------------------------------------------------------------------------------


def _features(source: Source, out: Path, plan: Plan) -> tuple[Path, list[Outcome]]:
    if source.features is not None:
        return source.features, []

    def watch(outcomes: Iterable[Outcome], count: int) -> Iterable[Outcome]:
        return with_progress(outcomes, "features", plan.progress, count)

    path = out / "features.h5"
    return path, write_features(path, source, plan.extraction, plan.overwrite, watch)


def _match(
    source: Source,
    features: Path,
    out: Path,
    pairs: Sequence[Pair],
    cameras: Cameras,
    plan: Plan,
    say: Callable[[str], None],
) -> None:
    write_pairs(out / "pairs.txt", pairs)
    path, record = out / "matches.h5", out / "matches.json"
    with open_h5(features) as stored:
        held = StoredFeatures(stored)
        made = _matches_record(source, features, cameras, plan, held)
        if path.exists() and (plan.overwrite or _read(record) != made):
            say("the matches that are there were made of other features or settings, and are made again")
            path.unlink()
        write(record, json.dumps(made, indent=1) + "\n")
        match_pairs(
            path,
            pairs,
            held,
            source.tracks or held.match,
            verifier(cameras, plan.threshold),
            lambda missing: with_progress(missing, "matches", plan.progress),
        )


def _matches_record(
    source: Source, features: Path, cameras: Cameras, plan: Plan, held: StoredFeatures
) -> dict[str, Any]:
    """What the matches depend on, apart from the images themselves."""
    extracted = _read(features.with_suffix(".json"))
    frames = hashlib.sha256()
    for name, _ in source.frames:
        frames.update(held.read(name).keypoints.tobytes())
    used = [(camera.model, camera.size, camera.params) for camera in cameras.cameras if camera.calibration is not None]
    return {
        "features": extracted if source.frames == () else frames.hexdigest(),
        "threshold": plan.threshold,
        "calibrations": hashlib.sha256(repr(used).encode()).hexdigest(),
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_database(
    features: Path, out: Path, names: Sequence[str], pairs: Sequence[Pair], cameras: Cameras
) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns (matches, inliers) of each pair, and the number of keypoints of each image."""
    with open_h5(features) as stored:
        held = StoredFeatures(stored)
        keypoints = {name: held.read(name).keypoints for name in names}
    counts: list[tuple[int, int]] = []

    def matched() -> Iterator[MatchedPair]:  # one by one: there may be a million
        for pair in read_matches(out / "matches.h5", pairs):
            if pair.keypoints != tuple(len(keypoints[name]) for name in pair.names):
                raise DataError(
                    f"expected matches of the features in {features}, found those of others for {pair.names}; make "
                    "them again (--overwrite)"
                )
            counts.append((len(pair.matches), pair.num_inliers))
            yield pair

    database = out / "database.db"
    for file in [database, *out.glob("database.db-*")]:  # also the log of a mapping that was killed
        file.unlink(missing_ok=True)
    write_database(database, keypoints, cameras, matched())
    return counts, [len(points) for points in keypoints.values()]


def _map(source: Source, out: Path, cameras: Cameras, images: int, progress: bool) -> list[Model]:
    bar = iter(with_progress(range(images), "mapping", progress))

    def registered() -> None:
        next(bar, None)

    return reconstruct(out / "database.db", source.images, out / "sparse", cameras, registered)


def _content(
    source: Source,
    plan: Plan,
    summary: Summary,
    models: Sequence[Model],
    failed: Sequence[Outcome],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    registered = list(models[0].poses) if models else []
    return {
        "summary": summary,
        "extraction": None if source.features is not None or source.frames else asdict(plan.extraction),
        "threshold": plan.threshold,
        "registered": registered,
        "not_registered": sorted(set(source.names) - set(registered)),
        "failed": {each.name: each.error for each in failed},
        "models": [
            {"images": len(model.poses), "points": model.points, "focal_lengths": list(model.focal_lengths)}
            for model in models
        ],
        "timings": dict(seconds),
    }
