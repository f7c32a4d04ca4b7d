"""The tracks of a sequence as flat arrays: which point was seen in which frame, along which ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scfeat_core.errors import CalibrationError
from scfeat_core.geometry import check_camera, undistort_points
from scfeat_core.replay.records import FrameRecord
from scfeat_core.types import Camera


@dataclass(frozen=True, eq=False)
class Observations:
    """What F frames saw of T points, M observations by ascending frames, in each frame by ascending points.

    stamps: (F,) int64, nanoseconds. starts: (F + 1,) int64, where the observations of each frame begin.
    frames, points: (M,) int64, 0 <= frames < F, 0 <= points < T. rays: (M, 2) float64, undistorted, z = 1, finite.
    focal_length: pixels per unit of the rays, mean of both axes. counts: T.
    """

    stamps: np.ndarray
    starts: np.ndarray
    frames: np.ndarray
    points: np.ndarray
    rays: np.ndarray
    focal_length: float
    count: int

    def __len__(self) -> int:
        """Frames."""
        return len(self.stamps)

    def of(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Points (N,) and rays (N, 2) of a frame."""
        part = slice(self.starts[frame], self.starts[frame + 1])
        return self.points[part], self.rays[part]

    def common(self, frame0: int, frame1: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points (N,) that both frames saw, and their rays (N, 2) in each."""
        (points0, rays0), (points1, rays1) = self.of(frame0), self.of(frame1)
        points, rows0, rows1 = np.intersect1d(points0, points1, assume_unique=True, return_indices=True)
        return points, rays0[rows0], rays1[rows1]

    def rows(self, frames: Sequence[int], chosen: np.ndarray) -> np.ndarray:
        """The observations (n,) in ``frames`` (ascending) of the points that are ``chosen``, (T,) bool."""
        parts = [np.arange(self.starts[frame], self.starts[frame + 1]) for frame in frames]
        rows = np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)
        return rows[chosen[self.points[rows]]]


def observations(frames: Sequence[FrameRecord], camera: Camera | None) -> Observations:
    """The observations of those frames that gave a result. Raises CalibrationError without a usable camera.

    Rays that are not known are left out; where a frame has none at all, those of its keypoints are computed.
    """
    if camera is None:
        raise CalibrationError(
            "visual odometry needs the intrinsics of the camera, found none; give them as --camera-info or --intrinsics"
        )
    check_camera(camera)
    stamps, parts = [], []
    for frame in frames:  # once, and without keeping them: an hour of them does not fit into memory
        if not frame.dropped:
            stamps.append(frame.stamp)
            parts.append(_observed(frame, camera))
    keys = np.concatenate([*(key for key, _ in parts), np.zeros(0, np.int64)])
    unique, points = np.unique(keys, return_inverse=True)
    lengths = [len(key) for key, _ in parts]
    return Observations(
        np.array(stamps, np.int64),
        np.cumsum([0, *lengths]).astype(np.int64),
        np.repeat(np.arange(len(parts)), lengths),
        points.reshape(-1),
        np.concatenate([*(rays for _, rays in parts), np.zeros((0, 2))]),
        float((camera.K[0, 0] + camera.K[1, 1]) / 2),
        len(unique),
    )


def _observed(frame: FrameRecord, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Keys (N,) int64, ascending, equal where the point is the same, and rays (N, 2)."""
    tracks = frame.tracks
    if tracks is None:
        return np.zeros(0, np.int64), np.zeros((0, 2))
    rays = undistort_points(tracks.keypoints, camera) if tracks.rays is None else tracks.rays.astype(np.float64)
    keys, first = np.unique(tracks.epoch * 2**32 + tracks.ids.astype(np.int64), return_index=True)
    known = np.isfinite(rays[first]).all(1)
    return keys[known], rays[first][known]
