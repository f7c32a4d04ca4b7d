"""The features of every image of a run, extracted once, and the loop over pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np

from scfeat_core.config import Range, check_config
from scfeat_core.data.photos import read_rgb
from scfeat_core.errors import DataError
from scfeat_core.evaluation.datasets import ImagePair, shrink_image
from scfeat_core.evaluation.methods import Method, check_features, match_features
from scfeat_core.types import Features

Item = TypeVar("Item")
Pair = TypeVar("Pair", bound=ImagePair)
Row = TypeVar("Row")


@dataclass(frozen=True)
class Protocol:
    """Everything that changes the numbers, apart from the method and the data. longer_side 0: as stored."""

    max_keypoints: Annotated[int, Range(minimum=1)] = 1024
    longer_side: Annotated[int, Range(minimum=0)] = 640
    estimator: Literal["poselib", "magsac"] = "poselib"
    runs: Annotated[int, Range(minimum=1)] = 1

    def __post_init__(self) -> None:
        check_config(self)


@dataclass(frozen=True, eq=False)
class View:
    """Features of a resized image.

    scale: (3, 3) float64 from pixels of the stored image to those of the resized one. size: (width, height) of the
    stored image, where it is known.
    """

    features: Features
    scale: np.ndarray
    size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class MatchedPair:
    """points0, points1: (M, 2) float64, matched keypoints of the two views in pixels of the resized images."""

    view0: View
    view1: View
    points0: np.ndarray
    points1: np.ndarray

    def __len__(self) -> int:
        return len(self.points0)

    def orders(self, runs: int) -> Iterator[np.ndarray]:
        """One permutation (M,) of the matches for each run: other samples are drawn. The first run has them as is."""
        for run in range(runs):
            yield np.random.default_rng(run).permutation(len(self)) if run else np.arange(len(self))


def extract_views(
    pairs: Sequence[ImagePair], method: Method, protocol: Protocol, progress: bool = False
) -> dict[Path, View]:
    """The views of all images that occur in ``pairs``."""
    paths = list(dict.fromkeys(path for pair in pairs for path in (pair.path0, pair.path1)))
    views = {}
    for path in with_progress(paths, "features", progress):
        stored = read_rgb(path, upright=False)  # the ground truth belongs to the pixels as they are stored
        image, scale = shrink_image(stored, protocol.longer_side)
        features = check_features(method(image, protocol.max_keypoints), protocol.max_keypoints)
        views[path] = View(features, scale, (stored.shape[1], stored.shape[0]))
    return views


def truncate_views(views: Mapping[Path, View], max_keypoints: int) -> dict[Path, View]:
    """The views with the first ``max_keypoints`` of their points, which are the best.

    Raises DataError where they do not come best first, as then others would have to be taken.
    """
    for path, view in views.items():
        if len(view.features) > max_keypoints and not (np.diff(view.features.scores) <= 0).all():
            raise DataError(
                f"expected features best first, to take {max_keypoints} of the {len(view.features)} of {path}, found "
                "scores that rise; sort them in the method by falling scores, or measure one budget at a time"
            )
    return {path: replace(view, features=_first(view.features, max_keypoints)) for path, view in views.items()}


def _first(features: Features, count: int) -> Features:
    return replace(
        features,
        keypoints=features.keypoints[:count],
        scores=features.scores[:count],
        descriptors=features.descriptors[:count],
    )


def match_views(pair: ImagePair, views: Mapping[Path, View]) -> MatchedPair:
    view0, view1 = views[pair.path0], views[pair.path1]
    index0, index1 = match_features(view0.features, view1.features)
    points0, points1 = view0.features.keypoints[index0], view1.features.keypoints[index1]
    return MatchedPair(view0, view1, points0.astype(np.float64), points1.astype(np.float64))


def map_pairs(
    evaluate: Callable[[Pair], Row], pairs: Sequence[Pair], name: str, workers: int = 1, progress: bool = False
) -> list[Row]:
    """``evaluate`` of each pair, in order; threads are enough, as the estimators work outside of Python."""
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        return list(with_progress(pool.map(evaluate, pairs), name, progress, len(pairs)))


def with_progress(items: Iterable[Item], name: str, wanted: bool, total: int | None = None) -> Iterable[Item]:
    """The items, behind a progress bar on stderr where one is wanted and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Any = tqdm(items, desc=name, total=total, disable=not wanted, leave=False, dynamic_ncols=True)
    return bar
