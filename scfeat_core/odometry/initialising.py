"""The first two poses of a map: which two frames, and how the camera moved between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from scfeat_core.odometry.observations import Observations
from scfeat_core.odometry.solving import (
    Bundle,
    Landmarks,
    Pose,
    Views,
    adjust,
    fit_rotation,
    mean_squares,
    ransac_pose,
    refine_pose,
    residuals,
    triangulate,
)

LOOK_BACK = (1, 2, 3, 4, 6, 8, 11, 15, 20, 26, 33, 41, 50, 60)  # frames
PARALLAX = 5.0  # pixels that the median point moves, but for the rotation
_FEWEST = 40  # points
_DEPTH = 0.3  # relative uncertainty of the depth that a point of the first map may have
_BETWEEN = 3  # frames that have to agree with the two
_AGREE, _AGREES = 0.7, 9.0  # of the points in each of them, by so many sigma^2
_GOOD = 3.0  # sigma^2, of a point, mean


@dataclass(frozen=True, eq=False)
class Beginning:
    """frames: (K,) int64, ascending. rotations: (K, 3, 3), translations: (K, 3), the first one identity.
    points: (P,) int64. positions: (P, 3), median depth 1 in the first frame."""

    frames: np.ndarray
    rotations: np.ndarray
    translations: np.ndarray
    points: np.ndarray
    positions: np.ndarray


def begin(observed: Observations, earliest: int, frame: int) -> Beginning | None:
    """A map of ``frame`` and one of those before it, not before ``earliest``; None where none has enough parallax.

    Hypotheses are the essential matrix's pose and, for planar scenes, those of the homography (Malis and Vargas, 2007).
    What counts is which of them the frames between the two agree with.
    """
    reference = _reference(observed, earliest, frame)
    if reference is None:
        return None
    points, rays0, rays1 = observed.common(reference, frame)
    sigma = 1 / observed.focal_length
    found = [_hypothesis(pose, rays0, rays1, sigma) for pose in _poses(rays0, rays1, observed.focal_length)]
    most = max((int(good.sum()) for *_, good in found), default=0)
    if most < _FEWEST:
        return None
    likely = [(pose, positions, good) for pose, positions, good in found if good.sum() > 0.75 * most]
    tried = [
        _verified(observed, reference, frame, pose, points[good], positions[good]) for pose, positions, good in likely
    ]
    agreed = [(cost, number, start) for number, (cost, start) in enumerate(tried) if start is not None]
    return min(agreed)[2] if agreed else None


def _reference(observed: Observations, earliest: int, frame: int) -> int | None:
    """The frame with the most points that moved far enough, weighed by how far."""
    best, reference = 0.0, None
    for back in LOOK_BACK:
        if frame - back < earliest:
            break
        points, rays0, rays1 = observed.common(frame - back, frame)
        if len(points) < _FEWEST:
            break
        _, errors = fit_rotation(rays0, rays1, 1 / observed.focal_length)
        parallax = float(np.median(errors))
        if parallax >= PARALLAX and parallax**0.5 * len(points) > best:
            best, reference = parallax**0.5 * len(points), frame - back
    return reference


def _poses(rays0: np.ndarray, rays1: np.ndarray, focal_length: float) -> Iterator[Pose]:
    """Where view 1 may be, seen from view 0."""
    scaled0, scaled1 = rays0 * focal_length, rays1 * focal_length
    k = np.diag([focal_length, focal_length, 1.0])
    cv2.setRNGSeed(0)
    try:
        essential, mask = cv2.findEssentialMat(scaled0, scaled1, k, cv2.USAC_ACCURATE, 0.9999, 1.0, 5000)
        if essential is not None and essential.shape == (3, 3):
            _, rotation, translation, _ = cv2.recoverPose(essential, scaled0, scaled1, k, mask=mask.copy())
            yield rotation, translation.ravel()
        homography, mask = cv2.findHomography(scaled0, scaled1, cv2.USAC_MAGSAC, 2.0, maxIters=2000, confidence=0.999)
        if homography is not None and mask.mean() > 0.5:
            _, rotations, translations, _ = cv2.decomposeHomographyMat(homography, k)
            for rotation, translation in zip(rotations, translations, strict=True):
                if np.linalg.norm(translation) > 1e-6:
                    yield rotation, translation.ravel() / np.linalg.norm(translation)
    except cv2.error:  # what they make of degenerate points
        return


def _hypothesis(pose: Pose, rays0: np.ndarray, rays1: np.ndarray, sigma: float) -> tuple[Pose, np.ndarray, np.ndarray]:
    """The pose, the points (N, 3) that it gives, and which of them are good, (N,) bool."""
    count = len(rays0)
    index = np.repeat(np.arange(count), 2)
    views = Views(
        index,
        np.tile(np.stack((np.eye(3), pose[0])), (count, 1, 1)),
        np.tile(np.stack((np.zeros(3), pose[1])), (count, 1)),
        np.stack((rays0, rays1), 1).reshape(-1, 2),
    )
    found = triangulate(views, sigma)
    return pose, found.positions, (found.uncertainty < _DEPTH) & (found.errors < _GOOD)


def _exact(positions: np.ndarray, rays: np.ndarray) -> Landmarks:
    return Landmarks(positions, np.zeros_like(positions), rays)


def _verified(
    observed: Observations,
    reference: int,
    frame: int,
    pose: Pose,
    points: np.ndarray,
    positions: np.ndarray,
) -> tuple[float, Beginning | None]:
    """The map after bundle adjustment with frames between, and its cost a point; None where these disagree."""
    sigma = 1 / observed.focal_length
    frames = np.unique(np.linspace(reference, frame, _BETWEEN + 2).round().astype(np.int64))
    poses, parts = [], []
    for number, current in enumerate(frames):
        seen, rays = observed.of(int(current))
        shared, rows, index = np.intersect1d(seen, points, assume_unique=True, return_indices=True)
        parts.append((np.full(len(shared), number), index, rays[rows]))
        if current in (reference, frame):
            poses.append((np.eye(3), np.zeros(3)) if current == reference else pose)
            continue
        found = ransac_pose(positions[index], rays[rows], 3 * sigma) if len(shared) >= 6 else None
        if found is None:
            return np.inf, None
        poses.append(refine_pose(found, _exact(positions[index], rays[rows]), sigma, 3.0))
    bundle = Bundle(
        np.stack([rotation for rotation, _ in poses]),
        np.stack([translation for _, translation in poses]),
        positions,
        *(np.concatenate(part) for part in zip(*parts, strict=True)),
    )
    bundle = adjust(bundle, np.arange(len(frames)) == 0, sigma, 15)
    errors = residuals(bundle.moved(), bundle.rays, sigma)
    agree = np.bincount(bundle.cameras, errors < _AGREES, len(frames)) / np.bincount(bundle.cameras)
    good = mean_squares(bundle.index, errors) < _GOOD
    if agree.min() < _AGREE or good.sum() < _FEWEST:
        return np.inf, None
    scale = 1 / np.median(bundle.points[good, 2])
    start = Beginning(frames, bundle.rotations, scale * bundle.translations, points[good], scale * bundle.points[good])
    return bundle.cost(sigma, _GOOD) / len(errors), start
