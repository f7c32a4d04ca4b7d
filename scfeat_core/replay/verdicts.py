"""What an engineer reads out of the figures of a replay: what is good enough, what is not, which frames are weak.

The limits are those of the node's diagnostics (scfeat_ros.diagnostics.Limits) where it has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scfeat_core.quality import BLURRED
from scfeat_core.replay.figures import shown
from scfeat_core.replay.metrics import NO_TRUTH, WEAK_INLIERS, Metrics
from scfeat_core.replay.records import FrameRecord
from scfeat_core.types import GeometryModel

Level = Literal["good", "watch", "poor", ""]
LEVELS: Mapping[str, str] = {
    "good": "Good on this recording",
    "watch": "Usable on this recording, with weak spots",
    "poor": "Not good enough on this recording",
    "": "Nothing could be judged",
}

# Each with its reason. Above the first a figure is good, above the second it is to be watched.
RATIO = (0.3, 0.15)  # below, RANSAC finds models by chance, or the front end does not believe the model
COVERAGE = (0.5, 0.25)  # points in half of the image; points in one quarter leave rotation and translation ambiguous
HALF_LIFE = (4, 2)  # frames in a row: three pass the scale on, a fourth checks it; what only two-view geometry can use
WRONG = (0.25, 0.5)  # of the re-identified tracks: what robust estimation forgives; as many wrong ones as right ones
TRUSTED = 0.05  # share of the inliers that are off: with more, the ground truth is
KEPT = (1.0, 0.95)  # share of the images that gave a result
BEGIN = 10  # frames: with fewer, an odometry that has not begun may have had no time to
PATH = (0.1, 0.5)  # ATE over that of a camera that stands still: with half of it, the path has little of the true one
LOST = (0.0, 0.01)  # share of the frames without a pose: with more, the path is that of a part
WEAK = (0.0, 0.01)  # share of frames with too few inliers for a pose: each can break a trajectory
KEYPOINTS = 50  # five-point RANSAC needs about 15 inliers, and a third of the points are matched
DARK, ENDS = 0.06, 1 / 3  # mean brightness; share of the pixels that are black or saturated
_FAST = 3.0  # times the median flow
_LATE = 1.5  # times the median distance of stamps
_APART = 5  # frames between two of the weakest: a bad stretch is shown once


@dataclass(frozen=True)
class Verdict:
    """value: with its unit. level: empty where a figure is shown and not judged. why: what it is held against. machine:
    it is about the machine that replayed, and not about the front end on this recording."""

    name: str
    value: str
    level: Level
    why: str
    machine: bool = False


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def verdicts(metrics: Metrics, facts: Mapping[str, Any] | None = None) -> list[Verdict]:
    """What is known, the most important first. facts: of the recording, by which an interrupted replay is told."""
    return [*_frames(metrics, facts or {}), *(verdict for judge in _JUDGES for verdict in judge(metrics))]


def overall(found: Sequence[Verdict]) -> Level:
    """The worst level of all that are not about the machine."""
    levels = {verdict.level for verdict in found if not verdict.machine}
    return next((level for level in ("poor", "watch", "good") if level in levels), "")


def headline(found: Sequence[Verdict], *remarks: str) -> str:
    """What they all come to, in words. remarks: of :func:`interruption` and :func:`damage`; empty ones are left out."""
    slow = any(verdict.machine and verdict.level == "watch" for verdict in found)
    notes = ["slower than the camera on this machine"] if slow else []
    return "; ".join([LEVELS[overall(found)], *notes, *filter(None, remarks)])


def interruption(metrics: Metrics, facts: Mapping[str, Any]) -> str:
    """After how many images a replay was stopped, in words; empty where it was not. facts: of its recording."""
    return f"interrupted after {done(metrics, facts)}" if facts.get("interrupted") else ""


def damage(metrics: Metrics) -> str:
    """What of the recording could not be read, in words; empty where nothing is known to be lost."""
    if not metrics.summary.get("damaged"):
        return ""
    lost = _number(metrics, "lost_messages")
    return f"the recording is damaged, {'an unknown number of' if lost is None else f'{lost:.0f}'} images are lost"


def done(metrics: Metrics, facts: Mapping[str, Any]) -> str:
    """How many images there are, and, where not all of them were looked at and their number is known, of how many."""
    frames, wanted = metrics.summary["frames"], _wanted(facts)
    return f"{frames} of {wanted} images" if facts.get("interrupted") and wanted else f"{frames} images"


def _wanted(facts: Mapping[str, Any]) -> int | None:
    """How many images a replay would have looked at; None where that is not known, as with a start or a stop."""
    count, window = facts.get("messages"), facts.get("window") or {}
    if not count or window.get("start") or window.get("stop") is not None:
        return None
    return min(int(count), int(window.get("frames") or count))


def _level(value: float, limits: tuple[float, float]) -> Level:
    """limits: falling where more is better, rising where less is."""
    good, least = limits if limits[0] > limits[1] else (-limits[0], -limits[1])
    value = value if limits[0] > limits[1] else -value
    return "good" if value >= good else "watch" if value >= least else "poor"


def _number(metrics: Metrics, name: str) -> float | None:
    value = metrics.summary.get(name)
    return None if value is None or isinstance(value, str) else float(value)


def _frames(metrics: Metrics, facts: Mapping[str, Any]) -> Iterator[Verdict]:
    frames, processed = _number(metrics, "frames"), _number(metrics, "processed")
    level: Level
    if not frames:
        yield Verdict("Images", "none", "poor", "there was nothing to process")
        return
    kept = (processed or 0) / frames
    lost = "all gave a result" if kept == 1 else "what was lost is listed below"
    lost += f"; {damage(metrics)}" if damage(metrics) else ""
    if damage(metrics) and not facts.get("interrupted"):
        level = "watch" if kept >= KEPT[1] else "poor"  # as much as can be told of those that can be read
        yield Verdict("Images processed", f"{processed:.0f} of {frames:.0f} that can be read", level, lost)
        return
    if not facts.get("interrupted"):
        yield Verdict("Images processed", f"{processed:.0f} of {frames:.0f}", _level(kept, KEPT), lost)
        return
    level = "" if kept == 1 else _level(kept, KEPT)
    wanted = _wanted(facts)
    value = f"{processed:.0f}{f' of {wanted}' if wanted else ''} (interrupted)"
    yield Verdict("Images processed", value, level, f"of the first {frames:.0f}, which all figures are of, {lost}")


def _weak(metrics: Metrics) -> Iterator[Verdict]:
    weak, count = _number(metrics, "weak_frames"), metrics.distributions["inliers"]["count"]
    if weak is not None and count:
        why = f"fewer than {WEAK_INLIERS} inliers: a pose hangs on single points"
        yield Verdict("Weak frames", f"{weak:.0f} of {count:.0f}", _level(weak / count, WEAK), why)


def _ratio(metrics: Metrics) -> Iterator[Verdict]:
    median, weakest = _number(metrics, "inlier_ratio"), _number(metrics, "inlier_ratio_p5")
    if median is not None and weakest is not None:
        why = (
            f"good where even the weakest 5 % of the frames have {percent(RATIO[0])}: below, models are found by chance"
        )
        yield Verdict(
            "Inlier ratio", f"{percent(median)}, weakest 5 %: {percent(weakest)}", _level(weakest, RATIO), why
        )


def _coverage(metrics: Metrics) -> Iterator[Verdict]:
    if (value := _number(metrics, "coverage")) is not None:
        why = f"of the image, by keypoints; below {percent(COVERAGE[1])} rotation and translation look alike"
        yield Verdict("Coverage", f"{percent(value)}", _level(value, COVERAGE), why)


def _half_life(metrics: Metrics) -> Iterator[Verdict]:
    if _number(metrics, "track_length") is None:
        return
    half_life, longest = metrics.survival.half_life, metrics.survival.longest
    seconds = metrics.survival.interval
    value = f"> {longest} frames" if half_life is None else f"{half_life} frames ({half_life * seconds:.2f} s)"
    level: Level = "" if half_life is None and longest < HALF_LIFE[0] else _level(half_life or longest, HALF_LIFE)
    why = f"half of the tracks seen twice are seen in as many frames in a row; good from {HALF_LIFE[0]}"
    yield Verdict("Half-life of tracks", value, level, why)


def _odometry(metrics: Metrics) -> Iterator[Verdict]:
    lost, begun = _number(metrics, "lost"), _number(metrics, "initialisations")
    if lost is None or begun is None:
        return
    processed = _number(metrics, "processed") or 1.0
    if begun == 0 and processed < BEGIN:
        why = f"{processed:.0f} frames are too few to say so: it begins where points have moved against each other"
        yield Verdict("Visual odometry", "not begun", "", why)
        return
    level: Level = "poor" if begun != 1 else _level(lost / processed, LOST)
    value = "never began" if begun == 0 else "began once" if begun == 1 else f"began {begun:.0f} times"
    value = "never lost" if begun == 1 and not lost else value
    value += f", {lost:.0f} of {processed:.0f} frames without a pose" if lost else ""
    yield Verdict("Visual odometry", value, level, "good where it begins once and goes on to the end")


def _trajectory(metrics: Metrics) -> Iterator[Verdict]:
    if (ate := _number(metrics, "ate_m")) is not None:
        turn, share = _number(metrics, "rpe_deg"), _number(metrics, "ate_share")
        value = f"{shown('ate_m', ate)} m" + ("" if share is None else f", {percent(share)} of standing still")
        why = f"RMSE of the positions of {metrics.summary.get('ate_frames')} frames after Sim(3) alignment; "
        why += f"RPE {turn:.2g}°" if turn is not None else f"no RPE: {metrics.missing.get('rpe_deg', 'not known')}"
        why += f"; good up to {percent(PATH[0])} of what a camera that never moved would score"
        yield Verdict("Trajectory error (ATE)", value, "" if share is None else _level(share, PATH), why)
    elif (reason := metrics.missing.get("ate_m", NO_TRUTH)) != NO_TRUTH:
        yield Verdict("Trajectory error (ATE)", "–", "", reason)


def _truth(metrics: Metrics) -> Iterator[Verdict]:
    if (error := _number(metrics, "epipolar_truth_px")) is not None:
        off = _number(metrics, "off_truth") or 0.0
        why = f"of inliers under the true motion, errors of the truth included; {100 * off:.1f} % are off by > 3 px"
        yield Verdict("True epipolar error", f"{error:.2f} px", "", why)
    if (wrong := _number(metrics, "reidentified_off_truth")) is not None:
        found = f"{shown('reidentified', metrics.summary['reidentified'])}, {percent(wrong)} off by > 3 px"
        inliers = _number(metrics, "off_truth")
        level: Level = _level(wrong, WRONG) if inliers is not None and inliers <= TRUSTED else ""
        why = f"from the true epipolar line of where they were last seen; good up to {percent(WRONG[0])}"
        why += "" if level else ", where the truth is exact enough for the inliers"
        yield Verdict("Re-identified tracks", found, level, why)
    if (repeated := _number(metrics, "repeatability")) is not None:
        count = metrics.distributions["repeatability"]["count"]
        why = f"at 3 px, of {count:.0f} frames where depth is known or the camera only turned"
        yield Verdict("Repeatability", f"{percent(repeated)}", "", why)


def _speed(metrics: Metrics) -> Iterator[Verdict]:
    time, slow, rate = (_number(metrics, name) for name in ("ms_total", "ms_total_p95", "rate_hz"))
    if time is None or slow is None or not rate:
        return
    interval = 1000 / rate
    level: Level = "good" if slow <= interval else "watch"
    missed = max(0.0, 1 - interval / time)
    why = f"the camera gives {interval:.0f} ms a frame; on this machine " + (
        "the node keeps up" if level == "good" else f"the node would skip about {percent(missed)} of them"
    )
    yield Verdict("Time a frame", f"{time:.0f} ms, slowest 5 %: {slow:.0f} ms", level, why, machine=True)


_JUDGES = (_odometry, _trajectory, _weak, _ratio, _half_life, _coverage, _truth, _speed)


# -- the weakest frames ------------------------------------------------------------------------------------------------


def weakest(metrics: Metrics, count: int = 4) -> list[int]:
    """Places, among all records, of the frames with the lowest inlier ratio, apart from each other, weakest first."""
    ratio = metrics.per_frame["inlier_ratio"]
    ratio = np.where(metrics.per_frame["matches"] == 0, 0.0, ratio)
    order = np.argsort(np.where(np.isfinite(ratio), ratio, np.inf), kind="stable")
    chosen: list[int] = []
    for place in order[: int(np.isfinite(ratio).sum())].tolist():
        if len(chosen) < count and all(abs(place - other) >= _APART for other in chosen):
            chosen.append(place)
    return chosen


def reasons(metrics: Metrics, place: int, frame: FrameRecord, before: FrameRecord) -> list[str]:
    """What is known to make a frame weak, or the one before it. place: of the frame among all records."""
    found = [*_image_reasons(frame), *(f"the frame before: {reason}" for reason in _image_reasons(before))]
    found += _motion_reasons(metrics, place)
    if frame.reset_reason:
        found.append(f"all tracks ended: {frame.reset_reason}")
    if len(frame.keypoints) < KEYPOINTS:
        found.append(f"only {len(frame.keypoints)} keypoints")
    elif metrics.per_frame["coverage"][place] < COVERAGE[1]:
        found.append(f"keypoints cover {percent(metrics.per_frame['coverage'][place])} of the image")
    if frame.pair is not None and frame.pair.geometry is not None and frame.pair.geometry.model == GeometryModel.NONE:
        found.append("no two-view model was found")
    return found


def _image_reasons(frame: FrameRecord) -> Iterator[str]:
    quality = frame.quality
    if quality is None:
        return
    if quality.sharpness < BLURRED:
        yield f"blurred: sharpness {quality.sharpness:.2f}, a sharp image has more than {BLURRED}"
    if quality.mean < DARK:
        yield f"dark: mean brightness {percent(quality.mean)}"
    elif quality.dark > ENDS:
        yield f"{percent(quality.dark)} of the image are black"
    if quality.saturated > ENDS:
        yield f"{percent(quality.saturated)} of the image are saturated"


def _motion_reasons(metrics: Metrics, place: int) -> Iterator[str]:
    flow, usual = metrics.per_frame["flow_px"][place], _number(metrics, "flow_px")
    if usual and flow > max(_FAST * usual, 10.0):
        yield f"fast: the image moved by {flow:.0f} px since the frame before, {usual:.0f} px is usual"
    stamps, rate = metrics.per_frame["time_s"], _number(metrics, "rate_hz")
    processed = np.flatnonzero(np.isfinite(metrics.per_frame["keypoints"][:place]))
    step = stamps[place] - stamps[processed[-1]] if len(processed) else 0.0
    if rate and step > _LATE / rate:
        yield f"{step:.2f} s after the frame before, {1 / rate:.2f} s is usual"
