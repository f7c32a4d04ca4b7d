"""Keypoint loss: REINFORCE over drawn keypoints and their matching distribution (spec section 5, DISK)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.config import Range
from scfeat_core.geometry import distances, sample_map, seen, warp_points
from scfeat_core.training.sampling import Proposals, keypoint_probability


@dataclass(frozen=True)
class KeypointLossConfig:
    """cell, temperature, rewards and penalty as published; reward_thr in pixels.

    score_scale, accept_bias: see :func:`sampling.propose_keypoints`.
    reward_profile: ``step`` gives every good pair the full reward, ``linear`` lets it fall to zero at the threshold,
    which pays for exact positions.
    repeat_weight, repeat_cost: see :func:`repeatability_loss`.
    cost_ramp: steps over which ``bad_reward``, ``kp_penalty`` and ``repeat_cost`` grow from 0. A detector that is still
    blind finds so little to gain that their full amount only flattens it.
    """

    cell: Annotated[int, Range(minimum=4)] = 8
    temperature: Annotated[float, Range(above=0.0)] = 60.0
    score_scale: Annotated[float, Range(above=0.0)] = 1.0
    accept_bias: float = 1.0
    repeat_weight: Annotated[float, Range(minimum=0.0)] = 1.0
    repeat_cost: float = 0.25
    cost_ramp: Annotated[int, Range(minimum=0)] = 0
    reward_thr: Annotated[float, Range(above=0.0)] = 2.0
    reward_profile: Literal["step", "linear"] = "linear"
    good_reward: float = 1.0
    bad_reward: float = -0.25
    kp_penalty: float = -0.001


def ramp_costs(config: KeypointLossConfig, step: int) -> KeypointLossConfig:
    """The settings in the ``step``-th step of detector training."""
    share = min(1.0, step / config.cost_ramp) if config.cost_ramp else 1.0
    return replace(
        config,
        bad_reward=share * config.bad_reward,
        kp_penalty=share * config.kp_penalty,
        repeat_cost=share * config.repeat_cost,
    )


def good_rewards(points0: Tensor, points1: Tensor, homography: Tensor, config: KeypointLossConfig) -> Tensor:
    """Reward of each pair of points, (B, N, M): good where they are each other's images to within the threshold."""
    d0 = distances(warp_points(points0, homography), points1)
    d1 = distances(points0, warp_points(points1, torch.linalg.inv(homography)))
    distance = torch.maximum(d0, d1).nan_to_num(torch.inf)
    profile = 1 - distance / config.reward_thr if config.reward_profile == "linear" else torch.ones_like(distance)
    return torch.where(distance < config.reward_thr, config.good_reward * profile, config.bad_reward)


def match_probability(map0: Tensor, map1: Tensor, points0: Tensor, points1: Tensor, temperature: float) -> Tensor:
    """Product of the row and the column softmax of the similarities, (B, N, M)."""
    d0 = F.normalize(sample_map(map0, points0).float(), dim=-1)
    d1 = F.normalize(sample_map(map1, points1).float(), dim=-1)
    logits = temperature * d0 @ d1.transpose(1, 2)
    return logits.softmax(2) * logits.softmax(1)


def keypoint_loss(
    draw0: Proposals, draw1: Proposals, probability: Tensor, reward: Tensor, config: KeypointLossConfig
) -> tuple[Tensor, Tensor]:
    """Surrogate whose gradient is that of the expected reward, per cell, and the expected matches per pair.

    With reward, probability and acceptance constant, the gradient of the full double sum needs only its row and column
    sums: nothing of size N x M is kept for the backward pass (spec 5.7).
    """
    with torch.no_grad():
        accepted = draw0.accepted[:, :, None] & draw1.accepted[:, None, :]
        matched = torch.where(accepted, probability, 0.0)
        gain = matched * reward
        rows, columns = gain.sum(2), gain.sum(1)
    penalty = config.kp_penalty
    weight0 = rows + penalty * draw0.accepted
    weight1 = columns + penalty * draw1.accepted
    cells = draw0.log_prob.numel()
    loss = -((weight0 * draw0.log_prob).sum() + (weight1 * draw1.log_prob).sum()) / cells
    return loss, (matched * (reward > 0)).sum() / len(reward)


def repeatability_loss(
    score0: Tensor,
    score1: Tensor,
    homography: Tensor,
    visible: tuple[Tensor, Tensor],
    config: KeypointLossConfig,
) -> Tensor:
    """Minus the expected number of points that both views choose in the same place, per cell, less a cost a point.

    With dense true correspondence this part of the reward needs no draws: its expectation is the sum over pixels of the
    product of the two probabilities, and its gradient has no variance. score0, score1: (B, 1, H, W). visible: (B, H, W)
    bool of view 0 and of view 1, where the correspondence holds.
    """
    q0, q1 = (
        keypoint_probability(score, config.cell, config.score_scale, config.accept_bias) for score in (score0, score1)
    )
    forth = _expected_repeats(q0, q1, homography, visible, config.repeat_cost)
    back = _expected_repeats(q1, q0, torch.linalg.inv(homography), visible[::-1], config.repeat_cost)
    return -(forth + back) / 2 * config.cell**2


def _expected_repeats(
    q0: Tensor, q1: Tensor, homography: Tensor, visible: tuple[Tensor, Tensor], cost: float
) -> Tensor:
    """Mean over the pixels of view 0 that view 1 shows."""
    h, w = q0.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h, device=q0.device), torch.arange(w, device=q0.device), indexing="ij")
    pixels = torch.stack((x, y), -1).reshape(1, -1, 2).float()
    warped = warp_points(pixels, homography)
    inside = visible[0][:, :h, :w].flatten(1) & seen(warped, visible[1][:, :h, :w])
    other = sample_map(q1, torch.where(inside[..., None], warped, 0.0), stride=1)[..., 0]
    gain = q0.flatten(1) * (other - cost)
    return torch.where(inside, gain, 0.0).sum() / inside.sum().clamp_min(1)
