"""Tracks that were found again, held against the true motion of the camera since they were last seen."""

from __future__ import annotations

import numpy as np

from scfeat_core.replay.records import FrameRecord, GroundTruth
from scfeat_core.replay.truth import Rays, motion, true_distance
from scfeat_core.types import Camera, TrackFlag, Tracks

_NONE = np.zeros(0, np.int64)
_NOWHERE = np.zeros((0, 2), np.float32)


class LastSeen:
    """Where all tracks that go on, or may come back, were last seen. State: their ids, stamps and points."""

    def __init__(self) -> None:
        self._epoch = 0
        self._ids, self._stamps, self._points = _NONE, _NONE, _NOWHERE

    def errors(self, frame: FrameRecord, camera: Camera | None, truth: GroundTruth | None) -> np.ndarray:
        """Pixels (K,) by which the tracks that this frame found again are off their true epipolar lines, of those that
        have one. frame: the next processed one."""
        tracks = frame.tracks
        if tracks is None:
            return np.zeros(0)
        stamps, before, after = self._next(tracks, frame.stamp)
        if camera is None or camera.size != frame.image_size:
            return np.zeros(0)
        found = [np.zeros(0)]
        for stamp in np.unique(stamps).tolist():
            at = stamps == stamp
            moved = motion(truth, stamp, frame.stamp)
            distance = true_distance(Rays.of(before[at], after[at], camera), moved)
            found.append(np.zeros(0) if distance is None else distance)
        return np.concatenate(found)

    def _next(self, tracks: Tracks, stamp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the tracks that are found again: when (M,) and where (M, 2) they were last seen, and where they are."""
        if tracks.epoch != self._epoch:  # ids begin again
            self._ids, self._stamps, self._points = _NONE, _NONE, _NOWHERE
        ids, lost = tracks.ids.astype(np.int64), tracks.lost_ids.astype(np.int64)
        _, new, old = np.intersect1d(ids, self._ids, assume_unique=True, return_indices=True)
        back = tracks.flags[new] & int(TrackFlag.REIDENTIFIED) != 0
        found = self._stamps[old[back]], self._points[old[back]], tracks.keypoints[new[back]]
        kept = ~np.isin(self._ids, np.concatenate((ids, lost)))
        self._epoch = tracks.epoch
        self._ids = np.concatenate((self._ids[kept], ids))
        self._stamps = np.concatenate((self._stamps[kept], np.full(len(ids), stamp)))
        self._points = np.concatenate((self._points[kept], tracks.keypoints))
        return found
