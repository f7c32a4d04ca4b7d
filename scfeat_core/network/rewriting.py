"""Exact rewrites of convolutions and norms, for inference (used by :mod:`scfeat_core.network.inference`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scfeat_core.network.coupling_bridge import CouplingBridge
from scfeat_core.network.detector import PeakNorm
from scfeat_core.network.fused import fuses
from scfeat_core.network.layers import Alignment, upsample

EPS = 1e-5  # of all instance norms


def fold_batch_norms(module: nn.Module) -> None:
    """Multiply each batch norm that directly follows a convolution into it, in place; for evaluation only."""
    previous: tuple[str, nn.Module] = ("", module)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and isinstance(previous[1], nn.Conv2d):
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norms(child)
        previous = (name, child)


def block_kernel(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The kernel of a 3x3 convolution that computes a block (rows, columns) of pixels at once.

    weight: (O, I, 3, 3). Returns (rows * columns * O, I, rows + 2, columns + 2), to be applied with stride ``block``
    and padding 1. More products, with zeros, but in vectors of many channels: where O is 8, half of the time.
    """
    rows, columns = block
    out, channels = weight.shape[:2]
    kernel = weight.new_zeros(rows, columns, out, channels, rows + 2, columns + 2)
    for y in range(rows):
        for x in range(columns):
            kernel[y, x, :, :, y : y + 3, x : x + 3] = weight
    return kernel.flatten(0, 2)


def phase_kernel(weight: Tensor, factor: int) -> Tensor:
    """The kernel that convolves the ``exact`` upsampling of a map without computing that.

    weight: (O, I, 3, 3), at the fine stride. Returns (factor * factor * O, I, 3, 3), to be applied to
    the coarse map: one group of outputs for each position (row, column) in a coarse cell.
    """
    mixing = interpolation(factor).to(weight)
    kernel = torch.einsum("pkm,qln,oikl->pqoimn", mixing, mixing, weight)
    return kernel.flatten(0, 2)


def interpolation(factor: int) -> Tensor:
    """(factor, 3, 3) float64: what coarse cells -1, 0 and 1 give to fine positions p - 1, p, p + 1 of cell 0."""
    fine = torch.arange(factor)[:, None] + torch.arange(-1, 2)
    cell = torch.div(fine, factor, rounding_mode="floor")
    share = (fine - cell * factor).double() / factor
    cells = torch.arange(-1, 2)
    return (cells == cell[..., None]) * (1 - share[..., None]) + (cells == cell[..., None] + 1) * share[..., None]


def centre_channels(rows: Tensor, channels: int, count: int, outside: Sequence[Tensor] = ()) -> Tensor:
    """Take the mean of each channel away, in place, and return 1 / deviation of each: (B, channels).

    rows: (B, R, K * channels), contiguous float32: a map with the channels innermost. count: positions of the image
    among the R * K. outside: the parts of ``rows`` that do not belong to it, as views; they are zero afterwards, as the
    padding of a convolution is. Whole rows at a time: broadcasting over 8 innermost channels is slow on a CPU.
    """
    _clear(outside)
    mean = _channel_sums(rows, channels) / count
    rows.sub_(mean.repeat(1, rows.shape[2] // channels)[:, None])
    _clear(outside)
    return torch.rsqrt(_channel_sums(rows * rows, channels) / count + EPS)


def _channel_sums(rows: Tensor, channels: int) -> Tensor:
    """(B, R, K * channels) to (B, channels). Short rows, of at least 16 channels, are added fastest on a CPU."""
    positions = rows.shape[1] * rows.shape[2] // channels
    together = next(n for n in (16, 8, 4, 2, 1) if positions % n == 0)
    sums = rows.view(rows.shape[0], -1, together * channels).sum(1)
    return sums.unflatten(1, (together, channels)).sum(1)


def normalise_channels(rows: Tensor, channels: int, count: int, outside: Sequence[Tensor] = ()) -> Tensor:
    """Instance norm, in place; see :func:`centre_channels`."""
    scale = centre_channels(rows, channels, count, outside)
    return rows.mul_(scale.repeat(1, rows.shape[2] // channels)[:, None])


def _clear(parts: Sequence[Tensor]) -> None:
    for part in parts:
        part.zero_()


def fast_upsample(x: Tensor, factor: int, size: tuple[int, int], alignment: Alignment) -> Tensor:
    """:func:`~scfeat_core.network.layers.upsample`, padding the small map rather than the large one.

    A view of a larger map, where the size is not that of the grid.
    """
    if alignment != "exact":
        return upsample(x, factor, size, alignment)
    grid = (x.shape[-2] * factor + 1, x.shape[-1] * factor + 1)
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(padded, size=grid, mode="bilinear", align_corners=True)[..., : size[0], : size[1]]


def fast_peakiness(x: Tensor, norm: PeakNorm) -> Tensor:
    """:func:`~scfeat_core.network.detector.peakiness` in fewer and faster passes; (B, C, h, w) to (B, 1, h, w)."""
    scale = x.amax((1, 2, 3), keepdim=True)
    if norm == "absmax":
        scale = torch.maximum(scale, -x.amin((1, 2, 3), keepdim=True))
    x = x / scale.clamp_min(1e-6)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    columns = (padded[..., :-2, :] + padded[..., 1:-1, :]).add_(padded[..., 2:, :])
    local_sum = (columns[..., :-2] + columns[..., 1:-1]).add_(columns[..., 2:])
    alpha = F.softplus(torch.sub(x, local_sum, alpha=1 / 9))
    beta = F.softplus(torch.sub(x, x.sum(1, keepdim=True), alpha=1 / x.shape[1]))
    return alpha.mul_(beta).amax(1, keepdim=True)


def fast_bridge(bridge: CouplingBridge, x: Tensor) -> Tensor:
    """The coupling bridge in fewer passes; x: (B, C, h, w), channels last."""
    if bridge.parts != "both" or not fuses(x):
        return bridge(x)
    channels = x.shape[1]
    rows = x.permute(0, 2, 3, 1).contiguous()
    mean = rows.mean(3, keepdim=True)
    centred = rows - mean
    variance = (centred * centred).sum(3, keepdim=True) / (channels - 1)
    gain, offset = bridge.affine(mean.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).split(1, 3)
    a, b = bridge.blend.softmax(0) if bridge.fuse == "softmax" else bridge.blend / bridge.blend.sum()
    position = centred.mul_(gain * torch.rsqrt(variance + bridge.EPS) * a).add_(offset * a)
    whole = rows.clone().flatten(2)
    scale = centre_channels(whole, channels, rows.shape[1] * rows.shape[2])
    whole.mul_((scale * b).repeat(1, rows.shape[2])[:, None])
    return position.add_(whole.view(rows.shape)).permute(0, 3, 1, 2)
