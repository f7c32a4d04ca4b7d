"""The ``scfeat`` command: one table of sub-commands, each imported only when it is the one that was asked for.

A sub-command is a module with ``add_arguments(parser)`` and ``run(args) -> int``, the exit status.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from scfeat_core import __version__
from scfeat_core.errors import ScfeatError

EXIT_ERROR = 2  # as argparse does for wrong arguments
EXIT_INTERRUPTED = 130

DESCRIPTION = """\
Learned local features: find keypoints in images, match them, follow a camera on a ROS 2 topic,
and train and measure the network that does it."""

EPILOG = """\
examples:
  scfeat demo                          a rendered camera, through the real ROS 2 node, to build/demo/
  scfeat demo --bag my_bag             the same with the images of a rosbag2
  scfeat doctor                        what the node misses on this machine, and what mends it
  scfeat match left.jpg right.jpg      verified matches of two images, and a picture of them
  scfeat extract *.jpg -o features     keypoints, scores and descriptors as one .npz an image
  scfeat extract photos --format h5    a folder of images, as one file for hloc

`scfeat COMMAND --help` says more about each. The node itself is `scfeat-frontend`, or
`ros2 launch scfeat frontend.launch.py`."""


@dataclass(frozen=True)
class Command:
    """Where a sub-command is, what it does in one line, what brings the modules that it may miss, and how much of the
    logs is for its user."""

    module: str
    summary: str
    needs: str = "pip install scfeat-python"
    logs: int = logging.WARNING


COMMANDS = {
    "demo": Command(
        "scfeat_ros.demo",
        "play a camera into the live ROS 2 node, report what comes out",
        "run `make setup`, or source a ROS 2 installation with scfeat in it and pip install 'scfeat-python[demo]'",
    ),
    "replay": Command(
        "scfeat_ros.replay.cli",
        "run a bag through the pipeline of the node, and say how good it is",
        "pip install 'scfeat-python[replay]'",
    ),
    "doctor": Command("scfeat_ros.doctor", "check that what the node needs is there and works, and say what mends it"),
    "extract": Command(
        "scfeat_core.commands.extract",
        "write the features of images, folders and data sets to files",
        "pip install 'scfeat-python[extract]'",
        logging.INFO,
    ),
    "bag-from-images": Command(
        "scfeat_ros.bag_from_images",
        "make a rosbag2 of images, stamps, calibration and ground truth (TUM, EuRoC, KITTI, any folder)",
        "pip install 'scfeat-python[bags]'",
    ),
    "reconstruct": Command(
        "scfeat_core.reconstruction.command",
        "write features and matches for hloc and COLMAP, and reconstruct the scene with pycolmap",
        "pip install 'scfeat-python[reconstruct]'",
    ),
    "match": Command("scfeat_core.commands.match", "match two images, verify the matches, draw them"),
    "compare": Command("scfeat_core.replay.compare", "put replays of one recording side by side: a table, a page"),
    "evaluate": Command(
        "scfeat_core.evaluation.cli",
        "measure features on image pairs with ground truth",
        "pip install 'scfeat-python[eval]'",
    ),
    "bench": Command(
        "scfeat_core.bench.cli", "measure the time of each stage, beside other features and what the machine could do"
    ),
    "train": Command(
        "scfeat_core.training.cli",
        "train a network from a configuration file",
        "pip install 'scfeat-python[train]'",
        logging.INFO,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns its exit status, 2 on an error that scfeat can name, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in words if not word.startswith("-")), "")
    if name in COMMANDS:
        logging.basicConfig(level=COMMANDS[name].logs, format="%(message)s")
    logging.getLogger("scfeat_core.engines").setLevel(logging.INFO)  # making one may take minutes
    try:
        return _run(name, words)
    except ScfeatError as error:
        print(f"scfeat {name}: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"scfeat {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(name: str, words: list[str]) -> int:
    try:
        module = import_module(COMMANDS[name].module) if name in COMMANDS else None
        args = _parser(name, module).parse_args(words)
        assert module is not None  # argparse has refused any other name
        return module.run(args)
    except ModuleNotFoundError as error:
        raise _missing_module(name, error) from error


def _parser(name: str, module: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scfeat",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scfeat {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each, command in COMMANDS.items():
        sub_parser = commands.add_parser(each, help=command.summary, description=f"{command.summary.capitalize()}.")
        if each == name and module is not None:
            module.add_arguments(sub_parser)
    return parser


def _missing_module(name: str, error: ModuleNotFoundError) -> ScfeatError | ModuleNotFoundError:
    """An error with the fix where the module is a dependency; a module of our own that is missing is a bug."""
    if (error.name or "").startswith(("scfeat_core", "scfeat_ros")):
        return error
    return ScfeatError(
        f"the Python module '{error.name}' is needed and not installed for {sys.executable}: {COMMANDS[name].needs}"
    )


if __name__ == "__main__":
    sys.exit(main())
