"""What travels between the stages: frozen dataclasses, structure of arrays.

Pixel coordinates everywhere: (0, 0) is the *centre* of the top-left pixel, x right, y down.
Between two views, view 0 is the older (or left) one and ``x1' M x0 = 0``; ``F`` and ``E`` have unit Frobenius norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor; numpy once a result has left the device


def _to_numpy(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Features:
    """Local features of one image, best first.

    keypoints: (N, 2) float32, pixels of the image that was given.
    scores: (N,) float32, detector score, descending.
    descriptors: (N, D) float32, unit rows.
    image_size: (width, height) of that image.
    descriptor_space: descriptors are comparable only where this is equal (weights and preprocessing).
    """

    keypoints: Array
    scores: Array
    descriptors: Array
    image_size: tuple[int, int]
    descriptor_space: str = ""

    def __len__(self) -> int:
        return len(self.keypoints)

    def numpy(self) -> Features:
        """The same features as numpy arrays (one copy from the device where they are not yet)."""
        return replace(
            self,
            keypoints=_to_numpy(self.keypoints),
            scores=_to_numpy(self.scores),
            descriptors=_to_numpy(self.descriptors),
        )


@dataclass(frozen=True, eq=False)
class Matches:
    """Correspondences between the features of two views.

    indices0, indices1: (M,) int64 into the features of view 0 and of view 1.
    scores: (M,) float32, cosine similarity of the two descriptors.
    """

    indices0: Array
    indices1: Array
    scores: Array

    def __len__(self) -> int:
        return len(self.indices0)

    def numpy(self) -> Matches:
        return Matches(_to_numpy(self.indices0), _to_numpy(self.indices1), _to_numpy(self.scores))


class GeometryModel(IntEnum):
    """The values of ``TwoViewGeometry.model`` on the wire."""

    NONE = 0
    FUNDAMENTAL = 1
    ESSENTIAL = 2
    HOMOGRAPHY = 3


@dataclass(frozen=True, eq=False)
class TwoViewGeometry:
    """The two-view model that verified a set of matches.

    matrix: (3, 3) float64. FUNDAMENTAL and HOMOGRAPHY act on pixels, ESSENTIAL on normalised rays.
    inliers: (M,) bool, parallel to the matches. All False where model is NONE.
    threshold: inlier threshold in pixels.
    """

    model: GeometryModel
    matrix: np.ndarray
    inliers: np.ndarray
    threshold: float

    @property
    def num_inliers(self) -> int:
        return int(self.inliers.sum())


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole intrinsics with a ROS distortion model (sensor_msgs/CameraInfo).

    K: (3, 3) float64, pixels. D: (n,) float64. size: (width, height) pixels.
    """

    K: np.ndarray
    D: np.ndarray
    size: tuple[int, int]
    distortion_model: str = "plumb_bob"


@dataclass(frozen=True, eq=False)
class PairResult:
    """Matches of a frame (view 1) to the previous frame of the same camera (view 0).

    keypoints0, keypoints1: (M, 2) float32 pixels, the matched points themselves.
    geometry is None where verification is switched off.
    """

    sequence0: int
    stamp0: int
    matches: Matches
    keypoints0: np.ndarray
    keypoints1: np.ndarray
    geometry: TwoViewGeometry | None


@dataclass(frozen=True, eq=False)
class FrameResult:
    """Everything the front end has to say about one image.

    sequence: counter of processed frames of this camera, from 0 and over resets. stamp: nanoseconds, of the image.
    pair: None on the first frame of a camera, after a reset, and where matching was not asked for.
    timings: stage name -> milliseconds (preprocess, network, select, match, verify).
    reset_reason: why the previous frame was forgotten, where this one could have had a predecessor; else empty.
    """

    camera: str
    sequence: int
    stamp: int
    features: Features
    pair: PairResult | None
    timings: dict[str, float] = field(default_factory=dict)
    reset_reason: str = ""
