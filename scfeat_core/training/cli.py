"""``scfeat train``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import yaml

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
    from scfeat_core.config import load_config
    from scfeat_core.training.config import TrainConfig
    from scfeat_core.training.trainer import train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    mapping = yaml.safe_load(args.config.read_text())
    for override in args.set + ([f"data.root={args.data}"] if args.data else []):
        _override(mapping, override)
    config = load_config(TrainConfig, mapping, where=str(args.config))
    weights = train(config, args.output or Path("runs") / config.name, resume=args.resume)
    print(f"weights: {weights}")
    return 0


def _override(mapping: dict[str, Any], assignment: str) -> None:
    path, _, value = assignment.partition("=")
    *parents, key = path.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
    mapping[key] = yaml.safe_load(value)
