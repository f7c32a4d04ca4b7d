"""How good the network is on held-back photographs, in the terms of the evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scfeat_core.data.warps import WarpConfig, WarpPairs, draw_pairs
from scfeat_core.evaluation.metrics import matching_accuracy, repeatability
from scfeat_core.extraction import Extractor
from scfeat_core.geometry import warp_points
from scfeat_core.matching import match
from scfeat_core.network.model import SCFeat
from scfeat_core.types import Features

VIEW_SIZE = 256  # pixels
MAX_KEYPOINTS = 256
BATCH = 8
THRESHOLD = 3  # pixels


class Validation:
    """A fixed set of warped pairs; ``measure`` says how the network does on them."""

    def __init__(self, photos: list[list[np.ndarray]], pairs: int, warps: WarpConfig) -> None:
        rng = np.random.default_rng(0)
        config = replace(warps, view_size=VIEW_SIZE)
        self._batches = [draw_pairs(photos, min(BATCH, pairs - i), config, rng) for i in range(0, pairs, BATCH)]

    def measure(self, model: SCFeat, device: str) -> dict[str, float]:
        """Means over the pairs: share of matches within 3 pixels, of points repeated within 3 pixels, and matches."""
        extractor = Extractor(model, device=device, max_keypoints=MAX_KEYPOINTS)
        rows = [row for batch in self._batches for row in _measure_batch(extractor, batch)]
        means = np.mean(rows, axis=0)
        return {
            f"validation_mma{THRESHOLD}": float(means[0]),
            f"validation_repeatability{THRESHOLD}": float(means[1]),
            "validation_matches": float(means[2]),
        }


def _measure_batch(extractor: Extractor, batch: WarpPairs) -> list[tuple[float, float, float]]:
    features0 = extractor.extract_batch(list(batch.image0))
    features1 = extractor.extract_batch(list(batch.image1))
    truths = batch.homography.double().numpy()
    return [_measure_pair(f0, f1, truth) for f0, f1, truth in zip(features0, features1, truths, strict=True)]


def _measure_pair(features0: Features, features1: Features, truth: np.ndarray) -> tuple[float, float, float]:
    matches = match(features0, features1)
    warped = warp_points(features0.keypoints[matches.indices0], truth)
    errors = np.linalg.norm(warped - features1.keypoints[matches.indices1], axis=1)
    sizes = (features0.image_size, features1.image_size)
    repeated = repeatability(features0.keypoints, features1.keypoints, truth, sizes, [THRESHOLD])
    return matching_accuracy(errors, [THRESHOLD])[0], repeated[0], float(len(matches))
