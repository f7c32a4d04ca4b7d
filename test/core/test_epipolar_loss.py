"""Line-to-window search and its loss against reference values, hand computation, and the same pairs in other pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.geometry import (
    denormalise_points,
    epipolar_lines,
    fundamental_from_pose,
    line_distance,
    normalise_points,
    sample_map,
)
from scfeat_core.training.epipolar_loss import (
    EpipolarLossConfig,
    EpipolarTerms,
    Found,
    LineSearchConfig,
    LineToWindowConfig,
    epipolar_terms,
    expected_in_window,
    jitter_centres,
    search_lines,
    weighted_distance,
)
from scfeat_core.training.sampling import draw_uniform, sample_descriptors

SIZE = (128, 96)
K = torch.tensor([[120.0, 0, 63.5], [0, 120, 47.5], [0, 0, 1]], dtype=torch.float64)


def sine_map() -> Tensor:
    """The map of acceptance test 4, 8x30x40."""
    c, y, x = np.mgrid[:8, :30, :40]
    return F.normalize(torch.from_numpy(np.sin(0.8 * c + 0.31 * y + 0.17 * x)).float()[None], dim=1)


def search(line_step: int = 100, *, use_nn: bool = True, loc_rand: bool = True, **changes: float) -> LineToWindowConfig:
    lines = LineSearchConfig(line_step=line_step, use_nn=use_nn, loc_rand=loc_rand)
    return LineToWindowConfig(line_search_config=lines, **changes)  # type: ignore[arg-type]


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Maps with gradient, points and F of ``count`` pairs of SIZE."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, count, 16, 8, 10, generator=random)
    map0, map1 = (F.interpolate(m, (24, 32), mode="bilinear").requires_grad_() for m in coarse)
    points0, points1 = (draw_uniform((96, 128), count, 8, random) for _ in range(2))
    turn = torch.linspace(-0.2, 0.2, count, dtype=torch.float64)
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    rotation = torch.stack((turn.cos(), zero, turn.sin(), zero, one, zero, -turn.sin(), zero, turn.cos()), -1)
    fundamental = fundamental_from_pose(K, K, rotation.view(-1, 3, 3), torch.stack((one, 0.3 * one, 0.1 * one), -1))
    return map0, map1, points0, points1, fundamental.float()


# -- reference values --------------------------------------------------------------------------------------------------


def test_window_of_the_specification() -> None:
    """Acceptance test 4: 12 places, their expectation and spread."""
    target, size = sine_map(), (160, 120)
    query = target[:, :, 10, 12][:, None]
    centre = denormalise_points(torch.tensor([[[-0.4, -0.3]]]), size)
    position, spread = expected_in_window(query, 60 * target, centre, size, search(), "legacy")
    np.testing.assert_allclose(normalise_points(position, size)[0, 0], [-0.398717, -0.282269], atol=1e-6)
    assert float(spread) == pytest.approx(0.116798, abs=1e-6)


def test_line_search_of_the_specification() -> None:
    """Acceptance test 5: the best of 100 places along two lines."""
    target, size = sine_map(), (160, 120)
    query = target[:, :, 10, 12][:, None].expand(-1, 2, -1)
    fundamental = torch.tensor([[[0, 2e-5, -1e-3], [-1e-5, 0, -1], [2e-3, 1, 0]]])
    lines = epipolar_lines(torch.tensor([[[33.0, 41], [100, 20]]]), fundamental)
    centres, valid = search_lines(query, 60 * target, lines, size, search(), "legacy")
    assert valid.all()
    expected = [[-0.373737, -0.310193], [0.131313, -0.661749]]
    np.testing.assert_allclose(normalise_points(centres, size)[0], expected, atol=2e-6)


def test_weighted_distance_of_the_specification() -> None:
    """Acceptance test 6: one point beyond the threshold, one not valid."""
    fundamental = torch.tensor([[[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]])
    points0, points1 = (
        torch.tensor([[[100.0, 100], [200, 50], [300, 400]]]),
        torch.tensor([[[120.0, 90], [10, 20], [50, 60]]]),
    )
    found0 = Found(
        torch.tensor([[[110.0, 103], [190, 48], [310, 460]]]),
        torch.tensor([[0.01, 0.02, 0.04]]),
        torch.tensor([[True, True, True]]),
    )
    found1 = Found(
        torch.tensor([[[118.0, 95], [14, 20], [60, 58]]]),
        torch.tensor([[0.05, 0.02, 0.01]]),
        torch.tensor([[True, True, False]]),
    )
    config = EpipolarLossConfig()
    window0 = weighted_distance(found0, epipolar_lines(points0, fundamental), 0.1 * 480, config)
    window1 = weighted_distance(found1, epipolar_lines(points1, fundamental.mT), 0.1 * 480, config)
    terms = EpipolarTerms(window0, window1, window0, window1, points=6)
    assert float(window0.mean) == pytest.approx(2.666667, abs=1e-6)
    assert float(window1.mean) == pytest.approx(1.428571, abs=1e-6)
    assert float(terms.loss(config)) == pytest.approx(4.095238, abs=1e-6)
    assert float(terms.values()["percent_w"]) == pytest.approx(0.6667, abs=1e-4)
    unweighted = weighted_distance(
        found0, epipolar_lines(points0, fundamental), 48, EpipolarLossConfig(0.5, 0.1, False)
    )
    assert float(unweighted.mean) == pytest.approx(2.5)


# -- search ------------------------------------------------------------------------------------------------------------


def test_equal_places_on_a_line_give_the_first_of_them() -> None:
    """Adding up tied places, as published, leaves the image."""
    query, target = torch.ones(1, 1, 4) / 2, torch.zeros(1, 4, 24, 32)
    for alignment in ("exact", "legacy"):
        line = torch.tensor([[[0.0, 1, -40]]])
        centre, valid = search_lines(query, target, line, SIZE, search(), alignment)  # type: ignore[arg-type]
        assert valid.all()
        torch.testing.assert_close(centre, torch.tensor([[[0.0, 40]]]))


def test_expectation_on_a_line_of_equal_places_is_its_middle() -> None:
    query, target = torch.ones(1, 1, 4) / 2, torch.ones(1, 4, 24, 32) * 30
    centre, _ = search_lines(query, target, torch.tensor([[[0.0, 1, -40]]]), SIZE, search(use_nn=False))
    torch.testing.assert_close(centre, torch.tensor([[[63.5, 40]]]))


def test_windows_move_within_their_reach_and_are_invalid_outside_of_the_image() -> None:
    centres = torch.tensor([64.0, 48]).expand(1, 4000, 2)
    valid = torch.ones(1, 4000, dtype=torch.bool)
    moved, still = jitter_centres(centres, valid, SIZE, 0.2, torch.Generator().manual_seed(0))
    reach = 0.707 * 0.2 * torch.tensor([127.0, 95]) / 2
    offset = (moved - centres).abs()[0]
    assert still.all() and (offset <= reach).all() and (offset.amax(0) > 0.99 * reach).all()
    moved, still = jitter_centres(torch.zeros(1, 4000, 2), valid, SIZE, 0.2, torch.Generator().manual_seed(0))
    assert float(still.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert (moved >= 0).all()


def test_an_exact_window_at_the_border_expects_nothing_outside() -> None:
    query, target = torch.ones(1, 1, 4) / 2, torch.zeros(1, 4, 24, 32)
    corner = torch.zeros(1, 1, 2)
    exact, _ = expected_in_window(query, target, corner, SIZE, search(window_size=0.5))
    legacy, _ = expected_in_window(query, target, corner, SIZE, search(window_size=0.5), "legacy")
    np.testing.assert_allclose(exact[0, 0], [8 / 30 * 63.5, 6 / 22 * 47.5], rtol=1e-5)
    np.testing.assert_allclose(legacy, 0, atol=1e-5)


def test_a_denser_window_finds_places_better() -> None:
    """Of points that moved by half a cell."""
    random = torch.Generator().manual_seed(1)
    wide = F.interpolate(torch.randn(1, 32, 13, 17, generator=random), (104, 136), mode="bicubic")
    map0, map1 = wide[..., 8:56:2, 8:72:2], wide[..., 9:57:2, 9:73:2]  # view 1 is half a cell, 2 pixels, farther on
    points0 = draw_uniform((48, 80), 1, 8, random) + torch.tensor([24.0, 24.0])
    query, target = sample_descriptors(map0, points0), 60 * F.normalize(map1, dim=1)
    errors = []
    for density in (1.0, 2.0, 4.0):
        position, _ = expected_in_window(query, target, points0, SIZE, search(window_size=0.2, window_density=density))
        errors.append(float((position - points0 + 2).norm(dim=-1).median()))
    assert errors[1] < 0.75 * errors[0] and errors[2] < 1


@pytest.mark.parametrize("alignment", ["exact", "legacy"])
def test_a_shifted_map_is_found_where_it_is(alignment: str) -> None:
    """Both conventions agree for a translation of whole cells. Without a systematic error."""
    random = torch.Generator().manual_seed(1)
    wide = F.interpolate(torch.randn(1, 32, 13, 17, generator=random), (52, 68), mode="bicubic")
    map0, map1 = wide[..., 4:28, 4:36], wide[..., 4:28, 8:40]  # content of view 1 lies 4 cells farther to the left
    points0 = draw_uniform((48, 80), 1, 8, random) + torch.tensor([32.0, 24.0])
    fundamental = torch.tensor([[[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]])
    config = search(loc_rand=False, window_size=0.25)
    query = sample_descriptors(map0, points0, alignment)  # type: ignore[arg-type]
    target = 60 * F.normalize(map1, dim=1)
    centres, valid = search_lines(query, target, epipolar_lines(points0, fundamental), SIZE, config, alignment)  # type: ignore[arg-type]
    position, _ = expected_in_window(query, target, centres, SIZE, config, alignment)  # type: ignore[arg-type]
    error = position - points0 + torch.tensor([16.0, 0])
    assert valid.all() and error.norm(dim=-1).max() < 5.0  # the window has places every 4.5 pixels
    assert error.mean(1).abs().max() < 0.5


# -- loss --------------------------------------------------------------------------------------------------------------


def terms_of(
    data: tuple[Tensor, ...],
    config: LineToWindowConfig,
    loss: EpipolarLossConfig,
    first: int = 0,
    alignment: str = "exact",
) -> EpipolarTerms:
    generators = [torch.Generator().manual_seed(first + i) for i in range(len(data[0]))]
    return epipolar_terms(*data, SIZE, config, loss, temperature=20.0, alignment=alignment, generator=generators)  # type: ignore[arg-type]


def test_the_loss_is_that_of_its_parts() -> None:
    """One direction against its definition, one point at a time, given the window centres."""
    data = pairs(2)
    map0, map1, points0, _, fundamental = (tensor.detach() for tensor in data)
    config = search(loc_rand=False, window_size=0.3)
    terms = terms_of(data, config, EpipolarLossConfig())
    query, lines = sample_descriptors(map0, points0), epipolar_lines(points0, fundamental)
    target = 20 * F.normalize(map1, dim=1)
    centres, valid = search_lines(query, target, lines, SIZE, config)
    half = torch.tensor([63.5, 47.5], dtype=torch.float64)
    numerator = denominator = 0.0
    for b, i in torch.nonzero(valid).tolist():
        x, y = (torch.linspace(-0.3, 0.3, n, dtype=torch.float64) for n in (9, 7))
        places = torch.cartesian_prod(x, y) * half + centres[b, i]
        places = places[((places >= 0) & (places <= 2 * half)).all(-1)]
        sampled = sample_map(target[b : b + 1].double(), places[None])[0]
        p = (sampled @ query[b, i].double()).softmax(0)
        mean = p @ places
        spread = float((p @ ((places - mean) / half).square()).sqrt().sum())
        distance = float(line_distance(mean, lines[b, i].double()))
        if distance < 9.6:
            numerator += distance / spread
            denominator += 1 / spread
    assert float(terms.window0.numerator.detach()) == pytest.approx(numerator, rel=1e-4)
    assert float(terms.window0.denominator) == pytest.approx(denominator, rel=1e-4)


@pytest.mark.parametrize("alignment", ["exact", "legacy"])
def test_gradient_of_the_window_branch(alignment: str) -> None:
    """Against finite differences, for fixed windows; the weights of the points are constants by definition."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(1, 3, 4, generator=random, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 4, 6, 8, generator=random, dtype=torch.float64, requires_grad=True)
    centres = torch.rand(1, 3, 2, generator=random, dtype=torch.float64) * 20
    lines = torch.randn(1, 3, 3, generator=random, dtype=torch.float64)
    config = EpipolarLossConfig(use_std_as_weight=False)

    def loss(query: Tensor, target: Tensor) -> Tensor:
        found = expected_in_window(query, target, centres, (32, 24), search(window_size=0.5), alignment)  # type: ignore[arg-type]
        valid = torch.ones(1, 3, dtype=torch.bool)
        return weighted_distance(Found(*found, valid), lines, 1000.0, config).mean

    assert torch.autograd.gradcheck(loss, (query, target))


def test_gradient_of_the_coarse_branch() -> None:
    data = pairs(1)
    loss = EpipolarLossConfig(use_std_as_weight=False, weight_grid=1.0, weight_window=0.0)

    def value(map1: Tensor) -> Tensor:
        return terms_of((data[0], map1, *data[2:]), search(), loss).loss(loss)

    (gradient,) = torch.autograd.grad(value(data[1]), data[1])
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(data[1] + step) - value(data[1] - step)) / 2e-3
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-2)


@pytest.mark.parametrize("alignment", ["exact", "legacy"])
def test_descending_the_loss_brings_matches_onto_their_lines(alignment: str) -> None:
    map0, map1, *rest = pairs(1)
    maps = [map0.detach().requires_grad_(), map1.detach().requires_grad_()]
    optimiser = torch.optim.Adam(maps, lr=0.03)
    loss, config = EpipolarLossConfig(win_cost_thr=0.5), search(window_size=0.2)
    history = []
    for _ in range(25):
        value = terms_of((*maps, *rest), config, loss, alignment=alignment).loss(loss)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        history.append(float(value.detach()))
    assert history[-1] < 0.5 * history[0]


def test_chunks_change_nothing_but_the_memory_that_is_kept() -> None:
    data = pairs(4)
    loss = EpipolarLossConfig()
    whole, kept_whole = _loss_and_kept_bytes(data, search(window_size=0.2, memory_mib=64), loss)
    gradients = torch.autograd.grad(whole, data[:2])
    chunked, kept_chunked = _loss_and_kept_bytes(data, search(window_size=0.2, memory_mib=1), loss)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    for own, expected in zip(torch.autograd.grad(chunked, data[:2]), gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-6)
    correlations = 2 * 4 * data[2].shape[1] * 24 * 32 * 4
    assert kept_whole > correlations and kept_chunked < correlations / 2


def _loss_and_kept_bytes(
    data: tuple[Tensor, ...], config: LineToWindowConfig, loss: EpipolarLossConfig
) -> tuple[Tensor, int]:
    """What autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = terms_of(data, config, loss).loss(loss)
    return value, sum(kept.values())


@pytest.mark.parametrize("weight_grid", [0.0, 0.5])
def test_parts_of_a_batch_add_up_to_the_whole(weight_grid: float) -> None:
    """What two processes compute, with the denominators summed, is the loss and the gradient of one."""
    data = pairs(4)
    loss, config = EpipolarLossConfig(weight_grid=weight_grid), search(window_size=0.2)
    whole = terms_of(data, config, loss)
    gradients = torch.autograd.grad(whole.loss(loss), data[:2])
    halves = [terms_of(tuple(tensor[i : i + 2] for tensor in data), config, loss, i) for i in (0, 2)]
    value = torch.zeros((), dtype=torch.float64)
    weights = (weight_grid, weight_grid, 1, 1)
    for k, weight in enumerate(weights):
        denominator = sum(half[k].denominator for half in halves)  # type: ignore[union-attr]
        value = value + weight * sum(half[k].numerator for half in halves) / max(denominator, 1e-30)  # type: ignore[union-attr]
    torch.testing.assert_close(value, whole.loss(loss), rtol=1e-6, atol=0)
    for own, expected in zip(torch.autograd.grad(value, data[:2]), gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("what", "value"), [(0, torch.nan), (1, torch.inf), (4, torch.nan), (4, 0.0)])
def test_a_pair_that_is_not_finite_counts_for_nothing(what: int, value: float) -> None:
    data = pairs(2)
    loss, config = EpipolarLossConfig(weight_grid=0.5), search(window_size=0.2)
    alone = terms_of(tuple(tensor[:1] for tensor in data), config, loss)
    broken = [tensor.detach().clone() for tensor in data]
    broken[what][1].view(-1)[: 9 if what == 4 else 1] = value
    maps = [tensor.requires_grad_() for tensor in broken[:2]]
    terms = terms_of((*maps, *broken[2:]), config, loss)
    torch.testing.assert_close(terms.loss(loss), alone.loss(loss), rtol=1e-6, atol=0)
    for gradient in torch.autograd.grad(terms.loss(loss), maps):
        assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_with_no_usable_pair_loss_and_gradient_are_zero() -> None:
    data = pairs(1)
    loss = EpipolarLossConfig()
    value = terms_of((*data[:4], data[4] * torch.nan), search(), loss).loss(loss)
    assert float(value.detach()) == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, data[:2]))


def test_a_feature_without_length_gives_a_finite_gradient() -> None:
    data = pairs(1)
    flat = torch.zeros_like(data[0]).requires_grad_()
    loss = EpipolarLossConfig(win_cost_thr=1.0)
    value = terms_of((flat, *data[1:]), search(), loss).loss(loss)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (flat, data[1])))


def test_temperature_rises_by_epochs_to_its_limit() -> None:
    config = LineToWindowConfig(temperature_base=50, temperature_max=52)
    assert [config.temperature_at(epoch) for epoch in range(4)] == [50, 51, 52, 52]
