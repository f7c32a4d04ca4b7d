"""How long tracks get on a recorded bag, with and without windows and re-identification.

    python benchmarks/tracking.py BAG [--topic /cam0/image_raw] [--camera-info FILE] [--ground-truth FILE]

The network runs once on each frame; then matching, verification and tracking are repeated with each setting of
``SETTINGS``. Columns: tracks; their mean and median length in frames, and the share of them longer than 10, of all
tracks and (>1) of those that were seen at least twice; share of all observations that belong to tracks longer than 10;
inlier ratio and inliers, medians; re-identified points a frame; "off": share of the re-identified points that lie more
than 3 pixels from the true epipolar line of where they were last seen, and the same of all points 5 frames on;
milliseconds, medians.

--camera-info: intrinsics of ROS, Kalibr or COLMAP; the default is camera_info.yaml beside the bag, where it is there.
--ground-truth: camera poses in the world (TUM, EuRoC, KITTI); the default is groundtruth.txt beside the bag. Without
one there is no "off".
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

from scfeat_core.extraction import Extractor
from scfeat_core.frontend import FeatureExtractor, Frontend, FrontendConfig
from scfeat_core.geometry import epipolar_distance, essential_from_pose, undistort_points
from scfeat_core.replay.records import GroundTruth
from scfeat_core.types import Camera, Features, FrameResult
from scfeat_ros.bags import header_stamp, open_bag
from scfeat_ros.ground_truth import read_ground_truth
from scfeat_ros.images import compressed_to_array, image_to_array
from scfeat_ros.intrinsics import read_intrinsics

SETTINGS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "no re-identification": {"max_track_gap": 0},
    "window 20": {"search_radius": 20.0},
    "window 40": {"search_radius": 40.0},
    "window 80": {"search_radius": 80.0},
    "gap 2": {"max_track_gap": 2},
    "gap 5": {"max_track_gap": 5},
    "gap 20": {"max_track_gap": 20},
    "cosine 0.7": {"reidentify_cosine": 0.7},
    "cosine 0.9": {"reidentify_cosine": 0.9},
}
Rays = dict[int, np.ndarray]  # track -> (2,)
OFF = 3.0  # pixels
LATER = 5  # frames


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """stamp: nanoseconds. pose: (4, 4), camera in the world, None without ground truth."""

    stamp: int
    features: Features
    pose: np.ndarray | None


SOMETHING = np.eye(64, dtype=np.uint8) * 255  # an image to be seen, in the place of those that the features are of


class Recorded:
    """In the place of the Extractor: gives back features that were extracted before."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.device = extractor.device
        self.timings: dict[str, float] = {}
        self.features: Features

    def extract_batch(self, images: list[np.ndarray], *_: Any, **__: Any) -> list[Features]:
        return [self.features for _ in images]

    def update(self, **_: Any) -> None:
        pass


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    extractor = Extractor(args.weights, args.device, args.max_keypoints)
    beside = args.bag if args.bag.is_dir() else args.bag.parent
    camera = read_camera(args.camera_info or beside / "camera_info.yaml", required=args.camera_info is not None)
    truth = read_truth(args.ground_truth or beside / "groundtruth.txt", required=args.ground_truth is not None)
    extracted = [
        (stamp, extractor(image, to_numpy=False)) for stamp, image in images(args.bag, args.topic, args.frames)
    ]
    frames = with_poses(extracted, truth)
    extra = yaml.safe_load(args.set)
    print(f"{args.bag.name}: {len(frames)} frames, {'calibrated' if camera else 'not calibrated'}, {args.weights}\n")
    names = [name for name in SETTINGS if args.only in name]
    print(table([(name, measure(frames, camera, {**extra, **SETTINGS[name]})) for name in names]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bag", type=Path)
    parser.add_argument("--topic", help="of the images, where the bag has several")
    parser.add_argument("--frames", type=int, default=0, help="at most so many; 0: all")
    parser.add_argument("--camera-info", type=Path)
    parser.add_argument("--ground-truth", type=Path)
    parser.add_argument("--weights", default="lite")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-keypoints", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--set", default="{}", help="settings of the front end for all rows, as YAML")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------- data


def images(path: Path, topic: str | None, limit: int) -> Iterator[tuple[int, np.ndarray]]:
    """Stamps, nanoseconds, and gray images (H, W)."""
    with open_bag(path) as bag:
        chosen, _ = bag.choose_image_topic(topic)
        for message in islice(bag.messages([chosen]), limit or None):
            image = bag.deserialize(message)
            pixels = compressed_to_array(image) if chosen.compressed else image_to_array(image)
            yield header_stamp(message.data), pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def read_camera(path: Path, required: bool) -> Camera | None:
    return read_intrinsics(path) if required or path.is_file() else None


def read_truth(path: Path, required: bool) -> GroundTruth | None:
    return read_ground_truth(path) if required or path.is_file() else None


def with_poses(extracted: list[tuple[int, Features]], truth: GroundTruth | None) -> list[Frame]:
    """Ground truth that has no image near its first stamp counts from the first image."""
    first = extracted[0][0] if extracted else 0
    origin = first if truth is not None and abs(int(truth.stamps[0]) - first) > 3600 * 10**9 else 0
    return [Frame(stamp, features, nearest_pose(truth, stamp - origin)) for stamp, features in extracted]


def nearest_pose(truth: GroundTruth | None, stamp: int) -> np.ndarray | None:
    if truth is None:
        return None
    away = np.abs(truth.stamps - stamp)
    return truth.poses[away.argmin()] if away.min() <= 10_000_000 else None


# ------------------------------------------------------------------------------------------------------------- measure


def measure(frames: list[Frame], camera: Camera | None, settings: dict[str, Any]) -> dict[str, float]:
    frontend, recorded = replaying(FrontendConfig(weights="random", **settings))
    lengths: dict[int, int] = {}
    history = History(camera)
    timings: dict[str, list[float]] = defaultdict(list)
    ratios, inliers = [], []
    for frame in frames:
        recorded.features = frame.features
        result = frontend.process(SOMETHING, frame.stamp, calibration=camera, assess=False)
        assert result.tracks is not None
        lengths.update(zip(result.tracks.ids.tolist(), result.tracks.ages.tolist(), strict=True))
        history.add(result, frame.pose)
        if result.pair is not None and result.pair.geometry is not None:
            ratios.append(result.pair.geometry.inliers.mean())
            inliers.append(result.pair.geometry.num_inliers)
        for stage, ms in result.timings.items():
            timings[stage].append(ms)
    length = np.array(list(lengths.values()))
    seen_twice = length[length > 1]
    return {
        "tracks": len(length),
        "mean": length.mean(),
        "median": np.median(length),
        "> 10, %": 100 * (length > 10).mean(),
        "mean (>1)": seen_twice.mean(),
        "median (>1)": np.median(seen_twice),
        "> 10 (>1), %": 100 * (seen_twice > 10).mean(),
        "observations, %": 100 * length[length > 10].sum() / length.sum(),
        "inlier ratio": np.median(ratios) if ratios else np.nan,
        "inliers": np.median(inliers) if inliers else np.nan,
        "re-identified": history.returned / len(frames),
        "off, %": history.off(history.distances_returned),
        f"off after {LATER}, %": history.off(history.distances_later),
        **{f"{stage}, ms": np.median(timings[stage] or [0.0]) for stage in ("match", "verify", "track")},
    }


def replaying(config: FrontendConfig) -> tuple[Frontend, Recorded]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network is not used
        frontend = Frontend(config)
    recorded = Recorded(frontend.extractor)
    frontend.extractor = recorded  # type: ignore[assignment]
    return frontend, recorded


class History:
    """Where the points of all tracks were, and how far the later ones are from the true epipolar lines of those."""

    def __init__(self, camera: Camera | None) -> None:
        self.returned = 0
        self.distances_returned: list[np.ndarray] = []
        self.distances_later: list[np.ndarray] = []
        self._camera = camera
        self._poses: list[np.ndarray] = []
        self._seen: list[Rays] = []

    def add(self, result: FrameResult, pose: np.ndarray | None) -> None:
        tracks = result.tracks
        assert tracks is not None
        returned = tracks.flags == 2
        self.returned += int(returned.sum())
        if self._camera is None or pose is None:
            return
        rays = undistort_points(tracks.keypoints, self._camera)
        now = dict(zip(tracks.ids.tolist(), rays, strict=True))
        self._poses.append(pose)
        self._seen.append(now)
        focal_length = (self._camera.K[0, 0] + self._camera.K[1, 1]) / 2
        self._compare(len(self._seen) - 1 - LATER, now, focal_length, self.distances_later)
        waiting = dict(zip(tracks.ids[returned].tolist(), rays[returned], strict=True))
        for before in range(len(self._seen) - 3, -1, -1):
            if not waiting:
                break
            found = {track: ray for track, ray in waiting.items() if track in self._seen[before]}
            self._compare(before, found, focal_length, self.distances_returned)
            waiting = {track: ray for track, ray in waiting.items() if track not in found}

    def off(self, distances: list[np.ndarray]) -> float:
        """Per cent; of points whose epipolar line is known, as the camera moved."""
        joined = np.concatenate(distances) if distances else np.zeros(0)
        joined = joined[np.isfinite(joined)]
        return 100 * float((joined > OFF).mean()) if len(joined) else float("nan")

    def _compare(self, before: int, now: Rays, focal_length: float, distances: list[np.ndarray]) -> None:
        if before < 0:
            return
        both = [track for track in now if track in self._seen[before]]
        relative = np.linalg.inv(self._poses[-1]) @ self._poses[before]
        if not both or np.linalg.norm(relative[:3, 3]) < 0.01:  # the camera stands still: there are no epipolar lines
            return
        essential = essential_from_pose(relative[:3, :3], relative[:3, 3])
        rays0 = np.array([self._seen[before][track] for track in both])
        rays1 = np.array([now[track] for track in both])
        distances.append(focal_length * epipolar_distance(rays0, rays1, essential))


def table(rows: list[tuple[str, dict[str, float]]]) -> str:
    names = list(rows[0][1])
    lines = ["| setting | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for name, values in rows:
        lines.append(f"| {name} | " + " | ".join(shown(values[column]) for column in names) + " |")
    return "\n".join(lines)


def shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 2 or value == 0 else f"{value:.2f}"


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s")
