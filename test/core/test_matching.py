from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scfeat_core import matching
from scfeat_core.errors import FeatureError
from scfeat_core.matching import match, match_descriptors, match_nearby, match_padded, window
from scfeat_core.types import Features


def unit_rows(count: int, dim: int = 32, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def features(descriptors, space: str = "scfeat:test") -> Features:
    count = len(descriptors)
    return Features(np.zeros((count, 2), np.float32), np.ones(count, np.float32), descriptors, (640, 480), space)


def by_definition(
    d0: np.ndarray, d1: np.ndarray, min_cosine: float = -1, max_ratio: float | None = None, allowed: object = True
) -> list:
    cosine = np.where(allowed, d0 @ d1.T, -np.inf)
    pairs = []
    for i, row in enumerate(cosine):
        j = int(row.argmax())
        if int(cosine[:, j].argmax()) != i or row[j] < min_cosine or row[j] == -np.inf:
            continue
        distance = np.sqrt(np.maximum(2 - 2 * cosine, 0))
        others = [np.delete(distance[i], j), np.delete(distance[:, j], i)]
        if max_ratio is None or all(len(o) == 0 or distance[i, j] <= max_ratio * o.min() for o in others):
            pairs.append((i, j))
    return pairs


def pairs_of(matches) -> list:
    return list(zip(matches.indices0.tolist(), matches.indices1.tolist(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"min_cosine": 0.5}, {"max_ratio": 0.9}, {"min_cosine": 0.4, "max_ratio": 1}])
@pytest.mark.parametrize("block", [1 << 24, 700, 1])
def test_matches_by_definition_whole_and_in_blocks(monkeypatch, settings, block):
    monkeypatch.setattr(matching, "_MAX_SIMILARITIES", block)
    d0, d1 = unit_rows(90), unit_rows(70, seed=1)
    d1[:40] = F.normalize(d0[20:60] + 0.15 * unit_rows(40, seed=2) * 32**0.5, dim=1)
    matches = match_descriptors(d0, d1, **settings)
    expected = by_definition(d0.numpy(), d1.numpy(), **settings)
    assert pairs_of(matches) == expected and len(expected) > 10
    torch.testing.assert_close(matches.scores, (d0[matches.indices0] * d1[matches.indices1]).sum(1))


@pytest.mark.parametrize("block", [1 << 24, 7, 1])
def test_ties_go_to_the_first(monkeypatch, block):
    monkeypatch.setattr(matching, "_MAX_SIMILARITIES", block)
    one = torch.eye(32)[:1]  # products of these are exact
    assert pairs_of(match_descriptors(one.expand(5, -1), one.expand(7, -1))) == [(0, 0)]


def test_numpy_gives_numpy_and_torch_stays_torch():
    d0, d1 = unit_rows(20), unit_rows(30, seed=1)
    from_torch, from_numpy = match(features(d0), features(d1)), match(features(d0.numpy()), features(d1.numpy()))
    assert isinstance(from_torch.indices0, torch.Tensor)
    assert isinstance(from_numpy.indices0, np.ndarray)
    assert (from_numpy.indices0.dtype, from_numpy.scores.dtype) == (np.int64, np.float32)
    assert pairs_of(from_torch) == pairs_of(from_numpy)
    half = match_descriptors(d0.numpy().astype(np.float16), d1.numpy().astype(np.float16))
    assert half.scores.dtype == np.float32 and len(half) > 0


@pytest.mark.parametrize(("n0", "n1"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_match_gives_nothing(n0, n1):
    for kind in (torch.Tensor.numpy, torch.Tensor.clone):
        matches = match(features(kind(unit_rows(n0))), features(kind(unit_rows(n1))), max_ratio=0.8)
        assert len(matches) == len(matches.scores) == len(matches.indices1) == 0


def test_a_single_candidate_passes_the_ratio_test():
    one = unit_rows(1)
    assert pairs_of(match_descriptors(one, one, max_ratio=0.5)) == [(0, 0)]


def test_the_ratio_test_looks_in_both_directions():
    few = torch.eye(32)[:3]
    near = F.normalize(few[0] + 0.2 * torch.eye(32)[8], dim=0)[None]
    many = torch.cat((few, near))  # the first of these has a rival here
    target = F.normalize(few + 0.1 * torch.eye(32)[9:12], dim=1)
    assert pairs_of(match_descriptors(many, target)) == [(0, 0), (1, 1), (2, 2)]
    assert pairs_of(match_descriptors(many, target, max_ratio=0.4)) == [(1, 1), (2, 2)]
    assert pairs_of(match_descriptors(target, many, max_ratio=0.4)) == [(1, 1), (2, 2)]


def test_incomparable_descriptors_are_refused():
    d = unit_rows(4)
    with pytest.raises(FeatureError, match=r"'scfeat:a' and 'scfeat:b'.*different weights"):
        match(features(d, "scfeat:a"), features(d, "scfeat:b"))
    with pytest.raises(FeatureError, match=r"\(4, 32\) and \(4, 16\)"):
        match(features(d), features(unit_rows(4, 16)))
    with pytest.raises(FeatureError, match=r"\(32,\)"):
        match_descriptors(d[0], d)


def test_runs_agree_to_the_bit():
    d0, d1 = unit_rows(300), unit_rows(300, seed=1)
    first, second = match_descriptors(d0, d1), match_descriptors(d0, d1)
    assert torch.equal(first.indices1, second.indices1) and torch.equal(first.scores, second.scores)


@pytest.mark.parametrize("settings", [{}, {"min_cosine": 0.5}, {"max_ratio": 0.9}])
@pytest.mark.parametrize("block", [1 << 24, 700, 1])
def test_gated_matches_by_definition(monkeypatch, settings, block):
    monkeypatch.setattr(matching, "_MAX_SIMILARITIES", block)
    d0, d1 = unit_rows(90), unit_rows(70, seed=1)
    d1[:40] = F.normalize(d0[20:60] + 0.15 * unit_rows(40, seed=2) * 32**0.5, dim=1)
    allowed = torch.rand(90, 70, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[3], allowed[:, 5] = False, False
    matches = match_descriptors(d0, d1, gate=lambda rows: allowed[rows], **settings)
    expected = by_definition(d0.numpy(), d1.numpy(), **settings, allowed=allowed.numpy())
    assert pairs_of(matches) == expected and len(expected) > 10
    assert expected != by_definition(d0.numpy(), d1.numpy(), **settings)
    from_numpy = match_descriptors(d0.numpy(), d1.numpy(), gate=lambda rows: allowed.numpy()[rows], **settings)
    assert pairs_of(from_numpy) == expected


def test_a_gate_that_allows_nothing_gives_nothing():
    d = unit_rows(5)
    matches = match_descriptors(d, d, gate=lambda rows: torch.zeros(5, 5, dtype=torch.bool)[rows], min_cosine=-2.0)
    assert len(matches) == len(matches.scores) == 0
    with pytest.raises(FeatureError, match=r"mask of \(5, 5\) bool for the rows 0 to 5, found \(5, 4\) torch.bool"):
        match_descriptors(d, d, gate=lambda rows: torch.ones(5, 4, dtype=torch.bool)[rows])


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_a_window_looks_for_points_where_they_are_expected(kind):
    same = np.eye(32, dtype=np.float32)[[0, 0, 0, 0]]  # only the position tells them apart
    predicted = np.array([[10, 10], [30, 10], [np.nan, 10], [90, 10]], np.float32)
    positions = np.array([[34, 13], [11, 6], [50, 50], [84.9, 10]], np.float32)
    gate = window(kind(predicted), kind(positions), 5)
    assert pairs_of(match_descriptors(kind(same), kind(same), gate=gate)) == [(0, 1), (1, 0)]
    assert np.array_equal(np.asarray(gate(slice(1, 3))), [[True, False, False, False], [False] * 4])


@pytest.mark.parametrize("counts", [(300, 200), (1, 1), (5, 400), (0, 3), (3, 0)])
@pytest.mark.parametrize("binary", [False, True])
def test_near_pairs_alone_give_the_matches_of_a_window(counts: tuple[int, int], binary: bool) -> None:
    rng = np.random.default_rng(sum(counts))
    points0, points1 = (rng.uniform(0, 100, (count, 2)).astype(np.float32) for count in counts)
    values = [rng.normal(size=(count, 16)) for count in counts]
    if binary:  # with many ties
        values = [np.sign(each) for each in values]
    unit0, unit1 = (torch.from_numpy(each / np.linalg.norm(each, axis=1, keepdims=True)).float() for each in values)
    if counts[0] > 5:
        points0[3] = np.nan
        points1[:5] = points0[:1] + 10  # on the edge of the window
    gate = window(points0, points1, 10.0)
    expected = match_descriptors(unit0, unit1, min_cosine=0.2, gate=gate).numpy()
    found = match_nearby(unit0, unit1, points0, points1, 10.0, min_cosine=0.2)
    np.testing.assert_array_equal(found.indices0, expected.indices0)
    np.testing.assert_array_equal(found.indices1, expected.indices1)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    assert len(found) > 20 or min(counts) < 5 or counts == (5, 400)


@pytest.mark.parametrize("radius", [0.0, 0.01, 3.0, 12.8, 1000.0])
@pytest.mark.parametrize("spread", [1.0, 640.0, 1e5])
def test_near_pairs_are_those_of_the_window(radius: float, spread: float) -> None:
    """Also on the edges of cells, of points far outside, of those that are nowhere, and where all are one."""
    rng = np.random.default_rng(0)
    positions = rng.uniform(0, spread, (150, 2)).astype(np.float32)
    positions[:20] = np.round(positions[:20])
    predicted = np.concatenate(
        (positions[:100], positions[:60] + np.float32(radius), -positions[:9], 3 * positions[:9])
    )
    predicted[5], predicted[6, 0], predicted[7, 1] = np.nan, np.inf, -np.inf
    positions[140], positions[141, 1] = np.nan, np.inf
    for few in (positions, positions[:1], positions[[3] * 9], positions[140:141], positions[:0]):
        rows, columns = matching._near(predicted, few, radius)
        allowed = np.asarray(window(predicted, few, radius)(slice(0, len(predicted))))
        expected_rows, expected_columns = np.nonzero(allowed)
        order = np.lexsort((columns, rows))
        np.testing.assert_array_equal(rows[order], expected_rows)
        np.testing.assert_array_equal(columns[order], expected_columns)
        assert (np.diff(rows) >= 0).all()


def test_predictions_just_within_reach_do_no_harm() -> None:
    """Where rounding to float32 puts the edge of what is within reach a little farther than cells have it."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        radius = float(rng.uniform(0.5, 30))
        positions = rng.uniform(900, 1400, (12, 2)).astype(np.float32)
        low, high = positions.min(0) - matching._MARGIN * radius, positions.max(0) + matching._MARGIN * radius
        corners = np.array([low, high, (low[0], high[1]), (high[0], low[1])], np.float32)
        predicted = np.concatenate((corners, positions))
        rows, columns = matching._near(predicted, positions, radius)
        allowed = np.asarray(window(predicted, positions, radius)(slice(0, len(predicted))))
        found = np.zeros_like(allowed)
        found[rows, columns] = True
        np.testing.assert_array_equal(found, allowed)


@pytest.mark.parametrize("counts", [(513, 1024), (1, 3000), (3000, 1), (700, 500)])
def test_blocks_that_stay_in_the_cache_change_no_match(monkeypatch, counts: tuple[int, int]) -> None:
    d0, d1 = (unit_rows(count, 64, seed=count) for count in counts)
    d1[::7] = d1[0].clone()  # ties
    found = match_descriptors(d0, d1)
    monkeypatch.setattr(matching, "_CACHED", 1 << 24)
    whole = match_descriptors(d0, d1)
    assert pairs_of(found) == pairs_of(whole) and len(found) > 0
    torch.testing.assert_close(found.scores, whole.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1 << 24, 700])
@pytest.mark.parametrize("min_cosine", [-1.0, 0.5])
def test_filled_up_rows_match_nothing(monkeypatch, block: int, min_cosine: float) -> None:
    monkeypatch.setattr(matching, "_MAX_SIMILARITIES", block)
    d0, d1 = unit_rows(90), unit_rows(70, seed=1)
    d1[:40] = F.normalize(d0[20:60] + 0.15 * unit_rows(40, seed=2) * 32**0.5, dim=1)
    d1[::9] = d1[0].clone()  # ties
    valid0, valid1 = torch.arange(90) < 75, torch.arange(70) < 33
    partners, similarity = match_padded(d0, valid0, d1, valid1, min_cosine=min_cosine)
    expected = match_descriptors(d0[:75], d1[:33], min_cosine=min_cosine)
    assert partners.dtype == torch.int32 and similarity.dtype == torch.float32
    found = torch.nonzero(partners >= 0)[:, 0]
    assert torch.equal(found, expected.indices0) and torch.equal(partners[found].long(), expected.indices1)
    torch.testing.assert_close(similarity[found], expected.scores)
    nothing, _ = match_padded(d0, valid0, d1, torch.zeros(70, dtype=torch.bool), min_cosine=min_cosine)
    assert (nothing == -1).all()


def test_no_shape_depends_on_the_descriptors() -> None:
    """Tensors without values have no shapes that depend on them: nothing here can wait for a device."""
    d0, d1 = (torch.empty(count, 32, device="meta") for count in (5000, 4000))  # more than are held at once
    valid0, valid1 = (torch.empty(len(each), dtype=torch.bool, device="meta") for each in (d0, d1))
    partners, similarity = match_padded(d0, valid0, d1, valid1)
    assert partners.shape == similarity.shape == (5000,)
