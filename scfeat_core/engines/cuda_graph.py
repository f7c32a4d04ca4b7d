"""The network as a CUDA graph: one launch instead of hundreds, for sizes that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from scfeat_core.engines.cache import Cache
from scfeat_core.engines.contract import Maps, Runner, Target

WARM_UP_RUNS = 3  # libraries choose their algorithms and allocate their workspaces, which a capture must not see


def build(target: Target, image: Tensor, cache: Cache) -> Runner:
    """Capture the network for images of the size of this one. Nothing is kept on disk."""
    with torch.cuda.device(target.device), torch.inference_mode():
        given = image.clone(memory_format=torch.preserve_format)
        _warm_up(target, given)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            maps = target.run(given)

    @torch.inference_mode()
    def run(image: Tensor) -> Maps:
        given.copy_(image, non_blocking=True)
        graph.replay()
        # The next replay writes into the same memory.
        return maps[0].clone(), maps[1].clone()

    return run


def _warm_up(target: Target, image: Tensor) -> None:
    """In a stream of its own, as capturing asks for."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            target.run(image)
    current.wait_stream(stream)
