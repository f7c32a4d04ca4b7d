"""Pairs with a few hand-made correspondences and no model (WxBS): how many of them the estimated geometry explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scfeat_core.evaluation.datasets import LabelledPair
from scfeat_core.evaluation.metrics import matching_accuracy, symmetric_epipolar_distance
from scfeat_core.evaluation.views import View, match_views
from scfeat_core.geometry import warp_points
from scfeat_core.two_view import verify
from scfeat_core.types import GeometryModel

RECALL_THRESHOLDS = (1, 3, 5, 10, 20)


@dataclass(frozen=True)
class LabelledRow:
    """recall: shares 0..1 of the labelled points within each threshold of the epipolar lines of the estimated F."""

    split: str
    name: str
    keypoints: tuple[int, int]
    matches: int
    recall: list[float]


def evaluate_labelled_pair(pair: LabelledPair, views: Mapping[Path, View]) -> LabelledRow:
    matched = match_views(pair, views)
    geometry = verify(matched.points0, matched.points1, model="fundamental")
    errors = np.full(len(pair.points0), np.inf)
    if geometry.model == GeometryModel.FUNDAMENTAL:
        points0 = warp_points(pair.points0, matched.view0.scale)
        points1 = warp_points(pair.points1, matched.view1.scale)
        errors = symmetric_epipolar_distance(points0, points1, geometry.matrix)
    keypoints = (len(matched.view0.features), len(matched.view1.features))
    return LabelledRow(pair.split, pair.name, keypoints, len(matched), matching_accuracy(errors, RECALL_THRESHOLDS))


def summarise_labelled(rows: Sequence[LabelledRow]) -> dict[str, float]:
    """Means over the pairs; recall in percent."""
    recall = np.mean([row.recall for row in rows], axis=0)
    return {
        "pairs": len(rows),
        "keypoints": float(np.mean([row.keypoints for row in rows])),
        "matches": float(np.mean([row.matches for row in rows])),
        **{f"recall@{t}": 100 * float(value) for t, value in zip(RECALL_THRESHOLDS, recall, strict=True)},
    }
