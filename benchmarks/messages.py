"""What it costs to turn results into messages and back, beside assigning lists: milliseconds, medians, as JSON.

python benchmarks/messages.py [--points 2048] [--dim 128] [--rounds 50]

All points are tracked and matched, with inliers and rays: the most that a frame can have. "wire" is the serialisation
of rclpy on top, both ways. The ways are run in turn within each round, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rclpy.serialization import deserialize_message, serialize_message
from scfeat.msg import Features as FeaturesMessage
from std_msgs.msg import Header

from scfeat_core.types import Features, FrameResult, GeometryModel, Matches, PairResult, Tracks, TwoViewGeometry
from scfeat_ros import messages

Ways = dict[str, Callable[[], object]]


def sample(points: int, dim: int) -> FrameResult:
    random = np.random.default_rng(0)
    descriptors = random.normal(size=(points, dim)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    keypoints = random.uniform(0, 640, (points, 2)).astype(np.float32)
    scores = np.sort(random.random(points).astype(np.float32))[::-1].copy()
    features = Features(keypoints, scores, descriptors, (640, 480))
    order = random.permutation(points)
    geometry = TwoViewGeometry(GeometryModel.ESSENTIAL, np.eye(3), random.random(points) < 0.7, 1.0)
    pair = PairResult(0, 0, Matches(order, np.arange(points), scores), keypoints[order], keypoints, geometry)
    rays = random.normal(size=(points, 2)).astype(np.float32)
    ids, flags = np.arange(1, points + 1, dtype=np.uint32), np.zeros(points, np.uint8)
    tracks = Tracks(ids, ids, order, keypoints[order], rays, rays, flags, ids[: points // 10])
    return FrameResult("camera", 0, 0, features, pair, tracks=tracks)


def conversions(result: FrameResult) -> Ways:
    """There and back for every kind of message."""
    header, pair = Header(), result.pair
    assert pair is not None
    ways: Ways = {}
    for kind in ("float32", "float16", "int8"):
        to_message = partial(messages.features_to_message, result, header, kind)
        ways |= both_ways(f"Features {kind}", to_message, messages.features_from_message)
    to_message = partial(messages.matches_to_message, pair, result, header, "")
    ways |= both_ways("Matches", to_message, messages.matches_from_message)
    to_message = partial(messages.tracks_to_message, result, header, "")
    ways |= both_ways("Tracks", to_message, messages.tracks_from_message)
    return {**ways, "Features as lists": lambda: with_lists(result)}


def both_ways(name: str, to_message: Callable[[], Any], from_message: Callable[[Any], object]) -> Ways:
    message = to_message()
    data = serialize_message(message)
    return {
        f"{name} to message": to_message,
        f"{name} from message": lambda: from_message(message),
        f"{name} to wire": lambda: serialize_message(message),
        f"{name} from wire": lambda: deserialize_message(data, type(message)),
    }


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
    result = sample(args.points, args.dim)
    ways = conversions(result)
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
