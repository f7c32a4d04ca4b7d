"""Pictures of keypoints and matches, drawn with OpenCV on copies; no window is ever opened."""

from __future__ import annotations

import cv2
import numpy as np

INLIER = (60, 220, 90)
OUTLIER = (235, 90, 70)
KEYPOINT = (250, 200, 60)
_SHIFT = 4  # OpenCV draws at 1/16 pixel


def draw_keypoints(image: np.ndarray, keypoints: np.ndarray, colour: tuple[int, int, int] = KEYPOINT) -> np.ndarray:
    """A copy of the image with a dot at every keypoint.

    image: (H, W), (H, W, 1) or (H, W, 3) RGB uint8. keypoints: (N, 2) float, pixels. Returns (H, W, 3) uint8.
    """
    canvas = _rgb(image).copy()
    _lines(canvas, keypoints, keypoints, colour, thickness=3)
    return canvas


def draw_matches(
    image0: np.ndarray,
    image1: np.ndarray,
    keypoints0: np.ndarray,
    keypoints1: np.ndarray,
    inliers: np.ndarray | None = None,
) -> np.ndarray:
    """Both images side by side with a line for every match: inliers green and on top, the others red.

    image0, image1: as in draw_keypoints, of any two sizes. keypoints0, keypoints1: (M, 2) float, pixels, parallel.
    inliers: (M,) bool, all where not given. Returns (max(H0, H1), W0 + W1, 3) RGB uint8.
    """
    left, right = _rgb(image0), _rgb(image1)
    canvas = np.zeros((max(len(left), len(right)), left.shape[1] + right.shape[1], 3), np.uint8)
    canvas[: len(left), : left.shape[1]] = left
    canvas[: len(right), left.shape[1] :] = right
    ends = np.asarray(keypoints1, np.float32) + np.array([left.shape[1], 0], np.float32)
    good = np.ones(len(ends), bool) if inliers is None else np.asarray(inliers, bool)
    for chosen, colour in ((~good, OUTLIER), (good, INLIER)):
        _lines(canvas, keypoints0[chosen], ends[chosen], colour, thickness=1)
    return canvas


def _rgb(image: np.ndarray) -> np.ndarray:
    gray = image.ndim == 2 or image.shape[2] == 1
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if gray else image


def _lines(
    canvas: np.ndarray, start: np.ndarray, end: np.ndarray, colour: tuple[int, int, int], thickness: int
) -> None:
    segments = np.rint(np.stack([start, end], axis=1) * (1 << _SHIFT)).astype(np.int32)
    cv2.polylines(canvas, list(segments), False, colour, thickness, cv2.LINE_AA, _SHIFT)
