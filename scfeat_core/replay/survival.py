"""How long tracks live: the estimator of Kaplan and Meier (Journal of the American Statistical Association, 1958)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scfeat_core.replay.records import FrameRecord

_EPOCH = 32  # bits of an id below those of its epoch


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


def lives(frames: Sequence[FrameRecord]) -> Lives:
    """frames: the processed ones."""
    tracks = [frame.tracks for frame in frames]
    none = np.zeros(0, np.uint64)
    seen = np.concatenate([none, *(_keys(t.ids, t.epoch) for t in tracks if t is not None)])
    lost = np.concatenate([none, *(_keys(t.lost_ids, t.epoch) for t in tracks if t is not None)])
    place = np.repeat(np.arange(len(tracks)), [0 if t is None else len(t) for t in tracks])
    keys, first, inverse, counts = np.unique(seen, return_index=True, return_inverse=True, return_counts=True)
    last = np.zeros(len(keys), np.int64)
    np.maximum.at(last, inverse, place)
    # The ids of an epoch that is over are all gone, though nobody has said so.
    over = keys >> np.uint64(_EPOCH) < (keys >> np.uint64(_EPOCH)).max(initial=0)
    return Lives(place[first], last, counts, np.isin(keys, lost) | over, len(frames))


def _keys(ids: np.ndarray, epoch: int) -> np.ndarray:
    return ids.astype(np.uint64) + np.uint64(epoch << _EPOCH)


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
