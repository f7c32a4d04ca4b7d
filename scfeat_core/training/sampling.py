"""Drawing points from images: one per cell, uniformly or by the detector (spec 4.2 and 5.2); descriptors at points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.geometry import Alignment, sample_map

# One generator for the whole batch, or one for each pair: then what is drawn for a pair depends on no other pair, and
# not on which process or piece of a batch it is in. Generators are of the CPU, so that all devices see the same draws,
# but for those that are so many that only a seed is drawn for them, and they are made on the device.
Draws: TypeAlias = torch.Generator | Sequence[torch.Generator]
Padding: TypeAlias = Literal["border", "zeros"]


class Proposals(NamedTuple):
    """One point per cell, N = (H // cell) * (W // cell).

    points: (B, N, 2) float32, integer pixels. accepted: (B, N) bool.
    log_prob: (B, N), of the draw and of its acceptance; carries the gradient to the scores.
    finite: (B, N) bool; a cell with a score that is not finite is never accepted, and its log_prob is 0.
    """

    points: Tensor
    accepted: Tensor
    log_prob: Tensor
    finite: Tensor


def draw_numbers(shape: Sequence[int], generator: Draws, device: torch.device | None = None) -> Tensor:
    """Uniform numbers in [0, 1) on the CPU, or on another device. shape: the first axis is that of the pairs."""
    if isinstance(generator, torch.Generator):
        return _uniform(shape, generator, device)
    return torch.stack([_uniform(shape[1:], g, device) for _, g in zip(range(shape[0]), generator, strict=True)])


def _uniform(shape: Sequence[int], generator: torch.Generator, device: torch.device | None) -> Tensor:
    if device is None or device.type == "cpu":
        return torch.rand(*shape, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.rand(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def sample_descriptors(maps: Tensor, points: Tensor, alignment: Alignment = "exact") -> Tensor:
    """Unit descriptors (B, N, D) float32 at pixels (B, N, 2) of maps (B, D, h, w) of stride 4.

    legacy samples as published: zeros outside of the map, which the normalisation undoes.
    """
    padding: Padding = "zeros" if alignment == "legacy" else "border"
    return F.normalize(sample_map(maps, points, alignment=alignment, padding=padding), dim=-1)


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


def propose_keypoints(score_map: Tensor, cell: int, scale: float, accept_bias: float, generator: Draws) -> Proposals:
    """DISK's scheme: a categorical draw within each cell, then a Bernoulli acceptance of the drawn score.

    The logits are ``scale * score`` for the choice and ``scale * (score - accept_bias)`` for the acceptance. The
    published rule is scale 1, bias 0; under it at least half of the cells are accepted, as scores are never negative.
    """
    logits = scale * _cells(score_map.float(), cell)
    finite = logits.isfinite().all(-1)
    logits = torch.where(finite[..., None], logits, 0.0)
    log_choice = logits.log_softmax(-1)
    noise = draw_numbers(logits.shape, generator, logits.device).to(logits).clamp_min(1e-20)
    index = (logits.detach() - (-noise.log()).log()).argmax(-1)  # Gumbel-max: a draw from the categorical
    picked = index.unsqueeze(-1)
    acceptance = logits.gather(-1, picked).squeeze(-1) - scale * accept_bias
    accepted = draw_numbers(acceptance.shape, generator).to(acceptance) < acceptance.detach().sigmoid()
    log_accept = F.logsigmoid(torch.where(accepted, acceptance, -acceptance))
    log_prob = log_choice.gather(-1, picked).squeeze(-1) + log_accept
    points = _cell_points(index, score_map.shape[-1] // cell, cell)
    return Proposals(points, accepted & finite, torch.where(finite, log_prob, 0.0), finite)


def draw_uniform(size: tuple[int, int], batch: int, cell: int, generator: Draws) -> Tensor:
    """One uniformly drawn pixel per cell of an (H, W) image, (batch, N, 2) float32."""
    rows, columns = size[0] // cell, size[1] // cell
    if isinstance(generator, torch.Generator):
        index = torch.randint(cell * cell, (batch, rows * columns), generator=generator)
    else:
        each = zip(range(batch), generator, strict=True)
        index = torch.stack([torch.randint(cell * cell, (rows * columns,), generator=g) for _, g in each])
    return _cell_points(index, columns, cell)
