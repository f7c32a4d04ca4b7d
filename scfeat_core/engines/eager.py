"""The network by torch, operation by operation: the reference of all other engines."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from scfeat_core.engines.contract import Maps


class EagerEngine:
    """Any size, nothing to prepare; on a CPU the same results from run to run.

    While one is called on CUDA, convolutions of the whole process go without TensorFloat-32 (see WithoutTensorFloat).
    """

    name = "eager"
    note = making = ""

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "float32") -> None:
        self.precision = precision
        self.network = network
        self._device = device
        self._dtype = getattr(torch, precision)

    @torch.inference_mode()
    def run(self, image: Tensor) -> Maps:
        half = self._dtype != torch.float32
        with exact(self._device), torch.autocast(self._device.type, self._dtype, enabled=half):
            score_map, descriptor_map = self.network(image)
        return score_map, descriptor_map

    def unasked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

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


class WithoutTensorFloat:
    """Without TensorFloat-32, which torch takes for float32 in convolutions unless it is told not to.

    The switch is one of the process: off while there are users, in any thread, and after the last one what it was
    before the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of all below
        self._users = 0
        self._switches: list[tuple[Any, str, Any]] = []  # object, attribute, value that means off
        self._before: list[Any] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._switches = _switches()
                self._before = [getattr(place, name) for place, name, _ in self._switches]
                for switch in self._switches:
                    setattr(*switch)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for (place, name, _), value in zip(self._switches, self._before, strict=True):
                    setattr(place, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """torch has new ones since 2.9, and does not tell the old one where it says something else than they."""
    cudnn: Any = torch.backends.cudnn
    new = [(getattr(cudnn, name), "fp32_precision", "ieee") for name in ("conv", "rnn") if hasattr(cudnn, name)]
    try:
        told = isinstance(cudnn.allow_tf32, bool)
    except RuntimeError:
        told = False
    return [(cudnn, "allow_tf32", False), *new] if told else new  # in this order: it sets the new ones, too


_EXACT = WithoutTensorFloat()


def exact(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """:class:`WithoutTensorFloat` where it is needed; one for all of the process."""
    return _EXACT if device.type == "cuda" else contextlib.nullcontext()
