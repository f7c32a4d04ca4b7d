"""How fast a training run is, and how much of the device it uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")

COUNTED_STEPS = 10  # the kinds of steps take turns with shorter periods


def matmul_rate(device: torch.device, precision: str = "float32") -> float:
    """Operations a second, two for a multiplication with its addition, of a large product of random matrices."""
    on_gpu = device.type == "cuda"
    size, repeats = (8192, 10) if on_gpu else (768, 3)
    dtype = torch.float32 if precision == "float32" else getattr(torch, precision)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    _wait(device)
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput:
    """Of the steps since it was asked last; the operations are those of convolutions and matrix products, counted in
    the first steps, which are slower for it and left out of the rates.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.peak = matmul_rate(device, precision)
        self._counted: list[float] = []  # operations a pair
        self._slowed = False
        self._steps = self._pairs = 0
        self._seconds = self._waited = 0.0

    def count(self, step: Callable[[], T], pairs: int) -> T:
        """``step()``, with its operations counted if it is one of the first."""
        self._slowed = len(self._counted) < COUNTED_STEPS
        if not self._slowed:
            return step()
        with FlopCounterMode(display=False) as counter:
            result = step()
        self._counted.append(counter.get_total_flops() / pairs)
        return result

    def add(self, pairs: int, seconds: float, waited: float) -> None:
        """What the last step took, of so many pairs. waited: seconds of it until its pairs were there."""
        if not self._slowed:
            self._steps += 1
            self._pairs += pairs
            self._seconds += seconds
            self._waited += waited

    def values(self) -> dict[str, float]:
        """What to log; nothing while operations are counted."""
        if self._steps == 0 or self._seconds == 0:
            return {}
        rate = self._pairs / self._seconds
        operations = rate * sum(self._counted) / len(self._counted)
        values = {
            "rate/pairs_per_s": rate,
            "rate/waited_ms": 1000 * self._waited / self._steps,
            "rate/tflop_per_s": operations / 1e12,
            "rate/percent_of_matmul": 100 * operations / self.peak,
        }
        self._steps = self._pairs = 0
        self._seconds = self._waited = 0.0
        return values
