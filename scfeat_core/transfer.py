"""From a device to the host with one wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Download:
    """Tensors on their way to the host, all in one copy, for which :meth:`arrays` waits. On a CPU they are there.

    tensors: of one device and of types of four bytes. From a CUDA device they are copied into pinned memory behind what
    the current stream has to do, and nobody waits for it here.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if self._tensors and self._tensors[0].device.type == "cuda":
            self._start()

    def _start(self) -> None:
        packed = torch.cat([tensor.contiguous().view(torch.int32).flatten() for tensor in self._tensors])
        host = torch.empty(packed.shape, dtype=torch.int32, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(packed.device))
        parts = host.split([tensor.numel() for tensor in self._tensors])
        pairs = zip(parts, self._tensors, strict=True)
        self._tensors = [part.view(tensor.dtype).view(tensor.shape) for part, tensor in pairs]

    def arrays(self) -> list[np.ndarray]:
        """The tensors, as numpy arrays; from a device in memory that is not pinned, as they may be kept for long."""
        if self._event is not None:
            self._event.synchronize()
            self._tensors, self._event = [tensor.clone() for tensor in self._tensors], None
        return [tensor.numpy() for tensor in self._tensors]
