"""The network against the reference values of the specification, and on images of every size."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from scfeat_core.errors import ConfigError
from scfeat_core.network.coupling_bridge import BridgeParts, CouplingBridge
from scfeat_core.network.detector import CellDetectionNet, DetectionNet, DetectorConfig, _pixels, peakiness
from scfeat_core.network.layers import upsample
from scfeat_core.network.model import SCFeat


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def wave(channels: int, height: int, width: int, c: float, y: float, x: float, offset: float = 0.0) -> Tensor:
    """sin(c * channel + y * row + x * column + offset), (1, channels, height, width)."""
    axes = [torch.arange(n, dtype=torch.float32) for n in (channels, height, width)]
    return torch.sin(c * axes[0][:, None, None] + y * axes[1][:, None] + x * axes[2] + offset)[None]


@pytest.fixture(scope="module")
def lite() -> SCFeat:
    torch.manual_seed(0)
    return SCFeat.create("lite").eval()


@pytest.mark.parametrize(("variant", "backbone"), [("r50", 22_197_158), ("r34", 15_188_646), ("r18", 9_801_126)])
def test_parameter_counts_are_those_of_the_published_network(variant: str, backbone: int) -> None:
    model = SCFeat.create(variant)
    assert (parameters(model.backbone), parameters(model.detector)) == (backbone, 628_930)


def test_lite_is_within_its_budget(lite: SCFeat) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        lite(torch.zeros(1, 3, 480, 640))
    assert parameters(lite) <= 1_500_000
    assert counter.get_total_flops() / 2 <= 3e9


def test_unknown_variant_is_named() -> None:
    with pytest.raises(ConfigError, match="'r99'"):
        SCFeat.create("r99")


@pytest.mark.parametrize("variant", ["r50", "r18"])
def test_tensor_contract(variant: str) -> None:
    model = SCFeat.create(variant).eval()
    image = torch.rand(1, 3, 96, 128)
    with torch.inference_mode():
        maps = model.backbone(image)
        output = model(image)
    assert maps.stem_map.shape == (1, 64, 24, 32)
    assert maps.global_map.shape == (1, 1024 if variant == "r50" else 256, 6, 8)
    assert output.desc_map.shape == output.local_map.shape == (1, 128, 24, 32)
    assert output.score_map.shape == (1, 1, 96, 128)
    assert (output.score_map >= 0).all()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (48, 64), (61, 250), (100, 75)])
def test_any_size_runs_and_keeps_its_size(lite: SCFeat, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        output = lite(torch.rand(2, 3, *size))
    assert output.score_map.shape == (2, 1, *size)
    assert output.local_map.shape[-2:] == tuple(-(-n // 4) for n in size)
    assert all(torch.isfinite(map_).all() for map_ in output)


@pytest.mark.parametrize("value", [0.0, -2.1, 2.6])
def test_uniform_images_give_finite_scores(lite: SCFeat, value: float) -> None:
    with torch.inference_mode():
        assert torch.isfinite(lite(torch.full((1, 3, 64, 64), value)).score_map).all()


def test_batch_equals_single_images(lite: SCFeat) -> None:
    images = torch.randn(3, 3, 64, 96)
    with torch.inference_mode():
        together, alone = lite(images), [lite(image[None]) for image in images]
    for i, one in enumerate(alone):
        for a, b in zip(together, one, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=2e-5, rtol=2e-5)


def test_coupling_bridge_reference_values() -> None:
    x = wave(4, 9, 10, 1.3, 0.7, 0.3)
    bridge = CouplingBridge("legacy", "ratio")
    i = torch.arange(7.0)
    with torch.no_grad():
        bridge.affine.weight[0, 0] = 0.01 * (i[:, None] - 3) + 0.02 * (i - 3) + 0.02
        bridge.affine.weight[1, 0] = 0.005 * (i[:, None] - 3) * (i - 3)
        bridge.affine.bias.copy_(torch.tensor([1.0, -0.25]))
        position, channel, fused = bridge.position_norm(x), bridge.channel_norm(x), bridge(x)
    close = {"atol": 2e-6, "rtol": 0.0}
    expected = torch.tensor([-1.439403, -1.065791, 0.520598, 0.995701])
    torch.testing.assert_close(position[0, :, 4, 5], expected, **close)
    expected = torch.tensor([-0.534837, 0.707364, 0.129738, -1.421493])
    torch.testing.assert_close(position[0, :, 0, 0], expected, **close)
    expected = torch.tensor([-1.297781, -0.894636, 0.819220, 1.332822])
    torch.testing.assert_close(channel[0, :, 4, 5], expected, **close)
    expected = torch.tensor([-1.396916, -1.014444, 0.610185, 1.096837])
    torch.testing.assert_close(fused[0, :, 4, 5], expected, **close)
    assert float(fused.sum()) == pytest.approx(-62.75327, abs=1e-4)
    assert float(fused.abs().sum()) == pytest.approx(298.69797, abs=1e-4)


def test_softmax_blend_starts_where_the_ratio_does() -> None:
    x = wave(4, 9, 10, 1.3, 0.7, 0.3)
    with torch.no_grad():
        torch.testing.assert_close(CouplingBridge("identity", "ratio")(x), CouplingBridge("identity", "softmax")(x))


def test_parts_of_the_bridge_are_those_that_are_blended() -> None:
    x = wave(4, 9, 10, 1.3, 0.7, 0.3)
    both = CouplingBridge("identity", "softmax")
    with torch.no_grad():
        torch.testing.assert_close(CouplingBridge("identity", "softmax", "position")(x), both.position_norm(x))
        torch.testing.assert_close(CouplingBridge("identity", "softmax", "channel")(x), both.channel_norm(x))
        assert torch.equal(CouplingBridge("identity", "softmax", "none")(x), x)
    for parts in get_args(BridgeParts):  # a parameter without a gradient would stop a distributed run
        bridge = CouplingBridge("identity", "softmax", parts)
        bridge(x.clone().requires_grad_()).square().sum().backward()
        assert all(p.grad is not None for p in bridge.parameters())


def test_detector_without_peakiness_still_scores() -> None:
    features, image = torch.rand(1, 8, 12, 16), torch.randn(1, 3, 48, 64)
    torch.manual_seed(0)
    plain = DetectionNet(8, DetectorConfig(4, 4, 4, use_peakiness=False))
    weighted = DetectionNet(8, DetectorConfig(4, 4, 4))
    weighted.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert plain(features, image).shape == (1, 1, 48, 64)
        assert not torch.allclose(plain(features, image), weighted(features, image))


CELLS = DetectorConfig(6, 8, 8, use_peakiness=False, stride=2)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (35, 46)])
def test_cells_score_every_pixel_and_move_with_the_image(size: tuple[int, int]) -> None:
    detector = CellDetectionNet(4, CELLS).eval()
    features = torch.zeros(1, 4, -(-size[0] // 4), -(-size[1] // 4))
    image = torch.zeros(1, 3, *size)
    image[..., 14, 19] = 1.0
    moved = image.roll((2, 4), (2, 3))
    with torch.no_grad():
        found, expected = detector(features, moved), detector(features, image).roll((2, 4), (2, 3))
    assert found.shape == (1, 1, *size)
    assert (found >= 0).all()
    torch.testing.assert_close(found[..., 8:26, 12:36], expected[..., 8:26, 12:36])


def test_cells_do_not_know_brightness_and_contrast() -> None:
    detector = CellDetectionNet(4, CELLS).eval()
    features, image = torch.randn(1, 4, 9, 12), 20 * torch.randn(1, 3, 36, 48)
    with torch.no_grad():
        torch.testing.assert_close(detector(features, 3 * image - 1), detector(features, image), atol=1e-4, rtol=1e-4)


def test_cells_are_laid_out_as_a_pixel_shuffle() -> None:
    cells = torch.randn(2, 4, 5, 7)
    assert torch.equal(_pixels(cells), nn.functional.pixel_shuffle(cells, 2))
    assert torch.equal(_pixels(cells.contiguous(memory_format=torch.channels_last)), _pixels(cells))


def test_cells_know_no_peakiness() -> None:
    with pytest.raises(ConfigError, match="use_peakiness: expected false with stride: 2"):
        DetectorConfig(stride=2)


def test_peakiness_reference_values() -> None:
    s = peakiness(wave(3, 6, 7, 0.9, 1.1, 0.6, 0.2))[0, 0]
    assert float(s[0, 0]) == pytest.approx(1.032623, abs=2e-6)
    assert float(s[2, 3]) == pytest.approx(0.583658, abs=2e-6)
    assert float(s[5, 6]) == pytest.approx(0.439371, abs=2e-6)
    assert float(s.mean()) == pytest.approx(0.838697, abs=2e-6)


def test_detector_never_trains_the_backbone(lite: SCFeat) -> None:
    image = torch.rand(1, 3, 64, 64)
    lite.detect(lite.backbone(image), image).sum().backward()
    assert all(p.grad is None for p in lite.backbone.parameters())
    assert any(p.grad is not None for p in lite.detector.parameters())
    lite.zero_grad()


def test_score_layer_equals_its_convolution() -> None:
    detector = DetectionNet(8, DetectorConfig(4, 4, 4))
    x = torch.randn(2, 4, 20, 30)
    with torch.no_grad():
        torch.testing.assert_close(detector._score(x), detector.conv_score(x))


def test_exact_upsampling_puts_input_p_at_output_factor_p() -> None:
    ramp = torch.arange(6.0).expand(1, 1, 5, 6)
    up = upsample(ramp, 4, (17, 24), "exact")
    assert up.shape == (1, 1, 17, 24)
    torch.testing.assert_close(up[0, 0, 3, :21], torch.arange(21) / 4)
    assert (up[0, 0, :, 21:] == 5).all()


def test_fusion_before_upsampling_is_an_exact_rewrite(lite: SCFeat) -> None:
    """A 1x1 convolution of upsampled maps equals the upsampled 1x1 convolution."""
    backbone = lite.backbone
    x1, x2, c3 = torch.randn(1, 32, 24, 32), torch.randn(1, 64, 12, 16), torch.randn(1, 112, 6, 8)
    size = (24, 32)
    with torch.inference_mode():
        branches = (
            backbone.side1(x1),
            upsample(backbone.side2(x2), 2, size, "exact"),
            upsample(backbone.side3(c3), 4, size, "exact"),
        )
        torch.testing.assert_close(
            backbone._fuse(x1, x2, c3), backbone.fusion(torch.cat(branches, 1)), atol=1e-5, rtol=1e-5
        )
