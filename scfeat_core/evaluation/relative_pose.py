"""Relative pose of calibrated pairs from matches: rotation and direction of translation against the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from scfeat_core.data.posed import check_shape
from scfeat_core.errors import ConfigError
from scfeat_core.evaluation.datasets import PosePair
from scfeat_core.evaluation.metrics import (
    direction_angle,
    error_auc,
    matching_accuracy,
    rotation_angle,
    symmetric_epipolar_distance,
)
from scfeat_core.evaluation.views import Protocol, View, match_views
from scfeat_core.geometry import fundamental_from_pose, scale_matrix

AUC_THRESHOLDS = (5, 10, 20)
RANSAC_THRESHOLDS = (1.0, 2.0)
EPIPOLAR_THRESHOLDS = (1, 3)
RANSAC_ITERATIONS = 10_000
MAGSAC_CONFIDENCE = 0.9999
_MIN_MATCHES = 5

Pose = tuple[np.ndarray, np.ndarray]
Estimator = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float], "Pose | None"]


@dataclass(frozen=True)
class PoseRow:
    """What one pair gives. Errors in degrees, [threshold][run]; epipolar_accuracy: shares 0..1 of the matches."""

    split: str
    name: str
    keypoints: tuple[int, int]
    matches: int
    epipolar_accuracy: list[float]
    rotation_errors: list[list[float]]
    translation_errors: list[list[float]]

    @property
    def pose_errors(self) -> np.ndarray:
        """(thresholds, runs): the larger of both angles."""
        return np.maximum(self.rotation_errors, self.translation_errors)


def evaluate_pose_pair(pair: PosePair, views: Mapping[Path, View], protocol: Protocol) -> PoseRow:
    matched = match_views(pair, views)
    k0, k1 = calibrations(pair, (matched.view0, matched.view1))
    estimate = create_estimator(protocol.estimator)
    errors = [
        [
            pose_error(estimate(matched.points0[order], matched.points1[order], k0, k1, threshold), pair)
            for order in matched.orders(protocol.runs)
        ]
        for threshold in RANSAC_THRESHOLDS
    ]
    fundamental = fundamental_from_pose(k0, k1, pair.rotation, pair.translation)
    distances = symmetric_epipolar_distance(matched.points0, matched.points1, fundamental)
    return PoseRow(
        split=pair.split,
        name=pair.name,
        keypoints=(len(matched.view0.features), len(matched.view1.features)),
        matches=len(matched),
        epipolar_accuracy=matching_accuracy(distances, EPIPOLAR_THRESHOLDS),
        rotation_errors=[[rotation for rotation, _ in runs] for runs in errors],
        translation_errors=[[translation for _, translation in runs] for runs in errors],
    )


def calibrations(pair: PosePair, views: tuple[View, View]) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) of both images in pixels of the views.

    Files of another resolution than was calibrated are fine; raises DataError for those of another shape.
    """
    stored = [pair.k0, pair.k1]
    for i, (path, view, calibrated) in enumerate(
        zip((pair.path0, pair.path1), views, pair.sizes or (None, None), strict=True)
    ):
        if view.size is not None and calibrated is not None and view.size != calibrated:
            check_shape(path, view.size, calibrated)
            stored[i] = scale_matrix(np.divide(view.size, calibrated)) @ stored[i]
    return views[0].scale @ stored[0], views[1].scale @ stored[1]


def pose_error(estimate: Pose | None, truth: PosePair) -> tuple[float, float]:
    """Angles in degrees between the rotations and between the directions of translation; 180 without an estimate."""
    if estimate is None:
        return 180.0, 180.0
    rotation, translation = estimate
    return rotation_angle(rotation, truth.rotation), direction_angle(translation, truth.translation)


def create_estimator(name: str) -> Estimator:
    """``(points0 (M, 2), points1 (M, 2), k0, k1, threshold in pixels) -> (R, t) or None``.

    Raises ConfigError where the package behind it is not installed.
    """
    if name == "magsac":
        return _magsac
    try:
        import poselib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the estimator 'poselib' needs the package poselib, which is not installed: pip install "
            "'scfeat-python[eval]', or choose --estimator magsac (other numbers, not comparable)"
        ) from error
    return _poselib


def _poselib(points0: np.ndarray, points1: np.ndarray, k0: np.ndarray, k1: np.ndarray, threshold: float) -> Pose | None:
    import poselib

    if len(points0) < _MIN_MATCHES:
        return None
    options = {"max_epipolar_error": threshold, "max_iterations": RANSAC_ITERATIONS}
    pose, info = poselib.estimate_relative_pose(points0, points1, _pinhole(k0), _pinhole(k1), options, {})
    return (pose.R, pose.t) if info["num_inliers"] >= _MIN_MATCHES else None


def _pinhole(k: np.ndarray) -> dict[str, object]:
    size = {"width": round(2 * k[0, 2] + 1), "height": round(2 * k[1, 2] + 1)}  # required, and not used
    return {"model": "PINHOLE", **size, "params": [k[0, 0], k[1, 1], k[0, 2], k[1, 2]]}


def _magsac(points0: np.ndarray, points1: np.ndarray, k0: np.ndarray, k1: np.ndarray, threshold: float) -> Pose | None:
    if len(points0) < _MIN_MATCHES:
        return None
    rays0 = cv2.undistortPoints(points0[:, None], k0, None)[:, 0]
    rays1 = cv2.undistortPoints(points1[:, None], k1, None)[:, 0]
    focal = np.mean([k0[0, 0], k0[1, 1], k1[0, 0], k1[1, 1]])
    try:
        essential, inliers = cv2.findEssentialMat(
            rays0,
            rays1,
            np.eye(3),
            method=cv2.USAC_MAGSAC,
            prob=MAGSAC_CONFIDENCE,
            threshold=threshold / focal,
            maxIters=RANSAC_ITERATIONS,
        )
        if essential is None or essential.shape != (3, 3):
            return None
        _, rotation, translation, _ = cv2.recoverPose(essential, rays0, rays1, np.eye(3), mask=inliers)
    except cv2.error:  # some degenerate sets fail an assertion instead of giving no model
        return None
    return rotation, translation[:, 0]


def summarise_pose_set(rows: Sequence[PoseRow]) -> dict[str, float]:
    """One set: AUC with the better threshold in each run, means over its pairs; all shares in percent."""
    errors = np.array([row.pose_errors for row in rows])  # (pairs, thresholds, runs)
    by_run = [[error_auc(pairs, AUC_THRESHOLDS) for pairs in thresholds] for thresholds in errors.transpose(2, 1, 0)]
    auc = np.mean(np.max(by_run, axis=1), axis=0)
    accuracy = np.mean([row.epipolar_accuracy for row in rows], axis=0)
    return {
        "pairs": len(rows),
        "keypoints": float(np.mean([row.keypoints for row in rows])),
        "matches": float(np.mean([row.matches for row in rows])),
        **{f"AUC@{t}": 100 * float(value) for t, value in zip(AUC_THRESHOLDS, auc, strict=True)},
        **{f"epipolar@{t}": 100 * float(value) for t, value in zip(EPIPOLAR_THRESHOLDS, accuracy, strict=True)},
    }


def summarise_pose(rows: Sequence[PoseRow]) -> dict[str, float]:
    """Mean of the sets, whatever their size; pairs is the sum."""
    splits = dict.fromkeys(row.split for row in rows)
    sets = [summarise_pose_set([row for row in rows if row.split == split]) for split in splits]
    mean = {key: float(np.mean([each[key] for each in sets])) for key in sets[0]}
    return {**mean, "pairs": len(rows)}
