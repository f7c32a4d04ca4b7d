"""Accuracy of matches, repeatability of points and error of the estimated model where the truth is a homography."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from scfeat_core.evaluation.datasets import HomographyPair
from scfeat_core.evaluation.metrics import (
    MMA_THRESHOLDS,
    corner_error,
    error_auc,
    matching_accuracy,
    mma_score,
    repeatability,
)
from scfeat_core.evaluation.views import Protocol, View, match_views
from scfeat_core.geometry import warp_points

REPEATABILITY_THRESHOLDS = (1, 3)
AUC_THRESHOLDS = (1, 3, 5)
RANSAC_THRESHOLD = 1.0
RANSAC_ITERATIONS = 10_000
RANSAC_CONFIDENCE = 0.9999


@dataclass(frozen=True)
class HomographyRow:
    """What one pair gives. Shares are 0..1; errors in pixels, one corner error for each run of the estimator.

    accuracy: share of the matches within 1, 2, ... 10 pixels, and beyond where more thresholds were asked for.
    """

    split: str
    name: str
    keypoints: tuple[int, int]
    matches: int
    accuracy: list[float]
    repeatability: list[float]
    corner_errors: list[float]


def evaluate_homography_pair(
    pair: HomographyPair,
    views: Mapping[Path, View],
    protocol: Protocol,
    thresholds: Sequence[float] = MMA_THRESHOLDS,
) -> HomographyRow:
    """thresholds: of the accuracy, pixels; MMA_THRESHOLDS and none before them."""
    matched = match_views(pair, views)
    features0, features1 = matched.view0.features, matched.view1.features
    truth = matched.view1.scale @ pair.homography @ np.linalg.inv(matched.view0.scale)
    errors = np.linalg.norm(warp_points(matched.points0, truth) - matched.points1, axis=1)
    estimates = (
        estimate_homography(matched.points0[order], matched.points1[order]) for order in matched.orders(protocol.runs)
    )
    return HomographyRow(
        split=pair.split,
        name=pair.name,
        keypoints=(len(features0), len(features1)),
        matches=len(matched),
        accuracy=matching_accuracy(errors, thresholds),
        repeatability=repeatability(
            features0.keypoints.astype(np.float64),
            features1.keypoints.astype(np.float64),
            truth,
            (features0.image_size, features1.image_size),
            REPEATABILITY_THRESHOLDS,
        ),
        corner_errors=[corner_error(estimate, truth, features0.image_size) for estimate in estimates],
    )


def estimate_homography(points0: np.ndarray, points1: np.ndarray) -> np.ndarray | None:
    """(3, 3) float64 from matched points (M, 2), by USAC_MAGSAC; None where there is no model. Deterministic."""
    if len(points0) < 4:
        return None
    try:
        return cv2.findHomography(
            points0,
            points1,
            cv2.USAC_MAGSAC,
            RANSAC_THRESHOLD,
            maxIters=RANSAC_ITERATIONS,
            confidence=RANSAC_CONFIDENCE,
        )[0]
    except cv2.error:  # some degenerate sets fail an assertion instead of giving no model
        return None


def summarise_homography(rows: Sequence[HomographyRow]) -> dict[str, float]:
    """Means over the pairs; all shares in percent."""
    mma = np.mean([row.accuracy[: len(MMA_THRESHOLDS)] for row in rows], axis=0)
    repeated = np.mean([row.repeatability for row in rows], axis=0)
    runs = zip(*(row.corner_errors for row in rows), strict=True)
    auc = np.mean([error_auc(errors, AUC_THRESHOLDS) for errors in runs], axis=0)
    return {
        "pairs": len(rows),
        "keypoints": float(np.mean([row.keypoints for row in rows])),
        "matches": float(np.mean([row.matches for row in rows])),
        **{f"MMA@{t}": 100 * float(value) for t, value in zip(MMA_THRESHOLDS, mma, strict=True)},
        "MMAscore": 100 * mma_score(mma.tolist()),
        **{f"repeatability@{t}": 100 * float(v) for t, v in zip(REPEATABILITY_THRESHOLDS, repeated, strict=True)},
        **{f"AUC@{t}": 100 * float(value) for t, value in zip(AUC_THRESHOLDS, auc, strict=True)},
    }
