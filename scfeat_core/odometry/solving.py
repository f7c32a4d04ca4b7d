"""Least squares on rays: rotations, poses and points, each robust and vectorised; and all of them at once.

A pose is (R, t) with x_camera = R X + t. ``sigma`` is the noise of a ray, pixels / focal length. Steps of a pose are
(rotation vector, translation) applied from the left: R <- exp(w) R, t <- exp(w) t + v.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import linalg, sparse

from scfeat_core.geometry import skew
from scfeat_core.inertial import exponential

Pose = tuple[np.ndarray, np.ndarray]

_NEAR = 1e-6  # a point nearer than this, in units of the map, is not in front of a camera
_KERNEL = 3.0  # sigma, of Cauchy's kernel for poses and points
_SPREAD, _KERNELS = 8.0, (1.0, 6.0)  # for all at once: median errors, and its limits in sigma
_LARGEST = 36.0  # squared error in sigma, that of an outlier
_ITERATIONS = 8
_PRIOR = 0.8  # of an expected inverse depth: infinity is not much less likely than half the depth


def homogeneous(rays: np.ndarray) -> np.ndarray:
    """(N, 2) to (N, 3) with z = 1."""
    return np.column_stack((rays, np.ones(len(rays))))


def directions(rays: np.ndarray) -> np.ndarray:
    """Unit vectors (N, 3) of rays (N, 2)."""
    full = homogeneous(rays)
    return full / np.linalg.norm(full, axis=1, keepdims=True)


# -- one view ----------------------------------------------------------------------------------------------------------


def residuals(points: np.ndarray, rays: np.ndarray, sigma: float) -> np.ndarray:
    """Squared reprojection errors (N,), in sigma, of points (N, 3) in the frame of the camera; inf behind it."""
    depth = points[:, 2]
    error = points[:, :2] / np.where(depth > _NEAR, depth, 1.0)[:, None] - rays
    return np.where(depth > _NEAR, (error**2).sum(1) / sigma**2, np.inf)


def fit_rotation(rays0: np.ndarray, rays1: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """The rotation (3, 3) that takes rays of view 0 to view 1 best, and the errors (N,) in sigma.

    Wahba's problem by SVD (Kabsch), reweighted with a Cauchy kernel whose scale is the median error.
    """
    from0, to1 = directions(rays0), directions(rays1)
    weights = np.ones(len(rays0))
    rotation, errors = np.eye(3), np.zeros(len(rays0))
    for _ in range(_ITERATIONS):
        u, _, vt = np.linalg.svd((to1 * weights[:, None]).T @ from0)
        rotation = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
        errors = np.linalg.norm(to1 - from0 @ rotation.T, axis=1) / sigma
        weights = 1 / (1 + (errors / max(np.median(errors), 1.0)) ** 2)
    return rotation, errors


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Known points as one frame sees them. positions: (N, 3). spreads: (N, 3), one standard deviation in the direction
    that is least certain. rays: (N, 2)."""

    positions: np.ndarray
    spreads: np.ndarray
    rays: np.ndarray

    def __len__(self) -> int:
        return len(self.rays)


def whitened(pose: Pose, marks: Landmarks, sigma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors (N, 2) in standard deviations, their Jacobian (N, 2, 6) in the pose, and what is in front, (N,) bool.

    The error of a point that is uncertain along a line counts less along the image of that line: of a point at an
    unknown depth that leaves the distance to its epipolar line.
    """
    moved = marks.positions @ pose[0].T + pose[1]
    error, projection = _projection(moved, marks.rays, sigma)
    image = (projection @ (marks.spreads @ pose[0].T)[..., None])[..., 0]
    square = (image**2).sum(1)
    factor = (1 - 1 / np.sqrt(1 + square)) / np.maximum(square, 1e-12)
    whitening = np.eye(2) - factor[:, None, None] * image[:, :, None] * image[:, None]
    return (whitening @ error[..., None])[..., 0], whitening @ projection @ _pose_jacobian(moved), moved[:, 2] > _NEAR


def pose_errors(pose: Pose, marks: Landmarks, sigma: float) -> np.ndarray:
    """Squared errors (N,) in standard deviations, inf behind the camera."""
    error, _, ahead = whitened(pose, marks, sigma)
    return np.where(ahead, (error**2).sum(1), np.inf)


def refine_pose(
    pose: Pose, marks: Landmarks, sigma: float, start: float, held: tuple[Pose, float] | None = None
) -> Pose:
    """Gauss-Newton on the pose alone, with a Cauchy kernel that narrows from ``start`` standard deviations to _KERNEL.

    held: a pose near to whose centre the camera is expected, and the standard deviation of that.
    """
    rotation, translation = pose
    for scale in np.geomspace(max(start, _KERNEL), _KERNEL, _ITERATIONS):
        error, steps, ahead = whitened((rotation, translation), marks, sigma)
        weights = ahead / (1 + (error**2).sum(1) / scale**2)
        flat = (steps * weights[:, None, None]).reshape(-1, 6)
        information = flat.T @ steps.reshape(-1, 6) + 1e-9 * np.eye(6)
        gradient = flat.T @ error.ravel()
        if held is not None:
            (turned, moved), deviation = held
            information[3:, 3:] += np.eye(3) / deviation**2
            gradient[3:] += (translation - rotation @ turned.T @ moved) / deviation**2
        step = -np.linalg.solve(information, gradient)
        turn = exponential(step[None, :3])[0]
        rotation, translation = turn @ rotation, turn @ translation + step[3:]
    return rotation, translation


def ransac_pose(points: np.ndarray, rays: np.ndarray, threshold: float) -> Pose | None:
    """A pose by OpenCV's RANSAC and SQPnP (Terzakis and Lourakis, ECCV 2020); None where there is none."""
    cv2.setRNGSeed(0)
    try:
        found, vector, translation, _ = cv2.solvePnPRansac(
            points, rays, np.eye(3), None, iterationsCount=300, reprojectionError=threshold, flags=cv2.SOLVEPNP_SQPNP
        )
    except cv2.error:  # what it makes of some degenerate samples
        return None
    if not found or not (np.isfinite(vector).all() and np.isfinite(translation).all()):
        return None
    return exponential(vector.reshape(1, 3))[0], translation.ravel()


def _projection(moved: np.ndarray, rays: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Errors (N, 2) in sigma of points (N, 3) in the camera's frame, and their Jacobian (N, 2, 3)."""
    depth = np.where(moved[:, 2] > _NEAR, moved[:, 2], 1.0)
    projected = moved[:, :2] / depth[:, None]
    jacobian = np.zeros((len(moved), 2, 3))
    jacobian[:, 0, 0] = jacobian[:, 1, 1] = 1
    jacobian[:, :, 2] = -projected
    return (projected - rays) / sigma, jacobian / (sigma * depth)[:, None, None]


def _pose_jacobian(moved: np.ndarray) -> np.ndarray:
    """(N, 3, 6): how points in the camera's frame move with a step of the pose."""
    return np.concatenate((-skew(moved), np.broadcast_to(np.eye(3), (len(moved), 3, 3))), 2)


# -- points ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Views:
    """Observations of P points from known poses, M of them by ascending points.

    index: (M,) int64, the point, each of 0..P-1 at least once. rotations: (M, 3, 3), translations: (M, 3): the pose
    that it was seen from. rays: (M, 2).
    """

    index: np.ndarray
    rotations: np.ndarray
    translations: np.ndarray
    rays: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each point begins."""
        return np.flatnonzero(np.diff(self.index, prepend=-1))


def mean_squares(index: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Mean squared errors (P,) of points from those (M,) of their observations, each no larger than _LARGEST."""
    return np.bincount(index, np.minimum(squares, _LARGEST)) / np.bincount(index)


@dataclass(frozen=True, eq=False)
class Triangulated:
    """positions: (P, 3). spreads: (P, 3), one standard deviation along the ray of the first view, where the position is
    least certain. uncertainty: (P,), relative, of the depth; inf at and beyond infinity. errors: (P,), see
    :func:`mean_squares`."""

    positions: np.ndarray
    spreads: np.ndarray
    uncertainty: np.ndarray
    errors: np.ndarray


def triangulate(views: Views, sigma: float, depth: float = np.inf) -> Triangulated:
    """Points by Gauss-Newton on their reprojection errors, Cauchy kernel, from any number of views, even one.

    In inverse depth along the first ray (Civera et al., T-RO 2008), in which the projection is all but linear: it
    starts at infinity, or, where a depth is to be expected, there, with a prior that has a standard deviation of _PRIOR
    of its inverse.
    """
    starts = views.starts
    anchor = starts[views.index]
    to_anchor = views.rotations[anchor].swapaxes(1, 2)
    centre = -(to_anchor @ views.translations[anchor][..., None])[..., 0]
    turns = views.rotations @ to_anchor
    shifts = (views.rotations @ centre[..., None])[..., 0] + views.translations
    expected, prior = (0.0, 0.0) if np.isinf(depth) else (1 / depth, (depth / _PRIOR) ** 2)
    state = np.column_stack((views.rays[starts], np.full(len(starts), expected)))
    information = np.zeros((len(starts), 3, 3))
    for _ in range(_ITERATIONS):
        moved = _seen(state, views.index, turns, shifts)
        error, jacobian = _projection(moved, views.rays, sigma)
        steps = jacobian @ np.concatenate((turns[:, :, :2], shifts[..., None]), 2)
        weights = (moved[:, 2] > _NEAR) / (1 + (error**2).sum(1) / _KERNEL**2)
        weighted = steps.swapaxes(1, 2) * weights[:, None, None]
        information = np.add.reduceat(weighted @ steps, starts)
        gradient = np.add.reduceat((weighted @ error[..., None])[..., 0], starts)
        information[:, 2, 2] += prior
        gradient[:, 2] += prior * (state[:, 2] - expected)
        information += 1e-9 * np.einsum("pii->pi", information)[:, None] * np.eye(3) + 1e-12 * np.eye(3)
        state = state - np.linalg.solve(information, gradient[..., None])[..., 0]
    squares = residuals(_seen(state, views.index, turns, shifts), views.rays, sigma)
    deviation = np.sqrt(np.linalg.inv(information)[:, 2, 2])
    inverse = np.maximum(state[:, 2], np.maximum(0.02 * expected, _NEAR))
    lines = (to_anchor[starts] @ homogeneous(state[:, :2])[..., None])[..., 0] / inverse[:, None]
    uncertainty = np.where(state[:, 2] > _NEAR, deviation / inverse, np.inf)
    return Triangulated(
        centre[starts] + lines, lines * (deviation / inverse)[:, None], uncertainty, mean_squares(views.index, squares)
    )


def _seen(state: np.ndarray, index: np.ndarray, turns: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Points in the frames of the cameras, times their inverse depth, (M, 3)."""
    points = state[index]
    return (turns @ homogeneous(points[:, :2])[..., None])[..., 0] + points[:, 2:] * shifts


# -- all at once -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bundle:
    """Poses, points, and who saw what: M observations by ascending cameras.

    rotations: (K, 3, 3), translations: (K, 3). points: (P, 3). cameras, index: (M,) int64. rays: (M, 2).
    """

    rotations: np.ndarray
    translations: np.ndarray
    points: np.ndarray
    cameras: np.ndarray
    index: np.ndarray
    rays: np.ndarray

    def moved(self) -> np.ndarray:
        """Points in the frames of the cameras that saw them, (M, 3)."""
        rotated = np.einsum("mij,mj->mi", self.rotations[self.cameras], self.points[self.index])
        return rotated + self.translations[self.cameras]

    def cost(self, sigma: float, kernel: float) -> float:
        """Cauchy's, of the errors in sigma."""
        squares = np.minimum(residuals(self.moved(), self.rays, sigma), 1e8)
        return float(kernel**2 * np.log1p(squares / kernel**2).sum())


def adjust(bundle: Bundle, fixed: np.ndarray, sigma: float, iterations: int) -> Bundle:
    """Bundle adjustment: Levenberg-Marquardt on the Schur complement of the points (Triggs et al., 1999).

    Cauchy's kernel, as wide as the errors are. fixed: (K,) bool, poses that stay. Where fewer than two do, the free
    gauge is held by the damping.
    """
    kernel = float(np.clip(_SPREAD * np.sqrt(np.median(residuals(bundle.moved(), bundle.rays, sigma))), *_KERNELS))
    damping, cost = 1e-4, bundle.cost(sigma, kernel)
    for _ in range(iterations):
        candidate = _step(bundle, fixed, sigma, kernel, damping)
        new = np.inf if candidate is None else candidate.cost(sigma, kernel)
        if candidate is None or not new < cost:
            damping *= 10
            continue
        bundle, gain, cost, damping = candidate, 1 - new / max(cost, 1e-12), new, max(damping / 10, 1e-9)
        if gain < 1e-4:
            break
    return bundle


def _step(bundle: Bundle, fixed: np.ndarray, sigma: float, kernel: float, damping: float) -> Bundle | None:
    """One step of Levenberg-Marquardt; None where its equations cannot be solved."""
    count, many = len(bundle.rotations), len(bundle.points)
    moved = bundle.moved()
    error, projection = _projection(moved, bundle.rays, sigma)
    weights = (moved[:, 2] > _NEAR) / (1 + (error**2).sum(1) / kernel**2)
    of_pose = (projection @ _pose_jacobian(moved)) * ~fixed[bundle.cameras][:, None, None]
    of_point = projection @ bundle.rotations[bundle.cameras]
    pose_t, point_t = (part.swapaxes(1, 2) * weights[:, None, None] for part in (of_pose, of_point))
    poses = _damped(_sums(pose_t @ of_pose, bundle.cameras, count), damping)
    points = np.linalg.inv(_damped(_sums(point_t @ of_point, bundle.index, many), damping))
    pose_side = -_sums(pose_t @ error[..., None], bundle.cameras, count)
    point_side = -_sums(point_t @ error[..., None], bundle.index, many)
    starts = np.searchsorted(bundle.cameras, np.arange(count + 1))
    mixed = sparse.bsr_matrix((pose_t @ of_point, bundle.index, starts), shape=(6 * count, 3 * many))
    solved = sparse.bsr_matrix((mixed.data @ points[bundle.index], bundle.index, starts), shape=mixed.shape)
    free = np.repeat(~fixed, 6)
    reduced = (linalg.block_diag(*poses) - (solved @ mixed.T).toarray())[np.ix_(free, free)]
    step = np.zeros(6 * count)
    try:
        factor = linalg.cho_factor(reduced, overwrite_a=True)
    except (linalg.LinAlgError, ValueError):
        return None
    step[free] = linalg.cho_solve(factor, (pose_side.ravel() - solved @ point_side.ravel())[free])
    shift = points @ (point_side - (mixed.T @ step).reshape(many, 3, 1))
    turns = exponential(step.reshape(count, 6)[:, :3])
    return Bundle(
        turns @ bundle.rotations,
        np.einsum("kij,kj->ki", turns, bundle.translations) + step.reshape(count, 6)[:, 3:],
        bundle.points + shift[..., 0],
        bundle.cameras,
        bundle.index,
        bundle.rays,
    )


def _sums(blocks: np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """Sums (count, ...) of blocks (M, ...) with the same index."""
    chosen = sparse.csr_matrix((np.ones(len(index)), (index, np.arange(len(index)))), shape=(count, len(index)))
    return (chosen @ blocks.reshape(len(blocks), -1)).reshape(count, *blocks.shape[1:])


def _damped(blocks: np.ndarray, damping: float) -> np.ndarray:
    """Marquardt's scaling, and a little more where there is nothing to scale."""
    size = blocks.shape[1]
    diagonal = np.einsum("nii->ni", blocks)
    return blocks + (damping * diagonal + 1e-8 * diagonal.max(1, keepdims=True) + 1e-6)[:, None] * np.eye(size)
