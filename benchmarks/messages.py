"""What it costs to turn features into a message and back, beside assigning lists: milliseconds, medians, as JSON.

python benchmarks/messages.py [--points 2048] [--dim 128] [--rounds 50]

The ways are run in turn within each round, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
from scfeat.msg import Features as FeaturesMessage
from std_msgs.msg import Header

from scfeat_core.types import Features, FrameResult
from scfeat_ros import messages


def sample(points: int, dim: int) -> FrameResult:
    random = np.random.default_rng(0)
    descriptors = random.normal(size=(points, dim)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    keypoints = random.uniform(0, 640, (points, 2)).astype(np.float32)
    scores = np.sort(random.random(points).astype(np.float32))[::-1].copy()
    return FrameResult("camera", 0, 0, Features(keypoints, scores, descriptors, (640, 480)), None)


def with_lists(result: FrameResult) -> FeaturesMessage:
    """What scfeat does not do."""
    features = result.features
    return FeaturesMessage(
        keypoints=features.keypoints.ravel().tolist(),
        scores=features.scores.tolist(),
        descriptors=features.descriptors.view(np.uint8).ravel().tolist(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    result, header = sample(args.points, args.dim), Header()
    ways: dict[str, Callable[[], object]] = {"lists": lambda: with_lists(result)}
    for kind in ("float32", "float16", "int8"):
        message = messages.features_to_message(result, header, kind)
        ways[f"{kind} to message"] = lambda kind=kind: messages.features_to_message(result, header, kind)
        ways[f"{kind} from message"] = lambda message=message: messages.features_from_message(message)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    report = {
        "points": args.points,
        "dim": args.dim,
        "rounds": args.rounds,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "median_ms": {name: round(statistics.median(values), 4) for name, values in times.items()},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
