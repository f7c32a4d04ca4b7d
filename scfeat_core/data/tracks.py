"""Sparse true correspondences of a scene: 3D points and where its images see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scfeat_core.errors import DataError

_POINTS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Tracks:
    """points: (P, 3) float32, in the frame and scale of the scene.

    xy: (M, 2) float32 pixels of the stored images; pid: (M,) int32, the point that is seen there. Image i has the rows
    offset[i]:offset[i + 1] (int64) of both, sorted by pid and each pid once; :func:`make_tracks` sees to that.
    """

    points: np.ndarray
    xy: np.ndarray
    pid: np.ndarray
    offset: np.ndarray

    def seen_by(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """pid (K,) and xy (K, 2) of one image."""
        rows = slice(self.offset[image], self.offset[image + 1])
        return self.pid[rows], self.xy[rows]

    def common(self, image0: int, image1: int) -> tuple[np.ndarray, np.ndarray]:
        """Corresponding pixels (C, 2) float64 of the points that both images see."""
        (pid0, xy0), (pid1, xy1) = self.seen_by(image0), self.seen_by(image1)
        _, rows0, rows1 = np.intersect1d(pid0, pid1, assume_unique=True, return_indices=True)
        return xy0[rows0].astype(np.float64), xy1[rows1].astype(np.float64)

    def image_of_row(self) -> np.ndarray:
        """(M,) int64: the image of each observation."""
        return np.repeat(np.arange(len(self.offset) - 1), np.diff(self.offset))

    def covisibility(self) -> np.ndarray:
        """(n, n) int32: how many points two images have in common."""
        count, image = len(self.offset) - 1, self.image_of_row()
        shared = np.zeros((count, count), np.float64)
        order = np.argsort(self.pid, kind="stable")
        pid, image = self.pid[order], image[order]
        for start in range(0, len(self.points), _POINTS_AT_ONCE):
            rows = slice(*np.searchsorted(pid, (start, start + _POINTS_AT_ONCE)))
            seen = np.zeros((count, _POINTS_AT_ONCE), np.float32)
            seen[image[rows], pid[rows] - start] = 1
            shared += seen @ seen.T
        return shared.astype(np.int32)


def make_tracks(points: np.ndarray, xy: np.ndarray, pid: np.ndarray, image: np.ndarray, images: int) -> Tracks:
    """Tracks of observations (M) in any order; of several observations of one point in one image the first is kept.

    image: (M,) the image of each observation, 0 to ``images`` - 1.
    """
    order = np.lexsort((pid, image))
    image, pid, xy = image[order], pid[order], xy[order]
    first = np.ones(len(pid), bool)
    first[1:] = (np.diff(image) != 0) | (np.diff(pid) != 0)
    offset = np.searchsorted(image[first], np.arange(images + 1)).astype(np.int64)
    return Tracks(points.astype(np.float32), xy[first].astype(np.float32), pid[first].astype(np.int32), offset)


def select_rows(tracks: Tracks, keep: np.ndarray) -> Tracks:
    """The same points with only the observations where ``keep`` (M,) bool is true."""
    offset = np.concatenate(([0], np.cumsum(keep)))[tracks.offset]
    return Tracks(tracks.points, tracks.xy[keep], tracks.pid[keep], offset)


def select_images(tracks: Tracks, images: np.ndarray) -> Tracks:
    """Tracks of some images, (K,) indices, in their order."""
    lengths = np.diff(tracks.offset)[images]
    offset = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    rows = np.arange(offset[-1]) - np.repeat(offset[:-1], lengths) + np.repeat(tracks.offset[images], lengths)
    return Tracks(tracks.points, tracks.xy[rows], tracks.pid[rows], offset)


def read_tracks(path: Path, images: int) -> Tracks:
    """A ``tracks.npz``: points (P, 3), xy64 (M, 2) pixel times 64, pid (M,), offset (images + 1,). Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            points, xy64, pid, offset = (file[key] for key in ("points", "xy64", "pid", "offset"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"expected points, xy64, pid and offset in {path}, found {error!r}; write it again") from error
    fits = points.ndim == 2 and points.shape[1] == 3 and xy64.shape == (len(pid), 2)
    fits = fits and offset.shape == (images + 1,) and offset[0] == 0 and offset[-1] == len(pid)
    if not fits or (np.diff(offset.astype(np.int64)) < 0).any() or (len(pid) and int(pid.max()) >= len(points)):
        shapes = ", ".join(str(array.shape) for array in (points, xy64, pid, offset))
        raise DataError(
            f"expected consistent tracks of {images} images in {path}, found points, xy64, pid, offset of shapes "
            f"{shapes}; write it again for the present cameras.json"
        )
    image = np.repeat(np.arange(images), np.diff(offset.astype(np.int64)))
    return make_tracks(points, xy64.astype(np.float32) / 64, pid.astype(np.int64), image, images)
