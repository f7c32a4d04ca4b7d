"""Localisation loss: it must measure sub-pixel errors and its gradient must mend them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scfeat_core.geometry import seen
from scfeat_core.training.localisation_loss import LocalisationConfig, localisation_loss

SIZE = 96
CONFIG = LocalisationConfig(weight=1.0, count=30)


def bumps(centres: torch.Tensor) -> torch.Tensor:
    """(1, 1, SIZE, SIZE) scores with a peak of width 1.5 pixels at each centre (N, 2)."""
    y, x = torch.meshgrid(torch.arange(float(SIZE)), torch.arange(float(SIZE)), indexing="ij")
    square = (x - centres[:, 0, None, None]) ** 2 + (y - centres[:, 1, None, None]) ** 2
    return torch.exp(-0.5 * square / 1.5**2).sum(0)[None, None]


def grid_of_points() -> torch.Tensor:
    x, y = torch.meshgrid(torch.arange(12.0, 84, 12), torch.arange(12.0, 60, 12), indexing="xy")
    return torch.stack((x, y), -1).reshape(-1, 2) + 0.3 * torch.rand(24, 2, generator=torch.Generator().manual_seed(0))


def everything() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(1, SIZE, SIZE, dtype=torch.bool)
    return mask, mask


def shift(dx: float) -> torch.Tensor:
    matrix = torch.eye(3)[None].clone()
    matrix[0, 0, 2] = dx
    return matrix


def test_is_the_distance_between_the_views() -> None:
    points = grid_of_points()
    exact, pairs = localisation_loss(
        bumps(points), bumps(points + torch.tensor([7.4, 0.0])), shift(7.4), everything(), CONFIG
    )
    assert pairs == 24
    assert exact < 0.01  # squares of the bias of the quadratic fit
    wrong, _ = localisation_loss(
        bumps(points), bumps(points + torch.tensor([8.4, 0.0])), shift(7.4), everything(), CONFIG
    )
    assert wrong == pytest.approx(0.75, abs=0.1)  # 2 * (1 - 0.25) * 0.5: one pixel, linear beyond half a pixel


def test_a_tenth_of_a_pixel_counts_as_is_said() -> None:
    """Half of ``square_below`` less than the distance, and the square of a smaller one over twice that."""
    points = grid_of_points()
    moved = bumps(points + torch.tensor([0.1, 0.0]))
    linear, squared = (
        localisation_loss(bumps(points), moved, torch.eye(3)[None], everything(), replace(CONFIG, square_below=below))[
            0
        ]
        for below in (0.02, 0.5)
    )
    assert linear == pytest.approx(0.09, abs=0.015)
    assert squared == pytest.approx(0.1**2 / (2 * 0.5), rel=0.25)


def test_gradient_moves_the_peaks_together() -> None:
    points = grid_of_points()
    score0 = bumps(points)
    score1 = bumps(points + torch.tensor([0.35, 0.0])).requires_grad_()
    losses = []
    for _ in range(10):
        loss, _ = localisation_loss(score0, score1, torch.eye(3)[None], everything(), CONFIG)
        (gradient,) = torch.autograd.grad(loss, score1)
        assert torch.isfinite(gradient).all()
        losses.append(float(loss.detach()))
        score1 = (score1 - 2.0 * gradient).detach().requires_grad_()
    assert losses[-1] < 0.5 * losses[0]


def test_hidden_points_and_flat_maps_count_nothing() -> None:
    points = grid_of_points()
    hidden = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    loss, pairs = localisation_loss(bumps(points), bumps(points), torch.eye(3)[None], (hidden, hidden), CONFIG)
    assert loss == 0 and pairs == 0
    flat = torch.zeros(1, 1, SIZE, SIZE, requires_grad=True)
    loss, pairs = localisation_loss(flat, flat, torch.eye(3)[None], everything(), CONFIG)
    loss.backward()
    assert pairs == 0 and torch.isfinite(flat.grad).all()


def test_seen_is_inside_and_visible() -> None:
    visible = torch.ones(1, 4, 6, dtype=torch.bool)
    visible[0, 2, 3] = False
    points = torch.tensor([[[0.0, 0.0], [3.2, 1.8], [5.0, 3.0], [5.1, 3.0], [-0.1, 0.0], [torch.nan, 1.0]]])
    assert seen(points, visible).tolist() == [[True, False, True, False, False, False]]
