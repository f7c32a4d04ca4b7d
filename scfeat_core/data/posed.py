"""Pairs of posed images: the supervision is the fundamental matrix, and sparse tracks where there are any.

A scene is structure of arrays, so that a hundred thousand images with their pairs stay small and go to the workers of a
DataLoader. Readers of layouts: :mod:`posed_images`, :mod:`megadepth`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfeat_core.config import Range
from scfeat_core.data.colour import JitterConfig
from scfeat_core.data.tracks import Tracks
from scfeat_core.data.warps import PhotometricConfig

log = logging.getLogger(__name__)

NotNegative = Annotated[float, Range(minimum=0.0)]
Edge = Annotated[int, Range(minimum=32)]
Zoom = Annotated[float, Range(minimum=1.0, maximum=8.0)]
Degrees = Annotated[float, Range(minimum=0.0, maximum=180.0)]


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


@dataclass(frozen=True)
class PosedConfig:
    """What pairs are taken from a folder of scenes, and how they are shown to the network.

    data_path: one scene, or a folder of scenes. split: YAML file whose ``scenes`` are held back for validation; without
    it (or where it names none of them), every 10th scene is, and of fewer than 5 scenes every 20th pair.
    excluded_scenes: names that are left out altogether.

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


class PosedPairs:
    """An ordered list of pairs of images of scenes, from which views are drawn; can be pickled, for workers."""

    def __init__(self, scenes: Sequence[PosedScene], config: PosedConfig) -> None:
        self.scenes = tuple(scenes)
        self.config = config
        self._ends = np.cumsum([len(scene.pairs) for scene in self.scenes])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def problems(self) -> Counter[str]:
        """How often what went wrong, over all workers."""
        raise NotImplementedError

    def sample(self, rng: np.random.Generator) -> PosedBatch:
        """A random pair (B = 1), decoded, cut to ``config.size`` and augmented; a function of the generator's state.

        A pair that cannot be read is counted, its file named in the log once, and another pair drawn. Raises DataError
        where nothing is left to draw.
        """
        raise NotImplementedError


def collate(samples: Sequence[PosedBatch]) -> PosedBatch:
    """One batch of many."""
    return PosedBatch(*(torch.cat(parts) for parts in zip(*samples, strict=True)))
