"""The network as a program of one size that other libraries can read."""

from __future__ import annotations

import importlib
import inspect
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfeat_core.engines.contract import Maps

aten = torch.ops.aten
OPSET = 17
INPUT, OUTPUTS = "image", ("score_map", "descriptor_map")


def exported(network: nn.Module, image: Tensor) -> Any:
    """The network as a torch.export.ExportedProgram for images like this one, with all sizes as constants."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(network, (image,))


def traceable(network: nn.Module, image: Tensor) -> nn.Module:
    """The network for images like this one, with all sizes as constants, in operations that converters know and, on a
    CPU, that their libraries are fast at.
    """
    program: Any = exported(network, image).module()
    for node in list(program.graph.nodes):
        _REWRITES.get(node.target, _as_it_is)(program, node)
        if image.device.type == "cpu":
            _REWRITES_ON_CPU.get(node.target, _as_it_is)(program, node)
    program.recompile()
    return _Evaluated(program)


def to_onnx(network: nn.Module, image: Tensor) -> bytes:
    """The network as an ONNX file for images like this one; needs the package onnx, not onnxscript."""
    options: dict[str, Any] = {"input_names": [INPUT], "output_names": list(OUTPUTS), "opset_version": OPSET}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # before torch 2.5 there was no other exporter
        options["dynamo"] = False
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        torch.onnx.export(traceable(network, image), (image,), str(path), **options)
        return path.read_bytes()


class _Evaluated(nn.Module):
    """Exported programs refuse to change their mode, which converters ask for in any case."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, image: Tensor) -> Maps:
        return self.program(image)

    def train(self, mode: bool = True) -> _Evaluated:
        self.training = mode
        return self


# -- operations --------------------------------------------------------------------------------------------------------


def _as_it_is(program: Any, node: Any) -> None:
    pass


def _affine_norm(program: Any, node: Any) -> None:
    """Weights of one and biases of zero for an instance norm without: ONNX has none, and the exporter adds them only
    where it can tell the number of channels, which it loses after a padding.
    """
    if node.args[1] is not None:
        return
    channels = node.args[0].meta["val"].shape[1]
    with program.graph.inserting_before(node):
        weight = _constant(program, f"ones_{channels}", torch.ones(channels))
        bias = _constant(program, f"zeros_{channels}", torch.zeros(channels))
    node.args = (node.args[0], weight, bias, *node.args[3:])


def _constant(program: Any, name: str, value: Tensor) -> Any:
    if not hasattr(program, name):
        program.register_buffer(name, value.to(next(program.parameters()).device))
    return program.graph.get_attr(name)


def _log_of_exp(program: Any, node: Any) -> None:
    """max(x, 0) + log(1 + exp(-|x|)) for a softplus, which ONNX Runtime computes one number at a time: 57 of 156 ms."""
    if len(node.args) > 1 or node.kwargs:  # another slope or threshold
        return
    (x,) = node.args
    with program.graph.inserting_before(node):
        small = _called(program, aten.exp, _called(program, aten.neg, _called(program, aten.abs, x)))
        tail = _called(program, aten.log, program.graph.call_function(aten.add.Tensor, (small, 1.0)))
        total = program.graph.call_function(aten.add.Tensor, (_called(program, aten.relu, x), tail))
    _replace(program, node, total)


def _leaky_relu(program: Any, node: Any) -> None:
    """For a PReLU with one slope, which takes 5 times as long."""
    x, weight = node.args
    slope = program.get_parameter(weight.target)
    if slope.numel() == 1:
        with program.graph.inserting_before(node):
            _replace(program, node, program.graph.call_function(aten.leaky_relu.default, (x, float(slope))))


def _called(program: Any, operation: Any, x: Any) -> Any:
    return program.graph.call_function(operation.default, (x,))


def _replace(program: Any, node: Any, other: Any) -> None:
    node.replace_all_uses_with(other)
    program.graph.erase_node(node)


_REWRITES: dict[Any, Callable[[Any, Any], None]] = {aten.instance_norm.default: _affine_norm}
_REWRITES_ON_CPU: dict[Any, Callable[[Any, Any], None]] = {
    aten.softplus.default: _log_of_exp,
    aten.prelu.default: _leaky_relu,
}


def versions(*packages: str) -> dict[str, str]:
    """Of importable packages."""
    return {name: str(importlib.import_module(name).__version__) for name in packages}
