"""sensor_msgs/CameraInfo to a Camera, without ROS: for any object with the fields of the message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scfeat_core.errors import CalibrationError
from scfeat_core.geometry import check_camera
from scfeat_core.types import Camera


class Calibrations:
    """The calibration of one camera, image by image, made again only where the message or the size is another one.

    complain(text): told about a message that cannot be used; the images are then processed without a calibration.
    refused: why the newest message, which was there, was not used.
    """

    def __init__(self, complain: Callable[[str], None]) -> None:
        self._complain = complain
        self.reset()

    def reset(self) -> None:
        """The next message is read anew."""
        self.refused = ""
        self._made: tuple[Any, tuple[int, int]] | None = None  # what the calibration was made of
        self._camera: Camera | None = None

    def __call__(self, message: Any, image_size: tuple[int, int], rectified: bool) -> Camera | None:
        """message: the newest sensor_msgs/CameraInfo, None without one. image_size: (width, height)."""
        if message is None:
            return None
        if self._made is not None and message is self._made[0] and image_size == self._made[1]:
            return self._camera
        self._made = message, image_size
        try:
            self._camera = camera_from_message(message, image_size, rectified)
            self.refused = ""
        except CalibrationError as error:
            self._camera = None
            self.refused = f"camera_info not used: {error}"
            self._complain(self.refused)
        return self._camera


def rectified_camera(camera: Camera) -> Camera:
    """The camera of the rectified images of this one. Raises CalibrationError where its P is not known."""
    if camera.P is None:
        raise CalibrationError(
            "expected a calibration with a projection matrix P for rectified images, found one without: give the "
            "CameraInfo of the rectified camera, or say rectified=false"
        )
    rectified = Camera(camera.P[:, :3], np.zeros(0), camera.size, "plumb_bob", np.eye(3), camera.P)
    check_camera(rectified)
    return rectified


def camera_from_message(message: Any, image_size: tuple[int, int], rectified: bool = False) -> Camera:
    """The intrinsics of a camera: K and D, or for rectified images P and no distortion.

    R and P go with them, for stereo; R of rectified images is the identity. Both are None where R or P is all zeros,
    as drivers of single cameras leave them. image_size: (width, height) of the images that it is meant for.

    K and P of the message are those of the full resolution. Where the image is what the message's region of interest
    and binning leave of it, they are shifted and scaled to its pixels; a binned pixel has its centre in the middle of
    those that it combines, and what is left over at the edge belongs to no pixel.

    Raises CalibrationError where the camera is not calibrated (zeros, by the convention of sensor_msgs), where a value
    is not finite, or where the size is another one.
    """
    window = _window(message, image_size)
    rotation, projection = np.array(message.r, np.float64).reshape(3, 3), np.array(message.p, np.float64).reshape(3, 4)
    if rectified:
        intrinsics, distortion, model, rotation = projection[:, :3], np.zeros(0), "plumb_bob", np.eye(3)
    else:
        intrinsics = np.array(message.k, np.float64).reshape(3, 3)
        distortion, model = np.array(message.d, np.float64), message.distortion_model
    if window is not None:
        intrinsics, projection = window @ intrinsics, window @ projection
    stereo = (rotation, projection) if rotation.any() and projection.any() else (None, None)
    camera = Camera(intrinsics, distortion, image_size, model, *stereo)
    check_camera(camera)
    return camera


def _window(message: Any, image_size: tuple[int, int]) -> np.ndarray | None:
    """(3, 3) float64: pixels of the full resolution to those of an image of (width, height); None for the same ones.

    The region of interest is in pixels of the full resolution (sensor_msgs/CameraInfo), and is cut out first. Raises
    CalibrationError where that and binning do not give an image of this size.
    """
    full, roi = (message.width, message.height), message.roi
    if full in (image_size, (0, 0)):
        return None
    cut = roi.width > 0 and roi.height > 0
    offset, size = ((roi.x_offset, roi.y_offset), (roi.width, roi.height)) if cut else ((0, 0), full)
    binning = (max(message.binning_x, 1), max(message.binning_y, 1))
    result = (size[0] // binning[0], size[1] // binning[1])
    if result != image_size:
        steps = f" with roi {_by(size)} and binning {_by(binning)}, which gives {_by(result)}"
        raise CalibrationError(
            f"expected the calibration of images of {_by(image_size)}, found one for {_by(full)}"
            f"{steps if result != full else ''}: remap "
            "camera_info to the topic that belongs to the image"
        )
    if offset[0] + size[0] > full[0] or offset[1] + size[1] > full[1]:
        raise CalibrationError(
            f"expected a region of interest within {_by(full)}, found {_by(size)} at {offset}, which reaches beyond "
            "it: mend roi in the CameraInfo of the driver"
        )
    (x, y), (by_x, by_y) = offset, binning
    return np.array(
        [[1 / by_x, 0, (0.5 - x) / by_x - 0.5], [0, 1 / by_y, (0.5 - y) / by_y - 0.5], [0, 0, 1]], np.float64
    )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
