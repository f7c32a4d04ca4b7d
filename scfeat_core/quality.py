"""How well an image is exposed, how sharp it is, and how well its keypoints cover it.

The former two say whether it can have good features at all.

``sharpness`` is the mean square of the Laplacian over the mean square of the differences at a distance of 4 pixels, of
the gray image brought to about 320 pixels along its longer side: how much of the contrast is in the finest details. It
does not depend on gain, offset or size, and much less on what is seen than the variance of the Laplacian alone.
White noise has 5, and noise is the only thing that raises it above 1. Measured on photographs at 640 pixels:

====================================== ======================================
39 photographs of 14 scenes            0.61 (median), 0.30 to 0.97 (5 to 95 %)
the same, Gaussian blur of 1 pixel     0.23, 0.15 to 0.35
the same, Gaussian blur of 2 pixels    0.07, 0.05 to 0.09
the same, Gaussian blur of 4 pixels    0.02, 0.02 to 0.03
the same, motion over 9 pixels         0.25, 0.14 to 0.38 (along one axis, so half of the details stay)
oxford_bikes, blur in 6 steps          0.63, 0.39, 0.29, 0.17, 0.12, 0.09
oxford_leuven, exposure in 6 steps     0.60, 0.60, 0.62, 0.63, 0.64, 0.68
====================================== ======================================

Below 0.15 an image is blurred, whatever it shows; that is a Gaussian of about 1.3 pixels at 640.
"""

from __future__ import annotations

import cv2
import numpy as np

from scfeat_core.errors import ImageError
from scfeat_core.types import Array, ImageQuality

BLURRED = 0.15  # sharpness below which an image is blurred
DARK, SATURATED = 0.03, 0.98  # of the full range: 7 and 250 of 255
_WORKING_SIZE = 320
_STEP = 4  # pixels: the scale that fine detail is compared with
_FLAT = 0.25 / 255  # standard deviation, of the full range: real images that are 50 times too dark have four times that
_GRID = 8  # cells per axis of the coverage, as FrontendStatus defines it
_NO_CONTRAST = 1e-8  # mean square difference, of the full range: a fortieth of a level of 8 bits


def assess(gray: np.ndarray) -> ImageQuality:
    """Exposure and sharpness of one image, which :func:`reduce` made small.

    dark, saturated: shares of the pixels below 0.03 and above 0.98. sharpness: 0 without any contrast.
    Raises ImageError.
    """
    mean = float(gray.mean())
    if not np.isfinite(mean):
        raise ImageError("expected an image of finite values, found NaN or infinity; replace them, or drop the image")
    dark, saturated = (np.count_nonzero(chosen) / gray.size for chosen in (gray < DARK, gray > SATURATED))
    return ImageQuality(mean, dark, saturated, _sharpness(gray))


def has_contrast(gray: np.ndarray) -> bool:
    """Whether anything can be seen: False for a lens cap, a white wall out of focus, a camera that sends black.

    What a detector finds there are the borders of the image and its own noise, alike in each frame. gray: of
    :func:`reduce`; its standard deviation against a quarter of a level of 255.
    """
    return bool(cv2.meanStdDev(gray)[1].item() > _FLAT)


def coverage(keypoints: np.ndarray, image_size: tuple[int, int]) -> float:
    """Share of the cells of an 8 x 8 grid over the image that hold a keypoint. keypoints: (N, 2) pixels."""
    cells = ((np.asarray(keypoints) + 0.5) * _GRID / np.asarray(image_size)).astype(np.int64).clip(0, _GRID - 1)
    return len(np.unique(cells @ (1, _GRID))) / _GRID**2


def _sharpness(gray: np.ndarray) -> float:
    if min(gray.shape) <= _STEP:
        return 0.0
    coarse = _mean_square(gray[:, _STEP:] - gray[:, :-_STEP]) + _mean_square(gray[_STEP:] - gray[:-_STEP])
    return _mean_square(cv2.Laplacian(gray, cv2.CV_32F)) / coarse if coarse > _NO_CONTRAST else 0.0


def _mean_square(values: np.ndarray) -> float:
    flat = values.ravel()
    return float(np.dot(flat, flat)) / flat.size


def reduce(image: Array) -> np.ndarray:
    """One image in gray, decimated by a whole factor to about 320 pixels: (h, w) float32 in [0, 1]; 0.2 ms at 640x480.

    image: numpy (H, W), (H, W, 1 | 3 | 4) RGB, or torch (H, W) or (C, H, W); uint8, uint16, or floating in [0, 1].
    Raises ImageError.
    """
    # Whoever has a tensor has torch; the node, which measures coverage here, starts without it.
    small = _decimated_tensor(image) if hasattr(image, "detach") else _decimated(np.asarray(image))
    if small.ndim == 3:
        small = small[..., 0] if small.shape[2] == 1 else cv2.cvtColor(small[..., :3], cv2.COLOR_RGB2GRAY)
    full = {np.uint8: 255.0, np.uint16: 65535.0}.get(small.dtype.type, 1.0)
    return small.astype(np.float32) / np.float32(full)


def _decimated(image: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, C), of the dtype of the image, but for half precision."""
    if image.ndim not in (2, 3) or min(image.shape) == 0 or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(f"expected one image (H, W) or (H, W, 1|3|4), found an array of shape {image.shape}")
    if image.dtype not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise ImageError(
            f"expected an image of uint8, uint16 or float in [0, 1], found {image.dtype}; convert it first"
        )
    image = image.astype(np.float32) if image.dtype == np.float16 else image
    factor = _factor(image.shape[1], image.shape[0])
    height, width = image.shape[0] // factor, image.shape[1] // factor
    # By a whole factor, where OpenCV is quick; up to factor - 1 rows and columns at the end do not count.
    return cv2.resize(image[: height * factor, : width * factor], (width, height), interpolation=cv2.INTER_AREA)


def _decimated_tensor(image: Array) -> np.ndarray:
    """On the device of the image where that is not the CPU, so that a small one is copied."""
    import torch.nn.functional as F

    planes = image.detach()[None] if image.ndim == 2 else image.detach()
    if planes.ndim != 3 or planes.shape[0] not in (1, 3, 4):
        raise ImageError(f"expected one image (H, W) or (C, H, W), C = 1, 3, 4, found a tensor of {tuple(image.shape)}")
    if planes.device.type != "cpu":
        factor = _factor(planes.shape[2], planes.shape[1])
        unit = 1.0 if planes.dtype.is_floating_point else 255.0
        return F.avg_pool2d(planes.float()[None] / unit, factor)[0].permute(1, 2, 0).cpu().numpy()
    planes = planes.float() if planes.dtype.itemsize == 2 and planes.dtype.is_floating_point else planes
    return _decimated(planes.permute(1, 2, 0).numpy())


def _factor(width: int, height: int) -> int:
    return max(1, min(round(max(width, height) / _WORKING_SIZE), width, height))
