"""How fast bags are read and decoded, beside how fast the network consumes their images.

    python benchmarks/bag_reading.py BAG... [--weights lite] [--frames 20] [--rounds 3] [--threads 1] [--cpu-time]

Each image of each bag is read, deserialized, decoded, and given to the network, before the next one, so that a busy
machine is busy for both. Columns: milliseconds an image, of one thread: opening the bag (once), reading (a chunk is
read with its first image, so it is the mean of a round), decoding, and the network with the selection of keypoints
(means, too); medians over the rounds, of which the first does not count. "times faster" is network / (read + decode).
--cpu-time counts the time of the processor, and not that of the disk: for a machine that is busy with other things.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

import cv2
import torch

from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_ros.bags import open_bag
from scfeat_ros.images import compressed_to_array, image_to_array


@dataclass(frozen=True)
class Round:
    """Milliseconds: once, and means over the images."""

    opening: float
    read: float
    decode: float
    network: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bags", type=Path, nargs="+")
    parser.add_argument("--weights", default="lite")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=20, help="images of each bag; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    frontend = Frontend(FrontendConfig(weights=args.weights, device=args.device))
    clock = time.process_time if args.cpu_time else time.perf_counter
    rounds: dict[Path, list[Round]] = {bag: [] for bag in args.bags}
    for _ in range(args.rounds + 1):
        for bag in args.bags:
            rounds[bag].append(one_round(bag, frontend, args.frames, clock))
    print("| bag | open | read | decode | images/s | network | times faster |\n|---|--:|--:|--:|--:|--:|--:|")
    for bag, measured in rounds.items():
        opening, read, decode, network = map(statistics.median, zip(*map(astuple, measured[1:]), strict=True))
        reading = read + decode
        print(
            f"| {bag.name} | {opening:.1f} | {read:.2f} | {decode:.2f} | {1000 / reading:.0f} | {network:.1f} | "
            f"{network / reading:.1f} |"
        )


def one_round(path: Path, frontend: Frontend, frames: int, clock: Callable[[], float]) -> Round:
    read = decode = network = 0.0
    count = 0
    frontend.reset()
    start = clock()
    with open_bag(path) as bag:
        topic = max(bag.image_topics, key=lambda topic: topic.count)
        opening = clock() - start
        messages = islice(bag.messages([topic]), frames or None)
        while True:
            times = [clock()]
            message = next(messages, None)
            times.append(clock())
            if message is None:
                break
            image = bag.deserialize(message)
            pixels = compressed_to_array(image) if topic.compressed else image_to_array(image)
            times.append(clock())
            frontend.process(pixels, count, match=False, track=False, assess=False)
            times.append(clock())
            read += times[1] - times[0]
            decode += times[2] - times[1]
            network += times[3] - times[2]
            count += 1
    return Round(1e3 * opening, *(1e3 * total / max(count, 1) for total in (read, decode, network)))


if __name__ == "__main__":
    main()
