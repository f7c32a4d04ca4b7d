"""Points followed over frames: where they are expected next, and which of them are the same point.

``predict`` says where points should be, ``TrackManager`` gives them identities. Neither looks at pixels: a track goes
on through the matches that it is given, or, after a gap, through its descriptor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scfeat_core.geometry import project_rays
from scfeat_core.matching import match_nearby
from scfeat_core.types import Camera, Features, TrackFlag, Tracks

NEIGHBOURS = 5  # whose median motion stands for that of a point that was not seen to move
_MAX_KNOWN = 128  # moving points that are asked, a power of two; four times as many say the same
_AT_ONCE = 1024  # points whose distances to the known ones stay in the cache
_CELLS = 250  # about as many, of the rectangle around what is known to move, are asked for the motion of many points
_RELIABLE = 0.1  # of the features must be linked, or the links say nothing about the motion of the others
_MAX_WAITING = 1 << 15  # lost tracks that are kept, the last ones
_PLAUSIBLE = 0.02  # of the longer side of the image: how far from its prediction a lost point may come back
_IDS = 2**32  # as many as the messages can tell apart


# -- motion ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Motion:
    """How some points of a frame came there from the frame before.

    indices: (M,) int64, into the features of the frame. points: (M, 2) float32, pixels there. steps: (M, 2) float32,
    pixels since the frame before. own_steps: the part of it that the known rotation of the camera does not explain;
    None where that was not known. seconds: between the two frames.
    """

    indices: np.ndarray
    points: np.ndarray
    steps: np.ndarray
    own_steps: np.ndarray | None
    seconds: float


def predict(points: np.ndarray, motion: Motion | None, seconds: float, turned: np.ndarray | None) -> np.ndarray | None:
    """Where all points (N, 2) of a frame are expected ``seconds`` later, (N, 2) float32, pixels; None: no idea.

    Those that were seen to move go on as they did (constant velocity), the others as their neighbours. turned: (N, 2),
    where the known rotation of the camera alone takes the points (see :func:`turn`); None where it is not known. It
    replaces the part of the motion that came from the rotation before. Not finite where a point turns out of view.
    """
    steps = None if motion is None else motion.steps if turned is None else motion.own_steps
    start = points if turned is None else turned
    if motion is None or steps is None or len(steps) == 0:
        return turned
    moved = np.empty_like(points, np.float32)
    moved[motion.indices] = steps
    others = np.ones(len(points), bool)
    others[motion.indices] = False
    moved[others] = neighbours(points[others], motion.points, steps)
    return (start + moved * np.float32(seconds / motion.seconds)).astype(np.float32)


def neighbours(points: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The component-wise median (N, 2) float32 of the values (M, 2) of those known points (M, 2), M > 0, that are
    nearest to each of the points (N, 2)."""
    step = -(-len(known) // _MAX_KNOWN)
    known, values = known[::step].astype(np.float32, copy=False), values[::step].astype(np.float32, copy=False)
    points = points.astype(np.float32, copy=False)
    result = np.empty((len(points), 2), np.float32)
    for start in range(0, len(points), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        result[part] = _median(values[_nearest(points[part], known)])
    return result


def _nearest(points: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Indices (N, NEIGHBOURS or M) into the known points of those that are nearest, in no order."""
    count = min(NEIGHBOURS, len(known))
    table = points[:, None, 0] - known[:, 0]
    table *= table
    along_y = points[:, None, 1] - known[:, 1]
    along_y *= along_y
    table += along_y
    # Distances that are not negative are ordered as their bits are; the last ones make room for the index, so that the
    # quick partition of whole numbers does what takes an arg-partition four times as long.
    keys = table.view(np.int32)
    keys &= ~np.int32(_MAX_KNOWN - 1)
    keys |= np.arange(len(known), dtype=np.int32)
    keys.partition(count - 1, axis=1)
    return keys[:, :count] & (_MAX_KNOWN - 1)


def _median(values: np.ndarray) -> np.ndarray:
    """(N, 2) of (N, n, 2), the lower one of the two in the middle; five by comparing them, in a fifth of the time."""
    if values.shape[1] != 5:
        middle = (values.shape[1] - 1) // 2
        return np.partition(values, middle, axis=1)[:, middle]
    a, b, c, d, e = values.swapaxes(0, 1)
    # Neither the least of the lower ones of two pairs nor the greatest of the higher ones is the median.
    low = np.maximum(np.minimum(a, b), np.minimum(c, d))
    high = np.minimum(np.maximum(a, b), np.maximum(c, d))
    return np.maximum(np.minimum(low, high), np.minimum(np.maximum(low, high), e))


def turn(rays: np.ndarray, rotation: np.ndarray, camera: Camera) -> np.ndarray:
    """Pixels (N, 2) float32 to which a rotation alone takes points, not finite where that is out of view.

    rays: (N, 2), undistorted, z = 1. rotation: (3, 3), takes rays of the view before to rays of the view after.
    camera: of the view after.
    """
    turned = np.column_stack((rays, np.ones(len(rays)))) @ rotation.T
    ahead = turned[:, 2:] > 1e-3
    normalised = turned[:, :2] / np.where(ahead, turned[:, 2:], 1.0)
    return np.where(ahead, project_rays(normalised, camera), np.nan).astype(np.float32)


# -- identities --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class View:
    """What the tracker is to know of a frame.

    sequence: number of the frame, which grows by 1 with each. stamp: nanoseconds. features: numpy arrays. descriptors:
    (N, D) torch, those of the features, where they were computed. rays: (N, 2) undistorted, None without calibration.
    """

    sequence: int
    stamp: int
    features: Features
    descriptors: Tensor
    rays: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Links:
    """Which features of a frame are points of the frame before (number sequence0): (M,) indices, one to one."""

    sequence0: int
    indices0: np.ndarray
    indices1: np.ndarray


@dataclass(frozen=True, eq=False)
class _Flow:
    """The last motion that was reliable. points: (M, 2) pixels, rates: (M, 2) pixels a second, both float32."""

    points: np.ndarray
    rates: np.ndarray


@dataclass(frozen=True, eq=False)
class _Pool:
    """All tracks that have not ended. The first ``count`` are those of the newest frame, in the order of its features;
    the others are lost, and wait to be seen again, the last ones first.

    ids, ages, seen (number of the last frame), stamps (of it): (P,) int64. points: (P, 2) float32, pixels, where they
    are, or, if lost, are expected in the newest frame. rays: (P, 2) float32 of the last frame, NaN without calibration.
    descriptors: (P, D). sequence, stamp: of the newest frame.
    """

    sequence: int
    stamp: int
    count: int
    flow: _Flow | None
    ids: np.ndarray
    ages: np.ndarray
    seen: np.ndarray
    stamps: np.ndarray
    points: np.ndarray
    rays: np.ndarray
    descriptors: Tensor


@dataclass(frozen=True, eq=False)
class TracksState:
    """All that a TrackManager remembers. next_id: of the next new track. ended: (E,) int64, ids still to be told."""

    next_id: int
    epoch: int
    ended: np.ndarray
    pool: _Pool | None


class TrackManager:
    """The tracks of one camera. Every feature belongs to one: that of the point it continues, or a new one.

    Ids begin at 1 and are never given twice, not even after a reset. Where they would exceed 32 bits (79 hours at 500
    new tracks a frame and 30 Hz), all tracks end, ids begin again and ``Tracks.epoch`` grows.
    """

    def __init__(self, state: TracksState | None = None, device: torch.device | str = "cpu") -> None:
        """state: of another one, to go on from there; with descriptors of any kind, which go to the device."""
        state = TracksState(1, 0, np.zeros(0, np.int64), None) if state is None else state
        self._next = state.next_id
        self._epoch = state.epoch
        self._pool = None if state.pool is None else _on_device(state.pool, device)
        self._ended = state.ended  # tracks that a reset has ended, for the next frame to say so

    def state(self) -> TracksState:
        """All that it remembers now; not changed by what comes."""
        return TracksState(self._next, self._epoch, self._ended, self._pool)

    def reset(self) -> None:
        """All tracks end; the next frame says so."""
        if self._pool is not None:
            self._ended = np.concatenate((self._ended, self._pool.ids))
            self._pool = None

    def update(self, view: View, links: Links | None, *, max_gap: int, min_cosine: float) -> Tracks:
        """The tracks of the next frame.

        links: from the frame before; None where it has none. Tracks that they do not continue are lost, and come back
        where a feature that is new otherwise is their mutual nearest neighbour by descriptor, with a cosine similarity
        of min_cosine or more, near to where the motion around them has taken them (2 % of the longer side), after at
        most max_gap frames without them. After those, they end.
        """
        self._reserve(len(view.features))
        pool = _nothing(view) if self._pool is None else self._pool
        linked, pool = _follow(pool, view, links)
        rows = _reidentify(pool, view, linked, max_gap, min_cosine)
        grown = _grow(pool, view, rows, self._next)
        waiting, ended = _divide(pool, view, rows, max_gap)
        tracks = _tracks(pool, grown, view, linked, rows, np.concatenate((self._ended, ended)), self._epoch)
        self._pool = _joined(grown, pool, waiting)
        self._next += int((rows < 0).sum())
        self._ended = np.zeros(0, np.int64)
        return tracks

    def _reserve(self, count: int) -> None:
        """Begin anew where there are not enough ids left for so many tracks."""
        if self._next + count > _IDS:
            self._next, self._epoch, self._pool, self._ended = 1, self._epoch + 1, None, np.zeros(0, np.int64)


def _on_device(pool: _Pool, device: torch.device | str) -> _Pool:
    return replace(pool, descriptors=torch.as_tensor(pool.descriptors).to(device))


def _nothing(view: View) -> _Pool:
    none = np.zeros(0, np.int64)
    points = np.zeros((0, 2), np.float32)
    return _Pool(-1, view.stamp, 0, None, none, none, none, none, points, points, view.descriptors[:0])


def _follow(pool: _Pool, view: View, links: Links | None) -> tuple[np.ndarray, _Pool]:
    """Which row of the pool each feature continues, (N,) int64, -1 for none; the pool with its lost points moved on."""
    rows = np.full(len(view.features), -1)
    flow = pool.flow
    if links is not None and links.sequence0 == pool.sequence:
        rows[links.indices1] = links.indices0
        flow = _flow(pool, view, links) or flow
    points = pool.points.copy()
    if flow is not None:
        left = np.ones(len(points), bool)
        left[rows[rows >= 0]] = False
        seconds = np.float32(1e-9 * (view.stamp - pool.stamp))
        points[left] += seconds * _rates(points[left], flow)
    return rows, replace(pool, points=points, flow=flow)


def _rates(points: np.ndarray, flow: _Flow) -> np.ndarray:
    """(N, 2) float32, of the neighbours in the flow of each point, or, of many points, of the middle of its cell.

    Cells are smaller than the neighbourhoods, and beyond the flow it is that of its border.
    """
    low, extent = flow.points.min(0), np.ptp(flow.points, axis=0)
    side = max(float(np.sqrt(extent.prod() / _CELLS)), float(extent.max()) / _CELLS, 1.0)
    width, height = (extent // side + 1).astype(np.int64).tolist()
    if len(points) <= width * height:
        return neighbours(points, flow.points, flow.rates)
    y, x = np.indices((height, width), np.float32)
    middles = low + np.float32(side) * (np.stack((x, y), -1).reshape(-1, 2) + np.float32(0.5))
    column, row = (
        np.fmax(np.fmin((points[:, axis] - low[axis]) / np.float32(side), count - 1), 0).astype(np.int64)
        for axis, count in enumerate((width, height))
    )
    return neighbours(middles, flow.points, flow.rates).take(row * width + column, 0)


def _flow(pool: _Pool, view: View, links: Links) -> _Flow | None:
    """What the links say; None where they are too few: those of a dark or a blurred frame are not to be believed."""
    if len(links.indices0) < max(NEIGHBOURS, _RELIABLE * min(pool.count, len(view.features))):
        return None
    before = pool.points[links.indices0]
    seconds = np.float32(1e-9 * (view.stamp - pool.stamp))
    return _Flow(before, (view.features.keypoints[links.indices1] - before) / seconds)


def _reidentify(pool: _Pool, view: View, linked: np.ndarray, max_gap: int, min_cosine: float) -> np.ndarray:
    """``linked`` with the rows of lost tracks at the features that bring them back.

    What was there in the frame before is left out: it was not matched, or not consistent with the others, and its
    descriptor alone is no reason to believe it.
    """
    missed = view.sequence - pool.seen - 1
    lost = np.flatnonzero((missed > 0) & (missed <= max_gap))
    free = np.flatnonzero(linked < 0)
    if len(lost) == 0 or len(free) == 0:
        return linked
    matches = match_nearby(
        pool.descriptors,
        view.descriptors,
        _only(pool.points, lost),
        _only(view.features.keypoints, free),
        _PLAUSIBLE * max(view.features.image_size),
        min_cosine=min_cosine,
    )
    rows = linked.copy()
    rows[matches.indices1] = matches.indices0
    return rows


def _only(points: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The points (N, 2) with NaN in the place of all but the chosen ones, which match nothing."""
    result = np.full_like(points, np.nan)
    result[chosen] = points[chosen]
    return result


def _grow(pool: _Pool, view: View, rows: np.ndarray, next_id: int) -> _Pool:
    """The tracks of this frame's features as a pool."""
    count, known = len(rows), rows >= 0
    ids, ages = np.zeros(count, np.int64), np.ones(count, np.int64)
    ids[known], ids[~known] = pool.ids[rows[known]], np.arange(next_id, next_id + int((~known).sum()))
    ages[known] += pool.ages[rows[known]]
    rays = np.full((count, 2), np.nan, np.float32) if view.rays is None else view.rays.astype(np.float32)
    seen, stamps = np.full(count, view.sequence), np.full(count, view.stamp)
    points = view.features.keypoints
    return _Pool(view.sequence, view.stamp, count, pool.flow, ids, ages, seen, stamps, points, rays, view.descriptors)


def _divide(pool: _Pool, view: View, rows: np.ndarray, max_gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pool that wait to be seen again, and the ids of those that do not."""
    lost = np.ones(len(pool.ids), bool)
    lost[rows[rows >= 0]] = False
    waiting = np.flatnonzero(lost & (view.sequence - pool.seen <= max_gap))[:_MAX_WAITING]
    lost[waiting] = False
    return waiting, pool.ids[lost]


def _joined(grown: _Pool, pool: _Pool, waiting: np.ndarray) -> _Pool:
    arrays: dict[str, Any] = {
        name: np.concatenate((getattr(grown, name), getattr(pool, name)[waiting]))
        for name in ("ids", "ages", "seen", "stamps", "points", "rays")
    }
    return replace(grown, descriptors=_with_rows(grown.descriptors, pool.descriptors, waiting), **arrays)


def _with_rows(first: Tensor, second: Tensor, rows: np.ndarray) -> Tensor:
    """(N + n, D): the former, then rows (n,) of the latter; by numpy on a CPU, which wakes no other thread up."""
    if first.device.type == "cpu":
        return torch.from_numpy(np.concatenate((first.numpy(), second.numpy().take(rows, 0))))
    return torch.cat((first, second[torch.from_numpy(rows).to(second.device)]))


def _tracks(
    pool: _Pool, grown: _Pool, view: View, linked: np.ndarray, rows: np.ndarray, ended: np.ndarray, epoch: int
) -> Tracks:
    flags = np.where(rows < 0, int(TrackFlag.NEW), np.where(linked < 0, int(TrackFlag.REIDENTIFIED), 0))
    order = grown.ids.argsort()
    return Tracks(
        ids=grown.ids[order].astype(np.uint32),
        ages=grown.ages[order].astype(np.uint32),
        indices=order,
        keypoints=grown.points[order],
        rays=None if view.rays is None else grown.rays[order],
        velocities=None if view.rays is None or len(pool.ids) == 0 else _velocities(pool, grown, rows)[order],
        flags=flags[order].astype(np.uint8),
        lost_ids=ended.astype(np.uint32),
        epoch=epoch,
    )


def _velocities(pool: _Pool, grown: _Pool, rows: np.ndarray) -> np.ndarray:
    """(N, 2) float32, of the rays since the track was last seen; 0 where it is new or a ray is not known."""
    known = rows >= 0
    result = np.zeros((len(rows), 2), np.float32)
    seconds = 1e-9 * (grown.stamps[known] - pool.stamps[rows[known]])
    moved = (grown.rays[known] - pool.rays[rows[known]]) / seconds[:, None]
    result[known] = np.where(np.isfinite(moved).all(1, keepdims=True), moved, 0)
    return result
