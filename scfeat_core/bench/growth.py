"""How times grow with the pixels of the image and with the number of points, and the exponents of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from scfeat_core.bench import own, peers
from scfeat_core.bench.images import load_images
from scfeat_core.bench.measuring import Meter, Progress, threads_of
from scfeat_core.bench.settings import Case, Settings
from scfeat_core.bench.timing import Contender, Samples, Task, measure, reason, summarise
from scfeat_core.errors import ScfeatError
from scfeat_core.matching import match_descriptors

SIZES = ((640, 480), (960, 720), (1280, 720), (1920, 1080), (2560, 1440), (3840, 2160))
POINTS = (256, 512, 1024, 2048, 4096, 8192)
POINTS_SIZE = (1280, 720)  # has more local maxima than the largest budget
_PEERS = ("sift", "orb")  # akaze finds more points in larger images, whatever the budget
MIN_PLACES = 3  # of a fit: fewer leave no error
_OPTIONS = {"pixels": "--size", "points": "--budget"}  # that choose the places
_NOISE = 0.05  # of each number of a descriptor whose point is seen again


@dataclass(frozen=True, eq=False)
class Place:
    """A contender at one place of its curve. owner: whose curve. x: pixels or points."""

    contender: Contender
    owner: str
    against: str
    x: float


def run(
    settings: Settings,
    progress: Progress = lambda: None,
    sizes: Sequence[tuple[int, int]] = SIZES,
    points: Sequence[int] = POINTS,
    points_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Measure the first variant, and SIFT and ORB beside it; a dictionary with ``growth``, see ``measuring``.

    All sizes and all numbers of points take turns in each round. What cannot be run, for want of memory or otherwise,
    is left out with a warning.
    """
    meter, skipped = Meter(), dict[str, str]()
    places: list[Place] = []
    samples = Samples(interrupted=True)
    with threads_of(settings.threads):
        try:
            places += _along_pixels(settings, sizes, skipped)
            places += _along_points(settings, points, points_size or POINTS_SIZE, skipped)
            contenders = [each.contender for each in places]
            samples = measure(
                contenders, settings.rounds, settings.warm_up, seconds=settings.seconds, progress=progress
            )
        except KeyboardInterrupt:
            samples.interrupted = True
        meter.interrupted = samples.interrupted
        curves = _curves(places, samples)
        results = meter.results(settings, {"growth": curves})
    failed = [f"{name}: left out: {why}" for name, why in {**skipped, **samples.errors}.items()]
    return {**results, "warnings": [*results["warnings"], *failed, *_notes(places), *_unfitted(curves)]}


def _notes(places: Sequence[Place]) -> Iterator[str]:
    """Why another engine ran than was asked for."""
    for place in places:
        if note := place.contender.found().get("note"):
            yield f"{place.contender.name}: {note}"


def _unfitted(curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why curves have no exponent: a line for each axis and number of places."""
    without = dict.fromkeys((each["against"], len(set(each["x"]))) for each in curves if not each["fit"])
    for against, count in without:
        yield (
            f"no exponents against {against}: {count} place{'' if count == 1 else 's'}; a fit with its error takes "
            f"{MIN_PLACES}, give more of them to {_OPTIONS[against]}"
        )


# -- what is measured --------------------------------------------------------------------------------------------------


def _along_pixels(settings: Settings, sizes: Sequence[tuple[int, int]], skipped: dict[str, str]) -> Iterator[Place]:
    variant = settings.variants[0]
    for size in sizes:
        case = replace(settings.cases[0], size=size, batch=1)
        images, pixels = load_images(size, settings.images), float(size[0] * size[1])
        for name in _PEERS:
            yield Place(
                _renamed(peers.create_opencv(name, case, images), case.size_text), f"opencv {name}", "pixels", pixels
            )
        try:
            made = own.extraction_contender(variant, case, images)
        except (ScfeatError, RuntimeError, MemoryError) as error:
            skipped[f"{variant} at {case.size_text}"] = reason(error)
        else:
            yield Place(_renamed(made, case.size_text), str(variant), "pixels", pixels)


def _along_points(
    settings: Settings, points: Sequence[int], size: tuple[int, int], skipped: dict[str, str]
) -> Iterator[Place]:
    variant = settings.variants[0]
    images = load_images(size, settings.images) if points else []
    try:
        stages = own.create_stages(variant, Case(size, max(points, default=1)), images) if points else None
    except (ScfeatError, RuntimeError, MemoryError) as error:
        skipped[f"{variant} against points"] = reason(error)
        return
    for count in points:
        assert stages is not None
        tasks = list(stages.point_tasks(count))
        match = matching_task(count, stages.extractor.descriptor_dim, stages.extractor.device)
        found = min(count, stages.points)
        yield Place(Contender(f"{variant} {count} points", "scfeat", tasks), str(variant), "points", float(found))
        yield Place(Contender(f"matching {count}", "scfeat", [match]), "matching", "points", float(count))


def matching_task(count: int, dim: int, device: torch.device) -> Task:
    """``count`` x ``count`` descriptors, half of which are seen again with some noise."""
    generator = torch.Generator().manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
    again = first[torch.randperm(count, generator=generator)]
    again[::2] += _NOISE * torch.randn(again[::2].shape, generator=generator)
    again[1::2] = torch.randn(again[1::2].shape, generator=generator)
    descriptors = first.to(device), torch.nn.functional.normalize(again, dim=1).to(device)

    def match() -> None:
        match_descriptors(*descriptors)

    return Task("match", match, device if device.type == "cuda" else None)


def _renamed(contender: Contender, suffix: str) -> Contender:
    return replace(contender, name=f"{contender.name} {suffix}")


# -- what comes out ----------------------------------------------------------------------------------------------------


def _curves(places: Sequence[Place], samples: Samples) -> list[dict[str, Any]]:
    """One for each owner and stage: medians along x, and the fit."""
    keys = dict.fromkeys(
        (place.owner, place.against, stage)
        for place in places
        for stage in samples.milliseconds.get(place.contender.name, {})
    )
    return [_curve(*key, places, samples) for key in keys]


def _curve(owner: str, against: str, stage: str, places: Sequence[Place], samples: Samples) -> dict[str, Any]:
    found = [
        (place.x, summary)
        for place in sorted(places, key=lambda place: place.x)
        if (place.owner, place.against) == (owner, against)
        and (summary := summarise(samples.of(place.contender.name, stage)))
    ]
    columns: Mapping[str, list[Any]] = {
        name: [summary[name] for _, summary in found] for name in ("median_ms", "p5_ms", "p95_ms", "runs")
    }
    x = [place for place, _ in found]
    fit = fit_exponent(np.array(x), np.array(columns["median_ms"]))
    return {"contender": owner, "stage": stage, "against": against, "x": x, **columns, "fit": fit}


def fit_exponent(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """y = factor x^exponent by least squares of the logarithms. error: standard error of the exponent.

    x, y: (n,), positive. Empty with fewer than MIN_PLACES, which leave no error.
    """
    good = (x > 0) & (y > 0)
    if good.sum() < MIN_PLACES or np.ptp(x[good]) == 0:
        return {}
    log_x, log_y = np.log(x[good]), np.log(y[good])
    centred = log_x - log_x.mean()
    exponent = float(centred @ log_y / (centred @ centred))
    offset = float(log_y.mean() - exponent * log_x.mean())
    residuals = log_y - (offset + exponent * log_x)
    variance = float(residuals @ residuals) / (len(log_x) - 2)
    return {
        "exponent": exponent,
        "error": float(np.sqrt(variance / (centred @ centred))),
        "factor": float(np.exp(offset)),
    }
