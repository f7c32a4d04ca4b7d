"""The network compiled by torch's Inductor ahead of time: what torch.compile makes of it for one size, as a file."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from scfeat_core.engines.cache import Cache
from scfeat_core.engines.contract import Facts, Maps, Runner, Shape, Target
from scfeat_core.engines.eager import exact


def build(target: Target, image: Tensor, cache: Cache) -> Runner:
    """Compile the network for images of the size of this one, which takes a minute, or load it, which takes none.

    Needs torch 2.6 and, on a CPU, a C++ compiler.
    """
    if not hasattr(torch._inductor, "aoti_compile_and_package"):
        raise RuntimeError(f"expected torch 2.6 or later, found {torch.__version__}")
    shape = tuple(image.shape)
    name = f"compile-{target.identity}-{shape[0]}x{shape[2]}x{shape[3]}-{target.precision}-{_place(target.device)}.pt2"
    job = partial(_package, target.network, target.device, target.precision, shape)
    content = cache.get(name, _facts(target.device), job)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt2"
        path.write_bytes(content)
        program = torch._inductor.aoti_load_package(str(path))

    def run(image: Tensor) -> Maps:
        with exact(target.device):
            score_map, descriptor_map = program(image.contiguous(memory_format=torch.channels_last))
        return score_map, descriptor_map

    return run


def _package(network: nn.Module, device: torch.device, precision: str, shape: Shape) -> bytes:
    image = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_InPrecision(network, device, precision), (image,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "network.pt2"))
        return Path(path).read_bytes()


class _InPrecision(nn.Module):
    """The network with the casts of its precision, as part of the program."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.network = network
        self._kind = device.type
        self._dtype = getattr(torch, precision)

    def forward(self, image: Tensor) -> Maps:
        if self._dtype == torch.float32:
            return self.network(image)
        with torch.autocast(self._kind, self._dtype):
            return self.network(image)


def _place(device: torch.device) -> str:
    """On a CPU with the number of threads, which the code has in it."""
    return device.type if device.type == "cuda" else f"{device.type}{torch.get_num_threads()}"


def _facts(device: torch.device) -> Facts:
    """The code is for this processor."""
    if device.type == "cuda":
        own = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    else:
        own = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "device": own}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
