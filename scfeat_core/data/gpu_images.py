"""Pictures in the memory of a device: decoded once, and whole batches of views of them rendered there.

The counterpart of what :mod:`warps` and :mod:`windows` do with OpenCV a picture at a time: bilinear samples of the
level of a pyramid whose resolution is nearest, mirrored beyond the border.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FAR = 2.0**20  # pixels; coordinates beyond are cut, as those near the horizon of a homography may be infinite


class ImageStore:
    """Pyramids (see :mod:`photos`) of N pictures with as many levels each, on one device.

    4 bytes a pixel of each level, with three levels 5.25 a pixel of the picture; twice that while they are put there.

    sizes: (N, 2) int64 (height, width) of the pictures, on the CPU.
    """

    def __init__(self, pyramids: Iterable[Sequence[np.ndarray]], device: torch.device) -> None:
        """pyramids: (H, W, 3) uint8 RGB a level. Raises ValueError where there are none."""
        words, shapes = [], []
        for pyramid in pyramids:
            words += [_words(level).to(device) for level in pyramid]
            shapes.append([level.shape[:2] for level in pyramid])
        if not shapes:
            raise ValueError("expected at least one picture")
        table = torch.tensor(shapes)  # (N, L, 2)
        area = table.prod(-1).flatten()
        self.sizes = table[:, 0].numpy()
        self.levels = table.shape[1]
        self._words: Tensor | None = torch.cat(words)
        self._shape = table.to(device)
        self._start = (area.cumsum(0) - area).view(table.shape[:2]).to(device)

    def __getstate__(self) -> dict[str, Any]:
        """Workers draw what is shown; the pixels stay with the process that renders."""
        return self.__dict__ | {"_words": None, "_shape": None, "_start": None}

    @property
    def device(self) -> torch.device:
        return self._start.device

    def render(self, picture: Tensor, level: Tensor, matrix: Tensor, size: tuple[int, int]) -> Tensor:
        """V views of ``size`` (height, width), (V, 3, height, width) float32 in [0, 1], of 256 steps.

        picture, level: (V,) int64. matrix: (V, 3, 3) float64, pixels of a view to pixels of the picture (level 0).
        """
        assert self._words is not None, "the pixels are in another process"
        picture, level, matrix = (t.to(self.device, non_blocking=True) for t in (picture, level, matrix))
        x, y = _places(_at_level(matrix, level), size)
        height, width = (n.view(-1, 1, 1) for n in self._shape[picture, level].unbind(-1))
        start = self._start[picture, level].view(-1, 1, 1)
        left, top = x.floor(), y.floor()
        columns = [_mirrored(left.long() + i, width) for i in (0, 1)]
        rows = [start + width * _mirrored(top.long() + i, height) for i in (0, 1)]
        x, y = (x - left)[..., None], (y - top)[..., None]
        upper, lower = (self._colours(row + columns[0]).lerp(self._colours(row + columns[1]), x) for row in rows)
        return (upper.lerp(lower, y).round() / 255).permute(0, 3, 1, 2)

    def _colours(self, index: Tensor) -> Tensor:
        """(V, h, w, 3) float32."""
        assert self._words is not None
        return self._words[index].view(torch.uint8).unflatten(-1, (-1, 4))[..., :3].float()


def _words(picture: np.ndarray) -> Tensor:
    """(H * W,) int32, the bytes R, G, B and one that is not used."""
    rgba = np.zeros((*picture.shape[:2], 4), np.uint8)
    rgba[..., :3] = picture
    return torch.from_numpy(rgba.reshape(-1).view(np.int32))


def _at_level(matrix: Tensor, level: Tensor) -> Tensor:
    """The matrices to pixels of that level: ``scale_matrix(0.5**level) @ matrix``."""
    scale = (0.5 ** level.to(matrix.dtype)).view(-1, 1, 1)
    offset = (0.5 * scale - 0.5) * matrix[:, 2:]
    return torch.cat((scale * matrix[:, :2] + offset, matrix[:, 2:]), 1)


def _places(matrix: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x and y (V, h, w) float32 of the pixels of a view. In products of numbers: matrices may be of less precision."""
    m = matrix.float()[..., None, None]  # (V, 3, 3, 1, 1)
    x = torch.arange(size[1], device=matrix.device, dtype=torch.float32)
    y = torch.arange(size[0], device=matrix.device, dtype=torch.float32)[:, None]
    u, v, w = (m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2] for i in range(3))
    return (u / w).nan_to_num(_FAR).clamp(-_FAR, _FAR), (v / w).nan_to_num(_FAR).clamp(-_FAR, _FAR)


def _mirrored(index: Tensor, count: Tensor) -> Tensor:
    """Of ... 1 0 | 0 1 ... n-1 | n-1 n-2 ..."""
    index = index.remainder(2 * count)
    return torch.minimum(index, 2 * count - 1 - index)


# -- JPEG --------------------------------------------------------------------------------------------------------------

# ITU-T T.81, tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(4 * ((99,) * 8,)),
)
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # JFIF 1.02


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """What JPEG of this quality (V,) makes of images (V, 3, H, W) in [0, 1]: 4:2:0, as encoders do it by default.

    All that loses something is done as they do it; the coding without loss is left out.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    mixing = torch.tensor(_YCBCR, dtype=torch.float64)
    back = torch.linalg.inv(mixing).to(images)  # where nothing has to be waited for
    levels = (255 * padded).round()
    planes = torch.stack([(row.view(3, 1, 1) * levels).sum(1) for row in mixing.to(images)], 1)
    brightness = _quantised(planes[:, :1] - 128, images.new_tensor(_LUMINANCE), quality) + 128
    colour = _quantised(F.avg_pool2d(planes[:, 1:], 2), images.new_tensor(_CHROMINANCE), quality)
    colour = F.interpolate(colour, scale_factor=2, mode="bilinear", align_corners=False)
    decoded = torch.cat((brightness, colour), 1)
    rgb = torch.stack([(row.view(3, 1, 1) * decoded).sum(1) for row in back], 1)
    return (rgb[..., :height, :width].round() / 255).clamp(0, 1)


def _quantised(planes: Tensor, table: Tensor, quality: Tensor) -> Tensor:
    """Planes (V, C, H, W), their 8x8 blocks transformed, rounded to the steps of the table, and transformed back."""
    q = quality.to(table).view(-1, 1, 1, 1, 1, 1)
    scale = torch.where(q < 50, 5000 / q, 200 - 2 * q)  # of libjpeg
    steps = ((table * scale + 50) / 100).floor().clamp(1, 255)
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)  # (V, C, rows, columns, 8, 8)
    basis = _cosines(planes)
    coefficients = (basis @ blocks @ basis.T / steps).round() * steps
    return (basis.T @ coefficients @ basis).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _cosines(like: Tensor) -> Tensor:
    """Orthonormal DCT-II of 8 numbers, (8, 8)."""
    k = torch.arange(8.0, dtype=torch.float64)
    basis = torch.cos(torch.pi / 8 * (k + 0.5) * k[:, None]) / 2
    basis[0] /= 2**0.5
    return basis.to(like)
