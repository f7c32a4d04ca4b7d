"""``scfeat extract``: the features of images, one .npz file an image."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from scfeat_core.commands.common import add_extractor_arguments, extractor_from, read_image
from scfeat_core.errors import DataError
from scfeat_core.types import Features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each file holds keypoints (N, 2) in pixels with (0, 0) the centre of the top-left pixel, scores (N,), best "
        "first, descriptors (N, D) of unit length, image_size (width, height), and descriptor_space."
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("-o", "--output", type=Path, default=Path("features"), help="folder to write to (%(default)s)")
    add_extractor_arguments(parser)


def run(args: argparse.Namespace) -> int:
    targets = _targets(args.images, args.output)
    extractor = extractor_from(args)
    args.output.mkdir(parents=True, exist_ok=True)
    for source, target in targets.items():
        features = extractor(read_image(source))
        save_features(target, features)
        print(f"{target}: {len(features)} keypoints")
    return 0


def save_features(path: Path, features: Features) -> None:
    features = features.numpy()
    np.savez(
        path,
        keypoints=features.keypoints,
        scores=features.scores,
        descriptors=features.descriptors,
        image_size=np.array(features.image_size),
        descriptor_space=np.array(features.descriptor_space),
    )


def _targets(images: list[Path], folder: Path) -> dict[Path, Path]:
    """Source to target file; two images that would share a target are refused before any work is done."""
    targets = {image: folder / f"{image.name}.npz" for image in images}
    taken = [path.name for path, count in Counter(targets.values()).items() if count > 1]
    if taken:
        raise DataError(f"images of the same name would overwrite each other: {', '.join(taken)}; extract them apart")
    return targets
