"""Score map to keypoints: mask, border, non-maximum suppression, threshold, top-k, sub-pixel position (spec 6).

All steps are batched on the device of the map, and the shapes of what they make do not depend on the scores but on a
CPU, so that nothing waits for another device: images with fewer points than others are filled up. The order is
deterministic: descending score, then ascending pixel index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.errors import ConfigError
from scfeat_core.types import Array

ThresholdMode = Literal["abs", "mean", "max"]
Refinement = Literal["quadratic", "centroid3", "softargmax", "none"]

_SOFTARGMAX_TEMPERATURE = 0.1  # as a share of the peak's score, so that it does not depend on the scale of the scores
_LOW = (1 << 32) - 1
_NONE = -(1 << 63) + _LOW  # less than the key of any pixel


class Keypoints(NamedTuple):
    """xy: (N, 2) float32, pixels. scores: (N,) float32, descending."""

    xy: Tensor
    scores: Tensor


class Selected(NamedTuple):
    """Keypoints of a batch, best first, filled up to the number of the image that has most, or may have most.

    xy: (B, K, 2) float32, pixels. scores: (B, K) float32, descending; -inf where an image has no more points, whose xy
    then mean nothing.
    """

    xy: Tensor
    scores: Tensor

    def split(self) -> list[Keypoints]:
        """The points of each image; waits for the device."""
        counts = (self.scores > -torch.inf).sum(1).tolist()
        return [Keypoints(xy[:count], own[:count]) for xy, own, count in zip(self.xy, self.scores, counts, strict=True)]


def select_keypoints(score_map: Tensor, **settings: Any) -> list[Keypoints]:
    """The points of each image that :func:`select_padded` finds; as few as survive."""
    return select_padded(score_map, **settings).split()


def select_padded(
    score_map: Tensor,
    *,
    max_keypoints: int | Sequence[int] = 1024,
    nms_radius: int = 2,
    border: int = 4,
    threshold: float | None = None,
    threshold_mode: ThresholdMode = "abs",
    refinement: Refinement = "quadratic",
    mask: Tensor | None = None,
    valid_size: tuple[int, int] | None = None,
    grid: int = 0,
) -> Selected:
    """The best local maxima of each image of a batch.

    score_map: (B, 1, H, W). max_keypoints: one number, or one for each image; 0 keeps all. nms_radius: a point is the
    maximum of the (2 r + 1)^2 pixels around it, of equal ones the first in reading order; 0 keeps every pixel. border:
    pixels along the edges without points. threshold: keep scores above it (``abs``), or above its product with the
    image's mean or maximum score. mask: (H, W) or (B, H, W), non-zero = keep. It removes points after suppression, so
    that its outline makes none. valid_size: (width, height) of the image where the map's right and bottom are padding,
    which then never counts.
    grid: each of grid x grid cells of the image first gets its equal share of ``max_keypoints``, its best points; what
    cells leave over goes to the best others. The order stays that of the scores. 0 takes the best of the image.
    Raises ConfigError where there are not as many budgets as images.
    """
    scores = _valid_scores(score_map[:, 0].float(), valid_size)
    size = valid_size or (scores.shape[-1], scores.shape[-2])
    budgets = _budgets(max_keypoints, scores, nms_radius)
    least = None if threshold is None else threshold * _threshold_reference(scores, threshold_mode, size[0] * size[1])
    find = _best_on_host if scores.device.type == "cpu" else _best_on_device
    most = _most(scores, nms_radius) if grid > 1 else max(budgets)
    index, valid = find(scores.detach(), nms_radius, _Where(size, border, mask, least), most)
    if grid > 1:
        order, valid = _spread(_cells(index, scores.shape[-1], size, grid), valid, budgets, grid)
        index = index.gather(1, order)
    elif len(set(budgets)) > 1:
        valid &= _places(index) < _column(budgets, index)
    values = torch.where(valid, scores.flatten(1).gather(1, index), -torch.inf)
    image = torch.arange(len(scores), device=scores.device)[:, None].expand_as(index).flatten()
    xy = refined_positions(scores, image, index.flatten(), refinement)
    x, y = xy[:, 0].clamp(0, size[0] - 1), xy[:, 1].clamp(0, size[1] - 1)
    return Selected(torch.stack((x, y), -1).view(*index.shape, 2), values)


def best_of_levels(
    xy: Tensor, scores: Tensor, max_keypoints: int | Sequence[int], size: tuple[int, int], grid: int = 0
) -> tuple[Tensor, Tensor]:
    """The best points of each image, best first, out of those of all levels of its pyramid.

    xy: (B, N, 2), pixels of the image. scores: (B, N), -inf where there is no point. size: (width, height).
    max_keypoints, grid: of ``select_padded``. Returns their indices (B, K), and whether each is one, (B, K) bool.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    valid = scores.gather(1, order) > -torch.inf
    budgets = [budget or scores.shape[1] for budget in _of_each(max_keypoints, len(scores))]
    if grid > 1:
        x, y = xy.gather(1, order[..., None].expand(-1, -1, 2)).round().long().unbind(-1)
        index = y.clamp(0, size[1] - 1) * size[0] + x.clamp(0, size[0] - 1)
        chosen, valid = _spread(_cells(index, size[0], size, grid), valid, budgets, grid)
        return order.gather(1, chosen), valid
    valid &= _places(order) < _column(budgets, order)
    return order[:, : max(budgets)], valid[:, : max(budgets)]


# -- suppression -------------------------------------------------------------------------------------------------------


def local_maxima(scores: Tensor, radius: int) -> Tensor:
    """(B, H, W) bool: finite pixels that no pixel of their window exceeds, nor equals with a lower index."""
    keep = scores.isfinite()
    if radius == 0:
        return keep
    if scores.device.type == "cpu":
        arrays = scores.detach().float().numpy()
        return keep & torch.stack([torch.from_numpy(_maxima_on_host(array, radius)) for array in arrays])
    return keep & _maxima(scores, radius)


def _maxima(scores: Tensor, radius: int) -> Tensor:
    """Shifted maxima instead of max_pool2d, which leaves ties to its implementation."""
    height, width = scores.shape[-2:]
    padded = F.pad(scores, (radius,) * 4, value=-torch.inf)
    centre = padded[:, radius : radius + height]
    rows = _maximum([padded[..., x : x + width] for x in range(2 * radius + 1)])
    before = [rows[:, y : y + height] for y in range(radius)] + [centre[..., x : x + width] for x in range(radius)]
    after = [rows[:, y : y + height] for y in range(radius + 1, 2 * radius + 1)]
    after += [centre[..., x : x + width] for x in range(radius + 1, 2 * radius + 1)]
    return (scores > _maximum(before)) & (scores >= _maximum(after))


def _maxima_on_host(scores: np.ndarray, radius: int) -> np.ndarray:
    """:func:`_maxima` of one map (H, W) by the dilation of OpenCV, a third of the time; infinite ones may be kept."""
    if np.isnan(scores.max()):  # what a maximum is then is not said there
        return _maxima(torch.from_numpy(scores)[None], radius)[0].numpy()
    keep = _not_exceeded(scores, radius)
    # Of equal ones the first: greater than all that is above, and to the left. An anchor must be inside, so these
    # end at the pixel, and are shifted by one.
    above = cv2.dilate(scores, np.ones((radius, 2 * radius + 1), np.uint8), anchor=(radius, radius - 1))
    keep[1:] &= scores[1:] > above[:-1]
    left = cv2.dilate(scores, np.ones((1, radius), np.uint8), anchor=(radius - 1, 0))
    keep[:, 1:] &= scores[:, 1:] > left[:, :-1]
    return keep


def _not_exceeded(scores: np.ndarray, radius: int) -> np.ndarray:
    """(H, W) bool: pixels that no pixel of their window exceeds, of a map without NaN."""
    return scores == cv2.dilate(scores, np.ones((2 * radius + 1, 2 * radius + 1), np.uint8))


def _none_equal(scores: np.ndarray, index: np.ndarray, radius: int) -> bool:
    """Whether no pixel of ``index`` equals one before it in its window, which lies inside of the map (H, W).

    False, too, where to look is more work than to look at the whole map.
    """
    before = np.arange(-radius, radius + 1)
    before = np.concatenate(((before[:radius, None] * scores.shape[1] + before).ravel(), before[:radius]))
    if len(before) * len(index) > scores.size:
        return False
    values = scores.ravel()
    return not (values.take(index + before[:, None]) == values.take(index)).any()


def _maximum(views: list[Tensor]) -> Tensor:
    if len(views) == 1:
        return views[0]
    result = torch.maximum(views[0], views[1])
    for view in views[2:]:
        torch.maximum(result, view, out=result)
    return result


def _valid_scores(scores: Tensor, valid_size: tuple[int, int] | None) -> Tensor:
    """The scores with -inf in the padding."""
    if valid_size is None or valid_size == (scores.shape[-1], scores.shape[-2]):
        return scores
    scores = scores.clone()
    scores[..., valid_size[0] :] = -torch.inf
    scores[..., valid_size[1] :, :] = -torch.inf
    return scores


# -- candidates --------------------------------------------------------------------------------------------------------


class _Where(NamedTuple):
    """Which maxima count. size: (width, height). least: scores must exceed it, (B, 1, 1) or a number; None: all do."""

    size: tuple[int, int]
    border: int
    mask: Tensor | None
    least: Tensor | float | None


def _best_on_device(scores: Tensor, radius: int, where: _Where, most: int) -> tuple[Tensor, Tensor]:
    """The ``most`` best pixels of each map, best first, (B, most) int64, and which of them are any, (B, most) bool."""
    keep = local_maxima(scores, radius) & _inside_border(scores, where)
    if where.least is not None:
        keep &= scores > where.least
    if where.mask is not None:
        keep &= where.mask != 0
    index = torch.arange(scores[0].numel(), device=scores.device)
    keys = torch.where(keep.flatten(1), _keys(scores.flatten(1), index), _NONE).topk(most).values
    return _LOW - (keys & _LOW), keys > _NONE


def _keys(scores: Tensor, index: Tensor) -> Tensor:
    """Whole numbers that are all different and in the order of the points: by score, of equal ones by -index. int64."""
    bits = (scores + 0.0).view(torch.int32)  # -0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats are ordered as their bits are, negative ones the other way
    return (ordered.long() << 32) | (_LOW - index)


def _best_on_host(scores: Tensor, radius: int, where: _Where, most: int) -> tuple[Tensor, Tensor]:
    """:func:`_best_on_device`, but filled up only to the number of the map that has most."""
    masks = [None] * len(scores) if where.mask is None else where.mask.expand_as(scores).numpy() != 0
    least = [None] * len(scores) if where.least is None else torch.as_tensor(where.least).expand(len(scores), 1, 1)
    maps = np.ascontiguousarray(scores.numpy())
    rows = [_best_of(*each, radius, where, most) for each in zip(maps, masks, least, strict=True)]
    index = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for place, row in zip(index, rows, strict=True):
        place[: len(row)] = row
    valid = np.arange(index.shape[1]) < np.array([[len(row)] for row in rows])
    return torch.from_numpy(index), torch.from_numpy(valid)


def _best_of(
    scores: np.ndarray, mask: np.ndarray | None, least: Tensor | None, radius: int, where: _Where, most: int
) -> np.ndarray:
    """Of one map (H, W), (n,). From the maxima on it looks only at those.

    Equal neighbours are rare, so whether there are any is asked of the best pixels alone.
    """
    if radius == 0:
        return _best_kept(scores, np.isfinite(scores), mask, least, where, most)
    if where.border >= radius and not np.isnan(scores.max()):
        best = _best_kept(scores, _not_exceeded(scores, radius), mask, least, where, most)
        if _none_equal(scores, best, radius):
            return best
    return _best_kept(scores, _maxima_on_host(scores, radius), mask, least, where, most)


def _best_kept(
    scores: np.ndarray, keep: np.ndarray, mask: np.ndarray | None, least: Tensor | None, where: _Where, most: int
) -> np.ndarray:
    """The best pixels (n,) of a map (H, W) that are to be kept, and count."""
    (width, height), border = where.size, where.border
    keep[:border], keep[max(height - border, 0) :] = False, False
    keep[:, :border], keep[:, max(width - border, 0) :] = False, False
    if mask is not None:
        keep &= mask
    index = np.flatnonzero(keep)
    values = scores.ravel().take(index)
    good = np.isfinite(values)
    if least is not None:
        good &= values > np.float32(least.item())
    if not good.all():
        index, values = index[good], values[good]
    if len(values) > most:
        better = np.flatnonzero(values >= np.partition(values, len(values) - most)[len(values) - most])
        index, values = index[better], values[better]
    return index[(-values).argsort(kind="stable")[:most]]


def _inside_border(scores: Tensor, where: _Where) -> Tensor:
    x = torch.arange(scores.shape[-1], device=scores.device)
    y = torch.arange(scores.shape[-2], device=scores.device)
    columns = (x >= where.border) & (x < where.size[0] - where.border)
    rows = (y >= where.border) & (y < where.size[1] - where.border)
    return rows[:, None] & columns


def _threshold_reference(scores: Tensor, mode: ThresholdMode, pixels: int) -> Tensor | float:
    if mode == "abs":
        return 1.0
    if mode == "max":
        return scores.amax((-2, -1), keepdim=True)
    return scores.masked_fill(scores == -torch.inf, 0).sum((-2, -1), keepdim=True) / pixels


# -- budgets -----------------------------------------------------------------------------------------------------------


def _most(scores: Tensor, radius: int) -> int:
    """More maxima than this a map cannot have: of any (r + 1)^2 pixels at most one is."""
    return -(-scores.shape[-2] // (radius + 1)) * -(-scores.shape[-1] // (radius + 1))


def _budgets(max_keypoints: int | Sequence[int], scores: Tensor, radius: int) -> list[int]:
    """How many points each image may have; at most as many as it can have."""
    most = _most(scores, radius)
    return [min(budget, most) if budget > 0 else most for budget in _of_each(max_keypoints, len(scores))]


def _of_each(max_keypoints: int | Sequence[int], count: int) -> list[int]:
    budgets = [max_keypoints] * count if isinstance(max_keypoints, int) else list(max_keypoints)
    if len(budgets) != count:
        raise ConfigError(
            f"max_keypoints: expected one number, or one for each of {count} images, found {len(budgets)}"
        )
    return budgets


def _column(values: Sequence[int], like: Tensor) -> Tensor:
    """(B, 1) int64."""
    return torch.tensor(values).to(like.device, non_blocking=True)[:, None]


def _places(like: Tensor) -> Tensor:
    """0 to N - 1 for (B, N)."""
    return torch.arange(like.shape[1], device=like.device)


def _cells(index: Tensor, stride: int, size: tuple[int, int], grid: int) -> Tensor:
    """Which of the grid x grid cells of the image each pixel is in, int64."""
    return index // stride * grid // size[1] * grid + index % stride * grid // size[0]


def _spread(cells: Tensor, valid: Tensor, budgets: list[int], grid: int) -> tuple[Tensor, Tensor]:
    """Which points are within the budget of their image if those within the share of their cell go first.

    cells, valid: (B, N), of points that are given best first. Returns their places (B, K), in the same order, and
    whether there is a point, (B, K) bool.
    """
    number, budget = grid * grid, _column(budgets, cells)
    share = (budget // number).clamp_min(1)  # of fewer points than cells, the best cells get one each
    beyond = _rank(torch.where(valid, cells, number)) >= share
    order = torch.where(valid, beyond.byte(), 2).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, _places(order).expand_as(order))
    valid = valid & (rank < budget)
    chosen = (~valid).byte().argsort(dim=1, stable=True)[:, : max(budgets)]
    return chosen, valid.gather(1, chosen)


def _rank(groups: Tensor) -> Tensor:
    """For each element of each row how many of its group come before it, (B, N) int64."""
    ordered, order = groups.sort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, _places(order) - torch.searchsorted(ordered, ordered))


# -- positions ---------------------------------------------------------------------------------------------------------


def refined_positions(scores: Tensor, image: Tensor, index: Tensor, refinement: Refinement) -> Tensor:
    """Sub-pixel positions (n, 2) float32 of the pixels ``index`` of the maps ``image``; differentiable in the scores.

    scores: (B, H, W). image, index: (n,) int64, the latter into the flattened map.
    """
    if scores.device.type != "cpu" or scores.requires_grad:
        return _refined(scores, image, index, refinement, torch)
    with np.errstate(over="ignore"):  # by numpy, whose calls on small arrays take a fraction of the time
        return torch.from_numpy(_refined(scores.numpy(), image.numpy(), index.numpy(), refinement, np))


def _refined(scores: Array, image: Array, index: Array, refinement: Refinement, library: Any) -> Array:
    """:func:`refined_positions` by torch or numpy."""
    width = scores.shape[-1]
    x, y = index % width, index // width
    position = library.stack((x, y), -1)
    position = position.float() if library is torch else position.astype(np.float32)
    if refinement == "none":
        return position
    # (3, 3, n): whole rows of numbers to calculate with.
    patches = _patches(scores, image, x, y)
    # Padding takes part as the score of the pixel itself, which neither attracts nor repels.
    patches = _where(library.isfinite(patches), patches, patches[1:2, 1:2])
    return position + library.stack(_OFFSETS[refinement](patches), -1)


def _patches(scores: Array, image: Array, x: Array, y: Array) -> Array:
    """(3, 3, n) of the maps (B, H, W) around the pixels x, y (n,) of the maps ``image`` (n,); edges are repeated."""
    height, width = scores.shape[-2:]
    step = torch.arange(-1, 2, device=scores.device) if isinstance(scores, Tensor) else np.arange(-1, 2)
    columns, rows = (x + step[:, None]).clip(0, width - 1), (y + step[:, None]).clip(0, height - 1)
    pixels = (image * height + rows)[:, None] * width + columns
    if isinstance(scores, np.ndarray):
        return scores.reshape(-1).take(pixels)
    return scores.reshape(-1).index_select(0, pixels.flatten()).view(pixels.shape)


def _where(condition: Array, values: Array, others: Array | float) -> Array:
    if isinstance(condition, Tensor):
        return torch.where(condition, values, others)
    return np.where(condition, values, np.asarray(others, np.float32))


def _weighted_offset(weights: Array) -> tuple[Array, Array]:
    """Centroid, x and y (n,), of weights (3, 3, n) relative to the middle; 0 where they have no positive sum."""
    total = weights.sum((0, 1))
    x = (weights[:, 2] - weights[:, 0]).sum(0)
    y = (weights[2] - weights[0]).sum(0)
    divisor = _where(total > 0, total, 1.0)
    x, y = (_where(total > 0, each / divisor, 0.0).clip(-1, 1) for each in (x, y))
    return x, y


def _softargmax_offset(patches: Array) -> tuple[Array, Array]:
    peak = patches[1:2, 1:2]
    temperature = _SOFTARGMAX_TEMPERATURE * abs(peak).clip(1e-12)
    exponents = ((patches - peak) / temperature).clip(None, 0)
    x, y = _weighted_offset(exponents.exp() if isinstance(exponents, Tensor) else np.exp(exponents))
    return x.clip(-0.5, 0.5), y.clip(-0.5, 0.5)


def _quadratic_offset(patches: Array) -> tuple[Array, Array]:
    """Maximum of the second-order Taylor expansion (Brown and Lowe, 2002), at most half a pixel away along each axis.

    Where the 2-D maximum is farther, or is none, each axis is fitted alone; that never leaves the half pixel.
    """
    p = patches
    gx, gy = (p[1, 2] - p[1, 0]) / 2, (p[2, 1] - p[0, 1]) / 2
    xx = p[1, 2] - 2 * p[1, 1] + p[1, 0]
    yy = p[2, 1] - 2 * p[1, 1] + p[0, 1]
    xy = (p[2, 2] - p[2, 0] - p[0, 2] + p[0, 0]) / 4
    determinant = xx * yy - xy * xy
    # Divisors that are not used are 1, as torch.where passes the NaN gradient of a division by 0 on to both sides.
    divisor = _where(determinant > 0, determinant, 1.0)
    x, y = (xy * gy - yy * gx) / divisor, (xy * gx - xx * gy) / divisor
    usable = (determinant > 0) & (xx < 0) & (abs(x) <= 0.5) & (abs(y) <= 0.5)
    x, y = _where(usable, x, _alone(gx, xx)), _where(usable, y, _alone(gy, yy))
    return x.clip(-0.5, 0.5), y.clip(-0.5, 0.5)


def _alone(gradient: Array, curvature: Array) -> Array:
    return _where(curvature < 0, -gradient / _where(curvature < 0, curvature, 1.0), 0.0)


_OFFSETS = {"quadratic": _quadratic_offset, "centroid3": _weighted_offset, "softargmax": _softargmax_offset}
