"""What the sub-commands on image files share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from scfeat_core.errors import ImageError

if TYPE_CHECKING:
    from scfeat_core.extraction import Extractor


def add_extractor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", default="lite", help="name of shipped weights, or a .safetensors file (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, or auto (%(default)s)")
    parser.add_argument("--max-keypoints", type=int, default=1024, metavar="N", help="at most N an image (%(default)s)")


def extractor_from(args: argparse.Namespace) -> Extractor:
    from scfeat_core.extraction import Extractor

    return Extractor(weights=args.weights, device=args.device, max_keypoints=args.max_keypoints)


def read_image(path: Path) -> np.ndarray:
    """The image file as (H, W, 3) uint8 RGB; ImageError where there is none, or none that OpenCV reads."""
    if not path.is_file():
        raise ImageError(f"expected an image file, found no file at {path}")
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ImageError(f"{path} is not an image that OpenCV can read: it is damaged, or of an unknown format")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
