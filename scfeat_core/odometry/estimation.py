"""Monocular visual odometry on the tracks of a front end: two views to begin with, then PnP, with a sliding window.

It sees nothing but what the node publishes – stamps, ids and rays of tracks – and is meant to show what accuracy these
allow, not to be a SLAM system: it closes no loops and recognises no places. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from scfeat_core.inertial import exponential
from scfeat_core.odometry.initialising import Beginning, begin
from scfeat_core.odometry.observations import Observations, observations
from scfeat_core.odometry.solving import (
    Bundle,
    Landmarks,
    Pose,
    Views,
    adjust,
    fit_rotation,
    homogeneous,
    mean_squares,
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
_MEAN = 4.0  # sigma^2, of a point, mean
_WELL = 0.3  # relative uncertainty of the depth of a point that says where the camera is, not only how it is turned
_WIDE = 3.0  # times as uncertain as it seems is where a point is whose depth is not known well
_ADJUSTED = 0.6  # and of one that takes part in bundle adjustment
_STEP = 0.2  # of the depth of the scene: how far a camera moves between two frames, one standard deviation
_KEYFRAME_PARALLAX = 8.0  # pixels
_KEYFRAME_SHARE = 0.7  # of the points of the last keyframe
_WINDOW, _FIXED = 8, 12  # keyframes that are adjusted, and that are held but looked at
_WHOLE = 400  # keyframes that are adjusted at once in the end: equations are dense, and grow with the square of them
_TRIED = 4  # first maps that are compared,
_PROBE = 12  # and frames after them by which
_PATIENCE = 5  # frames without a pose from points, before a new map is begun


@dataclass(frozen=True, eq=False)
class Odometry:
    """The path of the camera, in an unknown scale.

    stamps: (N,) int64, nanoseconds, of the processed frames. poses: (N, 4, 4) float64, T_world_camera; the world is the
    first frame of the map. tracked: (N,) bool, frames with a pose that was measured. initialisations: maps begun; 1 is
    what it should be. status: of each frame, "points" (PnP), "rotation" (there are too few points of known depth to
    measure the translation, which is held or guessed), or "lost". keyframes: (K,) int64.
    """

    stamps: np.ndarray
    poses: np.ndarray
    tracked: np.ndarray
    initialisations: int
    status: tuple[str, ...]
    keyframes: np.ndarray

    @property
    def lost(self) -> int:
        """Frames without a pose; all of them where there never was a map."""
        return self.status.count("lost")


def estimate(frames: Sequence[FrameRecord], camera: Camera | None, *, adjust: bool = True) -> Odometry:
    """The path of the camera over the processed ones of ``frames``.

    adjust: bundle adjustment of a sliding window at each keyframe, and of all keyframes in the end (of more than 400 in
    parts that overlap by half, one after the other). Fewer than two
    frames, or frames without parallax, give poses that are not tracked. Raises CalibrationError without a camera.
    """
    path = _Path(observations(frames, camera), adjust)
    path.run()
    return path.result()


class _Path:
    """All that is known so far: poses of frames, positions of points, and which frames are keyframes."""

    def __init__(self, observed: Observations, adjusting: bool) -> None:
        count = len(observed)
        self.observed, self.adjusting = observed, adjusting
        self.sigma = 1 / observed.focal_length
        self.rotations, self.translations = np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 3))
        self.status = ["lost"] * count
        self.positions, self.known = np.zeros((observed.count, 3)), np.zeros(observed.count, bool)
        self.spreads, self.uncertainty = np.zeros((observed.count, 3)), np.full(observed.count, np.inf)
        # The first and the last frame whose observations of a point are believed.
        self.since, self.until = np.zeros(observed.count, np.int64), np.full(observed.count, count)
        self.depth = 1.0  # of the scene, median
        self.maps: list[list[int]] = []  # the keyframes of each, ascending

    def run(self) -> None:
        """From the first map forwards, then from there backwards, then all of it again."""
        first = self._first()
        if first is None:
            return
        self._begin(first)
        begun, last = int(first.frames[0]), int(first.frames[-1])
        for frame in range(last + 1, len(self.status)):
            last = frame if self._add(frame, frame - 1) else last
            if frame - last >= _PATIENCE and (start := begin(self.observed, last + 1, frame)) is not None:
                self._begin(start)
                last = frame
        self.maps.reverse()  # the first is the current one again
        self._measure_depth(begun)
        for frame in range(begun - 1, -1, -1):
            self._add(frame, frame + 1)
        self.maps.reverse()
        self._refine()

    def _first(self) -> Beginning | None:
        """The first map: of the first few that can be made the one that the next frames agree with best.

        Two frames may agree with a map that is wrong: little parallax is explained by flat and by deep scenes alike.
        """
        found: list[Beginning] = []
        for frame in range(2, len(self.status)):
            if found and (len(found) == _TRIED or frame > found[0].frames[-1] + _PROBE):
                break
            start = begin(self.observed, 0, frame)
            found += [] if start is None else [start]
        return min(found, key=self._misfit, default=None)

    def _misfit(self, start: Beginning) -> float:
        """By how much, sigma^2, the points of a map are off in the frames after it, at most ``_GOOD**2`` each; mean.

        Points that had to begin again, and all of a frame that could not be placed by them, are off by that much.
        """
        path, last = _Path(self.observed, self.adjusting), int(start.frames[-1])
        path._begin(start)
        own, errors = path.known.copy(), []
        for frame in range(last + 1, len(self.status))[:_PROBE]:
            path._add(frame, frame - 1)
            seen = int(own[path.observed.of(frame)[0]].sum())
            points, marks = path._marks(frame)
            same = own[points] & (path.since[points] <= last)
            off = pose_errors((path.rotations[frame], path.translations[frame]), marks, self.sigma)[same]
            off = np.minimum(off, _GOOD**2) if path.status[frame] == "points" else off[:0]
            errors.append((off.sum() + (seen - len(off)) * _GOOD**2) / max(seen, 1))
        return float(np.mean(errors)) if errors else 0.0

    def result(self) -> Odometry:
        poses = np.tile(np.eye(4), (len(self.status), 1, 1))
        poses[:, :3, :3] = self.rotations.swapaxes(1, 2)
        poses[:, :3, 3] = -np.einsum("nji,nj->ni", self.rotations, self.translations)
        tracked = np.array([status != "lost" for status in self.status], bool)
        keyframes = np.array([frame for frames in self.maps for frame in frames], np.int64)
        return Odometry(self.observed.stamps, poses, tracked, len(self.maps), tuple(self.status), keyframes)

    # -- frames --------------------------------------------------------------------------------------------------------

    def _begin(self, start: Beginning) -> None:
        """A map; a later one goes on where the camera was, with the depth that there was."""
        first = int(start.frames[0])
        rotation, translation = self.rotations[first].copy(), self.translations[first].copy()
        between = range(first, int(start.frames[-1]) + 1)
        for current in between if self.maps else ():  # what is left of the map before does not fit
            self.known[self.observed.of(current)[0]] = False
            self.since[self.observed.of(current)[0]] = first
        for current, turn, shift in zip(start.frames, start.rotations, start.translations, strict=True):
            self.rotations[current] = turn @ rotation
            self.translations[current] = turn @ translation + self.depth * shift
            self.status[current] = "points"
        self.maps.append([int(frame) for frame in start.frames])
        for current in start.frames:
            self._triangulate(self.observed.of(current)[0], self.maps[-1])
        self._measure_depth(first)
        for current in sorted(set(between) - set(self.maps[-1])):
            self.status[current] = self._locate(current, current - 1)

    def _add(self, frame: int, neighbour: int) -> bool:
        """The next frame beside one that is done; whether it has a pose."""
        self.status[frame] = self._locate(frame, neighbour)
        if self.status[frame] != "lost" and self._is_keyframe(frame, neighbour):
            self.maps[-1] = sorted([*self.maps[-1], frame])
            self._extend(frame, frame > neighbour)
            if self.adjusting:
                recent = self._nearest(frame, _WINDOW + _FIXED)
                self._adjust(recent, self._nearest(frame, _WINDOW), 4)
                self._extend(frame, frame > neighbour)
        return self.status[frame] != "lost"

    def _nearest(self, frame: int, count: int) -> list[int]:
        """Keyframes of this map, ascending."""
        return sorted(sorted(self.maps[-1], key=lambda keyframe: abs(keyframe - frame))[:count])

    # -- poses ---------------------------------------------------------------------------------------------------------

    def _marks(self, frame: int) -> tuple[np.ndarray, Landmarks]:
        """What is known of the points (N,) that a frame sees."""
        points, rays = self.observed.of(frame)
        known = self.known[points] & (self.since[points] <= frame) & (frame <= self.until[points])
        points = points[known]
        wide = np.where(self.uncertainty[points] < _WELL, 1.0, _WIDE)[:, None]
        return points, Landmarks(self.positions[points], wide * self.spreads[points], rays[known])

    def _locate(self, frame: int, neighbour: int) -> str:
        """Find the pose of a frame, starting from that of a neighbour, and say from what it was found."""
        turn, turned = self._turn(neighbour, frame)
        held = turn @ self.rotations[neighbour], turn @ self.translations[neighbour]
        points, marks = self._marks(frame)
        well = self.uncertainty[points] < _WELL
        pose, agree = self._pose(marks, well, [held, self._predicted(frame, neighbour)])
        self.rotations[frame], self.translations[frame] = pose
        if self._suffices(agree, well):
            return "points"
        if agree.sum() >= max(_FEWEST, _SHARE * len(points)):
            return "rotation"
        turned = turned and self.status[neighbour] != "lost"
        self.rotations[frame], self.translations[frame] = held if turned else self._predicted(frame, neighbour)
        return "rotation" if turned else "lost"

    def _suffices(self, agree: np.ndarray, well: np.ndarray) -> bool:
        """Whether the points (N,) that agree with a pose, and of which the depth is known well, are enough for it."""
        return bool(agree[well].sum() >= _FEWEST and agree.sum() >= _SHARE * len(agree))

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
        if not 0 <= before < len(stamps) or self.status[before] == "lost" or stamps[neighbour] == stamps[before]:
            return self.rotations[neighbour], self.translations[neighbour]
        ratio = float(np.clip((stamps[frame] - stamps[neighbour]) / (stamps[neighbour] - stamps[before]), 0.0, 3.0))
        turn = self.rotations[neighbour] @ self.rotations[before].T
        step = self.translations[neighbour] - turn @ self.translations[before]
        turn = exponential(ratio * cv2.Rodrigues(turn)[0].reshape(1, 3))[0]
        return turn @ self.rotations[neighbour], turn @ self.translations[neighbour] + ratio * step

    # -- keyframes -----------------------------------------------------------------------------------------------------

    def _is_keyframe(self, frame: int, neighbour: int) -> bool:
        """Whether many of the points that are followed are new, or many have moved."""
        followed = self.observed.common(neighbour, frame)[0]
        if self.known[followed].sum() < _KEYFRAME_SHARE * len(followed):
            return True
        (keyframe,) = self._nearest(frame, 1)
        _, rays0, rays1 = self.observed.common(keyframe, frame)
        turned = homogeneous(rays0) @ (self.rotations[frame] @ self.rotations[keyframe].T).T
        moved = np.linalg.norm(turned[:, :2] / np.maximum(turned[:, 2:], 0.1) - rays1, axis=1)
        return len(moved) < _FEWEST or float(np.median(moved)) > _KEYFRAME_PARALLAX * self.sigma

    def _extend(self, frame: int, forwards: bool) -> None:
        """Triangulate, again where they are known, the points of a keyframe from all the last keyframes.

        Where these do not agree, a point begins again with this frame.
        """
        points, _ = self.observed.of(frame)
        bad = self._triangulate(points, self._nearest(frame, _WINDOW + _FIXED))
        (self.since if forwards else self.until)[bad] = frame
        self._triangulate(bad, [frame])
        self._measure_depth(frame)

    def _measure_depth(self, frame: int) -> None:
        points, _ = self.observed.of(frame)
        well = points[self.uncertainty[points] < _ADJUSTED]
        if len(well) >= _FEWEST:
            moved = self.positions[well] @ self.rotations[frame].T + self.translations[frame]
            self.depth = float(np.median(moved[:, 2]))

    def _believed(self, frames: Sequence[int], chosen: np.ndarray) -> np.ndarray:
        """Observations (n,) of the points that are ``chosen``, (T,) bool."""
        rows = self.observed.rows(frames, chosen)
        of, points = self.observed.frames[rows], self.observed.points[rows]
        return rows[(self.since[points] <= of) & (of <= self.until[points])]

    def _triangulate(self, points: np.ndarray, frames: Sequence[int]) -> np.ndarray:
        """Points from what these frames saw of them; returns those that this does not agree with."""
        chosen = np.zeros(len(self.known), bool)
        chosen[points] = True
        rows = self._believed(frames, chosen)
        if len(rows) == 0:
            return points[:0]
        rows = rows[np.argsort(self.observed.points[rows], kind="stable")]
        points, index = np.unique(self.observed.points[rows], return_inverse=True)
        of = self.observed.frames[rows]
        views = Views(index.reshape(-1), self.rotations[of], self.translations[of], self.observed.rays[rows])
        found = triangulate(views, self.sigma, self.depth)
        good = found.errors < _MEAN
        self.known[points] = good
        self.uncertainty[points] = np.where(good, found.uncertainty, np.inf)
        self.positions[points], self.spreads[points] = found.positions, found.spreads
        return points[~good]

    def _adjust(self, frames: Sequence[int], free: Sequence[int], iterations: int) -> None:
        """Bundle adjustment of the ``free`` ones of ``frames``, and of the points that these see."""
        chosen = np.zeros(len(self.known), bool)
        for frame in free:
            chosen[self.observed.of(frame)[0]] = True
        rows = self._believed(frames, chosen & self.known & (self.uncertainty < _ADJUSTED))
        _, index, seen = np.unique(self.observed.points[rows], return_inverse=True, return_counts=True)
        rows = rows[seen[index.reshape(-1)] > 1]
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
        bad = points[mean_squares(bundle.index, errors) > _MEAN]
        self.known[bad], self.uncertainty[bad] = False, np.inf

    def _refine(self) -> None:
        """Each map as a whole, then the frames between its keyframes."""
        for frames in self.maps if self.adjusting else []:
            for held, free in _parts(frames):
                self._adjust([*held, *free], free, 10)
                self._triangulate(np.concatenate([self.observed.of(frame)[0] for frame in free]), [*held, *free])
        keyframes = {frame for frames in self.maps for frame in frames}
        for frame in range(len(self.status)):
            points, marks = self._marks(frame)
            well = self.uncertainty[points] < _WELL
            if frame not in keyframes and self.status[frame] != "lost" and well.sum() >= _FEWEST:
                pose = refine_pose((self.rotations[frame], self.translations[frame]), marks, self.sigma, _GOOD)
                agree = pose_errors(pose, marks, self.sigma) < _GOOD**2
                if self._suffices(agree, well):
                    self.rotations[frame], self.translations[frame] = pose
                    self.status[frame] = "points"


def _parts(frames: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """What of the keyframes of a map is held, and what is adjusted, part after part; all at once where they are few."""
    last = max(0, len(frames) - _WHOLE)
    for start in (*range(0, last, _WHOLE // 2), last):
        yield frames[max(0, start - _FIXED) : start], frames[start : start + _WHOLE]
