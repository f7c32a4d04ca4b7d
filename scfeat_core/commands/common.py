"""What the sub-commands on image files share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.config import parse_value
from scfeat_core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from scfeat_core.extraction import Extractor


def count_from(minimum: int) -> Callable[[str], int]:
    """The ``type`` of an argument that takes whole numbers from ``minimum`` on."""

    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found '{text}'")
        return value

    return count


def add_extractor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", default="lite", help="name of shipped weights, or a .safetensors file (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, or auto (%(default)s)")
    parser.add_argument(
        "--max-keypoints",
        type=count_from(0),
        default=1024,
        metavar="N",
        help="at most N an image, 0: all (%(default)s)",
    )
    add_options_argument(parser, "option of the Extractor, such as max_edge=1600 or engine=onnx; may be repeated")


def extractor_from(args: argparse.Namespace) -> Extractor:
    from scfeat_core.extraction import Extractor

    options = {"max_keypoints": args.max_keypoints, **dict(args.options)}
    return Extractor(weights=args.weights, device=args.device, **options)


def read_upright(path: Path) -> np.ndarray:
    """The image file as (H, W, 3) uint8 RGB, turned as its EXIF data ask; ImageError where OpenCV reads none."""
    from scfeat_core.bulk.images import read_image

    return read_image(path, turned=True)


def add_options_argument(parser: argparse._ActionsContainer, help: str) -> None:
    """``--set KEY=VALUE``, any number of times, as the list ``options`` of key and value; the value is read as YAML."""
    parser.add_argument(
        "--set", action="append", type=_option, default=[], dest="options", metavar="KEY=VALUE", help=help
    )


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found '{text}'")
    try:
        return key, parse_value(value)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{key}: {error}") from error
