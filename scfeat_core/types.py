"""What travels between the stages: frozen dataclasses, structure of arrays.

Pixel coordinates everywhere: (0, 0) is the *centre* of the top-left pixel, x right, y down.
Between two views, view 0 is the older (or left) one and ``x1' M x0 = 0``; ``F`` and ``E`` have unit Frobenius norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
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
    score_map: (h, w) float32, detector scores all over the image, of any size; None unless it was asked for.
    """

    keypoints: Array
    scores: Array
    descriptors: Array
    image_size: tuple[int, int]
    descriptor_space: str = ""
    score_map: Array | None = None

    def __len__(self) -> int:
        return len(self.keypoints)

    def numpy(self) -> Features:
        """The same features as numpy arrays (one copy from the device where they are not yet)."""
        return replace(
            self,
            keypoints=_to_numpy(self.keypoints),
            scores=_to_numpy(self.scores),
            descriptors=_to_numpy(self.descriptors),
            score_map=None if self.score_map is None else _to_numpy(self.score_map),
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

    matrix: (3, 3) float64. FUNDAMENTAL and HOMOGRAPHY act on pixels, ESSENTIAL on normalised rays; with calibrations,
    HOMOGRAPHY acts on pixels without distortion (K times the undistorted ray).
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
    R: (3, 3) float64, rotates rays of the camera into its rectified frame, and P: (3, 4) float64, projects those to
    rectified pixels; both as in CameraInfo, None where they are not known.
    """

    K: np.ndarray
    D: np.ndarray
    size: tuple[int, int]
    distortion_model: str = "plumb_bob"
    R: np.ndarray | None = None
    P: np.ndarray | None = None


class MatchKind(IntEnum):
    """The values of ``Matches.kind`` on the wire."""

    TEMPORAL = 0
    STEREO = 1
    KEYFRAME = 2


@dataclass(frozen=True, eq=False)
class PairResult:
    """Matches of a frame (view 1) to the previous frame of the same camera, or to the left one (view 0).

    keypoints0, keypoints1: (M, 2) float32 pixels, the matched points themselves.
    geometry is None where verification is switched off. camera0: name of the camera of view 0.
    """

    sequence0: int
    stamp0: int
    matches: Matches
    keypoints0: np.ndarray
    keypoints1: np.ndarray
    geometry: TwoViewGeometry | None
    kind: MatchKind = MatchKind.TEMPORAL
    camera0: str = ""


class TrackFlag(IntFlag):
    """The bits of ``Tracks.flags`` on the wire."""

    NEW = 1
    REIDENTIFIED = 2
    FLOW = 4


@dataclass(frozen=True, eq=False)
class Tracks:
    """Points followed over frames, those seen in one frame (T of them), by ascending ids.

    ids: (T,) uint32, from 1, never reused within a run. ages: (T,) uint32, frames in which the track was observed.
    indices: (T,) int64, into the features of the frame. keypoints: (T, 2) float32, pixels.
    rays: (T, 2) float32, undistorted, normalised (z = 1), NaN where the distortion model cannot see; None without
    calibration. velocities: (T, 2) float32, of the rays, per second, since the track was last seen; 0 where it is new
    or a ray is not known; None without calibration and on the first frame of a camera. flags: (T,) uint8, of TrackFlag.
    lost_ids: (L,) uint32, tracks that ended with this frame: they do not come back. epoch: grows where 32 bits of ids
    were used up and they begin at 1 again; (epoch, id) is never reused.
    """

    ids: np.ndarray
    ages: np.ndarray
    indices: np.ndarray
    keypoints: np.ndarray
    rays: np.ndarray | None
    velocities: np.ndarray | None
    flags: np.ndarray
    lost_ids: np.ndarray
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImageQuality:
    """Whether an image can have good features at all.

    mean: 0 to 1. dark, saturated: shares of the pixels at the ends of the range. sharpness: see quality.py.
    """

    mean: float
    dark: float
    saturated: float
    sharpness: float


@dataclass(frozen=True, eq=False)
class FrameInput:
    """One image on its way into the front end.

    image, mask: as Extractor takes them. stamp: nanoseconds. calibration: None where the camera is not calibrated.
    rotation: (3, 3) float64, takes rays of the camera at its previous processed frame to rays at this one (from a
    gyroscope); None where that is not known. match, track, assess: False spares work that nobody asks for.
    score_map: True keeps the scores of the detector in ``FrameResult.features``.
    """

    image: Array
    stamp: int
    camera: str = "camera"
    calibration: Camera | None = None
    mask: Array | None = None
    rotation: np.ndarray | None = None
    match: bool = True
    track: bool = True
    assess: bool = True
    score_map: bool = False


@dataclass(frozen=True, eq=False)
class FrameResult:
    """Everything the front end has to say about one image.

    sequence: counter of processed frames of this camera, from 0 and over resets. stamp: nanoseconds, of the image.
    pair: None on the first frame of a camera, after a reset, and where neither matches nor tracks were asked for.
    tracks, quality: None where they were not asked for. timings: stage name -> milliseconds (preprocess, network,
    select, match, verify, track, assess); of a batch, each frame has its share of what was done for all at once.
    reset_reason: why the previous frame was forgotten, where this one could have had a predecessor; else empty.
    """

    camera: str
    sequence: int
    stamp: int
    features: Features
    pair: PairResult | None
    timings: dict[str, float] = field(default_factory=dict)
    reset_reason: str = ""
    tracks: Tracks | None = None
    quality: ImageQuality | None = None
