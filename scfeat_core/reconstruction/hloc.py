"""``matches.h5`` and ``pairs.txt`` as hloc has them, with the two-view geometries beside the matches.

HDF5: a group ``<name0>/<name1>`` for each pair, with ``/`` in the names of images replaced by ``-``. ``matches0``
(N0,) int16: for each keypoint of image 0 its partner in image 1, -1 where it has none; ``matching_scores0`` (N0,)
float16, 0 where it has none. Our own, which hloc does not look at: ``inliers0`` (N0,) bool and ``matrix`` (3, 3)
float64, with the attributes ``model`` (name of a GeometryModel) and ``threshold`` (pixels). The matrix is that of
:class:`scfeat_core.types.TwoViewGeometry`: pixel (0, 0) is the centre of the top-left pixel, and image 0 is view 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import DataError, FeatureError
from scfeat_core.feature_files import h5_names, new_h5, open_h5
from scfeat_core.report import write
from scfeat_core.types import GeometryModel, Matches, TwoViewGeometry

MOST_KEYPOINTS = int(np.iinfo(np.int16).max)  # that an image may have, for int16 to hold their indices

Pair = tuple[str, str]


@dataclass(frozen=True, eq=False)
class MatchedPair:
    """Matches of two images by their names, in the order of image 0. keypoints: how many each image has.

    geometry: None where they were not verified.
    """

    names: Pair
    keypoints: tuple[int, int]
    matches: Matches
    geometry: TwoViewGeometry | None

    @property
    def num_inliers(self) -> int:
        return 0 if self.geometry is None else self.geometry.num_inliers


def group_name(pair: Pair) -> str:
    """What the matches of a pair are called in the file."""
    return "/".join(name.replace("/", "-") for name in pair)


def check_group_names(names: Sequence[str]) -> None:
    """Raise DataError where the names of two images become one, as 'a/b.jpg' and 'a-b.jpg' do."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.replace("/", "-"), name)
        if other != name:
            raise DataError(
                f"expected names of images that differ when '/' is replaced by '-', as hloc does, found '{other}' and "
                f"'{name}'; rename one of them"
            )


# -- matches -----------------------------------------------------------------------------------------------------------


def write_matches(path: Path, pairs: Iterable[MatchedPair]) -> None:
    """A new file with the matches of some pairs. Raises ScfeatError, and FeatureError for more keypoints than fit."""
    with new_h5(path) as stored:
        for pair in pairs:
            _write_pair(stored, pair)


def _write_pair(stored: Any, pair: MatchedPair) -> None:
    if max(pair.keypoints) > MOST_KEYPOINTS:
        raise FeatureError(
            f"expected at most {MOST_KEYPOINTS} keypoints an image, whose indices hloc stores as int16, found "
            f"{pair.keypoints} in {pair.names}; extract fewer with --max-keypoints"
        )
    count = pair.keypoints[0]
    group = stored.create_group(group_name(pair.names))
    partners = np.full(count, -1, np.int16)
    scores = np.zeros(count, np.float16)
    partners[pair.matches.indices0] = pair.matches.indices1
    scores[pair.matches.indices0] = pair.matches.scores
    group.create_dataset("matches0", data=partners)
    group.create_dataset("matching_scores0", data=scores)
    if pair.geometry is not None:
        inliers = np.zeros(count, bool)
        inliers[pair.matches.indices0] = pair.geometry.inliers
        group.create_dataset("inliers0", data=inliers)
        group.create_dataset("matrix", data=pair.geometry.matrix)
        group.attrs["model"] = pair.geometry.model.name
        group.attrs["threshold"] = pair.geometry.threshold
    group.attrs["keypoints1"] = pair.keypoints[1]


def read_pair(stored: Any, pair: Pair) -> MatchedPair:
    """The matches of a pair in an open file, in either order of the names, as :func:`write_matches` wrote them.

    Files of hloc itself are read, too; they have no geometry. Raises DataError where the pair is not there.
    """
    for names in (pair, (pair[1], pair[0])):
        if group_name(names) in stored:
            found = _read_pair(stored[group_name(names)], names)
            return found if names == pair else swapped(found)
    raise DataError(f"expected matches of {pair[0]} and {pair[1]} in {stored.filename}, found none; match them first")


def _read_pair(group: Any, names: Pair) -> MatchedPair:
    partners = np.asarray(group["matches0"])
    index0 = np.flatnonzero(partners >= 0)
    index1 = partners[index0].astype(np.int64)
    scores = np.asarray(group["matching_scores0"], np.float32)[index0]
    count1 = int(group.attrs.get("keypoints1", index1.max(initial=-1) + 1))
    geometry = None
    if "matrix" in group:
        model = GeometryModel[str(group.attrs["model"])]
        inliers = np.asarray(group["inliers0"])[index0]
        geometry = TwoViewGeometry(model, np.asarray(group["matrix"]), inliers, float(group.attrs["threshold"]))
    return MatchedPair(names, (len(partners), count1), Matches(index0, index1, scores), geometry)


def swapped(pair: MatchedPair) -> MatchedPair:
    """The same pair with its images in the other order: F and E are transposed, a homography is inverted."""
    order = np.argsort(pair.matches.indices1, kind="stable")
    matches = Matches(pair.matches.indices1[order], pair.matches.indices0[order], pair.matches.scores[order])
    geometry = pair.geometry
    if geometry is not None:
        matrix = geometry.matrix.T
        if geometry.model == GeometryModel.HOMOGRAPHY:
            matrix = np.linalg.inv(geometry.matrix)
            matrix = matrix / np.linalg.norm(matrix)
        geometry = TwoViewGeometry(geometry.model, matrix, geometry.inliers[order], geometry.threshold)
    return MatchedPair((pair.names[1], pair.names[0]), (pair.keypoints[1], pair.keypoints[0]), matches, geometry)


def stored_groups(path: Path) -> set[str]:
    """The names of the groups of pairs in a file; empty where there is no file. Raises DataError where damaged."""
    return set(h5_names(path, "matches0")) if path.exists() else set()


def read_matches(path: Path, pairs: Iterable[Pair]) -> Iterable[MatchedPair]:
    """The matches of some pairs, one by one. Raises DataError."""
    with open_h5(path) as stored:
        for pair in pairs:
            yield read_pair(stored, pair)


# -- pairs -------------------------------------------------------------------------------------------------------------


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """A line ``name0 name1`` for each pair. Raises ScfeatError."""
    write(path, "".join(f"{name0} {name1}\n" for name0, name1 in pairs))
