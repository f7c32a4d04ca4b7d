"""The network by torch, operation by operation: the reference of all other engines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scfeat_core.engines.contract import Maps


class EagerEngine:
    """Any size, nothing to prepare; on a CPU the same results from run to run."""

    name = "eager"
    note = ""

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "float32") -> None:
        self.precision = precision
        self.network = network
        self._device = device
        self._dtype = getattr(torch, precision)

    @torch.inference_mode()
    def run(self, image: Tensor) -> Maps:
        # Without TensorFloat-32, which torch takes for float32 in convolutions unless it is told not to.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        half = self._dtype != torch.float32
        with exact, torch.autocast(self._device.type, self._dtype, enabled=half):
            score_map, descriptor_map = self.network(image)
        return score_map, descriptor_map
