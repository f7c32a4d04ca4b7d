"""Numbers from errors: areas under curves, angles, distances between sets of points. numpy in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scfeat_core.geometry import epipolar_distance, warp_points

MMA_THRESHOLDS = tuple(range(1, 11))
_MAX_DISTANCES = 1 << 22  # held at once: 32 MB of float64


def error_auc(errors: Sequence[float] | np.ndarray, thresholds: Sequence[float]) -> list[float]:
    """Area under the recall curve of errors (n,) up to each threshold, divided by it: 0..1.

    Straight lines between (0, 0), (e_1, 1/n), (e_2, 2/n) ..., level after the last error below the threshold
    (SuperGlue's definition). Non-finite errors count as failures.
    """
    values = np.sort(np.where(np.isfinite(errors), errors, np.inf).astype(np.float64))
    recall = np.arange(len(values) + 1) / max(len(values), 1)
    values = np.concatenate([[0.0], values])
    areas = []
    for threshold in thresholds:
        last = int(np.searchsorted(values, threshold))
        x = np.append(values[:last], threshold)
        y = np.append(recall[:last], recall[last - 1])
        areas.append(float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2 / threshold))
    return areas


def matching_accuracy(errors: np.ndarray, thresholds: Sequence[float] = MMA_THRESHOLDS) -> list[float]:
    """Share of the errors (M,) that are at most each threshold; 0 where there is no match."""
    if len(errors) == 0:
        return [0.0] * len(thresholds)
    return [float(np.mean(errors <= threshold)) for threshold in thresholds]


def mma_score(mma: Sequence[float]) -> float:
    """Weighted mean of MMA@1..10 in which small thresholds count most: sum (2 - t/10) MMA@t / 14.5."""
    weights = 2 - np.arange(1, 11) / 10
    return float(weights @ np.asarray(mma[:10]) / weights.sum())


def repeatability(
    points0: np.ndarray,
    points1: np.ndarray,
    homography: np.ndarray,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    thresholds: Sequence[float],
) -> list[float]:
    """Share of the points, of both images, that have one of the other image nearby once warped into it.

    Only points whose warp is inside the other image count; 0 where there are none. points: (N, 2); sizes: (w, h).
    """
    nearest0 = distance_to_nearest(warp_points(points0, homography), points1, sizes[1])
    nearest1 = distance_to_nearest(warp_points(points1, np.linalg.inv(homography)), points0, sizes[0])
    return matching_accuracy(np.concatenate([nearest0, nearest1]), thresholds)


def distance_to_nearest(warped: np.ndarray, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (K,) from those of the warped points (N, 2) that are inside the image, in their order, to the nearest of
    its points (M, 2); infinite without any. size: (width, height)."""
    inside = (warped >= 0).all(1) & (warped <= np.array(size) - 1).all(1)
    if len(points) == 0:
        return np.full(int(inside.sum()), np.inf)
    rows = torch.from_numpy(warped[inside].astype(np.float64)).split(max(1, _MAX_DISTANCES // len(points)))
    others = torch.from_numpy(points.astype(np.float64))
    # Not by products of matrices, which are faster and lose the digits that decide at a threshold.
    nearest = [torch.cdist(block, others, compute_mode="donot_use_mm_for_euclid_dist").amin(1) for block in rows]
    return torch.cat(nearest).numpy()


def corner_error(estimate: np.ndarray | None, homography: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance of the four image corners under both homographies, pixels; inf without an estimate."""
    if estimate is None or not np.isfinite(estimate).all():
        return float("inf")
    width, height = size
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.linalg.norm(warp_points(corners, estimate) - warp_points(corners, homography), axis=1).mean()
    return float(error) if np.isfinite(error) else float("inf")


def rotation_angle(rotation0: np.ndarray, rotation1: np.ndarray) -> float:
    """Angle of the rotation from one (3, 3) to the other, degrees."""
    # atan2 of sine and cosine: the arc cosine alone cannot tell angles below 1e-6 degrees from zero
    relative = rotation0.T @ rotation1
    sine = np.linalg.norm(
        [relative[2, 1] - relative[1, 2], relative[0, 2] - relative[2, 0], relative[1, 0] - relative[0, 1]]
    )
    return float(np.degrees(np.arctan2(sine, np.trace(relative) - 1)))


def direction_angle(vector0: np.ndarray, vector1: np.ndarray) -> float:
    """Angle between two vectors (3,), degrees; 180 where one has no direction."""
    if not (np.linalg.norm(vector0) > 0 and np.linalg.norm(vector1) > 0):
        return 180.0
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(vector0, vector1)), vector0 @ vector1)))


def symmetric_epipolar_distance(points0: np.ndarray, points1: np.ndarray, fundamental: np.ndarray) -> np.ndarray:
    """Mean of the distances (N,) to the epipolar lines in both images, pixels."""
    forth = epipolar_distance(points0, points1, fundamental)
    back = epipolar_distance(points1, points0, fundamental.T)
    return (forth + back) / 2
