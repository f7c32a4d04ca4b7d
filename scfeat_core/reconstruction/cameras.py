"""Our cameras as COLMAP's. Its pixel (0.5, 0.5) is the centre of the top-left pixel, ours (0, 0).

==============================  ==============  =====================================================
ROS                             COLMAP          parameters
==============================  ==============  =====================================================
no distortion                   PINHOLE         fx fy cx cy
plumb_bob with k3 = 0           OPENCV          fx fy cx cy k1 k2 p1 p2
plumb_bob, rational_polynomial  FULL_OPENCV     fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6
equidistant                     OPENCV_FISHEYE  fx fy cx cy k1 k2 k3 k4
==============================  ==============  =====================================================

COLMAP has neither skew, nor the thin prism and the tilted sensor of OpenCV: such a calibration is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import CalibrationError, DataError, ScfeatError
from scfeat_core.geometry import check_camera, is_fisheye
from scfeat_core.types import Camera

PIXEL_ORIGIN = 0.5  # COLMAP's coordinate of the centre of the first pixel
FOCAL_FACTOR = 1.2  # of the longer side: the guess of COLMAP where nothing is known
_GUESS = "SIMPLE_RADIAL"

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ColmapCamera:
    """A camera in COLMAP's terms. size: (width, height).

    calibration: what it was made from, kept fixed; None for a guess that bundle adjustment refines.
    prior: whether the focal length is known, from a calibration or from EXIF data.
    """

    model: str
    size: Size
    params: tuple[float, ...]
    calibration: Camera | None = None
    prior: bool = False


@dataclass(frozen=True, eq=False)
class Cameras:
    """Which camera took which image. of_image: name of an image -> index into ``cameras``."""

    cameras: tuple[ColmapCamera, ...]
    of_image: Mapping[str, int]

    def of(self, name: str) -> ColmapCamera:
        return self.cameras[self.of_image[name]]

    def calibrations(self, name0: str, name1: str) -> tuple[Camera, Camera] | None:
        """Of both images, or None where one of them is not calibrated."""
        first, second = self.of(name0).calibration, self.of(name1).calibration
        return None if first is None or second is None else (first, second)


def require_pycolmap() -> Any:
    """The module pycolmap. Raises ScfeatError with the fix where it is not installed."""
    try:
        import pycolmap
    except ImportError as error:
        raise ScfeatError(
            "COLMAP databases and reconstruction need pycolmap, which is not installed: "
            "pip install 'scfeat-python[reconstruct]'"
        ) from error
    return pycolmap


# -- one camera --------------------------------------------------------------------------------------------------------


def calibrated(camera: Camera) -> ColmapCamera:
    """A calibrated camera. Raises CalibrationError where COLMAP has no model for it."""
    check_camera(camera)
    k = np.asarray(camera.K, np.float64)
    d = np.asarray(camera.D, np.float64).ravel()
    if abs(k[0, 1]) > 1e-6 * k[0, 0]:
        raise CalibrationError(f"expected a K without skew, which COLMAP does not have, found {k.tolist()}")
    model, coefficients = _distortion(camera, d)
    centre = (k[0, 2] + PIXEL_ORIGIN, k[1, 2] + PIXEL_ORIGIN)
    params = tuple(float(x) for x in (k[0, 0], k[1, 1], *centre, *coefficients))
    return ColmapCamera(model, camera.size, params, camera, prior=True)


def _distortion(camera: Camera, d: np.ndarray) -> tuple[str, np.ndarray]:
    if is_fisheye(camera):
        return "OPENCV_FISHEYE", d[:4]
    if not d.any():
        return "PINHOLE", d[:0]
    if d[8:].any():
        raise CalibrationError(
            f"expected a distortion of at most 8 coefficients, as COLMAP has it, found {d.size} with a thin prism or a "
            "tilted sensor; undistort the images, or calibrate without them"
        )
    if not d[4:].any():
        return "OPENCV", d[:4]
    return "FULL_OPENCV", np.pad(d[:8], (0, 8 - len(d[:8])))


def guessed(size: Size) -> ColmapCamera:
    """What is assumed of an unknown camera until bundle adjustment knows better."""
    params = (FOCAL_FACTOR * max(size), size[0] / 2, size[1] / 2, 0.0)
    return ColmapCamera(_GUESS, size, params)


def guessed_of_file(path: Path, size: Size) -> ColmapCamera:
    """The same with the focal length of the EXIF data of the file, where it has them."""
    camera = require_pycolmap().infer_camera_from_image(path, {"camera_model": _GUESS})
    if not camera.has_prior_focal_length or (camera.width, camera.height) != size:
        return guessed(size)
    return ColmapCamera(_GUESS, size, tuple(float(x) for x in camera.params), prior=True)


# -- the cameras of images ---------------------------------------------------------------------------------------------


def one_camera(sizes: Mapping[str, Size], camera: ColmapCamera) -> Cameras:
    """All images from one camera. Raises DataError where one has another size."""
    for name, size in sizes.items():
        if size != camera.size:
            raise DataError(
                f"expected all images of {camera.size[0]}x{camera.size[1]} pixels, as they share one camera, found "
                f"'{name}' of {size[0]}x{size[1]}; give the calibration of these images, or --camera each"
            )
    return Cameras((camera,), dict.fromkeys(sizes, 0))


def own_cameras(cameras: Mapping[str, ColmapCamera]) -> Cameras:
    """A camera for each image, calibrated ones of equal parameters once."""
    kept: list[ColmapCamera] = []
    known: dict[tuple[Any, ...], int] = {}
    of_image = {}
    for name, camera in cameras.items():
        key = (camera.model, camera.size, camera.params) if camera.calibration is not None else (name,)
        if key not in known:
            known[key] = len(kept)
            kept.append(camera)
        of_image[name] = known[key]
    return Cameras(tuple(kept), of_image)


def check_sizes(sizes: Mapping[str, Size], calibrations: Mapping[str, Camera]) -> None:
    """Raise DataError where an image is of another size than its calibration."""
    for name, camera in calibrations.items():
        if sizes[name] != camera.size:
            raise DataError(f"expected '{name}' of {camera.size} pixels, as it was calibrated, found {sizes[name]}")


def shared_guess(sizes: Mapping[str, Size]) -> Cameras:
    """One unknown camera for all images. Raises DataError where their sizes differ."""
    return one_camera(sizes, guessed(next(iter(sizes.values()))))
