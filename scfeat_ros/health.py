"""How the node is doing: FrontendStatus, and log lines that repeat without flooding."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scfeat.msg import FrontendStatus
from std_msgs.msg import Header

from scfeat_core.quality import coverage
from scfeat_core.types import FrameResult, ImageQuality

from .worker import Counts

_STATUS_FIELDS = frozenset(FrontendStatus.get_fields_and_field_types())


@dataclass(frozen=True)
class FrameHealth:
    """Times (milliseconds, NaN = not run) and quality of one frame, named as in FrontendStatus.

    Only in the diagnostics: quality, of the image, None where it was not assessed; masked, the share of the image that
    the mask hides, NaN without one; ignored, why a mask or a calibration that is there was not used.
    """

    header: Header
    ms_queue: float = math.nan
    ms_decode: float = math.nan
    ms_preprocess: float = math.nan
    ms_network: float = math.nan
    ms_match: float = math.nan
    ms_publish: float = math.nan
    ms_total: float = math.nan
    age_ms: float = math.nan
    keypoints: int = 0
    matches: int = 0
    inliers: int = 0
    tracks: int = 0
    median_track_age: float = math.nan
    inlier_ratio: float = math.nan
    coverage: float = 0.0
    device: str = ""
    precision: str = ""
    descriptor_space: str = ""
    quality: ImageQuality | None = None
    masked: float = math.nan
    ignored: tuple[str, ...] = ()


def frame_health(header: Header, result: FrameResult, **measured: Any) -> FrameHealth:
    """header: of the image. measured: what the result does not know (queue, decode, publish, device, masked, …)."""
    geometry = result.pair.geometry if result.pair else None
    matches = len(result.pair.matches) if result.pair else 0
    ages = result.tracks.ages if result.tracks else ()
    timings = result.timings
    return FrameHealth(
        header,
        ms_preprocess=_total(timings, "preprocess", "assess"),
        ms_network=_total(timings, "network", "select"),
        ms_match=_total(timings, "match", "verify", "track"),
        keypoints=len(result.features),
        matches=matches,
        inliers=geometry.num_inliers if geometry else 0,
        tracks=len(ages),
        median_track_age=float(np.median(ages)) if len(ages) else math.nan,
        inlier_ratio=geometry.num_inliers / matches if geometry and matches else math.nan,
        coverage=coverage(result.features.keypoints, result.features.image_size),
        descriptor_space=result.features.descriptor_space,
        quality=result.quality,
        **measured,
    )


def status_to_message(camera: str, counts: Counts, frame: FrameHealth | None, last_error: str) -> FrontendStatus:
    """frame: the newest processed one, None before the first. The reasons in ``counts`` are X of dropped_X."""
    message = FrontendStatus(camera=camera, received=counts.received, processed=counts.processed, last_error=last_error)
    for reason, count in counts.dropped.items():
        setattr(message, f"dropped_{reason}", count)
    for name, value in vars(frame or FrameHealth(Header())).items():
        if name in _STATUS_FIELDS:
            setattr(message, name, value)
    return message


def _total(timings: dict[str, float], *stages: str) -> float:
    """Sum of the stages that ran; NaN where none did."""
    ran = [timings[stage] for stage in stages if stage in timings]
    return sum(ran) if ran else math.nan


class CoreLog(logging.Handler):
    """What scfeat_core says with ``logging`` (engines that are made, which takes minutes), in the log of a node.

    logger: of rclpy. From ``start`` on, until ``stop``; both may be called again. The level of the core's logger is
    INFO meanwhile.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._to = logger
        self._from = logging.getLogger("scfeat_core")
        self._level: int | None = None  # before

    def start(self) -> None:
        if self._level is None:
            self._level = self._from.level
            self._from.setLevel(logging.INFO)
            self._from.addHandler(self)

    def stop(self) -> None:
        if self._level is not None:
            self._from.removeHandler(self)
            self._from.setLevel(self._level)
            self._level = None

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.ERROR:  # rclpy takes one level for each line of code
            self._to.error(text)
        elif record.levelno >= logging.WARNING:
            self._to.warning(text)
        else:
            self._to.info(text)


class Repeats:
    """Lets the same line through at once, then at most every ``period`` seconds with the number of those held back.

    Lines are the same where their kind is, or without one their text.

    Not for use by several threads.
    """

    def __init__(self, period: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._period = period
        self._clock = clock
        self._lines: dict[str, tuple[float, int]] = {}  # when it was last let through, how often held back since

    def line(self, text: str, kind: str | None = None) -> str | None:
        """The text to log now, or None."""
        now = self._clock()
        key = text if kind is None else kind
        shown, held = self._lines.get(key, (-math.inf, 0))
        if now - shown < self._period:
            self._lines[key] = shown, held + 1
            return None
        if len(self._lines) >= 100:  # texts with changing numbers must not pile up
            self._lines.clear()
        self._lines[key] = now, 0
        return f"{text} [{held} more times in the last {now - shown:.0f} s]" if held else text
