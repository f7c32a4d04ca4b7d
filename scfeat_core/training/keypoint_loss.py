"""Keypoint loss: REINFORCE over drawn keypoints and their matching distribution (spec section 5, DISK)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scfeat_core.config import Range
from scfeat_core.geometry import Alignment, distances, sample_map, seen, warp_points
from scfeat_core.training.epipolar_loss import usable_pairs
from scfeat_core.training.rewards import (
    MINIMAL,
    EpipolarRule,
    MatrixError,
    Rates,
    RewardConfig,
    constant_rates,
    draw_good,
    draw_matched,
    epipolar_rule,
    error_rates,
    fundamental_error,
    legacy_error,
    rescale_thresholds,
)
from scfeat_core.training.sampling import Draws, Proposals, keypoint_probability, sample_descriptors

Temperature = Annotated[float, Range(above=0.0)]

_LEGACY_SEED = 1234


@dataclass(frozen=True)
class KeypointLossConfig:
    """Names and values as published where they exist; grid_size and reward_thr in pixels.

    grid_size: one point is proposed in each cell. score_scale, accept_bias: see :func:`sampling.propose_keypoints`.
    match_over: matching probabilities are those among ``all`` proposals (published), or among the ``accepted`` (DISK).
    match_grad: the gradient also reaches the descriptors, through the logarithm of the matching probability; and
    without cor_detach through that probability as a factor, too. These three are of posed pairs: with true
    correspondence the descriptors have a loss of their own.

    reward_config: rewards of posed pairs. With true correspondences only its reward_thr counts, and reward_profile:
    ``step`` gives every good match the full reward, ``linear`` lets it fall to zero at the threshold, which pays for
    exact positions.
    repeat_weight, repeat_cost: see :func:`repeatability_loss`.
    cost_ramp: steps over which ``bad_reward``, ``kp_penalty`` and ``repeat_cost`` grow from 0. A detector that is still
    blind finds so little to gain that their full amount only flattens it.
    memory_mib: what the matrices of points times points of :func:`epipolar_keypoint_loss` may take at once.
    """

    grid_size: Annotated[int, Range(minimum=4)] = 8
    temperature_base: Temperature = 60.0
    temperature_max: Temperature = 60.0
    score_scale: Annotated[float, Range(above=0.0)] = 1.0
    accept_bias: float = 1.0
    match_over: Literal["all", "accepted"] = "all"
    match_grad: bool = False
    cor_detach: bool = True
    reward_config: RewardConfig = field(default_factory=RewardConfig)
    reward_profile: Literal["step", "linear"] = "linear"
    good_reward: float = 1.0
    bad_reward: float = -0.25
    kp_penalty: float = -0.001
    repeat_weight: Annotated[float, Range(minimum=0.0)] = 1.0
    repeat_cost: float = 0.25
    cost_ramp: Annotated[int, Range(minimum=0)] = 0
    memory_mib: Annotated[int, Range(minimum=1)] = 512

    def temperature_at(self, epoch: int) -> float:
        """The factor on cosine similarities in the softmax."""
        return min(self.temperature_base + epoch, self.temperature_max)


def ramp_costs(config: KeypointLossConfig, step: int) -> KeypointLossConfig:
    """The settings in the ``step``-th step of detector training."""
    share = min(1.0, max(0, step) / config.cost_ramp) if config.cost_ramp else 1.0
    return replace(
        config,
        bad_reward=share * config.bad_reward,
        kp_penalty=share * config.kp_penalty,
        repeat_cost=share * config.repeat_cost,
    )


def good_rewards(
    points0: Tensor, points1: Tensor, homography: Tensor, visible: tuple[Tensor, Tensor], config: KeypointLossConfig
) -> Tensor:
    """Reward of each pair of points, (B, N, M): good where they are each other's images to within the threshold.

    visible: (B, H, W) bool of view 0 and of view 1; what stands before the photograph has no image in the other view.
    """
    d0 = distances(warp_points(points0, homography), points1)
    d1 = distances(points0, warp_points(points1, torch.linalg.inv(homography)))
    distance = torch.maximum(d0, d1).nan_to_num(torch.inf)
    limit = config.reward_config.reward_thr
    profile = 1 - distance / limit if config.reward_profile == "linear" else torch.ones_like(distance)
    both = seen(points0, visible[0])[:, :, None] & seen(points1, visible[1])[:, None, :]
    return torch.where(both & (distance < limit), config.good_reward * profile, config.bad_reward)


def match_probability(
    map0: Tensor,
    map1: Tensor,
    points0: Tensor,
    points1: Tensor,
    temperature: float,
    alignment: Alignment,
) -> Tensor:
    """Product of the row and the column softmax of the similarities, (B, N, M)."""
    d0, d1 = sample_descriptors(map0, points0, alignment), sample_descriptors(map1, points1, alignment)
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
        keypoint_probability(score, config.grid_size, config.score_scale, config.accept_bias)
        for score in (score0, score1)
    )
    forth = _expected_repeats(q0, q1, homography, visible, config.repeat_cost)
    back = _expected_repeats(q1, q0, torch.linalg.inv(homography), visible[::-1], config.repeat_cost)
    return -(forth + back) / 2 * config.grid_size**2


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


# -- posed pairs -------------------------------------------------------------------------------------------------------


class MatchSums(NamedTuple):
    """What the losses need of the matching probabilities P of accepted points, (N, M) a pair, without a gradient.

    rows, columns: (B, N), (B, M) sums of P. good_rows, good_columns: of the good matches. good_counts: (B, N) good
    matches of each point of view 0, accepted or not. partner: (B, N) the most probable match. mutual: (B, N) bool.
    """

    rows: Tensor
    columns: Tensor
    good_rows: Tensor
    good_columns: Tensor
    good_counts: Tensor
    partner: Tensor
    mutual: Tensor


class _Matching(NamedTuple):
    """Descriptors (B, N, D) and (B, M, D) of the proposals, which are accepted, and which the softmax is over."""

    d0: Tensor
    d1: Tensor
    accepted0: Tensor
    accepted1: Tensor
    over0: Tensor
    over1: Tensor
    temperature: float

    def logits(self, rows: slice) -> Tensor:
        """(B, n, M)."""
        return self.temperature * self.d0[:, rows] @ self.d1.transpose(1, 2)

    def accepted(self, rows: slice) -> Tensor:
        """(B, n, M) bool."""
        return self.accepted0[:, rows, None] & self.accepted1[:, None]

    def detach(self) -> _Matching:
        return self._replace(d0=self.d0.detach(), d1=self.d1.detach())

    def swap(self) -> _Matching:
        return _Matching(self.d1, self.d0, self.accepted1, self.accepted0, self.over1, self.over0, self.temperature)

    def chunks(self, memory_mib: int) -> Iterator[slice]:
        size = self.rows_a_chunk(memory_mib)
        return (slice(i, i + size) for i in range(0, self.d0.shape[1], size))

    def rows_a_chunk(self, memory_mib: int) -> int:
        """A chunk holds about eight matrices at once."""
        return max(1, memory_mib * 2**20 // (8 * 4 * len(self.d0) * self.d1.shape[1]))


def epipolar_keypoint_loss(
    map0: Tensor,
    map1: Tensor,
    draw0: Proposals,
    draw1: Proposals,
    fundamental: Tensor,
    size: tuple[int, int],
    config: KeypointLossConfig,
    *,
    temperature: float = 60.0,
    alignment: Alignment = "exact",
    generator: Draws,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Surrogate whose gradient is that of minus the expected reward, per cell, and what to log, means over the pairs.

    map0, map1: (B, D, h, w) of stride 4, float32. fundamental: (B, 3, 3), x1' F x0 = 0. size: (width, height).
    generator: chooses the matches from which F is estimated. As in :func:`keypoint_loss`, nothing of size N x M is kept
    for the backward pass, and here it is never there as a whole.
    A pair with a value that is not finite in a map or in F, or with F = 0, gets no gradient. Being a mean over cells,
    the loss of a batch is the mean of those of its equal parts, but for ``fmatrix_legacy``.
    """
    with torch.autocast(map0.device.type, enabled=False):
        usable = usable_pairs(map0, map1, fundamental)
        matching = _matching(map0, map1, draw0, draw1, usable, config, temperature, alignment)
        with torch.no_grad():
            chunk = matching.rows_a_chunk(config.memory_mib)
            rule = epipolar_rule(draw0.points, draw1.points, fundamental.float(), config.reward_config.reward_thr)
            if config.reward_config.rescale_thr:
                rule = rescale_thresholds(rule, chunk)
            sums = match_sums(matching, rule, config.memory_mib)
            error = _matrix_error(sums, rule, fundamental, usable, size, config.reward_config, chunk, generator)
            constant = constant_rates(usable, config.good_reward, config.bad_reward, config.kp_penalty)
            rates, e = error_rates(error, constant, config.reward_config)
        reinforce, penalty = _surrogate(sums, rates, matching, draw0, draw1)
        if config.match_grad:
            reinforce = reinforce + _matching_gain(matching, draw0, draw1, rule, rates, config)
    cells = draw0.log_prob.numel()
    values = {
        "reinforce": -reinforce.detach() / cells,
        "kp_penalty": -penalty.detach() / cells,
        "n_pairs": sums.rows.sum(1).mean(),
        "expected_matches": sums.good_rows.sum(1).mean(),
        "accepted": torch.stack((draw0.accepted, draw1.accepted)).float().mean(),
        "unusable_pairs": (~usable).float().mean(),
        "non_finite_cells": (~torch.stack((draw0.finite, draw1.finite))).float().mean(),
    }
    if config.reward_config.reward_type != "posfeat":
        values |= {"fm_error": e.mean(), "fm_unknown": (usable & ~error.known).float().mean()}
    return -(reinforce + penalty) / cells, values


def _matching(
    map0: Tensor,
    map1: Tensor,
    draw0: Proposals,
    draw1: Proposals,
    usable: Tensor,
    config: KeypointLossConfig,
    temperature: float,
    alignment: Alignment,
) -> _Matching:
    maps = (torch.where(usable[:, None, None, None], m.float(), 0.0) for m in (map0, map1))
    with torch.set_grad_enabled(config.match_grad and torch.is_grad_enabled()):
        d0, d1 = (sample_descriptors(m, draw.points, alignment) for m, draw in zip(maps, (draw0, draw1), strict=True))
    accepted0, accepted1 = (draw.accepted & usable[:, None] for draw in (draw0, draw1))
    over0, over1 = accepted0, accepted1
    if config.match_over == "all":
        over0, over1 = torch.ones_like(accepted0), torch.ones_like(accepted1)
    return _Matching(d0, d1, accepted0, accepted1, over0, over1, temperature)


def _log_sums(matching: _Matching, memory_mib: int) -> tuple[Tensor, Tensor]:
    """Logarithms (B, N, 1) and (B, 1, M) of the sums that the row and the column softmax divide by."""
    rows, columns = [], torch.full_like(matching.d1[:, None, :, 0], -torch.inf)
    for chunk in matching.chunks(memory_mib):
        logits = matching.logits(chunk)
        rows.append(logits.masked_fill(~matching.over1[:, None], -torch.inf).logsumexp(2, keepdim=True))
        part = logits.masked_fill(~matching.over0[:, chunk, None], -torch.inf).logsumexp(1, keepdim=True)
        columns = torch.logaddexp(columns, part)
    return torch.cat(rows, 1), columns


@torch.no_grad()
def match_sums(matching: _Matching, rule: EpipolarRule, memory_mib: int) -> MatchSums:
    """Row by row of the matching probabilities, some rows at a time."""
    matching = matching.detach()
    row_sums, column_sums = _log_sums(matching, memory_mib)
    rows, good_rows, counts, partners, best_rows = [], [], [], [], []
    columns, good_columns, best = torch.zeros(3, *matching.accepted1.shape, device=matching.d1.device)
    nearest = torch.zeros_like(matching.accepted1, dtype=torch.long)
    for chunk in matching.chunks(memory_mib):
        probability = (2 * matching.logits(chunk) - row_sums[:, chunk] - column_sums).exp_()
        probability = torch.where(matching.accepted(chunk), probability, 0.0)
        good = rule.rows(chunk)
        value, index = probability.max(1)
        nearest = torch.where(value > best, index + chunk.start, nearest)
        best = torch.maximum(best, value)
        value, index = probability.max(2)
        best_rows.append(value)
        partners.append(index)
        counts.append(good.sum(2))
        rows.append(probability.sum(2))
        columns += probability.sum(1)
        probability *= good
        good_rows.append(probability.sum(2))
        good_columns += probability.sum(1)
    partner = torch.cat(partners, 1)
    own = torch.arange(partner.shape[1], device=partner.device)
    mutual = (nearest.gather(1, partner) == own) & (torch.cat(best_rows, 1) > 0)
    return MatchSums(
        torch.cat(rows, 1), columns, torch.cat(good_rows, 1), good_columns, torch.cat(counts, 1), partner, mutual
    )


def _matrix_error(
    sums: MatchSums,
    rule: EpipolarRule,
    fundamental: Tensor,
    usable: Tensor,
    size: tuple[int, int],
    config: RewardConfig,
    chunk: int,
    generator: Draws,
) -> MatrixError:
    if config.reward_type == "posfeat":
        return MatrixError(usable.new_zeros(usable.shape, dtype=torch.float64), torch.zeros_like(usable))
    legacy = config.reward_type == "fmatrix_legacy"
    if legacy:
        # Always the same places in the list, as published, so that more than one trial would change nothing.
        fixed = [torch.Generator().manual_seed(_LEGACY_SEED) for _ in usable]
        first, second, count = draw_good(rule, sums.good_counts, 1, chunk, fixed)
    elif config.fm_pool == "good":
        first, second, count = draw_good(rule, sums.good_counts, config.fm_trials, chunk, generator)
    else:
        mask = sums.mutual
        if config.fm_pool == "matched_good":
            index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            mask = mask & rule.pairs(index, sums.partner)
        first, second, count = draw_matched(mask, sums.partner, config.fm_trials, generator)
    points0, points1 = _gather(rule.points0, first), _gather(rule.points1, second)
    if legacy:
        value = legacy_error(points0[:, 0], points1[:, 0], fundamental)
        known = ~value.isnan()
    else:
        value = fundamental_error(points0, points1, fundamental, size, config.fm_reduce)
        known = value.isfinite()
    return MatrixError(value, known & usable & (count >= MINIMAL))


def _gather(points: Tensor, index: Tensor) -> Tensor:
    """(B, T, 8, 2) of homogeneous points (B, N, 3)."""
    return points[..., :2].gather(1, index.flatten(1)[..., None].expand(-1, -1, 2)).unflatten(1, index.shape[1:])


def _surrogate(
    sums: MatchSums, rates: Rates, matching: _Matching, draw0: Proposals, draw1: Proposals
) -> tuple[Tensor, Tensor]:
    """What the drawn points earn by matches, and their penalty."""
    good, bad, price = (rate[:, None] for rate in rates)
    weight0 = bad * sums.rows + (good - bad) * sums.good_rows
    weight1 = bad * sums.columns + (good - bad) * sums.good_columns
    earned = (weight0 * draw0.log_prob).sum() + (weight1 * draw1.log_prob).sum()
    paid = (price * matching.accepted0 * draw0.log_prob).sum() + (price * matching.accepted1 * draw1.log_prob).sum()
    return earned, paid


def _matching_gain(
    matching: _Matching,
    draw0: Proposals,
    draw1: Proposals,
    rule: EpipolarRule,
    rates: Rates,
    config: KeypointLossConfig,
) -> Tensor:
    """The part of the expected reward whose gradient goes through the matching probabilities."""
    rows = _kept_log_sums(matching, config.memory_mib)
    columns = _kept_log_sums(matching.swap(), config.memory_mib).transpose(1, 2)
    chances = draw0.log_prob.detach()[:, :, None], draw1.log_prob.detach()[:, None]

    def gain(chunk: slice, row_sums: Tensor, column_sums: Tensor) -> Tensor:
        accepted = matching.accepted(chunk)
        log_probability = 2 * matching.logits(chunk) - row_sums[:, chunk] - column_sums
        log_probability = torch.where(accepted, log_probability, 0.0)
        good, bad, _ = (rate[:, None, None] for rate in rates)
        reward = torch.where(accepted, torch.where(rule.rows(chunk), good, bad), 0.0)
        if config.cor_detach:
            return (reward * log_probability.detach().exp() * log_probability).sum()
        return (reward * log_probability.exp() * (log_probability + chances[0][:, chunk] + chances[1])).sum()

    parts = [
        checkpoint(gain, chunk, rows, columns, use_reentrant=False, preserve_rng_state=False)
        for chunk in matching.chunks(config.memory_mib)
    ]
    return torch.stack(parts).sum()


def _kept_log_sums(matching: _Matching, memory_mib: int) -> Tensor:
    """The row part of :func:`_log_sums`, (B, N, 1), with gradient; computed again in the backward pass."""

    def part(chunk: slice) -> Tensor:
        logits = matching.logits(chunk).masked_fill(~matching.over1[:, None], -torch.inf)
        # A row without any would be -inf, with a gradient that is not finite; it has no accepted match either.
        some = matching.over1.any(1)[:, None, None]
        return torch.where(some, logits, 0.0).logsumexp(2, keepdim=True)

    chunks = matching.chunks(memory_mib)
    return torch.cat([checkpoint(part, c, use_reentrant=False, preserve_rng_state=False) for c in chunks], 1)
