"""``scfeat evaluate``: homography, pose, labelled, hpatches, or all, as tables, a JSON file and pictures.

A run is one method with one budget of points on images of one size. Several of each make all their combinations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from scfeat_core.commands.common import add_options_argument, count_from
from scfeat_core.config import dump_config, read_config
from scfeat_core.errors import ConfigError
from scfeat_core.evaluation import datasets
from scfeat_core.evaluation.datasets import APART, HPATCHES_SPLITS, limit_pairs
from scfeat_core.evaluation.views import Protocol, View, extract_views, map_pairs, truncate_views
from scfeat_core.report import check_folder

Columns = tuple[str, ...]

HOMOGRAPHY_COLUMNS = (
    *("pairs", "keypoints", "matches", "MMA@1", "MMA@3", "MMA@5", "MMAscore"),
    *("repeatability@1", "repeatability@3", "AUC@1", "AUC@3", "AUC@5"),
)
POSE_COLUMNS = ("pairs", "keypoints", "matches", "AUC@5", "AUC@10", "AUC@20", "epipolar@1", "epipolar@3")
LABELLED_COLUMNS = ("pairs", "keypoints", "matches", "recall@1", "recall@3", "recall@5", "recall@10", "recall@20")
HPATCHES_COLUMNS = ("pairs", "keypoints", "matches", *(f"MMA@{t}" for t in range(1, 11)), "MMAscore")
HPATCHES_MEASURED = (*HPATCHES_COLUMNS, *HOMOGRAPHY_COLUMNS[-5:])  # which the files of others do not hold
HPATCHES_KEYPOINTS = 8192  # what the published figures of SCFeat and PoSFeat were extracted with
HPATCHES_DECIMALS = 2  # as many as those have

EPILOG = f"""\
hpatches: DIR holds i_*/ and v_*/ with 1.ppm ... 6.ppm and H_1_2 ... H_1_6; the 8 sequences that D2-Net leaves out are
left out, images are taken as stored, with {HPATCHES_KEYPOINTS} points each unless --max-keypoints says otherwise.

Several methods, weights, budgets or sizes, separated by commas, are measured in all combinations and shown side by
side.

examples:
  scfeat evaluate all shared/data/eval --method sift
  scfeat evaluate all shared/data/eval --method scfeat,sift,orb --max-keypoints 512,1024,2048 -o build/compared
  scfeat evaluate homography shared/data/eval --weights my.safetensors --set nms_radius=2 --output build/mine
  scfeat evaluate pose shared/data/train/multiview --validation-split config/validation_split.yaml --limit 60
  scfeat evaluate homography shared/data/eval --splits evd_pairs
  scfeat evaluate hpatches hpatches-sequences-release --write-cache build/scfeat.npy
  scfeat evaluate hpatches hpatches-sequences-release --features build/hpatches/desc --postfix scfeat
  scfeat evaluate hpatches --cache scfeat.npy superpoint.npy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = ["homography", "pose", "labelled", "hpatches", "all"]
    parser.add_argument("kind", choices=kinds, help="all: homography and pose")
    parser.add_argument("data", type=Path, nargs="?", metavar="DIR", help="folder that holds one folder for each set")
    _add_method_arguments(parser)
    _add_protocol_arguments(parser)
    _add_hpatches_arguments(parser)
    which = parser.add_argument_group("which pairs")
    which.add_argument("--splits", type=_names, default=[], metavar="A,B", help="only these folders of DIR")
    which.add_argument(
        "--validation-split", type=Path, metavar="FILE", help="only the scenes that this file holds back from training"
    )
    which.add_argument(
        "--limit", type=count_from(0), default=0, metavar="N", help="at most N pairs of each set, 0: all (%(default)s)"
    )
    which.add_argument("--apart", action="store_true", help=f"with all: {' and '.join(APART)} as well, on their own")
    parser.add_argument("-o", "--output", type=Path, help="folder for results.json and the pictures (none written)")
    parser.add_argument("--workers", type=count_from(1), default=2, metavar="N", help="threads (%(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars (none without a terminal)")


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("what is measured")
    method.add_argument(
        "--method",
        type=_names,
        default=["scfeat"],
        metavar="A,B",
        help="scfeat, sift, rootsift, orb, akaze (where OpenCV has it), or module:callable, which takes "
        "(image, max_keypoints) (scfeat)",
    )
    method.add_argument(
        "--weights", type=_names, default=["lite"], metavar="A,B", help="of scfeat: names, or .safetensors files (lite)"
    )
    method.add_argument("--device", default="cpu", help="of scfeat: e.g. cpu, cuda (%(default)s)")
    add_options_argument(method, "option of the Extractor, or of your callable; may be repeated")


def _add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    protocol = parser.add_argument_group("protocol")
    default = Protocol()
    protocol.add_argument(
        "--max-keypoints", type=_counts, metavar="N,M", help=f"best points of an image ({default.max_keypoints})"
    )
    protocol.add_argument(
        "--longer-side", type=_sizes, metavar="PX,PX", help=f"0: as stored ({default.longer_side}, hpatches: 0)"
    )
    protocol.add_argument("--estimator", choices=["poselib", "magsac"], default=default.estimator, help="of poses")
    protocol.add_argument(
        "--runs",
        type=count_from(1),
        default=default.runs,
        metavar="N",
        help="average the estimates over N orders of the matches (%(default)s)",
    )


def _add_hpatches_arguments(parser: argparse.ArgumentParser) -> None:
    hpatches = parser.add_argument_group("hpatches only")
    hpatches.add_argument(
        "--cache", type=Path, nargs="+", default=[], metavar="FILE", help="no DIR: results in files of D2-Net's format"
    )
    hpatches.add_argument("--write-cache", type=Path, metavar="FILE", help="store the result in that format, too")
    hpatches.add_argument(
        "--features", type=Path, metavar="DIR2", help="no method: features in files DIR2/sequence/image.POSTFIX (npz)"
    )
    hpatches.add_argument("--postfix", type=_names, default=["scfeat"], metavar="A,B", help="of --features (scfeat)")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _counts(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, found '{text}'") from None


def _sizes(text: str) -> list[int]:
    from scfeat_core.network.model import MIN_IMAGE_SIZE

    sizes = _counts(text)
    if small := [size for size in sizes if 0 < size < MIN_IMAGE_SIZE]:
        raise argparse.ArgumentTypeError(f"expected 0 or at least {MIN_IMAGE_SIZE} pixels, found {small[0]}")
    return sizes


def run(args: argparse.Namespace) -> int:
    import torch

    from scfeat_core.evaluation.plots import write_plots
    from scfeat_core.evaluation.report import format_runs, write_json

    _check(args)
    if args.output is not None:
        check_folder(args.output)
    torch.set_num_threads(max(args.workers, 1))
    cv2.setNumThreads(max(args.workers, 1))
    runs = _cached_runs(args) if args.cache else _stored_runs(args) if args.features else _method_runs(args)
    print(f"{format_runs(runs)}\n")
    if args.output is not None:
        config = {"kind": args.kind, "data": str(args.data), "splits": _splits(args), "limit": args.limit}
        write_json(args.output / "results.json", config, runs)
        pictures = write_plots(args.output, runs)
        print("written:", *(str(path) for path in [args.output / "results.json", *pictures]))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for arguments that do not go together."""
    special = {"--cache": args.cache, "--features": args.features, "--write-cache": args.write_cache}
    given = [name for name, value in special.items() if value]
    if given and args.kind != "hpatches":
        raise ConfigError(f"expected {given[0]} with the kind 'hpatches', found '{args.kind}'")
    if (args.data is None) != bool(args.cache):
        raise ConfigError("expected a folder DIR, or --cache with the kind 'hpatches', found none or both")
    if len(given) > 1 and args.cache:
        raise ConfigError(f"expected --cache alone, found {' and '.join(given)}: its files hold results already")
    if args.features and args.longer_side not in (None, [0]):
        raise ConfigError("expected no --longer-side with --features: they are in pixels of the images as stored")


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Something to measure. label: for the reader; options: of create_method."""

    label: str
    name: str
    options: dict[str, Any]


def _subjects(args: argparse.Namespace) -> Iterator[Subject]:
    """The methods, scfeat once for each of its weights. Options go to the methods that take any, if there are some."""
    takes = [name for name in args.method if name == "scfeat" or ":" in name]
    suffix = "".join(f", {key}={value}" for key, value in args.options)
    for name in args.method:
        options = dict(args.options) if name in takes or not takes else {}
        shown = suffix if options else ""
        if name == "scfeat":
            for weights in args.weights:
                own = {"weights": weights, "device": args.device, **options}
                yield Subject(f"scfeat {_short(weights)}{shown}", name, own)
        else:
            yield Subject(f"{name}{shown}", name, options)


def _short(weights: str) -> str:
    """Of a path its last two parts, which tell the checkpoints of several runs apart."""
    return "/".join(Path(weights).parts[-2:])


def _protocols(args: argparse.Namespace) -> list[list[Protocol]]:
    """For each size of the images, one protocol for each budget of points."""
    hpatches = args.kind == "hpatches"
    budgets = args.max_keypoints or [HPATCHES_KEYPOINTS if hpatches else Protocol().max_keypoints]
    sizes = args.longer_side or [0 if hpatches else Protocol().longer_side]
    return [[Protocol(budget, size, args.estimator, args.runs) for budget in budgets] for size in sizes]


def _method_runs(args: argparse.Namespace) -> list[Any]:
    from scfeat_core.evaluation.methods import create_method
    from scfeat_core.evaluation.report import Run

    parts = _parts(args)
    runs = []
    for subject in _subjects(args):
        method = create_method(subject.name, subject.options)
        for protocols in _protocols(args):
            extract = _extraction(subject.name, method, protocols)
            by_part = [_sections(args, part, extract, protocols) for part in parts]
            for index, protocol in enumerate(protocols):
                settings = {"method": subject.name, "options": subject.options, "protocol": dump_config(protocol)}
                sections = [sections[index] for sections in by_part]
                runs.append(Run(_label(subject.label, protocol), settings, sections))
    return runs


def _label(name: str, protocol: Protocol) -> str:
    size = f"{protocol.longer_side} px" if protocol.longer_side else "as stored"
    return f"{name}, {protocol.max_keypoints} points, {size}"


Extract = Callable[[Sequence[Any], bool], Iterator[Mapping[Path, View]]]


def _extraction(name: str, method: Any, protocols: Sequence[Protocol]) -> Extract:
    """The views of the images of some pairs for each protocol in turn; all have one size of images.

    Features are extracted once, at the largest budget, and cut to their best, except where the budget changes what is
    found.
    """
    from scfeat_core.evaluation.methods import BUDGET_CHANGES_FEATURES

    def extract(pairs: Sequence[Any], progress: bool) -> Iterator[Mapping[Path, View]]:
        if name in BUDGET_CHANGES_FEATURES:
            for protocol in protocols:
                yield extract_views(pairs, method, protocol, progress)
            return
        views = extract_views(pairs, method, max(protocols, key=lambda each: each.max_keypoints), progress)
        for protocol in protocols:
            yield truncate_views(views, protocol.max_keypoints)

    return extract


@dataclass(frozen=True)
class Part:
    """The pairs of one section of the result. kind: how they are measured."""

    kind: str
    title: str
    pairs: Sequence[Any]


def _parts(args: argparse.Namespace) -> list[Part]:
    splits = _splits(args)

    def part(kind: str, pairs: Sequence[Any], title: str = "") -> Part:
        return Part(kind, title or kind, limit_pairs(pairs, args.limit))

    parts = []
    if args.kind in ("homography", "all"):
        parts.append(part("homography", datasets.homography_pairs(args.data, splits)))
    if args.kind in ("pose", "all"):
        parts.append(part("pose", datasets.pose_pairs(args.data, splits)))
    if args.kind == "labelled":
        parts.append(part("labelled", datasets.labelled_pairs(args.data, splits)))
    if args.kind == "hpatches":
        parts.append(part("hpatches", datasets.hpatches_pairs(args.data, splits)))
    if args.kind == "all" and args.apart:
        parts.append(part("homography", datasets.homography_pairs(args.data, APART[:1]), "homography, apart"))
        parts.append(part("labelled", datasets.labelled_pairs(args.data, APART[1:])))
    return parts


def _sections(args: argparse.Namespace, part: Part, extract: Extract, protocols: Sequence[Protocol]) -> list[Any]:
    """One section for each protocol."""
    if part.kind == "hpatches":
        return _hpatches_sections(args, part.pairs, lambda sequence: extract(sequence, False), protocols)
    from scfeat_core.evaluation.report import create_section

    progress = _wants_progress(args)
    measures = [_kind(part.kind, protocol) for protocol in protocols]  # a missing package shows before the work
    sections = []
    for views, (evaluate, columns, of_set, of_all) in zip(extract(part.pairs, progress), measures, strict=True):
        evaluate_pair = partial(evaluate, views=views)
        rows = map_pairs(evaluate_pair, part.pairs, part.title, args.workers, progress)
        sections.append(create_section(part.title, columns, rows, of_set, of_all))
    return sections


def _hpatches_sections(
    args: argparse.Namespace, pairs: Sequence[Any], views: Any, protocols: Sequence[Protocol]
) -> list[Any]:
    from scfeat_core.evaluation import hpatches
    from scfeat_core.evaluation.hpatches_cache import write_cache
    from scfeat_core.evaluation.report import create_section

    if args.write_cache and len(protocols) * len(args.method) * len(args.weights) * len(args.postfix) > 1:
        raise ConfigError("expected one method with one budget and size for --write-cache, found several")
    by_protocol = hpatches.evaluate_hpatches(pairs, views, protocols, args.workers, _wants_progress(args))
    if args.write_cache:
        write_cache(args.write_cache, hpatches.count_rows(by_protocol[0]))
    summarise = hpatches.summarise_hpatches
    return [
        create_section("hpatches", HPATCHES_MEASURED, rows, summarise, summarise, HPATCHES_DECIMALS)
        for rows in by_protocol
    ]


def _stored_runs(args: argparse.Namespace) -> list[Any]:
    """Of features in files: for each postfix, with each budget."""
    from scfeat_core.evaluation import hpatches
    from scfeat_core.evaluation.report import Run

    (part,) = _parts(args)
    budgets = args.max_keypoints or [None]
    protocols = [Protocol(1 if budget is None else budget, 0, args.estimator, args.runs) for budget in budgets]
    runs = []
    for postfix in args.postfix:
        views = hpatches.stored_views(args.features, postfix, budgets)
        sections = _hpatches_sections(args, part.pairs, views, protocols)
        for budget, section in zip(budgets, sections, strict=True):
            settings = {"features": str(args.features), "postfix": postfix, "max_keypoints": budget, "runs": args.runs}
            label = f"{postfix}, {'all' if budget is None else budget} points, as stored"
            runs.append(Run(label, settings, [section]))
    return runs


def _cached_runs(args: argparse.Namespace) -> list[Any]:
    """Of results in files of D2-Net's format."""
    from scfeat_core.evaluation.hpatches import summarise_counts
    from scfeat_core.evaluation.hpatches_cache import read_cache
    from scfeat_core.evaluation.report import Run, Section

    runs = []
    for path in args.cache:
        counts = read_cache(path)
        splits = {
            name: summarise_counts(counts, kind) for kind, name in HPATCHES_SPLITS.items() if kind in counts.kinds
        }
        section = Section("hpatches", HPATCHES_COLUMNS, summarise_counts(counts), splits, [], HPATCHES_DECIMALS)
        runs.append(Run(path.stem, {"cache": str(path)}, [section]))
    return runs


def _wants_progress(args: argparse.Namespace) -> bool:
    return not args.no_progress and sys.stderr.isatty()


def _kind(kind: str, protocol: Protocol) -> tuple[Callable[..., Any], Columns, Callable[..., Any], Callable[..., Any]]:
    """How to measure one pair, what goes into the table, and how the rows of a set and of all sets are summarised."""
    if kind == "homography":
        from scfeat_core.evaluation import homography

        evaluate = partial(homography.evaluate_homography_pair, protocol=protocol)
        summarise = homography.summarise_homography
        return evaluate, HOMOGRAPHY_COLUMNS, summarise, summarise
    if kind == "pose":
        from scfeat_core.evaluation import relative_pose

        relative_pose.create_estimator(protocol.estimator)
        evaluate_pose = partial(relative_pose.evaluate_pose_pair, protocol=protocol)
        return evaluate_pose, POSE_COLUMNS, relative_pose.summarise_pose_set, relative_pose.summarise_pose
    from scfeat_core.evaluation import labelled

    return labelled.evaluate_labelled_pair, LABELLED_COLUMNS, labelled.summarise_labelled, labelled.summarise_labelled


def _splits(args: argparse.Namespace) -> list[str]:
    if args.validation_split is None:
        return list(args.splits)
    from scfeat_core.data.photos import ValidationSplit

    if args.splits:
        raise ConfigError("expected --splits or --validation-split, found both; give one of them")
    return list(read_config(ValidationSplit, args.validation_split).scenes)
