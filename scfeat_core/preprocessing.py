"""Images of any common kind to the tensor that the network takes, and coordinates back (spec 6.5)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.errors import ImageError
from scfeat_core.geometry import scale_points
from scfeat_core.network.model import IMAGENET_MEAN, IMAGENET_STD, MIN_IMAGE_SIZE
from scfeat_core.types import Array

SizeMode = Literal["native", "pad16", "crop16"]

CLAHE_TILES = (8, 8)
_STRIP = 64  # rows
_RANGE_SLACK = 1e-3  # what resampling may add to float images in [0, 1]


class NetworkInput(NamedTuple):
    """image: (B, 3, H, W) float32, ImageNet-normalised, channels last. mask: (B or 1, H, W) bool, or None.

    valid_size: (width, height) of the part of the image that is not padding. scale_xy: network pixels per image pixel.
    """

    image: Tensor
    mask: Tensor | None
    valid_size: tuple[int, int]
    scale_xy: tuple[float, float]

    def to_image(self, points: Tensor) -> Tensor:
        """Network pixels (..., 2) to pixels of the image that was given."""
        return points if self.scale_xy == (1, 1) else scale_points(points, [1 / scale for scale in self.scale_xy])

    def without_padding(self, values: Tensor) -> Tensor:
        """The part (..., h, w) of a map (..., H, W) that shows the image."""
        return values[..., : self.valid_size[1], : self.valid_size[0]]


def image_tensor(image: Array) -> Tensor:
    """(H, W, 1 or 3) uint8 or float32 in [0, 1], on the device where the image is; no copy where its layout allows.

    image: numpy (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA, or torch (H, W) or (C, H, W). uint8 in [0, 255],
    uint16 in [0, 65535], or floating in [0, 1], which is checked (0.3 ms at 640x480). Alpha is dropped.
    Raises ImageError.
    """
    tensor = image.detach() if isinstance(image, Tensor) else _from_numpy(image)
    if tensor.ndim == 2:
        tensor = tensor[..., None]
    elif tensor.ndim == 3 and isinstance(image, Tensor):
        tensor = tensor.permute(1, 2, 0)
    if tensor.ndim != 3 or tensor.shape[2] not in (1, 3, 4):
        expected = "(H, W) or (C, H, W) with C = 1, 3 or 4" if isinstance(image, Tensor) else "(H, W) or (H, W, 1|3|4)"
        raise ImageError(f"expected one image {expected}, found an array of shape {tuple(image.shape)}")
    _check_size(tensor.shape[1], tensor.shape[0])
    tensor = tensor[..., :3]
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.dtype.is_floating_point:
        raise ImageError(
            f"expected an image of uint8, uint16 or float in [0, 1], found {tensor.dtype}; convert it first"
        )
    _check_range(tensor)
    return tensor.float()


def _from_numpy(image: Any) -> Tensor:
    if not isinstance(image, np.ndarray):
        raise ImageError(f"expected an image as a numpy array or a torch tensor, found {type(image).__name__}")
    if image.dtype == np.uint16:
        return torch.from_numpy(image.astype(np.float32) / 65535)
    if image.dtype.kind not in "fu" or image.dtype.itemsize > 8 or image.dtype not in _NUMPY_DTYPES:
        raise ImageError(
            f"expected an image of uint8, uint16 or float in [0, 1], found {image.dtype}; convert it first"
        )
    if not image.flags.writeable or min(image.strides, default=0) < 0:
        image = image.copy()  # torch takes neither read-only memory nor mirrored views; 0.02 ms at 640x480
    return torch.from_numpy(image)


_NUMPY_DTYPES = tuple(np.dtype(name) for name in ("uint8", "float16", "float32", "float64"))


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_IMAGE_SIZE:
        raise ImageError(
            f"expected an image of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} pixels, found {width}x{height}; "
            "check the source, or enlarge the image"
        )


def _check_range(tensor: Tensor) -> None:
    low, high = (value.item() for value in tensor.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN spreads to both
        raise ImageError("expected an image of finite values, found NaN or infinity; replace them, or drop the image")
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise ImageError(
            f"expected a float image in [0, 1], found values from {low:g} to {high:g}; "
            "divide by the largest possible value, or pass uint8"
        )


def stack_images(images: Sequence[Array] | Array) -> Tensor:
    """Images of one size and kind as (B, H, W, 1 or 3); see :func:`image_tensor`. Raises ImageError."""
    tensors = [image_tensor(image) for image in images]
    if not tensors:
        raise ImageError("expected at least one image, found none")
    if len(tensors) == 1:
        return tensors[0][None]
    kinds = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors}
    if len(kinds) > 1:
        found = ", ".join(f"{shape[1]}x{shape[0]}x{shape[2]} {dtype}" for shape, dtype in sorted(kinds, key=str))
        raise ImageError(f"expected images of one size and type in a batch, found {found}; extract them one by one")
    return torch.stack(tensors)


def stack_masks(masks: Sequence[Array | None] | Array | None, size: tuple[int, int], count: int) -> Tensor | None:
    """One mask for all of ``count`` images, or one for each, as (1 or B, H, W) bool: True = keep.

    masks: (H, W), (B, H, W), or a sequence of (H, W) and None; bool or uint8, non-zero = keep. Raises ImageError.
    """
    if masks is None:
        return None
    if isinstance(masks, (np.ndarray, Tensor)):
        masks = [masks] if masks.ndim == 2 else list(masks)
    if len(masks) not in (1, count):
        raise ImageError(f"expected one mask, or one for each of {count} images, found {len(masks)}")
    if all(mask is None for mask in masks):
        return None
    full = torch.ones(1, 1, dtype=torch.bool).expand(size[1], size[0])
    return torch.stack([full if mask is None else _mask_tensor(mask, size) for mask in masks])


def _mask_tensor(mask: Array, size: tuple[int, int]) -> Tensor:
    kinds = ("bool", "uint8", "torch.bool", "torch.uint8")
    if not isinstance(mask, (np.ndarray, Tensor)) or str(mask.dtype) not in kinds:
        found = getattr(mask, "dtype", type(mask).__name__)
        raise ImageError(f"expected a mask of bool or uint8 (non-zero = keep), found {found}")
    if tuple(mask.shape) != (size[1], size[0]):
        raise ImageError(
            f"expected a mask of the image's size, (H, W) = {(size[1], size[0])}, found {tuple(mask.shape)}; "
            "resize it with nearest neighbours"
        )
    return torch.as_tensor(mask != 0)


def equalise(images: Tensor, clip_limit: float) -> Tensor:
    """Contrast-limited adaptive histogram equalisation of the brightness: OpenCV's, on the CPU, in 8 x 8 tiles.

    images: (B, H, W, 1 or 3) uint8 or float32 in [0, 1]; those on another device are copied to the host. Colours keep
    their chroma (YCrCb). clip_limit: as in ``cv2.createCLAHE``; 2 to 4 is usual. Returns (B, H, W, 1 or 3) uint8 on
    the CPU. Floats (and 16-bit images, which arrive as such) are first multiplied by the power of two that just keeps
    them within 8 bits, so that 12 bits in 16 lose none of the upper 8.
    """
    clahe = cv2.createCLAHE(clip_limit, CLAHE_TILES)
    return torch.stack([torch.from_numpy(_equalised(eight_bits(image), clahe)) for image in images.cpu()])


def eight_bits(image: Tensor) -> np.ndarray:
    """One image (H, W, 1 or 3), uint8 or float32 in [0, 1], as uint8, dark ones brightened as ``equalise`` says."""
    if image.dtype == torch.uint8:
        return image.numpy()
    gain = 2.0 ** max(0, -int(np.ceil(np.log2(max(float(image.max()), 2**-8)))))
    return (image * (255 * gain)).round_().clamp_(0, 255).byte().numpy()


def _equalised(image: np.ndarray, clahe: Any) -> np.ndarray:
    """(H, W, 1 or 3) uint8."""
    if image.shape[2] == 1:
        return clahe.apply(image[..., 0])[..., None]
    planes = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    planes[..., 0] = clahe.apply(planes[..., 0])
    return cv2.cvtColor(planes, cv2.COLOR_YCrCb2RGB)


def network_input(images: Tensor, mask: Tensor | None, size_mode: SizeMode, max_edge: int) -> NetworkInput:
    """Fit the size and normalise, on the device where the images are.

    images: (B, H, W, 1 or 3) uint8 or float32 in [0, 1]. mask: (1 or B, H, W) bool. max_edge: images with a longer edge
    are scaled down to it, 0 never. native takes any size, pad16 repeats the last row and column up to multiples of
    16, crop16 cuts down to multiples of 16 on the right and at the bottom, as the published network needs it.
    """
    images, mask, scale_xy = _shrink(images, mask, max_edge)
    height, width = images.shape[1:3]
    valid_size = (width, height)
    if size_mode == "pad16":
        right, bottom = -width % 16, -height % 16
        images = _pad(images, right, bottom)
        mask = None if mask is None else F.pad(mask, (0, right, 0, bottom))
    elif size_mode == "crop16":
        valid_size = (width // 16 * 16, height // 16 * 16)
        images = images[:, : valid_size[1], : valid_size[0]]
        mask = None if mask is None else mask[:, : valid_size[1], : valid_size[0]]
    return NetworkInput(normalise(images), mask, valid_size, scale_xy)


def _shrink(images: Tensor, mask: Tensor | None, max_edge: int) -> tuple[Tensor, Tensor | None, tuple[float, float]]:
    height, width = images.shape[1:3]
    if max_edge <= 0 or max(height, width) <= max_edge:
        return images, mask, (1.0, 1.0)
    scale = max(max_edge / max(height, width), MIN_IMAGE_SIZE / min(height, width))
    size = (round(height * scale), round(width * scale))
    planes = images.permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=True)
    planes = planes if images.dtype == torch.float32 else planes / 255
    if mask is not None:  # a pixel is kept where all that it stands for is
        mask = F.interpolate(mask[:, None].float(), size=size, mode="area")[:, 0] > 1 - 1e-4
    return planes.permute(0, 2, 3, 1), mask, (size[1] / width, size[0] / height)


def _pad(images: Tensor, right: int, bottom: int) -> Tensor:
    rows = torch.arange(images.shape[1] + bottom, device=images.device).clamp_max(images.shape[1] - 1)
    columns = torch.arange(images.shape[2] + right, device=images.device).clamp_max(images.shape[2] - 1)
    return images[:, rows][:, :, columns]


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 1 or 3) uint8 or float in [0, 1] to the network's (B, 3, H, W) float32, channels last in memory."""
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    normalised = _normalised_on_host(images, unit) if images.device.type == "cpu" else _normalised(images, unit)
    return normalised.permute(0, 3, 1, 2)


def _normalised(images: Tensor, unit: float) -> Tensor:
    """(B, H, W, 3). On whole rows, as broadcasting over 3 innermost channels is slow."""
    if images.shape[3] == 1:
        images = torch.cat((images,) * 3, 3)
    batch, height, width, _ = images.shape
    scale, shift = _row_constants(width, unit, images.device)
    rows = images.reshape(batch, height, width * 3).to(torch.float32, copy=True)
    return rows.mul_(scale).sub_(shift).view(batch, height, width, 3)


def _normalised_on_host(images: Tensor, unit: float) -> Tensor:
    """:func:`_normalised` by OpenCV in one thread, and as fast as torch with two: whoever decodes the next image
    meanwhile keeps the other core. Strip by strip, which stay in its cache."""
    result = torch.empty(*images.shape[:3], 3)
    std = unit * np.array(IMAGENET_STD)
    weights = np.column_stack((np.diag(1 / std), -unit * np.array(IMAGENET_MEAN) / std))
    for image, place in zip(images.detach().numpy(), result.numpy(), strict=True):
        for y in range(0, len(image), _STRIP):
            strip = np.ascontiguousarray(image[y : y + _STRIP], np.float32)
            strip = cv2.cvtColor(strip, cv2.COLOR_GRAY2RGB) if strip.shape[2] == 1 else strip
            cv2.transform(strip, weights, dst=place[y : y + _STRIP])
    return result


@lru_cache(maxsize=32)
def _row_constants(width: int, unit: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a row (width * 3) is multiplied by and then lessened by. Kept, as a copy to a device makes the host wait."""
    with torch.inference_mode(False):
        mean, std = torch.tensor(IMAGENET_MEAN).repeat(width), torch.tensor(IMAGENET_STD).repeat(width)
        return (1 / (unit * std)).to(device), (mean / std).to(device)
