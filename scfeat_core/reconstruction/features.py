"""The features of a source in an HDF5 file; images that are there are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scfeat_core.bulk.images import ImageFile, Undecoded, decode_ahead
from scfeat_core.bulk.jobs import check_record
from scfeat_core.bulk.outputs import H5Output
from scfeat_core.bulk.pipeline import Outcome, Settings, extract_images
from scfeat_core.errors import DataError, ImageError
from scfeat_core.evaluation.methods import Method, check_features, create_method
from scfeat_core.feature_files import open_h5, read_h5
from scfeat_core.reconstruction.hloc import MOST_KEYPOINTS
from scfeat_core.reconstruction.sources import Source
from scfeat_core.types import Features

PART_IMAGES = 32  # what an interruption can cost
_DECODERS = 2

Watch = Callable[[Iterable[Outcome], int], Iterable[Outcome]]


@dataclass(frozen=True)
class Extraction:
    """What makes the features. method: see :func:`scfeat_core.evaluation.methods.create_method`. options: its own; of
    scfeat, those of the Extractor. weights, device: of scfeat. Raises DataError for more points than hloc can index."""

    method: str = "scfeat"
    max_keypoints: int = 2048
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = "lite"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.max_keypoints <= MOST_KEYPOINTS:
            raise DataError(
                f"expected 1 to {MOST_KEYPOINTS} keypoints an image, whose indices hloc stores as int16, found "
                f"{self.max_keypoints}; give --max-keypoints"
            )


def write_features(
    path: Path, source: Source, extraction: Extraction, overwrite: bool = False, watch: Watch = lambda items, n: items
) -> list[Outcome]:
    """Make what ``path`` does not have; returns what failed. watch: passes outcomes on, and may show their progress.

    Raises DataError where the file has features that were made otherwise, or that nobody recorded, and ScfeatError
    where it cannot be written.
    """
    output = H5Output(path, part_images=PART_IMAGES)
    if path.exists() and not output.record.exists() and not overwrite:
        raise DataError(
            f"expected no features of others at {path}, found a file without the record {output.record.name}; give it "
            "as the source instead, or overwrite it (--overwrite)"
        )
    if source.frames:
        check_record(output.record, {"frames": len(source.frames), "method": "replay"}, overwrite)
        _write_frames(output, source.frames)
        return []
    run, made = _runner(extraction, output)
    check_record(output.record, made, overwrite)
    if overwrite:
        output.remove(source.files)
    missing = output.missing(source.files)
    failed = []
    outcomes = run(missing)
    with contextlib.closing(outcomes):
        failed = [outcome for outcome in watch(outcomes, len(missing)) if outcome.error]
    output.finish()
    return failed


def _write_frames(output: H5Output, frames: Sequence[tuple[str, Features]]) -> None:
    output.remove(())
    with contextlib.closing(output.writer()) as writer:
        for name, features in frames:
            writer.add(name, features.keypoints, features, 1.0)
    output.finish()


def _runner(
    extraction: Extraction, output: H5Output
) -> tuple[Callable[[Sequence[ImageFile]], Generator[Outcome, None, None]], dict[str, Any]]:
    """What extracts, and how it does it, for the record."""
    made = {"method": extraction.method, "max_keypoints": extraction.max_keypoints, "options": extraction.options}
    if extraction.method != "scfeat":
        method = create_method(extraction.method, extraction.options)
        return lambda files: _extract(files, method, extraction.max_keypoints, output), made
    options = {**extraction.options, "max_keypoints": extraction.max_keypoints}
    settings = Settings(extraction.weights, extraction.device, options, decoders=_DECODERS)
    extractor = settings.create()
    made["descriptor_space"] = extractor.descriptor_space
    return lambda files: extract_images(files, settings, extractor, output), made


def _extract(
    files: Sequence[ImageFile], method: Method, budget: int, output: H5Output
) -> Generator[Outcome, None, None]:
    """With a method that is not ours, one image at a time."""
    with (
        contextlib.closing(decode_ahead(files, _DECODERS, 2 * _DECODERS)) as decoded,
        contextlib.closing(output.writer()) as writer,
    ):
        for each in decoded:
            if isinstance(each, Undecoded):
                yield Outcome(each.file.name, 0, str(each.error))
                continue
            try:
                features = check_features(method(each.image, budget), budget)
            except ImageError as error:
                yield Outcome(each.file.name, 0, str(error))
                continue
            writer.add(each.file.name, each.image, features, 1.0)
            yield Outcome(each.file.name, len(features), "")


def read_sizes(path: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Sizes (width, height) of the images of which the file has features, in the order of ``names``."""
    with open_h5(path) as stored:
        found = [name for name in names if name in stored]
        return {name: read_h5(stored, name).image_size for name in found}
