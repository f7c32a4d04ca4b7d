"""Verification of matches by one two-view model: fundamental matrix, essential matrix, or homography."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from scfeat_core.errors import ConfigError, FeatureError
from scfeat_core.geometry import check_camera, undistort_points, unit_norm, warp_points
from scfeat_core.types import Array, Camera, GeometryModel, TwoViewGeometry

Model = Literal["fundamental", "essential", "homography"]
ModelChoice = Literal["auto", "fundamental", "essential", "homography"]

# More points than a minimal sample holds, or every set of matches would "agree".
MINIMUM_MATCHES: dict[Model, int] = {"fundamental": 8, "essential": 6, "homography": 5}
_PARAMETERS: dict[Model, int] = {"fundamental": 7, "essential": 5, "homography": 8}
# 95 % limits of a residual with one dimension and with two, in standard deviations. A transfer error has the noise of
# both views in it, a Sampson distance that of one: with this factor the limits keep the same share of true matches.
_LIMIT1, _LIMIT2 = 1.96, 2.45
HOMOGRAPHY_TOLERANCE = 2**0.5 * _LIMIT2 / _LIMIT1
# A plane that holds 60 % of the points is found in 34 draws of 4 with 99 %; with less of them none is preferred.
_PLANE_ITERATIONS = 50
# Where more than this share of what the general model explains is far from the plane (in thresholds), that is not noise
# but what stands before a wall, and worth more to its consumers than a tidy model. In real flat scenes 2 to 7 % are.
_MOST_OFF_PLANE, _FAR = 0.1, 3.0


@dataclass(frozen=True)
class _Settings:
    """threshold: pixels, of the Sampson distance. focal_length: of the unit of the points, 1 for pixels."""

    threshold: float
    focal_length: float
    confidence: float
    max_iterations: int


def verify(
    keypoints0: Array,
    keypoints1: Array,
    *,
    threshold: float = 1.0,
    model: ModelChoice = "auto",
    cameras: tuple[Camera, Camera] | None = None,
    rays: tuple[np.ndarray, np.ndarray] | None = None,
    confidence: float = 0.999,
    max_iterations: int = 2000,
) -> TwoViewGeometry:
    """Fit a model to matched points robustly with OpenCV's USAC and tell who agrees.

    MAGSAC++ (Barath et al., CVPR 2020) for fundamental and homography, LO-RANSAC for essential.

    keypoints0, keypoints1: (M, 2) pixels, parallel. threshold: pixels, of the Sampson distance for fundamental and
    essential, of the transfer error in view 1 for homography. cameras: of view 0 and view 1; needed for essential,
    which works on undistorted rays scaled by the mean focal length. A homography is then one of pixels without
    distortion (K times the undistorted ray). Points that are not finite, or that the distortion model cannot see, are
    outliers and take no part. rays: (M, 2) of both views, what :func:`undistort_points` makes of the keypoints with
    their cameras, where that is known already.

    model: ``auto`` is essential with cameras and fundamental without, but homography where one explains the matches as
    well with less: a flat scene, or a camera that only turned. That is decided by GRIC (Torr, "An assessment of
    information criteria for motion model selection", CVPR 1997) on the matches that the general model explains, of
    which at most a tenth may be far from the plane. Its threshold is then HOMOGRAPHY_TOLERANCE times the one given, as
    that of the result says: a transfer error is larger than the Sampson distance of the same noise.

    confidence, max_iterations: when to stop; 2000 draws suffice for 0.999 where 45 % of the matches are good (samples
    of 7), and take 10 ms for 400 matches.

    Deterministic. Matches that determine no model – too few, coincident, collinear – give ``GeometryModel.NONE``, never
    an error. Raises FeatureError for shapes that do not fit and CalibrationError for an unusable camera.
    """
    if model not in get_args(ModelChoice):
        raise ConfigError(f"two-view model: expected one of {', '.join(get_args(ModelChoice))}, found '{model}'")
    points0, points1 = _as_points(keypoints0), _as_points(keypoints1)
    if points0.shape != points1.shape:
        raise FeatureError(
            f"expected as many points in both views, found {len(points0)} and {len(points1)}; "
            "index the keypoints with the matches first"
        )
    if model == "essential" and cameras is None:
        raise FeatureError("the essential matrix needs the cameras of both views; give them, or use 'fundamental'")
    cameras = None if model == "fundamental" else cameras
    focal_length = 1.0
    if cameras is not None:
        focal_length = _focal_length(cameras)
        points0, points1 = (focal_length * each for each in rays or _rays(points0, points1, cameras))
    usable = np.isfinite(points0).all(1) & np.isfinite(points1).all(1)
    settings = _Settings(threshold, focal_length, confidence, max_iterations)
    if model == "auto":
        fit = _choose(points0[usable], points1[usable], "fundamental" if cameras is None else "essential", settings)
    else:
        fit = _estimate(points0[usable], points1[usable], model, settings)
    inliers = np.zeros(len(usable), bool)
    if fit is None:
        return TwoViewGeometry(GeometryModel.NONE, np.zeros((3, 3)), inliers, threshold)
    inliers[usable] = fit.agree
    matrix = fit.matrix
    if fit.model == "homography" and cameras is not None:
        matrix = _in_pixels(matrix, focal_length, cameras)
    return TwoViewGeometry(GeometryModel[fit.model.upper()], unit_norm(matrix), inliers, fit.threshold)


def _as_points(keypoints: Array) -> np.ndarray:
    points = np.asarray(keypoints if isinstance(keypoints, np.ndarray) else keypoints.detach().cpu(), np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise FeatureError(f"expected points (M, 2) in pixels, found an array of shape {points.shape}")
    return np.ascontiguousarray(points)


# -- rays --------------------------------------------------------------------------------------------------------------


def _focal_length(cameras: tuple[Camera, Camera]) -> float:
    """The mean one: rays times it have thresholds in pixels."""
    for camera in cameras:
        check_camera(camera)
    return float(np.mean([camera.K[axis, axis] for camera in cameras for axis in (0, 1)]))


def _rays(points0: np.ndarray, points1: np.ndarray, cameras: tuple[Camera, Camera]) -> tuple[np.ndarray, np.ndarray]:
    return undistort_points(points0, cameras[0]), undistort_points(points1, cameras[1])


def _in_pixels(homography: np.ndarray, focal_length: float, cameras: tuple[Camera, Camera]) -> np.ndarray:
    """A homography of scaled rays as one of undistorted pixels."""
    scale = np.diag([focal_length, focal_length, 1.0])
    return cameras[1].K @ np.linalg.inv(scale) @ homography @ scale @ np.linalg.inv(cameras[0].K)


# -- choice of the model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Fit:
    """matrix: (3, 3), as TwoViewGeometry has it, but homographies in the unit of the points. agree: (M,) bool."""

    model: Model
    matrix: np.ndarray
    agree: np.ndarray
    threshold: float


def _choose(points0: np.ndarray, points1: np.ndarray, general: Model, settings: _Settings) -> _Fit | None:
    """The general model, or a homography where that is the better explanation, or the only one."""
    fit = _estimate(points0, points1, general, settings)
    relaxed = _Settings(settings.threshold * HOMOGRAPHY_TOLERANCE, 1.0, settings.confidence, settings.max_iterations)
    if fit is None:
        return _estimate(points0, points1, "homography", relaxed)
    plane = _plane(points0[fit.agree], points1[fit.agree], fit, settings, relaxed)
    if plane is None:
        return fit
    agree = _transfer_errors(points0, points1, plane) <= relaxed.threshold**2
    return _Fit("homography", plane, agree, relaxed.threshold)


def _plane(
    points0: np.ndarray, points1: np.ndarray, fit: _Fit, settings: _Settings, relaxed: _Settings
) -> np.ndarray | None:
    """The homography (3, 3), where one explains the inliers of the general model better, by GRIC, and nearly all.

    Only few draws: a homography that most of the points agree with is found at once, and others do not matter. All
    points: a quarter of them takes half the time, but now and then changes the answer, and with it a trajectory.
    """
    few = _Settings(relaxed.threshold, 1.0, relaxed.confidence, _PLANE_ITERATIONS)
    plane = _estimate(points0, points1, "homography", few)
    if plane is None:
        return None
    matrix = fit.matrix
    if fit.model == "essential":
        scale = np.diag([1 / settings.focal_length, 1 / settings.focal_length, 1.0])
        matrix = scale @ matrix @ scale
    squares = _homography_residuals(points0, points1, plane.matrix)
    if (squares > (_FAR * settings.threshold) ** 2).mean() > _MOST_OFF_PLANE:
        return None
    sigma = settings.threshold / _LIMIT1
    general = _gric(_epipolar_residuals(points0, points1, matrix), sigma, 3, _PARAMETERS[fit.model])
    return plane.matrix if _gric(squares, sigma, 2, _PARAMETERS["homography"]) < general else None


def _gric(squares: np.ndarray, sigma: float, dimension: int, parameters: int) -> float:
    """Geometric robust information criterion (Torr, 1997), less is better: sum rho(e^2) + n d ln 4 + k ln 4n.

    squares: (n,) squared distances e^2 to the manifold of the model in the space of (x0, y0, x1, y1). dimension: that
    of the manifold, d. rho caps e^2 / sigma^2 at 2 (4 - d).
    """
    cost = np.minimum(squares / sigma**2, 2 * (4 - dimension)).sum()
    return float(cost + len(squares) * dimension * np.log(4) + parameters * np.log(4 * max(len(squares), 1)))


def _epipolar_residuals(points0: np.ndarray, points1: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Squared Sampson distances (n,)."""
    lines1 = points0 @ matrix[:, :2].T + matrix[:, 2]
    lines0 = points1 @ matrix[:2] + matrix[2]
    residual = (lines1[:, :2] * points1).sum(1) + lines1[:, 2]
    return residual**2 / np.maximum((lines1[:, :2] ** 2).sum(1) + (lines0[:, :2] ** 2).sum(1), 1e-300)


def _transfer_errors(points0: np.ndarray, points1: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Squared distances (n,) in view 1 to where the homography takes the points of view 0; infinite from infinity."""
    with np.errstate(all="ignore"):
        squares = ((warp_points(points0, matrix) - points1) ** 2).sum(1)
    return np.where(np.isfinite(squares), squares, np.inf)


def _homography_residuals(points0: np.ndarray, points1: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Squared Sampson distances (n,): the transfer error d weighted by its covariance, d' (I + A A')^-1 d.

    A: how a small step in view 0 moves the transferred point (the first-order geometric error of Hartley and Zisserman,
    4.2.6). Infinite for points that are transferred to infinity.
    """
    (h00, h01, h02), (h10, h11, h12), (h20, h21, h22) = matrix.tolist()
    x, y = points0.T
    with np.errstate(all="ignore"):
        scale = 1 / (h20 * x + h21 * y + h22)
        u, v = (h00 * x + h01 * y + h02) * scale, (h10 * x + h11 * y + h12) * scale
        a00, a01, a10, a11 = h00 - h20 * u, h01 - h21 * u, h10 - h20 * v, h11 - h21 * v  # A, but for the scale
        square = scale * scale
        a, b, c = (
            (a00 * a00 + a01 * a01) * square + 1,
            (a00 * a10 + a01 * a11) * square,
            (a10 * a10 + a11 * a11) * square + 1,
        )
        x, y = points1[:, 0] - u, points1[:, 1] - v
        squares = (c * x * x - 2 * b * x * y + a * y * y) / (a * c - b * b)
    return np.where(np.isfinite(squares), squares, np.inf)


# -- estimation --------------------------------------------------------------------------------------------------------


def _estimate(points0: np.ndarray, points1: np.ndarray, model: Model, settings: _Settings) -> _Fit | None:
    """None where there is no model that enough points agree with.

    USAC draws from a generator of its own, seeded alike on each call.
    """
    if len(points0) < MINIMUM_MATCHES[model]:
        return None
    try:
        matrix, mask = _FITS[model](points0, points1, settings)
    except cv2.error:  # what USAC makes of some degenerate samples
        return None
    if matrix is None or mask is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not matrix.any():
        return None
    agree = mask.ravel() != 0
    return _Fit(model, matrix, agree, settings.threshold) if agree.sum() >= MINIMUM_MATCHES[model] else None


def _fundamental(points0: np.ndarray, points1: np.ndarray, settings: _Settings) -> tuple[np.ndarray, np.ndarray]:
    return cv2.findFundamentalMat(
        points0, points1, cv2.USAC_MAGSAC, settings.threshold, settings.confidence, settings.max_iterations
    )


def _essential(points0: np.ndarray, points1: np.ndarray, settings: _Settings) -> tuple[np.ndarray, np.ndarray]:
    # OpenCV does not polish the essential matrix after MAGSAC: 3 to 10 times the error. USAC_ACCURATE and the default
    # give the same as the fast one, to the bit, and take longer. Points in the scale of pixels rather than rays, as
    # USAC has constants in it that are not free of scale.
    return cv2.findEssentialMat(
        points0,
        points1,
        np.diag([settings.focal_length, settings.focal_length, 1.0]),
        cv2.USAC_FAST,
        settings.confidence,
        settings.threshold,
        settings.max_iterations,
    )


def _homography(points0: np.ndarray, points1: np.ndarray, settings: _Settings) -> tuple[np.ndarray, np.ndarray]:
    return cv2.findHomography(
        points0,
        points1,
        cv2.USAC_MAGSAC,
        settings.threshold,
        maxIters=settings.max_iterations,
        confidence=settings.confidence,
    )


_FITS = {"fundamental": _fundamental, "essential": _essential, "homography": _homography}
