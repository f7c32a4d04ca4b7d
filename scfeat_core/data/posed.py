"""Pairs of posed images: the supervision is the fundamental matrix, and sparse tracks where there are any.

A scene is structure of arrays, so that a hundred thousand images with their pairs stay small and go to the workers of a
DataLoader. Readers of layouts: :mod:`posed_images`, :mod:`megadepth`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from scfeat_core.config import Range
from scfeat_core.data.colour import LEGACY_JITTER, JitterConfig, jitter
from scfeat_core.data.photos import read_rgb
from scfeat_core.data.tracks import Tracks
from scfeat_core.data.warps import PhotometricConfig, distort_photometry, view_level
from scfeat_core.data.windows import Window, choose_windows
from scfeat_core.errors import DataError
from scfeat_core.geometry import fundamental_from_pose, scale_matrix, warp_points

log = logging.getLogger(__name__)

_MAX_DRAWS = 1000
_MAX_WORKERS = 64
_PROBLEMS = ("damaged image", "damaged image, again", "degenerate geometry", "vanished folder")

NotNegative = Annotated[float, Range(minimum=0.0)]
Edge = Annotated[int, Range(minimum=32)]
Zoom = Annotated[float, Range(minimum=1.0, maximum=8.0)]
Degrees = Annotated[float, Range(minimum=0.0, maximum=180.0)]
T = TypeVar("T")


class PosedBatch(NamedTuple):
    """Pairs of views of one size.

    image0, image1: (B, 3, H, W) float32 RGB in [0, 1].
    fundamental: (B, 3, 3) float32, unit Frobenius norm, x1' F x0 = 0 in pixels of these images.
    points0, points1: (B, M, 2) float32 pixels, sparse true correspondences; zeros where not valid, M = 0 where a data
    set has none. valid: (B, M) bool.
    """

    image0: Tensor
    image1: Tensor
    fundamental: Tensor
    points0: Tensor
    points1: Tensor
    valid: Tensor


class PosedDraws(NamedTuple):
    """What the two views of B pairs will be, as numbers alone: drawn here, rendered anywhere (see :mod:`gpu_pairs`).

    picture: (B, 2) int64, counted over the images of all scenes. level: (B, 2) int64 of their pyramids. matrix: (B, 2,
    3, 3) float64, pixels of a view to pixels of the image as stored. The next four as in :class:`PosedBatch`. seed:
    (B,) int64 for what is changed in the colours.
    """

    picture: Tensor
    level: Tensor
    matrix: Tensor
    fundamental: Tensor
    points0: Tensor
    points1: Tensor
    valid: Tensor
    seed: Tensor


@dataclass(frozen=True)
class PosedConfig:
    """What pairs are taken from a folder of scenes, and how they are shown to the network.

    data_path: one scene, or a folder of scenes. split: YAML file whose ``scenes`` are held back for validation; without
    it (or where it names none of them), every 10th scene is, and of fewer than 5 scenes every 20th pair. Several
    reconstructions of one place (MegaDepth's dense0, dense1) are held back together.
    excluded_scenes: names that are left out altogether; of MegaDepth, where the Image Matching Challenge is the test,
    "0008", "0021", "0024", "0063" and "1589", which it shows as well.

    size: (width, height) of the views. Images are scaled (area filter) until they just cover it, and cropped where
    common tracks are seen. zoom: further factor on that scale, drawn for each view (log-uniform); 1 shows as much as
    possible.

    pair_source: ``pairs_txt`` reads the list of the scene, ``covisibility`` takes pairs with ``min_shared`` common
    points, ``view_angle`` those whose optical axes differ by ``min_view_angle`` to ``max_view_angle`` degrees;
    ``auto`` takes the first of these that a scene has the data for. rot_thr: degrees, largest relative rotation.
    min_baseline: smallest distance of two cameras, as a share of the spread of the scene's cameras: without a baseline
    there is no fundamental matrix. pairs_per_scene: more are thinned out at random (fixed seed).
    scene_weight: a scene is drawn in proportion to its number of pairs (as published), to its square root, or all
    equally often.

    max_points: so many true correspondences are given with a pair, 0 for none. max_reprojection: pixels; observations
    farther from the projection of their point are dropped, 0 keeps all.

    augmentation: ``jitter`` of colours, ``legacy`` the published ranges (which contain black images), ``photometric``
    that of the warps, or ``none``; each view for itself. cache_mb: decoded images kept in memory, in each worker.
    patience: seconds to wait for a data folder that vanishes while training.
    """

    data_path: Path = Path("data/train")
    split: Path | None = None
    excluded_scenes: tuple[str, ...] = ()
    size: tuple[Edge, Edge] = (640, 480)
    zoom: tuple[Zoom, Zoom] = (1.0, 1.0)
    pair_source: Literal["auto", "pairs_txt", "covisibility", "view_angle"] = "auto"
    rot_thr: Annotated[float, Range(above=0.0, maximum=360.0)] = 80.0
    min_shared: Annotated[int, Range(minimum=8)] = 25
    min_view_angle: Degrees = 5.0
    max_view_angle: Degrees = 60.0
    min_baseline: NotNegative = 1e-3
    pairs_per_scene: Annotated[int, Range(minimum=1)] = 5000
    scene_weight: Literal["pairs", "sqrt", "equal"] = "pairs"
    max_points: Annotated[int, Range(minimum=0)] = 512
    max_reprojection: NotNegative = 2.0
    augmentation: Literal["jitter", "legacy", "photometric", "none"] = "jitter"
    jitter: JitterConfig = field(default_factory=JitterConfig)
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    cache_mb: Annotated[int, Range(minimum=0)] = 0
    patience: NotNegative = 60.0


@dataclass(frozen=True, eq=False)
class PosedImage:
    """One image of a scene. size: (width, height) that K (3, 3) belongs to. x_cam = R X + t, all float64."""

    path: Path
    size: tuple[int, int]
    K: np.ndarray
    R: np.ndarray
    t: np.ndarray


@dataclass(frozen=True, eq=False)
class PosedScene:
    """Images and pairs of one scene.

    files: names below ``folder``. sizes: (n, 2) int32 (width, height). K, R: (n, 3, 3) and t: (n, 3) float64, with
    x_cam = R X + t. pairs: (P, 2) int32 indices of images.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    sizes: np.ndarray
    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    pairs: np.ndarray
    tracks: Tracks | None = None

    def image(self, index: int) -> PosedImage:
        width, height = (int(edge) for edge in self.sizes[index])
        path = self.folder / self.files[index]
        return PosedImage(path, (width, height), self.K[index], self.R[index], self.t[index])

    def common_points(self, image0: int, image1: int) -> tuple[np.ndarray, np.ndarray]:
        """Corresponding pixels (C, 2) float64 of two images; none where the scene has no tracks."""
        if self.tracks is None:
            return np.zeros((0, 2)), np.zeros((0, 2))
        return self.tracks.common(image0, image1)


class UnusablePairError(DataError):
    """A pair that another one has to be drawn for. kind: one of what :attr:`PosedPairs.problems` counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, str(self))


class PosedPairs:
    """An ordered list of pairs of images of scenes, from which views are drawn; can be pickled, for workers.

    What goes wrong is counted in shared memory, so that the process that trains sees what its workers saw, and none of
    them reads a damaged file twice.
    """

    def __init__(
        self, scenes: Sequence[PosedScene], config: PosedConfig, problems: Mapping[str, int] | None = None
    ) -> None:
        """problems: what was found while reading the scenes, added to :attr:`problems`. Raises DataError if empty."""
        self.scenes = tuple(scene for scene in scenes if len(scene.pairs))
        self.config = config
        lengths = np.array([len(scene.pairs) for scene in self.scenes], np.int64)
        self._ends = np.cumsum(lengths)
        if not self.scenes:
            raise DataError(f"expected pairs of posed images in {config.data_path}, found none; check the path")
        self._shares = np.cumsum(scene_shares(lengths, config.scene_weight))
        self._first_image = np.cumsum([0, *(len(scene.files) for scene in self.scenes)])
        self._max_points = config.max_points if any(scene.tracks for scene in self.scenes) else 0
        self._found = dict(problems or {})
        self._counts = torch.zeros(_MAX_WORKERS + 1, len(_PROBLEMS), dtype=torch.int64).share_memory_()
        self._damaged = torch.zeros(int(self._first_image[-1]), dtype=torch.uint8).share_memory_()
        self._cache: dict[Path, np.ndarray] = {}
        self._cache_bytes = 0

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}, "_cache_bytes": 0}

    @property
    def problems(self) -> Counter[str]:
        """How often what went wrong, over all workers."""
        counts = Counter(self._found)
        counts.update(dict(zip(_PROBLEMS, self._counts.sum(0).tolist(), strict=True)))
        return +counts

    def pair(self, index: int) -> tuple[int, int, int]:
        """Scene, first and second image of a pair, 0 <= index < len."""
        scene = int(np.searchsorted(self._ends, index, side="right"))
        rows = self.scenes[scene].pairs
        first, second = rows[index - (int(self._ends[scene]) - len(rows))]
        return scene, int(first), int(second)

    def draw(self, rng: np.random.Generator) -> int:
        """Index of a random pair, scenes weighted as ``config.scene_weight`` says."""
        scene = min(int(np.searchsorted(self._shares, rng.random(), side="right")), len(self.scenes) - 1)
        count = len(self.scenes[scene].pairs)
        return int(self._ends[scene]) - count + int(rng.integers(count))

    def sample(self, rng: np.random.Generator) -> PosedBatch:
        """A random pair (B = 1), decoded, cut to ``config.size`` and augmented; a function of the generator's state.

        A pair that cannot be read is counted, its file named in the log once, and another pair drawn. Raises DataError
        where nothing is left to draw.
        """
        return self._first_usable(self.load, rng)

    def sample_views(self, sizes: np.ndarray, levels: int, rng: np.random.Generator) -> PosedDraws:
        """As :meth:`sample`, without the pixels. sizes: (N, 2) (height, width) of all images as stored, 0 where one is
        damaged; levels: of their pyramids.
        """
        return self._first_usable(lambda index, rng: self.views(index, sizes, levels, rng), rng)

    def _first_usable(self, load: Callable[[int, np.random.Generator], T], rng: np.random.Generator) -> T:
        for _ in range(_MAX_DRAWS):
            index = self.draw(rng)
            try:
                return load(index, rng)
            except UnusablePairError as problem:
                self._count(problem.kind)
        raise DataError(
            f"none of {_MAX_DRAWS} random pairs of {self.config.data_path} could be used ({dict(self.problems)}); "
            "the log names the files: replace them, and go on with --resume"
        )

    def load(self, index: int, rng: np.random.Generator) -> PosedBatch:
        """One pair (B = 1) of the list. Raises UnusablePairError, having named the file in the log if it is new."""
        number, *indices = self.pair(index)
        images = [self._read(number, i) for i in indices]
        windows, fundamental, points = self._geometry(index, rng)
        seen = [augment(window.cut(image), self.config, rng) for window, image in zip(windows, images, strict=True)]
        points0, points1, valid = visible_points(points, windows, self._max_points, rng)
        return PosedBatch(seen[0][None], seen[1][None], fundamental[None], points0[None], points1[None], valid[None])

    def views(self, index: int, sizes: np.ndarray, levels: int, rng: np.random.Generator) -> PosedDraws:
        """One pair (B = 1) of the list, without its pixels; see :meth:`sample_views`. Raises UnusablePairError."""
        number, *indices = self.pair(index)
        pictures = [int(self._first_image[number]) + i for i in indices]
        if not sizes[pictures].all():
            raise UnusablePairError("damaged image, again", " ".join(self.scenes[number].files[i] for i in indices))
        windows, fundamental, points = self._geometry(index, rng)
        points0, points1, valid = visible_points(points, windows, self._max_points, rng)
        matrices = np.stack([_stored_from_view(w, sizes[i]) for w, i in zip(windows, pictures, strict=True)])
        level = [view_level(matrix, max(self.config.size), levels) for matrix in matrices]
        numbers = (torch.tensor(pictures), torch.tensor(level), torch.from_numpy(matrices), fundamental)
        seed = torch.tensor(int(rng.integers(2**62)))
        return PosedDraws(*(tensor[None] for tensor in (*numbers, points0, points1, valid, seed)))

    def _geometry(
        self, index: int, rng: np.random.Generator
    ) -> tuple[tuple[Window, Window], Tensor, tuple[np.ndarray, np.ndarray]]:
        """Windows in both images, the fundamental matrix (3, 3) float32 between them, and common points of the images.

        Raises UnusablePairError.
        """
        number, *indices = self.pair(index)
        scene = self.scenes[number]
        sizes = [scene.image(i).size for i in indices]
        points = scene.common_points(*indices)
        windows = choose_windows((sizes[0], sizes[1]), points, self.config.size, self.config.zoom, rng)
        fundamental = pair_fundamental(scene.image(indices[0]), scene.image(indices[1]), windows)
        if not np.isfinite(fundamental).all():
            raise UnusablePairError("degenerate geometry", f"{scene.name}: no fundamental matrix for pair {indices}")
        return windows, torch.from_numpy(fundamental).float(), points

    def pictures(self) -> list[np.ndarray | None]:
        """All images of all scenes in order, (H, W, 3) uint8 RGB as stored, None for those that cannot be read.

        Those are named in the log and counted.
        """
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self._read_or_none, *self._numbers()))

    def _numbers(self) -> tuple[list[int], list[int]]:
        """Scene, and image in the scene, of all images in order."""
        rows = [(scene, image) for scene, each in enumerate(self.scenes) for image in range(len(each.files))]
        return [row[0] for row in rows], [row[1] for row in rows]

    def _read_or_none(self, scene: int, image: int) -> np.ndarray | None:
        try:
            return self._read(scene, image)
        except UnusablePairError as problem:
            self._count(problem.kind)
            return None

    def _read(self, scene: int, image: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        number = int(self._first_image[scene]) + image
        if self._damaged[number]:
            raise UnusablePairError("damaged image, again", self.scenes[scene].files[image])
        posed = self.scenes[scene].image(image)
        if (cached := self._cache.get(posed.path)) is not None:
            return cached
        try:
            pixels = read_posed(posed)
        except DataError as error:
            if not self._is_there():
                self._wait()
                return self._read(scene, image)
            self._damaged[number] = 1
            log.warning("%s (left out from now on)", error)
            raise UnusablePairError("damaged image", str(error)) from error
        if self._cache_bytes + pixels.nbytes <= self.config.cache_mb * 2**20:
            self._cache[posed.path] = pixels
            self._cache_bytes += pixels.nbytes
        return pixels

    def _wait(self) -> None:
        """Until the data folder is back, as after a lost mount. Raises DataError where it stays away."""
        root, end = self.config.data_path, time.monotonic() + self.config.patience
        log.warning("%s has vanished; waiting up to %g s for it", root, self.config.patience)
        self._count("vanished folder")
        while not self._is_there():
            if time.monotonic() >= end:
                raise DataError(
                    f"expected the {len(self.scenes)} scenes of {root}, found none of their folders any more, and "
                    f"waited {self.config.patience:g} s; bring the folder back, and go on with --resume"
                )
            time.sleep(min(1.0, self.config.patience))

    def _is_there(self) -> bool:
        return any(scene.folder.is_dir() for scene in self.scenes)

    def _count(self, problem: str) -> None:
        worker = get_worker_info()
        row = 0 if worker is None else worker.id % _MAX_WORKERS + 1
        self._counts[row, _PROBLEMS.index(problem)] += 1


def _stored_from_view(window: Window, stored: np.ndarray) -> np.ndarray:
    """(3, 3) float64, pixels of the window to those of the image as stored, (height, width)."""
    return scale_matrix(np.divide(stored[::-1], window.image_size)) @ np.linalg.inv(window.matrix)


def scene_shares(pairs: np.ndarray, weight: str) -> np.ndarray:
    """How often each scene is drawn, of 1. pairs: (S,) their numbers of pairs."""
    exponent = {"pairs": 1.0, "sqrt": 0.5, "equal": 0.0}[weight]
    shares = pairs.astype(np.float64) ** exponent
    return shares / shares.sum()


def read_posed(image: PosedImage) -> np.ndarray:
    """(H, W, 3) uint8 RGB as stored. Raises DataError where it cannot be read, or is not what was calibrated.

    Another resolution of the same picture is fine: the calibration is scaled with it.
    """
    pixels = read_rgb(image.path, upright=False)
    check_shape(image.path, (pixels.shape[1], pixels.shape[0]), image.size)
    return pixels


def check_shape(path: Path, stored: tuple[int, int], calibrated: tuple[int, int]) -> None:
    """Raises DataError where an image of one (width, height) cannot be the other at another resolution."""
    (width, height), (w, h) = stored, calibrated
    if abs(width * h - height * w) > max(w, h, width, height):  # more than a pixel
        raise DataError(
            f"expected an image of the shape {w}x{h} of its calibration at {path}, found {width}x{height}; "
            "calibrate the image as it is stored, or store the one that was calibrated"
        )


def relative_pose(image0: PosedImage, image1: PosedImage) -> tuple[np.ndarray, np.ndarray]:
    """R (3, 3) and t (3,) of X1 = R X0 + t, between the frames of two cameras."""
    rotation = image1.R @ image0.R.T
    return rotation, image1.t - rotation @ image0.t


def pair_fundamental(image0: PosedImage, image1: PosedImage, windows: tuple[Window, Window]) -> np.ndarray:
    """F (3, 3) float64 in pixels of the windows, unit Frobenius norm; not finite where the pair has no baseline."""
    k0, k1 = windows[0].matrix @ image0.K, windows[1].matrix @ image1.K
    with np.errstate(invalid="ignore", divide="ignore"):
        return fundamental_from_pose(k0, k1, *relative_pose(image0, image1))


def visible_points(
    points: tuple[np.ndarray, np.ndarray], windows: tuple[Window, Window], count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """points0, points1 (count, 2) float32 in pixels of the windows, and valid (count,) bool, from (C, 2) of the images.

    Of more points that both windows show, a random choice.
    """
    moved = np.stack([warp_points(p, window.matrix) for p, window in zip(points, windows, strict=True)])
    seen = np.flatnonzero(windows[0].contains(moved[0]) & windows[1].contains(moved[1]))
    if len(seen) > count:
        seen = rng.choice(seen, count, replace=False)
    padded = np.zeros((2, count, 2), np.float32)
    padded[:, : len(seen)] = moved[:, seen]
    points0, points1 = torch.from_numpy(padded)
    return points0, points1, torch.arange(count) < len(seen)


def augment(image: np.ndarray, config: PosedConfig, rng: np.random.Generator) -> Tensor:
    """(3, H, W) float32 in [0, 1] of (H, W, 3) uint8, with the colours changed as ``config.augmentation`` says."""
    if config.augmentation in ("jitter", "legacy"):
        image = jitter(image, LEGACY_JITTER if config.augmentation == "legacy" else config.jitter, rng)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
    if config.augmentation == "photometric":
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        tensor = distort_photometry(tensor[None], config.photometric, generator)[0]
    return tensor
