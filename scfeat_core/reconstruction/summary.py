"""The figures of a reconstruction as a table and as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core import __version__
from scfeat_core.reconstruction.mapping import Model
from scfeat_core.reconstruction.matching import MIN_INLIERS
from scfeat_core.reconstruction.truth import pose_errors
from scfeat_core.report import write

Summary = dict[str, float | int | None]

# Name of a figure -> what the table calls it, and its decimals.
COLUMNS: dict[str, tuple[str, int]] = {
    "images": ("images", 0),
    "registered": ("registered", 0),
    "points": ("points", 0),
    "observations": ("observations", 0),
    "track_length": ("track length", 2),
    "reprojection_px": ("reproj. px", 3),
    "verified_pairs": ("verified pairs", 0),
    "inliers": ("inliers/pair", 0),
    "inlier_ratio": ("inlier ratio", 2),
    "position_error": ("position, unit of truth", 4),
    "rotation_error_deg": ("rotation deg", 3),
}


def summarise_pairs(pairs: Sequence[tuple[int, int]], keypoints: Sequence[int]) -> Summary:
    """pairs: matches and inliers of each. keypoints: of each image. A pair is verified where it has at least
    MIN_INLIERS inliers; inliers and inlier_ratio are means over these."""
    verified = [(matches, inliers) for matches, inliers in pairs if inliers >= MIN_INLIERS]
    return {
        "images": len(keypoints),
        "keypoints": _mean(keypoints),
        "pairs": len(pairs),
        "matches": _mean([matches for matches, _ in pairs]),
        "verified_pairs": len(verified),
        "inliers": _mean([inliers for _, inliers in verified]),
        "inlier_ratio": _mean([inliers / matches for matches, inliers in verified]),
    }


def summarise_models(models: Sequence[Model], truth: Mapping[str, np.ndarray]) -> Summary:
    """Of the model with most images, as the benchmark of ETH counts; position errors in the unit of the truth."""
    if not models:
        return {"models": 0, "registered": 0, "points": 0, "observations": 0}
    best = models[0]
    errors = pose_errors(best.poses, truth)
    return {
        "models": len(models),
        "registered": len(best.poses),
        "points": best.points,
        "observations": best.observations,
        "observations_per_image": best.observations / len(best.poses),
        "track_length": _finite(best.track_length),
        "reprojection_px": _finite(best.reprojection_error),
        "compared": None if errors is None else errors.images,
        "position_error": None if errors is None else errors.position,
        "position_error_max": None if errors is None else errors.position_max,
        "position_error_share": None if errors is None else errors.share,
        "rotation_error_deg": None if errors is None else errors.rotation,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def format_summaries(summaries: Mapping[str, Summary]) -> str:
    """Plain text: a line for each reconstruction, called by its key; figures that none has are left out."""
    columns = [name for name in COLUMNS if any(each.get(name) is not None for each in summaries.values())]
    head = ["", *(COLUMNS[name][0] for name in columns)]
    body = [
        [label, *(_cell(each.get(name), COLUMNS[name][1]) for name in columns)] for label, each in summaries.items()
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = []
    for row in [head, *body]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: float | int | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def write_summary(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with the versions of what decides the figures. Raises ScfeatError."""
    versions = {"scfeat": __version__, "python": platform.python_version(), "pycolmap": _installed("pycolmap")}
    write(path, json.dumps({**content, "versions": versions}, indent=1, allow_nan=False) + "\n")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
