"""What descriptors lose on the wire: the same features, matched after they went through a message of each type.

python benchmarks/descriptor_types.py DIR [--weights lite] [--runs 4] [--output descriptor_types.json]

DIR is what ``scfeat evaluate all`` takes. Features are extracted once; homographies and poses are measured by its
protocol, after descriptors were packed to float32, float16 or int8 and back. Bytes are those of a serialised Features
message of the protocol's 1024 points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rclpy.serialization import serialize_message
from std_msgs.msg import Header

from scfeat_core.evaluation import datasets, homography, relative_pose
from scfeat_core.evaluation.methods import create_method
from scfeat_core.evaluation.views import Protocol, View, extract_views, map_pairs
from scfeat_core.types import Features, FrameResult
from scfeat_ros.messages import DESCRIPTOR_TYPES, features_from_message, features_to_message

Views = Mapping[Path, View]


def sent(features: Features, kind: str) -> Features:
    """As a subscriber gets them."""
    result = FrameResult("camera", 0, 0, features.numpy(), None)
    return features_from_message(features_to_message(result, Header(), kind))


def size(views: Views, kind: str) -> int:
    """Bytes of the largest message."""
    most = max((view.features for view in views.values()), key=len)
    return len(serialize_message(features_to_message(FrameResult("camera", 0, 0, most, None), Header(), kind)))


def measure(views: Views, pairs: Any, kind: str, evaluate: Callable[..., Any], summarise: Callable[..., Any]) -> Any:
    received = {path: replace(view, features=sent(view.features, kind)) for path, view in views.items()}
    return summarise(map_pairs(partial(evaluate, views=received), pairs, kind))


def parts(folder: Path, protocol: Protocol) -> Iterator[tuple[str, Any, Callable[..., Any], Callable[..., Any]]]:
    """Name, pairs, how to measure one of them, and how to summarise."""
    of_homography = partial(homography.evaluate_homography_pair, protocol=protocol)
    yield "homography", datasets.homography_pairs(folder), of_homography, homography.summarise_homography
    of_pose = partial(relative_pose.evaluate_pose_pair, protocol=protocol)
    yield "pose", datasets.pose_pairs(folder), of_pose, relative_pose.summarise_pose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR")
    parser.add_argument("--weights", default="lite")
    parser.add_argument("--runs", type=int, default=4, help="orders of the matches, as of scfeat evaluate (default: 4)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol(runs=args.runs)
    method = create_method("scfeat", {"weights": args.weights})
    report: dict[str, Any] = {kind: {} for kind in DESCRIPTOR_TYPES}
    for name, pairs, evaluate, summarise in parts(args.data, protocol):
        views = extract_views(pairs, method, protocol)
        for kind, row in report.items():
            row["bytes"] = max(row.get("bytes", 0), size(views, kind))
            row[name] = measure(views, pairs, kind, evaluate, summarise)
    text = json.dumps(report, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
