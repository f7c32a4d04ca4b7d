"""F2R backbone: encoder, U-shaped decoder, three-branch feature fusion, coupling bridge (spec sections 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfeat_core.network.coupling_bridge import BridgeParts, CouplingBridge
from scfeat_core.network.encoders import create_encoder
from scfeat_core.network.layers import Alignment, ConvNormELU, upsample

EncoderName = Literal["resnet18", "resnet34", "resnet50", "efficientnet_lite0"]


@dataclass(frozen=True)
class BackboneConfig:
    """Defaults are the published network's, but for ``alignment`` (spec 1.5: nothing published depends on it).

    decoder_channels: widths at stride 8 and 4. up_kernel, side_kernel: kernels of the convolutions beside an
    upsampling. fusion_order: ``conv_up`` convolves before upsampling, at 1/4 to 1/16 of the work. cn_init, cn_fuse,
    cn_parts: see :class:`CouplingBridge`.
    """

    encoder: EncoderName = "resnet50"
    decoder_channels: tuple[int, int] = (512, 256)
    branch_channels: int = 128
    fusion_out_ch: int = 128
    norm_groups: int = 32
    up_kernel: int = 3
    side_kernel: int = 3
    fusion_order: Literal["up_conv", "conv_up"] = "up_conv"
    alignment: Alignment = "exact"
    cn_init: Literal["legacy", "identity"] = "identity"
    cn_fuse: Literal["ratio", "softmax"] = "softmax"
    cn_parts: BridgeParts = "both"


class BackboneOutput(NamedTuple):
    """desc_map, local_map: (B, D, h, w), stride 4, before and after the coupling bridge.

    stem_map: (B, S, h, w), stride 4. global_map: (B, C3, h / 4, w / 4), stride 16.
    """

    desc_map: Tensor
    local_map: Tensor
    stem_map: Tensor
    global_map: Tensor


class F2RBackbone(nn.Module):
    """Feature-Fusion ResUNet; for any image of at least 32 x 32 pixels, with legacy alignment for multiples of 16."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = create_encoder(config.encoder)
        c1, c2, c3 = self.encoder.channels
        d2, d1 = config.decoder_channels
        side, groups = config.branch_channels, config.norm_groups
        self.upconv3 = ConvNormELU(c3, d2, config.up_kernel, groups)
        self.iconv3 = ConvNormELU(d2 + c2, d2, 3, groups)
        self.upconv2 = ConvNormELU(d2, d1, config.up_kernel, groups)
        self.iconv2 = ConvNormELU(d1 + c1, d1, 3, groups)
        self.side1 = ConvNormELU(d1, side, 1, groups)
        self.side2 = ConvNormELU(d2, side, config.side_kernel, groups)
        self.side3 = ConvNormELU(c3, side, config.side_kernel, groups)
        self.fusion = nn.Conv2d(3 * side, config.fusion_out_ch, 1)
        self.bridge = CouplingBridge(config.cn_init, config.cn_fuse, config.cn_parts)

    def forward(self, image: Tensor) -> BackboneOutput:
        stem, c1, c2, c3 = self.encoder(image)
        x2 = self._decode(c3, c2, self.upconv3, self.iconv3)
        x1 = self._decode(x2, c1, self.upconv2, self.iconv2)
        desc_map = self._fuse(x1, x2, c3)
        return BackboneOutput(desc_map, self.bridge(desc_map), stem, c3)

    def _decode(self, deep: Tensor, skip: Tensor, up: ConvNormELU, merge: ConvNormELU) -> Tensor:
        size = (skip.shape[-2], skip.shape[-1])
        if self.config.fusion_order == "conv_up":
            raised = self._upsample(up(deep), 2, size, doubling=True)
        else:
            raised = up(self._upsample(deep, 2, size, doubling=True))
        return merge(torch.cat((raised, _pad_to(skip, raised)), 1))

    def _fuse(self, x1: Tensor, x2: Tensor, c3: Tensor) -> Tensor:
        size = (x1.shape[-2], x1.shape[-1])
        d1 = self.side1(x1)
        if self.config.fusion_order == "up_conv":
            d2 = self.side2(self._upsample(x2, 2, size))
            d3 = self.side3(self._upsample(c3, 4, size))
            return self.fusion(torch.cat((d1, d2, d3), 1))
        # A 1x1 convolution commutes with interpolation, so each branch is fused at its own resolution: the same
        # function with fewer operations and without the concatenation.
        w1, w2, w3 = self.fusion.weight.chunk(3, dim=1)
        fused = F.conv2d(d1, w1, self.fusion.bias)
        fused = fused + self._upsample(F.conv2d(self.side2(x2), w2), 2, size)
        return fused + self._upsample(F.conv2d(self.side3(c3), w3), 4, size)

    def _upsample(self, x: Tensor, factor: int, size: tuple[int, int], *, doubling: bool = False) -> Tensor:
        return upsample(x, factor, size, self.config.alignment, doubling=doubling)


def _pad_to(skip: Tensor, decoded: Tensor) -> Tensor:
    """Zero-pad an encoder map to the size of the decoder map; only legacy doublings of odd maps are larger."""
    dy, dx = decoded.shape[-2] - skip.shape[-2], decoded.shape[-1] - skip.shape[-1]
    return F.pad(skip, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2)) if dx or dy else skip
