"""``scfeat demo``: plays a camera into the real node, in processes of their own, and reports what comes out.

The camera is rendered, with known geometry, or it is a rosbag2. Node and player run as they would on a robot, over
Fast DDS in a domain of their own; this process only watches. It ends with a table, and with the same figures in
summary.json, matches.png and index.html.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scfeat_core.drawing import INLIER, OUTLIER, draw_keypoints, draw_matches
from scfeat_core.errors import ScfeatError
from scfeat_core.report import (
    Figures,
    Picture,
    Series,
    encode,
    html_page,
    percentiles,
    rounded,
    text_table,
    write,
    write_json,
)

from .bags import open_bag
from .domain import free_domain
from .player import check_arguments, distinct_frames
from .processes import Child

if TYPE_CHECKING:
    from .monitor import Monitor, Observations, PairRecord

FRAMES, FPS = 120, 10.0  # of the rendered camera
START_PATIENCE = 180.0  # seconds until the node has loaded its network and the player has rendered, on a busy machine
STILL_PATIENCE = START_PATIENCE + 60.0  # seconds without a sign of life of the player; bags may hold pauses
DRAIN_PATIENCE = 30.0  # seconds for the node to finish what it has when the player has ended
STATUS_RATE = 20.0  # Hz, so that nearly every frame's times are seen
STAGES = ("queue", "decode", "preprocess", "network", "match", "publish", "total")
SAMPLES = (0.25, 0.5, 0.75)  # where in the sequence pairs are kept for the pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--bag", type=Path, help="rosbag2 to play (default: a rendered camera)")
    parser.add_argument("--topic", help="image topic in the bag (default: the one with most messages)")
    parser.add_argument("--frames", type=int, help=f"images to play (default: {FRAMES} rendered, all of a bag)")
    parser.add_argument(
        "--fps", type=float, help=f"images per second (default: {FPS:g} rendered, as recorded in a bag)"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="speed: 2 plays twice as fast (default: 1)")
    parser.add_argument("--max-fps", type=float, help="leave out images that would come faster than this")
    parser.add_argument("--seed", type=int, default=0, help="of the rendered room (default: 0)")
    parser.add_argument("--weights", default="lite", help="shipped weights or a .safetensors file (default: lite)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto (default: cpu)")
    parser.add_argument("--max-keypoints", type=int, default=1024, help="at most so many an image (default: 1024)")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder (default: build/demo)")


def run(args: argparse.Namespace) -> int:
    """Play, watch, report. Returns 0; raises ScfeatError where something does not work."""
    import tqdm  # noqa: F401  # the one module that may be missing and would be missed only after the start

    check_arguments(args)
    camera = _camera(args)
    write(args.output / "summary.json", "{}\n")  # now rather than after minutes, where it cannot be written
    print(f"camera: {camera.description}")
    with _orderly_end(), tempfile.TemporaryDirectory(prefix="scfeat-demo-") as scratch:
        seen, played = _watch(args, camera, Path(scratch))
    figures = _figures(seen, played, camera)
    facts = _facts(args, camera, seen, played)
    _write_report(args.output, figures, facts, seen, camera)
    print("\n" + text_table(figures) + "\n")
    for warning in _warnings(seen, played):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"written to {args.output}: index.html, matches.png, summary.json")
    return 0


# ------------------------------------------------------------------------------------------------------------- cameras


@dataclass(frozen=True, eq=False)
class PlayedCamera:
    """What is played. image: topic without /compressed. frames: how many, at most. size: (width, height) if known.

    K, poses: ground truth of the rendered camera, (3, 3) and (N, 4, 4) T_world_camera by index modulo N; None of a bag.
    """

    description: str
    image: str
    camera_info: str
    compressed: bool
    frames: int
    K: np.ndarray | None = None
    poses: np.ndarray | None = None

    def fundamental(self, index0: int, index1: int) -> np.ndarray:
        """F between two images of the rendered camera: x1' F x0 = 0."""
        from scfeat_core.geometry import fundamental_from_pose  # imports torch

        assert self.K is not None and self.poses is not None
        pose0, pose1 = (self.poses[i % len(self.poses)] for i in (index0, index1))
        relative = np.linalg.inv(pose1) @ pose0
        return fundamental_from_pose(self.K, self.K, relative[:3, :3], relative[:3, 3])


def _camera(args: argparse.Namespace) -> PlayedCamera:
    return _rendered_camera(args) if args.bag is None else _bag_camera(args)


def _rendered_camera(args: argparse.Namespace) -> PlayedCamera:
    from scfeat_core.demo_scene import SIZE, camera_path, intrinsics

    if args.topic is not None:
        raise ScfeatError("expected --topic together with --bag, found it alone: the rendered camera has one topic")
    frames, fps = args.frames or FRAMES, args.fps or FPS
    return PlayedCamera(
        f"rendered room (seed {args.seed}), {frames} frames of {SIZE[0]}x{SIZE[1]} at {fps * args.rate:g} Hz",
        "/camera/image",
        "/camera/camera_info",
        False,
        frames,
        intrinsics(),
        camera_path(distinct_frames(frames, fps), fps),
    )


def _bag_camera(args: argparse.Namespace) -> PlayedCamera:
    with open_bag(args.bag) as bag:
        image, why = bag.choose_image_topic(args.topic)
        info = bag.camera_info_topic(image)
    beside = image.image_name.rpartition("/")[0] + "/camera_info"
    frames = min(image.count, args.frames or image.count)
    return PlayedCamera(
        f"{args.bag}: {why}; {frames} frames" + ("" if info else "; the bag has no CameraInfo for it"),
        image.image_name,
        info.name if info else beside,
        image.compressed,
        frames,
    )


# ---------------------------------------------------------------------------------------------------------------- watch


@dataclass(frozen=True)
class Played:
    """What the player says it did: see player.Log.summary. sent: stamp -> (index, CLOCK_MONOTONIC), nanoseconds."""

    published: int
    late_ms: Mapping[str, float]
    error: str
    sent: Mapping[int, tuple[int, int]]


@contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C, so that the children are stopped and nothing stays behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _watch(args: argparse.Namespace, camera: PlayedCamera, scratch: Path) -> tuple[Observations, Played]:
    """Start node and player, watch until all is done. Raises ScfeatError with the end of a child's log."""
    with ExitStack() as stack:
        domain = stack.enter_context(free_domain())
        os.environ.update(_environment(domain, scratch))  # before Fast DDS reads it, in this process, too
        from .monitor import Monitor

        print(f"starting the node and the player in ROS domain {domain}")
        sample_at = tuple(round(share * camera.frames) for share in SAMPLES)
        monitor = stack.enter_context(Monitor(domain, "/scfeat", camera.image, camera.compressed, sample_at))
        node = stack.enter_context(Child("node", _node_command(args, camera), scratch / "node.log", os.environ))
        summary = scratch / "player.json"
        player = stack.enter_context(
            Child("player", _player_command(args, camera, summary), scratch / "player.log", os.environ)
        )
        _follow(monitor, node, player, camera)
        _drain(monitor, node)
        code = player.exit_code
        if code != 0 or not summary.exists():
            raise _died(player)
    return monitor.seen, _played(summary)


def _environment(domain: int, scratch: Path) -> dict[str, str]:
    """For all processes of the demo: a graph of their own on this machine, and room for large images."""
    variables = {
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOCALHOST_ONLY": "1",  # what Humble knows
        "ROS_LOG_DIR": str(scratch),
        "PYTHONUNBUFFERED": "1",
        "AMENT_PREFIX_PATH": os.environ.get("AMENT_PREFIX_PATH", sys.prefix),
    }
    profile = _profile()
    if profile is not None:
        variables[_profile_variable()] = str(profile)
    return variables


def _profile_variable() -> str:
    """Jazzy and older know the old name only; later ones complain about it."""
    major = _version("ros-rclpy").partition(".")[0]
    old = os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy") or (major.isdigit() and int(major) <= 7)
    return "FASTRTPS_DEFAULT_PROFILES_FILE" if old else "FASTDDS_DEFAULT_PROFILES_FILE"


def _profile() -> Path | None:
    """config/fastdds.xml in the source tree, or where it was installed."""
    places = [Path(__file__).parent.parent, Path(sys.prefix) / "share" / "scfeat"]
    places += [Path(p) / "share" / "scfeat" for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    files = [place / "config" / "fastdds.xml" for place in places]
    return next((file for file in files if file.is_file()), None)


def _node_command(args: argparse.Namespace, camera: PlayedCamera) -> list[str]:
    parameters = {
        "weights": args.weights,
        "device": args.device,
        "max_keypoints": args.max_keypoints,
        "status_rate": STATUS_RATE,
        "image_transport": "compressed" if camera.compressed else "raw",
    }
    # JSON quotes what YAML, as which ROS reads a value, would take for something else than text
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={json.dumps(value)}")]
    return [sys.executable, "-m", "scfeat_ros.node", "--ros-args", *_remapped(camera), *words]


def _player_command(args: argparse.Namespace, camera: PlayedCamera, summary: Path) -> list[str]:
    words = ["--subscriptions", "2", "--wait", str(START_PATIENCE), "--summary", str(summary), "--rate", str(args.rate)]
    words += ["--frames", str(camera.frames)]
    if args.bag is not None:
        words += ["--bag", str(args.bag), "--topic", camera.image]
    else:
        words += ["--seed", str(args.seed), "--fps", str(args.fps or FPS)]
    for name in ("fps", "max_fps"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return [sys.executable, "-m", "scfeat_ros.player", *words, "--ros-args", *_remapped(camera)]


def _remapped(camera: PlayedCamera) -> list[str]:
    return ["-r", f"image:={camera.image}", "-r", f"camera_info:={camera.camera_info}"]


def _check_alive(child: Child) -> None:
    if child.exit_code is not None:
        raise _died(child)


def _died(child: Child) -> ScfeatError:
    code = child.exit_code
    ended = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with exit status {code}"
    return ScfeatError(
        f"expected the {child.name} to run to the end, found it {ended}; "
        f"the last lines of its log:\n{child.last_lines()}"
    )


def _follow(monitor: Monitor, node: Child, player: Child, camera: PlayedCamera) -> None:
    """Until the player has ended, saying how far it is. Raises ScfeatError where the node dies or all stands still."""
    seen = monitor.seen
    activity, since = (0, 0), time.monotonic()
    with _Progress(camera.frames) as progress:
        while player.exit_code is None:
            _check_alive(node)
            monitor.spin(0.1)
            progress.show(seen, player)
            if activity != (seen.images, player.output_size):
                activity, since = (seen.images, player.output_size), time.monotonic()
            elif time.monotonic() - since > STILL_PATIENCE:
                raise ScfeatError(
                    f"expected images all the time, found none for {STILL_PATIENCE:g} s after {seen.images}; "
                    f"the last lines of the player's log:\n{player.last_lines()}"
                )


class _Progress:
    """What the player says until the first image, then a bar; without a terminal, a line now and then."""

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self._interactive = sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._write("")

    def show(self, seen: Observations, player: Child) -> None:
        if seen.images == 0:
            self._write(player.last_line())
            return
        if self._bar is None:
            self._write("")
            self._bar = _bar(self._frames, self._interactive)
        if seen.status is not None:
            self._bar.set_postfix(processed=seen.status.processed, inliers=seen.status.inliers, refresh=False)
        self._bar.update(seen.images - self._bar.n)

    def _write(self, text: str) -> None:
        if self._interactive:
            print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)


def _bar(frames: int, interactive: bool) -> Any:
    from tqdm import tqdm

    interval = 0.2 if interactive else 10.0
    return tqdm(total=frames, unit=" frames", mininterval=interval, desc="playing", leave=False, ascii=not interactive)


def _drain(monitor: Monitor, node: Child) -> None:
    """Until the node has finished every frame that it received and its counts have come to rest."""
    from .monitor import waiting

    end = time.monotonic() + DRAIN_PATIENCE
    rest = time.monotonic()
    received = -1
    while time.monotonic() < end:
        _check_alive(node)
        monitor.spin(0.1)
        status = monitor.seen.status
        if status is None or waiting(status) or status.received != received:
            rest, received = time.monotonic(), -1 if status is None else status.received
        elif time.monotonic() - rest > 0.5:
            return


def _played(summary: Path) -> Played:
    content = json.loads(summary.read_text())
    sent = {stamp: (index, at) for index, stamp, at in content["sent"]}
    return Played(content["published"], content["late_ms"], content["error"], sent)


# -------------------------------------------------------------------------------------------------------------- figures


def _figures(seen: Observations, played: Played, camera: PlayedCamera) -> Figures:
    """Everything that is reported, rounded. Raises ScfeatError where the node has not said anything."""
    from .monitor import dropped

    if seen.status is None or not seen.features:
        raise ScfeatError(
            f"expected features for {played.published} images, found none (received by the node: "
            f"{0 if seen.status is None else seen.status.received}, last error: "
            f"{'-' if seen.status is None else seen.status.last_error or '-'})"
        )
    frames = {"published": played.published, "received": int(seen.status.received)}
    frames["processed"] = int(seen.status.processed)
    frames |= {f"dropped_{reason}": int(count) for reason, count in dropped(seen.status).items()}
    # the newest image replaces one that the executor has not fetched yet: the middleware drops it, uncounted
    frames["dropped_before_node"] = played.published - frames["received"]
    seconds = _span([at for _, at in played.sent.values()])
    figures: dict[str, dict[str, Any]] = {
        "frames": frames,
        "rate_hz": {
            "published": rounded((played.published - 1) / seconds if seconds else None),
            "processed": rounded((len(seen.features) - 1) / _span([f[1] for f in seen.features]) if seconds else None),
        },
        "features": _feature_figures(seen),
        "ms": _stage_figures(seen),
        "end_to_end_ms": {"image_to_features": percentiles(_ages(seen, played))},
    }
    if camera.poses is not None:
        figures["truth"] = _truth_figures(seen, played, camera)
    return figures


def _span(times: Sequence[int]) -> float:
    return (max(times) - min(times)) / 1e9 if len(times) > 1 else float("nan")


def _feature_figures(seen: Observations) -> dict[str, Any]:
    matches = [len(pair.keypoints0) for pair in seen.pairs]
    inliers, ratio = _inliers(seen.pairs)
    return {
        "keypoints": {"median": percentiles([count for _, _, count in seen.features])["median"]},
        "matches": {"median": percentiles(matches)["median"]},
        "inliers": {"median": percentiles(inliers)["median"], "ratio": percentiles(ratio, 3)["median"]},
    }


def _inliers(pairs: Sequence[PairRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Number and share of the inliers of each pair; NaN where it was not verified, or had no matches."""
    count = np.array([np.nan if pair.inliers is None else pair.inliers.sum() for pair in pairs], float)
    total = np.array([len(pair.keypoints0) for pair in pairs], float)
    return count, np.divide(count, total, out=np.full_like(count, np.nan), where=total > 0)


def _stage_figures(seen: Observations) -> dict[str, Any]:
    frames = {
        (status.header.stamp.sec, status.header.stamp.nanosec): status for status in seen.statuses if status.processed
    }
    return {stage: percentiles([getattr(status, f"ms_{stage}") for status in frames.values()]) for stage in STAGES}


def _ages(seen: Observations, played: Played) -> list[float]:
    """Milliseconds from publishing an image to the arrival of its features in another process."""
    return [(at - played.sent[stamp][1]) / 1e6 for stamp, at, _ in seen.features if stamp in played.sent]


def _truth_figures(seen: Observations, played: Played, camera: PlayedCamera) -> dict[str, Any]:
    """Distance of what the node calls inliers to the epipolar lines of the true poses."""
    errors = [
        _true_error(pair, played, camera)
        for pair in seen.pairs
        if pair.inliers is not None and pair.stamp0 in played.sent and pair.stamp1 in played.sent
    ]
    error = np.concatenate(errors) if errors else np.zeros(0)
    return {
        "epipolar_error_px": percentiles(error, 2),
        "within_2_px": {"share": rounded(float((error < 2).mean()) if error.size else None, 3)},
    }


def _true_error(pair: PairRecord, played: Played, camera: PlayedCamera) -> np.ndarray:
    from scfeat_core.geometry import epipolar_distance

    fundamental = camera.fundamental(played.sent[pair.stamp0][0], played.sent[pair.stamp1][0])
    chosen = pair.inliers
    return epipolar_distance(pair.keypoints0[chosen].astype(float), pair.keypoints1[chosen].astype(float), fundamental)


# --------------------------------------------------------------------------------------------------------------- report


def _facts(args: argparse.Namespace, camera: PlayedCamera, seen: Observations, played: Played) -> dict[str, Any]:
    assert seen.status is not None
    return {
        "camera": camera.description,
        "weights": args.weights,
        "descriptor_space": seen.status.descriptor_space,
        "device": seen.status.device,
        "precision": seen.status.precision,
        "max_keypoints": args.max_keypoints,
        "image_topic": camera.image + ("/compressed" if camera.compressed else ""),
        "player_late_ms": {key: rounded(value, 2) for key, value in played.late_ms.items()},
        "versions": {
            name: _version(name) for name in ("scfeat-python", "torch", "opencv-python", "numpy", "ros-rclpy")
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not from PyPI"


def _write_report(
    output: Path, figures: Figures, facts: Mapping[str, Any], seen: Observations, camera: PlayedCamera
) -> None:
    pictures = [_picture(sample) for sample in seen.samples]
    if pictures:
        write(output / "matches.png", encode(pictures[len(pictures) // 2].image))
    write_json(output / "summary.json", figures, facts)
    inliers, ratio = _inliers(seen.pairs)
    matches = np.array([len(pair.keypoints0) for pair in seen.pairs], float)
    series = [
        Series("Keypoints", np.array([count for _, _, count in seen.features], float)),
        Series("Matches to the previous frame", matches),
        Series("Inliers", inliers),
        Series("Inlier ratio", 100 * ratio, "%"),
    ]
    frames = figures["frames"]
    summary = (
        f"{camera.description}. {frames['processed']} of {frames['published']} images processed on {facts['device']} "
        f"with the weights '{facts['weights']}', by the ROS 2 node in a process of its own."
    )
    write(output / "index.html", html_page("scfeat demo", summary, figures, pictures, series, facts))


def _picture(sample: Any) -> Picture:
    """All matches as dots, lines for some that are spread over the image: hundreds of lines would hide it."""
    pair = sample.pair
    good = np.ones(len(pair.keypoints0), bool) if pair.inliers is None else pair.inliers
    images = [
        draw_keypoints(draw_keypoints(_eight_bit(image), points[~good], OUTLIER), points[good], INLIER)
        for image, points in ((sample.image0, pair.keypoints0), (sample.image1, pair.keypoints1))
    ]
    lines = np.flatnonzero(good)[_spread(pair.keypoints0[good], sample.image0.shape)]
    image = draw_matches(*images, pair.keypoints0[lines], pair.keypoints1[lines])
    count = "not verified" if pair.inliers is None else f"{int(good.sum())} of them verified (green)"
    seconds = (pair.stamp1 - pair.stamp0) / 1e9
    return Picture(
        image,
        f"{len(good)} matches between two images {seconds:.2f} s apart, {count}; lines join {len(lines)} of these",
    )


def _spread(points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Indices of points (N, 2), at most one in each cell of an 8 x 6 grid over an image of this shape."""
    cells = (points / np.array([shape[1], shape[0]]) * np.array([8, 6])).astype(int).clip(0, (7, 5))
    return np.unique(cells @ np.array([1, 8]), return_index=True)[1]


def _eight_bit(image: np.ndarray) -> np.ndarray:
    return (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image


def _warnings(seen: Observations, played: Played) -> list[str]:
    from .monitor import waiting

    assert seen.status is not None
    found = []
    if played.error:
        found.append(f"only the readable part was played: {played.error}")
    if waiting(seen.status):
        found.append(f"{waiting(seen.status)} frames were still in work after {DRAIN_PATIENCE:g} s")
    if seen.status.last_error:
        found.append(f"the node's last error: {seen.status.last_error}")
    if not seen.samples:
        found.append("no matches came with their images: there is no picture")
    return found
