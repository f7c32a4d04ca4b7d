"""Matching of descriptors: mutual nearest neighbours, with an optional gate, least similarity and ratio test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfeat_core.errors import FeatureError
from scfeat_core.types import Array, Features, Matches

_MAX_SIMILARITIES = 1 << 24  # held at once: 64 MB of float32, 4096 x 4096 in one piece
_CACHED = 1 << 18  # on a CPU, for each thread: 1 MB, which stays in the cache of a core
_GATHERED = 1 << 15  # values of descriptors at once, which stay in the cache of a core
_MOST_CELLS = 64  # that points are sorted into, one above the other
_CELLS_A_SIDE = 4  # of them make a square: the narrower they are, the fewer points that are too far to the side
_MARGIN = 1.01  # of the radius, for rounding

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
    similarity = _similarities(_on_host(descriptors0), _on_host(descriptors1), rows, columns)
    alike = np.flatnonzero(similarity >= min_cosine)  # what is not can keep nobody from being the best
    rows, columns, similarity = rows[alike], columns[alike], similarity[alike]
    order = np.lexsort((columns, -similarity, rows))
    order = _first(rows, order)  # the best of each row, of equal ones the first
    order = order[similarity[order] == _highest(similarity, columns, len(positions))[columns[order]]]
    order = _first(columns, order)
    return Matches(rows[order], columns[order], similarity[order])


def _on_host(descriptors: Tensor) -> np.ndarray:
    return descriptors.detach().float().cpu().numpy()


def _first(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of the places in ``order``, the first with each value."""
    return order[np.sort(np.unique(values[order], return_index=True)[1])]


def _highest(values: np.ndarray, groups: np.ndarray, number: int) -> np.ndarray:
    """Of the values of each group (0 to number - 1), (number,) float32; -inf where it has none."""
    highest = np.full(number, -np.inf, np.float32)
    np.maximum.at(highest, groups, values)
    return highest


def _similarities(
    descriptors0: np.ndarray, descriptors1: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """(P,) float32 of P pairs, in pieces that stay in the cache."""
    size = max(1, _GATHERED // max(1, descriptors0.shape[1]))
    result = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        gathered0, gathered1 = descriptors0.take(rows[piece], 0), descriptors1.take(columns[piece], 0)
        np.einsum("pd,pd->p", gathered0, gathered1, out=result[piece])
    return result


def _near(predicted: np.ndarray, positions: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all pairs that :func:`window` allows, rows ascending: those of neighbouring cells, one by one.

    A cell is higher than the radius, so that only three rows of them can hold what is near; of each, cells beside each
    other are one run of the positions in the order of their cells.
    """
    columns = np.flatnonzero(_finite(positions))
    rows = np.flatnonzero(_within(predicted, positions[columns], radius))
    if len(rows) == 0:
        return rows, rows
    begins, ends, order = _runs(predicted[rows].astype(np.float64), positions[columns].astype(np.float64), radius)
    counts = (ends - begins).ravel()
    row = np.repeat(np.arange(len(rows)), counts.reshape(-1, 3).sum(1))
    place = np.arange(len(row)) - np.repeat(counts.cumsum() - counts - begins.ravel(), counts)
    near = np.ones(len(row), bool)
    for axis in (1, 0):  # each alone, as sums and tests over an axis of two take several times as long
        known, sought = positions[columns[order], axis], predicted[rows, axis]
        near &= np.abs(sought.take(row) - known.take(place)) <= np.float32(radius)
    found = np.flatnonzero(near)
    return rows[row[found]], columns[order[place[found]]]


def _finite(points: np.ndarray) -> np.ndarray:
    """(N,) bool."""
    return np.isfinite(points[:, 0]) & np.isfinite(points[:, 1])


def _within(points: np.ndarray, others: np.ndarray, radius: float) -> np.ndarray:
    """Which points are inside the rectangle around the others or within the radius of it, (N,) bool."""
    if len(others) == 0:
        return np.zeros(len(points), bool)
    (left, top), (right, bottom) = others.min(0) - _MARGIN * radius, others.max(0) + _MARGIN * radius
    x, y = points[:, 0], points[:, 1]
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def _runs(predicted: np.ndarray, positions: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the three runs of each prediction begin and end in the order of the positions by cell.

    (N0, 3), (N0, 3), and that order. All in float64, where rounding is far below the margin of a cell, and the
    predictions within reach of the positions.
    """
    origin, reach = positions.min(0), _MARGIN * radius
    high = max(reach, float((positions - origin).max()) / _MOST_CELLS, 1e-6)
    wide = high / _CELLS_A_SIDE
    x, y = np.floor((positions - origin) / (wide, high)).astype(np.int64).T
    width, height = int(x.max()) + 1, int(y.max()) + 5  # two empty rows above and below
    cell = (y + 2) * width + x
    starts = np.concatenate(([0], np.bincount(cell, minlength=width * height).cumsum()))
    along = (predicted[:, :1] - origin[0] + (-reach, reach)) / wide
    first, last = np.floor(along).astype(np.int64).clip(0, width - 1).T
    middle = np.floor((predicted[:, 1] - origin[1]) / high).astype(np.int64).clip(-1, height - 4) + 2
    row = (middle[:, None] + (-1, 0, 1)) * width
    return starts[row + first[:, None]], starts[row + last[:, None] + 1], cell.argsort(kind="stable")


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
    return torch.as_tensor(descriptors).detach().float()


def _mutual_nearest(d0: Tensor, d1: Tensor, min_cosine: float, max_ratio: float | None, gate: Gate | None) -> Matches:
    if len(d0) == 0 or len(d1) == 0:
        empty = d0.new_zeros(0, dtype=torch.int64)
        return Matches(empty, empty, d0.new_zeros(0))
    found = _nearest(d0, d1, max_ratio is not None, gate)
    rows = _mutual(found, min_cosine).nonzero()[:, 0]
    index1, similarity = found.index1[rows], found.similarity[rows]
    if max_ratio is not None:
        distance = _distance(similarity)
        good = distance <= max_ratio * _distance(found.second1[rows])
        good &= distance <= max_ratio * _distance(found.second0[index1])
        rows, index1, similarity = rows[good], index1[good], similarity[good]
    return Matches(rows, index1, similarity)


def match_padded(
    descriptors0: Tensor, valid0: Tensor, descriptors1: Tensor, valid1: Tensor, *, min_cosine: float = -1.0
) -> tuple[Tensor, Tensor]:
    """What ``match_descriptors`` finds among the valid rows, in shapes that do not depend on it: waits for no device.

    descriptors0: (N0, D), descriptors1: (N1, D), N1 > 0, of which valid0 (N0,) and valid1 (N1,) bool are points.
    Returns the partner of each row of view 0, (N0,) int32, -1 without one, and their similarity, (N0,) float32.
    """
    found = _nearest(descriptors0, descriptors1, False, lambda rows: valid0[rows, None] & valid1)
    return torch.where(_mutual(found, min_cosine), found.index1, -1).int(), found.similarity


def _mutual(found: _Nearest, min_cosine: float) -> Tensor:
    """Which rows of view 0 have their partner, (N0,) bool; of those with the same one the first."""
    number = len(found.index1)
    index0 = torch.arange(number, device=found.index1.device)
    good = (found.similarity == found.best0[found.index1]) & (found.similarity >= min_cosine)
    good &= found.similarity > -torch.inf  # the gate leaves some without a neighbour
    first = torch.full_like(found.best0, number, dtype=torch.int64)
    first.scatter_reduce_(0, found.index1, torch.where(good, index0, number), "amin")
    return good & (first[found.index1] == index0)


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
    size = max((rows.stop - rows.start for rows in _blocks(d0, d1)), default=0)
    space = d0.new_empty(size, len(d1))  # the same for all blocks, as new memory costs as much as what is done in it
    for rows in _blocks(d0, d1):
        product = torch.mm(d0[rows], d1.T, out=space[: rows.stop - rows.start])
        block = _allowed(product, rows, gate)
        second1 = _second_highest(block) if with_second else block.new_zeros(len(block))
        blocks.append((*_row_maxima(block), second1))
        if with_second:
            top0 = torch.cat((top0, block)).topk(2, 0).values
        else:
            top0[0] = torch.maximum(top0[0], _column_maxima(block))
    similarity, index1, second1 = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return _Nearest(similarity, index1, second1, *top0)


def _blocks(d0: Tensor, d1: Tensor) -> Iterator[slice]:
    """Rows of d0, as evenly as it goes: products with few rows are computed in another way, to other last digits."""
    held = min(_MAX_SIMILARITIES, _CACHED * torch.get_num_threads()) if d0.device.type == "cpu" else _MAX_SIMILARITIES
    number = -(-len(d0) // max(1, held // len(d1)))
    for block in range(number):
        yield slice(len(d0) * block // number, len(d0) * (block + 1) // number)


def _row_maxima(block: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value of each row, (n,), and where it is, (n,) int64; of equal ones the first, on a CPU for certain.

    By numpy there, which has vector instructions for it: a tenth of the time.
    """
    if block.device.type != "cpu":
        return block.max(1)
    index = torch.from_numpy(block.numpy().argmax(1))
    return block.gather(1, index[:, None])[:, 0], index


def _column_maxima(block: Tensor) -> Tensor:
    """By numpy on a CPU, which is as fast and needs no other thread."""
    return block.amax(0) if block.device.type != "cpu" else torch.from_numpy(block.numpy().max(0))


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
