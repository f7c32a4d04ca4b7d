"""Rewards by epipolar geometry: which matches are good, and the error of F as it is estimated from matches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scfeat_core.geometry import epipolar_distance, fundamental_from_pose
from scfeat_core.training.rewards import (
    MatrixError,
    RewardConfig,
    constant_rates,
    draw_distinct,
    draw_good,
    draw_matched,
    eight_point,
    epipolar_rule,
    error_rates,
    fundamental_error,
    legacy_error,
    rescale_thresholds,
)

SIZE = (640, 480)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(angles: Tensor) -> Tensor:
    """(B, 3, 3) of rotation vectors (B, 3)."""
    x, y, z = angles.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.linalg.matrix_exp(torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).view(-1, 3, 3))


def synthetic(count: int, points: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points (count, points, 2) that both views show, as an outdoor data set has them, and F."""
    random = np.random.default_rng(seed)
    rows0, rows1, matrices = [], [], []
    while len(rows0) < count:
        f = random.uniform(500, 900)
        k = np.array([[f, 0, 319.5], [0, f, 239.5], [0, 0, 1]])
        r = rotation(torch.tensor(random.normal(0, 0.15, (1, 3))))[0].numpy()
        t = random.normal(0, 1, 3)
        x0 = np.column_stack([random.uniform(0, [639, 479], (20 * points, 2)), np.ones(20 * points)])
        world = (x0 @ np.linalg.inv(k).T) * random.uniform(4, 20, (len(x0), 1))
        moved = (world @ r.T + t) @ k.T
        x1 = moved[:, :2] / moved[:, 2:]
        seen = np.flatnonzero((moved[:, 2] > 0) & (x1 >= 0).all(1) & (x1 <= [639, 479]).all(1))[:points]
        if len(seen) == points:
            rows0.append(x0[seen, :2])
            rows1.append(x1[seen])
            matrices.append(fundamental_from_pose(k, k, r, t))
    clean = torch.tensor(np.stack([rows0, rows1]))
    noisy = clean + noise * torch.tensor(random.normal(0, 1, clean.shape))
    return noisy[0], noisy[1], torch.tensor(np.stack(matrices))


def errors(points0: Tensor, points1: Tensor, fundamental: Tensor, reduce: str = "min", trials: int = 100) -> Tensor:
    counts = torch.full((len(points0),), points0.shape[1])
    chosen = draw_distinct(counts, trials, generator()).flatten(1)[..., None].expand(-1, -1, 2)
    picked = (points.gather(1, chosen).unflatten(1, (trials, 8)) for points in (points0, points1))
    return fundamental_error(*picked, fundamental, SIZE, reduce)


# -- good matches ------------------------------------------------------------------------------------------------------


def test_good_matches_lie_on_the_lines_of_each_other() -> None:
    points0, points1, fundamental = (tensor.float() for tensor in synthetic(2, 40, noise=1.5))
    rule = epipolar_rule(points0, points1, fundamental, 2.0)
    pairs0 = points0[:, :, None].expand(-1, -1, 40, -1).flatten(1, 2).double()
    pairs1 = points1[:, None].expand(-1, 40, -1, -1).flatten(1, 2).double()
    there = epipolar_distance(pairs0, pairs1, fundamental.double()).view(2, 40, 40)
    back = epipolar_distance(pairs1, pairs0, fundamental.mT.double()).view(2, 40, 40)
    expected = (there < 2) & (back < 2)
    good = rule.rows(slice(None))
    assert (good == expected).float().mean() > 0.999 and good.any(2).float().mean() > 0.5
    torch.testing.assert_close(rule.rows(slice(10, 20)), good[:, 10:20])
    index = torch.randint(40, (2, 30), generator=generator())
    torch.testing.assert_close(rule.chosen(index), torch.stack([good[b, index[b]] for b in range(2)]))
    torch.testing.assert_close(
        rule.pairs(index, index.flip(1)), torch.stack([good[b, index[b], index[b].flip(0)] for b in range(2)])
    )
    rescaled = rescale_thresholds(rule, 7)
    means = back.mean((1, 2)), there.mean((1, 2))
    smaller = torch.minimum(*means)
    for own, mean in zip((rescaled.threshold0, rescaled.threshold1), means, strict=True):
        torch.testing.assert_close(own[:, 0, 0], (2 * mean / smaller).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_without_a_fundamental_matrix_no_match_is_good(value: float) -> None:
    points = torch.rand(1, 9, 2, generator=generator()) * 100
    rule = epipolar_rule(points, points, torch.full((1, 3, 3), value), 2.0)
    assert not rule.rows(slice(None)).any()
    assert not rescale_thresholds(rule, 4).rows(slice(None)).any()


# -- draws -------------------------------------------------------------------------------------------------------------


def test_draws_are_distinct_equally_likely_and_differ_between_trials() -> None:
    counts = torch.tensor([8, 10, 4000])
    drawn = draw_distinct(counts, 20_000, generator())
    assert (drawn >= 0).all() and (drawn < counts[:, None, None]).all()
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()
    frequency = torch.bincount(drawn[1].flatten(), minlength=10) / 20_000
    assert (frequency - 0.8).abs().max() < 0.015
    pairs = torch.zeros(10, 10).index_put_((drawn[1, :, 0], drawn[1, :, 7]), torch.tensor(1.0), accumulate=True)
    subsets = (2 ** drawn[1]).sum(-1).unique(return_counts=True)[1]
    assert len(subsets) == 45 and subsets.min() > 0.75 * 20_000 / 45 and pairs.sum() == 20_000
    assert len(drawn[2].unique(dim=0)) == 20_000
    assert drawn[2].max() == 3999 and drawn[2].min() == 0  # the last one can be drawn, too


def test_draws_of_too_few_stay_within_them() -> None:
    drawn = draw_distinct(torch.tensor([0, 3]), 50, generator())
    assert (drawn[0] == 0).all() and (drawn[1] <= 2).all()


def test_draws_of_a_pair_depend_on_its_generator_alone() -> None:
    both = draw_distinct(torch.tensor([50, 90]), 5, [generator(1), generator(2)])
    alone = draw_distinct(torch.tensor([90]), 5, [generator(2)])
    assert torch.equal(both[1:], alone)


def test_drawn_matches_are_of_the_pool() -> None:
    mask = torch.rand(2, 60, generator=generator()) < 0.3
    partner = torch.randint(70, (2, 60), generator=generator(1))
    first, second, counts = draw_matched(mask, partner, 100, generator(2))
    assert counts.tolist() == mask.sum(1).tolist()
    for b in range(2):
        assert mask[b, first[b]].all() and set(first[b].flatten().tolist()) == set(
            torch.nonzero(mask[b])[:, 0].tolist()
        )
        assert torch.equal(second[b], partner[b, first[b]])


def test_drawn_good_pairs_are_good_and_all_can_come() -> None:
    points0, points1, fundamental = (tensor.float() for tensor in synthetic(2, 30, noise=1.0))
    rule = epipolar_rule(points0, points1, fundamental, 2.0)
    good = rule.rows(slice(None))
    first, second, counts = draw_good(rule, good.sum(2), 300, 11, generator())
    assert counts.tolist() == good.sum((1, 2)).tolist() and counts.min() > 20
    for b in range(2):
        drawn = torch.zeros(30, 30, dtype=torch.bool)
        drawn[first[b], second[b]] = True
        assert torch.equal(drawn, good[b])


# -- error of the fundamental matrix -----------------------------------------------------------------------------------


def test_exact_correspondences_have_no_error_whatever_scale_and_sign_of_the_matrix() -> None:
    points0, points1, fundamental = synthetic(10, 30)
    error = errors(points0, points1, fundamental)
    assert error.shape == (10,) and error.max() < 1e-8
    noisy = points1 + torch.randn(points1.shape, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(errors(points0, noisy, -1e-5 * fundamental), errors(points0, noisy, fundamental))


def test_error_tells_clean_matches_from_outliers_from_noise() -> None:
    """The medians of the specification, 5.7."""
    points0, points1, fundamental = synthetic(60, 100, noise=0.7)
    random = torch.rand(points1.shape, generator=generator(), dtype=torch.float64) * torch.tensor([639, 479])
    half = torch.where(torch.arange(100)[:, None] < 50, points1, random)
    medians = [float(errors(points0, second, fundamental).median()) for second in (points1, half, random)]
    assert medians[0] < 1e-3 < 0.01 < medians[1] < 0.2 < medians[2] < 0.6
    trial = float(errors(points0, points1, fundamental, "median").median())
    assert medians[0] < trial < 0.2


def test_eight_points_give_the_matrix_of_the_specification() -> None:
    """Geometry check of acceptance test 9, from projections."""
    k = torch.tensor([[600, 0, 319.5], [0, 600, 239.5], [0, 0, 1]], dtype=torch.float64)
    world = torch.rand(8, 3, generator=generator(), dtype=torch.float64) * 4 + torch.tensor([-2.0, -2, 4])
    r = rotation(torch.tensor([[0, np.radians(10), 0]]))[0]
    moved = world @ r.T + torch.tensor([1, 0.1, 0.2], dtype=torch.float64)
    points0, points1 = ((p @ k.T)[:, :2] / p[:, 2:] for p in (world, moved))
    matrix = eight_point(points0, points1)
    expected = [
        [8.104498e-06, 9.334389e-05, -5.252298e-02],
        [-1.729708e-04, 0, 0.3213161],
        [6.641485e-02, -0.3098550, 1],
    ]
    np.testing.assert_allclose(matrix / matrix[2, 2], expected, rtol=1e-5, atol=1e-9)


def test_degenerate_points_give_a_finite_error() -> None:
    same = torch.zeros(1, 4, 8, 2)
    error = fundamental_error(same, same, torch.eye(3)[None], SIZE)
    assert 0 <= float(error) <= 1
    assert not fundamental_error(same, same, torch.full((1, 3, 3), torch.nan), SIZE).isfinite().any()


def test_legacy_error_is_as_published() -> None:
    """Against numpy, and of the size that makes it useless: 1e-7 for true matches."""
    points0, points1, fundamental = synthetic(25, 8, noise=0.5)
    error = legacy_error(points0, points1, fundamental)
    for b in range(3):
        one = np.column_stack([points0[b].numpy(), np.ones(8)])
        two = np.column_stack([points1[b].numpy(), np.ones(8)])
        design = np.stack([np.outer(y, x).ravel() for x, y in zip(one, two, strict=True)])
        u, s, v = np.linalg.svd(np.linalg.svd(design)[2][-1].reshape(3, 3))
        estimate = u @ np.diag([s[0], s[1], 0]) @ v
        difference = np.abs(estimate / estimate[2, 2] - (fundamental[b] / (fundamental[b, 2, 2] + 1e-10)).numpy())
        expected = np.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
        assert float(error[b]) == pytest.approx(expected, rel=1e-4)
    assert float(legacy_error(*synthetic(25, 8)[:2], synthetic(25, 8)[2]).median()) < 1e-6
    assert float(error.median()) < 1e-2


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rates_by_error_and_their_fallback() -> None:
    error = MatrixError(torch.tensor([0.2, 0.4, 9.0], dtype=torch.float64), torch.tensor([True, True, False]))
    constant = constant_rates(error.value, 1.0, -0.25, -0.001)
    rates, e = error_rates(error, constant, RewardConfig(reward_type="fmatrix", fm_scale=3.0))
    tanh = np.tanh([0.6, 1.2])
    np.testing.assert_allclose(rates.good, [*(1 - tanh), 1], rtol=1e-6)
    np.testing.assert_allclose(rates.bad, [*(-tanh), -0.25], rtol=1e-6)
    np.testing.assert_allclose(rates.penalty, [*(-0.001 * tanh), -0.001], rtol=1e-6)
    np.testing.assert_allclose(e, [*tanh, 0], rtol=1e-6)


def test_the_legacy_error_is_one_of_the_batch() -> None:
    error = MatrixError(torch.tensor([0.2, 0.4, 9.0], dtype=torch.float64), torch.tensor([True, True, False]))
    constant = constant_rates(error.value, 1.0, -0.25, -0.001)
    config = RewardConfig(reward_type="fmatrix_legacy")
    rates, _ = error_rates(error, constant, config)
    np.testing.assert_allclose(rates.bad, [-np.tanh(0.6)] * 3, rtol=1e-6)
    none, _ = error_rates(MatrixError(error.value, torch.zeros(3, dtype=torch.bool)), constant, config)
    assert none.good.tolist() == [1, 1, 1] and none.bad.tolist() == [-0.25] * 3
