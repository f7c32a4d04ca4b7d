"""What ground truth says about the frames of a replay: true motion between them, errors of matches, repeatability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scfeat_core.evaluation.metrics import distance_to_nearest, symmetric_epipolar_distance
from scfeat_core.geometry import essential_from_pose, project_rays, scale_points, undistort_points, warp_points
from scfeat_core.replay.records import FrameRecord, GroundTruth
from scfeat_core.tracking import turn
from scfeat_core.types import Camera

OFF = 3.0  # pixels from the true epipolar line: beyond the noise of a keypoint in both images
STILL = 0.01  # metres: a camera that moved less has no epipolar lines that its ground truth could tell
TURNED_ONLY = 0.001  # metres: with a focal length of 500 pixels, half a pixel of parallax at a metre
REPEATED = 3.0  # pixels, the threshold of the repeatability
_SURFACE = 0.05  # share of the depth: next to a point it differs by more at edges only, and behind them is no more seen
_INTERPOLATED = 50_000_000  # ns between two true poses, in which even a hand turns a few degrees only
_NEAREST = 10_000_000  # ns from the one true pose that is near, where there is no other on the far side

DepthAt = Callable[[int], "np.ndarray | None"]
"""Of a stamp, nanoseconds: (H, W) float32, metres along the optical axis of that image, NaN where it is not known; of
any size, as long as it is of the same view. None where there is no map of that time."""


def poses_at(truth: GroundTruth, stamps: np.ndarray) -> np.ndarray:
    """True poses (N, 4, 4) at some stamps (N,) int64, nanoseconds; NaN where they are not known.

    Interpolated between two poses that are at most 50 ms apart; else that of the nearest stamp, within 10 ms.
    Rotations are interpolated along the chord and brought back to SO(3), which for small angles is the great circle.
    """
    if len(truth.stamps) == 0:
        return np.full((len(stamps), 4, 4), np.nan)
    after = np.searchsorted(truth.stamps, stamps).clip(0, len(truth.stamps) - 1)
    before = np.where((after > 0) & (truth.stamps[after] > stamps), after - 1, after)
    ahead, behind = truth.stamps[after] - stamps, stamps - truth.stamps[before]
    between = (ahead > 0) & (behind >= 0) & (ahead + behind <= _INTERPOLATED)
    nearest = np.where(abs(ahead) < abs(behind), after, before)
    poses = truth.poses[nearest].astype(np.float64)
    poses[~between & (abs(truth.stamps[nearest] - stamps) > _NEAREST)] = np.nan
    share = behind[between] / (ahead + behind)[between]
    poses[between] = _blended(truth.poses[before[between]], truth.poses[after[between]], share)
    return poses


def _blended(poses0: np.ndarray, poses1: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Poses (N, 4, 4) on the way from poses0 to poses1, at some share of it (N,)."""
    mixed = poses0 + share[:, None, None] * (poses1 - poses0)
    u, _, vt = np.linalg.svd(mixed[:, :3, :3])
    mixed[:, :3, :3] = u @ vt
    return mixed


def motion(truth: GroundTruth | None, stamp0: int, stamp1: int) -> np.ndarray:
    """True T_1_0 (4, 4) between two stamps: takes points of the camera at the first to it at the second. NaN where it
    is not known."""
    unknown = np.full((4, 4), np.nan)
    if truth is None:
        return unknown
    pose0, pose1 = poses_at(truth, np.array([stamp0, stamp1], np.int64))
    return np.linalg.inv(pose1) @ pose0 if np.isfinite((pose0, pose1)).all() else unknown


@dataclass(frozen=True, eq=False)
class Rays:
    """Undistorted rays (M, 2) of matched points, z = 1, of a camera; focal: its mean focal length, pixels."""

    rays0: np.ndarray
    rays1: np.ndarray
    camera: Camera
    focal: float

    @classmethod
    def of(cls, points0: np.ndarray, points1: np.ndarray, camera: Camera) -> Rays:
        """points0, points1: (M, 2) pixels, parallel."""
        rays = undistort_points(np.concatenate((points0, points1)), camera)
        return cls(rays[: len(points0)], rays[len(points0) :], camera, float(camera.K[0, 0] + camera.K[1, 1]) / 2)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """K times the rays, (M, 2) each: what the homographies of a calibrated camera act on."""
        return warp_points(self.rays0, self.camera.K), warp_points(self.rays1, self.camera.K)

    def epipolar_distance(self, essential: np.ndarray) -> np.ndarray:
        """(M,) pixels, the mean of those in both views."""
        return self.focal * symmetric_epipolar_distance(self.rays0, self.rays1, essential)


def true_distance(rays: Rays, motion: np.ndarray) -> np.ndarray | None:
    """Pixels (K,) of the points from their epipolar lines under the true motion (4, 4), T_1_0; of those that can be
    undistorted. None where the camera did not move enough to have any."""
    if not np.linalg.norm(motion[:3, 3]) >= STILL:
        return None
    distance = rays.epipolar_distance(essential_from_pose(motion[:3, :3], motion[:3, 3]))
    return distance[np.isfinite(distance)]


def repeatability(
    frame0: FrameRecord, frame1: FrameRecord, camera: Camera, motion: np.ndarray, depth_at: DepthAt = lambda stamp: None
) -> float:
    """Share of the keypoints of both frames that have one of the other within 3 pixels of where the true motion of the
    camera takes them, among those that stay in view.

    Where the camera moved by more than a millimetre that depends on their depth: points count whose surface is known
    and in view in both frames, and NaN is returned without both depth maps. motion: (4, 4), T_1_0.
    """
    if frame0.image_size != frame1.image_size or not np.isfinite(motion).all():
        return float("nan")
    rays0, rays1 = (undistort_points(frame.keypoints, camera) for frame in (frame0, frame1))
    if np.linalg.norm(motion[:3, 3]) <= TURNED_ONLY:
        there, back = turn(rays0, motion[:3, :3], camera), turn(rays1, motion[:3, :3].T, camera)
    else:
        depth0, depth1 = depth_at(frame0.stamp), depth_at(frame1.stamp)
        if depth0 is None or depth1 is None:
            return float("nan")
        there = reprojected(frame0.keypoints, rays0, depth0, depth1, camera, motion)
        back = reprojected(frame1.keypoints, rays1, depth1, depth0, camera, np.linalg.inv(motion))
    nearest = np.concatenate(
        (
            distance_to_nearest(there, frame1.keypoints, frame1.image_size),
            distance_to_nearest(back, frame0.keypoints, frame0.image_size),
        )
    )
    return float((nearest <= REPEATED).mean()) if len(nearest) else float("nan")


def reprojected(
    points: np.ndarray, rays: np.ndarray, depth: np.ndarray, depth_there: np.ndarray, camera: Camera, motion: np.ndarray
) -> np.ndarray:
    """Pixels (N, 2) float32 at which another view shows the surfaces at some points (N, 2); NaN where the surface is
    not known, at its edges, behind another one there, and out of view.

    rays: (N, 2), of the points, undistorted. depth, depth_there: (H, W) metres, maps of both views. motion: (4, 4),
    takes points of the first camera to the other.
    """
    around = _sampled(depth, points, camera.size, reach=1)
    surface = np.where(np.ptp(around, axis=1) <= _SURFACE * around.min(1), around[:, 4], np.nan)
    moved = np.column_stack((rays, np.ones(len(rays)))) * surface[:, None] @ motion[:3, :3].T + motion[:3, 3]
    ahead = moved[:, 2] > 0
    pixels = project_rays(moved[:, :2] / np.where(ahead, moved[:, 2], np.nan)[:, None], camera)
    seen = _sampled(depth_there, pixels, camera.size)[:, 0]
    return np.where((abs(seen - moved[:, 2]) <= _SURFACE * seen)[:, None], pixels, np.nan).astype(np.float32)


def _sampled(depth: np.ndarray, points: np.ndarray, size: tuple[int, int], reach: int = 0) -> np.ndarray:
    """Depths (N, (2 reach + 1)^2) next to some pixels (N, 2) of an image of that size, row by row; NaN outside."""
    height, width = depth.shape
    column, row = np.round(scale_points(points, (width / size[0], height / size[1]))).T
    steps = np.arange(-reach, reach + 1)
    rows, columns = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    rows, columns = row[:, None] + rows, column[:, None] + columns
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    found = np.full(rows.shape, np.nan)
    found[inside] = depth[rows[inside].astype(int), columns[inside].astype(int)]
    return found
