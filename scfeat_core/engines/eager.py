"""The network by torch, operation by operation: the reference of all other engines."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from scfeat_core.engines.contract import Maps


class EagerEngine:
    """Any size, nothing to prepare; on a CPU the same results from run to run.

    On CUDA it changes a switch of the process while it is called (``torch.backends.cudnn.allow_tf32``): of two threads
    that both run networks, one may find that of the other.
    """

    name = "eager"
    note = ""

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "float32") -> None:
        self.precision = precision
        self.network = network
        self._device = device
        self._dtype = getattr(torch, precision)

    @torch.inference_mode()
    def run(self, image: Tensor) -> Maps:
        half = self._dtype != torch.float32
        with _exact(self._device), torch.autocast(self._device.type, self._dtype, enabled=half):
            score_map, descriptor_map = self.network(image)
        return score_map, descriptor_map

    def close(self) -> None:
        pass


def with_weights_in(network: nn.Module, precision: str) -> nn.Module:
    """A copy with the weights of the backbone's convolutions in the precision: autocast would convert them with every
    image. The detector, which is small, does some of its arithmetic in float32.
    """
    network = copy.deepcopy(network)
    for module in network.get_submodule("backbone").modules():
        if isinstance(module, nn.Conv2d):
            module.to(getattr(torch, precision))
    return network


def _exact(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without TensorFloat-32, which torch takes for float32 in convolutions unless it is told not to."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(True, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)
