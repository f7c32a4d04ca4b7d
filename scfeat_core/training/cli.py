"""``scfeat train``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import yaml

from scfeat_core.errors import ConfigError

DESCRIPTION = "Train SCFeat. The configuration says on what, from what, and how long; unknown keys are refused."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--config", type=Path, required=True, help="YAML file, for example config/pretrain_warps.yaml")
    parser.add_argument("--data", type=Path, help="folder of the training images; overrides data.root")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/<name>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: --set optimiser.clip_norm=2"
    )


def run(args: argparse.Namespace) -> int:
    from scfeat_core.config import load_config, read_mapping
    from scfeat_core.training.config import TrainConfig
    from scfeat_core.training.trainer import train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    mapping = read_mapping(args.config)
    _resolve_paths(mapping, args.config.parent)
    for assignment in args.set:
        _override(mapping, assignment)
    if args.data is not None:
        _override(mapping, "data.root=", args.data)
    config = load_config(TrainConfig, mapping, where=str(args.config))
    weights = train(config, args.output or Path("runs") / config.name, resume=args.resume)
    print(f"weights: {weights}")
    return 0


def _resolve_paths(mapping: dict[str, Any], folder: Path) -> None:
    """Paths in a file are relative to the file; those of the command line to where it is given."""
    data = mapping.get("data")
    for key in ("root", "split"):
        if isinstance(data, dict) and isinstance(data.get(key), str):
            data[key] = folder / data[key]


def _override(mapping: dict[str, Any], assignment: str, value: object = None) -> None:
    """Set ``a.b.c`` of nested mappings to ``value``, or to what follows the equals sign, read as YAML."""
    path, equals, text = assignment.partition("=")
    *parents, key = path.split(".")
    if not equals:
        raise ConfigError(f"expected --set KEY=VALUE, found '{assignment}'")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise ConfigError(f"--set {assignment}: expected '{parent}' to hold settings, found a single value")
    mapping[key] = yaml.safe_load(text) if value is None else value
