"""What a frame costs besides its network: milliseconds by stage, medians and 95th percentiles, as JSON.

    python benchmarks/frame_cost.py [BAG] [--frames 120] [--threads 1] [--max-keypoints 1024] [--device cpu]

Each image goes through ``Frontend.process``, whose stages are reported as they are: preprocess, network, select, match,
verify, track, assess; "other" is what none of them counts. "nms" and "keypoints" are parts of select, run once more on
the score map of the frame: the suppression alone, and with it the choice and the sub-pixel positions; what is left of
select is the sampling of descriptors and the download. "messages" turns the result into ROS messages, where rclpy is
there. "without network" is the sum of a frame without network, nms and keypoints. The first ten frames do not count.

BAG: its images as they are; camera_info.yaml beside it, where it is there. Without a bag: the rendered room of
``scfeat demo`` at 640x480. To compare two versions run this file of each in turn, and take the ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch

from scfeat_core.demo_scene import Scene
from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_core.selection import local_maxima, select_keypoints
from scfeat_core.types import Camera, FrameResult

WARM_UP = 10  # frames
PERIOD = 33_000_000  # nanoseconds
PARTS = ("network", "nms", "keypoints")  # what the sum without network leaves out


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    settings = FrontendConfig(weights=args.weights, device=args.device, max_keypoints=args.max_keypoints)
    images, camera = recorded(args.bag, args.frames + WARM_UP) if args.bag else rendered(args.frames + WARM_UP)
    rows = list(measure(Frontend(settings), images, None if args.uncalibrated else camera))[WARM_UP:]
    stages = {name: np.array([row.get(name, 0.0) for row in rows]) for name in rows[-1]}
    report = {
        "images": args.bag.name if args.bag else "rendered room",
        "frames": len(rows),
        "threads": args.threads,
        "max_keypoints": args.max_keypoints,
        "device": args.device,
        "calibrated": camera is not None and not args.uncalibrated,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        "median_ms": {name: round(float(np.median(values)), 3) for name, values in stages.items()},
        "p95_ms": {name: round(float(np.percentile(values, 95)), 3) for name, values in stages.items()},
    }
    print(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bag", type=Path, nargs="?")
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", default="lite")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-keypoints", type=int, default=1024)
    parser.add_argument("--uncalibrated", action="store_true", help="without the calibration that there is")
    return parser.parse_args()


def rendered(count: int) -> tuple[Iterable[np.ndarray], Camera | None]:
    """As many images as are asked for, forwards and backwards over those that are rendered."""
    frames = list(Scene().frames(min(count, 40)))
    there_and_back = [frame.image for frame in (*frames, *frames[-2:0:-1])]
    size = (frames[0].image.shape[1], frames[0].image.shape[0])
    return [there_and_back[i % len(there_and_back)] for i in range(count)], Camera(frames[0].K, np.zeros(5), size)


def recorded(path: Path, count: int) -> tuple[Iterable[np.ndarray], Camera | None]:
    from scfeat_ros.bags import open_bag
    from scfeat_ros.images import compressed_to_array, image_to_array
    from scfeat_ros.intrinsics import read_intrinsics

    beside = (path if path.is_dir() else path.parent) / "camera_info.yaml"
    with open_bag(path) as bag:
        topic = max(bag.image_topics, key=lambda topic: topic.count)
        messages = [bag.deserialize(message) for message in islice(bag.messages([topic]), count)]
    images = [compressed_to_array(each) if topic.compressed else image_to_array(each) for each in messages]
    return images, read_intrinsics(beside) if beside.is_file() else None


def measure(frontend: Frontend, images: Iterable[np.ndarray], camera: Camera | None) -> Iterator[dict[str, float]]:
    """Milliseconds of each frame."""
    to_messages = message_builder()
    for number, image in enumerate(images):
        start = time.perf_counter()
        result = frontend.process(image, number * PERIOD, calibration=camera, score_map=True)
        whole = 1e3 * (time.perf_counter() - start)
        messages = milliseconds(partial(to_messages, result))
        row = {**result.timings, "other": whole - sum(result.timings.values()), "messages": messages}
        row["without network"] = whole + messages - row["network"]
        yield {**row, **selection(result, frontend)}


def selection(result: FrameResult, frontend: Frontend) -> dict[str, float]:
    scores = torch.as_tensor(result.features.score_map)[None].to(frontend.extractor.device)
    with torch.inference_mode():
        budget = frontend.config.max_keypoints
        nms = milliseconds(lambda: local_maxima(scores, frontend.config.nms_radius))
        return {"nms": nms, "keypoints": milliseconds(lambda: select_keypoints(scores[None], max_keypoints=budget))}


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def message_builder() -> Callable[[FrameResult], object]:
    """What makes all messages of a result; nothing where rclpy is not installed."""
    try:
        from std_msgs.msg import Header

        from scfeat_ros.messages import features_to_message, matches_to_message, tracks_to_message
    except ImportError:
        return lambda result: None
    header = Header()

    def build(result: FrameResult) -> None:
        features_to_message(result, header, "float16")
        tracks_to_message(result, header, "")
        if result.pair is not None:
            matches_to_message(result.pair, result, header, "")

    return build


if __name__ == "__main__":
    main()
