"""How good the network is on held-back data, in the terms of the evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from scfeat_core.data.posed import PosedPairs, read_posed, relative_pose
from scfeat_core.data.warps import WarpConfig, WarpPairs, draw_pairs
from scfeat_core.errors import ConfigError, DataError
from scfeat_core.evaluation.metrics import (
    direction_angle,
    error_auc,
    matching_accuracy,
    repeatability,
    rotation_angle,
    symmetric_epipolar_distance,
)
from scfeat_core.evaluation.relative_pose import create_estimator
from scfeat_core.extraction import Extractor
from scfeat_core.geometry import fundamental_from_pose, scale_points, warp_points
from scfeat_core.matching import match
from scfeat_core.network.model import SCFeat
from scfeat_core.types import Features

VIEW_SIZE = 256  # pixels
MAX_KEYPOINTS = 256
BATCH = 8
THRESHOLD = 3  # pixels
POSED_KEYPOINTS = 1024
POSED_EDGE = 640  # pixels
POSE_AUC = 5  # degrees
RANSAC_THRESHOLD = 1.0  # pixels


class Validation(Protocol):
    def measure(self, model: SCFeat, device: str) -> dict[str, float]:
        """Scores of the network by name; larger is better."""


def _extractor(model: SCFeat, device: str, keypoints: int, **options: Any) -> Extractor:
    """A network with legacy alignment takes multiples of 16 pixels only. Of one level: what the network alone does."""
    size_mode = "pad16" if model.config.backbone.alignment == "legacy" else "native"
    return Extractor(model, device=device, max_keypoints=keypoints, size_mode=size_mode, levels=1, **options)


class WarpValidation:
    """A fixed set of warped pairs of photographs."""

    def __init__(self, photos: list[list[np.ndarray]], pairs: int, warps: WarpConfig) -> None:
        rng = np.random.default_rng(0)
        config = replace(warps, view_size=VIEW_SIZE)
        self._batches = [draw_pairs(photos, min(BATCH, pairs - i), config, rng) for i in range(0, pairs, BATCH)]

    def measure(self, model: SCFeat, device: str) -> dict[str, float]:
        """Means over the pairs: share of matches within 3 pixels, of points repeated within 3 pixels, and matches."""
        extractor = _extractor(model, device, MAX_KEYPOINTS)
        rows = [row for batch in self._batches for row in _measure_batch(extractor, batch)]
        means = np.mean(rows, axis=0)
        return {
            f"validation_mma{THRESHOLD}": float(means[0]),
            f"validation_repeatability{THRESHOLD}": float(means[1]),
            "validation_matches": float(means[2]),
        }


def _measure_batch(extractor: Extractor, batch: WarpPairs) -> list[tuple[float, float, float]]:
    features0 = extractor.extract_batch(list(batch.image0))
    features1 = extractor.extract_batch(list(batch.image1))
    truths = batch.homography.double().numpy()
    return [_measure_pair(f0, f1, truth) for f0, f1, truth in zip(features0, features1, truths, strict=True)]


def _measure_pair(features0: Features, features1: Features, truth: np.ndarray) -> tuple[float, float, float]:
    matches = match(features0, features1)
    warped = warp_points(features0.keypoints[matches.indices0], truth)
    errors = np.linalg.norm(warped - features1.keypoints[matches.indices1], axis=1)
    sizes = (features0.image_size, features1.image_size)
    repeated = repeatability(features0.keypoints, features1.keypoints, truth, sizes, [THRESHOLD])
    return matching_accuracy(errors, [THRESHOLD])[0], repeated[0], float(len(matches))


class PosedValidation:
    """Evenly chosen pairs of held-back posed images, as they are stored."""

    def __init__(self, pairs: PosedPairs, count: int) -> None:
        self._pairs = pairs
        self._indices = np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(int))
        self._estimator, self._estimate = _pose_estimator()

    def measure(self, model: SCFeat, device: str) -> dict[str, float]:
        """Share of matches within 3 pixels of their epipolar lines; of those at true correspondences, the share within
        3 pixels of the true place; matches; and AUC of the relative pose up to 5 degrees, by poselib, or by OpenCV's
        MAGSAC under a name of its own.
        """
        extractor = _extractor(model, device, POSED_KEYPOINTS, max_edge=POSED_EDGE)
        rows = [row for index in self._indices if (row := self._measure(extractor, int(index))) is not None]
        if not rows:
            return {}
        names = {
            f"validation_epipolar{THRESHOLD}": 0,
            f"validation_track_mma{THRESHOLD}": 1,
            "validation_posed_matches": 2,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no pair at all has tracks
            means = np.nanmean(np.array(rows, np.float64), axis=0)
        scores = {name: float(means[column]) for name, column in names.items() if np.isfinite(means[column])}
        scores[f"validation_{self._estimator}_auc{POSE_AUC}"] = error_auc([row[3] for row in rows], [POSE_AUC])[0]
        return scores

    def _measure(self, extractor: Extractor, index: int) -> tuple[float, float, float, float] | None:
        """None where an image cannot be read."""
        scene, *pair = self._pairs.pair(index)
        images = [self._pairs.scenes[scene].image(i) for i in pair]
        try:
            features = [extractor(read_posed(image)) for image in images]
        except DataError:
            return None
        # Calibrations and tracks are those of the size that the scene states, which the file may exceed.
        scales = [np.divide(image.size, f.image_size) for image, f in zip(images, features, strict=True)]
        matches = match(*features)
        points0, points1 = (
            scale_points(f.keypoints[rows].astype(np.float64), scale)
            for f, rows, scale in zip(features, (matches.indices0, matches.indices1), scales, strict=True)
        )
        rotation, translation = relative_pose(*images)
        fundamental = fundamental_from_pose(images[0].K, images[1].K, rotation, translation)
        distances = symmetric_epipolar_distance(points0, points1, fundamental)
        pose_error = 180.0
        pose = self._estimate(points0, points1, images[0].K, images[1].K, RANSAC_THRESHOLD)
        if pose is not None:
            pose_error = max(rotation_angle(pose[0], rotation), direction_angle(pose[1], translation))
        tracks = self._pairs.scenes[scene].common_points(*pair)
        accuracy = matching_accuracy(distances, [THRESHOLD])[0]
        return accuracy, _track_accuracy(points0, points1, *tracks), float(len(matches)), pose_error


def _track_accuracy(points0: np.ndarray, points1: np.ndarray, truth0: np.ndarray, truth1: np.ndarray) -> float:
    """Share of the matches of a point near a true one that end near its counterpart; NaN where there are none."""
    if len(points0) == 0 or len(truth0) == 0:
        return float("nan")
    gaps = np.linalg.norm(points0[:, None] - truth0[None], axis=2)
    nearest = gaps.argmin(1)
    known = gaps.min(1) <= THRESHOLD
    if not known.any():
        return float("nan")
    expected = truth1[nearest[known]] + points0[known] - truth0[nearest[known]]
    return float((np.linalg.norm(points1[known] - expected, axis=1) <= THRESHOLD).mean())


def _pose_estimator() -> tuple[str, Callable]:
    """Its name in the scores, which are comparable for one estimator only, and itself."""
    try:
        return "pose", create_estimator("poselib")
    except ConfigError:
        return "magsac_pose", create_estimator("magsac")
