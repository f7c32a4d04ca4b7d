"""How long tracks live: the estimator of Kaplan and Meier (Journal of the American Statistical Association, 1958)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from scfeat_core.replay.records import FrameRecord
from scfeat_core.types import Tracks


@dataclass(frozen=True, eq=False)
class Survival:
    """frames: (K,) int64, from 0 on. share: (K,), of the tracks that were seen again so many frames after their first,
    or later. at_risk: (K,) int64, tracks on which the last step to that share is founded. interval: seconds, the median
    time between two processed frames; NaN where there are not two.
    """

    frames: np.ndarray
    share: np.ndarray
    at_risk: np.ndarray
    interval: float

    @property
    def share_of_followed(self) -> np.ndarray:
        """(K,) the share among those that were seen at least twice; NaN where there are none."""
        if len(self.share) < 2 or self.share[1] == 0:
            return np.full(len(self.share), np.nan)
        return np.minimum(self.share / self.share[1], 1.0)

    @property
    def half_life(self) -> int | None:
        """Frames after which half of the tracks that were seen twice are gone; None where more of them are left."""
        gone = np.flatnonzero(self.share_of_followed <= 0.5)
        return int(self.frames[gone[0]]) if len(gone) else None

    def after(self, seconds: float) -> float | None:
        """Share of the tracks seen twice that live so long; None where no track was known for so long."""
        if not self.interval > 0 or not len(self.frames):
            return None
        place = int(np.ceil(seconds / self.interval - 1e-6))
        share = self.share_of_followed
        return float(share[place]) if place < len(share) and np.isfinite(share[place]) else None


@dataclass(frozen=True, eq=False)
class Lives:
    """All tracks of a recording, (n,) each: in which processed frame they were first and last seen, in how many they
    were seen, and whether they are known to have ended. count: of the processed frames."""

    first: np.ndarray
    last: np.ndarray
    observations: np.ndarray
    ended: np.ndarray
    count: int


def lives(frames: Iterable[FrameRecord]) -> Lives:
    """frames: the processed ones, each looked at once."""
    followed = Followed()
    for frame in frames:
        followed.add(frame.tracks)
    return followed.lives()


class Followed:
    """What is known of all tracks so far. State: a register for each epoch, and the number of processed frames."""

    def __init__(self) -> None:
        self._epochs: dict[int, _Register] = {}
        self._count = 0

    def add(self, tracks: Tracks | None) -> None:
        """Those of the next processed frame; None where it has none."""
        if tracks is not None:
            self._epochs.setdefault(tracks.epoch, _Register()).add(self._count, tracks)
        self._count += 1

    def lives(self) -> Lives:
        """To be asked for once, after the last frame."""
        registers = [self._epochs[epoch] for epoch in sorted(self._epochs)] or [_Register()]
        for register in registers[:-1]:  # an epoch that is over has no tracks, though nobody has said so
            register.ended[:] = True
        seen = [register.observations > 0 for register in registers]
        columns = {
            name: np.concatenate(
                [getattr(register, name)[rows] for register, rows in zip(registers, seen, strict=True)]
            )
            for name in ("first", "last", "observations", "ended")
        }
        return Lives(**columns, count=self._count)


class _Register:
    """What is known of the tracks of an epoch so far, by their ids, which are given in turn: the first one is low."""

    def __init__(self) -> None:
        self.low = 0
        self.first, self.last, self.observations = (np.zeros(0, np.int64) for _ in range(3))
        self.ended = np.zeros(0, bool)

    def add(self, place: int, tracks: Tracks) -> None:
        ids, lost = tracks.ids.astype(np.int64), tracks.lost_ids.astype(np.int64)
        if len(ids):
            self._reserve(int(ids.min()), int(ids.max()) + 1)
        rows = ids - self.low
        self.first[rows] = np.where(self.observations[rows] == 0, place, self.first[rows])
        self.last[rows] = place
        self.observations[rows] += 1
        self.ended[lost[(lost >= self.low) & (lost < self.low + len(self.ended))] - self.low] = True

    def _reserve(self, low: int, high: int) -> None:
        """Room for these ids; twice what is needed, as they grow."""
        size = len(self.first)
        low = low if size == 0 else min(low, self.low)
        if size and low == self.low and high <= low + size:
            return
        room = 2 * max(high - low, size)
        for name in ("first", "last", "observations", "ended"):
            old = getattr(self, name)
            new = np.zeros(room, old.dtype)
            new[self.low - low if size else 0 :][:size] = old
            setattr(self, name, new)
        self.low = low


def survival(found: Lives, interval: float) -> Survival:
    """How long these tracks live; those that the end of the recording cuts off count as long as they were known.

    A track that is not seen may come back. So only what was before the last sight of the first track of which it is
    open whether it will is counted: up to there all fates are known.
    """
    horizon = int(found.last[~found.ended].min(initial=max(found.count - 1, 0)))
    known = found.first <= horizon
    dead = (found.last < horizon)[known]
    first, last = found.first[known], found.last[known]
    share, at_risk = kaplan_meier(np.where(dead, last - first + 1, horizon - first), dead)
    return Survival(np.arange(len(share)), share, at_risk, interval)


def kaplan_meier(durations: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share (K,) that survives 0, 1, … steps, and how many (K,) int64 were at risk at each.

    durations: (n,) int64, at which step something ended, or until when it is known not to have. ended: (n,) bool.
    """
    steps = int(durations.max(initial=-1)) + 1
    deaths = np.bincount(durations[ended], minlength=steps)
    at_risk = np.bincount(durations, minlength=steps)[::-1].cumsum()[::-1]
    return np.cumprod(1 - deaths / np.maximum(at_risk, 1)), at_risk
