"""``scfeat train``."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.config import parse_value
from scfeat_core.errors import ConfigError

DESCRIPTION = """\
Train SCFeat. A configuration file says what is trained, on what, from what, and how long; keys that it does not have
keep their defaults, unknown ones are refused. All keys: scfeat_core/training/config.py."""

EPILOG = """\
Posed images: a folder of scenes with cameras.json or a COLMAP model as text, or MegaDepth as CAPS distributes it. Which
of them it is, is found out. Two commands, and the second takes up the first by its load_path, runs/train_desc:

  scfeat train --config config/train_desc.yaml --data DIR      description: descriptors from camera geometry alone
  scfeat train --config config/train_det.yaml --data DIR       detection: keypoints that can be matched

Photographs without poses, which is also how to begin with random weights:

  scfeat train --config config/pretrain_warps.yaml --data DIR
  scfeat train --config config/train_desc.yaml --data DIR --set model=lite --set load_path=runs/pretrain_warps

  scfeat train ... --check-data                     does the geometry fit the pictures? Trains nothing
  scfeat train ... --resume                         go on after an interruption; on a CPU bit for bit the same
  scfeat train ... --set device=cpu --set model=lite --set data_config_train.size=[320,240]   small enough for a laptop
  scfeat train ... --set load_path=resnet50.pth     start from the ImageNet weights of torchvision
  scfeat train ... --set precision=bfloat16 --set data_config_train.workers=8                  fast on a GPU

Several GPUs: batch_size is that of each process, so the batch grows with their number. Losses and weights are then
those of one process with the whole batch, but for what looks at several pairs at once, of which each process has only
its own share: BatchNorm in training mode (set bn_mode: frozen), the negatives of other pairs in warps and tracks (set
DescriptorLoss_config.negatives: 0), the mean repeatability of warps, and the error that rewards of the type
fmatrix_legacy are relative to. The same is true of a batch that is computed in pieces for lack of memory. A run is
resumed with as many pairs a step, over all processes, as it had.

  torchrun --nproc-per-node 4 -m scfeat_core.cli train --config config/train_desc.yaml --data DIR

Several machines: the same command on each, all of which see DIR and the folder of the run; MASTER is one of them:

  torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint MASTER:29500 -m scfeat_core.cli train ...

The folder of a run (--output, or runs/<checkpoint_name>) has log.jsonl, curves.png, tensorboard/ (if the package is
installed), last.pt to resume from, and <model>.safetensors, the averaged weights, which every other command takes:

  scfeat match left.jpg right.jpg --weights runs/train_det/r50.safetensors"""

CHECKED_PAIRS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, required=True, help="YAML file, for example config/train_desc.yaml")
    parser.add_argument("--data", type=Path, help="folder of the training data; overrides data_config_train.data_path")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/<checkpoint_name>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    parser.add_argument(
        "--check-data", action="store_true", help="compare the geometry of posed images with SIFT matches, and stop"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, as --set model_config.backbone.cn_init=legacy",
    )


def run(args: argparse.Namespace) -> int:
    from scfeat_core.config import load_config, read_mapping
    from scfeat_core.training.config import TrainConfig

    first = int(os.environ.get("RANK", "0")) == 0
    if not first:  # which speaks for all
        logging.getLogger().setLevel(logging.WARNING)
    mapping = read_mapping(args.config)
    resolve_paths(mapping, args.config.parent)
    for assignment in args.set:
        override(mapping, assignment)
    if args.data is not None:
        override(mapping, "data_config_train.data_path=", args.data)
    config = load_config(TrainConfig, mapping, where=str(args.config))
    if args.check_data:
        return _check_data(config)
    from scfeat_core.training.trainer import train

    weights = train(config, args.output or Path("runs") / config.checkpoint_name, resume=args.resume)
    if first:
        print(f"weights: {weights}")
    return 0


def _check_data(config: Any) -> int:
    """0 where nothing speaks against the geometry, else 1."""
    from scfeat_core.data.pair_check import check_pairs, format_report
    from scfeat_core.training.data_sets import open_posed

    if config.data == "photos":
        raise ConfigError(
            "--check-data: expected posed images, found data: photos, whose warps are exact by construction"
        )
    pairs = open_posed(config.data, config.data_config_train)
    report = check_pairs(pairs, CHECKED_PAIRS, np.random.default_rng(config.seed))
    print(format_report(report))
    return 0 if report.agrees else 1


def resolve_paths(mapping: dict[str, Any], folder: Path) -> None:
    """Paths of data in a file are relative to the file; those of runs are relative to where the command is given."""
    data = mapping.get("data_config_train")
    for key in ("data_path", "split"):
        if isinstance(data, dict) and isinstance(data.get(key), str):
            data[key] = folder / data[key]


def override(mapping: dict[str, Any], assignment: str, value: object = None) -> None:
    """Set ``a.b.c`` of nested mappings to ``value``, or to what follows the equals sign, read as YAML."""
    path, equals, text = assignment.partition("=")
    *parents, key = path.split(".")
    if not equals:
        raise ConfigError(f"expected --set KEY=VALUE, found '{assignment}'")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise ConfigError(f"--set {assignment}: expected '{parent}' to hold settings, found a single value")
    try:
        mapping[key] = parse_value(text) if value is None else value
    except ConfigError as error:
        raise ConfigError(f"--set {path}: {error}") from error
