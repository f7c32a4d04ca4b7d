"""Descriptor loss on true correspondences: a dual softmax over similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from scfeat_core.config import Range
from scfeat_core.geometry import Alignment, distances
from scfeat_core.training.sampling import sample_descriptors


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
    map0: Tensor,
    map1: Tensor,
    points0: Tensor,
    points1: Tensor,
    valid: Tensor,
    config: DescriptorLossConfig,
    distractors: tuple[Tensor, Tensor] | None = None,
    alignment: Alignment = "exact",
) -> tuple[Tensor, Tensor]:
    """Mean of ``-log P(match)`` over the valid correspondences, both ways, and the share matched correctly.

    map0, map1: (B, D, h, w), stride 4. points0, points1: (B, N, 2) pixels, row i of one is the truth of row i of the
    other. valid: (B, N) bool. distractors: (B, K, 2) pixels of either view, further points to be told apart from, where
    the correspondences are too few to be hard to find. alignment: that of the network.
    """
    if points0.shape[1] == 0:
        return (map0.sum() + map1.sum()) * 0.0, map0.new_zeros(())
    extra0, extra1 = distractors or (points0[:, :0], points1[:, :0])
    d0, e0 = (sample_descriptors(map0, points, alignment) for points in (points0, extra0))
    d1, e1 = (sample_descriptors(map1, points, alignment) for points in (points1, extra1))
    forward = _cross_entropy(d0, d1, points1, valid, e1, extra1, config)
    backward = _cross_entropy(d1, d0, points0, valid, e0, extra0, config)
    count = valid.sum().clamp_min(1)
    loss = (forward[0] + backward[0]).sum() / (2 * count)
    return loss, (forward[1] & backward[1]).sum() / count


def _cross_entropy(
    query: Tensor,
    target: Tensor,
    target_points: Tensor,
    valid: Tensor,
    extra: Tensor,
    extra_points: Tensor,
    config: DescriptorLossConfig,
) -> tuple[Tensor, Tensor]:
    """Loss (B, N), zero where not valid, and whether the true match is the nearest (B, N)."""
    close = distances(target_points, target_points) < config.exclusion
    close.diagonal(dim1=1, dim2=2).fill_(False)
    close = torch.cat((close | ~valid[:, None, :], distances(target_points, extra_points) < config.exclusion), -1)
    logits = config.temperature * query @ torch.cat((target, extra), 1).transpose(1, 2)
    logits = logits.masked_fill(close, -torch.inf)
    others = _other_pairs(extra if extra.shape[1] else target, config.negatives)
    logits = torch.cat((logits, config.temperature * query @ others), -1)
    # Rows that are not valid may be empty of targets; they are masked before any reduction.
    positive = config.temperature * (query * target).sum(-1)
    loss = torch.logsumexp(logits, -1) - positive
    right = logits.detach().amax(-1) <= positive.detach() + 1e-4
    return torch.where(valid, loss, 0.0), right & valid


def _other_pairs(target: Tensor, count: int) -> Tensor:
    """(B, D, count) descriptors of the pair before, in a fixed stride through its points.

    Of the pair before in the same process: with them the loss depends on how a batch is shared out.
    """
    step = max(1, target.shape[1] // max(count, 1))
    others = target.roll(1, 0)[:, ::step][:, :count] if len(target) > 1 else target[:, :0]
    return others.transpose(1, 2)
