"""Whether an engine gives what float32 eager gives: the same keypoints, the same descriptors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.engines.contract import Maps, Shape
from scfeat_core.geometry import sample_map
from scfeat_core.network.layers import Alignment
from scfeat_core.selection import select_keypoints

POINTS = 1024  # of each image, the best ones of the reference
NEAR = 0.1  # pixels
TILE = (640, 480)  # width and height of what is rendered
_MEASURES = ("keypoints", "cosine", "median")
SLACK = 1.5  # of the deviation that torch itself has in a precision below float32, where that is beyond the limits


@dataclass(frozen=True)
class Parity:
    """How close two pairs of maps are.

    keypoints: share of the reference's keypoints that have one of the other within 0.1 pixels (NEAR), the worst of the
    images. cosine: the least of the descriptors at the reference's keypoints; median: half are above. All are 0 where
    something is not finite.
    """

    keypoints: float
    cosine: float
    median: float

    def __str__(self) -> str:
        near = f"{100 * self.keypoints:.1f} % of the keypoints within {NEAR} px"
        return f"{near}, descriptor cosine at least {self.cosine:.5f}"


LIMITS = Parity(keypoints=0.99, cosine=0.999, median=0.999)


FLOORS = Parity(keypoints=0.5, cosine=0.99, median=0.999)


def usable(found: Parity) -> bool:
    """Whether a precision gives features at all: not below FLOORS, as it is where numbers overflow."""
    return all(getattr(found, name) >= getattr(FLOORS, name) for name in _MEASURES)


def suffices(found: Parity, own: Parity = LIMITS) -> bool:
    """Whether an engine may be used. own: of eager in the precision of the engine.

    Where eager itself is beyond the limits, since few bits decide where a maximum is, an engine in the same precision
    may be SLACK times as far off as it, but not below FLOORS.
    """
    return usable(found) and all(
        getattr(found, name) >= min(getattr(LIMITS, name), 1 - SLACK * (1 - getattr(own, name))) for name in _MEASURES
    )


def compare(found: Maps, expected: Maps, alignment: Alignment = "exact") -> Parity:
    """found: of the engine. expected: of the reference; both of the same images."""
    if any(one.shape != other.shape for one, other in zip(found, expected, strict=True)):
        return Parity(0.0, 0.0, 0.0)
    if not all(bool(map_.isfinite().all()) for map_ in found):
        return Parity(0.0, 0.0, 0.0)
    images = zip(*(map_.float().split(1) for map_ in (*found, *expected)), strict=True)
    results = [_compare_one(image[:2], image[2:], alignment) for image in images]
    return Parity(*(min(getattr(each, name) for each in results) for name in _MEASURES))


def _compare_one(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], alignment: Alignment) -> Parity:
    """Maps of one image."""
    points, own = (select_keypoints(maps[0], max_keypoints=POINTS)[0].xy for maps in (expected, found))
    if len(points) == 0 or len(own) == 0:
        return Parity(1.0, 1.0, 1.0) if len(points) == len(own) else Parity(0.0, 0.0, 0.0)
    # Exact differences: by products of matrices they would be off by 0.2 pixels.
    near = torch.cdist(points, own, compute_mode="donot_use_mm_for_euclid_dist").amin(1) <= NEAR
    rows, true = (sample_map(maps[1], points[None], alignment=alignment)[0] for maps in (found, expected))
    cosines = F.cosine_similarity(rows, true, dim=-1)
    return Parity(float(near.float().mean()), float(cosines.min()), float(cosines.median()))


# -- the image that is compared on -------------------------------------------------------------------------------------


def rendered_images(batch: int, height: int, width: int) -> np.ndarray:
    """(B, H, W, 3) uint8 RGB: shelves of books and posters, each image another one; the same at every call.

    Beyond 640x480 they are mirrored at their edges.
    """
    inner = min(height, TILE[1]), min(width, TILE[0])
    pictures = np.stack([_picture(np.random.default_rng((7, index)), *inner) for index in range(batch)])
    return np.pad(pictures, ((0, 0), (0, height - inner[0]), (0, width - inner[1]), (0, 0)), mode="symmetric")


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    from scfeat_core import scene_textures as textures

    colours = [(0.94, 0.74, 0.32), (0.16, 0.22, 0.32), (0.80, 0.28, 0.22), (0.95, 0.92, 0.85), (0.14, 0.13, 0.15)]
    split = height // 2
    upper = textures.books(rng, max(split, 1), width)
    lower = textures.poster(colours)(rng, max(height - split, 1), width)
    return np.rint(255 * np.clip(np.concatenate((upper, lower)), 0, 1)).astype(np.uint8)


def parity_input(shape: Shape, device: torch.device) -> Tensor:
    """The network's input of a shape (B, 3, H, W), from :func:`rendered_images`."""
    from scfeat_core.preprocessing import normalise

    batch, _, height, width = shape
    return normalise(torch.from_numpy(rendered_images(batch, height, width)).to(device))
