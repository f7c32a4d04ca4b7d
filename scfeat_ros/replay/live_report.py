"""What a live replay found out: figures of what was sent and what came back, and the files that show them.

All times of one figure are of one clock: latencies and rates of this machine's CLOCK_MONOTONIC, which the player and
the listener share; the age of an image is of the clock of the node, which is that of the bag where the node uses it.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scfeat_core import charts
from scfeat_core.report import Figures, document, facts_list, figures_table, rounded, write, write_json

if TYPE_CHECKING:
    from scfeat_ros.monitor import Heard

STAGES = ("queue", "decode", "preprocess", "network", "match", "publish")  # of the status
INSIDE = (*STAGES, "other", "total")
MEANS = (
    "Means of stages add up to the mean of the whole, medians and other quantiles do not. 'other' is what the node "
    "does between its stages, and waiting there; 'transport' what is left of the time from image to the last output."
)
KINDS = ("features", "matches", "tracks", "stereo_matches")
SHARES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
STATISTICS = ("mean", *SHARES)
FILES = ("live.json", "live.html", "latency.csv")

# Of the flat summary, for checks; None where one is not known, for those below with the reason under "missing".
SUMMARY_NAMES = (
    *("frames", "received", "processed", "dropped", "dropped_before_node", "damaged", "lost_messages", "lost_bytes"),
    *(f"dropped_{why}" for why in ("busy", "stale", "decode", "sync", "no_calibration", "unwanted", "error")),
    *("processed_hz", "latency_ms", "latency_p95_ms", "latency_p99_ms", "latency_max_ms", "age_ms", "age_p95_ms"),
    *("ms_network", "ms_total", "keypoints", "matches", "inliers", "inlier_ratio", "coverage"),
)


_LATENCY_NAMES = {"latency_ms": "p50", "latency_p95_ms": "p95", "latency_p99_ms": "p99", "latency_max_ms": "max"}
_AGE_NAMES = {"age_ms": "p50", "age_p95_ms": "p95"}


@dataclass(frozen=True, eq=False)
class CameraRun:
    """One camera.

    sent: (index, stamp, CLOCK_MONOTONIC), nanoseconds, of each image that was published. arrivals: kind -> (stamp,
    CLOCK_MONOTONIC at arrival) of each message. heard: what its status said.
    """

    name: str
    topic: str
    sent: Sequence[tuple[int, int, int]]
    heard: Heard
    arrivals: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def latencies(self, kind: str) -> np.ndarray:
        """(len(sent),) float64, milliseconds from publishing an image to the arrival of what was made of it; NaN where
        nothing came. Of several images with one stamp, the first counts.
        """
        came: dict[int, int] = {}
        for stamp, at in self.arrivals.get(kind, ()):
            came.setdefault(stamp, at)
        values = [(came.pop(stamp) - at) / 1e6 if stamp in came else np.nan for _, stamp, at in self.sent]
        return np.array(values, np.float64)

    def measured(self, name: str) -> np.ndarray:
        """A field of the status (monitor.MEASURED) of each frame that a status was of."""
        from scfeat_ros.monitor import MEASURED

        column = MEASURED.index(name)
        return np.array([values[column] for values in self.heard.frames.values()], np.float64)

    def inside(self, stage: str) -> np.ndarray:
        """Milliseconds of one of INSIDE, of each frame that a status was of: 0 for a stage that did not run in it, NaN
        for one that never ran. "other": what the stages leave of the total."""
        total = self.measured("ms_total")
        if stage == "total":
            return total
        if stage == "other":
            return total - np.nansum([self.inside(name) for name in STAGES], axis=0)
        values = self.measured(f"ms_{stage}")
        return np.where(np.isfinite(total), np.nan_to_num(values), np.nan) if np.isfinite(values).any() else values

    def whole(self) -> dict[str, np.ndarray]:
        """Milliseconds from publishing an image to the arrival of the last of its outputs, of the frames that a status
        was of and of which an output came: inside of the node, transport (both ways), and their sum."""
        last: dict[int, int] = {}
        for came in self.arrivals.values():
            for stamp, at in came:
                last[stamp] = max(at, last.get(stamp, at))
        sent = {stamp: at for _, stamp, at in reversed(self.sent)}
        pairs = [
            (total, (last[stamp] - sent[stamp]) / 1e6)
            for stamp, total in zip(self.heard.frames, self.inside("total").tolist(), strict=True)
            if stamp in last and stamp in sent and np.isfinite(total)
        ]
        inside, whole = np.array(pairs, np.float64).reshape(-1, 2).T
        return {"inside_node": inside, "transport": whole - inside, "image_to_last_output": whole}

    def counted(self, name: str) -> int:
        """How much a counter of the status grew while it was watched."""
        if self.heard.last is None or self.heard.first is None:
            return 0
        return int(getattr(self.heard.last, name)) - int(getattr(self.heard.first, name))

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> images."""
        from scfeat_ros.monitor import dropped

        reasons = () if self.heard.last is None else dropped(self.heard.last)
        return {reason: self.counted(f"dropped_{reason}") for reason in reasons}

    @property
    def waiting(self) -> int:
        """Images that the node received and did not finish."""
        return self.counted("received") - self.counted("processed") - sum(self.dropped.values())


@dataclass(frozen=True, eq=False)
class LiveRun:
    """player: what it says beside the images, see player.Log.summary; empty where it said nothing. recorded: messages.
    cpu: share of one core that listening and recording took.
    """

    cameras: Sequence[CameraRun]
    player: Mapping[str, Any]
    recorded: int = 0
    cpu: float = 0.0


def quantiles(values: np.ndarray, digits: int = 1) -> dict[str, Any]:
    """STATISTICS of the finite values, None where there is none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return dict.fromkeys(STATISTICS)
    found = {name: rounded(float(np.percentile(finite, share)), digits) for name, share in SHARES.items()}
    return {"mean": rounded(float(finite.mean()), digits)} | found


# -- figures -----------------------------------------------------------------------------------------------------------


def figures_of(run: LiveRun) -> Figures:
    """Everything that is reported, rounded; of several cameras one after the other."""
    several = len(run.cameras) > 1
    figures: dict[str, dict[str, Any]] = {}
    for camera in run.cameras:
        sections = _camera_figures(camera)
        figures |= {f"{camera.name}_{name}" if several else name: section for name, section in sections.items()}
    late = run.player.get("late_ms", {})
    figures["player"] = {
        "late_ms": {
            name: rounded(late.get(key), 2) for name, key in (("p50", "median"), ("p95", "p95"), ("max", "max"))
        },
        "share_of_a_core": rounded(run.player.get("cpu"), 3),
    }
    figures["recording"] = {"messages": run.recorded, "share_of_a_core": rounded(run.cpu, 3)}
    return figures


def _camera_figures(camera: CameraRun) -> dict[str, dict[str, Any]]:
    arrived = [kind for kind in KINDS if kind in camera.arrivals]
    frames = {"published": len(camera.sent), "received": camera.counted("received")}
    frames["processed"] = camera.counted("processed")
    frames |= {f"dropped_{reason}": count for reason, count in camera.dropped.items()}
    frames["still_in_work"] = camera.waiting
    # an image that replaces one which the executor has not fetched yet: the middleware drops that, uncounted
    frames["dropped_before_node"] = max(0, frames["published"] - frames["received"])
    rates = {"published": rounded(_rate([at for _, _, at in camera.sent]), 2)}
    rates |= {kind: rounded(_rate([at for _, at in camera.arrivals[kind]]), 2) for kind in arrived}
    return {
        "frames": frames,
        "rate_hz": rates,
        "latency_ms": {f"image_to_{kind}": quantiles(camera.latencies(kind)) for kind in arrived},
        "inside_node_ms": {stage: quantiles(camera.inside(stage)) for stage in INSIDE},
        "image_to_last_output_ms": {name: quantiles(values) for name, values in camera.whole().items()},
        "image_age_ms": {"at_publishing": quantiles(camera.measured("age_ms"))},
        "per_frame": {
            name: quantiles(camera.measured(name), 3) for name in ("keypoints", "matches", "inliers", "tracks")
        }
        | {"frames_in_status": len(camera.heard.frames)},
    }


def _rate(times: Sequence[int]) -> float | None:
    """Hz, of nanoseconds; None of less than two."""
    seconds = (max(times) - min(times)) / 1e9 if len(times) > 1 else 0.0
    return (len(times) - 1) / seconds if seconds else None


def summary_of(run: LiveRun) -> dict[str, Any]:
    """Flat figures of all cameras together, by SUMMARY_NAMES: counts are sums, the rate is that of the slowest,
    latencies are those of all features. "missing": figure -> why it has no value, where there is such a reason.
    """
    summary: dict[str, Any] = dict.fromkeys(SUMMARY_NAMES)
    summary["frames"] = sum(len(camera.sent) for camera in run.cameras)
    for name in ("received", "processed"):
        summary[name] = sum(camera.counted(name) for camera in run.cameras)
    for camera in run.cameras:
        for reason, count in camera.dropped.items():
            summary[f"dropped_{reason}"] = (summary.get(f"dropped_{reason}") or 0) + count
    summary["dropped"] = sum(sum(camera.dropped.values()) for camera in run.cameras)
    summary["dropped_before_node"] = max(0, summary["frames"] - summary["received"])
    damage = run.player.get("damage")
    summary |= {
        "damaged": int(bool(damage)),
        **{name: run.player.get(name, 0) for name in ("lost_messages", "lost_bytes")},
    }
    summary |= {"damage": damage} if damage else {}
    rates = [rate for camera in run.cameras if (rate := _processed_hz(camera)) is not None]
    summary["processed_hz"] = rounded(min(rates, default=None), 2)
    for name in ("ms_network", "ms_total", "keypoints", "matches", "inliers", "inlier_ratio", "coverage"):
        summary[name] = quantiles(_all(camera.measured(name) for camera in run.cameras), 3)["p50"]
    return summary | _times(run)


def _processed_hz(camera: CameraRun) -> float | None:
    """Of its features; 0 where none came, or a single one of several images. None where it was sent no images, or
    features were not listened to: nothing says how many should have come.
    """
    if not camera.sent or "features" not in camera.arrivals:
        return None
    came = np.isfinite(camera.latencies("features")).sum()
    return _rate([at for _, at in camera.arrivals["features"]]) if came >= min(2, len(camera.sent)) else 0.0


def _times(run: LiveRun) -> dict[str, Any]:
    """Latencies and ages of the summary, and why there are none."""
    sent = [camera for camera in run.cameras if camera.sent]
    latencies = [(camera, camera.latencies("features")) for camera in sent if "features" in camera.arrivals]
    ages = [(camera, camera.measured("age_ms")) for camera in sent]
    latency, no_latency = _of_all(_LATENCY_NAMES, latencies, "no features came of the images of")
    age, no_age = _of_all(_AGE_NAMES, ages, "no status was of an image of")
    missing = no_latency | no_age
    return latency | age | ({"missing": missing} if missing else {})


def _of_all(
    names: Mapping[str, str], times: Sequence[tuple[CameraRun, np.ndarray]], why: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of the times of all cameras, and why they have no value: where one camera has none, those of the others
    would hide that its images never came back. names: figure -> which of STATISTICS. why: goes before the cameras.
    """
    silent = [camera.name or camera.topic for camera, values in times if not np.isfinite(values).any()]
    known = quantiles(_all([] if silent else (values for _, values in times)))
    missing = dict.fromkeys(names, f"{why} {', '.join(silent)}") if silent else {}
    return {name: known[statistic] for name, statistic in names.items()}, missing


def _all(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])


def warnings_of(run: LiveRun) -> list[str]:
    """What the figures alone do not say."""
    found = [f"only the readable part was played: {run.player['error']}"] if run.player.get("error") else []
    for camera in run.cameras:
        if camera.waiting:
            found.append(f"{camera.name}: {camera.waiting} frames were still in work at the end")
        if camera.heard.last is not None and camera.heard.last.last_error:
            found.append(f"{camera.name}: the node's last error: {camera.heard.last.last_error}")
        played = {stamp for _, stamp, _ in camera.sent}
        foreign = sum(stamp not in played for stamp, _ in camera.arrivals.get("features", ()))
        if foreign:
            found.append(
                f"{camera.name}: features of {foreign} images that were not played: who else publishes images?"
            )
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def write_files(folder: Path, run: LiveRun, figures: Figures, facts: Mapping[str, Any]) -> None:
    """FILES. Raises ScfeatError where one cannot be written."""
    write_json(folder / "live.json", figures, facts)
    write(folder / "latency.csv", _latency_table(run))
    write(folder / "live.html", _page(run, figures, facts))


def _latency_table(run: LiveRun) -> str:
    """A line for each image: when it was published, and after how many milliseconds what was made of it had come."""
    kinds = [kind for kind in KINDS if any(kind in camera.arrivals for camera in run.cameras)]
    start = min((camera.sent[0][2] for camera in run.cameras if camera.sent), default=0)
    sink = io.StringIO()
    table = csv.writer(sink, lineterminator="\n")
    table.writerow(["camera", "index", "stamp_ns", "published_ms", *(f"{kind}_ms" for kind in kinds)])
    for camera in run.cameras:
        columns = [camera.latencies(kind) for kind in kinds]
        for row, (index, stamp, at) in enumerate(camera.sent):
            cells = ["" if np.isnan(column[row]) else f"{column[row]:.3f}" for column in columns]
            table.writerow([camera.name, index, stamp, f"{(at - start) / 1e6:.3f}", *cells])
    return sink.getvalue()


def _page(run: LiveRun, figures: Figures, facts: Mapping[str, Any]) -> str:
    parts = [
        f"<h1>{html.escape(str(facts['bag']))}, live</h1>",
        f'<p class="summary">{html.escape(_headline(run))}</p>',
    ]
    parts += [f"<p>{html.escape(problem)}</p>" for problem in facts["problems"]]
    for camera in run.cameras:
        parts.append(f"<h2>{html.escape(camera.name)}: {html.escape(camera.topic)}</h2>")
        parts.append('<div class="charts">' + "".join(_camera_charts(camera)) + "</div>")
    parts += [
        "<h2>Figures</h2>",
        f'<p class="about">{html.escape(MEANS)}</p>',
        figures_table(figures),
        "<h2>How it was made</h2>",
        facts_list(facts),
    ]
    return document("scfeat replay, live", parts)


def _headline(run: LiveRun) -> str:
    summary = summary_of(run)
    text = f"{summary['processed']} of {summary['frames']} images processed"
    if summary["latency_ms"] is not None:
        text += (
            f"; features {summary['latency_ms']:g} ms after the image (median), {summary['latency_p99_ms']:g} ms (p99)"
        )
    return text + "."


def _camera_charts(camera: CameraRun) -> list[str]:
    kinds = [kind for kind in KINDS if kind in camera.arrivals]
    drawn = [
        charts.histogram(charts.Histogram(f"Image to {kind.replace('_', ' ')}", camera.latencies(kind), "ms"))
        for kind in kinds
    ]
    start = camera.sent[0][2] if camera.sent else 0
    times = np.array([(at - start) / 1e9 for _, _, at in camera.sent])
    lines = [_came(kind, times, camera.latencies(kind), i) for i, kind in enumerate(kinds)]
    drawn.append(
        charts.chart(charts.Chart("Latency over the run", lines, "s", "ms", note="of the images that came back"))
    )
    ages = camera.measured("age_ms")
    stages = [
        charts.Line(stage, np.arange(len(ages)), camera.inside(stage), i)
        for i, stage in enumerate(("queue", "decode", "network", "match", "other", "total"))
    ]
    drawn.append(charts.chart(charts.Chart("Inside the node", stages, "frame in status", "ms")))
    return drawn


def _came(kind: str, times: np.ndarray, latencies: np.ndarray, colour: int) -> charts.Line:
    """Without what was dropped: between two drops a single image would be no line."""
    finite = np.isfinite(latencies)
    return charts.Line(kind.replace("_", " "), times[finite], latencies[finite], colour)
