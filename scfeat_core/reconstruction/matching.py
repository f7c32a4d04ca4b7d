"""Matches of pairs of images, verified, in ``matches.h5``; pairs that are there are kept."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import DataError
from scfeat_core.evaluation.methods import match_features
from scfeat_core.feature_files import merge_h5, read_h5
from scfeat_core.matching import match
from scfeat_core.reconstruction.cameras import Cameras
from scfeat_core.reconstruction.hloc import MatchedPair, Pair, group_name, stored_groups, write_matches
from scfeat_core.two_view import verify
from scfeat_core.types import Features, Matches, TwoViewGeometry

MIN_INLIERS = 15  # of a pair that counts as verified; COLMAP's mapper ignores pairs with fewer
MAX_ITERATIONS = 10_000  # 0.999 where a third of the matches are good (samples of 7)
PART_PAIRS = 500  # what an interruption can cost
_HELD_IMAGES = 256  # whose features stay in memory: a megabyte each at 2048 points

Matcher = Callable[[str, str], Matches]
Verifier = Callable[[Pair, np.ndarray, np.ndarray], "TwoViewGeometry | None"]


def match_descriptors_of(features0: Features, features1: Features) -> Matches:
    """Mutual nearest neighbours. scores: cosines, or for binary descriptors the share of equal bits."""
    if features0.descriptors.dtype != np.uint8:
        return match(features0, features1).numpy()
    index0, index1 = match_features(features0, features1)
    differing = np.unpackbits(features0.descriptors[index0] ^ features1.descriptors[index1], axis=1)
    return Matches(index0, index1, 1 - differing.mean(1, dtype=np.float32) if len(index0) else np.zeros(0, np.float32))


class StoredFeatures:
    """The features of the images in an open HDF5 file; those that were read last stay in memory."""

    def __init__(self, stored: Any) -> None:
        self.read: Callable[[str], Features] = lru_cache(_HELD_IMAGES)(lambda name: read_h5(stored, name))

    def match(self, name0: str, name1: str) -> Matches:
        """Raises DataError where there are no descriptors, FeatureError where they are not comparable."""
        features = self.read(name0), self.read(name1)
        for name, each in zip((name0, name1), features, strict=True):
            if each.descriptors.shape[1] == 0:
                raise DataError(f"expected descriptors of '{name}' to match it, found none; extract it again")
        return match_descriptors_of(*features)


def verifier(cameras: Cameras, threshold: float) -> Verifier:
    """Verification with the calibrations of both images, or with a fundamental matrix. threshold: pixels."""

    def check(pair: Pair, points0: np.ndarray, points1: np.ndarray) -> TwoViewGeometry:
        calibrations = cameras.calibrations(*pair)
        return verify(points0, points1, threshold=threshold, cameras=calibrations, max_iterations=MAX_ITERATIONS)

    return check


def match_pairs(
    path: Path,
    pairs: Sequence[Pair],
    features: StoredFeatures,
    matcher: Matcher,
    check: Verifier,
    progress: Callable[[list[Pair]], Iterable[Pair]] = lambda pairs: pairs,
) -> int:
    """Match and verify what ``path`` does not have; returns how many pairs that were. Raises ScfeatError.

    What is complete is kept where this ends early, in parts beside the file that the next call puts together.
    """
    _put_together(path)
    groups = stored_groups(path)
    missing = [pair for pair in pairs if group_name(pair) not in groups]
    try:
        for part in _parts(_matched(progress(missing), features, matcher, check)):
            write_matches(_part_folder(path) / f"{uuid.uuid4().hex}.h5", part)
    finally:
        _put_together(path)
    return len(missing)


def _matched(
    pairs: Iterable[Pair], features: StoredFeatures, matcher: Matcher, check: Verifier
) -> Iterator[MatchedPair]:
    for pair in pairs:
        matches = matcher(*pair)
        keypoints0, keypoints1 = (features.read(name).keypoints for name in pair)
        geometry = check(pair, keypoints0[matches.indices0], keypoints1[matches.indices1])
        yield MatchedPair(pair, (len(keypoints0), len(keypoints1)), matches, geometry)


def _parts(pairs: Iterator[MatchedPair]) -> Iterator[list[MatchedPair]]:
    """Lists of at most PART_PAIRS; also of what there is when the user interrupts."""
    held: list[MatchedPair] = []
    try:
        for pair in pairs:
            held.append(pair)
            if len(held) == PART_PAIRS:
                yield held
                held = []
    except KeyboardInterrupt:
        if held:
            yield held
        raise
    if held:
        yield held


def _part_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _put_together(path: Path) -> None:
    folder = _part_folder(path)
    if not folder.is_dir():
        return
    parts = sorted(folder.glob("*.h5"))
    if parts:
        merge_h5(path, parts, "matches0")
    for file in [*parts, *folder.glob(".*.tmp")]:
        file.unlink(missing_ok=True)
    folder.rmdir()
