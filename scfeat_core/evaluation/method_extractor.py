"""SIFT, ORB and others in the place of the network, so that the front end compares features and nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch

from scfeat_core.config import dump_config, load_config
from scfeat_core.errors import DataError
from scfeat_core.evaluation.methods import Method, check_features, create_method
from scfeat_core.extraction import ExtractionOptions
from scfeat_core.preprocessing import eight_bits, equalise, stack_images, stack_masks
from scfeat_core.types import Array, Features

# The least cosine similarity that brings a lost track back, where nothing else is asked for: at which as many that come
# back are wrong (7 % on EuRoC V1_01) as with the network at 0.8. Not measured for akaze, which has bits as ORB.
REIDENTIFY_COSINE: dict[str, float] = {"sift": 0.65, "rootsift": 0.8, "orb": 0.7, "akaze": 0.7}
_MASKED = 4  # times as many keypoints are asked for under a mask, as it takes some away afterwards
_BITS = 7  # of a unit entry: the products of all bits then add up without rounding


class MethodExtractor:
    """A method of evaluation/methods.py as the front end takes it instead of an ``Extractor``.

    name: as of ``create_method``. max_keypoints, border, clahe and masks count as they do for the network; the score
    threshold, non-maximum suppression and grid are those of each method. Binary descriptors become rows of +c and -c
    (see :func:`signs`). ``timings`` has all of the method under "network". Raises ConfigError.
    """

    precision = "float32"
    engine = ""
    engine_note = ""
    engine_making = ""

    def __init__(self, name: str, max_keypoints: int = 1024, **options: Any) -> None:
        self.options = load_config(ExtractionOptions, {"max_keypoints": max_keypoints, **options}, name)
        self.device = torch.device("cpu")
        self.timings: dict[str, float] = {}
        self.descriptor_space = name
        self._method: Method = create_method(name)

    def update(self, **options: Any) -> None:
        """Change options between two images. Raises ConfigError."""
        self.options = load_config(ExtractionOptions, {**dump_config(self.options), **options}, self.descriptor_space)

    def extract_batch(
        self,
        images: Sequence[Array],
        masks: Sequence[Array | None] | None = None,
        max_keypoints: Sequence[int] | None = None,
        *,
        score_maps: bool | Sequence[bool] = False,
        to_numpy: bool = True,
    ) -> list[Features]:
        """As that of ``Extractor``; there are no score maps. Raises ImageError, and DataError for what a method
        returns."""
        started = time.perf_counter()
        stacked = stack_images(images)
        height, width = stacked.shape[1:3]
        stacked_masks = stack_masks(masks, (width, height), len(stacked))
        keep = [None] * len(stacked) if stacked_masks is None else [mask.numpy() for mask in stacked_masks]
        keep = keep * len(stacked) if len(keep) == 1 else keep
        stacked = equalise(stacked, self.options.clahe) if self.options.clahe > 0 else stacked
        pictures = [_rgb(eight_bits(image)) for image in stacked]
        prepared = time.perf_counter()
        budgets = max_keypoints or [self.options.max_keypoints] * len(stacked)
        found = [self._extract(*item) for item in zip(pictures, keep, budgets, strict=True)]
        finished = time.perf_counter()
        self.timings = {"preprocess": 1e3 * (prepared - started), "network": 1e3 * (finished - prepared)}
        return found if to_numpy else [_tensors(features) for features in found]

    def _extract(self, image: np.ndarray, keep: np.ndarray | None, budget: int) -> Features:
        asked = budget if keep is None else _MASKED * budget
        features = check_features(self._method(image, asked), asked)
        inside = _inside(features, keep, self.options.border)
        chosen = np.flatnonzero(inside)[:budget]
        descriptors = features.descriptors[chosen]
        if descriptors.dtype == np.uint8:
            descriptors = signs(descriptors)
        if not np.isfinite(features.keypoints).all() or not np.isfinite(descriptors).all():
            raise DataError(f"expected finite keypoints and descriptors of '{self.descriptor_space}', found NaN")
        keypoints = np.ascontiguousarray(features.keypoints[chosen], np.float32)
        return replace(
            features,
            keypoints=keypoints,
            scores=features.scores[chosen].astype(np.float32, copy=False),
            descriptors=np.ascontiguousarray(descriptors, np.float32),
            descriptor_space=self.descriptor_space,
            score_map=None,
        )


def signs(descriptors: np.ndarray) -> np.ndarray:
    """Binary descriptors (N, B) uint8 as (N, 8 B) float32 of +c and -c, rows of length 1 within 1 %.

    The dot product of two is 8 B c^2 (1 - 2 h / (8 B)) with their Hamming distance h. c has so few digits that it comes
    out exactly, in whatever order it is summed: those that are equally far are equal, and ties are resolved as by the
    Hamming distance.
    """
    count = 8 * descriptors.shape[1]
    mantissa, exponent = np.frexp(1 / np.sqrt(count))
    unit = np.float32(np.ldexp(np.rint(np.ldexp(mantissa, _BITS)), int(exponent) - _BITS))
    bits = np.unpackbits(descriptors, axis=1)
    return np.where(bits, unit, -unit).astype(np.float32)


def _inside(features: Features, keep: np.ndarray | None, border: int) -> np.ndarray:
    """(N,) bool: not at the edge, and where the mask allows keypoints."""
    width, height = features.image_size
    x, y = features.keypoints.T
    inside = (x >= border) & (y >= border) & (x <= width - 1 - border) & (y <= height - 1 - border)
    if keep is not None:
        columns, rows = (np.rint(values).astype(np.intp) for values in (x.clip(0, width - 1), y.clip(0, height - 1)))
        inside &= keep[rows, columns]
    return inside


def _rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of (H, W, 1 or 3)."""
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.shape[2] == 1 else image


def _tensors(features: Features) -> Features:
    names = ("keypoints", "scores", "descriptors")
    tensors: dict[str, Any] = {name: torch.from_numpy(getattr(features, name)) for name in names}
    return replace(features, **tensors)
