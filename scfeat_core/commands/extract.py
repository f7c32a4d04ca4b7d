"""``scfeat extract``: the features of images, folders of images and data sets, as .npz files or one HDF5 file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.commands.common import add_extractor_arguments, count_from
from scfeat_core.errors import ConfigError

if TYPE_CHECKING:
    from scfeat_core.bulk.jobs import Job, Report
    from scfeat_core.bulk.pipeline import Outcome

EXIT_INCOMPLETE = 1  # some images failed, the others are there
EXIT_ERROR = 2  # all failed

EPILOG = """\
npz: one file OUT/<name>.npz an image, with keypoints (N, 2) in pixels with (0, 0) the centre of the top-left pixel,
scores (N,), best first, descriptors (N, D) of unit length, image_size (width, height), and descriptor_space.
h5: one file as hloc writes it (descriptors D x N), OUT or OUT/features.h5.

An image of a folder is called by its path from there. Images are taken as they are stored: EXIF rotation is not
applied, as COLMAP does not either. Complete outputs are skipped, so that a run that was interrupted goes on where it
was. An image that cannot be read is reported and listed beside the output; the exit status is then 1, and 2 where all
fail.

examples:
  scfeat extract left.jpg right.jpg -o features
  scfeat extract photos/ -o features.h5 --format h5 --workers 4
  scfeat extract photos/ -o /shared/features --ray --workers 64 --device cuda
  scfeat extract --config config/extract_hpatches.yaml --data hpatches-sequences-release"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE_OR_FOLDER")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder to write to, or an .h5 file (features, or what the configuration says)",
    )
    parser.add_argument("--format", choices=["npz", "h5"], help="(npz; h5 where the output ends in .h5)")
    parser.add_argument("--half", action="store_true", help="descriptors as float16")
    add_extractor_arguments(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="take all of the above from a YAML file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="with --config: other images than it says")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--workers", type=count_from(1), metavar="N", help="threads that decode images, or actors of --ray (2)"
    )
    run.add_argument(
        "--batch-size", type=count_from(1), metavar="N", help="images of one size at once (8 on a GPU, 1 on a CPU)"
    )
    run.add_argument("--ray", action="store_true", help="on a Ray cluster (RAY_ADDRESS), or a Ray of this machine")
    run.add_argument("--overwrite", action="store_true", help="extract again what is there already")
    run.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")
    run.add_argument("--no-progress", action="store_true", help="no progress bar (none without a terminal)")


def run(args: argparse.Namespace) -> int:
    jobs = _config_jobs(args) if args.config else [_job(args)]
    if args.dry_run:
        for job in jobs:
            print(_plan(job, args.overwrite))
        return 0
    reports = [_run_job(job, args) for job in jobs]
    failed = sum(len(report.failures) for report in reports)
    extracted = sum(report.extracted + report.skipped for report in reports)
    return 0 if not failed else EXIT_INCOMPLETE if extracted else EXIT_ERROR


# -- what is to be done ------------------------------------------------------------------------------------------------


def _job(args: argparse.Namespace) -> Job:
    from scfeat_core.bulk.images import find_images
    from scfeat_core.bulk.jobs import Job
    from scfeat_core.bulk.outputs import H5Output, NpzOutput, Output
    from scfeat_core.bulk.pipeline import Settings

    if not args.images or args.data is not None:
        raise ConfigError("expected images or folders, or --config (with --data, if any); found neither or both")
    folder = args.output or Path("features")
    output: Output
    if (args.format or ("h5" if folder.suffix == ".h5" else "npz")) == "npz":
        output = NpzOutput(folder, half=args.half)
    else:
        output = H5Output(folder if folder.suffix == ".h5" else folder / "features.h5", half=args.half)
    options = {"max_keypoints": args.max_keypoints, **dict(args.options)}
    settings = Settings(args.weights, args.device, options, False, args.batch_size or 0, args.workers or 2)
    return Job(find_images(args.images, outside=folder), settings, output)


def _config_jobs(args: argparse.Namespace) -> list[Job]:
    from scfeat_core.bulk.config import ExtractConfig, create_jobs
    from scfeat_core.config import load_config, read_mapping

    if args.images or args.options or args.format or args.half:
        raise ConfigError("expected no images and no --format, --half or --set with --config; write them into the file")
    mapping = read_mapping(args.config)
    data = mapping.get("data_config_extract")
    if isinstance(data, dict):
        _set_path(data, "data_path", args.config.parent, args.data)
        _replace(data, workers=args.workers, batch_size=args.batch_size)
    if isinstance(weights := mapping.get("load_path"), str) and weights.endswith(".safetensors"):
        mapping["load_path"] = str(args.config.parent / weights)
    _replace(mapping, output_root=args.output)
    return create_jobs(load_config(ExtractConfig, mapping, where=str(args.config)))


def _set_path(mapping: dict[str, Any], key: str, folder: Path, given: Path | None) -> None:
    """A path of a file is relative to the file; one of the command line to where it is given."""
    if given is not None:
        mapping[key] = given
    elif isinstance(mapping.get(key), str):
        mapping[key] = folder / mapping[key]


def _replace(mapping: dict[str, Any], **values: Any) -> None:
    mapping.update({key: value for key, value in values.items() if value is not None})


def _plan(job: Job, overwrite: bool) -> str:
    missing = job.files if overwrite else job.output.missing(job.files)
    where = f"{job.output.target} with '{job.settings.weights}'"
    return f"{len(missing)} of {len(job.files)} images to extract to {where}; nothing done"


# -- doing it ----------------------------------------------------------------------------------------------------------


def _run_job(job: Job, args: argparse.Namespace) -> Report:
    from scfeat_core.bulk.jobs import run_job

    backend: Callable[..., Any] | None = None
    if args.ray:
        from scfeat_core.bulk.ray_backend import extract_with_ray

        backend = partial(extract_with_ray, workers=job.settings.decoders)
    with _Progress(not args.no_progress and sys.stderr.isatty()) as progress:
        report = run_job(job, backend, args.overwrite, progress.watch, progress.begin)
    print(f"{job.output.target}: {report}")
    return report


class _Progress:
    """A bar with images a second and the time that is left, where tqdm is installed; failures as lines in any case."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, count: int) -> None:
        if not self._wanted:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=count, unit="image", dynamic_ncols=True, smoothing=0.1)

    def watch(self, outcome: Outcome) -> None:
        if outcome.error:
            line = f"failed: {outcome.name}: {outcome.error}"
            print(line, file=sys.stderr) if self._bar is None else self._bar.write(line, file=sys.stderr)
        if self._bar is not None:
            self._bar.update()
