"""Draws of points: where they fall, and the probabilities that they report."""

from __future__ import annotations

import pytest
import torch

from scfeat_core.geometry import sample_map
from scfeat_core.training.sampling import (
    draw_numbers,
    draw_uniform,
    keypoint_probability,
    propose_keypoints,
    sample_descriptors,
)


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


def test_draws_of_a_pair_depend_on_its_generator_alone() -> None:
    generators = [generator(i) for i in range(3)]
    points = draw_uniform((40, 64), 3, 8, generators)
    scores = torch.rand(3, 1, 40, 64, generator=generator(9))
    draws = propose_keypoints(scores, 8, 1.0, 0.5, generators)
    own = generator(2)
    assert torch.equal(draw_uniform((40, 64), 1, 8, [own])[0], points[2])
    alone = propose_keypoints(scores[2:], 8, 1.0, 0.5, [own])
    assert all(torch.equal(one[0], all_[2]) for one, all_ in zip(alone, draws, strict=True))
    assert not torch.equal(points[0], points[1])
    with pytest.raises(ValueError):
        draw_numbers((3, 4), [generator()])


def test_a_cell_that_is_not_finite_is_never_accepted() -> None:
    scores = torch.full((1, 1, 8, 24), 9.0)
    scores[0, 0, 3, 3] = torch.nan
    scores[0, 0, 3, 20] = torch.inf
    scores.requires_grad_()
    draws = propose_keypoints(scores, 8, 1.0, 0.0, generator())
    assert draws.finite.tolist() == [[False, True, False]] and draws.accepted.tolist() == [[False, True, False]]
    assert (draws.points // 8)[0, :, 0].tolist() == [0, 1, 2]
    (gradient,) = torch.autograd.grad(draws.log_prob.sum(), scores)
    assert gradient.isfinite().all() and (gradient[..., :8] == 0).all() and (gradient[..., 8:16] != 0).any()


@pytest.mark.parametrize("alignment", ["exact", "legacy"])
def test_descriptors_are_samples_of_unit_length(alignment: str) -> None:
    maps = torch.randn(2, 8, 12, 16, generator=generator())
    points = torch.tensor([[[0.0, 0], [31, 22], [63, 47]]]).expand(2, -1, -1)
    descriptors = sample_descriptors(maps, points, alignment)  # type: ignore[arg-type]
    torch.testing.assert_close(descriptors.norm(dim=-1), torch.ones(2, 3))
    samples = sample_map(maps, points, alignment=alignment)  # type: ignore[arg-type]
    cosine = torch.nn.functional.cosine_similarity(descriptors[:, 1], samples[:, 1])
    torch.testing.assert_close(cosine, torch.ones(2))
