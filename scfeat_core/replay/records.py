"""One replayed sequence: what the front end said about each frame, as the node would have published it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scfeat_core.types import Camera, ImageQuality, PairResult, Tracks


@dataclass(frozen=True, eq=False)
class FrameRecord:
    """What is kept of one image: all that the node publishes, but for the descriptors.

    index: of the image message in its topic, from 0. stamp: nanoseconds, of its header. dropped: why there is no result
    ("decode", "stale", "error", as the node counts them), with ``error`` as its text; empty where there is one, and
    only then are the other fields filled. sequence: number of the processed frame, as ``FrameResult.sequence``.
    image_size: (width, height) pixels. keypoints: (N, 2) float32, pixels. scores: (N,) float32. pair: matches to the
    previous processed frame, ``pair.sequence0``. timings: stage -> milliseconds, "read" and "decode" among them.
    """

    index: int
    stamp: int
    dropped: str = ""
    error: str = ""
    sequence: int = -1
    image_size: tuple[int, int] = (0, 0)
    keypoints: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    pair: PairResult | None = None
    tracks: Tracks | None = None
    quality: ImageQuality | None = None
    reset_reason: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Poses of the camera.

    stamps: (P,) int64, nanoseconds, ascending. poses: (P, 4, 4) float64, T_world_camera, metres.
    source: where they are from, in words.
    """

    stamps: np.ndarray
    poses: np.ndarray
    source: str = ""


@dataclass(frozen=True, eq=False)
class Recording:
    """All frames of one replay. facts: what was replayed and how (bag, topic, method, settings, weights, versions,
    damage), as JSON takes it. camera: None where it is not calibrated. truth: None where there is none."""

    facts: Mapping[str, Any]
    frames: Sequence[FrameRecord]
    camera: Camera | None = None
    truth: GroundTruth | None = None

    @property
    def processed(self) -> list[FrameRecord]:
        """The frames that gave a result."""
        return [frame for frame in self.frames if not frame.dropped]
