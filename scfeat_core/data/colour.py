"""Colour jitter: brightness, contrast, saturation and hue of a view, in random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np

from scfeat_core.config import Range

Factor = Annotated[float, Range(minimum=0.0)]


@dataclass(frozen=True)
class JitterConfig:
    """brightness, contrast, saturation: factors are drawn uniformly from these ranges. hue: largest turn, of 1.

    The defaults are as wide as the published ones upwards, but leave every view something to see.
    """

    brightness: tuple[Factor, Factor] = (0.4, 1.6)
    contrast: tuple[Factor, Factor] = (0.4, 1.6)
    saturation: tuple[Factor, Factor] = (0.0, 2.0)
    hue: Annotated[float, Range(minimum=0.0, maximum=0.5)] = 0.4


LEGACY_JITTER = JitterConfig(brightness=(0.0, 2.0), contrast=(0.0, 2.0), saturation=(0.0, 2.0), hue=0.4)


def jitter(image: np.ndarray, config: JitterConfig, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 RGB, changed. In whole numbers, as published, and ten times as fast as in floats."""
    brightness, contrast, saturation = (
        rng.uniform(low, high) for low, high in (config.brightness, config.contrast, config.saturation)
    )
    turn = rng.uniform(-config.hue, config.hue)
    for step in rng.permutation(4):
        if step == 0:
            image = _stretch(image, brightness, 0.0)
        elif step == 1:
            image = _stretch(image, contrast, float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()))
        elif step == 2:
            gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            image = cv2.addWeighted(image, saturation, gray, 1 - saturation, 0)
        else:
            image = turn_hue(image, turn)
    return image


def _stretch(image: np.ndarray, factor: float, fixed: float) -> np.ndarray:
    """Values are moved away from ``fixed`` by this factor, and cut at black and white."""
    table = np.clip(np.round(fixed + factor * (np.arange(256) - fixed)), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def turn_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """(H, W, 3) uint8 RGB with the hue turned by this share of the colour circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue in 256ths of the circle
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)  # which wraps
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
