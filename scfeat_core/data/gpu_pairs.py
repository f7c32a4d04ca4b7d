"""Pairs rendered on a device: what is shown is drawn as numbers on the CPU (:mod:`warps`, :mod:`posed`), cheaply and
the same everywhere; pixels are made where they are used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scfeat_core.data.gpu_images import ImageStore, jpeg
from scfeat_core.data.posed import PosedBatch, PosedConfig, PosedDraws
from scfeat_core.data.warps import PhotometricConfig, WarpConfig, WarpDraws, WarpPairs, distort_photometry
from scfeat_core.geometry import scale_matrix


def render_warps(store: ImageStore, draws: WarpDraws, config: WarpConfig) -> WarpPairs:
    """As :func:`warps.render_pairs`, on the device of the store; draws: on the CPU.

    JPEG is computed instead of coded, and noise is that of the device; else they show the same to a step in 256, but
    for the edges of what stands before the photographs.
    """
    size = (config.view_size, config.view_size)
    picture = draws.photo.repeat_interleave(2)
    views = store.render(picture, draws.level.flatten(), draws.matrix.flatten(0, 1), size)
    views, visible = _occluded(store, views, draws.occluder.flatten(0, 1))
    views = _changed(views, config.photometric, draws.seed)
    coded = draws.quality.flatten().nonzero().flatten()
    if len(coded):
        rows, quality = (t.to(store.device, non_blocking=True) for t in (coded, draws.quality.flatten()[coded]))
        views = views.index_copy(0, rows, jpeg(views[rows], quality))
    homography = draws.homography.to(store.device, non_blocking=True)
    return WarpPairs(views[0::2], views[1::2], homography, visible[0::2], visible[1::2])


def render_posed(store: ImageStore, draws: PosedDraws, config: PosedConfig) -> PosedBatch:
    """The views of pairs of posed images; draws: on the CPU."""
    width, height = config.size
    views = store.render(draws.picture.flatten(), draws.level.flatten(), draws.matrix.flatten(0, 1), (height, width))
    if config.augmentation == "photometric":
        views = _changed(views, config.photometric, draws.seed)
    moved = (t.to(store.device, non_blocking=True) for t in draws[3:-1])
    return PosedBatch(views[0::2], views[1::2], *moved)


def _changed(views: Tensor, config: PhotometricConfig, seed: Tensor) -> Tensor:
    """seed: (draws,); the first stands for all of a batch."""
    return distort_photometry(views, config, torch.Generator().manual_seed(int(seed[0])))


def _occluded(store: ImageStore, views: Tensor, occluders: Tensor) -> tuple[Tensor, Tensor]:
    """The views with what :func:`warps.draw_occluder` drew (V, 8) before them, and (V, h, w) bool what is left."""
    visible = torch.ones_like(views[:, 0], dtype=torch.bool)
    rows = (occluders[:, 0] >= 0).nonzero().flatten()
    if len(rows) == 0:
        return views, visible
    some, size = occluders[rows], (views.shape[-2], views.shape[-1])
    picture = some[:, 0].long()
    patches = np.stack([_patch_matrix(store.sizes[int(o[0])], o[1:3].numpy(), size[0]) for o in some])
    patch = store.render(picture, torch.zeros_like(picture), torch.from_numpy(patches), size)
    rows = rows.to(store.device, non_blocking=True)
    before = _ellipses(some.to(store.device, torch.float32, non_blocking=True), size)
    views = views.index_copy(0, rows, torch.where(before[:, None], patch, views[rows]))
    return views, visible.index_copy(0, rows, ~before)


def _patch_matrix(picture: np.ndarray, corner: np.ndarray, size: int) -> np.ndarray:
    """Pixels of a view to those of a picture (height, width), for the part that begins at the corner (left, top)."""
    cut = np.minimum(size, picture[::-1] - corner)
    return np.array([[1, 0, corner[0]], [0, 1, corner[1]], [0, 0, 1.0]]) @ scale_matrix(cut / size)


def _ellipses(occluders: Tensor, size: tuple[int, int]) -> Tensor:
    """(V, h, w) bool."""
    a, b, cx, cy, angle = occluders[:, 3:, None, None].unbind(1)
    x = torch.arange(size[1], device=occluders.device) - cx
    y = torch.arange(size[0], device=occluders.device)[:, None] - cy
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    return ((x * cos + y * sin) / a) ** 2 + ((y * cos - x * sin) / b) ** 2 <= 1
