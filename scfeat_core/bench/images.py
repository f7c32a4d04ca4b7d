"""The images that are measured: a few frames of the rendered room, or the user's own, all of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from scfeat_core.errors import DataError

FRAMES = 4
STEP = 4  # frames of the rendered camera's 30 a second between two that are used
_JPEG_QUALITY = 90


def load_images(size: tuple[int, int], source: Path | None = None) -> list[np.ndarray]:
    """``FRAMES`` images (H, W, 3) uint8 RGB of (width, height); the same ones each time.

    source: a file or a folder, whose first images are scaled and cut to the size; None: the room of ``scfeat demo``.
    Raises DataError where there is none, ImageError for one that cannot be read.
    """
    return _rendered(size) if source is None else [fitted(image, size) for image in _read(source)]


def _read(source: Path) -> list[np.ndarray]:
    from scfeat_core.bulk.images import find_images, read_image

    if not source.exists():
        raise DataError(f"expected images at {source}, found nothing there; check the path")
    return [read_image(Path(file.path)) for file in find_images([source])[:FRAMES]]


@lru_cache(maxsize=2)
def _rendered(size: tuple[int, int]) -> list[np.ndarray]:
    from scfeat_core.demo_scene import camera_path, intrinsics

    scene, k = _scene(), intrinsics(size)
    return [scene.render(pose, k, size).image for pose in camera_path(FRAMES * STEP)[::STEP]]


@lru_cache(maxsize=1)
def _scene():
    from scfeat_core.demo_scene import Scene

    return Scene()


def fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scaled until it covers (width, height), its middle cut out."""
    width, height = size
    scale = max(width / image.shape[1], height / image.shape[0])
    new = max(width, round(scale * image.shape[1])), max(height, round(scale * image.shape[0]))
    scaled = cv2.resize(image, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    x, y = (new[0] - width) // 2, (new[1] - height) // 2
    return np.ascontiguousarray(scaled[y : y + height, x : x + width])


def encode(image: np.ndarray) -> bytes:
    """As a JPEG, which is what most recorded cameras give."""
    done, code = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert done, "an 8-bit image is always encoded"
    return bytes(code)


def decode(code: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    image = cv2.imdecode(np.frombuffer(code, np.uint8), cv2.IMREAD_COLOR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def walk(count: int) -> Iterator[int]:
    """Indices forth and back, for ever, so that two that follow each other are always neighbours: 0 1 2 1 0 1 …"""
    way: Sequence[int] = [*range(count), *range(count - 2, 0, -1)]
    while True:
        yield from way
