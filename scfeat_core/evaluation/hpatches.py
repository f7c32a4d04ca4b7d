"""The HPatches benchmark as D2-Net has it (Dusmanu et al., CVPR 2019), which its successors have kept.

Image 1 of each of 108 sequences against images 2..6 (540 pairs: 260 of illumination, 280 of viewpoint), at the size
that is stored; mutual nearest neighbours by the dot product, no ratio test, all features that there are. MMA@t is the
mean over the pairs of the share of the matches that are within t pixels of the true homography.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from scfeat_core.data.photos import read_rgb
from scfeat_core.errors import DataError
from scfeat_core.evaluation.datasets import HPATCHES_SPLITS, HomographyPair
from scfeat_core.evaluation.homography import HomographyRow, evaluate_homography_pair, summarise_homography
from scfeat_core.evaluation.metrics import MMA_THRESHOLDS, mma_score
from scfeat_core.evaluation.views import Protocol, View, map_pairs, truncate_views, with_progress
from scfeat_core.feature_files import read_npz
from scfeat_core.types import Features

THRESHOLDS = tuple(range(1, 16))  # of the cache files; MMAscore and all tables use the first ten
_KINDS = {split: kind for kind, split in HPATCHES_SPLITS.items()}

Views = Callable[[Sequence[HomographyPair]], Iterable[Mapping[Path, View]]]


@dataclass(frozen=True, eq=False)
class HPatchesCounts:
    """All that the protocol keeps of a run, and all that a cache file holds.

    thresholds: (T,) pixels, ascending. accuracy: for the kinds "i" and "v", (T,) float64, the sum over their pairs of
    the share of the matches within each threshold. kinds: (P,) "i" or "v", matches: (P,), both one for each pair.
    keypoints: (I,), one for each image, sequence by sequence.
    """

    thresholds: np.ndarray
    accuracy: dict[str, np.ndarray]
    kinds: np.ndarray
    keypoints: np.ndarray
    matches: np.ndarray


# -- measuring ---------------------------------------------------------------------------------------------------------


def evaluate_hpatches(
    pairs: Sequence[HomographyPair],
    views: Views,
    protocols: Sequence[Protocol],
    workers: int = 1,
    progress: bool = False,
) -> list[list[HomographyRow]]:
    """For each protocol one row for each pair, in order.

    views: of the images of some pairs, for each protocol in turn. It is asked for one sequence after the other: the
    features of the whole benchmark would take gigabytes.
    """
    sequences = [list(group) for _, group in groupby(pairs, lambda pair: pair.path0.parent)]
    rows: list[list[HomographyRow]] = [[] for _ in protocols]
    for sequence in with_progress(sequences, "sequences", progress):
        for found, protocol, sink in zip(views(sequence), protocols, rows, strict=True):
            evaluate = partial(evaluate_homography_pair, views=found, protocol=protocol, thresholds=THRESHOLDS)
            sink.extend(map_pairs(evaluate, sequence, sequence[0].path0.parent.name, workers))
    return rows


def stored_views(folder: Path, postfix: str, budgets: Sequence[int | None]) -> Views:
    """Views from files ``<folder>/<sequence>/<image>.<postfix>`` (npz, in pixels of the stored images).

    budgets: for each the views with so many points of the highest score; None: with all. Raises DataError.
    """

    def views(pairs: Sequence[HomographyPair]) -> Iterator[dict[Path, View]]:
        paths = dict.fromkeys(path for pair in pairs for path in (pair.path0, pair.path1))
        whole = {path: View(_stored_features(folder, path, postfix), np.eye(3)) for path in paths}
        for budget in budgets:
            yield whole if budget is None else truncate_views(whole, budget)

    return views


def _stored_features(folder: Path, image: Path, postfix: str) -> Features:
    """Best first."""
    features = read_npz(folder / image.parent.name / f"{image.name}.{postfix}")
    best = np.argsort(-features.scores, kind="stable")
    size = features.image_size if min(features.image_size) > 0 else read_rgb(image, upright=False).shape[1::-1]
    return Features(features.keypoints[best], features.scores[best], features.descriptors[best], size, postfix)


# -- summaries ---------------------------------------------------------------------------------------------------------


def summarise_hpatches(rows: Sequence[HomographyRow]) -> dict[str, float]:
    """Means over the pairs, keypoints over the images; all shares in percent."""
    return {**summarise_homography(rows), **_keypoint_summary(_keypoints_of(rows))}


def summarise_counts(counts: HPatchesCounts, kinds: str = "iv") -> dict[str, float]:
    """The same of a cache file, of the pairs of some kinds, as far as it says."""
    chosen = np.isin(counts.kinds, list(kinds))
    accuracy = np.sum([counts.accuracy[kind] for kind in kinds], axis=0)
    mma = accuracy[: len(MMA_THRESHOLDS)] / max(int(chosen.sum()), 1)
    return {
        "pairs": int(chosen.sum()),
        **_keypoint_summary(_keypoints_of_kinds(counts, kinds)),
        "matches": float(counts.matches[chosen].mean()) if chosen.any() else 0.0,
        **{f"MMA@{t}": 100 * float(value) for t, value in zip(MMA_THRESHOLDS, mma, strict=True)},
        "MMAscore": 100 * mma_score(mma.tolist()),
    }


def _keypoint_summary(keypoints: np.ndarray) -> dict[str, float]:
    if not keypoints.size:
        return {"keypoints": float("nan")}
    return {
        "keypoints": float(keypoints.mean()),
        "keypoints_min": float(keypoints.min()),
        "keypoints_max": float(keypoints.max()),
    }


def _keypoints_of(rows: Sequence[HomographyRow]) -> np.ndarray:
    """(I,) numbers of keypoints of the images, each image once."""
    return np.array([count for sequence in _by_sequence(rows) for count in _of_images(sequence)])


def _of_images(sequence: list[HomographyRow]) -> list[int]:
    return [sequence[0].keypoints[0], *(row.keypoints[1] for row in sequence)]


def _by_sequence(rows: Sequence[HomographyRow]) -> Iterator[list[HomographyRow]]:
    return (list(group) for _, group in groupby(rows, lambda row: row.name.rpartition("/")[0]))


def _keypoints_of_kinds(counts: HPatchesCounts, kinds: str) -> np.ndarray:
    """Images have no kind in a cache; it follows from that of the pairs where each sequence has 6 images, 5 pairs."""
    if kinds == "iv":
        return counts.keypoints
    pairs_of = counts.kinds[: len(counts.kinds) // 5 * 5].reshape(-1, 5)
    whole = len(counts.keypoints) * 5 == len(counts.kinds) * 6 and (pairs_of == pairs_of[:, :1]).all()
    return counts.keypoints[np.isin(np.repeat(pairs_of[:, 0], 6), list(kinds))] if whole else np.zeros(0)


def count_rows(rows: Sequence[HomographyRow]) -> HPatchesCounts:
    """What a cache file keeps of the rows of :func:`evaluate_hpatches`."""
    if any(len(row.accuracy) != len(THRESHOLDS) for row in rows):
        raise DataError(f"expected rows with an accuracy at 1..{THRESHOLDS[-1]} px, found others")
    kinds = np.array([_KINDS[row.split] for row in rows])
    accuracy = np.array([row.accuracy for row in rows])
    return HPatchesCounts(
        thresholds=np.array(THRESHOLDS),
        accuracy={kind: accuracy[kinds == kind].sum(0) for kind in HPATCHES_SPLITS},
        kinds=kinds,
        keypoints=_keypoints_of(rows),
        matches=np.array([row.matches for row in rows]),
    )
