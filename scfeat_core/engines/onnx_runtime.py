"""ONNX Runtime: on the CPU, on CUDA, and as the way to TensorRT. Neither images nor maps are copied on their way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scfeat_core.engines.cache import Cache
from scfeat_core.engines.contract import Maps, Runner, Shape, Target
from scfeat_core.engines.export import INPUT, OUTPUTS, to_onnx, versions

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"
Provider = tuple[str, dict[str, Any]]


def build(target: Target, image: Tensor, cache: Cache) -> Runner:
    """ONNX Runtime for images of the size of this one; as many threads as torch has now."""
    content = _onnx_file(target, tuple(image.shape), cache)
    if target.device.type == "cpu":
        return _host_runner(_session(content, [("CPUExecutionProvider", {})]), target, image)
    stream = torch.cuda.Stream(target.device)
    providers = _in_stream([(CUDA, _cuda_options(target.device))], stream)
    return _device_runner(_session(content, providers), target, image, stream)


def build_tensorrt(target: Target, image: Tensor, cache: Cache) -> Runner:
    """TensorRT through ONNX Runtime; the plan is kept in an ONNX file with nothing else in it."""
    shape = tuple(image.shape)
    stream = torch.cuda.Stream(target.device)
    precise = {"float32": {}, "float16": {"trt_fp16_enable": True}, "bfloat16": {"trt_bf16_enable": True}}
    options = {**_device_options(target.device), **precise[target.precision]}
    providers = [(TENSORRT, options), (CUDA, _cuda_options(target.device))]
    facts = versions("torch", "onnxruntime", "tensorrt") | {"cuda": torch.version.cuda}
    place = torch.cuda.get_device_name(target.device).replace(" ", "_").replace("/", "_")
    plan = cache.get(
        f"tensorrt-{target.identity}-{_size(shape)}-{target.precision}-{place}.onnx",
        facts,
        partial(_plan, target.network, target.device, shape, providers),
    )
    return _device_runner(_session(plan, _in_stream(providers, stream)), target, image, stream)


def _onnx_file(target: Target, shape: Shape, cache: Cache) -> bytes:
    """The network for one size, float32; the same on all devices of a kind."""
    name = f"onnx-{target.identity}-{_size(shape)}-{target.device.type}.onnx"
    return cache.get(name, versions("torch"), partial(_exported, target.network, target.device, shape))


def _exported(network: nn.Module, device: torch.device, shape: Shape) -> bytes:
    return to_onnx(network, torch.zeros(shape, device=device))


def _size(shape: Shape) -> str:
    return f"{shape[0]}x{shape[2]}x{shape[3]}"


# -- sessions ----------------------------------------------------------------------------------------------------------


def _session(content: bytes, providers: Sequence[Provider], **entries: str) -> Any:
    """Raises RuntimeError where the first provider does not work: others would quietly take its place."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for kind in ("intra", "inter"):  # threads that wait in a loop hold the processor that torch needs next
        options.add_session_config_entry(f"session.{kind}_op.allow_spinning", "0")
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    session = onnxruntime.InferenceSession(content, options, providers=list(providers))
    if session.get_providers()[0] != providers[0][0]:
        raise RuntimeError(
            f"expected ONNX Runtime to use {providers[0][0]}, found {', '.join(session.get_providers())}"
        )
    return session


def _device_options(device: torch.device) -> dict[str, Any]:
    return {"device_id": device.index or 0}


def _cuda_options(device: torch.device) -> dict[str, Any]:
    return {**_device_options(device), "use_tf32": 0}


def _in_stream(providers: Sequence[Provider], stream: Any) -> list[Provider]:
    return [(name, {**options, "user_compute_stream": str(stream.cuda_stream)}) for name, options in providers]


def _plan(network: nn.Module, device: torch.device, shape: Shape, providers: Sequence[Provider]) -> bytes:
    """What TensorRT makes of the network, as an ONNX file around its plan."""
    content = _exported(network, device, shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.onnx"
        entries = {"ep__context_enable": "1", "ep__context_embed_mode": "1", "ep__context_file_path": str(path)}
        _session(content, providers, **entries)
        return path.read_bytes()


# -- running -----------------------------------------------------------------------------------------------------------


def _host_runner(session: Any, target: Target, image: Tensor) -> Runner:
    bind = _binder(session, target, image)

    def run(image: Tensor) -> Maps:
        image = image.contiguous()
        binding, maps = bind(image)
        session.run_with_iobinding(binding)
        return maps

    return run


def _device_runner(session: Any, target: Target, image: Tensor, stream: Any) -> Runner:
    import onnxruntime

    bind = _binder(session, target, image)
    unsynchronised = onnxruntime.RunOptions()
    unsynchronised.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(image: Tensor) -> Maps:
        current = torch.cuda.current_stream(target.device)
        image = image.contiguous()
        binding, maps = bind(image)
        stream.wait_stream(current)
        session.run_with_iobinding(binding, unsynchronised)
        current.wait_stream(stream)
        for tensor in (image, *maps):
            tensor.record_stream(stream)
        return maps

    return run


def _binder(session: Any, target: Target, image: Tensor) -> Callable[[Tensor], tuple[Any, Maps]]:
    """Where an image is, and memory of torch for its maps."""
    place = (target.device.type, target.device.index or 0, np.float32)
    sizes = [tuple(output.shape) for output in session.get_outputs()]

    def bind(image: Tensor) -> tuple[Any, Maps]:
        binding = session.io_binding()
        binding.bind_input(INPUT, *place, tuple(image.shape), image.data_ptr())
        score_map, descriptor_map = (torch.empty(size, device=image.device) for size in sizes)
        for name, map_ in zip(OUTPUTS, (score_map, descriptor_map), strict=True):
            binding.bind_output(name, *place, tuple(map_.shape), map_.data_ptr())
        return binding, (score_map, descriptor_map)

    return bind
