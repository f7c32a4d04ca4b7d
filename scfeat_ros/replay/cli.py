"""``scfeat replay``: bags through the front end, without ROS, frame by frame; figures, trajectory and a report."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.commands.common import count_from
from scfeat_core.config import parse_value
from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_ros.parameters import NodeParameters, load_parameters, read_parameters

from . import batch, outcomes

if TYPE_CHECKING:
    from .job import ReplayJob

EPILOG = """\
Every image of the topic goes through the pipeline of the node, none is dropped for want of time, and two runs write
the same files. ROS need not be there. BAG is a folder of rosbag2, one of its files (.mcap, .db3), or a ROS 1 .bag.

DIR, the folder of a run (build/replay/BAG where it is not given), then holds
  report.html      everything on one page that needs no other file: tables, plots, worst frames, a film of the tracks
  metrics.json     all figures, of each frame and in all
  frames.npz       keypoints, matches, inliers and tracks of all frames; timings.npz, run.json: how long, and how made
  trajectory.txt   the path of the camera by visual odometry (TUM format), where the camera is calibrated
`scfeat compare DIR_A DIR_B` puts runs side by side.

A run that was interrupted (Ctrl-C writes the report of what was done) goes on when the same command is given again.
The same command on a finished run makes only the figures and the report again.

examples:
  scfeat replay my_bag                               all that is chosen by itself is said
  scfeat replay my_bag --topic /cam0/image_raw --intrinsics camchain.yaml --ground-truth poses.txt --out runs/a
  scfeat replay my_bag --config frontend.yaml --set max_keypoints=500 --out runs/b
  scfeat replay my_bag --method sift --out runs/sift && scfeat compare runs/a runs/sift
  scfeat replay bags/* --workers 4 --out runs --fail-if "inlier_ratio<0.5" --junit replay.xml
  scfeat replay my_bag --live --rate 2               the same bag into the running ROS node

exit status: 0; 1 where a --fail-if holds; 2 on an error; 130 where it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bags", type=Path, nargs="+", metavar="BAG", help="rosbag2 folder, .mcap, .db3, or ROS 1 .bag")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run; of several bags, that of a folder for each (build/replay/BAG)",
    )
    _add_input_arguments(parser.add_argument_group("what is replayed"))
    _add_setting_arguments(parser.add_argument_group("how"))
    run = parser.add_argument_group("run")
    run.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder")
    run.add_argument("--no-report", action="store_true", help="figures only, no report.html")
    run.add_argument("--no-progress", action="store_true", help="no progress bar (none without a terminal)")
    batch.add_arguments(parser)
    outcomes.add_arguments(parser)
    if find_spec("scfeat_ros.replay.live"):
        from . import live

        live.add_arguments(parser)


def _add_input_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--topic", metavar="T", help="image topic (that with most images)")
    group.add_argument(
        "--camera-info",
        metavar="T",
        help="sensor_msgs/CameraInfo topic (that beside the images), or 'none': as if there were no calibration",
    )
    group.add_argument(
        "--intrinsics",
        type=Path,
        metavar="FILE",
        help="calibration of Kalibr, ROS, COLMAP, EuRoC or KITTI instead of CameraInfo (camera_info.yaml beside the "
        "bag, where there is no CameraInfo in it)",
    )
    group.add_argument(
        "--ground-truth",
        metavar="FILE|TOPIC",
        help="poses of the camera: a TUM, EuRoC or KITTI file, a topic of the bag, or 'none' (groundtruth.txt beside "
        "the bag, or a topic that is called so)",
    )
    group.add_argument(
        "--truth-of-body",
        action="store_true",
        help="the poses are those of the body; --intrinsics says where the camera is on it (T_cam_imu, T_BS)",
    )
    group.add_argument(
        "--depth",
        metavar="T",
        help="topic of depth maps of the same view (16UC1, 32FC1), for the repeatability where there is ground truth, "
        "or 'none' (that with the frame_id of the images)",
    )
    group.add_argument("--frames", type=count_from(1), default=0, metavar="N", help="at most so many images")
    group.add_argument("--start", type=float, default=0.0, metavar="S", help="seconds of the recording to leave out")
    group.add_argument("--stop", type=float, metavar="S", help="seconds of the recording after which to end")


def _add_setting_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", type=Path, metavar="FILE", help="parameter file of the node (config/frontend.yaml)")
    group.add_argument(
        "--set",
        "-p",
        action="append",
        type=_setting,
        default=[],
        dest="settings",
        metavar="NAME=VALUE",
        help="parameter of the node, as max_keypoints=500 (NAME:=VALUE, too); may be repeated",
    )
    group.add_argument("--weights", metavar="W", help="the same as --set weights=W")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, or auto; the same as --set device=D")
    group.add_argument("--camera", default="", metavar="NAME", help="which of the cameras of the parameters this is")
    group.add_argument(
        "--method",
        default="scfeat",
        metavar="M",
        help="scfeat, sift, rootsift, orb, akaze where OpenCV has it, or module:callable, in the same pipeline "
        "(%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status; see the help."""
    jobs = _jobs(args)
    if getattr(args, "live", False):
        from . import live

        return live.run(jobs, args)
    if len(jobs) == 1 and args.ray is None:
        return outcomes.conclude([_run_here(jobs[0], args)], args)
    return outcomes.conclude(batch.run_jobs(jobs, args.workers or 1, args.ray, progress=not args.no_progress), args)


def _run_here(job: ReplayJob, args: argparse.Namespace) -> outcomes.Run:
    """In this process. Where JUnit, JSON or a table are asked for, an error of the replay is told there, too."""
    from .run import run_job

    started = time.perf_counter()
    summary, error = None, ""
    try:
        summary = run_job(job, lambda text: print(text, file=sys.stderr), not args.no_progress)
    except ScfeatError as problem:
        if not (args.junit or args.json or args.table):
            raise
        error = str(problem)
    return outcomes.Run(
        job.out.name,
        summary,
        error,
        time.perf_counter() - started,
        interrupted=bool(summary is not None and summary.pop("interrupted", False)),
        folder=job.out,
        bag=job.bag,
    )


def _jobs(args: argparse.Namespace) -> list[ReplayJob]:
    from .job import ReplayJob

    parameters = _parameters(args)
    shared = {name: getattr(args, name) for name in {field.name for field in fields(ReplayJob)} & set(vars(args))}
    shared.pop("out")
    if len(args.bags) == 1:
        folders = [args.out or Path("build/replay") / outcomes.bag_name(args.bags[0])]
    else:
        folders = batch.output_folders(args.bags, args.out or Path("build/replay"))
    first = ReplayJob(bag=args.bags[0], out=folders[0], parameters=parameters, report=not args.no_report, **shared)
    return [replace(first, bag=bag, out=folder) for bag, folder in zip(args.bags, folders, strict=True)]


def _parameters(args: argparse.Namespace) -> NodeParameters:
    """Those of the file, then those of the command line."""
    values: dict[str, Any] = {} if args.config is None else read_parameters(args.config)
    where = "parameters" if args.config is None else str(args.config)
    load_parameters(values, where)  # what is wrong in the file is told with its name
    values |= dict(args.settings)
    values |= {name: getattr(args, name) for name in ("weights", "device") if getattr(args, name) is not None}
    return load_parameters(values)


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    name = name.removesuffix(":")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found '{text}'")
    try:
        return name, parse_value(value)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error
