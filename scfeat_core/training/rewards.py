"""Rewards of matches by the geometry of posed pairs, without a gradient.

A match of two drawn points is good where each lies on the epipolar line of the other. Beside that constant reward, the
error of a fundamental matrix that is estimated from matches can decide how much a good match is worth and a bad one
costs. The published estimate says next to nothing of the matches (see :class:`RewardConfig`); ``fmatrix`` is what it
was meant to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.config import Range
from scfeat_core.geometry import epipolar_lines, unit_norm
from scfeat_core.training.sampling import Draws, draw_numbers

RewardType = Literal["posfeat", "fmatrix_legacy", "fmatrix"]
Pool = Literal["good", "matched", "matched_good"]

MINIMAL = 8  # correspondences that an estimate takes


@dataclass(frozen=True)
class RewardConfig:
    """reward_thr: pixels from the epipolar lines within which a match is good. rescale_thr: in the view where lines are
    farther from the points on average, allow that much more.

    reward_type: ``posfeat``: ``good_reward`` and ``bad_reward``, constant. The others let e in [0, 1), the error of F,
    decide: 1 - e for a good match, -e for a bad one, and the penalty of a point times e.

    - ``fmatrix``: e = tanh(fm_scale * error) of each pair, by normalised 8-point estimates. A pair with fewer than 8
      correspondences has the constant rewards.
    - ``fmatrix_legacy``: as published. One estimate from good matches, without normalisation, compared after division
      by its last entry: of the order of 1e-7, so that bad matches cost nothing; one e for the pairs that are computed
      together, the tanh of the sum of their errors. Not reproduced: that the last match of the list is never drawn and
      that 8 matches are drawn with replacement; which 8 are drawn (always the same places in the list); and that pairs
      are lost where the decomposition fails.

    fm_pool, of ``fmatrix``: which matches F is estimated from. ``good``: all pairs of points that are consistent with
    the epipolar geometry (published, and hardly informative, as they say nothing of the matching); ``matched``: mutual
    nearest neighbours among the accepted points, right or wrong; ``matched_good``: those of them that are good.
    fm_trials: estimates, each of 8 other matches. fm_reduce: the ``min`` or the ``median`` of their errors counts.
    """

    reward_thr: Annotated[float, Range(above=0.0)] = 2.0
    rescale_thr: bool = False
    reward_type: RewardType = "fmatrix_legacy"
    fm_pool: Pool = "matched"
    fm_trials: Annotated[int, Range(minimum=1)] = 100
    fm_scale: Annotated[float, Range(above=0.0)] = 1.0
    fm_reduce: Literal["min", "median"] = "min"


class Rates(NamedTuple):
    """What each pair (B,) pays: for a good match, for a bad one, and for a point."""

    good: Tensor
    bad: Tensor
    penalty: Tensor


class MatrixError(NamedTuple):
    """value: (B,) float64 error of F, 0 where there is none. known: (B,) bool."""

    value: Tensor
    known: Tensor


# -- good matches ------------------------------------------------------------------------------------------------------


class EpipolarRule(NamedTuple):
    """When points of two views are a good match: their homogeneous coordinates and lines in each view.

    points0, lines0: (B, N, 3), lines0 in view 0, of the points of view 1: (B, M, 3); likewise lines1 (B, N, 3) in view
    1. Lines have unit normals. threshold0, threshold1: (B, 1, 1) pixels, in view 0 and 1.
    """

    points0: Tensor
    points1: Tensor
    lines0: Tensor
    lines1: Tensor
    threshold0: Tensor
    threshold1: Tensor

    def rows(self, rows: slice) -> Tensor:
        """(B, n, M) bool, for some points of view 0."""
        distance0, distance1 = self.distances(rows)
        return (distance0 < self.threshold0) & (distance1 < self.threshold1)

    def distances(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(B, n, M) pixels in view 0, and in view 1."""
        distance0 = self.points0[:, rows] @ self.lines0.transpose(1, 2)
        distance1 = self.lines1[:, rows] @ self.points1.transpose(1, 2)
        return distance0.abs_(), distance1.abs_()

    def chosen(self, rows: Tensor) -> Tensor:
        """(B, n, M) bool, for the points (B, n) of view 0."""
        index = rows[..., None].expand(-1, -1, 3)
        some = self._replace(points0=self.points0.gather(1, index), lines1=self.lines1.gather(1, index))
        return some.rows(slice(None))

    def pairs(self, index0: Tensor, index1: Tensor) -> Tensor:
        """(B, n) bool, for the points (B, n) of view 0 and those of view 1."""
        first, second = (index[..., None].expand(-1, -1, 3) for index in (index0, index1))
        distance0 = (self.points0.gather(1, first) * self.lines0.gather(1, second)).sum(-1).abs()
        distance1 = (self.lines1.gather(1, first) * self.points1.gather(1, second)).sum(-1).abs()
        return (distance0 < self.threshold0[:, 0]) & (distance1 < self.threshold1[:, 0])


def epipolar_rule(points0: Tensor, points1: Tensor, fundamental: Tensor, threshold: float) -> EpipolarRule:
    """points0: (B, N, 2), points1: (B, M, 2) pixels. fundamental: (B, 3, 3). threshold: pixels."""
    lines1 = _unit_lines(epipolar_lines(points0, fundamental))
    lines0 = _unit_lines(epipolar_lines(points1, fundamental.mT))
    limit = points0.new_full((len(points0), 1, 1), threshold)
    return EpipolarRule(_homogeneous(points0), _homogeneous(points1), lines0, lines1, limit, limit)


def rescale_thresholds(rule: EpipolarRule, chunk: int) -> EpipolarRule:
    """The rule with the threshold of the view of larger mean distances raised by their ratio."""
    sums = torch.zeros(2, len(rule.points0), 1, 1, dtype=torch.float64, device=rule.points0.device)
    for start in range(0, rule.points0.shape[1], chunk):
        for k, distance in enumerate(rule.distances(slice(start, start + chunk))):
            sums[k] += distance.sum((1, 2), keepdim=True, dtype=torch.float64)
    ratio = (sums / sums.amin(0).clamp_min(1e-30)).to(rule.threshold0.dtype)
    return rule._replace(threshold0=rule.threshold0 * ratio[0], threshold1=rule.threshold1 * ratio[1])


def _homogeneous(points: Tensor) -> Tensor:
    return F.pad(points, (0, 1), value=1.0)


def _unit_lines(lines: Tensor) -> Tensor:
    """What is not a line becomes one that is far from every point."""
    length = lines[..., :2].norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-12, lines / length, lines.new_tensor([0.0, 0.0, torch.inf]))


# -- correspondences to estimate from ----------------------------------------------------------------------------------


def draw_distinct(counts: Tensor, trials: int, generator: Draws) -> Tensor:
    """(B, trials, 8) distinct numbers below counts (B,); where that is fewer than 8, any numbers.

    The j-th is one of the ``count - j`` that are left, numbered in order: every choice of 8 is equally likely, whatever
    the count, without a list of all.
    """
    shape = (len(counts), trials, MINIMAL)
    left = (counts[:, None, None] - torch.arange(MINIMAL, device=counts.device)).clamp_min(1)
    numbers = draw_numbers(shape, generator).to(counts.device, torch.float64)
    places = (numbers * left).long().minimum(left - 1)
    taken = places[..., :1]
    for j in range(1, MINIMAL):
        place = places[..., j : j + 1]
        for before in taken.unbind(-1):
            place = place + (before[..., None] <= place)
        taken = torch.cat((taken, place), -1).sort(-1).values
    return taken.minimum((counts - 1).clamp_min(0)[:, None, None])


def draw_matched(mask: Tensor, partner: Tensor, trials: int, generator: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Points of view 0 and 1, (B, trials, 8) each, of the matches that the mask (B, N) marks; and their number (B,).

    partner: (B, N) the match of each point of view 0.
    """
    counts = mask.sum(1)
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    ranks = draw_distinct(counts, trials, generator).flatten(1)
    first = order.gather(1, ranks)
    second = partner.gather(1, first)
    return first.unflatten(1, (trials, MINIMAL)), second.unflatten(1, (trials, MINIMAL)), counts


def draw_good(
    rule: EpipolarRule, row_counts: Tensor, trials: int, chunk: int, generator: Draws
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`draw_matched`, of all good pairs of points. row_counts: (B, N), good partners of points of view 0."""
    ends = row_counts.cumsum(1)
    ranks = draw_distinct(ends[:, -1], trials, generator).flatten(1)
    first = torch.searchsorted(ends, ranks, right=True).clamp_max(ends.shape[1] - 1)
    within = ranks - (ends - row_counts).gather(1, first)
    second = torch.cat(
        [_nth(rule.chosen(f), n) for f, n in zip(first.split(chunk, 1), within.split(chunk, 1), strict=True)], 1
    )
    return first.unflatten(1, (trials, MINIMAL)), second.unflatten(1, (trials, MINIMAL)), ends[:, -1]


def _nth(marked: Tensor, rank: Tensor) -> Tensor:
    """Index (B, n) of the rank-th (B, n) True in each row of (B, n, M)."""
    return ((marked.cumsum(-1, dtype=torch.int32) == rank[..., None] + 1) & marked).to(torch.uint8).argmax(-1)


# -- error of the fundamental matrix -----------------------------------------------------------------------------------


def fundamental_error(
    points0: Tensor, points1: Tensor, fundamental: Tensor, size: tuple[int, int], reduce: str = "min"
) -> Tensor:
    """(B,) float64 in [0, 1]: how far 8-point estimates are from the truth, over the trials.

    points0, points1: (B, T, 8, 2) pixels. fundamental: (B, 3, 3). size: (width, height) of both images.
    Both matrices are compared as those of coordinates of about [-1, 1], with unit norm and the sign that fits better:
    the sum of the smooth L1 distances of their entries is at most 1.
    """
    scale = max(size) / 2
    centre = points0.new_tensor([(size[0] - 1) / 2, (size[1] - 1) / 2], dtype=torch.float64)
    estimates = eight_point((points0.double() - centre) / scale, (points1.double() - centre) / scale)
    to_pixels = torch.diag(centre.new_tensor([scale, scale, 1.0]))
    to_pixels[:2, 2] = centre
    truth = unit_norm(to_pixels.T @ fundamental.double() @ to_pixels)[:, None]
    sign = torch.where((estimates * truth).sum((-2, -1), keepdim=True) < 0, -1.0, 1.0).double()
    errors = F.smooth_l1_loss(sign * estimates, truth.expand_as(estimates), reduction="none").sum((-2, -1))
    return errors.amin(1) if reduce == "min" else errors.median(1).values


def eight_point(points0: Tensor, points1: Tensor) -> Tensor:
    """Fundamental matrices (..., 3, 3) of unit norm and rank 2, from (..., 8, 2) each; normalise the points before."""
    columns = _homogeneous(points1)[..., :, None] * _homogeneous(points0)[..., None, :]
    # The full decomposition: the ninth right singular vector spans what 8 equations leave open.
    matrix = torch.linalg.svd(columns.flatten(-2), full_matrices=True)[2][..., -1, :].unflatten(-1, (3, 3))
    left, values, right = torch.linalg.svd(matrix)
    values = values * values.new_tensor([1.0, 1.0, 0.0])
    return unit_norm(left @ (values[..., None] * right))


def legacy_error(points0: Tensor, points1: Tensor, fundamental: Tensor) -> Tensor:
    """(B,) float64, as published: pixels as they are, and matrices divided by their last entries.

    points0, points1: (B, 8, 2). Not finite where the last entry is 0.
    """
    estimate = eight_point(points0.double(), points1.double())
    truth = fundamental.double()
    truth = truth / (truth[:, 2:, 2:] + 1e-10)
    return F.smooth_l1_loss(estimate / estimate[:, 2:, 2:], truth, reduction="none").mean((-2, -1))


# -- rates -------------------------------------------------------------------------------------------------------------


def constant_rates(pairs: Tensor, good: float, bad: float, penalty: float) -> Rates:
    """pairs: any tensor with the pairs as first axis, for its device."""
    ones = torch.ones(len(pairs), dtype=torch.float32, device=pairs.device)
    return Rates(good * ones, bad * ones, penalty * ones)


def error_rates(error: MatrixError, constant: Rates, config: RewardConfig) -> tuple[Rates, Tensor]:
    """Rates by the error of F, and e (B,), 0 where it does not count; ``constant`` where there is no error."""
    value = torch.where(error.known, error.value, 0.0)
    if config.reward_type == "fmatrix_legacy":
        e = value.sum().tanh().expand_as(value)
        counts = error.known.any().expand_as(error.known)
    else:
        e, counts = (config.fm_scale * value).tanh(), error.known
    e = torch.where(counts, e, 0.0).float()
    by_error = Rates(1 - e, -e, e * constant.penalty)
    return Rates(*(torch.where(counts, own, other) for own, other in zip(by_error, constant, strict=True))), e
