"""``scfeat match``: two images, their verified matches, and a picture of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from scfeat_core.commands.common import add_extractor_arguments, extractor_from, read_upright
from scfeat_core.drawing import draw_matches
from scfeat_core.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", type=Path)
    parser.add_argument("image1", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("matches.png"), help="picture to write (%(default)s)")
    add_extractor_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from scfeat_core.matching import match
    from scfeat_core.two_view import verify

    image0, image1 = read_upright(args.image0), read_upright(args.image1)
    extractor = extractor_from(args)
    features0, features1 = extractor(image0), extractor(image1)
    matches = match(features0, features1).numpy()
    keypoints0 = features0.keypoints[matches.indices0]
    keypoints1 = features1.keypoints[matches.indices1]
    geometry = verify(keypoints0, keypoints1)
    _write(args.output, draw_matches(image0, image1, keypoints0, keypoints1, geometry.inliers))
    print(
        f"{len(features0)} and {len(features1)} keypoints, {len(matches)} matches, {geometry.num_inliers} agree "
        f"with one {geometry.model.name.lower()} model within {geometry.threshold:g} px: {args.output}"
    )
    return 0


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.haveImageWriter(str(path)):
        raise DataError(f"OpenCV writes no '{path.suffix}' pictures: give --output a name ending in .png or .jpg")
    cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
