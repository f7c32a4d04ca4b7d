"""Geometry on arrays, batched, numpy or torch: the result is of the kind of the points that come in.

Pixel (0, 0) is the centre of the top-left pixel, x right, y down. ``x1' F x0 = 0`` with view 0 the older (or left) one;
F and E have unit Frobenius norm. This is the only place that warps, rescales or samples at points.
"""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfeat_core.errors import CalibrationError
from scfeat_core.types import Array, Camera

Alignment = Literal["exact", "legacy"]


# -- points ------------------------------------------------------------------------------------------------------------


def warp_points(points: Array, homography: Array) -> Array:
    """Apply a homography. points: (..., N, 2); homography: (..., 3, 3). Points at infinity come out non-finite."""
    matrix = _like(homography, points)
    projected = points @ matrix[..., :2].swapaxes(-1, -2) + matrix[..., None, :, 2]
    return projected[..., :2] / projected[..., 2:]


def scale_points(points: Array, scale_xy: Any) -> Array:
    """Where points (..., 2) are after a resize by ``scale_xy`` (one factor, or (x, y)): (x + 0.5) s - 0.5.

    ``scale_points(p, 1 / s)`` takes them back.
    """
    return (points + 0.5) * _like(scale_xy, points) - 0.5


def scale_matrix(scale_xy: Any) -> np.ndarray:
    """:func:`scale_points` as a (3, 3) float64 homography, which also turns K into that of the resized image."""
    sx, sy = np.broadcast_to(np.asarray(scale_xy, np.float64), (2,))
    return np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])


def distances(points0: Tensor, points1: Tensor) -> Tensor:
    """Euclidean distances (..., N, M) of points (..., N, 2) and (..., M, 2).

    Without the matrix product that torch.cdist uses for many points: it is up to half a pixel wrong at 640 pixels.
    """
    return torch.cdist(points0, points1, compute_mode="donot_use_mm_for_euclid_dist")


def normalise_points(points: Array, size: tuple[int, int]) -> Array:
    """Pixels (..., 2) to [-1, 1], pixel 0 to -1 and the last pixel to +1. size: (width, height)."""
    return points * _like([2 / (size[0] - 1), 2 / (size[1] - 1)], points) - 1


def denormalise_points(points: Array, size: tuple[int, int]) -> Array:
    """The inverse of :func:`normalise_points`."""
    return (points + 1) * _like([(size[0] - 1) / 2, (size[1] - 1) / 2], points)


# -- two views ---------------------------------------------------------------------------------------------------------


def skew(vector: Array) -> Array:
    """[v]x of (..., 3), so that [v]x w = v x w. Returns (..., 3, 3)."""
    x, y, z = vector[..., 0], vector[..., 1], vector[..., 2]
    zero = x * 0
    stack = torch.stack if isinstance(vector, Tensor) else np.stack
    return stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*vector.shape, 3)


def unit_norm(matrix: Array) -> Array:
    """(..., 3, 3) scaled to unit Frobenius norm; the sign stays."""
    return matrix / (matrix**2).sum((-2, -1))[..., None, None] ** 0.5


def essential_from_pose(rotation: Array, translation: Array) -> Array:
    """E of X1 = R X0 + t, unit Frobenius norm. rotation: (..., 3, 3); translation: (..., 3)."""
    return unit_norm(skew(translation) @ _like(rotation, translation))


def fundamental_from_pose(k0: Array, k1: Array, rotation: Array, translation: Array) -> Array:
    """F of X1 = R X0 + t in pixels, unit Frobenius norm. k0, k1, rotation: (..., 3, 3); translation: (..., 3)."""
    inverse = torch.linalg.inv if isinstance(translation, Tensor) else np.linalg.inv
    k0, k1 = _like(k0, translation), _like(k1, translation)
    return unit_norm(inverse(k1).swapaxes(-1, -2) @ essential_from_pose(rotation, translation) @ inverse(k0))


def epipolar_lines(points: Array, fundamental: Array) -> Array:
    """Lines (a, b, c) in view 1, not normalised, of points (..., N, 2) in view 0. Returns (..., N, 3)."""
    matrix = _like(fundamental, points)
    return points @ matrix[..., :2].swapaxes(-1, -2) + matrix[..., None, :, 2]


def line_distance(points: Array, lines: Array) -> Array:
    """Distance of points (..., 2) to lines (..., 3), in the unit of the points."""
    x, y = points[..., 0], points[..., 1]
    a, b, c = lines[..., 0], lines[..., 1], lines[..., 2]
    return abs(a * x + b * y + c) / ((a * a + b * b) ** 0.5).clip(1e-12)


def epipolar_distance(points0: Array, points1: Array, fundamental: Array) -> Array:
    """Distance (..., N) of points1 (..., N, 2) to the epipolar lines of points0 in view 1, pixels.

    For the distance in view 0 swap the points and transpose the matrix.
    """
    return line_distance(points1, epipolar_lines(points0, fundamental))


def line_endpoints(lines: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where lines cross the image, clipped to the centres of its border pixels.

    lines: (..., 3). size: (width, height). Returns ends (..., 2, 2) in pixels, from left to right, and valid (...)
    bool: False where a line misses the image, only touches a corner, or is not a line; its ends are then (0, 0).
    Liang–Barsky rather than the four border intersections: it has no special case at corners or for upright lines.
    """
    normal = lines[..., :2]
    square = normal.square().sum(-1, keepdim=True)
    limit = lines.new_tensor([size[0] - 1, size[1] - 1])
    centre = limit / 2
    offset = (normal * centre).sum(-1, keepdim=True) + lines[..., 2:]
    nearest = centre - normal * offset / square  # the point of the line that is closest to the image centre
    direction = torch.stack((normal[..., 1], -normal[..., 0]), -1) / square.sqrt()
    direction = torch.where(direction[..., :1] < 0, -direction, direction)
    # Parallel to a border gives +-inf, "everywhere" or "nowhere"; on the border itself 0 / 0, which is "everywhere".
    crossings = torch.stack(((0 - nearest) / direction, (limit - nearest) / direction))
    undefined = crossings.isnan()
    enter = crossings.masked_fill(undefined, -torch.inf).amin(0).amax(-1)
    leave = crossings.masked_fill(undefined, torch.inf).amax(0).amin(-1)
    ends = nearest[..., None, :] + torch.stack((enter, leave), -1)[..., None] * direction[..., None, :]
    valid = (leave > enter) & ends.isfinite().all(-1).all(-1)
    return torch.where(valid[..., None, None], ends, 0.0), valid


def points_between(ends: Tensor, count: int) -> Tensor:
    """``count`` evenly spaced points from end to end, both included. ends: (..., 2, 2). Returns (..., count, 2)."""
    t = torch.linspace(0, 1, count, dtype=ends.dtype, device=ends.device)[:, None]
    return ends[..., :1, :] * (1 - t) + ends[..., 1:, :] * t


# -- maps --------------------------------------------------------------------------------------------------------------


def sample_map(
    maps: Tensor,
    points: Tensor,
    stride: int = 4,
    alignment: Alignment = "exact",
    padding: Literal["border", "zeros"] = "border",
) -> Tensor:
    """Bilinear samples of feature maps at pixels of the image; differentiable in both.

    maps: (B, C, h, w) at ``stride`` pixels per cell. points: (B, N, 2) pixels. Returns (B, N, C) float32, or float64
    where the maps are: half precision would move the points.
    exact: pixel x is at index x / stride. legacy: at x w / (W - 1) - 0.5 with W = stride w, which is what the published
    network does (it feeds ``align_corners=True`` coordinates to ``align_corners=False`` sampling, 2 pixels off).
    """
    legacy = alignment == "legacy"
    if padding == "border" and not legacy and _holds_rows(maps):
        return _sample_rows(maps, points.float() / stride)
    h, w = maps.shape[-2:]
    maps = maps if maps.dtype == torch.float64 else maps.float()
    points = points.to(maps.dtype)
    if legacy:
        grid = normalise_points(points, (stride * w, stride * h))
    else:
        x, y = points.unbind(-1)
        grid = torch.stack((x * (2 / (stride * max(w - 1, 1))), y * (2 / (stride * max(h - 1, 1)))), -1) - 1
    samples = F.grid_sample(maps, grid[:, None], mode="bilinear", padding_mode=padding, align_corners=not legacy)
    return samples[:, :, 0].transpose(1, 2)


def _holds_rows(maps: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side on a CPU, for inference.

    Training stays with one way: of two that differ in the last digits, what a batch holds must not choose.
    """
    rows = maps.device.type == "cpu" and maps.is_contiguous(memory_format=torch.channels_last)
    return rows and torch.is_inference_mode_enabled() and maps.dtype != torch.float64


def _sample_rows(maps: Tensor, places: Tensor) -> Tensor:
    """Bilinear samples (B, N, C) float32 at (B, N, 2), x and y in cells: four rows each instead of all channels apart.

    grid_sample goes through a map of 64 channels 64 times, and leaves each descriptor scattered in memory.
    """
    batch, channels, h, w = maps.shape
    x, y = (each.nan_to_num(0).clamp(0, size - 1) for each, size in zip(places.unbind(-1), (w, h), strict=True))
    left, top = x.floor(), y.floor()
    right, bottom = x - left, y - top  # their weights
    first = (h * torch.arange(batch, device=maps.device)[:, None] + top.long()) * w + left.long()
    to_right, to_bottom = (left < w - 1).long(), w * (top < h - 1).long()
    index = torch.stack((first, first + to_right, first + to_bottom, first + to_right + to_bottom), -1).view(-1, 4)
    weights = torch.stack(((1 - right) * (1 - bottom), right * (1 - bottom), (1 - right) * bottom, right * bottom), -1)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    if rows.dtype != torch.float32:  # only those that are needed
        rows = rows.index_select(0, index.flatten()).float()
        index = torch.arange(len(rows)).view(-1, 4)
    samples = F.embedding_bag(index, rows, per_sample_weights=weights.view(-1, 4), mode="sum")
    return samples.view(batch, -1, channels)


# -- cameras -----------------------------------------------------------------------------------------------------------

# Names of sensor_msgs/CameraInfo first, then those that calibration tools and drivers use for the same.
_PINHOLE_MODELS = ("plumb_bob", "rational_polynomial", "radtan", "radial_tangential", "brown_conrady", "rational")
_FISHEYE_MODELS = ("equidistant", "fisheye", "kannala_brandt", "kannala_brandt4")
_PINHOLE_SIZES = (0, 4, 5, 8, 12, 14)  # k1 k2 p1 p2, k3, k4 to k6, thin prism s1 to s4, tilted sensor
_REPROJECTION = 0.1  # pixels: a ray that projects further from its pixel is none; solved ones are within 1e-6
_MOST_REMEMBERED = 32
_USABLE: set[tuple[Any, ...]] = set()
_UNDISTORT_CRITERIA = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-10)  # the default stops after 5 steps
# OpenCV 4.5.4 (Ubuntu 22.04) iterates ten times and takes no criteria for fisheye cameras.
_FISHEYE_OPTIONS: dict[str, Any] = (
    {"criteria": _UNDISTORT_CRITERIA} if "criteria" in (cv2.fisheye.undistortPoints.__doc__ or "") else {}
)


def undistort_points(points: np.ndarray, camera: Camera) -> np.ndarray:
    """Undistorted normalised rays (N, 2) float64, x/z and y/z, of pixels (N, 2).

    Distortion models of sensor_msgs/CameraInfo: plumb_bob, rational_polynomial (also with the coefficients of a thin
    prism and of a tilted sensor, in the order of OpenCV), equidistant (Kannala and Brandt, PAMI 2006), and none ("").
    NaN where a pixel is not finite, or outside of what the model can see. Raises CalibrationError for an unusable
    camera.
    """
    check_camera(camera)
    pixels = np.ascontiguousarray(points, np.float64).reshape(-1, 1, 2)
    if len(pixels) == 0:
        return np.zeros((0, 2))
    fisheye = is_fisheye(camera)
    if not fisheye and not np.any(camera.D):
        rays = (pixels[:, 0] - camera.K[:2, 2]) / (camera.K[0, 0], camera.K[1, 1])
        return np.where(np.isfinite(rays).all(1, keepdims=True), rays, np.nan)
    rays = _undistort_fisheye(pixels, camera) if fisheye else _undistort_pinhole(pixels, camera)
    # The iterations stop somewhere where there is nothing to find, and OpenCV bends wide angles back to 90 degrees.
    error = np.abs(_project(rays, camera, fisheye) - pixels).max(-1, keepdims=True)
    return np.where(error < _REPROJECTION, rays, np.nan).reshape(-1, 2)


def _undistort_fisheye(pixels: np.ndarray, camera: Camera) -> np.ndarray:
    return cv2.fisheye.undistortPoints(pixels, camera.K, camera.D[:4], **_FISHEYE_OPTIONS)


def _undistort_pinhole(pixels: np.ndarray, camera: Camera) -> np.ndarray:
    if hasattr(cv2, "undistortPointsIter"):  # OpenCV 4
        return cv2.undistortPointsIter(pixels, camera.K, camera.D, None, None, _UNDISTORT_CRITERIA)
    return cv2.undistortPoints(pixels, camera.K, camera.D, criteria=_UNDISTORT_CRITERIA)


def project_rays(rays: np.ndarray, camera: Camera) -> np.ndarray:
    """Pixels (N, 2) float64 of undistorted normalised rays (N, 2): the inverse of :func:`undistort_points`.

    A polynomial means nothing outside of what it was fitted to: rays far out of view may land anywhere. NaN and
    infinity stay non-finite. Raises CalibrationError for an unusable camera.
    """
    check_camera(camera)
    if len(rays) == 0:
        return np.zeros((0, 2))
    rays = np.ascontiguousarray(rays, np.float64).reshape(-1, 1, 2)
    return _project(rays, camera, is_fisheye(camera)).reshape(-1, 2)


def _project(rays: np.ndarray, camera: Camera, fisheye: bool) -> np.ndarray:
    """Pixels (N, 1, 2) of rays (N, 1, 2)."""
    points = np.concatenate([rays, np.ones_like(rays[..., :1])], -1)
    if fisheye:
        return cv2.fisheye.projectPoints(points, np.zeros(3), np.zeros(3), camera.K, camera.D[:4])[0].reshape(-1, 1, 2)
    return cv2.projectPoints(points, np.zeros(3), np.zeros(3), camera.K, camera.D)[0]


def is_fisheye(camera: Camera) -> bool:
    """Whether the camera has the distortion of Kannala and Brandt (equidistant)."""
    return _model_name(camera) in _FISHEYE_MODELS


def check_camera(camera: Camera) -> None:
    """Raise CalibrationError where the intrinsics, or a rectification that is given, cannot be used.

    Asked many times a frame, so the numbers of cameras that were found usable are remembered, by their bytes.
    """
    known = (camera.distortion_model, *map(_contents, (camera.K, camera.D, camera.R, camera.P)))
    if known in _USABLE:
        return
    _check_camera(camera)
    if len(_USABLE) >= _MOST_REMEMBERED:
        _USABLE.clear()
    _USABLE.add(known)


def _contents(numbers: Any) -> tuple[Any, ...] | None:
    array = np.asarray(numbers)
    return None if numbers is None else (array.shape, array.dtype.str, array.tobytes())


def _check_camera(camera: Camera) -> None:
    k, d = np.asarray(camera.K), np.asarray(camera.D)
    if k.shape != (3, 3) or not np.isfinite(k).all() or not (k[0, 0] > 0 and k[1, 1] > 0):
        raise CalibrationError(
            f"expected a finite 3x3 K with positive focal lengths, found {k.tolist()}; an uncalibrated camera "
            "publishes zeros: calibrate it, or verify with the fundamental matrix"
        )
    if not np.array_equal(k[2], (0, 0, 1)):
        raise CalibrationError(
            f"expected a K with the last row [0, 0, 1], found {k.tolist()}: give its 9 numbers row by row"
        )
    if not np.isfinite(d).all():
        raise CalibrationError(
            f"expected finite distortion coefficients, found {d.tolist()}; calibrate the camera again"
        )
    if not _distortion_is_known(_model_name(camera), d):
        raise CalibrationError(
            f"distortion model '{camera.distortion_model}' with {d.size} coefficients is not supported; expected "
            "plumb_bob (4 or 5), rational_polynomial (8, 12 or 14), equidistant (4), or none"
        )
    _check_rectification(camera)


def _model_name(camera: Camera) -> str:
    return camera.distortion_model.strip().lower().replace("-", "_").replace(" ", "_")


def _distortion_is_known(model: str, coefficients: np.ndarray) -> bool:
    if model in _FISHEYE_MODELS:  # some drivers append a zero
        return coefficients.size >= 4 and not coefficients[4:].any()
    if model in _PINHOLE_MODELS:
        return coefficients.size in _PINHOLE_SIZES
    return model in ("", "none") and not coefficients.any()


def _check_rectification(camera: Camera) -> None:
    if camera.R is not None:
        r = np.asarray(camera.R)
        if r.shape != (3, 3) or not np.allclose(r @ r.T, np.eye(3), atol=1e-3) or np.linalg.det(r) < 0:
            raise CalibrationError(f"expected R to be a 3x3 rotation, found {r.tolist()}; calibrate the camera again")
    if camera.P is not None:
        p = np.asarray(camera.P)
        if p.shape != (3, 4) or not np.isfinite(p).all() or not (p[0, 0] > 0 and p[1, 1] > 0):
            raise CalibrationError(
                f"expected a finite 3x4 P with positive focal lengths, found {p.tolist()}; calibrate the camera again"
            )


def _like(array: Any, reference: Array) -> Array:
    """``array`` as the kind of array that ``reference`` is (for torch: its device and, if floating, its dtype)."""
    if isinstance(reference, Tensor):
        return torch.as_tensor(array, dtype=reference.dtype, device=reference.device)
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


def seen(points: Tensor, visible: Tensor) -> Tensor:
    """Whether the pixel nearest to each point is in the image and visible, (B, N) bool.

    points: (B, N, 2), pixels. visible: (B, H, W) bool.
    """
    height, width = visible.shape[-2:]
    inside = ((points >= 0) & (points <= points.new_tensor((width - 1, height - 1)))).all(-1)
    pixel = torch.where(inside[..., None], points, 0.0).round().long()
    return inside & visible.flatten(1).gather(1, pixel[..., 1] * width + pixel[..., 0])
