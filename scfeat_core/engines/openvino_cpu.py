"""OpenVINO on the CPU. Neither images nor maps are copied on their way."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scfeat_core.engines.cache import Cache
from scfeat_core.engines.contract import Maps, Runner, Shape, Target
from scfeat_core.engines.export import traceable, versions

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


def build(target: Target, image: Tensor, cache: Cache) -> Runner:
    """OpenVINO for images of the size of this one; as many threads as torch has now."""
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": _HINTS[target.precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    shape = tuple(image.shape)
    facts = versions("torch", "openvino") | {"cpu": core.get_property("CPU", "FULL_DEVICE_NAME")}
    name = f"openvino-{target.identity}-{shape[0]}x{shape[2]}x{shape[3]}-{target.precision}.blob"
    content = cache.get(name, facts, partial(_blob, target.network, shape, options))
    request = core.import_model(io.BytesIO(content), "CPU", options).create_infer_request()
    sizes = [tuple(output.shape) for output in request.model_outputs]

    def run(image: Tensor) -> Maps:
        image = image.contiguous()
        score_map, descriptor_map = (torch.empty(size) for size in sizes)
        request.set_input_tensor(openvino.Tensor(image.numpy(), shared_memory=True))
        for index, map_ in enumerate((score_map, descriptor_map)):
            request.set_output_tensor(index, openvino.Tensor(map_.numpy(), shared_memory=True))
        request.infer()
        return score_map, descriptor_map

    return run


def _blob(network: nn.Module, shape: Shape, options: Mapping[str, Any]) -> bytes:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = torch.zeros(shape)
        # A trace rather than the exported program, which OpenVINO decomposes: three quarters of the time.
        traced = torch.jit.trace(traceable(network, image), image, check_trace=False)
        model = openvino.convert_model(traced, example_input=image)
    model.reshape(list(shape))  # the conversion forgets sizes
    return openvino.Core().compile_model(model, "CPU", options).export_model().getvalue()
