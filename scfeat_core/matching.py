"""Matching of descriptors: mutual nearest neighbours, with an optional gate, least similarity and ratio test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfeat_core.errors import FeatureError
from scfeat_core.types import Array, Features, Matches

_MAX_SIMILARITIES = 1 << 24  # held at once: 64 MB of float32, 4096 x 4096 in one piece
_GATHERED = 1 << 17  # values of descriptors that are gathered at once

# Which pairs may match: a slice of the rows of view 0 -> (rows, N1) bool, on the device of the descriptors or numpy.
Gate = Callable[[slice], Array]


def match(
    features0: Features,
    features1: Features,
    *,
    min_cosine: float = -1.0,
    max_ratio: float | None = None,
    gate: Gate | None = None,
) -> Matches:
    """Mutual nearest neighbours of two sets of features; see :func:`match_descriptors`.

    Raises FeatureError where the descriptors are not comparable: another dimension, or made by other weights.
    """
    check_space(features0, features1)
    return match_descriptors(
        features0.descriptors, features1.descriptors, min_cosine=min_cosine, max_ratio=max_ratio, gate=gate
    )


def check_space(features0: Features, features1: Features) -> None:
    """Raise FeatureError where the descriptors were made by different weights."""
    if features0.descriptor_space != features1.descriptor_space:
        raise FeatureError(
            f"expected descriptors of one space, found '{features0.descriptor_space}' and "
            f"'{features1.descriptor_space}': they were made with different weights; extract both with the same"
        )


def window(predicted: Array, positions: Array, radius: float) -> Gate:
    """A gate for points that are where they are expected: at most ``radius`` away in x and in y, pixels.

    predicted: (N0, 2), where the points of view 0 should be in view 1; those that are not finite match nothing.
    positions: (N1, 2), the points of view 1. Both of the kind and on the device of the descriptors.
    """
    predicted, positions = torch.as_tensor(predicted), torch.as_tensor(positions)

    # A square, as x and y need no sum then: half the time of a circle.
    def allowed(rows: slice) -> Tensor:
        x, y = predicted[rows, :1], predicted[rows, 1:]
        return ((x - positions[:, 0]).abs_() <= radius) & ((y - positions[:, 1]).abs_() <= radius)

    return allowed


def match_nearby(
    descriptors0: Tensor,
    descriptors1: Tensor,
    predicted: np.ndarray,
    positions: np.ndarray,
    radius: float,
    *,
    min_cosine: float = -1.0,
) -> Matches:
    """What ``match_descriptors(..., gate=window(predicted, positions, radius))`` gives, without looking at pairs that
    are far apart: to be preferred where few are near.

    descriptors0: (N0, D), descriptors1: (N1, D) torch, unit rows. predicted: (N0, 2), positions: (N1, 2), pixels.
    Returns numpy arrays.
    """
    rows, columns = _near(predicted, positions, radius)
    similarity = _similarities(descriptors0, descriptors1, rows, columns)
    best0, best1 = np.full(len(predicted), -np.inf, np.float32), np.full(len(positions), -np.inf, np.float32)
    np.maximum.at(best0, rows, similarity)
    np.maximum.at(best1, columns, similarity)
    order = np.flatnonzero((similarity == best0[rows]) & (similarity >= min_cosine))
    order = _first(rows, order[np.lexsort((columns[order], rows[order]))])
    order = _first(columns, order[similarity[order] == best1[columns[order]]])
    return Matches(rows[order], columns[order], similarity[order])


def _first(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of the places in ``order``, the first with each value."""
    return order[np.sort(np.unique(values[order], return_index=True)[1])]


def _similarities(descriptors0: Tensor, descriptors1: Tensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(P,) float32 of P pairs, in pieces that stay in the cache."""
    size = max(1, _GATHERED // max(1, descriptors0.shape[1]))
    pieces = []
    for start in range(0, len(rows), size):
        pair = (rows[start : start + size], columns[start : start + size])
        index0, index1 = (torch.from_numpy(index).to(descriptors0.device) for index in pair)
        pieces.append((descriptors0[index0].float() * descriptors1[index1].float()).sum(1))
    return torch.cat(pieces).cpu().numpy() if pieces else np.zeros(0, np.float32)


def _near(predicted: np.ndarray, positions: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all pairs that :func:`window` allows: along x by their order, then one by one."""
    by_x = positions[:, 0].argsort(kind="stable")
    ordered = positions[by_x, 0]
    start = np.searchsorted(ordered, predicted[:, 0] - 1.01 * radius)
    counts = np.searchsorted(ordered, predicted[:, 0] + 1.01 * radius, "right") - start
    rows = np.repeat(np.arange(len(predicted)), counts)
    places = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts - start, counts)
    columns = by_x[places]
    near = (np.abs(predicted[rows] - positions[columns]) <= np.float32(radius)).all(1)
    return rows[near], columns[near]


def match_descriptors(
    descriptors0: Array,
    descriptors1: Array,
    *,
    min_cosine: float = -1.0,
    max_ratio: float | None = None,
    gate: Gate | None = None,
) -> Matches:
    """Pairs of descriptors that are each other's nearest neighbour, in the order of view 0.

    descriptors0: (N0, D), descriptors1: (N1, D), unit rows, floating; numpy, or torch on one device. Of equally near
    neighbours the first wins. min_cosine: least cosine similarity of a pair. max_ratio: largest ratio of the nearest to
    the second nearest Euclidean distance (Lowe, 2004), in both directions. gate: pairs that it does not allow are not
    there, so that neighbours are the nearest, and the second nearest, of those that it allows; see :func:`window`.
    ``lambda rows: mask[rows]`` makes one of a mask (N0, N1). Returns arrays of the kind that came in.
    Memory is bounded, whatever the numbers. Raises FeatureError for shapes that do not fit.
    """
    d0, d1 = _as_tensor(descriptors0), _as_tensor(descriptors1)
    if d0.ndim != 2 or d1.ndim != 2 or d0.shape[1] != d1.shape[1]:
        raise FeatureError(
            f"expected descriptors (N0, D) and (N1, D), found {tuple(d0.shape)} and {tuple(d1.shape)}; "
            "extract both views with the same weights"
        )
    matches = _mutual_nearest(d0, d1, min_cosine, max_ratio, gate)
    return matches.numpy() if isinstance(descriptors0, np.ndarray) else matches


def _as_tensor(descriptors: Array) -> Tensor:
    return torch.as_tensor(descriptors).float()


def _mutual_nearest(d0: Tensor, d1: Tensor, min_cosine: float, max_ratio: float | None, gate: Gate | None) -> Matches:
    if len(d0) == 0 or len(d1) == 0:
        empty = d0.new_zeros(0, dtype=torch.int64)
        return Matches(empty, empty, d0.new_zeros(0))
    found = _nearest(d0, d1, max_ratio is not None, gate)
    index0 = torch.arange(len(d0), device=d0.device)
    good = (found.similarity == found.best0[found.index1]) & (found.similarity >= min_cosine)
    good &= found.similarity > -torch.inf  # the gate leaves some without a neighbour
    first = torch.full_like(found.best0, len(d0), dtype=torch.int64)
    first.scatter_reduce_(0, found.index1[good], index0[good], "amin")
    good &= first[found.index1] == index0
    if max_ratio is not None:
        distance = _distance(found.similarity)
        good &= distance <= max_ratio * _distance(found.second1)
        good &= distance <= max_ratio * _distance(found.second0[found.index1])
    return Matches(index0[good], found.index1[good], found.similarity[good])


class _Nearest(NamedTuple):
    """For each row of d0: its highest similarity, where that is in d1, and its second highest similarity (second1).

    For each row of d1: its highest and its second highest similarity (best0, second0).
    """

    similarity: Tensor
    index1: Tensor
    second1: Tensor
    best0: Tensor
    second0: Tensor


def _nearest(d0: Tensor, d1: Tensor, with_second: bool, gate: Gate | None) -> _Nearest:
    """Walk the similarity matrix in blocks of rows.

    Along columns only values are kept: on a CPU their maximum takes a fortieth of the time of their arg-max, and equal
    values say the same about who is mutual.
    """
    top0 = d1.new_full((2, len(d1)), -torch.inf)
    blocks = []
    size = max(1, _MAX_SIMILARITIES // len(d1))
    for start in range(0, len(d0), size):
        rows = slice(start, min(start + size, len(d0)))
        block = _allowed(d0[rows] @ d1.T, rows, gate)
        second1 = _second_highest(block) if with_second else block.new_zeros(len(block))
        blocks.append((*block.max(1), second1))
        if with_second:
            top0 = torch.cat((top0, block)).topk(2, 0).values
        else:
            top0[0] = torch.maximum(top0[0], block.amax(0))
    similarity, index1, second1 = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return _Nearest(similarity, index1, second1, *top0)


def _allowed(block: Tensor, rows: slice, gate: Gate | None) -> Tensor:
    """The similarities, -inf where the gate does not allow the pair."""
    if gate is None:
        return block
    allowed = torch.as_tensor(gate(rows))
    if allowed.shape != block.shape or allowed.dtype != torch.bool:
        raise FeatureError(
            f"expected a gate that gives a mask of {tuple(block.shape)} bool for the rows {rows.start} to {rows.stop}, "
            f"found {tuple(allowed.shape)} {allowed.dtype}"
        )
    return torch.where(allowed.to(block.device), block, -torch.inf)


def _second_highest(block: Tensor) -> Tensor:
    if block.shape[1] < 2:
        return block.new_full((len(block),), -torch.inf)
    return block.topk(2, 1).values[:, 1]


def _distance(cosine: Tensor) -> Tensor:
    """Euclidean distance of unit vectors; infinite where there is no neighbour."""
    return (2 - 2 * cosine).clamp_min(0).sqrt()
