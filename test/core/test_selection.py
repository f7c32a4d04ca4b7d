from __future__ import annotations

import numpy as np
import pytest
import torch

from scfeat_core import selection
from scfeat_core.errors import ConfigError
from scfeat_core.selection import local_maxima, refined_positions, select_keypoints, select_padded

ALL = {"max_keypoints": 0, "border": 0}


def random_map(height: int = 40, width: int = 50, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(seed))


def maxima_by_definition(scores: np.ndarray, radius: int) -> np.ndarray:
    """A pixel is kept where it is the first arg-max of its own window; padding never wins."""
    height, width = scores.shape
    padded = np.pad(scores, radius, constant_values=-np.inf)
    side = 2 * radius + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side)).reshape(height, width, -1)
    return windows.argmax(-1) == side * side // 2


def reference_map() -> torch.Tensor:
    scores = torch.full((1, 1, 32, 32), 0.1)
    scores[0, 0, 5, 6], scores[0, 0, 5, 7], scores[0, 0, 6, 6] = 2.0, 1.0, 0.5
    return scores


def test_reference_example_of_the_specification():
    """Acceptance test 7: position and score of 6.2, and only the survivor is returned."""
    ((xy, scores),) = select_keypoints(reference_map(), nms_radius=1, border=1, threshold=1.0, refinement="centroid3")
    np.testing.assert_allclose(xy, [[6.219512, 5.097561]], atol=1e-6)
    assert scores.tolist() == [2.0]


@pytest.mark.parametrize("radius", [1, 2, 3, 5])
@pytest.mark.parametrize("levels", [0, 3, 12])
def test_suppression_is_the_arg_max_of_the_window(radius, levels):
    """Also next to the border, where reflect padding loses maxima, and with many ties."""
    scores = random_map(seed=radius)
    if levels:
        scores = (scores * levels).floor()
    expected = maxima_by_definition(scores[0, 0].numpy(), radius)
    np.testing.assert_array_equal(local_maxima(scores[:, 0], radius)[0], expected)


def test_a_plateau_yields_its_first_pixel():
    scores = torch.zeros(1, 1, 20, 20)
    scores[0, 0, 7:10, 5:12] = 1.0
    ((xy, values),) = select_keypoints(scores, nms_radius=2, border=2, threshold=0.5, refinement="none")
    assert xy.tolist() == [[5, 7]] and values.tolist() == [1]


def test_a_constant_map_and_nan_do_no_harm():
    scores = torch.full((1, 1, 20, 20), 0.5)
    ((xy, _),) = select_keypoints(scores, border=4)
    assert len(xy) == 0  # the one maximum of a constant map is its first pixel, in the border
    scores = random_map()
    scores[0, 0, 10:20] = torch.nan
    ((xy, values),) = select_keypoints(scores, border=0)
    assert len(xy) and xy.isfinite().all() and values.isfinite().all()


def test_order_is_by_score_then_by_index_also_at_the_cut():
    scores = torch.zeros(1, 1, 30, 30)
    places = [(25, 4), (4, 25), (4, 4), (15, 15), (25, 25)]
    for y, x in places:
        scores[0, 0, y, x] = 1.0
    scores[0, 0, 10, 10] = 2.0
    ((xy, values),) = select_keypoints(scores, max_keypoints=4, border=1, threshold=0.5, refinement="none")
    assert xy.tolist() == [[10, 10], [4, 4], [25, 4], [15, 15]]
    assert values.tolist() == [2, 1, 1, 1]


def test_many_ties_are_in_reading_order():
    scores = (random_map(200, 300, batch=2, seed=8) * 20).floor()
    for image, (xy, values) in enumerate(select_keypoints(scores, nms_radius=1, refinement="none", **ALL)):
        index = (xy[:, 1] * 300 + xy[:, 0]).numpy()
        assert len(index) > 1000 and len(values.unique()) < 20
        np.testing.assert_array_equal(np.lexsort((index, -values.numpy())), np.arange(len(index)))
        assert torch.equal(scores[image, 0].flatten()[index.astype(int)], values)


def test_top_k_is_a_prefix_and_descending():
    scores = random_map(60, 80)
    ((xy_all, values_all),) = select_keypoints(scores, **ALL)
    ((xy, values),) = select_keypoints(scores, max_keypoints=50, border=0)
    assert len(xy_all) > 100 and len(xy) == 50
    assert torch.equal(xy, xy_all[:50]) and torch.equal(values, values_all[:50])
    assert (values_all.diff() <= 0).all()


@pytest.mark.parametrize("mode", ["abs", "mean", "max"])
def test_threshold_modes(mode):
    scores = random_map(seed=3) * 4
    reference = {"abs": 1.0, "mean": scores.mean().item(), "max": scores.max().item()}[mode]
    threshold = {"abs": 3.9, "mean": 1.9, "max": 0.97}[mode]
    ((_, everything),) = select_keypoints(scores, **ALL)
    ((_, values),) = select_keypoints(scores, threshold=threshold, threshold_mode=mode, **ALL)
    assert 0 < len(values) < len(everything)
    assert torch.equal(values, everything[everything > threshold * reference])


def test_border_and_mask_remove_points_but_make_none():
    scores = random_map(48, 64, batch=2)
    plain = select_keypoints(scores, border=0, max_keypoints=0, refinement="none")
    mask = torch.zeros(48, 64, dtype=torch.uint8)
    mask[10:30, 20:50] = 255
    for given in (mask, mask.bool(), mask.expand(2, -1, -1)):
        masked = select_keypoints(scores, border=4, max_keypoints=0, refinement="none", mask=given)
        for (xy, values), (all_xy, all_values) in zip(masked, plain, strict=True):
            x, y = all_xy.long().unbind(-1)
            expected = mask[y, x].bool()
            assert torch.equal(xy, all_xy[expected]) and torch.equal(values, all_values[expected])
    ((xy, _),) = select_keypoints(scores[:1], border=4, max_keypoints=0, refinement="none")
    assert xy.min() >= 4 and xy[:, 0].max() < 60 and xy[:, 1].max() < 44


@pytest.mark.parametrize("mode", ["abs", "mean", "max"])
@pytest.mark.parametrize("refinement", ["none", "quadratic", "softargmax"])
def test_padding_never_counts(mode, refinement):
    """Whatever the padding holds, the result is that of the image alone."""
    settings = {"threshold": 0.5, "threshold_mode": mode, "refinement": refinement}
    scores = random_map(33, 45)
    padded = torch.full((1, 1, 48, 48), 9.0)
    padded[..., :33, :45] = scores
    before = padded.clone()
    ((xy, values),) = select_keypoints(padded, valid_size=(45, 33), **settings)
    ((expected_xy, expected_values),) = select_keypoints(scores, **settings)
    assert len(xy) and torch.equal(values, expected_values)
    torch.testing.assert_close(xy, expected_xy)
    assert torch.equal(padded, before), "the caller's map was changed"


def test_batch_equals_single_images_and_is_ragged():
    scores = random_map(40, 56, batch=3, seed=5)
    scores[1] *= 0.1
    scores[2] = 0
    together = select_keypoints(scores, threshold=0.5)
    apart = [select_keypoints(scores[i : i + 1], threshold=0.5)[0] for i in range(3)]
    assert [len(xy) for xy, _ in together][1:] == [0, 0] and len(together[0].xy) > 0
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.xy, other.xy) and torch.equal(one.scores, other.scores)


def bumps(centres: torch.Tensor, height: int, width: int, sigma: tuple[float, float], angle: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    offset = torch.stack((x, y), -1) - centres[:, None, None]
    c, s = np.cos(angle), np.sin(angle)
    u, v = offset[..., 0] * c + offset[..., 1] * s, offset[..., 1] * c - offset[..., 0] * s
    return torch.exp(-0.5 * ((u / sigma[0]) ** 2 + (v / sigma[1]) ** 2)).amax(0)[None, None]


@pytest.mark.parametrize(("refinement", "limit"), [("quadratic", 0.06), ("softargmax", 0.12), ("centroid3", 0.28)])
def test_refinement_finds_the_top_of_slanted_bumps(refinement, limit):
    generator = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="xy"), -1).reshape(-1, 2) * 20 + 12
    centres = grid + torch.rand(9, 2, generator=generator) - 0.5
    ((xy, _),) = select_keypoints(bumps(centres, 64, 64, (2.2, 1.4), 0.6), threshold=0.5, refinement=refinement)
    assert len(xy) == 9
    error = torch.cdist(xy, centres).amin(1).mean()
    unrefined = torch.cdist(centres.round(), centres).amin(1).mean()
    assert error < limit < unrefined


@pytest.mark.parametrize("refinement", ["quadratic", "softargmax", "centroid3"])
def test_refined_points_stay_in_bounds_and_close(refinement):
    scores = random_map(40, 50, seed=9)
    ((xy, _),) = select_keypoints(scores, refinement=refinement, nms_radius=1, **ALL)
    ((pixels, _),) = select_keypoints(scores, refinement="none", nms_radius=1, **ALL)
    assert xy.min() >= 0 and xy[:, 0].max() <= 49 and xy[:, 1].max() <= 39
    assert (xy - pixels).abs().max() <= (1.0 if refinement == "centroid3" else 0.5)
    assert not torch.equal(xy, pixels)


def test_half_precision_scores_are_accepted():
    ((xy, values),) = select_keypoints(random_map().bfloat16())
    assert xy.dtype == values.dtype == torch.float32 and len(xy)


def chosen_by_definition(xy: np.ndarray, size: tuple[int, int], budget: int, grid: int) -> np.ndarray:
    """Indices of points, given best first, that a loop over cells would keep."""
    width, height = size
    share = max(1, budget // grid**2)
    taken = {}
    first, rest = [], []
    for i, (x, y) in enumerate(xy.astype(int)):
        cell = (y * grid // height, x * grid // width)
        taken[cell] = taken.get(cell, 0) + 1
        (first if taken[cell] <= share else rest).append(i)
    return np.sort((first + rest)[:budget])


@pytest.mark.parametrize(("budget", "grid"), [(100, 4), (37, 3), (10, 4), (250, 8), (5000, 4), (64, 1)])
def test_grid_gives_each_cell_its_share_first(budget, grid):
    scores = random_map(90, 130, batch=3, seed=4)
    scores[..., :45, :60] += 1  # where all of the best are
    plain = select_keypoints(scores, border=3, max_keypoints=0, refinement="none")
    chosen = select_keypoints(scores, border=3, max_keypoints=budget, refinement="none", grid=grid)
    for (xy, values), (all_xy, all_values) in zip(chosen, plain, strict=True):
        expected = chosen_by_definition(all_xy.numpy(), (130, 90), budget, grid)
        assert torch.equal(xy, all_xy[expected]) and torch.equal(values, all_values[expected])
        assert (values.diff() <= 0).all()


def test_grid_covers_the_image_and_wastes_nothing():
    scores = random_map(80, 80)
    scores[..., :40, :40] += 1
    for grid, covered in ((0, 4), (4, 16)):
        ((xy, _),) = select_keypoints(scores, max_keypoints=64, border=0, grid=grid)
        assert len(xy) == 64 and len(torch.unique((xy + 0.5).long() // 20, dim=0)) == covered
    mask = torch.zeros(80, 80, dtype=torch.bool)
    mask[:40] = True
    ((xy, _),) = select_keypoints(scores, max_keypoints=64, border=0, grid=4, mask=mask)
    assert len(xy) == 64, "what empty cells leave over goes to others"
    assert xy[:, 1].max() < 40


def test_grid_counts_cells_of_the_image_not_of_its_padding():
    scores = random_map(33, 45, seed=2)
    padded = torch.full((1, 1, 48, 48), 9.0)
    padded[..., :33, :45] = scores
    ((xy, values),) = select_keypoints(padded, valid_size=(45, 33), max_keypoints=20, grid=3)
    ((expected_xy, expected),) = select_keypoints(scores, max_keypoints=20, grid=3)
    assert torch.equal(values, expected)
    torch.testing.assert_close(xy, expected_xy)


@pytest.mark.parametrize("grid", [0, 4])
def test_budgets_of_each_image(grid):
    scores = random_map(60, 60, batch=3, seed=6)
    together = select_keypoints(scores, max_keypoints=[30, 0, 7], grid=grid)
    for i, budget in enumerate((30, 0, 7)):
        ((xy, values),) = select_keypoints(scores[i : i + 1], max_keypoints=budget, grid=grid)
        assert torch.equal(together[i].xy, xy) and torch.equal(together[i].scores, values)
    assert [len(xy) for xy, _ in together][::2] == [30, 7] and len(together[1].xy) > 100
    with pytest.raises(ConfigError, match="one for each of 3 images, found 2"):
        select_keypoints(scores, max_keypoints=[30, 7])


SETTINGS = [
    {},
    {"threshold": 0.5, "threshold_mode": "abs"},
    {"threshold": 1.2, "threshold_mode": "mean", "max_keypoints": 0},
    {"threshold": 0.8, "threshold_mode": "max", "max_keypoints": [7, 0, 3], "grid": 3},
    {"border": 30, "grid": 4},
    {"border": 0, "valid_size": (50, 33), "max_keypoints": [1, 50, 2000]},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("radius", [0, 1, 2, 5])
@pytest.mark.parametrize("levels", [0, 3, 12])
def test_host_and_device_choose_alike(monkeypatch, settings, radius, levels):
    """A CPU looks only at the maxima, a device at all pixels, so that it waits for nothing: to the bit the same."""
    scores = random_map(40, 57, batch=3, seed=radius) - 0.3
    if levels:
        scores = (scores * levels).floor() / levels
        scores[0, 0, 3:6, 5:9] = {3: torch.nan, 12: torch.inf}[levels]
        scores[1, 0, 30, 30], scores[2, 0, :9] = -torch.inf, -0.0
    mask = random_map(40, 57, seed=9)[0, 0] < 0.7
    on_host = select_keypoints(scores, nms_radius=radius, mask=mask, **settings)
    monkeypatch.setattr(selection, "_best_on_host", selection._best_on_device)
    monkeypatch.setattr(selection, "_maxima_on_host", lambda array, r: by_shifts(torch.from_numpy(array), r))
    on_device = select_keypoints(scores, nms_radius=radius, mask=mask, **settings)
    assert sum(len(xy) for xy, _ in on_host) > 3 or settings.get("border") == 30
    for one, other in zip(on_host, on_device, strict=True):
        assert torch.equal(one.xy, other.xy) and torch.equal(one.scores, other.scores)


def test_the_whole_map_is_asked_for_equal_neighbours_only_where_the_best_have_some(monkeypatch):
    asked = []
    monkeypatch.setattr(selection, "_maxima_on_host", lambda *given: asked.append(given) or _MAXIMA(*given))
    scores = random_map(60, 80, seed=3)
    scores[..., 20, 10:13] = -1.0  # equal, but no maxima
    assert len(select_keypoints(scores, max_keypoints=50)[0].xy) == 50 and not asked
    scores[..., 30, 30:32] = 2.0
    ((xy, values),) = select_keypoints(scores, max_keypoints=50, refinement="none")
    assert asked and xy[0].tolist() == [30, 30] and values[1] < 2
    asked.clear()
    select_keypoints(scores, max_keypoints=50, border=1)
    assert asked, "windows reach out of the map"


_MAXIMA = selection._maxima_on_host


@pytest.mark.parametrize("refinement", ["quadratic", "centroid3", "softargmax", "none"])
def test_positions_are_refined_alike_with_and_without_gradients(refinement):
    scores = random_map(30, 40, batch=2, seed=4)[:, 0]
    scores[0, 3, 4], scores[1, :, 35:] = -torch.inf, 0.25
    image, index = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 3 * 40 + 5, 1199, 16 * 40 + 36, 39])
    found = refined_positions(scores, image, index, refinement)
    expected = refined_positions(scores.clone().requires_grad_(), image, index, refinement)
    assert found.dtype == torch.float32 and found.shape == (5, 2)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def by_shifts(scores: torch.Tensor, radius: int) -> np.ndarray:
    return selection._maxima(scores[None], radius)[0].numpy()


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_shape_depends_on_the_scores_of_a_device(settings):
    """Tensors without values have no shapes that depend on them: nothing here can wait for a device."""
    mask = torch.empty(40, 57, dtype=torch.bool, device="meta")
    selected = select_padded(torch.empty(3, 1, 40, 57, device="meta"), mask=mask, **settings)
    budgets = settings.get("max_keypoints", 1024)
    at_most = 14 * 19  # maxima on 40 x 57 pixels with 2 between them
    expected = min(budgets or at_most, at_most) if isinstance(budgets, int) else at_most
    assert selected.xy.shape == (3, expected, 2) and selected.scores.shape == (3, expected)


def test_filled_up_places_are_told_by_their_score():
    scores = random_map(40, 50, batch=2)
    scores[1] = 0
    xy, values = select_padded(scores, threshold=0.5)
    counts = (values > -torch.inf).sum(1).tolist()
    assert counts[0] == xy.shape[1] > 10 and counts[1] == 0 and xy.isfinite().all()
    assert (values[0].diff() <= 0).all()
    ((alone, own),) = select_keypoints(scores[:1], threshold=0.5)
    assert torch.equal(alone, xy[0]) and torch.equal(own, values[0])
    nothing = select_padded(scores[1:], threshold=0.5)
    assert nothing.xy.shape == (1, 0, 2) and nothing.scores.shape == (1, 0)
