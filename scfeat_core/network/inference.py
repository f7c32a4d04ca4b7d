"""The network rewritten for inference: the same function with less work."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfeat_core.network.backbone import F2RBackbone
from scfeat_core.network.detector import CellDetectionNet, DetectionNet, normalise_plane
from scfeat_core.network.fused import FusedConv2d, convolution, fuse_convolutions, fuses
from scfeat_core.network.layers import ConvNormELU
from scfeat_core.network.model import SCFeat
from scfeat_core.network.rewriting import (
    UpsampledConv2d,
    centre_channels,
    fast_bridge,
    fast_peakiness,
    fast_upsample,
    fold_batch_norms,
    normalise_channels,
)


def inference_network(model: SCFeat) -> nn.Module:
    """A copy of ``model`` that maps a normalised image (B, 3, H, W) to what extraction needs, without gradients.

    Returns (score_map (B, 1, H, W), descriptor_map (B, D, h, w)), those of ``model`` in evaluation up to rounding.
    """
    return InferenceNetwork(model).eval().requires_grad_(False)


class InferenceNetwork(nn.Module):
    """See :func:`inference_network`."""

    def __init__(self, model: SCFeat) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval()
        fold_batch_norms(model)
        fuse_convolutions(model)
        self.descriptor_source = model.config.descriptor_source
        self.backbone = InferenceBackbone(model.backbone)
        self.detector = _rewritten(model.detector)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        image = image.contiguous(memory_format=torch.channels_last)
        desc_map, local_map, stem = self.backbone(image)
        score_map = self.detector(torch.cat((local_map, stem), 1), image)
        return score_map, desc_map if self.descriptor_source == "desc_map" else local_map


def _rewritten(detector: DetectionNet | CellDetectionNet) -> nn.Module:
    if isinstance(detector, CellDetectionNet) or detector.config.alignment != "exact":
        return detector
    return RewrittenDetector(detector)


class InferenceBackbone(nn.Module):
    """What F2RBackbone computes."""

    def __init__(self, backbone: F2RBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        config = backbone.config
        self.exact = config.alignment == "exact"
        self.raised = nn.ModuleDict()
        if self.exact and config.fusion_order == "up_conv":
            factors = {"upconv3": 2, "upconv2": 2, "side2": 2, "side3": 4}
            self.raised.update({name: RaisedConv(getattr(backbone, name), factor) for name, factor in factors.items()})
        for block in backbone.modules():
            if isinstance(block, ConvNormELU):
                block.conv = FusedConv2d(block.conv)  # type: ignore[assignment]
        w1, w2, w3 = backbone.fusion.weight.chunk(3, dim=1)
        self.fusion1 = convolution(w1, backbone.fusion.bias)
        self.fusion2 = convolution(w2)
        self.fusion3 = convolution(w3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """desc_map, local_map (B, D, h, w) and stem_map (B, S, h, w)."""
        stem, c1, c2, c3 = self.backbone.encoder(image)
        x2 = self._decode("3", c3, c2)
        x1 = self._decode("2", x2, c1)
        desc_map = self._fuse(x1, x2, c3)
        return desc_map, fast_bridge(self.backbone.bridge, desc_map), stem

    def _decode(self, level: str, deep: Tensor, skip: Tensor) -> Tensor:
        up, merge = getattr(self.backbone, f"upconv{level}"), getattr(self.backbone, f"iconv{level}")
        if self.raised:
            raised = self.raised[f"upconv{level}"](deep, _size(skip))
        elif self.exact:
            raised = fast_upsample(up(deep), 2, _size(skip), "exact")
        else:
            return self.backbone._decode(deep, skip, up, merge)
        return merge(torch.cat((raised, skip), 1))

    def _fuse(self, x1: Tensor, x2: Tensor, c3: Tensor) -> Tensor:
        own = self.backbone
        if self.raised:
            fused = self.fusion1(own.side1(x1))
            fused = self.fusion2.add_to(fused, self.raised["side2"](x2, _size(x1)))
            return self.fusion3.add_to(fused, self.raised["side3"](c3, _size(x1)))
        if not self.exact:
            return own._fuse(x1, x2, c3)
        # Exact upsampling by 4 is upsampling by 2 twice, and the sum is cheaper at the coarser stride.
        deep = fast_upsample(self.fusion3(own.side3(c3)), 2, _size(x2), "exact")
        deep = deep + self.fusion2(own.side2(x2))
        return self.fusion1(own.side1(x1)).add_(fast_upsample(deep, 2, _size(x1), "exact"))


class RaisedConv(nn.Module):
    """ConvNormELU of the ``exact`` upsampling of a map."""

    def __init__(self, block: ConvNormELU, factor: int) -> None:
        super().__init__()
        self.block = block
        self.factor = factor
        self.upsampled = UpsampledConv2d(block.conv, factor) if block.conv.kernel_size == (3, 3) else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: (B, I, h, w). size: (H, W) of the upsampled map."""
        if self.upsampled is None or not fuses(x):
            return self.block(fast_upsample(x, self.factor, size, "exact"))
        return F.elu_(self.block.norm(self.upsampled(x, size)))


class RewrittenDetector(nn.Module):
    """DetectionNet without upsampling its many feature channels to the size of the image, and without joining them.

    For eager float32 on a CPU; anything else is given to the plain detector, as graphs hold no writing into views.
    """

    def __init__(self, detector: DetectionNet) -> None:
        super().__init__()
        self.plain = detector
        self.config = detector.config
        self.slope = float(detector.activation.weight.detach())
        deep, shallow = detector.conv_merge.weight.detach().split(
            (self.config.feature_channels, self.config.image_channels), 1
        )
        self.conv_feature = convolution(detector.conv_feature.weight, padding=1)
        self.conv_image = convolution(detector.conv_image.weight, padding=1)
        self.conv_deep = UpsampledConv2d(convolution(deep).conv, 4)
        self.conv_shallow = convolution(shallow, padding=1)
        self.score_kernel = nn.Parameter(detector.conv_score.weight.detach()[0, :, 0, 0].clone())

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """See DetectionNet."""
        if not fuses(image):
            return self.plain(features, image)
        if not self.config.use_peakiness:
            return self._scores(features, image)
        planes = image.contiguous()
        peak_feature = fast_peakiness(features, self.config.peak_norm)
        peak_image = fast_peakiness(planes, self.config.peak_norm)
        score = self._scores(features * peak_feature, planes * peak_image)
        return score.mul_(peak_image).mul_(fast_upsample(peak_feature, 4, _size(image), self.config.alignment))

    def _scores(self, features: Tensor, image: Tensor) -> Tensor:
        # Without the biases of the convolutions, which the norms behind them take away.
        merged = self.conv_deep(self._activated(self.conv_feature(features)), _size(image))
        shallow = self._activated(self.conv_image(image.contiguous(memory_format=torch.channels_last)))
        logits = self._scored(_channels_innermost(self.conv_shallow.add_to(merged, shallow)))
        return F.softplus(normalise_plane(logits[:, None]))

    def _activated(self, maps: Tensor) -> Tensor:
        """Instance norm and PReLU of (B, C, h, w)."""
        maps = _channels_innermost(maps)
        normalise_channels(_rows(maps), maps.shape[-1])
        return F.leaky_relu_(maps, self.slope).permute(0, 3, 1, 2)

    def _scored(self, merged: Tensor) -> Tensor:
        """The last two layers: merged (B, H, W, C) before its norm, to logits (B, H, W)."""
        scale = centre_channels(_rows(merged), merged.shape[-1])
        # A PReLU commutes with a positive factor, which is cheaper to apply to the weights of the last layer.
        F.leaky_relu_(merged, self.slope)
        return (merged.flatten(1, 2) @ (self.score_kernel * scale)[..., None]).view(merged.shape[:-1])


def _rows(maps: Tensor) -> Tensor:
    """(B, h, w, C) as (B, h, w * C); never a copy."""
    return maps.view(*maps.shape[:2], -1)


def _channels_innermost(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h, w, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _size(image: Tensor) -> tuple[int, int]:
    return (image.shape[-2], image.shape[-1])
