"""Images of a bag as files, for reconstruction: COLMAP wants to find them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.bulk.images import ImageFile
from scfeat_core.errors import DataError
from scfeat_core.evaluation.views import with_progress
from scfeat_core.feature_files import replaced
from scfeat_core.reconstruction.sources import Source as Images
from scfeat_core.reconstruction.sources import image_name
from scfeat_core.reconstruction.truth import truth_of
from scfeat_core.report import encode
from scfeat_core.types import Camera

from .job import ReplayJob
from .source import Shot, Source


def bag_source(
    bag: Path,
    folder: Path,
    topic: str | None = None,
    every: int = 1,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Images:
    """Every n-th image of a bag, written to ``folder`` as PNG and called by its stamp; those that are there are kept.

    With the calibration and the true poses of the bag, or of the files beside it, as :mod:`.source` finds them. say: is
    told what was chosen, and what the bag did not give. Raises DataError where there is no image, ScfeatError where one
    cannot be written.
    """
    source = Source(ReplayJob(bag, folder, topic=topic))
    say(source.choice)
    written = _write_all(source, folder, every, say, progress)
    for line in [*source.warnings, *source.lost.damage]:
        say(line)
    if not written.stamps:
        raise DataError(f"expected images on {source.topic.name} in {bag}, found none that can be decoded")
    names = [image_name(stamp) for stamp in written.stamps]
    return Images(
        tuple(names),
        tuple(ImageFile(name, str(folder / name)) for name in names),
        folder,
        in_order=True,
        calibrations=written.cameras,
        truth=truth_of(names, written.stamps, source.truth),
    )


@dataclass(frozen=True)
class _Written:
    stamps: list[int] = field(default_factory=list)
    cameras: dict[str, Camera] = field(default_factory=dict)


def _write_all(source: Source, folder: Path, every: int, say: Callable[[str], None], progress: bool) -> _Written:
    written = _Written()
    calibrations = source.calibrations(say)
    seen: set[int] = set()
    shots: Any = with_progress(source.shots(decode=lambda index: index % every == 0), "images", progress, source.count)
    for shot in shots:
        if shot.index % every:
            continue
        if shot.pixels is None or shot.stamp in seen:
            say(f"image {shot.index} left out: {shot.error or 'another one has its stamp'}")
            continue
        seen.add(shot.stamp)
        _write(folder / image_name(shot.stamp), shot.pixels)
        written.stamps.append(shot.stamp)
        _calibrate(written, shot, calibrations)
    written.stamps.sort()
    return written


def _calibrate(written: _Written, shot: Shot, calibrations: Callable[[Shot], Camera | None]) -> None:
    camera = calibrations(shot)
    if camera is not None:
        written.cameras[image_name(shot.stamp)] = camera


def _write(path: Path, pixels: np.ndarray) -> None:
    if path.is_file():
        return
    with replaced(path) as scratch:
        scratch.write_bytes(encode(pixels))
