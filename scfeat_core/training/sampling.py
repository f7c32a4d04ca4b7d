"""Drawing points from images: one per cell, uniformly or by the detector (spec 4.2 and 5.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Proposals(NamedTuple):
    """One point per cell, N = (H // cell) * (W // cell).

    points: (B, N, 2) float32, integer pixels. accepted: (B, N) bool.
    log_prob: (B, N), of the draw and of its acceptance; carries the gradient to the scores.
    """

    points: Tensor
    accepted: Tensor
    log_prob: Tensor


def _cells(score_map: Tensor, cell: int) -> Tensor:
    """(B, 1, H, W) to (B, N, cell * cell); rows and columns beyond a multiple of the cell are left out."""
    h, w = score_map.shape[-2] // cell * cell, score_map.shape[-1] // cell * cell
    return F.pixel_unshuffle(score_map[..., :h, :w], cell).flatten(2).transpose(1, 2)


def _cell_points(index: Tensor, columns: int, cell: int) -> Tensor:
    """Pixel of the ``index``-th (B, N) place within each cell, (B, N, 2)."""
    order = torch.arange(index.shape[1], device=index.device)
    x = order % columns * cell + index % cell
    y = order // columns * cell + index // cell
    return torch.stack((x, y), -1).float()


def keypoint_probability(score_map: Tensor, cell: int, scale: float, accept_bias: float) -> Tensor:
    """Probability of each pixel to be drawn and accepted by :func:`propose_keypoints`, (B, 1, H', W').

    H' and W' are the multiples of the cell below H and W.
    """
    h, w = score_map.shape[-2] // cell * cell, score_map.shape[-1] // cell * cell
    score_map = scale * score_map[..., :h, :w].float()
    choice = F.pixel_unshuffle(score_map, cell).softmax(1)
    return F.pixel_shuffle(choice, cell) * torch.sigmoid(score_map - scale * accept_bias)


def propose_keypoints(
    score_map: Tensor, cell: int, scale: float, accept_bias: float, generator: torch.Generator
) -> Proposals:
    """DISK's scheme: a categorical draw within each cell, then a Bernoulli acceptance of the drawn score.

    The logits are ``scale * score`` for the choice and ``scale * (score - accept_bias)`` for the acceptance. The
    published rule is scale 1, bias 0; under it at least half of the cells are accepted, as scores are never negative.
    """
    logits = scale * _cells(score_map.float(), cell)
    log_choice = logits.log_softmax(-1)
    noise = torch.rand(logits.shape, generator=generator).to(logits).clamp_min(1e-20)
    index = (logits.detach() - (-noise.log()).log()).argmax(-1)  # Gumbel-max: a draw from the categorical
    picked = index.unsqueeze(-1)
    acceptance = logits.gather(-1, picked).squeeze(-1) - scale * accept_bias
    accepted = torch.rand(acceptance.shape, generator=generator).to(acceptance) < acceptance.detach().sigmoid()
    log_accept = F.logsigmoid(torch.where(accepted, acceptance, -acceptance))
    log_prob = log_choice.gather(-1, picked).squeeze(-1) + log_accept
    return Proposals(_cell_points(index, score_map.shape[-1] // cell, cell), accepted, log_prob)


def draw_uniform(size: tuple[int, int], batch: int, cell: int, generator: torch.Generator) -> Tensor:
    """One uniformly drawn pixel per cell of an (H, W) image, (batch, N, 2) float32."""
    rows, columns = size[0] // cell, size[1] // cell
    index = torch.randint(cell * cell, (batch, rows * columns), generator=generator)
    return _cell_points(index, columns, cell)
