"""Shared coupling-bridge normalization: the cross-norm between description and detection (spec section 2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BridgeParts = Literal["both", "position", "channel", "none"]


class CouplingBridge(nn.Module):
    """Blend of a position-wise norm with predicted affine maps and a channel-wise (instance) norm.

    init: ``legacy`` keeps torch's default convolution weights; ``identity`` starts as a pure norm (gain 1, offset 0).
    fuse: ``ratio`` blends with a / (a + b) as published; ``softmax`` of two logits rules out sign flips.
    Both start at 0.7 / 0.3. parts: one of the norms alone, or none of them, to measure what they are worth.
    """

    EPS = 1e-5

    def __init__(
        self, init: Literal["legacy", "identity"], fuse: Literal["ratio", "softmax"], parts: BridgeParts = "both"
    ) -> None:
        super().__init__()
        self.fuse = fuse
        self.parts = parts
        if parts in ("both", "position"):
            self.affine = nn.Conv2d(1, 2, 7, padding=3)  # gain and offset, predicted from the channel mean
            if init == "identity":
                nn.init.zeros_(self.affine.weight)
                self.affine.bias = nn.Parameter(torch.tensor([1.0, 0.0]))
        if parts == "both":
            start = torch.tensor([0.7, 0.3])
            self.blend = nn.Parameter(start if fuse == "ratio" else start.log())

    def position_norm(self, x: Tensor) -> Tensor:
        """Normalise each position over the channels (unbiased variance); (B, C, h, w) in and out."""
        mean = x.mean(1, keepdim=True)
        normed = (x - mean) * torch.rsqrt(x.var(1, keepdim=True, unbiased=True) + self.EPS)
        gain, offset = self.affine(mean).split(1, dim=1)
        return normed * gain + offset

    def channel_norm(self, x: Tensor) -> Tensor:
        """Normalise each channel over the image (biased variance); the same in training and evaluation."""
        return F.instance_norm(x, eps=self.EPS)

    def forward(self, x: Tensor) -> Tensor:
        if self.parts == "none":
            return x
        if self.parts != "both":
            return self.position_norm(x) if self.parts == "position" else self.channel_norm(x)
        a, b = self.blend.softmax(0) if self.fuse == "softmax" else self.blend / self.blend.sum()
        return self.position_norm(x) * a + self.channel_norm(x) * b
