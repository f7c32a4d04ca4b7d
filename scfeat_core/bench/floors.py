"""What a machine could do at best: operations over its rate of matrix products, bytes over its rate of copies.

The operations of the network are those that ``torch.utils.flop_counter`` counts, two for a multiplication with its
addition. The bytes are what the convolutions and matrix products, one after the other, have to read and write if all
that is between them is fused into them: of each its input, its weights and its output, once. Neither needs an image:
both are counted on tensors without content (torch's meta device), at any size.

A floor is the larger of the two times. Nothing is that fast; how many times the floor a stage takes says how much there
is to be gained, and by what.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scfeat_core.training.throughput import matmul_rate

Way = Literal["copy", "to_device", "from_device"]
_REPEATS = 3
_PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True)
class Work:
    """The least that has to be done. way: where the bytes go: within the memory of the device, or from or to it."""

    flops: float = 0.0
    bytes: float = 0.0
    way: Way = "copy"

    def times(self, count: float) -> Work:
        return replace(self, flops=count * self.flops, bytes=count * self.bytes)

    def __add__(self, other: Work) -> Work:
        return replace(self, flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


@dataclass(frozen=True)
class Rates:
    """Of one device, measured. flops: operations a second of a large matrix product in the precision. copy, to_device,
    from_device: bytes a second that are read or written; of a copy within the device both count."""

    flops: float
    copy: float
    to_device: float
    from_device: float

    def best_of(self, other: Rates) -> Rates:
        """The faster one of each: a floor does not know about a machine that was busy."""
        names = ("flops", "copy", "to_device", "from_device")
        return Rates(*(max(getattr(self, name), getattr(other, name)) for name in names))


def floor(work: Work, rates: Rates) -> dict[str, Any]:
    """Milliseconds of the arithmetic and of the bytes, the larger of which is the floor, and which that is."""
    compute, memory = 1e3 * work.flops / rates.flops, 1e3 * work.bytes / getattr(rates, work.way)
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "compute_ms": compute,
        "memory_ms": memory,
        "floor_ms": max(compute, memory),
        "bound": "compute" if compute >= memory else "memory",
    }


# -- rates -------------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, precision: str) -> Rates:
    """The best of some repetitions, half a second in all."""
    flops = max(matmul_rate(device, precision) for _ in range(_REPEATS))
    copy = copy_rate(device)
    if device.type != "cuda":
        return Rates(flops, copy, copy, copy)
    return Rates(flops, copy, _transfer_rate(device, True), _transfer_rate(device, False))


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _transfer_rate(device: torch.device, to_device: bool) -> float:
    """Bytes a second between pinned memory of the host and the device."""
    size = 1 << 26
    host = torch.ones(size // 4).pin_memory()
    there = torch.ones(size // 4, device=device)
    target, source = (there, host) if to_device else (host, there)
    return size / _fastest(lambda: target.copy_(source, non_blocking=True), device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


# -- the network -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkCost:
    """work: of one pass; its bytes in the precision that was asked for. peak_bytes: of the tensors that are held at
    once, weights included, in eager execution."""

    work: Work
    peak_bytes: float


def network_cost(network: nn.Module, shape: Sequence[int], precision: str = "float32") -> NetworkCost:
    """Counted, not run. network: takes an image (B, 3, H, W). shape: of that image. precision: of the arithmetic."""
    size = 4 if precision == "float32" else torch.finfo(getattr(torch, precision)).bits // 8
    # Without memory for the weights of a network that is on another device.
    imagined = copy.deepcopy(network).to("meta").eval()
    image = torch.empty(tuple(shape), device="meta").contiguous(memory_format=torch.channels_last)
    moved = _Moved()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, moved:
        imagined(image)
    weights = sum(tensor.numel() for tensor in (*imagined.parameters(), *imagined.buffers()))
    return NetworkCost(Work(counter.get_total_flops(), size * moved.elements), size * (moved.peak + weights))


class _Moved(TorchDispatchMode):
    """elements: read and written by convolutions and matrix products. peak: held at once, of all outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.peak = self._held = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.__name__.split(".")[0] in _PRODUCTS:
            self.elements += sum(each.numel() for each in tree_leaves((args, result)) if isinstance(each, Tensor))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        """Until the last tensor on its storage is gone."""
        storage = tensor.untyped_storage()
        key, elements = storage._cdata, storage.nbytes() // max(tensor.element_size(), 1)
        if key not in self._users:
            self._held += elements
            self.peak = max(self.peak, self._held)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, elements)

    def _release(self, key: int, elements: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self._held -= elements
