"""Verification of matches by one two-view model: fundamental matrix, essential matrix, or homography."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from scfeat_core.errors import ConfigError, FeatureError
from scfeat_core.geometry import check_camera, undistort_points, unit_norm
from scfeat_core.types import Array, Camera, GeometryModel, TwoViewGeometry

Model = Literal["fundamental", "essential", "homography"]

# More points than a minimal sample holds, or every set of matches would "agree".
MINIMUM_MATCHES = {"fundamental": 8, "essential": 6, "homography": 5}
_MODELS = {name: GeometryModel[name.upper()] for name in MINIMUM_MATCHES}


def verify(
    keypoints0: Array,
    keypoints1: Array,
    *,
    threshold: float = 1.0,
    model: Model = "fundamental",
    cameras: tuple[Camera, Camera] | None = None,
    confidence: float = 0.999,
    max_iterations: int = 2000,
) -> TwoViewGeometry:
    """Fit a model to matched points robustly with OpenCV's USAC and tell who agrees.

    MAGSAC++ (Barath et al., CVPR 2020) for fundamental and homography, Graph-Cut RANSAC for essential.

    keypoints0, keypoints1: (M, 2) pixels, parallel. threshold: pixels, of the Sampson distance for fundamental and
    essential, of the transfer error in view 1 for homography. cameras: of view 0 and view 1; needed for essential,
    which works on undistorted rays scaled by the mean focal length. Points that are not finite, or that the distortion
    model cannot see, are outliers and take no part.

    confidence, max_iterations: when to stop; 2000 draws suffice for 0.999 where 45 % of the matches are good (samples
    of 7), and take 10 ms for 400 matches.

    Deterministic. Matches that determine no model – too few, coincident, collinear – give ``GeometryModel.NONE``, never
    an error. Raises FeatureError for shapes that do not fit and CalibrationError for an unusable camera.
    """
    if model not in MINIMUM_MATCHES:
        raise ConfigError(f"two-view model: expected one of {', '.join(MINIMUM_MATCHES)}, found '{model}'")
    points0, points1 = _as_points(keypoints0), _as_points(keypoints1)
    if points0.shape != points1.shape:
        raise FeatureError(
            f"expected as many points in both views, found {len(points0)} and {len(points1)}; "
            "index the keypoints with the matches first"
        )
    focal_length = 1.0
    if model == "essential":
        if cameras is None:
            raise FeatureError("the essential matrix needs the cameras of both views; give them, or use 'fundamental'")
        for camera in cameras:
            check_camera(camera)
        focal_length = _mean_focal_length(cameras)
        points0, points1 = (
            focal_length * undistort_points(points, camera)
            for points, camera in zip((points0, points1), cameras, strict=True)
        )
    usable = np.isfinite(points0).all(1) & np.isfinite(points1).all(1)
    inliers = np.zeros(len(usable), bool)
    matrix, agree = _estimate(
        points0[usable], points1[usable], model, threshold, focal_length, confidence, max_iterations
    )
    if matrix is None:
        return TwoViewGeometry(GeometryModel.NONE, np.zeros((3, 3)), inliers, threshold)
    inliers[usable] = agree
    return TwoViewGeometry(_MODELS[model], unit_norm(matrix), inliers, threshold)


def _as_points(keypoints: Array) -> np.ndarray:
    points = np.asarray(keypoints if isinstance(keypoints, np.ndarray) else keypoints.detach().cpu(), np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise FeatureError(f"expected points (M, 2) in pixels, found an array of shape {points.shape}")
    return np.ascontiguousarray(points)


def _mean_focal_length(cameras: tuple[Camera, Camera]) -> float:
    return float(np.mean([camera.K[axis, axis] for camera in cameras for axis in (0, 1)]))


def _estimate(
    points0: np.ndarray,
    points1: np.ndarray,
    model: Model,
    threshold: float,
    focal_length: float,
    confidence: float,
    max_iterations: int,
) -> tuple[np.ndarray | None, np.ndarray]:
    """The matrix (3, 3) and the inliers (M,) bool; None where there is no model that enough points agree with.

    USAC draws from a generator of its own, seeded alike on each call.
    """
    nobody = np.zeros(len(points0), bool)
    if len(points0) < MINIMUM_MATCHES[model]:
        return None, nobody
    try:
        if model == "fundamental":
            matrix, mask = cv2.findFundamentalMat(
                points0, points1, cv2.USAC_MAGSAC, threshold, confidence, max_iterations
            )
        elif model == "homography":
            matrix, mask = cv2.findHomography(
                points0, points1, cv2.USAC_MAGSAC, threshold, maxIters=max_iterations, confidence=confidence
            )
        else:
            # OpenCV does not polish the essential matrix after MAGSAC: 3 to 10 times the error. Points in the scale of
            # pixels rather than rays, since USAC has constants in it that are not free of scale.
            matrix, mask = cv2.findEssentialMat(
                points0,
                points1,
                np.diag([focal_length, focal_length, 1.0]),
                cv2.USAC_ACCURATE,
                confidence,
                threshold,
                max_iterations,
            )
    except cv2.error:  # what USAC makes of some degenerate samples
        return None, nobody
    if matrix is None or mask is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not matrix.any():
        return None, nobody
    agree = mask.ravel() != 0
    return (matrix, agree) if agree.sum() >= MINIMUM_MATCHES[model] else (None, nobody)
