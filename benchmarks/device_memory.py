"""How much memory of a device an extraction needs at its peak: estimated on any machine, measured where there is CUDA.

    python benchmarks/device_memory.py --model r50 --size 1280x720 --precision float16 --limit 1500

The estimate is that of ``scfeat bench --count``: weights, maps and temporaries of the network that are held at once, if
all of them are in the precision that is asked for, without the workspaces of the convolution library and what the
allocator rounds up. What is measured is the peak of torch's allocator over --images extractions, and what that has
reserved of the device. Weights are random: memory does not depend on them. Exit status 1 where what was measured
(estimated, without CUDA) is above --limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from scfeat_core.bench.floors import network_cost
from scfeat_core.extraction import Extractor
from scfeat_core.network.inference import inference_network
from scfeat_core.network.model import SCFeat


def estimate(args: argparse.Namespace) -> dict[str, Any]:
    """MB, of the network alone."""
    width, height = args.size
    cost = network_cost(inference_network(SCFeat.create(args.model)), (args.batch, 3, height, width), args.precision)
    return {"peak_mb": megabytes(cost.peak_bytes)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """MB, of whole extractions."""
    extract = Extractor(SCFeat.create(args.model), "cuda", precision=args.precision, engine=args.engine, levels=1)
    width, height = args.size
    images = torch.randint(0, 255, (args.batch, height, width), dtype=torch.uint8)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(args.images):
        extract.extract_batch(list(images), to_numpy=False)
    torch.cuda.synchronize()
    return {
        "device": torch.cuda.get_device_name(),
        "engine": extract.engine,
        "note": extract.engine_note,
        "peak_mb": megabytes(torch.cuda.max_memory_allocated()),
        "reserved_mb": megabytes(torch.cuda.max_memory_reserved()),
    }


def megabytes(size: float) -> float:
    return round(size / 1e6, 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="r50", help="r50, r34, r18, lite (default: r50)")
    parser.add_argument("--size", default="1280x720", help="(default: 1280x720)")
    parser.add_argument("--batch", type=int, default=1, help="(default: 1)")
    parser.add_argument("--precision", default="float16", help="float32, bfloat16, float16 (default: float16)")
    parser.add_argument("--engine", default="eager", help="what runs the network on the device (default: eager)")
    parser.add_argument("--images", type=int, default=10, help="that are extracted (default: 10)")
    parser.add_argument("--limit", type=float, default=0.0, help="MB; 0: none (default)")
    parser.add_argument("--output", type=Path, help="JSON (default: none)")
    args = parser.parse_args()
    width, _, height = args.size.partition("x")
    args.size = (int(width), int(height))
    return args


def main() -> int:
    args = arguments()
    report = {"estimated": estimate(args)}
    if torch.cuda.is_available():
        report["measured"] = measure(args)
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    peak = report.get("measured", report["estimated"])["peak_mb"]
    return int(0 < args.limit < peak)


if __name__ == "__main__":
    sys.exit(main())
