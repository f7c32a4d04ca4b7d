"""Does the node keep its memory? A camera plays into it for an hour; rate, drops, latency and resident memory are kept.

python benchmarks/soak.py [--duration 3600] [--fps 15] [--bag my_bag] [--device cuda] [--output build/soak]

The node runs in a process of its own with somebody listening to all that it computes; the camera is rendered, or a
rosbag2 that begins again when it ends (its clock then jumps back, which resets the tracks). Writes soak.json and, where
matplotlib is there, soak.png. Memory grows where even the lower end of the 95 % interval of its slope after the warm-up
is above --limit, and is flat where the upper end is not; the exit status is 1 where it grows, 3 where the run was too
short to tell, 2 after an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import ScfeatError
from scfeat_ros.domain import free_domain, own_graph
from scfeat_ros.processes import Child

START_PATIENCE = 600.0  # seconds for torch, network and renderer on a busy machine
PERCENTILES = (50, 95, 99, 100)
EXIT_STATUS = {"flat": 0, "grows": 1, "undecided": 3}


@dataclass(frozen=True)
class Sample:
    """One look at the node. seconds: since the first features. rss: MB. counts: those of the newest FrontendStatus."""

    seconds: float
    rss: float
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Slope:
    """Of memory over time, MB an hour, by least squares, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass
class Heard:
    """What the subscribers of this process got. latencies: milliseconds from the stamp of the image to the arrival."""

    messages: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    status: Any = None


def resident_memory(pid: int) -> float:
    """MB of a process that occupy memory. Raises ScfeatError where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError) as error:
        raise ScfeatError(f"expected the node to run to the end, found its process {pid} gone") from error
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(seconds: np.ndarray, rss: np.ndarray) -> Slope:
    """Least squares through (n,) samples; n >= 3.

    Memory goes in steps, so that neighbouring samples say nearly the same: the interval is that of an autoregressive
    process of first order, not of independent samples.
    """
    hours = seconds / 3600
    value, offset = np.polyfit(hours, rss, 1)
    residuals = rss - value * hours - offset
    energy = float((residuals**2).sum())
    spread = float(np.sqrt(energy / (len(rss) - 2) / ((hours - hours.mean()) ** 2).sum()))
    alike = min(max(float((residuals[1:] * residuals[:-1]).sum()) / energy, 0.0), 0.99) if energy else 0.0
    spread *= float(np.sqrt((1 + alike) / (1 - alike)))
    return Slope(float(value), float(value - 1.96 * spread), float(value + 1.96 * spread))


class Listener:
    """Subscribers to everything that the node publishes, so that it does all that it can."""

    def __init__(self, domain: int, rendered: bool) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from scfeat.msg import Features, FrontendStatus, Matches, Tracks

        self.heard = Heard()
        self._rendered = rendered
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain)
        self._node = rclpy.create_node("soak", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        for kind, name in ((Features, "features"), (Matches, "matches"), (Tracks, "tracks")):
            self._node.create_subscription(kind, f"/scfeat/{name}", self._counter(name), 20, raw=True)
        self._node.create_subscription(FrontendStatus, "/scfeat/status", self._on_status, 20)

    def spin_until(self, end: float) -> None:
        """Take what arrives until this time of time.monotonic()."""
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=min(left, 1.0))

    def close(self) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    def _counter(self, name: str) -> Any:
        from scfeat_ros.bags import header_stamp

        def count(data: bytes) -> None:
            self.heard.messages[name] = self.heard.messages.get(name, 0) + 1
            if name == "features" and self._rendered:  # stamps of a bag are of another day
                self.heard.latencies.append((time.time_ns() - header_stamp(data)) / 1e6)

        return count

    def _on_status(self, message: Any) -> None:
        self.heard.status = message
        if self._rendered and message.processed:
            self.heard.ages.append(message.age_ms)


def counts(status: Any) -> dict[str, int]:
    """The counters of a FrontendStatus; empty without one."""
    names = [] if status is None else status.get_fields_and_field_types()
    return {name: getattr(status, name) for name in names if name in ("received", "processed") or "dropped_" in name}


def soak(args: argparse.Namespace) -> tuple[list[Sample], Heard]:
    """Run node and camera for the duration; what was measured meanwhile."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scfeat-soak-")))
        domain = stack.enter_context(free_domain())
        os.environ.update(own_graph(domain, scratch))  # before Fast DDS reads it, in this process, too
        listener = Listener(domain, args.bag is None)
        stack.callback(listener.close)
        node = stack.enter_context(Child("node", node_command(args), scratch / "node.log", os.environ))
        camera = stack.enter_context(Camera(player_command(args), scratch / "camera.log"))
        wait_for_features(listener, node, camera)
        return list(sample(args, listener, node, camera)), listener.heard


class Camera:
    """The player, started again whenever it has come to the end of its images."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._start = lambda: Child("camera", command, log, os.environ)
        self.child = self._start()

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *exception: object) -> None:
        self.child.stop()

    def keep_playing(self) -> None:
        """Raises ScfeatError where it ended otherwise than in order."""
        if self.child.exit_code == 0:
            self.child = self._start()
        self.child.check_alive()


def node_command(args: argparse.Namespace) -> list[str]:
    parameters = [f"weights:={args.weights}", f"device:={args.device}", *args.parameter]
    words = [word for parameter in parameters for word in ("-p", parameter)]
    return [sys.executable, "-m", "scfeat_ros.node", "--ros-args", *words]


def player_command(args: argparse.Namespace) -> list[str]:
    source = [] if args.bag is None else ["--bag", str(args.bag)]
    frames = str(round((args.duration + START_PATIENCE) * args.fps))
    options = ["--fps", str(args.fps), "--frames", frames, "--wait", str(START_PATIENCE)]
    return [sys.executable, "-m", "scfeat_ros.player", *source, *options]


def wait_for_features(listener: Listener, node: Child, camera: Camera) -> None:
    """Raises ScfeatError where none come."""
    end = time.monotonic() + START_PATIENCE
    while "features" not in listener.heard.messages:
        node.check_alive()
        camera.keep_playing()
        if time.monotonic() > end:
            logs = "\n".join(f"{child.name}:\n{child.last_lines()}" for child in (node, camera.child))
            raise ScfeatError(f"expected features within {START_PATIENCE:g} s, found none; the logs end with\n{logs}")
        listener.spin_until(time.monotonic() + 0.2)


def sample(args: argparse.Namespace, listener: Listener, node: Child, camera: Camera) -> Iterator[Sample]:
    start = time.monotonic()
    for number in range(round(args.duration / args.interval) + 1):
        listener.spin_until(start + number * args.interval)
        node.check_alive()
        camera.keep_playing()
        taken = Sample(time.monotonic() - start, resident_memory(node.pid), counts(listener.heard.status))
        print(f"{taken.seconds:7.0f} s  {taken.rss:8.1f} MB  {taken.counts.get('processed', 0):8d} frames", flush=True)
        yield taken


def percentiles(values: list[float]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES) if values else []
    return {f"p{percent}": round(float(value), 2) for percent, value in zip(PERCENTILES, found, strict=False)}


def summarise(args: argparse.Namespace, samples: list[Sample], heard: Heard) -> dict[str, Any]:
    """Everything that soak.json holds. Raises ScfeatError where too few samples are left after the warm-up."""
    seconds, rss = (np.array([getattr(sample, name) for sample in samples]) for name in ("seconds", "rss"))
    settled = seconds >= args.warm_up
    if settled.sum() < 3:
        raise ScfeatError(
            f"expected 3 samples or more after --warm-up {args.warm_up:g}, found {settled.sum()}: raise --duration"
        )
    growth = slope(seconds[settled], rss[settled])
    first, last = samples[0], samples[-1]
    made = {name: last.counts[name] - first.counts.get(name, 0) for name in last.counts}
    return {
        "machine": {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()},
        "options": {name: str(value) for name, value in vars(args).items()},
        "seconds": round(last.seconds, 1),
        "frames": made,
        "rate_hz": round(made.get("processed", 0) / max(last.seconds, 1e-9), 3),
        "messages": heard.messages,
        "latency_ms": percentiles(heard.latencies),
        "age_at_publication_ms": percentiles(heard.ages),
        "rss_mb": {"start": round(rss[0], 1), "settled": round(rss[settled][0], 1), "end": round(rss[-1], 1)},
        "slope_mb_per_hour": {"value": growth.value, "low": growth.low, "high": growth.high},
        "verdict": verdict(growth, args.limit),
        "samples": [(round(sample.seconds, 1), round(sample.rss, 2)) for sample in samples],
    }


def verdict(growth: Slope, limit: float) -> str:
    """limit: MB an hour."""
    return "grows" if growth.low > limit else "flat" if growth.high <= limit else "undecided"


def table(summary: Mapping[str, Any]) -> str:
    """The figures as text."""
    growth, memory = summary["slope_mb_per_hour"], summary["rss_mb"]
    drops = {name: count for name, count in summary["frames"].items() if name.startswith("dropped_") and count}
    rows = {
        "seconds": f"{summary['seconds']:.0f}",
        "frames received": str(summary["frames"].get("received", 0)),
        "frames processed": f"{summary['frames'].get('processed', 0)} ({summary['rate_hz']:.1f} Hz)",
        "frames dropped": ", ".join(f"{count} {name.removeprefix('dropped_')}" for name, count in drops.items()) or "0",
        "latency, ms": ", ".join(f"{name} {value:.0f}" for name, value in summary["latency_ms"].items()),
        "memory, MB": ", ".join(f"{name} {value:.0f}" for name, value in memory.items()),
        "slope, MB an hour": f"{growth['value']:.1f} (95 %: {growth['low']:.1f} to {growth['high']:.1f})",
        "memory": {"undecided": "too short a run to tell: raise --duration"}.get(
            summary["verdict"], summary["verdict"]
        ),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Memory over time; left out where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return
    seconds, rss = np.array(summary["samples"]).T
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(seconds / 60, rss)
    axes.set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, 1.2 * rss.max()))
    axes.set_title(f"{summary['slope_mb_per_hour']['value']:.1f} MB an hour after the warm-up")
    figure.savefig(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=3600.0, help="seconds to measure (default: 3600)")
    parser.add_argument("--fps", type=float, default=15.0, help="images a second (default: 15)")
    parser.add_argument("--bag", type=Path, help="rosbag2 to play, again and again (default: a rendered camera)")
    parser.add_argument("--weights", default="lite", help="shipped weights or a .safetensors file (default: lite)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto (default: cpu)")
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME:=VALUE", help="another of the node's")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two samples (default: 10)")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds that do not count (default: 60)")
    parser.add_argument("--limit", type=float, default=10.0, help="MB an hour that are no growth (default: 10)")
    parser.add_argument("--output", type=Path, default=Path("build/soak"), help="folder (default: build/soak)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    try:
        summary = summarise(args, *soak(args))
    except ScfeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "soak.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, args.output / "soak.png")
    print("\n" + table(summary))
    return EXIT_STATUS[summary["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
