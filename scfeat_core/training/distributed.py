"""Several processes train one network: ``torchrun`` starts them, each takes its share of every batch.

Gradients and the denominators of all means are added up explicitly, in two collectives a step: the sum is then the
gradient of one process with the whole batch, and a process that has to split its share for lack of memory keeps in step
with the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scfeat_core.errors import ScfeatError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """This process among those of the run. rank: 0 writes, logs and validates."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            with _lost_processes_named(self.rank):
                dist.all_reduce(tensor)
        return tensor

    def sum_all(self, tensors: Iterable[Tensor]) -> None:
        """:meth:`sum` of many tensors of one dtype, in one collective."""
        tensors = list(tensors)
        if self.world == 1 or not tensors:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean_buffers(self, module: nn.Module) -> None:
        """BatchNorm statistics, which each process gathers from its own share."""
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.sum_all(buffers)
        if self.world > 1:
            for buffer in buffers:
                buffer /= self.world

    def wait(self, device: torch.device) -> None:
        """Until all processes are here."""
        self.sum(torch.zeros(1, device=device))


@contextmanager
def join_group(device: torch.device, timeout: float) -> Iterator[Group]:
    """The group that torchrun's environment describes; without one, a group of this process alone.

    timeout: seconds that a process waits for the others before it ends with a message.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """In a distributed run on CUDA, the device with this process's number on its machine."""
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def _lost_processes_named(rank: int) -> Iterator[None]:
    """A broken or timed-out collective means that another process is gone; its own message says why."""
    try:
        yield
    except RuntimeError as error:
        raise ScfeatError(
            f"process {rank} lost the others of this run ({str(error).splitlines()[0]}); look for the first error that "
            "a process reported, mend it, and start all again with --resume"
        ) from error
