"""What a replay was worth: figures of each frame and of all of them.

Nothing is made up: what is not known is NaN in arrays, None in the summary and null in the file. All but the timings
depends on the recording alone and is rounded to six digits, so that equal recordings give equal files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scfeat_core.errors import DataError
from scfeat_core.evaluation.metrics import symmetric_epipolar_distance
from scfeat_core.feature_files import replaced
from scfeat_core.geometry import warp_points
from scfeat_core.quality import coverage
from scfeat_core.replay.figures import SUMMARY_NAMES, Number, is_timed, shown
from scfeat_core.replay.records import FrameRecord, Recording
from scfeat_core.replay.returns import LastSeen
from scfeat_core.replay.survival import Followed, Lives, Survival, survival
from scfeat_core.replay.truth import OFF, STILL, TURNED_ONLY, DepthAt, Rays, motion, repeatability, true_distance
from scfeat_core.types import Camera, GeometryModel, PairResult, TrackFlag, TwoViewGeometry

if TYPE_CHECKING:
    from scfeat_core.odometry import Odometry, TrajectoryScores

FILE = "metrics.json"
FORMAT = 3  # 1: lives went on where a track was found again; 2: frames without matches had no inlier ratio
NO_TRUTH = "there is no ground truth"
NO_CALIBRATION = "there is no calibration"
NEVER_BEGAN = "the odometry never began"
WEAK_INLIERS = 30  # with fewer, a pose hangs on single points: matches of scfeat_ros.diagnostics.Limits
LABELS = ("index", "time_s", "model")  # columns of frames that are no measurements
MEASURED = (
    "keypoints",
    "matches",
    "inliers",
    "inlier_ratio",
    "coverage",
    "flow_px",
    "tracks",
    "new",
    "reidentified",
    "reidentified_known",
    "reidentified_off_truth",
    "ended",
    "track_age",
    "epipolar_px",
    "transfer_px",
    "epipolar_truth_px",
    "off_truth",
    "repeatability",
    "sharpness",
    "brightness",
)
_WITHOUT = ("duration_s", "rate_hz", "lost", "initialisations", "ate_", "rpe_")  # needs no result of the front end
_OF_RESULTS = tuple(name for name in SUMMARY_NAMES if not name.startswith(_WITHOUT))
_ORDER = ("read", "decode", "preprocess", "network", "select", "assess", "match", "verify", "track", "other")
_SUMS = ("ms_total", "ms_overhead")
_NOTHING = np.zeros(0, np.float32)
_Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Metrics:
    """summary: a value or None for each of SUMMARY_NAMES. distributions: column -> count, mean, median, p5, …, p99.

    per_frame: column -> (F,) float64, one value for each record, dropped or not, NaN where there is none: LABELS
    (time_s: since the first image), MEASURED, and milliseconds, ``ms_<stage>`` and their sums. lengths: (L,) int64, how
    many lives (see ``survival``) lasted 0, 1, 2, … frames. resets: index of the image -> why all tracks ended before
    it. missing: figure of the summary -> why it has no value, where that is known.
    """

    summary: Mapping[str, Number]
    distributions: Mapping[str, Mapping[str, float | None]]
    per_frame: Mapping[str, np.ndarray]
    lengths: np.ndarray
    survival: Survival
    resets: Mapping[int, str]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def above(self) -> dict[str, float]:
        """Figures without a value of which is known what they are greater than."""
        lived = self.survival
        if self.summary.get("track_length") is None or lived.half_life is not None:
            return {}
        seconds = {"track_half_life_s": lived.longest * lived.interval} if lived.interval > 0 else {}
        return {"track_half_life": lived.longest, **seconds}

    @property
    def stages(self) -> list[str]:
        """Names of the timed stages, in the order of the pipeline."""
        names = [name[3:] for name in self.per_frame if name.startswith("ms_") and name not in _SUMS]
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def summarise(
    recording: Recording,
    odometry: Odometry | None = None,
    scores: TrajectoryScores | None = None,
    missing: Mapping[str, str] | None = None,
    depth_at: DepthAt | None = None,
) -> Metrics:
    """All figures of a recording, with those of its trajectory where there is one, and truth to compare it with.

    missing: figure -> why it has no value, as far as whoever made the trajectory knows. depth_at: asked in the order of
    the frames, None where there are no depth maps.
    """
    frames, rows, tracks = _walk(recording, depth_at or (lambda stamp: None))
    per_frame = {**_frame_columns(frames, rows), **_timing_columns(frames)}
    lived = survival(tracks, _interval([frame for frame in frames if not frame.dropped]))
    lengths = np.bincount(tracks.lengths, minlength=2)
    found = {
        **_counts(frames),
        **_loss_figures(recording.facts),
        **_medians(per_frame),
        **_track_figures(lengths, lived, per_frame),
        **_trajectory_figures(odometry, scores),
        **_timing_figures(per_frame),
    }
    summary = {name: _tidy(found.pop(name, None)) for name in SUMMARY_NAMES} | {k: _tidy(v) for k, v in found.items()}
    distributions = {name: _distribution(values) for name, values in per_frame.items() if name not in LABELS}
    resets = {frame.index: frame.reset_reason for frame in frames if frame.reset_reason}
    why = {
        **_why_unmeasured(summary, per_frame["model"]),
        **_why_short(summary, lived),
        **_why_untrue(recording, depth_at is not None, summary),
        **_why_uncounted(recording.facts),
        **({} if summary["processed"] else dict.fromkeys(_OF_RESULTS, "no image gave a result")),
        **(missing or {}),
    }
    why = {name: reason for name, reason in why.items() if summary.get(name) is None}
    return Metrics(summary, distributions, per_frame, lengths, lived, resets, why)


def _why_unmeasured(summary: Mapping[str, Number], model: np.ndarray) -> dict[str, str]:
    """Of the figures of frames. model: of each frame, NaN where none was looked for."""
    verified = model[model > 0]
    flat = len(verified) and (verified == GeometryModel.HOMOGRAPHY).all()
    unverified = "no two matched frames were verified"
    epipolar = "all frames were verified by homographies" if flat else "the calibration is that of another image size"
    return {
        **dict.fromkeys(("duration_s", "rate_hz"), "there are no two images with different stamps"),
        **dict.fromkeys(("keypoints", "coverage"), "no image gave a result"),
        "matches": "no frame was matched to the one before",
        **dict.fromkeys(("inliers", "inliers_p5", "inlier_ratio", "inlier_ratio_p5", "flow_px"), unverified),
        **dict.fromkeys(("weak_frames", "homography_share"), unverified),
        "epipolar_px": epipolar if len(verified) else unverified,
        "transfer_px": "no frame was verified by a homography" if len(verified) else unverified,
        **dict.fromkeys(("ms_total", "ms_total_p95", "ms_network", "ms_overhead", "fps"), "it was not timed"),
        **dict.fromkeys(("lost_messages", "lost_bytes"), "the recording is damaged, and nothing counts its losses"),
    }


def _why_uncounted(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of losses where not all of the recording was read."""
    window = facts.get("window") or {}
    if not window.get("frames") and window.get("stop") is None:
        return {}
    return {"lost_messages": "losses are not counted where --frames or --stop ends a replay before the recording does"}


def _why_short(summary: Mapping[str, Number], lived: Survival) -> dict[str, str]:
    """Of the figures of tracks."""
    names = ("track_length", "track_half_life", "track_half_life_s", "alive_1s")
    if summary["tracks"] is None:
        return dict.fromkeys(("tracks", *names, "reidentified"), "no frame has tracks")
    if summary["track_length"] is None:
        return dict.fromkeys(names, "no track was seen twice")
    longer = f"more than {lived.longest} frames: most tracks outlive the recording"
    return {
        "track_half_life": longer,
        "track_half_life_s": longer if lived.half_life is None else "there are no two images with different stamps",
        "alive_1s": f"no track can be seen for 1 s: the images last {shown('duration_s', summary['duration_s'])} s",
    }


def _why_untrue(recording: Recording, depth: bool, summary: Mapping[str, Number]) -> dict[str, str]:
    """Of the figures that ground truth is for."""
    moved = f"the camera never moved by {100 * STILL:g} cm"
    far = f"the camera moved by more than {1000 * TURNED_ONLY:g} mm between all frames, and depth is not known"
    why = {
        **dict.fromkeys(("epipolar_truth_px", "off_truth"), f"{moved} between two frames with a true pose"),
        "repeatability": far + (" where two of them show the same" if depth else ""),
        "reidentified_off_truth": f"{moved} while a track was gone, or its true pose is not known",
    }
    if recording.camera is None or recording.truth is None:
        why = dict.fromkeys(why, NO_CALIBRATION if recording.camera is None else NO_TRUTH)
    if not summary["reidentified"]:
        why["reidentified_off_truth"] = "no track was found again"
    return why


# -- per frame ---------------------------------------------------------------------------------------------------------


def _walk(recording: Recording, depth_at: DepthAt) -> tuple[list[FrameRecord], list[_Row], Lives]:
    """All records without their arrays, what was measured in each, and how their tracks lived.

    Each record is looked at once, and only the one before is held: those of an hour are ten gigabytes.
    """
    frames: list[FrameRecord] = []
    rows: list[_Row] = []
    followed, last_seen, before = Followed(), LastSeen(), None
    for frame in recording.frames:
        returns = _measure_returns(last_seen.errors(frame, recording.camera, recording.truth))
        rows.append(_measure(frame) | returns | _measure_pair(frame, before, recording, depth_at))
        frames.append(replace(frame, keypoints=_NOTHING, scores=_NOTHING, pair=None, tracks=None, quality=None))
        if not frame.dropped:
            followed.add(frame.tracks)
            before = frame
    return frames, rows, followed.lives()


def _frame_columns(frames: Sequence[FrameRecord], rows: Sequence[_Row]) -> dict[str, np.ndarray]:
    first = frames[0].stamp if frames else 0
    return {
        "index": np.array([frame.index for frame in frames], np.float64),
        "time_s": np.array([1e-9 * (frame.stamp - first) for frame in frames], np.float64),
        **{name: _column(rows, name) for name in ("model", *MEASURED)},
    }


def _column(rows: Iterable[Mapping[str, float]], name: str) -> np.ndarray:
    return np.array([row.get(name, np.nan) for row in rows], np.float64)


def _measure(frame: FrameRecord) -> _Row:
    """What a frame says without its predecessor."""
    if frame.dropped:
        return {}
    found: _Row = {"keypoints": len(frame.keypoints), "coverage": coverage(frame.keypoints, frame.image_size)}
    if frame.quality is not None:
        found |= {"sharpness": frame.quality.sharpness, "brightness": frame.quality.mean}
    if (tracks := frame.tracks) is not None:
        found |= {
            "tracks": len(tracks),
            "new": int((tracks.flags & int(TrackFlag.NEW) != 0).sum()),
            "reidentified": int((tracks.flags & int(TrackFlag.REIDENTIFIED) != 0).sum()),
            "ended": len(tracks.lost_ids),
            "track_age": _median(tracks.ages),
        }
    return found


def _measure_returns(errors: np.ndarray) -> _Row:
    """errors: pixels, of the re-identified tracks whose true epipolar line is known."""
    return (
        {"reidentified_known": len(errors), "reidentified_off_truth": float((errors > OFF).mean())}
        if len(errors)
        else {}
    )


def _measure_pair(frame: FrameRecord, before: FrameRecord | None, recording: Recording, depth_at: DepthAt) -> _Row:
    """before: the processed frame before this one."""
    if (pair := frame.pair) is None:
        return {}
    moved = motion(recording.truth, pair.stamp0, frame.stamp)
    camera = recording.camera
    fits = camera is not None and camera.size == frame.image_size  # images of another size have another calibration
    row: _Row = {"matches": len(pair.matches)}
    if camera is not None and fits and before is not None and before.sequence == pair.sequence0:
        row["repeatability"] = repeatability(before, frame, camera, moved, depth_at)
    return row if pair.geometry is None else row | _measure_inliers(pair, pair.geometry, camera, fits, moved)


def _measure_inliers(
    pair: PairResult, geometry: TwoViewGeometry, camera: Camera | None, fits: bool, moved: np.ndarray
) -> _Row:
    """fits: the camera is that of these images. moved: (4, 4), true T_1_0, NaN where it is not known."""
    inliers = geometry.inliers
    points0, points1 = pair.keypoints0[inliers].astype(np.float64), pair.keypoints1[inliers].astype(np.float64)
    rays = Rays.of(points0, points1, camera) if camera is not None and fits else None
    in_pixels = camera is None or fits or geometry.model is GeometryModel.FUNDAMENTAL
    return {
        "model": int(geometry.model),
        "inliers": int(inliers.sum()),
        "inlier_ratio": float(inliers.mean()) if len(inliers) else 0.0,  # not unknown: nothing could be followed
        "flow_px": _median(np.linalg.norm(points1 - points0, axis=1)),
        **(_residual(geometry.model, geometry.matrix, points0, points1, rays) if in_pixels else {}),
        **({} if rays is None else _true_residual(rays, moved)),
    }


def _residual(
    model: GeometryModel, matrix: np.ndarray, points0: np.ndarray, points1: np.ndarray, rays: Rays | None
) -> _Row:
    """Median distance of the inliers from the model that verified them, pixels; for a homography that in view 1."""
    if model is GeometryModel.FUNDAMENTAL:
        return {"epipolar_px": _median(symmetric_epipolar_distance(points0, points1, matrix))}
    if model is GeometryModel.ESSENTIAL and rays is not None:
        return {"epipolar_px": _median(rays.epipolar_distance(matrix))}
    if model is GeometryModel.HOMOGRAPHY:
        before, after = (points0, points1) if rays is None else rays.pixels()
        return {"transfer_px": _median(np.linalg.norm(warp_points(before, matrix) - after, axis=1))}
    return {}


def _true_residual(rays: Rays, moved: np.ndarray) -> _Row:
    distance = true_distance(rays, moved)
    if distance is None or not len(distance):
        return {}
    return {"epipolar_truth_px": _median(distance), "off_truth": float((distance > OFF).mean())}


def _timing_columns(frames: Sequence[FrameRecord]) -> dict[str, np.ndarray]:
    """ms_<stage> of all stages, ms_total, their sum, and ms_overhead, that of all but the network and decoding.

    Frames that were dropped have stages, but no sums: they say nothing of the time that a result takes.
    """
    stages = list(dict.fromkeys(stage for frame in frames for stage in frame.timings))
    columns = {stage: _column([frame.timings for frame in frames], stage) for stage in stages}
    if not columns:
        return {}
    own = [values for stage, values in columns.items() if stage not in ("network", "decode")]
    sums = {"total": _sum(list(columns.values())), "overhead": _sum(own or [np.full(len(frames), np.nan)])}
    dropped = np.array([bool(frame.dropped) for frame in frames])
    sums = {name: np.where(dropped, np.nan, values) for name, values in sums.items()}
    return {f"ms_{stage}": values for stage, values in (columns | sums).items()}


def _sum(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Of those that are there, NaN where none is."""
    return np.where(np.isfinite(columns).any(0), np.nansum(columns, 0), np.nan)


# -- in all ------------------------------------------------------------------------------------------------------------


def _counts(frames: Sequence[FrameRecord]) -> dict[str, Number]:
    dropped = Counter(frame.dropped for frame in frames if frame.dropped)
    interval = _interval(frames)
    return {
        "frames": len(frames),
        "processed": sum(not frame.dropped for frame in frames),
        "dropped": sum(dropped.values()),
        **{f"dropped_{reason}": 0 for reason in ("decode", "stale", "error")},
        **{f"dropped_{reason}": count for reason, count in sorted(dropped.items())},
        "resets": sum(bool(frame.reset_reason) for frame in frames),
        "duration_s": 1e-9 * (max(f.stamp for f in frames) - min(f.stamp for f in frames)) if frames else None,
        "rate_hz": 1 / interval if interval > 0 else None,
    }


def _loss_figures(facts: Mapping[str, Any]) -> dict[str, Number]:
    """What the recording itself had lost. None: it is damaged, and nobody knows how much that costs."""
    damage = facts.get("damage") or ()
    lost = facts.get("lost", {}) if damage else {"messages": 0, "bytes": 0}
    texts = [damage] if isinstance(damage, str) else damage
    return {
        "damaged": int(bool(damage)),
        **{f"lost_{name}": lost.get(name) for name in ("messages", "bytes")},
        **({"damage": "; ".join(map(str, texts))} if damage else {}),
    }


def _interval(frames: Sequence[FrameRecord]) -> float:
    """Median seconds between two frames; NaN where there are not two that follow each other."""
    steps = np.diff(np.array([frame.stamp for frame in frames], np.int64))
    return 1e-9 * _median(steps[steps > 0])


def _medians(per_frame: Mapping[str, np.ndarray]) -> dict[str, Number]:
    apart = (
        *("tracks", "new", "ended", "track_age", "sharpness", "brightness"),
        *("reidentified", "reidentified_known", "reidentified_off_truth"),
    )
    inliers, model = per_frame["inliers"], per_frame["model"]
    verified = model[model > 0]
    return {
        "homography_share": float((verified == GeometryModel.HOMOGRAPHY).mean()) if len(verified) else None,
        **{name: _median(per_frame[name]) for name in MEASURED if name not in apart},
        "inliers_p5": _percentile(inliers, 5),
        "inlier_ratio_p5": _percentile(per_frame["inlier_ratio"], 5),
        "weak_frames": int((inliers < WEAK_INLIERS).sum()) if np.isfinite(inliers).any() else None,
    }


def _track_figures(lengths: np.ndarray, lived: Survival, per_frame: Mapping[str, np.ndarray]) -> dict[str, Number]:
    if not np.isfinite(per_frame["tracks"]).any():
        return {}
    followed = lengths[2:]
    half_life = lived.half_life
    reidentified = int(np.nansum(per_frame["reidentified"]))
    known = per_frame["reidentified_known"]
    off = float(np.nansum(known * per_frame["reidentified_off_truth"]))
    return {
        "tracks": int(lengths.sum()) - reidentified,
        "track_length": float(followed @ np.arange(2, len(lengths)) / followed.sum()) if followed.sum() else None,
        "track_half_life": half_life,
        "track_half_life_s": None if half_life is None else half_life * lived.interval,
        "alive_1s": lived.after(1.0),
        "reidentified": reidentified,
        "reidentified_off_truth": off / np.nansum(known) if np.isfinite(known).any() else None,
    }


def _trajectory_figures(odometry: Any, scores: Any) -> dict[str, Number]:
    found: dict[str, Number] = {}
    if odometry is not None:
        found |= {"lost": int(odometry.lost), "initialisations": int(odometry.initialisations)}
    if scores is not None:
        found |= {name: getattr(scores, name) for name in ("ate_m", "rpe_m", "rpe_deg")}
        found |= {"ate_frames": scores.frames, "ate_share": scores.ate_m / scores.still_m}
    return found


def _timing_figures(per_frame: Mapping[str, np.ndarray]) -> dict[str, Number]:
    if "ms_total" not in per_frame:
        return {}
    total = per_frame["ms_total"]
    known = total[np.isfinite(total)]
    mean = _mean(known[1:]) if len(known) > 1 else _mean(known)
    return {
        **{name: _median(per_frame.get(name, ())) for name in ("ms_total", "ms_network", "ms_overhead")},
        "ms_total_p95": _percentile(total, 95),
        "fps": 1000 / mean if mean > 0 else None,
    }


def _distribution(values: np.ndarray) -> dict[str, float | None]:
    names = ("mean", "median", "p5", "p95", "p99")
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"count": 0, **dict.fromkeys(names)}
    figures = (finite.mean(), *np.percentile(finite, (50, 5, 95, 99)))
    return {"count": len(finite), **dict(zip(names, map(_digits, figures), strict=True))}


def _mean(values: np.ndarray) -> float:
    """NaN where there are none."""
    return float(values.mean()) if len(values) else float("nan")


def _median(values: Any) -> float:
    return _percentile(values, 50)


def _percentile(values: Any, share: float) -> float:
    """Of the finite values; NaN where there are none."""
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    return float(np.percentile(finite, share)) if len(finite) else float("nan")


def _digits(value: float) -> float | None:
    """Rounded to six digits; None where it is not finite."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _tidy(value: Number) -> Number:
    return _digits(value) if isinstance(value, float) else value


# -- file --------------------------------------------------------------------------------------------------------------


def write_metrics(folder: Path, metrics: Metrics) -> Path:
    """``metrics.json``: the summary, distributions, frames and tracks; all that differs between two equal runs is under
    "timings". Raises ScfeatError where it cannot be written."""
    tables = {
        "summary": metrics.summary,
        "distributions": metrics.distributions,
        "per_frame": _lists(metrics.per_frame),
    }
    lived = metrics.survival
    content = {
        "format": FORMAT,
        **{key: {k: v for k, v in table.items() if not is_timed(k)} for key, table in tables.items()},
        "tracks": {"lengths": metrics.lengths.tolist(), "survival": _survival_content(lived)},
        "resets": {str(index): reason for index, reason in metrics.resets.items()},
        "missing": dict(metrics.missing),
        "timings": {key: {k: v for k, v in table.items() if is_timed(k)} for key, table in tables.items()},
    }
    path = folder / FILE
    with replaced(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _lists(per_frame: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    return {name: [_digits(value) for value in values.tolist()] for name, values in per_frame.items()}


def _survival_content(lived: Survival) -> dict[str, Any]:
    return {
        "frames": lived.frames.tolist(),
        "share": [_digits(value) for value in lived.share],
        "at_risk": lived.at_risk.tolist(),
        "interval_s": _digits(lived.interval),
    }


def read_metrics(folder: Path) -> Metrics:
    """What :func:`write_metrics` wrote into a folder. Raises DataError where there is nothing that can be read."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _read(content)
    except FileNotFoundError as error:
        raise DataError(
            f"expected the metrics of a replay at {path}, found no file; give a folder that `scfeat replay --out` wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"expected the metrics of a replay in {path}, found {error!r}: damaged, or written by another version; "
            "replay the bag again"
        ) from error


def _read(content: Mapping[str, Any]) -> Metrics:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, not {FORMAT}")
    timed, tracks = content["timings"], content["tracks"]
    curve = tracks["survival"]
    merged = {key: {**content[key], **timed[key]} for key in ("summary", "distributions", "per_frame")}
    interval = float("nan") if curve["interval_s"] is None else float(curve["interval_s"])
    return Metrics(
        merged["summary"],
        merged["distributions"],
        {name: np.array(values, np.float64) for name, values in merged["per_frame"].items()},
        np.array(tracks["lengths"], np.int64),
        Survival(
            np.array(curve["frames"], np.int64),
            np.array(curve["share"], np.float64),
            np.array(curve["at_risk"], np.int64),
            interval,
        ),
        {int(index): reason for index, reason in content["resets"].items()},
        dict(content.get("missing", {})),
    )
