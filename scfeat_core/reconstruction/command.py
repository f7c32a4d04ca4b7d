"""``scfeat reconstruct``: features for hloc and COLMAP, and a sparse model with the figures of the ETH benchmark."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from scfeat_core.commands.common import add_options_argument, count_from
from scfeat_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from scfeat_core.reconstruction.sources import Source
    from scfeat_core.reconstruction.workspace import Plan, Result

EXIT_INCOMPLETE = 1  # nothing could be reconstructed, or some images could not be read
BAG_SUFFIXES = (".bag", ".mcap", ".db3")

EPILOG = """\
SOURCE is a folder of images, a bag (rosbag2 or ROS 1), the folder of a run of `scfeat replay`, whose tracks are then
the matches, or features.h5 of `scfeat extract --format h5`.

OUT gets features.h5 (but where that is SOURCE), pairs.txt and matches.h5 as hloc has them, database.db for COLMAP
(keypoints, matches and two-view geometries; no descriptors, as it has no kind for ours), the model as text in sparse/0,
and reconstruction.json.
Features and matches that are there are kept. --export-only stops before the model.

Cameras: calibrated ones (--camera FILE; CameraInfo of a bag; cameras.json beside the images) stay as they are; without
one the focal length is guessed or taken from EXIF data, and refined.

Where the true poses are known (ground truth of a bag or run; cameras.json), the table has position errors in their
unit, metres for bags, and rotation errors, after the similarity that fits the positions best.

examples:
  scfeat reconstruct photos/ --out build/model
  scfeat reconstruct photos/ --out build/model --compare sift
  scfeat reconstruct my_bag --every 5 --out build/model
  scfeat reconstruct features.h5 --out build/colmap --export-only"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, metavar="SOURCE", help="images, bag, run of a replay, or features.h5")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="folder to write to")
    parser.add_argument("--export-only", action="store_true", help="write the files for hloc and COLMAP, map nothing")
    features = parser.add_argument_group("features")
    features.add_argument(
        "--method", default="scfeat", help="scfeat, sift, rootsift, orb, akaze where OpenCV has it, or module:callable"
    )
    features.add_argument(
        "--compare", default="", metavar="METHOD,...", help="these, too, into OUT/METHOD, in one table"
    )
    features.add_argument(
        "--max-keypoints", type=count_from(1), default=2048, metavar="N", help="at most N an image (%(default)s)"
    )
    features.add_argument("--weights", default="lite", help="of scfeat: shipped ones, or a .safetensors file (lite)")
    features.add_argument("--device", default="cpu", help="of scfeat: cpu, cuda, cuda:1, or auto (%(default)s)")
    add_options_argument(features, "option of the Extractor, such as max_edge=1600; may be repeated")
    geometry = parser.add_argument_group("matches and cameras")
    geometry.add_argument(
        "--pairs",
        default="",
        help="exhaustive (default for images), sequential[:N] (for sequences: each with the next 10), "
        "or a file with two names a line",
    )
    geometry.add_argument(
        "--camera",
        default="known",
        metavar="FILE|shared|each",
        help="calibration of all images (Kalibr, ROS, COLMAP), or unknown: one for all images, or one for each",
    )
    geometry.add_argument(
        "--threshold", type=float, default=2.0, metavar="PX", help="of the two-view geometries (%(default)s)"
    )
    bag = parser.add_argument_group("sequences")
    bag.add_argument("--topic", help="image topic of a bag")
    bag.add_argument("--every", type=count_from(1), default=1, metavar="N", help="take every n-th image (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="keep nothing that is there")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars (none without a terminal)")


def run(args: argparse.Namespace) -> int:
    from scfeat_core.reconstruction.summary import format_summaries
    from scfeat_core.reconstruction.workspace import run as run_stages

    if not args.threshold > 0:
        raise ConfigError(f"expected a --threshold above 0, found {args.threshold}")
    plan = _plan(args)
    source = open_source(args)
    folders = {args.method if source.files else "features": (args.out, plan)}
    for method in _others(args, source):
        extraction = replace(plan.extraction, method=method, options={})
        folders[method] = (args.out / method.replace(":", "_"), replace(plan, extraction=extraction))
    results: dict[str, Result] = {}
    try:
        for label, (folder, each) in folders.items():
            results[label] = run_stages(source, folder, each, partial(_say, label))
            for outcome in results[label].failed:
                print(f"failed: {outcome.name}: {outcome.error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"what is complete in {args.out} is kept: the same command goes on from there", file=sys.stderr)
        raise
    finally:
        if results:
            print(format_summaries({label: result.summary for label, result in results.items()}))
    print(f"{args.out}: {', '.join(_written(source, next(iter(results.values()))))}")
    complete = all(not result.failed and (result.models or args.export_only) for result in results.values())
    return 0 if complete else EXIT_INCOMPLETE


def _written(source: Source, result: Result) -> list[str]:
    features = ["features.h5"] if source.features is None else []
    return [*features, "matches.h5", "pairs.txt", "database.db", *(["sparse/0"] if result.models else [])]


def _say(label: str, line: str) -> None:
    print(f"{label}: {line}")


def _plan(args: argparse.Namespace) -> Plan:
    from scfeat_core.reconstruction.features import Extraction
    from scfeat_core.reconstruction.workspace import CAMERA_CHOICES, Plan

    camera = args.camera
    if camera not in CAMERA_CHOICES:
        if not Path(camera).is_file():
            raise DataError(f"expected a calibration file, 'shared' or 'each' with --camera, found no file {camera}")
        camera = partial(import_module("scfeat_ros.intrinsics").read_intrinsics, Path(camera))
    extraction = Extraction(args.method, args.max_keypoints, dict(args.options), args.weights, args.device)
    mapping, progress = not args.export_only, _wants_progress(args)
    return Plan(extraction, args.pairs, camera, args.threshold, mapping, args.overwrite, progress)


def _wants_progress(args: argparse.Namespace) -> bool:
    return not args.no_progress and sys.stderr.isatty()


def _others(args: argparse.Namespace, source: Source) -> list[str]:
    methods = [method for method in args.compare.split(",") if method]
    if methods and not source.files:
        raise ConfigError("expected images with --compare, to extract other features from, found only features")
    if args.method in methods or len(set(methods)) < len(methods):
        raise ConfigError(f"expected different methods, found '{args.method}' and --compare {args.compare}")
    return methods


# -- the source --------------------------------------------------------------------------------------------------------


def open_source(args: argparse.Namespace) -> Source:
    """What SOURCE is, by its content. Raises DataError."""
    from scfeat_core.reconstruction import sources

    path: Path = args.source
    if not path.exists():
        raise DataError(f"expected images, a bag, a run or features at {path}, found nothing there; check the path")
    if path.suffix == ".h5":
        return sources.features_source(path)
    if (path / "run.json").is_file():
        recording = import_module("scfeat_core.replay.run_folder").read_run(path)
        return sources.recording_source(recording, args.every)
    if is_bag(path):
        opened = import_module("scfeat_ros.replay.bag_images")  # the bag is ROS's, and this package knows nothing of it
        folder, progress = args.out / "images", _wants_progress(args)
        return opened.bag_source(path, folder, args.topic, args.every, partial(_say, path.name), progress)
    return sources.folder_source(path, outside=args.out)


def is_bag(path: Path) -> bool:
    """Whether this is a bag: its file, or a folder with its storage files."""
    if path.is_file():
        return path.suffix in BAG_SUFFIXES
    return any(file.suffix in BAG_SUFFIXES or file.name.endswith(".db3.zstd") for file in path.iterdir())
