"""The network as rewritten for inference against the one that is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scfeat_core.network.inference import inference_network
from scfeat_core.network.model import ModelConfig, SCFeat


def trained(model: SCFeat) -> SCFeat:
    """The model with batch norms that do something and a coupling bridge that is not its start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.3, 3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


def random_model(variant: str | ModelConfig) -> SCFeat:
    torch.manual_seed(0)
    return trained(SCFeat.create(variant) if isinstance(variant, str) else SCFeat(variant))


def assert_same_maps(model: SCFeat, image: Tensor, tolerance: float = 1e-4) -> None:
    """tolerance: of a map's largest absolute value."""
    with torch.inference_mode():
        output = model(image)
        score_map, descriptor_map = inference_network(model)(image)
    for found, expected in ((score_map, output.score_map), (descriptor_map, model.descriptor_map(output))):
        assert found.shape == expected.shape
        assert torch.isfinite(found).all()
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("variant", ["lite", "r18", "r50"])
def test_maps_are_those_of_the_network_that_is_trained(variant: str) -> None:
    assert_same_maps(random_model(variant), torch.randn(1, 3, 64, 96))


def test_batch_norms_are_folded_and_the_given_model_is_left_alone() -> None:
    model = random_model("lite")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = inference_network(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
