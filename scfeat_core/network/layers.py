"""Building blocks that encoders, decoder and detector share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Alignment = Literal["exact", "legacy"]


def upsample(x: Tensor, factor: int, size: tuple[int, int], alignment: Alignment, *, doubling: bool = False) -> Tensor:
    """Bilinear upsampling of a stride ``factor * s`` map to the ``size`` (h, w) of a stride s map.

    exact: output j samples input j / factor, border-clamped: feature p of a stride s map is centred on pixel s * p.
    legacy: torch's ``align_corners`` grids, as the published network used them: True in the decoder's doublings
    (``doubling``), False where a map is resized to the size of another. Both drift with the position (spec 1.5).
    """
    if alignment == "legacy":
        if doubling:
            size = (x.shape[-2] * factor, x.shape[-1] * factor)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=doubling)
    h, w = x.shape[-2:]
    up = F.interpolate(x, size=((h - 1) * factor + 1, (w - 1) * factor + 1), mode="bilinear", align_corners=True)
    up = F.pad(up, (0, factor - 1, 0, factor - 1), mode="replicate")
    return up[..., : size[0], : size[1]]


class ConvNormELU(nn.Module):
    """CGE of the published network: Conv2d with bias, GroupNorm, ELU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.norm(self.conv(x)), inplace=not torch.is_grad_enabled())
