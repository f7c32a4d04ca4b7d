"""How long tracks live: the estimator of Kaplan and Meier (Journal of the American Statistical Association, 1958).

A life is a time in which a track was seen in each frame. One that is found again begins another life: whether that is
the same point is a guess of the descriptor, and settings that guess more often must not look better for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from scfeat_core.replay.records import FrameRecord
from scfeat_core.types import Tracks


@dataclass(frozen=True, eq=False)
class Survival:
    """frames: (K,) int64, from 0 on. share: (K,), of the lives that last so many frames after their first, or longer.
    at_risk: (K,) int64, lives on which the last step to that share is founded. interval: seconds, the median time
    between two processed frames; NaN where there are not two.
    """

    frames: np.ndarray
    share: np.ndarray
    at_risk: np.ndarray
    interval: float

    @property
    def share_of_followed(self) -> np.ndarray:
        """(K,) the share among those of two frames or more; NaN where there are none."""
        if len(self.share) < 2 or self.share[1] == 0:
            return np.full(len(self.share), np.nan)
        return np.minimum(self.share / self.share[1], 1.0)

    @property
    def longest(self) -> int:
        """Frames up to which anything is known."""
        return len(self.frames) - 1

    @property
    def half_life(self) -> int | None:
        """Frames after which half of the lives of two frames or more are over; None where more of them go on."""
        gone = np.flatnonzero(self.share_of_followed <= 0.5)
        return int(self.frames[gone[0]]) if len(gone) else None

    def after(self, seconds: float) -> float | None:
        """Share of the lives of two frames or more that last so long; None where none was known for so long, unless all
        were over before."""
        if not self.interval > 0 or not len(self.frames):
            return None
        place = int(np.ceil(seconds / self.interval - 1e-6))
        share = self.share_of_followed
        place = min(place, len(share) - 1) if share[-1] == 0 else place
        return float(share[place]) if place < len(share) and np.isfinite(share[place]) else None


@dataclass(frozen=True, eq=False)
class Lives:
    """All lives of the tracks of a recording, (n,) each: the first and the last of the processed frames of one. count:
    of the processed frames."""

    first: np.ndarray
    last: np.ndarray
    count: int

    @property
    def ended(self) -> np.ndarray:
        """(n,) bool: those that the end of the recording does not cut off."""
        return self.last < self.count - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) frames."""
        return self.last - self.first + 1


def lives(frames: Iterable[FrameRecord]) -> Lives:
    """frames: the processed ones, each looked at once."""
    followed = Followed()
    for frame in frames:
        followed.add(frame.tracks)
    return followed.lives()


class Followed:
    """What is known of all lives so far. State: those that are over, in pieces, and those of the newest frame."""

    def __init__(self) -> None:
        self._over: list[tuple[np.ndarray, np.ndarray]] = []  # first, last
        self._epoch = 0
        self._ids, self._first = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._count = 0

    def add(self, tracks: Tracks | None) -> None:
        """Those of the next processed frame; None where it has none."""
        ids, epoch = (self._ids[:0], self._epoch) if tracks is None else (tracks.ids.astype(np.int64), tracks.epoch)
        before = self._ids if epoch == self._epoch else self._ids[:0]
        _, new, old = np.intersect1d(ids, before, assume_unique=True, return_indices=True)
        first = np.full(len(ids), self._count)
        first[new] = self._first[old]
        self._end(np.delete(self._first, old))
        self._ids, self._first, self._epoch = ids, first, epoch
        self._count += 1

    def lives(self) -> Lives:
        """To be asked for once, after the last frame."""
        self._end(self._first)
        first, last = (np.concatenate(columns) for columns in zip(*self._over, strict=True))
        return Lives(first, last, self._count)

    def _end(self, first: np.ndarray) -> None:
        """Of lives whose last frame is the newest one."""
        self._over.append((first, np.full(len(first), self._count - 1)))


def survival(found: Lives, interval: float) -> Survival:
    """How long tracks live; lives that the end of the recording cuts off count as long as they were known."""
    dead = found.ended
    durations = np.where(dead, found.lengths, found.lengths - 1)
    share, at_risk = kaplan_meier(durations, dead)
    return Survival(np.arange(len(share)), share, at_risk, interval)


def kaplan_meier(durations: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share (K,) that survives 0, 1, … steps, and how many (K,) int64 were at risk at each.

    durations: (n,) int64, at which step something ended, or until when it is known not to have. ended: (n,) bool.
    """
    steps = int(durations.max(initial=-1)) + 1
    deaths = np.bincount(durations[ended], minlength=steps)
    at_risk = np.bincount(durations, minlength=steps)[::-1].cumsum()[::-1]
    return np.cumprod(1 - deaths / np.maximum(at_risk, 1)), at_risk
