"""Matches of pairs of images, verified, in ``matches.h5``; pairs that are there are kept."""

from __future__ import annotations

import math
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
from scfeat_core.types import Features, GeometryModel, Matches, TwoViewGeometry

MIN_INLIERS = 15  # of a pair that counts as verified; COLMAP's mapper ignores pairs with fewer
MAX_ITERATIONS = 10_000  # 0.999 where a third of the matches are good (samples of 7)
PART_PAIRS = 500  # what an interruption can cost
_SAMPLES = {GeometryModel.FUNDAMENTAL: 7, GeometryModel.ESSENTIAL: 5, GeometryModel.HOMOGRAPHY: 4}
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
                raise DataError(
                    f"expected descriptors of '{name}' to match it, found none; of a replay give the folder of the "
                    "run, whose tracks are the matches, else extract it again"
                )
        return match_descriptors_of(*features)


def verifier(cameras: Cameras, threshold: float) -> Verifier:
    """Verification with the calibrations of both images, or with a fundamental matrix. threshold: pixels.

    Inliers that wrong matches could be as well are none: see :func:`log_false_alarms`.
    """

    def check(pair: Pair, points0: np.ndarray, points1: np.ndarray) -> TwoViewGeometry:
        calibrations = cameras.calibrations(*pair)
        found = verify(points0, points1, threshold=threshold, cameras=calibrations, max_iterations=MAX_ITERATIONS)
        if found.model == GeometryModel.NONE or log_false_alarms(found, cameras.of(pair[1]).size) < 0:
            return found
        return TwoViewGeometry(GeometryModel.NONE, np.zeros((3, 3)), np.zeros_like(found.inliers), threshold)

    return check


def log_false_alarms(geometry: TwoViewGeometry, size: tuple[int, int]) -> float:
    """log10 of how many models with as many inliers are to be expected among as many matches that are all wrong.

    A-contrario (Moisan and Stival, IJCV 2004): n C(n, k) C(k, s) p^(k - s) for k inliers of n, samples of s, and the
    share p of the image that is within the threshold of an epipolar line, or of a transferred point. Best of thousands
    of draws, a model of two images that show nothing in common has 15 to 30 of 300 matches: no fixed number or share of
    inliers tells these from the true ones. size: (width, height) of view 1.
    """
    total, inliers, sample = len(geometry.inliers), geometry.num_inliers, _SAMPLES[geometry.model]
    area, reach = float(size[0] * size[1]), geometry.threshold
    band = 2 * reach * math.hypot(*size) if geometry.model != GeometryModel.HOMOGRAPHY else math.pi * reach**2
    chance = min(band / area, 1.0)
    return (
        math.log10(total)
        + _log_choices(total, inliers)
        + _log_choices(inliers, sample)
        + (inliers - sample) * math.log10(chance)
    )


def _log_choices(n: int, k: int) -> float:
    """log10 of the binomial coefficient."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(10)


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
