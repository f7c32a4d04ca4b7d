"""Score map to keypoints: mask, border, non-maximum suppression, threshold, top-k, sub-pixel position (spec 6).

All steps are batched torch on the device of the map; only the ragged result is split by image. The order is
deterministic: descending score, then ascending pixel index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.errors import ConfigError

ThresholdMode = Literal["abs", "mean", "max"]
Refinement = Literal["quadratic", "centroid3", "softargmax", "none"]

_SOFTARGMAX_TEMPERATURE = 0.1  # as a share of the peak's score, so that it does not depend on the scale of the scores


class Keypoints(NamedTuple):
    """xy: (N, 2) float32, pixels. scores: (N,) float32, descending."""

    xy: Tensor
    scores: Tensor


def select_keypoints(
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
) -> list[Keypoints]:
    """The best local maxima of each image of a batch; as few as survive.

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
    width, height = valid_size or (scores.shape[-1], scores.shape[-2])
    keep = local_maxima(scores, nms_radius)
    keep &= _inside_border(scores, (width, height), border)
    if threshold is not None:
        keep &= scores > threshold * _threshold_reference(scores, threshold_mode, width * height)
    if mask is not None:
        keep &= mask != 0
    image, index = _best_first(scores, keep)
    cells = _cells(index, scores.shape[-1], (width, height), grid)
    chosen = _within_budget(image, cells, _budgets(max_keypoints, scores), grid)
    image, index = image[chosen], index[chosen]
    counts = torch.bincount(image, minlength=len(scores)).tolist()
    xy = refined_positions(scores, image, index, refinement)
    xy = torch.minimum(xy.clamp_min(0), xy.new_tensor([width - 1, height - 1]))
    values = scores.flatten(1)[image, index]
    return [Keypoints(*split) for split in zip(xy.split(counts), values.split(counts), strict=True)]


def best_of_levels(xy: Tensor, scores: Tensor, max_keypoints: int, size: tuple[int, int], grid: int = 0) -> Tensor:
    """Indices of the best points of one image, best first, out of those of all levels of its pyramid.

    xy: (N, 2), pixels of the image. scores: (N,). size: (width, height). max_keypoints, grid: of ``select_keypoints``.
    """
    order = scores.argsort(descending=True, stable=True)
    x, y = xy[order].round().long().unbind(-1)
    index = y.clamp(0, size[1] - 1) * size[0] + x.clamp(0, size[0] - 1)
    budget = torch.tensor([max_keypoints or len(order)], device=scores.device)
    return order[_within_budget(torch.zeros_like(order), _cells(index, size[0], size, grid), budget, grid)]


def local_maxima(scores: Tensor, radius: int) -> Tensor:
    """(B, H, W) bool: finite pixels that no pixel of their window exceeds, nor equals with a lower index.

    Shifted maxima instead of max_pool2d, which takes 20 times as long on a CPU and leaves ties to its implementation.
    """
    keep = scores.isfinite()
    if radius == 0:
        return keep
    height, width = scores.shape[-2:]
    padded = F.pad(scores, (radius,) * 4, value=-torch.inf)
    centre = padded[:, radius : radius + height]
    rows = _maximum([padded[..., x : x + width] for x in range(2 * radius + 1)])
    before = [rows[:, y : y + height] for y in range(radius)] + [centre[..., x : x + width] for x in range(radius)]
    after = [rows[:, y : y + height] for y in range(radius + 1, 2 * radius + 1)]
    after += [centre[..., x : x + width] for x in range(radius + 1, 2 * radius + 1)]
    return keep & (scores > _maximum(before)) & (scores >= _maximum(after))


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


def _inside_border(scores: Tensor, size: tuple[int, int], border: int) -> Tensor:
    x = torch.arange(scores.shape[-1], device=scores.device)
    y = torch.arange(scores.shape[-2], device=scores.device)
    columns = (x >= border) & (x < size[0] - border)
    rows = (y >= border) & (y < size[1] - border)
    return rows[:, None] & columns


def _threshold_reference(scores: Tensor, mode: ThresholdMode, pixels: int) -> Tensor | float:
    if mode == "abs":
        return 1.0
    if mode == "max":
        return scores.amax((-2, -1), keepdim=True)
    return scores.masked_fill(scores == -torch.inf, 0).sum((-2, -1), keepdim=True) / pixels


def _best_first(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Image (n,) and pixel index (n,) of all kept pixels, image by image and best first."""
    image, index = keep.flatten(1).nonzero(as_tuple=True)
    order = scores.flatten(1)[image, index].argsort(descending=True, stable=True)
    if len(scores) > 1:
        order = order[image[order].argsort(stable=True)]
    return image[order], index[order]


def _budgets(max_keypoints: int | Sequence[int], scores: Tensor) -> Tensor:
    """How many points each image may have, (B,) int64; 0 becomes more than there are pixels."""
    if isinstance(max_keypoints, int):
        budgets = torch.full((len(scores),), max_keypoints, device=scores.device)
    else:
        budgets = torch.tensor(list(max_keypoints), dtype=torch.int64, device=scores.device)
    if budgets.shape != (len(scores),):
        raise ConfigError(
            f"max_keypoints: expected one number, or one for each of {len(scores)} images, found {len(budgets)}"
        )
    return torch.where(budgets > 0, budgets, scores[0].numel())


def _cells(index: Tensor, stride: int, size: tuple[int, int], grid: int) -> Tensor:
    """Which of the grid x grid cells of the image each pixel is in, (n,) int64; all 0 without a grid."""
    if grid <= 1:
        return torch.zeros_like(index)
    return index // stride * grid // size[1] * grid + index % stride * grid // size[0]


def _within_budget(image: Tensor, cells: Tensor, budgets: Tensor, grid: int) -> Tensor:
    """Which of the points, given best first, are kept, (n,) bool: those within the share of their cell go first."""
    if grid <= 1:
        return _rank_grouped(image, len(budgets)) < budgets[image]
    number = grid * grid
    share = (budgets // number).clamp_min(1)  # of fewer points than cells, the best cells get one each
    beyond = (_rank(image * number + cells, len(budgets) * number) >= share[image]).long()
    order = (image * 2 + beyond).argsort(stable=True)
    chosen = torch.empty_like(image, dtype=torch.bool)
    chosen[order] = _rank_grouped(image[order], len(budgets)) < budgets[image[order]]
    return chosen


def _rank(groups: Tensor, number: int) -> Tensor:
    """For each element how many of its group (0 to number - 1) come before it, (n,) int64."""
    order = groups.argsort(stable=True)
    rank = torch.empty_like(groups)
    rank[order] = _rank_grouped(groups[order], number)
    return rank


def _rank_grouped(groups: Tensor, number: int) -> Tensor:
    """:func:`_rank` of groups that are in ascending order."""
    counts = torch.bincount(groups, minlength=number)
    return torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts)[groups]


def refined_positions(scores: Tensor, image: Tensor, index: Tensor, refinement: Refinement) -> Tensor:
    """Sub-pixel positions (n, 2) float32 of the pixels ``index`` of the maps ``image``; differentiable in the scores.

    scores: (B, H, W). image, index: (n,) int64, the latter into the flattened map.
    """
    height, width = scores.shape[-2:]
    x, y = index % width, index // width
    position = torch.stack((x, y), -1).float()
    if refinement == "none":
        return position
    step = torch.arange(-1, 2, device=scores.device)
    columns = (x[:, None] + step).clamp(0, width - 1)
    rows = (y[:, None] + step).clamp(0, height - 1)
    patches = scores[image[:, None, None], rows[:, :, None], columns[:, None, :]]
    # Padding takes part as the score of the pixel itself, which neither attracts nor repels.
    patches = torch.where(patches.isfinite(), patches, patches[:, 1:2, 1:2])
    return position + _OFFSETS[refinement](patches)


def _weighted_offset(weights: Tensor) -> Tensor:
    """Centroid (n, 2) of weights (n, 3, 3) relative to the middle; 0 where they have no positive sum."""
    total = weights.sum((-2, -1))
    x = (weights[:, :, 2] - weights[:, :, 0]).sum(-1)
    y = (weights[:, 2] - weights[:, 0]).sum(-1)
    offset = torch.stack((x, y), -1) / total[:, None]
    return torch.where(total[:, None] > 0, offset, 0.0).clamp(-1, 1)


def _softargmax_offset(patches: Tensor) -> Tensor:
    peak = patches[:, 1:2, 1:2]
    temperature = _SOFTARGMAX_TEMPERATURE * peak.abs().clamp_min(1e-12)
    return _weighted_offset(((patches - peak) / temperature).clamp_max(0).exp()).clamp(-0.5, 0.5)


def _quadratic_offset(patches: Tensor) -> Tensor:
    """Maximum of the second-order Taylor expansion (Brown and Lowe, 2002), at most half a pixel away along each axis.

    Where the 2-D maximum is farther, or is none, each axis is fitted alone; that never leaves the half pixel.
    """
    p = patches
    gx, gy = (p[:, 1, 2] - p[:, 1, 0]) / 2, (p[:, 2, 1] - p[:, 0, 1]) / 2
    xx = p[:, 1, 2] - 2 * p[:, 1, 1] + p[:, 1, 0]
    yy = p[:, 2, 1] - 2 * p[:, 1, 1] + p[:, 0, 1]
    xy = (p[:, 2, 2] - p[:, 2, 0] - p[:, 0, 2] + p[:, 0, 0]) / 4
    determinant = xx * yy - xy * xy
    # Divisors that are not used are 1, as torch.where passes the NaN gradient of a division by 0 on to both sides.
    joint = (
        torch.stack((xy * gy - yy * gx, xy * gx - xx * gy), -1)
        / torch.where(determinant > 0, determinant, 1.0)[:, None]
    )
    gradient, curvature = torch.stack((gx, gy), -1), torch.stack((xx, yy), -1)
    alone = torch.where(curvature < 0, -gradient / torch.where(curvature < 0, curvature, 1.0), 0.0)
    usable = (determinant > 0) & (xx < 0) & (joint.abs() <= 0.5).all(-1)
    return torch.where(usable[:, None], joint, alone).clamp(-0.5, 0.5)


_OFFSETS = {"quadratic": _quadratic_offset, "centroid3": _weighted_offset, "softargmax": _softargmax_offset}
