"""Convolutions that oneDNN computes together with what follows them, where torch runs eagerly on a CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "relu", "relu6"]
# Names and parameters of torch.ops.mkldnn, the operators that torch.compile makes of the same.
_FUSED: dict[Activation, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}


def fuses(x: Tensor) -> bool:
    """Whether the fused operators take ``x``: not on other devices, in other precisions, or for a graph."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and _available()
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _available() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) and _works()


@lru_cache(maxsize=1)
def _works() -> bool:
    """Whether this torch has the operators, for this processor, and they do what is expected of them.

    They are torch's own affair: another version may call them otherwise.
    """
    x = torch.linspace(-1, 1, 2 * 8 * 5 * 6).view(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.linspace(-1, 1, 16 * 8 * 9).view(16, 8, 3, 3), torch.linspace(-1, 1, 16)
    try:
        return _agree(x, weight, bias)
    except Exception:  # whatever a missing operator, or one with other parameters, comes to
        return False


@torch.inference_mode()
def _agree(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    geometry = [1, 1], [1, 1], [1, 1], 1
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry)
    plain = F.conv2d(x, weight, bias, padding=1)
    fused = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, *_FUSED["relu6"], "")
    total = torch.ones_like(plain)
    added = torch.ops.mkldnn._convolution_pointwise_.binary(
        total, x, packed, bias, *geometry, "add", None, "relu", [], None
    )
    return torch.allclose(fused, F.relu6(plain), atol=1e-4) and torch.allclose(added, F.relu(1 + plain), atol=1e-4)


class FusedConv2d(nn.Module):
    """A convolution for inference, then an activation, in one pass over memory where :func:`fuses` allows it.

    The weights are kept once more, in the order that the CPU wants: without that they are sorted with every image. (And
    torch by itself gives convolutions of 1x1 pixels to a slower library on one thread.)
    """

    def __init__(self, conv: nn.Conv2d, activation: Activation = "none") -> None:
        super().__init__()
        self.conv = conv
        self.activation = activation
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not fuses(x):
            return _activated(self.conv(x), self.activation)
        name, values = _FUSED[self.activation]
        geometry = self._geometry()
        return torch.ops.mkldnn._convolution_pointwise(x, self._weight(), self.conv.bias, *geometry, name, values, "")

    def add_to(self, total: Tensor, x: Tensor, activation: Literal["none", "relu"] = "none") -> Tensor:
        """``total`` plus the convolution of x, then this activation and not its own; in place where it can be."""
        if not fuses(x):
            return _activated(total + self.conv(x), activation)
        total = total.contiguous(memory_format=torch.channels_last)
        geometry, after = self._geometry(), None if activation == "none" else activation
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            total, x, self._weight(), self.conv.bias, *geometry, "add", None, after, [], None
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # which can be neither copied nor saved

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        conv = self.conv
        return list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups  # type: ignore[arg-type]

    def _weight(self) -> Tensor:
        if self._packed is None:
            with torch.no_grad():
                self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.conv.weight, *self._geometry())
        return self._packed


def _activated(y: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return y
    return F.relu(y) if activation == "relu" else F.relu6(y)


def add_relu(conv: nn.Module, total: Tensor, x: Tensor) -> Tensor:
    """ReLU of ``total``, which may be overwritten, plus the convolution of x."""
    return conv.add_to(total, x, "relu") if isinstance(conv, FusedConv2d) else F.relu(total + conv(x))


def convolution(
    weight: Tensor, bias: Tensor | None = None, stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0
) -> FusedConv2d:
    """A convolution with these weights (O, I, kernel rows, kernel columns)."""
    out, channels, rows, columns = weight.shape
    # Without weights of its own, which would be drawn from the global random numbers; torch's skip_init imports sympy
    # for that, 34 MB and a second.
    options: dict[str, Any] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    conv = nn.Conv2d(channels, out, (rows, columns), stride, padding, **options)
    conv.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return FusedConv2d(conv)


def fuse_convolutions(module: nn.Module) -> None:
    """Replace convolutions and the ReLU or ReLU6 behind them in every sequence of ``module``, in place.

    Identities between them, which folded norms leave behind, are dropped.
    """
    for child in module.modules():
        if isinstance(child, nn.Sequential):
            _fuse_sequence(child)


def _fuse_sequence(sequence: nn.Sequential) -> None:
    layers: list[nn.Module] = []
    for layer in sequence:
        last = layers[-1] if layers else None
        if isinstance(layer, nn.Conv2d):
            layers.append(FusedConv2d(layer))
        elif isinstance(layer, (nn.ReLU, nn.ReLU6)) and isinstance(last, FusedConv2d) and last.activation == "none":
            last.activation = "relu6" if isinstance(layer, nn.ReLU6) else "relu"
        elif not isinstance(layer, nn.Identity):
            layers.append(layer)
    sequence._modules.clear()
    for i, layer in enumerate(layers):
        sequence.add_module(str(i), layer)
