"""The figures of a replay by their names: what they are called, in which unit, and whether more of them is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Number = int | float | str | None
Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Figure:
    """label: in tables. unit: "" where it is a number of something, "%" where the value is a share that is shown as
    per cent. better: empty where neither is. meaning: one line. digits: after the point, where it is shown."""

    label: str
    unit: str
    better: Better
    meaning: str
    digits: int = 0


# Of the summary. All of them are there in each summary, with None where one is not known.
FIGURES: dict[str, Figure] = {
    "frames": Figure("frames", "", "", "images of the topic"),
    "processed": Figure("processed", "", "higher", "images that gave a result"),
    "dropped": Figure("dropped", "", "lower", "images that gave none"),
    "dropped_decode": Figure("dropped: not decoded", "", "lower", "images that are damaged, or of an unknown encoding"),
    "dropped_stale": Figure("dropped: stale", "", "lower", "images that came late, or twice"),
    "dropped_error": Figure("dropped: error", "", "lower", "images that the front end could not use"),
    "damaged": Figure("damaged", "", "lower", "1 where not all of the recording could be read"),
    "lost_messages": Figure("lost messages", "", "lower", "images that were recorded and cannot be read"),
    "lost_bytes": Figure("lost bytes", "", "lower", "of the files of the recording that cannot be read"),
    "resets": Figure("resets", "", "lower", "how often all tracks ended as clock or image size changed"),
    "duration_s": Figure("duration", "s", "", "from the first stamp to the last", 1),
    "rate_hz": Figure("rate", "Hz", "", "images a second, by the median distance of their stamps", 1),
    "keypoints": Figure("keypoints", "", "", "of a frame, median"),
    "matches": Figure("matches", "", "higher", "to the frame before, median"),
    "inliers": Figure("inliers", "", "higher", "matches that the two-view geometry verified, median"),
    "inliers_p5": Figure("inliers, weakest 5 %", "", "higher", "5th percentile over the frames"),
    "inlier_ratio": Figure(
        "inlier ratio", "%", "higher", "share of the matches that were verified, 0 without matches, median", 1
    ),
    "inlier_ratio_p5": Figure("inlier ratio, weakest 5 %", "%", "higher", "5th percentile over the frames", 1),
    "weak_frames": Figure("weak frames", "", "lower", "frames with fewer than 30 inliers"),
    "homography_share": Figure("homographies", "%", "", "share of the frames verified by one: flat, or only turned", 1),
    "coverage": Figure("coverage", "%", "higher", "share of an 8 x 8 grid over the image with keypoints, median", 1),
    "flow_px": Figure("flow", "px", "", "how far the inliers moved since the frame before, median", 1),
    "tracks": Figure("tracks", "", "", "different points that were followed, in all"),
    "track_length": Figure("track length", "frames", "higher", "without a gap, mean of those that were seen twice", 1),
    "track_half_life": Figure(
        "half-life", "frames", "higher", "until half of the tracks seen twice have a gap, or end"
    ),
    "track_half_life_s": Figure("half-life in time", "s", "higher", "the same in seconds", 2),
    "alive_1s": Figure("alive after 1 s", "%", "higher", "share of the tracks seen twice that had no gap in it", 1),
    "reidentified": Figure("re-identified", "", "", "how often a track was found again after a gap, in all"),
    "reidentified_off_truth": Figure(
        "re-identified off by > 3 px", "%", "lower", "from the true epipolar line of where they were seen before", 1
    ),
    "epipolar_px": Figure("epipolar residual", "px", "lower", "of inliers to the verified model, median", 2),
    "transfer_px": Figure("transfer error", "px", "lower", "of inliers where the model is a homography, median", 2),
    "epipolar_truth_px": Figure("true epipolar error", "px", "lower", "of inliers under the true motion, median", 2),
    "off_truth": Figure("inliers off by > 3 px", "%", "lower", "from the true epipolar line, median over frames", 1),
    "repeatability": Figure("repeatability", "%", "higher", "at 3 px, with depth, or where it only turned, median", 1),
    "ate_m": Figure("ATE", "m", "lower", "RMSE of the positions of visual odometry, aligned by Sim(3)", 4),
    "ate_share": Figure("ATE / standing still", "%", "lower", "ATE over that of a camera that never moved", 1),
    "ate_frames": Figure("frames of the ATE", "", "", "that have a pose and a true one"),
    "rpe_m": Figure("RPE, translation", "m", "lower", "RMSE of the relative pose error", 4),
    "rpe_deg": Figure("RPE, rotation", "°", "lower", "RMSE of the relative pose error", 3),
    "lost": Figure("frames without a pose", "", "lower", "that the odometry could not place, after it began"),
    "initialisations": Figure("initialisations", "", "lower", "of the odometry; 1 where it was never lost"),
    "ms_total": Figure("all stages", "ms", "lower", "median of a frame that gave a result", 1),
    "ms_total_p95": Figure("all stages, slowest 5 %", "ms", "lower", "95th percentile of a frame", 1),
    "ms_network": Figure("network", "ms", "lower", "median of a frame", 1),
    "ms_overhead": Figure("overhead", "ms", "lower", "all but network, decoding and files of the run, median", 1),
    "fps": Figure(
        "speed", "frames/s", "higher", "of all stages, one after the other, but for the first frame, which prepares", 1
    ),
}
SUMMARY_NAMES: Sequence[str] = tuple(FIGURES)
TIMED = ("ms_", "fps")  # what the names of figures begin with that differ from run to run


def is_timed(name: str) -> bool:
    """Whether a figure depends on the machine, and differs between two equal runs."""
    return name.startswith(TIMED)


def shown(name: str, value: Number) -> str:
    """A value of the summary as text, without its unit; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, str) or name not in FIGURES:
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    figure = FIGURES[name]
    return f"{100 * value if figure.unit == '%' else value:,.{figure.digits}f}".replace(",", "\u202f")
