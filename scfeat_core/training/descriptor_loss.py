"""Descriptor loss on true correspondences: a dual softmax over similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.config import Range
from scfeat_core.geometry import distances, sample_map


@dataclass(frozen=True)
class DescriptorLossConfig:
    """cell: one point is drawn per cell of this size. temperature: factor on the cosine similarity.

    negatives: points of other pairs that each point must also be told apart from. exclusion: pixels around the true
    match within which another point is no negative.
    """

    cell: Annotated[int, Range(minimum=4)] = 8
    temperature: Annotated[float, Range(above=0.0)] = 20.0
    negatives: Annotated[int, Range(minimum=0)] = 256
    exclusion: Annotated[float, Range(minimum=0.0)] = 4.0


def descriptor_loss(
    map0: Tensor, map1: Tensor, points0: Tensor, points1: Tensor, valid: Tensor, config: DescriptorLossConfig
) -> tuple[Tensor, Tensor]:
    """Mean of ``-log P(match)`` over the valid correspondences, both ways, and the share matched correctly.

    map0, map1: (B, D, h, w), stride 4. points0, points1: (B, N, 2) pixels, row i of one is the truth of row i of the
    other. valid: (B, N) bool.
    """
    d0 = F.normalize(sample_map(map0, points0).float(), dim=-1)
    d1 = F.normalize(sample_map(map1, points1).float(), dim=-1)
    forward = _cross_entropy(d0, d1, points1, valid, config)
    backward = _cross_entropy(d1, d0, points0, valid, config)
    count = valid.sum().clamp_min(1)
    loss = (forward[0] + backward[0]).sum() / (2 * count)
    return loss, (forward[1] & backward[1]).sum() / count


def _cross_entropy(
    query: Tensor, target: Tensor, target_points: Tensor, valid: Tensor, config: DescriptorLossConfig
) -> tuple[Tensor, Tensor]:
    """Loss (B, N), zero where not valid, and whether the true match is the nearest (B, N)."""
    logits = config.temperature * query @ target.transpose(1, 2)
    close = distances(target_points, target_points) < config.exclusion
    close.diagonal(dim1=1, dim2=2).fill_(False)
    logits = logits.masked_fill(close | ~valid[:, None, :], -torch.inf)
    logits = torch.cat((logits, config.temperature * query @ _other_pairs(target, config.negatives)), -1)
    # Rows that are not valid may be empty of targets; they are masked before any reduction.
    positive = config.temperature * (query * target).sum(-1)
    loss = torch.logsumexp(logits, -1) - positive
    right = logits.detach().amax(-1) <= positive.detach() + 1e-4
    return torch.where(valid, loss, 0.0), right & valid


def _other_pairs(target: Tensor, count: int) -> Tensor:
    """(B, D, count) descriptors of the pair before, in a fixed stride through its points."""
    step = max(1, target.shape[1] // max(count, 1))
    others = target.roll(1, 0)[:, ::step][:, :count] if len(target) > 1 else target[:, :0]
    return others.transpose(1, 2)
