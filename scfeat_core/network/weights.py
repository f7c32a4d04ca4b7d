"""Weight files: safetensors with the network's configuration in the header, checked by sha256.

Large ones may be in several files: ``r50.safetensors`` with the header, which names the others, ``r50.safetensors.2``
and so on, with their checksums; its own checksum vouches for all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from scfeat_core.config import load_config
from scfeat_core.errors import ConfigError, WeightsError
from scfeat_core.network.model import ModelConfig, SCFeat

WEIGHTS_FOLDER = Path(__file__).parent.parent / "weights"


def shipped_weights() -> list[str]:
    """Names of the weight files that come with the package."""
    return sorted(path.stem for path in WEIGHTS_FOLDER.glob("*.safetensors"))


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_sha256(name: str) -> str:
    """The checksum that the card of a shipped weight file states."""
    card = WEIGHTS_FOLDER / f"{name}.md"
    found = re.search(r"sha256:?\W+([0-9a-f]{64})", card.read_text()) if card.is_file() else None
    if found is None:
        raise WeightsError(f"expected the sha256 of '{name}' in its card {card}, found none; reinstall scfeat")
    return found.group(1)


def save_model(model: SCFeat, path: Path, *, half: bool = True, max_bytes: int | None = None) -> str:
    """Write the weights (float16 where ``half``) and the network's configuration; returns the file's sha256.

    max_bytes: of the numbers in one file; more go to several, but a tensor to one. Raises WeightsError where a number
    is not finite, or too large for float16.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        tensors[name] = tensor.detach().to("cpu", torch.float16 if half else torch.float32).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise WeightsError(f"expected finite weights to save, found NaN, infinity or too large a number in {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "scfeat", "config": json.dumps(asdict(model.config), sort_keys=True), "data": _digest(tensors)}
    first, *others = _shared_out(tensors, max_bytes)
    names = [f"{path.name}.{number}" for number in range(2, len(others) + 2)]
    parts = {name: _write(path.with_name(name), save(part)) for name, part in zip(names, others, strict=True)}
    if parts:
        header["parts"] = json.dumps(parts)
    return _write(path, _in_order(save(first, metadata=header)))


def _shared_out(tensors: dict[str, torch.Tensor], max_bytes: int | None) -> list[dict[str, torch.Tensor]]:
    """The tensors in their order, in as many groups as it takes."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if max_bytes is not None and groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def _write(path: Path, content: bytes) -> str:
    """Returns the sha256."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)  # whoever has the file mapped keeps the old one
    return hashlib.sha256(content).hexdigest()


def _in_order(content: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in any order, and equal weights shall be equal
    files.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names and numbers; stands in the header, so that damage shows in files that no card vouches for."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def load_model(weights: str | Path, *, sha256: str = "") -> SCFeat:
    """A network in evaluation mode with float32 weights.

    weights: the name of a shipped file (``lite``) or the path of a .safetensors file.
    sha256: checksum to insist on; for shipped files the one in the card is used.
    Raises WeightsError where the file is missing, damaged, altered, or made for another network.
    """
    path, expected = _locate(weights, sha256)
    found = file_sha256(path)
    if expected and found != expected:
        raise WeightsError(
            f"weights {path}: expected sha256 {expected}, found {found}; the file is damaged or was replaced: "
            "fetch it, or install scfeat, again"
        )
    config, state = _read(path)
    model = SCFeat(config)
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**counters, **{k: v.float() for k, v in state.items()}})
    except RuntimeError as error:
        raise WeightsError(f"weights {path} do not fit the network that their header describes: {error}") from error
    model.descriptor_space = f"scfeat:{found[:6]}"
    return model.eval()


def weights_id(weights: str | Path) -> str:
    """A word that is another one for other weights, without loading them. Raises WeightsError where there are none."""
    return "random" if str(weights) == "random" else file_sha256(_locate(weights, "")[0])[:16]


def _locate(weights: str | Path, sha256: str) -> tuple[Path, str]:
    name = str(weights)
    if not name.endswith(".safetensors") and "/" not in name:
        path = WEIGHTS_FOLDER / f"{name}.safetensors"
        if path.is_file():
            return path, sha256 or card_sha256(name)
        raise WeightsError(
            f"expected the name of shipped weights ({_shipped_names()}) or a path to .safetensors, found '{name}'"
        )
    path = Path(name).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"expected a weight file at {path}, found none; train one with 'scfeat train', or use shipped weights "
            f"({_shipped_names()})"
        )
    return path, sha256


def _shipped_names() -> str:
    return ", ".join(shipped_weights()) or "none are installed"


def _read(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    header, state = _read_file(path)
    if header.get("format") != "scfeat" or "config" not in header:
        raise WeightsError(f"weights {path}: expected a file written by scfeat, found safetensors of another kind")
    for name, sha256 in json.loads(header.get("parts", "{}")).items():
        state |= _read_part(path.with_name(Path(name).name), sha256)
    if header.get("data") != _digest(state):
        raise WeightsError(
            f"weights {path}: expected the numbers that its header vouches for, found others: damaged; "
            "fetch the file again"
        )
    try:
        return load_config(ModelConfig, json.loads(header["config"]), where=str(path)), state
    except (ConfigError, json.JSONDecodeError) as error:
        raise WeightsError(f"weights {path} were made by another version of scfeat: {error}") from error


def _read_part(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise WeightsError(
            f"expected a part of the weights at {path}, found none; all files that belong together lie in one folder: "
            "fetch it"
        )
    found = file_sha256(path)
    if found != sha256:
        raise WeightsError(f"weights {path}: expected sha256 {sha256}, found {found}; fetch the file again")
    return _read_file(path)[1]


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"weights {path}: expected a complete safetensors file, found: {error}; fetch the file again"
        ) from error
