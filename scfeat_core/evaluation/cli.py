"""``scfeat evaluate``: homography, pose, labelled, or all of it, as a table, a JSON file and pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import yaml

from scfeat_core.config import dump_config, read_config
from scfeat_core.errors import ConfigError
from scfeat_core.evaluation.datasets import APART, homography_pairs, labelled_pairs, limit_pairs, pose_pairs
from scfeat_core.evaluation.views import Protocol, extract_views, map_pairs

Columns = tuple[str, ...]

HOMOGRAPHY_COLUMNS = (
    *("pairs", "keypoints", "matches", "MMA@1", "MMA@3", "MMA@5", "MMAscore"),
    *("repeatability@1", "repeatability@3", "AUC@1", "AUC@3", "AUC@5"),
)
POSE_COLUMNS = ("pairs", "keypoints", "matches", "AUC@5", "AUC@10", "AUC@20", "epipolar@1", "epipolar@3")
LABELLED_COLUMNS = ("pairs", "keypoints", "matches", "recall@1", "recall@3", "recall@5", "recall@10", "recall@20")

EPILOG = """\
examples:
  scfeat evaluate all shared/data/eval --method sift
  scfeat evaluate homography shared/data/eval --weights my.safetensors --set nms_radius=2 --output build/mine
  scfeat evaluate pose shared/data/train/multiview --validation-split config/validation_split.yaml --limit 60
  scfeat evaluate homography shared/data/eval --splits evd_pairs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=["homography", "pose", "labelled", "all"], help="all: homography and pose")
    parser.add_argument("data", type=Path, metavar="DIR", help="folder that holds one folder for each set")
    _add_method_arguments(parser)
    _add_protocol_arguments(parser)
    which = parser.add_argument_group("which pairs")
    which.add_argument("--splits", type=_names, default=[], metavar="A,B", help="only these folders of DIR")
    which.add_argument(
        "--validation-split", type=Path, metavar="FILE", help="only the scenes that this file holds back from training"
    )
    which.add_argument("--limit", type=int, default=0, metavar="N", help="at most N pairs of each set (all)")
    which.add_argument("--apart", action="store_true", help=f"with all: {' and '.join(APART)} as well, on their own")
    parser.add_argument("-o", "--output", type=Path, help="folder for results.json and the pictures (none written)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads (%(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars (none without a terminal)")


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("what is measured")
    method.add_argument(
        "--method",
        default="scfeat",
        help="scfeat, sift, rootsift, orb, akaze, or module:callable, which takes (image, max_keypoints) (%(default)s)",
    )
    method.add_argument("--weights", default="lite", help="of scfeat: a name, or a .safetensors file (%(default)s)")
    method.add_argument("--device", default="cpu", help="of scfeat: e.g. cpu, cuda (%(default)s)")
    method.add_argument(
        "--set",
        action="append",
        type=_option,
        default=[],
        dest="options",
        metavar="KEY=VALUE",
        help="option of the Extractor, or of your callable; may be repeated",
    )


def _add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    protocol = parser.add_argument_group("protocol")
    default = Protocol()
    protocol.add_argument("--max-keypoints", type=int, default=default.max_keypoints, metavar="N", help="(%(default)s)")
    protocol.add_argument(
        "--longer-side", type=int, default=default.longer_side, metavar="PX", help="0: as stored (%(default)s)"
    )
    protocol.add_argument("--estimator", choices=["poselib", "magsac"], default=default.estimator, help="of poses")
    protocol.add_argument(
        "--runs",
        type=int,
        default=default.runs,
        metavar="N",
        help="average the estimates over N orders of the matches (%(default)s)",
    )


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found '{text}'")
    return key, yaml.safe_load(value)


def run(args: argparse.Namespace) -> int:
    import torch

    from scfeat_core.evaluation.report import format_table, write_json, write_plots

    protocol = Protocol(args.max_keypoints, args.longer_side, args.estimator, args.runs)
    torch.set_num_threads(max(args.workers, 1))
    cv2.setNumThreads(max(args.workers, 1))
    sections = _measure(args, protocol)
    label = _label(args)
    for section in sections:
        print(f"{format_table(section, label)}\n")
    if args.output is not None:
        config = {
            "kind": args.kind,
            "data": str(args.data),
            "method": args.method,
            "options": _method_options(args),
            "splits": _splits(args),
            "limit": args.limit,
            "protocol": dump_config(protocol),
        }
        write_json(args.output / "results.json", config, sections)
        pictures = write_plots(args.output, label, sections)
        print("written:", *(str(path) for path in [args.output / "results.json", *pictures]))
    return 0


def _measure(args: argparse.Namespace, protocol: Protocol) -> list[Any]:
    from scfeat_core.evaluation.methods import create_method

    splits = _splits(args)
    method = create_method(args.method, _method_options(args))
    measure = partial(_section, args, protocol, method)
    sections = []
    if args.kind in ("homography", "all"):
        sections.append(measure("homography", homography_pairs(args.data, splits)))
    if args.kind in ("pose", "all"):
        sections.append(measure("pose", pose_pairs(args.data, splits)))
    if args.kind == "labelled":
        sections.append(measure("labelled", labelled_pairs(args.data, splits)))
    if args.kind == "all" and args.apart:
        sections.append(measure("homography", homography_pairs(args.data, APART[:1]), "homography, apart"))
        sections.append(measure("labelled", labelled_pairs(args.data, APART[1:])))
    return sections


def _section(
    args: argparse.Namespace, protocol: Protocol, method: Any, kind: str, all_pairs: list[Any], title: str = ""
) -> Any:
    from scfeat_core.evaluation.report import create_section

    title = title or kind
    progress = not args.no_progress and sys.stderr.isatty()
    evaluate, columns, of_set, of_all = _kind(kind, protocol)
    pairs = limit_pairs(all_pairs, args.limit)
    views = extract_views(pairs, method, protocol, progress)
    rows = map_pairs(lambda pair: evaluate(pair, views), pairs, title, args.workers, progress)
    return create_section(title, columns, rows, of_set, of_all)


def _kind(kind: str, protocol: Protocol) -> tuple[Callable[..., Any], Columns, Callable[..., Any], Callable[..., Any]]:
    """How to measure one pair, what goes into the table, and how the rows of a set and of all sets are summarised."""
    if kind == "homography":
        from scfeat_core.evaluation import homography

        evaluate = partial(homography.evaluate_homography_pair, protocol=protocol)
        summarise = homography.summarise_homography
        return evaluate, HOMOGRAPHY_COLUMNS, summarise, summarise
    if kind == "pose":
        from scfeat_core.evaluation import relative_pose

        relative_pose.create_estimator(protocol.estimator)  # a missing package shows before the work
        evaluate_pose = partial(relative_pose.evaluate_pose_pair, protocol=protocol)
        return evaluate_pose, POSE_COLUMNS, relative_pose.summarise_pose_set, relative_pose.summarise_pose
    from scfeat_core.evaluation import labelled

    return labelled.evaluate_labelled_pair, LABELLED_COLUMNS, labelled.summarise_labelled, labelled.summarise_labelled


def _method_options(args: argparse.Namespace) -> dict[str, Any]:
    own = {"weights": args.weights, "device": args.device} if args.method == "scfeat" else {}
    return {**own, **dict(args.options)}


def _label(args: argparse.Namespace) -> str:
    name = f"{args.method} {args.weights}" if args.method == "scfeat" else args.method
    options = "".join(f", {key}={value}" for key, value in args.options)
    size = f"{args.longer_side} px" if args.longer_side else "as stored"
    return f"{name}{options}, {args.max_keypoints} points, {size}"


def _splits(args: argparse.Namespace) -> list[str]:
    if args.validation_split is None:
        return list(args.splits)
    from scfeat_core.data.photos import ValidationSplit

    if args.splits:
        raise ConfigError("expected --splits or --validation-split, found both; give one of them")
    return list(read_config(ValidationSplit, args.validation_split).scenes)
