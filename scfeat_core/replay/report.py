"""``report.html``: what a replay found, as one page that an engineer can read, keep and send: it needs nothing else."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from scfeat_core.charts import Chart, Histogram, Line, Mark, chart, histogram, plan
from scfeat_core.drawing import draw_verified
from scfeat_core.errors import ScfeatError
from scfeat_core.feature_files import replaced
from scfeat_core.replay.figures import FIGURES, shown
from scfeat_core.replay.film import Pictures, draw_tracks, film_frames, make_film, strip_frames
from scfeat_core.replay.metrics import NO_TRUTH, Metrics
from scfeat_core.replay.paths import TRUTH, aligned, lines
from scfeat_core.replay.records import FrameRecord, Recording
from scfeat_core.replay.survival import Survival
from scfeat_core.replay.verdicts import (
    Verdict,
    damage,
    done,
    headline,
    interruption,
    overall,
    percent,
    reasons,
    verdicts,
    weakest,
)
from scfeat_core.report import Picture, data_uri, document, facts_list, figure

if TYPE_CHECKING:
    from scfeat_core.odometry import Odometry, TrajectoryScores

FILE = "report.html"
_SHOWN_DROPS = 12
_RELIABLE = 10  # tracks at risk: with less, the curve of survival is chance
_STRONG = 0.5  # inlier ratio that needs no explanation
_STRIP_WIDTH = 400  # pixels
_PAIR_WIDTH = 1200
_TABLE = (
    ("keypoints", "keypoints", ""),
    ("matches", "matches to the frame before", ""),
    ("inliers", "inliers", ""),
    ("inlier_ratio", "inlier ratio", "%"),
    ("coverage", "coverage", "%"),
    ("flow_px", "flow of the inliers", "px"),
    ("tracks", "tracks in view", ""),
    ("new", "new tracks", ""),
    ("reidentified", "re-identified tracks", ""),
    ("reidentified_off_truth", "re-identified off by > 3 px", "%"),
    ("track_age", "age of the tracks", "frames"),
    ("epipolar_px", "epipolar residual", "px"),
    ("transfer_px", "transfer error (homographies)", "px"),
    ("epipolar_truth_px", "true epipolar error", "px"),
    ("off_truth", "inliers off by > 3 px", "%"),
    ("repeatability", "repeatability", "%"),
)


def write_report(
    folder: Path,
    recording: Recording,
    metrics: Metrics,
    odometry: Odometry | None = None,
    scores: TrajectoryScores | None = None,
    pictures: Pictures | None = None,
) -> Path:
    """Write ``report.html`` into the folder of a run.

    pictures: gives images of the recording again, by their indices; without, the page has none. Raises ScfeatError
    where it cannot be written.
    """
    path = folder / FILE
    page = make_report(recording, metrics, odometry, scores, pictures)
    with replaced(path) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return path


def make_report(
    recording: Recording,
    metrics: Metrics,
    odometry: Odometry | None = None,
    scores: TrajectoryScores | None = None,
    pictures: Pictures | None = None,
) -> str:
    """The page as text."""
    found = verdicts(metrics, recording.facts)
    title = f"{recording.facts.get('bag', 'Replay')} · {recording.facts.get('method', 'scfeat')}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="summary">{html.escape(_summary(recording, metrics))}</p>',
        _verdict_table(found, interruption(metrics, recording.facts), damage(metrics)),
        _lost(recording, metrics),
        _trajectory(recording, metrics, odometry, scores),
        _over_time(metrics),
        _tracks(metrics),
        _pictured(recording, metrics, pictures),
        _latency(metrics),
        _all_figures(metrics),
        _settings(recording),
    ]
    return document(title, [part for part in parts if part], STYLE)


def _section(title: str, about: str, *parts: str) -> str:
    text = f'<p class="about">{html.escape(about)}</p>' if about else ""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{text}{''.join(parts)}\n</section>"


def _summary(recording: Recording, metrics: Metrics) -> str:
    facts, summary = recording.facts, metrics.summary
    parts = [done(metrics, facts) + (" (interrupted)" if facts.get("interrupted") else "")]
    if summary["duration_s"]:
        parts.append(f"{shown('duration_s', summary['duration_s'])} s")
    if summary["rate_hz"]:
        parts.append(f"{shown('rate_hz', summary['rate_hz'])} Hz")
    sizes = Counter(frame.image_size for frame in recording.frames if not frame.dropped)
    parts += [f"{width}x{height}" for (width, height), _ in sizes.most_common(2)]
    settings = facts.get("settings") or {}
    parts += [str(value) for value in (facts.get("topic"), settings.get("device"), settings.get("weights")) if value]
    parts.append("calibrated" if recording.camera is not None else "not calibrated")
    parts.append("with ground truth" if recording.truth is not None else "no ground truth")
    return " · ".join(parts)


def _verdict_table(found: Sequence[Verdict], *remarks: str) -> str:
    level = overall(found)
    rows = "".join(
        f"<tr><th>{html.escape(v.name)}</th><td>{html.escape(v.value)}</td>"
        f'<td><span class="chip {v.level or "none"}">{v.level or "–"}</span></td>'
        f'<td class="why">{html.escape(v.why)}</td></tr>'
        for v in found
    )
    return (
        f'<section class="verdict {level or "none"}"><p class="headline">{headline(found, *remarks)}</p>'
        f'<table class="verdicts">{rows}</table></section>'
    )


# -- what was lost -----------------------------------------------------------------------------------------------------


def _lost(recording: Recording, metrics: Metrics) -> str:
    """Nothing where nothing was."""
    told = recording.facts.get("damage") or []
    lost = [told] if isinstance(told, str) else [str(line) for line in told]
    lost += recording.facts.get("warnings") or []
    if metrics.summary.get("damaged"):
        lost.append(
            f"In all {_known(metrics, 'lost_messages')} images and {_known(metrics, 'lost_bytes')} bytes are lost."
        )
    if recording.facts.get("interrupted"):
        lost.append(f"The replay was {interruption(metrics, recording.facts)}: this is what was done until then.")
    dropped = [frame for frame in recording.frames if frame.dropped]
    lost += [
        f"{count} {'image' if count == 1 else 'images'} dropped: {reason}"
        for reason, count in Counter(frame.dropped for frame in dropped).most_common()
    ]
    lost += [f"Image {frame.index}: {frame.error or frame.dropped}" for frame in dropped[:_SHOWN_DROPS]]
    if len(dropped) > _SHOWN_DROPS:
        lost.append(f"and {len(dropped) - _SHOWN_DROPS} more")
    lost += [f"All tracks ended before image {index}: {reason}" for index, reason in metrics.resets.items()]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lost)
    return _section("What was lost", "", f"<ul>{items}</ul>") if lost else ""


def _known(metrics: Metrics, name: str) -> str:
    value = metrics.summary.get(name)
    return "an unknown number of" if value is None else shown(name, value)


# -- trajectory --------------------------------------------------------------------------------------------------------


def _trajectory(
    recording: Recording, metrics: Metrics, odometry: Odometry | None, scores: TrajectoryScores | None
) -> str:
    """Nothing without odometry."""
    if odometry is None or not len(odometry.stamps):
        return ""
    way = aligned(odometry.stamps, odometry.poses, odometry.tracked, recording.truth)
    ways = [("visual odometry", way.positions)]
    if recording.truth is not None and np.isfinite(way.scale):
        inside = slice(*np.searchsorted(recording.truth.stamps, [odometry.stamps.min(), odometry.stamps.max() + 1]))
        ways.insert(0, (TRUTH, recording.truth.poses[inside, :3, 3]))
    unit = "m" if np.isfinite(way.scale) else "units: no scale is known"
    beside = [facts_list(_score_lines(metrics, odometry, scores))]
    if np.isfinite(way.errors).any():
        seconds = 1e-9 * (odometry.stamps - odometry.stamps[0])
        error = Line("", seconds, way.errors)
        beside.insert(0, chart(Chart("Distance from the truth, after alignment", [error], "seconds", "m")))
    about = "Monocular visual odometry on the published tracks alone, seen from where the way is widest"
    about += "; aligned by a similarity, as one camera knows no scale." if np.isfinite(way.scale) else "."
    way_of_camera = plan("The way of the camera", lines(ways), unit)
    return _section("Trajectory", about, f'<div class="charts">{way_of_camera}<div>{"".join(beside)}</div></div>')


def _score_lines(metrics: Metrics, odometry: Odometry, scores: TrajectoryScores | None) -> dict[str, str]:
    found = {
        "frames with a pose": f"{int(odometry.tracked.sum())} of {len(odometry.tracked)}",
        "initialisations": str(odometry.initialisations),
    }
    if scores is not None:
        found["frames compared"] = f"{scores.frames}, over a true way of {scores.truth_m:.3g} m"
    for name in ("ate_m", "rpe_m", "rpe_deg"):
        value = None if scores is None else getattr(scores, name)
        known = f"{shown(name, value)} {FIGURES[name].unit}"
        found[FIGURES[name].label] = f"– ({metrics.missing.get(name, NO_TRUTH)})" if value is None else known
    return found


# -- charts ------------------------------------------------------------------------------------------------------------


def _over_time(metrics: Metrics) -> str:
    columns = metrics.per_frame
    marks = [Mark(float(at), "drop") for at in columns["index"][np.isnan(columns["keypoints"])]]
    marks += [Mark(float(index), "reset") for index in metrics.resets]
    wanted = [
        ("Points and matches", (("keypoints", "keypoints"), ("matches", "matches"), ("inliers", "inliers")), "", 1.0),
        ("Inlier ratio", (("inlier_ratio", ""),), "%", 100.0),
        ("Tracks", (("tracks", "in view"), ("new", "new"), ("reidentified", "re-identified")), "", 1.0),
        ("Age of the tracks, median", (("track_age", ""),), "frames", 1.0),
        ("Coverage", (("coverage", ""),), "%", 100.0),
        ("Flow of the inliers, median", (("flow_px", ""),), "px", 1.0),
        (
            "Errors of the inliers, median",
            (
                ("epipolar_px", "to the model"),
                ("transfer_px", "to a homography"),
                ("epipolar_truth_px", "to the truth"),
            ),
            "px",
            1.0,
        ),
        ("Sharpness of the image", (("sharpness", ""),), "", 1.0),
    ]
    drawn = [
        chart(_time_chart(columns, title, names, unit, scale, marks))
        for title, names, unit, scale in wanted
        if any(np.isfinite(columns[name]).any() for name, _ in names)
    ]
    if not drawn:
        return ""
    about = "By image of the topic." + (" Red lines: dropped images, orange ones: all tracks ended." if marks else "")
    return _section("Over time", about, f'<div class="charts">{"".join(drawn)}</div>')


def _time_chart(
    columns: Mapping[str, np.ndarray],
    title: str,
    names: Sequence[tuple[str, str]],
    unit: str,
    scale: float,
    marks: Sequence[Mark],
) -> Chart:
    lines = [
        Line(label, columns["index"], scale * columns[name], colour)
        for colour, (name, label) in enumerate(names)
        if np.isfinite(columns[name]).any()
    ]
    images = columns["index"]
    x_range = float(images.min()), float(images.max())
    return Chart(title, lines, "image", unit, high=100.0 if unit == "%" else None, x_range=x_range, marks=marks)


def survival_lines(lived: Survival, name: str = "", colour: int = 0) -> list[Line]:
    """Per cent of the tracks seen twice that go on without a gap, by frames, where enough are left to tell."""
    reliable = (lived.at_risk >= _RELIABLE) & (lived.frames >= 1)
    share = np.where(reliable, 100 * lived.share_of_followed, np.nan)
    return [Line(name, lived.frames.astype(float), share, colour, steps=True)]


def _tracks(metrics: Metrics) -> str:
    lived = metrics.survival
    if not metrics.lengths[1:].any():
        return ""
    all_tracks = Line(
        "all",
        lived.frames.astype(float),
        np.where(lived.at_risk >= _RELIABLE, 100 * lived.share, np.nan),
        5,
        steps=True,
    )
    seconds = f"; {1 / lived.interval:.0f} frames are a second" if lived.interval > 0 else ""
    survival_chart = Chart(
        "Tracks that are still followed",
        [*survival_lines(lived, "seen at least twice"), all_tracks],
        "frames since the first sight",
        "%",
        high=100.0,
        limit=(50.0, "half"),
        note="Kaplan–Meier: tracks that the end of the recording cuts off count as long as they were seen" + seconds,
    )
    observed = np.repeat(np.arange(2, len(metrics.lengths)), metrics.lengths[2:]).astype(float)
    lengths = Histogram(
        "In how many frames in a row a track was seen, of those seen twice", observed, "frames", "tracks", whole=True
    )
    drawn = chart(survival_chart) + histogram(lengths)
    about = "Without a gap: a track that is found again begins anew, as only its descriptor says that it is the same."
    return _section("How long tracks live", about, f'<div class="charts">{drawn}</div>')


def _latency(metrics: Metrics) -> str:
    rate = metrics.summary.get("rate_hz")
    stages = [stage for stage in metrics.stages if np.isfinite(metrics.per_frame[f"ms_{stage}"]).any()]
    if not stages:
        return ""
    limit = (1000 / float(rate), "a frame of the camera") if rate else None
    total = histogram(Histogram("All stages", metrics.per_frame["ms_total"], "ms", limit=limit))
    each = "".join(histogram(Histogram(stage, metrics.per_frame[f"ms_{stage}"], "ms", bins=20)) for stage in stages)
    lines = [
        Line(stage, metrics.per_frame["index"], metrics.per_frame[f"ms_{stage}"], colour)
        for colour, stage in enumerate(_slowest(metrics, stages))
    ]
    over_time = chart(Chart("The slowest stages", lines, "image", "ms"))
    about = "Milliseconds on the machine that replayed; the only figures here that change from run to run."
    return _section(
        "Time a frame",
        about,
        f'<div class="charts">{total}{over_time}</div>',
        f'<div class="charts small">{each}</div>',
    )


def _slowest(metrics: Metrics, stages: Sequence[str], count: int = 5) -> list[str]:
    return sorted(stages, key=lambda stage: -(metrics.distributions[f"ms_{stage}"]["median"] or 0.0))[:count]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictured(recording: Recording, metrics: Metrics, pictures: Pictures | None) -> str:
    """The sections with images; the recording is read once for all of them."""
    if pictures is None:
        return ""
    frames = recording.frames
    film, strip, weak = film_frames(frames), strip_frames(frames), _weak_pairs(recording, metrics)
    indices = {frames[place].index for place in (*film, *strip)} | {f.index for _, *pair in weak for f in pair}
    try:
        images = pictures(sorted(indices))
    except ScfeatError as error:
        return _section("Pictures", f"The images could not be read again: {error}")
    return _film(frames, images, film, strip) + _weakest(metrics, weak, images)


def _film(
    frames: Sequence[FrameRecord], images: Mapping[int, np.ndarray], places: Sequence[int], strip: Sequence[int]
) -> str:
    parts = []
    film = make_film(frames, draw_tracks(frames, places, images))
    if film is not None:
        caption = f"Images {film.first} to {film.last}, {film.slower:.1f} times slower than the camera."
        source = data_uri(film.content, "image/webp")
        parts.append(
            f'<figure class="film"><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        )
    stills = draw_tracks(frames, strip, images, _STRIP_WIDTH)
    parts.append(
        '<div class="strip">'
        + "".join(figure(Picture(picture, f"image {frames[place].index}")) for place, picture in stills.items())
        + "</div>"
    )
    about = "The 300 oldest tracks, with where they were in the last 12 frames: blue is new, red is old."
    return _section("Tracks in the images", about, *parts) if film is not None or stills else ""


def _weak_pairs(recording: Recording, metrics: Metrics) -> list[tuple[int, FrameRecord, FrameRecord]]:
    """Place among all records, frame before, frame."""
    frames = recording.frames
    chosen = [(place, _processed_before(frames, place), frames[place]) for place in weakest(metrics)]
    return [
        (place, before, frame)
        for place, before, frame in chosen
        if before is not None and frame.pair is not None and frame.pair.sequence0 == before.sequence
    ]


def _processed_before(frames: Sequence[FrameRecord], place: int) -> FrameRecord | None:
    records = (frames[earlier] for earlier in range(place - 1, -1, -1))
    return next((frame for frame in records if not frame.dropped), None)


def _weakest(
    metrics: Metrics, weak: Sequence[tuple[int, FrameRecord, FrameRecord]], images: Mapping[int, np.ndarray]
) -> str:
    shots = [
        _weak_shot(metrics, place, before, frame, images[before.index], images[frame.index])
        for place, before, frame in weak
        if before.index in images and frame.index in images
    ]
    about = (
        "Those with the lowest share of verified matches, the frame before on the left. Green: verified, "
        "red: not; lines join some of the green ones."
    )
    return _section("The weakest frames", about, f'<div class="weak">{"".join(shots)}</div>') if shots else ""


def _weak_shot(
    metrics: Metrics, place: int, before: FrameRecord, frame: FrameRecord, image0: np.ndarray, image1: np.ndarray
) -> str:
    pair = frame.pair
    assert pair is not None
    # Without verification only frames without matches are called weak.
    inliers = np.zeros(len(pair.matches), bool) if pair.geometry is None else pair.geometry.inliers
    picture, _ = draw_verified(image0, image1, pair.keypoints0, pair.keypoints1, inliers)
    share = f" ({percent(inliers.mean())})" if len(inliers) else ""
    found = f"{inliers.sum()} of {len(inliers)} matches verified{share}" if len(inliers) else "no matches"
    caption = f"Image {frame.index}, {metrics.per_frame['time_s'][place]:.2f} s: {found}"
    why = reasons(metrics, place, frame, before)
    if not why and not metrics.per_frame["inlier_ratio"][place] >= _STRONG:
        why = ["nothing that was measured says why: moving things, repeated texture, a calibration that does not fit?"]
    items = "".join(f"<li>{html.escape(reason)}</li>" for reason in why)
    return f"<div>{figure(Picture(_narrowed(picture), caption))}<ul>{items}</ul></div>"


def _narrowed(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    if width <= _PAIR_WIDTH:
        return picture
    return cv2.resize(picture, (_PAIR_WIDTH, max(round(height * _PAIR_WIDTH / width), 1)), interpolation=cv2.INTER_AREA)


# -- all figures -------------------------------------------------------------------------------------------------------


def _all_figures(metrics: Metrics) -> str:
    named = [*_TABLE, *((f"ms_{stage}", f"{stage}", "ms") for stage in (*metrics.stages, "overhead", "total"))]
    rows = [
        _distribution_row(label, unit, metrics.distributions[name])
        for name, label, unit in named
        if metrics.distributions.get(name, {}).get("count")
    ]
    names = ("of a frame", "median", "5th percentile", "95th percentile", "mean", "frames")
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f'<div class="scroll"><table class="wide"><tr class="head">{head}</tr>{"".join(rows)}</table></div>'
    summary = "".join(
        f"<tr><th>{html.escape(known.label)}</th>"
        f"<td>{html.escape(shown(name, metrics.summary[name]))} {html.escape(known.unit)}</td>"
        f'<td class="why">{html.escape(known.meaning)}</td></tr>'
        for name, known in FIGURES.items()
        if metrics.summary.get(name) is not None
    )
    summary += "".join(
        f'<tr><th>{html.escape(FIGURES[name].label)}</th><td>–</td><td class="why">{html.escape(reason)}</td></tr>'
        for name, reason in metrics.missing.items()
    )
    details = (
        f'<details><summary>The figures of the whole run</summary><table class="verdicts">{summary}</table></details>'
    )
    return _section("All figures", "", table, details)


def _distribution_row(label: str, unit: str, distribution: Mapping[str, float | None]) -> str:
    scale = 100.0 if unit == "%" else 1.0
    values = [distribution[name] for name in ("median", "p5", "p95", "mean")]
    cells = "".join("<td>–</td>" if value is None else f"<td>{scale * value:.4g}</td>" for value in values)
    unit = f' <span class="about">{html.escape(unit)}</span>' if unit else ""
    return f"<tr><th>{html.escape(label)}{unit}</th>{cells}<td>{distribution['count']}</td></tr>"


def _settings(recording: Recording) -> str:
    facts = {
        name: value for name, value in recording.facts.items() if name not in ("damage", "warnings", "interrupted")
    }
    if recording.truth is not None:
        facts["ground truth"] = f"{len(recording.truth.stamps)} poses, {recording.truth.source}"
    return _section("Settings and facts", "", facts_list(facts))


STYLE = """
.verdict { border-left: 5px solid var(--line); padding: 2px 0 2px 18px; margin: 20px 0 8px; }
.verdict.good { border-color: var(--good); }
.verdict.watch { border-color: var(--watch); }
.verdict.poor { border-color: var(--bad); }
.headline { font-size: 20px; font-weight: 600; margin: 0 0 8px; }
.verdicts { width: 100%; }
.verdicts th, .verdicts td { padding: 6px 20px 6px 0; text-align: left; vertical-align: top; }
.verdicts th { font-weight: 600; white-space: nowrap; }
.verdicts .why { color: var(--soft); white-space: normal; width: 60%; }
.chip { display: inline-block; min-width: 52px; padding: 0 8px; border-radius: 9px; font-size: 12.5px;
  text-align: center; border: 1px solid; color: var(--soft); border-color: var(--line); }
.chip.good { color: var(--good); border-color: var(--good); }
.chip.watch { color: var(--watch); border-color: var(--watch); }
.chip.poor { color: var(--paper); background: var(--bad); border-color: var(--bad); }
.film { max-width: 720px; }
.strip { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px 12px; }
.strip figure { margin: 0; }
.weak ul { margin: -8px 0 28px; padding-left: 20px; }
.wide { width: 100%; }
.wide th, .wide td { padding: 4px 0 4px 20px; }
.wide th:first-child { padding-left: 0; }
.head th { color: var(--soft); text-align: right; font-size: 13px; }
.head th:first-child { text-align: left; }
details { margin-top: 18px; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 8px; }
p.summary { cursor: auto; }
@media (max-width: 600px) {
  .strip { grid-template-columns: repeat(2, 1fr); }
  .verdict { padding-left: 12px; }
  .verdicts tr { display: grid; grid-template-columns: 1fr auto; padding: 6px 0; }
  .verdicts th, .verdicts td { padding: 0; white-space: normal; }
  .verdicts td:nth-child(2) { grid-row: 2; grid-column: 1; }
  .verdicts td:nth-child(3) { text-align: right; }
  .verdicts .why { grid-column: 1 / 3; width: auto; font-size: 13px; text-align: left; }
}
"""
