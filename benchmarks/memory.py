"""What the node keeps in memory beyond torch, and whether it grows: resident memory, MB, step by step.

    python benchmarks/memory.py                       # lite, 640x480, on the CPU
    python benchmarks/memory.py --frames 10000        # and so many frames without a network: does anything grow?
    python benchmarks/memory.py --large 3840x2160     # one image of that size in between: what stays of it?

Every process is a fresh one. "torch" imports torch and adds two numbers, which is the baseline; "node" imports what the
node imports, makes the real node, and has it process images of the given size with all topics listened to, but without
a middleware between. Each step is the resident memory after it, and the part of it that is no file (heap, stacks, what
the libraries allocate); files are mostly the libraries themselves, which processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from node import Case, Silent, image_message, make_frontend, resident_memory, size, stamped

from scfeat_core.memory import PATIENCE

TOPICS = ("features", "matches", "tracks")
ALL = "+".join(TOPICS)
Step = tuple[str, dict[str, float]]


def steps_of_torch(args: argparse.Namespace) -> Iterator[Step]:
    yield "python", resident_memory()
    import torch

    yield "import torch", resident_memory()
    torch.ones(1) + 1
    yield "one operation", resident_memory()


def steps_of_node(args: argparse.Namespace) -> Iterator[Step]:
    """The real node, and its pipeline called as its worker does."""
    yield "python", resident_memory()
    import rclpy
    from rclpy.lifecycle import TransitionCallbackReturn
    from rclpy.parameter import Parameter

    import scfeat_ros.node as module
    from scfeat_ros.inputs import Frame

    yield "import node", resident_memory()
    rclpy.init()
    values = {"weights": args.weights, "max_keypoints": args.points, "device": args.device}
    node = module.FrontendNode(parameter_overrides=[Parameter(name, value=value) for name, value in values.items()])
    yield "unconfigured", resident_memory()
    import scfeat_ros.pipeline  # noqa: F401

    yield "import pipeline", resident_memory()
    if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
        raise SystemExit("expected the node to be configured, found the error above")
    yield "configured", resident_memory()
    pipeline = node._pipeline
    pipeline.channels["camera"].publishers = {name: Silent(True) for name in TOPICS}
    case, stamps = Case("inside", "mono8", 0, ALL, "", 1), count(1)

    def process(size: tuple[int, int]) -> None:
        number = next(stamps)
        message = image_message(case, size, number % 60)
        message.header = stamped(number * 33_000_000)
        errors = pipeline.process({"camera": Frame("camera", message, time.perf_counter())})()
        assert not errors, errors

    for number in range(args.images):
        process(args.size)
        if number in (0, args.images - 1):
            yield f"{number + 1} images", resident_memory()
    if args.large is not None:
        process(args.large)
        yield "a large image", resident_memory()
        for _ in range(PATIENCE + 5):
            process(args.size)
        yield f"{PATIENCE + 5} small images", resident_memory()
    node.trigger_shutdown()
    yield "shut down", resident_memory()


def growth(args: argparse.Namespace) -> Iterator[Step]:
    """Frames as fast as they go, with a dummy that takes no time instead of the network."""
    from rclpy.clock import Clock
    from rclpy.logging import get_logger

    from scfeat_ros import pipeline as module
    from scfeat_ros.inputs import Frame
    from scfeat_ros.parameters import NodeParameters

    own = argparse.Namespace(weights="", canned=False, points=args.points, dim=64, size=args.size, network_ms=0.0)
    settings = NodeParameters(max_keypoints=args.points)
    pipeline = module.Pipeline(settings, Clock(), get_logger("benchmark"), make_frontend(own))
    pipeline.channels["camera"].publishers = {name: Silent(True) for name in TOPICS}
    message = image_message(Case("inside", "mono8", 0, ALL, "", 1), args.size)
    for number in range(args.frames + 1):
        message.header = stamped((number + 1) * 33_000_000)
        pipeline.process({"camera": Frame("camera", message, time.perf_counter())})()
        if number % max(1, args.frames // 20) == 0:
            yield str(number), resident_memory()


ROLES: dict[str, Callable[[argparse.Namespace], Iterator[Step]]] = {
    "torch": steps_of_torch,
    "node": steps_of_node,
    "growth": growth,
}


def run(role: str) -> list[Any]:
    """In a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--role", role]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "ROS_LOCALHOST_ONLY": "1"})
    return json.loads(done.stdout.decode().splitlines()[-1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="lite", help="shipped weights or a .safetensors file (default: lite)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--size", type=size, default=(640, 480), help="(default: 640x480)")
    parser.add_argument("--points", type=int, default=1024, help="(default: 1024)")
    parser.add_argument("--images", type=int, default=30, help="with the network (default: 30)")
    parser.add_argument("--large", type=size, help="of one image after those (default: none)")
    parser.add_argument("--frames", type=int, default=0, help="without a network, to see growth (default: none)")
    parser.add_argument("--output", type=Path, help="JSON (default: none)")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    return parser.parse_args()


def table(title: str, steps: list[Any]) -> str:
    rows = (
        f"  {name:16} {values['rss']:8.1f} {values['anonymous']:10.1f} {values['peak']:8.1f}" for name, values in steps
    )
    return "\n".join([f"{title:18} {'rss':>8} {'anonymous':>10} {'peak':>8}", *rows])


def main() -> int:
    args = arguments()
    if args.role:
        print(json.dumps(list(ROLES[args.role](args))))
        return 0
    found: dict[str, Any] = {role: run(role) for role in ("torch", "node")}
    baseline, used = found["torch"][-1][1], found["node"][-2][1]
    beyond = {name: round(used[name] - baseline[name], 1) for name in used}
    report: dict[str, Any] = {
        "machine": {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()},
        "beyond_torch_mb": beyond,
        "steps": found,
    }
    print("\n".join(table(role, steps) for role, steps in found.items()))
    print(f"beyond torch: {beyond['rss']} MB, at the peak {beyond['peak']} MB")
    if args.frames:
        steps = run("growth")
        report["growth"] = steps
        print(table("growth, frames", steps))
        settled = np.array([values["rss"] for _, values in steps[len(steps) // 4 :]])
        print(f"growth after a quarter of the frames: {settled[-1] - settled[0]:.1f} MB")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
