"""Whether one front end gives better trajectories than another, or whether that is chance.

    python benchmarks/trajectories.py BAG [--topic T] [--methods scfeat,sift,orb] [--budgets 800,1024,1500]
        [--strides 1,2] [--starts 0,10,20,30]

Each method replays the bag as `scfeat replay` does, with each budget of points, and with every n-th image in each
phase; the odometry then begins at each of the starts (images). Of all that, the errors of the first method over those
of each other one in the same variant: their median and range, in how many variants the first one is better, and the
probability of as uneven a count by chance (sign test, two-sided). Variants share images, and so are less independent
than the sign test takes them to be: its probabilities are too small rather than too large. Budgets other than the
default are tried with all images only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import comb
from pathlib import Path

import numpy as np

from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.odometry import estimate, evaluate
from scfeat_core.replay.records import FrameRecord
from scfeat_ros.parameters import NodeParameters, load_parameters
from scfeat_ros.replay.job import ReplayJob
from scfeat_ros.replay.run import Player
from scfeat_ros.replay.source import Source

ERRORS = {"ate_m": "ATE", "rpe_m": "RPE, translation", "rpe_deg": "RPE, rotation"}
Scores = dict[str, float]


@dataclass(frozen=True)
class Variant:
    """budget: points. stride, phase: of the images, the ones with index % stride == phase. start: image."""

    budget: int
    stride: int
    phase: int
    start: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bag", type=Path)
    parser.add_argument("--topic")
    parser.add_argument("--methods", default="scfeat,sift,orb", type=lambda text: text.split(","))
    for name, default in (("budgets", "800,1024,1500"), ("strides", "1,2"), ("starts", "0,10,20,30")):
        parser.add_argument(f"--{name}", default=default, type=lambda text: [int(word) for word in text.split(",")])
    args = parser.parse_args()
    found = {method: dict(scores_of(args, method)) for method in args.methods}
    for method in args.methods:
        medians = (np.median([scores[name] for scores in found[method].values() if name in scores]) for name in ERRORS)
        print(f"{method}: medians " + ", ".join(map("{} {:.4g}".format, ERRORS.values(), medians)))
    first, *others = args.methods
    for other, name in product(others, ERRORS):
        print(f"{first} / {other}, {ERRORS[name]}: {compared(found[first], found[other], name)}")


def scores_of(args: argparse.Namespace, method: str) -> Iterator[tuple[Variant, Scores]]:
    usual = NodeParameters.max_keypoints
    for budget, stride in product(args.budgets, args.strides):
        if stride > 1 and budget != usual:
            continue
        for phase in range(stride):
            job = ReplayJob(args.bag, Path("unused"), topic=args.topic, method=method)
            job = replace(job, parameters=load_parameters({"max_keypoints": budget}))
            source = Source(job)
            player = Player(job, source)
            frames = [player.process(shot) for shot in source.shots() if shot.index % stride == phase]
            for start in args.starts:
                variant = Variant(budget, stride, phase, start)
                scores = errors(frames[start // stride :], player, source)
                print(f"{method} {variant}: {scores}", flush=True)
                yield variant, scores


def errors(frames: list[FrameRecord], player: Player, source: Source) -> Scores:
    """Those of ERRORS that are known; of a path that never began, none."""
    if source.truth is None:
        raise DataError(f"expected ground truth of {source.job.bag}, found none: put groundtruth.txt beside it")
    try:
        scores = evaluate(estimate(frames, player.camera), source.truth)
    except ScfeatError as error:
        print(error)
        return {}
    return {name: value for name in ERRORS if (value := getattr(scores, name)) is not None}


def compared(ours: dict[Variant, Scores], theirs: dict[Variant, Scores], name: str) -> str:
    ratios = [
        ours[variant][name] / theirs[variant][name]
        for variant in ours
        if name in ours[variant] and name in theirs[variant]
    ]
    if not ratios:
        return "nothing to compare"
    count, better = len(ratios), sum(ratio < 1 for ratio in ratios)
    spread = f"median {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{spread}, better in {better} of {count} variants, by chance p = {sign_test(better, count):.3f}"


def sign_test(better: int, count: int) -> float:
    """Probability of a count at least as uneven where both are equally likely to be better."""
    uneven = abs(2 * better - count)
    return sum(comb(count, k) for k in range(count + 1) if abs(2 * k - count) >= uneven) / 2**count


if __name__ == "__main__":
    main()
