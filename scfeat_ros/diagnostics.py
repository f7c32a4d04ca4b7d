"""What /diagnostics says: how images come in, what they look like, what is found in them, and what computes it.

A pure function of frozen inputs makes the diagnostic_msgs/DiagnosticArray; only ``measure_memory`` looks around. As
tools for diagnostics expect (REP 107), names are "node: task", levels are OK, WARN, ERROR, and STALE where there is
nothing new to judge, and the message says what is wrong and what to do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from scfeat_core.types import ImageQuality

from .health import FrameHealth
from .worker import Counts

OK, WARN, ERROR, STALE = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE
_AS_PLANNED = ("busy", "unwanted")  # drops by design: the newest image wins, and nobody listened


@dataclass(frozen=True)
class Limits:
    """From where on something is worth a warning, or an error; each with its reason.

    On four recordings (a drone, a headset, a car, a hand) coverage is 0.77 to 1, inlier_ratio 0.65 to 0.94, mean 0.34
    to 0.6, dark and saturated at most 0.2, and sharpness 0.43 to 0.79, but 0.14 to 0.25 by hand in quick rotation.
    """

    silence: float = 3.0  # s without an image: slower cameras than 1/3 Hz are not tracked through
    rate: float = 3.0  # Hz processed: at a turn of 1 rad/s less overlap than 80 % between two frames of a 90° lens
    age_warn: float = 0.5  # s from stamp to arrival: more than the slowest exposure, encoding and network together
    age_error: float = 10.0  # s: beyond what the buffer of tf2 remembers, the pose at the stamp is gone
    ahead_warn: float = 0.05  # s into the future: more than NTP leaves, and tf2 refuses to extrapolate
    mean_warn: float = 0.06  # of the brightness range: the noise of the sensor comes near the contrast of the scene
    mean_error: float = 0.02  # a capped lens, or darkness
    end_warn: float = 1 / 3  # share of the pixels that are dark or saturated: no gradient there, hence no keypoints
    end_error: float = 0.9
    sharpness: float = 0.15  # of ImageQuality: a Gaussian blur of 1.3 pixels at 640 (BLURRED of quality.py)
    masked_warn: float = 0.6  # share that the mask hides: less view is left than two-view geometry needs to be stable
    masked_error: float = 0.98
    keypoints: int = 50  # five-point RANSAC needs about 15 inliers, and a third of the points are matched
    coverage: float = 0.25  # share of the 8 x 8 cells: points in one quarter leave rotation and translation ambiguous
    matches: int = 30  # from so many on a share of inliers says something
    inlier_ratio: float = 0.3  # at 0.3 a sample of 5 has no outlier once in 400: RANSAC finds models by chance, below
    free_memory: float = 0.05  # share: the next allocation may fail


@dataclass(frozen=True)
class Memory:
    """Bytes; None where that is not known. rss: of this process. available, total: of the host.

    device_used: by this process's tensors. device_free, device_total: of the device, None on the CPU.
    """

    rss: int | None = None
    available: int | None = None
    total: int | None = None
    device_used: int | None = None
    device_free: int | None = None
    device_total: int | None = None


@dataclass(frozen=True)
class CameraReport:
    """One camera since the last report. topic: of its images. now, before: its counts at this and the last report.

    period: seconds between the two. silence: seconds since the last image arrived, infinite before the first one.
    active: whether the node is subscribed. health: of the newest processed frame, None before the first one.
    """

    camera: str
    topic: str
    now: Counts
    before: Counts
    period: float
    silence: float
    active: bool
    health: FrameHealth | None = None
    last_error: str = ""

    def per_second(self, reason: str = "") -> float:
        """Rate of drops for a reason since the last report; without one, of what arrived."""
        if reason:
            return self._rate(self.now.dropped.get(reason, 0) - self.before.dropped.get(reason, 0))
        return self._rate(self.now.received - self.before.received)

    @property
    def processed_per_second(self) -> float:
        return self._rate(self.now.processed - self.before.processed)

    @property
    def news(self) -> FrameHealth | None:
        """Of the newest frame, where that came in since the last report."""
        return self.health if self.now.processed > self.before.processed else None

    def _rate(self, count: int) -> float:
        return count / self.period if self.period > 0 else math.nan


@dataclass(frozen=True)
class NetworkReport:
    """What computes the features. device: e.g. "cuda:0". weights: as configured.

    engine: what runs the network, e.g. "onnx". engine_note: why it is not the one that was asked for; empty where it
    is. engine_making: what is being made, and what runs meanwhile; empty where nothing is.
    """

    device: str
    precision: str
    weights: str
    descriptor_space: str
    memory: Memory = field(default_factory=Memory)
    engine: str = ""
    engine_note: str = ""
    engine_making: str = ""


class Finding(NamedTuple):
    """text: what is wrong, and what to do."""

    level: bytes
    text: str


Values = Mapping[str, Any]


def diagnostics_to_message(
    node: str, stamp: Any, cameras: Sequence[CameraReport], network: NetworkReport, limits: Limits | None = None
) -> DiagnosticArray:
    """node: its name, with or without the leading slash. stamp: builtin_interfaces/Time, of the node's clock.

    For each camera the status of its input, image and features, then one of the network.
    """
    limits = limits or Limits()
    node = node.lstrip("/")
    statuses = [status for camera in cameras for status in _camera_statuses(node, camera, limits)]
    found = [*_engine_findings(network), *_memory_findings(network.memory, limits)]
    statuses.append(_status(f"{node}: network", network.device, found, _ready(network), _network_values(network)))
    return DiagnosticArray(header=Header(stamp=stamp), status=statuses)


def measure_memory(device: str) -> Memory:
    """Of this process, the host and a device of torch. What the system does not tell stays None."""
    rss, available, total = _rss(), *_host_memory()
    if not device.startswith("cuda"):
        return Memory(rss, available, total)
    import torch  # not at the top: the node starts without it

    try:
        return Memory(rss, available, total, torch.cuda.memory_allocated(device), *torch.cuda.mem_get_info(device))
    except RuntimeError:  # a device that has failed: the drops say so
        return Memory(rss, available, total)


# -- one camera --------------------------------------------------------------------------------------------------------


def _camera_statuses(node: str, report: CameraReport, limits: Limits) -> Iterator[DiagnosticStatus]:
    def status(task: str, found: Iterable[Finding], fine: str, values: Values) -> DiagnosticStatus:
        return _status(f"{node}: {report.camera} {task}", report.camera, found, fine, values)

    fine = f"{report.per_second():.1f} Hz received, {report.processed_per_second:.1f} Hz processed"
    yield status("input", _input_findings(report, limits), fine, _input_values(report))
    health = report.news
    if health is None:
        for task in ("image", "features"):
            yield status(task, [Finding(STALE, _idle(report))], "", {})
    else:
        yield status("image", _image_findings(health, limits), "well exposed and sharp", _image_values(health))
        fine = f"{health.keypoints} keypoints"
        yield status("features", _feature_findings(health, limits), fine, _feature_values(health))


def _idle(report: CameraReport) -> str:
    if not report.active:
        return "the node is not active"
    if report.per_second("unwanted") > 0:
        return "not processed: nobody subscribes to what is made of the images"
    return "no frame was processed since the last report"


def _input_findings(report: CameraReport, limits: Limits) -> Iterator[Finding]:
    if not report.active:
        yield Finding(STALE, "the node is not active: let its lifecycle manager activate it, or set autostart")
    elif report.silence > limits.silence:
        yield _silence(report)
    else:
        yield from _drop_findings(report)
        yield from _rate_findings(report, limits)
        yield from _age_findings(report.news, limits)


def _silence(report: CameraReport) -> Finding:
    topic = report.topic
    if math.isinf(report.silence):
        text = f"no image on {topic} yet: does its driver run? `ros2 topic info -v {topic}` compares names and QoS"
        return Finding(STALE, text)
    return Finding(ERROR, f"no images for {report.silence:.0f} s on {topic}: has its driver stopped, or the network?")


def _drop_findings(report: CameraReport) -> Iterator[Finding]:
    """An error where nothing comes through."""
    rates = {reason: report.per_second(reason) for reason in report.now.dropped if reason not in _AS_PLANNED}
    found = ", ".join(f"{reason} {rate:.1f} Hz" for reason, rate in rates.items() if rate > 0)
    if found:
        level = WARN if report.processed_per_second > 0 else ERROR
        yield Finding(level, f"frames are dropped ({found}): {report.last_error or 'see the log of the node'}")


def _rate_findings(report: CameraReport, limits: Limits) -> Iterator[Finding]:
    processed = report.processed_per_second
    if processed < min(limits.rate, 0.9 * report.per_second()) and report.per_second("busy") > 0:
        yield Finding(
            WARN,
            f"only {processed:.1f} of {report.per_second():.1f} Hz are processed, the network is too slow for this "
            "camera: use a GPU (device), or let the camera send smaller images",
        )


def _age_findings(health: FrameHealth | None, limits: Limits) -> Iterator[Finding]:
    age = _arrival_age(health)
    if health is not None and health.header.stamp.sec == health.header.stamp.nanosec == 0:
        yield Finding(WARN, "stamps are 0, the driver sets none: nothing can be put in relation to these images")
    elif age > limits.age_error:
        cure = "clocks differ (synchronise them), or a recording plays (use_sim_time)"
        yield Finding(ERROR, f"stamps are {_seconds(age)} old: {cure}")
    elif age > limits.age_warn:
        yield Finding(WARN, f"stamps are {_seconds(age)} old: clocks? Or a driver or network that holds images back")
    elif age < -limits.ahead_warn:
        yield Finding(WARN, f"stamps are {_seconds(-age)} in the future: synchronise the clocks of camera and robot")


def _arrival_age(health: FrameHealth | None) -> float:
    """Seconds from the stamp to the arrival at the node; NaN where it is not known."""
    if health is None:
        return math.nan
    processing = 0.0 if math.isnan(health.ms_total) else health.ms_total
    return 1e-3 * (health.age_ms - processing)


def _image_findings(health: FrameHealth, limits: Limits) -> Iterator[Finding]:
    for text in health.ignored:
        yield Finding(WARN, text)
    if health.masked > limits.masked_warn:
        level = ERROR if health.masked > limits.masked_error else WARN
        yield Finding(level, f"mask covers {_percent(health.masked)}: is it inverted, or too generous? 0 hides")
    if health.quality is not None:
        yield from _exposure_findings(health.quality, limits)
        if health.quality.sharpness < limits.sharpness:
            found = f"image is blurred: sharpness {health.quality.sharpness:.2g}"
            yield Finding(WARN, f"{found}; shorter exposure, focus, or a clean lens")


def _exposure_findings(quality: ImageQuality, limits: Limits) -> Iterator[Finding]:
    if quality.mean < limits.mean_warn:
        level = ERROR if quality.mean < limits.mean_error else WARN
        yield Finding(level, f"image is dark: mean {quality.mean:.2f}; more light, exposure or gain; lens covered?")
    elif quality.dark > limits.end_warn:
        level = ERROR if quality.dark > limits.end_error else WARN
        yield Finding(level, f"{_percent(quality.dark)} of the image are black: more exposure or gain")
    if quality.saturated > limits.end_warn:
        level = ERROR if quality.saturated > limits.end_error else WARN
        yield Finding(level, f"{_percent(quality.saturated)} of the image are saturated: less exposure or gain")


def _feature_findings(health: FrameHealth, limits: Limits) -> Iterator[Finding]:
    if health.keypoints < limits.keypoints:
        level = WARN if health.keypoints else ERROR
        found = f"only {health.keypoints} keypoints"
        yield Finding(level, f"{found}: too little texture or light, or score_threshold is too high")
    elif health.coverage < limits.coverage:
        yield Finding(WARN, f"keypoints cover {_percent(health.coverage)} of the image: set grid to spread them; mask?")
    if health.matches >= limits.matches and health.inlier_ratio < limits.inlier_ratio:
        found = f"{_percent(health.inlier_ratio)} of {health.matches} matches are inliers"
        yield Finding(WARN, f"{found}: blur, too low a rate, moving objects, or a calibration that does not fit")


# -- the network -------------------------------------------------------------------------------------------------------


def _engine_findings(network: NetworkReport) -> Iterator[Finding]:
    if network.engine_note:
        yield Finding(WARN, network.engine_note)


def _memory_findings(memory: Memory, limits: Limits) -> Iterator[Finding]:
    host = ("the host", memory.available, memory.total)
    for place, free, total in (host, ("the device", memory.device_free, memory.device_total)):
        if free is not None and total and free < limits.free_memory * total:
            left = f"{_megabytes(free)} of {_megabytes(total)} MB are left on {place}"
            yield Finding(WARN, f"{left}: end what else runs there")


def _ready(network: NetworkReport) -> str:
    engine = f" by {network.engine}" if network.engine else ""
    making = f"; {network.engine_making}" if network.engine_making else ""
    return f"{network.weights} on {network.device} in {network.precision}{engine}{making}"


def _rss() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _host_memory() -> tuple[int | None, int | None]:
    """Available, and all of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * kilobytes["MemAvailable"], 1024 * kilobytes["MemTotal"]


# -- values ------------------------------------------------------------------------------------------------------------


def _input_values(report: CameraReport) -> Values:
    """Totals since the start of the node, and rates since the last report."""
    health = report.news
    return {
        "topic": report.topic,
        "received (Hz)": report.per_second(),
        "processed (Hz)": report.processed_per_second,
        **{f"dropped {reason} (Hz)": report.per_second(reason) for reason in sorted(report.now.dropped)},
        "received": report.now.received,
        "processed": report.now.processed,
        **{f"dropped {reason}": count for reason, count in sorted(report.now.dropped.items())},
        "stamp age at arrival (ms)": 1e3 * _arrival_age(health),
        "age at publication (ms)": health.age_ms if health else math.nan,
        "processing (ms)": health.ms_total if health else math.nan,
        "last error": report.last_error,
    }


def _image_values(health: FrameHealth) -> Values:
    quality = vars(health.quality) if health.quality else {}
    return {
        **{name: quality.get(name, math.nan) for name in ("mean", "dark", "saturated", "sharpness")},
        "masked": health.masked,
    }


def _feature_values(health: FrameHealth) -> Values:
    names = ("keypoints", "coverage", "matches", "inliers", "inlier_ratio", "tracks", "median_track_age")
    return {name.replace("_", " "): getattr(health, name) for name in names}


def _network_values(network: NetworkReport) -> Values:
    memory = {name.replace("_", " "): value for name, value in vars(network.memory).items() if value is not None}
    return {
        "device": network.device,
        "precision": network.precision,
        "engine": network.engine,
        "weights": network.weights,
        "descriptor space": network.descriptor_space,
        **{f"memory {name} (MB)": _megabytes(value) for name, value in memory.items()},
    }


def _status(name: str, hardware: str, findings: Iterable[Finding], fine: str, values: Values) -> DiagnosticStatus:
    """With the worst level, and the worst findings first. fine: the message where there are none."""
    found = sorted(findings, key=lambda finding: finding.level, reverse=True)
    return DiagnosticStatus(
        level=found[0].level if found else OK,
        name=name,
        message="; ".join(finding.text for finding in found) or fine,
        hardware_id=hardware,
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "not known"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _megabytes(count: int) -> int:
    return round(1e-6 * count)


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.2g} s"
    return f"{value / 3600:.1f} h" if value < 3.6e5 else f"{value / 86400:.0f} days"
