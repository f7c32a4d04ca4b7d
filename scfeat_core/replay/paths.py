"""Ways of a camera beside each other: aligned to the truth, and seen from where they spread most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scfeat_core.charts import Line
from scfeat_core.replay.records import GroundTruth
from scfeat_core.replay.truth import poses_at

TRUTH = "ground truth"
_FEWEST = 3  # positions that fix a similarity


@dataclass(frozen=True, eq=False)
class Way:
    """positions: (N, 3), NaN where they are not known. errors: (N,) metres, distance from the truth, NaN where either
    is not known. scale: by which the way was multiplied; NaN where it could not be aligned, and is as it was given."""

    positions: np.ndarray
    errors: np.ndarray
    scale: float


def aligned(stamps: np.ndarray, poses: np.ndarray, known: np.ndarray, truth: GroundTruth | None) -> Way:
    """Positions of poses (N, 4, 4) at stamps (N,), brought to those of the truth by a similarity.

    known: (N,) bool, poses that count; the others become NaN.
    """
    positions = np.where(known[:, None], poses[:, :3, 3], np.nan)
    unknown = np.full(len(stamps), np.nan)
    if truth is None:
        return Way(positions, unknown, float("nan"))
    true = poses_at(truth, stamps)[:, :3, 3]
    both = np.isfinite(positions).all(1) & np.isfinite(true).all(1)
    if both.sum() < _FEWEST:
        return Way(positions, unknown, float("nan"))
    scale, rotation, translation = similarity(positions[both], true[both])
    moved = scale * positions @ rotation.T + translation
    return Way(moved, np.linalg.norm(moved - true, axis=1), scale)


def similarity(points: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """s, R (3, 3), t (3,) that bring s R p + t of points (N, 3) nearest to the targets (N, 3), in the squared mean.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991.
    """
    centre, centre1 = points.mean(0), targets.mean(0)
    u, singular, vt = np.linalg.svd((targets - centre1).T @ (points - centre) / len(points))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u * sign @ vt
    spread = float(((points - centre) ** 2).sum(1).mean())
    scale = float(singular @ sign) / spread if spread > 0 else 1.0
    return scale, rotation, centre1 - scale * rotation @ centre


def lines(ways: Sequence[tuple[str, np.ndarray]]) -> list[Line]:
    """The ways (name, positions (N, 3)) in the plane in which the first one is largest, as lines of a plan, never as in
    a mirror. The one that is called TRUTH is dashed."""
    first = ways[0][1][np.isfinite(ways[0][1]).all(1)]
    centre = first.mean(0) if len(first) else np.zeros(3)
    axes = np.linalg.svd(first - centre, full_matrices=False)[2][:2] if len(first) >= _FEWEST else np.eye(3)[:2]
    axes = _from_above(axes * np.where(axes[np.arange(2), abs(axes).argmax(1)] < 0, -1, 1)[:, None])
    found, colour = [], 0
    for name, positions in ways:
        x, y = axes @ (positions - centre).T
        compared = name == TRUTH
        found.append(Line(name, x, y, 5 if compared else colour, dashed=compared))
        colour += not compared
    return found


def _from_above(axes: np.ndarray) -> np.ndarray:
    """The axes (2, 3) of a page, the second one turned where they would show the ways from below, and right as left.

    Upwards is z in a map (REP 103) and -y in the frame of a camera, in which odometry and some truths are.
    """
    normal = np.cross(*axes)
    largest = abs(normal).argmax()
    above = (normal[largest] > 0) != (largest == 1)
    return axes if above else axes * np.array([[1], [-1]])
