"""Draws of points: where they fall, and the probabilities that they report."""

from __future__ import annotations

import torch

from scfeat_core.training.sampling import draw_uniform, keypoint_probability, propose_keypoints


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_uniform_draw_has_one_point_in_each_cell() -> None:
    points = draw_uniform((40, 64), 3, 8, generator())
    cells = (points // 8).long()
    assert points.shape == (3, 40, 2)
    assert (cells[..., 1] * 8 + cells[..., 0] == torch.arange(40)).all()


def test_draws_follow_the_probability_they_report() -> None:
    scores = torch.rand(1, 1, 8, 8, generator=generator(1)) * 2
    probability = keypoint_probability(scores, 8, 2.0, 0.5)[0, 0]
    draws = propose_keypoints(scores.expand(20_000, -1, -1, -1), 8, 2.0, 0.5, generator(2))
    taken = draws.points[draws.accepted].long()
    counts = torch.bincount(taken[:, 1] * 8 + taken[:, 0], minlength=64).view(8, 8) / 20_000
    assert (counts - probability).abs().max() < 0.006
    accepted = draws.log_prob[draws.accepted].exp()
    torch.testing.assert_close(accepted, probability[taken[:, 1], taken[:, 0]], atol=1e-6, rtol=1e-4)
