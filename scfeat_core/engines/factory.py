"""From the name of an engine to the engine."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scfeat_core import network as architecture
from scfeat_core.config import dump_config
from scfeat_core.engines.cache import Cache, cache_folder
from scfeat_core.engines.checked import CheckedEngine
from scfeat_core.engines.contract import ENGINES, BuildEngines, Engine, Runner, Target
from scfeat_core.engines.eager import EagerEngine, with_weights_in
from scfeat_core.engines.elsewhere import Beside
from scfeat_core.engines.making import Build, Candidate, Made, Recipe
from scfeat_core.errors import ConfigError, DeviceError
from scfeat_core.network.inference import inference_network
from scfeat_core.network.model import SCFeat


@dataclass(frozen=True)
class _Kind:
    """An engine that is made for one size. load: imports its module. extra: of pip, that brings its packages. alone:
    made while nothing else of the engine runs.
    """

    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str
    load: Callable[[], Build]
    alone: bool = False


def _cuda_graph() -> Build:
    from scfeat_core.engines.cuda_graph import build

    return build


def _compile() -> Build:
    from scfeat_core.engines.compiled import build

    return build


def _onnx() -> Build:
    from scfeat_core.engines.onnx_runtime import build

    return build


def _tensorrt() -> Build:
    from scfeat_core.engines.onnx_runtime import build_tensorrt

    return build_tensorrt


def _openvino() -> Build:
    from scfeat_core.engines.openvino_cpu import build

    return build


_ALL = ("float32", "bfloat16", "float16")
_KINDS = {
    "tensorrt": _Kind(("cuda",), _ALL, ("onnx", "onnxruntime", "tensorrt"), "tensorrt", _tensorrt),
    "cuda_graph": _Kind(("cuda",), _ALL, (), "", _cuda_graph, alone=True),
    "compile": _Kind(("cpu", "cuda"), _ALL, (), "", _compile),
    "openvino": _Kind(("cpu",), ("float32", "bfloat16"), ("openvino",), "openvino", _openvino),
    "onnx": _Kind(("cpu", "cuda"), ("float32",), ("onnx", "onnxruntime"), "onnx", _onnx),
}
_ON_CPU = ("float32", "bfloat16")


def engine_precisions(name: str, device: torch.device) -> tuple[str, ...]:
    """What an engine computes in on a device. Raises ConfigError, DeviceError."""
    if name not in ENGINES:
        raise ConfigError(_unknown(name))
    kind = _KINDS.get(name)
    if kind is None:
        return _ALL if device.type == "cuda" else _ON_CPU
    if device.type not in kind.devices:
        able = ", ".join(each for each in ENGINES if each not in _KINDS or device.type in _KINDS[each].devices)
        raise DeviceError(
            f"engine '{name}' runs on {' and '.join(kind.devices)}, found device '{device}'; "
            f"on this one there are {able}"
        )
    return kind.precisions if device.type == "cuda" else tuple(each for each in kind.precisions if each in _ON_CPU)


def create_engine(
    name: str,
    model: SCFeat,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    *,
    build: BuildEngines = "now",
    source: SCFeat | None = None,
    cache: Cache | None = None,
) -> Engine:
    """What runs a network. Nothing but eager is made before the first image of a size.

    name: one of ENGINES; ``auto`` is the fastest of those that are installed and agree with the reference, by a short
    measurement on the first image. build: "now" makes the first image of a size wait for its engine; "beside" makes
    the engine in a thread, one at a time, while eager runs the images, and takes it between two of them: results then
    depend on time; ``close`` ends that. source: what the engine is made from, where that is another network than the
    model whose results it has to have.
    cache: where to keep what is expensive to make; ``cache_folder()`` where it is None.
    Raises ConfigError for an unknown name, a precision that the engine does not have, or packages that are not
    installed, and DeviceError for a device that it does not run on.
    """
    device = torch.device(device)
    _check(name, device, precision)
    network = _network(model, device)
    reference = EagerEngine(network, device)
    eager = _in_precision(reference, device, precision)
    names = _installed(device, precision) if name == "auto" else [name] if name in _KINDS else []
    if not names and precision == "float32":
        return reference
    if source is not None:
        network = _network(source, device)
    run = eager.run if source is None else _in_precision(EagerEngine(network, device), device, precision).run
    target = Target(network, run, device, precision, _identity(model if source is None else source))
    candidates = [Candidate(each, _KINDS[each].load(), _KINDS[each].alone) for each in names]
    beside: Beside[Made] | None = Beside() if build == "beside" else None
    folder = cache_folder() if cache is None else cache.folder
    recipe = Recipe(
        target,
        eager.run,
        reference.run,
        Cache(folder, None if beside is None else beside.workshop),
        model.config.backbone.alignment,
    )
    asked = name if names else "eager"
    return CheckedEngine(asked, candidates or [Candidate("eager", _as_it_is)], recipe, beside)


def _network(model: SCFeat, device: torch.device) -> nn.Module:
    # The convolutions are twice as fast on a CPU with the channels innermost, and no slower on a GPU.
    return inference_network(model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _in_precision(reference: EagerEngine, device: torch.device, precision: str) -> EagerEngine:
    if precision == "float32":
        return reference
    return EagerEngine(with_weights_in(reference.network, precision), device, precision)


def _as_it_is(target: Target, image: Tensor, cache: Cache) -> Runner:
    """Eager below float32, which is compared with float32, too."""
    return target.run


def _check(name: str, device: torch.device, precision: str) -> None:
    precisions = engine_precisions(name, device)
    if precision not in precisions:
        raise ConfigError(
            f"engine '{name}' on {device}: expected precision {' or '.join(precisions)}, found '{precision}'"
        )
    kind = _KINDS.get(name)
    if kind is not None and (missing := _missing(kind)):
        raise ConfigError(
            f"engine '{name}' needs {' and '.join(missing)}, found nothing importable of that name; "
            f"pip install 'scfeat-python[{kind.extra}]', or use another engine"
        )


def _installed(device: torch.device, precision: str) -> list[str]:
    """For ``auto``. torch.compile is not among them on a CPU: it takes minutes, and is not faster there."""
    able = [name for name, kind in _KINDS.items() if device.type in kind.devices and not _missing(kind)]
    able = [name for name in able if precision in engine_precisions(name, device)]
    return [name for name in able if name != "compile" or device.type == "cuda"]


def _missing(kind: _Kind) -> list[str]:
    return [name for name in kind.packages if importlib.util.find_spec(name) is None]


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, ENGINES, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(ENGINES)}"
    return f"engine: expected the name of one, found '{name}'; {hint}"


def _identity(model: SCFeat) -> str:
    """16 hexadecimal digits of the weights, the configuration, and the code that makes a network of them."""
    digest = hashlib.sha256(repr(dump_config(model.config)).encode())
    for folder in (Path(architecture.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
