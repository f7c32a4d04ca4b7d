"""The keypoint loss against the double sum it stands for, its rewards, and what it prefers."""

from __future__ import annotations

import pytest
import torch

from scfeat_core.training.keypoint_loss import (
    KeypointLossConfig,
    good_rewards,
    keypoint_loss,
    match_probability,
    ramp_costs,
    repeatability_loss,
)
from scfeat_core.training.rewards import RewardConfig
from scfeat_core.training.sampling import propose_keypoints


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_surrogate_gradient_is_that_of_the_full_sum() -> None:
    """Specification 5.7: the row and column sums give the gradient of the double sum over all pairs."""
    config = KeypointLossConfig(accept_bias=0.3)
    scores = torch.rand(2, 1, 32, 32, generator=generator()).requires_grad_()
    draw0 = propose_keypoints(scores, 8, 1.0, 0.3, generator(1))
    draw1 = propose_keypoints(scores * 0.7, 8, 1.0, 0.3, generator(2))
    maps = torch.randn(2, 8, 8, 8, generator=generator(3))
    probability = match_probability(maps, maps, draw0.points, draw1.points, 10.0)
    reward = good_rewards(draw0.points, draw1.points, torch.eye(3).expand(2, 3, 3), config)
    loss, _ = keypoint_loss(draw0, draw1, probability, reward, config)
    (surrogate,) = torch.autograd.grad(loss, scores, retain_graph=True)
    accepted = (draw0.accepted[:, :, None] & draw1.accepted[:, None, :]).float()
    log_pairs = probability.log() + draw0.log_prob[:, :, None] + draw1.log_prob[:, None, :]
    full = -(accepted * reward * probability * log_pairs).sum()
    for draw in (draw0, draw1):
        full = full - config.kp_penalty * (draw.accepted * draw.log_prob).sum()
    (expected,) = torch.autograd.grad(full / draw0.log_prob.numel(), scores)
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(surrogate, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("profile", "at_1_px"), [("step", 1.0), ("linear", 0.5)])
def test_rewards_by_distance(profile: str, at_1_px: float) -> None:
    config = KeypointLossConfig(reward_profile=profile, reward_config=RewardConfig(reward_thr=2.0))  # type: ignore[arg-type]
    points0 = torch.tensor([[[10.0, 10.0]]])
    points1 = torch.tensor([[[15.0, 10.0], [16.0, 10.0], [18.0, 10.0]]])
    shift = torch.eye(3)[None].clone()
    shift[0, 0, 2] = 5.0
    reward = good_rewards(points0, points1, shift, config)
    torch.testing.assert_close(reward[0, 0], torch.tensor([1.0, at_1_px, -0.25]))


def test_repeatability_loss_prefers_scores_that_move_with_the_view() -> None:
    config = KeypointLossConfig(score_scale=5.0)
    shift = torch.eye(3)[None].clone()
    shift[0, 0, 2] = 8.0
    peaks = torch.zeros(1, 1, 64, 64)
    peaks[:, :, 4::8, 3::8] = 3.0
    everything = (torch.ones(1, 64, 64, dtype=torch.bool),) * 2
    same = repeatability_loss(peaks, peaks, shift, everything, config)
    displaced = repeatability_loss(peaks, peaks.roll(3, -1), shift, everything, config)
    flat = repeatability_loss(torch.zeros_like(peaks), torch.zeros_like(peaks), shift, everything, config)
    assert same < flat and same < displaced
    hidden = torch.ones(1, 64, 64, dtype=torch.bool)
    hidden[:, :, 32:] = False  # no correspondence there: what is displaced there costs nothing
    torn = torch.cat((peaks[..., :36], peaks.roll(3, -1)[..., 36:]), -1)
    seen_only = repeatability_loss(peaks, torn, shift, (hidden, hidden), config)
    assert seen_only < repeatability_loss(peaks, torn, shift, everything, config) - 0.1


def test_costs_grow_from_nothing() -> None:
    config = KeypointLossConfig(cost_ramp=100)
    assert ramp_costs(config, 0).bad_reward == 0
    assert ramp_costs(config, 50).repeat_cost == pytest.approx(config.repeat_cost / 2)
    assert ramp_costs(config, 1000) == config
