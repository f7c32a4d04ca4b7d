"""SCFeat: backbone and detector in one module, and the variants that are built and trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from scfeat_core.errors import ConfigError
from scfeat_core.network.backbone import BackboneConfig, BackboneOutput, F2RBackbone
from scfeat_core.network.detector import DetectorConfig, create_detector

MIN_IMAGE_SIZE = 32  # pixels; below it the stride 16 map has a single row
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DescriptorSource = Literal["desc_map", "local_map"]


@dataclass(frozen=True)
class ModelConfig:
    """descriptor_source: the map that descriptors are sampled from at inference, before or after the bridge."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    descriptor_source: DescriptorSource = "desc_map"

    def __post_init__(self) -> None:
        if self.backbone.alignment != self.detector.alignment:
            raise ConfigError(
                f"expected one alignment in backbone and detector, found '{self.backbone.alignment}' and "
                f"'{self.detector.alignment}'; set both"
            )


_RESNET = ModelConfig()
VARIANTS: dict[str, ModelConfig] = {
    "r50": _RESNET,
    "r34": replace(_RESNET, backbone=BackboneConfig(encoder="resnet34")),
    "r18": replace(_RESNET, backbone=BackboneConfig(encoder="resnet18")),
    # The same blueprint within 1.5 M parameters and 3 GMAC at 640 x 480.
    "lite": ModelConfig(
        backbone=BackboneConfig(
            encoder="efficientnet_lite0",
            decoder_channels=(64, 32),
            branch_channels=64,
            fusion_out_ch=64,
            norm_groups=8,
            up_kernel=1,
            side_kernel=1,
            fusion_order="conv_up",
        ),
        detector=DetectorConfig(
            feature_channels=32,
            image_channels=16,
            merge_channels=16,
            peak_norm="absmax",
            use_peakiness=False,
            stride=2,
        ),
        descriptor_source="local_map",
    ),
}


class NetworkOutput(NamedTuple):
    """desc_map, local_map: (B, D, ceil(H / 4), ceil(W / 4)). score_map: (B, 1, H, W), >= 0."""

    desc_map: Tensor
    local_map: Tensor
    score_map: Tensor


class SCFeat(nn.Module):
    """Weakly supervised local features with a shared coupling bridge (Sun, Zhu and Ji, arXiv:2212.07047)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.descriptor_space = "scfeat:random"
        self.backbone = F2RBackbone(config.backbone)
        in_channels = config.backbone.fusion_out_ch + self.backbone.encoder.stem_channels
        self.detector = create_detector(in_channels, config.detector)

    @classmethod
    def create(cls, variant: str = "lite") -> SCFeat:
        """A network with random weights: ``lite``, ``r18``, ``r34`` or ``r50``."""
        if variant not in VARIANTS:
            raise ConfigError(f"network variant: expected one of {', '.join(VARIANTS)}, found '{variant}'")
        return cls(VARIANTS[variant])

    @classmethod
    def from_pretrained(cls, weights: str | Path = "lite", *, sha256: str = "") -> SCFeat:
        """Load weights by the name of a shipped file or by path; no network access. Raises WeightsError."""
        from scfeat_core.network.weights import load_model

        return load_model(weights, sha256=sha256)

    @property
    def descriptor_dim(self) -> int:
        return self.config.backbone.fusion_out_ch

    def forward(self, image: Tensor) -> NetworkOutput:
        """image: (B, 3, H, W) float, RGB in [0, 1] normalised by the ImageNet mean and deviation; H, W >= 32."""
        maps: BackboneOutput = self.backbone(image)
        return NetworkOutput(maps.desc_map, maps.local_map, self.detect(maps, image))

    def detect(self, maps: BackboneOutput, image: Tensor) -> Tensor:
        """Score map (B, 1, H, W). Its inputs are detached: the detector never trains the backbone (spec 3.1)."""
        features = torch.cat((maps.local_map, maps.stem_map), 1).detach()
        return self.detector(features, image)

    def descriptor_map(self, output: NetworkOutput | BackboneOutput) -> Tensor:
        """The map that inference samples descriptors from, un-normalised."""
        return output.desc_map if self.config.descriptor_source == "desc_map" else output.local_map
