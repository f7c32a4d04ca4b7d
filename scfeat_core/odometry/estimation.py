"""Monocular visual odometry on the tracks of a front end: two views to begin with, then PnP, with a sliding window.

It sees nothing but what the node publishes – stamps, ids and rays of tracks – and is meant to show what accuracy these
allow, not to be a SLAM system: it closes no loops and recognises no places. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from scfeat_core.odometry.initialising import begin
from scfeat_core.odometry.observations import Observations, observations
from scfeat_core.odometry.solving import (
    Bundle,
    Landmarks,
    Pose,
    Views,
    adjust,
    exponential,
    fit_rotation,
    homogeneous,
    pose_errors,
    ransac_pose,
    refine_pose,
    residuals,
    triangulate,
)
from scfeat_core.replay.records import FrameRecord
from scfeat_core.types import Camera

_FEWEST = 12  # points that agree with a pose
_SHARE = 0.3  # of the known points in view that must agree with a pose
_GOOD = 3.0  # sigma, that is pixels
_WELL = 0.3  # relative uncertainty of the depth of a point that says where the camera is, not only how it is turned
_ADJUSTED = 0.6  # and of one that takes part in bundle adjustment
_STEP = 0.2  # of the depth of the scene: how far a camera moves between two frames, one standard deviation
_KEYFRAME_PARALLAX = 8.0  # pixels
_KEYFRAME_SHARE = 0.7  # of the points of the last keyframe
_WINDOW, _FIXED = 8, 12  # keyframes that are adjusted, and that are held but looked at
_PATIENCE = 5  # frames without a pose from points, before a new map is begun


@dataclass(frozen=True, eq=False)
class Odometry:
    """The path of the camera, in an unknown scale.

    stamps: (N,) int64, nanoseconds, of the processed frames. poses: (N, 4, 4) float64, T_world_camera; the world is the
    first frame of the map. tracked: (N,) bool, frames with a pose that was measured. initialisations: maps begun; 1 is
    what it should be. status: of each frame, "start" (before the first map; its pose was found afterwards), "points"
    (PnP), "rotation" (only that could be measured, the translation is held), or "lost". keyframes: (K,) int64.
    """

    stamps: np.ndarray
    poses: np.ndarray
    tracked: np.ndarray
    initialisations: int
    status: tuple[str, ...]
    keyframes: np.ndarray

    @property
    def lost(self) -> int:
        """Frames, after the first map, without a pose."""
        return self.status.count("lost")


def estimate(frames: Sequence[FrameRecord], camera: Camera | None, *, adjust: bool = True) -> Odometry:
    """The path of the camera over the processed ones of ``frames``.

    adjust: bundle adjustment of a sliding window at each keyframe, and of all keyframes in the end. Fewer than two
    frames, or frames without parallax, give poses that are not tracked. Raises CalibrationError without a camera.
    """
    path = _Path(observations(frames, camera), adjust)
    for frame in range(len(path.observed)):
        path.add(frame)
    return path.finish()


class _Path:
    """All that is known so far: poses of frames, positions of points, and which frames are keyframes."""

    def __init__(self, observed: Observations, adjusting: bool) -> None:
        count = len(observed)
        self.observed, self.adjusting = observed, adjusting
        self.sigma = 1 / observed.focal_length
        self.rotations, self.translations = np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 3))
        self.status = ["start"] * count
        self.positions, self.known = np.zeros((observed.count, 3)), np.zeros(observed.count, bool)
        self.spreads, self.uncertainty = np.zeros((observed.count, 3)), np.full(observed.count, np.inf)
        self.since = np.zeros(observed.count, np.int64)  # frame before which observations are not believed
        self.depth = 1.0  # of the scene, median
        self.keyframes: list[int] = []
        self.maps: list[int] = []  # which keyframe each of them begins with
        self.last = -1  # newest frame with a pose from points

    def add(self, frame: int) -> None:
        if not self.maps:
            self._begin(frame, 0)
            return
        self.status[frame] = self._locate(frame, frame - 1)
        if self.status[frame] != "lost":
            self.last = frame
            if self._is_keyframe(frame):
                self._add_keyframe(frame)
        elif frame - self.last >= _PATIENCE:
            self._begin(frame, self.last + 1)

    def finish(self) -> Odometry:
        if self.maps:
            self._refine()
            self._complete()
        poses = np.tile(np.eye(4), (len(self.status), 1, 1))
        poses[:, :3, :3] = self.rotations.swapaxes(1, 2)
        poses[:, :3, 3] = -np.einsum("nji,nj->ni", self.rotations, self.translations)
        tracked = np.array([status != "lost" for status in self.status], bool) & bool(self.maps)
        keyframes = np.array(self.keyframes, np.int64)
        status = tuple(self.status)
        return Odometry(self.observed.stamps, poses, tracked, len(self.maps), status, keyframes)

    # -- maps ----------------------------------------------------------------------------------------------------------

    def _begin(self, frame: int, earliest: int) -> None:
        """A map, where there is enough parallax; a later one goes on where the camera was, with the depth there was."""
        start = begin(self.observed, earliest, frame)
        if start is None:
            return
        first = int(start.frames[0])
        scale = self.depth
        rotation, translation = self.rotations[first].copy(), self.translations[first].copy()
        for current in range(first, frame + 1):  # what is left of the map before does not fit
            self.known[self.observed.of(current)[0]] = False
            self.since[self.observed.of(current)[0]] = first
        for number, current in enumerate(start.frames):
            self.rotations[current] = start.rotations[number] @ rotation
            self.translations[current] = start.rotations[number] @ translation + scale * start.translations[number]
            self.status[current] = "points"
        self.maps.append(len(self.keyframes))
        self.keyframes += start.frames.tolist()
        self.last = frame
        for current in reversed(start.frames):
            self._extend(int(current))
        for current in sorted(set(range(first, frame)) - set(start.frames.tolist())):
            self.status[current] = self._locate(current, current - 1)

    # -- poses ---------------------------------------------------------------------------------------------------------

    def _marks(self, frame: int) -> tuple[np.ndarray, Landmarks]:
        """What is known of the points (N,) that a frame sees."""
        points, rays = self.observed.of(frame)
        known = self.known[points] & (self.since[points] <= frame)
        points = points[known]
        return points, Landmarks(self.positions[points], self.spreads[points], rays[known])

    def _locate(self, frame: int, neighbour: int) -> str:
        """Find the pose of a frame, starting from that of a neighbour, and say from what it was found."""
        turn, turned = self._turn(neighbour, frame)
        held = turn @ self.rotations[neighbour], turn @ self.translations[neighbour]
        points, marks = self._marks(frame)
        well = self.uncertainty[points] < _WELL
        pose, agree = self._pose(marks, well, [held, self._predicted(frame, neighbour)])
        self.rotations[frame], self.translations[frame] = pose
        if agree[well].sum() >= _FEWEST and agree.sum() >= _SHARE * len(points):
            return "points"
        if agree.sum() >= max(_FEWEST, _SHARE * len(points)):
            return "rotation"
        self.rotations[frame], self.translations[frame] = held
        return "rotation" if turned else "lost"

    def _pose(self, marks: Landmarks, well: np.ndarray, starts: list[Pose]) -> tuple[Pose, np.ndarray]:
        """By the points of the map that are in view, and which of them, (N,) bool, agree."""
        if len(marks) < _FEWEST:
            return starts[0], np.zeros(len(marks), bool)
        held = starts[0], _STEP * self.depth
        errors = [np.median(pose_errors(start, marks, self.sigma)) for start in starts]
        pose = refine_pose(starts[int(np.argmin(errors))], marks, self.sigma, 20.0, held)
        agree = pose_errors(pose, marks, self.sigma) < _GOOD**2
        if agree.sum() < 0.7 * len(marks) and well.sum() >= _FEWEST:
            other = ransac_pose(marks.positions[well], marks.rays[well], _GOOD * self.sigma)
            if other is not None:
                other = refine_pose(other, marks, self.sigma, _GOOD, held)
                agree_other = pose_errors(other, marks, self.sigma) < _GOOD**2
                if agree_other.sum() > agree.sum():
                    return other, agree_other
        return pose, agree

    def _turn(self, neighbour: int, frame: int) -> tuple[np.ndarray, bool]:
        """The rotation (3, 3) since a neighbour by what both saw, and whether enough agrees with one."""
        points, rays0, rays1 = self.observed.common(neighbour, frame)
        if len(points) < _FEWEST:
            return np.eye(3), False
        rotation, errors = fit_rotation(rays0, rays1, self.sigma)
        return rotation, int((errors < 2 * _GOOD).sum()) >= max(_FEWEST, _SHARE * len(points))

    def _predicted(self, frame: int, neighbour: int) -> Pose:
        """Constant velocity, from the two frames before."""
        before = neighbour - (frame - neighbour)
        stamps = self.observed.stamps
        if not 0 <= before < len(stamps) or self.status[before] == "start" or stamps[neighbour] == stamps[before]:
            return self.rotations[neighbour], self.translations[neighbour]
        ratio = float(np.clip((stamps[frame] - stamps[neighbour]) / (stamps[neighbour] - stamps[before]), 0.0, 3.0))
        turn = self.rotations[neighbour] @ self.rotations[before].T
        step = self.translations[neighbour] - turn @ self.translations[before]
        turn = exponential(ratio * cv2.Rodrigues(turn)[0].ravel())
        return turn @ self.rotations[neighbour], turn @ self.translations[neighbour] + ratio * step

    # -- keyframes -----------------------------------------------------------------------------------------------------

    def _is_keyframe(self, frame: int) -> bool:
        """Whether many of the points that are followed are new, or many have moved."""
        followed = self.observed.common(frame - 1, frame)[0]
        if self.known[followed].sum() < _KEYFRAME_SHARE * len(followed):
            return True
        _, rays0, rays1 = self.observed.common(self.keyframes[-1], frame)
        turn = self.rotations[frame] @ self.rotations[self.keyframes[-1]].T
        turned = homogeneous(rays0) @ turn.T
        moved = np.linalg.norm(turned[:, :2] / np.maximum(turned[:, 2:], 0.1) - rays1, axis=1)
        return len(moved) < _FEWEST or float(np.median(moved)) > _KEYFRAME_PARALLAX * self.sigma

    def _add_keyframe(self, frame: int) -> None:
        self.keyframes.append(frame)
        self._extend(frame)
        if self.adjusting:
            recent = self._recent()
            self._adjust(recent, recent[-_WINDOW:], 4)
            self._extend(frame)

    def _recent(self) -> list[int]:
        """The last keyframes of this map."""
        return self.keyframes[max(self.maps[-1], len(self.keyframes) - _WINDOW - _FIXED) :]

    def _extend(self, frame: int) -> None:
        """Triangulate, again where they are known, the points of a keyframe from all the last keyframes.

        Where these do not agree, it begins again with this frame.
        """
        points, _ = self.observed.of(frame)
        bad = self._triangulate(points, self._recent())
        self.since[bad] = frame
        self._triangulate(bad, [frame])
        well = points[self.uncertainty[points] < _WELL]
        if len(well) >= _FEWEST:
            moved = self.positions[well] @ self.rotations[frame].T + self.translations[frame]
            self.depth = float(np.median(moved[:, 2]))

    def _triangulate(self, points: np.ndarray, frames: Sequence[int]) -> np.ndarray:
        """Points from what these frames saw of them; returns those that this does not agree with."""
        chosen = np.zeros(len(self.known), bool)
        chosen[points] = True
        rows = self.observed.rows(frames, chosen)
        rows = rows[self.observed.frames[rows] >= self.since[self.observed.points[rows]]]
        if len(rows) == 0:
            return points[:0]
        rows = rows[np.argsort(self.observed.points[rows], kind="stable")]
        points, index = np.unique(self.observed.points[rows], return_inverse=True)
        of = self.observed.frames[rows]
        views = Views(index.reshape(-1), self.rotations[of], self.translations[of], self.observed.rays[rows])
        found = triangulate(views, self.sigma, self.depth)
        good = found.worst < _GOOD**2
        self.known[points] = good
        self.uncertainty[points] = np.where(good, found.uncertainty, np.inf)
        self.positions[points], self.spreads[points] = found.positions, found.spreads
        return points[~good]

    def _adjust(self, frames: Sequence[int], free: Sequence[int], iterations: int) -> None:
        """Bundle adjustment of the ``free`` ones of ``frames``, and of the points that these see."""
        chosen = np.zeros(len(self.known), bool)
        for frame in free:
            chosen[self.observed.of(frame)[0]] = True
        rows = self.observed.rows(frames, chosen & self.known & (self.uncertainty < _ADJUSTED))
        rows = rows[self.observed.frames[rows] >= self.since[self.observed.points[rows]]]
        seen = np.bincount(self.observed.points[rows], minlength=len(self.known))
        rows = rows[seen[self.observed.points[rows]] > 1]
        if len(rows) == 0:
            return
        points, index = np.unique(self.observed.points[rows], return_inverse=True)
        cameras = np.searchsorted(frames, self.observed.frames[rows])
        fixed = ~np.isin(frames, free)
        fixed[0] = True
        held = self.rotations[frames], self.translations[frames]
        bundle = Bundle(*held, self.positions[points], cameras, index.reshape(-1), self.observed.rays[rows])
        bundle = adjust(bundle, fixed, self.sigma, iterations)
        self.rotations[frames], self.translations[frames] = bundle.rotations, bundle.translations
        self.positions[points] = bundle.points
        errors = residuals(bundle.moved(), bundle.rays, self.sigma)
        bad = points[bundle.index[errors > _GOOD**2]]
        self.known[bad], self.uncertainty[bad] = False, np.inf

    def _refine(self) -> None:
        """Each map as a whole, then the frames between its keyframes."""
        for first, end in zip(self.maps, [*self.maps[1:], len(self.keyframes)], strict=True):
            frames = self.keyframes[first:end]
            if self.adjusting:
                self._adjust(frames, frames, 10)
        for frame in sorted(set(range(self.keyframes[0], len(self.status))) - set(self.keyframes)):
            if self.status[frame] == "points":
                pose = self.rotations[frame], self.translations[frame]
                points, marks = self._marks(frame)
                if (self.uncertainty[points] < _WELL).sum() >= _FEWEST:
                    self.rotations[frame], self.translations[frame] = refine_pose(pose, marks, self.sigma, _GOOD)

    def _complete(self) -> None:
        """Poses of the frames before the first map, backwards."""
        first = min(frame for frame, status in enumerate(self.status) if status == "points")
        for frame in range(first - 1, -1, -1):
            self.status[frame] = "start" if self._locate(frame, frame + 1) != "lost" else "lost"
