"""Distillation: a detector learns the scores of another one, as that of a larger network (Hinton et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from scfeat_core.config import Range

FLOOR = 1e-4  # added to scores, whose logarithms are compared


@dataclass(frozen=True)
class DistillationConfig:
    """weight: beside the other losses of the detector. until: step after which it learns without the teacher, which
    need not be the better one; 0 is never. cell: pixels. power: the higher, the more only the peaks count.
    """

    weight: Annotated[float, Range(above=0.0)] = 1.0
    until: Annotated[int, Range(minimum=0)] = 0
    cell: Annotated[int, Range(minimum=2)] = 8
    power: Annotated[float, Range(above=0.0)] = 4.0

    def counts_at(self, step: int) -> bool:
        return self.until == 0 or step < self.until


def distillation_loss(scores: Tensor, taught: Tensor, config: DistillationConfig) -> tuple[Tensor, Tensor]:
    """How far the scores are from the teacher's, both (B, 1, H, W) >= 0: by place and by rank.

    place: divergence of the distributions of scores within each cell, where cells with high peaks count more. rank:
    smooth L1 of the logarithms of what the cells add up to, up to a constant of each image. Cells are laid out twice,
    half of a cell apart, so that no peak is always on an edge.
    """
    place0, rank0 = _by_cells(scores, taught, 0, config)
    place1, rank1 = _by_cells(scores, taught, config.cell // 2, config)
    return (place0 + place1) / 2, (rank0 + rank1) / 2


def _by_cells(scores: Tensor, taught: Tensor, shift: int, config: DistillationConfig) -> tuple[Tensor, Tensor]:
    own, other = (config.power * _cells(x, shift, config.cell) for x in (scores, taught))
    target = other.log_softmax(1)
    divergence = F.kl_div(own.log_softmax(1), target, reduction="none", log_target=True).sum(1)
    place = (divergence * _importance(other.amax(1) / config.power)).sum(1).mean()
    sums, sums_taught = (x.logsumexp(1) / config.power for x in (own, other))
    rank = F.smooth_l1_loss(_centred(sums), _centred(sums_taught), beta=0.2)
    return place, rank


def _cells(scores: Tensor, shift: int, cell: int) -> Tensor:
    """Logarithms of (B, 1, H, W) as (B, cell * cell, N); what is left at the right and at the bottom is dropped."""
    height, width = ((size - shift) // cell * cell for size in scores.shape[-2:])
    inner = scores[..., shift : shift + height, shift : shift + width]
    return F.pixel_unshuffle((inner + FLOOR).log(), cell).flatten(2)


def _importance(peaks: Tensor) -> Tensor:
    """Shares of 1 by the squares of the peaks, whose logarithms are (B, N)."""
    return (2 * peaks).softmax(1)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)
