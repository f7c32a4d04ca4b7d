"""Detection network with peakiness measurement (spec section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfeat_core.errors import ConfigError
from scfeat_core.network.fused import add_relu
from scfeat_core.network.layers import Alignment, upsample

PeakNorm = Literal["max", "absmax"]
EPS = 1e-5  # of all instance norms
LUMA = (0.299 * 0.229, 0.587 * 0.224, 0.114 * 0.225)  # ITU-R BT.601, of channels that ImageNet's deviations divided


@dataclass(frozen=True)
class DetectorConfig:
    """Widths of the feature branch, the image branch and their merger; defaults are the published network's.

    stride: pixels from one position that is computed to the next: 1 is :class:`DetectionNet`, as published, 2 is
    :class:`CellDetectionNet`, whose widths are those of the layers of the same name; it knows no peakiness.
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
    stride: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.stride == 2 and self.use_peakiness:
            raise ConfigError("use_peakiness: expected false with stride: 2, found true; set it, or stride: 1")


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


class CellDetectionNet(nn.Module):
    """Keypoint scores >= 0 at full resolution from maps at half of it: a position scores the four pixels of its cell.

    For small networks, where maps of the size of the image take most of the time though they have few channels. The
    image comes in as luma of mean 0 and variance 1, so that no layer has to be normalised for its brightness; the
    scores are normalised as those of DetectionNet.
    """

    def __init__(self, in_channels: int, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        a, g, c = config.feature_channels, config.image_channels, config.merge_channels
        self.features = nn.Sequential(nn.Conv2d(in_channels, a, 1), nn.ReLU(inplace=True), nn.Conv2d(a, c, 1))
        self.image = nn.Sequential(nn.Conv2d(1, g, 6, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(g, c, 3, padding=1))
        self.score = nn.Sequential(nn.Conv2d(c, 4, 3, padding=1))

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """features: (B, C, h, w), stride 4. image: (B, 3, H, W), ImageNet-normalised. Returns (B, 1, H, W)."""
        height, width = _size(image)
        luma = normalise_plane(_luma(image))
        if height % 2 or width % 2:  # a padding by nothing is a copy
            luma = F.pad(luma, (0, width % 2, 0, height % 2), mode="replicate")
        shallow = self.image[:-1](luma)
        deep = upsample(self.features(features), 2, _size(shallow), self.config.alignment)
        scores = _pixels(self.score(add_relu(self.image[-1], deep, shallow)).float())[..., :height, :width]
        return F.softplus(normalise_plane(scores))


def create_detector(in_channels: int, config: DetectorConfig) -> DetectionNet | CellDetectionNet:
    """in_channels: of the bridged descriptor map and the stem map together."""
    return DetectionNet(in_channels, config) if config.stride == 1 else CellDetectionNet(in_channels, config)


def _luma(image: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 1, H, W); sums of planes, which are faster than a product and exact in any precision."""
    red, green, blue = image.split(1, 1)
    return torch.add(torch.add(red * LUMA[0], green, alpha=LUMA[1]), blue, alpha=LUMA[2])


def normalise_plane(x: Tensor) -> Tensor:
    """Instance norm of one channel, (B, 1, H, W), where torch's own is slow."""
    x = x - x.mean((2, 3), keepdim=True)
    return x * torch.rsqrt((x * x).mean((2, 3), keepdim=True) + EPS)


def _pixels(cells: Tensor) -> Tensor:
    """(B, 4, h, w) to (B, 1, 2 h, 2 w): torch's pixel_shuffle, faster where channels come last."""
    batch, _, h, w = cells.shape
    blocks = cells.permute(0, 2, 3, 1).unflatten(3, (2, 2))
    return blocks.permute(0, 1, 3, 2, 4).reshape(batch, 1, 2 * h, 2 * w)


def _size(image: Tensor) -> tuple[int, int]:
    return (image.shape[-2], image.shape[-1])
