"""What an engine is, and what one is made from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

EngineName = Literal["eager", "cuda_graph", "compile", "onnx", "openvino", "tensorrt", "auto"]
ENGINES: tuple[str, ...] = get_args(EngineName)

BuildEngines = Literal["now", "beside"]
"""When an engine is made: before the first image of its size goes on, or while images go on by eager."""

Maps = tuple[Tensor, Tensor]
"""score_map (B, 1, H, W), descriptor_map (B, D, h, w), on the device of the image, owned by whoever asked for them."""

Runner = Callable[[Tensor], Maps]
"""The network for one size: (B, 3, H, W) float32, normalised, in any memory layout, to its maps."""


class Engine(Protocol):
    """Runs the network. To be used by one thread at a time, whichever it is.

    name: what ran the last image; before the first one what was asked for. precision: of the arithmetic: float32,
    bfloat16 or float16. note: why it is another one than was asked for; empty where it is not. making: what is being
    made beside, and what runs meanwhile; empty where nothing is. All four may change with each image, and may be read
    by any thread.
    """

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def note(self) -> str: ...

    @property
    def making(self) -> str: ...

    def run(self, image: Tensor) -> Maps:
        """image: (B, 3, H, W) float32, normalised, on the device of the engine. See :data:`Maps`."""
        ...

    def unasked(self) -> AbstractContextManager[None]:
        """The block runs images of no size that will come: nothing is made beside for them."""
        ...

    def close(self) -> None:
        """Give up what is being made beside; returns when that has ended. After it eager runs, if anything."""
        ...


@dataclass(frozen=True, eq=False)
class Target:
    """What engines are made from.

    network: image to :data:`Maps`, on the device. run: the same by torch, in the precision. identity: another word for
    other weights, another architecture, or another version of the code of either.
    """

    network: nn.Module
    run: Runner
    device: torch.device
    precision: str
    identity: str


Shape = tuple[int, ...]
Facts = dict[str, Any]
