"""Detection network with peakiness measurement (spec section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfeat_core.network.layers import Alignment, upsample

PeakNorm = Literal["max", "absmax"]


@dataclass(frozen=True)
class DetectorConfig:
    """Widths of the feature branch, the image branch and their merger; defaults are the published network's.

    peak_norm: what a map is divided by before its peaks are measured. The published ``max`` loses its meaning on
    images that are darker than the ImageNet mean everywhere; ``absmax`` does not. use_peakiness: False leaves the
    measurement out, to learn what it is worth.
    """

    feature_channels: int = 192
    image_channels: int = 64
    merge_channels: int = 128
    alignment: Alignment = "exact"
    peak_norm: PeakNorm = "max"
    use_peakiness: bool = True


def peakiness(x: Tensor, norm: PeakNorm = "max") -> Tensor:
    """Local and channel-wise peakiness, the largest over the channels: (B, C, h, w) to (B, 1, h, w).

    ``softplus(x - local mean) * softplus(x - channel mean)`` of the map scaled by its maximum (ASLFeat, eq. 4).
    """
    scale = x.amax((1, 2, 3), keepdim=True) if norm == "max" else x.abs().amax((1, 2, 3), keepdim=True)
    x = x / scale.clamp_min(1e-6)
    local_mean = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    alpha = F.softplus(x - local_mean)
    beta = F.softplus(x - x.mean(1, keepdim=True))
    return (alpha * beta).amax(1, keepdim=True)


class DetectionNet(nn.Module):
    """Keypoint scores >= 0 at full resolution from the bridged descriptor map, the stem map and the image."""

    def __init__(self, in_channels: int, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        a, g, c = config.feature_channels, config.image_channels, config.merge_channels
        self.conv_feature = nn.Conv2d(in_channels, a, 3, padding=1)
        self.conv_image = nn.Conv2d(3, g, 3, padding=1)
        self.conv_merge = nn.Conv2d(a + g, c, 3, padding=1)
        self.conv_score = nn.Conv2d(c, 1, 1)
        self.activation = nn.PReLU()  # one slope, shared by the three hidden layers

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """features: (B, C, h, w), stride 4. image: (B, 3, H, W), ImageNet-normalised. Returns (B, 1, H, W)."""
        if not self.config.use_peakiness:
            return self._merge(features, image)
        peak_feature = peakiness(features, self.config.peak_norm)
        peak_image = peakiness(image, self.config.peak_norm)
        score = self._merge(peak_feature * features, peak_image * image)
        return upsample(peak_feature, 4, _size(image), self.config.alignment) * peak_image * score

    def _merge(self, features: Tensor, image: Tensor) -> Tensor:
        deep = self._activate(self.conv_feature(features))
        shallow = self._activate(self.conv_image(image))
        deep = upsample(deep, 4, _size(image), self.config.alignment)
        merged = self._activate(self.conv_merge(torch.cat((deep, shallow), 1)))
        return F.softplus(F.instance_norm(self._score(merged)))

    def _score(self, x: Tensor) -> Tensor:
        """``conv_score`` as a matrix product: convolution libraries are slow where one channel comes out."""
        logits = self.conv_score.weight[:, :, 0, 0] @ x.flatten(2)
        return logits.unflatten(2, x.shape[-2:]) + self.conv_score.bias

    def _activate(self, x: Tensor) -> Tensor:
        return self.activation(F.instance_norm(x))


def _size(image: Tensor) -> tuple[int, int]:
    return (image.shape[-2], image.shape[-1])
