"""The network as rewritten for inference against the one that is trained."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from scfeat_core.network import fused
from scfeat_core.network.detector import CellDetectionNet, DetectionNet, DetectorConfig
from scfeat_core.network.fused import FusedConv2d, convolution, fuse_convolutions, fuses
from scfeat_core.network.inference import RewrittenDetector, inference_network
from scfeat_core.network.layers import upsample
from scfeat_core.network.model import VARIANTS, ModelConfig, SCFeat
from scfeat_core.network.rewriting import UpsampledConv2d, fast_upsample, fold_batch_norms

LITE = VARIANTS["lite"]
SMALL = replace(  # the published blueprint, small: convolutions of 3x3 after upsampling, and a detector of each pixel
    LITE,
    backbone=replace(LITE.backbone, up_kernel=3, side_kernel=3, fusion_order="up_conv"),
    detector=DetectorConfig(8, 8, 8, peak_norm="absmax"),
    descriptor_source="desc_map",
)
WIDE = replace(SMALL, detector=replace(SMALL.detector, feature_channels=24, image_channels=8, merge_channels=20))


def trained(model: SCFeat) -> SCFeat:
    """The model with norms and a coupling bridge that are not what they start as."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.3, 3)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    bridge = model.backbone.bridge
    for parameter in bridge.parameters():
        nn.init.normal_(parameter, mean=0.2, std=0.1)
    return model.eval()


def random_model(variant: str | ModelConfig) -> SCFeat:
    torch.manual_seed(0)
    return trained(SCFeat.create(variant) if isinstance(variant, str) else SCFeat(variant))


def with_detector(config: ModelConfig = LITE, **changes: object) -> ModelConfig:
    return replace(config, detector=replace(config.detector, **changes))


def with_backbone(config: ModelConfig = LITE, **changes: object) -> ModelConfig:
    return replace(config, backbone=replace(config.backbone, **changes))


def legacy(config: ModelConfig) -> ModelConfig:
    detector = replace(config.detector, alignment="legacy")
    return replace(config, backbone=replace(config.backbone, alignment="legacy"), detector=detector)


def assert_same_maps(model: SCFeat, image: Tensor, tolerance: float = 2e-5) -> None:
    """tolerance: of a map's largest absolute value."""
    network = inference_network(model).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        output = model(image)
        score_map, descriptor_map = network(image)
    for found, expected in ((score_map, output.score_map), (descriptor_map, model.descriptor_map(output))):
        assert found.shape == expected.shape
        assert torch.isfinite(found).all()
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("variant", ["lite", "r18", "r50", SMALL])
def test_maps_are_those_of_the_network_that_is_trained(variant: str | ModelConfig) -> None:
    assert_same_maps(random_model(variant), torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (34, 61), (50, 51), (63, 64), (119, 161), (120, 160)])
@pytest.mark.parametrize("config", [LITE, SMALL, WIDE], ids=["lite", "small", "wide"])
def test_images_of_any_size(config: ModelConfig, size: tuple[int, int]) -> None:
    assert_same_maps(random_model(config), torch.randn(2, 3, *size))


@pytest.mark.parametrize(
    "config",
    [
        legacy(LITE),
        legacy(SMALL),
        legacy(WIDE),
        replace(WIDE, detector=replace(WIDE.detector, use_peakiness=False, peak_norm="max")),
        with_detector(SMALL, peak_norm="max"),
        with_detector(SMALL, use_peakiness=False),
        with_detector(SMALL, feature_channels=12, image_channels=4, merge_channels=6),
        with_detector(feature_channels=12, image_channels=4, merge_channels=6),
        with_backbone(cn_parts="position"),
        with_backbone(cn_parts="channel"),
        with_backbone(cn_parts="none"),
        with_backbone(cn_fuse="ratio", cn_init="legacy"),
        with_backbone(fusion_order="up_conv"),
        with_backbone(SMALL, fusion_order="conv_up"),
        replace(LITE, descriptor_source="desc_map"),
    ],
    ids=lambda config: "",
)
def test_every_configuration(config: ModelConfig) -> None:
    assert_same_maps(random_model(config), torch.randn(2, 3, 64, 48))


def test_channels_last_images_give_the_same() -> None:
    network = inference_network(random_model("lite"))
    image = torch.randn(2, 3, 49, 64)
    with torch.inference_mode():
        for a, b in zip(network(image), network(image.contiguous(memory_format=torch.channels_last)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "config", [LITE, with_detector(SMALL, peak_norm="max"), with_detector(SMALL, peak_norm="absmax")], ids=lambda _: ""
)
def test_dark_and_uniform_images(config: ModelConfig) -> None:
    model = random_model(config)
    dark = torch.rand(1, 3, 64, 64) * 0.01 - 2.1
    assert_same_maps(model, dark, tolerance=2e-4)  # what is divided by a small contrast has lost digits in both
    with torch.inference_mode():
        for value in (0.0, -2.1, 2.6):
            maps = inference_network(model)(torch.full((1, 3, 64, 64), value))
            assert all(torch.isfinite(found).all() for found in maps)


def test_other_memory_of_the_image_is_left_alone() -> None:
    network = inference_network(random_model("lite"))
    image = torch.randn(1, 3, 64, 64)
    before = image.clone()
    with torch.inference_mode():
        first = network(image)
        second = network(image)
    assert torch.equal(image, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_norms_are_folded_and_the_given_model_is_left_alone() -> None:
    model = random_model("lite")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = inference_network(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {name for name, _ in model.named_parameters()} <= before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("variant", ["lite", "r18", "r50"])
def test_folding_alone_is_exact(variant: str) -> None:
    encoder = random_model(variant).backbone.encoder
    folded = copy.deepcopy(encoder)
    fold_batch_norms(folded)
    fuse_convolutions(folded)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for a, b in zip(folded(image), encoder(image), strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("record", ["trace", "export"])
def test_graphs_are_the_same_function(record: str) -> None:
    model = random_model("lite")
    network = inference_network(model)
    image, other = torch.randn(1, 3, 64, 96), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        output = model(other)
        if record == "trace":
            graph = torch.jit.trace(network, image)
        else:
            graph = torch.export.export(network, (image,)).module()
        for found, expected in zip(graph(other), (output.score_map, output.local_map), strict=True):
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_copies_of_a_network_that_has_run_give_the_same() -> None:
    network = inference_network(random_model("lite"))
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network(image)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert all(torch.equal(a, b) for a, b in zip(other(image), expected, strict=True))


def test_half_precision_takes_the_plain_operators() -> None:
    network = inference_network(random_model("lite"))
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        exact = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert not fuses(image)
            rough = network(image)
    similarity = torch.cosine_similarity(exact[1], rough[1], dim=1)
    assert similarity.median() > 0.99


@pytest.mark.parametrize("alignment", ["exact", "legacy"])
@pytest.mark.parametrize(("factor", "size"), [(2, (17, 24)), (2, (18, 23)), (4, (33, 45)), (4, (36, 48))])
def test_upsampling_of_the_padded_map(alignment: str, factor: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, -(-size[0] // factor), -(-size[1] // factor))
    torch.testing.assert_close(fast_upsample(x, factor, size, alignment), upsample(x, factor, size, alignment))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("conv", [nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 6, 5, 1, 2, groups=6)])
def test_fused_convolution(conv: nn.Conv2d, activation: str) -> None:
    function = {"none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6()}[activation]
    x = 5 * torch.randn(2, 6, 13, 10)
    fused = FusedConv2d(conv, activation)
    with torch.inference_mode():
        expected = conv(x)
        torch.testing.assert_close(fused(x), function(expected), atol=1e-5, rtol=1e-5)
        total = torch.randn_like(expected)
        torch.testing.assert_close(fused.add_to(total.clone(), x), total + expected, atol=1e-5, rtol=1e-5)
        both = torch.relu(total + expected)
        torch.testing.assert_close(fused.add_to(total.clone(), x, "relu"), both, atol=1e-5, rtol=1e-5)
        part = torch.zeros(*total.shape[:2], 20, 20)[..., : total.shape[2], : total.shape[3]]
        torch.testing.assert_close(fused.add_to(part, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "kind"), [(LITE, CellDetectionNet), (WIDE, RewrittenDetector), (legacy(WIDE), DetectionNet)]
)
def test_which_detectors_are_rewritten(config: ModelConfig, kind: type[nn.Module]) -> None:
    assert type(inference_network(random_model(config)).detector) is kind


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("size", [(24, 32), (23, 31), (22, 29), (21, 30)])
def test_convolution_of_an_upsampled_map(factor: int, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(5, 20, 3, padding=1)
    x = torch.randn(2, 5, -(-size[0] // factor), -(-size[1] // factor))
    with torch.inference_mode():
        expected = conv(upsample(x, factor, size, "exact"))
        torch.testing.assert_close(UpsampledConv2d(conv, factor)(x, size), expected, atol=1e-5, rtol=1e-5)


def test_making_the_network_draws_no_random_numbers() -> None:
    model = random_model(SMALL)
    state = torch.random.get_rng_state()
    inference_network(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_torch_without_the_fused_operators_takes_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 3, 48, 64)
    conv = convolution(torch.randn(16, 3, 3, 3), torch.randn(16), padding=1)
    expected = conv(x)
    assert fuses(x) or not torch.backends.mkldnn.is_available()
    monkeypatch.delattr(torch.ops.mkldnn, "_reorder_convolution_weight", raising=False)
    monkeypatch.setattr(fused, "_FUSED", {**fused._FUSED, "relu6": ("no such activation", [])})
    fused._works.cache_clear()
    try:
        assert not fuses(x)
        torch.testing.assert_close(conv(x), expected)
    finally:
        fused._works.cache_clear()
