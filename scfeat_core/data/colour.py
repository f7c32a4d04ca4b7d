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
_GRAY = np.float32([0.299, 0.587, 0.114])


def jitter(image: np.ndarray, config: JitterConfig, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32 RGB in [0, 1], changed and clipped to that range."""
    factors = [rng.uniform(*limits) for limits in (config.brightness, config.contrast, config.saturation)]
    turn = rng.uniform(-config.hue, config.hue)
    for step in rng.permutation(4):
        if step == 3:
            image = turn_hue(image, turn)
            continue
        gray = 0.0 if step == 0 else image @ _GRAY
        base = gray[..., None] if step == 2 else np.mean(gray, dtype=np.float32)
        image = np.clip(base + np.float32(factors[step]) * (image - base), 0, 1)
    return image


def turn_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """The hue turned by this share of the colour circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # hue in degrees
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * turn)) % 360
    return np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), 0, 1)
