"""Pairs whose pictures are in the memory of a device and are rendered there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from scfeat_core.data.gpu_images import ImageStore
from scfeat_core.data.gpu_pairs import render_posed, render_warps
from scfeat_core.data.photos import pyramid
from scfeat_core.data.posed import PosedBatch, PosedDraws, PosedPairs
from scfeat_core.data.warps import WarpConfig, WarpDraws, WarpPairs, draw_warps
from scfeat_core.training.loading import RenderingSource

_NOTHING = np.zeros((4, 4, 3), np.uint8)  # in the place of an image that cannot be read; no pair shows it


class DeviceWarps(RenderingSource):
    """Warped pairs of the photographs in a store; problems: how often what went wrong while they were read."""

    def __init__(self, store: ImageStore, config: WarpConfig, problems: Mapping[str, int] | None = None) -> None:
        self._store = store
        self._config = config
        self._problems = dict(problems or {})

    @property
    def problems(self) -> Mapping[str, int]:
        return self._problems

    def sample(self, rng: np.random.Generator) -> WarpDraws:
        return draw_warps(self._store.sizes, self._store.levels, 1, self._config, rng)

    def render(self, draws: WarpDraws) -> WarpPairs:
        return render_warps(self._store, draws, self._config)


class DevicePosed(RenderingSource):
    """Views of posed images; decodes all of them."""

    def __init__(self, pairs: PosedPairs, device: torch.device) -> None:
        self._pairs = pairs
        pictures = pairs.pictures()
        self._store = ImageStore((pyramid(_NOTHING if p is None else p) for p in pictures), device)
        self._sizes = self._store.sizes * np.array([[p is not None] for p in pictures])

    @property
    def problems(self) -> Mapping[str, int]:
        return self._pairs.problems

    def sample(self, rng: np.random.Generator) -> PosedDraws:
        return self._pairs.sample_views(self._sizes, self._store.levels, rng)

    def render(self, draws: PosedDraws) -> PosedBatch:
        return render_posed(self._store, draws, self._pairs.config)
