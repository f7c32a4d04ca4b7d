"""Localisation loss: how far apart the refined positions of the same point are in two views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.config import Range
from scfeat_core.geometry import distances, seen, warp_points
from scfeat_core.selection import local_maxima, refined_positions


@dataclass(frozen=True)
class LocalisationConfig:
    """count: keypoints of each view that take part, the best by score. reach: pixels within which a keypoint of the
    other view is taken for the same point. square_below: pixels up to which distances count by their squares; the
    less, the more the small ones matter. nms_radius, border: as at inference.
    """

    weight: Annotated[float, Range(minimum=0.0)] = 0.0
    count: Annotated[int, Range(minimum=1)] = 400
    reach: Annotated[float, Range(above=0.0)] = 2.0
    square_below: Annotated[float, Range(above=0.0)] = 0.5
    nms_radius: Annotated[int, Range(minimum=0)] = 2
    border: Annotated[int, Range(minimum=1)] = 4


@dataclass(frozen=True)
class MotionLossConfig(LocalisationConfig):
    """Of pairs as of a video, where also a tenth of a pixel is to be mended."""

    weight: Annotated[float, Range(above=0.0)] = 8.0
    count: Annotated[int, Range(minimum=1)] = 300
    reach: Annotated[float, Range(above=0.0)] = 1.5
    square_below: Annotated[float, Range(above=0.0)] = 0.05


class _Peaks(NamedTuple):
    """xy: (B, N, 2), refined, with gradient. real: (B, N) bool, False where a view has fewer than N maxima."""

    xy: Tensor
    real: Tensor


def localisation_loss(
    score0: Tensor, score1: Tensor, homography: Tensor, visible: tuple[Tensor, Tensor], config: LocalisationConfig
) -> tuple[Tensor, Tensor]:
    """Mean distance of a keypoint from where its counterpart says it is, in pixels, and the number of such pairs.

    The positions are those that inference refines to, so the gradient moves just what is measured. score0, score1:
    (B, 1, H, W). visible: (B, H, W) bool each. Along each axis, and from ``square_below`` on less half of that.
    """
    peaks0, peaks1 = (_peaks(score[:, 0].float(), config) for score in (score0, score1))
    forth = _distances(peaks0, peaks1, homography, visible[1], config)
    back = _distances(peaks1, peaks0, torch.linalg.inv(homography), visible[0], config)
    pairs = forth[1] + back[1]
    return (forth[0] + back[0]) / pairs.clamp_min(1), pairs / 2


def _peaks(scores: Tensor, config: LocalisationConfig) -> _Peaks:
    keep = torch.zeros_like(scores, dtype=torch.bool)
    inner = (..., slice(config.border, -config.border), slice(config.border, -config.border))
    keep[inner] = local_maxima(scores.detach(), config.nms_radius)[inner]
    ranked = torch.where(keep, scores.detach(), -torch.inf).flatten(1)
    value, index = ranked.topk(min(config.count, ranked.shape[1]), dim=1)
    image = torch.arange(len(scores), device=scores.device)[:, None].expand_as(index)
    xy = refined_positions(scores, image.flatten(), index.flatten(), "quadratic")
    return _Peaks(xy.unflatten(0, index.shape), value.isfinite())


def _distances(
    peaks0: _Peaks, peaks1: _Peaks, homography: Tensor, visible1: Tensor, config: LocalisationConfig
) -> tuple[Tensor, Tensor]:
    """Sum over the pairs, and their number."""
    warped = warp_points(peaks0.xy, homography)
    gaps = distances(warped.detach(), peaks1.xy.detach()).masked_fill(~peaks1.real[:, None, :], torch.inf)
    gap, nearest = gaps.min(-1)
    valid = peaks0.real & (gap < config.reach) & seen(warped.detach(), visible1)
    counterpart = peaks1.xy.gather(1, nearest[..., None].expand(-1, -1, 2))
    delta = config.square_below
    error = F.huber_loss(warped, counterpart, reduction="none", delta=delta).sum(-1) / delta
    return torch.where(valid, error, 0.0).sum(), valid.sum()
