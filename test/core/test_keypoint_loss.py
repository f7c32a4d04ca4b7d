"""The keypoint loss against the double sum it stands for, its rewards, and what it prefers."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from scfeat_core.training.keypoint_loss import (
    KeypointLossConfig,
    epipolar_keypoint_loss,
    good_rewards,
    keypoint_loss,
    match_probability,
    ramp_costs,
    repeatability_loss,
)
from scfeat_core.training.rewards import (
    MatrixError,
    RewardConfig,
    constant_rates,
    draw_distinct,
    epipolar_rule,
    error_rates,
    fundamental_error,
    legacy_error,
    rescale_thresholds,
)
from scfeat_core.training.sampling import Proposals, propose_keypoints, sample_descriptors


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(batch, size, size, dtype=torch.bool)
    return mask, mask


def test_surrogate_gradient_is_that_of_the_full_sum() -> None:
    """Specification 5.7: the row and column sums give the gradient of the double sum over all pairs."""
    config = KeypointLossConfig(accept_bias=0.3)
    scores = torch.rand(2, 1, 32, 32, generator=generator()).requires_grad_()
    draw0 = propose_keypoints(scores, 8, 1.0, 0.3, generator(1))
    draw1 = propose_keypoints(scores * 0.7, 8, 1.0, 0.3, generator(2))
    maps = torch.randn(2, 8, 8, 8, generator=generator(3))
    probability = match_probability(maps, maps, draw0.points, draw1.points, 10.0, "exact")
    reward = good_rewards(draw0.points, draw1.points, torch.eye(3).expand(2, 3, 3), everything(2, 32), config)
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
    reward = good_rewards(points0, points1, shift, everything(1, 64), config)
    torch.testing.assert_close(reward[0, 0], torch.tensor([1.0, at_1_px, -0.25]))
    occluded = everything(1, 64)[0].clone()
    occluded[0, 10, 15] = False
    reward = good_rewards(points0, points1, shift, (everything(1, 64)[0], occluded), config)
    torch.testing.assert_close(reward[0, 0], torch.tensor([-0.25, at_1_px, -0.25]))


def test_matching_samples_as_the_network_is_aligned() -> None:
    maps = torch.randn(1, 8, 8, 8, generator=generator())
    points = torch.tensor([[[3.0, 5.0], [20.0, 9.0], [28.0, 28.0]]])
    for alignment in ("exact", "legacy"):
        descriptors = sample_descriptors(maps, points, alignment)[0]
        logits = 10 * descriptors @ descriptors.T
        expected = logits.softmax(1) * logits.softmax(0)
        torch.testing.assert_close(match_probability(maps, maps, points, points, 10.0, alignment)[0], expected)


def test_repeatability_loss_prefers_scores_that_move_with_the_view() -> None:
    config = KeypointLossConfig(score_scale=5.0)
    shift = torch.eye(3)[None].clone()
    shift[0, 0, 2] = 8.0
    peaks = torch.zeros(1, 1, 64, 64)
    peaks[:, :, 4::8, 3::8] = 3.0
    visible = everything(1, 64)
    same = repeatability_loss(peaks, peaks, shift, visible, config)
    displaced = repeatability_loss(peaks, peaks.roll(3, -1), shift, visible, config)
    flat = repeatability_loss(torch.zeros_like(peaks), torch.zeros_like(peaks), shift, visible, config)
    assert same < flat and same < displaced
    hidden = torch.ones(1, 64, 64, dtype=torch.bool)
    hidden[:, :, 32:] = False  # no correspondence there: what is displaced there costs nothing
    torn = torch.cat((peaks[..., :36], peaks.roll(3, -1)[..., 36:]), -1)
    seen_only = repeatability_loss(peaks, torn, shift, (hidden, hidden), config)
    assert seen_only < repeatability_loss(peaks, torn, shift, visible, config) - 0.1


def test_costs_grow_from_nothing() -> None:
    config = KeypointLossConfig(cost_ramp=100)
    assert ramp_costs(config, 0).bad_reward == ramp_costs(config, -50).bad_reward == 0
    assert ramp_costs(config, 50).repeat_cost == pytest.approx(config.repeat_cost / 2)
    assert ramp_costs(config, 1000) == config


# -- posed pairs -------------------------------------------------------------------------------------------------------

SIZE = (160, 96)  # 240 cells: with memory_mib 1, four chunks of a batch of 2
ALL_TYPES = [
    RewardConfig(reward_type="posfeat", rescale_thr=True),
    RewardConfig(reward_type="fmatrix_legacy"),
    RewardConfig(reward_type="fmatrix", fm_pool="good", fm_scale=300.0),
    RewardConfig(reward_type="fmatrix", fm_pool="matched"),
    RewardConfig(reward_type="fmatrix", fm_pool="matched_good", fm_reduce="median"),
]


class Pairs(NamedTuple):
    """Pairs that are nearly shifts, so that matches exist; the maps and scores have gradients."""

    map0: Tensor
    map1: Tensor
    score0: Tensor
    score1: Tensor
    fundamental: Tensor

    def draws(self, bias: float = 0.5) -> tuple[Proposals, Proposals]:
        count = len(self.map0)
        score0, score1 = self.score0, self.score1
        return tuple(  # type: ignore[return-value]
            propose_keypoints(score, 8, 1.0, bias, [generator(10 * k + i) for i in range(count)])
            for k, score in enumerate((score0, score1))
        )

    def loss(self, config: KeypointLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
        draws = [generator(100 + i) for i in range(len(self.map0))]
        maps = (self.map0, self.map1)
        return epipolar_keypoint_loss(
            *maps, *self.draws(), self.fundamental, SIZE, config, temperature=20.0, generator=draws
        )

    def part(self, first: int, last: int) -> Pairs:
        return Pairs(*(tensor[first:last] for tensor in self))


def posed_pairs(count: int = 2) -> Pairs:
    random = generator(5)
    wide = torch.randn(count, 16, 24, 40, generator=random)
    fundamental = torch.zeros(count, 3, 3)
    fundamental[:, 1, 2], fundamental[:, 2, 1] = -1, 1
    fundamental += 1e-5 * torch.randn(count, 3, 3, generator=random)
    other = wide + 0.2 * torch.randn(wide.shape, generator=random)
    scores = torch.rand(2, count, 1, 96, 160, generator=random) * 2
    tensors = [tensor.clone().requires_grad_() for tensor in (wide, other, scores[0], scores[1])]
    return Pairs(*tensors, fundamental / fundamental.flatten(1).norm(dim=1)[:, None, None])


def full_reinforce(pairs: Pairs, config: KeypointLossConfig) -> tuple[Tensor, Tensor]:
    """The published double sum, and the mean of 1 - the reward of a good match; as one matrix of all points."""
    draw0, draw1 = pairs.draws()
    rule = epipolar_rule(draw0.points, draw1.points, pairs.fundamental, config.reward_config.reward_thr)
    if config.reward_config.rescale_thr:
        rule = rescale_thresholds(rule, 1000)
    good = rule.rows(slice(None))
    logits = 20 * sample_descriptors(pairs.map0, draw0.points) @ sample_descriptors(pairs.map1, draw1.points).mT
    hide0, hide1 = (~draw0.accepted[:, :, None], ~draw1.accepted[:, None])
    if config.match_over == "all":
        hide0, hide1 = torch.zeros_like(hide0), torch.zeros_like(hide1)
    log_p = logits.masked_fill(hide1, -torch.inf).log_softmax(2) + logits.masked_fill(hide0, -torch.inf).log_softmax(1)
    accepted = draw0.accepted[:, :, None] & draw1.accepted[:, None]
    log_p = torch.where(accepted, log_p, 0.0)
    if not config.match_grad:
        log_p = log_p.detach()
    p = torch.where(accepted, log_p.detach().exp() if config.cor_detach else log_p.exp(), 0.0)
    error = _error(p.detach(), good, draw0, draw1, pairs.fundamental, config.reward_config)
    constant = constant_rates(good, config.good_reward, config.bad_reward, config.kp_penalty)
    rates, e = error_rates(error, constant, config.reward_config)
    reward = torch.where(good, rates.good[:, None, None], rates.bad[:, None, None])
    total = (reward * p * (log_p + draw0.log_prob[:, :, None] + draw1.log_prob[:, None])).sum()
    for draw in (draw0, draw1):
        total = total + (rates.penalty[:, None] * draw.accepted * draw.log_prob).sum()
    return -total / draw0.log_prob.numel(), e


def _error(
    p: Tensor, good: Tensor, draw0: Proposals, draw1: Proposals, fundamental: Tensor, config: RewardConfig
) -> MatrixError:
    """From the list of all matches of the pool, pair by pair."""
    values = []
    for b in range(len(p)):
        nearest0, nearest1 = p[b].argmax(1), p[b].argmax(0)
        own = torch.arange(len(nearest0))
        mutual = torch.zeros_like(good[b])
        mutual[own, nearest0] = (nearest1[nearest0] == own) & (p[b].amax(1) > 0)
        legacy = config.reward_type == "fmatrix_legacy"
        pool = "good" if legacy else config.fm_pool
        listed = torch.nonzero({"good": good[b], "matched": mutual, "matched_good": mutual & good[b]}[pool])
        assert len(listed) >= 8
        trials = 1 if legacy else config.fm_trials
        ranks = draw_distinct(torch.tensor([len(listed)]), trials, generator(1234 if legacy else 100 + b))
        first, second = draw0.points[b, listed[ranks][..., 0]], draw1.points[b, listed[ranks][..., 1]]
        if legacy:
            values.append(legacy_error(first[:, 0], second[:, 0], fundamental[b : b + 1]))
        else:
            values.append(fundamental_error(first, second, fundamental[b : b + 1], SIZE, config.fm_reduce))
    known = torch.tensor([config.reward_type != "posfeat"]).expand(len(p))
    return MatrixError(torch.cat(values), known)


@pytest.mark.parametrize("match_over", ["all", "accepted"])
@pytest.mark.parametrize("reward", ALL_TYPES, ids=lambda r: f"{r.reward_type}-{r.fm_pool}")
def test_posed_surrogate_gradient_is_that_of_the_full_sum(reward: RewardConfig, match_over: str) -> None:
    """Acceptance test 8, for each kind of reward, computed in chunks."""
    config = KeypointLossConfig(reward_config=reward, match_over=match_over, memory_mib=1)  # type: ignore[arg-type]
    pairs = posed_pairs()
    loss, values = pairs.loss(config)
    full, e = full_reinforce(pairs, config)
    scores = (pairs.score0, pairs.score1)
    for own, expected in zip(torch.autograd.grad(loss, scores), torch.autograd.grad(full, scores), strict=True):
        assert expected.abs().max() > 2e-6
        torch.testing.assert_close(own, expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-3)
    assert float(values.get("fm_error", 0.0)) == pytest.approx(float(e.mean()), rel=1e-3)


@pytest.mark.parametrize("match_over", ["all", "accepted"])
@pytest.mark.parametrize("cor_detach", [True, False])
def test_match_grad_reaches_the_descriptors(cor_detach: bool, match_over: str) -> None:
    reward = RewardConfig(reward_type="posfeat")
    config = KeypointLossConfig(
        reward_config=reward,
        match_grad=True,
        cor_detach=cor_detach,
        match_over=match_over,
        memory_mib=1,  # type: ignore[arg-type]
    )
    pairs = posed_pairs()
    tensors = pairs[:4]
    own = torch.autograd.grad(pairs.loss(config)[0], tensors)
    expected = torch.autograd.grad(full_reinforce(pairs, config)[0], tensors)
    for gradient, truth in zip(own, expected, strict=True):
        torch.testing.assert_close(gradient, truth, atol=1e-5 * float(truth.abs().max()), rtol=1e-3)
    without, _ = pairs.loss(KeypointLossConfig(reward_config=reward))
    assert torch.autograd.grad(without, pairs.map0, allow_unused=True)[0] is None


@pytest.mark.parametrize("match_grad", [False, True])
def test_no_matrix_of_points_is_kept_for_the_backward_pass(match_grad: bool) -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pairs = posed_pairs()
    draws = pairs.draws()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        config = KeypointLossConfig(match_grad=match_grad, memory_mib=1)
        epipolar_keypoint_loss(*pairs[:2], *draws, pairs.fundamental, SIZE, config, generator=generator())
    assert 0 < max(kept.values()) < 2 * 240 * 240 * 4 / 2


@pytest.mark.parametrize("reward", [ALL_TYPES[0], ALL_TYPES[2], ALL_TYPES[3]], ids=lambda r: r.fm_pool)
def test_parts_of_a_batch_have_the_mean_of_the_whole(reward: RewardConfig) -> None:
    """What two processes compute is what one does, for rewards by pair."""
    pairs = posed_pairs(4)
    config = KeypointLossConfig(reward_config=reward)
    draws = pairs.draws()
    loss = _loss_of(pairs, draws, config, 0, 4)
    halves = (_loss_of(pairs, draws, config, 0, 2) + _loss_of(pairs, draws, config, 2, 4)) / 2
    torch.testing.assert_close(halves, loss)
    (whole,), (parts,) = (torch.autograd.grad(value, pairs.score0, retain_graph=True) for value in (loss, halves))
    torch.testing.assert_close(parts, whole)


def _loss_of(
    pairs: Pairs, draws: tuple[Proposals, Proposals], config: KeypointLossConfig, first: int, last: int
) -> Tensor:
    part = pairs.part(first, last)
    own = [Proposals(*(tensor[first:last] for tensor in draw)) for draw in draws]
    generators = [generator(i) for i in range(first, last)]
    loss, _ = epipolar_keypoint_loss(part.map0, part.map1, *own, part.fundamental, SIZE, config, generator=generators)
    return loss


@pytest.mark.parametrize("what", ["map0", "fundamental", "zero"])
@pytest.mark.parametrize("reward", ALL_TYPES, ids=lambda r: f"{r.reward_type}-{r.fm_pool}")
def test_a_pair_that_is_not_finite_is_counted_and_left_out(reward: RewardConfig, what: str) -> None:
    pairs = posed_pairs()
    broken = {name: tensor.detach().clone() for name, tensor in pairs._asdict().items()}
    if what == "zero":
        broken["fundamental"][1] = 0
    else:
        broken[what][1, 0, 0] = torch.nan
    damaged = Pairs(**{name: tensor.requires_grad_(name != "fundamental") for name, tensor in broken.items()})
    loss, values = damaged.loss(KeypointLossConfig(reward_config=reward, match_grad=True))
    gradients = torch.autograd.grad(loss, damaged[:4])
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[1] == 0).all() and (gradient[0] != 0).any() for gradient in gradients)
    assert float(values["unusable_pairs"]) == 0.5
    assert all(value.isfinite() for value in values.values())


def test_scores_that_are_not_finite_are_counted_and_never_accepted() -> None:
    pairs = posed_pairs()
    score0 = pairs.score0.detach().clone()
    score0[0, 0, :8, :16] = torch.nan  # two cells
    score0[1, 0, 20, 20] = torch.inf
    damaged = pairs._replace(score0=score0.requires_grad_())
    loss, values = damaged.loss(KeypointLossConfig())
    (gradient,) = torch.autograd.grad(loss, score0)
    assert gradient.isfinite().all() and (gradient[0, 0, :8, :16] == 0).all() and (gradient != 0).any()
    assert float(values["non_finite_cells"]) == pytest.approx(3 / (4 * 240))
    draw0, _ = damaged.draws()
    assert not draw0.accepted[~draw0.finite].any() and (~draw0.finite).sum() == 3


@pytest.mark.parametrize("reward", ALL_TYPES, ids=lambda r: f"{r.reward_type}-{r.fm_pool}")
@pytest.mark.parametrize("match_over", ["all", "accepted"])
def test_without_accepted_points_there_is_no_loss(reward: RewardConfig, match_over: str) -> None:
    pairs = posed_pairs()
    config = KeypointLossConfig(reward_config=reward, match_grad=True, match_over=match_over)  # type: ignore[arg-type]
    draws = [draw._replace(accepted=torch.zeros_like(draw.accepted)) for draw in pairs.draws()]
    loss, values = epipolar_keypoint_loss(*pairs[:2], *draws, pairs.fundamental, SIZE, config, generator=generator())
    assert float(loss.detach()) == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, pairs[:4]))
    if reward.reward_type == "fmatrix":
        assert float(values["fm_unknown"]) == (0.0 if reward.fm_pool == "good" else 1.0)


def test_ascending_the_reward_moves_points_to_where_they_match() -> None:
    """Scores learn to choose, in each cell, the row that the other view chooses, too."""
    pairs = posed_pairs(1)
    scores = [torch.zeros(1, 1, 96, 160).requires_grad_() for _ in range(2)]
    optimiser = torch.optim.Adam(scores, lr=0.2)
    config = KeypointLossConfig(reward_config=RewardConfig(reward_type="posfeat"))
    history = []
    for step in range(80):
        draws = [propose_keypoints(score, 8, 1.0, 0.0, generator(2 * step + k)) for k, score in enumerate(scores)]
        loss, values = epipolar_keypoint_loss(
            *(m.detach() for m in pairs[:2]), *draws, pairs.fundamental, SIZE, config, generator=generator(step)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(float(values["expected_matches"]))
    assert sum(history[-10:]) > 1.5 * sum(history[:10])
