"""The network as a program of one size that other libraries can read."""

from __future__ import annotations

import importlib
import inspect
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfeat_core.engines.contract import Maps, Shape

OPSET = 17
INPUT, OUTPUTS = "image", ("score_map", "descriptor_map")


def exported(network: nn.Module, shape: Shape) -> Any:
    """The network as a torch.export.ExportedProgram for images (B, 3, H, W), with all sizes as constants."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(network, (torch.zeros(shape, device=next(network.parameters()).device),))


def to_onnx(network: nn.Module, shape: Shape) -> bytes:
    """The network as an ONNX file for images (B, 3, H, W) float32; needs the package onnx, not onnxscript.

    From the exported program rather than from the module: there all sizes are constants, and so they are in the file.
    """
    program = _Evaluated(_with_affine_norms(exported(network, shape).module()))
    image = torch.zeros(shape, device=next(network.parameters()).device)
    options: dict[str, Any] = {"input_names": [INPUT], "output_names": list(OUTPUTS), "opset_version": OPSET}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # before torch 2.5 there was no other exporter
        options["dynamo"] = False
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        torch.onnx.export(program, (image,), str(path), **options)
        return path.read_bytes()


class _Evaluated(nn.Module):
    """Exported programs refuse to change their mode, which the exporter asks for in any case."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, image: Tensor) -> Maps:
        return self.program(image)

    def train(self, mode: bool = True) -> _Evaluated:
        self.training = mode
        return self


def _with_affine_norms(program: Any) -> Any:
    """Instance norms get weights of one and biases of zero: ONNX has none without, and the exporter adds them only
    where it can tell the number of channels, which it loses after a padding.
    """
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.aten.instance_norm.default or node.args[1] is not None:
            continue
        channels = node.args[0].meta["val"].shape[1]
        with program.graph.inserting_before(node):
            weight = _constant(program, f"ones_{channels}", torch.ones(channels))
            bias = _constant(program, f"zeros_{channels}", torch.zeros(channels))
        node.args = (node.args[0], weight, bias, *node.args[3:])
    program.recompile()
    return program


def _constant(program: Any, name: str, value: Tensor) -> Any:
    if not hasattr(program, name):
        program.register_buffer(name, value.to(next(program.parameters()).device))
    return program.graph.get_attr(name)


def versions(*packages: str) -> dict[str, str]:
    """Of importable packages."""
    return {name: str(importlib.import_module(name).__version__) for name in packages}
