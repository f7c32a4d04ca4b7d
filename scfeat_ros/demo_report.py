"""What the demo found out: figures from what was observed, and the files that show them."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scfeat_core.drawing import draw_verified
from scfeat_core.errors import ScfeatError
from scfeat_core.report import Figures, Picture, Series, encode, html_page, percentiles, rounded, write, write_json

from .fastdds import version_of

if TYPE_CHECKING:
    from .monitor import Observations, PairRecord, Sample

STAGES = ("queue", "decode", "preprocess", "network", "match", "publish", "total")


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


@dataclass(frozen=True)
class Played:
    """What the player says it did: see player.Log.summary. sent: stamp -> (index, CLOCK_MONOTONIC), nanoseconds."""

    published: int
    late_ms: Mapping[str, float]
    error: str
    sent: Mapping[int, tuple[int, int]]


# -------------------------------------------------------------------------------------------------------------- figures


def figures_of(seen: Observations, played: Played, camera: PlayedCamera) -> Figures:
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


def facts_of(args: argparse.Namespace, camera: PlayedCamera, seen: Observations, played: Played) -> dict[str, Any]:
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
            name: version_of(name) or "not from PyPI"
            for name in ("scfeat-python", "torch", "opencv-python", "numpy", "ros-rclpy")
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
    }


def write_report(
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


def _picture(sample: Sample) -> Picture:
    pair = sample.pair
    good = np.ones(len(pair.keypoints0), bool) if pair.inliers is None else pair.inliers
    images = _eight_bit(sample.image0), _eight_bit(sample.image1)
    image, lines = draw_verified(*images, pair.keypoints0, pair.keypoints1, good)
    count = "not verified" if pair.inliers is None else f"{int(good.sum())} of them verified (green)"
    seconds = (pair.stamp1 - pair.stamp0) / 1e9
    return Picture(
        image, f"{len(good)} matches between two images {seconds:.2f} s apart, {count}; lines join {lines} of these"
    )


def _eight_bit(image: np.ndarray) -> np.ndarray:
    return (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image


def warnings_of(seen: Observations, played: Played) -> list[str]:
    from .monitor import waiting

    assert seen.status is not None
    found = []
    if played.error:
        found.append(f"only the readable part was played: {played.error}")
    if waiting(seen.status):
        found.append(f"{waiting(seen.status)} frames were still in work at the end")
    if seen.status.last_error:
        found.append(f"the node's last error: {seen.status.last_error}")
    if not seen.samples:
        found.append("no matches came with their images: there is no picture")
    return found
