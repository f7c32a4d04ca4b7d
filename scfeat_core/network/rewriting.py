"""Exact rewrites of convolutions and norms, for inference (used by :mod:`scfeat_core.network.inference`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scfeat_core.network.coupling_bridge import CouplingBridge
from scfeat_core.network.detector import EPS, PeakNorm
from scfeat_core.network.fused import convolution, fuses
from scfeat_core.network.layers import Alignment, upsample

CHANNELS_AT_ONCE = 16  # of a large convolution: what they need stays in the cache


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


def interpolation(factor: int) -> Tensor:
    """(factor, 3, 3) float64: what coarse cells -1, 0 and 1 give to fine positions p - 1, p, p + 1 of cell 0."""
    fine = torch.arange(factor)[:, None] + torch.arange(-1, 2)
    cell = torch.div(fine, factor, rounding_mode="floor")
    share = (fine - cell * factor).double() / factor
    cells = torch.arange(-1, 2)
    return (cells == cell[..., None]) * (1 - share[..., None]) + (cells == cell[..., None] + 1) * share[..., None]


def centre_channels(rows: Tensor, channels: int) -> Tensor:
    """Take the mean of each channel away, in place, and return 1 / deviation of each: (B, channels).

    rows: (B, R, K * channels), contiguous float32: a map with the channels innermost. Whole rows at a time:
    broadcasting over few innermost channels is slow on a CPU.
    """
    count = rows.shape[1] * rows.shape[2] // channels
    mean = _channel_sums(rows, channels) / count
    rows.sub_(mean.repeat(1, rows.shape[2] // channels)[:, None])
    return torch.rsqrt(_channel_sums(rows * rows, channels) / count + EPS)


def _channel_sums(rows: Tensor, channels: int) -> Tensor:
    """(B, R, K * channels) to (B, channels). Short rows, of at least 16 channels, are added fastest on a CPU."""
    positions = rows.shape[1] * rows.shape[2] // channels
    together = next(n for n in (16, 8, 4, 2, 1) if positions % n == 0)
    sums = rows.view(rows.shape[0], -1, together * channels).sum(1)
    return sums.unflatten(1, (together, channels)).sum(1)


def normalise_channels(rows: Tensor, channels: int) -> Tensor:
    """Instance norm, in place; see :func:`centre_channels`."""
    scale = centre_channels(rows, channels)
    return rows.mul_(scale.repeat(1, rows.shape[2] // channels)[:, None])


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
    scale = centre_channels(whole, channels)
    whole.mul_((scale * b).repeat(1, rows.shape[2])[:, None])
    return position.add_(whole.view(rows.shape)).permute(0, 3, 1, 2)


class UpsampledConv2d(nn.Module):
    """A 3x3 convolution of the ``exact`` upsampling of a map, without most of its products.

    An upsampled map holds no more than the coarse one, so each of the nine taps of the kernel is applied to the coarse
    map, as a convolution of 1x1 with 1 / factor^2 of the products, and their results are interpolated and added: a
    convolution of 9 to factor^2 maps, the same for every channel. Rows and columns along the border, where the kernel
    sees zeros beyond the map, are computed as they are defined.
    """

    mixing: Tensor

    def __init__(self, conv: nn.Conv2d, factor: int) -> None:
        super().__init__()
        self.factor = factor
        weight = conv.weight.detach()
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        taps = weight.permute(0, 2, 3, 1).flatten(1, 2)[..., None, None]  # (O, 9, I, 1, 1)
        self.taps = nn.ModuleList(convolution(some.flatten(0, 1)) for some in taps.split(CHANNELS_AT_ONCE))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach())
        mixing = interpolation(factor)
        mixing = torch.einsum("pkm,qln->pqklmn", mixing, mixing).reshape(factor * factor, 9, 3, 3)
        self.register_buffer("mixing", mixing.to(conv.weight.dtype), persistent=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: (B, I, h, w). size: (H, W) of the upsampled map. Returns (B, O, H, W), channels last."""
        batch, _, h, w = x.shape
        f = self.factor
        parts = x.new_empty(batch, h, f, w, f, self.weight.shape[0])
        for conv, part in zip(self.taps, parts.split(CHANNELS_AT_ONCE, 5), strict=True):
            tapped = conv(x).contiguous().view(-1, 9, h, w)
            mixed = F.conv2d(F.pad(tapped, (1, 1, 1, 1), mode="replicate"), self.mixing)
            part.copy_(mixed.view(batch, -1, f, f, h, w).permute(0, 4, 2, 5, 3, 1))
        fine = parts.view(batch, h * f, w * f, -1)[:, : size[0], : size[1]].permute(0, 3, 1, 2)
        self._set_border(fine, x, size)
        return fine if self.bias is None else fine.add_(self.bias[:, None, None])

    def _set_border(self, fine: Tensor, x: Tensor, size: tuple[int, int]) -> None:
        last = (size[0] - self.factor * (x.shape[2] - 2), size[1] - self.factor * (x.shape[3] - 2))
        fine[:, :, 0] = self._defined(x[:, :, :2], (2, size[1]))[:, :, 0]
        fine[:, :, -1] = self._defined(x[:, :, -2:], (last[0], size[1]), rows=2)[:, :, -1]
        fine[..., 0] = self._defined(x[..., :2], (size[0], 2))[..., 0]
        fine[..., -1] = self._defined(x[..., -2:], (size[0], last[1]), columns=2)[..., -1]

    def _defined(self, x: Tensor, size: tuple[int, int], rows: int = 0, columns: int = 0) -> Tensor:
        """The convolution of the upsampled map; of its last ``rows`` and ``columns``, where 0 is all."""
        fine = fast_upsample(x, self.factor, size, "exact")[:, :, -rows:, -columns:]
        return F.conv2d(fine, self.weight, padding=1)
