"""``scfeat demo``: plays a camera into the real node, in processes of their own, and reports what comes out.

The camera is rendered, with known geometry, or it is a rosbag2. Node and player run as they would on a robot, over
Fast DDS in a domain of their own; this process only watches. It ends with a table, and with the same figures in
summary.json, matches.png and index.html.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.errors import ScfeatError
from scfeat_core.report import text_table, write

from .bags import open_bag
from .demo_report import Played, PlayedCamera, facts_of, figures_of, warnings_of, write_report
from .domain import free_domain, own_graph
from .player import check_arguments, distinct_frames
from .processes import Child, signals_handled

if TYPE_CHECKING:
    from .monitor import Monitor, Observations

FRAMES, FPS = 120, 10.0  # of the rendered camera
START_PATIENCE = 180.0  # seconds until the node has loaded its network and the player has rendered, on a busy machine
STILL_PATIENCE = START_PATIENCE + 60.0  # seconds without a sign of life of the player; bags may hold pauses
DRAIN_PATIENCE = 30.0  # seconds for the node to finish what it has when the player has ended
STATUS_RATE = 20.0  # Hz, so that nearly every frame's times are seen


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
    parser.set_defaults(start=0.0, stop=None)  # of the player: all of the bag
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
    _clear(args.output)
    print(f"camera: {camera.description}")
    with _OrderlyEnd() as end, tempfile.TemporaryDirectory(prefix="scfeat-demo-") as scratch:
        seen, played = _watch(args, camera, Path(scratch), end)
    figures = figures_of(seen, played, camera)
    facts = facts_of(args, camera, seen, played)
    write_report(args.output, figures, facts, seen, camera)
    print("\n" + text_table(figures) + "\n")
    for warning in warnings_of(seen, played):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"written to {args.output}: index.html, matches.png, summary.json")
    return 0


def _clear(output: Path) -> None:
    """Remove what an earlier run left. Raises ScfeatError now, not after minutes, where nothing can be written."""
    write(output / "summary.json", "{}\n", "--output")
    for name in ("summary.json", "matches.png", "index.html"):
        (output / name).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- cameras


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


class _OrderlyEnd:
    """SIGTERM ends like Ctrl-C, so that the children are stopped and nothing stays behind.

    An exception that is raised while Python runs a finaliser is printed and lost, and so would be the signal; hence it
    is noted as well, and :meth:`check` raises it again.
    """

    def __init__(self) -> None:
        self._asked = False
        self._handled = signals_handled(self._interrupt)

    def __enter__(self) -> _OrderlyEnd:
        self._handled.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handled.__exit__(*exception)

    def _interrupt(self, *_: object) -> None:
        self._asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal has come."""
        if self._asked:
            raise KeyboardInterrupt


def _watch(
    args: argparse.Namespace, camera: PlayedCamera, scratch: Path, end: _OrderlyEnd
) -> tuple[Observations, Played]:
    """Start node and player, watch until all is done. Raises ScfeatError with the end of a child's log."""
    with ExitStack() as stack:
        domain = stack.enter_context(free_domain())
        os.environ.update(own_graph(domain, scratch))  # before Fast DDS reads it, in this process, too
        from .monitor import Monitor

        print(f"starting the node and the player in ROS domain {domain}")
        monitor = stack.enter_context(Monitor(domain, "/scfeat", camera.image, camera.compressed))
        node = stack.enter_context(Child("node", _node_command(args, camera), scratch / "node.log", os.environ))
        summary = scratch / "player.json"
        player = stack.enter_context(
            Child("player", _player_command(args, camera, summary), scratch / "player.log", os.environ)
        )
        _follow(monitor, node, player, camera, end)
        _drain(monitor, node, end)
        code = player.exit_code
        if code != 0 or not summary.exists():
            raise player.died()
    return monitor.seen, _played(summary)


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


def _follow(monitor: Monitor, node: Child, player: Child, camera: PlayedCamera, end: _OrderlyEnd) -> None:
    """Until the player has ended, saying how far it is. Raises ScfeatError where the node dies or all stands still."""
    seen = monitor.seen
    activity, since = (0, 0), time.monotonic()
    with _Progress(camera.frames) as progress:
        while player.exit_code is None:
            end.check()
            node.check_alive()
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


def _drain(monitor: Monitor, node: Child, asked: _OrderlyEnd) -> None:
    """Until the node has finished every frame that it received and its counts have come to rest."""
    from .monitor import waiting

    end = time.monotonic() + DRAIN_PATIENCE
    rest = time.monotonic()
    received = -1
    while time.monotonic() < end:
        asked.check()
        node.check_alive()
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
