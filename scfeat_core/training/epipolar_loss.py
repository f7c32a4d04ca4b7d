"""Description loss from camera geometry alone: line-to-window search and the epipolar distance of what it finds.

CAPS (Wang et al., 2020) asks that the place where a point is expected in the other view lie on its epipolar line;
PoSFeat (Li et al., 2022) looks for that place only in a window about the best match on the line. No true match is
needed. Points of both views are drawn on their own, and the loss is symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scfeat_core.config import Range
from scfeat_core.geometry import (
    Alignment,
    epipolar_lines,
    line_distance,
    line_endpoints,
    points_between,
    sample_map,
)
from scfeat_core.training.sampling import Draws, Padding, draw_numbers, sample_descriptors

NotNegative = Annotated[float, Range(minimum=0.0)]
Share = Annotated[float, Range(above=0.0, maximum=1.0)]
Temperature = Annotated[float, Range(above=0.0)]

_JITTER = 0.707  # of the window: its centre may move so far that what the line search found is just within


@dataclass(frozen=True)
class PointGridConfig:
    """grid_size: one point is drawn in each cell of so many pixels."""

    grid_size: Annotated[int, Range(minimum=4)] = 16


@dataclass(frozen=True)
class LineSearchConfig:
    """line_step: places looked at on each line. use_nn: take the best of them, not their expectation.

    loc_rand: move the window at random, so that the network cannot rely on its centre.
    """

    line_step: Annotated[int, Range(minimum=2)] = 100
    use_nn: bool = True
    loc_rand: bool = True


@dataclass(frozen=True)
class LineToWindowConfig:
    """window_size: of half the image, the reach of the window to each side. Temperatures: see :meth:`temperature_at`.

    window_density: places in the window for each cell of the map, along x and y. With the published 1 they lie as far
    apart as the peak of similarity is wide, so that the expectation jumps between them.

    memory_mib: what the similarities of points with whole maps may take. Where they need more, points are taken in
    chunks, and computed again in the backward pass instead of being kept.
    """

    kps_generator_config: PointGridConfig = field(default_factory=PointGridConfig)
    line_search_config: LineSearchConfig = field(default_factory=LineSearchConfig)
    window_size: Share = 0.1
    window_density: Annotated[float, Range(above=0.0, maximum=8.0)] = 1.0
    temperature_base: Temperature = 60.0
    temperature_max: Temperature = 60.0
    memory_mib: Annotated[int, Range(minimum=1)] = 512

    def temperature_at(self, epoch: int) -> float:
        """The factor on cosine similarities in the softmax."""
        return min(self.temperature_base + epoch, self.temperature_max)


@dataclass(frozen=True)
class EpipolarLossConfig:
    """Thresholds as a share of the shorter edge of the image: what is found farther from its line is left out.

    use_std_as_weight: points weigh as much as they are certain, by 1 / (spread of their probability).
    weight_grid: of the coarse branch, over the points drawn in the other view. weight_window: of the window branch. A
    branch of weight 0 is not computed.
    """

    grid_cost_thr: Share = 0.5
    win_cost_thr: Share = 0.1
    use_std_as_weight: bool = True
    weight_grid: NotNegative = 0.0
    weight_window: NotNegative = 1.0


class Found(NamedTuple):
    """Where points (B, N) are expected in the other view.

    position: (B, N, 2) pixels, with gradient. spread: (B, N) without, sum of the standard deviations in x and y, in
    halves of the image. valid: (B, N) bool.
    """

    position: Tensor
    spread: Tensor
    valid: Tensor


class WeightedSum(NamedTuple):
    """A weighted mean in parts: numerator () with gradient, denominator () without, kept () points that count."""

    numerator: Tensor
    denominator: Tensor
    kept: Tensor

    @property
    def mean(self) -> Tensor:
        """0 where nothing counts."""
        return self.numerator / self.denominator.clamp_min(1e-30)


class EpipolarTerms(NamedTuple):
    """The four means of the loss, from view 0 to view 1 and back; those of a branch with weight 0 are empty.

    The loss of pairs that several processes share is ``sum_k weight_k * sum(numerator_k) / sum(denominator_k)``, with
    both sums over the processes: add up the denominators first, which need no gradient, and divide each process's own
    numerators by them; the gradients then add up to that of one process with all pairs. With one generator for each
    pair also the draws are the same. points: in both views together.
    """

    grid0: WeightedSum
    grid1: WeightedSum
    window0: WeightedSum
    window1: WeightedSum
    points: int

    def loss(self, config: EpipolarLossConfig) -> Tensor:
        """The loss of one process, pixels."""
        grid, window = self.grid0.mean + self.grid1.mean, self.window0.mean + self.window1.mean
        return config.weight_grid * grid + config.weight_window * window

    def values(self) -> dict[str, Tensor]:
        """What to log, by the published names: the four losses, and the shares of points that count."""
        names = ("loss_g1", "loss_g2", "loss_w1", "loss_w2")
        parts = (self.grid0, self.grid1, self.window0, self.window1)
        losses = {name: part.mean.detach().float() for name, part in zip(names, parts, strict=True)}
        count = max(self.points, 1)
        return losses | {
            "percent_g": (self.grid0.kept + self.grid1.kept) / count,
            "percent_w": (self.window0.kept + self.window1.kept) / count,
        }


def epipolar_terms(
    map0: Tensor,
    map1: Tensor,
    points0: Tensor,
    points1: Tensor,
    fundamental: Tensor,
    size: tuple[int, int],
    search: LineToWindowConfig,
    config: EpipolarLossConfig,
    *,
    temperature: float = 60.0,
    alignment: Alignment = "exact",
    generator: Draws | None = None,
) -> EpipolarTerms:
    """The parts of the loss over both directions.

    map0, map1: (B, D, h, w) of stride 4, not normalised, float32 (the loss is computed in float32 also under autocast).
    points0, points1: (B, N, 2) and (B, M, 2) pixels, drawn independently. fundamental: (B, 3, 3), x1' F x0 = 0.
    size: (width, height) of the images. alignment: that of the network. generator: moves the windows; None: they stay.
    A pair with a value that is not finite in a map or in F, or with F = 0, counts for nothing and gets no gradient.
    """
    usable = usable_pairs(map0, map1, fundamental)
    shape = (-1, 1, 1, 1)
    map0, map1 = (torch.where(usable.view(shape), m.float(), 0.0) for m in (map0, map1))
    fundamental = torch.where(usable[:, None, None], fundamental.float(), 0.0)
    views = (
        (map0, points0, epipolar_lines(points0, fundamental)),
        (map1, points1, epipolar_lines(points1, fundamental.mT)),
    )
    nothing = _nothing(map0, map1)
    with torch.autocast(map0.device.type, enabled=False):
        query0, query1 = (sample_descriptors(m, points, alignment) for m, points, _ in views)
        target0, target1 = (temperature * F.normalize(m, dim=1) for m, _, _ in views)
        lines0, lines1 = views[0][2], views[1][2]
        grid = window = (nothing, nothing)
        if config.weight_grid > 0:
            grid = (
                _grid_part(query0, query1, points1, lines0, size, temperature, config),
                _grid_part(query1, query0, points0, lines1, size, temperature, config),
            )
        if config.weight_window > 0:
            window = (
                _window_part(query0, target1, lines0, size, search, config, alignment, generator),
                _window_part(query1, target0, lines1, size, search, config, alignment, generator),
            )
    return EpipolarTerms(*grid, *window, points0.shape[:2].numel() + points1.shape[:2].numel())


def usable_pairs(map0: Tensor, map1: Tensor, fundamental: Tensor) -> Tensor:
    """(B,) bool: all values are finite, and F is not 0."""
    finite = [tensor.detach().flatten(1).isfinite().all(1) for tensor in (map0, map1, fundamental)]
    return finite[0] & finite[1] & finite[2] & fundamental.flatten(1).ne(0).any(1)


def _nothing(*maps: Tensor) -> WeightedSum:
    """A sum over no points that still is a function of the maps, as gradients of several processes require."""
    zero = sum((m.flatten()[:0].sum() for m in maps), maps[0].new_zeros(())).double()
    return WeightedSum(zero, zero.detach(), zero.detach().long())


# -- window branch -----------------------------------------------------------------------------------------------------


def _window_part(
    query: Tensor,
    target: Tensor,
    lines: Tensor,
    size: tuple[int, int],
    search: LineToWindowConfig,
    config: EpipolarLossConfig,
    alignment: Alignment,
    generator: Draws | None,
) -> WeightedSum:
    centres, valid = search_lines(query, target, lines, size, search, alignment)
    if search.line_search_config.loc_rand and generator is not None:
        centres, valid = jitter_centres(centres, valid, size, search.window_size, generator)
    position, spread = expected_in_window(query, target, centres, size, search, alignment)
    return weighted_distance(Found(position, spread, valid), lines, config.win_cost_thr * min(size), config)


@torch.no_grad()
def search_lines(
    query: Tensor,
    target: Tensor,
    lines: Tensor,
    size: tuple[int, int],
    search: LineToWindowConfig,
    alignment: Alignment = "exact",
) -> tuple[Tensor, Tensor]:
    """The place on each line (B, N, 3) that is most like the query: (B, N, 2) pixels, and whether the line is seen.

    query: (B, N, D) unit descriptors. target: (B, D, h, w) unit descriptors times the temperature.
    """
    config = search.line_search_config
    ends, valid = line_endpoints(lines, size)
    places = points_between(ends, config.line_step)
    chunk = _points_a_chunk(target, search)
    pieces = zip(query.split(chunk, 1), places.split(chunk, 1), strict=True)
    logits = torch.cat([_similarities(q, target, p, alignment, "border") for q, p in pieces], 1)
    if config.use_nn:
        best = logits.argmax(-1)[..., None, None].expand(-1, -1, 1, 2)
        return places.gather(2, best).squeeze(2), valid
    return _expectation(logits.softmax(-1), places), valid


def jitter_centres(
    centres: Tensor, valid: Tensor, size: tuple[int, int], window_size: float, generator: Draws
) -> tuple[Tensor, Tensor]:
    """Window centres (B, N, 2) moved at random; those that leave the image become invalid, and stay at its border."""
    half, limit = _half_image(centres, size)
    noise = draw_numbers(centres.shape, generator).to(centres)
    moved = centres + (2 * noise - 1) * _JITTER * window_size * half
    inside = ((moved >= 0) & (moved <= limit)).all(-1)
    return moved.clamp_min(0).minimum(limit), valid & inside


def expected_in_window(
    query: Tensor,
    target: Tensor,
    centres: Tensor,
    size: tuple[int, int],
    search: LineToWindowConfig,
    alignment: Alignment = "exact",
) -> tuple[Tensor, Tensor]:
    """Expected position (B, N, 2) in pixels within windows about the centres (B, N, 2), and its spread (B, N).

    query, target: as in :func:`search_lines`; the gradient reaches both. centres: inside the image. Places
    outside of the image have probability 0 with exact alignment, and with legacy the similarity 0, as published.
    """
    places = centres[:, :, None] + _window_offsets(target, size, search)
    chunk = _points_a_chunk(target, search)
    if chunk >= query.shape[1]:
        return _expected(query, target, places, size, alignment)
    pieces = zip(query.split(chunk, 1), places.split(chunk, 1), strict=True)
    found = [
        checkpoint(_expected, q, target, p, size, alignment, use_reentrant=False, preserve_rng_state=False)
        for q, p in pieces
    ]
    position, spread = zip(*found, strict=True)
    return torch.cat(position, 1), torch.cat(spread, 1)


def _expected(
    query: Tensor, target: Tensor, places: Tensor, size: tuple[int, int], alignment: Alignment
) -> tuple[Tensor, Tensor]:
    half, limit = _half_image(places, size)
    legacy = alignment == "legacy"
    logits = _similarities(query, target, places, alignment, "zeros" if legacy else "border")
    if not legacy:
        outside = ((places < 0) | (places > limit)).any(-1)
        logits = logits.masked_fill(outside, -torch.inf)
    probability = logits.softmax(-1)
    return _expectation(probability, places), _spread(probability.detach(), places, half)


def _window_offsets(target: Tensor, size: tuple[int, int], search: LineToWindowConfig) -> Tensor:
    """(S, 2) pixels: a grid, for a density of 1 about that of the map."""
    half, _ = _half_image(target, size)
    reach = search.window_size
    counts = (max(2, int(search.window_density * reach * cells + 1e-6)) for cells in target.shape[:1:-1])
    x, y = (torch.linspace(-reach, reach, count, device=target.device) for count in counts)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2) * half


def _similarities(query: Tensor, target: Tensor, places: Tensor, alignment: Alignment, padding: Padding) -> Tensor:
    """Products (B, n, S) of queries (B, n, D) with the map at the pixels (B, n, S, 2).

    Products with the whole map first, then samples of these: one matrix product, instead of S sampled descriptors for
    each point. The order makes no difference, as sampling is linear.
    """
    b, n, s = places.shape[:3]
    products = (query @ target.flatten(2)).view(b * n, 1, *target.shape[-2:])
    sampled = sample_map(products, places.reshape(b * n, s, 2), alignment=alignment, padding=padding)
    return sampled.view(b, n, s)


def _points_a_chunk(target: Tensor, search: LineToWindowConfig) -> int:
    """Both directions are in memory at once."""
    bytes_a_point = len(target) * target[0, 0].numel() * target.element_size()
    return max(1, search.memory_mib * 2**20 // (2 * bytes_a_point))


# -- coarse branch -----------------------------------------------------------------------------------------------------


def _grid_part(
    query: Tensor,
    others: Tensor,
    other_points: Tensor,
    lines: Tensor,
    size: tuple[int, int],
    temperature: float,
    config: EpipolarLossConfig,
) -> WeightedSum:
    half, _ = _half_image(other_points, size)
    probability = (temperature * query @ others.transpose(1, 2)).softmax(-1)
    places = other_points[:, None].expand(*probability.shape, 2)
    found = Found(
        probability @ other_points,
        _spread(probability.detach(), places, half),
        line_endpoints(lines, size)[1],
    )
    return weighted_distance(found, lines, config.grid_cost_thr * min(size), config)


# -- shared ------------------------------------------------------------------------------------------------------------


def weighted_distance(found: Found, lines: Tensor, threshold: float, config: EpipolarLossConfig) -> WeightedSum:
    """Weighted distances of the found positions to their lines (B, N, 3), pixels, over those below the threshold.

    What is not finite is left out before anything is added up.
    """
    distance = line_distance(found.position, lines)
    kept = found.valid & found.spread.isfinite() & (distance.detach() < threshold)
    weight = 1 / found.spread.clamp_min(1e-10) if config.use_std_as_weight else torch.ones_like(found.spread)
    weight = torch.where(kept, weight, 0.0)
    total = (weight * torch.where(kept, distance, 0.0)).sum(dtype=torch.float64)
    return WeightedSum(total, weight.sum(dtype=torch.float64), kept.sum())


def _expectation(probability: Tensor, places: Tensor) -> Tensor:
    """(B, N, 2) of (B, N, S) and (B, N, S, 2)."""
    return (probability[..., None, :] @ places).squeeze(-2)


def _spread(probability: Tensor, places: Tensor, half: Tensor) -> Tensor:
    """(B, N): standard deviations in x and y added up, in halves of the image."""
    offsets = (places - _expectation(probability, places)[..., None, :]) / half
    return _expectation(probability, offsets.square()).clamp_min(1e-10).sqrt().sum(-1)


def _half_image(like: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Half the size, and the last pixel, as (2,) (x, y)."""
    limit = like.new_tensor((size[0] - 1, size[1] - 1))
    return limit / 2, limit
