"""Pairs of warped photographs with exact correspondence: what a robot's camera does to a picture, with known truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.config import Range
from scfeat_core.geometry import scale_matrix

Share = Annotated[float, Range(minimum=0.0, maximum=1.0)]
Positive = Annotated[float, Range(above=0.0)]
NotNegative = Annotated[float, Range(minimum=0.0)]


@dataclass(frozen=True)
class GeometryConfig:
    """zoom: source pixels per pixel of view 0, drawn log-uniformly from this range.

    scale_sigma: deviation of the log2 scale between the views, cut at 2 (factor 4). rotation_sigma: degrees.
    upside_down: share of pairs with any rotation at all. perspective: largest shift of a corner and
    translation: largest shift of the centre, both as shares of the view's size.
    """

    zoom: tuple[Positive, Positive] = (0.7, 2.0)
    scale_sigma: NotNegative = 0.5
    rotation_sigma: NotNegative = 20.0
    upside_down: Share = 0.1
    perspective: Share = 0.25
    translation: Share = 0.2


@dataclass(frozen=True)
class PhotometricConfig:
    """Each is a share of the views that it happens to, or the largest strength (a factor 2 ** +-x where ``log2``).

    occlusion: a piece of another photograph before the view, which has no counterpart in the other view.
    banding: stripes of light and dark, as a rolling shutter makes them of lamps that flicker.
    """

    occlusion: Share = 0.15
    banding: Share = 0.1
    exposure_log2: NotNegative = 0.8
    gamma_log2: NotNegative = 0.7
    contrast_log2: NotNegative = 0.6
    colour_log2: NotNegative = 0.2
    gray: Share = 0.3
    shading: Share = 0.3
    motion_blur: Share = 0.2
    defocus: Share = 0.25
    noise: NotNegative = 0.03
    jpeg: Share = 0.3


@dataclass(frozen=True)
class WarpConfig:
    view_size: Annotated[int, Range(minimum=32)] = 192
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)


@dataclass(frozen=True)
class MotionGeometry(GeometryConfig):
    """What a camera does between two frames, some of it less than a pixel.

    Photographs are not enlarged, but for a few per cent by what scale and perspective take from a zoom of 1, and for
    those with an edge shorter than view_size, which have to fill the view: choose it, and max_edge, accordingly.
    """

    zoom: tuple[Positive, Positive] = (1.0, 2.4)
    scale_sigma: NotNegative = 0.05
    rotation_sigma: NotNegative = 1.0
    upside_down: Share = 0.0
    perspective: Share = 0.01
    translation: Share = 0.06


@dataclass(frozen=True)
class MotionPhotometry(PhotometricConfig):
    """Two frames are alike, and mostly sharp."""

    occlusion: Share = 0.05
    exposure_log2: NotNegative = 0.3
    gamma_log2: NotNegative = 0.2
    contrast_log2: NotNegative = 0.2
    shading: Share = 0.1
    motion_blur: Share = 0.05
    defocus: Share = 0.05
    noise: NotNegative = 0.015
    jpeg: Share = 0.2


@dataclass(frozen=True)
class MotionConfig(WarpConfig):
    """Pairs as of a video."""

    geometry: MotionGeometry = field(default_factory=MotionGeometry)
    photometric: MotionPhotometry = field(default_factory=MotionPhotometry)


class WarpPairs(NamedTuple):
    """image0, image1: (B, 3, S, S) float32 RGB in [0, 1]. homography: (B, 3, 3) float32, pixels of 0 to pixels of 1.

    visible0, visible1: (B, S, S) bool, False where something stands before the photograph.
    """

    image0: Tensor
    image1: Tensor
    homography: Tensor
    visible0: Tensor
    visible1: Tensor


class WarpDraws(NamedTuple):
    """What the two views of B pairs will be, as numbers alone: drawn here, rendered anywhere (see :mod:`gpu_pairs`).

    photo: (B,) int64. matrix: (B, 2, 3, 3) float64, pixels of a view to pixels of the photograph; level: (B, 2) int64
    of its pyramid. homography: (B, 3, 3) float32. occluder: (B, 2, 8) float64, see :func:`draw_occluder`. quality:
    (B, 2) int64, of JPEG, 0 where there is none. seed: (draws,) int64, one for all pairs that were drawn together.
    """

    photo: Tensor
    matrix: Tensor
    level: Tensor
    homography: Tensor
    occluder: Tensor
    quality: Tensor
    seed: Tensor


def draw_pairs(
    photos: Sequence[Sequence[np.ndarray]], count: int, config: WarpConfig, rng: np.random.Generator
) -> WarpPairs:
    """``count`` pairs of random photographs (pyramids, see :mod:`photos`); a pure function of the generator's state."""
    sizes = np.array([photo[0].shape[:2] for photo in photos])
    return render_pairs(photos, draw_warps(sizes, len(photos[0]), count, config, rng), config)


def draw_warps(sizes: np.ndarray, levels: int, count: int, config: WarpConfig, rng: np.random.Generator) -> WarpDraws:
    """``count`` pairs of random photographs. sizes: (N, 2), their (height, width). levels: of their pyramids."""
    photo = rng.integers(len(sizes), size=count)
    matrices, occluders = [], []
    for index in photo:
        views = draw_views(tuple(sizes[index]), config, rng)
        matrices.append(views)
        occluders.append([draw_occluder(sizes, config.view_size, config.photometric.occlusion, rng) for _ in views])
    seed = int(rng.integers(2**62))
    quality = [draw_quality(config.photometric.jpeg, rng) for _ in range(2 * count)]
    matrix = np.array(matrices)
    homography = np.linalg.inv(matrix[:, 1]) @ matrix[:, 0]
    homography /= homography[:, 2:, 2:]
    level = [[view_level(view, config.view_size, levels) for view in views] for views in matrix]
    return WarpDraws(
        torch.from_numpy(photo),
        torch.from_numpy(matrix),
        torch.tensor(level),
        torch.from_numpy(homography).float(),
        torch.tensor(np.array(occluders)),
        torch.tensor(quality).view(count, 2),
        torch.tensor([seed]),
    )


def render_pairs(photos: Sequence[Sequence[np.ndarray]], draws: WarpDraws, config: WarpConfig) -> WarpPairs:
    """The pictures of pairs that were drawn together, on the CPU."""
    views: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for i, photo in enumerate(draws.photo.tolist()):
        for k in range(2):
            level = int(draws.level[i, k])
            view = render_view(photos[photo][level], draws.matrix[i, k].numpy(), level, config.view_size)
            masks.append(occlude(view, photos, draws.occluder[i, k].numpy()))
            views.append(view)
    images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    images = distort_photometry(images, config.photometric, torch.Generator().manual_seed(int(draws.seed[0])))
    for image, quality in zip(images, draws.quality.flatten().tolist(), strict=True):  # last, as in a camera
        compress(image, quality)
    visible = torch.from_numpy(np.stack(masks))
    return WarpPairs(images[0::2], images[1::2], draws.homography, visible[0::2], visible[1::2])


def draw_views(
    source_size: tuple[int, int], config: WarpConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two (3, 3) float64 homographies, pixels of a view to pixels of the (height, width) source."""
    g, size = config.geometry, config.view_size
    limit = min(source_size) / size
    zoom = np.exp(rng.uniform(*np.log(np.minimum(g.zoom, limit))))
    half = zoom * size / 2
    centre = np.array([rng.uniform(min(half, n / 2), max(n - half, n / 2)) for n in source_size[::-1]])
    scale = 2 ** np.clip(rng.normal(0, g.scale_sigma), -2, 2)
    angle = np.deg2rad(rng.uniform(-180, 180) if rng.random() < g.upside_down else rng.normal(0, g.rotation_sigma))
    shift = rng.uniform(-1, 1, 2) * g.translation * size * zoom * min(scale, 1.0)
    # Between two views the scale is shared out evenly, so that neither is always the sharper one.
    view0 = _similarity(centre, zoom / np.sqrt(scale), 0.0, size)
    view1 = _similarity(centre + shift, zoom * np.sqrt(scale), angle, size) @ _perspective(g.perspective, size, rng)
    return (view0, view1) if rng.random() < 0.5 else (view1, view0)


def _similarity(centre: np.ndarray, scale: float, angle: float, size: int) -> np.ndarray:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    middle = (size - 1) / 2
    to_source = np.array([[c, -s, centre[0]], [s, c, centre[1]], [0, 0, 1]])
    return to_source @ np.array([[1, 0, -middle], [0, 1, -middle], [0, 0, 1]])


def _perspective(strength: float, size: int, rng: np.random.Generator) -> np.ndarray:
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * (size - 1)
    moved = corners + rng.uniform(-1, 1, (4, 2)) * rng.uniform(0, strength) * size
    return cv2.getPerspectiveTransform(corners, moved.astype(np.float32))


def view_level(source_from_view: np.ndarray, size: int, levels: int) -> int:
    """The level of a pyramid whose resolution is nearest to that of the view."""
    scale = np.sqrt(abs(np.linalg.det(_local_jacobian(source_from_view, (size - 1) / 2))))
    return int(np.clip(np.round(np.log2(scale)), 0, levels - 1))


def render_view(picture: np.ndarray, source_from_view: np.ndarray, level: int, size: int) -> np.ndarray:
    """One view, (S, S, 3) uint8, of this level of a pyramid; mirrored beyond the border.

    The mirrored plane is the same for both views of a pair, so the correspondence holds there as well.
    """
    matrix = scale_matrix(0.5**level) @ source_from_view
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(picture, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT)


def draw_occluder(sizes: np.ndarray, size: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """An ellipse of another photograph that stands before a view, in ``share`` of the cases, (8,) float64.

    The photograph (-1: nothing stands there), left and top of the patch of it, half axes, centre (x, y), and degrees.
    """
    if rng.random() >= share:
        return np.full(8, -1.0)
    other = int(rng.integers(len(sizes)))
    top, left = (int(rng.integers(max(1, n - size + 1))) for n in sizes[other])
    axes = rng.uniform(0.08, 0.3, 2) * size
    return np.array([other, left, top, *axes, *rng.uniform(0, size, 2), rng.uniform(0, 180)])


def occlude(view: np.ndarray, photos: Sequence[Sequence[np.ndarray]], occluder: np.ndarray) -> np.ndarray:
    """Lay what :func:`draw_occluder` drew over the view, in place.

    Returns (S, S) bool, True where the view is still to be seen.
    """
    size = len(view)
    if occluder[0] < 0:
        return np.ones((size, size), bool)
    other, left, top = occluder[:3].astype(int)
    patch = cv2.resize(photos[other][0][top : top + size, left : left + size], (size, size))
    mask = np.zeros((size, size), np.uint8)
    cv2.ellipse(mask, (tuple(occluder[5:7]), tuple(2 * occluder[3:5]), occluder[7]), 1, -1)
    cv2.copyTo(patch, mask, view)
    return mask == 0


def draw_quality(share: float, rng: np.random.Generator) -> int:
    """Quality of a JPEG, in ``share`` of the cases, else 0."""
    return int(rng.integers(30, 95)) if rng.random() < share else 0


def compress(image: Tensor, quality: int) -> None:
    """JPEG compression of one (3, H, W) image in [0, 1], in place; none with quality 0."""
    if quality == 0:
        return
    bgr = (image * 255).round().byte().permute(1, 2, 0).flip(-1).contiguous().numpy()
    _, code = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    image.copy_(torch.from_numpy(decoded).permute(2, 0, 1) / 255)


def _local_jacobian(matrix: np.ndarray, middle: float) -> np.ndarray:
    x, y, w = matrix @ (middle, middle, 1.0)
    return (matrix[:2, :2] - np.outer((x / w, y / w), matrix[2, :2])) / w


def distort_photometry(images: Tensor, config: PhotometricConfig, generator: torch.Generator) -> Tensor:
    """Blur, shading, exposure, contrast, gamma, colour and noise, each view for itself. (B, 3, H, W) in [0, 1].

    generator: of the CPU, wherever the images are; only the noise of each pixel is drawn where they are.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return (low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)).to(device)

    def happens(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < share

    x = _blur(images, happens(config.defocus), happens(config.motion_blur), generator)
    grid = torch.rand(count, 1, 4, 4, generator=generator).to(device)
    shading = F.interpolate(grid, size=x.shape[-2:], mode="bicubic", align_corners=True).clamp(0, 1) * 1.2 + 0.4
    x = torch.where(happens(config.shading).to(device), x * shading, x)
    x = torch.where(happens(config.banding).to(device), x * _bands(x, uniform), x)
    gray, is_gray = x.mean(1, keepdim=True).expand_as(x), happens(config.gray).to(device)
    x = torch.where(is_gray, gray, x * 2 ** uniform(-config.colour_log2, config.colour_log2, 3))
    x = x * 2 ** uniform(-config.exposure_log2, config.exposure_log2 / 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * 2 ** uniform(-config.contrast_log2, config.contrast_log2) + mean
    x = x.clamp(1e-4, 1) ** 2 ** uniform(-config.gamma_log2, config.gamma_log2)
    x = x + uniform(0, config.noise) * _noise(x, generator)
    return x.clamp(0, 1)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.device.type == "cpu":
        return torch.randn(like.shape, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.randn(like.shape, generator=torch.Generator(like.device).manual_seed(seed), device=like.device)


def _bands(images: Tensor, uniform: Callable[[float, float], Tensor]) -> Tensor:
    """Factors around 1 that change with the row, 1 to 6 stripes a view."""
    row = torch.linspace(0, 1, images.shape[-2], device=images.device)[:, None]
    return 1 + uniform(0.1, 0.5) * torch.sin(2 * torch.pi * (uniform(1, 6) * row + uniform(0, 1)))


def _blur(images: Tensor, defocus: Tensor, motion: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian defocus and straight motion blur, one kernel a view, as one grouped convolution.

    All but that is done on the CPU, so that no other device has to be waited for.
    """
    count, radius = len(images), 5
    grid = torch.arange(-radius, radius + 1.0)
    sigma = 0.5 + 1.3 * torch.rand(count, 1, 1, generator=generator)
    sigma = torch.where(defocus[:, 0], sigma, 0.05)
    angle = torch.pi * torch.rand(count, 1, 1, generator=generator)
    length = torch.where(motion[:, 0], 1 + 4 * torch.rand(count, 1, 1, generator=generator), 0.05)
    x, y = grid[None, None, :], grid[None, :, None]
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    streak = torch.exp(-0.5 * (across / 0.4) ** 2) * torch.sigmoid(4 * (length - along.abs()))
    streak = torch.where(motion[:, 0], streak, (x == 0) & (y == 0))
    gaussian = torch.exp(-0.5 * (x**2 + y**2) / sigma**2)
    kernels = F.conv2d(_normalise(streak)[None], _normalise(gaussian)[:, None], padding=radius, groups=count)[0]
    blurred = (defocus | motion).flatten().nonzero().flatten()
    if images.device.type != "cpu":
        blurred = torch.arange(count)  # convolutions of one size are chosen once, and the others change nothing
    if len(blurred) == 0:
        return images
    kernels, chosen = _normalise(kernels[blurred])[:, None].to(images.device), blurred.to(images.device)
    stacked = F.pad(images[chosen].transpose(0, 1), (radius,) * 4, mode="reflect")
    convolved = F.conv2d(stacked, kernels, groups=len(blurred)).transpose(0, 1)
    return images.index_copy(0, chosen, convolved)


def _normalise(kernels: Tensor) -> Tensor:
    return kernels / kernels.sum((-2, -1), keepdim=True)
