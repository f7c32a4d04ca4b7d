"""Matching of the two views of a calibrated stereo rig: along epipolar lines, with positive disparity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scfeat_core import matching
from scfeat_core.errors import CalibrationError
from scfeat_core.geometry import check_camera, essential_from_pose, undistort_points
from scfeat_core.matching import Gate
from scfeat_core.types import Array, Camera, Features, Matches


def match_stereo(
    features0: Features,
    features1: Features,
    camera0: Camera,
    camera1: Camera,
    *,
    gate: float = 2.0,
    min_cosine: float = -1.0,
    max_ratio: float | None = None,
) -> Matches:
    """Mutual nearest neighbours among the pairs that one point in front of both cameras can make.

    Features of the left (0) and the right image (1) of the same instant. camera0, camera1: with R and P, as a stereo
    calibration gives them; raw images with any distortion model of :func:`undistort_points`, or rectified ones (then K
    is the left part of P, without distortion, and R = I). No image is warped. gate: pixels of the rectified left image;
    a pair is allowed where its rows differ by no more, and the point in the right image lies no further than this to
    the right of the one in the left (points at infinity have disparity 0). The rest as in ``match_descriptors``.

    Raises CalibrationError where the cameras are no horizontal stereo rig, left first, and FeatureError for descriptors
    that are not comparable.
    """
    check_rig(camera0, camera1)
    scale = focal_lengths(camera0)
    places0, places1 = (
        _like(rectified_rays(features.keypoints, camera) * scale, features.descriptors)
        for features, camera in ((features0, camera0), (features1, camera1))
    )
    allowed = epipolar_gate(places0, places1, gate)
    return matching.match(features0, features1, min_cosine=min_cosine, max_ratio=max_ratio, gate=allowed)


def epipolar_gate(places0: Tensor, places1: Tensor, gate: float) -> Gate:
    """Allows pairs with the same row, and with a disparity that is not negative, both within ``gate``.

    places0: (N0, 2), places1: (N1, 2), rectified positions in one unit and from one origin. What is not finite matches
    nothing.
    """

    def allowed(rows: slice) -> Tensor:
        disparity, height = places0[rows, :1] - places1[:, 0], places0[rows, 1:] - places1[:, 1]
        return (height.abs_() <= gate) & (disparity >= -gate)

    return allowed


def rectified_rays(points: Array, camera: Camera) -> np.ndarray:
    """Rays (N, 2) float64, x/z and y/z in the rectified frame, of pixels (N, 2) of the image as it is.

    Not finite where the distortion model cannot see, or where a ray does not point forward in the rectified frame.
    """
    pixels = points if isinstance(points, np.ndarray) else points.detach().cpu().numpy()
    rays = undistort_points(pixels, camera)
    rotated = np.column_stack([rays, np.ones(len(rays))]) @ _rectification(camera).T
    return np.where(rotated[:, 2:] > 1e-9, rotated[:, :2] / np.maximum(rotated[:, 2:], 1e-9), np.nan)


def focal_lengths(camera: Camera) -> np.ndarray:
    """(2,) float64, fx and fy of the rectified image, pixels."""
    return np.diag(_projection(camera))[:2]


def baseline(camera0: Camera, camera1: Camera) -> float:
    """How far camera 1 is to the right of camera 0, in the unit of P (metres); negative to the left.

    P[0, 3] = -fx B of a camera that is B to the right of the origin of the rig (sensor_msgs/CameraInfo).
    """
    offsets = [-_projection(camera)[0, 3] / focal_lengths(camera)[0] for camera in (camera0, camera1)]
    return float(offsets[1] - offsets[0])


def essential_matrix(camera0: Camera, camera1: Camera) -> np.ndarray:
    """(3, 3) float64, unit norm: x1' E x0 = 0 for undistorted rays of the two images as they are, not rectified."""
    back = _rectification(camera1).T
    return essential_from_pose(back @ _rectification(camera0), -back @ [baseline(camera0, camera1), 0.0, 0.0])


def check_rig(camera0: Camera, camera1: Camera) -> None:
    """Raise CalibrationError where the two are no horizontal stereo rig with the left camera first."""
    for name, camera in (("left", camera0), ("right", camera1)):
        check_camera(camera)
        if camera.R is None or camera.P is None:
            missing = " and ".join(key for key in ("R", "P") if getattr(camera, key) is None)
            raise CalibrationError(
                f"expected R and P of the {name} camera for stereo matching, found no {missing}: calibrate both "
                "cameras together and publish what comes out, or name no stereo pair"
            )
    distance = baseline(camera0, camera1)
    vertical = abs(_vertical_offset(camera1) - _vertical_offset(camera0))
    if vertical > abs(distance):
        raise CalibrationError(
            f"expected cameras side by side (P[0, 3] = -fx * baseline), found them {vertical:.3g} above each other "
            "(P[1, 3]); only horizontal rigs can be matched"
        )
    if distance == 0:
        raise CalibrationError(
            "expected a baseline between the two cameras, found P[0, 3] / P[0, 0] equal in both: that is a calibration "
            "of single cameras; calibrate them together, so that the right one has P[0, 3] = -fx * baseline"
        )
    if distance < 0:
        raise CalibrationError(
            f"expected the left camera first, found the second one {-distance:.3g} to the left of it (P[0, 3]); "
            "swap them"
        )


def _vertical_offset(camera: Camera) -> float:
    return float(-_projection(camera)[1, 3] / focal_lengths(camera)[1])


def _rectification(camera: Camera) -> np.ndarray:
    return np.asarray(camera.R, np.float64)


def _projection(camera: Camera) -> np.ndarray:
    return np.asarray(camera.P, np.float64)


def _like(places: np.ndarray, descriptors: Array) -> Tensor:
    device = descriptors.device if isinstance(descriptors, Tensor) else "cpu"
    return torch.from_numpy(places).to(device, torch.float32)
