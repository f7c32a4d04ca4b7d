"""Windows of one size in images of any size: which part of an image a view shows, and the pixels that go with it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from scfeat_core.geometry import scale_matrix, warp_points

_CANDIDATES = 8  # windows that are compared by what both views see
_MIDDLE = (0.25, 0.75)  # where in the window the common point lies that it is laid around, as shares of its size


@dataclass(frozen=True, eq=False)
class Window:
    """A crop of the resized image. image_size: (width, height) of the image, as its calibration has it.

    resized: (width, height) it is scaled to; offset: (x, y), top-left pixel of the crop; size: (width, height) of it.
    """

    image_size: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3) float64, pixels of the image to pixels of the window; K of the window is ``matrix @ K``."""
        scale = scale_matrix(np.divide(self.resized, self.image_size))
        return np.array([[1, 0, -self.offset[0]], [0, 1, -self.offset[1]], [0, 0, 1.0]]) @ scale

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The window of a picture (h, w, 3) of the same content, which may have been stored in another resolution."""
        if image.shape[1::-1] != self.resized:
            smaller = self.resized[0] < image.shape[1]
            image = cv2.resize(image, self.resized, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
        (x, y), (width, height) = self.offset, self.size
        return image[y : y + height, x : x + width]

    def contains(self, points: np.ndarray) -> np.ndarray:
        """(...,) bool for points (..., 2) in pixels of the window: within its border pixels."""
        return np.all((points >= 0) & (points <= np.subtract(self.size, 1)), axis=-1)


def covering_size(image_size: tuple[int, int], size: tuple[int, int], zoom: float = 1.0) -> tuple[int, int]:
    """The smallest size of the same shape that covers ``size``, times ``zoom``; all (width, height)."""
    scale = zoom * max(size[0] / image_size[0], size[1] / image_size[1])
    return max(size[0], round(scale * image_size[0])), max(size[1], round(scale * image_size[1]))


def choose_windows(
    image_sizes: tuple[tuple[int, int], tuple[int, int]],
    points: tuple[np.ndarray, np.ndarray],
    size: tuple[int, int],
    zoom: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Window, Window]:
    """A window of ``size`` in each of two images, where both see much of the same.

    points: corresponding pixels (C, 2) of the two images. A few pairs of windows are laid around random ones of them,
    and the pair with most common points is taken; without points the windows are anywhere. zoom: largest factor, drawn
    from this range, on the scale at which the image just covers the window.
    """
    zooms = np.exp(rng.uniform(np.log(zoom[0]), np.log(zoom[1]), size=2))
    resized = [covering_size(old, size, factor) for old, factor in zip(image_sizes, zooms, strict=True)]
    slack = np.subtract(resized, size)  # (2 views, 2)
    if len(points[0]):
        scales = [scale_matrix(np.divide(new, old)) for new, old in zip(resized, image_sizes, strict=True)]
        moved = np.stack([warp_points(p, m) for p, m in zip(points, scales, strict=True)])  # (2, C, 2)
        offsets = _around_common_points(moved, slack, size, rng)
    else:
        offsets = rng.integers(0, slack + 1)
    windows = (Window(image_sizes[i], resized[i], (int(offsets[i, 0]), int(offsets[i, 1])), size) for i in range(2))
    return next(windows), next(windows)


def _around_common_points(
    points: np.ndarray, slack: np.ndarray, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Offsets (2, 2) int of the windows. points: (2, C, 2)."""
    anchors = points[:, rng.integers(points.shape[1], size=_CANDIDATES)]
    place = rng.uniform(*_MIDDLE, anchors.shape) * size
    offsets = np.clip(np.round(anchors - place), 0, slack[:, None]).astype(int)  # (2, candidates, 2)
    shifted = points[:, None] - offsets[:, :, None]
    inside = ((shifted >= 0) & (shifted <= np.subtract(size, 1))).all(-1)
    common = inside.all(0).sum(-1)
    return offsets[:, common.argmax()]
