"""A job: some images, how, and to where. What is complete is skipped; what failed is listed and does not end it."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scfeat_core.bulk.images import ImageFile
from scfeat_core.bulk.outputs import Output
from scfeat_core.bulk.pipeline import Outcome, Settings, extract_images
from scfeat_core.config import dump_config
from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.extraction import ExtractionOptions, Extractor
from scfeat_core.report import write

_NAMED_AT_MOST = 5  # of the names in a message

Backend = Callable[[Sequence[ImageFile], Settings, Output], Generator[Outcome, None, None]]


@dataclass(frozen=True)
class Job:
    """Raises DataError where features of two images would go to one place."""

    files: Sequence[ImageFile]
    settings: Settings
    output: Output

    def __post_init__(self) -> None:
        counts = Counter(self.output.place(file.name) for file in self.files)
        taken = [place for place, count in counts.items() if count > 1]
        if taken:
            shown = ", ".join(taken[:_NAMED_AT_MOST]) + (" ..." if len(taken) > _NAMED_AT_MOST else "")
            raise DataError(f"images of the same name would overwrite each other: {shown}; extract them apart")


@dataclass(frozen=True)
class Report:
    """What a job came to. keypoints: of the extracted images together; seconds: without the start of the network."""

    images: int
    skipped: int
    extracted: int
    keypoints: int
    failures: tuple[Outcome, ...]
    seconds: float

    def __str__(self) -> str:
        parts = [f"{self.extracted} of {self.images} images, {self.keypoints} keypoints"]
        if self.extracted:
            parts.append(f"{self.extracted / max(self.seconds, 1e-9):.1f} images/s")
        if self.skipped:
            parts.append(f"{self.skipped} skipped, as they are complete")
        if self.failures:
            parts.append(f"{len(self.failures)} FAILED")
        return ", ".join(parts)


def run_job(
    job: Job,
    backend: Backend | None = None,
    overwrite: bool = False,
    watch: Callable[[Outcome], None] = lambda outcome: None,
    begin: Callable[[int], None] = lambda count: None,
) -> Report:
    """Extract what is missing. backend: what runs the pipeline; this process where it is None.

    begin: called with the number of images to extract before the first, watch with each outcome. Raises ScfeatError
    where the output holds features that were made otherwise, or cannot be written.
    """
    extractor = job.settings.create() if backend is None else _stand_in(job.settings)
    check_record(job.output.record, _record(job, extractor), overwrite)
    if overwrite:
        job.output.remove(job.files)
    missing = job.output.missing(job.files)
    begin(len(missing))
    start = time.perf_counter()
    outcomes = (
        extract_images(missing, job.settings, extractor, job.output)
        if backend is None
        else backend(missing, job.settings, job.output)
    )
    extracted, keypoints, failures = 0, 0, []
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            watch(outcome)
            if outcome.error:
                failures.append(outcome)
            else:
                extracted, keypoints = extracted + 1, keypoints + outcome.keypoints
    job.output.finish()
    seconds = time.perf_counter() - start
    _list_failures(job.output, failures)
    return Report(len(job.files), len(job.files) - len(missing), extracted, keypoints, tuple(failures), seconds)


def _stand_in(settings: Settings) -> Extractor:
    """Tells what is made elsewhere, perhaps on a device that this machine does not have."""
    options = {**settings.options, "precision": "float32", "engine": "eager"}
    return replace(settings, device="cpu", options=options).create()


def _list_failures(output: Output, failures: Sequence[Outcome]) -> None:
    """``failed.txt`` beside the record: what failed in the last run, a name and a reason a line."""
    path = output.record.with_name(f"{output.record.stem}.failed.txt")
    if failures:
        write(path, "".join(f"{outcome.name}\t{' '.join(outcome.error.split())}\n" for outcome in failures))
    else:
        path.unlink(missing_ok=True)


# -- record ------------------------------------------------------------------------------------------------------------


def check_record(path: Path, made: Mapping[str, Any], overwrite: bool) -> None:
    """Write how something is made, or see that what is there was made in the same way; DataError where it was not."""
    if not overwrite and path.is_file() and (found := _read_record(path)) != made:
        differing = [key for key in made if found.get(key) != made[key]]
        changes = "; ".join(f"{key} was {found.get(key)!r} and is now {made[key]!r}" for key in differing)
        raise DataError(
            f"expected features made with the same settings in {path.parent}, found others ({path.name}): "
            f"{changes or 'unknown settings'}; write to another place, or overwrite them (--overwrite)"
        )
    write(path, json.dumps(made, indent=1) + "\n")


def _record(job: Job, extractor: Extractor) -> dict[str, Any]:
    asked = {name: job.settings.options.get(name, getattr(ExtractionOptions, name)) for name in ("precision", "engine")}
    return {
        "descriptor_space": extractor.descriptor_space,
        "options": {**dump_config(extractor.options), **asked},
        "use_sift": job.settings.use_sift,
        "half": job.output.half,
    }


def _read_record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScfeatError(f"expected a readable record of settings at {path}, found {error}; remove it") from error
    return found if isinstance(found, dict) else {}
